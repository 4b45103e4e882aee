"""Which UDP flows have to be looked at, and what counts as right: decided from the state reached, never from events."""

import errno
from collections.abc import AsyncIterator

import pytest

from dataplane.agent import Agent, AgentOptions
from dataplane.desired import Rules
from dataplane.errors import KernelError
from dataplane.model import Address, Protocol, ServicePort, ServiceType, Update, parse_address, parse_network
from dataplane.netlink_conntrack import Swept
from dataplane.reconciler import Reconciler
from dataplane.staleness import Right
from dataplane.testing import FakeBackend

from .words import at, endpoints, name, service, split, update, view

DNS = "default/dns 10.96.0.10 dns:53/UDP"
NODE = parse_address("192.168.0.2")


class Table:
    """Stands in for conntrack: remembers what it was asked, in words; fails when told."""

    def __init__(self) -> None:
        self.asked: list[dict[str, set[str]]] = []
        self.failures = 0

    def sweep(self, right: Right) -> Swept:
        if self.failures:
            self.failures -= 1
            raise KernelError("dump", "", errno.EBUSY)
        self.asked.append({said(place): {said(each) for each in places} for place, places in right.items()})
        return Swept(0, 0, 0)


def said(place: tuple[Address, int]) -> str:
    address, port = place
    return f"{'.'.join(map(str, address))}:{port}" if len(address) == 4 else f"[{address.hex()}]:{port}"


class World:
    """A reconciler over the fakes; every `change` is one sync and the look behind it."""

    def __init__(self, **rules: object) -> None:
        self.backend = FakeBackend()
        self.table = Table()
        defaults: dict[str, object] = {"node_name": "a", "node_addresses": (NODE,)}
        self.rules = Rules(**{**defaults, **rules})  # type: ignore[arg-type]
        self.reconciler = self.new()

    def new(self) -> Reconciler:
        reconciler = Reconciler(self.backend, self.rules, flow_table=self.table)
        self.backend.prepare()
        return reconciler

    def start(self, first: Update) -> list[dict[str, set[str]]]:
        self.reconciler.take(first)
        self.reconciler.observe()
        self.reconciler.sync("start")
        return self.look()

    def change(self, news: Update) -> list[dict[str, set[str]]]:
        self.reconciler.sync("change", self.reconciler.take(news))
        return self.look()

    def look(self) -> list[dict[str, set[str]]]:
        self.table.asked.clear()
        self.reconciler.clean_flows()
        return self.table.asked


def dns(*pods: str, **fields: object) -> Update:
    return update(dns=view(service(DNS, **fields), endpoints("default/dns", "dns:9053/UDP", *pods)))


def test_at_start_every_udp_address_is_looked_at_once() -> None:
    world = World()
    first = dns("10.244.1.7", "10.244.2.3")
    first.changed.update(update(web=view(service("default/web 10.96.0.1 :80/TCP :99/SCTP"))).changed)
    assert world.start(first) == [{"10.96.0.10:53": {"10.244.1.7:9053", "10.244.2.3:9053"}}]
    assert world.look() == []
    world.reconciler = world.new()
    assert world.start(first) == [{"10.96.0.10:53": {"10.244.1.7:9053", "10.244.2.3:9053"}}]


def test_tcp_and_sctp_are_never_asked_for() -> None:
    world = World()
    web = "default/web 10.96.0.1 :80/TCP sig:99/SCTP"
    assert world.start(update(web=view(service(web), endpoints("default/web", ":80/TCP", "10.1.0.1")))) == []
    assert world.change(update(web=view(service(web)))) == []
    assert world.change(update(web=None)) == []


def test_a_removed_endpoint_is_not_right_any_more() -> None:
    world = World()
    world.start(dns("10.244.1.7", "10.244.2.3"))
    assert world.change(dns("10.244.1.7")) == [{"10.96.0.10:53": {"10.244.1.7:9053"}}]


def test_more_endpoints_make_nothing_wrong() -> None:
    world = World()
    world.start(dns("10.244.1.7"))
    assert world.change(dns("10.244.1.7", "10.244.2.3")) == []
    assert world.change(dns("10.244.2.3")) == [{"10.96.0.10:53": {"10.244.2.3:9053"}}]


