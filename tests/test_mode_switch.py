"""The switch of modes over the public fake: in which order, what waits for what, and what a crash in between leaves."""

import errno
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from dataplane import mode_switch, procfs_sockets
from dataplane.backend import Backend
from dataplane.desired import Rules
from dataplane.errors import KernelError, PreflightError
from dataplane.mode_switch import ModeSwitch, leftovers
from dataplane.model import Update, parse_address
from dataplane.plan import State
from dataplane.procfs_sockets import connected_from
from dataplane.reconciler import Reconciler
from dataplane.testing import FakeBackend

from .words import at, endpoints, hostnames, name, service, shown, split, update, view

HOSTNAMES, WEB, DNS = at("TCP 10.0.1.175:80"), at("TCP 10.0.0.1:80"), at("UDP 10.0.0.10:53")
TWO = update(
    hostnames=hostnames("10.244.1.7"),
    web=view(service("default/web 10.0.0.1 :80/TCP"), endpoints("default/web", ":80/TCP", "10.1.0.1")),
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Node:
    """One "kernel" with its modes, and the agents that come and go."""

    def __init__(self, *, old_drains: bool = False) -> None:
        self.clock = Clock()
        self.sysctls = {"net.ipv4.ip_forward": 0, "net.ipv4.vs.conntrack": 0}
        self.modes = {"old": FakeBackend(drains=old_drains), "new": FakeBackend()}
        self.told: list[str] = []
        for mode, backend in self.modes.items():
            backend.mode = mode
            backend.sysctls = self.sysctls
            backend.wants = {"net.ipv4.ip_forward": 1}
        self.modes["old"].wants = {"net.ipv4.ip_forward": 1, "net.ipv4.vs.conntrack": 1}

    def tell(self, step: str, *, warning: bool = False, **fields: object) -> None:
        self.told.append(" ".join([step, *map(str, fields.values())]))

    def agent(
        self, mode: str, news: Update, *, whole: bool = True, allow_mass_delete: bool = False
    ) -> tuple[Reconciler, ModeSwitch]:
        """Start an agent, up to the step behind its first sync."""
        reconciler = Reconciler(self.modes[mode], Rules(drain_seconds=60), clock=self.clock)
        reconciler.take(news)
        others = [each for each in self.modes if each != mode]
        switch = ModeSwitch(
            reconciler,
            others,
            self.modes.__getitem__,
            self.tell,
            drain_seconds=60,
            allow_mass_delete=allow_mass_delete,
            clock=self.clock,
        )
        reconciler.backend.prepare(switch.look())
        reconciler.observe()
        reconciler.keep_unexplained(input_is_whole=whole)
        reconciler.sync("start")
        switch.step(input_is_whole=whole)
        return reconciler, switch

    def held(self, mode: str) -> list[str]:
        return [shown(one).split(" rr ")[0] for one in self.modes[mode].servers.values()]

    def later(self, switch: ModeSwitch, seconds: float = 100, *, whole: bool = True) -> None:
        self.clock.now += seconds
        switch.step(input_is_whole=whole)


@pytest.fixture
def node() -> Node:
    made = Node()
    made.agent("old", TWO)
    return made


@pytest.fixture(autouse=True)
def _no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mode_switch, "connected_from", set)


def test_an_agent_alone_with_its_mode_does_nothing(node: Node) -> None:
    _, switch = node.agent("old", TWO)
    assert (switch.leaving, switch.stuck, node.told) == ([], False, [])


