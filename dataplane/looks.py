"""Looks at the kernel for whoever asks the agent: its virtual servers, and hits that never fall.

Reading every counter of a big table takes a good part of a second, during which the agent does nothing else. So an
answer is kept as long as looking would otherwise take more than a twentieth of the time; of small tables that is none.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from zlib import compress, decompress

from .backend import Backend, ServerReport
from .counters import Probe, Tally, Target, Way
from .drain import DrainKey
from .libc_malloc import give_memory_back
from .model import VirtualAddress, VirtualServer
from .rows import Counts, Look, service_rows

PAUSE = 20
"""How many times as long as it took an answer is kept."""
BIG = 1 << 20
"""Bytes of an answer from which on the memory that it took is worth giving back."""


class Looks:
    """Rows of one mode, at a bounded cost. `clocks`: seconds left of the drains."""

    def __init__(
        self,
        backend: Backend,
        clocks: Callable[[], Mapping[DrainKey, float]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backend = backend
        self._clocks = clocks
        self._clock = clock
        self._tally = Tally(remembers=backend.remembers_counts)
        self._probe: Probe | None = None
        self._since = 0.0
        self.no_probe = ""
        """Why the mode's own counters count."""
        self._kept = b""
        """The last answer, compressed: it is a twentieth then, and most agents are asked once a day."""
        self._fresh_until = 0.0

    def use(self, probe: Probe, addresses: Collection[VirtualAddress]) -> None:
        """From now on the probe counts, for the virtual servers at these addresses."""
        if not probe.counts(self._backend.mode):
            probe.close()
            self.give_up_probe(f"attached to {', '.join(probe.hooks)} only")
            return
        probe.expect(addresses)
        self._probe, self._since, self._tally, self._kept = probe, time.time(), Tally(remembers=True), b""
        self.no_probe = ""

    def give_up_probe(self, reason: str) -> None:
        """It cannot count any more, or could not from the start: the mode's own counters do."""
        if self._probe is not None:
            self._probe.close()
            self._probe, self._kept = None, b""
            self._tally = Tally(remembers=self._backend.remembers_counts)
        self.no_probe = reason

    def expect(self, addresses: Collection[VirtualAddress]) -> None:
        """These are about to be programmed. Whatever the probe says, that goes on."""
        if self._probe is not None:
            try:
                self._probe.expect(addresses)
            except OSError as error:
                self.give_up_probe(str(error))

    def forget(self, addresses: Collection[VirtualAddress]) -> None:
        """These are gone."""
        if self._probe is not None:
            try:
                self._probe.forget(addresses)
            except OSError as error:
                self.give_up_probe(str(error))

    def check(self, servers: Iterable[VirtualServer]) -> bool:
        """Every now and then: is the probe where it was? False: it has to be started anew.

        The room of real servers that are in none of these virtual servers is given back; their hits stay in the totals.
        """
        probe = self._probe
        if probe is None:
            return True
        probe.retire(
            {
                (server.at.protocol, server.at.address, server.at.port, real.address, real.port)
                for server in servers
                for real in server.real_servers
            }
        )
        return probe.check()

    def close(self) -> None:
        """Detach the probe."""
        if self._probe is not None:
            self._probe.close()
            self._probe = None

    @property
    def counts(self) -> Counts:
        """Who counts now, and what he has missed so far."""
        if self._probe is None:
            return Counts(self._backend.mode, reason=self.no_probe)
        return Counts("probe", tuple(self._probe.hooks), self._probe.missed(), self._since)

    def answer(self) -> bytes:
        """A look as JSON, of now or a moment ago."""
        started = self._clock()
        if not self._kept or started >= self._fresh_until:
            text = self.look().to_json()
            self._kept = compress(text, 1)
            if len(text) > BIG:
                give_memory_back()
            ended = self._clock()
            self._fresh_until = ended + PAUSE * (ended - started)
            return text
        return decompress(self._kept)

    def look(self) -> Look:
        """What the kernel holds now."""
        reports = list(self._backend.report())
        probe, tally = self._probe, self._tally
        tally.take(_own(reports) if probe is None else attributed(reports, probe.read()))

        def hits(target: Target, own: int | None) -> int | None:
            return None if probe is None and own is None else tally.total(target)

        rows = service_rows(reports, self._clocks(), hits, tally.totals())
        return Look(self._backend.mode, time.time(), self.counts, rows)


def _own(reports: Iterable[ServerReport]) -> dict[Target, int]:
    return {
        Target(report.server.at, real.address, real.port): counters.connections
        for report in reports
        for real, counters in report.reals
        if counters.connections >= 0
    }


def attributed(reports: Iterable[ServerReport], read: Mapping[Way, int]) -> dict[Target, int]:
    """A probe's hits, each at one virtual server.

    Where an address serves clients inside the cluster differently, the probe cannot tell the two virtual servers apart:
    a hit stands at the one for everybody if that has the real server, else at the one for those inside.
    """
    outside: set[Target] = set()
    inside: set[Target] = set()
    for report in reports:
        at = report.server.at
        (inside if at.inside else outside).update(Target(at, real.address, real.port) for real, _ in report.reals)
    hits = {}
    for (protocol, address, port, real, real_port), count in read.items():
        target = Target(VirtualAddress(protocol, address, port), real, real_port)
        if target not in outside:
            twin = Target(VirtualAddress(protocol, address, port, True), real, real_port)
            if twin in inside:
                target = twin
        hits[target] = count
    return hits
