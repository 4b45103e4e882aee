"""Full programming: an empty namespace, and then every Service in the kernel. The contenders, as one table.

Each contender runs in a process and a namespace of its own (`isolation`). What it needs beforehand is made before the
clock starts, and what it left in the kernel is counted after the clock has stopped.
"""

import subprocess
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from dataplane.backend import Backend, open_backend
from dataplane.model import format_address
from dataplane.netlink_socket import NETLINK_GENERIC, NETLINK_NETFILTER, NETLINK_ROUTE, NetlinkSocket, resolve_family
from dataplane.reconciler import Reconciler

from . import workload
from .isolation import RunFailed, isolated
from .raw import PlainSocket, Sent, flush_ipvs, replay, split
from .watching import PARTS, keep_time, record

Seconds = dict[str, float]
"""What took how long: "whole", and the parts of it that a contender can tell apart."""


class Contender(NamedTuple):
    """Somebody who programs IPVS. `run(size)` measures once; `most`: the largest size it is run at."""

    name: str
    about: str
    run: Callable[[int], Seconds]
    slow: bool = False
    most: int = 1 << 30
    covers: tuple[str, ...] = ("ipvs",)


def prepared_backend() -> Backend:
    """The backend of ipvs mode with everything that does not depend on Services made."""
    backend = open_backend("ipvs")
    backend.prepare()
    return backend


def prepared_reconciler(size: int) -> Reconciler:
    """A reconciler that knows what is wanted and what is there, just before its first sync."""
    reconciler = Reconciler(prepared_backend(), workload.RULES)
    reconciler.take(workload.update(size))
    reconciler.observe()
    return reconciler


# ------------------------------------------------------------------------------------------------------ contenders


def dataplane(size: int) -> Seconds:
    """Ours, the whole mode: from `plan` to the kernel's last answer, encoding included."""
    reconciler = prepared_reconciler(size)
    spent = keep_time()
    started = time.perf_counter()
    report = reconciler.sync("bench")
    whole = time.perf_counter() - started
    if report.result != "committed":
        raise RunFailed(f"sync ended {report.result}: {report.failed[:3]}")
    verify(size, vips=True)
    return {"whole": whole, **spent}


def raw_replay(size: int) -> Seconds:
    """The bytes that ours sends, ready before the clock starts, sent again with plain sockets."""
    sent = recorded(size)
    backend = prepared_backend()
    sockets = _plain_sockets()
    spent = dict.fromkeys(PARTS.values(), 0.0)
    began = time.perf_counter()
    for one in sent:
        started = time.perf_counter()
        replay([one], sockets)
        spent[PARTS[one.protocol]] += time.perf_counter() - started
    whole = time.perf_counter() - began
    verify(size, vips=True)
    backend.close()
    return {"whole": whole, **spent}


def one_by_one(size: int) -> Seconds:
    """The same IPVS messages, ready before the clock starts; each sent alone and acknowledged before the next."""
    messages = [each for one in recorded(size) if one.protocol == NETLINK_GENERIC for each in split(one.data)]
    sock = PlainSocket(NETLINK_GENERIC)
    started = time.perf_counter()
    for message in messages:
        sock.ask(message)
    spent = time.perf_counter() - started
    verify(size)
    return {"ipvs": spent}


def ipvsadm_restore(size: int) -> Seconds:
    """`ipvsadm -R` reading the same rules."""
    rules = workload.ipvsadm_rules(size)
    started = time.perf_counter()
    subprocess.run(["ipvsadm", "-R"], input=rules, check=True, timeout=800)
    spent = time.perf_counter() - started
    verify(size)
    return {"ipvs": spent}


def pyroute2(size: int) -> Seconds:
    """pyroute2's IPVS class, one call for each virtual and real server."""
    import pyroute2 as library

    servers = workload.servers(size)
    with library.IPVS() as ipvs:
        started = time.perf_counter()
        for server in servers:
            address = format_address(server.at.address)
            service = library.IPVSService(
                addr=address, port=server.at.port, protocol=server.at.protocol, sched_name=server.scheduler
            )
            ipvs.service("add", service=service)
            for real in server.real_servers:
                dest = library.IPVSDest(
                    addr=format_address(real.address), port=real.port, weight=real.weight, fwd_method=0
                )
                ipvs.dest("add", service=service, dest=dest)
        spent = time.perf_counter() - started
    verify(size)
    return {"ipvs": spent}


EVERYTHING = ("ipvs", "vips", "guard", "whole")
CONTENDERS = (
    Contender("raw replay", "our bytes, ready beforehand, plain sockets: the floor", raw_replay, covers=EVERYTHING),
    Contender("dataplane", "ours: plan to committed, encoding included", dataplane, covers=EVERYTHING),
    Contender("one by one", "our messages, ready beforehand, each acknowledged", one_by_one),
    Contender("ipvsadm -R", "the same rules as text", ipvsadm_restore, slow=True),
    Contender("pyroute2", "one call for each server", pyroute2, slow=True, most=1000),
)


def run(contender: Contender, size: int) -> Seconds:
    """One measurement of a contender in a process and namespace of its own."""
    recorded(size)  # here, so that it is made once and every fork has it

    def work() -> Seconds:
        spent = contender.run(size)
        flush_ipvs(family_id())
        return spent

    return isolated(work)


# ------------------------------------------------------------------------------------------------------- supplies


@lru_cache(maxsize=4)
def recorded(size: int) -> tuple[Sent, ...]:
    """What ours sends for so many Services, in its order."""

    def work() -> tuple[Sent, ...]:
        reconciler = prepared_reconciler(size)
        sent = record()
        reconciler.sync("bench")
        found = tuple(sent)
        verify(size, vips=True)
        flush_ipvs(family_id())
        return found

    return isolated(work)


def family_id() -> int:
    """The number of the IPVS family in this kernel."""
    with NetlinkSocket(NETLINK_GENERIC) as sock:
        return resolve_family(sock, "IPVS")


def _plain_sockets() -> dict[int, PlainSocket]:
    return {number: PlainSocket(number) for number in (NETLINK_GENERIC, NETLINK_ROUTE, NETLINK_NETFILTER)}


def held() -> tuple[int, int]:
    """Virtual and real servers that the kernel shows in this namespace."""
    lines = Path("/proc/net/ip_vs").read_text().splitlines()
    virtual = sum(line.startswith(("TCP", "UDP", "SCTP")) for line in lines)
    return virtual, sum(line.startswith("  -> ") for line in lines[3:])


def verify(size: int, *, vips: bool = False) -> None:
    """RunFailed unless the kernel holds what it should."""
    expected = size, size * workload.ENDPOINTS
    if held() != expected:
        raise RunFailed(f"{held()} virtual and real servers in the kernel instead of {expected}")
    if vips:
        shown = subprocess.run(
            ["ip", "-4", "-o", "address", "show", "dev", "kube-ipvs0"], capture_output=True, check=True
        )
        if shown.stdout.count(b"\n") != size:
            raise RunFailed(f"{shown.stdout.count(10)} addresses on kube-ipvs0 instead of {size}")
