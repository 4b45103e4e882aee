"""The running agent against damage, and what it leaves behind: nothing when told so, everything when only stopped."""

import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dataplane.backend import open_backend
from dataplane.desired import Rules
from dataplane.ipvs_messages import GET_DEST, GET_INFO, GET_SERVICE
from dataplane.manifest_files import ManifestFiles
from dataplane.netlink_nftables import read_generation
from dataplane.netlink_socket import HEADER, NETLINK_NETFILTER, NLM_F_DUMP, NetlinkSocket
from dataplane.reconciler import Reconciler

from .netns import NetNs
from .node_agent import VIP, VIP6, NodeAgent, manifest, node_agent
from .traffic import eventually

pytestmark = pytest.mark.ipvs

PODS = [("10.244.3.6", "fd00:244::6"), ("10.244.1.7", "fd00:244::7"), ("10.244.2.3", "fd00:244::3")]


@pytest.fixture
def agent(netns: NetNs, tmp_path: Path) -> Iterator[NodeAgent]:
    with node_agent(netns, tmp_path, "--resync-seconds", "2") as started:
        started.write(manifest(PODS))
        yield started


def picture(ns: NetNs) -> str:
    """Everything a proxy could leave in a namespace, in a comparable form."""
    links = json.loads(ns.run("ip", "-j", "addr").stdout)
    shown = [(link["ifname"], link.get("ifalias"), sorted(a["local"] for a in link["addr_info"])) for link in links]
    routes = [ns.run("ip", family, "route", "show", "table", "all").stdout for family in ("-4", "-6")]
    rules = ns.run("nft", "-s", "list", "ruleset").stdout
    # only what a person reads: clocks count down
    sysctls = ns.run("sysctl", "net.ipv4.ip_forward", "net.ipv4.vs.conntrack", "net.ipv4.vs.expire_nodest_conn").stdout
    return "\n".join([str(sorted(shown)), *routes, rules, ns.run("ipvsadm", "-S", "-n").stdout, sysctls])


def words(text: str) -> list[str]:
    """All words of a picture, sorted: sets are printed in any order."""
    return sorted(re.findall(r"[^\s,{}]+", text))


FOREIGN_TABLE = "table inet foreign {\n set s {\n type ipv4_addr; elements = { 10.0.1.175 }\n }\n}\n"
FOREIGN_SERVERS = "-A -t 192.0.2.77:80 -s wlc -p 50\n-a -t 192.0.2.77:80 -r 192.0.2.78:80 -g\n"
DAMAGE: dict[str, Callable[[NetNs], object]] = {
    "a VIP removed": lambda ns: ns.run("ip", "addr", "del", f"{VIP}/32", "dev", "kube-ipvs0"),
    "an IPv6 VIP removed": lambda ns: ns.run("ip", "addr", "del", f"{VIP6}/128", "dev", "kube-ipvs0"),
    "the device deleted": lambda ns: ns.run("ip", "link", "del", "kube-ipvs0"),
    "a real server removed": lambda ns: ns.run("ipvsadm", "-d", "-t", f"{VIP}:80", "-r", "10.244.1.7:9376"),
    "a real server's weight changed": lambda ns: ns.run(
        "ipvsadm", "-e", "-t", f"{VIP}:80", "-r", "10.244.1.7:9376", "-m", "-w", "7"
    ),
    "a real server added to ours": lambda ns: ns.run("ipvsadm", "-a", "-u", f"{VIP}:53", "-r", "10.9.9.9:53", "-m"),
    "the scheduler changed": lambda ns: ns.run("ipvsadm", "-E", "-t", f"{VIP}:80", "-s", "wlc"),
    "a virtual server removed": lambda ns: ns.run("ipvsadm", "-D", "-t", f"[{VIP6}]:80"),
    "everything in IPVS removed": lambda ns: ns.run("ipvsadm", "-C"),
    "the guard table deleted": lambda ns: ns.run("nft", "delete", "table", "inet", "dataplane-ipvs"),
    "all nftables rules flushed": lambda ns: ns.run("nft", "flush", "ruleset"),
    "a guard chain flushed": lambda ns: ns.run("nft", "flush", "chain", "inet", "dataplane-ipvs", "input_vips"),
    "a ledger entry removed": lambda ns: ns.run("nft", "flush", "set", "inet", "dataplane-ipvs", "servers4"),
    "a VIP's guard removed": lambda ns: ns.run("nft", "flush", "set", "inet", "dataplane-ipvs", "vips4"),
    "a stray VIP on our device": lambda ns: ns.run("ip", "addr", "add", "10.66.6.6/32", "dev", "kube-ipvs0"),
}


