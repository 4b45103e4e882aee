"""The one table that people read first: contenders down, operations across, at the largest number of Services."""

from typing import NamedTuple

from . import contenders, operations
from .figures import ratio, seconds, summarize
from .records import Key, Records

COLUMNS = (
    operations.FULL,
    operations.ADD,
    operations.REPLACE,
    operations.SCALE_UP,
    operations.REMOVE,
    operations.ROLL,
    operations.RESTART,
    operations.CHURN,
)
NAMES = [each.name for each in contenders.CONTENDERS]


class Cell(NamedTuple):
    """One figure: the median, its relation to the base's, and how sure it is."""

    key: Key
    median: float
    share: float | None
    spread: float
    samples: int
    calculated: bool

    def __str__(self) -> str:
        share = "" if self.share is None else f"{self.share:.3g} × "
        return f"{share}{seconds(self.median)}" + ("*" if self.calculated else "")


def plain(name: str) -> str:
    """A contender without the mark of a calculated row."""
    return name.split(" (calculated from")[0]


def sizes(records: Records) -> list[int]:
    """Numbers of Services that the modes were measured with."""
    return sorted({key.size for key in records.samples if key.case == "modes"})


def row_names(records: Records) -> list[str]:
    """Contenders of a run, in the order of the table of contenders."""
    here = {plain(key.contender) for key in records.samples if key.case == "modes"}
    return sorted(here, key=lambda name: NAMES.index(name) if name in NAMES else len(NAMES))


def cell(records: Records, size: int, part: str, contender: str) -> Cell | None:
    """One figure of the table; None: not measured."""
    for key, samples in records.samples.items():
        if key.case == "modes" and key.size == size and key.part == part and plain(key.contender) == contender:
            base = records.samples.get(key._replace(contender=contenders.base(contender)))
            summary = summarize(samples)
            share = ratio(samples, base) if base else None
            known = key in records.calculated
            return Cell(key, summary.median, share, summary.spread, summary.samples, known)
    return None


def as_text(records: Records, size: int | None = None) -> str:
    """The table as text; "" when the modes were not measured."""
    every = sizes(records)
    if not every:
        return ""
    size = size or every[-1]
    columns = [each for each in COLUMNS if any(key.size == size and key.part == each for key in records.samples)]
    rows = [["", *columns]]
    for name in row_names(records):
        cells = [cell(records, size, column, name) for column in columns]
        if any(cells):
            rows.append([name, *("" if one is None else str(one) for one in cells)])
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = []
    for row in rows:
        padded = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *padded[1:]]))
    note = "medians, and the ratio to the floor (raw replay; iptables: iptables-restore by hand)"
    if any("*" in text for row in rows[1:] for text in row):
        note += "; * calculated from smaller sizes"
    return f"{size:,} Services: {note}\n\n" + "\n".join(line.rstrip() for line in lines) + "\n"
