"""How a VirtualServer lies in the table of nftables mode: as elements, and back. Pure (`nft_tables.nft` has the rules).

An `Entry` is everything the table holds of one virtual address. `layout` gives the entry a server needs, close to the
one it has: elements that need not change stay, and with them the kernel's counters. `difference` of two entries is what
travels; `server_of` reads an entry back.

Slots are dense, 0 to N-1, since the index of a new connection is random below N. When one goes, the last one moves
into its place.

A Service port with affinity, or with other addresses than its cluster IP, has a number, and so have its endpoints:
slots lead to numbers, and numbers to endpoints. What a number leads to is one element, however many addresses have the
slot, so that an endpoint is replaced at all of them at once; and clients are remembered by numbers, so that moving
slots moves no client, and addresses share what they remember. A cluster IP that was alone when it came has its
endpoints itself, which saves packets a step; it goes on like that when others come.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import chain as joined
from math import gcd
from typing import Any, NamedTuple

from msgspec import Struct, field

from . import nftables_messages as nft
from .model import (
    Address,
    Forwarding,
    Kind,
    Masquerade,
    Network,
    NoServers,
    Protocol,
    RealServer,
    VirtualAddress,
    VirtualServer,
    format_address,
)
from .nlattr import u32_bytes
from .plan import Change, Reals

TABLE = "dataplane-nftables"
SCHEDULER = "random"
SLOTS = 256
"""Weights are scaled down to so many slots, unless there are more endpoints than that."""
ROWS = 64
"""Endpoints of a new server that are packed in one piece."""

Target = tuple[Address, int]
"""Address and port of an endpoint."""


INSIDE = 1 << 31
"""Added to the indexes of servers for clients inside the cluster, whose address is another server's as well."""
HOME_BITS, NUMBER_BITS = 0x7FFF_0000, 0x0000_FFFF
"""An endpoint's number: that of its Service's port above, its own below. So one priority says both."""
HOME_STEP = NUMBER_BITS + 1


class Entry(Struct, gc=False):
    """What the table holds of one virtual address."""

    chain: str = ""
    """Where `services` (or `inside`) sends it: "pick4_3", "inside_sticky6_10800_2"; "" = nowhere."""
    refused: str = ""
    """What `no_endpoints` does with it: "refuse" or "drop"; "" = it is not there."""
    comment: str = ""
    """Whose it is and at what kind of address."""
    endpoints: dict[int, Target] = field(default_factory=dict)
    """Slot -> endpoint."""
    numbers: dict[int, int] = field(default_factory=dict)
    """Or slot -> number."""
    shared: dict[int, Target] = field(default_factory=dict)
    """And number -> endpoint, as far as it has slots; these elements are the Service port's."""
    alive: set[int] = field(default_factory=set)
    """With affinity: numbers that clients may keep to."""
    idle: set[Target] = field(default_factory=set)
    home: int = 0
    """With affinity: the number of the Service's port."""
    masquerade: str = ""
    """The chain of `masquerade`; "" = it is not there."""
    external: bool = False
    allowed: tuple[Network, ...] = ()

    def slim(self) -> None:
        """For a whole entry that nobody changes any more: what is empty takes no memory of its own."""
        numbers, shared, alive, idle = _NONE
        self.numbers, self.shared = self.numbers or numbers, self.shared or shared
        self.alive, self.idle = self.alive or alive, self.idle or idle

    def slots(self) -> list[Target | None]:
        """The endpoint of each slot the chain draws from; None = it leads nowhere."""
        place, kind, _, count = chain_parts(self.chain)
        first = INSIDE if place == "inside" else 0
        if kind in _NUMBERED:
            return [self.shared.get(self.numbers.get(first + slot, 0)) for slot in range(count)]
        return [self.endpoints.get(first + slot) for slot in range(count)]

    def whole(self) -> bool:
        """Nothing is missing and nothing is too much."""
        place, kind, _, count = chain_parts(self.chain)
        if bool(count) == bool(self.refused) or None in self.slots():
            return False
        if (place == "local") != (self.masquerade == "masquerade_node"):
            return False
        if kind in _NUMBERED and count:
            used = set(self.numbers.values())
            first = INSIDE if place == "inside" else 0
            alive = {first | number for number in used} if kind == "sticky" else set()
            return (
                len(self.numbers) == count
                and self.shared.keys() == used
                and self.alive == alive
                and not self.endpoints
                and len({number & HOME_BITS for number in used}) == 1
            )
        return len(self.endpoints) == count and not self.numbers and not self.alive

    def port(self) -> int:
        """The number of the Service's port; 0 = it has nothing to do with one."""
        return self.home or next(iter(self.numbers.values()), 0) & HOME_BITS


