"""What must change: the pure difference between what a mode holds and what it shall hold.

`State` is both: what `observe()` read from the kernel, and what we know it holds after each commit. `diff` looks only
at the virtual addresses it is given, so a change of one Service costs the same among ten Services and ten thousand.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from .model import Address, NoServers, RealServer, VirtualAddress, VirtualServer


class State:
    """Virtual servers, and the addresses they need: VIPs bound on this node, endpoints that may reach themselves.

    `vips` and `hairpins` are what is really there; how often the servers need each is counted beside, so that both can
    be compared at any time. Three kinds of irregularity an observer may find:
    `foreign`: virtual addresses that somebody else programmed; they are never touched.
    `ghosts`: virtual addresses that we own by our own books, with no server behind them.
    `partial`: VIPs that are in one of the places where a bound VIP must be, but not in all.
    `adoptable`: servers that are probably ours, our books being lost: taken over if wanted, never removed.
    """

    def __init__(
        self,
        servers: Iterable[VirtualServer] = (),
        vips: Iterable[Address] = (),
        hairpins: Iterable[Address] = (),
        foreign: Iterable[VirtualAddress] = (),
        ghosts: Iterable[VirtualAddress] = (),
        partial: Iterable[Address] = (),
    ) -> None:
        self.servers: dict[VirtualAddress, VirtualServer] = {}
        self.vips = set(vips)
        self.hairpins = set(hairpins)
        self.foreign = set(foreign)
        self.ghosts = set(ghosts)
        self.partial = set(partial)
        self.adoptable: dict[VirtualAddress, VirtualServer] = {}
        self._vip_uses: dict[Address, int] = {}
        self._hairpin_uses: dict[Address, int] = {}
        for server in servers:
            self.put(server)

    def put(self, server: VirtualServer) -> None:
        """Add a virtual server, or replace the one at its address."""
        self.drop(server.at)
        self.adoptable.pop(server.at, None)
        self.servers[server.at] = server
        self._count(server, +1)

    def drop(self, at: VirtualAddress) -> None:
        """Take the virtual server at an address away, if there is one."""
        old = self.servers.pop(at, None)
        if old is not None:
            self._count(old, -1)

    def _replace(self, change: "Change") -> None:
        """`put`, for what is mostly known: only what differs is counted."""
        old, new = change.old, change.new
        if self.servers.get(new.at) is not old or old.bound is not new.bound:
            self.put(new)
            return
        self.servers[new.at] = new
        for address, step in change.differing.hairpins:
            _add(self._hairpin_uses, address, step)

    def _count(self, server: VirtualServer, step: int) -> None:
        if server.bound:
            _add(self._vip_uses, server.at.address, step)
        _count_hairpins(self._hairpin_uses, server, step)

    def needs(self) -> tuple[Collection[Address], Collection[Address]]:
        """The VIPs and hairpin addresses that the servers here need."""
        return self._vip_uses.keys(), self._hairpin_uses.keys()

    def irregular(self) -> bool:
        """Something was found that only a whole look explains."""
        return bool(self.foreign or self.ghosts or self.partial or self.adoptable)

    def uses(self) -> tuple[Mapping[Address, int], Mapping[Address, int]]:
        """The same with how many need each."""
        return self._vip_uses, self._hairpin_uses

    def apply(self, plan: "Plan", skip: Collection[VirtualAddress] = ()) -> None:
        """Know what a committed plan did; `skip` names the servers of it that failed."""
        for server in plan.remove:
            if server.at not in skip:
                self.drop(server.at)
                self.ghosts.discard(server.at)
        for server in plan.add:
            if server.at not in skip:
                self.put(server)
                self.ghosts.discard(server.at)
        for change in plan.change:
            if not skip or change.new.at not in skip:
                self._replace(change)
        self.vips.difference_update(plan.unbind)
        self.vips.update(plan.bind)
        self.partial.difference_update(plan.bind, plan.unbind)
        self.hairpins.difference_update(plan.hairpin_remove)
        self.hairpins.update(plan.hairpin_add)


class Reals(NamedTuple):
    """What differs between the real servers of two states of a virtual server.

    Addresses of a Service that have the same endpoints share one of these, by which whoever works on them sees that it
    has been there before.
    """

    add: Sequence[RealServer] = ()
    edit: Sequence[RealServer] = ()
    remove: Sequence[RealServer] = ()
    hairpins: Sequence[tuple[Address, int]] = ()
    """Real servers on this node that come (+1) and go (-1)."""


NO_REALS = Reals()


class Change(Struct, frozen=True):
    """A virtual server before and after (it unpacks as these two), and what differs: `compare` makes it."""

    old: VirtualServer
    new: VirtualServer
    server: bool = False
    """Something of the virtual server itself differs, not only its real servers."""
    differing: Reals = NO_REALS

    def __iter__(self) -> Iterator[VirtualServer]:
        return iter((self.old, self.new))

    def __bool__(self) -> bool:
        """There is something to do (where a real server runs is the hairpin addresses' matter)."""
        add, edit, remove, _ = self.differing
        return bool(self.server or edit or add or remove)

    def edited(self) -> bool:
        """Something of the virtual server itself differs, not only its real servers."""
        return self.server

    def reals(self) -> tuple[Sequence[RealServer], Sequence[RealServer], Sequence[RealServer]]:
        """Real servers to add, to change in place, and to remove."""
        return self.differing[:3]


class Plan(Struct, frozen=True):
    """Everything one commit does. An empty plan, and only that, means there is nothing to do.

    `blocked`: wanted virtual addresses that somebody else holds in the kernel. `reals_only`: it is known that
    nothing but real servers and hairpin addresses change (a plan that is not marked may be like that too).
    """

    add: tuple[VirtualServer, ...] = ()
    change: tuple[Change, ...] = ()
    remove: tuple[VirtualServer, ...] = ()
    bind: tuple[Address, ...] = ()
    unbind: tuple[Address, ...] = ()
    hairpin_add: tuple[Address, ...] = ()
    hairpin_remove: tuple[Address, ...] = ()
    blocked: tuple[VirtualAddress, ...] = ()
    reals_only: bool = False

    def __bool__(self) -> bool:
        return bool(
            self.change
            or self.add
            or self.remove
            or self.bind
            or self.unbind
            or self.hairpin_add
            or self.hairpin_remove
        )

    def addresses(self) -> Iterator[VirtualAddress]:
        """The virtual addresses whose servers it adds, changes or removes."""
        yield from (server.at for server in self.add)
        yield from (change.new.at for change in self.change)
        yield from (server.at for server in self.remove)

    def counts(self, skip: Collection[VirtualAddress] = ()) -> tuple[int, int, int]:
        """Adds, sets and deletes in virtual servers, real servers and addresses; `skip`: servers that failed."""
        added = [server for server in self.add if server.at not in skip]
        adds = len(added) + sum(len(s.real_servers) for s in added) + len(self.bind) + len(self.hairpin_add)
        deletes = sum(s.at not in skip for s in self.remove) + len(self.unbind) + len(self.hairpin_remove)
        sets = 0
        for change in self.change:
            if not skip or change.new.at not in skip:
                add, edit, remove, _ = change.differing
                adds += len(add)
                sets += len(edit) + change.server
                deletes += len(remove)
        return adds, sets, deletes


NO_PLAN = Plan()
_REJECT = NoServers.REJECT


def diff(
    held: State, wanted: Mapping[VirtualAddress, VirtualServer], only: Collection[VirtualAddress] | None = None
) -> Plan:
    """The plan that turns `held` into `wanted`; with `only`, the part of it that concerns those virtual addresses.

    `only` costs O(len(only)). Without it everything is compared, also VIPs and hairpin addresses no server needs.
    """
    if only is None and not (held.servers or held.vips or held.hairpins or held.irregular()):
        return _everything(wanted)
    keys: Iterable[VirtualAddress] = held.servers.keys() | wanted.keys() | held.ghosts if only is None else only
    add, change, remove, blocked = [], [], [], []
    vips: dict[Address, int] = {}
    hairpins: dict[Address, int] = {}
    for at in keys:
        old, new = held.servers.get(at), wanted.get(at)
        if old is None and new is not None and at in held.adoptable:
            change.append(compare(held.adoptable[at], new))
            _count_hairpins(hairpins, new, +1)
            _add(vips, at.address, +new.bound)
            continue
        if new is not None and at in held.foreign:
            blocked.append(at)
            continue
        if old is not None and new is not None:
            if old is new or old == new:
                continue  # the common case of a full look; what both need cancels out
            differing = compare(old, new)
            if differing or differing.differing.hairpins:  # as in `of_changes`
                change.append(differing)
            for address, step in differing.differing.hairpins:
                _add(hairpins, address, step)
            if old.bound == new.bound:
                continue
        elif new is not None:
            add.append(new)
            _count_hairpins(hairpins, new, +1)
        elif old is not None:
            remove.append(old)
            _count_hairpins(hairpins, old, -1)
        elif at in held.ghosts:
            remove.append(VirtualServer(at))
        if old is not None and old.bound:
            _add(vips, at.address, -1)
        if new is not None and new.bound:
            _add(vips, at.address, +1)
    if only is None:
        for uses, there, delta in zip(held.uses(), (held.vips, held.hairpins), (vips, hairpins), strict=True):
            for address in (*uses, *there):
                delta.setdefault(address, 0)
    else:
        # a VIP that was lost must come back with the next change of its server, also when no count changes
        for at in only:
            address = at.address
            if address in held.partial or (address in held.vips) != (address in held.uses()[0]):
                vips.setdefault(address, 0)
    bind, unbind = _missing(held.vips, held.uses()[0], vips, held.partial)
    hairpin_add, hairpin_remove = _missing(held.hairpins, held.uses()[1], hairpins, ())
    return Plan(tuple(add), tuple(change), tuple(remove), bind, unbind, hairpin_add, hairpin_remove, tuple(blocked))


def _everything(wanted: Mapping[VirtualAddress, VirtualServer]) -> Plan:
    """The plan from nothing at all, which is what a first load is."""
    hairpins: dict[Address, int] = {}
    vips: dict[Address, None] = {}
    for server in wanted.values():
        if server.bound:
            vips[server.at.address] = None
        for real in server.real_servers:
            if real.local:
                hairpins[real.address] = 1
    return Plan(tuple(wanted.values()), bind=tuple(vips), hairpin_add=tuple(hairpins))


def of_changes(held: State, changes: Iterable[Change]) -> Plan | None:
    """The plan of the commonest changes, servers that are there and stay, with all else in place; None: `diff`."""
    if held.foreign or held.partial:
        return None
    differing: list[Change] = []
    hairpins: dict[Address, int] = {}
    reals_only = True
    for change in changes:
        old, new = change.old, change.new
        bound = old.bound
        if bound is not new.bound or (bound and old.at.address not in held.vips):
            return None
        add, edit, remove, local = change.differing
        for address, step in local:
            hairpins[address] = hairpins.get(address, 0) + step
        if not (change.server or add or edit or remove or local):
            continue
        differing.append(change)  # where a real server runs is nothing to do, but has to be known
        # what packets meet in front of a server may go by whether it has somebody to serve: elsewhere than at a cluster
        # IP, or where it drops when it has nobody
        if reals_only:
            plain = bound and old.no_servers is _REJECT
            reals_only = not change.server and (plain or _both_serve(old.real_servers, new.real_servers))
    if hairpins:
        come, go = _missing(held.hairpins, held.uses()[1], hairpins, ())
        if come or go:
            return Plan((), tuple(differing), (), (), (), come, go, (), reals_only)
    return Plan((), tuple(differing), (), (), (), (), (), (), reals_only) if differing else NO_PLAN


def _both_serve(before: tuple[RealServer, ...], after: tuple[RealServer, ...]) -> bool:
    if before and after and before[0].weight and after[0].weight:
        return True  # as nearly always
    return any(real.weight for real in before) and any(real.weight for real in after)


Known = dict[tuple[int, int], Reals]
"""Comparisons of real servers made before, by the identities of the two tuples, which somebody keeps meanwhile."""


def compare(old: VirtualServer, new: VirtualServer, known: Known | None = None) -> Change:
    """What differs between two states of one virtual server."""
    server = (
        old.label != new.label
        or old.scheduler != new.scheduler
        or old.flags != new.flags
        or old.persistence != new.persistence
        or old.persistence_prefix != new.persistence_prefix
        or old.no_servers is not new.no_servers
        or old.masquerade is not new.masquerade
        or old.bound is not new.bound
        or old.kind is not new.kind
        or (old.allowed is not new.allowed and old.allowed != new.allowed)
    )
    before, after = old.real_servers, new.real_servers
    if known is None:
        return Change(old, new, server, _differing(before, after))
    pair = id(before), id(after)
    differing = known.get(pair)
    if differing is None:
        differing = known[pair] = _differing(before, after)
    return Change(old, new, server, differing)


def _differing(before: tuple[RealServer, ...], after: tuple[RealServer, ...]) -> Reals:
    # one walk through both; plain indexing and comparing, since the first call of anything costs more than all the rest
    add: list[RealServer] = []
    edit: list[RealServer] = []
    remove: list[RealServer] = []
    hairpins: list[tuple[Address, int]] = []
    count, index = len(before), 0
    for real in after:
        while True:
            if index == count:
                add.append(real)
                if real.local:
                    hairpins.append((real.address, +1))
                break
            was = before[index]
            if was == real:
                index += 1
                break
            if was.address == real.address and was.port == real.port:
                if was.local is not real.local:
                    hairpins.append((real.address, +1 if real.local else -1))
                if was.weight != real.weight or _edited(was, real):
                    edit.append(real)
                index += 1
                break
            # both are sorted: what comes before `real` is not wanted any more
            if (was.address, was.port) > (real.address, real.port):
                add.append(real)
                if real.local:
                    hairpins.append((real.address, +1))
                break
            remove.append(was)
            if was.local:
                hairpins.append((was.address, -1))
            index += 1
    while index < count:
        was = before[index]
        remove.append(was)
        if was.local:
            hairpins.append((was.address, -1))
        index += 1
    return Reals(add, edit, remove, hairpins)


def keeping(change: Change, kept: Sequence[RealServer]) -> Change:
    """The change with real servers that it would remove still there, as `kept` has them: weight 0. Both are sorted."""
    add, edited, removed, hairpins = change.differing
    edit, remove = [*edited], []
    reals: list[RealServer] = []
    index, count = 0, len(kept)
    for real in change.new.real_servers:
        while index < count and kept[index] < real:
            reals.append(kept[index])
            index += 1
        reals.append(real)
    reals += kept[index:]
    index = 0
    for was in removed:
        if index < count and kept[index].address == was.address and kept[index].port == was.port:
            if kept[index].weight != was.weight:
                edit.append(kept[index])
            if was.local:
                hairpins = [*hairpins]
                hairpins.remove((was.address, -1))
            index += 1
        else:
            remove.append(was)
    new = replace(change.new, real_servers=tuple(reals))
    return Change(change.old, new, change.server, Reals(add, edit, remove, hairpins))


def _edited(old: RealServer, new: RealServer) -> bool:
    """Of one real server, something differs that is kept with it."""
    return (
        old.weight != new.weight
        or old.forwarding != new.forwarding
        or old.upper_threshold != new.upper_threshold
        or old.lower_threshold != new.lower_threshold
    )


def _count_hairpins(hairpins: dict[Address, int], server: VirtualServer, step: int) -> None:
    for real in server.real_servers:
        if real.local:
            _add(hairpins, real.address, step)


def _add(counts: dict[Address, int], key: Address, step: int) -> None:
    left = counts.get(key, 0) + step
    if left:
        counts[key] = left
    else:
        counts.pop(key, None)


def _missing(
    there: Collection[Address], uses: Mapping[Address, int], delta: Mapping[Address, int], partial: Collection[Address]
) -> tuple[tuple[Address, ...], tuple[Address, ...]]:
    """Of the addresses in `delta`: those to add, those to take away."""
    if not delta:
        return (), ()
    add, remove = [], []
    for address, step in delta.items():
        needed = uses.get(address, 0) + step > 0
        if needed and (address not in there or address in partial):
            add.append(address)
        elif not needed and address in there:
            remove.append(address)
    return tuple(add), tuple(remove)
