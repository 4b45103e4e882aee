"""The table in front of IPVS: its text, its elements, and what real packets meet."""

import contextlib
import errno
import itertools
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane import netlink_nftables as nft
from dataplane import procfs_sysctl
from dataplane.errors import KernelError
from dataplane.ipvs_guard import TABLE, Guard, owner_comment, text
from dataplane.ipvs_ledger import Elements
from dataplane.model import Address, Masquerade, VirtualAddress, parse_address, parse_network
from dataplane.netlink_route import VipBinding, VipDevice, VipRoutes
from dataplane.netlink_socket import NETLINK_NETFILTER, NETLINK_ROUTE, NetlinkSocket
from dataplane.nft_clients import Clients
from dataplane.nft_skeleton import parse
from tests.netns import NetNs, Topology

TCP, UDP = 6, 17
WEB = VirtualAddress(TCP, parse_address("10.0.1.175"), 80)
DNS = VirtualAddress(UDP, parse_address("fd00::1"), 53)
WEB_INSIDE, DNS_INSIDE = WEB._replace(inside=True), DNS._replace(inside=True)
POD = parse_address("10.244.0.10")
CIDRS = (parse_network("10.244.0.0/16"), parse_network("fd00:244::/64"))


def everything() -> Elements:
    """Something in every set."""
    return Elements(
        servers={WEB: "default/web:http", DNS: "(LoadBalancer)", WEB_INSIDE: "default/web:http", DNS_INSIDE: ""},
        vips={WEB.address, DNS.address},
        hairpins={POD, parse_address("fd00:244::10")},
        external={WEB, DNS},
        refused={DNS},
        dropped={WEB, DNS},
        inside={WEB_INSIDE, DNS_INSIDE},
        marks={WEB_INSIDE: 0xDA700001, DNS_INSIDE: 0xDA700002},
        ranged={WEB, DNS},
        allowed={
            WEB: tuple(map(parse_network, ("10.0.0.0/8", "203.0.113.0/25", "203.0.113.200"))),
            DNS: tuple(map(parse_network, ("2001:db8::/32", "fd00::5/128"))),
        },
        masquerade={WEB: Masquerade.ALWAYS, DNS: Masquerade.NODE},
        draining={
            (WEB, POD, 8080): 86_400,
            (WEB_INSIDE, POD, 8080): 60,
            (DNS, parse_address("fd00:244::10"), 53): 30,
        },
    )


# ---------------------------------------------------------------------------------------------------------- pure


def test_every_rule_has_a_comment_with_the_hash_of_the_whole_text() -> None:
    written = text(Clients())
    rules = [line.strip() for line in written.splitlines() if line.startswith("\t\t") and "policy accept" not in line]
    marks = {line[-11:-2] for line in rules}
    assert len(rules) == sum(map(len, parse(written).rules.values())) >= 20
    assert len(marks) == 1
    assert marks != {line[-11:-2] for line in text(Clients(masquerade_all=True)).splitlines() if "masq" in line}
    assert "@" not in re.sub(r"@(?=[a-z_]+[46]\b)", "", written)


def test_options_become_rules() -> None:
    local = Clients(cluster_cidrs=(parse_network("10.0.0.0/8"), parse_network("172.16.0.0/12"), *CIDRS[1:]))
    assert local.masquerade() == [
        'ip saddr != 10.0.0.0/8 ip saddr != 172.16.0.0/12 masquerade fully-random comment "a client from outside"',
        'ip6 saddr != fd00:244::/64 masquerade fully-random comment "a client from outside"',
    ]
    assert Clients(interface_prefix="cali").masquerade() == [
        'iifname != "cali*" masquerade fully-random comment "a client from outside"'
    ]
    assert Clients(bridge_interface="br0").masquerade()[0].startswith('iifname != "br0" masquerade')
    several = Clients(cluster_cidrs=CIDRS[:1], bridge_interface="br0", interface_prefix="cali").masquerade()
    assert [rule.partition(" masquerade")[0] for rule in several] == [
        f'ip saddr != {CIDRS[0]} iifname != "br0" iifname != "cali*"',
        'meta nfproto ipv6 iifname != "br0" iifname != "cali*"',
    ]
    assert len(Clients(masquerade_all=True, cluster_cidrs=CIDRS).masquerade()) == 1
    assert Clients().masquerade() == []


