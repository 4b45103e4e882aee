"""Real packets through the real agent in nftables mode: who answers, how evenly, and that nobody fails meanwhile."""

import contextlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dataplane.backend import Options, open_backend
from dataplane.plan import diff

from .netns import Pod, Topology
from .node_agent import VIP, VIP6, NodeAgent, manifest, node_agent
from .traffic import PORT, Caller, _serving, eventually, host_server
from .words import server

pytestmark = pytest.mark.root
TABLE = "dataplane-nftables"
CONNECTIONS = int(os.environ.get("DATAPLANE_TEST_CONNECTIONS", "20000"))


def listeners(pod: Pod, name: str) -> list[tuple[socket.socket, bytes]]:
    """As the other modes' tests have them, but for SCTP: not every kernel has its sockets."""
    found = []
    with pod.ns.enter():
        for address in pod.addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                one = socket.socket(family, kind)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.bind((address, PORT))
                if kind == socket.SOCK_STREAM:
                    one.listen(1024)
                one.setblocking(False)
                found.append((one, name.encode()))
    return found


@pytest.fixture(scope="module")
def world() -> Iterator[Topology]:
    # each pod in a network of its own, as the tutorial's are: what pods say to each other passes the node
    with Topology.build(
        [("10.244.3.6", "fd00:3::6"), ("10.244.1.7", "fd00:1::7"), ("10.244.2.3", "fd00:2::3")]
    ) as built:
        for place in (built.node, *(pod.ns for pod in built.pods)):
            for key in ("ipv4.conf.all.send_redirects", "ipv4.conf.default.send_redirects"):
                place.sysctl(key, 0)
            for key in ("ipv4.conf.all.accept_redirects", "ipv6.conf.all.accept_redirects"):
                place.sysctl(key, 0)
        for device in ("br0", "eth0"):
            built.node.sysctl(f"ipv4.conf.{device}.send_redirects", 0)
        for pod in built.pods:
            pod.ns.sysctl("ipv6.conf.eth0.accept_redirects", 0)
            pod.ns.sysctl("ipv4.conf.eth0.accept_redirects", 0)
            # with br_netfilter a packet to its own pod never leaves the bridge, which must let it turn round
            built.node.ip(f"link set pod{built.pods.index(pod)} type bridge_slave hairpin on")
        # in this mode VIPs are nobody's addresses: a node needs some route that leads to them
        built.node.ip(*(f"route add default via {each}" for each in built.client_addresses))
        with _serving([one for n, pod in enumerate(built.pods) for one in listeners(pod, f"pod{n}")]):
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


def table(world: Topology) -> list[dict[str, Any]]:
    """The table as nft tells it."""
    listed: list[dict[str, Any]] = json.loads(world.node.run("nft", "-j", "list", "table", "inet", TABLE).stdout)[
        "nftables"
    ]
    return listed


@pytest.mark.parametrize(
    ("kind", "vip", "port"), [("tcp", VIP, 80), ("tcp", VIP6, 80), ("udp", VIP, 53), ("udp", VIP6, 53)], ids=str
)
def test_the_choice_is_even(agent: NodeAgent, client: Caller, kind: str, vip: str, port: int) -> None:
    agent.start()
    seen = client.tally(600, vip, port, kind=kind)
    assert set(seen) == {"pod0", "pod1", "pod2"}
    # chi-square with two degrees of freedom: 23 is passed once in a hundred thousand
    assert sum((count - 200) ** 2 / 200 for count in seen.values()) < 23


def test_everybody_reaches_a_service(agent: NodeAgent, world: Topology) -> None:
    agent.start()
    places = {"client": world.client, "node": world.node, **{f"pod{n}": p.ns for n, p in enumerate(world.pods)}}
    for place, ns in places.items():
        for vip in (VIP, VIP6):
            assert (place, vip, set(Caller(ns).tally(40, vip, 80))) == (place, vip, {"pod0", "pod1", "pod2"})


def test_a_vip_answers_on_its_services_ports_only(agent: NodeAgent, world: Topology, client: Caller) -> None:
    agent.start()
    with host_server(world.node):
        assert client.ask(world.node_addresses[0], 9376) == "host"
        for caller in (client, Caller(world.node), Caller(world.pods[0].ns)):
            for vip in (VIP, VIP6):
                assert caller.ask(vip, 9376) == "refused"
                # the node's own datagram is refused before it leaves: kube-proxy's nftables mode says the same
                answer = "Operation not permitted" if caller.ns == world.node else "refused"
                assert caller.ask(vip, 9376, kind="udp") == answer
    for ns in (agent.ns, world.client):
        assert ns.run("ping", "-c1", "-W2", VIP, check=False).returncode != 0


def test_a_service_without_endpoints_refuses_and_then_serves(agent: NodeAgent, world: Topology, client: Caller) -> None:
    agent.write(manifest([]))
    agent.start()
    for caller in (client, Caller(world.node)):
        assert caller.ask(VIP, 80) == "refused"
    assert client.ask(VIP, 53, kind="udp") == "refused"
    agent.write(manifest([world.pods[1].addresses]))
    eventually("the endpoint serves", lambda: client.ask(VIP, 80) == "pod1")


