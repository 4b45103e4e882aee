"""Columns of the two tables, how wide they are on a terminal, and what stands in them. Pure.

A cell is a list of parts, each a text and the name of a style (`palette.py`), exactly as wide as its column. Nothing is
told by a colour alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..printable import printable
from . import figures
from .history import History, Key, sparkline
from .listing import Line

Parts = list[tuple[str, str]]


@dataclass
class Drawing:
    """What cells are drawn from, besides their line."""

    history: History
    at: float = 0.0
    """When the look was taken."""
    now: float = 0.0
    _tops: dict[tuple[Key, int], float] = field(default_factory=dict)
    _hits: dict[Key, float] = field(default_factory=dict)

    def renew(self, at: float) -> None:
        """After each look."""
        self.at = at
        self._tops.clear()
        self._hits.clear()

    def share(self, line: Line) -> float | None:
        """A backend's part of what all backends of its Service that are here got in the last minute."""
        service = line.key[:2]
        if service not in self._hits:
            self._hits[service] = sum(self.history.hits(key) for key in _backends(line))
        hits = self._hits[service]
        return self.history.hits(line.key) / hits if hits else None

    def left(self, seconds: float) -> float:
        """Of a drain's clock, now."""
        return max(0.0, seconds - max(0.0, self.now - self.at))

    def top(self, line: Line, width: int) -> float:
        """The full height of a line's sparkline: backends of a Service share one, so that they can be compared."""
        key = (line.key[:2] if line.real is None else (*line.key[:2], ""), width)
        if key not in self._tops:
            keys: list[Key] = [line.key] if line.real is None else _backends(line)
            self._tops[key] = max((self.history.peak(each, width) for each in keys), default=0.0)
        return self._tops[key]


def _backends(line: Line) -> list[Key]:
    return [(*line.key[:2], real.endpoint) for real in line.service.real_servers]


@dataclass(frozen=True)
class Column:
    """One column. `sort`: what a click on its title sorts by; "" for nothing."""

    title: str
    sort: str
    cell: Callable[[Line, int, Drawing], Parts]
    width: int
    grow: int = 0
    """Its part of the room that is left."""
    most: int = 200
    right: bool = False
    since: int = 0
    """Shown on terminals of at least this width."""
    steps: tuple[int, ...] = ()
    """The only widths it may have."""


class Placed(NamedTuple):
    """A column at its place."""

    column: Column
    x: int
    width: int


MARGIN = 1
GAP = 2


def layout(columns: Sequence[Column], width: int) -> list[Placed]:
    """Columns that fit, with the spare room divided among those that grow."""
    gap = 1 if width < 100 else GAP
    shown = [column for column in columns if column.since <= width]
    widths = [column.width for column in shown]
    spare = width - 2 * MARGIN - sum(widths) - gap * (len(shown) - 1)
    while spare > 0:
        growing = [index for index, column in enumerate(shown) if column.grow and widths[index] < column.most]
        if not growing:
            break
        # the one that has got least for its part is next
        index = min(growing, key=lambda i: ((widths[i] - shown[i].width) / shown[i].grow, i))
        widths[index] += 1
        spare -= 1
    if spare < 0 and widths:
        widths[0] = max(4, widths[0] + spare)
    for index, column in enumerate(shown):
        if column.steps:
            step = max((each for each in column.steps if each <= widths[index]), default=widths[index])
            widths[0] += widths[index] - step
            widths[index] = step
    placed = []
    x = MARGIN
    for column, each in zip(shown, widths, strict=True):
        placed.append(Placed(column, x, each))
        x += each + gap
    return placed


# --------------------------------------------------------------------------------------------------------------- cells


def _fit(text: str, width: int, style: str, right: bool = False) -> Parts:
    return [(figures.fit(text, width, right=right), style)]


def _tone(line: Line, style: str) -> str:
    """Idle lines are dim."""
    rate = (line.service if line.real is None else line.real).rate
    return style if rate else "dim"


def _name(line: Line, width: int, drawing: Drawing) -> Parts:
    if line.real is None:
        return _service(line, width)
    branch = "  └ " if line.last else "  ├ "
    return [(branch[:width], "rule"), *_fit(printable(line.real.endpoint), max(0, width - 4), "backend")]


