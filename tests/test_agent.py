"""The agent's loop: what fails again and again is tried after pauses, and never in a hurry."""

import asyncio
import contextlib
import errno
import os

import pytest

from dataplane.agent import Agent, AgentOptions
from dataplane.backend import Options
from dataplane.desired import Rules
from dataplane.errors import KernelError
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
