"""The agent with a Kubernetes API as its source, in nftables mode, in a network namespace of its own."""

import asyncio
import datetime
import json
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from .kube_api import KubeApi, endpoint_slice, kubeconfig, node, service, service_cidr
from .netns import NetNs
from .node_agent import NodeAgent
from .traffic import eventually

pytestmark = pytest.mark.root


class Served:
    """A scripted API server that runs in a thread in a namespace, where the agent is."""

    def __init__(self, ns: NetNs) -> None:
        self.api = KubeApi()
        self._loop = asyncio.new_event_loop()
        self._end = False
        self._thread = threading.Thread(target=self._run, args=(ns,), daemon=True)
        self._thread.start()

    def _run(self, ns: NetNs) -> None:
        with ns.enter(), asyncio.Runner(loop_factory=lambda: self._loop) as runner:  # which cancels what is left
            runner.run(self._ended())

    async def _ended(self) -> None:
        while not self._end:
            await asyncio.sleep(0.05)

    def call(self, what: Callable[[KubeApi], Any]) -> Any:
        """Do something with the server, in its thread."""

        async def do() -> Any:
            made = what(self.api)
            return await made if asyncio.iscoroutine(made) else made

        return asyncio.run_coroutine_threadsafe(do(), self._loop).result(30)

    def end(self) -> None:
        self.call(lambda api: api.stop())
        self._end = True
        self._thread.join(10)


