"""Real packets through the real agent in iptables mode, over both back ends."""

import contextlib
import random
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataplane.backend import Options
from dataplane.iptables_restore import IptablesBackend
from dataplane.plan import diff

from . import traffic
from .netns import Topology
from .node_agent import VIP, VIP6, NodeAgent, manifest, node_agent
from .traffic import Caller, eventually, host_server
from .words import at, server

pytestmark = pytest.mark.root

CHI_SQUARE = 27.63  # 2 degrees of freedom, p = 10^-6: a test that fails by chance teaches to look away


def has_sctp() -> bool:
    """Whether this kernel has sockets for it; its netfilter may know the protocol without."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, traffic.SCTP).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _servers(built: Topology) -> Iterator[None]:
    """As `traffic.servers`, without SCTP where the kernel has none."""
    if has_sctp():
        with traffic.servers(built.pods):
            yield
        return
    listeners = []
    for number, pod in enumerate(built.pods):
        with pod.ns.enter():
            for address in pod.addresses:
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    one = socket.socket(family, kind)
                    one.bind((address, traffic.PORT))
                    if kind is socket.SOCK_STREAM:
                        one.listen(1024)
                    one.setblocking(False)
                    listeners.append((one, f"pod{number}".encode()))
    with traffic._serving(listeners):
        yield


@pytest.fixture(scope="module", params=["legacy", "nft"])
def tool(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def world(tool: str) -> Iterator[Topology]:
    # each pod in a network of its own: what pods say to each other passes the node
    with Topology.build(
        [("10.244.3.6", "fd00:3::6"), ("10.244.1.7", "fd00:1::7"), ("10.244.2.3", "fd00:2::3")]
    ) as built:
        for place in (built.node, *(pod.ns for pod in built.pods)):
            for key in ("ipv4.conf.all.send_redirects", "ipv4.conf.default.send_redirects"):
                place.sysctl(key, 0)
            for key in ("ipv4.conf.all.accept_redirects", "ipv6.conf.all.accept_redirects"):
                place.sysctl(key, 0)
        for device in ("br0", "eth0"):
            built.node.sysctl(f"ipv4.conf.{device}.send_redirects", 0)
        for pod in built.pods:
            pod.ns.sysctl("ipv6.conf.eth0.accept_redirects", 0)
            pod.ns.sysctl("ipv4.conf.eth0.accept_redirects", 0)
        for key in ("bridge.bridge-nf-call-iptables", "bridge.bridge-nf-call-ip6tables"):
            if Path("/proc/sys/net", *key.split(".")).exists():
                built.node.sysctl(key, 0)  # else a bridge drops what comes back by the port it came from
        # a VIP is nobody's address in this mode: a node without a default route has no way to it
        built.node.ip(
            "link add out type veth peer name away",
            "link set away up",
            "link set out up",
            "route add default dev out",
            "route add ::/0 dev out",
        )
        with _servers(built):
            yield built


@pytest.fixture
def agent(world: Topology, tool: str, tmp_path: Path) -> Iterator[NodeAgent]:
    with node_agent(
        world.node, tmp_path, "--mode", "iptables", "--iptables-tool", tool, "--resync-seconds", "3"
    ) as one:
        one.write(manifest([pod.addresses for pod in world.pods]))
        yield one
    one.run("cleanup", "--force", "--mode", "iptables")  # of either back end


@pytest.fixture
def client(world: Topology) -> Caller:
    return Caller(world.client)


def hits(agent: NodeAgent, tool: str, vip: str = f"TCP {VIP}:80") -> dict[str, int]:
    """Connections of each real server by the rules' counters."""
    with agent.ns.enter():
        backend = IptablesBackend(Options(iptables_tool=tool))
        (one,) = [each for each in backend.report() if str(each.server.at) == vip]
        return {str(real): counters.connections for real, counters in one.reals}


def spread(tally: Counter[str]) -> float:
    """How unlikely equal shares of three are."""
    mean = tally.total() / 3
    return sum((tally[name] - mean) ** 2 / mean for name in ("pod0", "pod1", "pod2"))


