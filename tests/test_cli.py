"""The command line: what each command prints, writes and returns; first over the fake, then on a kernel."""

import contextlib
import errno
import io
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
import structlog
from click.testing import CliRunner, Result

import dataplane.agent
import dataplane.backend
import dataplane.cli.options
from dataplane.backend import MODES, Options
from dataplane.cli import COMMANDS, cli
from dataplane.errors import AgentUnreachable, DataplaneError, NotRoot, PreflightError, UsageError
from dataplane.journal import open_journal
from dataplane.model import VirtualAddress, parse_address
from dataplane.testing import FakeBackend
from tests.netns import NetNs

DATAPLANE = [sys.executable, "-m", "dataplane"]
AT = VirtualAddress(6, parse_address("10.0.1.175"), 80)


def service(name: str = "hostnames", vip: str = "10.0.1.175", extra: str = "") -> str:
    return (
        f"---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: default}}\n"
        f'spec:\n  clusterIP: "{vip}"\n  ports: [{{name: http, port: 80}}]\n{extra}'
    )


def endpoints(*addresses: str, name: str = "hostnames", family: str = "IPv4") -> str:
    lines = "".join(f'- addresses: ["{address}"]\n' for address in addresses)
    return (
        f"---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: {family}\n"
        f"metadata: {{name: {name}-1, namespace: default, labels: {{kubernetes.io/service-name: {name}}}}}\n"
        f"ports: [{{name: http, port: 9376}}]\nendpoints:\n{lines}"
    )


HEALTHY = service() + endpoints("10.244.1.7", "10.244.2.3")
FAULTY = (
    "---\napiVersion: v1\nkind: Service\nmetadata: {name: bad, namespace: default}\nspec: {ports: [{port: 99999}]}\n"
)


class Kernel:
    """The fake behind the command line, and what was asked of it."""

    def __init__(self) -> None:
        self.backend = FakeBackend()
        self.opened: list[tuple[str, Options]] = []
        self.locked = False
        self.others: dict[str, FakeBackend] = {}
        """What other modes hold."""

    def open_leftover(self, mode: str, options: Options | None = None) -> FakeBackend:
        return self.backend if mode == "ipvs" else self.others.get(mode, FakeBackend())

    def open(self, mode: str, options: Options | None = None) -> FakeBackend:
        self.opened.append((mode, options or Options()))
        return self.backend if mode == "ipvs" else FakeBackend()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        if self.locked:
            raise DataplaneError("an agent runs in this network namespace already (pid 7)")
        yield


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(dataplane.backend, "open_backend", made.open)
    monkeypatch.setattr(dataplane.backend, "open_leftover", made.open_leftover)
    monkeypatch.setattr(dataplane.agent, "agent_lock", made.lock)
    monkeypatch.setattr(dataplane.cli.options, "has_net_admin", lambda: True)
    monkeypatch.delenv("DATAPLANE_MODE", raising=False)
    return made


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, prog_name="dataplane")


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    path = tmp_path / "services.yaml"
    path.write_text(HEALTHY)
    return path


# ------------------------------------------------------------------------------------------------- help, usage, errors


def test_help_lists_every_command_and_the_exit_status() -> None:
    done = invoke("--help")
    assert done.exit_code == 0
    for name in COMMANDS:
        assert f"  {name} " in done.stdout
    for status in ("0  ok", "4  diff found differences", "7  needs root"):
        assert status in done.stdout


@pytest.mark.parametrize("name", list(COMMANDS))
def test_each_help_begins_with_an_example_and_explains_every_option(name: str) -> None:
    done = invoke(name, "--help")
    assert done.exit_code == 0
    assert done.stdout.splitlines()[2].startswith(f"  dataplane {name}")
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert all(option.help for option in command.params if isinstance(option, click.Option))
    assert command.short_help


