"""Queries to answers, as bytes. What was asked once is prepared, and a change of a Service takes away only its own.

A packet whose like was seen before costs one look into a dictionary: the key is the packet without its id, the name in
lower case. What a stranger makes up (names that are not there, options of his own) is answered without being kept.

One thread answers, another may bring changes: `update` and the making of answers exclude each other, looking up what
is prepared needs no lock.
"""

import struct
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

from ..model import ObjectName, ServiceView
from .names import Labels
from .query import CD, HEADER, MOST_SIZE, RD, TC, Query, Refusal, read_query
from .records import Records, Rules
from .rrsets import (
    AAAA,
    ANY,
    CNAME,
    HTTPS,
    NS,
    PTR,
    REFUSED,
    SERVFAIL,
    SOA,
    SRV,
    TXT,
    ZONE,
    A,
    Dependency,
    Found,
)
from .wire import Body, apex, denial, render

MOST_PREPARED = 1 << 16
"""Prepared answers in all; with more, all are made anew as they are asked for."""
MOST_VARIANTS = 16
"""Of them for one name and type: clients differ by a few flags and sizes, and only strangers by more."""
KEPT_TYPES = frozenset((A, NS, CNAME, PTR, TXT, AAAA, SRV, HTTPS, ANY))
"""Of other types a name of ours has nothing, which is quickly said, and there are 65,536 of them."""
_RESPONSE, _AUTHORITATIVE, _RECURSIVE = 0x8000, 0x0400, 0x0080
_SHORT = struct.Struct("!H")
_COUNTS = struct.Struct("!HHHH")
_OPT_RECORD = struct.Struct("!BHHBBHH")


class Elsewhere(NamedTuple):
    """A question that is an upstream's: the whole query, or the rest of a chain of CNAMEs that `found` begins."""

    query: Query
    found: Found | None = None


class Prepared:
    """An answer but for id, case and turn. Rotated ones end with `opt`; in others that is in the tail already."""

    __slots__ = ("body", "head", "opt", "step", "tail", "turn")

    def __init__(self, head: bytes, tail: bytes, opt: bytes, body: Body) -> None:
        self.head = head
        self.tail = tail
        self.opt = opt
        self.body = body
        self.step = body.step
        self.turn = 0


