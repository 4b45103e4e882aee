"""Totals never fall, whatever the counters under them do, and nothing that was counted is lost."""

from hypothesis import given
from hypothesis import strategies as st

from dataplane.counters import Tally, Target
from dataplane.model import VirtualAddress, parse_address

AT = VirtualAddress(6, parse_address("10.0.1.175"), 80)
OTHER = VirtualAddress(6, parse_address("10.0.1.176"), 80)


def target(number: int, at: VirtualAddress = AT) -> Target:
    return Target(at, parse_address(f"10.1.0.{number}"), 80)


def after(*readings: dict[Target, int], room: int = 100, remembers: bool = False) -> Tally:
    tally = Tally(room, remembers=remembers)
    for reading in readings:
        tally.take(reading)
    return tally


def test_a_total_is_what_the_source_says() -> None:
    tally = after({target(1): 5, target(2): 7})
    assert (tally.total(target(1)), tally.total(target(3)), tally.totals()) == (5, 0, {AT: 12})


def test_a_counter_that_begins_again_adds_to_what_it_was() -> None:
    tally = after({target(1): 5}, {target(1): 2}, {target(1): 4}, {target(1): 0})
    assert (tally.total(target(1)), tally.totals()) == (9, {AT: 9})


def test_a_virtual_server_keeps_the_hits_of_real_servers_that_are_gone() -> None:
    tally = after({target(1): 5, target(2): 1, target(1, OTHER): 3}, {target(2): 2})
    assert tally.totals() == {AT: 7, OTHER: 3}
    tally.take({target(1): 1, target(2): 2})
    assert (tally.total(target(1)), tally.totals()[AT]) == (6, 8)


def test_who_comes_back_begins_again_unless_the_source_remembers() -> None:
    story: tuple[dict[Target, int], ...] = ({target(1): 5}, {}, {target(1): 7})
    assert after(*story).total(target(1)) == 12
    assert after(*story, remembers=True).total(target(1)) == 7


def test_real_servers_that_are_gone_are_summed_up_when_there_are_too_many() -> None:
    tally = after({target(n): n for n in range(1, 11)}, {target(10): 10}, {target(10): 11}, room=3)
    assert tally.totals() == {AT: sum(range(1, 10)) + 11}
    assert [tally.total(target(n)) for n in (1, 6, 7, 9)] == [0, 0, 7, 9]


@given(
    st.lists(st.dictionaries(st.integers(1, 6).map(target), st.integers(0, 50), max_size=6), max_size=30),
    st.sampled_from([0, 1, 3, 6]),
)
def test_sums_never_fall_and_hold_every_hit(readings: list[dict[Target, int]], room: int) -> None:
    """Against the definition: each counter adds what it grew by, and all of itself when it began again."""
    tally, seen, truth, before = Tally(room), dict[Target, int](), 0, 0
    for reading in readings:
        tally.take(reading)
        for each, value in reading.items():
            known = seen.get(each, 0)  # of the last reading: who comes back begins again
            truth += value - known if value >= known else value
        seen = reading
        total = tally.totals().get(AT, 0)
        assert total >= before
        before = total
        if room >= 6:
            assert total == truth