@pytest.mark.parametrize(
    ("kind", "vip", "port"),
    [
        ("tcp", VIP, 80),
        ("tcp", VIP6, 80),
        ("udp", VIP, 53),
        ("udp", VIP6, 53),
        # the one kernel with SCTP sockets we can count on is the one with IPVS
        pytest.param("sctp", VIP, 99, marks=pytest.mark.ipvs),
    ],
    ids=str,
)
def test_connections_are_spread_evenly_and_the_counters_say_so(
    agent: NodeAgent, world: Topology, client: Caller, tool: str, kind: str, vip: str, port: int
) -> None:
    agent.start()
    tally = client.tally(600, vip, port, kind=kind)
    assert set(tally) == {"pod0", "pod1", "pod2"}
    assert spread(tally) < CHI_SQUARE, tally
    six = ":" in vip
    counted = hits(agent, tool, f"{kind.upper()} [{vip}]:{port}" if six else f"{kind.upper()} {vip}:{port}")
    assert counted == {
        f"[{pod.v6}]:9376" if six else f"{pod.v4}:9376": tally[f"pod{number}"] for number, pod in enumerate(world.pods)
    }


def test_weights_are_shares(agent: NodeAgent, world: Topology, client: Caller, tool: str) -> None:
    with world.node.enter():
        backend = IptablesBackend(Options(iptables_tool=tool))
        backend.prepare()
        reals = ", ".join(f"{pod.v4}:9376 w{weight}" for pod, weight in zip(world.pods, (6, 3, 0), strict=True))
        one = backend.express(server(f"TCP {VIP}:80 rr -> {reals}"))
        backend.commit(backend.compile(diff(backend.observe(), {at(f"TCP {VIP}:80"): one})))
    tally = client.tally(600, VIP, 80)
    assert set(tally) == {"pod0", "pod1"}
    assert 320 < tally["pod0"] < 480


def masqueraded(world: Topology, tool: str, six: bool) -> int:
    """Connections that were marked to be masqueraded, by the rule's counter."""
    text = world.node.run(f"ip{'6' if six else ''}tables-{tool}-save", "-c", "-t", "nat").stdout
    (found,) = re.findall(r"\[(\d+):\d+\] -A KUBE-MARK-MASQ -j MARK", text)
    return int(found)


@pytest.mark.parametrize("inside", [{"bridge_interface": "br0"}, {"interface_prefix": "br"}], ids=str)
def test_clients_inside_are_told_by_the_device_they_come_from(
    agent: NodeAgent, world: Topology, tool: str, inside: dict[str, str]
) -> None:
    with world.node.enter():
        backend = IptablesBackend(Options(iptables_tool=tool, **inside))  # type: ignore[arg-type]
        backend.prepare()
        pods = [(pod.v4, f"[{pod.v6}]") for pod in world.pods]
        aim = {}
        for six, vip, external in ((0, VIP, "198.51.100.4"), (1, f"[{VIP6}]", "[2001:db8:4::4]")):
            for text in (
                f"TCP {vip}:80 label=a/b -> {pods[1][six]}:9376",
                f"TCP {external}:80 LoadBalancer node label=a/b -> {pods[2][six]}:9376",
                f"TCP {external}:80 (inside) LoadBalancer node label=a/b -> {pods[1][six]}:9376",
            ):
                one = backend.express(server(text))
                aim[one.at] = one
        assert backend.commit(backend.compile(diff(backend.observe(), aim))).failed == {}
    for vip, external in ((VIP, "198.51.100.4"), (VIP6, "2001:db8:4::4")):
        seen = {}
        for name, ns in (("pod", world.pods[0].ns), ("client", world.client), ("node", world.node)):
            for where, address in (("vip", vip), ("external", external)):
                before = masqueraded(world, tool, ":" in vip)
                answer = Caller(ns).ask(address, 80)
                seen[name, where] = answer, masqueraded(world, tool, ":" in vip) - before
        assert seen == {
            ("pod", "vip"): ("pod1", 0),
            ("pod", "external"): ("pod1", 0),
            ("client", "vip"): ("pod1", 1),
            ("client", "external"): ("pod2", 0),
            ("node", "vip"): ("pod1", 1),
            ("node", "external"): ("pod1", 1),
        }


