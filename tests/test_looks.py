"""Looks: whose numbers they are, which virtual server a hit stands at, how often the kernel is read, and rates."""

from collections.abc import Collection, Iterable, Iterator, Mapping

import pytest
from msgspec.structs import replace

from dataplane.backend import RealCounters, ServerReport
from dataplane.counters import Way
from dataplane.desired import Rules
from dataplane.looks import Looks
from dataplane.model import VirtualAddress, parse_address
from dataplane.plan import diff
from dataplane.reconciler import Reconciler
from dataplane.rows import Counts, Look, with_rates
from dataplane.testing import FakeBackend

from . import words

WEB = words.server("TCP 10.0.0.1:80 rr label=a/web -> 10.1.0.1:80, 10.1.0.2:80")
POOL = {each: parse_address(each) for each in ("10.0.0.1", "10.1.0.1", "10.1.0.2", "10.1.0.3")}


class Kernel(FakeBackend):
    """A fake whose real servers have counters."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[tuple[str, str], int] = {}
        self.reads = 0
        self.prepare()

    def report(self) -> Iterator[ServerReport]:
        self.reads += 1
        for report in super().report():
            vip = str(report.server.at)
            reals = tuple((real, RealCounters(0, 0, self.counts.get((vip, str(real)), 0))) for real, _ in report.reals)
            yield report._replace(reals=reals)


class FakeProbe:
    hooks = ("fexit:fake",)

    def __init__(self) -> None:
        self.hits: dict[Way, int] = {}
        self.lost: dict[str, int] = {"full": 0}
        self.expected: set[VirtualAddress] = set()
        self.closed = False
        self.modes = {"fake"}
        self.kept: set[Way] = set()
        self.sound = True

    def expect(self, addresses: Iterable[VirtualAddress]) -> None:
        self.expected.update(addresses)

    def forget(self, addresses: Iterable[VirtualAddress]) -> None:
        self.expected.difference_update(addresses)

    def read(self) -> Mapping[Way, int]:
        return self.hits

    def missed(self) -> dict[str, int]:
        return self.lost

    def counts(self, mode: str) -> bool:
        return mode in self.modes

    def retire(self, keep: Collection[Way]) -> None:
        self.kept = set(keep)

    def check(self) -> bool:
        return self.sound

    def close(self) -> None:
        self.closed = True


def kernel(*servers: str) -> Kernel:
    made = Kernel()
    wanted = [words.server(each) for each in servers]
    made.commit(made.compile(diff(made.observe(), {server.at: server for server in wanted})))
    return made


def hits(look: Look) -> dict[str, dict[str, int | None]]:
    return {
        f"{row.vip}{' inside' if row.inside else ''}": {real.endpoint: real.hits for real in row.real_servers}
        for row in look.services
    }


LINE = "TCP 10.0.0.1:80 rr label=a/web -> 10.1.0.1:80, 10.1.0.2:80"


def test_without_a_probe_the_modes_own_counters_count_and_never_fall() -> None:
    fake = kernel(LINE)
    looks = Looks(fake, dict)
    looks.no_probe = "kernel too old"
    fake.counts["TCP 10.0.0.1:80", "10.1.0.1:80"] = 6
    fake.counts["TCP 10.0.0.1:80", "10.1.0.2:80"] = 2
    look = looks.look()
    assert hits(look) == {"10.0.0.1:80/TCP": {"10.1.0.1:80": 6, "10.1.0.2:80": 2}}
    assert [real.share for real in look.services[0].real_servers] == [0.75, 0.25]
    assert str(look.counts) == "fake mode's own counters (kernel too old)"
    fake.counts["TCP 10.0.0.1:80", "10.1.0.1:80"] = 1
    look = looks.look()
    assert hits(look) == {"10.0.0.1:80/TCP": {"10.1.0.1:80": 7, "10.1.0.2:80": 2}}
    assert look.services[0].hits == 9


def test_with_a_probe_it_counts_and_what_it_missed_is_told() -> None:
    fake, probe = kernel(LINE), FakeProbe()
    looks = Looks(fake, dict)
    looks.use(probe, fake.servers)
    fake.counts["TCP 10.0.0.1:80", "10.1.0.1:80"] = 99
    probe.hits[6, POOL["10.0.0.1"], 80, POOL["10.1.0.1"], 80] = 4
    probe.hits[6, POOL["10.0.0.1"], 80, POOL["10.1.0.3"], 80] = 3
    probe.lost["full"] = 2
    look = looks.look()
    assert hits(look) == {"10.0.0.1:80/TCP": {"10.1.0.1:80": 4, "10.1.0.2:80": 0}}
    assert (look.services[0].hits, look.services[0].real_servers[0].connections) == (7, 99)
    assert str(look.counts) == "probe (fexit:fake), missed 2 (full 2)"
    looks.give_up_probe("gone")
    assert probe.closed
    assert looks.look().counts == Counts("fake", reason="gone")


def test_a_hit_stands_at_one_virtual_server_only() -> None:
    fake, probe = (
        kernel(
            "TCP 10.0.0.1:80 rr LoadBalancer node label=a/b -> 10.1.0.1:80",
            "TCP 10.0.0.1:80 (inside) rr LoadBalancer node label=a/b -> 10.1.0.1:80, 10.1.0.2:80",
        ),
        FakeProbe(),
    )
    looks = Looks(fake, dict, lambda: fake.servers)
    looks.use(probe, fake.servers)
    probe.hits = {(6, POOL["10.0.0.1"], 80, POOL[f"10.1.0.{n}"], 80): n for n in (1, 2, 3)}
    look = looks.look()
    assert hits(look) == {
        "10.0.0.1:80/TCP": {"10.1.0.1:80": 1},
        "10.0.0.1:80/TCP inside": {"10.1.0.1:80": 0, "10.1.0.2:80": 2},
    }
    assert [row.hits for row in look.services] == [4, 2]


def test_looking_takes_a_twentieth_of_the_time_at_most() -> None:
    now = 100.0
    fake = kernel(LINE)
    looks = Looks(fake, dict, clock=lambda: now)
    plain = fake.report

    def slow() -> Iterator[ServerReport]:
        nonlocal now
        now += 0.5
        return plain()

    fake.report = slow  # type: ignore[method-assign]
    for second in range(100):
        now = max(now, 100.0 + second)
        assert Look.from_json(looks.answer()).services[0].vip == "10.0.0.1:80/TCP"
    assert fake.reads == 10


def test_the_probe_knows_an_address_before_the_kernel_has_it_and_until_it_is_gone() -> None:
    fake, probe = Kernel(), FakeProbe()
    reconciler = Reconciler(fake, Rules())
    looks = reconciler.audience = Looks(fake, dict)
    looks.use(probe, ())
    order: list[tuple[bool, bool]] = []
    plain = fake.commit

    def commit(transaction: object) -> object:
        outcome = plain(transaction)  # type: ignore[arg-type]
        order.append((WEB.at in probe.expected, WEB.at in fake.servers))
        return outcome

    fake.commit = commit  # type: ignore[method-assign, assignment]
    reconciler.desired.servers[WEB.at] = WEB
    reconciler.sync("test")
    assert (order, probe.expected) == ([(True, True)], {WEB.at})
    del reconciler.desired.servers[WEB.at]
    reconciler.sync("test")
    assert (order[1:], probe.expected) == ([(True, False)], set())


def test_an_address_that_was_refused_is_no_longer_expected() -> None:
    fake, probe = Kernel(), FakeProbe()
    fake.refused[WEB.at] = 22
    reconciler = Reconciler(fake, Rules())
    looks = reconciler.audience = Looks(fake, dict)
    looks.use(probe, ())
    reconciler.desired.servers[WEB.at] = WEB
    assert reconciler.sync("test").failed
    assert probe.expected == set()


@pytest.mark.parametrize(("later", "rates"), [(3.0, [(4.0, 3.0), (1.0, 1.0)]), (1.0, [(None, None)] * 2)])
def test_rates_are_between_two_looks(later: float, rates: list[tuple[float | None, float | None]]) -> None:
    fake = kernel(LINE, "TCP 10.0.0.9:80 rr label=b/new -> 10.1.0.9:80")
    fake.counts["TCP 10.0.0.1:80", "10.1.0.1:80"] = 10
    looks = Looks(fake, dict)
    first = looks.look()
    fake.counts |= {("TCP 10.0.0.1:80", "10.1.0.1:80"): 16, ("TCP 10.0.0.1:80", "10.1.0.2:80"): 2}
    fake.counts["TCP 10.0.0.9:80", "10.1.0.9:80"] = 2
    second = with_rates(replace(looks.look(), at=later), replace(first, at=1.0))
    assert [(row.rate, row.real_servers[0].rate) for row in second.services] == rates


def test_a_look_travels_as_json() -> None:
    fake = kernel(LINE)
    look = Looks(fake, dict).look()
    assert Look.from_json(look.to_json()) == look


def test_a_probe_that_does_not_count_this_mode_is_not_used() -> None:
    fake, probe = kernel(LINE), FakeProbe()
    probe.modes = {"other"}
    looks = Looks(fake, dict)
    looks.use(probe, fake.servers)
    assert (probe.closed, str(looks.counts)) == (True, "fake mode's own counters (attached to fexit:fake only)")


def test_room_is_given_back_of_what_no_virtual_server_has_and_totals_stay() -> None:
    fake, probe = kernel(LINE), FakeProbe()
    looks = Looks(fake, dict)
    looks.use(probe, fake.servers)
    gone: Way = (6, POOL["10.0.0.1"], 80, POOL["10.1.0.3"], 80)
    probe.hits[gone] = 3
    assert looks.look().services[0].hits == 3
    assert looks.check(fake.servers.values())
    assert probe.kept == {(6, POOL["10.0.0.1"], 80, POOL[f"10.1.0.{n}"], 80) for n in (1, 2)}
    del probe.hits[gone]
    assert looks.look().services[0].hits == 3


def test_a_kernel_that_refuses_to_watch_an_address_does_not_stop_its_programming() -> None:
    fake, probe = Kernel(), FakeProbe()

    def refuse(addresses: Iterable[VirtualAddress]) -> None:
        raise OSError(12, "Cannot allocate memory")

    reconciler = Reconciler(fake, Rules())
    looks = reconciler.audience = Looks(fake, dict)
    looks.use(probe, ())
    probe.expect = refuse  # type: ignore[method-assign]
    reconciler.desired.servers[WEB.at] = WEB
    assert reconciler.sync("test").result == "committed"
    assert str(looks.counts) == "fake mode's own counters ([Errno 12] Cannot allocate memory)"
