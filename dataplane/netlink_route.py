"""VIPs made local over rtnetlink (linux/rtnetlink.h, linux/if_addr.h): a device that holds them, or local routes.

IPVS takes packets that are delivered to this node (hook LOCAL_IN), so the kernel must hold every VIP for its own.

* `VipDevice`: addresses on the dummy device kube-ipvs0, as kube-proxy and the classic tutorial have it. The device
  stays DOWN: its addresses are local all the same, and adding is twice as fast. Still each addition walks the list
  of addresses in the kernel, so the cost grows with the square of their number.
* `VipRoutes`: one route of type local per VIP in the table local. Linear; `ip addr` does not show the VIPs, but
  `ip route show table local proto 86` does.

Both bear a mark: the device our alias, the routes our protocol number. Nothing without the mark is touched.

`MarkedDelivery` is for addresses of which only some ports are ours: packets that a rule of ours has marked are
delivered to this node, whatever their address; the address itself is not local.
"""

import errno
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from functools import lru_cache
from itertools import islice
from typing import NamedTuple, Protocol

from .errors import KernelError, PreflightError
from .model import Address, Family, format_address
from .netlink_socket import (
    HEADER,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REQUEST,
    NetlinkSocket,
    kernel_error,
    message,
)
from .nlattr import NlAttrs, Part, Slot, attr, blob, compile_template, cstring, header, nested, u32

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
GROUPS = (1, 5, 7, 8, 9, 11, 19)
"""RTNLGRP_LINK, IPV4_IFADDR, IPV4_ROUTE, IPV4_RULE, IPV6_IFADDR, IPV6_ROUTE, IPV6_RULE: what `concerns` reads."""

IFF_UP, IFF_NOARP = 0x1, 0x80
IFA_F_NODAD = 0x02
RT_SCOPE_HOST = 254
RT_TABLE_LOCAL = 255
RTN_LOCAL = 2
LOOPBACK = 1  # the first interface of every network namespace

DEVICE = "kube-ipvs0"
ALIAS = "dataplane"
ROUTE_PROTOCOL = 86  # "V"; free in iproute2's rt_protos

_IFINFO = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
_IFADDR = struct.Struct("=BBBBI")  # struct ifaddrmsg: family, prefix length, flags, scope, index
RTMSG = struct.Struct("=BBBBBBBBI")  # struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags
_FIRST = HEADER.size + 8 + 4  # payload of the first attribute behind ifaddrmsg
_GROUP = 64  # addresses in one generated pack call


class LinkInfoAttrs(NlAttrs):
    """IFLA_INFO_* (linux/if_link.h)."""

    kind = attr(1, cstring)


class LinkAttrs(NlAttrs):
    """IFLA_* (linux/if_link.h)."""

    name = attr(3, cstring)
    info = attr(18, nested(LinkInfoAttrs))
    alias = attr(20, cstring)


class AddressAttrs(NlAttrs):
    """IFA_* (linux/if_addr.h)."""

    address = attr(1, blob)
    local = attr(2, blob)
    flags = attr(8, u32)


class RouteAttrs(NlAttrs):
    """RTA_* (linux/rtnetlink.h)."""

    destination = attr(1, blob)
    out_interface = attr(4, u32)
    preferred_source = attr(7, blob)
    table = attr(15, u32)


class Owner(Enum):
    """Whose a device is."""

    ABSENT = "absent"
    OURS = "ours"
    FOREIGN = "foreign"


class Link(NamedTuple):
    """A network interface."""

    number: int
    name: str
    kind: str = ""
    alias: str = ""
    flags: int = 0


class Refused(NamedTuple):
    """An address the kernel did not bind or unbind."""

    address: Address
    error: KernelError


class VipBinding(Protocol):
    """A way to make VIPs local."""

    def exists(self) -> bool:
        """Whether what holds the addresses is there and ours."""

    def ensure(self) -> bool:
        """Make what holds the addresses; True if something was written."""

    def bind(self, addresses: Iterable[Address]) -> list[Refused]:
        """Make addresses local; those that are already are no failures."""

    def unbind(self, addresses: Iterable[Address]) -> list[Refused]:
        """Take addresses away; those that are not there are no failures."""

    def bound(self) -> set[Address]:
        """The addresses that are bound now."""

    def remove(self) -> None:
        """Take away everything of ours."""

    def concerns(self, notification: bytes) -> bool:
        """Whether a notification of GROUPS is about what we hold."""

    def commands(self, bind: Iterable[Address], unbind: Iterable[Address]) -> str:
        """The same change as `ip -batch` text, sorted."""


