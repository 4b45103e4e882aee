"""`/healthz` and `/livez` over real sockets, with kube-proxy's meaning."""

import asyncio
import contextlib
import datetime
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dataplane.agent import Agent, AgentOptions
from dataplane.desired import Rules
from dataplane.errors import KernelError
from dataplane.figures import Figures
from dataplane.healthz_server import Health, HealthzServer, healthz_body
from dataplane.model import Update
from dataplane.reconciler import Reconciler
from dataplane.tcp_listener import Listen
from dataplane.testing import FakeBackend

from .test_health_responder import asked, free_port, raw
from .test_staleness import Lines

WELL = Health(True, True, True, 1000.0)


class Cluster:
    """What a cluster says of its node, and how its watches are."""

    def __init__(self) -> None:
        self.eligible = True
        self.dead: float | None = None
        self.is_stuck = False

    def dead_since(self) -> float | None:
        return self.dead

    def stuck(self) -> bool:
        return self.is_stuck


@contextlib.asynccontextmanager
async def served(health: Health) -> AsyncIterator[tuple[int, Figures, list[str]]]:
    port, figures, failures = free_port(), Figures(), list[str]()
    server = HealthzServer(Listen("127.0.0.1", port), Lines(), lambda: health, figures.checked, failures.append)
    server.start()
    await asyncio.sleep(0.05)
    try:
        yield port, figures, failures
    finally:
        await server.close()


async def get(port: int, path: str, method: str = "GET") -> tuple[int, dict[str, Any]]:
    answer = await asyncio.to_thread(asked, port, "127.0.0.1", method, path)
    text: str = answer.text  # type: ignore[attr-defined]
    return answer.status, json.loads(text) if text.startswith("{") else {}


@pytest.mark.parametrize(
    ("health", "healthz", "livez"),
    [
        (WELL, 200, 200),
        (WELL._replace(eligible=False, reasons=("the Node goes",)), 503, 200),
        (WELL._replace(current=False, reasons=("the watch is dead",)), 503, 200),
        (WELL._replace(live=False, reasons=("a sync is overdue",)), 503, 503),
    ],
    ids=["well", "the node goes", "the watch is dead", "behind"],
)
def test_what_is_answered(health: Health, healthz: int, livez: int) -> None:
    async def check() -> None:
        async with served(health) as (port, figures, _):
            status, body = await get(port, "/healthz")
            assert status == healthz
            assert body["nodeEligible"] is health.eligible
            assert ("reasons" in body) is (healthz == 503)
            assert (await get(port, "/livez?verbose"))[0] == livez
            assert "nodeEligible" not in (await get(port, "/livez"))[1]
            assert (await get(port, "/healthz", "HEAD")) == (healthz, {})
            assert (await get(port, "/metrics"))[0] == 404
            assert figures.proxy_checks[f"healthz {healthz}"] == 2
            assert figures.proxy_checks[f"livez {livez}"] == 2

    asyncio.run(check())


def test_who_is_well_was_updated_just_now_and_who_is_not_tells_when_he_last_was() -> None:
    told = json.loads(healthz_body("livez", WELL, True, 5000.0))
    assert told["lastUpdated"] == told["currentTime"] == "1970-01-01T01:23:20Z"
    told = json.loads(healthz_body("healthz", WELL._replace(live=False), False, 5000.5))
    assert told["lastUpdated"] == "1970-01-01T00:16:40Z"
    assert datetime.datetime.fromisoformat(told["currentTime"]).timestamp() == 5000.5
    never = json.loads(healthz_body("healthz", WELL._replace(updated=0.0, current=False), False, 5000.0))
    assert never["lastUpdated"] == "0001-01-01T00:00:00Z"


def test_garbage_is_refused() -> None:
    async def check() -> None:
        async with served(WELL) as (port, _, _):
            for data in (b"\x16\x03\x01\r\n\r\n", b"GET\r\n\r\n", b"\r\n\r\n", b"A" * 20000):
                answer = await asyncio.to_thread(raw, port, data)
                assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
            assert (await get(port, "/livez"))[0] == 200

    asyncio.run(check())


def test_a_port_in_use_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataplane.healthz_server.BUSY_SECONDS", 0.02)

    async def check() -> None:
        async with served(WELL) as (port, figures, _):
            failures: list[str] = []
            log = Lines()
            second = HealthzServer(Listen("127.0.0.1", port), log, lambda: WELL, figures.checked, failures.append)
            second.start()
            await asyncio.sleep(0.2)
            await second.close()
            assert failures == [f"127.0.0.1:{port}: address already in use"]
            assert [event for event, _ in log.lines] == ["healthz not served"]

    asyncio.run(check())


# --------------------------------------------------------------------------------------------- the agent's health


def agent_of(cluster: Cluster | None, seconds: float = 30.0) -> Agent:
    log = Lines()
    options = AgentOptions(resync_seconds=seconds)
    return Agent(Reconciler(FakeBackend(), Rules()), log, options, log, cluster=cluster)


def verdict(agent: Agent) -> tuple[bool, bool]:
    """Well by `/healthz`, well by `/livez`."""
    health = agent.proxy_health()
    return health.live and health.current and health.eligible, health.live


def test_an_agent_that_has_nothing_to_do_is_well_however_long_ago_it_last_did_something() -> None:
    assert verdict(agent_of(None)) == (True, True)
    assert verdict(agent_of(Cluster())) == (True, True)


def test_a_node_that_goes_and_a_dead_watch_are_for_load_balancers_only() -> None:
    cluster = Cluster()
    agent = agent_of(cluster)
    cluster.eligible = False
    assert verdict(agent) == (False, True)
    cluster.eligible = True
    cluster.dead = time.time() - 59
    assert verdict(agent) == (True, True)
    cluster.dead = time.time() - 61
    assert verdict(agent) == (False, True)
    assert "watch is dead" in agent.proxy_health().reasons[0]


def test_a_watch_that_no_longer_tries_is_for_the_kubelet_too() -> None:
    cluster = Cluster()
    cluster.is_stuck = True
    assert verdict(agent_of(cluster)) == (False, False)


def test_a_sync_that_is_overdue_is_red_until_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = agent_of(Cluster(), 0.1)
    reconciler = agent._reconciler
    real, broken = reconciler.sync, [True]

    def sync(*given: Any) -> Any:
        if broken[0]:
            raise KernelError("commit", "everything", 16)
        return real(*given)

    monkeypatch.setattr(reconciler, "sync", sync)
    monkeypatch.setattr("dataplane.agent.BACKOFF_LEAST", 0.05)
    agent._backoff = 0.05

    async def check() -> None:
        async def silence() -> None:
            await asyncio.sleep(60)

        reader = asyncio.create_task(silence())
        work = asyncio.create_task(agent._work(reader))
        agent._updates.append(Update({}))
        agent._reload = True
        agent._fall_behind()
        agent._wake.set()
        assert verdict(agent) == (True, True)
        while verdict(agent)[1]:
            await asyncio.sleep(0.02)
        assert "overdue" in agent.proxy_health().reasons[0]
        broken[0] = False
        while not verdict(agent)[0]:
            await asyncio.sleep(0.02)
        work.cancel()
        reader.cancel()

    asyncio.run(asyncio.wait_for(check(), 20))


def test_a_change_counts_as_programmed_when_the_kernel_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = agent_of(Cluster())
    programmed = agent._figures.network_programming
    agent._updates.append(Update({}, triggers=(time.time() - 2.2, time.time() + 5)))
    agent._last_error = "the kernel does not answer"
    agent._take_updates()
    assert programmed.count == 0
    agent._report(agent._reconciler.sync("retry"))
    assert programmed.count == 2
    assert programmed.counts[0] == 1  # the clock of another machine may be ahead of ours
    assert programmed.sum == pytest.approx(2.2, abs=0.2)
