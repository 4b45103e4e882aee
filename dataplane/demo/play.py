"""The demo's machinery: the agent, commands that are shown and run, waiting with an end."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..agent import read_status
from ..errors import AgentUnreachable, DataplaneError
from ..printable import printable
from .page import ClaimFailed, Page, quoted
from .stage import Stage, ended
from .tutorial import Tutorial

START_SECONDS = 60
"""How long the agent may take to its first sync."""
REACTION_SECONDS = 15
"""How long it may take to follow a changed manifest; it takes milliseconds, but a machine may be busy."""


def dataplane(arguments: str) -> list[str]:
    """This very program with some arguments."""
    return [sys.executable, "-m", "dataplane", *arguments.split(" ")]


class Play:
    """What the steps act with."""

    def __init__(self, stage: Stage, tutorial: Tutorial, folder: Path, *, pause: bool, steps: int) -> None:
        self.stage = stage
        self.tutorial = tutorial
        stage.folder = folder
        self.manifest = folder / "hostnames.yaml"
        self.log = folder / "agent.log"
        self.page = Page(pause=pause, steps=steps)
        self.url = tutorial.vip if tutorial.port == 80 else f"{tutorial.vip}:{tutorial.port}"
        self.names = {pod.hostname: f"{pod.address}:{pod.port}" for pod in tutorial.pods}
        self.agent: subprocess.Popen[str] | None = None
        self.drain_seconds = 0
        self.hits: dict[str, tuple[str, dict[str, int]]] = {}
        """By mode: who counted, and what at each server."""
        self.started = time.monotonic()

    def introduce(self) -> None:
        """The heading, and what the signs mean."""
        self.page.heading("A Kubernetes Service, made by the kernel of this machine in three ways")
        self.page.prose(
            "Every machine here is a network namespace of its own; this machine's network is not touched, and nothing "
            f"stays behind. `node# ip addr` means: run in the node, as `ip netns exec {self.stage.namespace('node')} "
            "ip addr`. A line that begins with ok was checked, not assumed."
        )

    @contextmanager
    def agent_ends(self) -> Iterator[None]:
        """Whatever happens the agent is ended; if a claim failed, its log is shown on stderr."""
        try:
            yield
        except DataplaneError:
            with contextlib.suppress(OSError):
                for line in self.log.read_text(errors="replace").splitlines()[-20:]:
                    print(f"agent: {printable(line, 1000)}", file=sys.stderr)
            raise
        finally:
            if self.agent:
                with ended(self.agent):
                    pass

    def launch(self, mode: str, *, more: str = "", servers: int = 1) -> None:
        """Start the agent, with `more` options, and wait for its first sync, which makes so many virtual servers."""
        begun = time.monotonic()
        # about a dozen programs run while the pod drains, and on a slow machine each takes its time
        patience = max(10, round(12 * self.page.pace))
        self.drain_seconds = patience
        words = f"run -f hostnames.yaml --mode {mode} --drain-seconds {patience} --log-format human"
        shown = f"dataplane {words}"
        if more:
            words += f" {more}"
            shown += f" \\\n        {more}"
        self.page.command("node", f"{shown} 2>agent.log &")
        with self.log.open("w") as log:
            self.agent = self.stage.start(
                "node",
                [sys.executable, "-m", "dataplane", *words.split()],
                stdout=log.fileno(),
                stderr=subprocess.STDOUT,
            )
        status: dict[str, Any]
        while True:
            with contextlib.suppress(AgentUnreachable):
                status = self.stage.inside("node", read_status)
                if status["lastSync"]:
                    break
            if self.agent.poll() is not None:
                raise ClaimFailed(f"the agent ended by itself, with status {self.agent.returncode}")
            if time.monotonic() > begun + START_SECONDS:
                raise ClaimFailed(f"the agent has not finished its first sync after {START_SECONDS} s")
            time.sleep(0.05)
        self.page.claim(
            f"in sync: {status['lastSync']['milliseconds']:.1f} ms from plan to the kernel's last answer",
            status["healthy"] and status["virtualServers"] == servers,
            str(status),
        )

    def stop(self) -> None:
        """End the agent, which leaves the kernel as it is."""
        assert self.agent is not None
        self.page.command("node", f"kill {self.agent.pid}")
        self.agent.terminate()
        self.agent.wait(REACTION_SECONDS)
        ended_well = self.agent.returncode == 0
        self.page.claim("the agent ended by itself", ended_well, f"status {self.agent.returncode}", quiet=True)

    def command(self, where: str, line: str, *, status: int = 0, ends_with: str = "") -> str:
        """Show a command line, run it there, show and return what it printed; both outcomes are claims."""
        page = self.page
        page.command(where, line)
        shell = " ".join(dataplane(line[10:])) if line.startswith("dataplane ") else line
        begun = time.monotonic()
        code, output = self.stage.run(where, ["sh", "-c", shell])
        page.pace = max(page.pace, time.monotonic() - begun)
        page.text(output)
        page.claim(f"`{line}` ends with status {status}", code == status, f"it ended with {code}", quiet=True)
        if ends_with:
            page.claim(f"it says {ends_with!r}", output.strip().endswith(ends_with), quoted(output), quiet=True)
        return output

    def ask(self, where: str, count: int) -> list[str]:
        """Ask the Service so many times, one connection each; the names that answered."""
        curl = f"curl -sS -m 10 {self.url}"
        line = curl if count == 1 else f"for i in $(seq {count}); do {curl}; done"
        return self.command(where, line).split("\n")[:-1]

    def tally(self, count: int) -> dict[str, int]:
        """The client asks that often; how often each name answered."""
        curl = f"curl -sS -m 10 {self.url}"
        text = self.command("client", f"for i in $(seq {count}); do {curl}; done | sort | uniq -c")
        return {name: int(times) for times, name in (line.split() for line in text.splitlines())}

    def look(self, line: str) -> str:
        """What a command in the node prints, not shown."""
        return self.stage.run("node", line.split())[1]

    def wait(self, line: str, holds: Callable[[str], bool], what: str, seconds: float = 0) -> None:
        """Until a command in the node prints what holds; `seconds` are part of the plan."""
        limit = time.monotonic() + seconds + REACTION_SECONDS
        while not holds(self.look(line)):
            if time.monotonic() > limit:
                raise ClaimFailed(f"{what}: not after {seconds + REACTION_SECONDS:g} s")
            time.sleep(0.1)