@pytest.mark.parametrize("name", ['br0"', "br0\n", "a b", "x" * 16, "@set", "{"])
def test_an_interface_name_that_could_be_language_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="interface name"):
        text(Clients(bridge_interface=name))


@given(st.text())
def test_owner_comments_hold_nothing_a_tool_could_read_as_language(owner: str) -> None:
    comment = owner_comment(owner)
    assert comment in ("", owner)
    assert len(comment) <= 100
    assert not set(comment) & set(" \t\n\"'\\{};,#$@\x1b\0")


def test_the_script_is_the_same_change_in_nft_language() -> None:
    guard = Guard.__new__(Guard)  # needs no kernel
    some = Elements(servers={WEB: "default/web:http", DNS: 'x"y'}, draining={(WEB, POD, 8080): 0})
    assert guard.script(some, Elements(vips={WEB.address})).splitlines() == [
        f"delete element inet {TABLE} vips4 {{ 10.0.1.175 }}",
        f'add element inet {TABLE} servers4 {{ 10.0.1.175 . tcp . 80 comment "default/web:http" }}',
        f"add element inet {TABLE} servers6 {{ fd00::1 . udp . 53 }}",
        f"add element inet {TABLE} draining4 {{ 10.0.1.175 . tcp . 80 . 10.244.0.10 . 8080 timeout 1s }}",
    ]


# -------------------------------------------------------------------------------------------------------- kernel


@pytest.fixture
def inside(netns: NetNs) -> Iterator[NetNs]:
    """The test itself in a fresh network namespace."""
    with netns.enter():
        yield netns


@pytest.fixture
def guard(inside: NetNs) -> Iterator[Guard]:
    """The table with no options."""
    with NetlinkSocket(NETLINK_NETFILTER) as sock:
        made = Guard(sock, Clients())
        assert made.ensure()
        yield made


def listed(netns: NetNs) -> str:
    return netns.run("nft", "list", "table", "inet", TABLE).stdout


@pytest.mark.root
def test_the_rules_are_written_once(inside: NetNs) -> None:
    with NetlinkSocket(NETLINK_NETFILTER) as sock:
        guard = Guard(sock, Clients(cluster_cidrs=CIDRS))
        assert not guard.exists()
        assert not guard.intact()
        assert guard.ensure()
        before = nft.read_generation(sock).id
        again = Guard(sock, Clients(cluster_cidrs=CIDRS))
        assert again.intact()
        assert not again.ensure()
        assert nft.read_generation(sock).id == before
        guard.delete()
        guard.delete()
        assert not guard.exists()


@pytest.mark.root
def test_other_options_replace_the_rules_and_keep_the_elements(inside: NetNs, guard: Guard) -> None:
    guard.commit(everything(), Elements())
    with NetlinkSocket(NETLINK_NETFILTER) as sock:
        other = Guard(sock, Clients(cluster_cidrs=CIDRS, interface_prefix="cali"))
        assert not other.intact()
        assert other.ensure()
        assert other.intact()
        seen = other.observe()
    assert 'iifname != "cali*" masquerade' in listed(inside)
    assert (seen.servers, seen.masquerade) == (everything().servers, everything().masquerade)


@pytest.mark.root
@pytest.mark.parametrize(
    "damage",
    [
        f"flush table inet {TABLE}",
        f"flush chain inet {TABLE} closed_ports",
        f"insert rule inet {TABLE} input_vips accept",
        f"add rule inet {TABLE} masquerade_always drop comment on_to_IPVS",
        f"add chain inet {TABLE} surprise {{ type filter hook input priority -300; policy drop; }}",
        f"add chain inet {TABLE} surprise",
        f"delete table inet {TABLE}",
        f"""flush chain inet {TABLE} output_vips; delete chain inet {TABLE} output_vips
            add chain inet {TABLE} output_vips {{ type filter hook output priority 0; policy accept; }}""",
        f"add chain inet {TABLE} output_vips {{ policy drop; }}",
        f"delete table inet {TABLE}; table inet {TABLE} {{ set vips4 {{ type ipv6_addr; }}; }}",
        f"delete set inet {TABLE} draining6",
    ],
)
def test_damage_is_noticed_and_repaired(inside: NetNs, guard: Guard, damage: str) -> None:
    whole = listed(inside)
    inside.run("nft", "-f", "-", stdin=damage + "\n")
    assert not guard.intact()
    assert guard.ensure()
    assert guard.intact()
    # sets that were made anew come in another place
    assert sorted(listed(inside).splitlines()) == sorted(whole.splitlines())


