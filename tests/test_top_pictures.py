"""What `top` looks like. `pytest tests/test_top_pictures.py --snapshot-update` draws all pictures anew, also the one in
the docs; look at them before you commit them."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from textual.pilot import Pilot

from dataplane.top.app import Top
from tests.looks import START, STORY, Fake, cluster, play, table, until

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "img" / "top.svg"
SECONDS = tuple(float(second) for second in range(int(STORY) + 1))
Snap = Callable[..., bool]


@pytest.fixture(autouse=True)
def _same_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.delenv("NO_COLOR", raising=False)
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def app_of(source: Fake, **options: Any) -> Top:
    return Top(source, clock=source.clock, **options)


def story(source: Fake, *keys: str, seconds: tuple[float, ...] = SECONDS) -> Callable[[Pilot[None]], Awaitable[None]]:
    async def tell(pilot: Pilot[None]) -> None:
        await pilot.pause()
        await play(pilot, source, *seconds)
        await pilot.press(*keys)
        await pilot.pause()

    return tell


def test_the_overview(snap_compare: Snap) -> None:
    source = Fake(cluster)
    assert snap_compare(app_of(source), terminal_size=(120, 32), run_before=story(source))


def test_the_overview_on_a_small_terminal(snap_compare: Snap) -> None:
    source = Fake(cluster)
    assert snap_compare(app_of(source), terminal_size=(80, 24), run_before=story(source, "down", "down"))


def test_the_overview_without_colours(snap_compare: Snap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    source = Fake(cluster)
    assert snap_compare(app_of(source), terminal_size=(80, 24), run_before=story(source, "down", "down"))


def test_a_page(snap_compare: Snap) -> None:
    source = Fake(cluster)
    keys = ("slash", *"checkout", "enter", "down", "enter")
    assert snap_compare(app_of(source), terminal_size=(120, 32), run_before=story(source, *keys))


def test_a_page_on_a_small_terminal(snap_compare: Snap) -> None:
    source = Fake(cluster)
    keys = ("slash", *"web", "enter", "enter")
    assert snap_compare(app_of(source), terminal_size=(80, 24), run_before=story(source, *keys))


def test_a_filter_with_backends_folded_and_a_pause(snap_compare: Snap) -> None:
    source = Fake(cluster)
    keys = ("slash", *"shop", "enter", "b", "p")
    assert snap_compare(app_of(source), terminal_size=(100, 20), run_before=story(source, *keys))


def test_trouble(snap_compare: Snap) -> None:
    source = Fake(cluster)

    async def tell(pilot: Pilot[None]) -> None:
        await story(source, seconds=(0.0, 1.0, 2.0))(pilot)
        source.trouble = OSError(105, "No buffer space available")
        source.from_agent = False
        app = pilot.app
        assert isinstance(app, Top)
        app.action_look()
        await until(pilot, lambda: app.situation().failed > 0)
        source.now += 75
        app._tick()
        await pilot.pause()

    assert snap_compare(app_of(source, interval=3600.0), terminal_size=(100, 20), run_before=tell)


def test_help(snap_compare: Snap) -> None:
    source = Fake(cluster)
    tell = story(source, "question_mark", seconds=(0.0, 1.0))
    assert snap_compare(app_of(source), terminal_size=(100, 40), run_before=tell)


def test_ten_thousand_services(snap_compare: Snap) -> None:
    source = Fake(lambda now: table(10_000, 3, now, 0.01))
    tell = story(source, "end", seconds=(1.0, 2.0))
    assert snap_compare(app_of(source, interval=3600.0), terminal_size=(100, 24), run_before=tell)


# ----------------------------------------------------------------------------------------------------------------- docs


async def _draw() -> str:
    source = Fake(cluster)
    app = app_of(source)
    async with app.run_test(size=(120, 30)) as pilot:
        await story(source)(pilot)
        return app.export_screenshot(title="dataplane top")


def portable(svg: str) -> str:
    """Without what a browser would have to fetch, and with names that do not depend on the content."""
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("Fira Code,", "Fira Code, DejaVu Sans Mono, Menlo, Consolas,")
    svg = re.sub(r"terminal-\d+-", "top-", svg)
    return re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE).strip() + "\n"


def test_the_picture_in_the_docs_is_what_the_program_draws(request: pytest.FixtureRequest) -> None:
    drawn = portable(asyncio.run(_draw()))
    ElementTree.fromstring(drawn)
    assert "://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", drawn)
    if request.config.getoption("--snapshot-update"):
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        PICTURE.write_text(drawn)
    assert PICTURE.read_text() == drawn, "pytest tests/test_top_pictures.py --snapshot-update draws it anew"


def test_the_story_begins_where_it_says() -> None:
    assert time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(START)) == "2026-01-01 00:00:00"
