"""The real program in a test's node: `dataplane run` as a process, its manifests, and what it says."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .netns import NetNs
from .traffic import PORT, eventually

VIP, VIP6 = "10.0.1.175", "fd00:10::175"


def manifest(pods: Sequence[Sequence[str]], annotations: dict[str, str] | None = None, **spec: object) -> str:
    """Service default/web on both VIPs, ports 80/TCP, 53/UDP, 99/SCTP, with a slice for each family, as JSON lines."""
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "default", "annotations": annotations or {}},
        "spec": {
            "clusterIP": VIP,
            "clusterIPs": [VIP, VIP6],
            "ipFamilies": ["IPv4", "IPv6"],
            "ports": [
                {"name": "http", "port": 80, "protocol": "TCP"},
                {"name": "dns", "port": 53, "protocol": "UDP"},
                {"name": "sig", "port": 99, "protocol": "SCTP"},
            ],
            **spec,
        },
    }
    objects: list[object] = [service]
    for family, wants in (("IPv4", False), ("IPv6", True)):
        addresses = [each for pod in pods for each in pod if (":" in each) is wants]
        objects.append(
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": f"web-{family.lower()}",
                    "namespace": "default",
                    "labels": {"kubernetes.io/service-name": "web"},
                },
                "addressType": family,
                "ports": [
                    {"name": "http", "port": PORT, "protocol": "TCP"},
                    {"name": "dns", "port": PORT, "protocol": "UDP"},
                    {"name": "sig", "port": PORT, "protocol": "SCTP"},
                ],
                "endpoints": [{"addresses": [each], "conditions": {"ready": True}} for each in addresses],
            }
        )
    return "".join(json.dumps(one) + "\n" for one in objects)


@dataclass
class NodeAgent:
    """A manifest file and an agent that follows it."""

    ns: NetNs
    folder: Path
    options: Sequence[str] = ()
    process: subprocess.Popen[bytes] | None = None
    starts: int = field(default=0)

    metrics: str = ""
    """Where this agent serves metrics; nowhere: most tests need none."""
    probe: str = "off"
    """Compiling one takes an emulated kernel ten seconds of each start."""

    @property
    def file(self) -> Path:
        return self.folder / "services.json"

    def write(self, text: str) -> None:
        """Replace the manifest file atomically."""
        draft = self.folder / ".draft"
        draft.write_text(text)
        draft.rename(self.file)

    def command(self, *arguments: str) -> list[str]:
        return ["ip", "netns", "exec", self.ns.name, sys.executable, "-m", "dataplane", *arguments]

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command of the program, to its end."""
        done = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, check=False, timeout=120, stdin=subprocess.DEVNULL
        )
        if check and done.returncode:
            raise AssertionError(f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def start(self) -> None:
        """Start the agent and wait for its first sync."""
        self.starts += 1
        with (self.folder / f"agent-{self.starts}.log").open("wb") as log:
            self.process = subprocess.Popen(
                self.command(
                    *("run", "-f", str(self.file), "--log-format", "json"),
                    *("--metrics-bind-address", self.metrics, "--probe", self.probe, *self.options),
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        eventually("the first sync", lambda: any(line.get("cause") == "start" for line in self.log()), 60)

    def log(self) -> list[dict[str, Any]]:
        """What this agent has logged so far."""
        text = (self.folder / f"agent-{self.starts}.log").read_text()
        assert "Traceback" not in text, text
        assert self.process is not None
        if self.process.poll() not in (None, 0, -9):
            raise AssertionError(f"the agent ended with {self.process.returncode}:\n{text}")
        return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]

    def changes(self) -> int:
        """Changes that this agent has carried out so far; none may have failed."""
        text = (self.folder / f"agent-{self.starts}.log").read_text()
        complaints = text.count('"level": "error"') + text.count('"level": "warning"')
        # the lock of iptables-legacy is the whole machine's: who holds it long may be another test
        assert complaints == text.count("holds the lock"), text
        return text.count('"cause": "change"') + text.count('"cause": "retry"')

    def change(self, text: str, seconds: float = 60) -> None:
        """Replace the manifest file by one that differs, and wait until the kernel has it."""
        before = self.changes()
        self.write(text)
        eventually("the agent carries it out", lambda: self.changes() > before, seconds, 0.005)

    def send(self, number: int) -> None:
        """Send the agent a signal; `ip netns exec` has become the agent."""
        assert self.process is not None
        os.kill(self.process.pid, number)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the agent; its exit status."""
        assert self.process is not None
        self.send(number)
        return self.process.wait(30)

    def status(self) -> dict[str, Any]:
        """What `dataplane status` would show."""
        status: dict[str, Any] = json.loads(self.run("status", "-o", "json").stdout)
        return status


@contextlib.contextmanager
def node_agent(ns: NetNs, folder: Path, *options: str) -> Iterator[NodeAgent]:
    """An agent's place in a namespace; whatever happens, no agent outlives the block."""
    agent = NodeAgent(ns, folder, options)
    try:
        yield agent
    finally:
        if agent.process is not None and agent.process.poll() is None:
            agent.process.kill()
            agent.process.wait(30)
