"""The demo's stage: network namespaces for a node, its pods and a client, and the pods' web servers.

    client 192.0.2.2 ── 192.0.2.1 node, bridge ── pods, each in a /24 of its own with the node as gateway

Every namespace has a name of its own (`dataplane-demo-…`), and nothing outside of them is touched. The pods' servers
are threads of this process whose sockets were opened in the pods' namespaces, so they end with it. Whatever the caller
does, leaving the `with` block takes everything away again.
"""

import contextlib
import ctypes
import ipaddress
import os
import secrets
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from ..errors import DataplaneError, KernelError, PreflightError, ToolError
from ..run_tool import SYSTEM_PATH, last_words, run_tool

Result = TypeVar("Result")

CLIENT, NODE = "192.0.2.2", "192.0.2.1"  # RFC 5737: addresses for documentation
PACKAGE = Path(__file__).resolve().parent.parent
CLONE_NEWNET = 0x40000000
LINE_SECONDS = 0.3
"""Pause between the lines of a stream."""


class PodSpec(NamedTuple):
    """A pod that the demo shall play."""

    hostname: str
    address: str
    port: int


class Stage:
    """What the demo acts on; made by `build_stage`."""

    def __init__(self, prefix: str, pods: Sequence[PodSpec]) -> None:
        self.prefix = prefix
        self.pods = tuple(pods)
        self.folder: Path | None = None
        """Working directory of the programs."""
        self.curtain = threading.Event()
        """Set: streams end."""
        self.lines_sent = 0
        """By the last stream."""

    @property
    def names(self) -> list[str]:
        """Where commands can run."""
        return ["node", *(f"pod{number}" for number in range(1, len(self.pods) + 1)), "client"]

    def namespace(self, where: str) -> str:
        """The name `ip netns` knows."""
        return f"{self.prefix}-{where}"

    def argv(self, where: str, command: Sequence[str]) -> list[str]:
        """A command that runs in one of the namespaces, and ends when this process dies."""
        inside = ["setpriv", "--pdeathsig", "TERM", "ip", "netns", "exec", self.namespace(where)]
        if where == "client" and self.folder is not None and (self.folder / "resolv.conf").exists():
            # `ip netns exec` has made mounts of its own, so this machine's file is what it was
            inside += ["sh", "-c", f'mount --bind {self.folder}/resolv.conf /etc/resolv.conf && exec "$@"', "sh"]
        return [*inside, *command]

    def start(
        self, where: str, command: Sequence[str], *, stdout: int = subprocess.PIPE, stderr: int = subprocess.DEVNULL
    ) -> "subprocess.Popen[str]":
        """Start a program; the caller ends it (`ended`)."""
        return subprocess.Popen(
            self.argv(where, command),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            env=environment(),
            cwd=self.folder,
            start_new_session=True,  # Ctrl-C is for the demo, which ends its programs in order
        )

    def run(self, where: str, command: Sequence[str], timeout: float = 60) -> tuple[int, str]:
        """Run a program; its exit status, and what it printed on stdout and stderr."""
        process = self.start(where, command, stderr=subprocess.STDOUT)
        with ended(process):
            try:
                output, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                raise ToolError(f"{' '.join(command)}: not finished after {timeout:g} s") from None
        return process.returncode, output

    def inside(self, where: str, action: Callable[[], Result]) -> Result:
        """Call `action` in a namespace: by a thread of its own, so that this one never leaves where it is."""
        results: list[Result] = []
        errors: list[Exception] = []

        def enter_and_call() -> None:
            try:
                with Path("/run/netns", self.namespace(where)).open() as file:
                    _setns(file.fileno())
                results.append(action())
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=enter_and_call)
        thread.start()
        thread.join()
        for error in errors:
            raise error
        return results[0]

    def serve(self, number: int) -> socket.socket:
        """Start the web server of a pod."""
        pod = self.pods[number - 1]
        listener = self.inside(f"pod{number}", lambda: socket.create_server((pod.address, pod.port), backlog=64))
        threading.Thread(target=self._accept, args=(listener, pod.hostname), daemon=True).start()
        return listener

    def _accept(self, listener: socket.socket, hostname: str) -> None:
        with contextlib.suppress(OSError):  # closed: the play is over
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self._answer, args=(connection, hostname), daemon=True).start()

    def _answer(self, connection: socket.socket, hostname: str) -> None:
        """`/` answers with the host's name, as the tutorial's serve_hostname does; `/stream` does not stop to."""
        with connection, contextlib.suppress(OSError):
            connection.settimeout(60)
            request = b""
            while b"\r\n\r\n" not in request and len(request) < 65536:
                received = connection.recv(4096)
                if not received:
                    return
                request += received
            connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n")
            if not request.startswith(b"GET /stream"):
                connection.sendall(f"{hostname}\n".encode())
                return
            self.lines_sent = 0
            while True:
                connection.sendall(f"{hostname} line {self.lines_sent + 1}\n".encode())
                self.lines_sent += 1
                if self.curtain.wait(LINE_SECONDS):
                    connection.sendall(f"{hostname} end\n".encode())
                    return


