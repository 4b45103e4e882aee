"""kube-proxy itself, when a binary and a kubeconfig are given: `--kube-proxy BINARY --kubeconfig FILE`.

It programs the Services of that cluster, whatever they are, in a network namespace of its own that reaches the API
server by `bench.relay`. What is measured: from its start until it says that its first sync is over, and that sync by
its own clock. How many Services there are is counted in the kernel afterwards.
"""

import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import yaml

from . import peers
from .isolation import RunFailed, isolated
from .programming import held

INSIDE = "127.0.0.1:16443"
METRICS = "127.0.0.1:10249"
MODES = ("ipvs", "nftables", "iptables")
WAIT = 1200.0


class Found(NamedTuple):
    """Seconds, the Service ports that were in the kernel, and MiB that the process had at most."""

    start: float
    sync: float
    services: int
    memory: float


def inside(kubeconfig: str, server: str) -> tuple[str, str]:
    """A kubeconfig for somebody who reaches the API server at another address, and HOST:PORT of the real one."""
    document: dict[str, Any] = yaml.safe_load(kubeconfig)
    context = next(each for each in document["contexts"] if each["name"] == document["current-context"])
    name = context["context"]["cluster"]
    cluster = next(each["cluster"] for each in document["clusters"] if each["name"] == name)
    real = urlsplit(cluster["server"])
    if real.scheme == "https" and real.hostname:
        cluster.setdefault("tls-server-name", real.hostname)
    cluster["server"] = f"{real.scheme}://{server}"
    return yaml.safe_dump(document), f"{real.hostname}:{real.port or 443}"


@contextmanager
def running(command: list[str], log: Path | None = None) -> Iterator["subprocess.Popen[bytes]"]:
    """A program while the block lasts."""
    with (log or Path("/dev/null")).open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def relay(source: str, target: str) -> list[str]:
    """The command of one."""
    return [sys.executable, "-m", "bench.relay", source, target]


def run(binary: Path, kubeconfig: Path, mode: str) -> Found:
    """One start in one mode."""
    text, server = inside(kubeconfig.read_text(), INSIDE)
    with TemporaryDirectory() as folder:
        way, config, log = f"{folder}/way", Path(folder, "kubeconfig"), Path(folder, "log")
        config.write_text(text)  # files that it names keep their absolute paths

        def work() -> Found:
            with ExitStack() as stack:
                stack.enter_context(running(relay(INSIDE, way)))
                command = [str(binary), f"--kubeconfig={config}", f"--proxy-mode={mode}", "--conntrack-max-per-core=0"]
                began = time.perf_counter()
                process = stack.enter_context(running([*command, f"--metrics-bind-address={METRICS}"], log))
                while not (seen := synced()):
                    if process.poll() is not None or time.perf_counter() - began > WAIT:
                        raise RunFailed(f"kube-proxy: {log.read_text(errors='replace')[-1000:]}")
                    time.sleep(0.01)
                took = time.perf_counter() - began
                status = Path(f"/proc/{process.pid}/status").read_text()
                most = re.search(r"VmHWM:\s+(\d+) kB", status)
                return Found(took, seen, services(mode), int(most.group(1)) / 1024 if most else 0.0)

        with running(relay(way, server)):
            return isolated(work, timeout=WAIT + 60)


def synced() -> float:
    """Seconds of the syncs so far, by its own metrics; 0 = none is over."""
    try:
        with urllib.request.urlopen(f"http://{METRICS}/metrics", timeout=5) as answer:
            return first_sync(answer.read().decode())
    except OSError:
        return 0.0


def first_sync(metrics: str) -> float:
    """The sum of its sync durations; the IP families count together."""
    found = re.findall(r"^kubeproxy_sync_proxy_rules_duration_seconds_sum(?:\{.*\})? (\S+)$", metrics, re.MULTILINE)
    return sum(map(float, found))


def services(mode: str) -> int:
    """Service ports in the kernel."""
    if mode == "ipvs":
        return held()[0]
    if mode == "nftables":
        return peers.run(["nft", "list", "map", "ip", "kube-proxy", "service-ips"], "").count(" : goto ")
    rules = peers.run(["iptables-save", "-t", "nat"], "").splitlines()
    return sum(rule.startswith("-A KUBE-SERVICES ") and "-j KUBE-SVC-" in rule for rule in rules)