def open_binding(sock: NetlinkSocket, kind: str, *, take_over: bool = False) -> VipBinding:
    """The binding of that name: "device" or "routes"."""
    if kind == "routes":
        return VipRoutes(sock)
    if kind == "device":
        return VipDevice(sock, take_over=take_over)
    raise ValueError(f"{kind!r} is no way to bind VIPs: device or routes")


# ---------------------------------------------------------------------------------------------------------- in bulk


@lru_cache(maxsize=64)
def _packer(head: bytes, numbers: tuple[int, ...], width: int, tail: bytes, count: int) -> Callable[..., bytes]:
    """A function of `count` addresses that packs as many messages: `head`, the address as each of the attributes
    `numbers`, `tail`."""
    parts: list[Part] = []
    for index in range(count):
        parts.append(head)
        for number in numbers:
            parts += [header(width, number), Slot(f"a{index}", f"{width}s")]
        parts.append(tail)
    return compile_template(parts, [f"a{index}" for index in range(count)])


def _messages(
    kind: int, flags: int, body: bytes, numbers: tuple[int, ...], tail: bytes, addresses: list[Address]
) -> Iterator[bytes]:
    """The same message for each address (all of one family), joined in groups."""
    width = len(addresses[0])
    length = HEADER.size + len(body) + (4 + width) * len(numbers) + len(tail)
    head = HEADER.pack(length, kind, flags | NLM_F_REQUEST, 0, 0) + body
    many = _packer(head, numbers, width, tail, _GROUP)
    feed = iter(addresses)
    while group := tuple(islice(feed, _GROUP)):
        if len(group) == _GROUP:
            yield many(*group)
        else:
            one = _packer(head, numbers, width, tail, 1)
            yield b"".join(map(one, group))


def _by_family(addresses: Iterable[Address]) -> Iterator[tuple[Family, list[Address]]]:
    wanted = list(addresses)
    for family, width in ((Family.IPV4, 4), (Family.IPV6, 16)):
        if chosen := [address for address in wanted if len(address) == width]:
            yield family, chosen


def _refusals(
    sock: NetlinkSocket, operation: str, groups: Iterable[bytes], at: int, width: int, fine: frozenset[int]
) -> list[Refused]:
    """Send messages; what was refused for a reason that is not `fine`, told by the address at offset `at`."""
    refused = []
    for failure in sock.batch(groups):
        if failure.errno not in fine:
            address = Address(failure.message[at : at + width])
            error = KernelError(operation, format_address(address), failure.errno, failure.text)
            refused.append(Refused(address, error))
    return refused


_ADD_FINE = frozenset({errno.EEXIST})
_REMOVE_FINE = frozenset({errno.EADDRNOTAVAIL, errno.ESRCH, errno.ENOENT})


# ----------------------------------------------------------------------------------------------------------- device


