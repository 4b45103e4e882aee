"""How a VirtualServer lies in the table of nftables mode: as elements, and back. Pure (`nft_tables.nft` has the rules).

An `Entry` is everything the table holds of one virtual address. `layout` gives the entry a server needs, close to the
one it has: elements that need not change stay, and with them the kernel's counters. `difference` of two entries is what
travels; `server_of` reads an entry back.

Slots are dense, 0 to N-1, since the index of a new connection is random below N. When one goes, the last one moves
into its place. With affinity an endpoint also has a number, and clients are remembered by numbers, so that moving slots
moves no client; and each Service port has one, by which all of its addresses share what they remember.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import chain as joined
from math import gcd
from typing import NamedTuple

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


class Entry(Struct, gc=False):
    """What the table holds of one virtual address."""

    chain: str = ""
    """Where `services` (or `inside`) sends it: "pick4_3", "inside_sticky6_10800_2"; "" = nowhere."""
    refused: str = ""
    """What `no_endpoints` does with it: "refuse" or "drop"; "" = it is not there."""
    comment: str = ""
    """Whose it is and at what kind of address."""
    endpoints: dict[int, Target] = field(default_factory=dict)
    """Index -> endpoint: by slot, or with affinity by number."""
    numbers: dict[int, int] = field(default_factory=dict)
    """With affinity: slot -> number."""
    alive: set[int] = field(default_factory=set)
    idle: set[Target] = field(default_factory=set)
    home: int = 0
    """With affinity: the number of the Service's port."""
    masquerade: str = ""
    """The chain of `masquerade`; "" = it is not there."""
    external: bool = False
    allowed: tuple[Network, ...] = ()

    def slots(self) -> list[Target | None]:
        """The endpoint of each slot the chain draws from; None = it leads nowhere."""
        place, kind, _, count = chain_parts(self.chain)
        first = INSIDE if place == "inside" else 0
        if kind == "sticky":
            return [self.endpoints.get(self.numbers.get(first + slot, 0)) for slot in range(count)]
        return [self.endpoints.get(first + slot) for slot in range(count)]

    def whole(self) -> bool:
        """Nothing is missing and nothing is too much."""
        place, kind, _, count = chain_parts(self.chain)
        if bool(count) == bool(self.refused) or None in self.slots():
            return False
        if (place == "local") != (self.masquerade == "masquerade_node"):
            return False
        if kind == "sticky" and count:
            used = set(self.numbers.values())
            return len(self.numbers) == count and self.endpoints.keys() == used == self.alive
        return len(self.endpoints) == count and not self.numbers and not self.alive


NOTHING = Entry()
_NONE: tuple[dict[int, int], set[int], set[Target]] = ({}, set(), set())
"""Numbers, alive and idle of all servers that have none: nobody changes an entry that `layout` has made."""


class Parts(NamedTuple):
    """What a chain's name says. `place`: "inside" (for clients inside the cluster), "local" (looks for those first), or
    ""; `kind`: "sticky", "pick", or "" for what is none of ours."""

    place: str
    kind: str
    seconds: int
    slots: int


@lru_cache(maxsize=4096)
def chain_name(width: int, seconds: int, slots: int, place: str = "") -> str:
    """The chain that picks one of `slots`, for addresses of `width` bytes."""
    family = 4 if width == 4 else 6
    name = f"sticky{family}_{seconds}_{slots}" if seconds else f"pick{family}_{slots}"
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
    if head in ("pick4", "pick6") and len(numbers) == 1:
        return Parts(place, "pick", 0, int(numbers[0]))
    if head in ("sticky4", "sticky6") and len(numbers) == 2:
        return Parts(place, "sticky", int(numbers[0]), int(numbers[1]))
    return Parts("", "", 0, 0)


# ------------------------------------------------------------------------------------------------ server <-> entry


def canonical(server: VirtualServer) -> VirtualServer:
    """What of a server this mode can hold.

    The choice is random, and weights are slots, hence small whole numbers; weight 0 stays 0. A server that has nobody
    to send to has no affinity (unless others lead through it), and one that has does not say what it would do
    otherwise. Servers for clients inside have no settings of their own besides their endpoints.
    """
    at = server.at
    inside = at[3]
    reals = server.real_servers
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
    if held is NOTHING and server.bound and not server.persistence and server.real_servers and not server.allowed:
        targets = [(real.address, real.port) for real in server.real_servers if real.weight == 1]
        if len(targets) == len(server.real_servers) and server.masquerade is Masquerade.DETECT:
            # a new server as most are: a slot for each
            return Entry(chain_name(len(at.address), 0, len(targets)), "", comment, dict(enumerate(targets)), *_NONE)
    wanted: dict[Target, int] = {}
    entry = Entry(comment=comment)
    for real in server.real_servers:
        if real.weight:
            wanted[real.address, real.port] = real.weight
        else:
            entry.idle.add((real.address, real.port))
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
    slots = _slots(wanted, held.slots())
    entry.chain = chain_name(len(at.address), server.persistence, len(slots), place)
    first = INSIDE if at.inside else 0
    if not server.persistence:
        entry.endpoints = dict(enumerate(slots, first))
        return entry
    home = homes.port(server)
    # who comes takes the number of who goes: fewer elements change, and clients of the one go on with the other
    gone = [target for target in held.endpoints.values() if target not in wanted] if held.numbers else []
    known: dict[Target, int] = {}
    for target in wanted:
        number = homes.number(home, target, gone)
        if first | number in entry.endpoints:
            number = homes.new_number(home, target)
        known[target] = first | number
        entry.endpoints[first | number] = target
    entry.numbers = dict(enumerate(map(known.__getitem__, slots), first))
    entry.alive = set(entry.endpoints)
    return entry


