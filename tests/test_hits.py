"""Hits as `dataplane counters` tells them against what clients were told, in every mode, while everything changes.

Where the kernel allows a probe (the one with IPVS does) it has to be the probe that counts, and each hit must be there,
as in nftables mode without one; the rules of iptables lose what a real server counted after the last look at it.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dataplane.prober import COMPILING

from .lanes import LANES, PARAMETERS, Lane, build_world, scaled
from .netns import Topology
from .node_agent import VIP, VIP6, NodeAgent, manifest, node_agent
from .storm import storm
from .traffic import Caller, eventually

IPVS = LANES[0]


@pytest.fixture(scope="module", params=PARAMETERS)
def lane(request: pytest.FixtureRequest) -> Lane:
    chosen: Lane = request.param
    return chosen


@pytest.fixture(scope="module")
def world(lane: Lane) -> Iterator[Topology]:
    with build_world() as built:
        yield built


@pytest.fixture
def agent(world: Topology, lane: Lane, tmp_path: Path) -> Iterator[NodeAgent]:
    with node_agent(world.node, tmp_path, *lane.arguments, "--resync-seconds", "3", "--drain-seconds", "1") as started:
        started.probe = "auto"
        started.write(manifest([pod.addresses for pod in world.pods]))
        started.start()
        eventually("a probe, or why not", lambda: COMPILING not in counters(started)["counts"]["reason"], 120)
        yield started
    started.run("cleanup", "--force")


def counters(agent: NodeAgent) -> dict[str, Any]:
    """What `dataplane counters` tells, by the agent."""
    told: dict[str, Any] = json.loads(agent.run("counters", "-o", "json").stdout)
    return told


def hits(told: dict[str, Any], world: Topology, vip: str, port: int) -> tuple[dict[str, int], int]:
    """Of one virtual server: by pod, and in all."""
    names = {address: f"pod{number}" for number, pod in enumerate(world.pods) for address in pod.addresses}
    (service,) = [each for each in told["services"] if (each["address"], each["port"]) == (vip, port)]
    by_pod = {names[each["backend"].rpartition(":")[0].strip("[]")]: each["hits"] for each in service["backends"]}
    return {name: count for name, count in by_pod.items() if count}, service["hits"]


def test_hits_are_what_the_servers_answered_also_of_those_that_left_and_came_back(
    agent: NodeAgent, world: Topology, lane: Lane
) -> None:
    client = Caller(world.client)
    first = client.tally(30, VIP, 80) + client.tally(3, VIP, 80)
    datagrams = client.tally(12, VIP6, 53, kind="udp")
    eventually(f"hits are {first}", lambda: hits(counters(agent), world, VIP, 80) == (first, 33), 10)
    assert hits(counters(agent), world, VIP6, 53) == (datagrams, 12)
    assert counters(agent)["counts"]["source"] == ("probe" if lane is IPVS else lane.mode)
    agent.change(manifest([pod.addresses for pod in world.pods[1:]]))
    second = client.tally(30, VIP, 80)
    here = {name: first[name] + second[name] for name in ("pod1", "pod2")}
    eventually(
        "pod0 is gone, and its hits stay the Service's",
        lambda: hits(counters(agent), world, VIP, 80) in ((here, 63), (here | {"pod0": first["pod0"]}, 63)),
        10,
    )
    agent.change(manifest([pod.addresses for pod in world.pods]))
    third = client.tally(30, VIP, 80)
    wanted = (first + second + third, 93)
    eventually(f"pod0 is back, hits are {wanted}", lambda: hits(counters(agent), world, VIP, 80) == wanted, 10)


@pytest.mark.slow
def test_every_connection_is_counted_once_while_backends_change(
    agent: NodeAgent, world: Topology, lane: Lane, record_property: Any
) -> None:
    """At full speed; full size: 1,000,000 connections. pod0 stays, the others come and go."""
    connections, changes = scaled(1_000_000), scaled(400)
    rng = random.Random(43)
    sets: list[tuple[int, ...]] = [(0, 1), (0, 2), (0, 1, 2)]
    current = sets[-1]
    before = dict.fromkeys((VIP, VIP6), 0)
    with storm(world.client, (VIP, VIP6), 80, long_lived=0, pause=0) as running:
        for number in range(changes):
            current = rng.choice([each for each in sets if each != current])
            agent.change(manifest([world.pods[each].addresses for each in current]))
            running.wait_for(connections * number // changes)
            told = counters(agent)
            for vip, least in before.items():
                total = hits(told, world, vip, 80)[1]
                assert total >= least, "an exported value fell"
                before[vip] = total
        running.wait_for(connections)
        assert not running.failures()
    if current != sets[-1]:
        agent.change(manifest([pod.addresses for pod in world.pods]))
    for client, vip in enumerate(before):
        truth = running.answered(client)

        def is_true(vip: str = vip, truth: dict[str, int] = truth) -> bool:
            told, all_hits = hits(counters(agent), world, vip, 80)
            if lane.mode == "iptables":
                return told["pod0"] == truth["pod0"] and all_hits <= sum(truth.values())
            return told == truth and all_hits == sum(truth.values())

        eventually(f"{vip}: {truth}", is_true, 10)
    told = counters(agent)
    assert sum(told["counts"]["missed"].values()) == 0
    who = told["counts"]["source"]
    record_property("hits", f"{lane}: {running.connections} connections, {changes} changes, counted by {who}")
