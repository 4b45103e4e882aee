"""Connection tracking over netlink (ctnetlink): finds UDP entries that lead to the wrong place, and deletes just them.

UDP has no end of a connection: a client that keeps its source port keeps its conntrack entry, and with it the real
server that was chosen for its first packet, also when that one has gone. What is wrong is said by the caller
(`staleness`); here are the bytes, the reading and the deleting (linux/netfilter/nfnetlink_conntrack.h,
net/netfilter/nf_conntrack_netlink.c).

The kernel is asked to show UDP only, or one destination only (CTA_FILTER, Linux 5.8); kernels without it show the whole
table, and nothing relies on them having obeyed. Entries of another conntrack zone than the default one are somebody
else's. An entry is deleted by its original tuple and its id, so that one that took its place meanwhile stays.
"""

import errno
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from . import procfs_sysctl
from .errors import KernelError
from .model import Family, Protocol
from .netlink_socket import HEADER, NETLINK_NETFILTER, NLM_F_REQUEST, NetlinkSocket, kernel_error, message
from .nftables_messages import NFGENMSG
from .nlattr import (
    NlAttrs,
    Part,
    Slot,
    attr,
    be16,
    be32,
    blob,
    compile_reader,
    nest,
    nested,
    raw4,
    raw16,
    u8,
    u32,
)
from .sightings import Look, Sighting, seen
from .staleness import Place, Right

SUBSYSTEM = 1  # NFNL_SUBSYS_CTNETLINK
NEW, GET, DELETE = 0, 1, 2  # IPCTNL_MSG_CT_*
NEW_GROUP = 1  # NFNLGRP_CONNTRACK_NEW
BODY = HEADER.size + NFGENMSG.size
FILTER_DESTINATION = 1 << 1  # CTA_FILTER_F_* (nf_conntrack_netlink.c): address, protocol number, destination port
FILTER_PROTOCOL = 1 << 3
FILTER_PORT = 1 << 5
BUCKETS_PER_ENTRY = 32
"""Empty buckets the kernel walks through in the time in which it shows us one entry (about 0.1 µs and 4 µs each)."""
Way = Literal["each", "udp", "all"]
"""How to read: one dump for each destination, one of UDP for each family, or one of everything."""


class IpAttrs(NlAttrs):
    """CTA_IP_*."""

    v4_source = attr(1, raw4)
    v4_destination = attr(2, raw4)
    v6_source = attr(3, raw16)
    v6_destination = attr(4, raw16)


class PortAttrs(NlAttrs):
    """CTA_PROTO_*."""

    number = attr(1, u8)
    source = attr(2, be16)
    destination = attr(3, be16)


class TupleAttrs(NlAttrs):
    """CTA_TUPLE_*; `zone`: of one direction."""

    ip = attr(1, nested(IpAttrs))
    ports = attr(2, nested(PortAttrs))
    zone = attr(3, be16)


class FilterAttrs(NlAttrs):
    """CTA_FILTER_*: which fields of the tuples beside it must match."""

    original = attr(1, u32)
    reply = attr(2, u32)


class EntryAttrs(NlAttrs):
    """CTA_*, as far as anybody here reads or writes them."""

    original = attr(1, nested(TupleAttrs))
    reply = attr(2, nested(TupleAttrs))
    status = attr(3, be32)
    timeout = attr(7, be32)
    id = attr(12, be32)
    zone = attr(18, be16)
    filter = attr(25, nested(FilterAttrs))


class _Edges(NlAttrs):
    """The same numbers: the original tuple as it came, to be sent back."""

    original = attr(1, blob)
    id = attr(12, be32)
    zone = attr(18, be16)


class Swept(NamedTuple):
    """What a sweep did: entries the kernel showed, those wrong, and those we had deleted (a few end by themselves)."""

    read: int
    wrong: int
    deleted: int