class Answers:
    """All answers of one server. `synced`: the source has told everything; before that names are SERVFAIL.

    `recursive`: questions outside the zone go to upstreams.
    """

    def __init__(self, rules: Rules, *, recursive: bool = False) -> None:
        self.rules = rules
        self.synced = False
        self.rcodes: dict[int, int] = {}
        """Answers by rcode, but for those of prepared answers that still stand (`counts` has all)."""
        self.malformed = 0
        """Packets that got no answer."""
        self.made = 0
        """Bodies that the codec made."""
        self._recursive = recursive
        self._records = Records(rules)
        self._lock = threading.Lock()
        self._ready: dict[bytes, Prepared] = {}
        self._bodies: dict[bytes, Body] = {}
        """By name, in lower case, and type."""
        self._made_from: dict[Dependency, set[bytes]] = {}
        self._counted: dict[ObjectName, int] = {}
        """Answers for each Service, those of prepared ones as above."""
        self._serial = int(time.time())

    # ------------------------------------------------------------------------------------------------------ changes

    def update(self, changed: Mapping[ObjectName, ServiceView | None], *, synced: bool = True) -> None:
        """Answer by this from now on. Called by any thread."""
        with self._lock:
            for dependency in self._records.update(changed):
                for key in self._made_from.pop(dependency, ()):
                    self._forget(key)
            for name, view in changed.items():
                if view is None or view.service is None:
                    self._counted.pop(name, None)  # as its other metrics end with it
            if changed:
                self._serial = max(self._serial + 1, int(time.time()))
            self.synced = self.synced or synced

    def _forget(self, key: bytes) -> None:
        body = self._bodies.pop(key, None)
        if body is None:
            return
        for packet in body.keys:
            self._ready.pop(packet, None)
        self._retire(body)
        for dependency in body.depends:
            others = self._made_from.get(dependency)  # type: ignore[call-overload]
            if others is not None:
                others.discard(key)
                if not others:
                    del self._made_from[dependency]  # type: ignore[arg-type]

    def _retire(self, body: Body) -> None:
        if body.uses:
            self.rcodes[body.rcode] = self.rcodes.get(body.rcode, 0) + body.uses
            owner = _service_of(body.depends)
            if owner is not None:
                self._counted[owner] = self._counted.get(owner, 0) + body.uses
            body.uses = 0

    def counts(self) -> tuple[dict[int, int], dict[ObjectName, int]]:
        """Answers so far by rcode, and by Service. Called by any thread."""
        with self._lock:
            rcodes, services = dict(self.rcodes), dict(self._counted)
            for body in self._bodies.values():
                if body.uses:
                    rcodes[body.rcode] = rcodes.get(body.rcode, 0) + body.uses
                    owner = _service_of(body.depends)
                    if owner is not None:
                        services[owner] = services.get(owner, 0) + body.uses
            return rcodes, services

    @property
    def services(self) -> int:
        """Services that have names."""
        return self._records.services

    @property
    def prepared(self) -> int:
        """Answers that are ready."""
        return len(self._ready)

    # ------------------------------------------------------------------------------------------------------ answers

    def quick(self, packet: bytes) -> bytes | None:
        """The prepared answer over UDP; None: there is none for this packet."""
        end = packet.find(0, HEADER)
        ready = self._ready.get(packet[2:HEADER] + packet[HEADER:end].lower() + packet[end:])
        if ready is None:
            return None
        ready.body.uses += 1
        tail = ready.tail
        if ready.step:
            ready.turn = turn = (ready.turn + ready.step) % len(tail)
            tail = tail[turn:] + tail[:turn] + ready.opt
        return packet[:2] + ready.head + packet[HEADER : end + 5] + tail

    def answer(self, packet: bytes, *, udp: bool = True) -> bytes | Elsewhere | None:
        """The answer, made if need be; None: the packet deserves none."""
        if udp and (known := self.quick(packet)) is not None:
            return known
        query = read_query(packet)
        if query is None:
            self.malformed += 1
            return None
        if isinstance(query, Refusal):
            self.count(query.rcode & 15)
            return refusal(packet, query)
        with self._lock:
            return self._answer(packet, query, udp)

    def _answer(self, packet: bytes, query: Query, udp: bool) -> bytes | Elsewhere:
        end = query.question_end
        key = packet[HEADER : end - 4].lower() + packet[end - 4 : end - 2]
        body = self._bodies.get(key)
        if body is None:
            found = self._records.look(query.labels, query.qtype)
            if found is None:
                if self._recursive:
                    return Elsewhere(query)
                self.count(REFUSED)
                return refusal(packet, Refusal(REFUSED, query.question_end, query.edns))
            if not self.synced:
                self.count(SERVFAIL)
                return refusal(packet, Refusal(SERVFAIL, query.question_end, query.edns))
            if found.alias and self._recursive:
                return Elsewhere(query, found)
            body = self._make(query.labels, query.qtype, found)
            if body.depends and query.qtype in KEPT_TYPES:
                self._keep(key, body)
            else:
                body.depends = ()
                self.count(body.rcode)
        if body.depends:
            body.uses += 1
        return self._write(packet, query, body, udp)

    def _make(self, labels: Labels, qtype: int, found: Found) -> Body:
        if found.answer:
            body = render(labels, qtype, found)
            self.made += 1
        elif qtype == SOA and labels == self._records.zone:
            body = apex(labels, self._serial, self.rules.ttl)
        else:
            body = denial(labels, found.zone, found.rcode, self._serial, self.rules.ttl)
        body.depends = found.depends
        return body

    def _keep(self, key: bytes, body: Body) -> None:
        if len(self._ready) >= MOST_PREPARED or len(self._bodies) >= MOST_PREPARED:
            for each in self._bodies.values():
                self._retire(each)
            self._ready.clear()
            self._bodies.clear()
            self._made_from.clear()
        self._bodies[key] = body
        for dependency in body.depends:
            assert isinstance(dependency, ObjectName | bytes)
            self._made_from.setdefault(dependency, set()).add(key)  # type: ignore[arg-type]

    def _write(self, packet: bytes, query: Query, body: Body, udp: bool) -> bytes:
        opt = _opt(query) if query.edns else b""
        head, tail = fitted(query, body, len(opt), query.size if udp else 65535, recursive=self._recursive)
        question = packet[HEADER : query.question_end]
        if not udp or not query.plain or not body.depends:
            turn = body.step * (body.uses % max(1, body.answers)) % len(tail) if body.step and tail else 0
            return packet[:2] + head + question + tail[turn:] + tail[:turn] + opt
        if len(body.keys) < MOST_VARIANTS:
            end = packet.find(0, HEADER)
            packet_key = packet[2:HEADER] + packet[HEADER:end].lower() + packet[end:]
            if end + 5 == query.question_end:  # a label with a zero byte in it is nobody's name
                body.keys.append(packet_key)
                ready = Prepared(head, tail if body.step and tail else tail + opt, opt, body)
                if not tail:
                    ready.step = 0
                self._ready[packet_key] = ready
        return packet[:2] + head + question + tail + opt

    def explain(self, labels: Labels, qtype: int) -> tuple[Found | None, list[str]]:
        """What there is to say, and how that came about. Called by any thread."""
        steps: list[str] = []
        with self._lock:
            found = self._records.look(labels, qtype, steps)
        if found is not None and not self.synced:
            steps.append("the source has not told everything yet: SERVFAIL until it has")
            found = Found(SERVFAIL, found.zone)
        return found, steps

    def complete(self, packet: bytes, query: Query, found: Found, *, udp: bool) -> bytes:
        """An answer that an upstream had a part in; it is not kept."""
        body = render(query.labels, query.qtype, found)
        body.step = 0
        self.count(found.rcode)
        with self._lock:
            owner = _service_of(found.depends)
            if owner is not None:
                self._counted[owner] = self._counted.get(owner, 0) + 1
        opt = _opt(query) if query.edns else b""
        head, tail = fitted(query, body, len(opt), query.size if udp else 65535, recursive=True)
        return packet[:2] + head + packet[HEADER : query.question_end] + tail + opt

    def count(self, rcode: int) -> None:
        """One more answer that was not prepared; in the server's thread only."""
        self.rcodes[rcode] = self.rcodes.get(rcode, 0) + 1


