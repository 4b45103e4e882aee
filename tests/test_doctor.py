"""The doctor: each finding with its status and its fix, and on a healthy kernel nothing to complain of."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dataplane import doctor, procfs_sysctl
from dataplane.backend import Options
from dataplane.configuration import Configuration
from dataplane.doctor import check, kube_proxy, node, probe, trials
from dataplane.doctor.check import Check
from dataplane.errors import KernelError, PreflightError, ProbeUnavailable, ToolError
from dataplane.kube_proxy_leftovers import Leftovers
from dataplane.model import Address, Family, VirtualAddress, VirtualServer, parse_address
from dataplane.testing import FakeBackend
from tests.netns import NetNs
from tests.test_cli import DATAPLANE, HEALTHY, snapshot

VIP = parse_address("10.0.1.175")


def brief(checks: Iterator[Check]) -> list[tuple[str, str, str]]:
    return [(each.status, each.name, each.fix) for each in checks]


@pytest.mark.parametrize(
    ("statuses", "expected"), [([], "ok"), (["ok"], "ok"), (["ok", "warn"], "warn"), (["warn", "fail", "ok"], "fail")]
)
def test_the_worst_counts(statuses: list[Any], expected: str) -> None:
    assert doctor.worst([Check("x", status, "") for status in statuses]) == expected


def test_the_report_is_aligned_escaped_and_has_fixes_below() -> None:
    checks = [Check("a", "ok", "well"), Check("longer", "fail", "bad\x1b[2J", "repair it")]
    assert doctor.report(checks) == "ok    a       well\nfail  longer  bad\\x1b[2J\n      fix: repair it\n"
    assert "\x1b[31mfail\x1b[0m" in doctor.report(checks, colour=True)


@pytest.mark.parametrize(
    ("error", "detail", "fix"),
    [
        (PreflightError("lacks it", "get it"), "lacks it", "get it"),
        (KernelError("do", "it", 22), "do it: Invalid argument (EINVAL)", ""),
        (ToolError("nft: status 1"), "nft: status 1", ""),
    ],
)
def test_a_check_that_fails_is_a_finding_and_keeps_the_earlier_ones(error: Exception, detail: str, fix: str) -> None:
    def checks() -> Iterator[Check]:
        yield Check("first", "ok", "")
        raise error

    assert check.safely("second", checks) == [Check("first", "ok", ""), Check("second", "fail", detail, fix)]


def test_missing_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "which", lambda program: None)
    assert brief(node.tools("ipvs")) == [
        ("fail", "tool nft", "apt-get install nftables"),
        ("fail", "tool modprobe", "apt-get install kmod"),
        ("warn", "tool iptables-restore", "apt-get install iptables"),
        ("warn", "tool ip6tables-restore", "apt-get install iptables"),
        ("warn", "tool ip", "apt-get install iproute2"),
        ("warn", "tool ipvsadm", "apt-get install ipvsadm"),
        ("warn", "tool conntrack", "apt-get install conntrack"),
    ]


def test_a_missing_binding_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bcc", None)
    assert ("warn", "python bcc", "apt-get install python3-bpfcc") in brief(node.bindings())


@pytest.fixture
def settings_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /proc/sys of our own, all as wanted."""
    for module in (procfs_sysctl, node):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    for each in procfs_sysctl.IPVS_SYSCTLS + procfs_sysctl.REPORTED_SYSCTLS:
        put(tmp_path, each.name, each.value)
    monkeypatch.setattr(node, "running_kernel", lambda: (6, 1))
    return tmp_path


def put(tree: Path, name: str, value: int) -> Path:
    path = tree / name.replace(".", "/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{value}\n")
    return path


def test_sysctls_as_wanted(settings_tree: Path) -> None:
    assert {each.status for each in node.sysctls(Configuration(), (), "")} == {"ok"}


def test_a_sysctl_that_the_agent_will_set_is_no_fault_and_one_changed_behind_it_is(settings_tree: Path) -> None:
    put(settings_tree, "net.ipv4.ip_forward", 0)
    found = {each.name: each for each in node.sysctls(Configuration(), (), "")}
    assert found["net.ipv4.ip_forward"].status == "ok"
    found = {each.name: each for each in node.sysctls(Configuration(), (), "pid 7")}
    assert found["net.ipv4.ip_forward"].status == "warn"
    assert found["net.ipv4.ip_forward"].fix == "sysctl -w net.ipv4.ip_forward=1"


