"""pytest plugin: tests marked `ipvs` run on a kernel that has IPVS and dummy devices.

Where this kernel has none, all selected `ipvs` tests run in one boot of the micro-VM (vagrant/microvm.sh): a pytest
in the guest writes its reports to a shared file, and the pytest here replays them as if the tests had run here. The
guest begins when the tests are known, and works while those of this kernel run; its reports come after theirs.
Selection (-k, --lf, node ids), -x and the summary are this side's.

Environment:
DATAPLANE_REQUIRE_KERNEL=1  a skip of a test marked `root` or `ipvs` is a failure
DATAPLANE_VM_FORCE=1        use the micro-VM although this kernel would do
DATAPLANE_VM_CPUS=2         processors of the micro-VM
DATAPLANE_VM_SECONDS=4800   its time limit
DATAPLANE_VM_KERNEL         its kernel: what vagrant/microvm.sh -k takes (default: the newest that is installed)
DATAPLANE_VM_SCRIPT         another script in place of vagrant/microvm.sh (for the tests of this file)
"""

import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, TextIO

import pytest
from _pytest.runner import runtestprotocol  # the default protocol, which has no public name

ROOT = Path(__file__).resolve().parent.parent
MICROVM = os.environ.get("DATAPLANE_VM_SCRIPT") or str(ROOT / "vagrant" / "microvm.sh")
IN_GUEST = "DATAPLANE_GUEST_EXCHANGE" in os.environ  # set for the pytest that we start in the guest, and only there
REQUIRED = os.environ.get("DATAPLANE_REQUIRE_KERNEL") == "1"
IS_ROOT = os.geteuid() == 0
TAIL_LINES = 70
KERNEL_OPTION = ["-k", os.environ["DATAPLANE_VM_KERNEL"]] if os.environ.get("DATAPLANE_VM_KERNEL") else []


@functools.cache
def has_ipvs() -> bool:
    """Whether this kernel can run `ipvs` tests."""
    if IN_GUEST:
        return True
    if os.environ.get("DATAPLANE_VM_FORCE") == "1":
        return False
    return subprocess.run([ROOT / "vagrant" / "has-ipvs.sh"], check=False).returncode == 0


def is_delegated(item: pytest.Item) -> bool:
    """Whether the guest runs this test."""
    return item.get_closest_marker("ipvs") is not None and IS_ROOT and not has_ipvs()


def needs_kernel(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in ("root", "ipvs"))


