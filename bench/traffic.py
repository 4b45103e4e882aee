"""What a client notices: a new connection through a mode with few Services and with many.

All in one namespace, over loopback: every address is local, a server listens on the endpoints' port, and the client
connects to the first, the middle and the last Service in turn. *connect* is SYN to SYN-ACK, which the kernel does in
one system call; *first byte* is connect, one byte there and one back; *connections* is how many of these a second, one
after another. The base is the same server without any mode in the kernel, at an endpoint's own address.
"""

import os
import random
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from dataplane.model import format_address

from . import workload
from .contenders import Ours, committed, empty
from .isolation import RunFailed, isolated, pin
from .operations import Task
from .variants import Variant

CLIENT = "10.0.0.1"
PLACES = ("first", "middle", "last")
PORT = 8080
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: the client's port is free at once."""
NOTHING = "nothing in the kernel"


class Seen(NamedTuple):
    """Seconds of each connection, by place; `rate`: connections a second, all places in turn."""

    connect: dict[str, list[float]]
    first_byte: dict[str, list[float]]
    rate: list[float]


def prepare() -> None:
    """Every address of the workload is here, and answers are not refused for coming from loopback."""
    commands = (
        ["ip", "addr", "add", f"{CLIENT}/32", "dev", "lo"],
        ["ip", "route", "add", "local", "10.0.0.0/8", "dev", "lo", "src", CLIENT],
        ["ip", "route", "add", "local", "11.0.0.0/8", "dev", "lo", "src", CLIENT],
    )
    for command in commands:
        subprocess.run(command, check=True)


@contextmanager
def server() -> Iterator[None]:
    """At every address, in another process: who sends a byte is told the address that it has reached."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("0.0.0.0", PORT))
    listener.listen(4096)
    pid = os.fork()
    if pid == 0:
        pin(0)
        signal.alarm(600)
        while True:
            try:
                one, _ = listener.accept()
                with one:
                    if one.recv(1):
                        one.send(socket.inet_aton(one.getsockname()[0]))
            except OSError:
                continue
    listener.close()
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


class Connection(NamedTuple):
    """Seconds until it is open, and until an answer has come back; `reached`: which endpoint that was."""

    opened: float
    answered: float
    reached: bytes


def connection(address: str, port: int) -> Connection:
    """One connection, from its first packet to the first answer. ConnectionRefusedError when nobody is there."""
    clock = time.perf_counter
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        one.bind((CLIENT, 0))
        one.settimeout(5)
        started = clock()
        one.connect((address, port))
        opened = clock()
        one.send(b"?")
        reached = one.recv(4)
        answered = clock()
        if len(reached) != 4:
            raise RunFailed(f"{address}:{port} did not answer")
        return Connection(opened - started, answered - started, reached)


def look(targets: dict[str, tuple[str, int]], count: int, seconds: float) -> Seen:
    """`count` connections to each, in an order that is drawn; then as many a second as go, three times."""
    for target in targets.values():
        for _ in range(20):
            connection(*target)
    draw = random.Random(1)
    order = [place for place in targets for _ in range(count)]
    draw.shuffle(order)
    seen = Seen({place: [] for place in targets}, {place: [] for place in targets}, [])
    for place in order:
        one = connection(*targets[place])
        seen.connect[place].append(one.opened)
        seen.first_byte[place].append(one.answered)
    for _ in range(3):
        began, number, every = time.perf_counter(), 0, list(targets.values())
        while time.perf_counter() - began < seconds:
            connection(*every[number % len(every)])
            number += 1
        seen.rate.append(number / (time.perf_counter() - began))
    return seen


def bare(count: int, seconds: float) -> Seen:
    """Without any mode."""

    def work() -> Seen:
        prepare()
        with server():
            pin(-1)
            address = format_address(workload.endpoint_address(0))
            return look({"endpoint": (address, PORT)}, count, seconds)

    return isolated(work)


def through(variant: Variant, size: int, count: int, seconds: float) -> Seen:
    """Through a mode with so many Services. Only an endpoint listens, so every answer was led to one."""

    def work() -> Seen:
        prepare()
        ours = Ours(variant)
        everything = Task(size).everything()
        ours.reconciler.take(everything)
        committed(ours.reconciler.sync("bench"))
        numbers = dict(zip(PLACES, (0, size // 2, size - 1), strict=True))
        targets = {place: (format_address(workload.vip(number)), 80) for place, number in numbers.items()}
        with server():
            pin(-1)
            seen = look(targets, count, seconds)
        ours.check(everything)
        empty(variant)
        return seen

    return isolated(work)