def test_a_sysctl_that_cannot_be_written_is_a_failure(settings_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(settings_tree, "net.ipv4.ip_forward", 0)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = {each.name: each for each in node.sysctls(Configuration(), (), "")}
    assert found["net.ipv4.ip_forward"].status == "fail"


def test_ipv6_forwarding_matters_for_ipv6_vips_only(settings_tree: Path) -> None:
    put(settings_tree, "net.ipv6.conf.all.forwarding", 0)

    def status(*vips: Address) -> str:
        return next(each.status for each in node.sysctls(Configuration(), vips, "") if each.name.startswith("net.ipv6"))

    assert status(VIP) == "ok"
    assert status(VIP, parse_address("fd00::1")) == "warn"


@pytest.mark.parametrize(
    ("count", "status", "fix"),
    [
        (79, "ok", ""),
        (80, "warn", "sysctl -w net.netfilter.nf_conntrack_max=200"),
        (95, "fail", "sysctl -w net.netfilter.nf_conntrack_max=200"),
    ],
)
def test_a_full_connection_table(settings_tree: Path, count: int, status: str, fix: str) -> None:
    put(settings_tree, "net.netfilter.nf_conntrack_max", 100)
    put(settings_tree, "net.netfilter.nf_conntrack_count", count)
    assert brief(node.conntrack()) == [(status, "conntrack table", fix)]


def test_vips_that_are_the_nodes_own_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "addresses_by_link", lambda sock: {VIP: ("eth0",)})
    (found,) = node.collisions({VIP, parse_address("10.0.1.1")})
    assert (found.status, found.detail) == ("fail", "10.0.1.175 is also an address of eth0")
    assert "ip address delete 10.0.1.175/32 dev eth0" in found.fix
    (found,) = node.collisions({parse_address("10.0.1.1")})
    assert found.status == "ok"
    assert not list(node.collisions(()))


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    made = FakeBackend()

    def open_fake(mode: str, options: Options) -> FakeBackend:
        return made

    monkeypatch.setattr(node, "open_backend", open_fake)
    return made


def test_leftovers_and_the_agent(backend: FakeBackend) -> None:
    assert brief(node.state(Configuration(), ""))[-1] == ("ok", "agent", "")
    backend.prepared = True
    at = VirtualAddress(6, VIP, 80)
    backend.servers[at] = VirtualServer(at)
    status, _, fix = brief(node.state(Configuration(), ""))[-1]
    assert (status, "dataplane cleanup" in fix) == ("warn", True)
    assert brief(node.state(Configuration(), "pid 7"))[-1] == ("ok", "agent", "")
    backend.prepared = False
    assert brief(node.state(Configuration(), "pid 7"))[-1][0] == "warn"


def test_traces_of_kube_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Leftovers(tables=(Family.IPV4,), sets=("KUBE-CLUSTER-IP",), unread=("ipsets: no tool",))
    monkeypatch.setattr("dataplane.doctor.kube_proxy.kube_proxy_leftovers.find", lambda: found)
    monkeypatch.setattr(kube_proxy, "processes", lambda: iter(()))
    assert list(kube_proxy.traces(True)) == [
        Check("kube-proxy", "warn", "has left: its table ip kube-proxy, 1 ipset", "dataplane cleanup --kube-proxy"),
        Check("kube-proxy", "warn", "not looked at: ipsets: no tool"),
    ]
    assert [each.status for each in kube_proxy.traces(False)] == ["ok"]


def test_a_running_kube_proxy_is_a_failure(tmp_path: Path) -> None:
    assert not list(kube_proxy.processes())
    fake = tmp_path / "kube-proxy"
    fake.symlink_to("/bin/sleep")
    with subprocess.Popen([fake, "60"]) as process:
        try:
            while Path(f"/proc/{process.pid}/comm").read_text() != "kube-proxy\n":
                time.sleep(0.01)  # the kernel sets it a moment after exec let us go on
            (found,) = kube_proxy.processes()
        finally:
            process.kill()
    assert (found.status, f"pid {process.pid}" in found.detail) == ("fail", True)


def test_without_the_capability_the_rest_is_told_all_the_same() -> None:
    found = doctor.examine(Configuration(), capable=False)
    assert found[0] == Check(
        "capability", "fail", "no CAP_NET_ADMIN; what needs it is not tried", "sudo dataplane doctor"
    )
    assert len(found) > 5


def test_a_kernel_that_lacks_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Any:
        raise KernelError("look up", "it", 2)

    def no_tool(*_: object) -> Any:
        raise ToolError("modprobe: status 1")

    monkeypatch.setattr(trials, "resolve_family", fail)
    monkeypatch.setattr(trials, "run_tool", no_tool)
    monkeypatch.setattr("dataplane.netlink_route.VipDevice.ensure", fail)
    found = [*trials.try_device(), *trials.try_ipvs()]
    assert [(each.status, each.name) for each in found] == [("fail", "dummy device"), ("fail", "IPVS")]
    assert found[0].fix.startswith("modprobe dummy || ")
    assert found[1].fix.startswith("modprobe ip_vs || ")


