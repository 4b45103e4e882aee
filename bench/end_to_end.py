"""The agent as a process, in every mode: from a file's change to the first connection that meets it, and its memory.

The manifests are a folder: one file with all Services, and one with the Service that changes. A change is a file that
is renamed to its place; the witness is a client that connects until the new Service answers, or the new endpoint does.
Kernel memory is what slab, per-CPU and vmalloc memory of the whole machine grow by, so other programs are in it.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from dataplane.model import Address, format_address

from . import workload
from .contenders import empty
from .isolation import RunFailed, isolated
from .process import memory, processor_time
from .traffic import connection, prepare, server
from .variants import Variant

Figures = dict[str, tuple[list[float], str]]
"""What, its samples and their unit."""
KERNEL_MEMORY = ("Slab", "Percpu", "VmallocUsed")
WAIT = 300.0
QUIET = 1.0
"""MiB by which the kernel's memory may change in a second in which we do nothing; else others do something."""


def run(variant: Variant, size: int, count: int) -> Figures:
    """Figures of one agent with `size` Services and `count` changes of each kind."""

    def work() -> Figures:
        prepare()
        with TemporaryDirectory() as name, server():
            agent = Agent(variant, Path(name))
            found = agent.measure(size, count)
        empty(variant)
        return found

    return isolated(work, timeout=1800)


class Agent:
    """`dataplane run`, with a folder of its own."""

    def __init__(self, variant: Variant, folder: Path) -> None:
        self._variant, self._log = variant, folder / "log"
        self._manifests = folder / "manifests"
        self._manifests.mkdir()
        self._process: subprocess.Popen[bytes] | None = None

    def measure(self, size: int, count: int) -> Figures:
        """Everything, one after another."""
        before = kernel_memory()
        workload.write_manifests(size, self._manifests / "services.json")
        self._write(None, size)
        found: Figures = {}
        try:
            began = time.perf_counter()
            self._start()
            until(lambda: answers(workload.vip(size - 1)), "the last Service", self)
            found["start to programmed"] = [time.perf_counter() - began], "s"
            self._told()
            time.sleep(1)
            after = kernel_memory()
            time.sleep(1)
            if abs(kernel_memory() - after) < QUIET:
                found["kernel memory"] = [after - before], "MiB"
            else:
                found["kernel memory moved by others"] = [abs(kernel_memory() - after)], "MiB"
            resident, most = self._memory()
            found["resident memory"], found["resident memory, most"] = ([resident], "MiB"), ([most], "MiB")
            found |= self._changes(size, count)
            self._stop()
            starts, processor = [], []
            for _ in range(3):
                used = children()
                began = time.perf_counter()
                self._start()
                self._told()
                starts.append(time.perf_counter() - began)
                if b'"unchanged"' not in self._log.read_bytes():
                    raise RunFailed(f"a restart with nothing changed: {self._log.read_bytes()[-500:]!r}")
                self._stop()
                processor.append(children() - used)
            found["restart until verified"] = starts, "s"
            found["restart until verified, processor time"] = processor, "s"
        finally:
            self._stop()
        return found

    def _changes(self, size: int, count: int) -> Figures:
        added, replaced, removed = [], [], []
        used, changes = self._cpu(), 0
        for turn in range(count):
            began = self._write(turn * 2, size)
            until(lambda: answers(workload.vip(size)), "a new Service", self)
            added.append(time.perf_counter() - began)
            began = self._write(turn * 2 + 1, size)
            wanted = endpoint(turn * 2 + 1)
            until(lambda wanted=wanted: answers(workload.vip(size)) == wanted, "a new endpoint", self)  # type: ignore[misc]
            replaced.append(time.perf_counter() - began)
            began = self._write(None, size)
            until(lambda: answers(workload.vip(size)) is None, "a Service that goes", self)
            removed.append(time.perf_counter() - began)
            changes += 3
        spent = (self._cpu() - used) / changes
        return {
            "add a Service": (added, "s"),
            "replace one endpoint": (replaced, "s"),
            "remove a Service": (removed, "s"),
            "processor time of a change": ([spent], "s"),
        }

    def _write(self, which: int | None, size: int) -> float:
        """The Service that changes, with one endpoint, or without it; the moment when the file was there."""
        items: list[object] = [] if which is None else one_service(size, which)
        new = self._manifests.parent / "new"
        new.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
        began = time.perf_counter()
        new.rename(self._manifests / "one.json")
        return began

    def _start(self) -> None:
        arguments = ["run", "-f", str(self._manifests), "--node-name", workload.NODE, "--log-format", "json"]
        mode = ["--mode", self._variant.mode, *self._variant.arguments]
        rest = ["--drain-seconds", "0", "--probe", "off", "--resync-seconds", "3600"]
        with self._log.open("wb") as log:
            command = [sys.executable, "-m", "dataplane", *arguments, *mode, *rest]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def _stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(60)
            self._process = None

    def _told(self) -> None:
        until(lambda: b'"sync"' in self._log.read_bytes(), "the agent's first sync", self)

    def _memory(self) -> tuple[float, float]:
        assert self._process is not None
        return memory(self._process.pid)

    def _cpu(self) -> float:
        """Seconds, with the tools that it has run."""
        assert self._process is not None
        return processor_time(self._process.pid, tools=True)

    def failed(self) -> str:
        """Why it is not running, or ""."""
        if self._process is not None and self._process.poll() is None:
            return ""
        return self._log.read_bytes()[-2000:].decode(errors="replace") or "it has ended"


def endpoint(which: int) -> bytes:
    """The one endpoint of the Service that changes."""
    return workload.endpoint_address((1 << 21) + which)


def one_service(size: int, which: int) -> list[object]:
    """It as manifests."""
    view = workload.view(size)
    assert view.service is not None
    name = view.service.name.name
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"namespace": "bench", "name": name},
            "spec": {
                "clusterIP": format_address(view.service.cluster_ips[0]),
                "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}],
            },
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "namespace": "bench",
                "name": f"{name}-0",
                "labels": {"kubernetes.io/service-name": name},
            },
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": [{"addresses": [format_address(Address(endpoint(which)))], "conditions": {"ready": True}}],
        },
    ]


def answers(address: bytes) -> bytes | None:
    """Which endpoint answers at a Service's address; None: nobody does."""
    try:
        return connection(format_address(Address(address)), 80).reached
    except OSError:
        return None


def until(done: Callable[[], object], what: str, agent: Agent) -> None:
    """Ask again and again."""
    limit = time.monotonic() + WAIT
    while not done():
        if time.monotonic() > limit:
            raise RunFailed(f"{what} did not come within {WAIT:g} s")
        if error := agent.failed():
            raise RunFailed(f"the agent: {error}")
        time.sleep(0.0005)


def kernel_memory() -> float:
    """MiB."""
    found = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
    return sum(int(found.get(each, 0)) for each in KERNEL_MEMORY) / 1024


def children() -> float:
    """Processor seconds of the children that have ended."""
    times = os.times()
    return times.children_user + times.children_system
