"""Real packets through the real agent in ipvs mode: what only it has, real servers that drain."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from .lanes import build_world
from .netns import Topology
from .node_agent import VIP, NodeAgent, manifest, node_agent
from .traffic import Caller, eventually

pytestmark = pytest.mark.ipvs


@pytest.fixture(scope="module")
def world() -> Iterator[Topology]:
    with build_world() as built:
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
