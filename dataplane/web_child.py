"""The web server's process beside the agent: the agent listens, and starts it when somebody calls.

The agent holds the listening socket, so that a port in use is its warning and callers queue while the process starts or
is replaced; it serves nobody itself. `dataplane web` (`web/`) is the process; it ends when the agent does
(PR_SET_PDEATHSIG), and what it writes, which is complaints, becomes lines of the agent's log.
"""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from typing import Any, Protocol

from .errors import DataplaneError
from .printable import printable
from .tcp_listener import Listen, open_listener

BUSY_SECONDS = 5.0
"""How often a port that is in use is tried again: kube-proxy's."""
PAUSE_LEAST, PAUSE_MOST = 1.0, 60.0
"""Seconds before a process that ended by itself is replaced."""
STEADY_SECONDS = 60.0
"""A process that lived so long is replaced after the least pause."""
_LINE = 1 << 16


class Log(Protocol):
    """What is needed of a structlog logger."""

    def info(self, event: str, **fields: Any) -> Any: ...
    def warning(self, event: str, **fields: Any) -> Any: ...


class WebChild:
    """Belongs to one event loop, from `start` to `close`. Nothing of it raises, and nothing of it waits."""

    def __init__(self, listen: Listen, log: Log, max_series: int) -> None:
        self._listen = listen
        self._log = log
        self._max_series = max_series
        self._listener: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._output = b""
        self._timer: asyncio.TimerHandle | None = None
        self._pause = PAUSE_LEAST
        self._started = 0.0
        self._trouble = ""

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Listen, now or as soon as the port is free."""
        try:
            self._listener = open_listener(self._listen)
        except DataplaneError as error:
            if str(error) != self._trouble:
                self._log.warning("metrics not served", reason=printable(str(error)))
            self._trouble = str(error)
            self._later(BUSY_SECONDS, self.start)
            return
        if self._trouble or not self._listen.loopback:
            tell = self._log.info if self._listen.loopback else self._log.warning
            reach = "this machine" if self._listen.loopback else "everybody who reaches this address"
            tell("metrics served", address=str(self._listen), to=reach)
        self._trouble = ""
        self._await_caller()

    def _later(self, seconds: float, act: Any) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, act)

    def _await_caller(self) -> None:
        assert self._listener is not None
        asyncio.get_running_loop().add_reader(self._listener.fileno(), self._spawn)

    def _spawn(self) -> None:
        assert self._listener is not None
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener.fileno())
        descriptor = self._listener.fileno()
        # -P: nothing is imported from the directory the agent happens to run in
        command = [sys.executable, "-P", "-m", "dataplane", "web", "--descriptor", str(descriptor)]
        command += ["--of-agent", str(os.getpid()), "--max-series", str(self._max_series)]
        self._started = time.monotonic()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[descriptor],
                process_group=0,  # Ctrl-C is for the agent
            )
        except OSError as error:
            self._ended(printable(str(error)))
            return
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        loop.add_reader(self._process.stdout.fileno(), self._hear)

    def _hear(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            chunk = os.read(self._process.stdout.fileno(), _LINE)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        *lines, self._output = (self._output + chunk).split(b"\n")
        if not chunk or len(self._output) > _LINE:
            lines, self._output = [*lines, self._output], b""
        for line in filter(None, lines):
            self._log.warning("web", said=printable(line.decode(errors="replace"), 2048))
        if not chunk:
            self._ended(f"ended with status {self._reap()}")

    def _reap(self) -> int:
        """Take leave of the process, which has closed its output; its exit status."""
        assert self._process is not None
        process, self._process = self._process, None
        assert process.stdout is not None
        asyncio.get_running_loop().remove_reader(process.stdout.fileno())
        process.stdout.close()
        process.kill()  # normally it is gone already
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
        return process.returncode if process.returncode is not None else -1

    def _ended(self, reason: str) -> None:
        steady = time.monotonic() - self._started >= STEADY_SECONDS
        pause = PAUSE_LEAST if steady else self._pause
        self._pause = min(2 * pause, PAUSE_MOST)
        self._log.warning("web", what="the web server's process ended", reason=reason, again_in_seconds=pause)
        self._later(pause, self._await_caller)

    def close(self) -> None:
        """End the process and stop listening."""
        if self._timer is not None:
            self._timer.cancel()
        if self._process is not None:
            self._reap()
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
