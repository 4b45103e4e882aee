"""Which lines are shown, and in which order: Services with their backends, sorted and filtered. Pure."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from ..rows import RealServerRow, ServiceRow
from .history import Key

_STATES = {"draining": 2, "quiescent": 1, "active": 0}


class Line(NamedTuple):
    """A Service, or one of its backends."""

    key: Key
    service: ServiceRow
    real: RealServerRow | None
    last: bool
    """The last backend of its Service that is shown."""


@dataclass(frozen=True)
class Order:
    """What to sort by: a value of Services, one of backends, and which end people want to see first."""

    of_service: Callable[[ServiceRow], Any]
    of_real: Callable[[RealServerRow], Any]
    highest_first: bool = True


def _name(row: ServiceRow) -> tuple[bool, str]:
    return (not row.label, row.label or row.vip)


def _known(value: float | None) -> float:
    return -1 if value is None else value


def _endpoint(real: RealServerRow) -> tuple[int, str, int]:
    return (len(real.address), real.address, real.port)


ORDERS = {
    "rate": Order(lambda row: _known(row.rate), lambda real: _known(real.rate)),
    "hits": Order(lambda row: row.hits, lambda real: _known(real.hits)),
    "share": Order(lambda row: row.hits, lambda real: _known(real.share)),
    "name": Order(_name, _endpoint, highest_first=False),
    "vip": Order(lambda row: (row.address, row.port), _endpoint, highest_first=False),
    "state": Order(
        lambda row: sum(real.state != "active" for real in row.real_servers),
        lambda real: (_STATES.get(real.state, 0), -(real.drain_seconds_left or 0)),
    ),
    "weight": Order(lambda row: len(row.real_servers), lambda real: real.weight),
    "active": Order(
        lambda row: sum(real.active for real in row.real_servers), lambda real: (real.active, real.inactive)
    ),
}
"""By the names that `--sort` takes."""


def service_key(row: ServiceRow) -> Key:
    """Of a Service's port at one address."""
    return (row.label, row.vip)


class Entry(NamedTuple):
    """A Service's port at one address, with what takes long to make of it: done once a look, in the looks' thread."""

    key: Key
    row: ServiceRow
    text: str
    """What a filter searches, besides its backends."""


def entries(rows: Iterable[ServiceRow]) -> list[Entry]:
    """By name; what has none comes last."""
    found = [Entry(service_key(row), row, f"{row.label} {row.vip} {row.kind}".casefold()) for row in rows]
    return sorted(found, key=lambda each: (not each.key[0], each.key))


class Listing:
    """Lines of a table. Only Services are sorted at once; the backends of one are when somebody looks at them.

    `heads`: with a line for each Service; `backends`: with theirs.
    """

    def __init__(
        self,
        groups: Sequence[tuple[Entry, Sequence[RealServerRow]]] = (),
        order: Order | None = None,
        *,
        backwards: bool = False,
        heads: bool = True,
        backends: bool = True,
    ) -> None:
        self._groups = groups
        self._order = order or ORDERS["name"]
        self._backwards = backwards
        self._heads = int(heads)
        self._ends = list(accumulate(self._heads + len(reals) * backends for _, reals in groups))
        self._sorted: dict[int, list[RealServerRow]] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Line:
        if not 0 <= index < len(self):
            raise IndexError(index)
        group = bisect_right(self._ends, index)
        entry = self._groups[group][0]
        place = index - self._start(group) - self._heads
        if place < 0:
            return Line(entry.key, entry.row, None, False)
        reals = self._reals(group)
        return Line((*entry.key, reals[place].endpoint), entry.row, reals[place], place == len(reals) - 1)

    @property
    def services(self) -> int:
        """How many have lines."""
        return len(self._groups)

    def find(self, key: Key) -> int | None:
        """The line of a Service or backend; of a backend that is not there its Service's; None: neither is."""
        group = next((index for index, (entry, _) in enumerate(self._groups) if entry.key == key[:2]), None)
        if group is None:
            return None
        start, end = self._start(group), self._ends[group]
        if len(key) > 2 and end > start + self._heads:
            for place, real in enumerate(self._reals(group)):
                if real.endpoint == key[2]:
                    return start + self._heads + place
        return start if self._heads else None

    def _start(self, group: int) -> int:
        return self._ends[group - 1] if group else 0

    def _reals(self, group: int) -> list[RealServerRow]:
        found = self._sorted.get(group)
        if found is None:
            found = sorted(self._groups[group][1], key=_endpoint)
            found.sort(key=self._order.of_real, reverse=self._order.highest_first is not self._backwards)
            self._sorted[group] = found
        return found


def arranged(
    rows: Sequence[Entry], sort: str, *, backwards: bool = False, words: Sequence[str] = (), backends: bool = True
) -> Listing:
    """Services in their order, each with its backends in theirs; what ties stays in the order of names."""
    order = ORDERS[sort]
    groups = [(entry, reals) for entry in rows if (reals := _matching(entry, words)) is not None]
    groups.sort(key=lambda each: order.of_service(each[0].row), reverse=order.highest_first is not backwards)
    return Listing(groups, order, backwards=backwards, backends=backends)


def arranged_backends(entry: Entry, sort: str, recent: Callable[[Key], float], *, backwards: bool = False) -> Listing:
    """The backends of one Service; their shares are those of the hits that `recent` tells."""
    order = ORDERS[sort]
    if sort == "share":
        order = Order(order.of_service, lambda real: recent((*entry.key, real.endpoint)))
    return Listing([(entry, entry.row.real_servers)], order, backwards=backwards, heads=False)


def words_of(text: str) -> tuple[str, ...]:
    """What somebody filters by: all of the words have to be there."""
    return tuple(text.casefold().split())


def _matching(entry: Entry, words: Sequence[str]) -> Sequence[RealServerRow] | None:
    """The backends to show: all, if the Service itself is meant; those that are meant; None: not even the Service."""
    missing = [word for word in words if word not in entry.text]
    if not missing:
        return entry.row.real_servers
    found = []
    for real in entry.row.real_servers:
        text = f"{real.endpoint} {real.state}".casefold()
        if all(word in text for word in missing):
            found.append(real)
    return found or None


@dataclass(frozen=True)
class Totals:
    """Sums over Services."""

    services: int
    active: int
    draining: int
    quiescent: int
    hits: int
    rate: float | None
    """None as long as no Service has one."""

    @property
    def backends(self) -> int:
        """In whatever state."""
        return self.active + self.draining + self.quiescent


def totals(rows: Sequence[ServiceRow]) -> Totals:
    """Of all rows; a Service with several ports or addresses counts once, its backends at each of them."""
    states = {"active": 0, "draining": 0, "quiescent": 0}
    for row in rows:
        for real in row.real_servers:
            states[real.state] = states.get(real.state, 0) + 1
    rates = [row.rate for row in rows if row.rate is not None]
    return Totals(
        len({(row.namespace, row.service) if row.service else row.vip for row in rows}),
        states["active"],
        states["draining"],
        states["quiescent"],
        sum(row.hits for row in rows),
        sum(rates) if rates else None,
    )


def rates(rows: Iterable[Entry]) -> Iterator[tuple[Key, float | None]]:
    """What the history takes: everything, each Service and each backend."""
    total = 0.0
    for key, row, _ in rows:
        if row.rate:
            yield key, row.rate
            total += row.rate
            for real in row.real_servers:
                if real.rate:
                    yield (*key, real.endpoint), real.rate
    yield (), total
