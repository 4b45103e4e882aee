"""Whole IP packets as bytes, out and in: the first packets of connections, answers to them, and refusals. Pure.

Every packet carries a tag of 32 bits that address translation leaves alone, so that it is known again wherever it comes
out: TCP's sequence number, SCTP's initiate tag, eight bytes of UDP payload. Answers and refusals are known by the same
tag, ICMP errors by the packet they quote.
"""

import struct
from enum import Enum
from typing import NamedTuple

from dataplane.model import Address, Protocol, format_endpoint

ICMP, ICMP6 = 1, 58
UNREACHABLE, UNREACHABLE6 = 3, 1
REFUSALS = frozenset({(ICMP, 3), (ICMP, 9), (ICMP, 10), (ICMP, 13), (ICMP6, 4), (ICMP6, 1)})
"""ICMP codes of destination unreachable that say no on purpose: port unreachable and the prohibitions."""
_MAGIC, _ANSWER_MAGIC = b"flow", b"wolf"
_TTL = 64


class What(Enum):
    """What a packet is in its connection."""

    OPENING = "opening"
    ANSWER = "answer"
    RESET = "reset"
    ERROR = "error"


class Packet(NamedTuple):
    """A packet of ours. An ERROR has the addresses, ports and tag of the packet that it quotes."""

    what: What
    protocol: int
    src: Address
    dst: Address
    sport: int
    dport: int
    tag: int
    intact: bool = True
    """Its checksum is right."""
    reporter: Address = Address(b"")
    """Of an ERROR: who sent it, and to whom."""
    told: Address = Address(b"")
    code: tuple[int, int] = (0, 0)
    """Of an ERROR: ICMP or ICMP6, and its code."""

    def __str__(self) -> str:
        src, dst = format_endpoint(self.src, self.sport), format_endpoint(self.dst, self.dport)
        return f"{self.what.value} {src} -> {dst}/{Protocol(self.protocol).name}"


