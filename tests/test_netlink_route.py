"""VIPs made local: addresses of a device, or local routes. ip(8) is the judge."""

import errno
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane import netlink_route
from dataplane.errors import KernelError, PreflightError
from dataplane.model import Address, parse_address
from dataplane.netlink_route import (
    ALIAS,
    DEVICE,
    GROUPS,
    Owner,
    VipBinding,
    VipDevice,
    VipRoutes,
    addresses_by_link,
    link_by_name,
    links_with_address,
    open_binding,
)
from dataplane.netlink_socket import HEADER, NETLINK_ROUTE, NetlinkSocket
from tests.netns import NetNs

WEB, WEB6, DNS = map(parse_address, ("10.0.1.175", "fd00:1::175", "10.0.1.10"))


# ---------------------------------------------------------------------------------------------------------- pure


def messages(kind: int, flags: int, body: bytes, tail: bytes, addresses: list[Address]) -> bytes:
    return b"".join(netlink_route._messages(kind, flags, body, (2, 1), tail, addresses))


def test_an_address_message_byte_for_byte() -> None:
    body = netlink_route._IFADDR.pack(10, 128, netlink_route.IFA_F_NODAD, 0, 7)
    assert messages(20, 0x600, body, b"", [WEB6]).hex(" ", 4).split() == [
        *("40000000", "14000106", "00000000", "00000000"),  # 64 bytes, RTM_NEWADDR, REQUEST | CREATE | EXCL
        *("0a800200", "07000000"),  # ifaddrmsg: AF_INET6, /128, IFA_F_NODAD, scope universe, interface 7
        *("14000200", "fd000001", "00000000", "00000000", "00000175"),  # IFA_LOCAL
        *("14000100", "fd000001", "00000000", "00000000", "00000175"),  # IFA_ADDRESS
    ]


@given(st.lists(st.binary(min_size=4, max_size=4), min_size=1, max_size=200))
def test_groups_are_the_same_bytes_as_single_messages(values: list[bytes]) -> None:
    addresses = [Address(value) for value in values]
    body = netlink_route._IFADDR.pack(2, 32, 0, 0, 7)
    single = b"".join(messages(20, 0, body, b"tail", [address]) for address in addresses)
    assert messages(20, 0, body, b"tail", addresses) == single


def test_commands_are_ip_batch_text() -> None:
    with NetlinkSocket(NETLINK_ROUTE) as sock:
        device, routes = open_binding(sock, "device"), open_binding(sock, "routes")
        with pytest.raises(ValueError, match="device or routes"):
            open_binding(sock, "magic")
    assert device.commands([WEB6, WEB], [DNS]).splitlines() == [
        "address add 10.0.1.175/32 dev kube-ipvs0",
        "address add fd00:1::175/128 dev kube-ipvs0 nodad",
        "address delete 10.0.1.10/32 dev kube-ipvs0",
    ]
    assert routes.commands([WEB], [DNS]).splitlines() == [
        "route add local 10.0.1.175/32 dev lo table local protocol 86",
        "route delete local 10.0.1.10/32 dev lo table local protocol 86",
    ]


# -------------------------------------------------------------------------------------------------------- kernel


@pytest.fixture
def sock(netns: NetNs) -> Iterator[NetlinkSocket]:
    with netns.enter(), NetlinkSocket(NETLINK_ROUTE) as opened:
        yield opened


@pytest.fixture
def device(netns: NetNs, sock: NetlinkSocket) -> VipDevice:
    """kube-ipvs0 of a kind that every kernel has."""
    netns.ip(f"link add {DEVICE} type bridge", f"link set {DEVICE} alias {ALIAS}")
    return VipDevice(sock)


@pytest.fixture(params=["device", "routes"])
def binding(request: pytest.FixtureRequest, netns: NetNs, sock: NetlinkSocket) -> VipBinding:
    """Both ways to bind."""
    if request.param == "device":
        made: VipDevice = request.getfixturevalue("device")
        return made
    return VipRoutes(sock)


def shown(netns: NetNs, *command: str) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = json.loads(netns.run("ip", "-j", *command).stdout or "[]")
    return told


