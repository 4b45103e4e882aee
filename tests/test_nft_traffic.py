"""Real packets through the real agent in nftables mode: what only it has, marks, counters, and news of damage."""

import contextlib
import itertools
import json
import multiprocessing
import random
import signal
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dataplane.backend import Options, open_backend
from dataplane.plan import diff

from .lanes import build_world, scaled
from .netns import Pod, Topology
from .node_agent import VIP, NodeAgent, manifest, node_agent
from .traffic import Caller, eventually
from .words import server

pytestmark = pytest.mark.root
TABLE = "dataplane-nftables"
CONNECTIONS = scaled(100_000)


@pytest.fixture(scope="module")
def world() -> Iterator[Topology]:
    with build_world() as built:
        yield built


@pytest.fixture
def agent(world: Topology, tmp_path: Path) -> Iterator[NodeAgent]:
    with node_agent(world.node, tmp_path, "--mode", "nftables", "--resync-seconds", "3") as started:
        started.write(manifest([pod.addresses for pod in world.pods]))
        yield started
    world.node.run("nft", "delete", "table", "inet", TABLE, check=False)


@pytest.fixture
def client(world: Topology) -> Caller:
    return Caller(world.client)


def test_no_mark_and_no_priority_is_left(agent: NodeAgent, world: Topology, client: Caller) -> None:
    """A packet with a mark of somebody else's keeps it, and behind our chains there is no priority."""
    script = """table inet witness {
        counter marked { }
        counter bare { }
        counter queued { }
        chain before { type filter hook prerouting priority -150; meta mark set 0x1234; }
        chain after { type filter hook prerouting priority -90;
            ct state new ct status dnat meta mark 0x1234 counter name marked
            ct state new ct status dnat meta mark != 0x1234 counter name bare
            ct state new ct status dnat meta priority != 0 counter name queued
        }
    }"""
    config = {"clientIP": {"timeoutSeconds": 60}}
    agent.write(manifest([p.addresses for p in world.pods], sessionAffinity="ClientIP", sessionAffinityConfig=config))
    agent.start()
    world.node.run("nft", "-f", "-", stdin=script)
    try:
        client.tally(20, VIP, 80)
        listed = json.loads(world.node.run("nft", "-j", "list", "table", "inet", "witness").stdout)["nftables"]
        counts = {one["counter"]["name"]: one["counter"]["packets"] for one in listed if "counter" in one}
        assert counts == {"marked": 20, "bare": 0, "queued": 0}
    finally:
        world.node.run("nft", "delete", "table", "inet", "witness")


# ------------------------------------------------------------------------------------------------------- counting


