"""What a kube-proxy has left in the kernel, in all of its modes: found, told in the tools' words, and removed.

Its chains in both families and both back ends of iptables, its nftables tables, its virtual servers, its device and its
ipsets. What our own ledgers say is ours is never among it, nor what others' rules lead to (`kube_proxy_rules`). Network
namespace: that of the calling thread.
"""

import errno
from collections.abc import Callable, Iterator
from functools import partial

from msgspec import Struct

from . import netlink_nftables as nft
from .errors import DataplaneError, KernelError, PreflightError, ToolError
from .ipvs_guard import Guard
from .ipvs_messages import DEL_SERVICE, FAMILY_NAME, Encoder, decode_server
from .kube_proxy_rules import SETS, Doomed, ServedSets, doomed, its_servers, served
from .model import Address, Family, VirtualAddress, VirtualServer, format_endpoint
from .netlink_route import DEVICE, Owner, VipDevice, addresses_by_link
from .netlink_socket import NETLINK_GENERIC, NETLINK_NETFILTER, NETLINK_ROUTE, NetlinkSocket, resolve_family
from .nft_clients import Clients
from .run_iptables import Tools, has_legacy_tables
from .run_tool import run_tool
from .show_text import plural

TABLE = "kube-proxy"
FAMILIES = {Family.IPV4: "ip", Family.IPV6: "ip6"}
_OPTION = {6: "-t", 17: "-u", 132: "--sctp-service"}


class Rules(Struct, frozen=True):
    """Rules and chains of one table in one back end of iptables."""

    tools: Tools
    doomed: Doomed


class Leftovers(Struct, frozen=True):
    """All of it; empty when there is none."""

    rules: tuple[Rules, ...] = ()
    tables: tuple[Family, ...] = ()
    servers: tuple[VirtualAddress, ...] = ()
    device: bool = False
    sets: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    """What could not be looked at, and why."""

    @property
    def anything(self) -> bool:
        """Whether something would go."""
        led = any(each.doomed.chains or each.doomed.jumps for each in self.rules)
        return bool(led or self.tables or self.servers or self.device or self.sets)

    @property
    def summary(self) -> list[str]:
        """What would go, in words, one part each."""
        counted: dict[str, int] = {}
        for each in self.rules:
            if each.doomed.chains or each.doomed.jumps:
                name = f"{each.tools.prefix.partition('-')[0]} chains ({each.tools.flavour})"
                counted[name] = counted.get(name, 0) + len(each.doomed.chains)
        parts = [f"{count} {name}" for name, count in counted.items()]
        parts += [f"its table {FAMILIES[family]} {TABLE}" for family in self.tables]
        parts += [plural(len(self.servers), "IPVS virtual server")] if self.servers else []
        parts += [f"its device {DEVICE}"] if self.device else []
        parts += [plural(len(self.sets), "ipset")] if self.sets else []
        return parts

    @property
    def kept(self) -> list[str]:
        """Chains that stay, since rules of others lead to them."""
        return [
            f"{each.tools.prefix}: {each.doomed.table} {chain} stays: a rule of somebody else leads to it"
            for each in self.rules
            for chain in each.doomed.kept
        ]

    def plan(self) -> str:
        """What removing them does, in the words of the tools that could do it."""
        parts = []
        for each in self.rules:
            if each.doomed.chains or each.doomed.jumps:
                parts.append(f"# {each.tools.command}\n{each.doomed.script()}")
        parts += [f"# nft\ndelete table {FAMILIES[family]} {TABLE}\n" for family in self.tables]
        if self.servers:
            lines = (f"-D {_OPTION[at.protocol]} {format_endpoint(at.address, at.port)}\n" for at in self.servers)
            parts.append("# ipvsadm -R\n" + "".join(lines))
        parts += [f"# ip\nlink delete {DEVICE}\n"] if self.device else []
        parts += ["# ipset restore\n" + "".join(f"destroy {name}\n" for name in self.sets)] if self.sets else []
        return "".join(parts)