def test_the_last_endpoint_and_the_first() -> None:
    world = World()
    world.start(dns("10.244.1.7"))
    assert world.change(dns()) == [{"10.96.0.10:53": set()}]
    # what passed untranslated while nobody served would stay so for ever
    assert world.change(dns("10.244.2.3")) == [{"10.96.0.10:53": {"10.244.2.3:9053"}}]


def test_an_address_given_up_may_answer_for_itself() -> None:
    world = World()
    world.start(dns("10.244.1.7"))
    assert world.change(update(dns=None)) == [{"10.96.0.10:53": {"10.96.0.10:53"}}]
    assert world.look() == []


def test_an_address_removed_at_start_is_looked_at() -> None:
    world = World()
    world.start(dns("10.244.1.7"))
    world.reconciler = world.new()
    assert world.start(Update({})) == [{"10.96.0.10:53": {"10.96.0.10:53"}}]


def test_every_address_of_a_service_counts() -> None:
    world = World(external_ip_ranges=(parse_network("192.0.2.0/24"),))
    kinds = {
        "type": ServiceType.LOAD_BALANCER,
        "external_ips": (parse_address("192.0.2.1"),),
        "load_balancer_ips": (parse_address("1.2.3.4"),),
    }
    full = service("default/dns 10.96.0.10", ports=(ServicePort("dns", Protocol.UDP, 53, 31053),), **kinds)
    pods = endpoints("default/dns", "dns:9053/UDP", "10.244.1.7", "10.244.2.3 gone")
    right = {"10.244.1.7:9053"}
    assert world.start(update(dns=view(full, pods))) == [
        {"10.96.0.10:53": right, "192.0.2.1:53": right, "1.2.3.4:53": right, "192.168.0.2:31053": right}
    ]


def test_who_still_serves_keeps_his_clients_whatever_the_policy() -> None:
    world = World()
    world.start(dns("10.244.1.7 node=a", "10.244.2.3 node=b"))
    local = dns("10.244.1.7 node=a", "10.244.2.3 node=b", internal_local=True)
    assert world.change(local) == []
    assert [str(r) for r in world.backend.servers[at("UDP 10.96.0.10:53")].real_servers] == ["10.244.1.7:9053"]
    # it ends: the virtual server does not change, and yet its entries are wrong now
    assert world.change(dns("10.244.1.7 node=a", "10.244.2.3 node=b gone", internal_local=True)) == [
        {"10.96.0.10:53": {"10.244.1.7:9053"}}
    ]


def test_a_terminating_endpoint_that_serves_keeps_its_clients() -> None:
    world = World()
    world.start(dns("10.244.1.7", "10.244.2.3"))
    assert world.change(dns("10.244.1.7", "10.244.2.3 terminating")) == []
    assert world.change(dns("10.244.1.7", "10.244.2.3 gone")) == [{"10.96.0.10:53": {"10.244.1.7:9053"}}]


def test_clients_inside_and_outside_share_an_address() -> None:
    world = World()
    kinds: dict[str, object] = {"type": ServiceType.LOAD_BALANCER, "external_local": True}
    one = service(DNS, load_balancer_ips=(parse_address("1.2.3.4"),), **kinds)
    pods = endpoints("default/dns", "dns:9053/UDP", "10.244.1.7 node=a", "10.244.2.3 node=b")
    both = {"10.244.1.7:9053", "10.244.2.3:9053"}
    assert world.start(update(dns=view(one, pods))) == [{"10.96.0.10:53": both, "1.2.3.4:53": both}]
    assert at("UDP 1.2.3.4:53 (inside)") in world.backend.servers


def test_what_somebody_else_has_is_not_judged() -> None:
    world = World()
    world.backend.foreign = {at("UDP 10.96.0.10:53")}
    assert world.start(dns("10.244.1.7")) == []
    assert world.change(dns("10.244.2.3")) == []
    assert world.change(update(dns=None)) == []


def test_a_refused_change_leaves_what_the_kernel_has_right() -> None:
    world = World()
    world.start(dns("10.244.1.7"))
    world.backend.refused[at("UDP 10.96.0.10:53")] = errno.EINVAL
    assert world.change(dns("10.244.2.3")) == []
    world.backend.refused.clear()
    world.reconciler.verify("retry")
    assert world.look() == [{"10.96.0.10:53": {"10.244.2.3:9053"}}]


