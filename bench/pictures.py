"""Pictures of a run (matplotlib, SVG and PNG): what a reader sees before any number."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import operations, traffic
from .figures import quantile, summarize
from .records import Key, Records, place
from .summary import NAMES, plain, row_names, sizes

COLOURS = {
    "ipvs": "#1f6fb4",
    "ipvs, routes": "#6fb7e8",
    "nftables": "#2a9d4a",
    "iptables-legacy": "#c43c39",
    "iptables-nft": "#e88a1a",
}
GREY = "#777777"
LINES = ("--", ":", "-.", (0, (5, 1, 1, 1)), (0, (1, 1)))
MARKS = "sv^Dx"
PANELS = (operations.FULL, operations.REPLACE, operations.ADD, operations.RESTART)


def _style(name: str) -> dict[str, Any]:
    """Ours in full colour; peers thin and dashed in the colour of their mechanism."""
    mechanism = name.split(":")[0]
    colour = COLOURS.get(mechanism, GREY)
    if ":" not in name:
        return {"color": colour, "linewidth": 2.4, "marker": "o", "markersize": 5, "zorder": 3}
    peers = [each for each in NAMES if each.startswith(f"{mechanism}:")]
    number = peers.index(name) % len(LINES) if name in peers else 0
    return {"color": colour, "linewidth": 1.1, "linestyle": LINES[number], "marker": MARKS[number], "markersize": 4}


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "bench"})
    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")
    return figure, axes


def _time_axis(axis: Any, which: str = "y") -> None:
    from matplotlib.ticker import FuncFormatter

    from .figures import seconds

    side = axis.yaxis if which == "y" else axis.xaxis
    side.set_major_formatter(FuncFormatter(lambda value, _: seconds(value)))


def _services_axis(axis: Any, every: Sequence[int]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(list(every)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_xlabel("Services")


def latency(records: Records) -> Any:
    """Operations against the number of Services, both axes logarithmic; hollow: calculated, not measured."""
    every = sizes(records)
    if len(every) < 1:
        return None
    parts = [each for each in PANELS if any(key.part == each for key in records.samples)]
    columns = min(2, len(parts))
    rows = -(-len(parts) // columns)
    figure, axes = _figure(12, 4.6 * rows + 1.6, rows, columns)
    shown: dict[str, Any] = {}
    for axis, part in zip(axes.flat, parts, strict=False):
        for name in row_names(records):
            points = _points(records, part, name)
            if not points:
                continue
            style = _style(name)
            (line,) = axis.plot([x for x, _, _ in points], [y for _, y, _ in points], **style)
            calculated = [(x, y) for x, y, measured in points if not measured]
            if calculated:
                axis.plot(
                    *zip(*calculated, strict=True),
                    linestyle="",
                    marker="o",
                    markersize=9,
                    mfc="none",
                    color=style["color"],
                )
            shown.setdefault(name, line)
        axis.set_yscale("log")
        _services_axis(axis, every)
        _time_axis(axis)
        axis.set_title(part)
    for axis in list(axes.flat)[len(parts) :]:
        axis.set_visible(False)
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle("Time of one operation, medians (bold: dataplane; thin: the floor and the usual tools)")
    return figure


def _points(records: Records, part: str, name: str) -> list[tuple[int, float, bool]]:
    points = [
        (key.size, summarize(samples).median, key not in records.calculated)
        for key, samples in records.samples.items()
        if key.case == "modes" and key.part == part and plain(key.contender) == name
    ]
    return sorted(points)


def distribution(records: Records) -> Any:
    """Each operation of our modes at the largest size: the share of samples below a time."""
    every = sizes(records)
    if not every:
        return None
    size = every[-1]
    wanted = (
        operations.REPLACE,
        operations.ADD,
        operations.REMOVE,
        operations.SCALE_UP,
        operations.ROLL,
        operations.CHURN,
    )
    parts = [each for each in wanted if any(key.part == each and key.size == size for key in records.samples)]
    if not parts:
        return None
    rows = -(-len(parts) // 3)
    figure, axes = _figure(12, 3.4 * rows + 0.8, rows, 3)
    shown: dict[str, Any] = {}
    for axis, part in zip(axes.flat, parts, strict=False):
        for name in COLOURS:
            samples = records.samples.get(Key("modes", size, part, name))
            if samples:
                ordered = sorted(samples)
                shares = [(index + 1) / len(ordered) for index in range(len(ordered))]
                (line,) = axis.step(ordered, shares, where="post", color=COLOURS[name], linewidth=1.8)
                shown.setdefault(name, line)
        axis.set_xscale("log")
        _time_axis(axis, "x")
        axis.set_title(part)
        axis.set_ylim(0, 1)
    for axis in list(axes.flat)[len(parts) :]:
        axis.set_visible(False)
    for row in axes:
        row[0].set_ylabel("share of changes done")
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=5)
    figure.suptitle(f"How long changes take among {size:,} Services, all samples")
    return figure


def first_packet(records: Records) -> Any:
    """A new connection's SYN to SYN-ACK, and to its first answer, against the number of Services."""
    keys = [key for key in records.samples if key.case == "traffic" and key.part.startswith("connect")]
    every = sorted({key.size for key in keys if key.contender != traffic.NOTHING})
    if not every:
        return None
    figure, axes = _figure(12, 4.8, 1, 3)
    shown: dict[str, Any] = {}
    for axis, kind, title in zip(
        axes.flat,
        ("connect, {}", "first byte, {}", "connections"),
        ("SYN to SYN-ACK", "until the first answer", "connections a second, one after another"),
        strict=True,
    ):
        for name, colour in COLOURS.items():
            places = traffic.PLACES if "{}" in kind else ("",)
            for number, where in enumerate(places):
                xs, middle, low, high = _traffic(records, kind.format(where), name, every)
                if xs:
                    line = axis.plot(
                        xs, middle, color=colour, linestyle=("-", "--", ":")[number], marker="o", markersize=3
                    )
                    shown.setdefault(name, line[0])
                    if where == traffic.PLACES[0]:
                        axis.fill_between(xs, low, high, color=colour, alpha=0.12, linewidth=0)
        part = kind.format("endpoint")
        base = records.samples.get(Key("traffic", 0, part, traffic.NOTHING))
        if base:
            shown.setdefault(traffic.NOTHING, axis.axhline(summarize(base).median, color=GREY, linewidth=1))
        _services_axis(axis, every)
        axis.set_title(title)
        if "{}" in kind:
            _time_axis(axis)
            axis.set_yscale("log")
            from matplotlib.ticker import MaxNLocator, NullLocator

            axis.yaxis.set_major_locator(MaxNLocator(6))
            axis.yaxis.set_minor_locator(NullLocator())
        axis.set_ylim(bottom=0 if "{}" not in kind else None)
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=6)
    figure.suptitle("A new connection (—— first Service, - - middle, ··· last; shaded: 10th to 90th percentile)")
    return figure


