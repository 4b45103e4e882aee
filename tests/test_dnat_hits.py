"""What the probe counts is what clients, servers and the kernel's own counters say.

Three ways to have it: attached by fexit and by kretprobe, on a kernel that allows it, and its body as a netfilter
program (bench/probe_body.py) on those that do not. One probe for all modes, in turns, as after a mode switch.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from bench.probe_body import BACKEND_PORT, behind_dnat, images
from bench.probe_body import PORT as IMAGE_PORT
from bench.probe_body import VIP as IMAGE_VIP
from dataplane.bpf import bpf_syscall as bpf
from dataplane.bpf.dnat_hits import DnatHits, HitKey
from dataplane.bpf.probe_start import ProbeStart
from dataplane.errors import ProbeUnavailable
from dataplane.model import Address, VirtualAddress
from dataplane.run_tool import run_tool

from .lanes import LANES, Lane, build_world, scaled
from .netns import NetNs, Topology
from .node_agent import VIP, VIP6
from .programmed import ADDRESSES, answered_by, by_backend, counters_say, program, programmed, servers
from .storm import storm
from .traffic import PORT, Caller, eventually

NOTHING_MISSED = {"full": 0, "insert": 0, "read": 0, "recursion": 0}
TCP = ADDRESSES["tcp", VIP]
IMAGE = VirtualAddress(6, Address(IMAGE_VIP), IMAGE_PORT)
OF_NETFILTER = tuple(lane for lane in LANES if lane.mode != "ipvs")
CASES = [pytest.param("netfilter", lane, marks=pytest.mark.root, id=f"netfilter-{lane}") for lane in OF_NETFILTER] + [
    pytest.param(way, lane, marks=pytest.mark.ipvs, id=f"{way}-{lane}")
    for way, lanes in (("fexit", LANES), ("kretprobe", LANES[:2]))  # the mode matters little to a hook that is there
    for lane in lanes
]
SOME = [case for case in CASES if case.id not in ("fexit-iptables-nft", "fexit-iptables-legacy", "kretprobe-nftables")]
"""The guest's time is short: of what no mode has a part in it sees each hook, and each way to attach, once."""
everywhere = pytest.mark.parametrize(("hits", "lane"), CASES, indirect=["hits"])
in_short = pytest.mark.parametrize(("hits", "lane"), SOME, indirect=["hits"])
anew = pytest.mark.parametrize(("fresh", "lane"), SOME, indirect=["fresh"])


@pytest.fixture(scope="module")
def world() -> Iterator[Topology]:
    with build_world() as built:
        yield built


def attached(kind: str) -> DnatHits:
    """The probe of the calling thread's network namespace."""
    run_tool(["modprobe", "-a", "ip_vs", "nf_nat"])  # as preparing a mode does
    with ProbeStart(kinds=(kind,)) as start:
        return start.finish()


class Probes:
    """One probe at a time: compiling takes long where it is emulated, and kretprobes lose hits beside others."""

    def __init__(self, world: Topology) -> None:
        self._world = world
        self._kind = ""
        self._open = contextlib.ExitStack()
        self._probe: DnatHits | None = None

    def of(self, kind: str) -> DnatHits:
        """The one that is there, or another in its place."""
        if self._probe is None or self._kind != kind:
            self.close()
            with self._world.node.enter():
                self._probe = self._open.enter_context(behind_dnat() if kind == "netfilter" else attached(kind))
            self._probe.expect(ADDRESSES.values())
            self._kind = kind
        return self._probe

    def close(self) -> None:
        self._open.close()
        self._probe = None


@pytest.fixture(scope="module")
def probes(world: Topology) -> Iterator[Probes]:
    opened = Probes(world)
    yield opened
    opened.close()


@pytest.fixture
def hits(probes: Probes, request: pytest.FixtureRequest) -> DnatHits:
    kind: str = request.param
    return probes.of(kind)


@pytest.fixture
def fresh(probes: Probes, request: pytest.FixtureRequest) -> DnatHits:
    """One that remembers nothing of the tests before."""
    probes.close()
    kind: str = request.param
    return probes.of(kind)


# ---------------------------------------------------------------------------------------------------- what is counted


@everywhere
def test_hits_are_what_clients_servers_and_the_kernels_counters_say(
    hits: DnatHits, world: Topology, lane: Lane
) -> None:
    before = hits.read()
    with programmed(world, lane) as backend:
        for (kind, vip), at in ADDRESSES.items():
            tally = Caller(world.client).tally(23, vip, at.port, kind=kind)
            wanted = answered_by(tally, world.pods, vip)
            assert by_backend(hits.read(), at) - by_backend(before, at) == wanted
            with world.node.enter():
                # IPVS adds its counters up every two seconds
                eventually(f"counters say {wanted}", partial(counters_say, backend, at, wanted), 10)
    assert {key.backend_port for key in hits.read()} == {PORT}
    assert hits.missed() == NOTHING_MISSED


