"""The reconciler over the public fake: what it believes, what it retries, what it refuses to do."""

import errno
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dataplane.desired import Rules
from dataplane.model import Update
from dataplane.reconciler import Reconciler
from dataplane.testing import FakeBackend

from .words import at, endpoints, hostnames, name, server, service, shown, split, update, view

HOSTNAMES = at("TCP 10.0.1.175:80")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def start(backend: FakeBackend, first: Update, clock: Clock | None = None, **options: Any) -> Reconciler:
    reconciler = Reconciler(backend, Rules(drain_seconds=60), clock=clock or Clock(), **options)
    reconciler.take(first)
    backend.prepare()
    reconciler.observe()
    reconciler.sync("start")
    return reconciler


def change(reconciler: Reconciler, news: Update) -> str:
    return reconciler.sync("change", reconciler.take(news)).result


def test_a_second_sync_has_nothing_to_do() -> None:
    backend = FakeBackend()
    reconciler = start(backend, update(hostnames=hostnames("10.244.1.7")))
    assert [shown(one) for one in backend.servers.values()] == [
        "TCP 10.0.1.175:80 rr label=default/hostnames -> 10.244.1.7:9376 here"
    ]
    assert reconciler.sync("again").result == "unchanged"
    assert reconciler.verify("resync").result == "unchanged"
    assert len(backend.commits) == 1


def test_a_new_agent_adopts_and_writes_nothing() -> None:
    backend = FakeBackend()
    start(backend, update(hostnames=hostnames("10.244.1.7")))
    start(backend, update(hostnames=hostnames("10.244.1.7")))
    assert len(backend.commits) == 1


@pytest.mark.parametrize("answer", ["lost before", "lost after"])
def test_a_lost_answer_means_look_again(answer: str) -> None:
    backend = FakeBackend()
    reconciler = start(backend, update(hostnames=hostnames("10.244.1.7")))
    backend.answers = [answer]  # type: ignore[list-item]
    assert change(reconciler, update(hostnames=hostnames("10.244.2.3"))) == "committed"
    assert reconciler.held.servers == backend.servers
    assert [str(real) for real in backend.servers[HOSTNAMES].real_servers] == ["10.244.2.3:9376"]


def test_answers_that_never_come_end_a_sync_as_failed() -> None:
    backend = FakeBackend()
    backend.answers = ["lost before"] * 3
    reconciler = Reconciler(backend, Rules(), clock=Clock())
    reconciler.take(update(hostnames=hostnames("10.244.1.7")))
    report = reconciler.sync("start")
    assert report.result == "failed"
    assert reconciler.held.servers == {}
    assert reconciler.verify("retry").result == "committed"


def test_one_refused_object_harms_only_itself() -> None:
    backend = FakeBackend()
    backend.refused[HOSTNAMES] = errno.EINVAL
    web = view(service("default/web 10.0.0.1 :80/TCP"), endpoints("default/web", ":80/TCP", "10.1.0.1"))
    reconciler = start(backend, update(hostnames=hostnames("10.244.1.7"), web=web))
    assert list(backend.servers) == [at("TCP 10.0.0.1:80")]
    # nothing that only the refused one needed is left behind, and the numbers count what was done
    assert backend.vips == {at("TCP 10.0.0.1:80").address}
    assert reconciler.sync("again").result == "failed"
    assert [str(error) for error in reconciler.failing.values()] == [
        "add virtual server TCP 10.0.1.175:80: Invalid argument (EINVAL)"
    ]
    del backend.refused[HOSTNAMES]
    assert reconciler.verify("retry").result == "committed"
    assert reconciler.failing == {}
    assert HOSTNAMES in backend.servers


def test_a_surprise_is_looked_at_and_settled() -> None:
    backend = FakeBackend()
    reconciler = start(backend, update(hostnames=hostnames("10.244.1.7")))
    del backend.servers[HOSTNAMES]  # and nobody told us
    assert change(reconciler, update(hostnames=hostnames("10.244.2.3"))) == "committed"
    assert [str(real) for real in backend.servers[HOSTNAMES].real_servers] == ["10.244.2.3:9376"]


