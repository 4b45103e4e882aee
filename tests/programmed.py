"""Virtual servers on a node as a mode's backend programs them, without an agent, and their connections by backend."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence

from dataplane.backend import Backend, Options, open_backend
from dataplane.bpf.dnat_hits import HitKey
from dataplane.model import Protocol, RealServer, VirtualAddress, VirtualServer, format_address, parse_address
from dataplane.plan import diff

from .lanes import Lane
from .netns import Pod, Topology
from .node_agent import VIP, VIP6
from .traffic import PORT

ADDRESSES = {
    (kind, vip): VirtualAddress(int(Protocol[kind.upper()]), parse_address(vip), port)
    for kind, port in (("tcp", 80), ("udp", 53))
    for vip in (VIP, VIP6)
}


def servers(pods: Sequence[Pod], persistence: int = 0) -> dict[VirtualAddress, VirtualServer]:
    """One virtual server for each protocol and family, with a real server in each pod."""
    found = {}
    for (_, vip), at in ADDRESSES.items():
        reals = sorted(RealServer(parse_address(pod.v6 if ":" in vip else pod.v4), PORT) for pod in pods)
        found[at] = VirtualServer(at, tuple(reals), persistence=persistence)
    return found


def program(backend: Backend, wanted: dict[VirtualAddress, VirtualServer]) -> None:
    """Make the kernel so, from the namespace that the caller is in."""
    expressed = {at: backend.express(each) for at, each in wanted.items()}
    assert not backend.commit(backend.compile(diff(backend.observe(), expressed))).failed


@contextlib.contextmanager
def programmed(world: Topology, lane: Lane, persistence: int = 0) -> Iterator[Backend]:
    """The node with servers(); everybody is masqueraded."""
    with world.node.enter():
        backend = open_backend(lane.mode, Options(iptables_tool=lane.iptables_tool, masquerade_all=True))
    try:
        with world.node.enter():
            backend.prepare()
            program(backend, servers(world.pods, persistence))
        yield backend
    finally:
        with world.node.enter():
            backend.remove()
            backend.close()


def answered_by(tally: Counter[str], pods: Sequence[Pod], vip: str) -> Counter[str]:
    """What pods have answered, by their addresses."""
    names = {f"pod{number}": (pod.v6 if ":" in vip else pod.v4) for number, pod in enumerate(pods)}
    return Counter({names[name]: count for name, count in tally.items()})


def by_backend(found: dict[HitKey, int], at: VirtualAddress) -> Counter[str]:
    """Hits of one virtual server, by the addresses of its backends."""
    return Counter({format_address(key.backend): count for key, count in found.items() if key[:3] == at[:3]})


def counters_say(backend: Backend, at: VirtualAddress, wanted: Counter[str]) -> bool:
    """Whether the mode's own counters have these connections."""
    for report in backend.report():
        if report.server.at == at:
            return wanted == {format_address(real.address): counted.connections for real, counted in report.reals}
    return False