class VipDevice:
    """VIPs as /32 and /128 addresses of a dummy device.

    `take_over`: put our mark on a device of that name that has none (kube-proxy's), instead of refusing to touch it.
    """

    def __init__(self, sock: NetlinkSocket, name: str = DEVICE, *, take_over: bool = False) -> None:
        self._sock = sock
        self._name = name
        self._take_over = take_over
        self._index = 0
        self._owner = Owner.ABSENT

    def owner(self) -> Owner:
        """Whose the device of our name is."""
        link = link_by_name(self._sock, self._name)
        self._index = link.number if link else 0
        self._owner = Owner.ABSENT if link is None else Owner.OURS if link.alias == ALIAS else Owner.FOREIGN
        return self._owner

    def exists(self) -> bool:
        """Whether the device is there and ours."""
        return self.owner() is Owner.OURS

    def ensure(self) -> bool:
        """Create the device unless it is there; PreflightError when it is somebody else's."""
        owner = self.owner()
        if owner is Owner.OURS:
            return False
        if owner is Owner.FOREIGN:
            if not self._take_over:
                raise PreflightError(
                    f"the device {self._name} is not ours (its alias is not {ALIAS!r})",
                    f"dataplane cleanup --kube-proxy, or take the device over: ip link set {self._name} alias {ALIAS}",
                )
            alias = LinkAttrs.encode(alias=ALIAS)
            self._ask(RTM_SETLINK, 0, self._index, alias, "take over device")
        else:
            # the kernel takes no alias while it creates a link; both messages in one send, so that no death of this
            # process can come between them and leave a device that nobody owns
            create = self._message(
                RTM_NEWLINK,
                NLM_F_CREATE | NLM_F_EXCL,
                0,
                LinkAttrs.encode(name=self._name, info={"kind": "dummy"}),
                IFF_NOARP,
            )
            mark = self._message(RTM_SETLINK, 0, 0, LinkAttrs.encode(name=self._name, alias=ALIAS))
            for failure in self._sock.batch([create + mark]):
                raise kernel_error("create dummy device", self._name, failure.errno, failure.text)
        self.owner()
        return True

    def bind(self, addresses: Iterable[Address]) -> list[Refused]:
        """Give the device addresses, IPv6 ones without duplicate address detection."""
        return self._change(addresses, RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, "bind", _ADD_FINE)

    def unbind(self, addresses: Iterable[Address]) -> list[Refused]:
        """Take addresses away from the device."""
        return self._change(addresses, RTM_DELADDR, 0, "unbind", _REMOVE_FINE)

    def _change(
        self, addresses: Iterable[Address], kind: int, flags: int, operation: str, fine: frozenset[int]
    ) -> list[Refused]:
        refused: list[Refused] = []
        index = self._require()
        if self._owner is not Owner.OURS:
            raise KernelError(operation, f"addresses on {self._name}", errno.EPERM, "the device is not ours")
        for family, chosen in _by_family(addresses):
            width = len(chosen[0])
            nodad = IFA_F_NODAD if family is Family.IPV6 else 0
            body = _IFADDR.pack(family, 8 * width, nodad, 0, index)
            groups = _messages(kind, flags, body, (2, 1), b"", chosen)  # IFA_LOCAL, IFA_ADDRESS
            refused += _refusals(self._sock, operation, groups, _FIRST, width, fine)
        return refused

    def bound(self) -> set[Address]:
        """The device's addresses; IPv6 link-local ones are the kernel's own doing and not among them."""
        index = self._require()
        found = {address for at, address in _dump_addresses(self._sock, index) if at == index}
        return {address for address in found if len(address) == 4 or not _is_link_local(address)}

    def remove(self) -> None:
        """Delete the device if it is ours."""
        if self.owner() is Owner.OURS:
            self._ask(RTM_DELLINK, 0, self._index, b"", "delete device")
            self._index = 0

    def concerns(self, notification: bytes) -> bool:
        """Whether a notification is about the device or its addresses."""
        kind = HEADER.unpack_from(notification)[1]
        if kind in (RTM_NEWLINK, RTM_DELLINK):
            link = _link(notification)
            return link.name == self._name or link.number == self._index != 0
        return kind in (RTM_NEWADDR, RTM_DELADDR) and _IFADDR.unpack_from(notification, HEADER.size)[4] == self._index

    def commands(self, bind: Iterable[Address], unbind: Iterable[Address]) -> str:
        """The same change as `ip -batch` text, sorted."""
        lines = [f"address add {_prefixed(each)} dev {self._name}{_nodad(each)}" for each in _sorted(bind)]
        lines += [f"address delete {_prefixed(each)} dev {self._name}" for each in _sorted(unbind)]
        return "".join(line + "\n" for line in lines)

    def _require(self) -> int:
        """The interface index. Asked for each time a call is made: a deleted device comes back with another one."""
        if self.owner() is Owner.ABSENT:
            raise KernelError("find device", self._name, errno.ENODEV)
        return self._index

    def _message(self, kind: int, flags: int, index: int, attributes: bytes, link_flags: int = 0) -> bytes:
        body = _IFINFO.pack(0, 0, index, link_flags, link_flags)
        return message(kind, NLM_F_REQUEST | flags, body + attributes)

    def _ask(self, kind: int, flags: int, index: int, attributes: bytes, operation: str) -> None:
        self._sock.request(self._message(kind, flags, index, attributes), operation, self._name)


# ----------------------------------------------------------------------------------------------------------- routes