def test_damage_is_repaired_and_somebody_elses_server_left_alone() -> None:
    backend = FakeBackend()
    reconciler = start(backend, update(hostnames=hostnames("10.244.1.7")))
    foreign = server("TCP 192.0.2.1:80 rr -> 192.0.2.2:80")
    backend.meddle(lambda kernel: kernel.servers.clear())
    backend.meddle(lambda kernel: kernel.vips.clear())
    backend.servers[foreign.at] = foreign
    backend.foreign.add(foreign.at)
    # the fake shows foreign servers in its observation only by name
    backend.servers.pop(foreign.at)
    assert reconciler.verify("disturbed").result == "committed"
    assert list(backend.servers) == [HOSTNAMES]
    assert len(backend.vips) == 1


def test_a_taken_address_is_reported_and_not_touched() -> None:
    backend = FakeBackend()
    backend.foreign.add(HOSTNAMES)
    reconciler = Reconciler(backend, Rules(), clock=Clock())
    reconciler.take(update(hostnames=hostnames("10.244.1.7")))
    reconciler.observe()
    report = reconciler.sync("start")
    assert report.blocked == (HOSTNAMES,)
    assert backend.commits == []


def twenty(alive: int) -> Update:
    return Update(
        {
            name(f"default/s{i}"): view(service(f"default/s{i} 10.0.0.{i} :80/TCP")) if i <= alive else None
            for i in range(1, 21)
        }
    )


def test_a_mass_delete_is_held_back_until_it_is_released() -> None:
    backend = FakeBackend()
    reconciler = start(backend, twenty(20))
    report = reconciler.sync("change", reconciler.take(twenty(5)))
    assert (report.held_back, report.deletes, len(backend.servers)) == (15, 0, 20)
    assert reconciler.verify("resync").held_back == 15
    reconciler.release()
    assert reconciler.verify("released").result == "committed"
    assert len(backend.servers) == 5


def test_a_mass_delete_is_forgotten_when_the_source_changes_its_mind() -> None:
    backend = FakeBackend()
    reconciler = start(backend, twenty(20))
    reconciler.sync("change", reconciler.take(twenty(0)))
    report = reconciler.sync("change", reconciler.take(twenty(19)))
    assert (report.held_back, len(backend.servers)) == (0, 20)
    assert reconciler.verify("resync").held_back == 0
    assert len(backend.servers) == 19


def test_half_may_go_at_once_and_everything_when_told() -> None:
    backend = FakeBackend()
    reconciler = start(backend, twenty(20))
    reconciler.sync("change", reconciler.take(twenty(10)))
    assert len(backend.servers) == 10
    allowed = FakeBackend()
    reconciler = start(allowed, twenty(20), allow_mass_delete=True)
    reconciler.sync("change", reconciler.take(twenty(0)))
    assert allowed.servers == {}


real_servers = st.lists(
    st.builds(
        "10.244.{}.1:{}{}{}".format,
        st.integers(1, 4),
        st.integers(1, 2),
        st.sampled_from(["", "", " w0", " w2"]),
        st.sampled_from(["", "", "", " here"]),
    ),
    max_size=5,
    unique_by=lambda text: text.split()[0],
).map(", ".join)
settings = st.sampled_from(["rr", "rr", "rr", "wlc", "rr drop"])


@example([("rr", "10.244.1.1:1"), ("rr", "10.244.1.1:1 here"), ("rr", "")], False)
@example([("rr", "10.244.1.1:1"), ("rr", ""), ("rr", "10.244.1.1:1 w0")], True)
@given(st.lists(st.tuples(settings, real_servers), min_size=2, max_size=4), st.booleans())
def test_one_server_is_planned_as_among_many(states: list[tuple[str, str]], drains: bool) -> None:
    """There is a shorter way for one virtual server; it must lead to the same plan, and to the same drain clocks."""
    one, two = (Reconciler(FakeBackend(drains=drains), Rules(), clock=Clock()) for _ in range(2))
    for reconciler in (one, two):
        reconciler.desired.servers[HOSTNAMES] = server("TCP 10.0.1.175:80 {} -> {}".format(*states[0]))
        reconciler.held.apply(reconciler.plan())
    for words, reals in states[1:]:
        plans = []
        for reconciler, only in ((one, {HOSTNAMES}), (two, None)):
            reconciler.desired.servers[HOSTNAMES] = server(f"TCP 10.0.1.175:80 {words} -> {reals}")
            plan = reconciler.plan(only)
            plans.append(
                [
                    sorted(map(shown, plan.add)),
                    [(shown(each.new), each.server, *map(sorted, each.reals())) for each in plan.change],
                    plan.remove,
                    *(set(part) for part in (plan.bind, plan.unbind, plan.hairpin_add, plan.hairpin_remove)),
                    bool(plan),
                ]
            )
            reconciler.held.apply(plan)
        assert plans[0] == plans[1]
        assert one.drains.deadlines == two.drains.deadlines
        assert one.held.servers == two.held.servers


