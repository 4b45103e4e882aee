"""How a VirtualServer lies in the table of nftables mode: as elements, and back. Pure (`nft_tables.nft` has the rules).

An `Entry` is everything the table holds of one virtual address. `layout` gives the entry a server needs, close to the
one it has: elements that need not change stay, and with them the kernel's counters. `difference` of two entries is what
travels; `server_of` reads an entry back.

Slots are dense, 0 to N-1, since the index of a new connection is random below N. When one goes, the last one moves into
its place. With affinity an endpoint also has a number, the smallest that is free: clients are remembered by numbers, so
that moving slots moves no client.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import chain as joined
from math import gcd

from msgspec import Struct, field

from . import nftables_messages as nft
from .model import (
    Address,
    Forwarding,
    Masquerade,
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


class Entry(Struct, gc=False):
    """What the table holds of one virtual address."""

    chain: str = ""
    """Where `services` sends it: "pick4_3", "sticky6_10800_2"; "" = nowhere."""
    refused: str = ""
    """What `no_endpoints` does with it: "refuse" or "drop"; "" = it is not there."""
    label: str = ""
    endpoints: dict[int, Target] = field(default_factory=dict)
    """Index -> endpoint: by slot, or with affinity by number."""
    numbers: dict[int, int] = field(default_factory=dict)
    """With affinity: slot -> number."""
    alive: set[int] = field(default_factory=set)
    idle: set[Target] = field(default_factory=set)

    def slots(self) -> list[Target | None]:
        """The endpoint of each slot the chain draws from; None = it leads nowhere."""
        kind, _, count = chain_parts(self.chain)
        if kind == "sticky":
            return [self.endpoints.get(self.numbers.get(slot, 0)) for slot in range(count)]
        return [self.endpoints.get(slot) for slot in range(count)]

    def whole(self) -> bool:
        """Nothing is missing and nothing is too much."""
        kind, _, count = chain_parts(self.chain)
        if bool(self.chain) == bool(self.refused) or None in self.slots():
            return False
        if kind == "sticky":
            used = set(self.numbers.values())
            return len(self.numbers) == count and self.endpoints.keys() == used == self.alive
        return len(self.endpoints) == count and not self.numbers and not self.alive


NOTHING = Entry()
_NONE: tuple[dict[int, int], set[int], set[Target]] = ({}, set(), set())
"""Numbers, alive and idle of all servers that have none: nobody changes an entry that `layout` has made."""


@lru_cache(maxsize=4096)
def chain_name(width: int, seconds: int, slots: int) -> str:
    """The chain that picks one of `slots`, for addresses of `width` bytes."""
    family = 4 if width == 4 else 6
    return f"sticky{family}_{seconds}_{slots}" if seconds else f"pick{family}_{slots}"


@lru_cache(maxsize=4096)
def chain_parts(name: str) -> tuple[str, int, int]:
    """("sticky", seconds, slots), ("pick", 0, slots), or ("", 0, 0) for what is none of ours."""
    head, *numbers = name.split("_")
    if head in ("pick4", "pick6") and len(numbers) == 1 and numbers[0].isdecimal():
        return "pick", 0, int(numbers[0])
    if head in ("sticky4", "sticky6") and len(numbers) == 2 and all(each.isdecimal() for each in numbers):
        return "sticky", int(numbers[0]), int(numbers[1])
    return "", 0, 0


# ------------------------------------------------------------------------------------------------ server <-> entry


def canonical(server: VirtualServer) -> VirtualServer:
    """What of a server this mode can hold.

    The choice is random, and weights are slots, hence small whole numbers; weight 0 stays 0. A server that has nobody
    to send to has no affinity, and one that has does not say what it would do otherwise.
    """
    reals = server.real_servers
    weights = slot_counts([real.weight for real in reals])
    serves = any(weights)
    sticky = server.persistence if serves else 0
    return VirtualServer(
        server.at,
        tuple(
            real
            if real.weight == weight and real.forwarding is Forwarding.MASQ and not real.upper_threshold
            else RealServer(real.address, real.port, weight, real.local)
            for real, weight in zip(reals, weights, strict=True)
        ),
        SCHEDULER,
        0,
        sticky,
        8 * len(server.at.address) if sticky else 32,
        Masquerade.DETECT,
        NoServers.REJECT if serves else server.no_servers,
        server.bound,
        nft.owner_comment(server.label),
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


def layout(server: VirtualServer, held: Entry) -> Entry:
    """The entry of a canonical server, as close to the held one as can be."""
    label = nft.owner_comment(server.label)
    if held is NOTHING and not server.persistence and server.real_servers:
        targets = [(real.address, real.port) for real in server.real_servers if real.weight == 1]
        if len(targets) == len(server.real_servers):  # a new server as most are: a slot for each
            name = chain_name(len(server.at.address), 0, len(targets))
            return Entry(name, "", label, dict(enumerate(targets)), *_NONE)
    wanted: dict[Target, int] = {}
    idle = set()
    for real in server.real_servers:
        if real.weight:
            wanted[real.address, real.port] = real.weight
        else:
            idle.add((real.address, real.port))
    if not wanted:
        refused = "drop" if server.no_servers is NoServers.DROP else "refuse"
        return Entry("", refused, label, idle=idle)
    slots = _slots(wanted, held.slots())
    chain = chain_name(len(server.at.address), server.persistence, len(slots))
    if not server.persistence:
        return Entry(chain, "", label, dict(enumerate(slots)), idle=idle)
    known: dict[Target, int] = {}
    if chain_parts(held.chain)[0] == "sticky":
        known = {target: number for number, target in held.endpoints.items() if number and target in wanted}
    taken = set(known.values())
    free = (number for number in range(1, len(wanted) + len(taken) + 1) if number not in taken)
    for target in wanted:
        if target not in known:
            known[target] = next(free)
    endpoints = {number: target for target, number in known.items()}
    return Entry(
        chain, "", server.label, endpoints, dict(enumerate(map(known.__getitem__, slots))), set(endpoints), idle
    )


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
    sticky = chain_parts(entry.chain)[1]
    return VirtualServer(
        at,
        tuple(sorted(reals)),
        SCHEDULER,
        0,
        sticky,
        8 * len(at.address) if sticky else 32,
        Masquerade.DETECT,
        NoServers.DROP if entry.refused == "drop" else NoServers.REJECT,
        at.address in vips,
        entry.label,
    )


# ------------------------------------------------------------------------------------------------------- elements


def _wires(kind: str) -> dict[int, nft.SetWire]:
    """Both families' sets of one kind, by the length of their addresses."""

    def wire(address: nft.Field, suffix: int) -> nft.SetWire:
        server = (address, nft.PROTOCOL, nft.PORT)
        keys: dict[str, tuple[nft.Field, ...]] = {
            "endpoints": (*server, nft.HOST32),
            "numbers": (*server, nft.HOST32),
            "alive": (*server, nft.HOST32),
            "affinity": (address, *server),
            "idle": (*server, address, nft.PORT),
            "cluster_ips": (address,),
            "hairpin": (address, address),
        }
        data = {"endpoints": (address, nft.PORT), "numbers": (nft.HOST32,), "affinity": (nft.HOST32,)}
        return nft.SetWire(nft.INET, TABLE, f"{kind}{suffix}", keys.get(kind, server), data.get(kind, ()))

    return {4: wire(nft.IPV4, 4), 16: wire(nft.IPV6, 6)}


