"""nftables mode against its floor and its rival, natively: `python -m bench.nft_programming [SERVICES]`.

Full programming: ours from plan to ACK; the bytes ours sends, ready before the clock starts, sent by a plain socket;
and `nft -f` of one chain per Service with an anonymous map. A change: the three endpoints of one Service replaced, from
plan to ACK. Each figure is of a namespace of its own.
"""

import socket
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Any

from dataplane.backend import Backend, open_backend
from dataplane.model import Address, RealServer, VirtualServer, format_address
from dataplane.netlink_socket import NetlinkSocket
from dataplane.plan import State, diff

from . import workload
from .isolation import isolated

ROUNDS = 5


def _prepared(size: int) -> tuple[Backend, State, dict[Any, VirtualServer]]:
    backend = open_backend("nftables")
    backend.prepare()
    wanted = {server.at: backend.express(server) for server in workload.servers(size)}
    return backend, backend.observe(), wanted


def full(size: int) -> float:
    """Seconds of ours: plan, compile, commit."""
    backend, held, wanted = _prepared(size)
    started = time.perf_counter()
    outcome = backend.commit(backend.compile(diff(held, wanted)))
    spent = time.perf_counter() - started
    assert not outcome.failed
    assert len(backend.observe().servers) == size
    return spent


def replay(size: int) -> float:
    """Seconds for the same bytes, encoded beforehand, by a plain socket."""
    sent: list[bytes] = []
    original = NetlinkSocket._send

    def record(self: NetlinkSocket, data: bytes | bytearray) -> None:
        sent.append(bytes(data))
        original(self, data)

    backend, held, wanted = _prepared(size)
    NetlinkSocket._send = record  # type: ignore[method-assign]
    backend.commit(backend.compile(diff(held, wanted)))
    NetlinkSocket._send = original  # type: ignore[method-assign]
    backend.remove()
    backend.prepare()
    (batch,) = [each for each in sent if len(each) > 1000]
    # the generation is another one by now: without the attribute nobody asks
    batch = _without_generation(batch)
    plain = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
    for option in (32, 33):  # SO_SNDBUFFORCE, SO_RCVBUFFORCE
        plain.setsockopt(socket.SOL_SOCKET, option, 64 << 20)
    plain.bind((0, 0))
    started = time.perf_counter()
    plain.send(batch)
    answer = plain.recv(65536)
    spent = time.perf_counter() - started
    assert int.from_bytes(answer[16:20], sys.byteorder) == 0
    assert len(backend.observe().servers) == size
    return spent


def _without_generation(batch: bytes) -> bytes:
    length = int.from_bytes(batch[:4], sys.byteorder)
    return (20).to_bytes(4, sys.byteorder) + batch[4:20] + batch[length:]


def chains(size: int) -> float:
    """Seconds of `nft -f` for one chain per Service, each with an anonymous map."""
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
    started = time.perf_counter()
    subprocess.run(["nft", "-f", "-"], input="\n".join(lines), text=True, check=True, timeout=900)
    return time.perf_counter() - started


def change(size: int) -> list[float]:
    """Seconds of each of 1000 changes: three endpoints of one Service replaced, from plan to ACK."""
    backend, held, wanted = _prepared(size)
    plan = diff(held, wanted)
    backend.commit(backend.compile(plan))
    held.apply(plan)
    samples = []
    keys = list(wanted)
    for turn in range(1100):
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
        assert not outcome.failed
        assert not outcome.unsure
        held.apply(plan)
    return samples[100:]


def main() -> None:
    """Print the table."""
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    ours, floor = [], []
    for _ in range(ROUNDS):
        ours.append(isolated(lambda: full(size)))
        floor.append(isolated(lambda: replay(size)))
    print(
        f"full programming, {size} x {workload.ENDPOINTS}: ours {statistics.median(ours) * 1000:.0f} ms, replay "
        f"{statistics.median(floor) * 1000:.0f} ms, ratio {statistics.median(ours) / statistics.median(floor):.2f}"
    )
    for each in (1000, size, 40_000):
        samples = sorted(isolated(partial(change, each)))
        print(f"one Service changed among {each}: p50 {samples[500] * 1e6:.0f} us, p99 {samples[990] * 1e6:.0f} us")
    rival = isolated(lambda: chains(size))
    print(f"nft -f, one chain per Service: {rival:.1f} s, {rival / statistics.median(ours):.0f} times ours")


if __name__ == "__main__":
    main()
