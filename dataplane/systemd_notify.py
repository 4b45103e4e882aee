"""What the service manager is told, by sd_notify(3), the protocol of systemd and others: ready, alive, stopping.

One datagram of `KEY=value` lines to the socket that `NOTIFY_SOCKET` names; without it there is nobody to tell. A
service manager that cannot be reached is no reason to stop working, so nothing here raises for that.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, MutableMapping

from .printable import printable

PING_MOST = 15.0
"""Seconds between two signs of life at most, so that one call of the longest deadline fits into the rest of a watchdog
of that deadline and a little more (`deploy/systemd/dataplane.service`)."""
PINGS = 3
"""Signs of life in one watchdog time, at least."""


class ServiceManager:
    """The service manager at `address` ("" = none; a leading @ = an abstract socket).

    `watchdog_seconds`: how long it waits for a sign of life; 0 = it does not.
    """

    def __init__(
        self, address: str = "", watchdog_seconds: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._clock = clock
        self._every = min(watchdog_seconds / PINGS, PING_MOST) if address else 0.0
        self._reloading = False
        self.due: float | None = clock() + self._every if self._every else None
        """When the next sign of life is due, by the monotonic clock; None = none is asked for."""

    def ready(self, status: str) -> None:
        """The first sync is done, or a reload has ended; `status` is what `systemctl status` shows."""
        self._reloading = False
        self._tell(f"READY=1\nSTATUS={printable(status, 200)}")

    def waiting(self, status: str) -> None:
        """Not ready yet, and why."""
        self._tell(f"STATUS={printable(status, 200)}")

    def reloading(self) -> None:
        """Everything is being read again. systemd compares the time with that of its signal (Type=notify-reload)."""
        self._reloading = True
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def reloaded(self, status: str) -> None:
        """A reload, if there was one, has ended."""
        if self._reloading:
            self.ready(status)

    def stopping(self) -> None:
        """The end has begun."""
        self._tell("STOPPING=1\nSTATUS=stopping; the kernel stays as it is")

    def alive(self) -> None:
        """A sign of life, if one is due. Called by the loop that does the work, so that a stuck one is noticed."""
        if self.due is not None and self._clock() >= self.due:
            self.due = self._clock() + self._every
            self._tell("WATCHDOG=1")

    def _tell(self, text: str) -> None:
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)  # a service manager that does not read must not stop us
            sock.sendto(text.encode(), self._address)


def take_service_manager(environment: MutableMapping[str, str] = os.environ) -> ServiceManager:
    """The service manager of the environment, which loses the variables: our own children are not to speak for us."""
    address = environment.pop("NOTIFY_SOCKET", "")
    microseconds, pid = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", "")
    if not address.startswith(("/", "@")):  # vsock and others: of virtual machines and containers, not of a service
        address = ""
    ours = pid in ("", str(os.getpid()))
    watchdog = int(microseconds) / 1e6 if ours and microseconds.isascii() and microseconds.isdigit() else 0.0
    return ServiceManager(address, watchdog)
