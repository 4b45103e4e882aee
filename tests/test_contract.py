"""The contract every mode fulfils: the same table, over the fake here and over each real mode on a real kernel.

A row is a sequence of states to reach; after each step the backend must hold exactly that, need nothing more, and print
every transaction it made.
"""

from collections.abc import Iterator

import msgspec
import pytest

from dataplane.backend import MODES, Backend, Options, open_backend
from dataplane.model import VirtualServer, parse_network
from dataplane.plan import State, diff
from dataplane.procfs_sysctl import read, write
from dataplane.sightings import Look
from dataplane.testing import FakeBackend
from dataplane.walk import Client, Question, Verdict, walk

from .netns import NetNs
from .words import at, server, shown

MARKS = {"ipvs": pytest.mark.ipvs}  # any other mode is at home on every kernel with netfilter


@pytest.fixture(params=["fake", *(pytest.param(mode, marks=MARKS.get(mode, pytest.mark.root)) for mode in MODES)])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    if request.param == "fake":
        yield FakeBackend()
        return
    with NetNs.create("contract") as netns, netns.enter():
        opened = open_backend(request.param, Options())
        yield opened
        opened.close()


WEB = "TCP 10.0.0.1:80 rr label=default/web:http -> 10.1.0.1:8080, 10.1.0.2:8080"
DNS = "UDP 10.0.0.10:53 rr label=kube-system/kube-dns:dns -> 10.1.0.3:53"
V6 = "TCP [fd00::1]:443 wrr label=default/six -> [fd00:1::1]:8443, [fd00:1::2]:8443 w3"

