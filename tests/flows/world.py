"""The world of a case, on the real kernel: the node is this network namespace, everything else is at our end of a TUN.

What the kernel does with a packet it does before `write` returns, or on this processor's backlog (loopback); a sentinel
sent behind each packet comes out when that is done. So silence is proved by the sentinel and not by waiting.
"""

import contextlib
import fcntl
import os
import select
import socket
import struct
from collections.abc import Collection, Iterator
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from dataplane.model import Address, Network, Protocol, format_address, parse_address
from dataplane.run_tool import run_tool

from .packets import ICMP, ICMP6, Packet, What, build, parse, parse_body

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_RAW_IPV6_PKTINFO, _RECV_PKTINFO = socket.IPV6_PKTINFO, socket.IPV6_RECVPKTINFO
_SENTINEL_SECONDS = 10.0
_SENTINEL_PORT = 9
_LOOPBACK = {4: parse_address("127.0.0.1"), 16: parse_address("::1")}
# addresses of benchmark networks (RFC 2544, RFC 5180), which no case has
_FROM = {4: parse_address("198.18.0.1"), 16: parse_address("2001:2::1")}
_TO = {4: parse_address("198.18.0.2"), 16: parse_address("2001:2::2")}
# what masquerading takes for packets to the pods: seen at once, also where the client is the node's first address
GATEWAYS = frozenset({parse_address("198.18.0.3"), parse_address("2001:2::3")})
_NETLINK_NETFILTER = 12
_FLUSH_CONNTRACK = struct.pack("=IHHII", 20, 0x102, 0x5, 1, 0) + struct.pack("=BBH", 0, 0, 0)


class Place(Enum):
    """Where a packet starts or comes out."""

    NODE = "the node"
    PODS = "the pods"
    WORLD = "the world"


class Sighting(NamedTuple):
    """A packet of ours that came out somewhere."""

    place: Place
    packet: Packet


class WorldStuck(Exception):
    """A packet that nothing should hold did not come through, so silence proves nothing."""


