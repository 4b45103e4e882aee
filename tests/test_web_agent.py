"""Metrics and the page of a real agent with real traffic, in every mode; the other witnesses are the clients."""

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from .lanes import LANES, PARAMETERS, Lane, build_world
from .netns import Topology
from .node_agent import VIP, VIP6, NodeAgent, manifest, node_agent
from .traffic import Caller, eventually
from .web_stage import events, request

PORT = 10249
WORDS = re.compile(r"dataplane\0web\0")


@pytest.fixture(scope="module", params=PARAMETERS)
def lane(request: pytest.FixtureRequest) -> Lane:
    assert isinstance(request.param, Lane)
    return request.param


@pytest.fixture(scope="module")
def world(lane: Lane) -> Iterator[Topology]:
    with build_world() as built:
        yield built


@pytest.fixture
def agent(world: Topology, lane: Lane, tmp_path: Path) -> Iterator[NodeAgent]:
    with node_agent(world.node, tmp_path, *lane.arguments, "--resync-seconds", "3") as started:
        started.metrics = f"127.0.0.1:{PORT}"
        started.probe = "auto"
        started.write(manifest([pod.addresses for pod in world.pods]))
        yield started
    started.run("cleanup", "--all")


Sample = tuple[dict[str, str], float]


def scrape(agent: NodeAgent) -> dict[str, list[Sample]]:
    with agent.ns.enter():
        answer, body = request(PORT, "/metrics")
    assert answer.status == 200
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
    return found


def hits(found: dict[str, list[Sample]], vip: str, port: int) -> Counter[str]:
    """By backend."""
    tally: Counter[str] = Counter()
    for labels, value in found["dataplane_backend_hits_total"]:
        if (labels["local_address"], labels["local_port"]) == (vip, str(port)):
            tally[labels["remote_address"]] += int(value)
    return tally


def memory(pid: int) -> int:
    """Kilobytes."""
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0])


def web_processes(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(each) for each in children if WORDS.search(Path(f"/proc/{each}/cmdline").read_text())]


def test_metrics_are_what_clients_have_counted(agent: NodeAgent, world: Topology, lane: Lane) -> None:
    agent.start()
    assert agent.process is not None
    assert web_processes(agent.process.pid) == []
    client = Caller(world.client)
    names = {f"pod{number}": pod for number, pod in enumerate(world.pods)}
    tallies = {vip: client.tally(60, vip, 80) for vip in (VIP, VIP6)}
    found: dict[str, list[Sample]] = {}

    def agree() -> bool:
        nonlocal found
        found = scrape(agent)
        return all(
            hits(found, vip, 80)
            == {(names[who].v6 if ":" in vip else names[who].v4): count for who, count in told.items()}
            for vip, told in tallies.items()
        )

    eventually("metrics agree with the clients", agree, 60, 0.5)
    (services,) = [
        value
        for labels, value in found["dataplane_service_hits_total"]
        if (labels["local_address"], labels["local_port"], labels["inside"]) == (VIP, "80", "false")
    ]
    assert services == 60
    labels, _ = found["dataplane_backend_hits_total"][0]
    assert (labels["namespace"], labels["service"]) == ("default", "web")
    assert found["dataplane_build_info"][0][0]["mode"] == lane.mode
    assert found["dataplane_agent_up"] == found["dataplane_healthy"] == [({}, 1.0)]
    assert found["dataplane_hits_source_info"][0][0]["source"] in ("probe", lane.mode)


def test_values_never_fall_while_a_backend_leaves_and_comes_back(agent: NodeAgent, world: Topology) -> None:
    agent.start()
    client = Caller(world.client)
    everybody = [pod.addresses for pod in world.pods]
    before: dict[tuple[str, ...], float] = {}
    total = 0
    for pods in (everybody, everybody[1:], everybody, everybody[:2], everybody):
        if total:
            agent.change(manifest(pods))
        total += sum(client.tally(20, VIP, 80).values())
        for name, samples in scrape(agent).items():
            if name.startswith("dataplane_") and name.endswith(("_total", "_bucket", "_count")):
                for labels, value in samples:
                    key = (name, *sorted(map(str, labels.items())))
                    assert value >= before.get(key, 0), key
                    before[key] = value
    # a counter of the kernel that goes takes with it what nobody has seen of it yet: the probe's do not go
    assert 0 < sum(hits(scrape(agent), VIP, 80).values()) <= total


def test_the_page_gets_live_figures(agent: NodeAgent, world: Topology) -> None:
    agent.start()
    client = Caller(world.client)
    with agent.ns.enter(), events(PORT, f"?open={VIP}:80/TCP") as news:
        next(news)
        limit = time.monotonic() + 120
        for kind, told in news:
            if kind == "points" and any(sum(filter(None, each[1:])) for each in told["points"]):
                break
            assert time.monotonic() < limit, "no connection shows"
            client.tally(30, VIP, 80)  # again: those of before the probe took over are in no rate
    assert len(told["names"]) == 3


def test_the_agent_does_not_grow_and_a_killed_one_leaves_no_process(agent: NodeAgent) -> None:
    agent.start()
    assert agent.process is not None
    pid = agent.process.pid
    agent.status()
    before = memory(pid)
    for _ in range(20):
        scrape(agent)
    (web,) = web_processes(pid)
    assert memory(pid) - before <= 2048
    agent.stop(signal.SIGKILL)
    eventually("the web server ends as well", lambda: not Path(f"/proc/{web}").exists(), 10)
    agent.start()
    assert scrape(agent)["dataplane_agent_up"] == [({}, 1.0)]
    assert agent.stop() == 0
    assert "metrics not served" not in (agent.folder / "agent-2.log").read_text()


def test_a_web_server_that_is_killed_disturbs_nobody(agent: NodeAgent) -> None:
    agent.start()
    assert agent.process is not None
    scrape(agent)
    (web,) = web_processes(agent.process.pid)
    os.kill(web, signal.SIGKILL)
    assert scrape(agent)["dataplane_agent_up"] == [({}, 1.0)]
    assert web_processes(agent.process.pid) != [web]
    assert agent.status()["healthy"]


@pytest.mark.parametrize("lane", [pytest.param(LANES[1], marks=pytest.mark.root)], indirect=True)
def test_what_others_change_is_drift(agent: NodeAgent, world: Topology) -> None:
    agent.start()
    assert scrape(agent)["dataplane_drift_objects_total"] == [({}, 0.0)]
    world.node.run("nft", "delete", "table", "inet", "dataplane-nftables")
    eventually("it is put right", lambda: scrape(agent)["dataplane_drift_objects_total"][0][1] > 0, 30, 0.5)
    assert scrape(agent)["dataplane_drift_syncs_total"] == [({}, 1.0)]
