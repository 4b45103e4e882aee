"""`dataplane demo`: one Service from manifest to real connections, told step by step and checked step by step.

Nothing is staged but the machines: the agent is the real one, every command shown is run as it stands, and every line
that begins with `ok` was compared with what the kernel and the programs said. A claim that does not hold ends the demo
with status 1.
"""

import contextlib
import difflib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from .agent import read_status
from .demo_stage import CLIENT, NO_KERNEL_FIX, NODE, PodSpec, Stage, build_stage, ended
from .errors import AgentUnreachable, DataplaneError, KernelError, NotRoot, PreflightError, UsageError
from .netlink_socket import NETLINK_GENERIC, NetlinkSocket, resolve_family
from .printable import printable
from .run_tool import SYSTEM_PATH, run_tool

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "hostnames.yaml"
WIDTH = 78
TOOLS = {"curl": "curl", "ip": "iproute2", "ipvsadm": "ipvsadm", "nft": "nftables", "setpriv": "util-linux"}
START_SECONDS = 60
"""How long the agent may take to its first sync."""
REACTION_SECONDS = 15
"""How long it may take to follow a changed manifest; it takes milliseconds, but a machine may be busy."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class ClaimFailed(DataplaneError):
    """What the demo says is not what happened."""


class Tutorial(NamedTuple):
    """What the demo needs to know of the manifest."""

    text: str
    vip: str
    port: int
    pods: tuple[PodSpec, ...]


class RealLine(NamedTuple):
    """One real server in `ipvsadm -ln`."""

    weight: int
    active: int
    inactive: int


def run_demo(*, pause: bool = False, keep: bool = False, mode: str = "ipvs") -> int:
    """Play the whole demo on stdout; returns 0, raises when a claim does not hold.

    `pause` waits for Enter before each step; `keep` leaves everything running after the last look, until Ctrl-C.
    """
    if mode != "ipvs":
        raise UsageError(f"no demo for mode {mode!r} yet; modes: ipvs")
    if os.geteuid() != 0:
        raise NotRoot("the demo makes network namespaces, for which it needs root")
    _need_tools()
    _need_ipvs()
    tutorial = read_tutorial(EXAMPLE)
    with _signals_end_it() as ignore_signals, tempfile.TemporaryDirectory(prefix="dataplane-demo-") as folder:
        try:
            with build_stage(tutorial.pods) as stage:
                try:
                    play = Play(stage, tutorial, Path(folder), pause=pause, mode=mode)
                    with play.agent_ends():
                        play.all_steps(keep=keep)
                finally:
                    ignore_signals()
        finally:
            ignore_signals()
        play.gone()
    return 0


def _need_tools() -> None:
    """PreflightError for the first program that is not installed."""
    for tool, package in TOOLS.items():
        if not shutil.which(tool, path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}"):
            raise PreflightError(f"the program {tool} is not installed", f"apt-get install {package}")


def _need_ipvs() -> None:
    """PreflightError unless this kernel has IPVS, loaded or to be loaded."""
    with contextlib.suppress(DataplaneError):
        run_tool(["modprobe", "-qa", "ip_vs", "dummy"])  # a kernel that has them built in needs none
    with contextlib.closing(NetlinkSocket(NETLINK_GENERIC)) as sock:
        try:
            resolve_family(sock, "IPVS")
        except KernelError:
            raise PreflightError("this kernel has no IPVS (module ip_vs)", NO_KERNEL_FIX) from None


def read_tutorial(path: Path) -> Tutorial:
    """The Service and the pods of the example manifest."""
    import yaml  # slow to import

    try:
        text = path.read_text()
    except OSError:
        raise PreflightError(f"{path} is not there", "run the demo in a clone of the project") from None
    service, endpoint_slice = yaml.safe_load_all(text)
    target = endpoint_slice["ports"][0]["port"]
    pods = [
        PodSpec(endpoint["targetRef"]["name"], endpoint["addresses"][0], target)
        for endpoint in endpoint_slice["endpoints"]
    ]
    return Tutorial(text, service["spec"]["clusterIP"], service["spec"]["ports"][0]["port"], tuple(pods))


def without_endpoint(text: str, address: str) -> str:
    """The manifest without the endpoint of that address."""
    return re.sub(rf"^- addresses: \[{re.escape(address)}\]\n(?:  .*\n)*", "", text, flags=re.MULTILINE)


def real_lines(table: str) -> dict[str, RealLine]:
    """Real servers in the output of `ipvsadm -ln`, by address:port."""
    rows = re.findall(r"^  -> (\S+:\d+)\s+Masq\s+(\d+)\s+(\d+)\s+(\d+)", table, re.MULTILINE)
    return {server: RealLine(int(weight), int(active), int(inactive)) for server, weight, active, inactive in rows}


@contextmanager
def _signals_end_it() -> Iterator[Callable[[], None]]:
    """Let the first signal unwind the stack, and none disturb the cleaning up; yields what makes them ignored."""

    def ignore() -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def unwind(number: int, _: FrameType | None) -> NoReturn:
        ignore()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, unwind) for number in SIGNALS}
    try:
        yield ignore
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Play:
    """The demo's steps, in order."""

    def __init__(self, stage: Stage, tutorial: Tutorial, folder: Path, *, pause: bool, mode: str) -> None:
        self.stage = stage
        self.tutorial = tutorial
        self.mode = mode
        stage.folder = folder
        self.manifest = folder / "hostnames.yaml"
        self.log = folder / "agent.log"
        self.page = Page(pause=pause, steps=8)
        self.url = tutorial.vip if tutorial.port == 80 else f"{tutorial.vip}:{tutorial.port}"
        self.names = {pod.hostname: f"{pod.address}:{pod.port}" for pod in tutorial.pods}
        self.agent: subprocess.Popen[str] | None = None
        self.drain_seconds = 0
        self.started = time.monotonic()

    def all_steps(self, *, keep: bool) -> None:
        """Everything; with `keep` all but the end, and then wait."""
        page = self.page
        page.heading(f"A Kubernetes Service in {self.mode} mode, made by the kernel of this machine")
        page.prose(
            "Every machine here is a network namespace of its own; this machine's network is not touched, and nothing "
            f"stays behind. `node# ip addr` means: run in the node, as `ip netns exec {self.stage.namespace('node')} "
            "ip addr`. A line that begins with ok was checked, not assumed."
        )
        self.show_machines()
        self.show_manifest()
        self.start_agent()
        self.spread_requests()
        self.other_ways()
        self.drain()
        self.show_own_view()
        if keep:
            self.stay()
        else:
            self.stop_and_clean()

    # ------------------------------------------------------------------------------------------------------- steps

    def show_machines(self) -> None:
        page, pods = self.page, self.tutorial.pods
        page.step(f"A node, {_number(len(pods))} pods and a client")
        page.prose(
            "Each pod runs a web server that answers with the pod's own name. The client is outside of the cluster, "
            "and the node is its gateway. Asked directly, every pod answers."
        )
        page.text(
            "\n".join(
                [
                    f"client {CLIENT} ---- {NODE} node ---+--- pod1 {pods[0].address}:{pods[0].port}",
                    *(
                        f"{'':{len(f'client {CLIENT} ---- {NODE} node ---')}}+--- pod{number} {pod.address}:{pod.port}"
                        for number, pod in enumerate(pods[1:], 2)
                    ),
                ]
            )
        )
        for pod in pods:
            answer = self.command("client", f"curl -sS -m 10 {pod.address}:{pod.port}")
            page.claim(
                f"it is {pod.hostname}", answer.strip() == pod.hostname, f"it said {_quoted(answer)}", quiet=True
            )
        page.ok("all of them answer")

    def show_manifest(self) -> None:
        page, tutorial = self.page, self.tutorial
        page.step("The Service, as Kubernetes writes it")
        page.prose(
            f"A Service is a promise: who connects to {tutorial.vip}:{tutorial.port} reaches one of the pods. The "
            "EndpointSlice lists them. No machine has that address yet, so for now nobody can reach it."
        )
        self.manifest.write_text(tutorial.text)
        self.command("node", "grep -v '^#' hostnames.yaml")
        self.command("client", f"curl -sS -m 5 {self.url}", status=7)
        page.ok("nobody can")

    def start_agent(self) -> None:
        page, vip = self.page, self.tutorial.vip
        page.step("The agent writes it into the kernel")
        page.prose(
            "The agent reads the manifest, watches it from now on, and programs IPVS, the load balancer inside Linux. "
            "It carries no traffic itself. First it makes the address the node's own, on a dummy device that stays "
            "DOWN: enough for the kernel to take the packets in."
        )
        begun = time.monotonic()
        self._launch(begun)
        links = self.command("node", "ip addr show kube-ipvs0")
        page.claim(
            f"kube-ipvs0 holds {vip}, and is DOWN",
            f"inet {vip}/32 scope global kube-ipvs0" in " ".join(links.split()) and "state DOWN" in links,
            "the output above says otherwise",
        )
        page.prose(
            "Then it adds a virtual server with a scheduler (rr: round robin, each in turn) and the pods as its real "
            "servers. Masq: the packet's destination address is replaced by the pod's, and back in the answer."
        )
        table = self.command("node", "ipvsadm -ln")
        page.claim(
            f"one virtual server with {_number(len(self.names))} real servers of weight 1",
            f"TCP  {vip}:{self.tutorial.port} rr\n" in table
            and real_lines(table) == dict.fromkeys(self.names.values(), RealLine(1, 0, 0)),
            "the table above is another one",
        )

    def spread_requests(self) -> None:
        page = self.page
        count = 3 * len(self.names)
        page.step("Requests are spread")
        page.prose(
            f"The client asks the Service {_number(count)} times. The scheduler takes the next pod for each new "
            "connection; within a connection every packet goes to the same pod."
        )
        answers = self.ask("client", count)
        page.claim(
            f"{' + '.join(['3'] * len(self.names))}: every pod got the same share",
            Counter(answers) == dict.fromkeys(self.names, 3),
            _shares(answers),
        )

    def other_ways(self) -> None:
        page, vip = self.page, self.tutorial.vip
        page.step("Three cases that are easily forgotten")
        page.prose(
            f"A port that no Service has. Without care the node itself would answer, as {vip} is its own address now; "
            "the agent's nftables table refuses it at once."
        )
        self.command("client", f"curl -v -m 5 {vip}:81 2>&1 | grep failed", ends_with="failed: Connection refused")
        page.ok("refused at once, not left waiting")
        page.prose("A process on the node itself, whose packets never arrive from outside:")
        answers = self.ask("node", 1)
        page.claim("the node reaches a pod", answers[0] in self.names, _quoted(answers[0]))
        page.prose(
            "And a pod that meets itself behind the Service (hairpin). Its source address has to be replaced, or it "
            "would answer itself directly and never recognise the connection."
        )
        answers = self.ask("pod1", len(self.names))
        page.claim(
            f"pod1 reaches every pod, itself ({self.tutorial.pods[0].hostname}) included",
            sorted(answers) == sorted(self.names),
            _shares(answers),
        )

    def drain(self) -> None:
        page = self.page
        page.step("A pod leaves while somebody is connected to it")
        page.prose("The client starts a download that does not stop by itself, and IPVS gives it to a pod:")
        command = f"curl -sN {self.url}/stream"
        page.command("client", f"{command} &")
        download = self.stage.start("client", command.split())
        with ended(download):
            assert download.stdout is not None
            first = download.stdout.readline()
            page.text(first)
            pod = first.split(" ")[0]
            page.claim("a pod answers", pod in self.names, _quoted(first), quiet=True)
            self._drain(pod, download)

    def _drain(self, pod: str, download: "subprocess.Popen[str]") -> None:
        page, server = self.page, self.names[pod]
        others = [name for name in self.names if name != pod]
        page.prose(
            f"Now this very pod, {server}, is taken out of the file. The agent sees the file change and sets the pod's "
            "weight to 0: no new connections, and those it has may go on."
        )
        edited = without_endpoint(self.tutorial.text, server.partition(":")[0])
        page.command("node", "editor hostnames.yaml")
        page.text(_difference(self.tutorial.text, edited))
        self.manifest.write_text(edited)
        removed = time.monotonic()
        self.wait(lambda table: real_lines(table)[server].weight == 0, f"{server} gets weight 0")
        table = self.command("node", "ipvsadm -ln")
        lines = real_lines(table)
        page.claim("weight 0, and its connection is still there", lines[server][:2] == (0, 1), "the table differs")
        answers = self.ask("client", 3 * len(others))
        page.claim("new requests avoid it", Counter(answers) == dict.fromkeys(others, 3), _shares(answers))
        more = self._fresh_lines(download, self.stage.lines_sent)
        page.text("".join(more[-2:]))
        page.claim("the download goes on", more[-1].startswith(f"{pod} line "), _quoted("".join(more)))
        page.prose(
            "The download ends. IPVS remembers a closed connection for two minutes (InActConn), in case packets are "
            f"late, and the agent lets it; but not for longer than --drain-seconds, which is {self.drain_seconds} here "
            "(and 900 otherwise). Then the real server goes."
        )
        self.stage.curtain.set()
        rest = download.communicate(timeout=REACTION_SECONDS)[0]
        page.text(rest.splitlines()[-1])
        page.claim(
            "the download was complete", rest.endswith(f"{pod} end\n") and not download.returncode, _quoted(rest)
        )
        self.wait(lambda table: server not in real_lines(table), f"{server} goes", self.drain_seconds)
        waited = time.monotonic() - removed
        table = self.command("node", "ipvsadm -ln")
        page.claim(
            f"{server} is gone, {waited:.0f} s after it left the file",
            real_lines(table).keys() == {self.names[name] for name in others},
            "the table differs",
        )

    def show_own_view(self) -> None:
        page = self.page
        page.step("The agent's own view")
        page.prose(
            "The same from the kernel, with the names that IPVS does not know. They, and the proof that a virtual "
            "server is ours, stand in the agent's nftables table; other people's servers are left alone."
        )
        shown = self.command("node", "dataplane show")
        left = [server for server in self.names.values() if server in real_lines(self.ipvsadm())]
        page.claim(
            "the Service is named, with the pods that are left",
            "hostnames" in shown and all(server in shown for server in left) and len(left) == len(self.names) - 1,
            "the output above says otherwise",
        )

    def stop_and_clean(self) -> None:
        page = self.page
        page.step("The agent stops, traffic goes on, and cleaning up")
        page.prose(
            "The kernel does the work, so it goes on without the agent: an update or a crash of the agent cuts nobody."
        )
        assert self.agent is not None
        page.command("node", f"kill {self.agent.pid}")
        self.agent.terminate()
        self.agent.wait(REACTION_SECONDS)
        page.claim("the agent ended by itself", self.agent.returncode == 0, f"status {self.agent.returncode}")
        answers = self.ask("client", 2)
        page.claim("the Service works without it", all(answer in self.names for answer in answers), _shares(answers))
        page.prose("Only `dataplane cleanup` takes everything away, and no more than what is ours.")
        self.command("node", "dataplane cleanup")
        self.command("node", "ip addr show kube-ipvs0", ends_with="does not exist.", status=1)
        table = self.command("node", "ipvsadm -ln")
        page.claim("IPVS is empty", "->" not in table.partition("ActiveConn")[2], "the table above is not empty")
        tables = self.command("node", "nft list tables")
        page.claim("no nftables table is left", not tables.strip(), _quoted(tables))

    def stay(self) -> None:
        """Until a signal comes."""
        prefix = self.stage.prefix
        self.page.prose(
            f"Everything keeps running until Ctrl-C. From another terminal: `ip netns exec {prefix}-client curl "
            f"{self.url}`, `ip netns exec {prefix}-node ipvsadm -ln`; the manifest is {self.manifest}."
        )
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()

    def gone(self) -> None:
        """The stage is down: say so, if it is so."""
        left = [each.name for each in Path("/run/netns").glob(f"{self.stage.prefix}-*")]
        self.page.claim("the namespaces of the demo are gone too", not left, ", ".join(left))
        self.page.prose(
            f"That was all, in {time.monotonic() - self.started:.0f} seconds. Next: `dataplane doctor` checks this "
            "machine, `dataplane diff -f FILE` shows what a manifest would change, `dataplane run -f FILE` does it."
        )

    # --------------------------------------------------------------------------------------------------- machinery

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

    def _launch(self, begun: float) -> None:
        """Start the agent and wait for its first sync."""
        # about a dozen programs run while the pod drains, and on a slow machine each takes its time
        patience = max(10, round(12 * self.page.pace))
        self.drain_seconds = patience
        words = f"run -f hostnames.yaml --mode {self.mode} --drain-seconds {patience}"
        self.page.command("node", f"dataplane {words} &")
        with self.log.open("w") as log:
            self.agent = self.stage.start(
                "node",
                [sys.executable, "-m", "dataplane", *words.split()],
                stdout=log.fileno(),
                stderr=subprocess.STDOUT,
            )
        while True:
            with contextlib.suppress(AgentUnreachable):
                status: dict[str, Any] = self.stage.inside("node", read_status)
                if status["lastSync"]:
                    break
            if self.agent.poll() is not None:
                raise ClaimFailed(f"the agent ended by itself, with status {self.agent.returncode}")
            if time.monotonic() > begun + START_SECONDS:
                raise ClaimFailed(f"the agent has not finished its first sync after {START_SECONDS} s")
            time.sleep(0.05)
        self.page.claim(
            f"in sync: {status['lastSync']['milliseconds']:.1f} ms from plan to the kernel's last answer",
            status["healthy"] and status["virtualServers"] == 1,
            str(status),
        )

    def command(self, where: str, line: str, *, status: int = 0, ends_with: str = "") -> str:
        """Show a command line, run it there, show and return what it printed; both outcomes are claims."""
        page = self.page
        page.command(where, line)
        shell = line.replace("dataplane ", f"{sys.executable} -m dataplane ") if line.startswith("dataplane ") else line
        begun = time.monotonic()
        code, output = self.stage.run(where, ["sh", "-c", shell])
        page.pace = max(page.pace, time.monotonic() - begun)
        page.text(output)
        page.claim(f"`{line}` ends with status {status}", code == status, f"it ended with {code}", quiet=True)
        if ends_with:
            page.claim(f"it says {ends_with!r}", output.strip().endswith(ends_with), _quoted(output), quiet=True)
        return output

    def ask(self, where: str, count: int) -> list[str]:
        """Ask the Service so many times, one connection each; the names that answered."""
        curl = f"curl -sS -m 10 {self.url}"
        line = curl if count == 1 else f"for i in $(seq {count}); do {curl}; done"
        return self.command(where, line).split("\n")[:-1]

    def ipvsadm(self) -> str:
        """The table, not shown."""
        return self.stage.run("node", ["ipvsadm", "-ln"])[1]

    def wait(self, holds: Callable[[str], bool], what: str, seconds: float = 0) -> None:
        """Until the table of IPVS is so; `seconds` are part of the plan."""
        limit = time.monotonic() + seconds + REACTION_SECONDS
        while not holds(self.ipvsadm()):
            if time.monotonic() > limit:
                raise ClaimFailed(f"{what}: not after {seconds + REACTION_SECONDS:g} s")
            time.sleep(0.1)

    @staticmethod
    def _fresh_lines(download: "subprocess.Popen[str]", sent: int) -> list[str]:
        """Lines of the download up to the second that the pod sends from now on, `sent` being what it sent so far."""
        assert download.stdout is not None
        lines: list[str] = []
        while not lines or (lines[-1] and int(lines[-1].split()[-1]) < sent + 2):
            lines.append(download.stdout.readline())
        return lines