@pytest.mark.root
def test_what_is_committed_is_observed_and_shown_by_nft(inside: NetNs, guard: Guard) -> None:
    wanted = everything()
    guard.commit(wanted, Elements())
    assert guard.observe() == wanted
    text = listed(inside)
    for part in (
        'elements = { 10.0.1.175 . tcp . 80 comment "default/web:http" }',
        "elements = { fd00::1 . udp . 53 }",
        "elements = { 10.244.0.10 . 10.244.0.10 }",
        "elements = { 10.0.1.175 . tcp . 80 : goto masquerade_always }",
        "elements = { fd00::1 . udp . 53 : goto masquerade_node }",
        "10.0.1.175 . tcp . 80 . 10.244.0.10 . 8080 timeout 1d expires 23h59m59s",
    ):
        assert part in text
    guard.commit(Elements(), wanted)
    assert guard.observe() == Elements()


@pytest.mark.root
def test_the_script_makes_what_the_commit_makes(inside: NetNs, guard: Guard) -> None:
    guard.commit(everything(), Elements())
    by_netlink = guard.observe()
    guard.commit(Elements(), everything())
    inside.run("nft", "-f", "-", stdin=guard.script(everything(), Elements()))
    assert guard.observe() == by_netlink
    inside.run("nft", "-f", "-", stdin=guard.script(Elements(), everything()))
    assert guard.observe() == Elements()


@pytest.mark.root
def test_adding_and_removing_twice_is_fine(guard: Guard) -> None:
    guard.commit(everything(), Elements())
    guard.commit(everything(), Elements())
    half = Elements(servers={WEB: ""}, vips={WEB.address}, masquerade={WEB: Masquerade.ALWAYS})
    guard.commit(Elements(), half)
    guard.commit(half, everything())
    assert guard.observe() == half
    guard.commit(Elements(), everything())
    assert guard.observe() == Elements()


@pytest.mark.root
def test_what_is_in_both_is_replaced(guard: Guard) -> None:
    old = Elements(servers={WEB: "a/b"}, masquerade={WEB: Masquerade.ALWAYS}, draining={(WEB, POD, 1): 10})
    new = Elements(servers={WEB: "c/d"}, masquerade={WEB: Masquerade.NODE}, draining={(WEB, POD, 1): 600})
    guard.commit(old, Elements())
    guard.commit(new, old)
    assert guard.observe() == new


@pytest.mark.root
def test_a_refused_commit_changes_nothing(guard: Guard) -> None:
    kept = Elements(masquerade={WEB: Masquerade.ALWAYS}, vips={WEB.address})
    guard.commit(kept, Elements())
    other = Elements(masquerade={WEB: Masquerade.NODE}, vips={DNS.address})
    with pytest.raises(nft.BatchRefused, match=f"NEWSETELEM {TABLE} exceptions4"):
        guard.commit(other, Elements(vips={WEB.address}))
    assert guard.observe() == kept


@pytest.mark.root
def test_without_the_table_commit_and_observe_say_so(guard: Guard) -> None:
    guard.delete()
    for call in (lambda: guard.commit(everything(), Elements()), guard.observe):
        with pytest.raises(KernelError) as caught:
            call()
        assert caught.value.errno == errno.ENOENT


@pytest.mark.root
def test_the_kernel_keeps_the_clock_of_a_drain(guard: Guard) -> None:
    short, long = (WEB, POD, 1), (WEB, POD, 2)
    guard.commit(Elements(draining={short: 1, long: 86_400}), Elements())
    assert guard.observe().draining == {short: 1, long: 86_400}
    time.sleep(1.2)
    assert guard.observe().draining == {long: 86_399}
    guard.commit(Elements(), Elements(draining={short: 0, long: 0}))
    assert guard.observe().draining == {}