SEQUENCES: dict[str, list[list[str]]] = {
    "one Service comes and goes": [[WEB], []],
    "many kinds side by side": [
        [WEB, DNS, V6, "SCTP 10.0.0.2:132 rr label=a/s -> 10.1.0.9:132"],
        [WEB, V6],
    ],
    "real servers change": [
        ["TCP 10.0.0.1:80 rr -> 10.1.0.1:8080"],
        ["TCP 10.0.0.1:80 rr -> 10.1.0.1:8080, 10.1.0.2:8080"],
        ["TCP 10.0.0.1:80 rr -> 10.1.0.2:8080"],
        ["TCP 10.0.0.1:80 rr -> 10.1.0.3:9090, 10.1.0.4:8080"],
        ["TCP 10.0.0.1:80 rr"],
    ],
    "weights change": [
        ["TCP 10.0.0.1:80 wrr -> 10.1.0.1:8080, 10.1.0.2:8080 w5"],
        ["TCP 10.0.0.1:80 wrr -> 10.1.0.1:8080 w0, 10.1.0.2:8080 w65535"],
    ],
    "the server itself changes": [
        ["TCP 10.0.0.1:80 rr -> 10.1.0.1:8080"],
        ["TCP 10.0.0.1:80 sh flags=18 -> 10.1.0.1:8080"],
        ["TCP 10.0.0.1:80 wlc sticky=10800 -> 10.1.0.1:8080"],
        ["TCP 10.0.0.1:80 rr sticky=1 -> 10.1.0.1:8080"],
        ["TCP 10.0.0.1:80 rr -> 10.1.0.1:8080"],
    ],
    "IPv6 with affinity": [["TCP [fd00::1]:80 rr sticky=300 -> [fd00:1::1]:80"], []],
    "a Service at every kind of address": [
        [
            "TCP 10.0.0.1:80 rr label=a/b:http -> 10.1.0.1:80, 10.1.0.2:80",
            "TCP 192.168.0.2:30080 rr NodePort always label=a/b:http -> 10.1.0.1:80, 10.1.0.2:80",
            "TCP 192.168.99.9:80 rr ExternalIP always label=a/b:http -> 10.1.0.1:80, 10.1.0.2:80",
            "TCP 1.2.3.4:80 rr LoadBalancer always from=10.0.0.0/8+203.0.113.0/25 label=a/b:http -> 10.1.0.1:80",
            "TCP [2001:db8::9]:80 rr LoadBalancer always from=2001:db8::/32 label=a/b:http -> [fd00:1::1]:80",
        ],
        [
            "TCP 10.0.0.1:80 rr label=a/b:http -> 10.1.0.2:80, 10.1.0.3:80",
            "TCP 192.168.0.2:30080 rr NodePort always label=a/b:http -> 10.1.0.2:80, 10.1.0.3:80",
            "TCP 1.2.3.4:80 rr LoadBalancer always from=10.1.0.0/16 label=a/b:http -> 10.1.0.2:80, 10.1.0.3:80",
            "TCP [2001:db8::9]:80 rr LoadBalancer always label=a/b:http -> [fd00:1::1]:80",
        ],
        ["TCP 192.168.0.2:30080 rr NodePort always label=a/b:http"],
        [],
    ],
    "external policy Local: clients inside are served by others": [
        [
            "TCP 10.0.0.1:80 rr label=a/b -> 10.1.0.1:80 here, 10.1.0.2:80",
            "TCP 192.168.0.2:30080 rr NodePort node label=a/b -> 10.1.0.1:80 here",
            "TCP 192.168.0.2:30080 (inside) rr NodePort node label=a/b -> 10.1.0.1:80 here, 10.1.0.2:80",
        ],
        [
            "TCP 10.0.0.1:80 rr label=a/b -> 10.1.0.2:80, 10.1.0.3:80",
            "TCP 192.168.0.2:30080 rr drop NodePort node label=a/b",
            "TCP 192.168.0.2:30080 (inside) rr NodePort node label=a/b -> 10.1.0.2:80, 10.1.0.3:80",
        ],
        [
            "TCP 10.0.0.1:80 rr label=a/b -> 10.1.0.2:80, 10.1.0.3:80",
            "TCP 192.168.0.2:30080 rr NodePort node label=a/b -> 10.1.0.2:80, 10.1.0.3:80",
        ],
        ["TCP 10.0.0.1:80 rr label=a/b", "TCP 192.168.0.2:30080 rr NodePort node label=a/b"],
    ],
    "external policy Local with affinity": [
        [
            "TCP 10.0.0.1:80 rr sticky=600 label=a/b -> 10.1.0.1:80 here, 10.1.0.2:80",
            "TCP 1.2.3.4:80 rr sticky=600 LoadBalancer node from=10.0.0.0/8 label=a/b -> 10.1.0.1:80 here",
            "TCP 1.2.3.4:80 (inside) rr sticky=600 LoadBalancer node label=a/b -> 10.1.0.1:80 here, 10.1.0.2:80",
        ],
        [
            "TCP 10.0.0.1:80 rr sticky=600 label=a/b -> 10.1.0.2:80, 10.1.0.3:80",
            "TCP 1.2.3.4:80 rr sticky=600 drop LoadBalancer node label=a/b",
            "TCP 1.2.3.4:80 (inside) rr sticky=600 LoadBalancer node label=a/b -> 10.1.0.2:80, 10.1.0.3:80",
        ],
    ],
    "ports of one VIP come and go": [
        ["TCP 10.0.0.1:80 rr", "TCP 10.0.0.1:81 rr", "UDP 10.0.0.1:80 rr"],
        ["TCP 10.0.0.1:81 rr"],
        ["TCP 10.0.0.1:82 rr"],
    ],
    "an endpoint of this node, in two Services": [
        ["TCP 10.0.0.1:80 rr -> 10.1.0.1:80 here", "TCP 10.0.0.2:80 rr -> 10.1.0.1:80 here"],
        ["TCP 10.0.0.2:80 rr -> 10.1.0.1:80 here"],
        [],
    ],
    "silence where the policy is Local, and back": [
        ["TCP 10.0.0.1:80 rr drop"],
        ["TCP 10.0.0.1:80 rr -> 10.1.0.1:80"],
        ["TCP 10.0.0.1:80 rr drop"],
        ["TCP 10.0.0.1:80 rr"],
    ],
    "a Service is renamed": [["TCP 10.0.0.1:80 rr label=a/old"], ["TCP 10.0.0.1:80 rr label=a/new"]],
    "more real servers than fit one template": [
        ["TCP 10.0.0.1:80 rr -> " + ", ".join(f"10.1.0.{n}:80" for n in range(1, 60))],
        ["TCP 10.0.0.1:80 rr -> " + ", ".join(f"10.1.0.{n}:80" for n in range(30, 90))],
    ],
}

