"""The probe: what a hit costs, what that is of a connection, reading, and starting: `python -m bench --only probe`.

A hit: the body over images of kernel structures (probe_body.py), run by the kernel itself, with and without counting.
Connections: TCP, by turns with and without the probe; attached where this kernel allows that, else a netfilter program
at the same place and the same one without counting. Reading: DnatHits over the maps that the body has filled.
"""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from dataplane.backend import Options, open_backend
from dataplane.bpf import bpf_syscall as bpf
from dataplane.bpf.dnat_hits import DnatHits
from dataplane.bpf.hooks import Hook, link_kprobes, target_of
from dataplane.bpf.probe_start import ProbeStart
from dataplane.errors import ProbeUnavailable
from dataplane.model import RealServer, VirtualAddress, VirtualServer, format_address, parse_address
from dataplane.plan import diff

from .isolation import RunFailed, isolated
from .probe_body import PORT, behind_dnat, images, link_behind_dnat, load_modules
from .stopwatch import Spent, measured

IMAGE = VirtualAddress(6, parse_address("10.96.0.1"), PORT)
SERVER = parse_address("192.0.2.1")
AT = VirtualAddress(6, parse_address("10.96.0.2"), 80)
RUNS = 300_000
"""Hits of one sample; each is the mean of so many."""


def cost(backends: int, samples: int) -> dict[str, list[float]]:
    """Seconds of a hit: of each body, samples alone and with counting, taken in turns; and the differences."""

    def work() -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        with images(slots=2 * backends + 1024) as made:
            made.hits.expect([IMAGE])
            for body in ("nat", "ipvs"):
                if f"{body}_image" not in made.programs:
                    continue
                made.run(f"{body}_image", backends, 2 * backends)  # the first hit of each is another matter
                for _ in range(samples):
                    empty = made.run(f"{body}_empty", backends, RUNS)
                    whole = made.run(f"{body}_image", backends, RUNS)
                    found.setdefault(f"{body}: an empty probe", []).append(empty)
                    found.setdefault(f"{body}: the probe", []).append(whole)
                    found.setdefault(f"{body}: a hit over an empty probe", []).append(whole - empty)
                counted = sum(made.hits.read().values()) + sum(made.hits.missed().values())
                if counted % (2 * backends + samples * RUNS):
                    raise RunFailed(f"{counted} hits counted of {2 * backends + samples * RUNS}")
        return found

    return isolated(work)


def reading(backends: int, samples: int) -> list[float]:
    """Seconds of each reading of all counters, of which each has changed since the last time."""

    def work() -> list[float]:
        seconds = []
        with images(slots=2 * backends + 1024) as made:
            made.hits.expect([IMAGE])
            made.run("nat_image", backends, backends)
            made.hits.read()
            for turn in range(samples):
                made.run("nat_image", backends, backends)
                seconds.append(measured(made.hits.read).wall)
                if sum(made.hits.read().values()) != (turn + 2) * backends:
                    raise RunFailed(f"not {(turn + 2) * backends} hits")
        return seconds

    return isolated(work)


def starting() -> tuple[str, float]:
    """Seconds from starting the child to a probe that counts; where none attaches, to knowing that."""

    def work() -> tuple[str, float]:
        load_modules()
        began = time.perf_counter()
        try:
            with ProbeStart() as start, start.finish() as hits:
                return f"compiled and attached ({', '.join(hits.hooks)})", time.perf_counter() - began
        except ProbeUnavailable:
            return "compiled, and no hook attached", time.perf_counter() - began

    return isolated(work)


class Connections(NamedTuple):
    """Time per connection. `probe`: seconds of one run of its programs, as the kernel measures them."""

    without: list[Spent]
    with_probe: list[Spent]
    probe: float
    hook: str


