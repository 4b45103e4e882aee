"""What nf_tables tells of a traced packet (NFT_MSG_TRACE), and the table that has packets traced. Pure.

    table inet dataplane-trace-PID-START
        prerouting and output, in front of all others: nftrace for what is wanted, so many packets a second at most
        input and postrouting, behind all others: how the packet ends up

What is wanted stands in a set whose element has a timeout, so what a killed trace leaves behind does nothing.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from msgspec import Struct, field

from .model import Address, Protocol, format_address
from .netlink_socket import HEADER
from .nftables_messages import BODY, SUBSYSTEM, ExpressionAttrs, VerdictAttrs, comment_of
from .nlattr import NlAttrs, attr, be32, be64, blob, cstring, nested, walk
from .sightings import Look, Sighting
from .walk import Verdict

TRACE = 17  # NFT_MSG_TRACE
PREFIX = "dataplane-trace-"
RATE = 50
"""Packets a second that are traced at most."""
_LEFTOVER = re.compile(rf"{PREFIX}(\d+)-(\d+)")
_SPARE_SECONDS = 2


class TraceAttrs(NlAttrs):
    """NFTA_TRACE_*."""

    table = attr(1, cstring)
    chain = attr(2, cstring)
    handle = attr(3, be64)
    type = attr(4, be32)
    verdict = attr(5, nested(VerdictAttrs))
    id = attr(6, be32)
    network = attr(8, blob)
    transport = attr(9, blob)
    protocol = attr(15, be32)
    policy = attr(16, be32)


_POLICY, _RETURN, _RULE = 1, 2, 3  # NFT_TRACETYPE_*
_DROP, _ACCEPT = 0, 1
_CONTINUE, _JUMP, _GOTO = -1, -3, -4


class MatchAttrs(NlAttrs):
    """NFTA_MATCH_*: a match of iptables inside nf_tables."""

    name = attr(1, cstring)
    info = attr(3, blob)


# ---------------------------------------------------------------------------------------------------------- the table


def table_name(pid: int, start: int) -> str:
    """Whose table it is: a process, by its number and the time of its start."""
    return f"{PREFIX}{pid}-{start}"


def owner_of(table: str) -> tuple[int, int] | None:
    """The reverse; None for what is none of ours."""
    found = _LEFTOVER.fullmatch(table)
    return (int(found[1]), int(found[2])) if found else None


def script(table: str, wanted: Look) -> str:
    """The table in nft's language."""
    at = wanted.at
    word, kind = ("ip", "ipv4_addr") if len(at.address) == 4 else ("ip6", "ipv6_addr")
    protocol = Protocol(at.protocol).name.lower()
    match = f"{word} saddr {format_address(wanted.source)} " if wanted.source is not None else ""
    match += f"{word} daddr . meta l4proto . th dport @wanted "
    if at.protocol == Protocol.TCP:
        match += "tcp flags & (fin | syn | rst | ack) == syn "
    rule = f"{match}limit rate {RATE}/second burst {RATE} packets meta nftrace set 1"
    goal = f"{format_address(at.address)} . {protocol} . {at.port}"
    lines = [f"table inet {table} {{", f"set wanted {{ type {kind} . inet_proto . inet_service; flags timeout;"]
    lines += [f"elements = {{ {goal} timeout {round(wanted.seconds) + _SPARE_SECONDS}s }} }}"]
    for hook in ("prerouting", "output"):
        lines.append(f"chain {hook} {{ type filter hook {hook} priority -300; policy accept; {rule}; }}")
    for hook in ("input", "postrouting"):
        lines.append(f"chain {hook} {{ type filter hook {hook} priority 300; policy accept; }}")
    return "\n".join([*lines, "}"]) + "\n"


# --------------------------------------------------------------------------------------------------------- the rules


class RuleTold(NamedTuple):
    """What is worth saying of a rule: its comment, and whether it refuses rather than drops."""

    comment: str
    refuses: bool


RuleKey = tuple[int, str, str, int]
"""Family, table, chain and handle."""
UNTOLD = RuleTold("", False)
_MADE = "made on demand"
"""Comments by which chains of nftables mode are known, and which tell nobody anything."""
_MARKED = re.compile(r" \[[0-9a-f]{8}\]$")


def rule_told(expressions: bytes, userdata: bytes) -> RuleTold:
    """Of a rule's expressions and user data: comments are nft's own, or iptables' match `comment`."""
    comment = _MARKED.sub("", comment_of(userdata))
    for _, start, stop in walk(expressions, 0):
        values = ExpressionAttrs.decode(expressions, start, stop)
        if values.get("name") == "match" and not comment:
            match = MatchAttrs.decode(values.get("data", b""))
            if match.get("name") == "comment":
                comment = match.get("info", b"").split(b"\0")[0].decode("utf-8", "replace")
    if comment.startswith(_MADE):
        comment = ""
    return RuleTold(comment, b"reject\0" in expressions or b"REJECT\0" in expressions)


# ------------------------------------------------------------------------------------------------------- the packets


class Ends(NamedTuple):
    """Source and destination of a packet."""

    source: Address
    source_port: int
    destination: Address
    port: int


