"""The one place that starts other programs (nft, modprobe, ipvsadm, iptables-restore).

No shell ever; the C locale, so that what they print can be read by a program; nothing to read on stdin unless it is
given; and a time limit. What a failed program said last travels in the error, escaped and cut: it may quote user text.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import BinaryIO

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


def run_tool(argv: Sequence[str], *, input: str | None = None, timeout: float = 30) -> str:  # noqa: A002
    """Run a program in the calling thread's network namespace and return what it printed on stdout.

    PreflightError when it is not installed, ToolError when it fails or takes longer than `timeout` seconds.
    """
    program = shutil.which(argv[0], path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}")
    if program is None:
        package = PACKAGES.get(argv[0], argv[0])
        raise PreflightError(f"the program {argv[0]} is not installed", f"apt-get install {package}")
    environment = {"LC_ALL": "C", "PATH": SYSTEM_PATH}
    try:
        with _readable(input or "") as stdin:
            done = subprocess.run(
                [program, *argv[1:]],
                stdin=stdin,
                capture_output=True,
                check=False,
                timeout=timeout,
                env=environment,
            )
    except subprocess.TimeoutExpired:
        raise ToolError(f"{' '.join(argv)}: not finished after {timeout:g} s") from None
    except OSError as error:
        raise ToolError(f"{' '.join(argv)}: cannot be started: {error.strerror}") from error
    if done.returncode:
        ended = f"status {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
        raise ToolError(f"{' '.join(argv)}: {ended}: {last_words(done.stderr or done.stdout)}")
    return done.stdout.decode("utf-8", "replace")


def _readable(text: str) -> BinaryIO:
    """The text as a file in memory: through a pipe 16 MB go in 4,000 pieces, and the program waits for each."""
    file = os.fdopen(os.memfd_create("input"), "w+b")
    file.write(text.encode())
    file.seek(0)
    return file


def last_words(output: bytes) -> str:
    """The end of what a program printed, in one printable line."""
    text = output.decode("utf-8", "replace").strip()
    cut = text if len(text) <= LAST_WORDS else "..." + text[-LAST_WORDS:]
    lines = (line.strip() for line in cut.splitlines())
    joined = "; ".join(line for line in lines if line)
    return printable(joined, 2 * LAST_WORDS) or "it said nothing"
