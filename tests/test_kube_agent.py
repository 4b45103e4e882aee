"""The agent with a Kubernetes API as its source, in nftables mode, in a network namespace of its own."""

import asyncio
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .kube_api import KubeApi, endpoint_slice, kubeconfig, service
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
def watching(folder: Path) -> Iterator[tuple[Served, NodeAgent]]:
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
                    *("--metrics-bind-address", ""),
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


def test_an_agent_that_waits_for_the_api_can_be_stopped(tmp_path: Path) -> None:
    with watching(tmp_path) as (_, agent):
        eventually("it waits", lambda: any(x["event"] == "watch lost" for x in agent.log()))
        assert agent.stop(signal.SIGTERM) == 0