@in_short
def test_a_connection_is_one_hit_however_long_it_lives(hits: DnatHits, world: Topology, lane: Lane) -> None:
    before = by_backend(hits.read(), TCP).total()
    with programmed(world, lane):
        held = [Caller(place).hold(VIP, 80) for place in (world.client, world.node, world.pods[0].ns) for _ in range(3)]
        assert all(one.beats() for one in held for _ in range(5))
        for one in held:
            one.close()
    assert by_backend(hits.read(), TCP).total() - before == len(held)


@in_short
def test_nat_of_somebody_else_is_not_counted(hits: DnatHits, world: Topology, lane: Lane) -> None:
    before, missed = hits.read(), hits.missed()
    rule = f"ip daddr 10.9.9.9 tcp dport 80 dnat to {world.pods[0].v4}:{PORT}"
    foreign = f"""table ip foreign {{
        chain there {{ type nat hook prerouting priority -110; {rule}; }}
        chain back {{ type nat hook postrouting priority 110; oifname "br0" masquerade; }}
    }}"""
    with programmed(world, lane):
        world.node.run("nft", "-f", "-", stdin=foreign)
        try:
            client = Caller(world.client)
            assert client.tally(5, "10.9.9.9", 80) == {"pod0": 5}
            assert client.tally(5, world.pods[1].v4, PORT) == {"pod1": 5}  # source NAT alone
        finally:
            world.node.run("nft", "delete", "table", "ip", "foreign")
    assert (hits.read(), hits.missed()) == (before, missed)


@in_short
def test_another_network_namespace_is_not_counted(hits: DnatHits, world: Topology, lane: Lane) -> None:
    before = hits.read()
    rule = f"ip daddr {VIP} tcp dport 80 dnat to {world.pods[2].v4}:{PORT}"
    table = f"table ip foreign {{ chain there {{ type nat hook output priority -100; {rule}; }}; }}"
    world.client.run("nft", "-f", "-", stdin=table)
    try:
        with programmed(world, lane):
            assert Caller(world.client).tally(5, VIP, 80) == {"pod2": 5}
    finally:
        world.client.run("nft", "delete", "table", "ip", "foreign")
    assert hits.read() == before


@in_short
def test_what_is_not_expected_any_more_gets_no_new_counters(hits: DnatHits, world: Topology, lane: Lane) -> None:
    inside = TCP._replace(inside=True)
    hits.expect([inside])
    with programmed(world, lane):
        client = Caller(world.client)
        hits.retire(())
        hits.forget([TCP])  # the other one of this address is still there
        assert by_backend(hits.read(), TCP).total() == 0
        client.tally(3, VIP, 80)
        assert by_backend(hits.read(), TCP)
        hits.retire(())
        hits.forget([inside])
        client.tally(3, VIP, 80)
        assert by_backend(hits.read(), TCP).total() == 0
    hits.expect([TCP])


@anew
def test_totals_go_on_when_slots_are_taken_back(fresh: DnatHits, world: Topology, lane: Lane) -> None:
    hits = fresh
    with programmed(world, lane):
        client = Caller(world.client)
        client.tally(12, VIP, 80)
        before = by_backend(hits.read(), TCP)
        for _ in range(2):
            hits.retire(())
            time.sleep(1.1)  # a grace period has a least duration
        hits.retire(())
        wanted = before + answered_by(client.tally(12, VIP, 80), world.pods, VIP)
        assert all(by_backend(hits.read(), TCP)[address] == wanted[address] for address in by_backend(hits.read(), TCP))