class _Packet(Struct):
    """One packet on its way."""

    protocol: int
    first: Ends
    last: Ends
    steps: list[str] = field(default_factory=list)
    ended: Verdict | None = None
    reason: str = ""


class Tracer:
    """Puts together what the kernel tells, packet by packet. `rule`: what is known of a rule."""

    def __init__(self, wanted: Look, table: str, rule: Callable[[RuleKey], RuleTold]) -> None:
        self._wanted = wanted
        self._table = table
        self._rule = rule
        self._packets: dict[int, _Packet] = {}
        self._told: set[tuple[Address, int]] = set()

    def take(self, messages: Iterable[bytes]) -> list[Sighting]:
        """The packets that have come to their end."""
        found = []
        for message in messages:
            if HEADER.unpack_from(message)[1] != SUBSYSTEM << 8 | TRACE:
                continue
            values = TraceAttrs.decode(message, BODY)
            number = values.get("id", 0)
            ended = self._step(number, message[HEADER.size], values)
            if ended and (sighting := self._sighting(self._packets.pop(number))):
                found.append(sighting)
        return found

    def finish(self) -> list[Sighting]:
        """Packets of whose end nothing was told."""
        rest = [self._sighting(packet) for packet in self._packets.values()]
        self._packets.clear()
        return [each for each in rest if each]

    def _step(self, number: int, family: int, values: dict[str, object]) -> bool:
        """One message; True when the packet has come to its end."""
        ends = _ends(values)
        packet = self._packets.get(number)
        if packet is None:
            if ends is None or not self._mine(ends):
                return False
            packet = self._packets[number] = _Packet(ends[0], ends[1], ends[1])
        elif ends is not None:
            packet.last = ends[1]
        table, chain = str(values.get("table", "")), str(values.get("chain", ""))
        kind = values.get("type")
        if table == self._table:
            return chain in ("input", "postrouting") and kind == _POLICY
        verdict = values.get("verdict")
        code, target = _ACCEPT, ""
        if isinstance(verdict, dict):
            code, target = _code(verdict.get("code", 0)), verdict.get("chain", "")
        if kind == _POLICY:
            policy = values.get("policy", 1)
            if policy == _DROP:
                packet.ended, packet.reason = Verdict.DROPPED, f"by the policy of chain {chain} in table {table}"
            return policy == _DROP
        if kind == _RETURN:
            return False
        handle = values.get("handle", 0)
        told = self._rule((family, table, chain, handle if isinstance(handle, int) else 0))
        where = f"{table} {chain}"
        note = f" ({told.comment})" if told.comment else ""
        if code == _DROP:
            packet.ended = Verdict.REFUSED if told.refuses else Verdict.DROPPED
            packet.reason = f"by a rule of chain {chain} in table {table}{note}"
            packet.steps.append(f"{where}: {'reject' if told.refuses else 'drop'}{note}")
            return True
        if code in (_JUMP, _GOTO):
            packet.steps.append(f"{where}: {'jump' if code == _JUMP else 'goto'} {target}{note}")
        elif code != _CONTINUE:
            packet.steps.append(f"{where}: accept{note}")
        elif told.comment:
            packet.steps.append(f"{where}: {told.comment}")
        return False

    def _mine(self, ends: tuple[int, Ends]) -> bool:
        protocol, there = ends
        return self._wanted.fits(protocol, there.source, there.destination, there.port)

    def _sighting(self, packet: _Packet) -> Sighting | None:
        """None for a further packet of a connection that was told."""
        first, last = packet.first, packet.last
        client = first.source, first.source_port
        if client in self._told:
            return None
        self._told.add(client)
        steps = tuple(packet.steps)
        if packet.ended is not None:
            return Sighting(packet.protocol, *client, packet.ended, None, None, packet.reason, steps)
        if (last.destination, last.port) == (first.destination, first.port):
            reason = "untranslated: it goes on as it came"
            return Sighting(packet.protocol, *client, Verdict.NOT_OURS, None, None, reason, steps)
        real = last.destination, last.port
        return Sighting(packet.protocol, *client, Verdict.ENDPOINT, real, last.source, "", steps)


def _code(value: object) -> int:
    """A verdict, which the kernel sends as a number without a sign."""
    number = value if isinstance(value, int) else 0
    return number - (1 << 32) if number >> 31 else number


def _ends(values: Mapping[str, object]) -> tuple[int, Ends] | None:
    """Protocol and ends, of the headers in a message that has some."""
    network, transport = values.get("network"), values.get("transport")
    if not isinstance(network, bytes) or not isinstance(transport, bytes) or len(transport) < 4 or len(network) < 20:
        return None
    if network[0] >> 4 == 4:
        protocol, source, destination = network[9], network[12:16], network[16:20]
    elif len(network) >= 40:
        protocol, source, destination = network[6], network[8:24], network[24:40]
    else:
        return None
    ports = int.from_bytes(transport[:2]), int.from_bytes(transport[2:4])
    return protocol, Ends(Address(source), ports[0], Address(destination), ports[1])