class VipRoutes:
    """VIPs as local routes of the loopback device."""

    def __init__(self, sock: NetlinkSocket) -> None:
        self._sock = sock

    def exists(self) -> bool:
        """Always: every network namespace has lo."""
        return True

    def ensure(self) -> bool:
        """Nothing to make."""
        return False

    def bind(self, addresses: Iterable[Address]) -> list[Refused]:
        """Make addresses local."""
        return self._change(addresses, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, "bind", _ADD_FINE)

    def unbind(self, addresses: Iterable[Address]) -> list[Refused]:
        """Take our routes for addresses away."""
        return self._change(addresses, RTM_DELROUTE, 0, "unbind", _REMOVE_FINE)

    def _change(
        self, addresses: Iterable[Address], kind: int, flags: int, operation: str, fine: frozenset[int]
    ) -> list[Refused]:
        refused: list[Refused] = []
        for family, chosen in _by_family(addresses):
            width = len(chosen[0])
            scope = RT_SCOPE_HOST if family is Family.IPV4 else 0
            body = _route(family, 8 * width, scope)
            tail = RouteAttrs.encode(out_interface=LOOPBACK)
            groups = _messages(kind, flags, body, (1,), tail, chosen)  # RTA_DST
            refused += _refusals(self._sock, operation, groups, HEADER.size + RTMSG.size + 4, width, fine)
        return refused

    def bound(self) -> set[Address]:
        """Addresses that our routes make local."""
        found: set[Address] = set()
        for family, width in ((Family.IPV4, 4), (Family.IPV6, 16)):
            try:
                answers = self._sock.dump(message(RTM_GETROUTE, NLM_F_REQUEST, _route(family, 0, 0)))
            except KernelError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EAFNOSUPPORT, errno.ENOENT):
                    raise
                continue  # no IPv6 in this kernel, or no such table yet
            for answer in answers:
                if self.concerns(answer):
                    destination = RouteAttrs.decode(answer, HEADER.size + RTMSG.size).get("destination", b"")
                    if len(destination) == width:
                        found.add(Address(destination))
        return found

    def remove(self) -> None:
        """Take all our routes away."""
        if refused := self.unbind(self.bound()):
            raise refused[0].error

    def concerns(self, notification: bytes) -> bool:
        """Whether a notification is about one of our routes."""
        if HEADER.unpack_from(notification)[1] not in (RTM_NEWROUTE, RTM_DELROUTE):
            return False
        _, _, _, _, table, protocol, _, kind, _ = RTMSG.unpack_from(notification, HEADER.size)
        return (table, protocol, kind) == (RT_TABLE_LOCAL, ROUTE_PROTOCOL, RTN_LOCAL)

    def commands(self, bind: Iterable[Address], unbind: Iterable[Address]) -> str:
        """The same change as `ip -batch` text, sorted."""
        rest = f"dev lo table local protocol {ROUTE_PROTOCOL}"
        lines = [f"route add local {_prefixed(each)} {rest}" for each in _sorted(bind)]
        lines += [f"route delete local {_prefixed(each)} {rest}" for each in _sorted(unbind)]
        return "".join(line + "\n" for line in lines)


def _sorted(addresses: Iterable[Address]) -> list[Address]:
    return sorted(addresses, key=lambda each: (len(each), each))


def _prefixed(address: Address) -> str:
    return f"{format_address(address)}/{8 * len(address)}"


def _nodad(address: Address) -> str:
    return " nodad" if len(address) == 16 else ""


def _route(family: Family, prefix: int, scope: int) -> bytes:
    return RTMSG.pack(family, prefix, 0, 0, RT_TABLE_LOCAL, ROUTE_PROTOCOL, scope, RTN_LOCAL, 0)


# -------------------------------------------------------------------------------------------------- links, addresses


def link_by_name(sock: NetlinkSocket, name: str) -> Link | None:
    """The interface of that name, None when there is none."""
    asked = message(RTM_GETLINK, NLM_F_REQUEST, _IFINFO.pack(0, 0, 0, 0, 0) + LinkAttrs.encode(name=name))
    try:
        return _link(sock.get(asked, "look up device", name))
    except KernelError as error:
        if error.errno == errno.ENODEV:
            return None
        raise


def bring_loopback_up(sock: NetlinkSocket) -> None:
    """`ip link set lo up`, which in a new network namespace nobody has done."""
    body = _IFINFO.pack(0, 0, LOOPBACK, IFF_UP, IFF_UP)
    sock.request(message(RTM_SETLINK, NLM_F_REQUEST, body), "bring up", "lo")


def read_links(sock: NetlinkSocket) -> dict[int, Link]:
    """All interfaces by index."""
    answers = sock.dump(message(RTM_GETLINK, NLM_F_REQUEST, _IFINFO.pack(0, 0, 0, 0, 0)))
    return {link.number: link for link in map(_link, answers)}