def _service(line: Line, width: int) -> Parts:
    row = line.service
    if not row.label:
        return _fit(printable(row.vip), width, "service")
    namespace, _, rest = printable(row.label).partition("/")
    name, colon, port = rest.partition(":")
    # namespace and port give way before the name does
    if len(namespace) + 1 + len(rest) > width:
        room = max(0, width - 1 - len(rest))
        namespace = namespace[: room - 1] + "…" if room > 1 else "…"
    parts: Parts = [(f"{namespace}/", "service-namespace"), (name, "service"), (colon + port, "service-port")]
    text = "".join(text for text, _ in parts)
    return (
        [*parts, (" " * (width - len(text)), "text")] if len(text) <= width and text.isascii() else _cut(parts, width)
    )


def _cut(parts: Parts, width: int) -> Parts:
    """Parts in exactly `width` cells."""
    from rich.cells import cell_len

    found: Parts = []
    for index, (text, style) in enumerate(parts):
        length = cell_len(text)
        if length > width or index == len(parts) - 1:
            return [*found, (figures.fit(text, width), style)]
        found.append((text, style))
        width -= length
    return found


def _endpoint(line: Line, width: int, drawing: Drawing) -> Parts:
    return _fit(printable(line.real.endpoint) if line.real else "", width, "backend")


def _rate(line: Line, width: int, drawing: Drawing) -> Parts:
    rate = (line.service if line.real is None else line.real).rate
    return _fit(figures.rate(rate), width, _tone(line, "rate" if line.real is None else "text"), right=True)


def _vip_or_share(line: Line, width: int, drawing: Drawing) -> Parts:
    if line.real is None:
        return _fit(printable(line.service.vip), width, "vip")
    return _share(line, width, drawing)


def _share(line: Line, width: int, drawing: Drawing) -> Parts:
    real = line.real
    if real is None:
        return _fit("", width, "text")
    room = width - 7
    share = drawing.share(line)
    bar, rest = figures.bar(share, room)
    style = "bar" if real.state == "active" else "bar-leaving"
    return [
        (bar, style),
        (rest, "rule"),
        *_fit(figures.percent(share), 7, "text" if share else "dim", right=True),
    ]


def _minute(line: Line, width: int, drawing: Drawing) -> Parts:
    cells = drawing.history.cells(line.key, width)
    text = sparkline(cells, drawing.top(line, width))
    style = "spark" if line.real is None else "spark-backend"
    if line.real is not None and line.real.state != "active":
        style = "bar-leaving"
    # zeros are a thin dim line
    parts: Parts = [(" " * (width - len(text)), "rule")]
    for character in text:
        tone = "rule" if character in " ▁" else style
        if parts[-1][1] == tone:
            parts[-1] = (parts[-1][0] + character, tone)
        else:
            parts.append((character, tone))
    return parts


def _hits(line: Line, width: int, drawing: Drawing) -> Parts:
    hits = (line.service if line.real is None else line.real).hits
    return _fit(figures.count(hits), width, "text" if hits else "dim", right=True)


def _of_hits(line: Line, width: int, drawing: Drawing) -> Parts:
    return _fit(figures.percent(line.real.share) if line.real else "", width, "dim", right=True)


def _state(line: Line, width: int, drawing: Drawing) -> Parts:
    if line.real is not None:
        real = line.real
        if real.drain_seconds_left is not None:
            return _fit(f"draining {figures.clock(drawing.left(real.drain_seconds_left))}", width, "draining")
        return _fit("weight 0" if real.state == "quiescent" else real.state, width, _STYLES.get(real.state, "text"))
    reals = line.service.real_servers
    if not reals:
        refuse = line.service.no_endpoints == "reject"
        return _fit("no endpoints" if refuse else "none is local", width, "warning")
    active = sum(real.state == "active" for real in reals)
    if active == len(reals):
        return _fit(f"{active} active", width, "dim")
    return _fit(f"{active} of {len(reals)} active", width, "warning")


