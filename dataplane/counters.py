"""Hits per real server: who may count them, and totals that never fall whatever happens to the counters under them.

Pure. A counter of the kernel begins again when its object is made anew (a real server that left and came back, a
rewritten chain, a reloaded module); a total here goes on from where it was. Of real servers that are gone their virtual
server keeps the sum.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol

from .model import Address, VirtualAddress

ROOM = 64
"""Real servers of one virtual server that are gone and still known by name, in case they come back."""
FORMER = 10_000
"""Virtual servers that are gone and still known, in case they come back."""

RealServerAt = tuple[Address, int]
"""Address and port of a real server."""


class _Totals:
    """Of one virtual server."""

    __slots__ = ("before", "last", "summed")

    def __init__(self) -> None:
        self.last: dict[RealServerAt, int] = {}
        self.before: dict[RealServerAt, int] = {}
        """What was counted before a counter began again."""
        self.summed = 0
        """Of real servers that are not known by name any more."""


class Tally:
    """Totals of one source of numbers. They begin with what the source says at first.

    `remembers`: the source goes on where it was with a real server that was gone; a kernel object begins again.
    """

    def __init__(self, room: int = ROOM, *, remembers: bool = False) -> None:
        self._room = room
        self._remembers = remembers
        self._servers: dict[VirtualAddress, _Totals] = {}
        self._former: dict[VirtualAddress, _Totals] = {}

    def take(self, at: VirtualAddress, seen: Mapping[RealServerAt, int]) -> tuple[dict[RealServerAt, int], int]:
        """The source's numbers for one virtual server at this moment; a real server that they lack is gone for now.

        Returns the totals of those that are here, and that of the virtual server.
        """
        totals = self._servers.get(at)
        if totals is None:
            totals = self._servers[at] = self._former.pop(at) if at in self._former else _Totals()
        last, before = totals.last, totals.before
        if last.keys() != seen.keys() and not self._remembers:
            for backend in last.keys() - seen.keys():
                if last[backend]:
                    before[backend] = before.get(backend, 0) + last[backend]
                    last[backend] = 0
        for backend, value in seen.items():
            known = last.pop(backend, 0)  # popped, so that the order of the dictionary is that of the last sight
            if value < known:
                before[backend] = before.get(backend, 0) + known
            last[backend] = value
        surplus = len(last) - len(seen) - self._room
        if surplus > 0:
            for backend in [backend for backend in last if backend not in seen][:surplus]:
                totals.summed += last.pop(backend) + before.pop(backend, 0)
        here = {backend: value + before.get(backend, 0) for backend, value in seen.items()}
        return here, totals.summed + sum(last.values()) + sum(before.values())

    def forget(self, at: VirtualAddress) -> None:
        """A virtual server is gone; its totals are kept for a while, in case it comes back."""
        totals = self._servers.pop(at, None)
        if totals is not None:
            self._former[at] = totals
            if len(self._former) > FORMER:
                del self._former[next(iter(self._former))]


Way = tuple[int, Address, int, Address, int]
"""Protocol, VIP, port, real server, its port."""


class Probe(Protocol):
    """What counts inside the kernel, for all modes (`bpf.dnat_hits.DnatHits`)."""

    @property
    def hooks(self) -> tuple[str, ...]:
        """Where it is attached: `fexit:nf_nat_setup_info`."""

    def expect(self, addresses: Iterable[VirtualAddress]) -> None:
        """Count connections to these from now on."""

    def forget(self, addresses: Iterable[VirtualAddress]) -> None:
        """No longer."""

    def read(self) -> Mapping[Any, int]:
        """Hits by the Way they took."""

    def missed(self) -> dict[str, int]:
        """Hits that could not be counted, by reason."""

    def counts(self, mode: str) -> bool:
        """Whether what this mode translates is counted."""

    def retire(self, keep: Collection[Any]) -> None:
        """Give the room of all Ways but these back."""

    def check(self) -> bool:
        """Attach again where a module has been loaded anew. False: it takes another probe to do that."""

    def close(self) -> None:
        """Detach."""
