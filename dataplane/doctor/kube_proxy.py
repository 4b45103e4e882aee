"""Traces of a kube-proxy that programs, or once programmed, the same kernel."""

from collections.abc import Iterator
from pathlib import Path

from .. import kube_proxy_leftovers
from .check import Check

CLEANUP = "dataplane cleanup --kube-proxy"
FIX = f"stop kube-proxy on this node, then: {CLEANUP}"


def traces(may: bool) -> Iterator[Check]:
    findings = [*processes()]
    if may:
        findings += leftovers(running=bool(findings))
    yield from findings or [Check("kube-proxy", "ok", "no trace of it")]


def processes() -> Iterator[Check]:
    """A kube-proxy in our network namespace; those of containers with their own do no harm."""
    for pid in running():
        detail = f"runs here (pid {pid}); in ipvs mode it deletes the virtual servers of others"
        yield Check("kube-proxy", "fail", detail, FIX)


def running() -> Iterator[int]:
    """Process ids of those."""
    own = Path("/proc/self/ns/net").readlink()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "comm").read_text().strip() == "kube-proxy" and (process / "ns/net").readlink() == own:
                yield int(process.name)
        except OSError:
            continue  # it has ended, or is not ours to look at


def leftovers(*, running: bool) -> Iterator[Check]:
    """What it left, or holds: one finding for all that one command removes."""
    found = kube_proxy_leftovers.find()
    if found.anything:
        yield Check("kube-proxy", "warn", f"has left: {', '.join(found.summary)}", FIX if running else CLEANUP)
    for each in found.unread:
        yield Check("kube-proxy", "warn", f"not looked at: {each}")