def environment() -> dict[str, str]:
    """For the demo's programs: no proxies, no colours, English, and sbin on the path."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return {
        **kept,
        "LC_ALL": "C.UTF-8",
        "NO_COLOR": "1",
        "PATH": f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}",
        "PYTHONPATH": f"{PACKAGE.parent}:{os.environ.get('PYTHONPATH', '')}".rstrip(":"),  # in a clone, not installed
    }


def _setns(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns came with Python 3.12
    if libc.setns(descriptor, CLONE_NEWNET):
        raise KernelError("enter", "network namespace", ctypes.get_errno())


@contextmanager
def ended(process: "subprocess.Popen[str]") -> Iterator[None]:
    """End a program, if it still runs, on leaving."""
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
        if process.stdout:
            process.stdout.close()


@contextmanager
def build_stage(pods: Sequence[PodSpec], *, needs_dummy: bool = True) -> Iterator[Stage]:
    """A stage with these pods, each behind the node, with its web server running.

    `needs_dummy`: PreflightError where this kernel has no dummy devices, without which there is no kube-ipvs0.
    """
    stage = Stage(f"dataplane-demo-{secrets.token_hex(2)}", pods)
    with ExitStack() as stack:
        for where in stage.names:
            stack.callback(_remove_namespace, stage.namespace(where))
            run_tool(["ip", "netns", "add", stage.namespace(where)])
            stage.inside(where, _quiet_ipv6)
        if needs_dummy:
            _try_dummy(stage)
        stage.inside("node", _forward)
        _connect(stage)
        for number in range(1, len(pods) + 1):
            stack.callback(stage.serve(number).close)
        stack.callback(stage.curtain.set)
        yield stage


NO_KERNEL_FIX = "`make demo` in a clone of the project boots a micro-VM whose kernel has everything"


def _try_dummy(stage: Stage) -> None:
    try:
        _ip(stage, "node", "link add dataplane-try type dummy", "link delete dataplane-try")
    except ToolError as error:
        raise PreflightError(
            f"this kernel has no dummy devices ({last_words(str(error).encode())})", NO_KERNEL_FIX
        ) from None


def _quiet_ipv6() -> None:
    """Nothing here speaks IPv6, and `ip addr` is for reading."""
    with contextlib.suppress(OSError):
        for which in ("all", "default"):
            Path(f"/proc/sys/net/ipv6/conf/{which}/disable_ipv6").write_text("1")


def _forward() -> None:
    """A node is its pods' router."""
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    for which in ("all", "default"):
        Path(f"/proc/sys/net/ipv4/conf/{which}/rp_filter").write_text("0")


def _ip(stage: Stage, where: str, *commands: str) -> None:
    """Run ip(8) commands in a namespace, all in one process."""
    run_tool(["ip", "-n", stage.namespace(where), "-batch", "-"], input="\n".join(commands) + "\n")


def _connect(stage: Stage) -> None:
    gateways = [str(ipaddress.ip_interface(f"{pod.address}/24").network[1]) for pod in stage.pods]
    joined = [
        line
        for number in range(1, len(stage.pods) + 1)
        for line in (
            f"link add pod{number} type veth peer name eth0 netns {stage.namespace(f'pod{number}')}",
            f"link set pod{number} master bridge up",
        )
    ]
    _ip(
        stage,
        "node",
        "link set lo up",
        "link add bridge type bridge forward_delay 0 mcast_snooping 0",
        *(f"address add {gateway}/24 dev bridge" for gateway in dict.fromkeys(gateways)),
        "link set bridge up",
        f"link add eth0 type veth peer name eth0 netns {stage.namespace('client')}",
        f"address add {NODE}/24 dev eth0",
        "link set eth0 up",
        *joined,
    )
    ends = [(f"pod{number}", pod.address, gateways[number - 1]) for number, pod in enumerate(stage.pods, 1)]
    for where, address, gateway in (*ends, ("client", CLIENT, NODE)):
        _ip(
            stage,
            where,
            "link set lo up",
            f"address add {address}/24 dev eth0",
            "link set eth0 up",
            f"route add default via {gateway}",
        )


def _remove_namespace(name: str) -> None:
    if Path("/run/netns", name).exists():
        with contextlib.suppress(DataplaneError):
            run_tool(["ip", "netns", "delete", name])
