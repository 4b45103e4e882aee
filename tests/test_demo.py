"""The demo, as a newcomer runs it: it says what the tutorial says, checks itself, and leaves nothing behind."""

import errno
import io
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from click.testing import CliRunner

from dataplane import demo
from dataplane.cli import cli
from dataplane.demo import stage as stage_module
from dataplane.demo.ipvs_act import real_lines
from dataplane.demo.names_act import names
from dataplane.demo.other_acts import CHAIN, iptables
from dataplane.demo.page import ClaimFailed, Page, difference
from dataplane.demo.play import Play
from dataplane.demo.stage import PodSpec, build_stage
from dataplane.demo.tutorial import EXAMPLE, read_tutorial, without_endpoint
from dataplane.errors import KernelError, NotRoot, PreflightError

ROOT = Path(__file__).resolve().parent.parent
TABLE = """\
    Prot LocalAddress:Port Scheduler Flags
      -> RemoteAddress:Port           Forward Weight ActiveConn InActConn
    TCP  10.0.1.175:80 rr
      -> 10.244.1.7:9376              Masq    1      0          0
      -> 10.244.2.3:9376              Masq    1      0          0
      -> 10.244.3.6:9376              Masq    1      0          0
"""


def leftovers() -> list[str]:
    """Namespaces, folders and processes of a demo."""
    found = [str(path) for where in ("/run/netns", "/tmp") for path in Path(where).glob("dataplane-demo-*")]
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = cmdline.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(b"dataplane-demo-" in word for word in words) or b"hostnames.yaml" in words:
            found.append(repr(words))
    return found


def comparable(line: str) -> str:
    """A line without its numbers, which differ from run to run, and its spaces, which follow the numbers."""
    return " ".join(re.sub(r"\d+", "N", line).split())


@pytest.fixture
def nothing_before() -> Iterator[None]:
    before = leftovers()
    yield
    assert [each for each in leftovers() if each not in before] == []