def test_a_client_has_one_memory_for_all_addresses_of_a_service(
    agent: NodeAgent, world: Topology, client: Caller, tool: str
) -> None:
    """Affinity is a ServicePort's: who came by the cluster IP meets the same endpoint at every other address."""
    node = world.node_addresses[0]
    ends = ", ".join(f"{pod.v4}:9376" for pod in world.pods)
    with world.node.enter():
        backend = IptablesBackend(Options(iptables_tool=tool))
        backend.prepare()
        aim = {
            one.at: backend.express(one)
            for one in map(server, [
                f"TCP {VIP}:80 sticky=60 label=a/b -> {ends}",
                f"TCP {node}:30080 NodePort always sticky=60 label=a/b -> {ends}",
                f"TCP 198.51.100.4:80 LoadBalancer always sticky=60 label=a/b -> {ends}",
                f"TCP 198.51.100.5:80 LoadBalancer always sticky=60 label=a/c -> {ends}",
            ])
        }  # fmt: skip
        assert backend.commit(backend.compile(diff(backend.observe(), aim))).failed == {}
    (mine,) = client.tally(4, VIP, 80)
    for address, port in ((node, 30080), ("198.51.100.4", 80), (VIP, 80)):
        assert client.tally(6, address, port) == {mine: 6}
    assert len(client.tally(4, "198.51.100.5", 80)) == 1
    with world.node.enter():
        reports = {str(one.server.at): one for one in backend.report()}
    # the chains are shared, and so are their counts: told once
    assert reports[f"TCP {VIP}:80"].connections == 4 + 18
    assert {c.connections for _, c in reports["TCP 198.51.100.4:80"].reals} == {-1}
    assert reports["TCP 198.51.100.5:80"].connections == 4


def test_everybody_reaches_a_service_also_through_itself(agent: NodeAgent, world: Topology) -> None:
    agent.start()
    places = {"client": world.client, "node": world.node, **{f"pod{n}": p.ns for n, p in enumerate(world.pods)}}
    for place, ns in places.items():
        for vip in (VIP, VIP6):
            # a hairpin is a third of what a pod asks for
            tally = Caller(ns).tally(30, vip, 80)
            assert (place, vip, set(tally)) == (place, vip, {"pod0", "pod1", "pod2"})


def test_a_vip_answers_on_its_services_ports_only(agent: NodeAgent, world: Topology, client: Caller) -> None:
    agent.start()
    with host_server(world.node):
        assert client.ask(world.node_addresses[0], 9376) == "host"
        for caller in (client, Caller(world.node), Caller(world.pods[0].ns)):
            for vip in (VIP, VIP6):
                assert caller.ask(vip, 9376) == "refused"
                assert caller.ask(vip, 80, kind="udp") in ("refused", "Operation not permitted")
    for vip in (VIP, VIP6):
        assert agent.ns.run("ping", "-c1", "-W2", vip, check=False).returncode != 0
        answer = world.client.run("ping", "-c1", "-W2", vip, check=False)
        assert "ort unreachable" in answer.stdout.lower()


def test_a_service_without_endpoints_refuses_and_then_serves(agent: NodeAgent, world: Topology, client: Caller) -> None:
    agent.write(manifest([]))
    agent.start()
    for vip in (VIP, VIP6):
        assert client.ask(vip, 80) == "refused"
        assert client.ask(vip, 53, kind="udp") == "refused"
    agent.write(manifest([world.pods[1].addresses]))
    eventually("the endpoint serves", lambda: client.ask(VIP, 80) == "pod1")


