"""Bytes of answers: what stands behind the question, made once (dnspython), and put behind any question of its length.

Owners are pointers into the question, so the answer is in the client's own upper and lower case, and fits every
client's packet.
"""

import struct

import dns.exception
import dns.message
import dns.name
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from .names import Labels
from .query import HEADER, IN
from .rrsets import AAAA, SOA, A, Found, RRset

MOST_RECORDS = 1024
"""Records of an answer: more than 64 KiB cannot hold, and nobody tries so many addresses."""
MESSAGE = 65535
_POINTER = 0xC000
ROOM = 1024
"""Bytes kept for what is put to it: OPT, and more."""
REFRESH, RETRY, EXPIRE = 7200, 1800, 86400
"""Seconds of the SOA, as CoreDNS has them; nobody transfers this zone."""


class Body:
    """What follows a question: `tail`, of which `answer_size` bytes are not additional.

    `step`: bytes of each record where all are alike and may take turns, else 0. `answers`, `authorities`,
    `additionals`: records of each section. `uses`: answers made of it. `keys`: of what was prepared from it.
    """

    __slots__ = (
        "additionals",
        "answer_size",
        "answers",
        "authorities",
        "depends",
        "keys",
        "rcode",
        "step",
        "tail",
        "uses",
    )

    def __init__(
        self, rcode: int, tail: bytes, counts: tuple[int, int, int], answer_size: int = 0, step: int = 0
    ) -> None:
        self.rcode = rcode
        self.tail = tail
        self.answers, self.authorities, self.additionals = counts
        self.answer_size = answer_size or len(tail)
        self.step = step
        self.uses = 0
        self.keys: list[bytes] = []
        self.depends: tuple[object, ...] = ()


def render(labels: Labels, qtype: int, found: Found) -> Body:
    """An answer with records. The name asked for must be one of ours: its labels are written again."""
    qname = dns.name.Name([*(label.encode("latin-1") for label in labels), b""])
    for most, extras in ((MOST_RECORDS, found.additional), (MOST_RECORDS, ()), (MOST_RECORDS // 4, ())):
        message = dns.message.QueryMessage(id=0)
        message.question.append(dns.rrset.RRset(qname, dns.rdataclass.IN, dns.rdatatype.RdataType.make(qtype)))
        message.answer = [_rrset(rrset, most) for rrset in found.answer]
        try:
            short = message.to_wire(max_size=MESSAGE - ROOM)
            message.additional = [_rrset(rrset, most) for rrset in extras]
            whole = message.to_wire(max_size=MESSAGE - ROOM) if extras else short
        except dns.exception.TooBig:
            continue
        start = HEADER + sum(len(label) + 1 for label in labels) + 5
        _, _, _, answers, _, extra = struct.unpack_from("!HHHHHH", whole)
        size = len(short) - start
        alike = len(found.answer) == 1 and answers > 1 and qtype in (A, AAAA)
        return Body(found.rcode, whole[start:], (answers, 0, extra), size, size // answers if alike else 0)
    raise AssertionError("a fourth of the records fits")


def _rrset(rrset: RRset, most: int) -> dns.rrset.RRset:
    return dns.rrset.from_text(rrset.name, rrset.ttl, "IN", rrset.type, *rrset.data[:most])


def denial(labels: Labels, zone: Labels, rcode: int, serial: int, ttl: int) -> Body:
    """NXDOMAIN or NODATA with the zone's SOA (RFC 2308), whose names are pointers into the question."""
    soa = soa_record(labels, zone, serial, ttl)
    return Body(rcode, soa, (0, 1, 0))


def apex(labels: Labels, serial: int, ttl: int) -> Body:
    """The zone's SOA as an answer."""
    return Body(0, soa_record(labels, labels, serial, ttl), (1, 0, 0))


def soa_record(labels: Labels, zone: Labels, serial: int, ttl: int) -> bytes:
    """The record, for a question about `labels`, which end with the zone."""
    before = sum(len(label) + 1 for label in labels[: len(labels) - len(zone)])
    pointer = struct.pack("!H", _POINTER | HEADER + before)
    names = b"\x02ns\x03dns" + pointer + b"\x0ahostmaster" + pointer
    times = struct.pack("!IIIII", serial & 0xFFFFFFFF, REFRESH, RETRY, EXPIRE, ttl)
    return pointer + struct.pack("!HHIH", SOA, IN, ttl, len(names) + len(times)) + names + times
