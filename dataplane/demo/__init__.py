"""`dataplane demo`: one Service from manifest to real connections in each mode, told step by step and checked so.

Nothing is staged but the machines: the agent is the real one, every command shown is run as it stands, and every line
that begins with `ok` was compared with what the kernel and the programs said. A claim that does not hold ends the demo
with status 1.
"""

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from ..errors import DataplaneError, KernelError, NotRoot, PreflightError
from ..netlink_socket import NETLINK_GENERIC, NetlinkSocket, resolve_family
from ..run_tool import SYSTEM_PATH, run_tool
from . import ending, ipvs_act, names_act, other_acts
from .play import Play
from .shell import run_shell
from .stage import NO_KERNEL_FIX, build_stage
from .tutorial import EXAMPLE, read_tutorial

TOOLS = {
    "curl": "curl",
    "getent": "libc-bin",
    "ip": "iproute2",
    "iptables-save": "iptables",
    "ipvsadm": "ipvsadm",
    "nft": "nftables",
    "setpriv": "util-linux",
}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STEPS = (
    ipvs_act.show_machines,
    ipvs_act.show_manifest,
    ipvs_act.start_agent,
    ipvs_act.spread_requests,
    ipvs_act.other_ways,
    ipvs_act.drain,
    ipvs_act.show_own_view,
    other_acts.nftables,
    names_act.names,
    other_acts.iptables,
)


def run_demo(*, pause: bool = False, keep: bool = False) -> int:
    """Play the whole demo on stdout; returns 0, raises when a claim does not hold.

    `pause` waits for Enter before each step; `keep` leaves everything running after the last look, until Ctrl-C.
    """
    if os.geteuid() != 0:
        raise NotRoot("the demo makes network namespaces, for which it needs root")
    _need_tools(TOOLS)
    _need_ipvs()
    tutorial = read_tutorial(EXAMPLE)
    with _signals_end_it() as ignore_signals, tempfile.TemporaryDirectory(prefix="dataplane-demo-") as folder:
        try:
            with build_stage(tutorial.pods) as stage:
                try:
                    play = Play(stage, tutorial, Path(folder), pause=pause, steps=len(STEPS) + 1)
                    with play.agent_ends():
                        play.introduce()
                        for step in STEPS:
                            step(play)
                        (ending.stay if keep else ending.stop_and_clean)(play)
                finally:
                    ignore_signals()
        finally:
            ignore_signals()
        ending.gone(play)
    return 0


def open_shell() -> int:
    """A shell in the demo's world, until it is left; its exit status. Needs no IPVS: two of the modes do without."""
    if os.geteuid() != 0:
        raise NotRoot("the demo makes network namespaces, for which it needs root")
    _need_tools(["curl", "ip", "setpriv"])
    with contextlib.suppress(DataplaneError):
        run_tool(["modprobe", "-qa", "ip_vs", "dummy"])
    tutorial = read_tutorial(EXAMPLE)
    with _signals_end_it() as ignore_signals:
        try:
            return run_shell(tutorial)
        finally:
            ignore_signals()


def _need_tools(tools: Iterable[str]) -> None:
    """PreflightError for the first program that is not installed."""
    for tool in tools:
        package = TOOLS[tool]
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