def draining() -> tuple[FakeBackend, Reconciler, Clock]:
    backend, clock = FakeBackend(drains=True), Clock()
    reconciler = start(backend, update(hostnames=hostnames("10.244.1.7", "10.244.2.3")), clock)
    backend.connections[HOSTNAMES, *split("10.244.2.3:9376")] = 1
    change(reconciler, update(hostnames=hostnames("10.244.1.7")))
    return backend, reconciler, clock


def weights(backend: FakeBackend) -> dict[str, int]:
    return {str(one): one.weight for one in backend.servers[HOSTNAMES].real_servers}


def test_a_removed_endpoint_drains_until_its_connections_end() -> None:
    backend, reconciler, _ = draining()
    assert weights(backend) == {"10.244.1.7:9376": 1, "10.244.2.3:9376": 0}
    assert reconciler.draining_pass() is None
    backend.connections.clear()
    report = reconciler.draining_pass()
    assert report is not None
    assert report.deletes == 2  # the real server, and its leave to meet itself
    assert weights(backend) == {"10.244.1.7:9376": 1}
    assert backend.kept == {}


def test_a_removed_endpoint_drains_until_its_deadline() -> None:
    backend, reconciler, clock = draining()
    clock.now = 60
    assert reconciler.draining_pass() is not None
    assert weights(backend) == {"10.244.1.7:9376": 1}


def test_draining_survives_a_restart_with_its_clock() -> None:
    backend, _, _ = draining()
    (key,) = backend.kept
    backend.kept[key] = 20
    clock = Clock()
    clock.now = 1000
    reconciler = start(backend, update(hostnames=hostnames("10.244.1.7")), clock)
    assert weights(backend) == {"10.244.1.7:9376": 1, "10.244.2.3:9376": 0}
    assert reconciler.drains.deadlines == {key: 1020}


def test_an_endpoint_that_returns_is_revived() -> None:
    backend, reconciler, _ = draining()
    change(reconciler, update(hostnames=hostnames("10.244.1.7", "10.244.2.3")))
    assert weights(backend) == {"10.244.1.7:9376": 1, "10.244.2.3:9376": 1}
    assert backend.kept == {}


def test_a_removed_service_keeps_its_vip_while_it_drains() -> None:
    backend, reconciler, _ = draining()
    change(reconciler, update(hostnames=None))
    assert weights(backend) == {"10.244.1.7:9376": 0, "10.244.2.3:9376": 0}
    assert len(backend.vips) == 1
    backend.connections.clear()
    reconciler.draining_pass()
    assert (backend.servers, backend.vips) == ({}, set())


def test_what_a_faulty_input_lacks_at_start_is_kept_until_the_input_is_whole() -> None:
    backend = FakeBackend()
    start(backend, twenty(3))
    reconciler = Reconciler(backend, Rules(), clock=Clock())
    reconciler.take(twenty(1))
    reconciler.observe()
    reconciler.keep_unexplained(input_is_whole=False)
    assert reconciler.sync("start").deletes == 0
    assert len(backend.servers) == 3
    reconciler.keep_unexplained(input_is_whole=True)
    assert reconciler.sync("input is whole").result == "committed"
    assert len(backend.servers) == 1


def test_affinity_that_a_mode_remembers_for_each_address_is_told_once_with_the_services_name() -> None:
    backend = FakeBackend()
    backend.shares_affinity = False
    plain = hostnames("10.244.1.7", affinity_seconds=60)
    reconciler = start(backend, update(hostnames=plain))
    assert reconciler.remarks() == ()  # one address
    public = hostnames("10.244.1.7", affinity_seconds=60, external_ips=(split("203.0.113.9:1")[0],))
    change(reconciler, update(hostnames=public))
    (remark,) = reconciler.remarks()
    assert remark.startswith("fake mode remembers a client's endpoint (sessionAffinity) for each address")
    assert remark.endswith(": default/hostnames")
    change(reconciler, update(hostnames=public))
    assert reconciler.remarks() == ()
    change(reconciler, update(hostnames=plain))
    backend.shares_affinity = True
    change(reconciler, update(hostnames=public))
    assert reconciler.remarks() == ()