@pytest.mark.parametrize("arguments", [["version"], ["--version"]])
def test_version(arguments: list[str]) -> None:
    assert invoke(*arguments).stdout == f"dataplane {dataplane.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["nonsense"], 2, "No such command"),
        (["apply", "--nonsense"], 2, "No such option"),
        (["apply"], 2, "no manifests: name a file or directory with -f"),
        (["diff"], 2, "no manifests"),
        (["check"], 2, "nothing to check"),
        (["apply", "-f", "/nowhere/x.yaml"], 3, "/nowhere/x.yaml: no such file or directory"),
        (["run", "-f", "/nowhere/x.yaml"], 3, "/nowhere/x.yaml: no such file or directory"),
        (["show", "--config", "/nowhere/c.yaml"], 3, "/nowhere/c.yaml: no such file or directory"),
        (["show", "--mode", "bpf"], 2, "is not one of"),
        (["apply", "-f", "FILE", "--cluster-cidr", "10.0.0.0/99"], 2, "is not an address range"),
        (["apply", "-f", "FILE", "--ipvs-timeouts", "1,2"], 2, "three numbers"),
        (["apply", "-f", "FILE", "--scheduler", "no such"], 2, "--scheduler"),
        (["apply", "-f", "FILE", "--drain-seconds", "-1"], 2, "drain-seconds"),
        (["show", "-o", "ipvsadm", "default/x"], 2, "leave out the names"),
        (["show", "-o", "ipvsadm"], 2, "is for --mode ipvs"),
        (["show", "-o", "nft", "default/x"], 2, "leave out the names"),
        (["show", "-o", "iptables"], 2, "-o iptables is not for --mode fake"),
        (["cleanup", "--all", "--mode", "ipvs"], 2, "--all is every mode, --mode one of them"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    kernel: Kernel, manifests: Path, arguments: list[str], status: int, said: str
) -> None:
    done = invoke(*(str(manifests) if each == "FILE" else each for each in arguments))
    assert (done.exit_code, done.stdout) == (status, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not kernel.backend.commits


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (DataplaneError("it failed"), 1, "dataplane: it failed\n"),
        (UsageError("no"), 2, "dataplane: no\n"),
        (PreflightError("no IPVS", "modprobe ip_vs"), 5, "dataplane: no IPVS; fix: modprobe ip_vs\n"),
        (NotRoot("the kernel asks for CAP_NET_ADMIN"), 7, "; try: sudo dataplane "),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 0, ""),
        (RuntimeError("a\x1bb"), 1, r"dataplane: RuntimeError: a\x1bb; rerun with --verbose for the traceback"),
    ],
)
def test_every_error_has_its_exit_status(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, said: str
) -> None:
    def fail() -> Iterator[Any]:
        raise error

    monkeypatch.setattr(kernel.backend, "report", fail)
    if isinstance(error, BrokenPipeError):
        monkeypatch.setattr("dataplane.cli._discard_output", lambda: None)  # the runner's stdout is no file
    done = invoke("show")
    assert done.exit_code == status
    assert said in done.stderr
    assert "\x1b" not in done.stderr