ADDRESSES = (
    "TCP 10.0.0.1:80",
    "TCP 192.168.0.2:30080 NodePort node",
    "TCP 1.2.3.4:80 LoadBalancer node from=10.0.0.0/8",
)
INSIDE = ("TCP 192.168.0.2:30080 (inside) NodePort node", "TCP 1.2.3.4:80 (inside) LoadBalancer node")
BOTH = [("192.168.0.2", "10.1.0.1"), ("[fd00::a]", "[fd00:1::1]"), ("192.168.1.2", "10.1.0.1")]
# addresses of one ServicePort, which share what a mode can share: chains, sets, the memory of affinity
SEQUENCES |= {
    "a policy turns Local, loses its endpoints here, and turns back": [
        [f"{each} label=a/b:http -> 10.1.0.1:80, 10.1.0.2:80" for each in ADDRESSES],
        [
            "TCP 10.0.0.1:80 label=a/b:http -> 10.1.0.1:80, 10.1.0.2:80",
            *(f"{each} label=a/b:http -> 10.1.0.1:80" for each in ADDRESSES[1:]),
            *(f"{each} label=a/b:http -> 10.1.0.1:80, 10.1.0.2:80" for each in INSIDE),
        ],
        [
            "TCP 10.0.0.1:80 label=a/b:http -> 10.1.0.2:80",
            *(f"{each} drop label=a/b:http" for each in ADDRESSES[1:]),
            *(f"{each} label=a/b:http -> 10.1.0.2:80" for each in INSIDE),
        ],
        [f"{each.replace('node', 'always')} label=a/b:http -> 10.1.0.2:80" for each in ADDRESSES],
        [f"{each} label=a/b:http" for each in ADDRESSES],
        [],
    ],
    "source ranges come, change, and outlive the endpoints": [
        ["TCP 1.2.3.4:80 LoadBalancer always label=a/b -> 10.1.0.1:80"],
        ["TCP 1.2.3.4:80 LoadBalancer always from=10.0.0.0/8+1.2.3.4/32 label=a/b -> 10.1.0.1:80"],
        ["TCP 1.2.3.4:80 LoadBalancer always from=203.0.113.0/25 label=a/b -> 10.1.0.1:80"],
        ["TCP 1.2.3.4:80 LoadBalancer from=203.0.113.0/25 label=a/b"],
        ["TCP 1.2.3.4:80 LoadBalancer drop from=203.0.113.0/25 label=a/b"],
        ["TCP 1.2.3.4:80 LoadBalancer drop label=a/b"],
    ],
    "node ports of both families come and go with addresses of the node": [
        [f"UDP {where}:30053 NodePort always label=a/dns -> {end}:53" for where, end in BOTH[:2]],
        [f"UDP {where}:30053 NodePort always label=a/dns -> {end}:53" for where, end in BOTH],
        [f"UDP {where}:30053 NodePort always sticky=60 label=a/dns -> {end}:53" for where, end in BOTH[1:]],
        [f"UDP {where}:30053 NodePort label=a/dns" for where, _ in BOTH[1:]],
    ],
    "an address changes its kind": [
        ["TCP 1.2.3.4:80 LoadBalancer always label=a/b -> 10.1.0.1:80"],
        ["TCP 1.2.3.4:80 ExternalIP always label=a/b -> 10.1.0.1:80"],
        ["TCP 1.2.3.4:80 NodePort label=a/b"],
        ["TCP 1.2.3.4:80 LoadBalancer label=a/b"],
    ],
    "two ServicePorts of one name differ, and the name changes hands": [
        ["TCP 10.0.0.1:80 label=a/b -> 10.1.0.1:80", "TCP 10.0.0.2:80 label=a/b -> 10.1.0.2:80"],
        ["TCP 10.0.0.2:80 label=a/b -> 10.1.0.2:80", "TCP 1.2.3.4:80 ExternalIP always label=a/b -> 10.1.0.1:80"],
        ["TCP 10.0.0.2:80 -> 10.1.0.2:80", "TCP 1.2.3.4:80 ExternalIP always -> 10.1.0.1:80"],
        ["TCP 10.0.0.2:80 -> 10.1.0.2:80 w0", "TCP 1.2.3.4:80 ExternalIP always -> 10.1.0.1:80 w0"],
    ],
}