NOTHING = Entry()
_NONE: tuple[dict[int, int], dict[int, Target], set[int], set[Target]] = ({}, {}, set(), set())
"""Numbers, shared, alive and idle of all servers that have none: nobody changes an entry that `layout` has made."""
_NUMBERED = ("draw", "sticky")


class Parts(NamedTuple):
    """What a chain's name says. `place`: "inside" (for clients inside the cluster), "local" (looks for those first), or
    ""; `kind`: "pick" (slots lead to endpoints), "draw" (to numbers), "sticky" (the same with affinity), or "" for what
    is none of ours."""

    place: str
    kind: str
    seconds: int
    slots: int


@lru_cache(maxsize=4096)
def chain_name(width: int, seconds: int, slots: int, place: str = "", *, numbered: bool = False) -> str:
    """The chain that picks one of `slots`, for addresses of `width` bytes."""
    family = 4 if width == 4 else 6
    name = f"{'draw' if numbered else 'pick'}{family}_{slots}"
    if seconds:
        name = f"sticky{family}_{seconds}_{slots}"
    return f"{place}_{name}" if place else name


@lru_cache(maxsize=4096)
def chain_parts(name: str) -> Parts:
    """The reverse."""
    head, *numbers = name.split("_")
    place = ""
    if head in ("inside", "local") and numbers:
        place, head, numbers = head, numbers[0], numbers[1:]
    if not all(each.isdecimal() for each in numbers):
        return Parts("", "", 0, 0)
    if head in ("pick4", "pick6", "draw4", "draw6") and len(numbers) == 1:
        return Parts(place, head[:-1], 0, int(numbers[0]))
    if head in ("sticky4", "sticky6") and len(numbers) == 2:
        return Parts(place, "sticky", int(numbers[0]), int(numbers[1]))
    return Parts("", "", 0, 0)


# ------------------------------------------------------------------------------------------------ server <-> entry


def canonical(server: VirtualServer, *, plain: bool = False) -> VirtualServer:
    """What of a server this mode can hold.

    The choice is random, and weights are slots, hence small whole numbers; weight 0 stays 0. A server that has nobody
    to send to has no affinity (unless others lead through it), and one that has does not say what it would do
    otherwise. Servers for clients inside have no settings of their own besides their endpoints. `plain`: it is known
    that the real servers are as they can be held.
    """
    at = server.at
    inside = at[3]
    reals = server.real_servers
    if not plain:
        for real in reals:
            if real.weight != 1 or real.forwarding is not _MASQ or real.upper_threshold or real.lower_threshold:
                reals = _slotted(reals, inside)
                break
    serves = False
    for real in reals:  # mostly the first one
        if real.weight:
            serves = True
            break
    sticky = server.persistence
    if sticky and not (serves or (server.masquerade is Masquerade.NODE and not server.bound)):
        sticky = 0
    bound = server.bound and not inside
    return VirtualServer(
        at,
        reals,
        SCHEDULER,
        0,
        sticky,
        8 * len(at[1]) if sticky else 32,
        Masquerade.NODE if inside else server.masquerade,
        NoServers.REJECT if serves else server.no_servers,
        bound,
        _plain_label(server.label),
        Kind.CLUSTER_IP if bound else server.kind,
        () if inside else server.allowed,
    )


_MASQ = Forwarding.MASQ
_plain_label = lru_cache(maxsize=64)(nft.owner_comment)
"""Addresses of a Service come one after the other."""


@lru_cache(maxsize=16)
def _slotted(reals: tuple[RealServer, ...], inside: bool) -> tuple[RealServer, ...]:
    """Real servers with slots for weights; the same object for all addresses of a Service that have them."""
    if inside:
        reals = tuple(real for real in reals if real.weight)
    weights = slot_counts([real.weight for real in reals])
    return tuple(
        real
        if real.weight == weight and real.forwarding is _MASQ and not (real.upper_threshold or real.lower_threshold)
        else RealServer(real.address, real.port, weight, real.local)
        for real, weight in zip(reals, weights, strict=True)
    )