_STYLES = {"active": "active", "quiescent": "quiescent"}


def _weight(line: Line, width: int, drawing: Drawing) -> Parts:
    return _fit(str(line.real.weight) if line.real else "", width, "text", right=True)


def _active(line: Line, width: int, drawing: Drawing) -> Parts:
    return _fit(figures.count(line.real.active) if line.real else "", width, "text", right=True)


def _inactive(line: Line, width: int, drawing: Drawing) -> Parts:
    return _fit(figures.count(line.real.inactive) if line.real else "", width, "dim", right=True)


def _forward(line: Line, width: int, drawing: Drawing) -> Parts:
    return _fit(line.real.forwarding if line.real else "", width, "dim")


def _bytes_in(line: Line, width: int, drawing: Drawing) -> Parts:
    return _fit(figures.size(line.real.bytes_in) if line.real else "", width, "dim", right=True)


def _bytes_out(line: Line, width: int, drawing: Drawing) -> Parts:
    return _fit(figures.size(line.real.bytes_out) if line.real else "", width, "dim", right=True)


_MINUTES = (10, 12, 15, 20, 30, 60)  # whole seconds a character, and the whole minute
OVERVIEW = (
    Column("SERVICE / BACKEND", "name", _name, 25, 2, 60),
    Column("CONN/S", "rate", _rate, 7, right=True),
    Column("VIP / SHARE", "vip", _vip_or_share, 18, 2, 28),
    Column("LAST 60 S", "", _minute, 10, 6, 60, steps=_MINUTES),
    Column("HITS", "hits", _hits, 6, right=True, since=90),
    Column("STATE", "state", _state, 14, 0),
)
PAGE = (
    Column("BACKEND", "name", _endpoint, 20, 2, 48),
    Column("CONN/S", "rate", _rate, 7, right=True),
    Column("SHARE", "share", _share, 16, 1, 32),
    Column("LAST 60 S", "", _minute, 10, 6, 60, steps=_MINUTES),
    Column("STATE", "state", _state, 14),
    Column("HITS", "hits", _hits, 6, right=True, since=82),
    Column("OF HITS", "", _of_hits, 7, right=True, since=104),
    Column("WEIGHT", "weight", _weight, 7, right=True, since=90),
    Column("ACTIVE", "active", _active, 7, right=True, since=98),
    Column("INACTIVE", "", _inactive, 8, right=True, since=132),
    Column("BYTES IN", "", _bytes_in, 10, right=True, since=150),
    Column("BYTES OUT", "", _bytes_out, 10, right=True, since=150),
    Column("FORWARD", "", _forward, 7, since=164),
)


def line_parts(line: Line, placed: Sequence[Placed], drawing: Drawing, marker: str = " ") -> Parts:
    """A line of the table: its cells, with blanks between them and a marker in the margin."""
    parts: Parts = [(marker, "marker")]
    x = MARGIN
    for column, at, width in placed:
        if at > x:
            parts.append((" " * (at - x), "text"))
        parts.extend(column.cell(line, width, drawing))
        x = at + width
    return parts


def title_parts(placed: Sequence[Placed], sort: str, *, backwards: bool, highest_first: bool) -> Parts:
    """The line of titles; an arrow marks what it is sorted by, down for the highest first."""
    parts: Parts = [(" " * MARGIN, "title")]
    x = MARGIN
    for column, at, width in placed:
        if at > x:
            parts.append((" " * (at - x), "title"))
        if column.sort and column.sort == sort:
            arrow = "▼" if highest_first is not backwards else "▲"
            # a narrow title gives its last letter to the arrow rather than the next column a blank
            text = column.title[: width - 1] + arrow if len(column.title) >= width else f"{column.title}{arrow}"
            parts.append((figures.fit(text, width, right=column.right), "title-sorted"))
        else:
            parts.append((figures.fit(column.title, width, right=column.right), "title"))
        x = at + width
    return parts


def column_at(placed: Sequence[Placed], x: int) -> Column | None:
    """The column whose title is under a click, or left of it."""
    found = None
    for column, at, _ in placed:
        if at - 1 <= x:
            found = column
    return found
