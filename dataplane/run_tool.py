"""The one place that starts other programs (nft, modprobe, ipvsadm, iptables-restore).

No shell ever; the C locale, so that what they print can be read by a program; nothing to read on stdin unless it is
given; and a time limit. What a failed program said last travels in the error, escaped and cut: it may quote user text.
"""

import contextlib
import fcntl
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, BinaryIO

from .errors import PreflightError, ToolError
from .printable import printable

PACKAGES = {
    "conntrack": "conntrack",
    "ip": "iproute2",
    "iptables-restore": "iptables",
    "iptables-save": "iptables",
    "ip6tables-restore": "iptables",
    "ip6tables-save": "iptables",
    "ipvsadm": "ipvsadm",
    "modprobe": "kmod",
    "nft": "nftables",
}
"""Debian's package of each program that is called."""

LAST_WORDS = 600
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # sbin is often missing from PATH


PIPE_BYTES = 1 << 20
"""What may wait for a program that reads while its input is being made (the most that a kernel gives by default)."""
PIECE_CHARACTERS = 1 << 16
NAP_SECONDS = 0.002
"""How long a program is left alone with a full pipe: to be woken for each page that is free again costs more."""


def run_tool(
    argv: Sequence[str],
    *,
    input: str | Iterable[str] | None = None,  # noqa: A002
    timeout: float = 30,
) -> str:
    """Run a program in the calling thread's network namespace and return what it printed on stdout.

    Input in pieces is made while the program reads; when making it fails, the program is killed before it sees an end.
    PreflightError when it is not installed, ToolError when it fails or takes longer than `timeout` seconds.
    """
    program = shutil.which(argv[0], path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}")
    if program is None:
        package = PACKAGES.get(argv[0], argv[0])
        raise PreflightError(f"the program {argv[0]} is not installed", f"apt-get install {package}")
    environment = {"LC_ALL": "C", "PATH": SYSTEM_PATH}
    try:
        if input is None or isinstance(input, str):
            with _readable(input or "") as stdin:
                done = subprocess.run(
                    [program, *argv[1:]],
                    stdin=stdin,
                    capture_output=True,
                    check=False,
                    timeout=timeout,
                    env=environment,
                )
        else:
            done = _run_fed([program, *argv[1:]], input, environment, timeout)
    except subprocess.TimeoutExpired:
        raise ToolError(f"{' '.join(argv)}: not finished after {timeout:g} s") from None
    except OSError as error:
        raise ToolError(f"{' '.join(argv)}: cannot be started: {error.strerror}") from error
    if done.returncode:
        ended = f"status {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
        raise ToolError(f"{' '.join(argv)}: {ended}: {last_words(done.stderr or done.stdout)}")
    return done.stdout.decode("utf-8", "replace")


def _readable(text: str) -> BinaryIO:
    """The text as a file in memory."""
    file = os.fdopen(os.memfd_create("input"), "w+b")
    file.write(text.encode())
    file.seek(0)
    return file


def _run_fed(
    argv: Sequence[str], pieces: Iterable[str], environment: Mapping[str, str], timeout: float
) -> "subprocess.CompletedProcess[bytes]":
    """Run a program that reads what is being made. What it prints goes into files: nobody has to listen meanwhile."""
    deadline = time.monotonic() + timeout
    with (
        _readable("") as stdout,
        _readable("") as stderr,
        subprocess.Popen(
            argv, bufsize=0, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr, env=environment
        ) as process,
        os.fdopen(os.pidfd_open(process.pid), "rb", buffering=0) as ending,
    ):
        poll = select.poll()
        poll.register(ending, select.POLLIN)

        def ended(seconds: float) -> bool:
            """Wait so long for the program to end."""
            left = deadline - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(argv, timeout)
            return bool(poll.poll(1000 * min(seconds, left)))

        assert process.stdin is not None
        try:
            _feed(process.stdin, pieces, ended)
            process.stdin.close()
            while not ended(timeout):
                pass
        except BaseException:
            process.kill()  # before it meets the end of its input
            raise
        status = process.wait()
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(argv, status, stdout.read(), stderr.read())


def _feed(stdin: IO[bytes], pieces: Iterable[str], ended: Callable[[float], bool]) -> None:
    """Write everything; or as much as the program wants, when it ends before that: its status says why."""
    pipe = stdin.fileno()
    with contextlib.suppress(OSError):  # a smaller one does, too
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    os.set_blocking(pipe, False)
    for piece in _sized(pieces):
        rest = memoryview(piece)
        while rest:
            try:
                rest = rest[os.write(pipe, rest) :]
            except BlockingIOError:
                ended(NAP_SECONDS)
            except BrokenPipeError:
                return


def _sized(pieces: Iterable[str]) -> Iterator[bytes]:
    """The pieces in larger ones."""
    waiting, size = [], 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= PIECE_CHARACTERS:
            yield "".join(waiting).encode()
            waiting, size = [], 0
    yield "".join(waiting).encode()


def last_words(output: bytes) -> str:
    """The end of what a program printed, in one printable line."""
    text = output.decode("utf-8", "replace").strip()
    cut = text if len(text) <= LAST_WORDS else "..." + text[-LAST_WORDS:]
    lines = (line.strip() for line in cut.splitlines())
    joined = "; ".join(line for line in lines if line)
    return printable(joined, 2 * LAST_WORDS) or "it said nothing"
