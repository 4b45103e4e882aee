"""Kernel settings under /proc/sys, and those the ipvs mode wants.

Most of them belong to a network namespace; the files show the calling thread's. What cannot be written (a container, a
read-only /proc) is reported and never fatal: the caller decides what it means for health. A value the administrator set
higher is never lowered.
"""

import errno
import platform
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/proc/sys")
_MISSING = "this kernel has no such setting"

Kernel = tuple[int, int]
"""Major and minor version."""

_PART = r"[A-Za-z0-9_@:-]+(?:/[A-Za-z0-9_@:-]+)*"
_NAME = re.compile(rf"{_PART}(?:\.{_PART})+")


def _path(name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a sysctl name")
    return ROOT / name.translate(str.maketrans("./", "/."))  # as sysctl(8): a/b stands for an interface named a.b


def read(name: str) -> int | None:
    """The number a setting holds; None where this kernel has no such setting, or does not let us see it."""
    path = _path(name)
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def write(name: str, value: int) -> str:
    """Set it; returns why that failed, or ""."""
    path = _path(name)
    try:
        path.write_text(f"{value}\n")
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EACCES) and not path.exists():  # procfs refuses to make files
            return _MISSING
        return (error.strerror or str(error)).lower()
    return ""


class Change(NamedTuple):
    """What became of one wanted setting."""

    name: str
    wanted: int
    before: int | None
    """None: it could not be read."""
    after: int | None
    error: str = ""
    """Why it does not hold what is wanted; "" = it does."""

    @property
    def changed(self) -> bool:
        """Whether we wrote a new value, which `restore` can take back."""
        return self.before != self.after

    def __str__(self) -> str:
        if self.error:
            return f"{self.name} = {self.wanted}: {self.error}"
        return f"{self.name} = {self.after}" + (f" (was {self.before})" if self.changed else "")


def raise_to(name: str, value: int) -> Change:
    """Set it unless it is at least `value` already."""
    before = read(name)
    return _settle(name, value, before, before is not None and before >= value)


def _settle(name: str, value: int, before: int | None, holds: bool) -> Change:
    if before is None:
        return Change(name, value, None, None, _MISSING)
    if holds:
        return Change(name, value, before, before)
    error = write(name, value)
    return Change(name, value, before, before if error else value, error)


def _always(_: Kernel) -> bool:
    return True


class Wanted(NamedTuple):
    """One setting a mode wants, why, and on which kernels."""

    name: str
    value: int
    why: str
    applies: Callable[[Kernel], bool] = _always
    exact: bool = False
    """The value itself is wanted, not at least that much: for settings where 0 is the wish."""


IPVS_SYSCTLS = (
    Wanted("net.ipv4.ip_forward", 1, "packets to a VIP leave for real servers on other machines"),
    Wanted("net.ipv4.vs.conntrack", 1, "masquerade and the guard's rules see IPVS connections through conntrack"),
    Wanted("net.ipv4.vs.expire_nodest_conn", 1, "connections to a removed real server end at once"),
    Wanted("net.ipv4.vs.expire_quiescent_template", 1, "sticky clients leave a real server that drains (weight 0)"),
    Wanted(
        "net.ipv4.vs.conn_reuse_mode",
        0,
        "a reused client port costs a second on kernels 4.1 to 5.8 (kubernetes/kubernetes#81775)",
        applies=lambda kernel: (4, 1) <= kernel < (5, 9),
        exact=True,
    ),
)
"""What kube-proxy sets in ipvs mode. IPv6 forwarding is not among them, as there: switching it on makes the node ignore
router advertisements (accept_ra = 1), so that it may lose its own default route. `REPORTED_SYSCTLS` is for `doctor`."""

STRICT_ARP_SYSCTLS = (
    Wanted("net.ipv4.conf.all.arp_ignore", 1, "no ARP answers for VIPs: only for addresses of the asked interface"),
    Wanted("net.ipv4.conf.all.arp_announce", 2, "ARP requests never carry a VIP as their sender"),
)
"""kube-proxy's --ipvs-strict-arp."""

REPORTED_SYSCTLS = (
    Wanted(
        "net.ipv6.conf.all.forwarding",
        1,
        "IPv6 VIPs need it; not set by us, since interfaces with accept_ra = 1 then ignore router advertisements",
    ),
)
"""To be checked, never applied, when there are IPv6 VIPs."""


def running_kernel() -> Kernel:
    """The version of the kernel we run on."""
    return kernel_version(platform.release())


def kernel_version(release: str) -> Kernel:
    """(6, 1) of "6.1.0-13-amd64"."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _applicable(wanted: Iterable[Wanted], kernel: Kernel) -> list[Wanted]:
    return [each for each in wanted if each.applies(kernel)]


def _holds(wanted: Wanted, value: int | None) -> bool:
    return value is not None and (value == wanted.value if wanted.exact else value >= wanted.value)


def apply(wanted: Iterable[Wanted], kernel: Kernel) -> list[Change]:
    """Make settings hold; one Change for each that applies to this kernel, also for those that held already."""
    changes = []
    for each in _applicable(wanted, kernel):
        before = read(each.name)
        changes.append(_settle(each.name, each.value, before, _holds(each, before)))
    return changes


def check(wanted: Iterable[Wanted], kernel: Kernel) -> list[Change]:
    """The same without writing: `error` says what is wrong and why it matters."""
    changes = []
    for each in _applicable(wanted, kernel):
        value = read(each.name)
        error = "" if _holds(each, value) else f"{_MISSING if value is None else f'it is {value}'}: {each.why}"
        changes.append(Change(each.name, each.value, value, value, error))
    return changes


def restore(changes: Iterable[Change]) -> list[Change]:
    """Take back what `apply` changed, unless somebody has set another value since; what was written, or failed."""
    restored = []
    for each in changes:
        if each.changed and each.before is not None and read(each.name) == each.after:
            error = write(each.name, each.before)
            restored.append(Change(each.name, each.before, each.after, each.after if error else each.before, error))
    return restored
