"""The IPVS generic netlink family: its attributes, and every message we send or read (linux/ip_vs.h, ip_vs_ctl.c).

Declarations first, in the header's order; then whole messages. A virtual server with all its real servers is one
precompiled template per *shape* (family, scheduler, flags, weights …), so that encoding it is a single C call: full
programming costs little more than sending bytes that lie ready.
"""

import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from .model import Address, Forwarding, RealServer, VirtualAddress, VirtualServer, family_of
from .netlink_socket import GENL_HEADER, HEADER, NLM_F_ACK, NLM_F_REQUEST, genl_message
from .nlattr import (
    LayoutReader,
    NlAttrs,
    Part,
    Slot,
    attr,
    be16,
    compile_template,
    cstring,
    nest,
    nested,
    raw8,
    raw16,
    u8,
    u16,
    u32,
    u32_bytes,
    u64,
    width_of,
)
from .plan import Change

FAMILY_NAME = "IPVS"
GENL_VERSION = 1
DATA = HEADER.size + GENL_HEADER.size  # where attributes start in a message

# enum IPVS_CMD_*
NEW_SERVICE, SET_SERVICE, DEL_SERVICE, GET_SERVICE = 1, 2, 3, 4
NEW_DEST, SET_DEST, DEL_DEST, GET_DEST = 5, 6, 7, 8
SET_CONFIG, GET_CONFIG = 12, 13
GET_INFO, ZERO = 15, 16

COMMAND_NAMES = {
    NEW_SERVICE: "add virtual server",
    SET_SERVICE: "change virtual server",
    DEL_SERVICE: "remove virtual server",
    NEW_DEST: "add real server",
    SET_DEST: "change real server",
    DEL_DEST: "remove real server",
}

SVC_F_PERSISTENT = 0x01
SVC_F_HASHED = 0x02  # the kernel adds it to every server in its table
FWD_MASK = 0x07
ALL_FLAGS = 0xFFFF_FFFF


class Stats64Attrs(NlAttrs):
    """IPVS_STATS_ATTR_* in their 64-bit form."""

    connections = attr(1, u64)
    packets_in = attr(2, u64)
    packets_out = attr(3, u64)
    bytes_in = attr(4, u64)
    bytes_out = attr(5, u64)
    connections_per_second = attr(6, u64)
    packets_in_per_second = attr(7, u64)
    packets_out_per_second = attr(8, u64)
    bytes_in_per_second = attr(9, u64)
    bytes_out_per_second = attr(10, u64)


class ServiceAttrs(NlAttrs):
    """IPVS_SVC_ATTR_*."""

    af = attr(1, u16)
    protocol = attr(2, u16)
    addr = attr(3, raw16)  # union nf_inet_addr: 16 bytes for either family
    port = attr(4, be16)
    fwmark = attr(5, u32)
    sched_name = attr(6, cstring)
    flags = attr(7, raw8)  # struct ip_vs_flags: u32 flags, u32 mask
    timeout = attr(8, u32)  # persistence, seconds
    netmask = attr(9, u32)  # IPv4: mask in network order; IPv6: prefix length in host order
    pe_name = attr(11, cstring)
    stats64 = attr(12, nested(Stats64Attrs))


class DestAttrs(NlAttrs):
    """IPVS_DEST_ATTR_*."""

    addr = attr(1, raw16)
    port = attr(2, be16)
    fwd_method = attr(3, u32)
    weight = attr(4, u32)
    u_thresh = attr(5, u32)
    l_thresh = attr(6, u32)
    active_conns = attr(7, u32)
    inact_conns = attr(8, u32)
    persist_conns = attr(9, u32)
    addr_family = attr(11, u16)
    stats64 = attr(12, nested(Stats64Attrs))
    tun_type = attr(13, u8)
    tun_port = attr(14, be16)
    tun_flags = attr(15, u16)


class CommandAttrs(NlAttrs):
    """IPVS_CMD_ATTR_*."""

    service = attr(1, nested(ServiceAttrs))
    dest = attr(2, nested(DestAttrs))
    timeout_tcp = attr(4, u32)
    timeout_tcp_fin = attr(5, u32)
    timeout_udp = attr(6, u32)


class InfoAttrs(NlAttrs):
    """IPVS_INFO_ATTR_*."""

    version = attr(1, u32)  # KERNEL_VERSION(1, 2, 1)
    conn_tab_size = attr(2, u32)