@pytest.mark.root
def test_foreign_elements_are_read_without_harm(inside: NetNs, guard: Guard) -> None:
    """Whoever may write our table may write anything; what we read stays within bounds."""
    key = "10.0.0.1 . tcp . 80"
    inside.run(
        *("nft", "-f", "-"),
        stdin=f'add element inet {TABLE} servers4 {{ {key} comment "$(reboot) {{ ; }}" }}\n'
        f"add element inet {TABLE} exceptions4 {{ {key} : drop }}\n"
        f"add element inet {TABLE} draining4 {{ {key} . 10.0.0.2 . 80 }}\n"
        f"add element inet {TABLE} hairpin4 {{ 10.0.0.1 . 10.0.0.2 }}\n",
    )
    at = VirtualAddress(TCP, parse_address("10.0.0.1"), 80)
    seen = guard.observe()
    assert seen.servers == {at: ""}
    assert seen.masquerade == {at: Masquerade.DETECT}
    assert seen.hairpins == set()
    assert seen.draining == {(at, parse_address("10.0.0.2"), 80): 0}


@pytest.mark.root
def test_forty_thousand_elements(inside: NetNs, guard: Guard) -> None:
    numbered = (Address((0x0A000000 + n).to_bytes(4)) for n in range(40_000))
    many = Elements(servers={VirtualAddress(TCP, each, 80): f"default/web-{each.hex()}:http" for each in numbered})
    guard.commit(many, Elements())
    assert guard.observe() == many
    tail = Elements(servers=dict(list(many.servers.items())[:39_000]))
    guard.commit(Elements(), tail)
    assert len(guard.observe().servers) == 1_000
    assert len(json.loads(inside.run("nft", "-j", "list", "set", "inet", TABLE, "servers4").stdout)["nftables"]) == 2


# ------------------------------------------------------------------------------------------------- real packets


