"""`top` as somebody uses it: keys, clicks, filter, sort, page, pause, trouble. No kernel: looks come from a story."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from textual.pilot import Pilot

from dataplane.errors import AgentUnreachable, NotRoot
from dataplane.rows import Look
from dataplane.top.app import Top
from dataplane.top.grid import Grid, Lines
from dataplane.top.screens import Help, Table
from tests.looks import PROBE, START, Fake, cluster, play, service_row, table, until

Story = Callable[[Pilot[None], Fake], Awaitable[None]]


@contextlib.asynccontextmanager
async def running(source: Fake, *, size: tuple[int, int] = (120, 32), **options: Any) -> AsyncIterator[Pilot[None]]:
    app = Top(source, clock=source.clock, **{"interval": 3600.0, **options})
    async with app.run_test(size=size) as pilot:
        await pilot.pause()
        yield pilot


def told(story: Story, source: Fake | None = None, **options: Any) -> None:
    """Two looks of the small cluster, then the story."""

    async def tell(given: Fake) -> None:
        async with running(given, **options) as pilot:
            await play(pilot, given, 1, 2)
            await story(pilot, given)

    asyncio.run(tell(source or Fake(cluster)))


def top_of(pilot: Pilot[None]) -> Top:
    assert isinstance(pilot.app, Top)
    return pilot.app


def table_of(pilot: Pilot[None]) -> Table:
    assert isinstance(pilot.app.screen, Table)
    return pilot.app.screen


def screen_of(pilot: Pilot[None]) -> str:
    return type(pilot.app.screen).__name__


def heading(pilot: Pilot[None]) -> str:
    return "\n".join("".join(text for text, _ in line) for line in table_of(pilot).heading.lines)


def shown(pilot: Pilot[None]) -> list[str]:
    """The lines in sight, as text."""
    grid = table_of(pilot).grid
    return [grid.render_line(y).text for y in range(min(grid.size.height, len(grid.lines) - grid.scroll_offset.y))]


def first_words(pilot: Pilot[None]) -> list[str]:
    """Services in sight, in their order."""
    return [line.strip("▸ ").split()[0] for line in shown(pilot) if not line.lstrip("▸ ").startswith(("├", "└"))]


def test_it_shows_services_backends_rates_and_who_counted() -> None:
    async def story(pilot: Pilot[None], _: Fake) -> None:
        assert first_words(pilot)[0] == "kube-system/kube-dns:dns"
        assert len(shown(pilot)) == len(table_of(pilot).grid.lines) == 19
        assert "ipvs mode, by the agent" in heading(pilot)
        assert "counted by probe (fexit:ip_vs_schedule), missed 0" in heading(pilot)
        assert "00:00:02" in heading(pilot)
        assert any("no endpoints" in line for line in shown(pilot))

    told(story)


def test_the_cursor_moves_and_stays_with_its_backend_when_it_is_sorted_anew() -> None:
    async def story(pilot: Pilot[None], source: Fake) -> None:
        grid = table_of(pilot).grid
        await pilot.press("down", "j", "j", "k")
        assert grid.cursor == 2
        await pilot.press("end")
        assert grid.cursor == 18
        await pilot.press("home", "down", "down", "down")
        key = grid.line.key if grid.line else ()
        await pilot.press("s", "s", "s", "s", "r")
        assert grid.line is not None
        assert grid.line.key == key
        assert grid.cursor != 3
        await play(pilot, source, 3, 25)
        assert grid.line.key == key
        await pilot.press("home")
        assert grid.cursor == 0

    told(story)


def test_a_cursor_that_nobody_moved_stays_at_the_top() -> None:
    async def story(pilot: Pilot[None], _: Fake) -> None:
        grid = table_of(pilot).grid
        await pilot.press("r")
        assert grid.cursor == 0
        assert grid.line is not None
        assert grid.line.key[0] != "kube-system/kube-dns:dns"

    told(story)


def test_keys_sort_by_the_next_column_and_reverse() -> None:
    async def story(pilot: Pilot[None], _: Fake) -> None:
        assert table_of(pilot).sort == "rate"
        names = sorted(first_words(pilot))
        for key, sort in (("s", "vip"), ("greater_than_sign", "hits"), ("less_than_sign", "vip"), ("S", "rate")):
            await pilot.press(key)
            assert table_of(pilot).sort == sort
        await pilot.press("S")
        assert table_of(pilot).sort == "name"
        assert first_words(pilot) == names
        await pilot.press("r")
        assert first_words(pilot) == names[::-1]

    told(story)


def test_clicks_on_titles_sort() -> None:
    async def story(pilot: Pilot[None], _: Fake) -> None:
        titles = table_of(pilot).titles
        place = {placed.column.sort: placed.x for placed in titles.placed}
        await pilot.click(titles, offset=(place["state"] + 1, 0))
        assert table_of(pilot).sort == "state"
        assert "STATE▼" in "".join(text for text, _ in titles.lines[0])
        await pilot.click(titles, offset=(place["state"] + 1, 0))
        assert "STATE▲" in "".join(text for text, _ in titles.lines[0])

    told(story)


def test_a_filter_is_typed_kept_and_cleared() -> None:
    async def story(pilot: Pilot[None], _: Fake) -> None:
        everything = shown(pilot)
        await pilot.press("slash", *"WEB")
        assert first_words(pilot) == ["shop/web:https"]
        assert "filter web: 1 of 7" in heading(pilot)
        await pilot.press("escape", "slash", *"shop", "slash", *"web")
        assert first_words(pilot) == ["shop/web:https"]
        # keys are letters there
        await pilot.press("q", "backspace", "enter")
        assert first_words(pilot) == ["shop/web:https"]
        assert isinstance(pilot.app.focused, Grid)
        await pilot.press("escape")
        assert shown(pilot) == everything

    told(story)


def test_what_is_typed_is_no_markup() -> None:
    async def story(pilot: Pilot[None], _: Fake) -> None:
        await pilot.press("slash", "left_square_bracket", *"red", "right_square_bracket", "enter")
        assert "filter [red]: 0 of 7" in heading(pilot)
        assert shown(pilot) == []
        await pilot.press("down", "enter", "end", "s")

    told(story)


def test_names_are_no_markup_either() -> None:
    evil = "[bold]x[/bold]/[@click=app.quit]y[/]:\x1b[31m"

    def look(now: float) -> Look:
        return Look("nftables", now, PROBE, (service_row(evil, "10.0.0.1:80/TCP"),))

    async def story(pilot: Pilot[None], _: Fake) -> None:
        assert r"[@click=app.quit]y[/]:\x1b[3…" in shown(pilot)[0]
        await pilot.press("enter")
        assert r"[bold]x[/bold]/[@click=app.quit]y[/]:\x1b[31m" in heading(pilot)
        assert "\x1b" not in pilot.app.export_screenshot()

    told(story, Fake(look))


def test_services_fold() -> None:
    async def story(pilot: Pilot[None], _: Fake) -> None:
        await pilot.press("b")
        assert len(shown(pilot)) == 7
        await pilot.press("b")
        assert len(shown(pilot)) == 19

    told(story)


def test_a_page_shows_one_service_and_escape_goes_back() -> None:
    async def story(pilot: Pilot[None], source: Fake) -> None:
        await play(pilot, source, 30, 31)
        await pilot.press("slash", *"checkout", "enter", "down", "down", "enter")
        await pilot.pause()
        assert screen_of(pilot) == "Page"
        assert "shop/checkout:http" in heading(pilot)
        assert "scheduler  wlc" in heading(pilot)
        assert len(shown(pilot)) == 4
        assert table_of(pilot).grid.cursor == 1  # the backend that was under the cursor
        draining = next(line for line in shown(pilot) if "draining" in line)
        assert "14:51" in draining
        await play(pilot, source, 32)
        assert "14:50" in next(line for line in shown(pilot) if "draining" in line)
        await pilot.press("s")
        assert table_of(pilot).sort == "share"
        await pilot.press("escape")
        assert screen_of(pilot) == "Overview"
        assert table_of(pilot).sort == "rate"

    told(story)


def test_a_second_click_opens_the_page() -> None:
    async def story(pilot: Pilot[None], _: Fake) -> None:
        await pilot.click(Grid, offset=(5, 3), times=2)
        await pilot.pause()
        assert "shop/catalogue:grpc" in heading(pilot)

    told(story)


def test_a_page_of_a_service_that_goes_says_so() -> None:
    gone = False

    def look(now: float) -> Look:
        whole = cluster(now)
        return Look(whole.mode, now, whole.counts, () if gone else whole.services)

    async def story(pilot: Pilot[None], source: Fake) -> None:
        nonlocal gone
        await pilot.press("enter")
        assert " gone " not in heading(pilot)
        gone = True
        await play(pilot, source, 5)
        assert " gone " in heading(pilot)
        assert len(shown(pilot)) == 2
        await pilot.press("escape")
        assert shown(pilot) == []

    told(story, Fake(look))


def test_a_drains_clock_counts_down_without_a_look() -> None:
    async def story(pilot: Pilot[None], source: Fake) -> None:
        await play(pilot, source, 30)
        assert any("draining 14:52" in line for line in shown(pilot))
        source.now += 90
        top_of(pilot)._tick()
        assert any("draining 13:22" in line for line in shown(pilot))

    told(story)


def test_a_pause_stops_looks_and_clocks() -> None:
    async def story(pilot: Pilot[None], source: Fake) -> None:
        await play(pilot, source, 30)
        await pilot.press("p")
        assert "PAUSED" in heading(pilot)
        looks, before = source.looks, shown(pilot)
        source.now += 60
        await pilot.pause(0.3)
        top_of(pilot)._tick()
        assert source.looks == looks
        assert shown(pilot) == before
        await pilot.press("space")
        await play(pilot, source, source.now - START)
        assert source.looks > looks
        assert "PAUSED" not in heading(pilot)

    told(story, interval=0.05)


def test_the_interval_is_made_longer_and_shorter() -> None:
    async def story(pilot: Pilot[None], _: Fake) -> None:
        assert "every 1.5 s" in heading(pilot)
        for key, text in (("plus", "2 s"), ("plus", "5 s"), ("minus", "2 s"), ("minus", "1 s"), ("minus", "0.5 s")):
            await pilot.press(key)
            assert f"every {text}" in heading(pilot)
        await pilot.press(*["minus"] * 5)
        assert "every 0.2 s" in heading(pilot)
        await pilot.press(*["plus"] * 12)
        assert "every 60 s" in heading(pilot)

    told(story, interval=1.5)


def test_help_explains_keys_and_says_who_counts() -> None:
    async def story(pilot: Pilot[None], source: Fake) -> None:
        await pilot.press("question_mark")
        assert isinstance(pilot.app.screen, Help)
        picture = pilot.app.export_screenshot()
        assert "fexit:ip_vs_schedule" in picture
        await play(pilot, source, 3)  # looks go on behind it
        await pilot.press("escape")
        assert "00:00:03" in heading(pilot)

    told(story, size=(120, 50))


@pytest.mark.parametrize("key", ["q", "ctrl+c"])
def test_it_quits(key: str) -> None:
    async def story(pilot: Pilot[None], _: Fake) -> None:
        await pilot.press(key)
        await pilot.pause()
        assert not pilot.app.is_running

    told(story)


# -------------------------------------------------------------------------------------------------------------- trouble


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (NotRoot("the agent answers root only"), "no look: the agent answers root only"),
        (AgentUnreachable("the agent hung up"), "no look: the agent hung up"),
        (OSError(24, "Too many open files"), "no look: OSError: [Errno 24] Too many open files"),
    ],
)
def test_trouble_is_shown_and_goes_away(error: Exception, text: str) -> None:
    async def story(pilot: Pilot[None], source: Fake) -> None:
        before = shown(pilot)
        source.trouble = error
        await pilot.press("f5")
        await until(pilot, lambda: text in heading(pilot))
        assert shown(pilot) == before
        await pilot.press("f5")
        await until(pilot, lambda: "no look, 2 times" in heading(pilot))
        source.trouble = None
        await play(pilot, source, 9)
        assert "no look" not in heading(pilot)

    told(story)


def test_an_agent_that_goes_is_told() -> None:
    async def story(pilot: Pilot[None], source: Fake) -> None:
        source.from_agent = False
        await play(pilot, source, 3)
        assert "from the kernel: no agent of this mode answers" in heading(pilot)
        source.from_agent = True
        await play(pilot, source, 4)
        assert "by the agent" in heading(pilot)

    told(story)


def test_who_has_never_seen_anything_gets_the_error() -> None:
    async def tell() -> Exception | None:
        source = Fake(cluster, trouble=NotRoot("root only"))
        app = Top(source, clock=source.clock)
        async with app.run_test() as pilot:
            await until(pilot, lambda: app.failure is not None)
        return app.failure

    assert isinstance(asyncio.run(tell()), NotRoot)


def test_a_look_that_hangs_does_not_stop_the_screen() -> None:
    hang = threading.Event()

    def look(now: float) -> Look:
        if now > START + 5:
            hang.wait(30)
        return cluster(now)

    async def story(pilot: Pilot[None], source: Fake) -> None:
        source.now = START + 6
        await pilot.press("f5")
        began = time.monotonic()
        await pilot.press("down", "s", "slash", *"web", "enter", "question_mark", "escape", "enter", "escape")
        source.now += 10
        await until(pilot, lambda: "waiting for an answer, 0:10" in heading(pilot))
        assert time.monotonic() - began < 20
        hang.set()

    told(story, Fake(look))


def test_counters_that_change_hands_start_the_minute_anew() -> None:
    def look(now: float) -> Look:
        whole = cluster(now)
        if now < START + 3:
            return whole
        return Look(whole.mode, now, type(whole.counts)("nftables", reason="the probe is gone"), whole.services)

    async def story(pilot: Pilot[None], source: Fake) -> None:
        assert len(top_of(pilot).history)
        await play(pilot, source, 3)
        assert not len(top_of(pilot).history)
        assert "nftables mode's own counters (the probe is gone)" in heading(pilot)
        await play(pilot, source, 4)
        assert len(top_of(pilot).history)

    told(story, Fake(look))


# ----------------------------------------------------------------------------------------------------------------- size


@pytest.mark.parametrize("size", [(80, 24), (60, 16), (30, 8), (200, 60)])
def test_any_terminal_will_do(size: tuple[int, int]) -> None:
    async def story(pilot: Pilot[None], source: Fake) -> None:
        await pilot.press("end", "pageup", "enter", "s", "escape", "question_mark", "escape", "slash", "x", "escape")
        await play(pilot, source, 3)
        for lines in pilot.app.screen.query(Lines):
            assert all(len(line) for line in lines.lines)

    told(story, size=size)


def test_ten_thousand_services_cost_what_is_in_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = 0
    render_line = Grid.render_line

    def counted(self: Grid, y: int) -> Any:
        nonlocal drawn
        drawn += 1
        return render_line(self, y)

    monkeypatch.setattr(Grid, "render_line", counted)

    async def story(pilot: Pilot[None], source: Fake) -> None:
        nonlocal drawn
        grid = table_of(pilot).grid
        assert len(grid.lines) == 40_000
        drawn = 0
        await play(pilot, source, 3)
        await pilot.press("end", "pageup", "s")
        assert len(grid.lines._sorted) <= 40  # backends of Services in sight only
        assert 0 < drawn < 30 * 40

    told(story, Fake(lambda now: table(10_000, 3, now, 0.1)), size=(120, 40))


def test_named_services_only() -> None:
    async def story(pilot: Pilot[None], _: Fake) -> None:
        assert sorted(first_words(pilot)) == ["monitoring/grafana", "shop/web:https"]
        assert "named web 10.0.1.175 [fd00:10::40]:3000" not in heading(pilot)
        assert "named shop/web grafana" in heading(pilot)

    told(story, services=("shop/web", "grafana"))
