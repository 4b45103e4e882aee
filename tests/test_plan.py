"""plan.py: the difference, as a table; and that applying it gives what was wanted (hypothesis)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.model import VirtualServer, format_address
from dataplane.plan import Plan, State, diff

from .words import at, server, shown

A1 = "TCP 10.0.0.1:80 rr -> 10.1.0.1:8080"
A2 = "TCP 10.0.0.1:80 rr -> 10.1.0.1:8080, 10.1.0.2:8080"
B = "UDP 10.0.0.1:53 rr -> 10.1.0.3:53"
HERE = "TCP 10.0.0.1:80 rr -> 10.1.0.1:8080 here"


def told(plan: Plan) -> list[str]:
    """A plan in words."""
    lines = [f"add {shown(one)}" for one in plan.add]
    lines += [f"change {change.old.at} to {shown(change.new)}" for change in plan.change]
    lines += [f"remove {one.at}" for one in plan.remove]
    for verb in ("bind", "unbind", "hairpin_add", "hairpin_remove"):
        lines += [f"{verb} {format_address(address)}" for address in getattr(plan, verb)]
    lines += [f"blocked {key}" for key in plan.blocked]
    return sorted(lines)


def holding(*lines: str) -> State:
    """A state in which everything the servers need is in place."""
    state = State(map(server, lines))
    vips, hairpins = state.needs()
    state.vips, state.hairpins = set(vips), set(hairpins)
    return state


CASES: dict[str, tuple[list[str], list[str], list[str]]] = {
    "nothing to nothing": ([], [], []),
    "the same": ([A1, B], [A1, B], []),
    "a new server brings its VIP": ([], [A1], [f"add {A1}", "bind 10.0.0.1"]),
    "a second port needs no second VIP": ([A1], [A1, B], [f"add {B}"]),
    "the last port takes the VIP with it": ([A1], [], ["remove TCP 10.0.0.1:80", "unbind 10.0.0.1"]),
    "not the last port": ([A1, B], [B], ["remove TCP 10.0.0.1:80"]),
    "one more real server": ([A1], [A2], [f"change TCP 10.0.0.1:80 to {A2}"]),
    "an endpoint of this node may meet itself": (
        [],
        [HERE],
        [f"add {HERE}", "bind 10.0.0.1", "hairpin_add 10.1.0.1"],
    ),
    "only where it runs differs": ([A1], [HERE], [f"change TCP 10.0.0.1:80 to {HERE}", "hairpin_add 10.1.0.1"]),
    "it stays for the other server that has it": (
        [HERE, "TCP 10.0.0.2:80 rr -> 10.1.0.1:8080 here"],
        [HERE],
        ["remove TCP 10.0.0.2:80", "unbind 10.0.0.2"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_diff(case: str) -> None:
    held, wanted, expected = CASES[case]
    plan = diff(holding(*held), {one.at: one for one in map(server, wanted)})
    assert told(plan) == sorted(expected)
    assert bool(plan) == bool(expected)


@pytest.mark.parametrize("case", CASES)
def test_diff_of_the_changed_part_is_the_same(case: str) -> None:
    held, wanted, expected = CASES[case]
    state, aim = holding(*held), {one.at: one for one in map(server, wanted)}
    assert told(diff(state, aim, only=state.servers.keys() | aim.keys())) == sorted(expected)


def test_a_lost_vip_comes_back_by_itself_and_with_its_servers_next_change() -> None:
    state = holding(A1)
    state.vips.clear()
    wanted = {at("TCP 10.0.0.1:80"): server(A1)}
    assert told(diff(state, wanted)) == ["bind 10.0.0.1"]
    assert told(diff(state, wanted, only=wanted.keys())) == ["bind 10.0.0.1"]


def test_a_half_bound_vip_is_bound_again_or_taken_away() -> None:
    wanted = {at("TCP 10.0.0.1:80"): server(A1)}
    state = holding(A1)
    state.partial = set(state.vips)
    assert told(diff(state, wanted)) == ["bind 10.0.0.1"]
    stray = State(vips=state.vips, partial=state.vips)
    assert told(diff(stray, {})) == ["unbind 10.0.0.1"]


def test_what_no_server_needs_goes_in_a_full_diff() -> None:
    state = holding(A1)
    state.vips.add(server("TCP 10.9.9.9:1 rr").at.address)
    wanted = {at("TCP 10.0.0.1:80"): server(A1)}
    assert told(diff(state, wanted)) == ["unbind 10.9.9.9"]
    assert told(diff(state, wanted, only=wanted.keys())) == []


def test_somebody_elses_server_is_never_touched() -> None:
    state = State(foreign=[at("TCP 10.0.0.1:80")])
    plan = diff(state, {at("TCP 10.0.0.1:80"): server(A1)})
    assert told(plan) == ["blocked TCP 10.0.0.1:80"]
    assert not plan


def test_an_entry_in_our_books_without_a_server_is_struck_out_or_filled() -> None:
    ghost = State(ghosts=[at("TCP 10.0.0.1:80")])
    assert told(diff(ghost, {})) == ["remove TCP 10.0.0.1:80"]
    assert told(diff(ghost, {at("TCP 10.0.0.1:80"): server(A1)})) == [f"add {A1}", "bind 10.0.0.1"]


def test_a_server_that_is_probably_ours_is_taken_over_if_wanted_and_never_removed() -> None:
    state = State(vips=[server(A1).at.address])
    state.adoptable = {at("TCP 10.0.0.1:80"): server(A1), at("TCP 10.0.0.1:81"): server("TCP 10.0.0.1:81 rr")}
    wanted = {at("TCP 10.0.0.1:80"): server(A2)}
    plan = diff(state, wanted)
    assert told(plan) == [f"change TCP 10.0.0.1:80 to {A2}"]
    state.apply(plan)
    assert list(state.servers) == [at("TCP 10.0.0.1:80")]
    assert list(state.adoptable) == [at("TCP 10.0.0.1:81")]
    assert not diff(state, wanted)


def test_the_parts_of_a_change() -> None:
    held = "TCP 10.0.0.1:80 rr -> 10.1.0.1:8080, 10.1.0.2:8080, 10.1.0.3:8080"
    wanted = "TCP 10.0.0.1:80 wlc -> 10.1.0.1:8080, 10.1.0.2:8080 w5, 10.1.0.4:8080"
    (change,) = diff(holding(held), {at("TCP 10.0.0.1:80"): server(wanted)}).change
    add, edit, remove = change.reals()
    assert change.edited()
    assert [str(one) for one in add] == ["10.1.0.4:8080"]
    assert [(str(one), one.weight) for one in edit] == [("10.1.0.2:8080", 5)]
    assert [str(one) for one in remove] == ["10.1.0.3:8080"]


reals = st.lists(
    st.builds(
        "10.1.0.{}:{}{}{}".format,
        st.integers(1, 3),
        st.integers(1, 2),
        st.sampled_from(["", " w0", " w2"]),
        st.sampled_from(["", " here"]),
    ),
    max_size=3,
    unique_by=lambda text: text.split()[0],
)
servers = st.lists(
    st.builds(
        lambda vip, port, word, backends: server(f"TCP 10.0.0.{vip}:{port} {word} -> {', '.join(backends)}"),
        st.integers(1, 3),
        st.integers(1, 3),
        st.sampled_from(["rr", "wlc sticky=300", "rr drop", "rr label=a/b"]),
        reals,
    ),
    max_size=5,
    unique_by=lambda one: one.at,
)


@given(servers, servers)
def test_applying_the_plan_gives_what_was_wanted(before: list[VirtualServer], after: list[VirtualServer]) -> None:
    state = holding(*map(shown, before))
    wanted = {one.at: one for one in after}
    state.apply(diff(state, wanted))
    for one in after:
        state.put(one)  # where a real server runs is not worth a change of its own
    assert state.servers == wanted
    assert state.vips == set(state.needs()[0])
    assert state.hairpins == set(state.needs()[1])
    assert not diff(state, wanted)


@given(servers, servers)
def test_piece_by_piece_ends_where_all_at_once_does(before: list[VirtualServer], after: list[VirtualServer]) -> None:
    whole, pieces = holding(*map(shown, before)), holding(*map(shown, before))
    wanted = {one.at: one for one in after}
    whole.apply(diff(whole, wanted))
    for key in sorted(pieces.servers.keys() | wanted.keys()):
        pieces.apply(diff(pieces, wanted, only=[key]))
    assert (pieces.servers, pieces.vips, pieces.hairpins) == (whole.servers, whole.vips, whole.hairpins)
