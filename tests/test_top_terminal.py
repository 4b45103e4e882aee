"""`dataplane top` for real: an agent, connections, and a terminal on which the program runs."""

import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from .lanes import build_world
from .netns import Topology
from .node_agent import VIP, NodeAgent, manifest, node_agent
from .terminal import Terminal, terminal
from .traffic import PORT, Caller, eventually

SERVICE = "default/web:http"


@pytest.fixture(scope="module")
def world() -> Iterator[Topology]:
    with build_world() as built:
        yield built


@pytest.fixture
def agent(world: Topology, tmp_path: Path) -> Iterator[NodeAgent]:
    with node_agent(world.node, tmp_path, "--mode", "nftables") as started:
        started.write(manifest([pod.addresses for pod in world.pods]))
        started.start()
        yield started
    world.node.run("nft", "delete", "table", "inet", "dataplane-nftables", check=False)


class Traffic:
    """Connections at a steady pace from a thread, and who answered them."""

    def __init__(self, client: Caller, per_second: float) -> None:
        self._client = client
        self._pause = 1 / per_second
        self._ended = threading.Event()
        self.answers: Counter[str] = Counter()
        self.began = time.monotonic()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._ended.is_set():
            self.answers[self._client.ask(VIP, 80)] += 1
            due += self._pause
            self._ended.wait(max(0.0, due - time.monotonic()))

    def end(self) -> float:
        """Stop; connections per second that there have been."""
        self._ended.set()
        self._thread.join()
        return sum(self.answers.values()) / (time.monotonic() - self.began)


def columns(line: str) -> list[str]:
    return re.split(r"  +", line.strip(" ▸├└"))


def hits(line: str) -> int:
    """Of a line of the overview: the number before the state; -1 while the line is being drawn."""
    found = re.search(r" (\d+)  (?:\d active|active)$", line)
    return int(found[1]) if found else -1


@pytest.mark.root
def test_it_shows_the_traffic_that_there_is(world: Topology, agent: NodeAgent) -> None:
    with terminal(agent.command("top", f"{VIP}:80", "--interval", "0.5")) as screen:
        screen.shows("nftables mode", "by the agent", "every 0.5 s")
        screen.shows(SERVICE, f"{VIP}:80/TCP", "3 active")
        for pod in world.pods:
            screen.shows(f"{pod.v4}:{PORT}", "active")
        traffic = Traffic(Caller(world.client), 40)
        try:
            seen = _rates(screen, 6)
        finally:
            pace = traffic.end()
        assert seen, screen.screen()
        middle = sorted(seen)[len(seen) // 2]
        assert 0.6 * pace <= middle <= 1.4 * pace, (seen, pace)
        answers = sum(traffic.answers.values())
        assert set(traffic.answers) == {"pod0", "pod1", "pod2"}
        wanted = [answers, *(traffic.answers[f"pod{number}"] for number in range(3))]
        lines = [SERVICE, *(f"{pod.v4}:{PORT}" for pod in world.pods)]
        eventually(f"{wanted} hits", lambda: [hits(screen.line(each)) for each in lines] == wanted, 15)
        assert any(block in screen.line(SERVICE) for block in "▂▃▄▅▆▇")

        screen.press("\r")
        screen.shows("kind", "ClusterIP")
        screen.shows("BACKEND", "WEIGHT", "ACTIVE")
        screen.press("\x1b")
        screen.shows("SERVICE / BACKEND")

        # the agent goes: the kernel is there, in the agent's mode, and so is what it counts
        agent.send(signal.SIGKILL)
        assert agent.process is not None
        agent.process.wait(30)
        screen.shows("nftables mode", "from the kernel: no agent of this mode answers")
        assert Caller(world.client).ask(VIP, 80).startswith("pod")
        eventually("one hit more", lambda: hits(screen.line(SERVICE)) == answers + 1, 15)
        agent.start()
        screen.shows("nftables mode", "by the agent")

        screen.press("q")
        assert screen.process.wait(30) == 0
    assert "Traceback" not in screen.written
    assert "\x1b[?1049l" in screen.written  # the terminal is given back as it was


def _rates(screen: Terminal, seconds: float) -> list[float]:
    """What stood in CONN/S of the Service, after the first two seconds."""
    found = []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.25)
        cells = columns(screen.line(SERVICE))
        if time.monotonic() > deadline - seconds + 2 and len(cells) > 1 and re.fullmatch(r"[\d.]+", cells[1]):
            found.append(float(cells[1]))
    return found


@pytest.mark.root
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_the_terminal_is_given_back(agent: NodeAgent, number: int) -> None:
    with terminal(agent.command("top"), 80, 24) as screen:
        screen.shows(SERVICE)
        screen.process.send_signal(number)  # `ip netns exec` has become the program
        assert screen.process.wait(30) == 128 + number
    assert "\x1b[?1049l" in screen.written


@pytest.mark.root
def test_without_colours_no_colour_is_written(agent: NodeAgent) -> None:
    with terminal(agent.command("top"), 80, 24, {"NO_COLOR": "1"}) as screen:
        screen.shows(SERVICE)
        screen.press("?")
        screen.shows("Keys")
        screen.press("\x1b")
        screen.shows("SERVICE / BACKEND")
        screen.press("/web")
        screen.shows("filter web")
        screen.press("\r")
        screen.shows("/ filter")  # the keys again
        screen.press("\r")
        screen.shows("masquerade")
        screen.press("q")
        assert screen.process.wait(30) == 0
    attributes = {
        int(each) for codes in re.findall(r"\x1b\[([\d;]*)m", screen.written) for each in codes.split(";") if each
    }
    assert attributes <= {0, 1, 2, 3, 4, 7, 22, 23, 24, 27, 39, 49}


@pytest.mark.root
def test_who_may_not_look_is_told_and_the_terminal_is_left_alone(world: Topology) -> None:
    drop = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    command = ("ip", "netns", "exec", world.client.name, *drop, sys.executable, "-m", "dataplane", "top")
    with terminal(command) as screen:
        assert screen.process.wait(60) == 7
    assert "sudo dataplane top" in screen.written.rpartition("\x1b[?1049l")[2]


@pytest.mark.parametrize("redirected", ["stdin", "stdout", "stderr"])
def test_without_a_terminal_it_points_to_counters(redirected: str, tmp_path: Path) -> None:
    told = tmp_path / "told"
    redirection = {"stdin": "</dev/null", "stdout": ">/dev/null", "stderr": ""}[redirected] + f" 2>{told}"
    with terminal(["bash", "-c", f'"{sys.executable}" -m dataplane top {redirection}']) as screen:
        assert screen.process.wait(60) == 2
    assert told.read_text() == "dataplane: top needs a terminal; without one: dataplane counters --watch\n"
    assert "\x1b[?1049h" not in screen.written


def test_a_pipe_is_no_terminal() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dataplane", "top"],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "dataplane counters --watch" in done.stderr