class Homes:
    """With affinity: the numbers of Service ports, and of the endpoints of each.

    All addresses of a Service port use the same, so that a client is remembered at all of them. A number stays an
    endpoint's as long as the endpoint serves at one of them.
    """

    def __init__(self) -> None:
        self._ports: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._numbers: dict[int, dict[Target, int]] = {}
        self._uses: Counter[tuple[int, Target | None]] = Counter()

    def port(self, server: VirtualServer) -> int:
        """The number of a server's Service port."""
        name = _port_name(server.at, server.label)
        if name not in self._ports:
            free = (number << 16 for number in range(1, HOME_BITS >> 16) if number << 16 not in self._names)
            self._learn(name, next(free))
        return self._ports[name]

    def number(self, home: int, target: Target, gone: list[Target]) -> int:
        """The number of an endpoint of a Service port; a new one takes over that of one of `gone`, if there is any."""
        numbers = self._numbers[home]
        if target not in numbers:
            while gone:
                if (before := numbers.get(gone.pop())) is not None:
                    numbers[target] = before
                    return before
            return self.new_number(home, target)
        return numbers[target]

    def new_number(self, home: int, target: Target) -> int:
        """A number that no endpoint of a Service port has."""
        numbers = self._numbers[home]
        taken = set(numbers.values())
        numbers[target] = next(number for number in range(home + 1, home + NUMBER_BITS) if number not in taken)
        return numbers[target]

    def learn(self, at: VirtualAddress, entry: Entry) -> None:
        """Take over what the table holds."""
        home = entry.home or next(iter(entry.numbers.values()), 0) & HOME_BITS
        if not home:
            return
        self._learn(_port_name(at, nft.read_owner(entry.comment)[0]), home)
        for number, target in entry.endpoints.items():
            self._numbers[home].setdefault(target, number & ~INSIDE)
        self.replace(NOTHING, entry)

    def replace(self, old: Entry, new: Entry) -> None:
        """An entry took another's place: numbers that nobody has any more are free."""
        if not (old.home or new.home or old.numbers or new.numbers):
            return
        gone: list[tuple[int, Target | None]] = []
        for entry, step in ((new, 1), (old, -1)):
            uses: list[tuple[int, Target | None]] = [(entry.home, None)] if entry.home else []
            if entry.numbers:
                uses += [(number & HOME_BITS, target) for number, target in entry.endpoints.items()]
            for use in uses:
                self._uses[use] += step
                if self._uses[use] <= 0:
                    gone.append(use)
        for home, whose in gone:
            del self._uses[home, whose]
            if whose is not None:
                self._numbers.get(home, {}).pop(whose, None)
            else:
                self._ports.pop(self._names.pop(home, ""), None)
                self._numbers.pop(home, None)

    def _learn(self, name: str, home: int) -> None:
        self._ports.setdefault(name, home)
        self._names.setdefault(home, name)
        self._numbers.setdefault(home, {})


def _port_name(at: VirtualAddress, label: str) -> str:
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
            "affinity": (address, nft.HOST32),
            "allowed": (*server, address),
            "idle": (*server, address, nft.PORT),
            "cluster_ips": (address,),
            "hairpin": (address, address),
        }
        data: dict[str, tuple[nft.Field, ...]] = {"endpoints": (address, nft.PORT)}
        data |= dict.fromkeys(("numbers", "affinity", "homes"), (nft.HOST32,))
        return nft.SetWire(nft.INET, TABLE, f"{kind}{suffix}", keys.get(kind, server), data.get(kind, ()))

    return {4: wire(nft.IPV4, 4), 16: wire(nft.IPV6, 6)}


SERVICES, NO_ENDPOINTS, ENDPOINTS = _wires("services"), _wires("no_endpoints"), _wires("endpoints")
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

    def apply(self, at: VirtualAddress, old: Entry, new: Entry) -> None:
        """Add what turns one entry of a virtual address into another."""
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
        if old.endpoints != new.endpoints:
            wire = ENDPOINTS[width]
            before, after = old.endpoints, new.endpoints
            for index, target in before.items():
                if after.get(index) != target:
                    counted.setdefault(wire, []).append(wire.key(address, protocol, port, u32_bytes(index)))
            added = add(wire, [])
            for index, (real, real_port) in after.items():
                if before.get(index) != (real, real_port):
                    added.append(wire.element(address, protocol, port, u32_bytes(index), real, real_port))
        if old.numbers != new.numbers:
            wire = NUMBERS[width]
            for slot, number in old.numbers.items():
                if new.numbers.get(slot) != number:
                    remove(wire, []).append(wire.key(address, protocol, port, u32_bytes(slot)))
            for slot, number in new.numbers.items():
                if old.numbers.get(slot) != number:
                    add(wire, []).append(wire.element(address, protocol, port, u32_bytes(slot), u32_bytes(number)))
        if old.alive != new.alive:
            wire = ALIVE[width]
            for number in old.alive - new.alive:
                remove(wire, []).append(wire.key(address, protocol, port, u32_bytes(number)))
            for number in new.alive - old.alive:
                add(wire, []).append(wire.element(address, protocol, port, u32_bytes(number)))
        if old.idle != new.idle:
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
        before_rest = (old.home, old.external, old.masquerade, old.allowed)
        if before_rest != (new.home, new.external, new.masquerade, new.allowed):
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