def test_the_new_mode_holds_everything_before_the_old_one_goes(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    remove = node.modes["old"].remove

    def watched(leave: object = ()) -> None:
        seen.append(len(node.modes["new"].servers))
        remove(leave)  # type: ignore[arg-type]

    monkeypatch.setattr(node.modes["old"], "remove", watched)
    _, switch = node.agent("new", TWO)
    assert seen == [2]
    assert (node.held("old"), len(node.held("new")), switch.leaving) == ([], 2, [])
    assert not node.modes["old"].present()
    assert node.told == ["found old new", "programmed and verified new 2", "removed old"]


def test_settings_from_before_the_first_mode_outlive_the_switch(node: Node) -> None:
    node.agent("new", TWO)
    assert node.sysctls == {"net.ipv4.ip_forward": 1, "net.ipv4.vs.conntrack": 0}
    assert node.modes["new"].settings() == {"net.ipv4.ip_forward": 0}
    node.modes["new"].remove()
    assert node.sysctls == {"net.ipv4.ip_forward": 0, "net.ipv4.vs.conntrack": 0}


def test_what_the_new_mode_cannot_have_stays_in_the_old_one_until_it_can(node: Node) -> None:
    node.modes["new"].refused[WEB] = errno.EINVAL
    reconciler, switch = node.agent("new", TWO)
    assert list(node.modes["old"].servers) == [WEB]
    assert switch.stuck
    assert list(map(str, switch.leaving)) == ["old: 1 virtual server kept"]
    for _ in range(3):
        node.later(switch)
    assert node.told[1:] == ["kept old 1 not programmed in the new mode"]
    node.modes["new"].refused.clear()
    reconciler.verify("retry")
    node.later(switch)
    assert (switch.leaving, switch.stuck, node.held("old")) == ([], False, [])


def test_a_new_mode_that_lost_something_behind_our_back_is_repaired_first(node: Node) -> None:
    reconciler = Reconciler(node.modes["new"], Rules(), clock=node.clock)
    reconciler.take(TWO)
    switch = ModeSwitch(reconciler, ["old"], node.modes.__getitem__, node.tell, clock=node.clock)
    reconciler.backend.prepare(switch.look())
    reconciler.sync("start")
    node.modes["new"].servers.clear()
    switch.step(input_is_whole=True)
    assert len(node.held("new")) == 2
    assert not node.modes["old"].present()


def test_what_a_faulty_input_lacks_stays_in_the_old_mode(node: Node) -> None:
    _, switch = node.agent("new", update(hostnames=hostnames("10.244.1.7")), whole=False)
    assert list(node.modes["old"].servers) == [WEB]
    assert "the manifests lack them" in node.told[-1]
    assert not switch.stuck
    node.later(switch, whole=False)
    assert list(node.modes["old"].servers) == [WEB]
    node.later(switch, whole=True)
    assert not node.modes["old"].present()


def many(count: int) -> Update:
    return Update({name(f"default/s{i}"): view(service(f"default/s{i} 10.0.0.{i} :80/TCP")) for i in range(count)})


@pytest.mark.parametrize("allowed", [False, True])
def test_a_switch_with_most_of_the_manifests_gone_is_a_mass_delete(allowed: bool) -> None:
    node = Node()
    node.agent("old", many(20))
    _, switch = node.agent("new", many(5), allow_mass_delete=allowed)
    assert len(node.held("old")) == (0 if allowed else 15)
    assert switch.stuck is not allowed


# ------------------------------------------------------------------------------------------------------------ draining


def draining() -> Node:
    node = Node(old_drains=True)
    dns = view(service("default/dns 10.0.0.10 :53/UDP"), endpoints("default/dns", ":53/UDP", "10.1.0.3", "10.1.0.4"))
    node.agent("old", Update({**TWO.changed, name("default/dns"): dns}))
    old = node.modes["old"]
    old.connections[HOSTNAMES, *split("10.244.1.7:9376")] = 1
    old.connections[DNS, *split("10.1.0.3:53")] = 1
    old.connections[DNS, *split("10.1.0.4:53")] = 1
    return node


def everything(node: Node, *dns: str) -> Update:
    found = view(service("default/dns 10.0.0.10 :53/UDP"), endpoints("default/dns", ":53/UDP", *dns))
    return Update({**TWO.changed, name("default/dns"): found})


def weights(node: Node) -> dict[str, int]:
    return {str(real): real.weight for one in node.modes["old"].servers.values() for real in one.real_servers}


def test_connections_of_a_mode_that_drains_live_on_and_new_ones_go_elsewhere() -> None:
    node = draining()
    _, switch = node.agent("new", everything(node, "10.1.0.3", "10.1.0.4"))
    # nobody was connected to web
    assert weights(node) == {"10.244.1.7:9376": 0, "10.1.0.3:53": 0, "10.1.0.4:53": 0}
    assert list(map(str, switch.leaving)) == ["old: 3 real servers draining"]
    assert not switch.stuck
    node.modes["old"].connections.clear()
    node.later(switch, 2)
    assert (node.held("old"), switch.leaving) == ([], [])
    assert [line.split(" ")[0] for line in node.told] == ["found", "programmed", "draining", "removed"]


def test_a_drain_ends_with_its_time() -> None:
    node = draining()
    _, switch = node.agent("new", everything(node, "10.1.0.3", "10.1.0.4"))
    node.later(switch, 59)
    assert len(weights(node)) == 3
    node.later(switch, 2)
    assert switch.leaving == []


def test_what_drains_is_no_mass_delete_when_the_rest_has_gone() -> None:
    node = Node(old_drains=True)
    views = {
        name(f"default/s{i}"): view(
            service(f"default/s{i} 10.0.0.{i} :80/TCP"), endpoints(f"default/s{i}", ":80/TCP", f"10.1.0.{i}")
        )
        for i in range(1, 41)
    }
    node.agent("old", Update({**views}))
    for i in range(1, 13):
        node.modes["old"].connections[at(f"TCP 10.0.0.{i}:80"), *split(f"10.1.0.{i}:80")] = 1
    _, switch = node.agent("new", Update({key: one for key, one in views.items() if int(key.name[1:]) > 12}))
    assert list(map(str, switch.leaving)) == ["old: 12 real servers draining"]
    node.later(switch, 2)
    assert not switch.stuck
    node.later(switch, 60)
    assert switch.leaving == []


def test_a_udp_client_leaves_a_real_server_that_has_gone() -> None:
    node = draining()
    reconciler, switch = node.agent("new", everything(node, "10.1.0.3", "10.1.0.4"))
    reconciler.sync("change", reconciler.take(everything(node, "10.1.0.4")))
    node.later(switch, 2)
    assert weights(node) == {"10.244.1.7:9376": 0, "10.1.0.4:53": 0}


def test_the_clock_of_a_drain_outlives_the_agent() -> None:
    node = draining()
    news = everything(node, "10.1.0.3", "10.1.0.4")
    node.agent("new", news)
    assert set(node.modes["old"].kept.values()) == {60}
    node.modes["old"].kept = dict.fromkeys(node.modes["old"].kept, 20.0)  # 40 s later the kernel's clocks say
    _, switch = node.agent("new", news)
    node.later(switch, 19)
    assert len(weights(node)) == 3
    node.later(switch, 2)
    assert switch.leaving == []


def test_a_vip_from_which_the_nodes_own_processes_talk_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    node = draining()
    node.modes["old"].connections.clear()
    talking = {parse_address("10.0.0.1")}
    monkeypatch.setattr(mode_switch, "connected_from", lambda: talking)
    _, switch = node.agent("new", everything(node, "10.1.0.3", "10.1.0.4"))
    assert list(node.modes["old"].servers) == [WEB]
    talking.clear()
    node.later(switch, 2)
    assert switch.leaving == []


# ------------------------------------------------------------------------------------------------------------- crashes


def _prepared(node: Node) -> None:
    node.modes["new"].prepare(node.modes["old"].settings())


def _half(node: Node) -> None:
    _prepared(node)
    node.modes["new"].servers[WEB] = node.modes["old"].servers[WEB]


def _half_gone(node: Node) -> None:
    _half(node)
    node.modes["old"].servers.popitem()


CRASHES: dict[str, Callable[[Node], object]] = {
    "prepared": _prepared,
    "half programmed": _half,
    "both whole": lambda node: node.modes["new"].__dict__.update(servers=dict(node.modes["old"].servers)),
    "old one half gone": _half_gone,
}


@pytest.mark.parametrize("started", ["old", "new"])
@pytest.mark.parametrize("crash", CRASHES)
@pytest.mark.parametrize("drains", [False, True])
def test_after_a_crash_the_mode_that_is_started_wins(crash: str, started: str, drains: bool) -> None:
    node = Node(old_drains=drains)
    node.agent("old", TWO)
    node.modes["old"].connections[WEB, *split("10.1.0.1:80")] = 1
    CRASHES[crash](node)
    node.modes["old"].connections.clear()
    _, switch = node.agent(started, TWO)
    node.later(switch)
    other = "new" if started == "old" else "old"
    assert (len(node.held(started)), node.modes[other].present(), switch.leaving) == (2, False, [])
    assert all(real.weight == 1 for one in node.modes[started].servers.values() for real in one.real_servers)
    assert node.sysctls["net.ipv4.ip_forward"] == 1
    node.modes[started].remove()
    assert node.sysctls == {"net.ipv4.ip_forward": 0, "net.ipv4.vs.conntrack": 0}


def test_a_trouble_is_told_once_and_tried_again(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(leave: object = ()) -> None:
        raise KernelError("delete", "table", errno.EBUSY)

    monkeypatch.setattr(node.modes["old"], "remove", refuse)
    _, switch = node.agent("new", TWO)
    node.later(switch)
    assert [line for line in node.told if line.startswith("failed")] == [
        "failed, tried again delete table: Device or resource busy (EBUSY)"
    ]
    monkeypatch.undo()
    node.later(switch)
    assert switch.leaving == []


def test_a_mode_whose_mechanism_the_kernel_lost_is_cleaned_up(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(only: object = None) -> State:
        raise PreflightError("this kernel has no IPVS", "modprobe ip_vs")

    monkeypatch.setattr(node.modes["old"], "observe", fail)
    node.agent("new", TWO)
    assert not node.modes["old"].present()


def test_a_mode_that_cannot_be_opened_holds_nothing() -> None:
    def opener(mode: str) -> Backend:
        raise PreflightError("this kernel has no IPVS", "modprobe ip_vs")

    assert leftovers(["ipvs"], opener) == []


# ------------------------------------------------------------------------------------------------------------- sockets


def test_connected_sockets_are_found_in_the_kernels_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = "  sl  local_address rem_address   st tx_queue rx_queue\n"
    rows = [("AF01000A:9432", "01"), ("0100007F:0016", "0A"), ("0200007F:1000", "06")]
    (tmp_path / "tcp").write_text(head + "".join(f"   0: {local} AF01000A:0050 {st} 0 0\n" for local, st in rows))
    six = "0000000000000000FFFF0000AE01000A:1111", "000000FD000000000000000075010000:2222"
    (tmp_path / "tcp6").write_text(head + "".join(f"   0: {local} {local} 01 0 0\n" for local in six))
    monkeypatch.setattr(procfs_sockets, "ROOT", tmp_path)
    monkeypatch.setattr("sys.byteorder", "little")
    assert connected_from() == set(map(parse_address, ["10.0.1.175", "10.0.1.174", "fd00::175"]))


def test_a_connection_of_this_process_is_seen() -> None:
    with socket.create_server(("127.0.0.9", 0)) as listener:
        assert parse_address("127.0.0.9") not in connected_from()
        with socket.create_connection(listener.getsockname(), source_address=("127.0.0.8", 0)):
            assert parse_address("127.0.0.8") in connected_from()
