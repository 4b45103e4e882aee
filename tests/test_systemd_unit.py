"""The systemd unit: how exposed it is, and that everything works behind its walls, under a real systemd."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .netns import NetNs
from .traffic import eventually

ROOT = Path(__file__).resolve().parent.parent
SYSTEMD = ROOT / "deploy/systemd"
UNIT = SYSTEMD / "dataplane.service"
EXPOSURE = 2.5


def directives() -> dict[str, list[str]]:
    """The unit's settings; a name may stand there several times."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if line and line[0] not in "#[":
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def test_the_exposure_is_low() -> None:
    """By systemd-analyze where there is one of a version that reads a file (250); by the directives everywhere."""
    program = shutil.which("systemd-analyze")
    version = (
        subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout if program else ""
    )
    if program and int(version.split()[1]) >= 250:
        text = subprocess.run(
            [program, "security", "--offline=true", "--no-pager", str(UNIT)],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
        told = re.search(r"Overall exposure level for dataplane.service: ([0-9.]+)", text)
        assert told is not None, text
        assert float(told[1]) <= EXPOSURE, text
    unit = directives()
    yes = (
        *(
            "NoNewPrivileges",
            "PrivateTmp",
            "PrivateDevices",
            "PrivateMounts",
            "ProtectHome",
            "ProtectClock",
            "RemoveIPC",
        ),
        *("ProtectHostname", "ProtectKernelTunables", "ProtectKernelModules", "ProtectKernelLogs", "LockPersonality"),
        *("ProtectControlGroups", "RestrictNamespaces", "RestrictRealtime", "RestrictSUIDSGID"),
        "MemoryDenyWriteExecute",
    )
    assert {name: unit.get(name) for name in yes} == {name: ["yes"] for name in yes}
    assert unit["ProtectSystem"] == ["strict"]
    assert unit["ProtectProc"] == ["invisible"]
    assert unit["ReadWritePaths"] == ["/proc/sys/net"]
    assert unit["User"] == ["dataplane"]
    assert unit["SystemCallArchitectures"] == ["native"]
    assert unit["SystemCallFilter"] == ["@system-service bpf perf_event_open", "~@resources"]
    assert unit["RestrictAddressFamilies"] == ["AF_NETLINK AF_UNIX AF_INET AF_INET6"]
    capabilities = {"NET_ADMIN", "NET_RAW", "DAC_READ_SEARCH", "BPF", "PERFMON", "SYS_ADMIN"}
    for name in ("CapabilityBoundingSet", "AmbientCapabilities"):
        assert {each.removeprefix("CAP_") for each in unit[name][0].split()} == capabilities


def test_the_watchdog_is_longer_than_the_longest_deadline_within() -> None:
    from dataplane.run_iptables import RESTORE_SECONDS
    from dataplane.systemd_notify import PING_MOST

    unit = directives()
    assert unit["Type"] == ["notify"]
    assert float(unit["WatchdogSec"][0]) > RESTORE_SECONDS + PING_MOST


def test_the_user_of_the_unit_is_the_one_that_is_made() -> None:
    assert "u dataplane " in (SYSTEMD / "sysusers.d/dataplane.conf").read_text()
    assert "/run/xtables.lock " in (SYSTEMD / "tmpfiles.d/dataplane.conf").read_text()


# ---------------------------------------------------------------------------------------------------- a real systemd

INIT = """
set -e
echo $$ > "$GROUP/cgroup.procs"
exec unshare --cgroup --mount --pid --fork --kill-child --mount-proc bash -ec '
  umount /sys/fs/cgroup
  mount -t cgroup2 none /sys/fs/cgroup
  mount -t tmpfs -o mode=755 none /run
  mkdir -p /run/systemd/system /run/lock /run/stage
  cp "$FOLDER/services.yaml" /run/stage/
  cp -r "$FOLDER/units/." /run/systemd/system/
  cp "$FOLDER/xtables.lock" /run/
  exec /lib/systemd/systemd --system --unit=stage.target --log-target=console --show-status=no
'
"""
"""A systemd as the first process of namespaces of its own, with an empty /run and a control group of its own."""


class Stage:
    """That systemd, and what is asked of it."""

    def __init__(self, ns: NetNs, folder: Path) -> None:
        self.log = folder / "agent.log"
        self._group = Path("/sys/fs/cgroup") / f"dpt-{os.getpid()}"
        self._group.mkdir()
        units = folder / "units"
        units.mkdir()
        (folder / "xtables.lock").touch(0o600)
        (units / "stage.target").write_text("[Unit]\nDescription=The stage\n")
        command = f"{sys.executable} -m dataplane run -f /run/stage/services.yaml --mode ipvs --log-format json"
        text = re.sub(r"(?m)^(Wants|After)=.*$", "", UNIT.read_text())
        text = text.replace("[Unit]", "[Unit]\nDefaultDependencies=no")
        text = text.replace("User=dataplane\nGroup=dataplane", "User=nobody\nGroup=nogroup")  # nobody is made for this
        text = re.sub(
            "(?m)^ExecStart=.*$",
            f"ExecStart={command}\nWorkingDirectory={ROOT}\nStandardOutput=append:{self.log}\n"
            f"StandardError=append:{self.log}",
            text,
        )
        (units / "dataplane.service").write_text(text)
        self._process = subprocess.Popen(
            ["nsenter", f"--net={ns.path}", "bash", "-c", INIT],  # `ip netns exec` would hide the control groups
            env={**os.environ, "container": "other", "GROUP": str(self._group), "FOLDER": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=(folder / "systemd.log").open("wb"),
            stderr=subprocess.STDOUT,
        )
        self.pid = 0

    def wait(self) -> None:
        """Until it is up."""
        eventually("systemd runs", self._found, 60)
        eventually("its target is reached", lambda: self.run("systemctl", "is-active", "stage.target") == "active", 60)

    def _found(self) -> bool:
        """Our process has become unshare, whose child is the init of the new namespaces."""
        assert self._process.poll() is None, (self.log.parent / "systemd.log").read_text()
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        self.pid = int(children[0]) if children else 0
        return bool(self.pid) and Path(f"/proc/{self.pid}/comm").read_text().strip() == "systemd"

    def run(self, *command: str) -> str:
        """A command inside; what it printed."""
        inside = ["nsenter", "-t", str(self.pid), "-m", "-p", "-n", f"-w{ROOT}"]
        done = subprocess.run([*inside, *command], capture_output=True, text=True, check=False, timeout=120)
        return (done.stdout + done.stderr).strip()

    def property(self, name: str) -> str:
        return self.run("systemctl", "show", "dataplane", "-P", name)

    def end(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)  # the init: everything in its namespace goes with it
        self._process.kill()
        self._process.wait(30)
        for _ in range(100):
            try:
                for group in sorted(self._group.rglob("*/"), reverse=True):
                    group.rmdir()
                self._group.rmdir()
            except OSError:
                time.sleep(0.1)  # what was killed has not gone yet
            else:
                return
        raise AssertionError(f"{self._group} stays")


@pytest.fixture
def stage(netns: NetNs, tmp_path: Path) -> Iterator[Stage]:
    shutil.copy(ROOT / "examples/hostnames.yaml", tmp_path / "services.yaml")
    made = Stage(netns, tmp_path)
    try:
        made.wait()
        yield made
    finally:
        made.end()


@pytest.mark.root
@pytest.mark.ipvs
@pytest.mark.slow
def test_the_agent_has_all_it_needs_behind_the_unit_s_walls(stage: Stage, netns: NetNs) -> None:
    netns.run("sysctl", "-qw", "net.ipv4.ip_forward=0")
    told = stage.run("systemctl", "start", "dataplane")
    # the command may come back early where processor time is short; the first start has to be the one that serves
    eventually("active", lambda: stage.property("ActiveState") == "active", 60)
    assert stage.property("NRestarts") == "0", (told, stage.log.read_text())
    assert stage.property("StatusText") == "1 virtual server in ipvs mode"
    assert netns.run("sysctl", "-n", "net.ipv4.ip_forward", "net.ipv4.vs.conntrack").stdout.split() == ["1", "1"]
    assert "10.0.1.175:80" in netns.run("ipvsadm", "-Ln").stdout

    eventually("the probe has been tried", lambda: '"event": "probe"' in stage.log.read_text(), 120)
    text = stage.log.read_text()
    assert '"result": "counts"' in text, text
    assert not [line for line in text.splitlines() if '"level": "warning"' in line or '"level": "error"' in line], text
    assert "10.0.1.175" in stage.run(sys.executable, "-m", "dataplane", "show")  # root asks on the socket

    stage.run("systemctl", "reload", "dataplane")
    eventually("reloaded", lambda: '"cause": "reload"' in stage.log.read_text(), 30)
    assert stage.property("ActiveState") == "active"
    assert stage.property("WatchdogTimestampMonotonic") != "0"
    stage.run("systemctl", "stop", "dataplane")
    assert (stage.property("ActiveState"), stage.property("Result")) == ("inactive", "success")
    assert "10.0.1.175:80" in netns.run("ipvsadm", "-Ln").stdout  # traffic goes on