@contextmanager
def watching(folder: Path, *options: str) -> Iterator[tuple[Served, NodeAgent]]:
    """A server that was there once and is not now, and an agent that has just been started."""
    with NetNs.create("kube") as ns:
        served = Served(ns)
        served.call(lambda api: api.start())
        url = served.api.url
        served.call(lambda api: api.stop())
        config = folder / "kubeconfig"
        config.write_text(kubeconfig(url))
        agent = NodeAgent(ns, folder)
        agent.starts = 1
        with (folder / "agent-1.log").open("wb") as log:
            agent.process = subprocess.Popen(
                agent.command(
                    *("run", "--mode", "nftables", "--kubeconfig", str(config), "--log-format", "json"),
                    *("--metrics-bind-address", "", *options),
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            yield served, agent
        finally:
            if agent.process.poll() is None:
                agent.process.kill()
                agent.process.wait(30)
            served.end()


def rules(ns: NetNs) -> str:
    """What nft shows, without the counters' values."""
    return re.sub(r"packets \d+ bytes \d+", "", ns.run("nft", "list", "ruleset").stdout)


def watches(agent: NodeAgent) -> dict[str, Any]:
    found: dict[str, Any] = agent.status()["source"]["watches"]
    return found


def test_what_the_api_has_is_programmed_and_an_outage_changes_nothing(tmp_path: Path) -> None:
    with watching(tmp_path) as (served, agent):
        eventually("it tells that the API is away", lambda: any(x["event"] == "watch lost" for x in agent.log()))
        assert watches(agent)["Service"]["deadSince"]
        assert "10.96." not in rules(agent.ns)
        for number in range(12):
            served.api.put(service(f"s{number}", f"10.96.0.{number + 1}"))
            served.api.put(endpoint_slice(f"s{number}-a", f"s{number}", f"10.244.0.{number + 1}"))
        served.call(lambda api: api.start())
        eventually("the first sync", lambda: "10.96.0.12" in rules(agent.ns))
        assert watches(agent)["Service"]["deadSince"] is None
        # a Service is added, another one loses its endpoint
        served.call(lambda api: api.put(service("late", "10.96.0.99")))
        served.call(lambda api: api.put(endpoint_slice("late-a", "late", "10.244.0.99")))
        served.call(lambda api: api.delete("EndpointSlice", "default/s0-a"))
        eventually("added", lambda: "10.244.0.99" in rules(agent.ns) and "10.244.0.1 " not in rules(agent.ns))

        served.call(lambda api: api.stop())
        before = rules(agent.ns)
        eventually("the outage is noticed", lambda: all(each["deadSince"] for each in watches(agent).values()))
        eventually("by trying again", lambda: "connect" in watches(agent)["Service"]["lastError"].lower())
        assert rules(agent.ns) == before
        # meanwhile a Service goes, and the API forgets how
        served.api.delete("Service", "default/late")
        served.api.compact()
        served.call(lambda api: api.start())
        eventually("the deletion is found by comparison", lambda: "10.96.0.99" not in rules(agent.ns))
        assert all(f"10.96.0.{number}" in rules(agent.ns) for number in range(1, 13))
        eventually("the watch is back", lambda: not watches(agent)["Service"]["deadSince"])

        # a list that is suddenly empty is held back
        served.api.objects.clear()
        served.api.version += 1
        served.api.compact()
        served.call(lambda api: api.break_all())
        eventually("held back", lambda: any("held_back" in line for line in agent.log()))
        assert all(f"10.96.0.{number}" in rules(agent.ns) for number in range(1, 13))

        before = rules(agent.ns)
        assert agent.stop() == 0
        assert rules(agent.ns) == before


def health(agent: NodeAgent, path: str) -> tuple[int, dict[str, Any]]:
    """The answer of kube-proxy's port."""
    done = agent.ns.run("curl", "-s", "-m", "5", "-w", "%{http_code}", f"http://127.0.0.1:10256{path}")
    return int(done.stdout[-3:]), json.loads(done.stdout[:-3])


def test_the_cluster_says_where_the_node_is_and_the_node_says_how_it_is(tmp_path: Path) -> None:
    with watching(tmp_path, "--node-name", "node-1", "--node-cidr") as (served, agent):
        hinted = endpoint_slice("web-a", "web", "10.244.1.1", "10.244.2.2")
        for endpoint, zone in zip(hinted["endpoints"], ("zone-a", "zone-b"), strict=True):
            endpoint |= {"zone": zone, "hints": {"forZones": [{"name": zone}]}}
        served.api.put(service("web"))
        served.api.put(hinted)
        served.api.put(node("node-1", "zone-a", "10.244.1.0/24"))
        served.api.put(service_cidr("kubernetes", "10.96.0.0/12"))
        served.call(lambda api: api.start())
        eventually("the first sync", lambda: "10.244.1.1" in rules(agent.ns))
        assert "10.244.2.2" not in rules(agent.ns)
        assert "ip saddr 10.244.1.0/24 goto" in rules(agent.ns)
        assert "ip daddr 10.96.0.0/12 drop" in rules(agent.ns)
        (first,) = [each for each in agent.log() if each["event"] == "sync"]
        assert first["cause"] == "start"
        eventually("an Event", lambda: [each["reason"] for each in served.api.events] == ["Starting"])
        code, told = health(agent, "/healthz")
        assert (code, told["healthy"], told["nodeEligible"]) == (200, True, True)

        # another zone: other endpoints, the same rules; another range: other rules, the same endpoints
        served.call(lambda api: api.put(node("node-1", "zone-b", "10.244.1.0/24")))
        eventually("the other zone's", lambda: "10.244.2.2" in rules(agent.ns) and "10.244.1.1" not in rules(agent.ns))
        elements = re.findall(r"elements = \{[^}]*\}", rules(agent.ns))
        served.call(lambda api: api.put(node("node-1", "zone-b", "10.244.7.0/24")))
        eventually("the other range", lambda: "ip saddr 10.244.7.0/24 goto" in rules(agent.ns))
        assert "10.244.1.0/24" not in rules(agent.ns)
        assert re.findall(r"elements = \{[^}]*\}", rules(agent.ns)) == elements
        served.call(lambda api: api.put(service_cidr("more", "10.80.0.0/16")))
        eventually("more cluster IPs", lambda: "{ 10.80.0.0/16, 10.96.0.0/12 } drop" in rules(agent.ns))

        # a change of an endpoint is timed from its trigger to the kernel
        changed = deepcopy(hinted)
        changed["endpoints"][1]["addresses"] = ["10.244.2.3"]
        moment = datetime.datetime.now(datetime.UTC).isoformat()
        changed["metadata"]["annotations"] = {"endpoints.kubernetes.io/last-change-trigger-time": moment}
        served.call(lambda api: api.put(changed))
        eventually("the change", lambda: "10.244.2.3" in rules(agent.ns))
        figures = agent.status()["figures"]
        assert sum(figures["networkProgramming"]["counts"]) == 1
        assert figures["networkProgramming"]["sum"] < 60

        # a node that goes: red for load balancers, and nothing of the kernel changes
        before = rules(agent.ns)
        taint = {"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}
        served.call(lambda api: api.put(node("node-1", "zone-b", "10.244.7.0/24", taints=[taint])))
        eventually("not eligible", lambda: health(agent, "/healthz")[0] == 503)
        assert health(agent, "/livez")[0] == 200
        assert agent.status()["figures"]["proxyChecks"]["livez 200"] == 1
        assert rules(agent.ns) == before
        assert agent.stop() == 0


def test_a_list_that_lacks_most_is_held_back_and_an_outage_of_any_length_changes_nothing(tmp_path: Path) -> None:
    with watching(tmp_path) as (served, agent):
        for number in range(30):
            served.api.put(service(f"s{number}", f"10.96.0.{number + 1}"))
            served.api.put(endpoint_slice(f"s{number}-a", f"s{number}", f"10.244.0.{number + 1}"))
        served.call(lambda api: api.start())
        eventually("the first sync", lambda: "10.96.0.30" in rules(agent.ns))
        before = rules(agent.ns)
        served.call(lambda api: api.stop())
        eventually("the outage is noticed", lambda: all(each["deadSince"] for each in watches(agent).values()))
        agent.send(signal.SIGHUP)  # reading again, and looking at everything, changes nothing either
        eventually("a look", lambda: any(each.get("cause") == "reload" for each in agent.log()))
        assert rules(agent.ns) == before
        for number in range(20):  # a server that lost a part of its store
            del served.api.objects["Service", f"default/s{number}"]
        served.api.version += 1
        served.api.compact()
        served.call(lambda api: api.start())
        eventually("held back", lambda: any("held_back" in line for line in agent.log()))
        assert all(f"10.96.0.{number + 1}" in rules(agent.ns) for number in range(30))
        assert json.loads(agent.run("status", "-o", "json", check=False).stdout)["heldBack"] == 20
        assert agent.stop() == 0


def test_an_agent_that_waits_for_the_api_can_be_stopped(tmp_path: Path) -> None:
    with watching(tmp_path) as (_, agent):
        eventually("it waits", lambda: any(x["event"] == "watch lost" for x in agent.log()))
        assert agent.stop(signal.SIGTERM) == 0


def test_commands_that_end_by_themselves_read_the_api_once(tmp_path: Path) -> None:
    with watching(tmp_path, "--node-name", "node-1") as (served, agent):
        eventually("it waits", lambda: any(x["event"] == "watch lost" for x in agent.log()))
        assert agent.stop() == 0
        api = ("--kubeconfig", str(tmp_path / "kubeconfig"), "--node-name", "node-1")
        unreachable = agent.run("check", *api, check=False)
        assert unreachable.returncode == 1
        assert "connect" in unreachable.stderr.lower()
        hinted = endpoint_slice("web-a", "web", "10.244.1.1", "10.244.2.2")
        for endpoint, zone in zip(hinted["endpoints"], ("zone-a", "zone-b"), strict=True):
            endpoint |= {"zone": zone, "hints": {"forZones": [{"name": zone}]}}
        served.api.put(service("web"))
        served.api.put(hinted)
        served.api.put(node("node-1", "zone-b"))
        served.call(lambda api: api.start())
        assert "1 Service, 1 virtual server, 1 real server, 0 problems" in agent.run("check", *api).stdout
        words = ("--from", "10.244.9.9", "--to", "default/web", "--manifests-only", "--mode", "nftables")
        asked = agent.run("explain", *words, *api).stdout
        assert "10.244.2.2" in asked
        assert "10.244.1.1" not in asked
        differs = agent.run("diff", "--mode", "nftables", *api, check=False)
        assert differs.returncode == 4
        assert "10.244.2.2" in differs.stdout
        assert "10.96.0.10" not in rules(agent.ns)
        agent.run("apply", "--mode", "nftables", *api)
        assert "10.244.2.2" in rules(agent.ns)
        assert agent.run("diff", "--mode", "nftables", *api).returncode == 0
        served.api.put(service("bad", port=0))
        bad = agent.run("check", *api, check=False)
        assert bad.returncode == 3
        assert "Service default/bad: spec.ports[0].port" in bad.stderr