class Start:
    """A probe that attaches so far, in place of the real one."""

    def __init__(self, *hooks: str, reason: str = "") -> None:
        self.hooks, self.reason, self.refusals = hooks, reason, ("ip_vs_schedule: no",)

    def __enter__(self) -> "Start":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def finish(self) -> "Start":
        if self.reason:
            raise ProbeUnavailable(self.reason)
        return self

    def counts(self, mode: str) -> bool:
        return any("ip_vs" in hook for hook in self.hooks) if mode == "ipvs" else True


@pytest.mark.parametrize(
    ("start", "mode", "status", "says"),
    [
        (Start("fexit:nf_nat_setup_info"), "nftables", "ok", "fexit:nf_nat_setup_info; compiled and attached in"),
        (Start("fexit:nf_nat_setup_info"), "ipvs", "warn", "ip_vs_schedule: no, so hits are the connection counters"),
        (Start("kretprobe:nf_nat_setup_info"), "iptables", "warn", "kretprobes may lose hits"),
        (Start(reason="no BTF"), "iptables", "warn", "so hits are the packet counters of the endpoints' rules: no BTF"),
        (Start(reason="no python3-bpfcc"), "ipvs", "warn", "connection counters of IPVS: no python3-bpfcc"),
    ],
)
def test_the_probe_and_what_counts_without_it(
    monkeypatch: pytest.MonkeyPatch, start: Start, mode: Any, status: str, says: str
) -> None:
    monkeypatch.setattr(probe, "ProbeStart", lambda: start)
    (found,) = probe.try_probe(Configuration(mode=mode))
    assert (found.name, found.status, says in found.detail) == ("probe", status, True), found
    assert found.fix == ("apt-get install python3-bpfcc" if "bpfcc" in start.reason else "")


# --------------------------------------------------------------------------------------------------------- on a kernel


def examined(netns: NetNs, *arguments: str, status: int = 0) -> dict[str, dict[str, str]]:
    done = netns.run(*DATAPLANE, "doctor", "-o", "json", *arguments, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return {each["name"]: each for each in json.loads(done.stdout)["checks"]}


@pytest.mark.ipvs
def test_a_healthy_machine_and_nothing_is_left_behind(netns: NetNs) -> None:
    before = snapshot(netns)
    found = examined(netns)
    assert not [each for each in found.values() if each["status"] != "ok"]
    assert found["probe"]["detail"].startswith("fexit:nf_nat_setup_info, fexit:ip_vs_schedule; ")
    assert {"dummy device", "IPVS", "IPVS IPv6", "IPVS conntrack", "guard table", "kube-proxy", "loopback"} <= set(
        found
    )
    assert {"mode nftables", "iptables", "iptables legacy", "iptables nft"} <= set(found)
    assert found["IPVS schedulers"]["detail"] == "rr wrr lc wlc sh mh"
    assert snapshot(netns) == before


@pytest.mark.root
def test_the_probe_attaches_or_says_why_not(netns: NetNs) -> None:
    done = netns.run(*DATAPLANE, "doctor", "-o", "json", "--mode", "nftables", check=False)
    (found,) = (each for each in json.loads(done.stdout)["checks"] if each["name"] == "probe")
    assert found["status"] in ("ok", "warn")
    assert "nf_nat_setup_info" in found["detail"]
    assert found["status"] == "ok" or "so hits are" in found["detail"]


@pytest.mark.ipvs
def test_what_is_wrong_here_is_found(netns: NetNs, tmp_path: Path) -> None:
    manifests = tmp_path / "services.yaml"
    manifests.write_text(HEALTHY)
    assert netns.run(*DATAPLANE, "apply", "-f", str(manifests)).returncode == 0
    assert examined(netns)["agent"]["status"] == "warn"
    assert netns.run(*DATAPLANE, "cleanup").returncode == 0
    netns.ip("link add kube-ipvs0 type dummy", "link add eth7 type dummy", "address add 10.0.1.175/32 dev eth7")
    netns.run("nft", "add table ip kube-proxy")
    found = examined(netns, "-f", str(manifests), status=5)
    assert (found["device"]["status"], found["VIPs"]["status"]) == ("fail", "fail")
    assert found["kube-proxy"]["fix"] == "dataplane cleanup --kube-proxy"
    netns.ip("link set lo down")
    assert examined(netns, status=5)["loopback"]["fix"] == "ip link set lo up"