def addresses_by_link(sock: NetlinkSocket, except_of: Sequence[str] = (DEVICE,)) -> dict[Address, tuple[str, ...]]:
    """The node's addresses and the interfaces that have them, without those of the devices in `except_of`."""
    links = read_links(sock)
    found: dict[Address, tuple[str, ...]] = {}
    for index, address in _dump_addresses(sock):
        name = links[index].name if index in links else f"#{index}"
        if name not in except_of:
            found[address] = tuple(sorted((*found.get(address, ()), name)))
    return found


class Way(NamedTuple):
    """Where this node sends what is for an address. `local`: to itself; `source`: the address it takes for its own."""

    local: bool
    interface: str
    source: Address | None


def way_to(sock: NetlinkSocket, address: Address) -> Way | None:
    """The way of a packet of this node's own; None when there is no route."""
    family, width = (Family.IPV4, 32) if len(address) == 4 else (Family.IPV6, 128)
    asked = RTMSG.pack(family, width, 0, 0, 0, 0, 0, 0, 0) + RouteAttrs.encode(destination=address)
    try:
        answer = sock.get(message(RTM_GETROUTE, NLM_F_REQUEST, asked), "look up a route to", format_address(address))
    except KernelError as error:
        if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.EAFNOSUPPORT):
            return None
        raise
    kind = RTMSG.unpack_from(answer, HEADER.size)[7]
    values = RouteAttrs.decode(answer, HEADER.size + RTMSG.size)
    source = values.get("preferred_source", b"")
    links = read_links(sock)
    interface = links[values["out_interface"]].name if values.get("out_interface") in links else ""
    return Way(kind == RTN_LOCAL, interface, Address(source) if len(source) == len(address) else None)


ADDRESS_GROUPS = (5, 9)
"""RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV6_IFADDR: what changes `node_addresses`."""


def node_addresses(sock: NetlinkSocket) -> tuple[Address, ...]:
    """The node's own addresses in the kernel's order: those of kube-ipvs0, loopback and link-local ones are none."""
    link = link_by_name(sock, DEVICE)
    vips = link.number if link else 0
    found = dict.fromkeys(address for index, address in _dump_addresses(sock) if index != vips)
    return tuple(each for each in found if not (_is_loopback(each) or (len(each) == 16 and _is_link_local(each))))


def addressed_link(notification: bytes) -> int:
    """The index of the interface whose address a notification of ADDRESS_GROUPS is about."""
    index: int = _IFADDR.unpack_from(notification, HEADER.size)[4]
    return index


def _is_loopback(address: bytes) -> bool:
    return address[0] == 127 if len(address) == 4 else address == bytes(15) + b"\1"


def links_with_address(sock: NetlinkSocket, address: Address, except_of: Sequence[str] = (DEVICE,)) -> tuple[str, ...]:
    """The interfaces that have this address: a VIP found on one is the node's own, not ours to bind."""
    return addresses_by_link(sock, except_of).get(address, ())


def _dump_addresses(sock: NetlinkSocket, index: int = 0) -> Iterator[tuple[int, Address]]:
    """(interface index, address) of all addresses, or only one interface's where the kernel can filter (since 5.0)."""
    for answer in sock.dump(message(RTM_GETADDR, NLM_F_REQUEST, _IFADDR.pack(0, 0, 0, 0, index))):
        family, _, _, _, at = _IFADDR.unpack_from(answer, HEADER.size)
        # as the kernel writes them: IFA_ADDRESS and IFA_LOCAL (IPv4), only IFA_ADDRESS (IPv6 without a peer)
        if answer[_FIRST + 4 : _FIRST + 8] == _LOCAL_4 and family == Family.IPV4:
            yield at, Address(answer[_FIRST + 8 : _FIRST + 12])
        elif answer[_FIRST - 4 : _FIRST] == _ADDRESS_16 and family == Family.IPV6:
            yield at, Address(answer[_FIRST : _FIRST + 16])
        else:
            values = AddressAttrs.decode(answer, HEADER.size + _IFADDR.size)
            if own := values.get("local", values.get("address", b"")):
                yield at, Address(own)


_LOCAL_4 = header(4, 2)
_ADDRESS_16 = header(16, 1)


def _link(answer: bytes) -> Link:
    _, _, index, flags, _ = _IFINFO.unpack_from(answer, HEADER.size)
    values = LinkAttrs.decode(answer, HEADER.size + _IFINFO.size)
    return Link(index, values["name"], values.get("info", {}).get("kind", ""), values.get("alias", ""), flags)


def _is_link_local(address: bytes) -> bool:
    return address[0] == 0xFE and address[1] & 0xC0 == 0x80