SERVICES, NO_ENDPOINTS, ENDPOINTS = _wires("services"), _wires("no_endpoints"), _wires("endpoints")
NUMBERS, ALIVE, IDLE = _wires("numbers"), _wires("alive"), _wires("idle")
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
        protocol, address, port = at
        width = len(address)
        if old is NOTHING and new.chain and not new.numbers and not new.idle:  # a new server as most are
            pack = _going(width, new.chain, len(new.label))
            label = (new.label.encode("ascii"),) if new.label else ()
            self.add.setdefault(SERVICES[width], []).append(pack(address, protocol, port, *label))
            wire, targets = ENDPOINTS[width], new.endpoints.values()
            if len(targets) <= ROWS:
                packed = wire.rows(len(targets))(address, protocol, port, *joined.from_iterable(targets))
                self.add.setdefault(wire, []).append(packed)
            else:
                plain = wire.plain
                self.add.setdefault(wire, []).extend(
                    [plain(address, protocol, port, u32_bytes(i), real, to) for i, (real, to) in new.endpoints.items()]
                )
            return
        remove, add = self.remove.setdefault, self.add.setdefault
        counted = self.counted if new is not NOTHING else self.remove
        relabelled = old.label != new.label
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
        if old.chain != new.chain or (relabelled and new.chain):
            wire = SERVICES[width]
            if old.chain:
                remove(wire, []).append(wire.key(address, protocol, port))
            if new.chain:
                verdict = nft.goto(new.chain)
                add(wire, []).append(wire.element(address, protocol, port, comment=new.label, verdict=verdict))
        if old.refused != new.refused or (relabelled and new.refused):
            wire = NO_ENDPOINTS[width]
            if old.refused:
                remove(wire, []).append(wire.key(address, protocol, port))
            if new.refused:
                verdict = REFUSALS[new.refused]
                add(wire, []).append(wire.element(address, protocol, port, comment=new.label, verdict=verdict))


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
        comment = f' comment "{entry.label}"' if entry.label else ""
        if entry.chain:
            yield "services", key, f"{comment} : goto {entry.chain}"
        if entry.refused:
            yield "no_endpoints", key, f"{comment} : {'drop' if entry.refused == 'drop' else 'goto refuse'}"
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