def test_verbose_shows_the_traceback(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Iterator[Any]:
        raise RuntimeError("deep")

    monkeypatch.setattr(kernel.backend, "report", fail)
    done = invoke("show", "-v")
    assert isinstance(done.exception, RuntimeError)
    assert done.exit_code == 1


@pytest.mark.parametrize("arguments", [["show"], ["apply", "-f", "FILE"], ["diff", "-f", "FILE"], ["cleanup"]])
def test_without_the_capability_nothing_is_tried(
    kernel: Kernel, manifests: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr(dataplane.cli.options, "has_net_admin", lambda: False)
    done = invoke(*(str(manifests) if each == "FILE" else each for each in arguments))
    assert done.exit_code == 7
    assert "sudo dataplane" in done.stderr
    assert not kernel.opened


# --------------------------------------------------------------------------------------------------------------- apply


def test_apply_programs_once_and_then_finds_nothing_to_do(kernel: Kernel, manifests: Path) -> None:
    first = invoke("apply", "-f", str(manifests))
    assert (first.exit_code, first.stderr) == (0, "")
    assert first.stdout.startswith("committed: ")
    assert kernel.backend.prepared
    assert [str(real) for real in kernel.backend.servers[AT].real_servers] == ["10.244.1.7:9376", "10.244.2.3:9376"]
    second = invoke("apply", "-f", str(manifests))
    assert (second.exit_code, second.stdout.split(":")[0]) == (0, "unchanged")
    assert len(kernel.backend.commits) == 1


def test_apply_in_json(kernel: Kernel, manifests: Path) -> None:
    done = json.loads(invoke("apply", "-f", str(manifests), "-o", "json").stdout)
    assert (done["schemaVersion"], done["result"], done["mode"], done["draining"]) == (1, "committed", "fake", 0)
    assert (done["failed"], done["blocked"], done["problems"], done["heldBack"]) == ([], [], [], 0)


def test_settings_of_the_command_line_and_the_file_meet(kernel: Kernel, tmp_path: Path, manifests: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "apiVersion: dataplane/v1alpha1\nkind: AgentConfiguration\nmanifests: [services.yaml]\n"
        "scheduler: wlc\nmasqueradeAll: true\nipvsTimeouts: {udp: 9}\n"
    )
    arguments = ["--cluster-cidr", "10.0.0.0/8,fd00::/8", "--cluster-cidr", "192.168.0.0/16", "--scheduler", "sh"]
    assert invoke("apply", "--config", str(config), *arguments).exit_code == 0
    options = kernel.opened[0][1]
    assert list(map(str, options.cluster_cidrs)) == ["10.0.0.0/8", "fd00::/8", "192.168.0.0/16"]
    assert (options.masquerade_all, options.timeouts) == (True, (0, 0, 9))
    assert kernel.backend.servers[AT].scheduler == "sh"


def test_the_environment_chooses_a_mode(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATAPLANE_MODE", "nftables")
    assert invoke("show").exit_code == 0
    assert invoke("show", "--mode", "ipvs").exit_code == 0
    assert [mode for mode, _ in kernel.opened] == ["nftables", "ipvs"]


def test_a_faulty_object_is_named_and_the_rest_applied(kernel: Kernel, manifests: Path) -> None:
    manifests.write_text(HEALTHY + FAULTY)
    done = invoke("apply", "-f", str(manifests))
    assert done.exit_code == 3
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{manifests}:")
    assert "Service default/bad: spec.ports[0].port: " in line
    assert list(kernel.backend.servers) == [AT]


def test_what_the_kernel_holds_stays_while_the_input_has_faults(kernel: Kernel, manifests: Path) -> None:
    manifests.write_text(HEALTHY + service("other", "10.0.1.2"))
    assert invoke("apply", "-f", str(manifests)).exit_code == 0
    manifests.write_text(service() + endpoints("10.244.1.7") + "---\na: [\n")
    done = invoke("apply", "-f", str(manifests))
    assert done.exit_code == 3
    assert "1 virtual server that the manifests lack stays" in done.stderr
    assert len(kernel.backend.servers) == 2
    assert len(kernel.backend.servers[AT].real_servers) == 1
    assert invoke("diff", "-f", str(manifests)).stdout.startswith("in sync")
    assert invoke("apply", "-f", str(manifests), "--allow-mass-delete").exit_code == 3
    assert list(kernel.backend.servers) == [AT]


def test_a_mass_delete_is_held_back_until_it_is_meant(kernel: Kernel, manifests: Path) -> None:
    manifests.write_text("".join(service(f"s{n}", f"10.0.1.{n}") for n in range(1, 21)))
    assert invoke("apply", "-f", str(manifests)).exit_code == 0
    manifests.write_text("# none\n")
    done = invoke("apply", "-f", str(manifests))
    assert done.exit_code == 1
    assert "20 virtual servers would be removed at once: held back" in done.stderr
    assert invoke("diff", "-f", str(manifests)).exit_code == 4
    assert len(kernel.backend.servers) == 20
    assert invoke("apply", "-f", str(manifests), "--allow-mass-delete").exit_code == 0
    assert not kernel.backend.servers


def test_what_the_kernel_refuses_is_named(kernel: Kernel, manifests: Path) -> None:
    manifests.write_text(HEALTHY + FAULTY)
    kernel.backend.refused[AT] = errno.ENOENT
    done = invoke("apply", "-f", str(manifests), "-o", "json")
    assert done.exit_code == 1
    assert "add virtual server TCP 10.0.1.175:80: No such file or directory (ENOENT)" in done.stderr
    assert len(json.loads(done.stdout)["failed"]) == 1


def test_somebody_elses_server_is_left_alone(kernel: Kernel, manifests: Path) -> None:
    kernel.backend.foreign.add(AT)
    done = invoke("apply", "-f", str(manifests))
    assert done.exit_code == 1
    assert "TCP 10.0.1.175:80: somebody else's virtual server is there" in done.stderr


def test_draining_real_servers_are_announced(kernel: Kernel, manifests: Path) -> None:
    kernel.backend.drains = True
    assert invoke("apply", "-f", str(manifests)).exit_code == 0
    kernel.backend.connections[AT, parse_address("10.244.2.3"), 9376] = 1
    manifests.write_text(service() + endpoints("10.244.1.7"))
    done = invoke("apply", "-f", str(manifests))
    assert done.exit_code == 0
    assert "1 real server drains; it goes when you run apply again or an agent runs" in done.stderr
    assert "draining 14m" in invoke("show").stdout or "draining 15m" in invoke("show").stdout
    kernel.backend.connections.clear()
    assert invoke("apply", "-f", str(manifests)).exit_code == 0
    assert [str(real) for real in kernel.backend.servers[AT].real_servers] == ["10.244.1.7:9376"]


def test_apply_refuses_while_an_agent_runs_and_diff_does_not(kernel: Kernel, manifests: Path) -> None:
    kernel.locked = True
    done = invoke("apply", "-f", str(manifests))
    assert done.exit_code == 1
    assert "an agent runs" in done.stderr
    assert not kernel.backend.commits
    assert invoke("diff", "-f", str(manifests)).exit_code == 4


# ---------------------------------------------------------------------------------------------------------------- diff


@pytest.mark.parametrize("command", [["diff"], ["apply", "--dry-run"]])
def test_diff_prints_the_change_and_makes_none(kernel: Kernel, manifests: Path, command: list[str]) -> None:
    done = invoke(*command, "-f", str(manifests))
    assert done.exit_code == 4
    assert done.stdout.splitlines() == [
        "1 virtual server to add; 2 real servers to add; 1 VIP to bind; 2 hairpin addresses to add",
        "+ TCP 10.0.1.175:80 10.244.1.7:9376 10.244.2.3:9376",
    ]
    assert not kernel.backend.prepared
    assert not kernel.backend.commits
    invoke("apply", "-f", str(manifests))
    again = invoke(*command, "-f", str(manifests))
    assert (again.exit_code, again.stdout) == (0, "in sync: 1 virtual server, 2 real servers\n")


def test_diff_in_json(kernel: Kernel, manifests: Path) -> None:
    done = json.loads(invoke("diff", "-f", str(manifests), "-o", "json").stdout)
    assert (done["inSync"], done["adds"], done["sets"], done["deletes"]) == (False, 6, 0, 0)
    assert done["objects"][0]["service"] == "default/hostnames:http"
    assert done["transaction"].startswith("+ TCP")


def test_problems_win_over_differences(kernel: Kernel, manifests: Path) -> None:
    manifests.write_text(HEALTHY + FAULTY)
    assert invoke("diff", "-f", str(manifests)).exit_code == 3


# ---------------------------------------------------------------------------------------------------- another mode here


def test_another_mode_that_is_here_is_told_by_diff_and_let_go_by_apply(kernel: Kernel, manifests: Path) -> None:
    invoke("apply", "-f", str(manifests))
    other = kernel.others["nftables"] = FakeBackend(drains=True)
    other.mode, other.prepared, other.servers = "nftables", True, dict(kernel.backend.servers)
    other.connections[AT, parse_address("10.244.2.3"), 9376] = 1
    found = invoke("diff", "-f", str(manifests))
    assert found.exit_code == 4
    assert found.stdout.splitlines() == [
        "in sync: 1 virtual server, 2 real servers",
        "nftables mode goes, when fake mode holds all this: 1 virtual server",
    ]
    done = invoke("apply", "-f", str(manifests))
    assert done.exit_code == 0
    assert "switch: draining mode nftables real servers 1 at most seconds 900" in done.stderr
    assert "still here: nftables: 1 real server draining; it goes when you run apply again" in done.stderr
    assert json.loads(invoke("apply", "-f", str(manifests), "-o", "json").stdout)["leavingModes"] == [
        "nftables: 1 real server draining"
    ]
    other.connections.clear()
    assert "switch: removed mode nftables" in invoke("apply", "-f", str(manifests)).stderr
    assert not other.present()
    assert invoke("diff", "-f", str(manifests)).exit_code == 0


def test_what_a_switch_cannot_replace_makes_apply_fail(kernel: Kernel, manifests: Path) -> None:
    other = kernel.others["nftables"] = FakeBackend()
    invoke("apply", "-f", str(manifests))
    other.mode, other.prepared, other.servers = "nftables", True, dict(kernel.backend.servers)
    kernel.backend.remove()
    kernel.backend.refused[AT] = errno.EINVAL
    done = invoke("apply", "-f", str(manifests))
    assert done.exit_code == 1
    assert "switch: kept mode nftables virtual servers 1 reason not programmed in the new mode" in done.stderr
    assert list(other.servers) == [AT]


# ---------------------------------------------------------------------------------------------------------------- show


def test_show(kernel: Kernel, manifests: Path) -> None:
    invoke("apply", "-f", str(manifests))
    kernel.backend.connections[AT, parse_address("10.244.2.3"), 9376] = 2
    table = """
NAMESPACE  SERVICE         VIP                TYPE       REAL SERVER      WEIGHT  STATE   ACTIVE  HITS(fake)  SHARE
default    hostnames:http  10.0.1.175:80/TCP  ClusterIP  10.244.1.7:9376  1       active  0       0           -
                                                         10.244.2.3:9376  1       active  2       0           -
"""
    assert invoke("show").stdout.splitlines() == table.strip().splitlines()
    assert invoke("show", "default/hostnames", "-o", "name").stdout == "default/hostnames:http\n"
    assert json.loads(invoke("show", "-o", "json").stdout)["services"][0]["service"] == "hostnames"
    assert not invoke("show", "--no-headers").stdout.startswith("NAMESPACE")


def test_nothing_to_show_is_no_error_and_a_wrong_name_is(kernel: Kernel, manifests: Path) -> None:
    empty = invoke("show")
    assert (empty.exit_code, empty.stdout) == (0, "")
    assert "dataplane apply -f" in empty.stderr
    assert json.loads(invoke("show", "-o", "json").stdout)["services"] == []
    invoke("apply", "-f", str(manifests))
    wrong = invoke("show", "default/\x1bnone")
    assert wrong.exit_code == 1
    assert r"nothing here is named default/\x1bnone" in wrong.stderr


def test_others_are_shown_on_demand(kernel: Kernel, manifests: Path) -> None:
    invoke("apply", "-f", str(manifests))
    kernel.backend.foreign.add(AT)
    assert invoke("show").stdout == ""
    assert "(foreign)" in invoke("show", "--all").stdout


def test_watching_without_a_terminal(kernel: Kernel, manifests: Path) -> None:
    invoke("apply", "-f", str(manifests))
    done = invoke("show", "-w", "-n", "3", "--interval", "0.1")
    assert done.exit_code == 0
    assert done.stdout.count("NAMESPACE") == 3
    assert "\x1b" not in done.stdout
    assert invoke("show", "-n", "2", "--interval", "0.1", "-o", "jsonl").stdout.count("\n") == 2


# ----------------------------------------------------------------------------------------- cleanup, check, and the rest


def test_cleanup_removes_what_is_ours_and_can_be_repeated(kernel: Kernel, manifests: Path) -> None:
    invoke("apply", "-f", str(manifests))
    kernel.opened.clear()
    dry = invoke("cleanup", "--dry-run")
    assert (dry.exit_code, "- TCP 10.0.1.175:80" in dry.stdout, len(kernel.backend.servers)) == (0, True, 1)
    done = invoke("cleanup")
    assert "ipvs: removed 1 virtual server, 2 real servers, 1 VIP, 2 hairpin addresses\n" in done.stdout
    assert {options.vip_binding for _, options in kernel.opened} == {"device", "routes"}
    assert not kernel.backend.servers
    again = invoke("cleanup")
    assert again.exit_code == 0
    assert again.stdout.splitlines() == [f"{mode}: nothing of ours is there" for mode in MODES]


def test_cleanup_works_without_the_mechanism(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(only: object = None) -> Any:
        raise PreflightError("this kernel has no IPVS", "modprobe ip_vs")

    monkeypatch.setattr(kernel.backend, "observe", fail)
    kernel.backend.prepared = True
    done = invoke("cleanup")
    assert (done.exit_code, kernel.backend.prepared) == (0, False)


def test_cleanup_refuses_while_an_agent_runs_unless_forced(kernel: Kernel) -> None:
    kernel.locked = True
    assert invoke("cleanup").exit_code == 1
    assert invoke("cleanup", "--dry-run").exit_code == 0
    assert invoke("cleanup", "--force").exit_code == 0


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        (HEALTHY, 0, "ok: 1 Service, 1 virtual server, 2 real servers, 0 problems\n"),
        (HEALTHY + FAULTY, 3, "problems: 1 Service, 1 virtual server, 2 real servers, 1 problem\n"),
        (HEALTHY + service("thief"), 3, "problems: 2 Services, 1 virtual server, 2 real servers, 1 problem\n"),
    ],
)
def test_check_needs_no_kernel(manifests: Path, text: str, status: int, said: str) -> None:
    manifests.write_text(text)
    done = invoke("check", "-f", str(manifests))
    assert (done.exit_code, done.stdout) == (status, said)
    assert len(done.stderr.splitlines()) == (status == 3)


def test_check_of_a_configuration(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("apiVersion: dataplane/v1alpha1\nkind: AgentConfiguration\n")
    assert invoke("check", "--config", str(config)).exit_code == 0
    config.write_text("apiVersion: dataplane/v1alpha1\nkind: AgentConfiguration\nscheduller: rr\n")
    done = invoke("check", "--config", str(config))
    assert done.exit_code == 3
    assert f"{config}:3: AgentConfiguration: scheduller: no such field; did you mean scheduler?" in done.stderr
    assert json.loads(invoke("check", "--print-schema").stdout)["title"] == "AgentConfiguration"


def test_status(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {"schemaVersion": 1, "pid": 7, "healthy": True, "failing": [], "lastError": "\x1b[2J"}
    monkeypatch.setattr(dataplane.agent, "read_status", lambda: told)
    done = invoke("status")
    assert done.exit_code == 0
    assert done.stdout.splitlines() == ["pid:        7", "healthy:    yes", "failing:    none", r"lastError:  \x1b[2J"]
    assert json.loads(invoke("status", "-o", "json").stdout) == told
    told["healthy"] = False
    assert invoke("status").exit_code == 1

    def unreachable() -> None:
        raise AgentUnreachable("no agent answers in this network namespace")

    monkeypatch.setattr(dataplane.agent, "read_status", unreachable)
    assert invoke("status").exit_code == 6


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    done = invoke("completion", shell)
    assert done.exit_code == 0
    assert "_DATAPLANE_COMPLETE" in done.stdout


def test_service_names_are_completed_and_errors_never_shown(
    kernel: Kernel, manifests: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invoke("apply", "-f", str(manifests))

    def complete(incomplete: str) -> Result:
        environment = {
            "_DATAPLANE_COMPLETE": "bash_complete",
            "COMP_WORDS": f"dataplane show {incomplete}",
            "COMP_CWORD": str(len(incomplete.split()) + 1),
        }
        return CliRunner(env=environment).invoke(cli, prog_name="dataplane", complete_var="_DATAPLANE_COMPLETE")

    assert complete("def").stdout == "plain,default/hostnames\n"
    assert complete("--mode ipvs def").stdout == "plain,default/hostnames\n"
    assert complete("--mode nftables def").stdout.strip() == ""
    assert complete("x").stdout.strip() == ""
    monkeypatch.setattr(dataplane.cli.options, "has_net_admin", lambda: False)
    done = complete("def")
    assert (done.stdout.strip(), done.stderr) == ("", "")


# ------------------------------------------------------------------------------------------------------------- journal


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def _structlog() -> Iterator[None]:
    yield
    structlog.reset_defaults()


@pytest.mark.usefixtures("_structlog")
def test_log_lines_are_json_unless_somebody_watches() -> None:
    out = io.StringIO()
    open_journal(stream=out).info("sync", adds=1, failed=["x\x1b[2J\u202e"])
    assert out.getvalue().isascii()
    line = json.loads(out.getvalue())
    assert (line["event"], line["level"], line["adds"], line["failed"]) == ("sync", "info", 1, ["x\x1b[2J\u202e"])
    assert line["timestamp"].endswith("Z")


@pytest.mark.usefixtures("_structlog")
@pytest.mark.parametrize(("log_format", "stream"), [("auto", Terminal()), ("human", io.StringIO())])
def test_log_lines_for_people_are_escaped(
    monkeypatch: pytest.MonkeyPatch, log_format: str, stream: io.StringIO
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    log = open_journal(log_format, stream=stream)
    log.debug("unseen")
    log.warning("bad input", problem="a\x1b[2Jb\nforged", also=["\x1b]0;t\x07"], **{"k\r": 1})
    try:
        raise RuntimeError("deep\x1b[2J")
    except RuntimeError:
        log.exception("broke")
    text = stream.getvalue()
    assert not set(text) & {"\x1b", "\r", "\x07"}
    assert text.splitlines()[0].count("bad input") == 1
    assert "forged" in text.splitlines()[0]
    assert "RuntimeError: deep" in text


# ---------------------------------------------------------------------------------------------------- cost of importing

HEAVY = (
    "pyroute2",
    "structlog",
    "watchfiles",
    "yaml",
    "textual",
    "rich",
    "asyncio",
    "bcc",
    "nftables",
    "dataplane.manifest_files",
)


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], (*HEAVY, "msgspec", "dataplane.backend", "dataplane.configuration")),
        (["version"], (*HEAVY, "msgspec", "dataplane.backend", "dataplane.configuration")),
        (["show"], (*HEAVY, "dataplane.reconciler", "dataplane.agent", "dataplane.doctor")),
        (["show", "-o", "json"], (*HEAVY, "dataplane.reconciler", "dataplane.agent", "dataplane.doctor")),
    ],
)
def test_start_is_not_paid_for_by_what_is_not_used(arguments: list[str], heavy: Sequence[str]) -> None:
    script = (
        "import sys\nfrom dataplane.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(*sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert "dataplane.cli" in loaded
    assert not loaded & set(heavy)


def test_a_closed_pipe_is_no_failure() -> None:
    done = subprocess.run(
        [
            "bash",
            "-c",
            'set -o pipefail; "$0" -m dataplane check --print-schema | true; echo ${PIPESTATUS[0]}',
            sys.executable,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("0\n", "")


# -------------------------------------------------------------------------------------------------------- on a kernel


def on(netns: NetNs, *arguments: str) -> subprocess.CompletedProcess[str]:
    return netns.run(*DATAPLANE, *arguments, check=False)


def snapshot(netns: NetNs) -> str:
    tools = (["nft", "list", "ruleset"], ["ip", "-o", "addr"], ["ip", "-o", "route", "show", "table", "all"])
    return "".join(netns.run(*tool).stdout for tool in (*tools, ["ipvsadm", "-S", "-n"]))


SIX = service("six", "fd00:1::10", "  sessionAffinity: ClientIP\n") + endpoints(
    "fd00:244::1", name="six", family="IPv6"
)


@pytest.mark.ipvs
@pytest.mark.parametrize("binding", ["device", "routes"])
def test_round_trip(netns: NetNs, tmp_path: Path, binding: str) -> None:
    manifests = tmp_path / "services.yaml"
    manifests.write_text(HEALTHY + SIX)
    arguments = ["-f", str(manifests), "--vip-binding", binding]
    before = snapshot(netns)
    diff = on(netns, "diff", *arguments)
    assert (diff.returncode, diff.stderr) == (4, "")
    assert "-A -t 10.0.1.175:80 -s rr\n" in diff.stdout
    assert snapshot(netns) == before
    done = on(netns, "apply", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert on(netns, "diff", *arguments).stdout == "in sync: 2 virtual servers, 3 real servers\n"
    assert on(netns, "show", "-o", "name").stdout == "default/hostnames:http\ndefault/six:http\n"
    shown = json.loads(on(netns, "show", "default/six", "-o", "json").stdout)["services"]
    assert [(each["address"], each["persistenceSeconds"]) for each in shown] == [("fd00:1::10", 10800)]
    manifests.write_text(service() + endpoints("10.244.1.7"))
    assert on(netns, "apply", *arguments).returncode == 0
    assert on(netns, "apply", *arguments).returncode == 0
    rules = netns.run("ipvsadm", "-S", "-n").stdout
    assert rules == "-A -t 10.0.1.175:80 -s rr\n-a -t 10.0.1.175:80 -r 10.244.1.7:9376 -m -w 1\n"
    done = on(netns, "cleanup")
    assert (done.returncode, done.stderr) == (0, "")
    assert snapshot(netns) == before
    again = on(netns, "cleanup")
    assert again.returncode == 0
    assert again.stdout.splitlines() == [f"{mode}: nothing of ours is there" for mode in MODES]


RULES = """\
-A -t 192.0.2.1:80 -s wlc -p 300 -M 255.255.255.0
-a -t 192.0.2.1:80 -r 192.0.2.10:8080 -m -w 3
-a -t 192.0.2.1:80 -r 192.0.2.11:80 -g -w 0
-A -u 192.0.2.1:53 -s sh -o -b sh-fallback,sh-port
-a -u 192.0.2.1:53 -r 192.0.2.10:53 -m -w 1
-A -t 192.0.2.2:0 -s rr -p 60
-A -t 192.0.2.3:443 -s mh -b mh-port
-a -t 192.0.2.3:443 -r 192.0.2.12:443 -i -w 1 --tun-type ipip
-A -t [2001:db8::1]:80 -s rr -p 300 -M 64
-a -t [2001:db8::1]:80 -r [2001:db8::10]:8080 -m -w 1
-A -u [2001:db8::1]:53 -s wrr
-A -f 7 -s rr
-a -f 7 -r 192.0.2.10:0 -g -w 1
-A -f 8 -6 -s wlc -p 60 -M 64
-a -f 8 -6 -r [2001:db8::10]:0 -g -w 1
"""


@pytest.mark.ipvs
def test_ipvsadm_output_is_byte_for_byte_that_of_ipvsadm(netns: NetNs, tmp_path: Path) -> None:
    manifests = tmp_path / "services.yaml"
    manifests.write_text(HEALTHY + SIX)
    assert on(netns, "apply", "-f", str(manifests)).returncode == 0
    netns.run("ipvsadm", "-R", stdin=RULES)
    # connections: a VIP on lo whose real server is this namespace itself
    netns.ip("address add 192.0.2.1/32 dev lo", "address add 192.0.2.10/32 dev lo")
    netns.run("bash", "-c", "exec 3<>/dev/tcp/192.0.2.1/80", check=False, timeout=20)
    table = netns.run("ipvsadm", "-ln").stdout
    assert "persistent 300 mask 255.255.255.0" in table
    assert on(netns, "show", "-o", "ipvsadm").stdout == table
    assert on(netns, "show", "-o", "ipvsadm-save").stdout == netns.run("ipvsadm", "-S", "-n").stdout
    everything = on(netns, "show", "--all", "-o", "name").stdout.splitlines()
    assert len(everything) == len(table.splitlines()) - 3 - table.count("->") + 1
    assert on(netns, "cleanup").returncode == 0
    left = netns.run("ipvsadm", "-S", "-n").stdout
    assert sorted(left.splitlines()) == sorted(RULES.splitlines())


@pytest.mark.ipvs
def test_a_reader_that_leaves_and_a_user_that_may_not(netns: NetNs, tmp_path: Path) -> None:
    manifests = tmp_path / "services.yaml"
    manifests.write_text("".join(service(f"s{n}", f"10.0.{n // 200}.{n % 200 + 1}") for n in range(800)))
    assert on(netns, "apply", "-f", str(manifests)).returncode == 0
    command = " ".join(DATAPLANE)
    piped = netns.run("bash", "-c", f"{command} show | head -n 1 >/dev/null; echo ${{PIPESTATUS[0]}}")
    assert (piped.stdout, piped.stderr) == ("0\n", "")
    refused = netns.run(
        "setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", *DATAPLANE, "show", check=False
    )
    assert (refused.returncode, refused.stdout) == (7, "")
    assert "sudo dataplane show" in refused.stderr