class Timeouts(NamedTuple):
    """Connection timeouts in seconds (`ipvsadm --set`); 0 in a request = leave as it is."""

    tcp: int
    tcp_fin: int
    udp: int


# ---------------------------------------------------------------------------------------------------- encoding


class Shape(NamedTuple):
    """What messages of one template have in common; everything but addresses and ports."""

    family_id: int
    address_width: int
    protocol: int
    scheduler: str
    flags: int
    persistence: int
    netmask: int
    marked: bool = False
    """Known by a firewall mark instead of protocol, address and port; the mark then is the slot "vip"."""


def shape_of(server: VirtualServer, family_id: int) -> Shape:
    """The part of a virtual server that is folded into a template."""
    at = server.at
    width = len(at.address)
    flags = server.flags | SVC_F_PERSISTENT if server.persistence else server.flags
    netmask = netmask_of(width, server)
    return Shape(family_id, width, at.protocol, server.scheduler, flags, server.persistence, netmask, at.inside)


def netmask_of(width: int, server: VirtualServer) -> int:
    """Persistence granularity as the kernel wants it; without persistence the whole address."""
    prefix = server.persistence_prefix if server.persistence else 8 * width
    if width == 16:
        return prefix
    mask: int = struct.unpack("=I", (0xFFFF_FFFF << (32 - prefix) & 0xFFFF_FFFF).to_bytes(4))[0]
    return mask


def _key_parts(shape: Shape) -> list[Part]:
    """The attributes by which the kernel finds a virtual server."""
    if shape.marked:
        return ServiceAttrs.parts({"af": 2 if shape.address_width == 4 else 10, "fwmark": Slot("vip", "4s")})
    return ServiceAttrs.parts(
        {
            "af": 2 if shape.address_width == 4 else 10,
            "protocol": shape.protocol,
            "addr": Slot("vip", f"{shape.address_width}s"),
            "port": Slot("vport", "H"),
        }
    )


def _service_parts(shape: Shape) -> list[Part]:
    flags = u32.encode(shape.flags) + u32.encode(ALL_FLAGS)
    rest = {
        "sched_name": shape.scheduler,
        "flags": flags,
        "timeout": shape.persistence,
        "netmask": shape.netmask,
    }
    return _key_parts(shape) + ServiceAttrs.parts(rest)


class _Dest(NamedTuple):
    """What a template folds in of a real server."""

    width: int
    weight: int
    forwarding: int = 0
    upper: int = 0
    lower: int = 0


def _dest_parts(dest: _Dest, name: str) -> list[Part]:
    return DestAttrs.parts(
        {
            "addr": Slot(f"{name}.address", f"{dest.width}s"),
            "port": Slot(f"{name}.port", "H"),
            "fwd_method": dest.forwarding,
            "weight": dest.weight,
            "u_thresh": dest.upper,
            "l_thresh": dest.lower,
            "addr_family": 2 if dest.width == 4 else 10,
        }
    )


def _message_parts(family_id: int, command: int, attributes: list[Part], asking: bool = False) -> list[Part]:
    length = DATA + width_of(attributes)
    head = HEADER.pack(length, family_id, NLM_F_REQUEST, 0, 0) + GENL_HEADER.pack(command, GENL_VERSION, 0)
    if asking:
        head = HEADER.pack(length, family_id, NLM_F_REQUEST | NLM_F_ACK, 0, 0) + head[16:]
        return [head[:8], Slot("seq", "I"), head[12:], *attributes]
    return [head, *attributes]


_SERVICE, _DEST = CommandAttrs.by_name["service"].number, CommandAttrs.by_name["dest"].number


@lru_cache(maxsize=1024)
def _service_template(shape: Shape, command: int, dests: tuple[_Dest, ...]) -> Callable[..., bytes]:
    """One NEW/SET_SERVICE (or DEL_SERVICE) message and, behind it, one NEW_DEST for each of `dests`."""
    key_only = command in (DEL_SERVICE, ZERO)
    service = _key_parts(shape) if key_only else _service_parts(shape)
    parts = _message_parts(shape.family_id, command, nest(_SERVICE, service))
    names = ["vip", "vport"]
    for index, dest in enumerate(dests):
        names.append(f"real{index}")
        inner = nest(_SERVICE, _key_parts(shape)) + nest(_DEST, _dest_parts(dest, names[-1]))
        parts += _message_parts(shape.family_id, NEW_DEST, inner)
    return compile_template(parts, names)


