"""Single fields of Kubernetes objects: what a name, a port, a VIP or an annotation may be. Pure.

Readers take the raw value and a `Faults`, to which they say what is wrong and what becomes of it: `refuse` makes the
whole object unusable, `note` leaves out the one part. They return the value, or a harmless one after a fault.
"""

import datetime
import re
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache

from dataplane.model import Address, Network, Protocol, ServerFlags, parse_address, parse_network
from dataplane.printable import shown

DNS_LABEL = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")
"""RFC 1123 label (apimachinery validation.go, DNS1123LabelFmt)."""
DNS_SUBDOMAIN = re.compile(r"(?=.{1,253}\Z)[a-z0-9](?:[-a-z0-9]*[a-z0-9])?(?:\.[a-z0-9](?:[-a-z0-9]*[a-z0-9])?)*")
"""RFC 1123 subdomain (DNS1123SubdomainFmt)."""
_LABEL_VALUE = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,251}[A-Za-z0-9])?")
_TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:[Zz]|[-+]\d\d:\d\d)", re.ASCII)
_SCHEDULER = re.compile(r"[a-z0-9_-]{1,15}")
_DURATION = re.compile(r"(?:\d{1,9}(?:\.\d{0,9})?(?:ns|us|µs|ms|s|m|h))+")
_DURATION_PART = re.compile(r"([\d.]+)(ns|us|µs|ms|s|m|h)")
_UNIT_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PROTOCOLS = {protocol.name: protocol for protocol in Protocol}
_SCHEDULER_FLAGS = {
    "flag-1": ServerFlags.SCHED_1,
    "flag-2": ServerFlags.SCHED_2,
    "flag-3": ServerFlags.SCHED_3,
    "sh-fallback": ServerFlags.SCHED_1,
    "sh-port": ServerFlags.SCHED_2,
    "mh-fallback": ServerFlags.SCHED_1,
    "mh-port": ServerFlags.SCHED_2,
}
DAY = 86_400
_MOST_FAULTS = 20


class Faults:
    """What is wrong with one object: (field, reason) pairs, at most 20 and a count of the rest."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []
        self.refused = False
        self._more = 0

    def note(self, field: str, reason: str) -> None:
        """A part of the object is left out or replaced by its default; the reason says which."""
        if len(self.found) < _MOST_FAULTS:
            self.found.append((field, reason))
        else:
            self._more += 1

    def refuse(self, field: str, reason: str) -> None:
        """The object cannot be used."""
        self.refused = True
        self.note(field, reason)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        more = [("", f"{self._more} more faults")] if self._more else []
        return iter(self.found + more)


def name(text: str | None, field: str, faults: Faults, pattern: re.Pattern[str] = DNS_LABEL) -> str:
    """A DNS name that identifies something; without it the object is refused."""
    if not text:
        faults.refuse(field, "required")
    elif not pattern.fullmatch(text):
        what = "label (a-z, 0-9 and -, at most 63)" if pattern is DNS_LABEL else "name (labels joined by dots)"
        faults.refuse(field, f"{shown(text)} is not a DNS {what}")
    else:
        return sys.intern(text)
    return ""


def word(text: str | None, place: str, leaf: str, faults: Faults, pattern: re.Pattern[str] = _LABEL_VALUE) -> str:
    """A name of something else (node, zone, host) at `place.leaf`; a malformed one is left out."""
    if not text:
        return ""
    if len(text) > 253 or not pattern.fullmatch(text):
        faults.note(f"{place}.{leaf}", f"{shown(text)} is not a name; it is left out")
        return ""
    return sys.intern(text)


def timestamp(text: str | None, field: str, faults: Faults) -> str:
    """RFC 3339 text, checked for its shape."""
    if text and not _TIMESTAMP.fullmatch(text):
        faults.note(field, f"{shown(text)} is not an RFC 3339 time; it is left out")
        return ""
    return text or ""


def moment(text: str) -> float | None:
    """RFC 3339 text as seconds since the epoch; None for anything else."""
    if not _TIMESTAMP.fullmatch(text):
        return None
    try:
        return datetime.datetime.fromisoformat(text.upper()).timestamp()
    except (ValueError, OverflowError):
        return None


def choice(text: str | None, options: Sequence[str], field: str, faults: Faults) -> str:
    """One of `options`; absent or empty means the first."""
    if not text or text == options[0]:
        return options[0]
    if text not in options:
        faults.refuse(field, f"{shown(text)} is none of {', '.join(options)}")
        return options[0]
    return text


def number(value: int | None, least: int, most: int, field: str, faults: Faults, default: int | None = None) -> int:
    """A whole number in a range; `default` None = required."""
    if value is None:
        if default is None:
            faults.refuse(field, "required")
        return default or 0
    if not least <= value <= most:
        faults.refuse(field, f"{shown(value)} is not a number from {least} to {most}")
        return default or 0
    return value


def protocol(text: str | None, field: str, faults: Faults) -> Protocol:
    """TCP (also when absent), UDP or SCTP."""
    found = _PROTOCOLS.get(text or "TCP")
    if found is None:
        faults.refuse(field, f"{shown(text)} is none of {', '.join(_PROTOCOLS)}")
        return Protocol.TCP
    return found


@lru_cache(maxsize=4096)
def address_fault(text: str) -> tuple[Address | None, str]:
    """A usable unicast address, or why it is none.

    Refused are the ranges that would point a Service into the node itself or at a whole network (CVE-2021-25737 and
    its kin): unspecified, loopback, link-local, multicast, IPv4-mapped IPv6 and the IPv4 broadcast address.
    """
    try:
        packed = parse_address(text)
    except ValueError:
        return None, f"{shown(text)} is not an IP address"
    first = packed[0]
    if len(packed) == 4:
        kinds = (
            (packed == b"\0\0\0\0", "the unspecified address"),
            (first == 127, "a loopback address"),
            (packed[:2] == b"\xa9\xfe", "a link-local address"),
            (packed == b"\xff\xff\xff\xff", "the broadcast address"),
            (first & 0xF0 == 0xE0, "a multicast address"),
        )
    else:
        kinds = (
            (packed == bytes(16), "the unspecified address"),
            (packed == bytes(15) + b"\1", "a loopback address"),
            (first == 0xFE and packed[1] & 0xC0 == 0x80, "a link-local address"),
            (packed[:12] == bytes(10) + b"\xff\xff", "an IPv4-mapped IPv6 address"),
            (first == 0xFF, "a multicast address"),
        )
    for applies, what in kinds:
        if applies:
            return None, f"{shown(text)} is {what}"
    return packed, ""


def addresses(texts: Sequence[str] | None, field: str, faults: Faults) -> tuple[Address, ...]:
    """Addresses of which each stands for itself: a bad one is left out, one given twice counts once."""
    found: dict[Address, None] = {}
    for index, text in enumerate(texts or ()):
        packed, reason = address_fault(text)
        if packed is None:
            faults.note(f"{field}[{index}]", f"{reason}; this address is left out")
        else:
            found[packed] = None
    return tuple(found)


def source_ranges(texts: Sequence[str] | None, field: str, faults: Faults) -> tuple[Network, ...]:
    """`loadBalancerSourceRanges`; a zero-length prefix lifts the filter of its family, as in kube-proxy.

    A malformed range refuses the object: leaving it out could leave the family without a filter.
    """
    found: list[Network] = []
    for index, text in enumerate(texts or ()):
        try:
            found.append(parse_network(text))
        except ValueError:
            faults.refuse(f"{field}[{index}]", f"{shown(text)} is not an address range")
    open_widths = {len(network.address) for network in found if network.prefix == 0}
    return tuple(network for network in found if len(network.address) not in open_widths)


def scheduler(text: str | None, field: str, faults: Faults) -> str:
    """An IPVS scheduler's name (IP_VS_SCHEDNAME_MAXLEN 16); whether the kernel has it is not known here."""
    if not text:
        return ""
    if not _SCHEDULER.fullmatch(text):
        faults.note(field, f"{shown(text)} is not a scheduler's name; the default is used")
        return ""
    return sys.intern(text)