def slot_counts(weights: list[int]) -> list[int]:
    """Slots for each weight: in proportion, as few as that takes, at least one for every weight above 0."""
    if weights.count(1) == len(weights):
        return weights
    divisor = gcd(*weights) or 1
    counts = [weight // divisor for weight in weights]
    serving = sum(count > 0 for count in counts)
    most = max(SLOTS, serving)
    total = sum(counts)
    if total > most:
        counts = [max(1, count * (most - serving) // total) if count else 0 for count in counts]
        divisor = gcd(*counts)
        counts = [count // divisor for count in counts]
    return counts


def layout(server: VirtualServer, held: Entry, homes: "Homes") -> Entry:
    """The entry of a canonical server, as close to the held one as can be; `homes` has the numbers that go with it."""
    at = server.at
    comment = nft.owner_comment(server.label, server.kind)
    reals = server.real_servers
    if held is NOTHING and server.bound and reals and not (server.persistence or server.allowed or homes.knows(server)):
        targets = [(real.address, real.port) for real in reals if real.weight == 1]
        if len(targets) == len(reals) and server.masquerade is Masquerade.DETECT:
            # a new server as most are: a slot for each
            return Entry(chain_name(len(at.address), 0, len(targets)), "", comment, dict(enumerate(targets)), *_NONE)
    numbered = _is_numbered(server, held, homes)
    wanted, idle = _targets(server.real_servers)
    entry = Entry(comment=comment, idle=idle)
    if not at.inside:
        entry.external, entry.allowed = not server.bound, server.allowed
        if entry.external or server.masquerade is not Masquerade.DETECT:
            entry.masquerade = MASQUERADES[server.masquerade]
        entry.home = homes.port(server) if server.persistence else 0
        if not wanted:
            entry.refused = "drop" if server.no_servers is NoServers.DROP else "refuse"
    place = "inside" if at.inside else "local" if entry.masquerade == "masquerade_node" else ""
    if not wanted and not place:
        return entry
    first = INSIDE if at.inside else 0
    if numbered:
        port = homes.port(server)
        stock = _stock(server.real_servers, first, server.persistence > 0, held, homes, port)
        entry.numbers, entry.shared, entry.alive, entry.idle = stock
        count = len(entry.numbers)
    else:
        slots = _slots(wanted, held.slots())
        entry.endpoints = dict(enumerate(slots, first))
        count = len(slots)
    entry.chain = chain_name(len(at.address), server.persistence, count, place, numbered=numbered)
    return entry


def _is_numbered(server: VirtualServer, held: Entry, homes: "Homes") -> bool:
    """Whether the server's slots lead to numbers."""
    if server.persistence:
        return True
    kind = chain_parts(held.chain).kind
    if kind == "draw" or (kind == "pick" and server.bound):
        return kind == "draw"  # any other that is not is of an earlier version, or came when there was no number left
    return homes.knows(server) or (not server.bound and homes.room())


def _targets(reals: tuple[RealServer, ...]) -> tuple[dict[Target, int], set[Target]]:
    """Who takes how many slots, and who takes nothing new."""
    wanted: dict[Target, int] = {}
    idle: set[Target] = set()
    for real in reals:
        if real.weight:
            wanted[real.address, real.port] = real.weight
        else:
            idle.add((real.address, real.port))
    return wanted, idle


Stock = tuple[dict[int, int], dict[int, Target], set[int], set[Target]]
"""What an entry whose slots lead to numbers has of its endpoints: numbers, shared, alive, idle."""


def _stock(reals: tuple[RealServer, ...], first: int, sticky: bool, held: Entry, homes: "Homes", port: int) -> Stock:
    """Where the slots of a server lead."""
    wanted, idle = _targets(reals)
    numbers: dict[int, int] = {}
    shared: dict[int, Target] = {}
    alive: set[int] = set()
    if wanted:
        known_numbers: dict[Target, int] = {}
        for target in wanted:
            number = homes.number(port, target)
            known_numbers[target] = number
            shared[number] = target
        # who takes over the number of who goes has his slots as well
        had = [shared.get(held.numbers[slot]) for slot in sorted(held.numbers)] if held.shared else held.slots()
        slots = _slots(wanted, had)
        numbers = dict(enumerate(map(known_numbers.__getitem__, slots), first))
        alive = {first | number for number in shared} if sticky else alive
    return numbers, homes.same(shared), alive, idle


class Loss(Struct):
    """Servers that have the same shared endpoints, and of which the same go and others come."""

    port: int
    shared: dict[int, Target]
    differing: Reals
    changes: list[Change] = field(default_factory=list)
    more: bool = False
    """Something else of one of them differs."""


def losses(changes: Iterable[Change], entries: Mapping[VirtualAddress, Entry]) -> Collection[Loss]:
    """The changes of servers whose slots lead to numbers, by what goes and comes."""
    found: dict[tuple[int, int], Loss] = {}
    for change in changes:
        held = entries.get(change.new.at)
        if held is not None and held.numbers:
            key = id(held.shared), id(change.differing)
            loss = found.get(key)
            if loss is None:
                loss = found[key] = Loss(held.port(), held.shared, change.differing)
            loss.changes.append(change)
            if change.server:
                loss.more = True
    return found.values()


class Restocking(NamedTuple):
    """What becomes of shared endpoints: those that nobody needs any more, and new ones; how many servers more or less
    use each; and entries that stay as they are while their numbers lead to others."""

    remove: list[tuple[int, Target]]
    add: list[tuple[int, Target]]
    uses: dict[tuple[int, Target | None], int]
    views: list[tuple[dict[int, Target], int, Target]]

    @classmethod
    def nothing(cls) -> "Restocking":
        """To be filled."""
        return cls([], [], {}, [])

    def joined(self, other: "Restocking") -> "Restocking":
        """Both, of different servers."""
        if not other.uses:
            return self
        uses = dict(self.uses)
        for key, step in other.uses.items():
            uses[key] = uses.get(key, 0) + step
        known = set(self.remove)
        remove = self.remove + [each for each in other.remove if each not in known]
        return Restocking(remove, self.add + other.add, uses, self.views + other.views)


class Homes:
    """The numbers of Service ports, and of the endpoints of each.

    All addresses of a Service port use the same. A number stays an endpoint's as long as the endpoint serves at one of
    them. What a commit is to use is found with `begin`, `port`, `number` and `difference`, and learned by `apply` when
    it has happened.
    """

    def __init__(self) -> None:
        self._ports: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._free: list[int] = []
        self._last = 0
        self.used = False
        """Some Service port has, or had, a number."""
        self._numbers: dict[int, dict[Target, int]] = {}
        self._uses: dict[tuple[int, Target | None], int] = {}
        self._gone: dict[int, list[int]] = {}
        self._taken: set[int] = set()
        self._fresh: dict[int, dict[Target, int]] = {}
        self._same: dict[frozenset[tuple[int, Target]], dict[int, Target]] = {}

    # ---------------------------------------------------------------------------------------------------- finding

    def begin(self, lost: Collection[Loss] = ()) -> None:
        """Another commit is made. `lost`: all servers that lose endpoints, so that the number of one that then has none
        can be taken over by one that comes."""
        if not self.used:
            return
        self._fresh.clear()
        self._gone.clear()
        self._taken.clear()
        self._same.clear()
        left: dict[tuple[int, Target], int] = {}
        for loss in lost:
            for real in loss.differing.remove:
                if real.weight:
                    key = loss.port, (real.address, real.port)
                    left[key] = left.get(key, 0) + len(loss.changes)
        for loss in lost:
            for real in loss.differing.add:
                left.pop((loss.port, (real.address, real.port)), None)
        for key, count in reversed(left.items()):  # they are taken from the end
            if self._uses.get(key) == count:
                self._gone.setdefault(key[0], []).append(self._numbers[key[0]][key[1]])

    def refill(self, loss: Loss, stock: Restocking) -> bool:
        """Nothing but shared endpoints differs, as each that goes is followed by one that takes over its number, and so
        its slots: add that to `stock`. False: it is not so simple."""
        add, edit, remove, _ = loss.differing
        port, count = loss.port, len(loss.changes)
        if edit or loss.more or len(add) != len(remove):
            return False
        moves: list[tuple[int, Target, Target]] = []
        for goes, comes in zip(remove, add, strict=True):
            before, after = (goes.address, goes.port), (comes.address, comes.port)
            number = self.number(port, after)
            if goes.weight != comes.weight or loss.shared.get(number) != before:
                return False
            moves.append((number, before, after))
        for number, before, after in moves:
            if (port, before) not in stock.uses:
                stock.remove.append((number, before))
                stock.add.append((number, after))
            for target, step in ((before, -count), (after, +count)):
                stock.uses[port, target] = stock.uses.get((port, target), 0) + step
            stock.views.append((loss.shared, number, after))
        return True

    def knows(self, server: VirtualServer) -> bool:
        """Some address of a server's Service port uses a number."""
        return bool(self._ports) and port_name(server.at, server.label) in self._ports

    def room(self) -> bool:
        """There is a number for another Service port."""
        return bool(self._free) or self._last < HOME_BITS - HOME_STEP

    def port(self, server: VirtualServer) -> int:
        """The number of a server's Service port."""
        name = port_name(server.at, server.label)
        home = self._ports.get(name)
        if home is None:
            while home is None or home in self._names:
                if self._free:
                    home = self._free.pop()
                else:
                    home = self._last = self._last + HOME_STEP
            self._learn(name, home)
        return home

    def name(self, number: int) -> str:
        """The Service port whose number, or whose endpoint's number, that is."""
        return self._names.get(number & HOME_BITS, "")

    def number(self, port: int, target: Target) -> int:
        """The number of an endpoint of a Service port."""
        numbers, gone = self._numbers[port], self._gone.get(port)
        number = numbers.get(target)
        if number is not None and number not in self._taken:
            if gone and number in gone:
                gone.remove(number)  # somebody else goes on with it, or begins
            return number
        fresh = self._fresh.setdefault(port, {})
        number = fresh.get(target)
        if number is None and gone:
            number = fresh[target] = gone.pop()
            self._taken.add(number)
        elif number is None:
            number = fresh[target] = _unused(port, {*numbers.values(), *fresh.values()})
        return number

    def same(self, shared: dict[int, Target]) -> dict[int, Target]:
        """One object for all equal ones since `begin`: by that they are quickly known to be equal."""
        return self._same.setdefault(frozenset(shared.items()), shared)

    def difference(self, steps: Iterable[tuple[Entry, Entry]]) -> Restocking:
        """What entries that take the places of others mean for shared endpoints."""
        if not self.used:
            return Restocking.nothing()
        uses: dict[tuple[int, Target | None], int] = {}
        numbers: dict[tuple[int, Target], int] = {}
        alike: dict[tuple[int, int], list[Any]] = {}
        for old, new in steps:
            if not (old.numbers or new.numbers or old.home or new.home):
                continue
            before, after = old.shared, new.shared
            if before is not after:
                pair = id(before), id(after)
                if pair in alike:
                    alike[pair][2] += 1
                else:
                    alike[pair] = [before, after, 1]
            if old.numbers is not new.numbers or old.home != new.home:
                for entry, step in ((old, -1), (new, +1)):
                    if port := entry.port():
                        uses[port, None] = uses.get((port, None), 0) + step
        for before, after, count in alike.values():
            for shared, other, step in ((before, after, -count), (after, before, +count)):
                for number, target in shared.items():
                    if other.get(number) == target:
                        continue  # as nearly all are
                    key = number & HOME_BITS, target
                    if step > 0 or key not in numbers:
                        numbers[key] = number
                    uses[key] = uses.get(key, 0) + step
        remove, add = [], []
        for key, number in numbers.items():
            had = self._uses.get(key, 0)
            has = had + uses[key]
            former = self._numbers[key[0]][key[1]] if had else 0
            moves = had and has and number != former  # another one has taken over its number
            if had and (moves or not has):
                remove.append((former, key[1]))
            if has and (moves or not had):
                add.append((number, key[1]))
        return Restocking(remove, add, uses, [])

    # --------------------------------------------------------------------------------------------------- learning

    def learn(self, at: VirtualAddress, entry: Entry) -> None:
        """Take over what the table holds."""
        port = entry.port()
        if port:
            self._learn(port_name(at, nft.read_owner(entry.comment)[0]), port)
            self.replace(NOTHING, entry)

    def replace(self, old: Entry, new: Entry) -> None:
        """An entry took another's place."""
        self.apply(self.difference(((old, new),)))

    def apply(self, done: Restocking) -> None:
        """It has happened: numbers that nobody has any more are free."""
        for number, target in done.remove:
            self._numbers[number & HOME_BITS].pop(target, None)
        for number, target in done.add:
            self._numbers[number & HOME_BITS][target] = number
        for view, number, target in done.views:
            view[number] = target
        for key, step in done.uses.items():
            left = self._uses.get(key, 0) + step
            if left > 0:
                self._uses[key] = left
                continue
            self._uses.pop(key, None)
            home, whose = key
            if whose is None and home in self._names:
                name = self._names.pop(home)
                if self._ports.get(name) == home:
                    del self._ports[name]
                self._numbers.pop(home, None)
                self._free.append(home)
        self.begin()

    def _learn(self, name: str, home: int) -> None:
        self.used = True
        self._ports.setdefault(name, home)
        self._names.setdefault(home, name)
        self._numbers.setdefault(home, {})


def _unused(port: int, taken: set[int]) -> int:
    number = port + len(taken) + 1
    if number in taken or number > port + NUMBER_BITS:
        number = next(each for each in range(port + 1, port + NUMBER_BITS) if each not in taken)
    return number


def port_name(at: VirtualAddress, label: str) -> str:
    """What addresses of one Service port have in common; one without a name is alone."""
    return f"{label} {at.protocol}" if label else f"{at.protocol} {at.address.hex()} {at.port}"


def _slots(wanted: dict[Target, int], held: list[Target | None]) -> list[Target]:
    """Who has which slot: whoever had one keeps it if he may; holes are filled with who is new, then from the end."""
    left = dict(wanted)
    slots: list[Target | None] = []
    for target in held:
        if target is not None and left.get(target):
            left[target] -= 1
            slots.append(target)
        else:
            slots.append(None)
    new = [target for target, count in left.items() for _ in range(count)]
    total = sum(wanted.values())
    slots += [None] * (total - len(slots))
    for index in range(total):
        if slots[index] is None:
            if new:
                slots[index] = new.pop(0)
            else:
                while slots[-1] is None:
                    slots.pop()
                slots[index] = slots.pop()
    return [target for target in slots[:total] if target is not None]


def server_of(at: VirtualAddress, entry: Entry, vips: set[Address], hairpins: set[Address]) -> VirtualServer:
    """The server that a whole entry stands for."""
    weights: dict[Target, int] = dict.fromkeys(entry.idle, 0)
    for target in entry.slots():
        if target is not None:
            weights[target] = weights.get(target, 0) + 1
    reals = [RealServer(address, port, weight, address in hairpins) for (address, port), weight in weights.items()]
    sticky = chain_parts(entry.chain).seconds
    label, kind = nft.read_owner(entry.comment)
    return VirtualServer(
        at,
        tuple(sorted(reals)),
        SCHEDULER,
        0,
        sticky,
        8 * len(at.address) if sticky else 32,
        Masquerade.NODE if at.inside else _MEANINGS.get(entry.masquerade, Masquerade.DETECT),
        NoServers.DROP if entry.refused == "drop" else NoServers.REJECT,
        not entry.external and not at.inside and at.address in vips,
        label,
        kind,
        entry.allowed,
    )


MASQUERADES = {
    Masquerade.DETECT: "masquerade_clients",
    Masquerade.ALWAYS: "masquerade_always",
    Masquerade.NODE: "masquerade_node",
}
_MEANINGS = {chain: meaning for meaning, chain in MASQUERADES.items()}


# ------------------------------------------------------------------------------------------------------- elements


def _wires(kind: str) -> dict[int, nft.SetWire]:
    """Both families' sets of one kind, by the length of their addresses."""

    def wire(address: nft.Field, suffix: int) -> nft.SetWire:
        server = (address, nft.PROTOCOL, nft.PORT)
        keys: dict[str, tuple[nft.Field, ...]] = {
            "endpoints": (*server, nft.HOST32),
            "numbers": (*server, nft.HOST32),
            "alive": (*server, nft.HOST32),
            "shared": (nft.HOST32,),
            "affinity": (address, nft.HOST32),
            "allowed": (*server, address),
            "idle": (*server, address, nft.PORT),
            "cluster_ips": (address,),
            "hairpin": (address, address),
        }
        data: dict[str, tuple[nft.Field, ...]] = dict.fromkeys(("endpoints", "shared"), (address, nft.PORT))
        data |= dict.fromkeys(("numbers", "affinity", "homes"), (nft.HOST32,))
        return nft.SetWire(nft.INET, TABLE, f"{kind}{suffix}", keys.get(kind, server), data.get(kind, ()))

    return {4: wire(nft.IPV4, 4), 16: wire(nft.IPV6, 6)}


SERVICES, NO_ENDPOINTS, ENDPOINTS = _wires("services"), _wires("no_endpoints"), _wires("endpoints")
SHARED = _wires("shared")
NUMBERS, ALIVE, IDLE, HOMES = _wires("numbers"), _wires("alive"), _wires("idle"), _wires("homes")
INSIDERS, EXTERNAL, MASQUERADE = _wires("inside"), _wires("external"), _wires("masquerade")
RANGED, ALLOWED = _wires("ranged"), _wires("allowed")
VIPS, HAIRPIN, AFFINITY = _wires("cluster_ips"), _wires("hairpin"), _wires("affinity")
SETTINGS = nft.SetWire(nft.INET, TABLE, "settings", (nft.HOST32,))

Packed = dict[nft.SetWire, list[bytes]]
"""Packed elements by their set."""

REFUSALS: Mapping[str, nft.Verdict] = {"drop": nft.DROP, "refuse": nft.goto("refuse")}


class Difference(Struct):
    """Elements to take away and to add, packed. Those of `counted` have counters worth a look when they go."""

    remove: Packed = field(default_factory=dict)
    counted: Packed = field(default_factory=dict)
    add: Packed = field(default_factory=dict)

    def restock(self, change: Restocking) -> None:
        """Add what becomes of shared endpoints."""
        for number, target in change.remove:
            wire = SHARED[len(target[0])]
            self.counted.setdefault(wire, []).append(wire.key(u32_bytes(number)))
        for number, target in change.add:
            wire = SHARED[len(target[0])]
            self.add.setdefault(wire, []).append(wire.plain(u32_bytes(number), *target))

    def apply(self, at: VirtualAddress, old: Entry, new: Entry) -> None:
        """Add what turns one entry of a virtual address into another; shared endpoints are left out."""
        protocol, address, port, inside = at
        width = len(address)
        if old is NOTHING and new.chain and not (new.numbers or new.idle or new.masquerade or inside):
            # a new server as most are
            pack = _going(width, new.chain, len(new.comment))
            comment = (new.comment.encode("ascii"),) if new.comment else ()
            self.add.setdefault(SERVICES[width], []).append(pack(address, protocol, port, *comment))
            wire, targets = ENDPOINTS[width], new.endpoints.values()
            if len(targets) <= ROWS:
                packed = wire.rows(len(targets))(address, protocol, port, *joined.from_iterable(targets))
                self.add.setdefault(wire, []).append(packed)
            else:
                plain = wire.plain
                self.add.setdefault(wire, []).extend(
                    [plain(address, protocol, port, u32_bytes(i), real, to) for i, (real, to) in new.endpoints.items()]
                )
            if new.allowed or new.external:
                self._apply_external(at, old, new)
            return
        remove, add = self.remove.setdefault, self.add.setdefault
        counted = self.counted if new is not NOTHING else self.remove
        renamed = old.comment != new.comment
        if old.endpoints is not new.endpoints and old.endpoints != new.endpoints:
            wire = ENDPOINTS[width]
            before, after = old.endpoints, new.endpoints
            for index, target in before.items():
                if after.get(index) != target:
                    counted.setdefault(wire, []).append(wire.key(address, protocol, port, u32_bytes(index)))
            added = add(wire, [])
            for index, (real, real_port) in after.items():
                if before.get(index) != (real, real_port):
                    added.append(wire.element(address, protocol, port, u32_bytes(index), real, real_port))
        if old.numbers is not new.numbers and old.numbers != new.numbers:
            wire = NUMBERS[width]
            for slot, number in old.numbers.items():
                if new.numbers.get(slot) != number:
                    remove(wire, []).append(wire.key(address, protocol, port, u32_bytes(slot)))
            for slot, number in new.numbers.items():
                if old.numbers.get(slot) != number:
                    add(wire, []).append(wire.element(address, protocol, port, u32_bytes(slot), u32_bytes(number)))
        if old.alive is not new.alive and old.alive != new.alive:
            wire = ALIVE[width]
            for number in old.alive - new.alive:
                remove(wire, []).append(wire.key(address, protocol, port, u32_bytes(number)))
            for number in new.alive - old.alive:
                add(wire, []).append(wire.element(address, protocol, port, u32_bytes(number)))
        if old.idle is not new.idle and old.idle != new.idle:
            wire = IDLE[width]
            for target in old.idle - new.idle:
                remove(wire, []).append(wire.key(address, protocol, port, *target))
            for target in new.idle - old.idle:
                add(wire, []).append(wire.element(address, protocol, port, *target))
        if old.chain != new.chain or (renamed and new.chain):
            wire = (INSIDERS if inside else SERVICES)[width]
            if old.chain:
                remove(wire, []).append(wire.key(address, protocol, port))
            if new.chain:
                verdict = nft.goto(new.chain)
                add(wire, []).append(wire.element(address, protocol, port, comment=new.comment, verdict=verdict))
        if old.refused != new.refused or (renamed and new.refused):
            wire = NO_ENDPOINTS[width]
            if old.refused:
                remove(wire, []).append(wire.key(address, protocol, port))
            if new.refused:
                verdict = REFUSALS[new.refused]
                add(wire, []).append(wire.element(address, protocol, port, comment=new.comment, verdict=verdict))
        if (
            old.home != new.home
            or old.external is not new.external
            or old.masquerade != new.masquerade
            or (old.allowed is not new.allowed and old.allowed != new.allowed)
        ):
            self._apply_external(at, old, new)

    def _apply_external(self, at: VirtualAddress, old: Entry, new: Entry) -> None:
        """What hardly ever changes."""
        protocol, address, port, _ = at
        width = len(address)
        for wires, before, after in (
            (HOMES, old.home, new.home),
            (EXTERNAL, old.external, new.external),
            (MASQUERADE, old.masquerade, new.masquerade),
            (RANGED, bool(old.allowed), bool(new.allowed)),
        ):
            if before == after:
                continue
            wire = wires[width]
            if before:
                self.remove.setdefault(wire, []).append(wire.key(address, protocol, port))
            if after:
                data = (u32_bytes(new.home),) if wires is HOMES else ()
                verdict = nft.goto(new.masquerade) if wires is MASQUERADE else None
                packed = wire.element(address, protocol, port, *data, verdict=verdict)
                self.add.setdefault(wire, []).append(packed)
        wire = ALLOWED[width]
        for messages, networks in (
            (self.remove, set(old.allowed) - set(new.allowed)),
            (self.add, set(new.allowed) - set(old.allowed)),
        ):
            for each in networks:
                span = wire.span(address, protocol, port, each.address, address, protocol, port, each.last)
                messages.setdefault(wire, []).append(span)


@lru_cache(maxsize=8192)
def _going(width: int, chain: str, comment: int) -> Callable[..., bytes]:
    """The function that packs an element of `services`, by what its template depends on."""
    return SERVICES[width].going(nft.goto(chain), comment)


def printed_stock(change: Restocking) -> tuple[list[str], list[str]]:
    """Shared endpoints in nft's language: elements to delete, elements to add."""

    gone = [f"delete element inet {TABLE} {shared_text(*each, key_only=True)}" for each in sorted(change.remove)]
    come = [f"add element inet {TABLE} {shared_text(*each)}" for each in sorted(change.add)]
    return gone, come


def shared_text(number: int, target: Target, *, key_only: bool = False) -> str:
    """`shared4 { 1:3 : 10.244.1.7 . 9376 }`"""
    told = "" if key_only else f" : {format_address(target[0])} . {target[1]}"
    return f"shared{4 if len(target[0]) == 4 else 6} {{ {_classid(number)}{told} }}"


def printed(at: VirtualAddress, old: Entry, new: Entry) -> tuple[list[str], list[str]]:
    """The same in nft's language: elements to delete, elements to add."""
    suffix = 4 if len(at.address) == 4 else 6
    key = f"{format_address(at.address)} . {Protocol(at.protocol).name.lower()} . {at.port}"

    def target(each: Target) -> str:
        return f"{format_address(each[0])} . {each[1]}"

    def lines(entry: Entry) -> Iterator[tuple[str, str, str]]:
        comment = f' comment "{entry.comment}"' if entry.comment else ""
        if entry.chain:
            yield "inside" if at.inside else "services", key, f"{comment} : goto {entry.chain}"
        if entry.refused:
            yield "no_endpoints", key, f"{comment} : {'drop' if entry.refused == 'drop' else 'goto refuse'}"
        if entry.external:
            yield "external", key, ""
        if entry.masquerade:
            yield "masquerade", key, f" : goto {entry.masquerade}"
        if entry.allowed:
            yield "ranged", key, ""
        for network in entry.allowed:
            yield "allowed", f"{key} . {network}", ""
        if entry.home:
            yield "homes", key, f" : {_classid(entry.home)}"
        for index, each in sorted(entry.endpoints.items()):
            yield "endpoints", f"{key} . {_classid(index)}", f" : {target(each)}"
        for slot, number in sorted(entry.numbers.items()):
            yield "numbers", f"{key} . {_classid(slot)}", f" : {_classid(number)}"
        for number in sorted(entry.alive):
            yield "alive", f"{key} . {_classid(number)}", ""
        for each in sorted(entry.idle):
            yield "idle", f"{key} . {target(each)}", ""

    before, after = list(lines(old)), list(lines(new))
    where = f"element inet {TABLE}"
    gone = [
        f"delete {where} {name}{suffix} {{ {text} }}" for name, text, rest in before if (name, text, rest) not in after
    ]
    come = [
        f"add {where} {name}{suffix} {{ {text}{rest} }}"
        for name, text, rest in after
        if (name, text, rest) not in before
    ]
    return gone, come


def _classid(number: int) -> str:
    """A number as nft writes a priority: a traffic class, major:minor in hexadecimal."""
    return f"{number >> 16:x}:{number & 0xFFFF:x}" if number else "none"
