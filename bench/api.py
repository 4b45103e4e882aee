"""The agent with a Kubernetes API as its source, in nftables mode: its start, its memory, and one EndpointSlice.

The server is a process of its own (`bench.api_server`). *Event to kernel* begins when the server has the event ready
and ends when the kernel tells, by its own notification, that the ruleset has changed: the way over the connection is
in it, and so is waking up here. Changes come one at a time, slower than `kube_source.RATE`.
"""

import json
import random
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from dataplane import netlink_nftables as netlink
from dataplane.backend import open_backend
from dataplane.desired import virtual_servers
from dataplane.model import VirtualServer
from dataplane.netlink_socket import NETLINK_NETFILTER, NetlinkSocket

from . import workload
from .end_to_end import Figures
from .isolation import RunFailed, isolated
from .process import memory, processor_time, until_told
from .variants import RULES

WAIT = 120.0
PAUSE = 0.12
BURST = 5000


def run(size: int, count: int, seed: int) -> Figures:
    """Figures of one agent with `size` Services over the API, and `count` changes of one EndpointSlice each."""

    def work() -> Figures:
        with TemporaryDirectory() as name:
            return _measure(Path(name), size, count, random.Random(seed))

    return isolated(work, timeout=1800)


def _measure(folder: Path, size: int, count: int, chance: random.Random) -> Figures:
    command = [sys.executable, "-m", "bench.api_server", str(size)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "bench",
            "clusters": [{"name": "bench", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
            "users": [{"name": "bench", "user": {}}],
            "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "bench"}}],
        }
        (folder / "config").write_text(json.dumps(config))
        arguments = ["run", "--mode", "nftables", "--kubeconfig", str(folder / "config"), "--node-name", workload.NODE]
        arguments += ["--log-format", "json", "--probe", "off", "--resync-seconds", "3600"]
        began = time.monotonic()
        with (folder / "log").open("wb") as log:
            agent = subprocess.Popen([sys.executable, "-m", "dataplane", *arguments], stdout=log, stderr=log)
        try:
            until_told(agent, folder / "log", b'"sync"', WAIT, 0.001)
            found: Figures = {"start to programmed": ([time.monotonic() - began], "s")}
            found["start to programmed, processor time"] = [processor_time(agent.pid, tools=True)], "s"
            held = open_backend("nftables").observe().servers
            if len(held) != size:
                raise RunFailed(f"{len(held)} virtual servers of {size}: {(folder / 'log').read_bytes()[-500:]!r}")
            time.sleep(1)
            resident, _ = memory(agent.pid)
            found["resident memory"] = [resident], "MiB"
            found["event to kernel"] = _changes(server, size, count, chance), "s"
            found |= _burst(server, agent, folder / "log", min(size, BURST))
            resident, most = memory(agent.pid)
            found["resident memory after a burst"] = [resident], "MiB"
            found["resident memory, most"] = [most], "MiB"
            return found
        finally:
            agent.terminate()
            agent.wait(60)
            server.terminate()


def _changes(server: "subprocess.Popen[str]", size: int, count: int, chance: random.Random) -> list[float]:
    spent = []
    with NetlinkSocket(NETLINK_NETFILTER, groups=(netlink.GROUP,), timeout=10) as monitor:
        for turn in range(count):
            sent = _tell(server, f"{chance.randrange(size)} {turn + 2}")
            if not select.select([monitor], [], [], WAIT)[0]:
                raise RunFailed("a change did not arrive")
            spent.append(time.monotonic() - sent)
            time.sleep(PAUSE)
            monitor.notifications()
    return spent


def _burst(server: "subprocess.Popen[str]", agent: "subprocess.Popen[bytes]", log: Path, count: int) -> Figures:
    """Many EndpointSlices change at once: until the last is in the kernel, and in how many commits."""
    time.sleep(1)
    told = log.read_bytes().count(b'"cause": "change"')
    used = processor_time(agent.pid, tools=True)
    before = _added(log)
    sent = _tell(server, f"all {count}")
    while _added(log) - before < count:
        if time.monotonic() - sent > WAIT or agent.poll() is not None:
            raise RunFailed(f"the burst did not arrive: {log.read_bytes()[-2000:]!r}")
        time.sleep(0.01)
    spent = time.monotonic() - sent
    backend = open_backend("nftables")
    held = backend.observe().servers
    if any(held.get(each.at) != backend.express(each) for each in _replaced(count)):
        raise RunFailed("the kernel does not hold what the burst says")
    return {
        "burst of changes, until the last is held": ([spent], "s"),
        "burst of changes, processor time": ([processor_time(agent.pid, tools=True) - used], "s"),
        "burst of changes, commits": ([float(log.read_bytes().count(b'"cause": "change"') - told)], "commits"),
    }


def _added(log: Path) -> int:
    """Endpoints that changes have added so far."""
    return sum(map(int, re.findall(rb'"cause": "change", "adds": ([0-9]+)', log.read_bytes())))


def _replaced(count: int) -> list[VirtualServer]:
    return [each for number in range(count) for each in virtual_servers(workload.view(number, replaced=1), RULES)]


def _tell(server: "subprocess.Popen[str]", line: str) -> float:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(line + "\n")
    server.stdin.flush()
    return float(server.stdout.readline())