def scheduler_flags(text: str | None, field: str, faults: Faults) -> int:
    """`sh-port,sh-fallback` as IP_VS_SVC_F_SCHED bits (ipvsadm(8), --sched-flags)."""
    flags = 0
    for part in (text or "").split(",")[:16]:
        flag = part.strip()
        if flag and flag not in _SCHEDULER_FLAGS:
            faults.note(field, f"{shown(flag)} is none of {', '.join(_SCHEDULER_FLAGS)}; it is left out")
        flags |= _SCHEDULER_FLAGS.get(flag, 0)
    return int(flags)


def go_duration(text: str) -> float | None:
    """Go's time.ParseDuration without a sign, in seconds: `15m`, `1h0m0s`, `250ms`, `0`; None for what is none."""
    if text == "0":
        return 0.0
    if len(text) > 64 or not _DURATION.fullmatch(text):
        return None
    return sum(float(count) * _UNIT_SECONDS[unit] for count, unit in _DURATION_PART.findall(text))


def drain_seconds(text: str | None, field: str, faults: Faults) -> int:
    """`"900"` or `"15m"`, 0 to 86400 seconds, rounded up; -1 = not given."""
    if not text:
        return -1
    is_number = text.isascii() and text.isdigit() and len(text) <= 9
    seconds = int(text) if is_number else go_duration(text)
    if seconds is None or not 0 <= seconds <= DAY:
        faults.note(field, f'{shown(text)} is neither seconds (0 to {DAY}) nor like "15m"; the default is used')
        return -1
    return -int(-seconds // 1)


def weights(text: str | None, field: str, faults: Faults) -> tuple[tuple[Address, int], ...]:
    """`10.244.3.6=3,10.244.1.7=1` as (address, weight) pairs; weights are 0 to 65535."""
    found: dict[Address, int] = {}
    for part in (text or "").split(","):
        if not (entry := part.strip()):
            continue
        left, _, right = entry.partition("=")
        packed, reason = address_fault(left.strip())
        digits = right.strip()
        if not (digits.isascii() and digits.isdigit() and len(digits) <= 5 and int(digits) <= 65535):
            packed, reason = None, f"{shown(entry)} is not address=weight (0 to 65535)"
        if packed is None:
            faults.note(field, f"{reason}; it is left out")
        else:
            found[packed] = int(digits)
    return tuple(found.items())
