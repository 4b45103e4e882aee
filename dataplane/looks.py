"""Looks at the kernel for whoever asks the agent: its virtual servers, and hits that never fall.

Reading every counter of a big table takes a good part of a second, during which the agent does nothing else. So an
answer is kept as long as looking would otherwise take more than a twentieth of the time; of small tables that is none.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from operator import itemgetter
from zlib import compress, decompress

from msgspec.json import encode

from .backend import Backend, ServerReport
from .counters import Probe, RealServerAt, Tally
from .drain import DrainKey
from .model import Address, VirtualAddress, VirtualServer
from .rows import Counts, Hits, Look, ServiceRow, by_name, own_counters, service_row

PAUSE = 20
"""How many times as long as it took an answer is kept."""


class Looks:
    """Rows of one mode at a bounded cost. `clocks`: seconds left of the drains. `servers`: the virtual servers here."""

    def __init__(
        self,
        backend: Backend,
        clocks: Callable[[], Mapping[DrainKey, float]],
        servers: Callable[[], Mapping[VirtualAddress, VirtualServer]] = dict,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backend = backend
        self._clocks = clocks
        self._servers = servers
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
        for at in addresses:
            self._tally.forget(at)
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
        if self._kept and started < self._fresh_until:
            return decompress(self._kept)
        # row by row: many small objects that live at once would keep the memory in which others stay
        rows = [(by_name(row), encode(row)) for row in self._rows()]
        rows.sort(key=itemgetter(0))
        text = self._frame(()).around(map(itemgetter(1), rows))
        del rows
        self._kept = compress(text, 1)
        ended = self._clock()
        self._fresh_until = ended + PAUSE * (ended - started)
        return text

    def look(self) -> Look:
        """What the kernel holds now."""
        return self._frame(tuple(sorted(self._rows(), key=by_name)))

    def _frame(self, rows: tuple[ServiceRow, ...]) -> Look:
        return Look(self._backend.mode, time.time(), self.counts, rows)

    def _rows(self) -> Iterator[ServiceRow]:
        clocks, hits = self._clocks(), self._hits() if self._probe is None else self._probe_hits(self._probe)
        for report in self._backend.report():
            yield service_row(report, clocks, hits)

    def _hits(self) -> Hits:
        """By the mode's own counters."""
        tally = self._tally

        def hits(report: ServerReport) -> tuple[Mapping[RealServerAt, int], int]:
            return tally.take(report.server.at, own_counters(report)[0])

        return own_counters if self._backend.remembers_counts else hits

    def _probe_hits(self, probe: Probe) -> Hits:
        """By the probe, each hit at one virtual server.

        Where an address serves clients inside the cluster differently, the probe cannot tell the two virtual servers
        apart: a hit stands at the one for everybody if that has the real server, else at the one for those inside.
        """
        found: dict[tuple[int, Address, int], dict[RealServerAt, int]] = {}
        for (protocol, address, port, real, real_port), count in probe.read().items():
            found.setdefault((protocol, address, port), {})[real, real_port] = count
        servers, tally = self._servers(), self._tally
        nothing: dict[RealServerAt, int] = {}

        def hits(report: ServerReport) -> tuple[Mapping[RealServerAt, int], int]:
            at = report.server.at
            counted = found.get((at.protocol, at.address, at.port), nothing)
            twin = servers.get(at._replace(inside=not at.inside))
            if twin is not None:
                mine, theirs = _backends(report.server), _backends(twin)
                elsewhere = theirs if at.inside else theirs - mine
                counted = {backend: count for backend, count in counted.items() if backend not in elsewhere}
                if at.inside:
                    counted = {backend: count for backend, count in counted.items() if backend in mine}
            counted = {backend: counted.get(backend, 0) for backend in (*_backends(report.server), *counted)}
            return tally.take(at, counted)

        return hits


def _backends(server: VirtualServer) -> set[RealServerAt]:
    return {(real.address, real.port) for real in server.real_servers}