def fitted(query: Query, body: Body, opt: int, size: int, *, recursive: bool) -> tuple[bytes, bytes]:
    """Header without id, and what stands between question and OPT, in at most `size` bytes together with these.

    Additional records go first, and silently; then records of the answer, and TC says so: all of them, unless each is
    as good as the others, for clients that do not come back over TCP.
    """
    room = size - query.question_end - opt
    tail, answers, authorities, additionals = body.tail, body.answers, body.authorities, body.additionals
    flags = _RESPONSE | _AUTHORITATIVE | body.rcode | query.flags & (RD | CD) | (_RECURSIVE if recursive else 0)
    if len(tail) > room and additionals:
        tail, additionals = tail[: body.answer_size], 0
    if len(tail) > room:
        flags |= TC
        answers = room // body.step if body.step else 0
        tail, authorities = tail[: answers * body.step], 0
    return _SHORT.pack(flags) + _COUNTS.pack(1, answers, authorities, additionals + bool(opt)), tail


def refusal(packet: bytes, refused: Refusal, *, truncated: bool = False) -> bytes:
    """An answer without records. `truncated`: come back over TCP."""
    flags = int.from_bytes(packet[2:4])
    flags = _RESPONSE | flags & (0x7800 | RD | CD) | refused.rcode & 15 | (TC if truncated else 0)
    questions = int(refused.question_end > HEADER)
    opt = _OPT_RECORD.pack(0, 41, MOST_SIZE, refused.rcode >> 4, 0, 0, 0) if refused.edns else b""
    counts = _COUNTS.pack(questions, 0, 0, bool(opt))
    return packet[:2] + _SHORT.pack(flags) + counts + packet[HEADER : refused.question_end] + opt


def _service_of(depends: tuple[object, ...]) -> ObjectName | None:
    """The Service that an answer counts for: the one that was asked for."""
    return next((one for one in depends if isinstance(one, ObjectName) and one != ZONE), None)


def _opt(query: Query) -> bytes:
    return _OPT_RECORD.pack(0, 41, MOST_SIZE, 0, 0, 0x8000 if query.dnssec_ok else 0, 0)
