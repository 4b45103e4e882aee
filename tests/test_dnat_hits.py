"""The probe on a kernel that takes it: what it counts is what clients, servers and the kernel's own counters say.

One probe for all modes, in turns, as after a mode switch; the modes are programmed by their backends, without an agent.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial

import pytest

from dataplane.backend import Backend, Options, open_backend
from dataplane.bpf.dnat_hits import DnatHits, HitKey
from dataplane.bpf.probe_start import ProbeStart
from dataplane.model import Protocol, RealServer, VirtualAddress, VirtualServer, format_address, parse_address
from dataplane.plan import diff
from dataplane.run_tool import run_tool

from .lanes import LANES, Lane, build_world
from .netns import Topology
from .node_agent import VIP, VIP6
from .traffic import PORT, Caller, eventually

pytestmark = pytest.mark.ipvs
ADDRESSES = {
    (kind, vip): VirtualAddress(int(Protocol[kind.upper()]), parse_address(vip), port)
    for kind, port in (("tcp", 80), ("udp", 53))
    for vip in (VIP, VIP6)
}
NOTHING_MISSED = {"full": 0, "insert": 0, "read": 0, "recursion": 0}


@pytest.fixture(scope="module")
def world() -> Iterator[Topology]:
    with build_world() as built:
        yield built


@pytest.fixture(scope="module", params=[("fexit", "kretprobe"), ("kretprobe",)], ids=["fexit", "kretprobe"])
def hits(world: Topology, request: pytest.FixtureRequest) -> Iterator[DnatHits]:
    run_tool(["modprobe", "-a", "ip_vs", "nf_nat"])  # as a mode's tables do
    with world.node.enter(), ProbeStart(kinds=request.param) as start:
        began = time.monotonic()
        with start.finish() as attached:
            print(f"attached {attached.hooks} in {time.monotonic() - began:.1f} s; {attached.refusals}")
            yield attached


def servers(world: Topology, persistence: int = 0) -> dict[VirtualAddress, VirtualServer]:
    """One virtual server for each protocol and family, with a real server in each pod."""
    return {
        at: VirtualServer(
            at,
            tuple(
                sorted(
                    RealServer(parse_address(pod.v4 if len(at.address) == 4 else pod.v6), PORT) for pod in world.pods
                )
            ),
            persistence=persistence,
        )
        for at in ADDRESSES.values()
    }


@contextlib.contextmanager
def programmed(world: Topology, lane: Lane, persistence: int = 0) -> Iterator[Backend]:
    """The kernel as a mode programs it."""
    with world.node.enter():
        backend = open_backend(lane.mode, Options(iptables_tool=lane.iptables_tool, masquerade_all=True))
    try:
        with world.node.enter():
            backend.prepare()
            wanted = {at: backend.express(each) for at, each in servers(world, persistence).items()}
            outcome = backend.commit(backend.compile(diff(backend.observe(), wanted)))
            assert not outcome.failed
        yield backend
    finally:
        with world.node.enter():
            backend.remove()
            backend.close()


def by_backend(found: dict[HitKey, int], at: VirtualAddress) -> Counter[str]:
    return Counter(
        {
            format_address(key.backend): count
            for key, count in found.items()
            if key[:3] == at[:3] and key.backend_port == PORT
        }
    )


def counters_say(backend: Backend, at: VirtualAddress, wanted: Counter[str]) -> bool:
    """Whether the mode's own counters have these connections."""
    for report in backend.report():
        if report.server.at == at:
            return wanted == {format_address(real.address): counted.connections for real, counted in report.reals}
    return False


@pytest.mark.parametrize("lane", LANES, ids=str)
def test_hits_are_what_clients_servers_and_the_kernels_counters_say(
    hits: DnatHits, world: Topology, lane: Lane
) -> None:
    hits.expect(ADDRESSES.values())
    before, missed = hits.read(), hits.missed()
    with programmed(world, lane) as backend:
        client = Caller(world.client)
        for (kind, vip), at in ADDRESSES.items():
            answered = client.tally(23, vip, at.port, kind=kind)
            names = {f"pod{n}": (pod.v6 if ":" in vip else pod.v4) for n, pod in enumerate(world.pods)}
            wanted = Counter({names[name]: count for name, count in answered.items()})
            assert wanted.total() == 23
            assert by_backend(hits.read(), at) - by_backend(before, at) == wanted
            with world.node.enter():
                eventually(f"counters say {wanted}", partial(counters_say, backend, at, wanted), 10)
    assert hits.missed() == missed == NOTHING_MISSED