def test_damage_is_repaired_and_what_is_not_ours_left_alone(agent: NodeAgent) -> None:
    ns = agent.ns
    agent.start()
    ns.run("ipvsadm", "-R", stdin=FOREIGN_SERVERS)
    ns.ip("address add 198.51.100.7/32 dev lo", "link add other type dummy", "address add 198.51.100.8/32 dev other")
    ns.run("nft", "-f", "-", stdin=FOREIGN_TABLE)
    whole = picture(ns)
    for what, damage in DAMAGE.items():
        damage(ns)
        if what == "all nftables rules flushed":
            ns.run("nft", "-f", "-", stdin=FOREIGN_TABLE)
        if what == "everything in IPVS removed":
            ns.run("ipvsadm", "-R", stdin=FOREIGN_SERVERS)
        eventually(f"{what}: repaired", lambda: words(picture(ns)) == words(whole), 120)
    assert agent.status()["healthy"]


def test_a_stopped_agent_leaves_the_kernel_as_it_is_and_the_next_writes_nothing(agent: NodeAgent) -> None:
    agent.start()
    before = picture(agent.ns)
    assert agent.stop(signal.SIGTERM) == 0
    assert picture(agent.ns) == before
    agent.start()
    (first,) = [line for line in agent.log() if line.get("cause") == "start"]
    assert (first["result"], first["adds"], first["sets"], first["deletes"]) == ("unchanged", 0, 0, 0)
    assert picture(agent.ns) == before


