"""One measurement, one process, one network namespace: nothing of an earlier run is left in either.

The process is a fork, so that everything is imported and warm; the namespace ends with it.
"""

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


def isolated(work: Callable[[], _Result], *, timeout: float = 900.0) -> _Result:
    """The result of `work`, done in a process and a network namespace of its own; RunFailed tells how it failed."""
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
