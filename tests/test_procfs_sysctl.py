"""Kernel settings: written where they are wanted, raised and never lowered, reported where they cannot be written."""

from pathlib import Path

import pytest

from dataplane import procfs_sysctl as sysctl
from dataplane.procfs_sysctl import (
    IPVS_SYSCTLS,
    STRICT_ARP_SYSCTLS,
    Change,
    Wanted,
    apply,
    check,
    kernel_version,
    raise_to,
    read,
    restore,
    running_kernel,
    write,
)
from tests.netns import NetNs

FORWARD = "net.ipv4.ip_forward"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /proc/sys of our own, with what ipvs mode wants, all 0."""
    monkeypatch.setattr(sysctl, "ROOT", tmp_path)
    for wanted in (*IPVS_SYSCTLS, *STRICT_ARP_SYSCTLS):
        path = tmp_path / wanted.name.replace(".", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("0\n")
    return tmp_path


def test_names_are_paths(tree: Path) -> None:
    assert read(FORWARD) == 0
    assert write(FORWARD, 1) == ""
    assert (tree / "net/ipv4/ip_forward").read_text() == "1\n"
    vlan = tree / "net/ipv4/conf/eth0.100/arp_ignore"
    vlan.parent.mkdir(parents=True)
    vlan.write_text("2\n")
    assert read("net.ipv4.conf.eth0/100.arp_ignore") == 2


@pytest.mark.parametrize(
    "name", ["ip_forward", "/etc/passwd", "net.../../etc/passwd", "net..x", "net.//.//.x", "net.ipv4.x y", ""]
)
def test_what_is_no_name_is_no_path(tree: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not a sysctl name"):
        read(name)


def test_raising_never_lowers(tree: Path) -> None:
    name = STRICT_ARP_SYSCTLS[1].name
    assert raise_to(name, 1) == Change(name, 1, 0, 1)
    write(name, 8)
    change = raise_to(name, 2)
    assert (change.before, change.after, change.changed) == (8, 8, False)
    assert read(name) == 8


def test_apply_reports_each_and_restore_takes_back_only_ours(tree: Path) -> None:
    write("net.ipv4.vs.conntrack", 1)
    changes = apply(IPVS_SYSCTLS, (6, 1))
    assert [str(each) for each in changes] == [
        "net.ipv4.ip_forward = 1 (was 0)",
        "net.ipv4.vs.conntrack = 1",
        "net.ipv4.vs.expire_nodest_conn = 1 (was 0)",
        "net.ipv4.vs.expire_quiescent_template = 1 (was 0)",
    ]
    assert apply(IPVS_SYSCTLS, (6, 1)) != changes  # nothing is left to change
    write("net.ipv4.vs.expire_nodest_conn", 5)  # somebody else's value since then
    restored = restore(changes)
    assert [each.name for each in restored] == [FORWARD, "net.ipv4.vs.expire_quiescent_template"]
    assert (read(FORWARD), read("net.ipv4.vs.expire_nodest_conn")) == (0, 5)


@pytest.mark.parametrize(
    ("kernel", "applies"), [((4, 0), False), ((4, 1), True), ((5, 8), True), ((5, 9), False), ((6, 18), False)]
)
def test_conn_reuse_mode_is_only_for_old_kernels_and_only_there_lowered(
    tree: Path, kernel: tuple[int, int], applies: bool
) -> None:
    name = "net.ipv4.vs.conn_reuse_mode"
    write(name, 1)
    changed = [each.name for each in apply(IPVS_SYSCTLS, kernel) if each.changed]
    assert (name in changed) == applies
    assert read(name) == (0 if applies else 1)


def test_check_writes_nothing_and_says_why(tree: Path) -> None:
    (tree / "net/ipv4/vs/conntrack").unlink()
    found = {each.name: each.error for each in check(IPVS_SYSCTLS, (6, 1))}
    assert found[FORWARD].startswith("it is 0: packets to a VIP")
    assert found["net.ipv4.vs.conntrack"].startswith("this kernel has no such setting: ")
    assert read(FORWARD) == 0
    write(FORWARD, 1)
    assert check(IPVS_SYSCTLS[:1], (6, 1)) == [Change(FORWARD, 1, 1, 1)]


def test_what_cannot_be_written_is_reported(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", refuse)
    change = raise_to(FORWARD, 1)
    assert (change.error, change.changed) == ("read-only file system", False)
    assert str(change) == "net.ipv4.ip_forward = 1: read-only file system"
    assert restore([change]) == []


def test_missing_settings_are_reported(tree: Path) -> None:
    assert apply([Wanted("net.ipv4.vs.nothing", 1, "")], (6, 1))[0].error == "this kernel has no such setting"


def test_kernel_versions() -> None:
    assert kernel_version("6.1.0-13-amd64") == (6, 1)
    assert kernel_version("nonsense") == (0, 0)
    assert running_kernel() >= (3, 0)


@pytest.mark.root
def test_in_a_real_namespace(netns: NetNs) -> None:
    with netns.enter():
        write(FORWARD, 0)
        changes = apply([*IPVS_SYSCTLS[:1], *STRICT_ARP_SYSCTLS], running_kernel())
        assert [each.error for each in changes] == ["", "", ""]
        assert write("net.ipv4.no_such", 1) == "this kernel has no such setting"
        assert read(FORWARD) == 1
        assert read("net.ipv4.conf.all.arp_announce") == 2
        assert all(each.error == "" for each in check(STRICT_ARP_SYSCTLS, running_kernel()))
        restore(changes)
        assert read("net.ipv4.conf.all.arp_announce") == 0
    assert netns.run("cat", "/proc/sys/net/ipv4/ip_forward").stdout == "0\n"


@pytest.mark.ipvs
def test_ipvs_settings_exist_and_hold(netns: NetNs) -> None:
    netns.run("ipvsadm", "-ln")  # loads the module
    with netns.enter():
        assert [each.error for each in apply(IPVS_SYSCTLS, running_kernel())] == [""] * 4
        assert all(each.error == "" for each in check(IPVS_SYSCTLS, running_kernel()))
