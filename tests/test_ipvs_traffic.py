"""Real packets through the real agent in ipvs mode: who answers, how evenly, and that nobody fails meanwhile."""

import random
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from .netns import Topology
from .node_agent import VIP, VIP6, NodeAgent, manifest, node_agent
from .traffic import Caller, eventually, host_server, servers

pytestmark = pytest.mark.ipvs


@pytest.fixture(scope="module")
def world() -> Iterator[Topology]:
    # each pod in a network of its own, as the tutorial's are: what pods say to each other passes the node
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
        with servers(built.pods):
            yield built


@pytest.fixture
def agent(world: Topology, tmp_path: Path) -> Iterator[NodeAgent]:
    with node_agent(world.node, tmp_path, "--resync-seconds", "3") as started:
        started.write(manifest([pod.addresses for pod in world.pods]))
        yield started
    started.run("cleanup", "--force")


@pytest.fixture
def client(world: Topology) -> Caller:
    return Caller(world.client)


def real_servers(agent: NodeAgent, vip: str = f"{VIP}:80") -> dict[str, tuple[int, int]]:
    """Weight and open connections of each IPv4 real server, as ipvsadm sees them."""
    found: dict[str, tuple[int, int]] = {}
    for line in agent.ns.run("ipvsadm", "-l", "-n", "-t", vip, check=False).stdout.splitlines():
        words = line.split()
        if words[:1] == ["->"] and words[1] != "RemoteAddress:Port":
            found[words[1]] = (int(words[3]), int(words[4]))
    return found


@pytest.mark.parametrize(
    ("kind", "vip", "port"),
    [("tcp", VIP, 80), ("tcp", VIP6, 80), ("udp", VIP, 53), ("udp", VIP6, 53), ("sctp", VIP, 99)],
    ids=str,
)
def test_round_robin_is_exact(agent: NodeAgent, client: Caller, kind: str, vip: str, port: int) -> None:
    agent.start()
    assert client.tally(90, vip, port, kind=kind) == {"pod0": 30, "pod1": 30, "pod2": 30}


def test_everybody_reaches_a_service(agent: NodeAgent, world: Topology) -> None:
    agent.start()
    places = {"client": world.client, "node": world.node, **{f"pod{n}": p.ns for n, p in enumerate(world.pods)}}
    for place, ns in places.items():
        for vip in (VIP, VIP6):
            # pods reach themselves too: every third connection is a hairpin
            assert (place, vip, Caller(ns).tally(6, vip, 80)) == (place, vip, {"pod0": 2, "pod1": 2, "pod2": 2})


def test_a_vip_answers_on_its_services_ports_only(agent: NodeAgent, world: Topology, client: Caller) -> None:
    agent.start()
    with host_server(world.node):
        assert client.ask(world.node_addresses[0], 9376) == "host"
        for caller in (client, Caller(world.node), Caller(world.pods[0].ns)):
            assert caller.ask(VIP, 9376) == "refused"
            assert caller.ask(VIP, 9376, kind="udp") == "refused"
    assert agent.ns.run("ping", "-c1", "-W2", VIP, check=False).returncode != 0
    assert world.client.run("ping", "-c1", "-W2", VIP, check=False).returncode != 0


def test_a_service_without_endpoints_refuses_and_then_serves(agent: NodeAgent, world: Topology, client: Caller) -> None:
    agent.write(manifest([]))
    agent.start()
    assert client.ask(VIP, 80) == "refused"
    assert client.ask(VIP, 53, kind="udp") == "refused"
    agent.write(manifest([world.pods[1].addresses]))
    eventually("the endpoint serves", lambda: client.ask(VIP, 80) == "pod1")


def test_affinity_keeps_a_client_with_its_server(agent: NodeAgent, world: Topology, client: Caller) -> None:
    config = {"clientIP": {"timeoutSeconds": 60}}
    agent.write(manifest([p.addresses for p in world.pods], sessionAffinity="ClientIP", sessionAffinityConfig=config))
    agent.start()
    assert len(client.tally(12, VIP, 80)) == 1
    by_pod = [Caller(pod.ns).tally(4, VIP, 80) for pod in world.pods]
    assert all(len(one) == 1 for one in by_pod)
    assert len({next(iter(one)) for one in by_pod}) > 1


