"""Styles by name, with colours and without. Every difference that a colour makes, a word or a sign makes too."""

from rich.style import Style

BACKGROUND, PANEL, CURSOR = "#0f141b", "#18202a", "#25364a"
TEXT, DIM, RULE = "#d3dae3", "#8593a3", "#3d4a59"
BLUE, GREEN, YELLOW, RED, VIOLET = "#6cb6ff", "#7fd88f", "#f5b454", "#ff7b85", "#c4a7ff"

_COLOURS = {
    "text": f"{TEXT}",
    "dim": f"{DIM}",
    "rule": f"{RULE}",
    "marker": f"bold {BLUE}",
    "service": "bold #ffffff",
    "service-namespace": f"{DIM}",
    "service-port": f"{BLUE}",
    "backend": f"{TEXT}",
    "vip": f"{VIOLET}",
    "rate": f"bold {GREEN}",
    "spark": f"{GREEN}",
    "spark-backend": "#4fa3a5",
    "bar": f"{BLUE}",
    "bar-leaving": f"{YELLOW}",
    "active": f"{GREEN}",
    "draining": f"{YELLOW}",
    "quiescent": f"{DIM}",
    "warning": f"{YELLOW}",
    "error": "bold #ffffff on #8c2f39",
    "title": f"{DIM} on {PANEL}",
    "title-sorted": f"bold {BLUE} on {PANEL}",
    "head": f"{TEXT} on {PANEL}",
    "head-name": f"bold {BACKGROUND} on {BLUE}",
    "head-dim": f"{DIM} on {PANEL}",
    "head-alarm": f"bold {BACKGROUND} on {YELLOW}",
    "label": f"{DIM}",
    "figure": "bold #ffffff",
    "chart-high": "#a3e5a9",
    "chart-middle": f"{GREEN}",
    "chart-low": "#56ad72",
    "key": f"bold {BLUE}",
}
_PLAIN = {
    "service": "bold",
    "rate": "bold",
    "error": "reverse",
    "title": "underline",
    "title-sorted": "bold underline",
    "head": "reverse",
    "head-name": "bold reverse",
    "head-dim": "reverse",
    "head-alarm": "bold reverse",
    "figure": "bold",
    "key": "bold",
    "marker": "bold",
    "draining": "bold",
    "warning": "bold",
}


def styles(*, plain: bool) -> dict[str, Style]:
    """By name. `plain`: without any colour."""
    if plain:
        return {name: Style.parse(_PLAIN.get(name, "none")) for name in _COLOURS}
    return {name: Style.parse(f"on {BACKGROUND}") + Style.parse(text) for name, text in _COLOURS.items()}


def cursor(*, plain: bool) -> Style:
    """Over the line of the cursor, which the marker in the margin tells as well."""
    return Style.parse("reverse" if plain else f"on {CURSOR}")