def find() -> Leftovers:
    """Look everywhere; writes nothing. NotRoot for who may not look."""
    unread: list[str] = []
    with (
        NetlinkSocket(NETLINK_NETFILTER) as netfilter,
        NetlinkSocket(NETLINK_ROUTE) as route,
        NetlinkSocket(NETLINK_GENERIC) as generic,
    ):
        tables = tuple(family for family in FAMILIES if nft.has_table(netfilter, family, TABLE))
        rules = tuple(_rules(unread))
        text = _saved_sets(unread)
        device = VipDevice(route)
        foreign = device.owner() is Owner.FOREIGN
        servers = _servers(generic, netfilter, served(text), device.bound() if foreign else set(), route)
    names = sorted({line.split()[1] for line in text.splitlines() if line.startswith("create ")} & SETS)
    return Leftovers(rules, tables, tuple(servers), foreign, tuple(names), tuple(unread))


def _rules(unread: list[str]) -> Iterator[Rules]:
    for family in FAMILIES:
        for choice in ("nft", "legacy"):
            if choice == "legacy" and not has_legacy_tables(family):
                continue  # looking would make them
            tools = Tools(family, choice)
            try:
                found = doomed(tools.save())
            except (PreflightError, ToolError) as error:
                if choice == "legacy":  # it has tables
                    unread.append(f"{tools.prefix}: {error}")
                continue  # without the tool, or without that kind of tables in this kernel
            for each in found:
                yield Rules(tools, each)


def _saved_sets(unread: list[str]) -> str:
    try:
        return run_tool(["ipset", "save"])
    except PreflightError:
        unread.append("ipsets: the program ipset is not installed (apt-get install ipset)")
    except ToolError:
        pass  # no ipset in this kernel
    return ""


def _servers(
    generic: NetlinkSocket, netfilter: NetlinkSocket, said: ServedSets, bound: set[Address], route: NetlinkSocket
) -> list[VirtualAddress]:
    if not (said.at or said.node_ports or bound):
        return []
    encoder = _encoder(generic)
    if encoder is None:
        return []
    guard = Guard(netfilter, Clients())
    ours = guard.observe().addresses() if guard.exists() else set()
    entries = map(decode_server, generic.dump(encoder.get_servers()))
    there = [entry.server.at for entry in entries if not entry.fwmark]
    return its_servers(there, said, bound, addresses_by_link(route), ours)


def _encoder(generic: NetlinkSocket) -> Encoder | None:
    try:
        return Encoder(resolve_family(generic, FAMILY_NAME))
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise
    return None  # no IPVS


def remove(found: Leftovers) -> list[str]:
    """Remove it, one kind after the other; what failed, in words. What has gone in between is no failure."""
    failed: list[str] = []

    def tried(what: str, do: Callable[[], object]) -> None:
        try:
            do()
        except (DataplaneError, OSError) as error:
            failed.append(f"{what}: {error}")

    for each in found.rules:
        if each.doomed.chains or each.doomed.jumps:
            script = each.doomed.script()
            tried(f"{each.tools.prefix}: table {each.doomed.table}", partial(each.tools.restore, script))
    with NetlinkSocket(NETLINK_NETFILTER) as netfilter:
        for family in found.tables:
            message = nft.delete_table(family, TABLE)
            tried(f"table {FAMILIES[family]} {TABLE}", partial(nft.commit, netfilter, [message]))
    if found.servers:
        tried("virtual servers", partial(_remove_servers, found.servers, failed))
    if found.device:
        tried(DEVICE, partial(run_tool, ["ip", "link", "delete", DEVICE]))
    for name in found.sets:
        tried(f"ipset {name}", partial(run_tool, ["ipset", "destroy", name]))
    return failed


def _remove_servers(servers: tuple[VirtualAddress, ...], failed: list[str]) -> None:
    with NetlinkSocket(NETLINK_GENERIC) as generic:
        encoder = _encoder(generic)
        if encoder is None:
            return
        for failure in generic.batch(encoder.server(DEL_SERVICE, VirtualServer(at)) for at in servers):
            if failure.errno != errno.ESRCH:
                failed.append(f"a virtual server: {failure.text or errno.errorcode.get(failure.errno, '')}")
