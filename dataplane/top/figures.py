"""Figures as short texts: rates, counts, sizes, clocks and bars. Pure."""


def rate(value: float | None) -> str:
    """`-`, `0`, `4.2`, `127`, `12.3k`: at most six characters; what is above 0 never reads 0."""
    if value is None:
        return "-"
    if value <= 0:
        return "0"
    if value < 0.05:
        return "<0.1"
    return f"{value:.1f}" if value < 99.95 else count(round(value))


def count(value: int | None) -> str:
    """`-`, `9999`, `12.3k`, `4.0M`: at most six characters up to a thousand million million."""
    if value is None:
        return "-"
    if value < 10_000:
        return str(value)
    scaled = float(value)
    for unit in "kMGT":
        scaled /= 1000
        if scaled < 999.95:
            return f"{scaled:.1f}{unit}"
    return f"{scaled / 1000:.1f}P"


def size(value: int | None) -> str:
    """`-`, `512 B`, `12.3 KiB`."""
    if value is None:
        return "-"
    if value < 1024:
        return f"{value} B"
    scaled = float(value)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        scaled /= 1024
        if scaled < 1023.95:
            return f"{scaled:.1f} {unit}"
    return f"{scaled / 1024:.1f} PiB"


def clock(seconds: float) -> str:
    """`0:09`, `14:32`, from an hour on `3h12m`, from four days on `7d`."""
    whole = max(0, int(seconds))
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    if whole < 4 * 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d"


def seconds(value: float) -> str:
    """`0.5 s`, `2 s`."""
    return f"{value:g} s"


def percent(share: float | None) -> str:
    """`-` or `34.2%`; six characters at most."""
    return "-" if share is None else f"{share:.1%}"


def bar(share: float | None, width: int) -> tuple[str, str]:
    """A heavy line, by half characters, and the light one behind it; what is above 0 never looks like 0."""
    if not share or share <= 0 or width < 1:
        return "", "─" * width
    halves = max(1, round(min(share, 1.0) * width * 2))
    drawn = "━" * (halves // 2) + "╾" * (halves % 2)
    return drawn, "─" * (width - len(drawn))


def fit(text: str, width: int, *, right: bool = False) -> str:
    """`text` in exactly `width` cells of a terminal, cut with … or padded."""
    from rich.cells import cell_len, set_cell_size

    length = cell_len(text)
    if length > width:
        return set_cell_size(text, width - 1) + "…" if width > 0 else ""
    return " " * (width - length) + text if right else text + " " * (width - length)
