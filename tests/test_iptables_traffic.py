"""Real packets through the real agent in iptables mode: what only it says, over both back ends."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataplane.backend import Options
from dataplane.iptables_restore import IptablesBackend
from dataplane.plan import diff

from .lanes import LANES, Lane, build_world
from .netns import Topology
from .node_agent import VIP, VIP6, NodeAgent, manifest, node_agent
from .traffic import Caller
from .words import server

pytestmark = pytest.mark.root


@pytest.fixture(scope="module", params=[lane for lane in LANES if lane.mode == "iptables"], ids=str)
def lane(request: pytest.FixtureRequest) -> Lane:
    chosen: Lane = request.param
    return chosen


@pytest.fixture(scope="module")
def world() -> Iterator[Topology]:
    with build_world() as built:
        yield built


@pytest.fixture
def agent(world: Topology, lane: Lane, tmp_path: Path) -> Iterator[NodeAgent]:
    with node_agent(world.node, tmp_path, *lane.arguments) as one:
        one.write(manifest([pod.addresses for pod in world.pods]))
        yield one
    one.run("cleanup", "--force", "--mode", "iptables")  # of either back end


def test_who_pings_a_vip_is_told_that_there_is_nothing(agent: NodeAgent, world: Topology) -> None:
    agent.start()
    for vip in (VIP, VIP6):
        answer = world.client.run("ping", "-c1", "-W2", vip, check=False)
        assert "ort unreachable" in answer.stdout.lower()


def masqueraded(world: Topology, tool: str, six: bool) -> int:
    """Connections that were marked to be masqueraded, by the rule's counter."""
    text = world.node.run(f"ip{'6' if six else ''}tables-{tool}-save", "-c", "-t", "nat").stdout
    (found,) = re.findall(r"\[(\d+):\d+\] -A KUBE-MARK-MASQ -j MARK", text)
    return int(found)


@pytest.mark.parametrize("inside", [{"bridge_interface": "br0"}, {"interface_prefix": "br"}], ids=str)
def test_clients_inside_are_told_by_the_device_they_come_from(
    agent: NodeAgent, world: Topology, lane: Lane, inside: dict[str, str]
) -> None:
    with world.node.enter():
        backend = IptablesBackend(Options(iptables_tool=lane.iptables_tool, **inside))  # type: ignore[arg-type]
        backend.prepare()
        pods = [(pod.v4, f"[{pod.v6}]") for pod in world.pods]
        aim = {}
        for six, vip, external in ((0, VIP, "198.51.100.4"), (1, f"[{VIP6}]", "[2001:db8:4::4]")):
            for text in (
                f"TCP {vip}:80 label=a/b -> {pods[1][six]}:9376",
                f"TCP {external}:80 LoadBalancer node label=a/b -> {pods[2][six]}:9376",
                f"TCP {external}:80 (inside) LoadBalancer node label=a/b -> {pods[1][six]}:9376",
            ):
                one = backend.express(server(text))
                aim[one.at] = one
        assert backend.commit(backend.compile(diff(backend.observe(), aim))).failed == {}
    for vip, external in ((VIP, "198.51.100.4"), (VIP6, "2001:db8:4::4")):
        seen = {}
        for name, ns in (("pod", world.pods[0].ns), ("client", world.client), ("node", world.node)):
            for where, address in (("vip", vip), ("external", external)):
                before = masqueraded(world, lane.iptables_tool, ":" in vip)
                answer = Caller(ns).ask(address, 80)
                seen[name, where] = answer, masqueraded(world, lane.iptables_tool, ":" in vip) - before
        assert seen == {
            ("pod", "vip"): ("pod1", 0),
            ("pod", "external"): ("pod1", 0),
            ("client", "vip"): ("pod1", 1),
            ("client", "external"): ("pod2", 0),
            ("node", "vip"): ("pod1", 1),
            ("node", "external"): ("pod1", 1),
        }


def test_a_client_has_one_memory_for_all_addresses_of_a_service(agent: NodeAgent, world: Topology, lane: Lane) -> None:
    """Affinity is a ServicePort's: who came by the cluster IP meets the same endpoint at every other address."""
    node, client = world.node_addresses[0], Caller(world.client)
    ends = ", ".join(f"{pod.v4}:9376" for pod in world.pods)
    with world.node.enter():
        backend = IptablesBackend(Options(iptables_tool=lane.iptables_tool))
        backend.prepare()
        aim = {
            one.at: backend.express(one)
            for one in map(server, [
                f"TCP {VIP}:80 sticky=60 label=a/b -> {ends}",
                f"TCP {node}:30080 NodePort always sticky=60 label=a/b -> {ends}",
                f"TCP 198.51.100.4:80 LoadBalancer always sticky=60 label=a/b -> {ends}",
                f"TCP 198.51.100.5:80 LoadBalancer always sticky=60 label=a/c -> {ends}",
            ])
        }  # fmt: skip
        assert backend.commit(backend.compile(diff(backend.observe(), aim))).failed == {}
    (mine,) = client.tally(4, VIP, 80)
    for address, port in ((node, 30080), ("198.51.100.4", 80), (VIP, 80)):
        assert client.tally(6, address, port) == {mine: 6}
    assert len(client.tally(4, "198.51.100.5", 80)) == 1
    with world.node.enter():
        reports = {str(one.server.at): one for one in backend.report()}
    # the chains are shared, and so are their counts: told once
    assert reports[f"TCP {VIP}:80"].connections == 4 + 18
    assert {c.connections for _, c in reports["TCP 198.51.100.4:80"].reals} == {-1}
    assert reports["TCP 198.51.100.5:80"].connections == 4