def settle(backend: Backend, wanted: list[str]) -> State:
    """Take the backend from whatever it holds to `wanted`, by observation, plan and commit."""
    aim = {one.at: backend.express(one) for one in map(server, wanted)}
    plan = diff(backend.observe(), aim)
    transaction = backend.compile(plan)
    if plan:
        outcome = backend.commit(transaction)
        assert (outcome.failed, outcome.unsure) == ({}, frozenset())
        for one in (*plan.add, *plan.remove):
            assert str(one.at).split()[1] in str(transaction)
    state = backend.observe()
    assert sorted(map(shown, state.servers.values())) == sorted(map(shown, aim.values()))
    assert not diff(state, aim)
    return state


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_a_sequence_of_states(backend: Backend, sequence: str) -> None:
    backend.prepare()
    assert backend.intact()
    for wanted in SEQUENCES[sequence]:
        state = settle(backend, wanted)
        assert state.vips == set(state.needs()[0])
        assert state.hairpins == set(state.needs()[1])


def test_nothing_is_there_before_and_after(backend: Backend) -> None:
    assert backend.observe().servers == {}
    backend.prepare()
    settle(backend, [WEB, DNS, V6])
    backend.remove()
    backend.remove()
    assert not backend.intact()
    state = backend.observe()
    assert (state.servers, state.vips, state.hairpins, state.ghosts) == ({}, set(), set(), set())


def test_preparing_again_changes_nothing(backend: Backend) -> None:
    backend.prepare()
    settle(backend, [WEB])
    backend.prepare()
    assert backend.intact()
    assert [shown(one) for one in backend.observe().servers.values()] == [shown(backend.express(server(WEB)))]


def test_a_part_can_be_observed(backend: Backend) -> None:
    backend.prepare()
    settle(backend, [WEB, DNS])
    seen = backend.observe([at("UDP 10.0.0.10:53"), at("TCP 10.9.9.9:1")])
    assert [shown(one) for one in seen.servers.values()] == [shown(backend.express(server(DNS)))]


def test_a_plan_made_from_stale_knowledge_is_unsure_and_not_wrong(backend: Backend) -> None:
    backend.prepare()
    settle(backend, [WEB])
    stale = diff(State(), {at("TCP 10.0.0.1:80"): server(WEB)})
    outcome = backend.commit(backend.compile(stale))
    assert outcome.unsure == {at("TCP 10.0.0.1:80")}
    assert [shown(one) for one in backend.observe().servers.values()] == [shown(backend.express(server(WEB)))]
    gone = msgspec.structs.replace(server(WEB), at=at("TCP 10.0.0.99:80"))
    outcome = backend.commit(backend.compile(diff(State([gone]), {})))
    assert outcome.failed == {}


def test_the_report_shows_every_server_with_its_label(backend: Backend) -> None:
    backend.prepare()
    settle(backend, [WEB, DNS])
    rows = {one.server.label: one for one in backend.report()}
    assert set(rows) == {"default/web:http", "kube-system/kube-dns:dns"}
    web = rows["default/web:http"]
    assert web.ours
    assert [str(real) for real, _ in web.reals] == ["10.1.0.1:8080", "10.1.0.2:8080"]
    assert all(counters.active == 0 for _, counters in web.reals)