def test_a_removed_endpoint_drains(agent: NodeAgent, world: Topology, client: Caller) -> None:
    agent.start()
    held = [client.hold(VIP, 80) for _ in range(3)]
    assert sorted(one.server for one in held) == ["pod0", "pod1", "pod2"]
    leaving = next(one for one in held if one.server == "pod2")
    key = f"{world.pods[2].v4}:9376"
    agent.write(manifest([p.addresses for p in world.pods[:2]]))
    eventually("weight 0", lambda: real_servers(agent).get(key, (1, 0))[0] == 0)
    assert client.tally(20, VIP, 80) == {"pod0": 10, "pod1": 10}
    assert all(one.beats() for one in held)
    row = next(line for line in agent.run("show").stdout.splitlines() if key in line)
    assert "draining" in row
    # a killed agent leaves it draining, and the next one goes on with the same clock
    agent.stop(signal.SIGKILL)
    agent.start()
    assert agent.status()["draining"] >= 1
    assert all(one.beats() for one in held)
    # wanted again: revived
    agent.write(manifest([p.addresses for p in world.pods]))
    eventually("weight 1", lambda: real_servers(agent).get(key, (0, 0))[0] == 1)
    assert leaving.beats()
    for one in held:
        one.close()


def test_a_drain_ends_at_its_deadline(agent: NodeAgent, world: Topology, client: Caller) -> None:
    quick = {"dataplane.io/drain-seconds": "3"}
    agent.write(manifest([p.addresses for p in world.pods], quick))
    agent.start()
    held = [client.hold(VIP, 80) for _ in range(3)]
    agent.write(manifest([p.addresses for p in world.pods[:2]], quick))
    key = f"{world.pods[2].v4}:9376"
    eventually("the deadline", lambda: key not in real_servers(agent), 20)
    assert [one.beats() for one in held if one.server != "pod2"] == [True, True]
    for one in held:
        one.close()


def test_a_removed_service_finishes_its_connections_and_takes_no_new_ones(
    agent: NodeAgent, world: Topology, client: Caller
) -> None:
    agent.start()
    held = client.hold(VIP, 80)
    agent.write("# nothing\n")
    agent.file.rename(agent.folder / "gone")
    eventually("new ones are refused", lambda: client.ask(VIP, 80, timeout=2) == "refused")
    assert held.beats()
    held.close()


def test_udp_moves_at_once(agent: NodeAgent, world: Topology, client: Caller) -> None:
    agent.start()
    assert client.tally(6, VIP, 53, kind="udp") == {"pod0": 2, "pod1": 2, "pod2": 2}
    agent.write(manifest([world.pods[0].addresses]))
    eventually("only pod0", lambda: set(client.tally(3, VIP, 53, kind="udp")) == {"pod0"})
    assert client.tally(10, VIP, 53, kind="udp") == {"pod0": 10}


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
        while done_in["churn"] < 4000:
            keep = rng.sample(world.pods, rng.randint(1, 3))
            agent.write(manifest([pod.addresses for pod in keep]))
            changes += 1
            stop.wait(0.2)
        phase["name"] = "kill"
        while done_in["kill"] < 3000:
            agent.stop(signal.SIGKILL)
            agent.write(manifest([pod.addresses for pod in rng.sample(world.pods, 2)]))
            agent.start()
            kills += 1
        phase["name"] = "resync"
        while done_in["resync"] < 3000:
            agent.send(signal.SIGHUP)
            resyncs += 1
            stop.wait(0.2)
    finally:
        stop.set()
        caller.join(60)
    assert results == {"ok": results.total()}
    assert results.total() >= 10_000
    assert min(changes, resyncs) >= 20
    assert kills >= 2
    assert [one.server for one in held if not one.beats()] == []
    for one in held:
        one.close()
