"""The commands in every mode, on a kernel: each tool's own language, and what they say of modes that are left over."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.netns import NetNs
from tests.test_cli import DATAPLANE, HEALTHY, endpoints, service

pytestmark = pytest.mark.root
MODES = [("nftables",), ("iptables", "--iptables-tool", "legacy"), ("iptables", "--iptables-tool", "nft")]
STICKY = service("sticky", "10.0.1.8", "  sessionAffinity: ClientIP\n") + endpoints("10.244.1.9", name="sticky")
NOBODY = service("nobody", "10.0.1.9")


def on(netns: NetNs, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = netns.run(*DATAPLANE, *arguments, check=False)
    assert done.returncode == status, (arguments, done.stdout, done.stderr)
    return done


@pytest.fixture
def manifests(tmp_path: Path) -> str:
    path = tmp_path / "services.yaml"
    # nft 1.0.6 has too few registers for affinity over IPv6, which the kernel has: it cannot read its own listing
    six = service("six", "fd00:1::10") + endpoints("fd00:244::1", name="six", family="IPv6")
    path.write_text(HEALTHY + six + STICKY + NOBODY)
    return str(path)


def settings(netns: NetNs, options: tuple[str, ...]) -> list[str]:
    """Options of a mode for commands that have no --iptables-tool: by a file."""
    mode, *rest = options
    path = Path("/tmp", f"{netns.name}.yaml")
    tool = rest[1] if rest else "auto"
    path.write_text(f"apiVersion: dataplane/v1alpha1\nkind: AgentConfiguration\nmode: {mode}\niptablesTool: {tool}\n")
    return ["--config", str(path)]


@pytest.mark.parametrize("options", MODES, ids=lambda each: each[-1])
def test_a_mode_is_shown_in_its_tools_language_and_can_be_restored_from_it(
    netns: NetNs, manifests: str, options: tuple[str, ...]
) -> None:
    config = settings(netns, options)
    try:
        language = options[0] if options[0] == "iptables" else "nft"
        on(netns, "apply", "-f", manifests, *config)
        text = on(netns, "show", "-o", language, *config).stdout
        assert "default/hostnames:http" in text
        on(netns, "cleanup", "--all")
        assert on(netns, "show", "-o", language, *config).stdout == ""
        if language == "nft":
            netns.run("nft", "-f", "-", stdin=text)
        else:
            for family in text.split("# ip")[1:]:
                tool = f"ip{family.partition('-restore')[0]}-restore"
                netns.run(tool, "--noflush", stdin=f"# ip{family}")
        assert on(netns, "diff", "-f", manifests, *config).stdout == "in sync: 4 virtual servers, 4 real servers\n"
        assert sorted(on(netns, "show", "-o", language, *config).stdout.split()) == sorted(text.split())
        assert "  random  " in on(netns, "show", "-o", "wide", *config).stdout
        wrong = on(netns, "show", "-o", "iptables" if language == "nft" else "nft", *config, status=2)
        assert f"is not for --mode {options[0]}" in wrong.stderr
    finally:
        Path(config[1]).unlink()


def test_another_mode_is_named_by_diff_and_doctor_and_goes_by_apply(netns: NetNs, manifests: str) -> None:
    on(netns, "apply", "-f", manifests, "--mode", "nftables")
    on(netns, "apply", "-f", manifests, "--mode", "nftables")
    diff = on(netns, "diff", "-f", manifests, "--mode", "iptables", status=4)
    assert "nftables mode goes, when iptables mode holds all this: 4 virtual servers\n" in diff.stdout
    found = json.loads(on(netns, "diff", "-f", manifests, "--mode", "iptables", "-o", "json", status=4).stdout)
    assert (found["inSync"], found["otherModes"]) == (False, [{"mode": "nftables", "virtualServers": 4}])
    checks = {
        each["name"]: each
        for each in json.loads(on(netns, "doctor", "--mode", "iptables", "-o", "json").stdout)["checks"]
    }
    assert checks["other modes"]["status"] == "warn"
    assert "nftables mode is here (4 virtual servers)" in checks["other modes"]["detail"]
    assert "dataplane cleanup --mode nftables" in checks["other modes"]["fix"]
    assert checks["iptables"]["detail"].startswith(("nft, the host's choice: ", "legacy, the host's choice: "))
    done = on(netns, "apply", "-f", manifests, "--mode", "iptables")
    assert done.stderr.splitlines() == [
        "dataplane: switch: found mode nftables to iptables",
        "dataplane: switch: programmed and verified mode iptables virtual servers 4",
        "dataplane: switch: removed mode nftables",
    ]
    assert "dataplane-nftables" not in netns.run("nft", "list", "tables").stdout
    again = on(netns, "apply", "-f", manifests, "--mode", "iptables")
    assert (again.stdout.split(":")[0], again.stderr) == ("unchanged", "")
    on(netns, "diff", "-f", manifests, "--mode", "iptables")
    # our own chains are nobody else's
    checks = {each["name"]: each for each in json.loads(on(netns, "doctor", "-o", "json", status=5).stdout)["checks"]}
    assert checks["kube-proxy"]["status"] == "ok"
    on(netns, "cleanup", "--all")


@pytest.mark.parametrize("options", MODES, ids=lambda each: each[-1])
def test_cleaning_up_takes_the_mode_that_is_named_or_all(
    netns: NetNs, manifests: str, options: tuple[str, ...]
) -> None:
    netns.sysctl("ipv4.ip_forward", 0)
    before = netns.run("nft", "list", "tables").stdout
    on(netns, "apply", "-f", manifests, "--mode", *options)
    other = "iptables" if options[0] == "nftables" else "nftables"
    assert f"{other}: nothing of ours is there" in on(netns, "cleanup", "--mode", other).stdout
    assert netns.run("sysctl", "-n", "net.ipv4.ip_forward").stdout == "1\n"
    # of either back end, without being told
    assert f"{options[0]}: removed" in on(netns, "cleanup", "--all").stdout
    assert netns.run("sysctl", "-n", "net.ipv4.ip_forward").stdout == "0\n"
    rules = netns.run("nft", "list", "ruleset").stdout + netns.run("iptables-legacy-save").stdout
    assert "KUBE" not in rules
    assert "dataplane" not in rules
    assert set(before.split()) <= set(netns.run("nft", "list", "tables").stdout.split())