def test_labels_that_are_not_plain_never_reach_the_kernel(backend: Backend) -> None:
    backend.prepare()
    hostile = VirtualServer(at("TCP 10.0.0.1:80"), label='a/b"; add table ip evil; #\n')
    plan = diff(backend.observe(), {hostile.at: hostile})
    assert "evil" not in str(backend.compile(plan)) or isinstance(backend, FakeBackend)
    backend.commit(backend.compile(plan))
    assert list(backend.observe().servers) == [hostile.at]


def test_a_mode_can_be_told_from_its_absence(backend: Backend) -> None:
    assert not backend.present()
    backend.prepare()
    assert backend.present()
    backend.remove()
    assert not backend.present()


def test_settings_are_noted_as_an_earlier_mode_found_them_and_left_alone_if_told(backend: Backend) -> None:
    name = "net.ipv4.ip_forward"
    if isinstance(backend, FakeBackend):
        backend.wants, kernel = {name: 1}, backend.sysctls
        kernel[name] = 1
    else:
        write(name, 1)
    backend.prepare({name: 0, "net.ipv4.vs.no_such_setting": 7})
    assert backend.settings().get(name) == 0
    assert "net.ipv4.vs.no_such_setting" not in backend.settings()
    backend.prepare()
    assert backend.settings().get(name) == 0
    backend.remove(leave=[name])
    assert (backend.sysctls[name] if isinstance(backend, FakeBackend) else read(name)) == 1
    backend.prepare({name: 0})
    backend.remove()
    assert (backend.sysctls[name] if isinstance(backend, FakeBackend) else read(name)) == 0


def test_what_it_holds_is_what_a_packet_meets(backend: Backend) -> None:
    backend.prepare()
    settle(backend, [WEB, DNS])
    situation = backend.situation()
    assert situation.servers.keys() == {server(WEB).at, server(DNS).at}
    assert not situation.flaws
    for where, verdict in (
        (server(WEB).at, Verdict.ENDPOINT),
        (server(DNS).at, Verdict.ENDPOINT),
        (at("TCP 10.0.0.1:81"), Verdict.REFUSED),
        (at("TCP 10.0.0.77:80"), Verdict.NOT_OURS),
    ):
        walked = walk(Question(Client(at("TCP 10.9.9.9:1").address), where), situation)
        assert walked.verdict is verdict, where
        named = backend.objects(walked)
        assert any(named.values()), where
    assert backend.remembered(server(WEB), at("TCP 10.9.9.9:1").address) is None


def test_a_look_at_connections_leaves_nothing(backend: Backend) -> None:
    backend.prepare()
    settle(backend, [WEB])
    before = backend.observe().servers
    witness = backend.watch(Look(server(WEB).at, None, 5))
    assert witness.name
    assert witness.read() == witness.finish() == []
    witness.close()
    assert backend.observe().servers == before
    assert backend.intact()


def test_other_ranges_of_pods_and_cluster_ips_apply_without_a_restart(backend: Backend) -> None:
    backend.prepare()
    settle(backend, [WEB, DNS, V6])
    for pods, services in (("10.244.1.0/24", "10.0.0.0/16"), ("10.244.7.0/24", "10.0.0.0/12")):
        backend.renew(Options(cluster_cidrs=(parse_network(pods),), service_cidrs=(parse_network(services),)))
        backend.prepare()
        assert backend.intact()
        settle(backend, [WEB, DNS, V6])
        detection = backend.situation().detection
        assert (*map(str, detection.cluster_cidrs),) == (pods,)
        assert (*map(str, detection.service_cidrs),) == (services,)
    backend.renew(Options())
    backend.prepare()
    settle(backend, [WEB, DNS, V6])
    assert not backend.situation().detection.cluster_cidrs
    settle(backend, [WEB])
