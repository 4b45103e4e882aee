"""Totals never fall, whatever the counters under them do, and nothing that was counted is lost."""

from hypothesis import given
from hypothesis import strategies as st

from dataplane.counters import RealServerAt, Tally
from dataplane.model import VirtualAddress, parse_address

AT = VirtualAddress(6, parse_address("10.0.1.175"), 80)
OTHER = VirtualAddress(6, parse_address("10.0.1.176"), 80)
Reading = dict[int, int]
"""Counters by the last number of a real server's address."""


def named(reading: Reading) -> dict[RealServerAt, int]:
    return {(parse_address(f"10.1.0.{number}"), 80): value for number, value in reading.items()}


def after(*readings: Reading, room: int = 100, remembers: bool = False) -> tuple[Reading, int]:
    """Totals after the last of some readings: of who is here, and of all."""
    tally = Tally(room, remembers=remembers)
    for reading in readings:
        here, total = tally.take(AT, named(reading))
    return {address[-1]: value for (address, _), value in here.items()}, total


def test_a_total_is_what_the_source_says() -> None:
    assert after({1: 5, 2: 7}) == ({1: 5, 2: 7}, 12)


def test_a_counter_that_begins_again_adds_to_what_it_was() -> None:
    assert after({1: 5}, {1: 2}, {1: 4}, {1: 0}) == ({1: 9}, 9)


def test_a_virtual_server_keeps_the_hits_of_real_servers_that_are_gone() -> None:
    assert after({1: 5, 2: 1}, {2: 2}) == ({2: 2}, 7)
    assert after({1: 5, 2: 1}, {2: 2}, {1: 1, 2: 2}) == ({1: 6, 2: 2}, 8)


def test_who_comes_back_begins_again_unless_the_source_remembers() -> None:
    assert after({1: 5}, {}, {1: 7}) == ({1: 12}, 12)
    assert after({1: 5}, {}, {1: 7}, remembers=True) == ({1: 7}, 7)


def test_real_servers_that_are_gone_are_summed_up_when_there_are_too_many() -> None:
    many = {number: number for number in range(1, 11)}
    assert after(many, {10: 10}, {10: 11}, room=3) == ({10: 11}, sum(range(1, 10)) + 11)
    assert after(many, {10: 10}, {10: 11, 9: 1, 1: 1}, room=3) == ({10: 11, 9: 10, 1: 1}, sum(range(1, 10)) + 13)


def test_a_virtual_server_that_comes_back_goes_on_and_others_are_not_concerned() -> None:
    tally = Tally()
    tally.take(AT, named({1: 5}))
    tally.take(OTHER, named({1: 3}))
    tally.forget(AT)
    assert tally.take(OTHER, named({1: 4}))[1] == 4
    assert tally.take(AT, named({2: 1}))[1] == 6


@given(
    st.lists(st.dictionaries(st.integers(1, 6), st.integers(0, 50), max_size=6), max_size=30),
    st.sampled_from([0, 1, 3, 6]),
)
def test_sums_never_fall_and_hold_every_hit(readings: list[Reading], room: int) -> None:
    """Against the definition: each counter adds what it grew by, and all of itself when it began again."""
    tally = Tally(room)
    seen, truth, before = dict[int, int](), 0, 0
    for reading in readings:
        _, total = tally.take(AT, named(reading))
        for number, value in reading.items():
            known = seen.get(number, 0)  # of the last reading: who comes back begins again
            truth += value - known if value >= known else value
        seen = reading
        assert total >= before
        assert total == truth
        before = total
