"""The iptables programs: which back end they are, save, restore, and whose the lock is.

iptables-legacy takes a lock (a file of the whole machine, not of a network namespace) and replaces whole tables;
iptables-nft has no lock and writes nf_tables. One host may have both, and packets then meet the tables of both.
"""

import contextlib
import errno
from collections.abc import Iterable
from pathlib import Path

from .errors import KernelError, NotRoot, PreflightError, ToolError, Unanswered
from .iptables_save import Table, parse_save
from .iptables_text import MARKER
from .model import Family
from .netlink_nftables import read_chains
from .netlink_socket import NETLINK_NETFILTER, NetlinkSocket
from .run_tool import run_tool

LOCK_SECONDS = 5
"""How long iptables-legacy waits for its lock, as kube-proxy has it; iptables-nft has no lock."""
LOCK_FILE = Path("/run/xtables.lock")
RESTORE_SECONDS, SAVE_SECONDS = 300.0, 120.0


class Tools:
    """The iptables programs of one family: those the host has chosen, or of one back end."""

    def __init__(self, family: Family, choice: str) -> None:
        self._family = family
        self.prefix = ("iptables" if family is Family.IPV4 else "ip6tables") + (f"-{choice}" if choice else "")
        self._flavour = ""

    @property
    def flavour(self) -> str:
        """`legacy` or `nft`: which tables of the kernel the programs write."""
        if not self._flavour:
            self._flavour = "nft" if "nf_tables" in self.version else "legacy"
        return self._flavour

    @property
    def version(self) -> str:
        """As the program tells it: `iptables v1.8.9 (nf_tables)`."""
        return self._run("-restore", "--version", timeout=10).strip()

    @property
    def command(self) -> str:
        """How a restore is called, for people."""
        return f"{self.prefix}-restore ({self.flavour}) --noflush -w {LOCK_SECONDS}"

    def save(self) -> dict[str, Table]:
        """All tables that there are; a table that is not there is not made by looking."""
        return parse_save(self._run("-save", "-c", timeout=SAVE_SECONDS))

    def owned(self) -> bool:
        """Whether our marker stands in one of the tables; a process is started for legacy tables only."""
        if self.flavour == "legacy":
            return has_legacy_tables(self._family) and any(table.owned for table in self.save().values())
        with NetlinkSocket(NETLINK_NETFILTER) as sock:
            return any(
                chain.name == MARKER for table in ("nat", "filter") for chain in read_chains(sock, self._family, table)
            )

    def restore(self, text: str | Iterable[str], *, counters: bool = False) -> None:
        """Apply restore text, which is atomic per section of a table: what has no COMMIT changes nothing."""
        flags = ["--noflush", "-w", str(LOCK_SECONDS), *(["--counters"] if counters else [])]
        self._run("-restore", *flags, input=text, timeout=RESTORE_SECONDS)

    def _run(self, suffix: str, *arguments: str, input: str | Iterable[str] = "", timeout: float) -> str:  # noqa: A002
        program = self.prefix + suffix
        try:
            return run_tool([program, *arguments], input=input, timeout=timeout)
        except PreflightError as error:
            raise PreflightError(error.reason, "apt-get install iptables") from None
        except ToolError as error:
            told = str(error)
            if "xtables lock" in told:
                hint = f"{_lock_holder()} holds the lock {LOCK_FILE}; waited {LOCK_SECONDS} s"
                raise KernelError("run", program, errno.EBUSY, hint) from None
            if "not finished after" in told:
                raise Unanswered("run", program, errno.ETIMEDOUT, told) from None
            if "you must be root" in told or "Permission denied" in told:
                raise NotRoot(told) from None
            raise


def _lock_holder() -> str:
    """Who holds the lock of iptables-legacy, as /proc/locks tells it."""
    with contextlib.suppress(OSError, IndexError):
        inode = LOCK_FILE.stat().st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[5].endswith(f":{inode}"):
                return f"pid {words[4]} ({Path('/proc', words[4], 'comm').read_text().strip()})"
    return "another program"


def has_legacy_tables(family: Family) -> bool:
    """iptables-legacy has tables of those we use in this namespace; looking with the program would make them."""
    file = Path("/proc/thread-self/net", f"{'ip' if family is Family.IPV4 else 'ip6'}_tables_names")
    try:
        return not {"nat", "filter"}.isdisjoint(file.read_text().split())
    except OSError:
        return False