class Conntrack:
    """The conntrack table of the calling thread's network namespace. Opens its socket when it is first needed."""

    def __init__(self, *, way: Way | None = None) -> None:
        self._sock: NetlinkSocket | None = None
        self._way = way
        """Always read in this way; None = in the cheapest one."""
        self._filters = True
        """The kernel knows CTA_FILTER, as far as we know."""

    def sweep(self, right: Right) -> Swept:
        """Delete the UDP entries to some destinations that lead elsewhere than they may.

        `right`: for each destination (a virtual address, as the client wrote it on the packet) where replies may come
        from: its real servers. An address that is nobody's any more may answer for itself: then entries that were never
        translated stay. Raises KernelError; what was deleted until then is deleted.
        """
        if not right:
            return Swept(0, 0, 0)
        reader = _Reader(right)
        sock = self._sock = self._sock or NetlinkSocket(NETLINK_NETFILTER)
        wrong = self._read(sock, right, reader)
        requests = [_deletion(entry) for entry in dict.fromkeys(wrong)]
        refused = [failure for failure in sock.batch(requests) if failure.errno != errno.ENOENT]
        if refused:
            raise kernel_error("delete", f"{len(refused)} conntrack entries", refused[0].errno, refused[0].text)
        return Swept(reader.shown, len(wrong), len(requests))

    def _read(self, sock: NetlinkSocket, right: Right, reader: "_Reader") -> list[bytes]:
        families = sorted({_family(address) for address, _ in right})
        way = self._way or _cheapest(len(right), len(families))
        if way != "all" and self._filters:
            if way == "each":
                requests = [_question(_family(place[0]), place) for place in right]
            else:
                requests = [_question(family) for family in families]
            try:
                wrong = [entry for request in requests for entry in sock.dump(request, reader.wrong)]
            except KernelError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ERANGE):
                    raise
                self._filters = False
            else:
                self._filters = not reader.others
                if self._filters:
                    return wrong
        reader.shown = 0
        return sock.dump(message(SUBSYSTEM << 8 | GET, NLM_F_REQUEST, NFGENMSG.pack(0, 0, 0)), reader.wrong)

    def close(self) -> None:
        """Give the descriptor back."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def _cheapest(destinations: int, families: int) -> Way:
    """Every dump makes the kernel walk through all buckets, however few entries it shows."""
    count = procfs_sysctl.read("net.netfilter.nf_conntrack_count")
    buckets = procfs_sysctl.read("net.netfilter.nf_conntrack_buckets")
    if count is None or buckets is None:
        return "udp"
    walk = buckets / BUCKETS_PER_ENTRY
    costs: dict[Way, float] = {
        "all": walk + count,
        "udp": families * walk + count / 2,  # how much of it is UDP is not known
        "each": destinations * walk,
    }
    return min(costs, key=lambda way: costs[way])


def _family(address: bytes) -> Family:
    return Family.IPV4 if len(address) == 4 else Family.IPV6


def _question(family: Family, place: Place | None = None) -> bytes:
    """A dump of UDP entries, of one destination or all of a family."""
    ports: dict[str, Any] = {"number": Protocol.UDP}
    original: list[Part] = []
    flags = FILTER_PROTOCOL
    if place is not None:
        address, ports["destination"] = place
        flags |= FILTER_PORT
        if family is Family.IPV4:  # an IPv6 address lets pass what is *not* it (!ipv6_addr_cmp, seen on 6.18)
            original += nest(1, IpAttrs.parts({"v4_source": bytes(4), "v4_destination": address}))
            flags |= FILTER_DESTINATION
    original += nest(2, PortAttrs.parts(ports))
    parts = [*nest(1, original), *nest(25, FilterAttrs.parts({"original": flags}))]
    attributes = b"".join(part for part in parts if isinstance(part, bytes))
    return message(SUBSYSTEM << 8 | GET, NLM_F_REQUEST, NFGENMSG.pack(family, 0, 0) + attributes)


def _deletion(entry: bytes) -> bytes:
    """The request that deletes an entry, made of the message that showed it."""
    seen = _Edges.decode(entry, BODY)
    return message(
        SUBSYSTEM << 8 | DELETE,
        NLM_F_REQUEST,
        NFGENMSG.pack(entry[HEADER.size], 0, 0) + _Edges.encode(original=seen["original"], id=seen["id"]),
    )


_SOURCE = {Family.IPV4: "v4_source", Family.IPV6: "v6_source"}
_DESTINATION = {Family.IPV4: "v4_destination", Family.IPV6: "v6_destination"}


def _layout(family: Family) -> list[Part]:
    """The beginning of an UDP entry as the kernel writes it: both tuples."""
    code = "4s" if family is Family.IPV4 else "16s"

    def tuple_parts(source: Slot, source_port: Slot, destination: Slot, port: Slot) -> list[Part]:
        ip = IpAttrs.parts({_SOURCE[family]: source, _DESTINATION[family]: destination})
        ports = PortAttrs.parts({"number": Protocol.UDP, "source": source_port, "destination": port})
        return [*nest(1, ip), *nest(2, ports)]

    original = tuple_parts(Slot("client", code), Slot("cport", "H"), Slot("vip", code), Slot("vport", "H"))
    reply = tuple_parts(Slot("real", code), Slot("rport", "H"), Slot("back", code), Slot("bport", "H"))
    return [*nest(1, original), *nest(2, reply)]


_READERS: dict[int, Callable[[bytes | bytearray, int], tuple[Any, ...] | None]] = {
    family: compile_reader(_layout(family)) for family in Family
}


class _Reader:
    """Judges entries while they are read: one `unpack`, one look-up, and nothing is copied of what is right."""

    def __init__(self, right: Right) -> None:
        self._right = right
        self.shown = 0
        self.others = False
        """An entry was shown that is not UDP: the kernel does not filter, if it was asked to."""

    def wrong(self, buffer: bytearray, start: int, stop: int) -> bool:
        """Whether the entry in buffer[start:stop] has to go."""
        self.shown += 1
        read = _READERS.get(buffer[start + 16])
        if read is None:
            return False
        values = read(buffer, start + BODY)
        if values is None:
            return self._walk(buffer, start, stop)
        _, vip, _, port, real, _, real_port, _ = values
        targets = self._right.get((vip, port))
        if targets is None or (real, real_port) in targets:
            return False
        return self._ours(buffer, start, stop)

    def _walk(self, buffer: bytearray, start: int, stop: int) -> bool:
        """The same for an entry laid out otherwise: not UDP, as a rule."""
        entry = EntryAttrs.decode(buffer, start + BODY, stop)
        original, reply = entry.get("original", {}), entry.get("reply", {})
        ports, answers = original.get("ports", {}), reply.get("ports", {})
        if ports.get("number") != Protocol.UDP:
            self.others = True
            return False
        there, back = original.get("ip", {}), reply.get("ip", {})
        vip = there.get("v4_destination") or there.get("v6_destination")
        real = back.get("v4_source") or back.get("v6_source")
        targets = self._right.get((vip, ports.get("destination")))
        if targets is None or real is None or (real, answers.get("source")) in targets:
            return False
        return self._ours(buffer, start, stop)

    @staticmethod
    def _ours(buffer: bytearray, start: int, stop: int) -> bool:
        """Not in a zone of somebody else's."""
        entry = EntryAttrs.decode(buffer, start + BODY, stop)
        zones = (entry.get("zone", 0), entry["original"].get("zone", 0), entry["reply"].get("zone", 0))
        return not any(zones) and "id" in entry


