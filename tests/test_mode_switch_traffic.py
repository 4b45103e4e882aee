"""Real packets through switches of modes: no new connection fails, open ones live on, a killed agent is repaired."""

import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from .netns import NetNs, Topology
from .node_agent import VIP, VIP6, NodeAgent, manifest, node_agent
from .traffic import Caller, Held, eventually, servers

NFTABLES, LEGACY, NFT = ("nftables",), ("iptables", "--iptables-tool", "legacy"), ("iptables", "--iptables-tool", "nft")
IPVS = ("ipvs",)
NATIVE = [NFTABLES, LEGACY, NFTABLES, NFT]
WITH_IPVS = [IPVS, NFTABLES, IPVS, NFT, IPVS, LEGACY]
ROUNDS = int(os.environ.get("DATAPLANE_TEST_SWITCHES", "12"))
MARKERS: dict[str, Callable[[str], bool]] = {
    "nftables": lambda rules: "table inet dataplane-nftables" in rules,
    "ipvs": lambda rules: "table inet dataplane-ipvs" in rules,
    "iptables": lambda rules: "KUBE-DATAPLANE" in rules,
}


@pytest.fixture(scope="module")
def world() -> Iterator[Topology]:
    with Topology.build(
        [("10.244.3.6", "fd00:3::6"), ("10.244.1.7", "fd00:1::7"), ("10.244.2.3", "fd00:2::3")]
    ) as built:
        # what one pod says to another turns round at the node, which would teach them a way past it
        for place in (built.node, *(pod.ns for pod in built.pods)):
            for key in ("all.send_redirects", "default.send_redirects", "all.accept_redirects"):
                place.sysctl(f"ipv4.conf.{key}", 0)
            place.sysctl("ipv6.conf.all.accept_redirects", 0)
        for device in ("br0", "eth0"):
            built.node.sysctl(f"ipv4.conf.{device}.send_redirects", 0)
        for pod in built.pods:
            for family in ("ipv4", "ipv6"):
                pod.ns.sysctl(f"{family}.conf.eth0.accept_redirects", 0)
        # without ipvs mode VIPs are nobody's addresses: a node needs some route that leads to them
        built.node.ip(*(f"route add default via {each}" for each in built.client_addresses))
        with servers(built.pods):
            yield built


@pytest.fixture
def agent(world: Topology, tmp_path: Path) -> Iterator[NodeAgent]:
    with node_agent(world.node, tmp_path) as one:
        one.write(manifest([pod.addresses for pod in world.pods]))
        yield one
    one.run("cleanup", "--force")
    for kind in ("legacy", "nft"):
        one.run("cleanup", "--force", "--mode", "iptables")
        assert "KUBE-" not in world.node.run(f"iptables-{kind}-save", check=False).stdout


def start(agent: NodeAgent, options: Sequence[str]) -> None:
    mode, *rest = options
    agent.options = ["--mode", mode, "--resync-seconds", "3", *rest]
    agent.start()


def steps(agent: NodeAgent) -> list[str]:
    return [f"{line['step']} {line.get('mode', '')}".strip() for line in agent.log() if line["event"] == "switch"]


def present(node: NetNs) -> set[str]:
    """Modes that hold something, as other programs see it."""
    rules = node.run("nft", "list", "ruleset").stdout
    if "nat" in node.run("cat", "/proc/net/ip_tables_names", check=False).stdout:
        rules += node.run("iptables-legacy-save", check=False).stdout
    return {mode for mode, there in MARKERS.items() if there(rules)}


@dataclass
class Load:
    """Clients that connect all the time, and connections that stay open."""

    world: Topology
    stop: threading.Event = field(default_factory=threading.Event)
    results: Counter[str] = field(default_factory=Counter)
    phase: str = "start"
    held: list[Held] = field(default_factory=list)
    flows: list[tuple[socket.socket, str]] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> "Load":
        for place, vip in ((self.world.client, VIP), (self.world.client, VIP6), (self.world.node, VIP)):
            thread = threading.Thread(target=self._call, args=(Caller(place), vip))
            thread.start()
            self.threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(60)
        for one in self.held:
            one.close()
        for udp, _name in self.flows:
            udp.close()

    def _call(self, caller: Caller, vip: str) -> None:
        while not self.stop.is_set():
            phase = self.phase
            answer = caller.ask(vip, 80, timeout=30)
            self.results["ok" if answer.startswith("pod") else f"{phase}: {caller.ns.name} {vip}: {answer}"] += 1

    def hold(self) -> None:
        """More connections that stay open: from outside, from the node itself, from a pod; and a UDP flow."""
        for place in (self.world.client, self.world.node, self.world.pods[0].ns):
            self.held += [Caller(place).hold(VIP, 80), Caller(place).hold(VIP6, 80)]
        with self.world.client.enter():
            flow = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        flow.settimeout(10)
        flow.connect((VIP, 53))
        self.flows.append((flow, self.says(flow)))

    @staticmethod
    def says(flow: socket.socket) -> str:
        flow.send(b"?")
        return flow.recv(64).decode()

    def check(self) -> None:
        """Nothing has failed so far."""
        assert set(self.results) <= {"ok"}, self.results
        assert [n for n, one in enumerate(self.held) if not one.beats()] == [], self.phase
        assert [name for flow, name in self.flows if self.says(flow) != name] == [], self.phase

    def goes_on(self, count: int) -> None:
        before = self.results.total()
        eventually(f"{count} connections", lambda: self.results.total() >= before + count, 120)


