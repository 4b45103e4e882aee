"""The contract in packets: one table of cases, and every mode passes it with real connections through the real agent.

What only one mode has stands in that mode's own file. DATAPLANE_TEST_SCALE=1 runs the storm at full size.
"""

import itertools
import random
import signal
import time
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from dataplane.model import format_address, parse_address

from .lanes import LANES, PARAMETERS, Lane, build_world, scaled
from .netns import Pod, Topology
from .node_agent import VIP, VIP6, NodeAgent, manifest, node_agent
from .storm import storm
from .traffic import Caller, eventually, host_server

CHI_SQUARE = 27.63  # 2 degrees of freedom, p = 10^-6: a test that fails by chance teaches to look away
STICKY = 60


@pytest.fixture(scope="module", params=PARAMETERS)
def lane(request: pytest.FixtureRequest) -> Lane:
    chosen: Lane = request.param
    return chosen


@pytest.fixture(scope="module")
def world(lane: Lane) -> Iterator[Topology]:
    with build_world() as built:
        yield built


@pytest.fixture
def agent(world: Topology, lane: Lane, tmp_path: Path) -> Iterator[NodeAgent]:
    with node_agent(world.node, tmp_path, *lane.arguments, "--resync-seconds", "3") as started:
        started.write(manifest([pod.addresses for pod in world.pods]))
        yield started
    started.run("cleanup", "--force")  # of every mode


@pytest.fixture
def client(world: Topology) -> Caller:
    return Caller(world.client)


def shown(agent: NodeAgent, lane: Lane, vip: str = VIP, port: int = 80) -> dict[str, tuple[int, int]]:
    """Weight, and connections so far, of each real server of one virtual server, as the kernel has them."""
    with agent.ns.enter():
        backend = lane.backend()
        found = [each.reals for each in backend.report() if each.server.at[1:3] == (parse_address(vip), port)]
        backend.close()
    return {format_address(real.address): (real.weight, counted.connections) for real, counted in found[0]}


def takes_new(agent: NodeAgent, lane: Lane, vip: str = VIP) -> set[str]:
    """The addresses that new connections may go to."""
    return {address for address, (weight, _) in shown(agent, lane, vip).items() if weight}


def address_of(pod: Pod, vip: str) -> str:
    return pod.v6 if ":" in vip else pod.v4


def sticky(pods: Collection[Pod], seconds: int = STICKY) -> str:
    config = {"clientIP": {"timeoutSeconds": seconds}}
    return manifest([pod.addresses for pod in pods], sessionAffinity="ClientIP", sessionAffinityConfig=config)


# --------------------------------------------------------------------------------------------------- who answers


@pytest.mark.parametrize(
    ("kind", "vip", "port"),
    [
        ("tcp", VIP, 80),
        ("tcp", VIP6, 80),
        ("udp", VIP, 53),
        ("udp", VIP6, 53),
        # the one kernel with SCTP sockets we can count on is the one with IPVS
        pytest.param("sctp", VIP, 99, marks=pytest.mark.ipvs),
    ],
    ids=str,
)
def test_connections_are_spread_evenly_and_the_counters_say_so(
    agent: NodeAgent, world: Topology, client: Caller, lane: Lane, kind: str, vip: str, port: int
) -> None:
    agent.start()
    times = 90 if lane.takes_turns else 600
    tally = client.tally(times, vip, port, kind=kind)
    assert set(tally) == {"pod0", "pod1", "pod2"}
    mean = times / 3
    surprise = sum((count - mean) ** 2 / mean for count in tally.values())
    assert surprise <= (0 if lane.takes_turns else CHI_SQUARE), tally
    wanted = {address_of(pod, vip): (1, tally[f"pod{number}"]) for number, pod in enumerate(world.pods)}
    # IPVS adds its counters up every two seconds
    eventually(f"counters say {wanted}", lambda: shown(agent, lane, vip, port) == wanted, 10)


def test_weights_are_shares(agent: NodeAgent, world: Topology, client: Caller, lane: Lane) -> None:
    weights = ",".join(f"{pod.v4}={weight}" for pod, weight in zip(world.pods, (6, 3, 0), strict=True))
    annotations = {"dataplane.io/weights": weights, "dataplane.io/scheduler": "wrr"}
    agent.write(manifest([pod.addresses for pod in world.pods], annotations))
    agent.start()
    tally = client.tally(90 if lane.takes_turns else 600, VIP, 80)
    assert set(tally) == {"pod0", "pod1"}
    if lane.takes_turns:
        assert tally == {"pod0": 60, "pod1": 30}
    else:
        assert 330 < tally["pod0"] < 470  # 400 ± 6 standard deviations


