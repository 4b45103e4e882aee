"""The pure parts of `top`: the history and its pictures, figures, columns, the order of lines, headings."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from dataplane.printable import printable
from dataplane.rows import Counts, Look
from dataplane.top import figures, headings
from dataplane.top.columns import OVERVIEW, PAGE, Column, Drawing, Parts, column_at, layout, line_parts, title_parts
from dataplane.top.history import SECONDS, History, chart, sparkline
from dataplane.top.listing import ORDERS, Listing, arranged, arranged_backends, entries, rates, totals, words_of
from dataplane.top.palette import styles
from tests.looks import PROBE, START, cluster, real_row, service_row

KEY = ("default/web", "10.0.0.1:80/TCP")


def text_of(parts: Parts) -> str:
    return "".join(text for text, _ in parts)


# -------------------------------------------------------------------------------------------------------------- history


def history_of(*looks: tuple[float, float | None]) -> History:
    history = History()
    for at, rate in looks:
        history.take(at, [(KEY, rate)])
    return history


def test_the_first_look_only_starts_the_minute() -> None:
    assert history_of((100.0, 7.0)).cells(KEY, 60) == [None] * 60


def test_each_second_has_the_rate_of_its_look() -> None:
    cells = history_of((100.0, None), (101.0, 5.0), (102.0, 0.0), (103.0, 9.0)).cells(KEY, 60)
    assert cells == [None] * 57 + [5.0, 0.0, 9.0]


def test_a_long_interval_fills_all_of_its_seconds() -> None:
    assert history_of((100.0, None), (105.0, 4.0)).cells(KEY, 60)[-6:] == [None, 4.0, 4.0, 4.0, 4.0, 4.0]


def test_several_looks_in_a_second_give_their_mean() -> None:
    cells = history_of((100.0, None), (100.25, 8.0), (101.0, 4.0)).cells(KEY, 60)
    assert cells[-1] == pytest.approx(5.0)


def test_a_look_across_two_seconds_counts_in_both() -> None:
    cells = history_of((100.5, None), (101.5, 6.0)).cells(KEY, 60)
    assert cells[-2:] == pytest.approx([6.0, 6.0])


def test_what_is_older_than_a_minute_is_gone() -> None:
    history = history_of((100.0, None), (101.0, 5.0), *((102.0 + second, 0.0) for second in range(SECONDS - 1)))
    assert history.cells(KEY, 60)[0] == 5.0
    history.take(161.0, [(KEY, 0.0)])
    assert history.cells(KEY, 60) == [0.0] * 60
    assert len(history) == 0


def test_idle_keys_cost_nothing() -> None:
    history = History()
    history.take(100.0, [])
    history.take(101.0, [((str(number),), 0.0) for number in range(10_000)])
    assert len(history) == 0
    assert history.cells(("7",), 60)[-1] == 0.0


def test_a_clock_that_is_set_back_starts_the_minute_anew() -> None:
    history = history_of((100.0, None), (101.0, 5.0), (50.0, 5.0))
    assert history.cells(KEY, 60) == [None] * 60
    history.take(51.0, [(KEY, 2.0)])
    assert history.cells(KEY, 60)[-1] == 2.0


def test_a_gap_longer_than_a_minute_leaves_only_its_mean() -> None:
    assert history_of((100.0, None), (101.0, 50.0), (1000.0, 3.0)).cells(KEY, 60) == pytest.approx([3.0] * 60)


def test_parts_of_the_minute_begin_at_multiples_of_their_length() -> None:
    looks: list[tuple[float, float | None]] = [(100.0, None)]
    looks += [(101.0 + second, float(second)) for second in range(60)]
    before = history_of(*looks).cells(KEY, 20)
    after = history_of(*looks, (161.0, 60.0), (162.0, 61.0), (163.0, 62.0)).cells(KEY, 20)
    assert after[:-2] == before[1:-1]  # the newest part has just begun


@given(
    st.lists(st.tuples(st.floats(0.05, 130), st.floats(0, 1e6)), max_size=30),
    st.integers(1, 80),
)
def test_hits_are_rates_times_seconds(looks: Sequence[tuple[float, float]], width: int) -> None:
    """Of the seconds that are still remembered, and no picture is wider than asked."""
    history = History()
    at = 1000.0
    history.take(at, [])
    spans = []
    for seconds, rate in looks:
        spans.append((at, at + seconds, rate))
        at += seconds
        history.take(at, [(KEY, rate)])
    oldest = -(-at // 1) - SECONDS
    wanted = sum(rate * max(0.0, end - max(start, oldest)) for start, end, rate in spans)
    assert history.hits(KEY) == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    cells = history.cells(KEY, width)
    assert len(cells) <= width
    assert all(cell is None or cell >= -1e-9 for cell in cells)
    top = history.peak(KEY, width)
    assert len(sparkline(cells, top)) == len(cells)


def test_a_sparkline_tells_nothing_zero_and_little_apart() -> None:
    assert sparkline([None, 0.0, 0.001, 50.0, 100.0], 100.0) == " ▁▂▄▇"


def test_a_chart_is_a_sparkline_of_several_lines() -> None:
    assert chart([None, 0.0, 0.1, 50.0, 100.0], 100.0, 2) == ["   ▁█", " ▁▂██"]


def test_a_chart_of_nothing_is_a_line() -> None:
    assert chart([0.0, 0.0], 0.0, 2) == ["  ", "▁▁"]


# -------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0"),
        (0.04, "<0.1"),
        (0.05, "0.1"),
        (9.96, "10.0"),
        (99.94, "99.9"),
        (127.4, "127"),
        (9_999.4, "9999"),
        (12_345, "12.3k"),
        (999_960, "1.0M"),
        (4.2e9, "4.2G"),
    ],
)
def test_rates(value: float | None, text: str) -> None:
    assert figures.rate(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0:00"), (59.9, "0:59"), (872, "14:32"), (3600, "1h00m"), (90_000, "25h00m"), (4e5, "4d")]
)
def test_clocks(value: float, text: str) -> None:
    assert figures.clock(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (512, "512 B"), (1023, "1023 B"), (2048, "2.0 KiB"), (5 << 40, "5.0 TiB")]
)
def test_sizes(value: int | None, text: str) -> None:
    assert figures.size(value) == text


@given(st.integers(0, 10**15))
def test_counts_are_short(value: int) -> None:
    assert len(figures.count(value)) <= 6


@given(st.floats(0, 1) | st.none(), st.integers(0, 40))
def test_bars_are_as_wide_as_their_column(share: float | None, width: int) -> None:
    drawn, rest = figures.bar(share, width)
    assert len(drawn) + len(rest) == width
    assert bool(drawn) == bool(share and width)


@given(st.text(max_size=30), st.integers(1, 20), st.booleans())
def test_text_fits_exactly(text: str, width: int, right: bool) -> None:
    assert cell_len(figures.fit(printable(text), width, right=right)) == width


# ---------------------------------------------------------------------------------------------------------------- lines


def names(listing: Listing) -> list[str]:
    return [listing[index].key[-1 if listing[index].real else 0] for index in range(len(listing))]


WEB = service_row(
    "default/web:http",
    "10.0.1.175:80/TCP",
    [
        real_row("10.244.1.7:80", 10, rate=1.0),
        real_row("10.244.2.3:80", 30, rate=3.0, weight=0, state="draining", drain_seconds_left=60),
        real_row("10.244.10.1:80", 20, rate=2.0, active=4),
    ],
    rate=6.0,
)
API = service_row("default/api", "10.0.1.176:80/TCP", [real_row("10.244.1.8:80", 500, rate=1.5)], rate=1.5)
BARE = service_row("", "10.0.0.9:1/TCP", ours=True)
ROWS = entries([BARE, WEB, API])


@pytest.mark.parametrize(
    ("sort", "wanted"),
    [
        ("rate", ["default/web:http", "default/api", ""]),
        ("hits", ["default/api", "default/web:http", ""]),
        ("name", ["default/api", "default/web:http", ""]),
        ("state", ["default/web:http", "default/api", ""]),
        ("vip", ["", "default/web:http", "default/api"]),
    ],
)
def test_services_are_sorted(sort: str, wanted: list[str]) -> None:
    assert names(arranged(ROWS, sort, backends=False)) == wanted
    if sort not in ("state", "hits"):  # ties stay in the order of names both ways
        backwards = names(arranged(ROWS, sort, backwards=True, backends=False))
        assert backwards == wanted[::-1]


def test_backends_are_sorted_within_their_service() -> None:
    assert names(arranged(ROWS, "rate"))[:4] == ["default/web:http", "10.244.2.3:80", "10.244.10.1:80", "10.244.1.7:80"]
    assert names(arranged(ROWS, "name"))[3:6] == ["10.244.1.7:80", "10.244.2.3:80", "10.244.10.1:80"]
    assert names(arranged(ROWS, "state"))[1] == "10.244.2.3:80"


@pytest.mark.parametrize("sort", ORDERS)
@pytest.mark.parametrize("backends", [True, False])
def test_every_line_is_found_where_it_is(sort: str, backends: bool) -> None:
    listing = arranged(entries(cluster(START + 50).services), sort, backends=backends)
    assert [listing.find(listing[index].key) for index in range(len(listing))] == list(range(len(listing)))
    with pytest.raises(IndexError):
        listing[len(listing)]


def test_a_backend_that_is_gone_leads_to_its_service() -> None:
    listing = arranged(ROWS, "name")
    assert listing.find((*ROWS[1].key, "10.9.9.9:1")) == listing.find(ROWS[1].key)
    assert listing.find(("nobody", "nowhere")) is None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", 7),
        ("WEB", 4),
        ("10.0.1.17", 6),
        ("draining", 2),
        ("web draining", 2),
        ("api draining", 0),
        ("244.1.", 4),
        ("clusterip", 7),
    ],
)
def test_a_filter_keeps_what_has_all_of_its_words(text: str, wanted: int) -> None:
    assert len(arranged(ROWS, "name", words=words_of(text))) == wanted


def test_the_page_of_a_service_has_its_backends_only() -> None:
    recent = {(*ROWS[1].key, "10.244.10.1:80"): 5.0}
    listing = arranged_backends(ROWS[1], "share", lambda key: recent.get(key, 0.0))
    assert names(listing) == ["10.244.10.1:80", "10.244.1.7:80", "10.244.2.3:80"]
    assert [listing[index].real is not None for index in range(3)] == [True] * 3
    assert listing.find(ROWS[1].key) is None


def test_sums() -> None:
    sums = totals([WEB, API, BARE])
    assert (sums.services, sums.backends, sums.draining, sums.hits, sums.rate) == (3, 4, 1, 560, 7.5)
    assert dict(rates(ROWS))[()] == 7.5


# -------------------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize("columns", [OVERVIEW, PAGE], ids=["overview", "page"])
@pytest.mark.parametrize("width", [40, 60, 79, 80, 100, 120, 133, 160, 200, 300])
def test_lines_are_as_wide_as_the_terminal_allows(columns: Sequence[Column], width: int) -> None:
    placed = layout(columns, width)
    assert all(one.x + one.width < other.x for one, other in pairwise(placed))
    if width >= 79:
        assert placed[-1].x + placed[-1].width <= width
    look = cluster(START + 40)
    history = History()
    history.take(look.at - 1, [])
    history.take(look.at, [((row.label, row.vip), 5.0) for row in look.services])
    listing = arranged(entries(look.services), "rate")
    for index in range(len(listing)):
        parts = line_parts(listing[index], placed, Drawing(history, look.at, look.at))
        assert cell_len(text_of(parts)) == placed[-1].x + placed[-1].width
        assert {name for _, name in parts} <= styles(plain=True).keys()
    title = title_parts(placed, "rate", backwards=False, highest_first=True)
    assert text_of(title).count("▼") == 1


def test_a_click_finds_its_column() -> None:
    placed = layout(OVERVIEW, 120)
    for each in placed:
        assert column_at(placed, each.x) is each.column
        assert column_at(placed, each.x + each.width - 1) is each.column


def test_a_drains_clock_goes_on_between_looks() -> None:
    drawing = Drawing(History(), at=1000.0, now=1007.5)
    assert drawing.left(60) == 52.5
    assert drawing.left(5) == 0
    drawing.now = 990.0  # a clock that was set back does not give time
    assert drawing.left(60) == 60


HOSTILE = "[bold red]x[/]\x1b[2J\u202ename\n"


@pytest.mark.parametrize("width", [80, 160])
def test_names_reach_the_screen_escaped_and_wide_ones_keep_the_columns(width: int) -> None:
    rows = entries(
        [
            service_row(f"{HOSTILE}/{HOSTILE}:{HOSTILE}", "10.0.0.1:80/TCP"),
            service_row("空間/名前がとても長いサービスの名前です:ポート", "10.0.0.2:80/TCP", [real_row("10.1.1.1:1")]),
        ]
    )
    placed = layout(OVERVIEW, width)
    listing = arranged(rows, "name")
    for index in range(len(listing)):
        text = text_of(line_parts(listing[index], placed, Drawing(History())))
        assert text.isprintable()
        assert cell_len(text) == placed[-1].x + placed[-1].width


# ------------------------------------------------------------------------------------------------------------- headings


def situation(**fields: object) -> headings.Situation:
    look = cluster(START)
    return headings.Situation(look=look, totals=totals(look.services), now=START, from_agent=True, **fields)  # type: ignore[arg-type]


def heading(now: headings.Situation, width: int = 120) -> str:
    lines = headings.overview(now, History(), width)
    assert {cell_len(text_of(line)) for line in lines} == {width}
    return "\n".join(map(text_of, lines))


def test_the_heading_says_who_counts_and_what_he_has_missed() -> None:
    assert "counted by probe (fexit:ip_vs_schedule), missed 0" in heading(situation())
    look = Look("ipvs", START, Counts("ipvs", reason="no BTF"), ())
    assert "counted by ipvs mode's own counters (no BTF)" in heading(headings.Situation(look, now=START))
    lossy = Look("ipvs", START, Counts("probe", PROBE.hooks, {"map full": 3}), ())
    assert "missed 3 (map full 3)" in heading(headings.Situation(lossy, now=START))


@pytest.mark.parametrize("width", [20, 40, 72, 80, 100, 200])
def test_headings_fit(width: int) -> None:
    told = situation(error="the agent did not answer: timed out", failed=2, words=("web",), shown=1, paused=True)
    heading(told, width)
    row = cluster(START).services[3]
    for height in (24, 40):
        lines = headings.page(told, row, History(), width, height, gone=True)
        assert {cell_len(text_of(line)) for line in lines} == {width}


def test_trouble_is_told_with_the_age_of_what_is_shown() -> None:
    told = heading(headings.Situation(cluster(START), now=START + 75, error="no\x1b way", failed=3))
    assert r"no look, 3 times: no\x1b way; below is what was there 1:15 ago" in told


def test_a_slow_look_is_mentioned() -> None:
    assert "waiting for an answer, 0:04" in heading(situation(waiting_since=START - 4))
    assert "waiting" not in heading(situation(waiting_since=START - 2))


def test_without_colours_there_are_none() -> None:
    for style in styles(plain=True).values():
        assert (style.color, style.bgcolor) == (None, None)
