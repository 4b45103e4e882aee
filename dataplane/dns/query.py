"""A query out of a packet, and whether it is one. Pure; its few fields are read by hand, since strangers send them.

RFC 1035 4.1 (header, question), RFC 6891 (EDNS0).
"""

import struct
from typing import NamedTuple

from .names import Labels, read_name
from .rrsets import FORMERR, NOTIMP, REFUSED

HEADER = 12
QR, TC, RD, CD = 0x8000, 0x0200, 0x0100, 0x0010
OPCODE = 0x7800
IN, ANY_CLASS = 1, 255
OPT, IXFR, AXFR = 41, 251, 252
META = range(249, 255)
"""TKEY, TSIG, IXFR, AXFR, MAILB, MAILA: nothing of these is answered."""
BADVERS = 16
LEAST_SIZE, MOST_SIZE = 512, 1232
"""Bytes of an answer over UDP without EDNS0, and at most with it (DNS flag day 2020: fits IPv6's least MTU)."""
_FIELDS = struct.Struct("!HHHHHH")
_RECORD = struct.Struct("!HHIH")
_DNSSEC_OK = 0x8000


class Query(NamedTuple):
    """A well-formed question. `question_end`: offset behind it. `size`: bytes an answer over UDP may have."""

    id: int
    flags: int
    labels: Labels
    qtype: int
    question_end: int
    edns: bool
    dnssec_ok: bool
    size: int
    plain: bool
    """Nothing of it but id and case is its client's own: equal ones get equal answers."""


class Refusal(NamedTuple):
    """Why there is no answer, and how much of the packet goes back with that."""

    rcode: int
    question_end: int
    edns: bool = False


def read_query(packet: bytes) -> Query | Refusal | None:
    """None: not even worth an answer (too short, or an answer itself)."""
    if len(packet) < HEADER:
        return None
    number, flags, questions, answers, authorities, additionals = _FIELDS.unpack_from(packet)
    if flags & QR:
        return None
    if flags & OPCODE:
        return Refusal(NOTIMP, HEADER)
    if questions != 1 or answers:
        return Refusal(FORMERR, HEADER)
    named = read_name(packet, HEADER)
    if named is None or len(packet) < named[1] + 4:
        return Refusal(FORMERR, HEADER)
    labels, end = named
    qtype, qclass = struct.unpack_from("!HH", packet, end)
    end += 4
    if qtype in META:  # IXFR comes with an SOA in the authority section, which need not be read
        return Refusal(REFUSED, end)
    if authorities or additionals > 4 or qtype == OPT:
        return Refusal(FORMERR, end)
    offset, options, edns, dnssec_ok, size = end, 0, False, False, LEAST_SIZE
    for _ in range(additionals):
        owner = read_name(packet, offset)
        if owner is None or len(packet) < owner[1] + _RECORD.size:
            return Refusal(FORMERR, end)
        rtype, rclass, ttl, length = _RECORD.unpack_from(packet, owner[1])
        offset = owner[1] + _RECORD.size + length
        if offset > len(packet):
            return Refusal(FORMERR, end)
        if rtype != OPT:
            options += 1  # a TSIG or another record: not ours to check, and nothing to remember an answer by
            continue
        if edns or owner[0]:
            return Refusal(FORMERR, end)
        edns, dnssec_ok, options = True, bool(ttl & _DNSSEC_OK), options + length
        size = min(max(rclass, LEAST_SIZE), MOST_SIZE)
        if ttl >> 16 & 0xFF:
            return Refusal(BADVERS, end, True)
    if offset != len(packet):
        return Refusal(FORMERR, end)
    if qclass not in (IN, ANY_CLASS):
        return Refusal(REFUSED, end, edns)
    return Query(number, flags, labels, qtype, end, edns, dnssec_ok, size, not options and qclass == IN)
