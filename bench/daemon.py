"""The agent itself as a process: memory, CPU while nothing happens, and what a restart writes to the kernel."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from . import workload
from .isolation import RunFailed, isolated
from .programming import family_id, verify
from .raw import flush_ipvs

Figures = dict[str, tuple[float, str]]
"""What, and its unit."""


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
        _until(agent, path.parent / "log", b'"sync"')
        started = time.perf_counter() - began
        verify(size, vips=True)
        time.sleep(2)
        before = _cpu(agent.pid)
        began = time.perf_counter()
        time.sleep(idle_seconds)
        idle = (_cpu(agent.pid) - before) / (time.perf_counter() - began)
        status = Path(f"/proc/{agent.pid}/status").read_text()
        memory = {name: int(value) / 1024 for name, value in re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", status)}
    finally:
        agent.terminate()
        agent.wait(60)
    return {
        "start to programmed": (started, "s"),
        "resident memory": (memory["VmRSS"], "MiB"),
        "resident memory, most": (memory["VmHWM"], "MiB"),
        f"CPU while idle, {idle_seconds:g} s": (100 * idle, "%"),
    }


def _restart(size: int, path: Path) -> Figures:
    """A restart with nothing changed, with a witness (`bench.witness`)."""
    told, log = path.parent / "told", path.parent / "log2"
    with log.open("wb") as stream:
        command = [sys.executable, "-m", "bench.witness", str(told), *arguments(path)]
        agent = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        _until(agent, log, b'"sync"')
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


def _until(process: "subprocess.Popen[bytes]", log: Path, word: bytes, timeout: float = 240.0) -> None:
    limit = time.monotonic() + timeout
    while word not in log.read_bytes():
        if process.poll() is not None or time.monotonic() > limit:
            raise RunFailed(f"the agent did not get ready: {log.read_bytes()[-2000:].decode(errors='replace')}")
        time.sleep(0.05)


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