class NewConnections:
    """`sightings.Witness` by conntrack's news of entries: each with both of its directions."""

    name = "conntrack events (conntrack -E -e NEW)"

    def __init__(self, wanted: Look) -> None:
        self.blind = "connections that are refused or dropped: conntrack has no entry for these"
        self._wanted = wanted
        self._sock = NetlinkSocket(NETLINK_NETFILTER, groups=(NEW_GROUP,))

    def fileno(self) -> int:
        """Readable when the kernel tells of an entry."""
        return self._sock.fileno()

    def read(self) -> list[Sighting]:
        """What has come since the last call."""
        notes, lost = self._sock.notifications()
        if lost:
            self.blind = "the kernel had more to tell than was read in time: some connections are missing"
        return [sighting for note in notes if (sighting := new_connection(note, self._wanted))]

    def finish(self) -> list[Sighting]:
        """Nothing is ever half seen."""
        return []

    def close(self) -> None:
        """Give the descriptor back: nothing else was needed."""
        self._sock.close()


def new_connection(note: bytes, wanted: Look) -> Sighting | None:
    """The connection that an event tells of, if it is one of those."""
    if HEADER.unpack_from(note)[1] != SUBSYSTEM << 8 | NEW:
        return None
    entry = EntryAttrs.decode(note, BODY)
    original, reply = entry.get("original", {}), entry.get("reply", {})
    if entry.get("zone") or original.get("zone") or reply.get("zone"):
        return None  # somebody else's
    ports, answers = original.get("ports", {}), reply.get("ports", {})
    there, back = original.get("ip", {}), reply.get("ip", {})
    which = "v4" if "v4_source" in there else "v6"
    client, asked = there.get(f"{which}_source"), there.get(f"{which}_destination")
    real, to = back.get(f"{which}_source"), back.get(f"{which}_destination")
    if None in (client, asked, real, to):
        return None
    if not wanted.fits(ports.get("number", 0), client, asked, ports.get("destination", 0)):
        return None
    return seen(
        ports["number"],
        (client, ports.get("source", 0)),
        (asked, ports["destination"]),
        (real, answers.get("source", 0)),
        to,
    )