@lru_cache(maxsize=1024)
def _dest_template(
    family_id: int, width: int, protocol: int, command: int, dest: _Dest, marked: bool, asking: bool = False
) -> Callable[..., bytes]:
    """One NEW_, SET_ or DEL_DEST message."""
    shape = Shape(family_id, width, protocol, "", 0, 0, 0, marked)
    inner = nest(_SERVICE, _key_parts(shape)) + nest(_DEST, _dest_parts(dest, "real"))
    names = ["vip", "vport", "real", "seq"] if asking else ["vip", "vport", "real"]
    return compile_template(_message_parts(family_id, command, inner, asking), names)


def _fold(real: RealServer) -> _Dest:
    # a plain int: an enum's hash is a call of Python code
    return _Dest(len(real.address), real.weight, int(real.forwarding), real.upper_threshold, real.lower_threshold)


TOGETHER = 8
"""Real servers encoded in one call with their virtual server; more of them go one by one (templates stay few)."""


_MASQ = Forwarding.MASQ


class Encoder:
    """Messages for one kernel: knows the number that kernel gave to the IPVS family.

    IPVS has no servers for some clients only, but it has servers by firewall mark, which it looks for first: so a
    server for clients inside the cluster is one. `marks` says which mark.
    """

    def __init__(self, family_id: int, marks: Mapping[VirtualAddress, int] | None = None) -> None:
        self.family_id = family_id
        self._marks = marks if marks is not None else {}
        self._new: dict[tuple[object, ...], Callable[..., bytes]] = {}
        self._usual: dict[tuple[int, int, int, str], Callable[..., bytes]] = {}
        self._plain: dict[tuple[int, ...], Callable[..., bytes]] = {}
        self._asking: dict[tuple[int, ...], Callable[..., bytes]] = {}

    def new_server(self, server: VirtualServer) -> bytes:
        """NEW_SERVICE and a NEW_DEST for each real server, in one piece of bytes."""
        at, reals = server.at, server.real_servers
        if not (server.flags or server.persistence or at[3]) and server.persistence_prefix == 32:
            # as nearly all are: plain real servers are only counted
            width = len(at[1])
            for real in reals:
                if (
                    real.weight != 1
                    or real.forwarding is not _MASQ
                    or real.upper_threshold
                    or real.lower_threshold
                    or len(real.address) != width
                ):
                    break
            else:
                template = self._usual.get((len(reals), at[0], width, server.scheduler))
                if template is not None:
                    return template(at[1], at[2], *reals)
        return self._new_server(server)

    def _new_server(self, server: VirtualServer) -> bytes:
        """The same for any server; templates of usual ones are kept for the shorter way."""
        protocol, address, port, inside = server.at
        if inside:
            return self.server(NEW_SERVICE, server) + b"".join(
                self.real(NEW_DEST, server, r) for r in server.real_servers
            )
        reals, width = server.real_servers, len(address)
        # everything the template folds in, as one cheap dictionary key: plain real servers are only counted
        settings: tuple[_Dest, ...] = ()
        for real in reals:
            if (
                real.weight != 1
                or real.forwarding
                or real.upper_threshold
                or real.lower_threshold
                or len(real.address) != width
            ):
                settings = tuple(map(_fold, reals))
                break
        key = (
            len(reals),
            settings,
            protocol,
            width,
            server.scheduler,
            server.flags,
            server.persistence,
            server.persistence_prefix,
        )
        template = self._new.get(key)
        if template is None:
            if len(reals) > TOGETHER:
                return self.server(NEW_SERVICE, server) + b"".join(self.real(NEW_DEST, server, r) for r in reals)
            template = _service_template(shape_of(server, self.family_id), NEW_SERVICE, tuple(map(_fold, reals)))
            if len(self._new) < 1024:
                self._new[key] = template
                if not (settings or server.flags or server.persistence) and server.persistence_prefix == 32:
                    self._usual[len(reals), protocol, width, server.scheduler] = template
        return template(address, port, *reals)

    def server(self, command: int, server: VirtualServer) -> bytes:
        """One NEW_, SET_ or DEL_SERVICE message."""
        template = _service_template(shape_of(server, self.family_id), command, ())
        at = server.at
        return template(self._mark(at) if at.inside else at.address, at.port)

    def _mark(self, at: VirtualAddress) -> bytes:
        return u32_bytes(self._marks[at])

    def real(self, command: int, server: VirtualServer, real: RealServer) -> bytes:
        """One NEW_, SET_ or DEL_DEST message."""
        protocol, address, port, inside = server.at
        key = (command, protocol, len(address), len(real.address), real.weight, inside)
        plain = not (real.forwarding or real.upper_threshold or real.lower_threshold)
        template = self._plain.get(key) if plain else None
        if template is None:
            template = _dest_template(self.family_id, len(address), protocol, command, _fold(real), inside)
            if plain and len(self._plain) < 1024:
                self._plain[key] = template
        return template(self._mark(server.at) if inside else address, port, real)

    def reals(self, changes: Sequence[Change], seq: int) -> bytes:
        """NEW_, SET_ and DEL_DEST messages, joined; the last asks for an ACK and has `seq`, in network order.

        Made for few: mostly there is only one.
        """
        final = changes[-1]
        add, edit, remove, _ = final.differing
        if remove:
            last, command = remove[-1], DEL_DEST
        elif edit:
            last, command = edit[-1], SET_DEST
        else:
            last, command = add[-1], NEW_DEST
        protocol, address, port, inside = at = final.new.at
        key = (command, protocol, len(address), len(last.address), last.weight, inside)
        template = self._asking.get(key)
        if template is None or last.forwarding or last.upper_threshold or last.lower_threshold:
            template = _dest_template(self.family_id, len(address), protocol, command, _fold(last), inside, asking=True)
            if not (last.forwarding or last.upper_threshold or last.lower_threshold) and len(self._asking) < 1024:
                self._asking[key] = template
        message = template(self._mark(at) if inside else address, port, last, seq)
        if len(changes) == 1 and len(add) + len(edit) + len(remove) == 1:
            return message
        pieces: list[bytes] = []
        for change in changes:
            server = change.new
            add, edit, remove, _ = change.differing
            for each, reals in ((NEW_DEST, add), (SET_DEST, edit), (DEL_DEST, remove)):
                for real in reals:
                    pieces.append(self.real(each, server, real))
        pieces[-1] = message
        return b"".join(pieces)

    def get_servers(self) -> bytes:
        """Dump request for all virtual servers."""
        return genl_message(self.family_id, GET_SERVICE, 0)

    def get_reals_of_mark(self, fwmark: int, family: int) -> bytes:
        """Dump request for the real servers of a virtual server by firewall mark."""
        return genl_message(self.family_id, GET_DEST, 0, CommandAttrs.encode(service={"af": family, "fwmark": fwmark}))

    def get_server(self, at: VirtualAddress) -> bytes:
        """Request for one virtual server (no dump)."""
        if at.inside:
            key: dict[str, object] = {"af": family_of(at.address), "fwmark": self._marks[at]}
        else:
            key = {"af": family_of(at.address), "protocol": at.protocol, "addr": at.address, "port": at.port}
        return genl_message(self.family_id, GET_SERVICE, 0, CommandAttrs.encode(service=key))

    def get_reals(self, at: VirtualAddress) -> bytes:
        """Dump request for the real servers of one virtual server."""
        if at.inside:
            return self.get_reals_of_mark(self._marks[at], family_of(at.address))
        template = _dump_template(self.family_id, len(at.address), at.protocol)
        return template(at.address, at.port)

    def command(self, command: int, **attributes: object) -> bytes:
        """A message with command attributes of its own (SET_CONFIG) or none (GET_INFO)."""
        return genl_message(self.family_id, command, 0, CommandAttrs.encode(**attributes))


