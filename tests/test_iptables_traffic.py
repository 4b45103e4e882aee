"""Real packets through the real agent in iptables mode: what only it says, over both back ends."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .lanes import LANES, Lane, build_world
from .netns import Topology
from .node_agent import VIP, VIP6, NodeAgent, manifest, node_agent

pytestmark = pytest.mark.root


@pytest.fixture(scope="module", params=[lane for lane in LANES if lane.mode == "iptables"], ids=str)
def lane(request: pytest.FixtureRequest) -> Lane:
    chosen: Lane = request.param
    return chosen


@pytest.fixture(scope="module")
def world() -> Iterator[Topology]:
    with build_world() as built:
        yield built


@pytest.fixture
def agent(world: Topology, lane: Lane, tmp_path: Path) -> Iterator[NodeAgent]:
    with node_agent(world.node, tmp_path, *lane.arguments) as one:
        one.write(manifest([pod.addresses for pod in world.pods]))
        yield one
    one.run("cleanup", "--force", "--mode", "iptables")  # of either back end


def test_who_pings_a_vip_is_told_that_there_is_nothing(agent: NodeAgent, world: Topology) -> None:
    agent.start()
    for vip in (VIP, VIP6):
        answer = world.client.run("ping", "-c1", "-W2", vip, check=False)
        assert "ort unreachable" in answer.stdout.lower()