def _count_and_close(sockets: Sequence[socket.socket], counts: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def serve(number: int, listener: socket.socket) -> None:
        while True:
            accepted, _ = listener.accept()
            counts[number] += 1
            accepted.send(b"%d" % number)
            accepted.close()

    for number, listener in enumerate(sockets):
        threading.Thread(target=serve, args=(number, listener), daemon=True).start()
    signal.pause()


@contextlib.contextmanager
def counting_servers(pods: Sequence[Pod]) -> Iterator[Any]:
    """Servers on port 9377 that count whom they accept."""
    sockets = []
    for pod in pods:
        with pod.ns.enter():
            one = socket.socket()
        one.bind((pod.v4, 9377))
        one.listen(1024)
        sockets.append(one)
    context = multiprocessing.get_context("fork")
    counts = context.Array("L", len(pods), lock=False)
    process = context.Process(target=_count_and_close, args=(sockets, counts), daemon=True)
    process.start()
    try:
        yield counts
    finally:
        process.kill()
        process.join()
        for one in sockets:
            one.close()


@pytest.mark.slow
def test_counters_agree_with_client_and_server(world: Topology) -> None:
    """Per backend, while slots move: what the client met, what servers accepted, what the kernel says."""
    full = f"TCP {VIP}:90 rr -> " + ", ".join(f"{pod.v4}:9377" for pod in world.pods)
    fewer = f"TCP {VIP}:90 rr -> " + ", ".join(f"{pod.v4}:9377" for pod in world.pods[1:])
    heavy = full.replace(f"{world.pods[2].v4}:9377", f"{world.pods[2].v4}:9377 w3")
    met = [0, 0, 0]
    # a port used before may still be a connection to conntrack, which no rule sees a second time
    second = "192.0.2.3"
    world.client.ip(f"address add {second}/32 dev eth0")
    sources = itertools.product((world.client_addresses[0], second), range(2_000, 64_000))
    with world.node.enter():
        backend = open_backend("nftables", Options())
        backend.prepare()

    def settle(line: str) -> None:
        wanted = backend.express(server(line))
        plan = diff(backend.observe(), {wanted.at: wanted})
        if plan:
            outcome = backend.commit(backend.compile(plan))
            assert not outcome.failed
            assert not outcome.unsure

    def call(times: int) -> None:
        linger = struct.pack("ii", 1, 0)
        for _ in range(times):
            with world.client.enter():
                one = socket.socket()
            with one:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                one.settimeout(10)
                one.bind(next(sources))
                one.connect((VIP, 90))
                met[int(one.recv(8))] += 1

    def reported() -> list[int]:
        (row,) = [one for one in backend.report() if one.server.at.port == 90]
        counts = {real.address: counters.connections for real, counters in row.reals}
        return [counts.get(socket.inet_aton(pod.v4), -1) for pod in world.pods]  # type: ignore[call-overload]

    try:
        with counting_servers(world.pods) as accepted:
            settle(full)
            lows = [0, 0, 0]
            rng = random.Random(9377)
            done = 0
            while done < CONNECTIONS:
                settle(rng.choice([full, fewer, heavy, full.replace("rr", "rr sticky=1")]))
                step = min(CONNECTIONS - done, CONNECTIONS // 20)
                call(step)
                done += step
                now = reported()
                assert all(after >= before or after == -1 for before, after in zip(lows, now, strict=True))
                lows = [max(pair) for pair in zip(lows, now, strict=True)]
            settle(full)
            assert sum(met) == CONNECTIONS
            assert list(accepted) == met
            assert reported() == met
    finally:
        world.client.ip(f"address delete {second}/32 dev eth0")
        backend.remove()
        backend.close()


def test_damage_is_repaired_by_events(agent: NodeAgent, world: Topology, client: Caller) -> None:
    """Each kind of damage to our table is undone; another table is not touched."""
    world.node.run("nft", "-f", "-", stdin="table ip other {\n set s { type ipv4_addr; elements = { 1.2.3.4 }; }\n}\n")
    other = world.node.run("nft", "list", "table", "ip", "other").stdout
    agent.start()
    wanted = world.node.run("nft", "-s", "list", "table", "inet", TABLE).stdout

    def sorted_lines(text: str) -> list[str]:
        return sorted(text.replace("elements = ", "").replace("}", ",").replace("{", ",").replace("\n", ",").split(","))

    for damage in (
        f"flush set inet {TABLE} cluster_ips4",
        f"flush map inet {TABLE} services4",
        f"flush map inet {TABLE} endpoints6",
        f"flush chain inet {TABLE} nat_prerouting",
        f"flush chain inet {TABLE} pick4_3",
        f"delete table inet {TABLE}",
        f"add element inet {TABLE} services4 {{ 10.0.1.175 . tcp . 81 : goto refuse }}",
    ):
        world.node.run("nft", "-f", "-", stdin=damage)

        def repaired() -> bool:
            done = world.node.run("nft", "-s", "list", "table", "inet", TABLE, check=False)
            squeezed = [[part.strip() for part in sorted_lines(text)] for text in (done.stdout, wanted)]
            return sorted(filter(None, squeezed[0])) == sorted(filter(None, squeezed[1]))

        eventually(damage, repaired)
        assert client.ask(VIP, 80).startswith("pod")
    assert world.node.run("nft", "list", "table", "ip", "other").stdout == other
    world.node.run("nft", "delete", "table", "ip", "other")