class World:
    """The node's surroundings. Make it inside a new network namespace, which it changes as it likes."""

    def __init__(self) -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one backlog, so that the sentinel comes last
        self._routes: set[str] = set()
        self._addresses: list[Address] = []
        self._tag = int.from_bytes(os.urandom(3)) << 8
        self._port = 1024
        self._poll = select.poll()
        self._places: dict[int, Place] = {}
        self._receivers: dict[int, socket.socket] = {}
        self._protocols: dict[int, int] = {}
        with contextlib.suppress(Exception):
            run_tool(["modprobe", "-q", "tun"])  # built in, or loaded already, or the next line says what is missing
        self._tuns = {place: self._open_tun(name, place) for place, name in _TUNS.items()}
        self._prepare_node()
        self._senders = {
            4: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW),
            16: socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW),
        }
        for protocol in (*Protocol, ICMP):
            self._open_receiver(socket.AF_INET, protocol)
        for protocol in (*Protocol, ICMP6):
            self._open_receiver(socket.AF_INET6, protocol)
        self._netfilter = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)

    # --------------------------------------------------------------------------------------------------- making it

    def _open_tun(self, name: str, place: Place) -> int:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
        self._places[descriptor] = place
        self._poll.register(descriptor, select.POLLIN)
        return descriptor

    def _open_receiver(self, family: int, protocol: int) -> None:
        """A raw socket: it gets a copy of everything of a protocol that is delivered on the node, listener or not."""
        one = socket.socket(family, socket.SOCK_RAW, protocol)
        one.setblocking(False)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, _RECV_PKTINFO, 1)
        self._receivers[one.fileno()] = one
        self._protocols[one.fileno()] = protocol
        self._poll.register(one, select.POLLIN)

    def _prepare_node(self) -> None:
        for key, value in _SYSCTLS:
            with contextlib.suppress(FileNotFoundError):
                Path("/proc/sys/net", key).write_text(value)
        commands = ["link set lo up"]
        for name in _TUNS.values():
            commands += [f"link set {name} addrgenmode none txqueuelen 1000", f"link set {name} up"]
        commands += [f"address add {_host(each)} dev {_TUNS[Place.PODS]}{_nodad(each)}" for each in GATEWAYS]
        world = _TUNS[Place.WORLD]
        _ip([*commands, f"route add default dev {world}", f"-6 route add default dev {world}"])

    def shape(self, addresses: Collection[Address], pods: Collection[Network]) -> None:
        """Give the node its addresses (the primary one of a family first) and the routes to the pods."""
        world, behind = _TUNS[Place.WORLD], _TUNS[Place.PODS]
        commands = []
        wanted = list(dict.fromkeys(addresses))
        if wanted != self._addresses:
            # all anew: the first is the one that masquerading takes, and with the last one go the device's routes
            commands += [f"address del {_host(each)} dev {world}" for each in self._addresses]
            commands += [f"address add {_host(each)} dev {world}{_nodad(each)}" for each in wanted]
            commands += [f"{version}route replace default dev {world}" for version in ("", "-6 ")]
            self._addresses = wanted
        routes = {str(network) for network in pods}
        commands += [f"{_family(route)}route del {route} dev {behind}" for route in sorted(self._routes - routes)]
        commands += [f"{_family(route)}route add {route} dev {behind}" for route in sorted(routes - self._routes)]
        self._routes = routes
        if commands:
            _ip(commands)

    @contextlib.contextmanager
    def local(self, address: Address) -> Iterator[None]:
        """An address is the node's own meanwhile, as a load balancer's agent makes it."""
        route = f"local {_host(address)} dev lo"
        family = "-6 " if len(address) == 16 else ""
        _ip([f"{family}route add {route}"], force=True)  # in ipvs mode it is there already
        try:
            yield
        finally:
            _ip([f"{family}route del {route}"], force=True)

    def forget_connections(self) -> None:
        """Empty conntrack, so that no packet meets a connection of an earlier case."""
        self._netfilter.send(_FLUSH_CONNTRACK)
        self._netfilter.recv(4096)

    # --------------------------------------------------------------------------------------------------- playing

    def is_node(self, address: Address) -> bool:
        """Whether an address is one of the node's own, loopback included."""
        return address in self._addresses or is_loopback(address)

    def next_tag(self) -> int:
        self._tag = self._tag + 1 & 0xFFFFFFFF or 1
        return self._tag

    def next_port(self) -> int:
        """A source port that no connection had for a long time; never a node port."""
        self._port += 1
        if self._port == 30000:
            self._port = 32768
        if self._port > 65000:
            self._port = 1025
        return self._port

    def send(self, place: Place, packet: bytes) -> str:
        """Let a packet start somewhere; how the kernel refused to take it, else ""."""
        if place is not Place.NODE:
            os.write(self._tuns[place], packet)
            return ""
        is_v4 = packet[0] >> 4 == 4
        destination = socket.inet_ntop(
            *((socket.AF_INET, packet[16:20]) if is_v4 else (socket.AF_INET6, packet[24:40]))
        )
        try:
            self._senders[4 if is_v4 else 16].sendto(packet, (destination, 0))
        except OSError as error:
            return os.strerror(error.errno or 0)
        return ""

    def follow(self, place: Place, family: int) -> list[Sighting]:
        """Everything of ours that has come out since the last call; `place`, `family`: where a packet has started."""
        sentinel = self.next_tag()
        ends = (_LOOPBACK[family],) * 2 if place is Place.NODE else (_FROM[family], _TO[family])
        packet = build(What.OPENING, Protocol.UDP, *ends, _SENTINEL_PORT, _SENTINEL_PORT, sentinel)
        refused = self.send(place, packet)
        if refused:
            raise WorldStuck(f"a packet from {place.value} to {format_address(ends[1])} was not taken: {refused}")
        found: list[Sighting] = []
        while True:
            ready = self._poll.poll(_SENTINEL_SECONDS * 1000)
            if not ready:
                raise WorldStuck(f"a packet from {place.value} to {format_address(ends[1])} did not come through")
            seen = False
            for descriptor, _ in ready:
                for sighting in self._read(descriptor):
                    if sighting.packet.tag == sentinel:
                        seen = seen or sighting.packet.what is What.OPENING
                    else:
                        found.append(sighting)
            if seen:
                # what lay in a descriptor that was looked at before the sentinel's
                for descriptor, _ in self._poll.poll(0):
                    found += [each for each in self._read(descriptor) if each.packet.tag != sentinel]
                return found

    def _read(self, descriptor: int) -> Iterator[Sighting]:
        place = self._places.get(descriptor, Place.NODE)
        one = self._receivers.get(descriptor)
        while True:
            try:
                packet = parse(os.read(descriptor, 65536)) if one is None else self._receive(one)
            except BlockingIOError:
                return
            if packet is not None:
                yield Sighting(place, packet)

    def _receive(self, one: socket.socket) -> Packet | None:
        """What a raw socket of the node got. Checksums on the loopback are left to nobody, so they are not verified."""
        if one.family == socket.AF_INET:
            return parse(one.recv(65536), verify=False)
        body, ancillary, _, source = one.recvmsg(65536, 256)
        for level, kind, value in ancillary:
            if level == socket.IPPROTO_IPV6 and kind == _RAW_IPV6_PKTINFO:
                protocol = self._protocols[one.fileno()]
                src = parse_address(source[0].partition("%")[0])
                return parse_body(protocol, src, Address(value[:16]), body, verify=False)
        return None

    def close(self) -> None:
        for one in (*self._receivers.values(), *self._senders.values(), self._netfilter):
            one.close()
        for descriptor in self._tuns.values():
            os.close(descriptor)