def test_an_unknown_outcome_means_look_at_everything() -> None:
    world = World()
    first = dns("10.244.1.7")
    other = view(service("default/log 10.96.0.11 :514/UDP"), endpoints("default/log", ":514/UDP", "10.244.1.9"))
    first.changed[name("default/log")] = other
    world.start(first)
    world.backend.answers = ["lost after"]
    assert world.change(update(dns=None)) == [
        {"10.96.0.10:53": {"10.96.0.10:53"}, "10.96.0.11:514": {"10.244.1.9:514"}}
    ]


@pytest.mark.parametrize("failures", [1, 3])
def test_a_failed_look_is_made_again_until_it_succeeds(failures: int) -> None:
    world = World()
    world.start(dns("10.244.1.7", "10.244.2.3"))
    world.table.failures = failures
    for _ in range(failures):
        with pytest.raises(KernelError):
            world.change(dns("10.244.1.7"))
    assert world.look() == [{"10.96.0.10:53": {"10.244.1.7:9053"}}]
    assert world.look() == []


def test_a_failed_look_is_not_forgotten_when_the_endpoint_changes_meanwhile() -> None:
    world = World()
    world.start(dns("10.244.1.7"))
    world.table.failures = 1
    with pytest.raises(KernelError):
        world.change(dns("10.244.2.3"))
    # .1.7 was right at the last look and would be again; entries to .2.3 came into being in between
    assert world.change(dns("10.244.1.7")) == [{"10.96.0.10:53": {"10.244.1.7:9053"}}]
    world.table.failures = 1
    with pytest.raises(KernelError):
        world.change(dns("10.244.2.3"))
    assert world.change(update(dns=None)) == [{"10.96.0.10:53": {"10.96.0.10:53"}}]


def test_another_service_takes_the_address() -> None:
    world = World()
    world.start(dns("10.244.1.7"))
    pods = endpoints("default/log", ":9053/UDP", "10.244.2.3")
    news = update(dns=None, log=view(service("default/log 10.96.0.10 :53/UDP"), pods))
    assert world.change(news) == [{"10.96.0.10:53": {"10.244.2.3:9053"}}]
    assert split("10.244.2.3:9053") in world.reconciler.desired.serving(at("UDP 10.96.0.10:53"))


def test_everything_can_be_asked_for() -> None:
    world = World()
    world.start(dns("10.244.1.7"))
    world.reconciler.clean_flows(everything=True)
    assert world.table.asked[1:] == [{"10.96.0.10:53": {"10.244.1.7:9053"}}]


class Lines:
    """A log that keeps what it is told, and a source that tells nothing."""

    problems = ()

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, object]]] = []

    def info(self, event: str, **fields: object) -> None:
        self.lines.append((event, fields))

    warning = error = info

    def read(self) -> Update:
        return Update({})

    async def updates(self) -> AsyncIterator[Update]:
        return
        yield

    async def ready(self) -> None:
        return

    async def close(self) -> None:
        return

    def status(self) -> dict[str, object]:
        return {"kind": "nothing"}


def test_the_agent_tells_a_failed_look_once_and_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world, log = World(), Lines()
    clock = [1000.0]
    monkeypatch.setattr("dataplane.agent.time.monotonic", lambda: clock[0])
    agent = Agent(world.reconciler, log, AgentOptions(), log)
    world.start(dns("10.244.1.7", "10.244.2.3"))
    world.table.failures = 3
    world.reconciler.sync("change", world.reconciler.take(dns("10.244.1.7")))
    world.table.asked.clear()
    looks = 0
    while not world.table.asked:
        agent._clean_flows()
        looks += 1
        clock[0] += 0.5
        assert looks < 100
    assert clock[0] - 1000 > 7  # after 1, 2 and 4 seconds
    assert log.lines == [("conntrack", {"result": "failed", "error": "dump: Device or resource busy (EBUSY)"})]
    assert agent.status()["conntrack"] == {"deleted": 0, "lastError": ""}
    assert agent.status()["healthy"]
