"""The walk through what the kernel holds: every flow of the cases, in a network namespace, as each mode reads it back.

No packets: those are `python -m tests.flows`, which plays the same flows on the same kernel state.
"""

import contextlib
import sys
import tempfile
from pathlib import Path

import msgspec
import pytest

from bench.isolation import enter_new_namespace
from dataplane.backend import MODES, Options, open_backend
from dataplane.model import disjoint, parse_network
from dataplane.plan import diff
from dataplane.walk import Detection

from .flows.agent import CaseAgent
from .flows.cases import read_cases
from .flows.walking import answers
from .flows.world import World
from .netns import NetNs
from .words import server

FOLDER = Path(__file__).with_name("flows")
WEB = server("TCP 10.0.0.1:80 rr label=default/web:http -> 10.1.0.1:8080")
REPOSITORY = FOLDER.parent.parent
FILES = ("flows.yaml", "edges.yaml")
"""In the micro-VM a case takes seconds: there the first file's every third."""


def play(mode: str, tool: str, share: int) -> int:
    """Program each case, walk each flow of it, and print what is wrong; how many flows were right."""
    right = 0
    with tempfile.TemporaryDirectory(prefix="dataplane-walk-") as folder:
        enter_new_namespace()
        agent, world = CaseAgent(mode, Path(folder), iptables_tool=tool), World()
        for case in [case for name in FILES for case in read_cases(FOLDER / name).cases][::share]:
            world.shape(case.node.addresses, case.node.cluster_cidrs)
            agent.program(case)
            backend = agent.backend
            situation = backend.situation()
            if situation.flaws:
                print(f"{case.name}: {situation.flaws}")
            wanted = agent.configuration(case).options().detection()
            if _sorted(situation.detection) != _sorted(wanted):
                print(f"{case.name}: the rules say {situation.detection}, written with {wanted}")
            for flow, told, complaints in answers(case, situation):
                named = backend.objects(told)
                bare = [stage.value for stage in told.stages() if stage.value != "client" and not named.get(stage)]
                if bare:
                    complaints.append(f"no object is named at: {', '.join(bare)}")
                if complaints:
                    print(f"{case.name}: {flow}: {flow.expect}; said {told.verdict}, {told.reason}: {complaints}")
                right += not complaints
        agent.close()
    return right


def _sorted(detection: Detection) -> Detection:
    """Ranges in order, and none inside another: rules need no others."""
    return msgspec.structs.replace(
        detection,
        cluster_cidrs=disjoint(detection.cluster_cidrs),
        service_cidrs=disjoint(detection.service_cidrs),
    )


def walk_all(mode: str, tool: str = "", share: int = 1) -> None:
    """In a process of its own, whose network namespace may then be another one."""
    with NetNs.create("walk") as namespace:
        program = f"from tests.test_walk_kernel import play; print('right:', play({mode!r}, {tool!r}, {share}))"
        done = namespace.run("env", "-C", str(REPOSITORY), sys.executable, "-c", program, check=False, timeout=900)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    flows = sum(len(case.flows) for case in [c for name in FILES for c in read_cases(FOLDER / name).cases][::share])
    assert lines == [f"right: {flows}"], done.stdout


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize(("mode", "tool"), [("nftables", ""), ("iptables", "nft"), ("iptables", "legacy")])
def test_a_walk_through_the_kernels_state_says_what_every_flow_expects(mode: str, tool: str) -> None:
    walk_all(mode, tool)


@pytest.mark.root
@pytest.mark.ipvs
@pytest.mark.slow
def test_a_walk_through_ipvs_says_what_flows_expect() -> None:
    walk_all("ipvs", share=3)


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.ipvs if mode == "ipvs" else pytest.mark.root) for mode in MODES]
)
def test_how_clients_are_told_is_read_from_the_rules(mode: str) -> None:
    """Whoever asks need not know the options with which an agent has written them."""
    wide = Options(
        cluster_cidrs=(parse_network("10.244.0.0/16"), parse_network("192.0.2.7/32")),
        bridge_interface="br0",
        interface_prefix="cali",
        service_cidrs=(parse_network("10.96.0.0/12"), parse_network("fd00:96::/112")),
    )
    with NetNs.create("told") as namespace, namespace.enter():
        for options in (wide, Options(), Options(masquerade_all=True)):
            with contextlib.closing(open_backend(mode, options)) as backend:
                backend.prepare()
                assert backend.intact()
                backend.commit(backend.compile(diff(backend.observe(), {WEB.at: backend.express(WEB)})))
            with contextlib.closing(open_backend(mode, Options())) as asked:
                situation = asked.situation()
                found = situation.detection
                assert _sorted(found) == _sorted(options.detection())
                assert not situation.flaws
                asked.remove()