def test_silence_where_the_policy_is_local(world: Topology, client: Caller) -> None:
    with world.node.enter():
        backend = open_backend("nftables", Options())
        backend.prepare()
        wanted = server(f"TCP {VIP}:80 rr drop")
        backend.commit(backend.compile(diff(backend.observe(), {wanted.at: backend.express(wanted)})))
    try:
        assert client.ask(VIP, 80, timeout=1) == "timeout"
        assert client.ask(VIP, 81, timeout=1) == "refused"
    finally:
        with world.node.enter():
            backend.remove()
            backend.close()


@pytest.mark.parametrize("vip", [VIP, VIP6])
def test_affinity_keeps_a_client_with_its_server(agent: NodeAgent, world: Topology, client: Caller, vip: str) -> None:
    config = {"clientIP": {"timeoutSeconds": 60}}
    agent.write(manifest([p.addresses for p in world.pods], sessionAffinity="ClientIP", sessionAffinityConfig=config))
    agent.start()
    before = client.tally(30, vip, 80)
    assert len(before) == 1
    (chosen,) = before
    # other endpoints come and go, slots move: the client stays
    mine = world.pods[int(chosen[-1])]
    others = [pod for pod in world.pods if pod is not mine]
    for pods in ([mine, others[0]], [others[1], mine], [mine], [*others, mine]):
        agent.write(manifest([p.addresses for p in pods], sessionAffinity="ClientIP", sessionAffinityConfig=config))
        agent.send(signal.SIGHUP)
        many = len(pods)
        eventually("that many", lambda many=many: len(slots(world, vip)) == many)
        assert client.tally(10, vip, 80) == {chosen: 10}
    # its endpoint goes: another one, and no connection fails
    agent.write(manifest([p.addresses for p in others], sessionAffinity="ClientIP", sessionAffinityConfig=config))
    eventually("another", lambda: client.ask(vip, 80) != chosen)
    after = client.tally(20, vip, 80)
    assert len(after) == 1
    assert chosen not in after
    assert world.node.run("nft", "list", "table", "inet", TABLE).returncode == 0


def slots(world: Topology, vip: str) -> list[Any]:
    """Slots of the HTTP port in the map `numbers`."""
    found = []
    for one in table(world):
        if one.get("map", {}).get("name", "").startswith("numbers"):
            for key, _ in one["map"].get("elem", []):
                found += [key] if key["concat"][0] == vip and key["concat"][2] == 80 else []
    return found


def test_affinity_ends_with_its_time(agent: NodeAgent, world: Topology, client: Caller) -> None:
    config = {"clientIP": {"timeoutSeconds": 1}}
    agent.write(manifest([p.addresses for p in world.pods], sessionAffinity="ClientIP", sessionAffinityConfig=config))
    agent.start()
    seen: set[str] = set()

    def another() -> bool:
        seen.update(client.tally(3, VIP, 80))
        threading.Event().wait(1.2)
        return len(seen) > 1

    eventually("a second server", another, 60)


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


def test_counters_agree_with_client_and_server(world: Topology) -> None:
    """Per backend, while slots move: what the client met, what servers accepted, what the kernel says."""
    full = f"TCP {VIP}:90 rr -> " + ", ".join(f"{pod.v4}:9377" for pod in world.pods)
    fewer = f"TCP {VIP}:90 rr -> " + ", ".join(f"{pod.v4}:9377" for pod in world.pods[1:])
    heavy = full.replace(f"{world.pods[2].v4}:9377", f"{world.pods[2].v4}:9377 w3")
    met = [0, 0, 0]
    ports = itertools.cycle(range(2_000, 64_000))
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
                # a port used before may still be a connection to conntrack, which no rule sees a second time
                one.bind(("0.0.0.0", next(ports)))
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
        backend.remove()
        backend.close()


def test_no_connection_fails_while_everything_changes(agent: NodeAgent, world: Topology, client: Caller) -> None:
    """New connections and 20 long-lived ones through endpoint churn, SIGKILL with restart, full re-syncs."""
    agent.start()
    held = [client.hold(VIP, 80) for _ in range(20)]
    rng = random.Random(175)
    results: Counter[str] = Counter()
    phase = {"name": "churn"}
    stop = threading.Event()
    done_in: Counter[str] = Counter()

    def call() -> None:
        while not stop.is_set():
            name = phase["name"]
            answer = client.ask(VIP, 80, timeout=20)
            results["ok" if answer.startswith("pod") else f"{name}: {answer}"] += 1
            done_in[name] += 1

    caller = threading.Thread(target=call)
    caller.start()
    changes = kills = resyncs = 0
    try:
        while done_in["churn"] < 8000:
            agent.write(manifest([pod.addresses for pod in rng.sample(world.pods, rng.randint(1, 3))]))
            changes += 1
            stop.wait(0.1)
        phase["name"] = "kill"
        while done_in["kill"] < 7000:
            agent.stop(signal.SIGKILL)
            agent.write(manifest([pod.addresses for pod in rng.sample(world.pods, 2)]))
            agent.start()
            kills += 1
        phase["name"] = "resync"
        while done_in["resync"] < 5000:
            agent.send(signal.SIGHUP)
            resyncs += 1
            stop.wait(0.02)
    finally:
        stop.set()
        caller.join(60)
    assert results == {"ok": results.total()}
    assert results.total() >= 20_000
    assert min(changes, resyncs) >= 10
    assert kills >= 2
    assert [one.server for one in held if not one.beats()] == []
    for one in held:
        one.close()


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
