"""What the system tells of a process: its processor time, its memory, and whether it has said a word."""

import os
import re
import subprocess
import time
from pathlib import Path

from .isolation import RunFailed


def processor_time(pid: int, *, tools: bool) -> float:
    """Seconds in user and kernel mode (proc(5)); `tools`: with the programs that it has run to their end."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11 : 15 if tools else 13])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> tuple[float, float]:
    """Resident, and the most that it was, in MiB."""
    found = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()))
    return int(found["VmRSS"]) / 1024, int(found["VmHWM"]) / 1024


def until_told(process: "subprocess.Popen[bytes]", log: Path, word: bytes, seconds: float, pause: float) -> None:
    """Wait until an agent's log has a word, looked at with such a pause."""
    limit = time.monotonic() + seconds
    while word not in log.read_bytes():
        if process.poll() is not None or time.monotonic() > limit:
            raise RunFailed(f"the agent did not get ready: {log.read_bytes()[-2000:].decode(errors='replace')}")
        time.sleep(pause)
