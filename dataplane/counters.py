"""Hits per real server: who may count them, and totals that never fall whatever happens to the counters under them.

Pure. A counter of the kernel begins again when its object is made anew (a real server that left and came back, a
rewritten chain, a reloaded module); a total here goes on from where it was. Of real servers that are gone their virtual
server keeps the sum.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from .model import Address, VirtualAddress

ROOM = 65536
"""Real servers that are gone and still known by name, in case they come back; older ones are summed up."""


class Target(NamedTuple):
    """One real server of one virtual server."""

    at: VirtualAddress
    address: Address
    port: int


class Tally:
    """Totals of one source of numbers. They begin with what the source says at first.

    `remembers`: the source goes on where it was with a real server that was gone; a kernel object begins again.
    """

    def __init__(self, room: int = ROOM, *, remembers: bool = False) -> None:
        self._room = room
        self._remembers = remembers
        self._last: dict[Target, int] = {}
        self._before: dict[Target, int] = {}
        """What was counted before a counter began again."""
        self._summed: dict[VirtualAddress, int] = {}

    def take(self, seen: Mapping[Target, int]) -> None:
        """The source's numbers of this moment; what it does not name is gone for now."""
        last, before = self._last, self._before
        if not self._remembers:
            for target in last.keys() - seen.keys():
                if last[target]:
                    before[target] = before.get(target, 0) + last[target]
                    last[target] = 0
        for target, value in seen.items():
            known = last.pop(target, 0)  # popped, so that the order of the dictionary is that of the last sight
            if value < known:
                before[target] = before.get(target, 0) + known
            last[target] = value
        surplus = len(last) - len(seen) - self._room
        if surplus > 0:
            for target in [target for target in last if target not in seen][:surplus]:
                total = last.pop(target) + before.pop(target, 0)
                self._summed[target.at] = self._summed.pop(target.at, 0) + total
            while len(self._summed) > ROOM:
                del self._summed[next(iter(self._summed))]

    def total(self, target: Target) -> int:
        """All hits of a real server since the first sight of it."""
        return self._last.get(target, 0) + self._before.get(target, 0)

    def totals(self) -> dict[VirtualAddress, int]:
        """All hits of each virtual server, also those of real servers that are gone."""
        sums = dict(self._summed)
        for target, value in self._last.items():
            sums[target.at] = sums.get(target.at, 0) + value
        for target, value in self._before.items():
            sums[target.at] = sums.get(target.at, 0) + value
        return sums


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
