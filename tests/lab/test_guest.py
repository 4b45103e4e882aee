"""The lab: what the kernel of the `ipvs` tests has, how the micro-VM ends, and that its reports get here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guest import ROOT, has_ipvs
from tests.netns import NetNs, Topology

MICROVM = ROOT / "vagrant" / "microvm.sh"


@pytest.mark.ipvs
def test_kernel_has_what_ipvs_mode_and_the_probe_need(netns: NetNs) -> None:
    assert "IPVS" in netns.run("genl", "ctrl", "get", "name", "IPVS").stdout
    netns.ip("link add kube-ipvs0 type dummy")
    assert Path("/sys/kernel/btf/vmlinux").stat().st_size > 0
    name = f"dataplane_lab/probe_{os.getpid()}"
    events = os.open("/sys/kernel/tracing/kprobe_events", os.O_WRONLY | os.O_APPEND)
    try:
        os.write(events, f"p:{name} vfs_read".encode())
        os.write(events, f"-:{name}".encode())
    finally:
        os.close(events)


@pytest.mark.root
def test_topology_reaches_pods_from_the_client_in_both_families(topology: Topology) -> None:
    for pod in topology.pods:
        topology.client.run("ping", "-c1", "-W2", pod.v4)
        topology.client.run("ping", "-c1", "-W2", pod.v6)
    topology.pods[0].ns.run("ping", "-c1", "-W2", topology.pods[1].v4)


def test_microvm_takes_a_kernel_that_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "boot").mkdir()
    for version in ("6.9.1-amd64", "6.12.3-amd64"):
        (tmp_path / "boot" / f"vmlinuz-{version}").touch()
    told = subprocess.run([MICROVM, "-k", tmp_path, "-V"], capture_output=True, text=True, check=True)
    assert told.stdout == "6.12.3-amd64\n"
    refused = subprocess.run([MICROVM, "-k", "0.0.1", "-V"], capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr) == (125, "microvm: no kernel to boot is installed: run make setup\n")


boots = pytest.mark.skipif(os.geteuid() != 0 or has_ipvs(), reason="the micro-VM is only used as root without IPVS")


@boots
@pytest.mark.slow
def test_microvm_passes_output_and_exit_status_on(tmp_path: Path) -> None:
    script = 'echo out; echo err >&2; pwd; echo "$DATAPLANE_GUEST $DATAPLANE_ODD" >"$1/file"; exit 37'
    done = subprocess.run(
        [MICROVM, "-o", tmp_path, "--", "bash", "-c", script, "-", tmp_path],
        cwd=tmp_path,
        env={**os.environ, "DATAPLANE_ODD": "a 'b' \"c\"\n$d"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.returncode) == (f"out\nerr\n{tmp_path}\n", 37), done.stderr
    assert (tmp_path / "file").read_text() == "1 a 'b' \"c\"\n$d\n"


@boots
@pytest.mark.slow
def test_microvm_ends_at_its_time_limit(tmp_path: Path) -> None:
    done = subprocess.run([MICROVM, "-t", "12", "--", "sleep", "600"], capture_output=True, text=True, check=False)
    assert done.returncode == 125
    assert "did not finish" in done.stderr


# Stands in for microvm.sh: the same options and exit status, and no boot.
STAND_IN = """#!/bin/bash
if [ "$1" = -V ]; then echo stand-in; exit; fi
while [ "$1" != -- ]; do shift; done
shift
echo "the guest's own output"
DATAPLANE_GUEST=1 exec "$@"
"""

SAMPLE = """
import os, pytest
pytestmark = pytest.mark.ipvs

def test_here(): assert os.environ["DATAPLANE_GUEST"] == "1"

@pytest.mark.parametrize("x", ["a b", "é::[/]", "new\\nline", "-k", "$HOME'"])
def test_odd_ids(x): assert x

def test_fails():
    print("printed text")
    assert 1 == 2, "told reason"

def test_skips(): pytest.skip("no such thing")

@pytest.mark.xfail(strict=True)
def test_xfails(): assert False
"""


def run_sample(tmp_path: Path, code: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    stand_in = tmp_path / "stand-in.sh"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    (tmp_path / "conftest.py").write_text("pytest_plugins = ['tests.guest']\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    ipvs:\n    root:\n")
    (tmp_path / "test_sample.py").write_text(code)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("DATAPLANE_", "PYTEST_"))}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", *arguments],
        cwd=tmp_path,
        env={
            **inherited,
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(tmp_path),
            "DATAPLANE_VM_FORCE": "1",
            "DATAPLANE_VM_SCRIPT": str(stand_in),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )


def summary(done: "subprocess.CompletedProcess[str]") -> str:
    """The counts of pytest's last line."""
    return done.stdout.splitlines()[-1].strip("= ").partition(" in ")[0]


@pytest.mark.root
def test_reports_of_the_guest_are_replayed(tmp_path: Path) -> None:
    done = run_sample(tmp_path, SAMPLE)
    assert summary(done) == "1 failed, 6 passed, 1 skipped, 1 xfailed", done.stdout + done.stderr
    assert "ipvs tests run on: the micro-VM (stand-in)" in done.stdout
    assert "told reason" in done.stdout
    assert "printed text" in done.stdout


@pytest.mark.root
def test_a_skip_fails_where_the_kernel_is_required(tmp_path: Path) -> None:
    done = run_sample(tmp_path, SAMPLE, DATAPLANE_REQUIRE_KERNEL="1")
    assert summary(done) == "2 failed, 6 passed, 1 xfailed", done.stdout + done.stderr


@pytest.mark.root
def test_selection_is_this_sides(tmp_path: Path) -> None:
    done = run_sample(tmp_path, SAMPLE, "-k", "odd_ids and line")
    assert summary(done) == "1 passed, 8 deselected", done.stdout + done.stderr


@pytest.mark.root
def test_tests_without_an_outcome_fail_with_the_guests_output(tmp_path: Path) -> None:
    code = SAMPLE + "\ndef test_dies(): os._exit(9)\n\ndef test_never_runs(): pass\n"
    done = run_sample(tmp_path, code, "-k", "here or dies or never")
    assert summary(done) == "2 failed, 1 passed, 8 deselected", done.stdout + done.stderr
    assert "the guest's own output" in done.stdout
    assert "ended (status 9)" in done.stdout


@pytest.mark.root
def test_stopping_early_ends_the_guest(tmp_path: Path) -> None:
    code = (
        SAMPLE
        + "\ndef test_sleeps():\n    import time\n    open('pid', 'w').write(str(os.getpid()))\n    time.sleep(600)\n"
    )
    done = run_sample(tmp_path, code, "-x", "-k", "fails or sleeps")
    assert "1 failed" in summary(done), done.stdout + done.stderr
    pid = tmp_path / "pid"
    assert not pid.exists() or not Path("/proc", pid.read_text()).exists()
