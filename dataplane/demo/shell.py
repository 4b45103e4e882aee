"""`dataplane demo --shell`: the demo's machines with nothing told about them, and a shell in the node to try things in.

The commands `client`, `pod1` … run their arguments in the other machines, so that the guided tour (docs/tour.md) can be
walked by typing what stands in it. A shell that is not on a terminal reads its commands from stdin: so tests walk it.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from ..run_tool import run_tool
from .stage import Stage, build_stage, ended, environment
from .tutorial import Tutorial

PROMPT = "node# "
END_SECONDS = 10
"""How long programs that the shell has left behind may take to end."""


def run_shell(tutorial: Tutorial) -> int:
    """Open the shell; its exit status. Leaving it ends what still runs in the machines, and takes them away."""
    with (
        tempfile.TemporaryDirectory(prefix="dataplane-demo-") as folder,
        build_stage(tutorial.pods, needs_dummy=False) as stage,
    ):
        stage.folder = Path(folder)
        (stage.folder / "hostnames.yaml").write_text(tutorial.text)
        bin_folder = _write_commands(stage, stage.folder / ".bin")
        try:
            return _shell(stage, bin_folder, {**environment(), "PATH": f"{bin_folder}:{environment()['PATH']}"})
        finally:
            _end_programs(stage)


def _write_commands(stage: Stage, folder: Path) -> Path:
    """One script for each machine, and one for this very program."""
    folder.mkdir()
    scripts = {where: ["exec", "ip", "netns", "exec", stage.namespace(where)] for where in stage.names}
    scripts["dataplane"] = ["exec", sys.executable, "-m", "dataplane"]
    for name, words in scripts.items():
        script = folder / name
        script.write_text(f'#!/bin/sh\n{shlex.join(words)} "$@"\n')
        script.chmod(0o755)
    (folder / "bashrc").write_text(f"PS1={shlex.quote(PROMPT)}\n")
    return folder


def _shell(stage: Stage, bin_folder: Path, variables: Mapping[str, str]) -> int:
    interactive = sys.stdin.isatty()
    if interactive:
        others = ", ".join(f"`{name}`" for name in stage.names if name != "node")
        print(
            "This shell is in the node; its manifest is hostnames.yaml. Behind one of the words\n"
            f"{others} a command runs there: `client curl 10.244.3.6:9376`.\n"
            "`exit` takes everything away again.",
            flush=True,
        )
    options = ["--rcfile", str(bin_folder / "bashrc"), "-i"] if interactive else ["--noprofile"]
    process = subprocess.Popen(
        ["ip", "netns", "exec", stage.namespace("node"), "bash", *options],
        cwd=stage.folder,
        env=dict(variables),
        text=True,
    )
    with ended(process):
        try:
            return process.wait()
        except BaseException:
            process.send_signal(signal.SIGHUP)  # a shell on a terminal does not end by SIGTERM
            raise


def _end_programs(stage: Stage) -> None:
    """End what was started in the machines and still runs, such as an agent in the background."""
    deadline = time.monotonic() + END_SECONDS
    number = signal.SIGTERM
    while running := _running(stage):
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if time.monotonic() > deadline:
            number = signal.SIGKILL
        if time.monotonic() > deadline + END_SECONDS:
            return  # not even killed: it hangs in the kernel, and nothing here helps
        time.sleep(0.1)


def _running(stage: Stage) -> list[int]:
    found = [run_tool(["ip", "netns", "pids", stage.namespace(where)]) for where in stage.names]
    return [int(word) for text in found for word in text.split() if int(word) != os.getpid()]