@lru_cache(maxsize=64)
def _dump_template(family_id: int, width: int, protocol: int) -> Callable[..., bytes]:
    shape = Shape(family_id, width, protocol, "", 0, 0, 0)
    parts = _message_parts(family_id, GET_DEST, nest(_SERVICE, _key_parts(shape)))
    return compile_template(parts, ["vip", "vport"])


# ---------------------------------------------------------------------------------------------------- decoding


class Traffic(NamedTuple):
    """IPVS statistics of a virtual or real server (IPVS_STATS_ATTR_*); rates are per second."""

    connections: int = 0
    packets_in: int = 0
    packets_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    connections_per_second: int = 0
    packets_in_per_second: int = 0
    packets_out_per_second: int = 0
    bytes_in_per_second: int = 0
    bytes_out_per_second: int = 0


class ServerEntry(NamedTuple):
    """A virtual server as the kernel reports it, without its real servers.

    One by firewall mark has `fwmark` set and an address of zeros.
    """

    server: VirtualServer
    fwmark: int
    family: int
    engine: str
    """Persistence engine, "" = none."""
    traffic: Traffic


class RealEntry(NamedTuple):
    """A real server as the kernel reports it, with its connections."""

    real: RealServer
    active: int
    inactive: int
    persistent: int
    traffic: Traffic
    tunnel: tuple[int, int, int] = (0, 0, 0)
    """IP_VS_CONN_F_TUNNEL_TYPE_*, port and flags of a tunnelled real server."""


