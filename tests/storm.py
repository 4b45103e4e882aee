"""Clients that never stop while a test changes, kills or switches what carries them.

Every new connection has a source address and port of its own, also among the storms of one test run: conntrack keeps
an entry for minutes, and a SYN that meets one goes the old way, which nobody counts as a new connection. None is tried
twice. Long-lived connections say something all the time.
"""

import contextlib
import itertools
import multiprocessing
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .netns import NetNs
from .traffic import Caller, Held, eventually

_ABORT = struct.pack("ii", 1, 0)  # closing resets: no port is kept waiting at either end
_PORTS = range(2_000, 65_000)
_SOURCES = 15  # addresses of one client
_TOLD = 100  # failures of one client that are told: a pipe has to hold them
_PODS = 8  # servers whose answers are counted apart: pod0, pod1, …
_PAUSE = 0.001  # between two of one client: the agent has to have a turn on a small machine


_storms = itertools.count()


def _sources(vip: str, number: int) -> list[str]:
    numbers = range(1, _SOURCES + 1)
    return [f"2001:db8::{number + 1:x}:{n:x}" if ":" in vip else f"192.0.2.{16 + number * 16 + n}" for n in numbers]


def _answer(vip: str, port: int, source: tuple[str, int]) -> str:
    with socket.socket(socket.AF_INET6 if ":" in vip else socket.AF_INET) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        one.settimeout(20)
        try:
            one.bind(source)
            one.connect((vip, port))
            return one.recv(64).decode() or "closed"
        except TimeoutError:
            return "timeout"
        except OSError as error:
            return error.strerror or repr(error)


def _call(
    client: NetNs, vip: str, port: int, number: int, first: int, pause: float, shared: Any, failures: Any
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    told = 0
    with client.enter():
        sources = _sources(vip, number)
        for source in itertools.cycle(itertools.product([*sources[first:], *sources[:first]], _PORTS)):
            if shared.stop.value:
                return
            phase = shared.phase.value
            answer = _answer(vip, port, source)
            shared.counts[number] += 1
            if answer.startswith("pod"):
                shared.answers[number * _PODS + int(answer[3:])] += 1
            elif (told := told + 1) < _TOLD:
                failures.put((phase, answer))
            if pause:
                time.sleep(pause)


@dataclass
class _Shared:
    """What the clients and the test have in common."""

    stop: Any
    phase: Any
    counts: Any
    answers: Any


@dataclass
class Storm:
    """A running storm. `phase` names what goes on, for the report of failures."""

    held: list[Held]
    _shared: _Shared
    _failures: Any
    _names: list[str] = field(default_factory=lambda: ["start"])
    _broken: set[int] = field(default_factory=set)
    _told: Counter[str] = field(default_factory=Counter)
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    def phase(self, name: str) -> None:
        """From now on this goes on."""
        self._names.append(name)
        self._shared.phase.value = len(self._names) - 1

    @property
    def connections(self) -> int:
        """New connections so far."""
        return sum(self._shared.counts)

    def answered(self, client: int) -> dict[str, int]:
        """New connections of one client by the server that answered them."""
        found = self._shared.answers[client * _PODS : (client + 1) * _PODS]
        return {f"pod{number}": count for number, count in enumerate(found) if count}

    def failures(self) -> Counter[str]:
        """How new connections failed, with the phase in which they began."""
        while not self._failures.empty():
            phase, answer = self._failures.get()
            self._told[f"{self._names[phase]}: {answer}"] += 1
        return self._told

    def broken(self) -> int:
        """Long-lived connections that have stopped to answer."""
        self._beat()
        return len(self._broken)

    def _beat(self) -> None:
        with self._one_at_a_time:
            for number, one in enumerate(self.held):
                if number not in self._broken and not one.beats():
                    self._broken.add(number)

    def wait_for(self, connections: int, seconds: float = 600) -> None:
        """Until so many connections were made."""
        eventually(f"{connections} connections", lambda: self.connections >= connections, seconds)


@contextlib.contextmanager
def storm(client: NetNs, vips: Sequence[str], port: int, *, long_lived: int, pause: float = _PAUSE) -> Iterator[Storm]:
    """One client process for each VIP, and `long_lived` open connections over all of them. `pause`: seconds between two
    new connections of a client."""
    caller = Caller(client)
    for number, vip in enumerate(vips):
        width = "128 nodad" if ":" in vip else "32"
        client.ip(*(f"address add {each}/{width} dev eth0" for each in _sources(vip, number)))
    first = next(_storms) % _SOURCES
    context = multiprocessing.get_context("fork")
    counts, answers = (context.Array("L", len(vips) * each, lock=False) for each in (1, _PODS))
    shared = _Shared(context.Value("b", 0), context.Value("i", 0), counts, answers)
    running = Storm(
        [caller.hold(vips[number % len(vips)], port) for number in range(long_lived)], shared, context.SimpleQueue()
    )
    processes = [
        context.Process(
            target=_call, args=(client, vip, port, number, first, pause, shared, running._failures), daemon=True
        )
        for number, vip in enumerate(vips)
    ]
    beaten = threading.Event()

    def beat() -> None:
        while not beaten.wait(0.5):
            running._beat()

    beater = threading.Thread(target=beat)
    for one in processes:
        one.start()
    beater.start()
    try:
        yield running
        beaten.set()
        beater.join(120)
        shared.stop.value = 1
        for one in processes:
            one.join(60)
            assert one.exitcode == 0
    finally:
        beaten.set()
        for one in processes:
            one.kill()
            one.join()
        for held in running.held:
            held.close()
        for number, vip in enumerate(vips):
            width = "128" if ":" in vip else "32"
            client.ip(*(f"address delete {each}/{width} dev eth0" for each in _sources(vip, number)))