@pytest.mark.root
def test_bound_addresses_are_local(netns: NetNs, binding: VipBinding) -> None:
    assert binding.ensure() is False
    assert binding.exists()
    assert binding.bound() == set()
    assert binding.bind([WEB, WEB6, DNS]) == []
    assert binding.bound() == {WEB, WEB6, DNS}
    assert "local 10.0.1.175" in netns.run("ip", "route", "get", "10.0.1.175").stdout
    assert "local fd00:1::175" in netns.run("ip", "route", "get", "fd00:1::175").stdout
    assert binding.unbind([DNS, WEB6]) == []
    assert binding.bound() == {WEB}
    binding.remove()
    assert "local" not in netns.run("ip", "route", "get", "10.0.1.175", check=False).stdout
    binding.remove()


@pytest.mark.root
def test_doing_it_twice_is_fine(binding: VipBinding) -> None:
    for _ in range(2):
        assert binding.bind([WEB, WEB6]) == []
        assert binding.bound() == {WEB, WEB6}
    for _ in range(2):
        assert binding.unbind([WEB, WEB6]) == []
        assert binding.bound() == set()


@pytest.mark.root
def test_ten_thousand(binding: VipBinding) -> None:
    many = {Address((0x0A600000 + n).to_bytes(4)) for n in range(10_000)}
    many |= {Address(WEB6[:14] + n.to_bytes(2)) for n in range(500)}
    assert binding.bind(many) == []
    assert binding.bound() == many
    gone = set(sorted(many)[::2])
    assert binding.unbind(gone) == []
    assert binding.bound() == many - gone


@pytest.mark.root
def test_a_refused_address_is_named(netns: NetNs, binding: VipBinding) -> None:
    netns.sysctl("ipv6.conf.all.disable_ipv6", 1)
    bad = WEB6 if isinstance(binding, VipDevice) else Address(bytes(16))  # no IPv6 there; ::/128 is no local route
    (refused,) = binding.bind([WEB, bad])
    assert str(refused.error).startswith("bind ")
    assert refused.error.errno
    assert refused.address == bad
    assert binding.bound() == {WEB}


@pytest.mark.root
def test_what_ip_makes_of_the_printed_commands_is_the_same(netns: NetNs, binding: VipBinding) -> None:
    binding.bind([WEB, WEB6])
    show = ("address", "show", "dev", DEVICE) if isinstance(binding, VipDevice) else ("route", "show", "table", "local")
    ours = shown(netns, *show) + shown(netns, "-6", *show)
    netns.ip(*binding.commands([], [WEB, WEB6]).splitlines())
    assert binding.bound() == set()
    netns.ip(*binding.commands([WEB, WEB6], []).splitlines())
    assert shown(netns, *show) + shown(netns, "-6", *show) == ours
    assert binding.bound() == {WEB, WEB6}


@pytest.mark.root
def test_other_routes_and_addresses_are_not_ours(netns: NetNs, sock: NetlinkSocket, device: VipDevice) -> None:
    netns.ip("address add 10.0.1.10/32 dev lo", f"route add local {'10.0.1.175/32'} dev lo table local")
    routes = VipRoutes(sock)
    assert routes.bound() == set()
    assert routes.unbind([WEB]) == []  # there is no such route of ours
    assert "local 10.0.1.175" in netns.run("ip", "route", "get", "10.0.1.175").stdout
    assert device.bound() == set()
    device.unbind([DNS])
    assert links_with_address(sock, DNS) == ("lo",)


@pytest.mark.root
def test_link_local_addresses_of_the_device_are_not_ours(netns: NetNs, device: VipDevice) -> None:
    netns.ip(f"link set {DEVICE} up", f"address add fe80::1/64 dev {DEVICE} nodad")
    device.bind([WEB6])
    assert device.bound() == {WEB6}


@pytest.mark.root
def test_a_device_without_our_mark_is_left_alone(netns: NetNs, sock: NetlinkSocket) -> None:
    netns.ip(f"link add {DEVICE} type bridge", f"address add 10.9.9.9/32 dev {DEVICE}")
    device = VipDevice(sock)
    assert device.owner() is Owner.FOREIGN
    assert not device.exists()
    with pytest.raises(PreflightError, match="not ours"):
        device.ensure()
    for change in (device.bind, device.unbind):
        with pytest.raises(KernelError, match="the device is not ours"):
            change([parse_address("10.9.9.9")])
    device.remove()
    assert device.bound() == {parse_address("10.9.9.9")}
    taker = VipDevice(sock, take_over=True)
    assert taker.ensure()
    assert taker.owner() is Owner.OURS
    assert not taker.ensure()
    assert device.unbind([parse_address("10.9.9.9")]) == []
    assert shown(netns, "link", "show", DEVICE)[0]["ifalias"] == ALIAS