def test_affinity_sticks_moves_and_expires(agent: NodeAgent, world: Topology, client: Caller, tool: str) -> None:
    def sticky(seconds: int, count: int = 3) -> str:
        config = {"clientIP": {"timeoutSeconds": seconds}}
        pods = [p.addresses for p in world.pods[:count]]
        return manifest(pods, sessionAffinity="ClientIP", sessionAffinityConfig=config)

    agent.write(sticky(60))
    agent.start()
    for vip in (VIP, VIP6):
        assert len(client.tally(12, vip, 80)) == 1
    by_pod = [Caller(pod.ns).tally(4, VIP, 80) for pod in world.pods]
    assert all(len(one) == 1 for one in by_pod)
    # a change beside it: the client's memory survives that the chain is written anew
    (mine,) = client.tally(3, VIP, 80)
    other = next(n for n in (2, 1, 0) if f"pod{n}" != mine)
    keep = [p.addresses for n, p in enumerate(world.pods) if n != other]
    config = {"clientIP": {"timeoutSeconds": 60}}
    agent.write(manifest(keep, sessionAffinity="ClientIP", sessionAffinityConfig=config))
    eventually("fewer endpoints", lambda: f"{world.pods[other].v4}:9376" not in hits(agent, tool))
    assert client.tally(10, VIP, 80) == {mine: 10}
    # its own server goes: another one
    gone = [p.addresses for n, p in enumerate(world.pods) if f"pod{n}" != mine]
    agent.write(manifest(gone, sessionAffinity="ClientIP", sessionAffinityConfig=config))
    eventually("another server", lambda: mine not in client.tally(1, VIP, 80))
    # short memory
    agent.write(sticky(1))
    seen: Counter[str] = Counter()
    for _ in range(12):
        seen[client.ask(VIP, 80)] += 1
        if len(seen) > 1:
            break
        time.sleep(2.2)  # longer than the time out
    assert len(seen) > 1


def test_open_connections_outlive_their_endpoint_and_their_service(
    agent: NodeAgent, world: Topology, client: Caller
) -> None:
    agent.start()
    held = client.hold(VIP, 80)
    agent.write(manifest([p.addresses for n, p in enumerate(world.pods) if f"pod{n}" != held.server]))
    eventually("no new ones", lambda: held.server not in client.tally(20, VIP, 80))
    assert held.beats()
    agent.run("cleanup", "--force", "--mode", "iptables")
    held.close()


def test_no_connection_fails_while_everything_changes(agent: NodeAgent, world: Topology, client: Caller) -> None:
    """10,000 new connections and 20 long-lived ones through endpoint churn, SIGKILL with restart, full re-syncs."""
    agent.start()
    held = [client.hold(VIP, 80) for _ in range(20)]
    rng = random.Random(175)
    results: Counter[str] = Counter()
    phase = {"name": "churn"}
    stop = threading.Event()
    done_in: Counter[str] = Counter()

    def call() -> None:
        while not stop.is_set():
            name = phase["name"]
            answer = client.ask(VIP, 80, timeout=20)
            results["ok" if answer.startswith("pod") else f"{name}: {answer}"] += 1
            done_in[name] += 1

    caller = threading.Thread(target=call)
    caller.start()
    changes = kills = resyncs = 0
    try:
        while done_in["churn"] < 4000 or changes < 20:
            agent.write(manifest([pod.addresses for pod in rng.sample(world.pods, rng.randint(1, 3))]))
            changes += 1
            stop.wait(0.2)
        phase["name"] = "kill"
        while done_in["kill"] < 3000 or kills < 4:
            agent.stop(signal.SIGKILL)
            agent.write(manifest([pod.addresses for pod in rng.sample(world.pods, 2)]))
            agent.start()
            kills += 1
        phase["name"] = "resync"
        while done_in["resync"] < 3000 or resyncs < 20:
            agent.send(signal.SIGHUP)
            resyncs += 1
            stop.wait(0.2)
    finally:
        stop.set()
        caller.join(60)
    assert results == {"ok": results.total()}
    assert results.total() >= 10_000
    assert [one.server for one in held if not one.beats()] == []
    for one in held:
        one.close()
