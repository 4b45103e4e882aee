"""The probe's life: the agent never waits for it, and whatever goes wrong is a reason beside the numbers."""

import asyncio
import os
from collections.abc import Callable, Collection, Iterable
from typing import Any

from dataplane.counters import Probe
from dataplane.errors import DataplaneError, ProbeUnavailable
from dataplane.model import VirtualAddress, VirtualServer
from dataplane.prober import COMPILING, Prober

from . import words
from .test_looks import FakeProbe

SERVERS = {each.at: each for each in (words.server("TCP 10.0.0.1:80 rr label=a/b -> 10.1.0.1:80, 10.1.0.2:80"),)}


class Scene:
    """A user of a probe, a log, and a child that ends when told."""

    def __init__(self, outcome: Probe | DataplaneError) -> None:
        self.outcome = outcome
        self.story: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self.sound: bool | OSError = True
        self.read, self._write = os.pipe()

    def starter(self, backends: int, frontends: int) -> "Scene":
        self.sizes.append((backends, frontends))
        return self

    def fileno(self) -> int:
        return self.read

    def ends(self) -> None:
        os.write(self._write, b"x")

    def finish(self) -> Probe:
        os.read(self.read, 1)
        if isinstance(self.outcome, DataplaneError):
            raise self.outcome
        return self.outcome

    def cancel(self) -> None:
        self.story.append("cancelled")

    def use(self, probe: Probe, addresses: Collection[VirtualAddress]) -> None:
        self.story.append(f"uses it for {len(addresses)}")

    def give_up_probe(self, reason: str) -> None:
        self.story.append(reason)

    def check(self, servers: Iterable[VirtualServer]) -> bool:
        if isinstance(self.sound, OSError):
            raise self.sound
        return self.sound

    def info(self, event: str, **fields: Any) -> None:
        self.story.append(f"log: {fields['result']}")

    def play(self, *acts: Callable[[Prober], object], switched_off: bool = False) -> list[str]:
        async def run() -> None:
            prober = Prober(self, lambda: SERVERS, self, None if switched_off else self.starter)
            for act in acts:
                act(prober)
                await asyncio.sleep(0.02)
            prober.end()

        try:
            asyncio.run(run())
        finally:
            os.close(self.read)
            os.close(self._write)
        return self.story


def test_it_is_used_when_the_child_has_finished_and_not_before() -> None:
    scene = Scene(FakeProbe())
    assert scene.play(Prober.begin, lambda _: None, lambda _: scene.ends()) == [
        COMPILING,
        "uses it for 1",
        "log: counts",
    ]
    assert scene.sizes == [(2, 1)]


def test_why_there_is_none_is_told() -> None:
    scene = Scene(ProbeUnavailable("no BTF"))
    told = [COMPILING, "no BTF", "log: none, the mode's own counters count"]
    assert scene.play(Prober.begin, lambda _: scene.ends()) == told


def test_an_agent_that_ends_takes_the_child_along() -> None:
    assert Scene(FakeProbe()).play(Prober.begin) == [COMPILING, "cancelled"]


def test_switched_off() -> None:
    assert Scene(FakeProbe()).play(Prober.begin, switched_off=True) == ["the probe is switched off"]


def test_what_a_reloaded_module_broke_is_made_anew() -> None:
    scene = Scene(FakeProbe())

    def breaks(prober: Prober) -> None:
        scene.sound = False
        prober.check()
        scene.ends()

    acts = (Prober.begin, lambda _: scene.ends(), Prober.check, breaks)
    once = [COMPILING, "uses it for 1", "log: counts"]
    assert scene.play(*acts) == [*once, *once]


def test_a_look_at_it_that_fails_ends_it() -> None:
    scene = Scene(FakeProbe())
    scene.sound = OSError(9, "Bad file descriptor")
    assert scene.play(Prober.check) == ["[Errno 9] Bad file descriptor", "log: none, the mode's own counters count"]
