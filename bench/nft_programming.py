"""nftables mode against its floor and its rival: `python -m bench --only nftables`.

Full programming: ours from plan to ACK; the bytes ours sends, ready before the clock starts, sent by a plain socket;
and `nft -f` of one chain per Service with an anonymous map. A change: the three endpoints of one Service replaced, from
plan to ACK. Each figure is of a namespace of its own.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from dataplane.backend import Backend, open_backend
from dataplane.model import Address, RealServer, VirtualServer, format_address
from dataplane.netlink_nftables import BATCH_BEGIN
from dataplane.netlink_socket import NETLINK_NETFILTER
from dataplane.plan import State, diff

from . import workload
from .isolation import RunFailed, isolated
from .raw import PlainSocket
from .stopwatch import Spent, measured
from .watching import record

WARM_UP = 100


def _prepared(size: int) -> tuple[Backend, State, dict[Any, VirtualServer]]:
    backend = open_backend("nftables")
    backend.prepare()
    wanted = {server.at: backend.express(server) for server in workload.servers(size)}
    return backend, backend.observe(), wanted


def dataplane(size: int) -> Spent:
    """Ours: plan, compile, commit."""

    def work() -> Spent:
        backend, held, wanted = _prepared(size)
        spent = measured(lambda: backend.commit(backend.compile(diff(held, wanted))))
        _verify(backend, size)
        return spent

    return isolated(work)


def raw_replay(size: int) -> Spent:
    """The bytes that ours sends, ready before the clock starts, by a plain socket."""
    batch = recorded(size)

    def work() -> Spent:
        backend, _, _ = _prepared(size)
        plain = PlainSocket(NETLINK_NETFILTER, len(batch))
        spent = measured(lambda: plain.ask(batch))
        _verify(backend, size)
        return spent

    return isolated(work)


@lru_cache(maxsize=4)
def recorded(size: int) -> bytes:
    """The batch that ours sends for so many Services; of no generation, so that nobody asks for the right one."""

    def work() -> bytes:
        backend, held, wanted = _prepared(size)
        transaction = backend.compile(diff(held, wanted))
        sent = record()
        backend.commit(transaction)
        (batch,) = [each.data for each in sent if len(each.data) > 1000]
        return without_generation(batch)

    return isolated(work)


def _verify(backend: Backend, size: int) -> None:
    found = len(backend.observe().servers)
    if found != size:
        raise RunFailed(f"{found} servers in the table instead of {size}")


def without_generation(batch: bytes) -> bytes:
    """An nf_tables batch for whatever generation there is; other bytes stay as they are."""
    if int.from_bytes(batch[4:6], sys.byteorder) != BATCH_BEGIN:
        return batch
    length = int.from_bytes(batch[:4], sys.byteorder)
    return (20).to_bytes(4, sys.byteorder) + batch[4:20] + batch[length:]


def nft_chains(size: int) -> Spent:
    """`nft -f` of one chain per Service, each with an anonymous map."""
    text = _chains(size)
    return isolated(lambda: measured(lambda: subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)))


def _chains(size: int) -> str:
    lines = ["table ip chains {", "map services { type ipv4_addr . inet_proto . inet_service : verdict; }"]
    elements = []
    for number, server in enumerate(workload.servers(size)):
        reals = server.real_servers
        picks = ", ".join(f"{n} : {format_address(r.address)} . {r.port}" for n, r in enumerate(reals))
        lines.append(
            f"chain s{number} {{ meta l4proto tcp dnat ip addr . port to "
            f"numgen random mod {len(reals)} map {{ {picks} }}; }}"
        )
        elements.append(f"{format_address(server.at.address)} . tcp . {server.at.port} : goto s{number}")
    lines += ["}", "add element ip chains services { " + ", ".join(elements) + " }"]
    return "\n".join(lines)


CONTENDERS: dict[str, Callable[[int], Spent]] = {
    "raw replay": raw_replay,
    "dataplane": dataplane,
    "nft -f, a chain each": nft_chains,
}
SLOW = {"nft -f, a chain each"}


def change(size: int, count: int) -> list[float]:
    """Seconds of each of `count` changes: three endpoints of one Service replaced, from plan to ACK."""

    def work() -> list[float]:
        backend, held, wanted = _prepared(size)
        plan = diff(held, wanted)
        backend.commit(backend.compile(plan))
        held.apply(plan)
        samples = []
        keys = list(wanted)
        for turn in range(count + WARM_UP):
            at = keys[turn * 37 % size]
            old = held.servers[at]
            reals = tuple(
                RealServer(Address((0x0B000000 + turn * 3 + n).to_bytes(4)), 8080) for n in range(len(old.real_servers))
            )
            new = {at: VirtualServer(at, reals, "random", label=old.label)}
            started = time.perf_counter()
            plan = diff(held, new, [at])
            outcome = backend.commit(backend.compile(plan))
            samples.append(time.perf_counter() - started)
            if outcome.failed or outcome.unsure:
                raise RunFailed(f"change {turn}: {outcome}")
            held.apply(plan)
        return samples[WARM_UP:]

    return isolated(work)