def test_everybody_reaches_a_service_also_through_itself(agent: NodeAgent, world: Topology, lane: Lane) -> None:
    agent.start()
    places = {"client": world.client, "node": world.node, **{f"pod{n}": p.ns for n, p in enumerate(world.pods)}}
    for place, ns in places.items():
        for vip in (VIP, VIP6):
            # a hairpin is a third of what a pod asks for
            tally = Caller(ns).tally(6 if lane.takes_turns else 40, vip, 80)
            assert (place, vip, set(tally)) == (place, vip, {"pod0", "pod1", "pod2"})


def test_a_vip_answers_on_its_services_ports_only(agent: NodeAgent, world: Topology, client: Caller) -> None:
    agent.start()
    with host_server(world.node):
        assert client.ask(world.node_addresses[0], 9376) == "host"
        for caller in (client, Caller(world.node), Caller(world.pods[0].ns)):
            for vip in (VIP, VIP6):
                assert caller.ask(vip, 9376) == "refused"
                # the node's own datagram is refused before it leaves: kube-proxy's nftables mode says the same
                assert caller.ask(vip, 9376, kind="udp") in ("refused", "Operation not permitted")
    for ns in (agent.ns, world.client):
        for vip in (VIP, VIP6):
            assert ns.run("ping", "-c1", "-W2", vip, check=False).returncode != 0