@pytest.mark.ipvs
@pytest.mark.slow
@pytest.mark.usefixtures("nothing_before")
def test_the_whole_demo_shows_the_tutorials_table_and_leaves_nothing_behind() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dataplane", "demo"], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = done.stdout
    assert TABLE in text
    assert re.search(r"kube-ipvs0: <BROADCAST,NOARP> mtu 1500 qdisc noop state DOWN", text)
    assert "inet 10.0.1.175/32 scope global kube-ipvs0" in text
    assert "ok  3 + 3 + 3: every pod got the same share" in text
    assert re.search(r"-> 10\.244\.\d\.\d:9376              Masq    0      1 ", text), "a real server that drains"
    assert re.findall(r"^(\d+)/(\d+)  ", text, re.MULTILINE) == [(str(number), "11") for number in range(1, 12)]
    assert "ok  the namespaces of the demo are gone too" in text
    assert "\x1b" not in text, "colours are for terminals"
    assert max(len(line) for line in text.splitlines() if "-A KUBE-" not in line) <= 120
    portal = f'--comment "default/hostnames: cluster IP" -m tcp --dport 80 -j {CHAIN}'
    assert f"-A KUBE-SERVICES -d 10.0.1.175/32 -p tcp -m comment {portal}" in text
    assert text.count("ok  the download was complete") == 3
    assert text.count("ok  it is back") == 2
    assert text.count("ok  every connection was counted, each at its pod") == 3
    assert text.count("counted by probe (fexit:") == 6
    assert "ok  all of them, in all three modes" in text
    assert "ok  they counted what the client was told" in text
    assert done.stderr == ""
    (excerpt,) = re.findall(r"^```text\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    printed = {comparable(line) for line in text.splitlines()}
    assert [line for line in excerpt.splitlines() if line not in ("", "…") and comparable(line) not in printed] == []


@pytest.mark.ipvs
@pytest.mark.slow
@pytest.mark.usefixtures("nothing_before")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_leaves_nothing_behind(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "dataplane", "demo"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "Requests are spread" in line:
                break
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == 128 + number


@pytest.mark.root
@pytest.mark.usefixtures("nothing_before")
def test_a_stage_that_fails_half_way_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("no more cables")

    monkeypatch.setattr(stage_module, "_ip", lambda *_: None)
    monkeypatch.setattr(stage_module, "_connect", fails)
    with pytest.raises(OSError, match="cables"), build_stage([PodSpec("web", "10.244.3.6", 9376)]):
        pass


@pytest.mark.root
@pytest.mark.usefixtures("nothing_before")
def test_a_pod_answers_with_its_name_and_streams_until_the_curtain_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    whole_ip = stage_module._ip

    def without_the_trial(stage: stage_module.Stage, where: str, *commands: str) -> None:
        if not any("dummy" in command for command in commands):
            whole_ip(stage, where, *commands)

    monkeypatch.setattr(stage_module, "_ip", without_the_trial)
    with build_stage([PodSpec("web", "10.244.3.6", 9376)]) as stage:
        assert stage.run("client", ["curl", "-s", "10.244.3.6:9376"]) == (0, "web\n")
        stream = stage.start("client", ["curl", "-sN", "10.244.3.6:9376/stream"])
        with stage_module.ended(stream):
            assert stream.stdout is not None
            assert [stream.stdout.readline() for _ in range(2)] == ["web line 1\n", "web line 2\n"]
            stage.curtain.set()
            assert stream.communicate(timeout=20)[0].endswith("web end\n")
        assert stream.returncode == 0


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.usefixtures("nothing_before")
def test_services_have_names_and_iptables_mode_takes_over_from_nftables_mode(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The last acts by themselves: they need no IPVS."""
    whole_ip = stage_module._ip

    def without_the_trial(stage: stage_module.Stage, where: str, *commands: str) -> None:
        if not any("dummy" in command for command in commands):
            whole_ip(stage, where, *commands)

    monkeypatch.setattr(stage_module, "_ip", without_the_trial)
    tutorial = read_tutorial(EXAMPLE)
    with build_stage(tutorial.pods) as stage, redirect_stdout(io.StringIO()) as told:
        play = Play(stage, tutorial, tmp_path, pause=False, steps=1)
        with play.agent_ends():
            play.manifest.write_text(tutorial.text)
            play.launch("nftables")
            names(play)
            assert not (tmp_path / "resolv.conf").exists()
            iptables(play)
            play.stop()
            play.command("node", "dataplane cleanup --all")
            assert "KUBE" not in play.look("iptables-save")
    assert told.getvalue().count("\nok  ") == 15


@pytest.mark.root
def test_without_ipvs_the_demo_names_the_way_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_family(*_: object) -> int:
        raise KernelError("find", "generic netlink family IPVS", errno.ENOENT)

    monkeypatch.setattr(demo, "resolve_family", no_such_family)
    with pytest.raises(PreflightError, match="make demo"):
        demo.run_demo()


def test_a_program_that_is_missing_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda tool, path: None if tool == "ipvsadm" else f"/sbin/{tool}")
    with pytest.raises(PreflightError, match="ipvsadm is not installed; fix: apt-get install ipvsadm"):
        demo.run_demo()


def test_who_is_not_root_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    for start in (demo.run_demo, demo.open_shell):
        with pytest.raises(NotRoot, match="needs root"):
            start()


@pytest.mark.parametrize("other", ["--pause", "--keep"])
def test_a_shell_is_no_demo(other: str) -> None:
    told = CliRunner().invoke(cli, ["demo", "--shell", other])
    assert told.exit_code == 2
    assert "--shell plays no demo" in told.stderr


def test_a_claim_that_does_not_hold_ends_the_demo() -> None:
    page = Page(pause=False, steps=1)
    with redirect_stdout(io.StringIO()) as told:
        page.claim("water is wet", True, "it was dry")
        page.claim("not worth saying", True, "", quiet=True)
    assert told.getvalue() == "ok  water is wet\n"
    with pytest.raises(ClaimFailed, match=r"^expected: grass is blue; but it is green$") as caught:
        page.claim("grass is blue", False, "it is green")
    assert caught.value.exit_code == 1


def test_output_of_programs_cannot_act_on_the_terminal() -> None:
    page = Page(pause=False, steps=1)
    with redirect_stdout(io.StringIO()) as told:
        page.text("a\tb\x1b[2J\n")
    assert told.getvalue() == "    a       b\\x1b[2J\n"


def test_an_endpoint_is_taken_out_of_the_manifest_and_nothing_else() -> None:
    tutorial = read_tutorial(EXAMPLE)
    assert [pod.address for pod in tutorial.pods] == ["10.244.3.6", "10.244.1.7", "10.244.2.3"]
    for pod in tutorial.pods:
        edited = without_endpoint(tutorial.text, pod.address)
        lines = difference(tutorial.text, edited).splitlines()
        removed = [line for line in lines if line.startswith("-")]
        assert len(removed) == 3
        assert pod.address in removed[0]
        assert pod.hostname in removed[2]
        assert not [line for line in lines if line.startswith("+")]


def test_real_servers_are_read_from_ipvsadms_table() -> None:
    table = TABLE.replace("Masq    1      0          0\n", "Masq    0      1          4\n", 1)
    assert real_lines("\n".join(line[4:] for line in table.splitlines())) == {
        "10.244.1.7:9376": (0, 1, 4),
        "10.244.2.3:9376": (1, 0, 0),
        "10.244.3.6:9376": (1, 0, 0),
    }


def test_waiting_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    play = Play.__new__(Play)
    monkeypatch.setattr("dataplane.demo.play.REACTION_SECONDS", 0.1)
    monkeypatch.setattr(Play, "look", lambda *_: "")
    begun = time.monotonic()
    with pytest.raises(ClaimFailed, match="the moon: not after"):
        play.wait("date", lambda _: False, "the moon")
    assert time.monotonic() - begun < 5
