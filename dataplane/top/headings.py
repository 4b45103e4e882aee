"""What stands above the tables: who is looked at, who counts, sums, and charts of the last minute. Pure."""

import time
from dataclasses import dataclass

from rich.cells import cell_len

from ..printable import printable
from ..rows import Look, ServiceRow
from . import figures
from .columns import Parts
from .history import History, Key, chart
from .listing import Totals, service_key, totals


@dataclass(frozen=True)
class Situation:
    """All that a heading tells."""

    look: Look | None = None
    """None as long as none has come."""
    from_agent: bool = False
    totals: Totals | None = None
    interval: float = 1.0
    paused: bool = False
    now: float = 0.0
    error: str = ""
    """Why the last look failed."""
    failed: int = 0
    """How many have failed one after the other."""
    waiting_since: float = 0.0
    """When the look that is under way was begun; 0: none is."""
    words: tuple[str, ...] = ()
    """Of the filter."""
    shown: int = 0
    """Services and addresses that pass the filter."""
    of: int = 0
    asked: tuple[str, ...] = ()
    """Names on the command line."""


NOTHING = totals(())
SLOW = 3.0
"""Seconds after which a look that has not come is mentioned."""


def fitted(parts: Parts, width: int, style: str = "text") -> Parts:
    """Parts in exactly `width` cells, cut with … or padded."""
    found: Parts = []
    for text, each in parts:
        length = cell_len(text)
        if length > width:
            return [*found, (figures.fit(text, width), each)] if width else found
        found.append((text, each))
        width -= length
    return [*found, (" " * width, style)] if width else found


def justified(left: Parts, right: Parts, width: int, style: str = "text") -> Parts:
    """The left parts are cut where the right ones begin."""
    taken = sum(cell_len(text) for text, _ in right)
    if taken >= width:
        return fitted(left, width, style)
    return [*fitted(left, width - taken, style), *right]


def bar(now: Situation, width: int, where: str = "") -> Parts:
    """The line at the top: name, mode, who answers, time."""
    left: Parts = [(" dataplane top ", "head-name"), (" ", "head")]
    if now.look is not None:
        left.append((f"{now.look.mode} mode", "head"))
        left.append(
            (", by the agent" if now.from_agent else ", from the kernel: no agent of this mode answers", "head-dim")
        )
    else:
        left.append(("looking …", "head-dim"))
    if where:
        left.append((f"  {where}", "head"))
    right: Parts = [(f"  every {figures.seconds(now.interval)}  ", "head-dim")]
    if now.paused:
        right = [("  ", "head"), (" PAUSED ", "head-alarm"), ("  ", "head")]
    stamp = now.look.at if now.paused and now.look is not None else now.now
    right.append((time.strftime("%H:%M:%S ", time.localtime(stamp)), "head"))
    return justified(left, right, width, "head")


def status(now: Situation) -> Parts:
    """Who counts, or what is wrong."""
    age = now.now - now.look.at if now.look is not None else 0.0
    if now.error:
        times = f", {now.failed} times" if now.failed > 1 else ""
        old = f"; below is what was there {figures.clock(age)} ago" if now.look is not None else ""
        return [(f" no look{times}: {printable(now.error, 200)}{old} ", "error")]
    if now.waiting_since and now.now - now.waiting_since >= SLOW:
        return [(f"! waiting for an answer, {figures.clock(now.now - now.waiting_since)}", "warning")]
    if now.look is None:
        return [("taking the first look", "dim")]
    counts = now.look.counts
    style = "warning" if counts.lost else "dim"
    return [("counted by ", "label"), (printable(str(counts), 400), style)]


def overview(now: Situation, history: History, width: int) -> list[Parts]:
    """The five lines above the table of Services."""
    sums = now.totals or NOTHING
    left: list[Parts] = [
        [(f"{figures.rate(sums.rate):>7}", "figure"), (" connections/s", "label")],
        [
            (f"{figures.count(sums.services):>7}", "figure"),
            (" Services" if sums.services != 1 else " Service", "label"),
            *_filter(now),
        ],
        [(f"{figures.count(sums.backends):>7}", "figure"), (" backends", "label"), *_not_active(sums)],
    ]
    return [bar(now, width), *_beside(left, history, (), width), fitted([(" ", "text"), *status(now)], width)]


