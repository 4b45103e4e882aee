"""One measurement, one process, one network namespace: nothing of an earlier run is left in either.

The process is a fork, so that everything is imported and warm; the namespace ends with it.
"""

import contextlib
import ctypes
import gc
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import TypeVar

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_Result = TypeVar("_Result")


class RunFailed(Exception):
    """A contender failed or left another state than it should."""


def enter_new_namespace() -> None:
    """Put this process into a network namespace of its own."""
    if _libc.unshare(CLONE_NEWNET) != 0:  # os.unshare came with Python 3.12
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), "unshare")
    # as on every node; without any address there is no routing table, and IPVS then takes no real server (EINVAL)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def pin(cpu: int) -> None:
    """Keep this process, and those it starts from now on, on one processor, where it may choose."""
    allowed = sorted(os.sched_getaffinity(0))
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, {allowed[cpu % len(allowed)]})


def isolated(work: Callable[[], _Result], *, timeout: float = 900.0, quiet: bool = False) -> _Result:
    """The result of `work`, done in a process and a network namespace of its own; RunFailed tells how it failed.

    `quiet`: its error is not printed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(readable)
        code = 1
        try:
            signal.alarm(int(timeout))
            gc.collect()
            gc.freeze()
            enter_new_namespace()
            with os.fdopen(writable, "wb") as stream:
                pickle.dump(work(), stream)
            code = 0
        except BaseException:
            if not quiet:
                traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writable)
    with os.fdopen(readable, "rb") as stream:
        data = stream.read()
    _, status = os.waitpid(pid, 0)
    if status != 0 or not data:
        raise RunFailed(f"process ended with {os.waitstatus_to_exitcode(status)}; its error stands above")
    result: _Result = pickle.loads(data)
    time.sleep(0.05)  # the namespace is taken apart by a kernel worker, which shall not run beside the next one
    return result
