"""Which UDP flows lead to the wrong place: what a conntrack entry to one of our virtual addresses may lead to. Pure.

A conntrack entry outlives the rule it was made by. TCP and SCTP clients notice a dead real server and connect anew; a
UDP client that keeps its source port never does (DNS forwarders, QUIC). So after a sync entries to our UDP virtual
addresses are compared with the state reached, not with what happened: an entry is right while the place that answers
it is one of the virtual server's real servers, or an endpoint of its Service that still serves (policies and topology
may have moved new clients elsewhere; those who are there may stay, as with TCP). An address that we have given up may
answer for itself again. All other entries are not ours to judge.

Nothing is forgotten when a look fails: what is due stays due.
"""

from collections.abc import Callable, Collection, Iterable, Mapping

from .model import Address, Protocol, VirtualAddress, VirtualServer

Place = tuple[Address, int]
"""An address and a port."""
_UDP = int(Protocol.UDP)
Right = dict[Place, frozenset[Place]]
"""For each destination, where replies may come from."""


class Staleness:
    """The virtual addresses whose conntrack entries have to be looked at, and what was right at the last look."""

    def __init__(self) -> None:
        self._everything = True  # an earlier agent may have ended between a commit and its look
        self._due: set[Place] = set()
        self._removed: set[Place] = set()
        self._right: Right = {}

    def touch(self, addresses: Iterable[VirtualAddress]) -> None:
        """Their virtual servers, or the endpoints of their Services, have changed."""
        self._due.update((at.address, at.port) for at in addresses if at.protocol == _UDP)

    def touch_everything(self) -> None:
        """It is not known what has changed."""
        self._everything = True

    def remove(self, servers: Iterable[VirtualServer]) -> None:
        """A commit was to remove them: entries to them are ours to judge though nothing is there any more."""
        gone = [(server.at.address, server.at.port) for server in servers if server.at.protocol == _UDP]
        self._due.update(gone)
        self._removed.update(gone)

    def questions(
        self,
        held: Mapping[VirtualAddress, VirtualServer],
        serving: Callable[[VirtualAddress], Collection[Place]],
    ) -> Right:
        """What to look for now; {} = no entry can be wrong. `serving`: endpoints of an address's Service that serve."""
        if self._everything:
            self.touch(held)
            self._due.update(self._right)
            self._removed.update(self._right)
            self._everything = False
            self._right.clear()
        wanted: Right = {}
        for place in self._due:
            right = _right(place, held, serving)
            before = self._right.get(place)
            if right is None:
                if before is not None or place in self._removed:
                    wanted[place] = frozenset((place,))
            elif before is None or not (before == right or (before and before <= right)):
                wanted[place] = right  # also after a time without real servers: entries may be untranslated
            else:
                self._right[place] = right  # every entry was right at the last look, and is so still
                self._removed.discard(place)
        self._due = set(wanted)
        return wanted

    def answered(self, questions: Right) -> None:
        """All entries are as `questions` wanted them."""
        self._due.difference_update(questions)
        self._removed.difference_update(questions)
        for place, right in questions.items():
            if right == {place}:
                self._right.pop(place, None)
            else:
                self._right[place] = right

    def failed(self, questions: Right) -> None:
        """It could not be found out: look again, whatever becomes of them until then."""
        for place in questions:
            if self._right.pop(place, None) is not None:
                self._removed.add(place)  # it was ours


def _right(
    place: Place,
    held: Mapping[VirtualAddress, VirtualServer],
    serving: Callable[[VirtualAddress], Collection[Place]],
) -> frozenset[Place] | None:
    """Where entries to a place may lead; None = no virtual server of ours is there."""
    found: set[Place] | None = None
    for inside in (False, True):
        server = held.get(VirtualAddress(_UDP, *place, inside))
        if server is not None:
            found = set() if found is None else found
            found.update((real.address, real.port) for real in server.real_servers)
            found.update(serving(server.at))
    return None if found is None else frozenset(found)
