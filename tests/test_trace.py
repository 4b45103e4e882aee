"""`dataplane trace` on real packets: what each mode's witness tells, that it ends, and that nothing of it stays."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .lanes import PARAMETERS, Lane, build_world
from .netns import NetNs, Topology
from .node_agent import VIP, VIP6, manifest
from .traffic import Caller

CLI = str(Path(sys.executable).with_name("dataplane"))
PODS = ["--cluster-cidr", "10.244.0.0/16,fd00:1::/48"]


@pytest.fixture(scope="module")
def world() -> Iterator[Topology]:
    with build_world() as built:
        yield built


@pytest.fixture(scope="module", params=PARAMETERS)
def lane(request: pytest.FixtureRequest) -> Lane:
    found: Lane = request.param
    return found


@pytest.fixture
def programmed(world: Topology, lane: Lane, tmp_path: Path) -> Iterator[Lane]:
    """One Service with three endpoints, programmed in a mode."""
    file = tmp_path / "services.json"
    file.write_text(manifest([pod.addresses for pod in world.pods]))
    apply(world.node, lane, file)
    yield lane
    world.node.run(CLI, "cleanup", "--all", timeout=120)


def apply(node: NetNs, lane: Lane, file: Path) -> None:
    node.run(CLI, "apply", "-f", str(file), *lane.arguments, *PODS, timeout=120)


@contextlib.contextmanager
def tracing(node: NetNs, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """A trace that has begun to look."""
    process = node.popen(CLI, "trace", *arguments)
    try:
        assert process.stderr is not None
        first = process.stderr.readline()
        assert " looking at " in first, first + process.stderr.read()
        yield process
    finally:
        process.kill()
        process.wait()


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def tables(node: NetNs) -> list[str]:
    return [line for line in node.run("nft", "list", "tables").stdout.splitlines() if "dataplane-trace" in line]


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# ----------------------------------------------------------------------------------------------------- what is seen


def test_each_connection_is_told_with_its_endpoint(programmed: Lane, world: Topology) -> None:
    with tracing(world.node, "--to", "default/web:http", "--seconds", "30", "-n", "6", "-o", "jsonl") as process:
        met = Caller(world.client).tally(6, VIP, 80)
        status, out, err = ended(process)
    assert status == 0, err
    seen = lines(out)
    assert len(seen) == 6, out
    names = {address: f"pod{number}" for number, pod in enumerate(world.pods) for address in pod.addresses}
    told: dict[str, int] = {}
    for each in seen:
        name = names[each["endpoint"]["address"]]
        told[name] = told.get(name, 0) + 1
        assert each["client"] == world.client_addresses[0]
        assert each["verdict"] == "endpoint"
        assert each["masquerade"] is True
        assert each["source"] not in (None, each["client"])
    assert told == dict(met)
    assert not tables(world.node)


def test_it_tells_clients_apart_and_pods_are_not_masqueraded(programmed: Lane, world: Topology) -> None:
    pod = world.pods[0]
    with tracing(
        world.node, "--from", pod.v4, "--to", f"{VIP}:80", "--seconds", "30", "-n", "1", "-o", "jsonl"
    ) as process:
        Caller(world.client).tally(3, VIP, 80)
        met: dict[str, int] = {}
        while "pod1" not in met and "pod2" not in met:
            met = dict(Caller(pod.ns).tally(1, VIP, 80))
        status, out, err = ended(process)
    assert status == 0, err
    (seen,) = lines(out)
    assert seen["client"] == pod.v4
    assert seen["masquerade"] is (seen["endpoint"]["address"] == pod.v4)


def test_a_process_of_the_node(programmed: Lane, world: Topology) -> None:
    with tracing(world.node, "--to", f"{VIP}:80", "--seconds", "30", "-n", "1", "-o", "jsonl") as process:
        met = Caller(world.node).tally(1, VIP, 80)
        status, out, err = ended(process)
    assert status == 0, (err, met)
    (seen,) = lines(out)
    assert met == {f"pod{[pod.v4 for pod in world.pods].index(seen['endpoint']['address'])}": 1}


def test_the_text_names_the_way(programmed: Lane, world: Topology) -> None:
    with tracing(world.node, "--to", "web:http", "--seconds", "30", "-n", "1") as process:
        Caller(world.client).tally(1, VIP, 80)
        status, out, err = ended(process)
    assert status == 0, err
    assert out.splitlines()[0].startswith(f"default/web:http: {world.client_addresses[0]}:")
    assert f"-> {VIP}:80/TCP goes to 10.244." in out.splitlines()[0]
    assert "masqueraded as" in out.splitlines()[0]
    way = {"nftables": "goto pick4_3 (to a Service)", "iptables-nft": "jump KUBE-SVC-"}
    assert way.get(programmed.name, "") in out


@pytest.mark.parametrize("family", [0, 1])
def test_udp_and_ipv6(programmed: Lane, world: Topology, family: int) -> None:
    target = (f"{VIP}:53/UDP", f"[{VIP6}]:53/UDP")[family]
    with tracing(world.node, "--to", target, "--seconds", "30", "-n", "2", "-o", "jsonl") as process:
        met = Caller(world.client).tally(2, (VIP, VIP6)[family], 53, kind="udp")
        status, out, err = ended(process)
    assert status == 0, (err, met)
    assert [each["protocol"] for each in lines(out)] == ["UDP", "UDP"]
    assert {each["client"] for each in lines(out)} == {world.client_addresses[family]}


def test_a_refused_connection(programmed: Lane, world: Topology) -> None:
    """Where each rule is told, a refusal is; elsewhere the end says what the rules would do."""
    with tracing(world.node, "--to", f"{VIP}:81", "--seconds", "3", "-n", "1", "-o", "jsonl") as process:
        Caller(world.client).tally(1, VIP, 81)
        status, out, err = ended(process)
    if programmed.name in ("nftables", "iptables-nft"):
        assert status == 0, err
        (seen,) = lines(out)
        assert seen["verdict"] == "refused"
    else:
        assert status == 1, out
        assert "nothing was seen in 3 s; by its rules such a connection is refused: closed port" in err


# -------------------------------------------------------------------------------------------------- that it ends


def test_nothing_is_seen_in_time(programmed: Lane, world: Topology) -> None:
    started = time.monotonic()
    with tracing(world.node, "--to", "web:http", "--seconds", "0.5") as process:
        status, out, err = ended(process)
    assert status == 1
    assert out == ""
    assert "nothing was seen in 0.5 s" in err
    assert time.monotonic() - started < 60
    assert not tables(world.node)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_nothing_stays(programmed: Lane, world: Topology, number: signal.Signals) -> None:
    with tracing(world.node, "--to", "web:http", "--seconds", "300") as process:
        process.send_signal(number)
        status, _, err = ended(process)
    assert status == 1, err
    assert not tables(world.node)


@pytest.mark.root
def test_what_a_killed_trace_leaves_is_removed_by_the_next_and_by_cleanup(world: Topology, tmp_path: Path) -> None:
    file = tmp_path / "services.json"
    file.write_text(manifest([pod.addresses for pod in world.pods]))
    world.node.run(CLI, "apply", "-f", str(file), "--mode", "nftables")
    for mender in (("trace", "--to", "web:http", "--seconds", "0.1"), ("cleanup", "--all")):
        with tracing(world.node, "--to", "web:http", "--seconds", "300") as process:
            process.kill()
            process.wait()
        assert len(tables(world.node)) == 1
        with tracing(world.node, "--to", "web:http", "--seconds", "300") as alive:
            assert len(tables(world.node)) == 1, "the next one has removed it, and has one of its own"
            world.node.run(CLI, *mender, check=False)
            assert len(tables(world.node)) == 1, "that of a living one stays"
            alive.kill()
            alive.wait()
        world.node.run(CLI, *mender, check=False)
        assert not tables(world.node)
        world.node.run(CLI, "apply", "-f", str(file), "--mode", "nftables")
    world.node.run(CLI, "cleanup", "--all")


def test_a_client_with_affinity_is_remembered(programmed: Lane, world: Topology, tmp_path: Path) -> None:
    """What `explain` says of a client is what it meets."""
    config = {"clientIP": {"timeoutSeconds": 600}}
    file = tmp_path / "services.json"
    text = manifest([p.addresses for p in world.pods], sessionAffinity="ClientIP", sessionAffinityConfig=config)
    file.write_text(text)
    apply(world.node, programmed, file)
    met = Caller(world.client).tally(3, VIP, 80)
    (name,) = met
    address = world.pods[int(name.removeprefix("pod"))].v4
    done = world.node.run(CLI, "explain", "--from", world.client_addresses[0], "--to", "web:http", "-o", "json")
    document = json.loads(done.stdout)
    assert document["remembered"] is True
    assert [each["address"] for each in document["endpoints"] if each["probability"] == 1.0] == [address]
    assert "(59" in done.stdout or "(60" in done.stdout, "and how long"
    other = world.node.run(CLI, "explain", "--from", "192.0.2.99", "--to", "web:http", "-o", "json")
    assert json.loads(other.stdout)["remembered"] is False


def test_rules_that_somebody_has_taken_away_are_told(programmed: Lane, world: Topology) -> None:
    """What is in sets and chains is then not what packets meet."""
    asked = ("explain", "--from", world.client_addresses[0], "--to", "web:http")
    assert "careful" not in world.node.run(CLI, *asked).stdout
    removal = {
        "ipvs": "nft flush chain inet dataplane-ipvs input_vips",
        "nftables": "nft flush chain inet dataplane-nftables nat_prerouting",
        "iptables-nft": "iptables-nft -t nat -F PREROUTING",
        "iptables-legacy": "iptables-legacy -t nat -F PREROUTING",
    }
    world.node.run(*removal[programmed.name].split())
    assert "careful: " in world.node.run(CLI, *asked).stdout


@pytest.mark.ipvs
def test_where_conntrack_is_not_told_the_table_of_ipvs_is_looked_at(world: Topology, tmp_path: Path) -> None:
    file = tmp_path / "services.json"
    file.write_text(manifest([pod.addresses for pod in world.pods]))
    world.node.run(CLI, "apply", "-f", str(file), "--mode", "ipvs", "--vip-binding", "routes", timeout=120)
    world.node.sysctl("ipv4.vs.conntrack", 0)
    try:
        with tracing(world.node, "--to", f"{VIP}:80", "--seconds", "60", "-n", "1", "-o", "json") as process:
            Caller(world.client).tally(1, VIP, 80)
            status, out, err = ended(process)
        document = json.loads(out)
        assert status == 0, err
        assert document["witness"].startswith("IPVS connection table")
        (seen,) = document["connections"]
        assert seen["endpoint"]["address"] in {pod.v4 for pod in world.pods}
        assert seen["masquerade"] is None
    finally:
        world.node.run(CLI, "cleanup", "--all", timeout=120)