@pytest.mark.root
def test_no_connection_fails_while_nftables_and_iptables_take_turns(agent: NodeAgent, world: Topology) -> None:
    _take_turns(agent, world, NATIVE, ROUNDS, 200)


@pytest.mark.root
def test_no_connection_fails_while_iptables_changes_its_back_end(agent: NodeAgent, world: Topology) -> None:
    start(agent, LEGACY)
    with Load(world) as load:
        for old, new in ((LEGACY, NFT), (NFT, LEGACY)):
            load.hold()
            load.phase = f"{old[-1]} to {new[-1]}"
            load.goes_on(200)
            agent.stop()
            start(agent, new)
            eventually(load.phase, lambda old=old: f"removed iptables ({old[-1]})" in steps(agent), 60)
            load.goes_on(200)
            load.check()
            assert "KUBE" not in world.node.run(f"iptables-{old[-1]}-save").stdout
            assert "KUBE" not in world.node.run(f"ip6tables-{old[-1]}-save").stdout
            assert not [line for line in agent.log() if line["event"] == "not as wanted"]


@pytest.mark.ipvs
def test_no_connection_fails_while_all_modes_take_turns(agent: NodeAgent, world: Topology) -> None:
    _take_turns(agent, world, WITH_IPVS, 6, 60)


def _take_turns(agent: NodeAgent, world: Topology, sequence: Sequence[Sequence[str]], rounds: int, count: int) -> None:
    start(agent, sequence[0])
    with Load(world) as load:
        for number in range(1, rounds + 1):
            load.hold()
            old, new = sequence[(number - 1) % len(sequence)], sequence[number % len(sequence)]
            load.phase = f"{number}: {' '.join(old)} to {' '.join(new)}"
            load.goes_on(count)
            agent.stop()
            start(agent, new)
            last = f"draining {old[0]}" if old == IPVS else f"removed {old[0]}"
            eventually(f"{load.phase}: {last}", lambda last=last: last in steps(agent), 60)
            assert steps(agent)[:2] == [f"found {old[0]}", f"programmed and verified {new[0]}"]
            load.goes_on(count)
            load.check()
            assert present(world.node) == ({old[0], new[0]} if old == IPVS else {new[0]})
            # the mode that took over follows the manifests
            agent.write(manifest([pod.addresses for pod in world.pods[number % 3 :]]))
            gone = {f"pod{n}" for n in range(number % 3)}
            eventually("the change", lambda gone=gone: not gone & set(Caller(world.client).tally(12, VIP, 80)))
            agent.write(manifest([pod.addresses for pod in world.pods]))
            eventually("and back", lambda: len(set(Caller(world.client).tally(24, VIP, 80))) == 3)
            load.flows = [(flow, load.says(flow)) for flow, _ in load.flows]  # those of a pod that left may have moved
        load.phase = "end"
        load.check()
    print(f"{rounds} switches, {load.results.total()} connections, {len(load.held)} held")


@pytest.mark.root
def test_an_agent_killed_while_nftables_and_iptables_change_over_is_repaired(agent: NodeAgent, world: Topology) -> None:
    _kill(agent, world, [NFTABLES, NFT], ROUNDS)


@pytest.mark.root
def test_an_agent_killed_while_legacy_tables_change_over_is_repaired(agent: NodeAgent, world: Topology) -> None:
    _kill(agent, world, [NFTABLES, LEGACY], ROUNDS)


@pytest.mark.ipvs
def test_an_agent_killed_while_ipvs_changes_over_is_repaired(agent: NodeAgent, world: Topology) -> None:
    _kill(agent, world, [IPVS, NFTABLES], 3)