class Answerer:
    """Servers in a namespace that answer every connection and datagram with a name and the client's address."""

    def __init__(self, ns: NetNs, name: str, port: int) -> None:
        self.name = name.encode()
        self.sockets: list[socket.socket] = []
        with ns.enter():
            for family, any_address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    made = socket.socket(family, kind)
                    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if family == socket.AF_INET6:
                        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    made.bind((any_address, port))
                    self.sockets.append(made)
                    serve = self.accept if kind == socket.SOCK_STREAM else self.receive
                    threading.Thread(target=serve, args=(made,), daemon=True).start()

    def accept(self, listener: socket.socket) -> None:
        listener.listen()
        with contextlib.suppress(OSError):
            while True:
                connection, peer = listener.accept()
                with connection:
                    connection.sendall(self.name + b" " + peer[0].encode())

    def receive(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                _, peer = sock.recvfrom(100)
                if peer is None:  # shut down
                    return
                sock.sendto(self.name + b" " + peer[0].encode(), peer)

    def close(self) -> None:
        for each in self.sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


_udp_ports = itertools.count(10_000)


def ask(ns: NetNs, address: str, port: int, protocol: int = TCP, patience: float = 4) -> str:
    """What a client in the namespace gets: an answer, or "refused", or "nothing"."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with ns.enter():
        client = socket.socket(family, socket.SOCK_STREAM if protocol == TCP else socket.SOCK_DGRAM)
    with client:
        client.settimeout(patience)
        try:
            if protocol == UDP:
                # a source port used before is an old connection to IPVS and conntrack
                client.bind(("::" if ":" in address else "0.0.0.0", next(_udp_ports)))
            client.connect((address, port))
            if protocol == UDP:
                client.send(b"?")
            return client.recv(200).decode()
        except (TimeoutError, PermissionError):  # EPERM: the datagram was dropped on its way out of this very machine
            return "nothing"
        except ConnectionRefusedError:
            return "refused"


_ping_numbers = itertools.count(1)


def ping(ns: NetNs, address: str) -> str:
    """ "echo", "refused" (port unreachable) or "nothing"."""
    six = ":" in address
    with ns.enter():
        if six:
            raw = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
        else:
            raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    meanings = {(1, 4): "refused", (129, 0): "echo"} if six else {(3, 3): "refused", (0, 0): "echo"}
    with raw:
        number = next(_ping_numbers)  # to conntrack a number used before is the same, established "connection"
        checksum = 0 if six else ~(0x0800 + number + 1) & 0xFFFF
        raw.sendto(struct.pack(">BBHHH", 128 if six else 8, 0, checksum, number, 1), (address, 0))
        end = time.monotonic() + 4
        while (left := end - time.monotonic()) > 0:
            raw.settimeout(left)
            try:
                packet = raw.recv(2000)
            except TimeoutError:
                break
            offset = 0 if six else (packet[0] & 15) * 4
            if meaning := meanings.get((packet[offset], packet[offset + 1])):
                return meaning
    return "nothing"


VIPS = ("10.0.1.175", "fd00:1::175")
both_families = pytest.mark.parametrize("vip", VIPS)


class Lab:
    """A node with IPVS servers VIP:80 (TCP, UDP) over three pods, its guard, and a service of the node itself."""

    def __init__(self, topology: Topology, stack: ExitStack) -> None:
        self.topology, self.stack = topology, stack
        self.node, self.client = topology.node, topology.client
        self.pods = [pod.ns for pod in topology.pods]
        for key in (
            "ipv4.icmp_ratelimit",
            "ipv6.icmp.ratelimit",
        ):  # else one refusal a second
            self.node.sysctl(key, 0)
        self.node.run("ipvsadm", "-ln")  # loads the module, without which its settings do not exist
        with self.node.enter():
            changes = procfs_sysctl.apply(procfs_sysctl.IPVS_SYSCTLS, procfs_sysctl.running_kernel())
            assert [each.error for each in changes] == [""] * len(changes)
            self.route = stack.enter_context(NetlinkSocket(NETLINK_ROUTE))
            self.netfilter = stack.enter_context(NetlinkSocket(NETLINK_NETFILTER))
        for number, pod in enumerate(self.pods):
            # as most pod networks have it: pods reach each other through the node, and so do their answers
            pod.sysctl("ipv4.conf.all.accept_redirects", 0)
            pod.sysctl("ipv4.conf.eth0.accept_redirects", 0)
            pod.sysctl("ipv6.conf.eth0.accept_redirects", 0)
            pod.ip(
                "route add 10.244.0.1 dev eth0 scope link",
                "route delete 10.244.0.0/24 dev eth0",
                "route add fd00:244::1 dev eth0",
                "route delete fd00:244::/64 dev eth0",
            )
            stack.callback(Answerer(pod, f"pod{number}", 8080).close)
        stack.callback(Answerer(self.node, "node", 2222).close)
        self.binding: VipBinding = VipDevice(self.route)
        self.binding.ensure()
        assert self.binding.bind(map(parse_address, VIPS)) == []
        lines = []
        for vip in VIPS:
            text = f"[{vip}]" if ":" in vip else vip
            for flag in "tu":
                lines.append(f"-A -{flag} {text}:80 -s rr")
                for each in topology.pods:
                    real = f"[{each.v6}]" if ":" in vip else each.v4
                    lines.append(f"-a -{flag} {text}:80 -r {real}:8080 -m -w 1")
        self.ipvsadm("\n".join(lines))
        self.guard = self.options()

    def ipvsadm(self, rules: str) -> None:
        self.node.run("ipvsadm", "-R", stdin=rules + "\n")

    def options(self, **options: object) -> Guard:
        """Write the guard for these options, with all that it needs to know."""
        with self.node.enter():
            self.guard = Guard(self.netfilter, Clients(**options))  # type: ignore[arg-type]
            self.guard.delete()
            self.guard.ensure()
        addresses = [parse_address(vip) for vip in VIPS]
        self.guard.commit(
            Elements(
                servers=dict.fromkeys(self.servers(), "default/web:http"),
                vips=set(addresses),
                hairpins={parse_address(each) for pod in self.topology.pods for each in pod.addresses},
            ),
            Elements(),
        )
        return self.guard

    def servers(self) -> list[VirtualAddress]:
        return [VirtualAddress(protocol, parse_address(vip), 80) for vip in VIPS for protocol in (TCP, UDP)]

    def only(self, pod: int, vip: str) -> str:
        """Let just this pod take connections to the VIP, so that a hairpin is sure to be one; its address."""
        text = f"[{vip}]" if ":" in vip else vip
        chosen = self.topology.pods[pod]
        lines = []
        for number, each in enumerate(self.topology.pods):
            real = f"[{each.v6}]" if ":" in vip else each.v4
            lines += [f"-e -{flag} {text}:80 -r {real}:8080 -m -w {int(number == pod)}" for flag in "tu"]
        self.ipvsadm("\n".join(lines))
        return chosen.v6 if ":" in vip else chosen.v4

    def gateway(self, vip: str) -> str:
        return "fd00:244::1" if ":" in vip else "10.244.0.1"

    def outside(self, vip: str) -> str:
        return self.topology.client_addresses[":" in vip]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Topology.build() as topology, ExitStack() as stack:
        yield Lab(topology, stack)


@pytest.fixture(autouse=True)
def _all_pods_take_connections(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "lab" in request.fixturenames:
        lab: Lab = request.getfixturevalue("lab")
        lines = []
        for vip in VIPS:
            text = f"[{vip}]" if ":" in vip else vip
            for pod in lab.topology.pods:
                real = f"[{pod.v6}]" if ":" in vip else pod.v4
                lines += [f"-e -{flag} {text}:80 -r {real}:8080 -m -w 1" for flag in "tu"]
        lab.ipvsadm("\n".join(lines))


@pytest.mark.ipvs
@both_families
def test_the_service_answers_from_everywhere(lab: Lab, vip: str) -> None:
    lab.options(cluster_cidrs=CIDRS)
    for client in (lab.client, lab.node, lab.pods[0]):
        for protocol in (TCP, UDP):
            names = {ask(client, vip, 80, protocol).split()[0] for _ in range(6)}
            assert names == {"pod0", "pod1", "pod2"}, (client.name, protocol)


@pytest.mark.ipvs
@both_families
@pytest.mark.parametrize("who", ["client", "node", "pod"])
def test_other_ports_of_a_vip_are_refused(lab: Lab, vip: str, who: str) -> None:
    lab.options(cluster_cidrs=CIDRS)
    client = {"client": lab.client, "node": lab.node, "pod": lab.pods[0]}[who]
    assert ask(client, vip, 81, TCP) == "refused"
    assert ask(client, vip, 81, UDP) == "refused"
    assert ping(client, vip) == "refused"
    # a service of the node listens on every address, yet is not to be had through the VIP
    assert ask(client, vip, 2222, TCP) == "refused"
    assert ask(client, vip, 2222, UDP) == "refused"
    own = lab.topology.node_addresses[":" in vip]
    assert ask(client, own, 2222, TCP).startswith("node ")
    assert ping(client, own) == "echo"


@pytest.mark.ipvs
@both_families
def test_without_the_guard_the_nodes_service_answers_through_the_vip(lab: Lab, vip: str) -> None:
    """What the guard is for; if this fails the test above proves nothing."""
    lab.guard.delete()
    assert ask(lab.client, vip, 2222, TCP).startswith("node ")
    assert ping(lab.client, vip) == "echo"


@pytest.mark.ipvs
@both_families
@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize(
    ("options", "client_masqueraded", "pod_masqueraded"),
    [
        ({}, False, False),
        ({"cluster_cidrs": CIDRS}, True, False),
        ({"bridge_interface": "br0"}, True, False),
        ({"interface_prefix": "br"}, True, False),
        ({"masquerade_all": True}, True, True),
    ],
    ids=["none", "cidr", "bridge", "prefix", "all"],
)
def test_masquerade(
    lab: Lab, vip: str, protocol: int, options: dict[str, object], client_masqueraded: bool, pod_masqueraded: bool
) -> None:
    lab.options(**options)
    pod0 = lab.only(0, vip)
    node = lab.gateway(vip)
    outside = lab.outside(vip)
    pod1 = lab.topology.pods[1].v6 if ":" in vip else lab.topology.pods[1].v4
    assert ask(lab.client, vip, 80, protocol) == f"pod0 {node if client_masqueraded else outside}"
    assert ask(lab.pods[1], vip, 80, protocol) == f"pod0 {node if pod_masqueraded else pod1}"
    assert ask(lab.pods[0], vip, 80, protocol) == f"pod0 {node}", f"hairpin of {pod0}"
    assert ask(lab.node, vip, 80, protocol) == f"pod0 {node}"


@pytest.mark.ipvs
@both_families
def test_exceptions_come_before_the_options(lab: Lab, vip: str) -> None:
    lab.only(0, vip)
    at = VirtualAddress(TCP, parse_address(vip), 80)
    lab.options(cluster_cidrs=CIDRS).commit(Elements(masquerade={at: Masquerade.NODE}), Elements())
    assert ask(lab.client, vip, 80) == f"pod0 {lab.outside(vip)}"
    assert ask(lab.pods[0], vip, 80) == f"pod0 {lab.gateway(vip)}"  # hairpin
    assert ask(lab.node, vip, 80) == f"pod0 {lab.gateway(vip)}"
    assert ask(lab.client, vip, 80, UDP) == f"pod0 {lab.gateway(vip)}"  # another server
    lab.options().commit(Elements(masquerade={at: Masquerade.ALWAYS}), Elements())
    assert ask(lab.client, vip, 80) == f"pod0 {lab.gateway(vip)}"
    assert ask(lab.pods[1], vip, 80) == f"pod0 {lab.gateway(vip)}"


@pytest.mark.ipvs
@both_families
@pytest.mark.parametrize("who", ["client", "node", "pod"])
def test_dropped_servers_give_no_answer(lab: Lab, vip: str, who: str) -> None:
    client = {"client": lab.client, "node": lab.node, "pod": lab.pods[0]}[who]
    dropped = Elements(dropped={VirtualAddress(protocol, parse_address(vip), 80) for protocol in (TCP, UDP)})
    guard = lab.options(cluster_cidrs=CIDRS)
    guard.commit(dropped, Elements())
    assert ask(client, vip, 80, TCP, patience=1.5) == "nothing"
    assert ask(client, vip, 80, UDP, patience=1) == "nothing"
    guard.commit(Elements(), dropped)
    assert ask(client, vip, 80, TCP).startswith("pod")


@pytest.mark.ipvs
@both_families
def test_a_server_without_real_servers_refuses(lab: Lab, vip: str) -> None:
    text = f"[{vip}]" if ":" in vip else vip
    lab.options(cluster_cidrs=CIDRS)
    at = VirtualAddress(TCP, parse_address(vip), 8443)
    lab.guard.commit(Elements(servers={at: "default/empty"}), Elements())
    lab.ipvsadm(f"-A -t {text}:8443 -s rr")
    try:
        assert ask(lab.client, vip, 8443) == "refused"
    finally:
        lab.ipvsadm(f"-D -t {text}:8443")


@pytest.mark.ipvs
@both_families
def test_local_routes_do_the_same(lab: Lab, vip: str) -> None:
    """VIPs bound as local routes: the same answers, for the node's own processes too."""
    lab.options(cluster_cidrs=CIDRS)
    lab.only(0, vip)
    routes = VipRoutes(lab.route)
    lab.binding.unbind([parse_address(vip)])
    try:
        assert routes.bind([parse_address(vip)]) == []
        for client in (lab.client, lab.node, lab.pods[0]):
            assert ask(client, vip, 80, TCP) == f"pod0 {lab.gateway(vip)}", client.name
            assert ask(client, vip, 81, TCP) == "refused"
            assert ping(client, vip) == "refused"
    finally:
        routes.remove()
        lab.binding.bind([parse_address(vip)])


@pytest.mark.ipvs
@both_families
def test_a_real_server_on_the_node_itself(lab: Lab, vip: str) -> None:
    """An endpoint with the node's network: its address is the node's."""
    lab.options(cluster_cidrs=CIDRS)
    own = lab.topology.node_addresses[":" in vip]
    text, real = (f"[{vip}]", f"[{own}]") if ":" in vip else (vip, own)
    at = VirtualAddress(TCP, parse_address(vip), 22)
    lab.guard.commit(Elements(servers={at: "default/host"}, hairpins={parse_address(own)}), Elements())
    lab.ipvsadm(f"-A -t {text}:22 -s rr\n-a -t {text}:22 -r {real}:2222 -m -w 1")
    try:
        for client in (lab.client, lab.pods[0], lab.node):
            assert ask(client, vip, 22).startswith("node "), client.name
    finally:
        lab.ipvsadm(f"-D -t {text}:22")
