"""The agent itself as a process: memory, CPU while nothing happens, and what a restart writes to the kernel."""

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from . import workload
from .isolation import RunFailed, isolated
from .process import memory, processor_time, until_told
from .programming import family_id, verify
from .raw import flush_ipvs

Figures = dict[str, tuple[float, str]]
"""What, and its unit."""
WAIT = 240.0


def run(size: int, idle_seconds: float) -> Figures:
    """Figures of one agent with `size` Services from a manifest file."""

    def work() -> Figures:
        with TemporaryDirectory() as folder:
            path = Path(folder, "services.json")
            workload.write_manifests(size, path)
            found = _first_start(size, path, idle_seconds) | _restart(size, path)
        flush_ipvs(family_id())
        return found

    return isolated(work)


def arguments(path: Path) -> list[str]:
    """The agent's command line, as a user gives it."""
    return ["run", "-f", str(path), "--node-name", workload.NODE, "--log-format", "json", "--metrics-bind-address", ""]


def _first_start(size: int, path: Path, idle_seconds: float) -> Figures:
    began = time.perf_counter()
    with Path(path.parent, "log").open("wb") as log:
        agent = subprocess.Popen([sys.executable, "-m", "dataplane", *arguments(path)], stdout=log, stderr=log)
    try:
        until_told(agent, path.parent / "log", b'"sync"', WAIT, 0.05)
        started = time.perf_counter() - began
        verify(size, vips=True)
        time.sleep(2)
        before = processor_time(agent.pid, tools=False)
        began = time.perf_counter()
        time.sleep(idle_seconds)
        idle = (processor_time(agent.pid, tools=False) - before) / (time.perf_counter() - began)
        resident, most = memory(agent.pid)
    finally:
        agent.terminate()
        agent.wait(60)
    return {
        "start to programmed": (started, "s"),
        "resident memory": (resident, "MiB"),
        "resident memory, most": (most, "MiB"),
        f"CPU while idle, {idle_seconds:g} s": (100 * idle, "%"),
    }


def _restart(size: int, path: Path) -> Figures:
    """A restart with nothing changed, with a witness (`bench.witness`)."""
    told, log = path.parent / "told", path.parent / "log2"
    with log.open("wb") as stream:
        command = [sys.executable, "-m", "bench.witness", str(told), *arguments(path)]
        agent = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        until_told(agent, log, b'"sync"', WAIT, 0.05)
    finally:
        agent.terminate()
        agent.wait(60)
    verify(size, vips=True)
    if b'"unchanged"' not in log.read_bytes():
        raise RunFailed(f"a restart with nothing changed ended otherwise: {log.read_bytes()[-500:]!r}")
    seen = json.loads(told.read_text())
    for what in ("changing", "programs", "settings"):
        if seen[what]:
            print(f"agent: a restart with nothing changed: {what}: {seen[what][:10]}", file=sys.stderr)
    return {
        "restart: netlink requests": (float(seen["requests"]), "requests"),
        "restart: requests that change something": (float(len(seen["changing"])), "requests"),
        "restart: programs started": (float(len(seen["programs"])), "programs"),
        "restart: kernel settings written": (float(len(seen["settings"])), "settings"),
    }