def test_node_ports_follow_the_nodes_addresses(agent: NodeAgent, world: Topology, client: Caller) -> None:
    """Every address of the node serves them, also one that comes later; no other port of it is anybody's."""
    ports = [{"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30080}]
    agent.write(manifest([world.pods[0].addresses], type="NodePort", ports=ports))
    agent.options = (*agent.options, "--drain-seconds", "1")  # so that what is gone goes soon, where modes drain
    agent.start()
    for address in world.node_addresses:
        assert client.ask(address, 30080) == "pod0"
        assert client.ask(address, 30081) == "refused"  # by the node itself
    assert Caller(world.node).ask(world.node_addresses[0], 30080) == "pod0"
    assert client.ask("192.0.2.77", 30080, timeout=0.5) != "pod0"
    before = agent.status()["virtualServers"]
    world.node.ip(f"address add 192.0.2.77/24 dev {world.uplink}")
    try:
        eventually("a new address serves", lambda: client.ask("192.0.2.77", 30080, timeout=1) == "pod0", 15)
    finally:
        world.node.ip(f"address delete 192.0.2.77/24 dev {world.uplink}")
    eventually("one that is gone is forgotten", lambda: agent.status()["virtualServers"] == before, 15)


def test_a_service_without_endpoints_refuses_and_then_serves(agent: NodeAgent, world: Topology, client: Caller) -> None:
    agent.write(manifest([]))
    agent.start()
    for vip in (VIP, VIP6):
        for caller in (client, Caller(world.node)):
            assert caller.ask(vip, 80) == "refused"
        assert client.ask(vip, 53, kind="udp") == "refused"
    agent.change(manifest([world.pods[1].addresses]))
    for vip in (VIP, VIP6):
        assert client.ask(vip, 80) == "pod1"


def test_silence_where_the_policy_is_local_and_every_endpoint_is_elsewhere(
    agent: NodeAgent, world: Topology, client: Caller
) -> None:
    agent.write(manifest([pod.addresses for pod in world.pods], internalTrafficPolicy="Local"))
    agent.start()
    for vip in (VIP, VIP6):
        assert client.ask(vip, 80, timeout=1) == "timeout"
        assert client.ask(vip, 81, timeout=5) == "refused"


# ------------------------------------------------------------------------------------------------------- affinity


@pytest.mark.parametrize("vip", [VIP, VIP6])
def test_affinity_keeps_a_client_with_its_server(
    agent: NodeAgent, world: Topology, client: Caller, lane: Lane, vip: str
) -> None:
    agent.write(sticky(world.pods))
    agent.start()
    before = client.tally(30, vip, 80)
    assert len(before) == 1
    assert all(len(Caller(pod.ns).tally(6, vip, 80)) == 1 for pod in world.pods)
    (chosen,) = before
    # other endpoints come and go, slots and chains move: the client stays
    mine = world.pods[int(chosen[-1])]
    others = [pod for pod in world.pods if pod is not mine]
    for pods in ([mine, others[0]], [others[1], mine], [mine], [*others, mine]):
        agent.change(sticky(pods))
        assert takes_new(agent, lane, vip) == {address_of(pod, vip) for pod in pods}
        assert client.tally(10, vip, 80) == {chosen: 10}
    # its endpoint goes: another one takes it, for good, and no connection fails
    agent.change(sticky(others))
    after = client.tally(20, vip, 80)
    assert len(after) == 1
    assert set(after) < {f"pod{number}" for number in range(3)} - {chosen}


def test_affinity_ends_with_its_time(agent: NodeAgent, world: Topology, client: Caller, lane: Lane) -> None:
    if lane.mode == "ipvs":
        # IPVS remembers a client as long as one of its connections lives; a datagram's does so for five minutes
        agent.options = (*agent.options, "--ipvs-timeouts", "0,0,1")
    agent.write(sticky(world.pods, 1))
    agent.start()
    seen = {client.ask(VIP, 53, kind="udp")}
    # IPVS may look at what it remembers a moment before the last connection ends: that then goes on for 60 s more, from
    # each packet anew (ip_vs_conn_expire), so the client has to be silent for longer and longer
    pauses = itertools.chain([2.2] * 10, [65] * 3) if lane.mode == "ipvs" else itertools.repeat(2.2)

    def another() -> bool:
        time.sleep(next(pauses))
        seen.add(client.ask(VIP, 53, kind="udp"))
        return len(seen) > 1

    eventually("a second server", another, 240)
    assert seen <= {"pod0", "pod1", "pod2"}


# -------------------------------------------------------------------------------------------- endpoints that leave


@pytest.mark.parametrize(("kind", "port"), [("tcp", 80), ("udp", 53)])
def test_a_removed_endpoint_takes_nothing_new(
    agent: NodeAgent, world: Topology, client: Caller, kind: str, port: int
) -> None:
    agent.start()
    assert set(client.tally(40, VIP, port, kind=kind)) == {"pod0", "pod1", "pod2"}
    agent.change(manifest([world.pods[0].addresses]))
    assert client.tally(20, VIP, port, kind=kind) == {"pod0": 20}


def test_open_connections_outlive_their_endpoint_and_their_service(
    agent: NodeAgent, world: Topology, client: Caller
) -> None:
    agent.start()
    held = [client.hold(vip, 80) for vip in (VIP, VIP6) for _ in range(6)]
    for number in range(3):
        agent.change(manifest([pod.addresses for n, pod in enumerate(world.pods) if n != number]))
        assert f"pod{number}" not in client.tally(20, VIP, 80)
        assert [one.server for one in held if not one.beats()] == []
    agent.file.rename(agent.folder / "gone")
    eventually("no new ones", lambda: not client.ask(VIP, 80, timeout=1).startswith("pod"))
    assert [one.server for one in held if not one.beats()] == []
    for one in held:
        one.close()


# ---------------------------------------------------------------------------------------------------------- storm


def through_all_modes(lane: Lane) -> list[Lane]:
    """The modes that this kernel has, by turns with one of them: the two back ends of iptables are no two modes."""
    ipvs, nftables, nft, legacy = LANES
    if lane is ipvs:
        return [nftables, ipvs, nft, ipvs, legacy]
    return [nftables, legacy, nftables, nft, nftables] if lane is nft else [nftables, nft, nftables, legacy, nftables]


@pytest.mark.slow
def test_no_connection_fails_while_everything_changes(
    agent: NodeAgent, world: Topology, lane: Lane, record_property: Any
) -> None:
    """New connections without a pause, and long-lived ones, through endpoint changes, SIGKILL with restart, re-syncs,
    and switches through all modes.

    Full size: 100,000 and 200 through 1,000 changes and 20 kills. Another disturbance is one more phase of the storm.
    """
    connections, changes, kills = scaled(100_000), scaled(1_000), scaled(20, least=2)
    rng = random.Random(175)
    sets = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
    current = sets[-1]

    def other() -> str:
        nonlocal current
        current = rng.choice([each for each in sets if each != current])
        return manifest([world.pods[number].addresses for number in current])

    began = time.monotonic()
    agent.probe = "auto"  # that comes and goes under traffic as well
    agent.start()
    with storm(world.client, (VIP, VIP6), 80, long_lived=scaled(200, least=20)) as running:
        for part in range(kills):
            running.phase("changes")
            for _ in range(changes * (part + 1) // kills - changes * part // kills):
                agent.change(other())
            running.phase("kill")
            agent.write(other())
            time.sleep(rng.random() * 0.1)  # anywhere in what the agent does with it
            agent.stop(signal.SIGKILL)
            agent.start()
            running.phase("re-sync")
            agent.send(signal.SIGHUP)
        for there in (*through_all_modes(lane), lane):
            running.phase(f"switch to {there}")
            agent.stop()
            agent.options = [*there.arguments, "--resync-seconds", "3"]
            agent.start()
            agent.change(other())
        running.wait_for(connections)
        running.phase("end")
        assert running.failures() == Counter()
        assert running.broken() == 0
        made, held = running.connections, len(running.held)
    assert running.failures() == Counter()
    assert set(Caller(world.client).tally(40, VIP, 80)) == {f"pod{number}" for number in current}
    told = f"{made} connections, {held} long-lived, {changes} changes, {kills} kills"
    record_property("storm", f"{lane}: {told}: none failed, none broke, {time.monotonic() - began:.0f} s")