def internet_checksum(data: bytes) -> int:
    """RFC 1071: the complement of the one's complement sum of 16-bit words; 0 over data that holds its checksum."""
    total: int = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def _crc_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """Castagnoli's CRC as SCTP uses it (RFC 9260, appendix A)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def build(what: What, protocol: Protocol, src: Address, dst: Address, sport: int, dport: int, tag: int) -> bytes:
    """The first packet of a connection, or its answer (SYN-ACK, INIT-ACK, a datagram back)."""
    opening = what is What.OPENING
    if protocol is Protocol.TCP:
        flags, acknowledged = (0x02, 0) if opening else (0x12, tag + 1 & 0xFFFFFFFF)
        options = struct.pack("!BBH", 2, 4, 1400)
        body = struct.pack("!HHIIBBHHH", sport, dport, tag, acknowledged, 6 << 4, flags, 64240, 0, 0) + options
        body = _with_checksum(body, 16, src, dst, protocol)
    elif protocol is Protocol.UDP:
        payload = (_MAGIC if opening else _ANSWER_MAGIC) + struct.pack("!I", tag)
        body = struct.pack("!HHHH", sport, dport, 8 + len(payload), 0) + payload
        body = _with_checksum(body, 6, src, dst, protocol)
    else:
        chunk = struct.pack("!BBHIIHHI", 1 if opening else 2, 0, 20, tag, 65536, 1, 1, tag)
        if not opening:
            cookie = struct.pack("!HHI", 7, 8, tag)  # an INIT-ACK without a state cookie is malformed
            chunk = struct.pack("!BBH", 2, 0, 28) + chunk[4:] + cookie
        common = struct.pack("!HHI", sport, dport, 0 if opening else tag)
        crc = crc32c(common + bytes(4) + chunk)
        body = common + struct.pack("<I", crc) + chunk
    return _with_header(body, src, dst, protocol)


def _pseudo(src: bytes, dst: bytes, length: int, protocol: int) -> bytes:
    if len(src) == 4:
        return src + dst + struct.pack("!BBH", 0, protocol, length)
    return src + dst + struct.pack("!I3xB", length, protocol)


def _with_checksum(body: bytes, at: int, src: Address, dst: Address, protocol: int) -> bytes:
    total = internet_checksum(_pseudo(src, dst, len(body), protocol) + body)
    return body[:at] + struct.pack("!H", total or 0xFFFF) + body[at + 2 :]  # 0 would mean none, in UDP


def _with_header(body: bytes, src: Address, dst: Address, protocol: int) -> bytes:
    if len(src) == 16:
        return struct.pack("!IHBB", 6 << 28, len(body), protocol, _TTL) + src + dst + body
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0x4000, _TTL, protocol, 0) + src + dst
    return header[:10] + struct.pack("!H", internet_checksum(header)) + header[12:] + body


def parse(data: bytes, *, verify: bool = True) -> Packet | None:
    """A packet of ours out of a whole IP packet; None when it is something else. `verify`: look at its checksum."""
    if len(data) >= 20 and data[0] >> 4 == 4:
        start = 4 * (data[0] & 15)
        end = max(start, min(len(data), int.from_bytes(data[2:4])))
        return parse_body(data[9], Address(data[12:16]), Address(data[16:20]), data[start:end], verify=verify)
    if len(data) >= 40 and data[0] >> 4 == 6:
        end = 40 + int.from_bytes(data[4:6])
        return parse_body(data[6], Address(data[8:24]), Address(data[24:40]), data[40:end], verify=verify)
    return None


def parse_body(protocol: int, src: Address, dst: Address, body: bytes, *, verify: bool = True) -> Packet | None:
    """The same, of what follows the IP header; `body` may be cut short when nothing is verified."""
    if protocol in (ICMP, ICMP6):
        return _parse_error(protocol, src, dst, body)
    found = _kind_and_tag(protocol, body)
    if found is None:
        return None
    what, tag = found
    sport, dport = struct.unpack_from("!HH", body)
    intact = not verify or _is_intact(protocol, src, dst, body)
    return Packet(what, protocol, src, dst, sport, dport, tag, intact)


def _parse_error(protocol: int, src: Address, dst: Address, body: bytes) -> Packet | None:
    if len(body) < 8 or body[0] != (UNREACHABLE if protocol == ICMP else UNREACHABLE6):
        return None
    quoted = parse(body[8:], verify=False)
    if quoted is None or quoted.what is not What.OPENING:
        return None
    return quoted._replace(what=What.ERROR, reporter=src, told=dst, code=(protocol, body[1]))


def _kind_and_tag(protocol: int, body: bytes) -> tuple[What, int] | None:
    if protocol == Protocol.TCP and len(body) >= 8:
        sequence, acknowledged = struct.unpack_from("!II", body.ljust(12, b"\0"), 4)
        flags = body[13] if len(body) > 13 else 0x02  # a quote may end after eight bytes
        if flags & 0x04:
            return (What.RESET, acknowledged - 1 & 0xFFFFFFFF) if flags & 0x10 else None
        what = {0x02: What.OPENING, 0x12: What.ANSWER}.get(flags & 0x17)
        return (what, sequence) if what else None
    if protocol == Protocol.UDP and len(body) >= 16:
        what = {_MAGIC: What.OPENING, _ANSWER_MAGIC: What.ANSWER}.get(body[8:12])
        return (what, int.from_bytes(body[12:16])) if what else None
    if protocol == Protocol.SCTP and len(body) >= 16:
        what = {1: What.OPENING, 2: What.ANSWER, 6: What.RESET}.get(body[12])
        if what is What.OPENING and len(body) < 20:
            return None
        return (what, int.from_bytes(body[16:20] if what is What.OPENING else body[4:8])) if what else None
    return None


def _is_intact(protocol: int, src: Address, dst: Address, body: bytes) -> bool:
    if protocol == Protocol.SCTP:
        return crc32c(body[:8] + bytes(4) + body[12:]) == int.from_bytes(body[8:12], "little")
    return internet_checksum(_pseudo(src, dst, len(body), protocol) + body) == 0
