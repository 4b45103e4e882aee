"""drain.py: what stays with weight 0, for how long, and what comes back."""

from dataplane.drain import DrainKey, Drains
from dataplane.model import VirtualServer

from .words import at, server, shown, split

KEY = at("TCP 10.0.0.1:80")
TWO = "TCP 10.0.0.1:80 rr -> 10.1.0.1:80, 10.1.0.2:80"
ONE = "TCP 10.0.0.1:80 rr -> 10.1.0.1:80"
LEAVING = DrainKey(KEY, *split("10.1.0.2:80"))


def retain(drains: Drains, wanted: str | None, held: str | None, seconds: int = 60, now: float = 0) -> str | None:
    key = at(" ".join((wanted or held or "").split()[:2]))
    kept = drains.retain(key, server(wanted) if wanted else None, server(held) if held else None, seconds, now)
    return shown(kept) if isinstance(kept, VirtualServer) else None


def test_a_real_server_that_is_no_longer_wanted_stays_with_weight_0() -> None:
    drains = Drains()
    assert retain(drains, ONE, TWO) == "TCP 10.0.0.1:80 rr -> 10.1.0.1:80, 10.1.0.2:80 w0"
    assert drains.deadlines == {LEAVING: 60}


def test_the_clock_runs_from_the_first_look_and_not_from_the_last() -> None:
    drains = Drains()
    retain(drains, ONE, TWO, now=0)
    assert retain(drains, ONE, TWO, now=59) == "TCP 10.0.0.1:80 rr -> 10.1.0.1:80, 10.1.0.2:80 w0"
    assert drains.expired(59) == []
    assert drains.expired(60) == [LEAVING]
    assert retain(drains, ONE, TWO, now=60) == ONE
    assert drains.deadlines == {}


def test_it_goes_when_its_connections_have_ended() -> None:
    drains = Drains()
    retain(drains, ONE, TWO)
    drains.finish(LEAVING)
    assert retain(drains, ONE, TWO) == ONE


def test_it_is_revived_when_it_is_wanted_again() -> None:
    drains = Drains()
    retain(drains, ONE, TWO)
    assert retain(drains, TWO, "TCP 10.0.0.1:80 rr -> 10.1.0.1:80, 10.1.0.2:80 w0") == TWO
    assert drains.deadlines == {}


def test_udp_goes_at_once() -> None:
    assert retain(Drains(), "UDP 10.0.0.1:53 rr", "UDP 10.0.0.1:53 rr -> 10.1.0.1:53") == "UDP 10.0.0.1:53 rr"


def test_sctp_drains_as_tcp_does() -> None:
    held = "SCTP 10.0.0.1:53 rr -> 10.1.0.1:53"
    assert retain(Drains(), "SCTP 10.0.0.1:53 rr", held) == "SCTP 10.0.0.1:53 rr -> 10.1.0.1:53 w0"


def test_no_time_to_drain_means_at_once() -> None:
    assert retain(Drains(), ONE, TWO, seconds=0) == ONE


def test_a_whole_server_stays_as_long_as_something_of_it_drains() -> None:
    drains = Drains()
    assert retain(drains, None, ONE) == "TCP 10.0.0.1:80 rr -> 10.1.0.1:80 w0"
    drains.finish(DrainKey(KEY, *split("10.1.0.1:80")))
    assert retain(drains, None, "TCP 10.0.0.1:80 rr -> 10.1.0.1:80 w0") is None


def test_an_earlier_agents_clock_goes_on() -> None:
    drains = Drains()
    drains.restore(LEAVING, 10, now=100)
    assert drains.next_deadline() == 110
    held = "TCP 10.0.0.1:80 rr -> 10.1.0.1:80, 10.1.0.2:80 w0"
    assert retain(drains, ONE, held, now=109) == held
    assert retain(drains, ONE, held, now=110) == ONE


def test_weight_0_by_wish_is_no_drain() -> None:
    drains = Drains()
    quiet = "TCP 10.0.0.1:80 rr -> 10.1.0.1:80 w0"
    assert retain(drains, quiet, ONE) == quiet
    assert drains.deadlines == {}


def test_how_drains_have_ended_is_counted() -> None:
    drains = Drains()
    retain(drains, ONE, TWO, now=0)
    drains.finish(LEAVING)
    retain(drains, ONE, TWO, now=1)
    retain(drains, ONE, TWO, now=2)  # begins again
    retain(drains, ONE, TWO, now=62)
    retain(drains, ONE, TWO, now=63)
    retain(drains, TWO, TWO, now=64)  # revived: has not ended
    assert (drains.completed, drains.cut_short) == (1, 1)