def _filter(now: Situation) -> Parts:
    if now.words:
        return [
            ("  filter ", "label"),
            (printable(" ".join(now.words)), "warning"),
            (f": {now.shown} of {now.of}", "label"),
        ]
    if now.asked:
        return [("  named ", "label"), (printable(" ".join(now.asked)), "text")]
    return []


def _not_active(sums: Totals) -> Parts:
    found: Parts = []
    if sums.draining:
        found.append((f"  {sums.draining} draining", "draining"))
    if sums.quiescent:
        found.append((f"  {sums.quiescent} at weight 0", "dim"))
    return found


def _beside(left: list[Parts], history: History, key: Key, width: int) -> list[Parts]:
    """Lines with a chart of the last minute at the right, and its scale."""
    room = 60 if width >= 120 else 30 if width >= 96 else 20 if width >= 72 else 0
    if not room:
        return [fitted(parts, width) for parts in left]
    cells = history.cells(key, room)
    top = history.peak(key, room)
    pictures = chart(cells, top, len(left))
    scale = [f"{figures.rate(top):>6}", *[""] * (len(left) - 2), f"{'0':>6}"]
    if not top:
        scale[0] = ""
    lines = []
    for line, (parts, picture, mark) in enumerate(zip(left, pictures, scale, strict=True)):
        drawn: Parts = [(f"  {mark:>6} ", "dim"), ("▕", "rule")]
        style = ("chart-high", "chart-middle", "chart-low")[3 * line // len(left)]
        drawn += _drawn(picture.rjust(room), style, zero="▁" if line == len(left) - 1 else "")
        drawn.append((" ", "text"))
        lines.append(justified(parts, drawn, width))
    return lines


def _drawn(picture: str, style: str, zero: str) -> Parts:
    """A line of a chart, of which the thin line that says 0 is not so bright."""
    parts: Parts = []
    for character in picture:
        each = "rule" if character in (" ", zero) else style
        if parts and parts[-1][1] == each:
            parts[-1] = (parts[-1][0] + character, each)
        else:
            parts.append((character, each))
    return parts


TALL = 30
"""Lines of a terminal from which the page of a Service has a tall chart."""


def page(
    now: Situation, row: ServiceRow, history: History, width: int, height: int, *, gone: bool = False
) -> list[Parts]:
    """What stands above the backends of one Service: its facts beside a chart."""
    name: Parts = [(" ", "text"), (printable(row.label or row.vip), "service")]
    if gone:
        name += [("  ", "text"), (" gone ", "error")]
    rate = None if gone else row.rate
    left: list[Parts] = [
        [(f"{figures.rate(rate):>7}", "figure"), (" connections/s", "label")],
        [(f"{figures.count(row.hits):>7}", "figure"), (" hits", "label")],
        [(f"{len(row.real_servers):>7}", "figure"), (" backends", "label"), *_not_active(totals([row]))],
    ]
    facts = _facts(row)
    between: list[Parts] = []
    if height >= TALL:
        left += [[(f" {title:<11}", "label"), (value, style)] for title, value, style in facts]
    else:
        line: Parts = [(" ", "text")]
        for title, value, style in facts:
            line += [(f"{title} ", "label"), (value, style), ("  ", "text")]
        between = [fitted(line, width)]
    return [
        bar(now, width),
        fitted(name, width),
        *between,
        *_beside(left, history, service_key(row), width),
        fitted([(" ", "text"), *status(now)], width),
    ]


def _facts(row: ServiceRow) -> list[tuple[str, str, str]]:
    facts = [
        ("VIP", row.vip, "vip"),
        ("kind", row.kind, "text"),
        ("only from", ", ".join(row.allowed), "text"),
        ("scheduler", " ".join((row.scheduler, *row.scheduler_flags)), "text"),
        (
            "affinity",
            f"{row.persistence_seconds} s, /{row.persistence_prefix}" if row.persistence_seconds else "",
            "text",
        ),
        ("masquerade", row.masquerade, "text"),
    ]
    return [(title, printable(value), style) for title, value, style in facts if value]