class Page:
    """What the reader sees."""

    def __init__(self, *, pause: bool, steps: int) -> None:
        self._steps = steps
        self._number = 0
        self._pause = pause and sys.stdin.isatty()
        self._colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self.pace = 0.0
        """Seconds that the slowest command took."""
        if pause and not self._pause:
            print("demo: no terminal to press Enter on, so --pause does nothing", file=sys.stderr)

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text

    def heading(self, text: str) -> None:
        print(self._paint(text, "1"))
        print(self._paint("=" * len(text), "1"))

    def step(self, title: str) -> None:
        if self._pause:
            print(self._paint("-- Enter goes on --", "2"), end="", flush=True)
            sys.stdin.readline()
        self._number += 1
        print()
        print(self._paint(f"{self._number}/{self._steps}  {title}", "1"), flush=True)

    def prose(self, text: str) -> None:
        print()
        print(textwrap.fill(text, WIDTH, break_on_hyphens=False, break_long_words=False))
        print(flush=True)

    def command(self, where: str, line: str) -> None:
        print(f"    {self._paint(f'{where}#', '2')} {self._paint(line, '36')}", flush=True)

    def text(self, text: str) -> None:
        """A program's output as it is, indented; what could act on a terminal is escaped."""
        for line in text.rstrip("\n").split("\n") if text.strip() else []:
            print(f"    {printable(line.expandtabs().rstrip(), 500)}")
        sys.stdout.flush()

    def ok(self, text: str) -> None:
        print(f"{self._paint('ok', '32')}  {text}", flush=True)

    def claim(self, text: str, holds: bool, otherwise: str, *, quiet: bool = False) -> None:
        """Say it, if it holds (unless `quiet`); else end the demo."""
        if not holds:
            raise ClaimFailed(f"expected: {text}; but {otherwise}")
        if not quiet:
            self.ok(text)


def _number(count: int) -> str:
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return words[count] if count < len(words) else str(count)


def _quoted(text: str) -> str:
    return f'"{printable(text.strip())}"'


def _shares(answers: Sequence[str]) -> str:
    counts = Counter(answers)
    return "the answers were " + ", ".join(f"{count} of {_quoted(name)}" for name, count in sorted(counts.items()))


def _difference(before: str, after: str) -> str:
    """The lines that differ, as diff -u marks them."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=1)
    return "\n".join(list(lines)[3:])
