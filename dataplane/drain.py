"""Graceful removal: which real servers that are no longer wanted stay for a while, with weight 0.

TCP and SCTP connections live on until they end or a deadline passes; UDP has no connections to end, so its real servers
go at once. A real server that is wanted again while it drains is revived. Pure: the clock is given, and what starts to
drain is told, so that the caller can keep the deadlines where they survive it (the guard table in the kernel).
"""

from collections.abc import Iterable
from typing import NamedTuple

from msgspec.structs import replace

from .model import Address, Protocol, RealServer, VirtualAddress, VirtualServer

_UDP = int(Protocol.UDP)


class DrainKey(NamedTuple):
    """One real server of one virtual server."""

    at: VirtualAddress
    address: Address
    port: int


class Drains:
    """The clocks of all draining real servers; deadlines in seconds of the caller's monotonic clock."""

    def __init__(self, *, udp: bool = False) -> None:
        self._udp = udp
        """UDP may finish as well: what leaves is not a real server that has gone, but the mode that leads to it."""
        self.deadlines: dict[DrainKey, float] = {}
        self.changed: set[DrainKey] = set()
        """Clocks that started or ended since the one who keeps a copy of them emptied this."""
        self._finished: set[DrainKey] = set()
        self.completed = 0
        """Drains that ended because the last connection had."""
        self.cut_short = 0
        """Drains that ended because the time was over."""

    def retain(
        self, at: VirtualAddress, wanted: VirtualServer | None, held: VirtualServer | None, seconds: int, now: float
    ) -> VirtualServer | None:
        """What the kernel shall hold at `at`: `wanted`, and weight 0 for what is held, not wanted, and may finish.

        A virtual server that is not wanted at all stays as long as one of its real servers drains: its VIP stays bound
        and open connections go on, new ones are refused.
        """
        if held is None or (wanted is not None and wanted.real_servers == held.real_servers):
            if wanted is not None:
                self.revive(at, wanted.real_servers)  # with weight 0 it is there as it was when it drained
            return wanted
        wanted_reals = wanted.real_servers if wanted else ()
        wanted_keys = {(real.address, real.port) for real in wanted_reals}
        leaving = [real for real in held.real_servers if (real.address, real.port) not in wanted_keys]
        self.revive(at, wanted_reals)
        kept = self.let_finish(at, leaving, seconds, now)
        if not kept:
            return wanted
        return with_reals(wanted or replace(held, real_servers=()), kept)

    def revive(self, at: VirtualAddress, wanted: Iterable[RealServer]) -> None:
        """What is wanted has no clock."""
        deadlines, finished = self.deadlines, self._finished
        if deadlines or finished:
            for real in wanted:
                # a plain tuple finds a DrainKey, and is cheaper to make
                key = (at, real.address, real.port)
                if key in deadlines or key in finished:
                    self.forget(DrainKey(*key))

    def let_finish(
        self, at: VirtualAddress, leaving: Iterable[RealServer], seconds: int, now: float
    ) -> list[RealServer]:
        """Those of the real servers `leaving` that may stay for now, with weight 0."""
        kept = []
        at_once = seconds <= 0 or (at.protocol == _UDP and not self._udp)
        for real in leaving:
            key = DrainKey(at, real.address, real.port)
            deadline = self.deadlines.get(key)
            if at_once or key in self._finished or (deadline is not None and deadline <= now):
                if deadline is not None and key in self._finished:
                    self.completed += 1
                elif deadline is not None:
                    self.cut_short += 1
                self.forget(key)
                continue
            if deadline is None:
                self.deadlines[key] = now + seconds
                self.changed.add(key)
            kept.append(replace(real, weight=0) if real.weight else real)
        return kept

    def restore(self, key: DrainKey, seconds_left: float, now: float) -> None:
        """Go on with a clock that an earlier agent started."""
        self.deadlines[key] = now + seconds_left

    def finish(self, key: DrainKey) -> None:
        """Its last connection ended: the next `retain` lets it go."""
        self._finished.add(key)

    def forget(self, key: DrainKey) -> None:
        """It is gone, or wanted again."""
        if self.deadlines.pop(key, None) is not None:
            self.changed.add(key)
        self._finished.discard(key)

    def expired(self, now: float) -> list[DrainKey]:
        """Those whose deadline has passed."""
        return [key for key, deadline in self.deadlines.items() if deadline <= now]

    def next_deadline(self) -> float | None:
        """The earliest deadline, None when nothing drains."""
        return min(self.deadlines.values(), default=None)


def with_reals(server: VirtualServer, more: list[RealServer]) -> VirtualServer:
    """The virtual server with more real servers."""
    return replace(server, real_servers=tuple(sorted([*server.real_servers, *more])))
