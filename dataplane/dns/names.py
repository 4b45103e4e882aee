"""Domain names as labels: out of a packet, out of text, and those that stand for addresses. Pure."""

import re
from collections.abc import Sequence

from ..model import Address, format_address

Labels = tuple[str, ...]
"""Lower-case labels from the left, without the root; bytes that are no ASCII are latin-1, and match nothing of ours."""

LONGEST_NAME = 255
"""Octets of a name in a packet, its length octets and the root's included (RFC 1035, 2.3.4)."""
_DOMAIN = re.compile(r"(?=.{1,180}\.?$)[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)*\.?")
_V4, _V6 = ("in-addr", "arpa"), ("ip6", "arpa")


def read_name(packet: bytes, offset: int) -> tuple[Labels, int] | None:
    """An uncompressed name and the offset behind it; None when it is malformed, compressed or too long."""
    labels: list[str] = []
    start = offset
    while offset < len(packet):
        length = packet[offset]
        offset += 1
        if not length:
            return (tuple(labels), offset) if offset - start <= LONGEST_NAME else None
        if length > 63 or offset - start > LONGEST_NAME:
            return None
        labels.append(packet[offset : offset + length].lower().decode("latin-1"))
        offset += length
    return None


def parse_domain(text: str) -> Labels:
    """`cluster.local` as labels; ValueError names the text."""
    if not _DOMAIN.fullmatch(text.lower()):
        raise ValueError(f"{text!r} is not a domain name (labels of a-z, 0-9 and -, joined by dots)")
    return tuple(text.lower().rstrip(".").split("."))


def as_text(labels: Sequence[str]) -> str:
    """With a dot at the end."""
    return ".".join(labels) + "."


def dashed(address: bytes) -> str:
    """The label of an endpoint that has no hostname: `10-244-0-5`, `fd00--5` (CoreDNS: endpointHostname)."""
    return format_address(address).replace(".", "-").replace(":", "-")


def reverse_labels(address: bytes) -> Labels:
    """Where the PTR records of an address are (RFC 1035, 3.5; RFC 3596, 2.5)."""
    if len(address) == 4:
        return (*map(str, reversed(address)), *_V4)
    return (*reversed(address.hex()), *_V6)


def reverse_address(labels: Labels) -> Address | None:
    """The address that a whole reverse name stands for."""
    digits = labels[:-2]
    if labels[-2:] == _V4 and len(digits) == 4:
        octets = [int(one) for one in reversed(digits) if one.isascii() and one.isdigit() and len(one) <= 3]
        if len(octets) == 4 and max(octets) <= 255 and tuple(map(str, reversed(octets))) == digits:
            return Address(bytes(octets))
    if labels[-2:] == _V6 and len(digits) == 32 and all(len(one) == 1 and one in "0123456789abcdef" for one in digits):
        return Address(bytes.fromhex("".join(reversed(digits))))
    return None