def connecting(mode: str, rounds: int, connections: int) -> Connections:
    """TCP connections of this node to a virtual server whose backend is on this node, too: all on loopback."""

    def work() -> Connections:
        subprocess.run(["ip", "address", "add", f"{format_address(SERVER)}/32", "dev", "lo"], check=True)
        subprocess.run(["ip", "route", "add", "local", "10.96.0.0/16", "dev", "lo"], check=True)
        backend = open_backend(mode, Options())
        backend.prepare()
        wanted = {AT: backend.express(VirtualServer(AT, (RealServer(SERVER, 9376, local=True),)))}
        if backend.commit(backend.compile(diff(backend.observe(), wanted))).failed:
            raise RunFailed("the virtual server was refused")
        with _server(), _probe() as hits:
            hits.expect([AT])
            _connect(connections)
            samples: dict[bool, list[Spent]] = {False: [], True: []}
            for turn in range(rounds):
                for counting in (False, True) if turn % 2 else (True, False):
                    before = sum(hits.read().values())
                    with contextlib.nullcontext() if counting else _detached(hits):
                        spent = measured(partial(_connect, connections))
                    counted = sum(hits.read().values()) - before
                    if counted != (connections if counting else 0):
                        raise RunFailed(f"{counted} hits of {connections} connections, counting: {counting}")
                    samples[counting].append(Spent(spent.wall / connections, spent.cpu / connections))
            return Connections(samples[False], samples[True], _own_time(hits, connections), ", ".join(hits.hooks))

    return isolated(work)


@contextlib.contextmanager
def _probe() -> Iterator[DnatHits]:
    """Attached, or what comes nearest to it here."""
    with ProbeStart() as start:
        try:
            hits = start.finish()
        except ProbeUnavailable:
            with behind_dnat() as hits:
                yield hits
            return
    with hits:
        yield hits


@contextlib.contextmanager
def _detached(hits: DnatHits) -> Iterator[None]:
    """The links are closed meanwhile, which detaches the programs; the new ones get their descriptors.

    A netfilter program sees every packet, which the probe does not: there an empty one takes its place.
    """
    nothing = os.open(os.devnull, os.O_RDONLY)
    for hook in hits.attached:
        for link in hook.links:
            os.dup2(nothing, link, inheritable=False)
    os.close(nothing)
    empty = [link for hook in hits.attached if hook.kind == "netfilter" for link in link_behind_dnat(hook.programs[1])]
    yield
    for link in empty:
        os.close(link)
    for hook in hits.attached:
        for link, new in zip(hook.links, _links(hook), strict=True):
            os.dup2(new, link, inheritable=False)
            os.close(new)


def _links(hook: Hook) -> tuple[int, ...]:
    if hook.kind == "fexit":
        return tuple(map(bpf.attach_fexit, hook.programs))
    if hook.kind == "kretprobe":
        return link_kprobes(target_of(hook.function), hook.programs)
    return link_behind_dnat(hook.programs[0])


def _own_time(hits: DnatHits, connections: int) -> float:
    """Seconds that one run of the programs takes, as the kernel measures them, most of which are hits."""
    statistics = bpf.enable_statistics()
    _connect(connections)
    runs = [bpf.program_runs(program) for hook in hits.attached for program in hook.programs]
    os.close(statistics)
    return sum(one.seconds for one in runs) / max(1, sum(one.runs for one in runs))


_ABORT = struct.pack("ii", 1, 0)  # closing resets: no port is kept waiting


@contextlib.contextmanager
def _server() -> Iterator[None]:
    """Takes connections on port 9376 and waits for their end."""
    listener = socket.create_server((format_address(SERVER), 9376), backlog=1024)
    pid = os.fork()
    if pid == 0:
        try:
            while True:
                with listener.accept()[0] as one, contextlib.suppress(ConnectionResetError):
                    one.recv(1)
        finally:
            os._exit(1)
    listener.close()
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _connect(times: int) -> None:
    for _ in range(times):
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
            one.connect((format_address(AT.address), AT.port))
