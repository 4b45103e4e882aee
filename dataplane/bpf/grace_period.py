"""Waiting until no program that runs now is still running, without holding anybody up.

Programs run between rcu_read_lock() and its end, so a grace period of RCU is what to wait for. membarrier(2),
MEMBARRIER_CMD_GLOBAL, is synchronize_rcu(): tens of milliseconds, so a thread of its own waits. With one processor it
returns at once, and some kernels refuse it (nohz_full): therefore some time passes in any case.
"""

import ctypes
import os
import threading
import time

_NUMBERS = {"x86_64": 324, "aarch64": 283}
_GLOBAL = 1
WITH_BARRIER, WITHOUT_BARRIER = 1.0, 60.0
"""Seconds that pass at least. Far more than a program of some hundred instructions takes, even preempted; and more than
the time after which the kernel itself reports a stalled reader (21 s), where nothing but time is to be had."""


class GracePeriod:
    """One grace period, from now on; `over()` tells when it has passed."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._least = WITHOUT_BARRIER
        self._thread = threading.Thread(target=self._wait, name="grace-period", daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        number = _NUMBERS.get(os.uname().machine)
        if number is not None and ctypes.CDLL(None).syscall(number, _GLOBAL, 0, 0) == 0:
            self._least = WITH_BARRIER

    def over(self) -> bool:
        """Every program that ran when this began has ended."""
        return not self._thread.is_alive() and time.monotonic() - self._began >= self._least