def _kill(agent: NodeAgent, world: Topology, modes: Sequence[Sequence[str]], rounds: int) -> None:
    rng = random.Random(20)
    now = 0
    start(agent, modes[now])
    took = 0.5  # seconds from the first look to the last step, roughly
    seen: Counter[int] = Counter()
    with Load(world) as load:
        for number in range(rounds):
            load.hold()
            agent.stop()
            load.phase = f"{number}: {modes[now][0]} to {modes[1 - now][0]}, killed"
            with subprocess.Popen(
                agent.command(
                    "run", "-f", str(agent.file), "--log-format", "json", "--probe", "off", "--mode", *modes[1 - now]
                ),
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            ) as victim:
                assert victim.stderr is not None
                step = rng.choice(["found", "found", "programmed"])
                for line in victim.stderr:
                    if f'"step": "{step}' in line:
                        break
                time.sleep(rng.uniform(0, took / 2 if step == "found" else 0.05))
                victim.send_signal(signal.SIGKILL)
            seen[len(present(world.node))] += 1
            load.goes_on(20)
            load.check()
            now = rng.choice([0, 1])
            start(agent, modes[now])
            mine, other = modes[now][0], modes[1 - now][0]
            if other == "ipvs":
                eventually("weight 0", lambda: not _heavy(world.node), 60)
            else:
                eventually(f"only {mine}", lambda mine=mine: present(world.node) == {mine}, 60)
            load.goes_on(20)
            load.check()
            assert agent.status()["healthy"]
    print(f"{rounds} kills, modes there after them {dict(seen)}, {load.results.total()} connections")


def _heavy(node: NetNs) -> bool:
    """IPVS would still take a new connection."""
    return any(line.split()[-1] != "0" for line in node.run("ipvsadm", "-S", "-n").stdout.splitlines() if "-a" in line)


@pytest.mark.ipvs
@pytest.mark.parametrize("new", [NFTABLES, NFT], ids=lambda each: each[0])
def test_ipvs_mode_goes_when_its_connections_have_ended(agent: NodeAgent, world: Topology, new: Sequence[str]) -> None:
    node = world.node
    node.sysctl("ipv4.ip_forward", 0)
    node.sysctl("ipv4.vs.conntrack", 0)
    start(agent, IPVS)
    old = [Caller(world.client).hold(VIP, 80), Caller(node).hold(VIP, 80)]
    agent.stop()
    start(agent, [*new, "--drain-seconds", "40"])
    eventually("draining", lambda: "draining ipvs" in steps(agent), 30)
    fresh = [Caller(world.client).hold(VIP, 80), Caller(node).hold(VIP, 80)]
    assert fresh[1].socket.getsockname()[0] == VIP
    assert all(one.beats() for one in (*old, *fresh))
    leaving = agent.status()["leavingModes"]
    assert len(leaving) == 1
    assert "draining" in leaving[0]
    # a killed agent goes on with the same clock
    agent.stop(signal.SIGKILL)
    start(agent, [*new, "--drain-seconds", "900"])
    assert all(one.beats() for one in (*old, *fresh))
    fresh[1].close()
    eventually("the end of the drain", lambda: "removed ipvs" in steps(agent), 120)
    assert present(node) == {new[0]}
    assert node.run("ipvsadm", "-S", "-n").stdout == ""
    assert VIP not in node.run("ip", "addr").stdout
    assert fresh[0].beats()
    assert Caller(world.client).ask(VIP, 80).startswith("pod")
    assert Caller(node).ask(VIP, 80).startswith("pod")
    # settings: what ipvs mode alone wanted is back, what both wanted is still so, and the end is the beginning
    assert node.run("sysctl", "-n", "net.ipv4.vs.conntrack", "net.ipv4.ip_forward").stdout.split() == ["0", "1"]
    agent.stop()
    agent.run("cleanup")
    assert node.run("sysctl", "-n", "net.ipv4.ip_forward").stdout.strip() == "0"
    node.sysctl("ipv4.ip_forward", 1)
    for one in (*old, *fresh):
        one.close()


MUTE = """table inet mute {
    counter came { }
    chain input { type filter hook input priority 0; udp dport 9376 counter name came; }
    chain output { type filter hook output priority 0; udp sport 9376 drop; }
}"""


@pytest.mark.ipvs
@pytest.mark.parametrize("new", [NFTABLES, NFT], ids=lambda each: each[0])
def test_what_nobody_answers_goes_on_through_ipvs(agent: NodeAgent, world: Topology, new: Sequence[str]) -> None:
    """To conntrack such a flow is new with every packet, as a SYN is that is sent again."""

    def came() -> int:
        counted = (pod.ns.run("nft", "list", "counter", "inet", "mute", "came").stdout for pod in world.pods)
        return sum(int(text.split("packets ")[1].split()[0]) for text in counted)

    start(agent, IPVS)
    for pod in world.pods:
        pod.ns.run("nft", "-f", "-", stdin=MUTE)
    try:
        with world.client.enter():
            flow = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with flow:
            flow.connect((VIP, 53))
            flow.send(b"?")
            eventually("the first", lambda: came() == 1)
            agent.stop()
            start(agent, new)
            eventually("draining", lambda: "draining ipvs" in steps(agent), 30)
            for number in range(2, 8):
                flow.send(b"?")  # raises where the last one was refused
                eventually(f"number {number}", lambda number=number: came() == number)
    finally:
        for pod in world.pods:
            pod.ns.run("nft", "delete", "table", "inet", "mute")