_TUNS = {Place.PODS: "pods0", Place.WORLD: "world0"}
_SYSCTLS = (
    ("ipv4/ip_forward", "1"),
    ("ipv6/conf/all/forwarding", "1"),
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    *((f"ipv4/conf/{name}/rp_filter", "0") for name in _TUNS.values()),
    ("ipv4/conf/all/send_redirects", "0"),
    ("ipv4/conf/default/send_redirects", "0"),
    *((f"ipv4/conf/{name}/send_redirects", "0") for name in _TUNS.values()),
    # thousands of refusals in a second are what we want to see
    ("ipv4/icmp_ratelimit", "0"),
    ("ipv4/icmp_ratemask", "0"),
    ("ipv6/icmp/ratelimit", "0"),
    ("ipv6/icmp/ratemask", "\n"),  # an empty write writes nothing
    ("ipv6/conf/all/accept_dad", "0"),
    ("ipv6/conf/default/accept_dad", "0"),
)


def is_loopback(address: Address) -> bool:
    """127.0.0.0/8 and ::1."""
    return address[0] == 127 if len(address) == 4 else address == _LOOPBACK[16]


def _host(address: Address) -> str:
    return f"{format_address(address)}/{8 * len(address)}"


def _nodad(address: Address) -> str:
    return " nodad" if len(address) == 16 else ""


def _family(text: str) -> str:
    return "-6 " if ":" in text else ""


def _ip(commands: list[str], *, force: bool = False) -> None:
    """ip(8), many commands in one process; `force`: a command may fail."""
    v4 = [each for each in commands if not each.startswith("-6 ")]
    v6 = [each.removeprefix("-6 ") for each in commands if each.startswith("-6 ")]
    for family, some in (([], v4), (["-6"], v6)):
        if some:
            _run_ip([*family, *(["-force"] if force else [])], some, force)


def _run_ip(options: list[str], commands: list[str], force: bool) -> None:
    with contextlib.suppress(Exception) if force else contextlib.nullcontext():
        run_tool(["ip", *options, "-batch", "-"], input="\n".join(commands) + "\n", timeout=60)