@anew
def test_full_speed_while_backends_change(fresh: DnatHits, world: Topology, lane: Lane) -> None:
    """Every connection is a hit, and no value ever falls."""
    hits = fresh
    full = 200_000 if "DATAPLANE_GUEST" in os.environ else 1_000_000
    before, seen = hits.read(), hits.read()
    vips = (VIP, VIP6)
    with programmed(world, lane) as backend:
        with storm(world.client, vips, 80, long_lived=4, pause=0) as running:
            for turn in range(8):
                running.wait_for(scaled(full) * (turn + 1) // 8, 3600)
                with world.node.enter():
                    # not drained: what IPVS removes at once is cut, and the client has made its connection
                    program(backend, servers(world.pods[turn % 2 :]))
                found = hits.read()
                assert all(found.get(key, count) >= count for key, count in seen.items())
                seen |= found
            running.phase("end")
        made = running.connections + 4
    found = hits.read()
    counted = sum(count - before.get(key, 0) for key, count in found.items())
    missed = hits.missed()
    assert counted + sum(missed.values()) >= made
    assert (counted, missed) == (made, NOTHING_MISSED)


@pytest.mark.ipvs
@pytest.mark.parametrize("kind", ["fexit", "kretprobe"])
def test_persistent_connections_are_counted_too(world: Topology, kind: str) -> None:
    ipvs = next(each for each in LANES if each.mode == "ipvs")
    with world.node.enter():
        probe = attached(kind)
    with probe as hits, programmed(world, ipvs, persistence=60):
        hits.expect(ADDRESSES.values())
        tally = Caller(world.client).tally(7, VIP, 80)
        assert len(tally) == 1
        assert by_backend(hits.read(), TCP) == answered_by(tally, world.pods, VIP)


# ------------------------------------------------------------------------------------------------ many, and all at once


def image_key(number: int) -> HitKey:
    return HitKey(6, IMAGE_VIP, IMAGE_PORT, number.to_bytes(4, sys.byteorder), BACKEND_PORT)


@pytest.mark.root
def test_what_does_not_fit_is_counted_as_missed() -> None:
    with images(slots=100) as made:
        made.hits.expect([IMAGE])
        made.run("nat_image", 150, 1500)
        found = made.hits.read()
        assert (len(found), sum(found.values())) == (100, 1000)
        assert made.hits.missed() == {**NOTHING_MISSED, "full": 500}
        made.hits.retire([image_key(number) for number in range(1, 50)])
        time.sleep(1.1)
        made.hits.retire(found)
        made.run("nat_image", 101, 101)  # all but one fit
        assert made.hits.missed() == {**NOTHING_MISSED, "full": 501}
        assert sum(made.hits.read().values()) == 1100


@pytest.mark.root
def test_virtual_servers_for_which_there_is_no_room_are_told_and_get_room_later() -> None:
    many = [VirtualAddress(6, Address(bytes([10, 9, number >> 8, number & 255])), 80) for number in range(1100)]
    with images(slots=100) as made:  # and room for 1,024 of these
        made.hits.expect(many)
        left = made.hits.unwatched
        assert len(left) == len(many) - 1024
        made.hits.forget(set(many[:100]) - left)
        assert not made.hits.unwatched


@pytest.mark.root
def test_processors_that_count_at_once_lose_nothing() -> None:
    runs, backends = 200_000, 3_000
    with images(slots=4096) as made:
        made.hits.expect([IMAGE])
        done = threading.Event()
        seen: dict[HitKey, int] = {}

        def work() -> None:
            for _ in range(10):
                made.run("nat_image", backends, runs)

        workers = [threading.Thread(target=work) for _ in range(2)]
        for one in workers:
            one.start()
        while any(one.is_alive() for one in workers):
            found = made.hits.read()
            assert all(found.get(key, count) >= count for key, count in seen.items())
            seen |= found
            made.hits.retire([key for key in found if key.backend[0] % 2])
            done.wait(0.05)
        for one in workers:
            one.join()
        time.sleep(1.1)
        made.hits.retire(found)
        made.run("nat_image", backends, backends)  # so that all have a slot again
        total = sum(made.hits.read().values()) + sum(made.hits.missed().values())
        assert total == 2 * 10 * runs + backends


# ---------------------------------------------------------------------------------------------------- its own life


def loaded() -> dict[str, set[int]]:
    return bpf.everything_loaded()


CHILD = """
import sys, time
from dataplane.bpf.probe_start import ProbeStart
hits = ProbeStart(kinds=(sys.argv[1],)).finish()
print(*hits.hooks, flush=True)
time.sleep(600)
"""


@pytest.mark.ipvs
@pytest.mark.parametrize("kind", ["fexit", "kretprobe"])
def test_nothing_is_left_of_a_killed_process(netns: NetNs, kind: str) -> None:
    run_tool(["modprobe", "-a", "ip_vs", "nf_nat"])
    before = loaded()
    with netns.popen(sys.executable, "-c", CHILD, kind) as process:
        assert process.stdout is not None
        assert f"{kind}:ip_vs_schedule" in process.stdout.readline().split()
        assert len(loaded()["programs"] - before["programs"]) >= 2
        process.kill()
        process.wait()
    eventually("everything is gone", lambda: all(loaded()[what] <= before[what] for what in before), 10)


@pytest.mark.ipvs
def test_a_module_in_use_by_fexit_stays_and_one_reloaded_under_kretprobes_is_found_again(world: Topology) -> None:
    ipvs = next(each for each in LANES if each.mode == "ipvs")
    with world.node.enter():
        probe = attached("fexit")
    with probe:
        assert subprocess.run(["rmmod", "ip_vs_rr"], check=False, capture_output=True).returncode in (0, 1)
        assert subprocess.run(["rmmod", "ip_vs"], check=False, capture_output=True).returncode != 0
        assert probe.check()
    with world.node.enter():
        probe = attached("kretprobe")
    with probe as hits:
        hits.expect(ADDRESSES.values())
        with programmed(world, ipvs):
            first = Caller(world.client).tally(5, VIP, 80)
        eventually("IPVS is unloaded", unload_ipvs, 20)
        run_tool(["modprobe", "ip_vs"])
        assert hits.check()
        with programmed(world, ipvs):
            tally = first + Caller(world.client).tally(5, VIP, 80)
        assert by_backend(hits.read(), TCP) == answered_by(tally, world.pods, VIP)


def unload_ipvs() -> bool:
    users = [path.name for path in Path("/sys/module/ip_vs/holders").iterdir()]
    return subprocess.run(["rmmod", *users, "ip_vs"], check=False, capture_output=True).returncode == 0


@pytest.mark.ipvs
def test_a_module_that_comes_later_gets_its_hook_and_counts_go_on(world: Topology) -> None:
    eventually("IPVS is unloaded", unload_ipvs, 20)
    with world.node.enter(), ProbeStart(kinds=("fexit",)) as start:
        probe = start.finish()
    with probe as hits:
        assert hits.hooks == ("fexit:nf_nat_setup_info",)
        assert "ip_vs is not loaded" in hits.refusals[0]
        assert not hits.counts("ipvs")
        assert hits.check()
        hits.expect(ADDRESSES.values())
        run_tool(["modprobe", "ip_vs"])
        assert not hits.check()
        with world.node.enter(), ProbeStart(more_of=hits, kinds=("fexit",)) as start:
            assert start.finish() is hits
        assert [hook.function for hook in hits.attached] == ["nf_nat_setup_info", "ip_vs_schedule"]
        assert hits.check()
        total = 0
        for lane in LANES[:2]:
            with programmed(world, lane):
                total += Caller(world.client).tally(5, VIP, 80).total()
        assert by_backend(hits.read(), TCP).total() == total


@pytest.mark.ipvs
def test_the_agent_grows_by_less_than_15_mb(netns: NetNs) -> None:
    run_tool(["modprobe", "-a", "ip_vs", "nf_nat"])
    script = """
import dataplane.cli, dataplane.agent
from pathlib import Path
def resident():
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmRSS"))
before = resident()
from dataplane.bpf.probe_start import ProbeStart
hits = ProbeStart(30_000, 10_000).finish()
hits.read()
print(resident() - before)
"""
    done = netns.run(sys.executable, "-c", script, timeout=180)
    print(f"{done.stdout.strip()} KiB")
    assert int(done.stdout) < 15 * 1024


@pytest.mark.ipvs
def test_which_capabilities_it_takes(netns: NetNs) -> None:
    """CAP_SYS_ADMIN: for a descriptor of a module's BTF, and on Debian for a kprobe (perf_event_paranoid 3)."""
    run_tool(["modprobe", "-a", "ip_vs", "nf_nat"])
    script = "from dataplane.bpf.probe_start import ProbeStart; print(*ProbeStart().finish().hooks)"

    def attached_with(capabilities: str) -> subprocess.CompletedProcess[str]:
        few = [f"--{which}=-all,{capabilities}" for which in ("inh-caps", "ambient-caps", "bounding-set")]
        command = ["setpriv", *few, "--securebits=+noroot", sys.executable, "-c", script]
        return netns.run(*command, check=False, timeout=180)

    done = attached_with("+net_admin,+sys_admin")
    assert done.stdout.split() == ["fexit:nf_nat_setup_info", "fexit:ip_vs_schedule"], done.stderr
    done = attached_with("+net_admin,+bpf,+perfmon")
    assert "kretprobe:" in done.stdout or "fexit: Operation not permitted" in done.stderr


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_a_child_that_hangs_is_ended() -> None:
    with ProbeStart(limit=1.0) as start:
        os.kill(start._process.pid, signal.SIGSTOP)
        with pytest.raises(ProbeUnavailable, match="took too long"):
            start.finish()
    assert start._process.returncode is not None


def test_a_child_that_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataplane.bpf.probe_start.CHILD", "dataplane.bpf.no_such_module")
    with ProbeStart() as start, pytest.raises(ProbeUnavailable, match=r"ended with status 1: .*no_such_module"):
        start.finish()


def test_a_start_that_is_given_up_leaves_no_child_and_no_descriptor() -> None:
    before = sorted(Path("/proc/self/fd").iterdir())
    with ProbeStart() as start:
        pass
    assert start._process.returncode is not None
    assert sorted(Path("/proc/self/fd").iterdir()) == before
