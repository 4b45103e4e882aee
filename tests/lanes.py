"""Where the contract is tested with real packets: each mode, and each back end of one, in a world it can live in."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from dataplane.backend import Backend, Options, open_backend

from .netns import Topology
from .traffic import servers

SCALE = float(os.environ.get("DATAPLANE_TEST_SCALE") or ("0.02" if os.environ.get("DATAPLANE_GUEST") else "0.05"))
"""Part of the full sizes (100,000 connections, 1,000 changes …) at which a test runs; 1 = all of it. The emulated
micro-VM takes less.
"""


def scaled(full: int, least: int = 1) -> int:
    """A size at the scale of this run."""
    return max(least, round(full * SCALE))


class Lane(NamedTuple):
    """One way to have Services. `takes_turns`: endpoints take turns; elsewhere the choice is random."""

    name: str
    mode: str
    iptables_tool: str = ""
    takes_turns: bool = False
    mark: pytest.MarkDecorator = pytest.mark.root

    def __str__(self) -> str:
        return self.name

    @property
    def arguments(self) -> tuple[str, ...]:
        """Options of the command line that choose it."""
        tool = ("--iptables-tool", self.iptables_tool) if self.iptables_tool else ()
        return ("--mode", self.mode, *tool)

    def backend(self) -> Backend:
        """Its backend in the calling thread's network namespace."""
        return open_backend(self.mode, Options(iptables_tool=self.iptables_tool))


LANES = (
    Lane("ipvs", "ipvs", takes_turns=True, mark=pytest.mark.ipvs),
    Lane("nftables", "nftables"),
    Lane("iptables-nft", "iptables", "nft"),
    Lane("iptables-legacy", "iptables", "legacy"),
)
PARAMETERS = [pytest.param(lane, marks=lane.mark, id=lane.name) for lane in LANES]


@contextlib.contextmanager
def build_world() -> Iterator[Topology]:
    """A node, a client, and three pods with servers, each pod in a network of its own, as the tutorial's are.

    What pods say to each other passes the node. A VIP is nobody's address in some modes: a default route that leads to
    nobody stands for a node's real one, so what no mode takes is lost and not answered by accident.
    """
    with Topology.build(
        [("10.244.3.6", "fd00:3::6"), ("10.244.1.7", "fd00:1::7"), ("10.244.2.3", "fd00:2::3")]
    ) as built:
        node = built.node
        for place in (node, *(pod.ns for pod in built.pods)):
            for key in ("ipv4.conf.all.send_redirects", "ipv4.conf.default.send_redirects"):
                place.sysctl(key, 0)
            for key in ("ipv4.conf.all.accept_redirects", "ipv6.conf.all.accept_redirects"):
                place.sysctl(key, 0)
        for device in ("br0", "eth0"):
            node.sysctl(f"ipv4.conf.{device}.send_redirects", 0)
        for pod in built.pods:
            pod.ns.sysctl("ipv6.conf.eth0.accept_redirects", 0)
            pod.ns.sysctl("ipv4.conf.eth0.accept_redirects", 0)
        for key in ("bridge.bridge-nf-call-iptables", "bridge.bridge-nf-call-ip6tables"):
            if Path("/proc/sys/net", *key.split(".")).exists():
                node.sysctl(key, 0)  # else a bridge drops what comes back by the port it came from
        node.ip(
            "link add out type veth peer name away",
            "link set away up",
            "link set out up",
            "route add default dev out",
            "route add ::/0 dev out",
        )
        with servers(built.pods):
            yield built