class Guest:
    """One boot of the micro-VM, running the given tests."""

    def __init__(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self.config = config
        self.folder = Path(tempfile.mkdtemp(prefix="dataplane-guest-"))
        self.log = self.folder / "guest.log"
        self.failed = False
        self.told = False  # its last output is shown once, with the test that it ended in
        self.position = 0
        self.reports: dict[str, list[dict[str, Any]]] = {}
        self.finished: set[str] = set()
        self.reports_file = self.folder / "reports.jsonl"
        self.reports_file.touch()
        (self.folder / "items.json").write_text(json.dumps([item.nodeid for item in items]))
        option = config.option
        # Files, not node ids: ids may hold any character, so the guest picks them by items.json.
        pytest_arguments = [
            *dict.fromkeys(str(item.path) for item in items),
            f"--rootdir={config.rootpath}",
            f"--tb={option.tbstyle}",
            *(["--showlocals"] if option.showlocals else []),
            *(["-" + "v" * option.verbose] if option.verbose > 0 else []),
            *("-p", "no:cacheprovider"),
            "--basetemp=/tmp/tests-of-the-guest",  # this side makes folders of pytest at the same time
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    # not even a killed pytest leaves a guest behind
                    *("setpriv", "--pdeathsig", "TERM", "--"),
                    *(MICROVM, "-o", str(self.folder), "-m", "4096"),
                    *("-c", os.environ.get("DATAPLANE_VM_CPUS", "2")),
                    *("-t", os.environ.get("DATAPLANE_VM_SECONDS", "4800")),
                    *KERNEL_OPTION,
                    *("--", sys.executable, "-m", "pytest", *pytest_arguments),
                ],
                cwd=config.rootpath,
                env={**os.environ, "DATAPLANE_GUEST_EXCHANGE": str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def read(self) -> None:
        """Take in the reports that came since the last time; a line that is not complete yet stays for the next."""
        with self.reports_file.open("rb") as file:
            file.seek(self.position)
            data = file.read()
        lines = data[: data.rfind(b"\n") + 1]
        self.position += len(lines)
        for line in lines.splitlines():
            event = json.loads(line)
            if event["event"] == "finish":
                self.finished.add(event["nodeid"])
            else:
                self.reports.setdefault(event["nodeid"], []).append(event["report"])

    def wait(self, nodeid: str) -> bool:
        """Wait for a test's last report; False when the guest ended without it."""
        while True:
            ended = self.process.poll() is not None  # before reading: what was written before the end is then seen
            self.read()
            if nodeid in self.finished:
                return True
            if ended:
                return False
            time.sleep(0.05)

    def replay(self, item: pytest.Item) -> None:
        """Report a test of the guest as if it had run here."""
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        complete = self.wait(item.nodeid)
        for data in self.reports.pop(item.nodeid, []):
            report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
            if isinstance(report.longrepr, list):  # a skip's place and reason, which were a tuple before JSON
                report.longrepr = tuple(report.longrepr)
            self.failed |= report.failed
            item.ihook.pytest_runtest_logreport(report=report)
        if not complete:
            self.failed = True
            item.ihook.pytest_runtest_logreport(report=self.missing(item))
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)

    def missing(self, item: pytest.Item) -> pytest.TestReport:
        """The failure of a test whose end was never reported."""
        lines = [] if self.told else self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        self.told = True
        what = f"the micro-VM ended (status {self.process.returncode}) before this test did"
        text = "\n".join([f"{what}; all its output: {self.log}", *lines])
        return pytest.TestReport(item.nodeid, item.location, dict.fromkeys(item.keywords, 1), "failed", text, "call")

    def close(self) -> None:
        """End the guest if it still runs, and keep its output only if there was a failure."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if not self.failed:
            shutil.rmtree(self.folder, ignore_errors=True)


class HostPlugin:
    """This side: hands `ipvs` tests to the guest."""

    def __init__(self) -> None:
        self.guest: Guest | None = None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=is_delegated)  # stable

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        wanted = [item for item in session.items if is_delegated(item)]
        if wanted and not session.config.option.collectonly:
            self.guest = Guest(session.config, wanted)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if is_delegated(item):
            assert self.guest is not None
            self.guest.replay(item)
            return True
        if nextitem is not None and is_delegated(nextitem):
            # The next test sets nothing up here, so this one is the last to use any fixture.
            item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
            runtestprotocol(item, nextitem=None)
            item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
            return True
        return None

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.guest is not None and self.guest.failed:
            terminalreporter.write_line(f"output of the micro-VM: {self.guest.log}")

    def pytest_unconfigure(self) -> None:
        if self.guest is not None:
            self.guest.close()
            self.guest = None


class GuestPlugin:
    """The guest's side: runs just the tests that were asked for and writes their reports."""

    def __init__(self, folder: Path) -> None:
        self.wanted = {nodeid: n for n, nodeid in enumerate(json.loads((folder / "items.json").read_text()))}
        self.file: TextIO = (folder / "reports.jsonl").open("a")
        self.config: pytest.Config | None = None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self.config = config
        items[:] = sorted((i for i in items if i.nodeid in self.wanted), key=lambda i: self.wanted[i.nodeid])

    def write(self, event: dict[str, Any]) -> None:
        self.file.write(json.dumps(event) + "\n")
        self.file.flush()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        assert self.config is not None
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.write({"event": "report", "nodeid": report.nodeid, "report": data})

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.write({"event": "finish", "nodeid": nodeid})


def pytest_configure(config: pytest.Config) -> None:
    plugin = GuestPlugin(Path(os.environ["DATAPLANE_GUEST_EXCHANGE"])) if IN_GUEST else HostPlugin()
    config.pluginmanager.register(plugin, "dataplane-guest")


def pytest_report_header() -> str:
    if not IS_ROOT:
        where = "nowhere (not root)"
    elif has_ipvs():
        where = f"this kernel ({platform.release()})"
    else:
        version = subprocess.run([MICROVM, *KERNEL_OPTION, "-V"], capture_output=True, text=True, check=False)
        where = f"the micro-VM ({(version.stdout or version.stderr).strip()})"
    return f"ipvs tests run on: {where}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if needs_kernel(item) and not IS_ROOT:
        pytest.skip("needs root")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if REQUIRED and report.skipped and not hasattr(report, "wasxfail") and needs_kernel(item):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{reason} (with DATAPLANE_REQUIRE_KERNEL=1 a skip is a failure)"
    return report
