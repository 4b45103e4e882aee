"""One HTML file with everything in it: where it was measured, aims, tables and pictures. Opens without a network."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from . import aims, summary
from .pictures import draw
from .records import Bases, Records, Target, place, table

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; display: block; overflow-x: auto; }
th, td { padding: .25em .7em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.ours td { background: #eef6ee; font-weight: 600; }
.missed, .noisy { color: #b00020; font-weight: 600; } .met { color: #1d7a34; }
.spread { color: #777; font-weight: 400; font-size: 11px; }
figure { margin: 1.5em 0; } svg { max-width: 100%; height: auto; }
pre { font-size: 12px; overflow-x: auto; background: #f6f6f6; padding: 1em; }
"""


def write(
    runs: Sequence[Records], folder: Path, bases: Bases, targets: tuple[Target, ...], only: Sequence[str] | None = None
) -> Path:
    """report.html in the folder, with its pictures beside it as files of their own too."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [_run(records, folder, number, len(runs), bases, targets, only) for number, records in enumerate(runs)]
    path = folder / "report.html"
    path.write_text(
        "<!doctype html><html lang=en><meta charset=utf-8><title>dataplane: bench</title>"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style>"
        "<h1>dataplane: what it costs to maintain the rules</h1>"
        "<p>Ratios come first: they mean something on other machines too, seconds do not. Compare figures of one run "
        "only. How each was made: <code>bench/README.md</code>. Every sample is in the <code>.jsonl</code> file "
        "beside this report.</p>" + "".join(parts) + "</html>\n"
    )
    return path


def _run(
    records: Records,
    folder: Path,
    number: int,
    runs: int,
    bases: Bases,
    targets: tuple[Target, ...],
    only: Sequence[str] | None,
) -> str:
    about, verdict = records.metadata, records.verdict()
    kind = "vm" if about.get("emulated") else "native"
    prefix = "" if runs == 1 else f"{kind}-" if number < 2 else f"{kind}-{number + 1}-"
    noisy = "<span class=noisy>The machine was noisy</span>" if verdict.noisy else "The machine was quiet"
    tools = ", ".join(f"{name}: {version}" for name, version in about.get("tools", {}).items())
    lines = [
        f"<h2>{escape(place(about))}</h2>",
        (
            f"<p>{escape(str(about['date']))}, commit {escape(str(about['commit']))}; {escape(tools)}.<br>"
            f"{noisy}: {escape(verdict.words)}.</p>"
        ),
        *(f"<p class=missed>FAILED: {escape(failure)}</p>" for failure in records.failures),
        _aims(records),
        *(_table(records, size) for size in reversed(summary.sizes(records))),
    ]
    pictures = draw(records, folder, prefix, *((only,) if only else ()))
    lines += [f"<figure>{_svg(path)}</figure>" for path in pictures]
    full = escape(table(records, bases, targets))
    lines.append(f"<details><summary>Every figure of this run</summary><pre>{full}</pre></details>")
    return "\n".join(lines)


def _svg(path: Path) -> str:
    text = path.read_text()
    inner = text[text.index("<svg") :]
    stem = path.stem  # identifiers are per file: two pictures in one page must not share them
    return inner.replace('id="', f'id="{stem}-').replace('href="#', f'href="#{stem}-').replace("url(#", f"url(#{stem}-")


def _aims(records: Records) -> str:
    rows = aims.aims(records)
    if not rows:
        return ""
    words = {True: "<span class=met>met</span>", False: "<span class=missed>missed</span>", None: ""}
    cells = "".join(f"<tr><td>{escape(row.asked)}<td>{escape(row.found)}<td>{words[row.met]}</tr>" for row in rows)
    return f"<h3>Aims</h3><table><tr><th>aim<th>found<th></tr>{cells}</table>"


def _table(records: Records, size: int) -> str:
    columns = [each for each in summary.COLUMNS if any(k.size == size and k.part == each for k in records.samples)]
    rows, calculated = [], False
    for name in summary.row_names(records):
        cells = [summary.cell(records, size, column, name) for column in columns]
        if not any(cells):
            continue
        calculated |= any(one.calculated for one in cells if one)
        shown = "".join(
            "<td>" if one is None else f"<td>{escape(str(one))} <span class=spread>± {one.spread:.0%}</span>"
            for one in cells
        )
        rows.append(f"<tr{' class=ours' if ':' not in name else ''}><td>{escape(name)}{shown}</tr>")
    heads = "".join(f"<th>{escape(each)}" for each in columns)
    note = "<p>* calculated from smaller sizes, not measured.</p>" if calculated else ""
    return (
        f"<h3>{size:,} Services × 3 endpoints</h3><p>Ratio to the floor (raw replay of the same bytes; for iptables "
        f"iptables-restore by hand), median, spread (half of 10th to 90th percentile).</p>"
        f"<table><tr><th>{heads}</tr>{''.join(rows)}</table>{note}"
    )