def test_a_no_change_start_sends_the_kernel_no_message_that_writes(
    netns: NetNs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every message to the kernel is looked at: only GETs, and the empty nftables batch that waits for a commit."""
    (tmp_path / "web.json").write_text(manifest(PODS))
    sent: list[bytes] = []
    send = NetlinkSocket._send

    def spy(self: NetlinkSocket, data: bytes | bytearray) -> None:
        sent.append(bytes(data))
        send(self, data)

    monkeypatch.setattr(NetlinkSocket, "_send", spy)
    monkeypatch.setattr(NetlinkSocket, "exchange", lambda self, data, seq: self.batch([data]))  # through the spy, too
    with netns.enter():
        for expected in ("committed", "unchanged"):
            sent.clear()
            backend = open_backend("ipvs")
            generation = read_generation(NetlinkSocket(NETLINK_NETFILTER)).id
            reconciler = Reconciler(backend, Rules())
            reconciler.take(ManifestFiles([tmp_path]).read())
            backend.prepare()
            reconciler.observe()
            assert reconciler.sync("start").result == expected
            after = read_generation(NetlinkSocket(NETLINK_NETFILTER)).id
            assert (after == generation) == (expected == "unchanged")
            writes = [kind for message in sent for kind in writing(message)]
            assert bool(writes) == (expected == "committed"), writes
            backend.close()


def writing(data: bytes) -> Iterator[str]:
    """The messages of one send that change something, by the kernel's names for what does not."""
    start = 0
    while start < len(data):
        length, kind, flags, _, _ = HEADER.unpack_from(data, start)
        command = data[start + 16]
        body = data[start : start + length]
        start += (length + 3) & ~3
        if flags & NLM_F_DUMP == NLM_F_DUMP:
            continue
        if kind >> 8 == 10:  # NFNL_SUBSYS_NFTABLES: GET* or an empty element list
            if kind & 0xFF in (1, 4, 7, 10, 13, 16) or (kind & 0xFF == 12 and body.endswith(b"\x04\x00\x03\x80")):
                continue
        elif kind in (0x10, 0x11):  # the edges of a batch, or generic netlink's own family
            continue
        elif 16 <= kind < 128:
            if kind % 4 == 2:  # RTM_GET*
                continue
        elif command in (GET_SERVICE, GET_DEST, GET_INFO):
            continue
        yield f"type {kind}, command {command}, flags {flags:x}"


def test_cleanup_leaves_the_namespace_as_it_was(agent: NodeAgent) -> None:
    ns = agent.ns
    ns.run("ipvsadm", "-A", "-t", "192.0.2.77:80", "-s", "wlc")
    ns.run("nft", "add", "table", "inet", "foreign")
    before = picture(ns)
    agent.start()
    assert agent.run("cleanup", check=False).returncode == 1  # an agent runs here
    agent.stop()
    assert picture(ns) != before
    agent.run("cleanup")
    agent.run("cleanup")
    assert picture(ns) == before


def test_two_agents_never_run_in_one_namespace(agent: NodeAgent) -> None:
    agent.start()
    second = agent.run("run", "-f", str(agent.file), check=False)
    assert second.returncode == 1
    assert f"pid {agent.process.pid if agent.process else 0}" in second.stderr
    assert agent.run("apply", "-f", str(agent.file), check=False).returncode == 1
    assert agent.status()["pid"] == agent.process.pid if agent.process else 0


def test_status_without_an_agent_says_so(agent: NodeAgent) -> None:
    assert agent.run("status", check=False).returncode == 6


def test_apply_diff_show_round_trip(agent: NodeAgent) -> None:
    file = str(agent.file)
    assert agent.run("diff", "-f", file, check=False).returncode == 4
    agent.run("apply", "-f", file)
    assert agent.run("diff", "-f", file).returncode == 0
    assert agent.run("show", "-o", "ipvsadm").stdout == agent.ns.run("ipvsadm", "-l", "-n").stdout
    assert agent.run("show", "-o", "ipvsadm-save").stdout == agent.ns.run("ipvsadm", "-S", "-n").stdout
    assert "default" in agent.run("show").stdout
    agent.run("cleanup")


def test_a_bad_object_is_named_and_the_rest_goes_on(agent: NodeAgent) -> None:
    agent.start()
    good = manifest(PODS)
    spec = {"clusterIP": "10.0.0.300", "ports": [{"port": 80}]}
    bad = json.dumps({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "bad"}, "spec": spec}) + "\n"
    agent.write(good + bad)
    eventually("the problem is told", lambda: agent.status()["problems"])
    (problem,) = agent.status()["problems"]
    assert problem.startswith(f"{agent.file}:4: Service default/bad: spec.clusterIP: ")
    assert agent.ns.run("ipvsadm", "-S", "-n").stdout.count("-A") == 6
    # half a file keeps what was there
    agent.write(good[: len(good) // 2])
    eventually(
        "the half file is told", lambda: len(agent.log()) and any("bad input" in str(line) for line in agent.log())
    )
    assert agent.ns.run("ipvsadm", "-S", "-n").stdout.count("-A") == 6


@pytest.mark.parametrize("binding", ["device", "routes"])
def test_vips_by_device_or_by_routes(netns: NetNs, tmp_path: Path, binding: str) -> None:
    with node_agent(netns, tmp_path, "--vip-binding", binding) as agent:
        agent.write(manifest(PODS))
        before = picture(netns)
        agent.start()
        local = netns.run("ip", "route", "get", VIP).stdout
        assert local.startswith(f"local {VIP}")
        agent.stop()
        agent.run("cleanup")
        assert picture(netns) == before
