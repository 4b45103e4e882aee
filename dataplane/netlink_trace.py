"""Real packets traced by nf_tables: a table of our own for a moment, and the kernel's news of it (NFNLGRP_NFTRACE)."""

import errno
import os
from pathlib import Path

from . import netlink_nftables as netlink
from .errors import KernelError
from .netlink_socket import NETLINK_NETFILTER, NetlinkSocket
from .nft_trace import PREFIX, UNTOLD, RuleKey, RuleTold, Tracer, owner_of, rule_told, script, table_name
from .nftables_messages import BODY, INET, Message, RuleAttrs, TableAttrs, request
from .run_tool import run_tool
from .sightings import Look, Sighting

GROUP = 9  # NFNLGRP_NFTRACE


class PacketTrace:
    """`sightings.Witness` by nftrace. Also takes away what a killed trace has left."""

    name = "nftables trace (nft monitor trace)"
    blind = ""

    def __init__(self, wanted: Look) -> None:
        self._sock = NetlinkSocket(NETLINK_NETFILTER)
        self._news = NetlinkSocket(NETLINK_NETFILTER, groups=(GROUP,))
        self._table = table_name(os.getpid(), started(os.getpid()) or 0)
        remove_leftovers(self._sock)
        self._rules: dict[RuleKey, RuleTold] = {}
        self._tracer = Tracer(wanted, self._table, self._rule)
        run_tool(["nft", "-f", "-"], input=script(self._table, wanted))

    def fileno(self) -> int:
        """Readable when the kernel tells of a packet."""
        return self._news.fileno()

    def read(self) -> list[Sighting]:
        """Packets that have come to their end."""
        notes, lost = self._news.notifications()
        if lost:
            self.blind = "the kernel had more to tell than was read in time: some packets are missing"
        return self._tracer.take(notes)

    def finish(self) -> list[Sighting]:
        """Packets of whose end nothing was told."""
        return self._tracer.finish()

    def _rule(self, key: RuleKey) -> RuleTold:
        """What is worth saying of a rule, looked up when a packet has met it: there may be very many."""
        if key not in self._rules:
            family, table, chain, handle = key
            asked = RuleAttrs.encode(table=table, chain=chain, handle=handle)
            try:
                answer = self._sock.get(request(Message.GETRULE, family, asked), "look up a rule of", chain)
            except KernelError:
                return UNTOLD  # gone already
            values = RuleAttrs.decode(answer, BODY)
            self._rules[key] = rule_told(values.get("expressions", b""), values.get("userdata", b""))
        return self._rules[key]

    def close(self) -> None:
        """Remove the table."""
        try:
            _delete(self._sock, self._table)
        finally:
            self._news.close()
            self._sock.close()


def remove_leftovers(sock: NetlinkSocket) -> list[str]:
    """Delete tables of traces whose process is gone; returns their names."""
    gone = leftovers(sock)
    for table in gone:
        _delete(sock, table)
    return gone


def leftovers(sock: NetlinkSocket) -> list[str]:
    """Tables of traces whose process is gone: whoever has its number now began at another time."""
    found = []
    for answer in sock.dump(request(Message.GETTABLE, INET)):
        name = TableAttrs.decode(answer, BODY).get("name", "")
        owner = owner_of(name) if name.startswith(PREFIX) else None
        if owner is not None and started(owner[0]) != owner[1]:
            found.append(name)
    return found


def started(pid: int) -> int | None:
    """When a process began, in the kernel's ticks since boot (proc(5): starttime); None = there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])


def _delete(sock: NetlinkSocket, table: str) -> None:
    try:
        netlink.commit(sock, [netlink.delete_table(INET, table)])
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise
