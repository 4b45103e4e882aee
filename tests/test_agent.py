"""The agent's loop: what fails again and again is tried after pauses, and never in a hurry."""

import asyncio
import contextlib
import errno
import os
from collections.abc import Mapping
from typing import Any

import pytest

from dataplane.agent import Agent, AgentOptions
from dataplane.backend import Options
from dataplane.desired import Rules
from dataplane.errors import KernelError
from dataplane.model import (
    ObjectName,
    Protocol,
    Service,
    ServicePort,
    ServiceType,
    ServiceView,
    Update,
    parse_address,
)
from dataplane.reconciler import Reconciler
from dataplane.testing import FakeBackend

from .test_staleness import Lines


class DeafNode:
    """A node whose addresses cannot be read."""

    def __init__(self) -> None:
        self.readings = 0

    def fileno(self) -> int:
        return os.open("/dev/null", os.O_RDONLY)

    def changed(self) -> bool:
        return True

    def options(self) -> Options:
        return Options()

    def rules(self) -> Rules:
        self.readings += 1
        raise KernelError("dump", "addresses", errno.EINTR)


async def for_a_while(agent: Agent, seconds: float) -> None:
    async def silence() -> None:
        await asyncio.sleep(60)

    reader = asyncio.create_task(silence())
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(agent._work(reader), seconds)
    reader.cancel()


class Names:
    """What answers names; keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Update] = []

    def start(self) -> None: ...
    def close(self) -> None: ...

    def update(self, update: Update) -> None:
        self.told.append(update)

    def status(self) -> dict[str, Any]:
        return {"updates": len(self.told)}

    def service_counts(self) -> Mapping[ObjectName, int]:
        return {}

    def explain(self, name: str, qtype: str, namespace: str) -> dict[str, Any]:
        raise ValueError(name)


def test_names_follow_in_the_same_step_as_the_kernel_also_those_it_has_nothing_of() -> None:
    backend, log = FakeBackend(), Lines()
    names = Names()
    agent = Agent(Reconciler(backend, Rules()), log, AgentOptions(), log, names=names)
    web, external = ObjectName("default", "web"), ObjectName("default", "external")
    port = ServicePort("http", Protocol.TCP, 80)
    first = Update({web: ServiceView(Service(web, cluster_ips=(parse_address("10.0.0.1"),), ports=(port,)))})
    second = Update({external: ServiceView(Service(external, type=ServiceType.EXTERNAL_NAME, external_name="x.y"))})
    agent._updates += [first, second]
    assert agent._take_updates()
    assert names.told == [first, second]
    assert len(backend.observe().servers) == 1
    assert agent.status()["dns"] == {"updates": 2}


def test_addresses_that_cannot_be_read_are_asked_for_after_a_pause() -> None:
    log, node = Lines(), DeafNode()
    agent = Agent(Reconciler(FakeBackend(), Rules()), log, AgentOptions(), log, node)
    asyncio.run(for_a_while(agent, 1.5))
    assert 1 <= node.readings <= 3
    assert 1 <= sum(event == "sync" for event, _ in log.lines) <= 4


def test_a_look_that_fails_is_repeated_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    log, looks = Lines(), []

    def verify(cause: str) -> None:
        looks.append(cause)
        raise KernelError("dump", "everything", errno.EINTR)

    reconciler = Reconciler(FakeBackend(), Rules())
    monkeypatch.setattr(reconciler, "verify", verify)
    agent = Agent(reconciler, log, AgentOptions(resync_seconds=0.1), log)
    asyncio.run(for_a_while(agent, 1.5))
    assert 1 <= len(looks) <= 3