def decode_server(message: bytes) -> ServerEntry:
    """One answer to GET_SERVICE."""
    values = CommandAttrs.decode(message, DATA)["service"]
    width = 4 if values["af"] == 2 else 16
    flags, _ = struct.unpack("=II", values["flags"])
    persistence = values["timeout"] if flags & SVC_F_PERSISTENT else 0
    traffic = Traffic(**values.get("stats64", {}))
    engine = values.get("pe_name", "")
    fwmark = values.get("fwmark", 0)
    address = Address(bytes(width) if fwmark else values["addr"][:width])
    # without persistence the mask means nothing: one canonical value, so that equal servers compare equal
    netmask = values["netmask"]
    prefix = (netmask if width == 16 else netmask.bit_count()) if persistence else 32
    server = VirtualServer(
        VirtualAddress(values.get("protocol", 0), address, values.get("port", 0)),
        (),
        values["sched_name"],
        flags & ~(SVC_F_PERSISTENT | SVC_F_HASHED),
        persistence,
        prefix,
    )
    return ServerEntry(server, fwmark, values["af"], engine, traffic)


def decode_real(message: bytes) -> RealEntry:
    """One answer to GET_DEST."""
    values = CommandAttrs.decode(message, DATA)["dest"]
    width = 4 if values.get("addr_family", 2) == 2 else 16
    real = RealServer(
        Address(values["addr"][:width]),
        values["port"],
        values["weight"],
        False,
        Forwarding(values["fwd_method"] & FWD_MASK),
        values["u_thresh"],
        values["l_thresh"],
    )
    return RealEntry(
        real,
        values["active_conns"],
        values["inact_conns"],
        values["persist_conns"],
        Traffic(**values.get("stats64", {})),
        (values.get("tun_type", 0), values.get("tun_port", 0), values.get("tun_flags", 0)),
    )


_REAL_SERVER = LayoutReader(DestAttrs, ("addr", "port", "weight", "fwd_method", "u_thresh", "l_thresh", "addr_family"))


def decode_real_server(message: bytes, local: Collection[Address]) -> RealServer:
    """The real server of an answer to GET_DEST without its counters, for looks at thousands; `local`: hairpins."""
    address, port, weight, forwarding, upper, lower, family = _REAL_SERVER.read(message, DATA + 4)
    if family in (None, 2):
        address = address[:4]
    method = Forwarding(forwarding & FWD_MASK) if forwarding & FWD_MASK else Forwarding.MASQ
    return RealServer(address, port, weight, address in local, method, upper, lower)


class Named(NamedTuple):
    """What a refused message was about. `mark`: of a virtual server that has no address, else 0."""

    command: int
    at: VirtualAddress | None
    real: tuple[Address, int] | None
    scheduler: str
    mark: int = 0


def name_message(message: bytes) -> Named:
    """Which object a message of ours speaks of; for mapping failures back."""
    command = message[HEADER.size]
    values = CommandAttrs.decode(message, DATA)
    at = real = None
    scheduler = ""
    mark = 0
    if service := values.get("service"):
        width = 4 if service["af"] == 2 else 16
        mark = service.get("fwmark", 0)
        if not mark:
            at = VirtualAddress(service["protocol"], Address(service["addr"][:width]), service["port"])
        scheduler = service.get("sched_name", "")
    if dest := values.get("dest"):
        width = 4 if dest.get("addr_family", 2) == 2 else 16
        real = (Address(dest["addr"][:width]), dest["port"])
    return Named(command, at, real, scheduler, mark)
