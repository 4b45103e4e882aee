"""Every error this program raises on purpose; the class says whose fault it is, and so which exit code it gets.

DataplaneError
├── UsageError        the command line is wrong                                      exit 2
├── InputError        a manifest or configuration is wrong: carries Problems         exit 3
├── PreflightError    this machine lacks something: carries the fix                  exit 5
├── AgentUnreachable  no agent answers in this network namespace                     exit 6
├── NotRoot           the kernel refused us for want of a capability                 exit 7
├── KernelError       the kernel refused a request: operation, object, errno         exit 1
│   └── Unanswered    no answer within the deadline, or answers were lost: look again
├── WireError         bytes from the kernel do not follow their declaration          exit 1
├── ToolError         a program we called (modprobe, nft) failed                     exit 1
├── ApiError          the Kubernetes API refused, broke off or cannot be reached     exit 1
└── ProbeUnavailable  no BPF program can count hits here: carries the reason        exit 1
"""

import errno as _errno
import os
from collections.abc import Sequence


class DataplaneError(Exception):
    """Base of all errors of this package."""

    exit_code = 1


class UsageError(DataplaneError):
    """The command line asks for something that makes no sense."""

    exit_code = 2


class InputError(DataplaneError):
    """Input that cannot be used; `problems` print one per line (`model.Problem`)."""

    exit_code = 3

    def __init__(self, problems: Sequence[object]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


class PreflightError(DataplaneError):
    """The machine lacks something the chosen mode needs; `fix` is the command or setting that helps."""

    exit_code = 5

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(f"{reason}; fix: {fix}" if fix else reason)
        self.reason = reason
        self.fix = fix


class AgentUnreachable(DataplaneError):
    """No agent listens in this network namespace."""

    exit_code = 6


class NotRoot(DataplaneError):
    """The caller lacks the capability (CAP_NET_ADMIN) that the operation needs."""

    exit_code = 7


class ToolError(DataplaneError):
    """An external program failed; the message holds its last words."""


class WireError(DataplaneError):
    """A message does not follow its declaration: names the set, the attribute and the offset."""


class ApiError(DataplaneError):
    """A request to the Kubernetes API failed; `status` is its HTTP status, 0 when there was none.

    `retry_after`: seconds that the server asks to wait.
    """

    def __init__(self, reason: str, status: int = 0, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.status = status
        self.retry_after = retry_after


class ProbeUnavailable(DataplaneError):
    """This kernel, or what we may do, allows no probe; the mode's own counters are all there is."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class KernelError(DataplaneError):
    """The kernel refused `operation` on `subject`.

    `errno` is the positive errno; `hint` is what that errno means for this operation.
    """

    def __init__(self, operation: str, subject: str, errno: int, hint: str = "") -> None:
        name = _errno.errorcode.get(errno, str(errno))
        told = f"{operation} {subject}".strip() + f": {os.strerror(errno)} ({name})"
        super().__init__(f"{told}: {hint}" if hint else told)
        self.operation = operation
        self.subject = subject
        self.errno = errno
        self.hint = hint


class Unanswered(KernelError):
    """The outcome is unknown (deadline passed, or ENOBUFS swallowed answers): observe again."""