@pytest.mark.root
def test_a_device_that_is_gone_is_named(sock: NetlinkSocket) -> None:
    device = VipDevice(sock)
    assert device.owner() is Owner.ABSENT
    for call in (device.bound, lambda: device.bind([WEB])):
        with pytest.raises(KernelError, match=DEVICE) as caught:
            call()
        assert caught.value.errno == errno.ENODEV
    assert link_by_name(sock, "nothing0") is None


@pytest.mark.root
def test_a_device_that_came_back_has_another_index(netns: NetNs, device: VipDevice) -> None:
    device.bind([WEB])
    netns.ip(f"link delete {DEVICE}", "link add d0 type bridge", f"link add {DEVICE} type bridge")
    netns.ip(f"link set {DEVICE} alias {ALIAS}")
    assert device.bound() == set()
    assert device.bind([WEB]) == []
    assert device.bound() == {WEB}


@pytest.mark.root
def test_only_other_peoples_changes_are_news(netns: NetNs, sock: NetlinkSocket, binding: VipBinding) -> None:
    binding.bind([DNS])
    with NetlinkSocket(NETLINK_ROUTE, groups=GROUPS) as news:

        def touched() -> bool:
            notes, lost = news.notifications()
            assert not lost
            return any(HEADER.unpack_from(note)[4] != sock.port and binding.concerns(note) for note in notes)

        binding.bind([WEB])
        netns.ip("address add 10.3.3.3/32 dev lo", "link add d1 type bridge")
        assert not touched()
        netns.ip(*binding.commands([], [WEB]).splitlines())
        assert touched()
        assert not touched()
        if isinstance(binding, VipDevice):
            netns.ip(f"link set {DEVICE} up")
            assert touched()
            netns.ip(f"link delete {DEVICE}")
            assert touched()


@pytest.mark.root
def test_addresses_by_link(netns: NetNs, sock: NetlinkSocket, device: VipDevice) -> None:
    netns.ip("link add veth0 type veth peer name veth1", "address add 10.0.1.10 peer 10.0.1.11 dev veth0")
    netns.ip("address add 10.0.1.10/24 dev veth1", "address add fd00::9 peer fd00::8 dev veth1")
    device.bind([WEB, WEB6])
    assert links_with_address(sock, DNS) == ("veth0", "veth1")
    assert links_with_address(sock, WEB) == ()
    assert links_with_address(sock, WEB, except_of=()) == (DEVICE,)
    found = addresses_by_link(sock)
    assert found[parse_address("127.0.0.1")] == ("lo",)
    assert found[parse_address("fd00::9")] == ("veth1",)
    assert parse_address("10.0.1.11") not in found


@pytest.mark.ipvs
def test_the_dummy_device(netns: NetNs) -> None:
    """As the classic tutorial shows it: DOWN, NOARP, and its addresses are local all the same."""
    with netns.enter(), NetlinkSocket(NETLINK_ROUTE) as sock:
        device = VipDevice(sock)
        assert device.ensure()
        assert not device.ensure()
        assert device.bind([WEB, WEB6]) == []
        (link,) = shown(netns, "-d", "link", "show", DEVICE)
        assert link["linkinfo"]["info_kind"] == "dummy"
        assert link["ifalias"] == ALIAS
        assert link["operstate"] == "DOWN"
        assert "NOARP" in link["flags"]
        assert "UP" not in link["flags"]
        told = {each["local"]: each for each in shown(netns, "address", "show", "dev", DEVICE)[0]["addr_info"]}
        assert set(told) == {"10.0.1.175", "fd00:1::175"}
        assert (told["10.0.1.175"]["prefixlen"], told["10.0.1.175"]["scope"]) == (32, "global")
        assert told["fd00:1::175"]["prefixlen"] == 128
        assert not told["fd00:1::175"].get("tentative", False)
        assert "local fd00:1::175" in netns.run("ip", "route", "get", "fd00:1::175").stdout
        assert "local 10.0.1.175" in netns.run("ip", "route", "get", "10.0.1.175").stdout
        device.remove()
        assert device.owner() is Owner.ABSENT
