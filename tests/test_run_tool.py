"""Starting other programs: what reaches them and what comes back."""

import itertools
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataplane.errors import PreflightError, ToolError
from dataplane.run_tool import last_words, run_tool


def test_stdout_comes_back_and_input_goes_in() -> None:
    assert run_tool(["cat"], input="vip 10.0.1.175 – ü\n") == "vip 10.0.1.175 – ü\n"


def test_without_input_a_program_that_reads_ends_at_once() -> None:
    assert run_tool(["cat"], timeout=5) == ""


def test_input_in_pieces_is_read_while_it_is_made() -> None:
    lines = [f"{number} – ü\n" for number in range(300_000)]  # more than a pipe holds, either way
    assert run_tool(["cat"], input=iter(lines)) == "".join(lines)
    assert run_tool(["cat"], input=()) == ""


def test_a_program_that_ends_before_it_has_read_all_tells_why() -> None:
    with pytest.raises(ToolError, match=r"status 3: line 1 is wrong$"):
        run_tool(["sh", "-c", "read line; echo line 1 is wrong >&2; exit 3"], input=itertools.repeat("line\n"))


def test_input_that_cannot_be_made_never_seems_to_be_at_its_end(tmp_path: Path) -> None:
    def broken() -> Iterator[str]:
        yield "line\n" * 500_000
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        run_tool(["sh", "-c", f"cat >/dev/null; touch {tmp_path}/end"], input=broken())
    assert not list(tmp_path.iterdir())


def test_a_program_that_does_not_read_meets_the_time_limit() -> None:
    started = time.monotonic()
    with pytest.raises(ToolError, match=r"not finished after 0\.2 s"):
        run_tool(["sleep", "30"], input=itertools.repeat("line\n"), timeout=0.2)
    assert time.monotonic() - started < 5


def test_no_shell_reads_the_arguments() -> None:
    assert run_tool(["echo", "$HOME; `id` && *"]) == "$HOME; `id` && *\n"


def test_the_environment_is_ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("LD_PRELOAD_LIKE", "x")
    lines = run_tool(["env"]).splitlines()
    assert "LC_ALL=C" in lines
    assert {line.split("=")[0] for line in lines} <= {"LC_ALL", "PATH", "PWD", "SHLVL", "_"}


def test_a_failure_tells_the_last_words() -> None:
    with pytest.raises(ToolError, match=r"^sh -c .*: status 3: no such table; sorry$"):
        run_tool(["sh", "-c", "echo no such table >&2; echo sorry >&2; exit 3"])


def test_a_signal_is_told_as_one() -> None:
    with pytest.raises(ToolError, match="signal 9: it said nothing"):
        run_tool(["sh", "-c", "kill -9 $$"])


def test_the_time_limit_ends_the_program() -> None:
    started = time.monotonic()
    with pytest.raises(ToolError, match=r"not finished after 0\.2 s"):
        run_tool(["sleep", "30"], timeout=0.2)
    assert time.monotonic() - started < 5


def test_a_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(PreflightError) as caught:
        run_tool(["nft", "-f", "-"])
    assert caught.value.fix == "apt-get install nftables"
    assert caught.value.exit_code == 5


def test_a_program_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(ToolError, match="cannot be started: Permission denied"):
        run_tool(["cat"])


def test_last_words_are_one_printable_line_of_limited_length() -> None:
    said = last_words(b"start " + b"x" * 2000 + b"\nthe \x1b[31mend\x00\xff\n")
    assert said.startswith("...")
    assert said.endswith("the \\x1b[31mend\\x00�")
    assert said.isprintable()
    assert len(said) < 700
    assert last_words(b" \n") == "it said nothing"
