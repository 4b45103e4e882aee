"""UDP clients that keep their source port, in every mode: who is gone loses them within a second, nobody else does."""

import datetime
import re
import select
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .netns import NetNs, Topology
from .node_agent import VIP, VIP6, NodeAgent, manifest, node_agent
from .traffic import eventually, servers

MODES = [
    pytest.param("nftables", marks=pytest.mark.root),
    pytest.param("iptables", marks=pytest.mark.root),
    pytest.param("ipvs", marks=pytest.mark.ipvs),
]
SECOND = 1.0
NOTHING = '{"apiVersion": "v1", "kind": "List", "items": []}\n'  # an empty file may be a half written one


@pytest.fixture(scope="module", params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def world(mode: str) -> Iterator[Topology]:
    with Topology.build(
        [("10.244.3.6", "fd00:3::6"), ("10.244.1.7", "fd00:1::7"), ("10.244.2.3", "fd00:2::3")]
    ) as built:
        for key in ("all", "default", built.bridge, built.uplink):
            built.node.sysctl(f"ipv4.conf.{key}.send_redirects", 0)
        for key in ("ipv4.icmp_ratelimit", "ipv6.icmp.ratelimit"):
            built.node.sysctl(key, 0)  # one refusal a second and client is all the kernel allows otherwise
        if mode != "ipvs":  # VIPs are nobody's addresses: a node needs some route that leads to them
            built.node.ip(*(f"route add default via {each}" for each in built.client_addresses))
        with servers(built.pods):
            yield built


@pytest.fixture
def agent(world: Topology, mode: str, tmp_path: Path) -> Iterator[NodeAgent]:
    with node_agent(world.node, tmp_path, "--mode", mode, "--resync-seconds", "5") as started:
        started.write(everything(world))
        yield started
    started.run("cleanup", "--force", "--mode", mode)
    world.node.run("conntrack", "-F")


def everything(world: Topology) -> str:
    return manifest([pod.addresses for pod in world.pods])


def without(world: Topology, *names: str) -> str:
    return manifest([pod.addresses for n, pod in enumerate(world.pods) if f"pod{n}" not in names])


@dataclass
class Client:
    """One UDP socket for all its life."""

    socket: socket.socket

    @classmethod
    def of(cls, ns: NetNs, vip: str, port: int = 53) -> "Client":
        with ns.enter():
            one = socket.socket(socket.AF_INET6 if ":" in vip else socket.AF_INET, socket.SOCK_DGRAM)
        one.connect((vip, port))
        one.setblocking(False)
        return cls(one)

    @property
    def port(self) -> int:
        number: int = self.socket.getsockname()[1]
        return number

    def ask(self, seconds: float = 5) -> str:
        """Who answers: asks every 10 ms. "refused", or "" when nobody does."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                self.socket.send(b"?")
                if select.select([self.socket], [], [], 0.01)[0]:
                    return self.socket.recv(64).decode()
            except ConnectionRefusedError:
                return "refused"
        return ""

    def until(self, answers: set[str], seconds: float = 20) -> float:
        """Keeps asking until one of `answers` comes; when that was, in seconds since the epoch."""
        begin = time.monotonic()
        while (answer := self.ask(0.05)) not in answers:
            assert time.monotonic() - begin < seconds, f"still {answer!r}, wanted one of {answers}"
        return time.time()

    def drain(self) -> None:
        """Forget answers to earlier questions."""
        while select.select([self.socket], [], [], 0.05)[0]:
            self.socket.recv(64)


def synced(agent: NodeAgent) -> float:
    """When the agent's last sync was in the kernel, in seconds since the epoch: watching files has its own time."""
    line = [line for line in agent.log() if line["event"] == "sync"][-1]
    return datetime.datetime.fromisoformat(line["timestamp"]).timestamp()


def entries(ns: NetNs) -> dict[tuple[str, int], str]:
    """The conntrack id of each (destination, client's port) of port 53."""
    found = {}
    for family in ("ipv4", "ipv6"):
        for line in ns.run("conntrack", "-L", "-f", family, "-o", "id").stdout.splitlines():
            told = re.search(r" dst=(\S+) sport=(\d+) dport=53 .* id=(\d+)", line)
            if told:
                found[told[1], int(told[2])] = told[3]
    return found


@pytest.mark.parametrize("vip", [VIP, VIP6])
def test_a_client_follows_its_removed_backend_within_a_second(agent: NodeAgent, world: Topology, vip: str) -> None:
    agent.start()
    client = Client.of(world.client, vip)
    left = set()
    for _ in range(2):
        server = client.ask()
        assert server in {"pod0", "pod1", "pod2"}
        assert {client.ask() for _ in range(20)} == {server}
        left.add(server)
        agent.write(without(world, *left))
        took = client.until({"pod0", "pod1", "pod2"} - left) - synced(agent)
        client.drain()
        print(f"{vip}: left {server} after {took:.3f} s")
        assert took < SECOND
    assert agent.status()["healthy"]


@pytest.mark.parametrize("to", ["192.0.2.1", "2001:db8::1", "198.51.100.7"])
def test_a_client_of_a_node_port_or_an_external_ip_follows_too(agent: NodeAgent, world: Topology, to: str) -> None:
    ports = [{"name": "dns", "port": 53, "protocol": "UDP", "nodePort": 31053}]
    more: dict[str, Any] = {"type": "NodePort", "ports": ports, "externalIPs": ["198.51.100.7"]}
    agent.options = (*agent.options, "--external-ip-ranges", "198.51.100.0/24")
    agent.write(manifest([pod.addresses for pod in world.pods], **more))
    agent.start()
    client = Client.of(world.client, to, 53 if to == "198.51.100.7" else 31053)
    server = client.ask()
    assert server in {"pod0", "pod1", "pod2"}
    assert {client.ask() for _ in range(20)} == {server}
    left = [pod.addresses for n, pod in enumerate(world.pods) if f"pod{n}" != server]
    agent.write(manifest(left, **more))
    took = client.until({"pod0", "pod1", "pod2"} - {server}) - synced(agent)
    print(f"{to}: left {server} after {took:.3f} s")
    assert took < SECOND


def test_the_last_backend_goes_and_another_comes(agent: NodeAgent, world: Topology) -> None:
    agent.start()
    client = Client.of(world.client, VIP)
    assert client.ask().startswith("pod")
    agent.write(without(world, "pod0", "pod1", "pod2"))
    took = client.until({"refused"}) - synced(agent)
    print(f"refused after {took:.3f} s")
    assert took < SECOND
    agent.write(without(world, "pod0", "pod2"))
    took = client.until({"pod1"}) - synced(agent)
    print(f"answered after {took:.3f} s")
    assert took < SECOND


def test_a_removed_service_lets_its_clients_go(agent: NodeAgent, world: Topology) -> None:
    agent.start()
    client = Client.of(world.client, VIP)
    assert client.ask().startswith("pod")
    assert (VIP, client.port) in entries(world.node)
    agent.write(NOTHING)
    eventually("its entry goes", lambda: not client.ask(0.2).startswith("pod"), 5)
    agent.write(everything(world))
    # what its packets left behind while nobody was there must not hold it for ever
    took = client.until({"pod0", "pod1", "pod2"}) - synced(agent)
    print(f"answered after {took:.3f} s")
    assert took < SECOND


def test_a_backend_removed_while_no_agent_ran(agent: NodeAgent, world: Topology) -> None:
    agent.start()
    client = Client.of(world.client, VIP)
    server = client.ask()
    assert agent.stop(signal.SIGKILL) == -signal.SIGKILL
    agent.write(without(world, server))
    agent.start()
    assert client.until({"pod0", "pod1", "pod2"} - {server}) - synced(agent) < SECOND


def test_a_restart_without_a_change_moves_no_flow(agent: NodeAgent, world: Topology) -> None:
    agent.start()
    clients = [Client.of(world.client, vip) for vip in (VIP, VIP6) for _ in range(30)]
    servers = [client.ask() for client in clients]
    assert set(servers) == {"pod0", "pod1", "pod2"}
    before = entries(world.node)
    for number in (signal.SIGKILL, signal.SIGTERM):
        agent.stop(number)
        agent.start()
        assert not [line for line in agent.log() if line["event"] == "conntrack"]
        assert [client.ask() for client in clients] == servers
    after = entries(world.node)
    assert {key: after.get(key) for key in before} == before


def test_the_entries_of_others_stay(agent: NodeAgent, world: Topology) -> None:
    agent.start()
    node, pod = world.node, world.pods[0].v4
    common = ("-s", "192.0.2.2", "-q", "192.0.2.2", "-r", pod, "-t", "600", "-u", "SEEN_REPLY,ASSURED")

    def insert(client: int, protocol: str, destination: str, port: int, *more: str) -> None:
        ports = ("--sport", str(client), "--reply-port-dst", str(client), "--reply-port-src", "9376")
        node.run(*("conntrack", "-I", "-p", protocol, "-d", destination, "--dport", str(port), *common, *ports, *more))

    insert(4441, "udp", "10.0.1.99", 53)
    insert(4442, "udp", VIP, 5353)
    insert(4443, "udp", VIP, 53, "-w", "9")
    insert(4444, "tcp", VIP, 80, "--state", "ESTABLISHED")
    insert(4445, "udp", VIP, 53)  # this one is ours

    def kept() -> int:
        return len(re.findall(r" src=192.0.2.2 \S+ sport=444\d ", node.run("conntrack", "-L").stdout))

    assert kept() == 5
    agent.write(without(world, "pod0"))
    eventually("ours goes", lambda: kept() == 4, 10)
    agent.write(NOTHING)
    client = Client.of(world.client, VIP)
    eventually("nobody answers", lambda: not client.ask(0.2).startswith("pod"), 10)
    assert kept() == 4
    deleted = [line["deleted"] for line in agent.log() if line["event"] == "conntrack"]
    assert deleted[0] == 1
    assert agent.status()["conntrack"] == {"deleted": sum(deleted), "lastError": ""}