def _traffic(
    records: Records, part: str, name: str, every: Sequence[int]
) -> tuple[list[int], list[float], list[float], list[float]]:
    xs: list[int] = []
    middle: list[float] = []
    low: list[float] = []
    high: list[float] = []
    for size in every:
        samples = records.samples.get(Key("traffic", size, part, name))
        if samples:
            xs.append(size)
            middle.append(summarize(samples).median)
            low.append(quantile(samples, 0.1))
            high.append(quantile(samples, 0.9))
    return xs, middle, low, high


def memory(records: Records) -> Any:
    """Of the agent, and what the kernel's grew by, with the most Services that were measured."""
    parts = [each for each in ("resident memory", "kernel memory") if any(key.part == each for key in records.samples)]
    keys = [key for key in records.samples if key.case == "end-to-end" and key.part in parts]
    if not keys:
        return None
    every = sorted({key.size for key in keys})
    figure, axes = _figure(10, 3.8, 1, len(parts))
    names = [name for name in COLOURS if any(key.contender == name for key in keys)]
    for axis, part in zip(axes.flat, parts, strict=True):
        width = 0.8 / len(every)
        for number, size in enumerate(every):
            values = [
                summarize(records.samples.get(Key("end-to-end", size, part, name), [0.0])).median for name in names
            ]
            at = [index + (number - (len(every) - 1) / 2) * width for index in range(len(names))]
            shade = 0.35 + 0.65 * (number + 1) / len(every)
            bars = axis.bar(at, values, width * 0.92, color=[COLOURS[name] for name in names], alpha=shade)
            axis.bar_label(bars, [f"{value:.0f}\n{size:,}" if value else "" for value in values], fontsize=7)
        axis.set_xticks(range(len(names)), names, fontsize=8)
        axis.set_ylabel("MiB")
        axis.margins(y=0.2)
        axis.set_title(
            {"resident memory": "the agent (RSS)", "kernel memory": "the kernel (slab, per-CPU, vmalloc)"}[part]
        )
    figure.suptitle("Memory with so many Services × 3 endpoints")
    return figure


PICTURES: dict[str, Callable[[Records], Any]] = {
    "latency": latency,
    "distribution": distribution,
    "first-packet": first_packet,
    "memory": memory,
}


def draw(records: Records, folder: Path, prefix: str = "", only: Sequence[str] = tuple(PICTURES)) -> list[Path]:
    """Each picture as SVG and PNG, as far as the run has figures for it; the SVG files."""
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name in only:
        figure = PICTURES[name](records)
        if figure is None:
            continue
        figure.suptitle(f"{figure.get_suptitle()}\n{_caption(records)}", fontsize=10)
        for form in ("svg", "png"):
            path = folder / f"{prefix}{name}.{form}"
            figure.savefig(path, dpi=110, metadata={"Date": None} if form == "svg" else None)
        made.append(folder / f"{prefix}{name}.svg")
        pyplot.close(figure)
    return made


def _caption(records: Records) -> str:
    noisy = "; NOISY MACHINE" if records.verdict().noisy else ""
    return f"{place(records.metadata)}, {records.metadata['commit']}, {records.metadata['date'][:10]}{noisy}"
