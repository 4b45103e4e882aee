"""ipvs mode: virtual servers over generic netlink, VIPs on kube-ipvs0, and a guard table in front.

Three kernel subsystems make one mode, and there is no transaction across them, so a commit is ordered such that every
prefix of it is safe for traffic (a process may die between any two steps; the next one compares and goes on):

1. guard: ledger entry, VIP and hairpin elements (the ledger says "ours" before the server exists);
2. IPVS: new virtual servers with their real servers, then changes (new real servers before old ones lose weight
   or go);
3. VIPs become local, and the guard sends to IPVS what it shall take in besides (`external`, `inside`): from here on
   clients reach the new servers; then what is no longer needed of these goes;
4. IPVS: virtual servers no longer wanted;
5. guard: entries of what is gone.

IPVS has no owner field. What is ours is written in the guard table's sets, which live and die with the kernel's state.

Addresses that are not the node's (external and load balancer IPs) are not bound, since then the node would answer for
all of their ports: packets to the ports that are ours are marked and delivered (`MarkedDelivery`, made when the first
such server comes). A server for clients inside the cluster is an IPVS server by firewall mark. It cannot be persistent,
as IPVS then keeps the port that was asked for (ip_vs_sched_persist): its clients stay with their endpoint by the
scheduler `mh`, which goes by the client's address.
"""

import contextlib
import errno
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import msgspec
from msgspec import Struct

from . import ipvs_proc_text, ipvsadm_text
from .backend import NO_SETTINGS, Options, Outcome, RealCounters, ServerReport, Transaction
from .drain import DrainKey
from .errors import KernelError, NotRoot, PreflightError, ToolError
from .ipvs_guard import DELIVERED, DELIVERED_MASK, TABLE, Guard
from .ipvs_ledger import INSIDE_MARKS, Elements, Marks, concerns, note, note_all, note_change, seen_server
from .ipvs_messages import (
    COMMAND_NAMES,
    DATA,
    DEL_DEST,
    DEL_SERVICE,
    FAMILY_NAME,
    GET_INFO,
    NEW_DEST,
    NEW_SERVICE,
    SET_CONFIG,
    SET_DEST,
    SET_SERVICE,
    Encoder,
    InfoAttrs,
    RealEntry,
    ServerEntry,
    decode_real,
    decode_real_server,
    decode_server,
    name_message,
)
from .ipvs_path import objects
from .model import Address, Masquerade, NoServers, VirtualAddress, VirtualServer, format_endpoint
from .netlink_conntrack import NewConnections
from .netlink_delivery import MarkedDelivery
from .netlink_nftables import GROUP as NFTABLES_GROUP
from .netlink_nftables import foreign_touches
from .netlink_route import GROUPS as ROUTE_GROUPS
from .netlink_route import VipBinding, VipDevice, VipRoutes
from .netlink_socket import (
    HEADER,
    NETLINK_GENERIC,
    NETLINK_NETFILTER,
    NETLINK_ROUTE,
    Failure,
    NetlinkSocket,
    kernel_error,
    resolve_family,
)
from .nft_clients import Clients, read_detection
from .nftables_messages import INET
from .plan import Change as ServerChange
from .plan import Plan, State
from .procfs_ipvs import ConnectionTable, read_connections
from .procfs_sysctl import IPVS_SYSCTLS, STRICT_ARP_SYSCTLS, Change, apply, check, restore, running_kernel
from .procfs_sysctl import read as read_sysctl
from .run_tool import run_tool
from .sightings import Look, Witness
from .walk import Detection, Remembered, Situation, Stage, Walk

PROC_TABLE = Path("/proc/thread-self/net/ip_vs")  # of the calling thread's network namespace
MODULES = ("ip_vs", "ip_vs_rr", "nf_conntrack", "dummy")

_HINTS = {
    (NEW_SERVICE, errno.ENOENT): "the kernel has no scheduler {scheduler} (module ip_vs_{scheduler})",
    (SET_SERVICE, errno.ENOENT): "the kernel has no scheduler {scheduler} (module ip_vs_{scheduler})",
    (NEW_SERVICE, errno.EAFNOSUPPORT): "the kernel's IPVS has no IPv6 (CONFIG_IP_VS_IPV6)",
    (NEW_SERVICE, errno.EPROTONOSUPPORT): "the kernel's IPVS does not know this protocol (CONFIG_IP_VS_PROTO_*)",
    (NEW_SERVICE, errno.EINVAL): "the kernel does not accept these attributes",
    (NEW_DEST, errno.ERANGE): "a weight must not be negative, a lower threshold not above the upper one",
    (NEW_DEST, errno.EINVAL): "the address is not unicast, or this namespace routes nothing yet: ip link set lo up",
}
# the kernel held something else than we knew; the next look decides, and mostly there is nothing left to do
_SURPRISES = {
    (NEW_SERVICE, errno.EEXIST),
    (NEW_DEST, errno.EEXIST),
    (NEW_DEST, errno.ESRCH),
    (SET_SERVICE, errno.ESRCH),
    (SET_DEST, errno.ESRCH),
    (SET_DEST, errno.ENOENT),
}
_ALREADY_GONE = {(DEL_SERVICE, errno.ESRCH), (DEL_DEST, errno.ESRCH), (DEL_DEST, errno.ENOENT)}


def open_backend(options: Options) -> "IpvsBackend":
    """The backend in the calling thread's network namespace; PreflightError when the kernel has no IPVS."""
    return IpvsBackend(options)


def open_leftover(options: Options) -> "IpvsBackend":
    """The same with VIPs bound as they are here."""
    with NetlinkSocket(NETLINK_ROUTE) as sock:
        routes = not VipDevice(sock).exists() and bool(VipRoutes(sock).bound())
    return IpvsBackend(msgspec.structs.replace(options, vip_binding="routes" if routes else "device"))


BY_HASH = "mh"
"""Scheduler of a server for clients inside the cluster that has affinity."""
_NOTHING = Elements()
"""Of the guard, for the many changes that do not concern it. Never written to."""
_ALL_WELL = Outcome()
FEW = 64
"""Messages that surely fit one send."""


class IpvsTransaction(Struct, frozen=True):
    """A plan with its guard elements; prints as `ipvsadm -R`, `ip -batch` and `nft -f` text in the order of commit."""

    plan: Plan
    guard_add: Elements
    guard_replace: Elements
    guard_open: Elements
    """What leads clients to servers, added when these are there."""
    guard_close: Elements
    guard_remove: Elements
    backend: "IpvsBackend"

    def __str__(self) -> str:
        plan, backend = self.plan, self.backend
        script, marks = backend.guard.script, backend.marks.of
        blocks = [
            ("nft -f -", script(self.guard_add, self.guard_replace)),
            ("ipvsadm -R", "".join(line + "\n" for line in _rules_before(plan, marks))),
            ("ip -batch -", backend.vips.commands(plan.bind, plan.unbind)),
            *(backend.delivery.commands() if self.guard_open.external and not backend.delivers else ()),
            ("nft -f -", script(self.guard_open, self.guard_close)),
            ("ipvsadm -R", "".join(line + "\n" for line in _rules_after(plan, marks))),
            ("nft -f -", script(_NOTHING, self.guard_remove)),
        ]
        return "".join(f"# {tool}\n{text}" for tool, text in blocks if text)


class RealsTransaction(Struct, frozen=True):
    """A plan of nothing but real servers and the hairpin addresses of those on this node."""

    plan: Plan
    backend: "IpvsBackend"

    def __str__(self) -> str:
        plan, backend = self.plan, self.backend
        come, go = Elements(hairpins=set(plan.hairpin_add)), Elements(hairpins=set(plan.hairpin_remove))
        blocks = (
            ("nft -f -", backend.guard.script(come, _NOTHING)),
            ("ipvsadm -R", "".join(line + "\n" for line in _rules_before(plan, backend.marks.of))),
            ("nft -f -", backend.guard.script(_NOTHING, go)),
        )
        return "".join(f"# {tool}\n{text}" for tool, text in blocks if text)


def _rules_before(plan: Plan, marks: Mapping[VirtualAddress, int]) -> Iterator[str]:
    """What `_messages_before` sends, sorted for the reader: between servers the order means nothing."""
    for server in sorted(plan.add, key=lambda each: each.at):
        mark = marks.get(server.at, 0)
        yield ipvsadm_text.server_rule("-A", server, mark)
        for real in server.real_servers:
            yield ipvsadm_text.real_rule("-a", server, real, mark)
    for change in sorted(plan.change, key=lambda each: each.new.at):
        mark = marks.get(change.new.at, 0)
        add, edit, remove = change.reals()
        if _edited(change):
            yield ipvsadm_text.server_rule("-E", change.new, mark)
        for real in add:
            yield ipvsadm_text.real_rule("-a", change.new, real, mark)
        for real in edit:
            yield ipvsadm_text.real_rule("-e", change.new, real, mark)
        for real in remove:
            yield ipvsadm_text.real_rule("-d", change.new, real, mark)


def _rules_after(plan: Plan, marks: Mapping[VirtualAddress, int]) -> Iterator[str]:
    for server in sorted(plan.remove, key=lambda each: each.at):
        yield ipvsadm_text.server_rule("-D", server, marks.get(server.at, 0))


def _edited(change: ServerChange) -> bool:
    """Something IPVS itself keeps of a virtual server differs (label, bound and the like live elsewhere)."""
    old, new = change.old, change.new
    return change.server and (
        old.scheduler != new.scheduler
        or old.flags != new.flags
        or old.persistence != new.persistence
        or old.persistence_prefix != new.persistence_prefix
    )


class IpvsBackend:
    """`backend.Backend` for IPVS."""

    mode = "ipvs"
    drains = True
    shares_affinity = False
    remembers_counts = False
    picks = ""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._route = NetlinkSocket(NETLINK_ROUTE)
        self._netfilter = NetlinkSocket(NETLINK_NETFILTER)
        self._genl = NetlinkSocket(NETLINK_GENERIC)
        self._resolved: Encoder | None = None
        self.renew(options)
        self.vips: VipBinding = VipRoutes(self._route) if options.vip_binding == "routes" else VipDevice(self._route)
        self.delivery = MarkedDelivery(self._route, DELIVERED, DELIVERED_MASK)
        self.delivers = False
        """Some server needs `delivery`, so it has to be there."""
        self.marks = Marks()
        self._monitors: tuple[NetlinkSocket, NetlinkSocket] | None = None
        self._ledger_lost = False
        self._sysctls = IPVS_SYSCTLS + (STRICT_ARP_SYSCTLS if options.strict_arp else ())
        self._before: dict[str, int] = {}
        self._ours: set[VirtualAddress] = set()
        """Servers this process programmed or found in the ledger; so a damaged ledger is no riddle to it."""

    @cached_property
    def _encoder(self) -> Encoder:
        try:
            return Encoder(resolve_family(self._genl, FAMILY_NAME), self.marks.of)
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
            raise PreflightError("this kernel has no IPVS (module ip_vs)", "modprobe ip_vs") from None

    # ------------------------------------------------------------------------------------------------ contract

    def express(self, server: VirtualServer) -> VirtualServer:
        """All of it: IPVS is what the model's words come from. Affinity of a server by mark is its scheduler's."""
        if not server.at.inside:
            return server
        sticky = server.persistence > 0
        return VirtualServer(
            server.at,
            server.real_servers,
            BY_HASH if sticky else server.scheduler,
            0 if sticky else server.flags,
            0,
            32 if sticky else server.persistence_prefix,
            Masquerade.NODE,
            NoServers.REJECT,
            server.bound,
            server.label,
            server.kind,
        )

    def renew(self, options: Options) -> None:
        """Another guard, whose rules the next `prepare` writes; its elements stay."""
        clients = Clients.of(options.detection())
        self._detection: Detection = clients
        """How the guard's rules tell clients: these options say, until the kernel's rules have been read."""
        self.guard = Guard(self._netfilter, clients)

    def present(self) -> bool:
        """Our guard table or our device is there."""
        return self.guard.exists() or VipDevice(self._route).exists()

    def prepare(self, before: Mapping[str, int] = NO_SETTINGS) -> tuple[str, ...]:
        """Load modules, set sysctls, make kube-ipvs0 and the guard table; nothing is written that is there already."""
        _load_modules(lambda: self._encoder)
        lacking = [one for one in check(self._sysctls, running_kernel()) if one.error and one.before is not None]
        made_device = self.vips.ensure()
        # without its ledger the device still proves which VIPs are ours: adopt their servers, traffic goes on
        self._ledger_lost = not self.guard.exists() and not made_device
        made_guard = self.guard.ensure()
        if made_guard:
            self.marks.learn(self.guard.observe().marks)
            self._remove_strays()
        self.delivers = self.delivers or self.guard.has_external()
        if self.delivers:
            self.delivery.ensure()
        # what was there before us is noted before it changes, so that `remove` can put it back whoever runs it
        inherited = {one.name: before[one.name] for one in self._sysctls if one.name in before}
        found = {one.name: one.before for one in lacking if one.before is not None}
        self._before = found | inherited | self._before
        if self._before and (lacking or inherited or made_guard):
            self.guard.commit(Elements(settings=self._before), Elements())
        if any(self._options.timeouts):
            tcp, fin, udp = self._options.timeouts
            request = self._encoder.command(SET_CONFIG, timeout_tcp=tcp, timeout_tcp_fin=fin, timeout_udp=udp)
            self._genl.request(request, "set", "IPVS timeouts")
        return tuple(str(one) for one in apply(self._sysctls, running_kernel()) if one.error)

    def settings(self) -> dict[str, int]:
        """Noted in the guard table."""
        return self.guard.observe().settings if self.guard.exists() else {}

    def observe(self, only: Collection[VirtualAddress] | None = None) -> State:
        """What the kernel holds of ours.

        IPVS dumps are hints: the kernel resumes them by position and never tells that one was torn. A server that the
        ledger knows and the dump lacks is asked for by its key; adds and deletes are judged by their own answers.
        """
        ledger = self.guard.observe() if self.guard.exists() else Elements()
        bound = self.vips.bound() if self.vips.exists() else set()
        self.marks.learn(ledger.marks)
        self.delivers = self.delivers or bool(ledger.external)
        state = State(vips=bound | ledger.vips, hairpins=ledger.hairpins, partial=bound ^ ledger.vips)
        owned = ledger.addresses()
        for entry in self._servers(ledger.servers.keys() if only is None else only, everything=only is None):
            at = entry.server.at
            ours = at in owned or at in self._ours
            if not (ours or self._ledger_lost):
                state.foreign.add(at)
                continue
            answers = self._genl.dump(self._encoder.get_reals(at))
            reals = [decode_real_server(answer, ledger.hairpins) for answer in answers]
            found = msgspec.structs.replace(entry.server, real_servers=tuple(sorted(reals)))
            server = seen_server(found, ledger, self.marks.of)
            if ours:
                self._ours.add(at)
                state.put(server)
            else:
                state.adoptable[at] = server
        state.ghosts |= (owned if only is None else owned & set(only)) - state.servers.keys()
        return state

    def suspects(self, held: State) -> set[VirtualAddress] | None:
        """By /proc/net/ip_vs and the guard's sets: a hundredth of what asking for every real server costs."""
        ledger = self.guard.observe() if self.guard.exists() else Elements()
        marks = self.marks.of
        expected = Elements(vips=held.vips, hairpins=held.hairpins)
        try:
            for server in held.servers.values():
                note(expected, server, marks)
        except KeyError:
            return None  # a mark that we do not know
        expected.draining, expected.settings = ledger.draining, ledger.settings
        bound = self.vips.bound() if self.vips.exists() else set()
        if ledger != expected or bound != held.vips:
            return None
        try:
            text = PROC_TABLE.read_text()
        except OSError:
            return None
        found = ipvs_proc_text.differing(text, held.servers.values(), marks)
        # flags of the scheduler are not in the table, but only few servers have any
        found.update(at for at, server in held.servers.items() if server.flags)
        return found

    def compile(self, plan: Plan) -> "IpvsTransaction | RealsTransaction":
        """The plan with the guard elements that belong to it."""
        if plan.reals_only:
            return RealsTransaction(plan, self)
        if not _concerns_guard(plan):
            return IpvsTransaction(plan, _NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING, self)
        add = Elements(vips=set(plan.bind), hairpins=set(plan.hairpin_add))
        replaced = Elements()
        drop = Elements(vips=set(plan.unbind), hairpins=set(plan.hairpin_remove))
        marks = self.marks.of
        for server in plan.add:
            if server.at.inside:
                self.marks.take(server.at)
            note(add, server, marks)
        for old, new in plan.change:
            if new.at.inside:
                self.marks.take(new.at)
            if concerns(old, new):
                note_change(replaced, add, old, new, marks)
        for server in plan.remove:
            if server == VirtualServer(server.at) or (server.at.inside and server.at not in marks):
                note_all(drop, server.at, marks)  # only the table knows of it
            else:
                note(drop, server, marks)
        opened = Elements(external=add.external, inside=add.inside)
        closed = Elements(external=replaced.external | drop.external, inside=replaced.inside | drop.inside)
        for each in (add, replaced, drop):
            each.external, each.inside = set(), set()
        return IpvsTransaction(plan, add, replaced, opened, closed, drop, self)

    def commit(self, transaction: Transaction) -> Outcome:
        """Do it; IPVS failures are mapped back to their virtual addresses."""
        if isinstance(transaction, RealsTransaction):
            return self._commit_reals(transaction.plan)
        return self._commit_in_order(transaction)

    def _commit_reals(self, plan: Plan) -> Outcome:
        """The commonest commit of all, so by the shortest way: one send, one answer."""
        if plan.hairpin_add:
            self.guard.add_hairpins(plan.hairpin_add)
        genl, encoder = self._genl, self._resolved
        if encoder is None:
            encoder = self._resolved = self._encoder
        refusals: Sequence[Failure] = ()
        if plan.change:
            count = 0
            for change in plan.change:
                add, edit, remove, _ = change.differing
                count += len(add) + len(edit) + len(remove)
            if count <= FEW:
                seq = genl.next_seq()
                data = encoder.reals(plan.change, seq)
                refusals = genl.exchange(data, seq)
            else:
                refusals = genl.batch(each for change in plan.change for each in _change_messages(encoder, change))
        if plan.hairpin_remove:
            self.guard.remove_hairpins(plan.hairpin_remove)
        if not refusals:
            return _ALL_WELL
        failed: dict[VirtualAddress, KernelError] = {}
        unsure: set[VirtualAddress] = set()
        self._sort_out(refusals, failed, unsure)
        return Outcome(failed, frozenset(unsure - failed.keys()))

    def _commit_in_order(self, transaction: Transaction) -> Outcome:
        """The five steps of the module's docstring."""
        assert isinstance(transaction, IpvsTransaction)
        plan, encoder = transaction.plan, self._encoder
        failed: dict[VirtualAddress, KernelError] = {}
        unsure: set[VirtualAddress] = set()
        if transaction.guard_add is _NOTHING:
            self._sort_out(self._genl.batch(_messages_before(encoder, plan)), failed, unsure)
            return Outcome(failed, frozenset(unsure - failed.keys()))
        if _any(transaction.guard_add) or _any(transaction.guard_replace):
            self.guard.commit(transaction.guard_add, transaction.guard_replace)
        opened, closed = transaction.guard_open, transaction.guard_close
        self._ours.update(server.at for server in plan.add)
        self._sort_out(self._genl.batch(_messages_before(encoder, plan)), failed, unsure)
        refused = self.vips.bind(plan.bind) if plan.bind else []
        refused += self.vips.unbind(plan.unbind) if plan.unbind else []
        if opened.external and not self.delivers:
            self.delivery.ensure()
            self.delivers = True
        if _any(opened) or _any(closed):
            self.guard.commit(opened, closed)
        if plan.remove:
            self._sort_out(self._genl.batch(_messages_after(encoder, plan, self.marks.of)), failed, unsure)
        self._ours.difference_update(server.at for server in plan.remove)
        self._ours.difference_update(unsure)
        self._ours.difference_update(failed.keys() & {server.at for server in plan.add})
        if _any(transaction.guard_remove):
            self.guard.commit(_NOTHING, transaction.guard_remove)
        for server in plan.remove:
            if server.at.inside:
                self.marks.forget(server.at)
        for address, error in refused:
            for server in (*plan.add, *(change.new for change in plan.change), *plan.remove):
                if server.at.address == address:
                    failed[server.at] = error
        return Outcome(failed, frozenset(unsure - failed.keys()))

    def intact(self) -> bool:
        """kube-ipvs0, the guard's chains, rules and sets, and the delivery by mark are there, unchanged."""
        return self.vips.exists() and self.guard.intact() and (not self.delivers or self.delivery.exists())

    def clocks(self) -> dict[DrainKey, float]:
        """Seconds left on the drain clocks in the guard table."""
        if not self.guard.exists():
            return {}
        return {DrainKey(*key): left for key, left in self.guard.observe().draining.items()}

    def keep_clocks(self, add: dict[DrainKey, int], remove: Collection[DrainKey]) -> None:
        """Drain clocks as set elements with a timeout: the kernel counts them down, whoever lives or dies."""
        starting = {(key.at, key.address, key.port): seconds for key, seconds in add.items()}
        ending = {(key.at, key.address, key.port): 0 for key in remove}
        if starting or ending:
            self.guard.commit(Elements(draining=starting), Elements(draining=ending))

    def open_connections(self, at: VirtualAddress) -> dict[tuple[Address, int], int]:
        """Active and inactive connections of each real server (a closed one lingers as inactive in TIME_WAIT)."""
        if at.inside and at not in self.marks.of:
            raise KernelError("list real servers of", str(at), errno.ESRCH)
        reals = self._reals(self._encoder.get_reals(at))
        return {(one.real.address, one.real.port): one.active + one.inactive for one in reals}

    def report(self) -> Iterator[ServerReport]:
        """Every virtual server of the kernel, in ipvsadm's order, with the kernel's counters."""
        ledger = self.guard.observe() if self.guard.exists() else Elements()
        self.marks.learn(ledger.marks)
        for entry, reals in ipvsadm_text.in_order(self.listing()):
            at = self.marks.at.get(entry.fwmark, entry.server.at)
            ours = at in ledger.servers
            server = msgspec.structs.replace(entry.server, at=at, real_servers=tuple(one.real for one in reals))
            if ours:
                server = seen_server(server, ledger, self.marks.of)
            rows = tuple(
                (
                    one.real,
                    RealCounters(
                        one.active,
                        one.inactive,
                        one.traffic.connections,
                        one.traffic.bytes_in,
                        one.traffic.bytes_out,
                    ),
                )
                for one in ipvsadm_text.sorted_reals(reals)
            )
            yield ServerReport(server, entry.fwmark, entry.traffic.connections, rows, ours)

    def listing(self) -> list[tuple[ServerEntry, list[RealEntry]]]:
        """Everything IPVS holds, ours or not, as the kernel tells it."""
        listing = []
        for entry in map(decode_server, self._genl.dump(self._encoder.get_servers())):
            at = entry.server.at
            asked = (
                self._encoder.get_reals_of_mark(entry.fwmark, entry.family)
                if entry.fwmark
                else self._encoder.get_reals(at)
            )
            listing.append((entry, self._reals(asked)))
        return listing

    def info(self) -> tuple[int, int]:
        """(version code, size of the connection table) of the kernel's IPVS."""
        values = InfoAttrs.decode(self._genl.get(self._encoder.command(GET_INFO), "get", "IPVS info"), DATA)
        return values["version"], values["conn_tab_size"]

    def situation(self) -> Situation:
        """As IPVS and the guard's sets say, and the guard's rules, which may have been written with other options."""
        try:
            state = self.observe()
        except PreflightError:
            state = State()  # no IPVS in this kernel, so no servers
        flaws = []
        if self.guard.exists():
            self._detection = read_detection(run_tool(["nft", "-t", "list", "table", "inet", TABLE]))
            if not self.guard.written_with(self._detection):
                flaws.append(f"the rules of table inet {TABLE} are not as this version writes them")
        if state.servers and not self.vips.exists():
            flaws.append("what binds the cluster IPs to this node is not there")
        if self.delivers and not self.delivery.exists():
            flaws.append(
                "the routing rules (ip rule 86 to 88) that deliver packets to external addresses are not there"
            )
        return Situation(state.servers, state.vips, state.hairpins, self._detection, state.foreign, tuple(flaws))

    def remembered(self, server: VirtualServer, client: Address) -> Remembered | None:
        """By IPVS's template for the client; each virtual server has its own."""
        return ipvs_proc_text.remembered(read_connections(), server, client)

    def objects(self, walked: Walk) -> dict[Stage, tuple[str, ...]]:
        """Sets of the guard table, and servers as ipvsadm writes them."""
        device = "kube-ipvs0" if self._options.vip_binding == "device" else "the local routing table"
        return objects(walked, self.marks.of, self._detection, device)

    def watch(self, wanted: Look) -> Witness:
        """By conntrack, which IPVS tells of the real server if it is to (vs.conntrack); else by IPVS's own table."""
        known = read_sysctl("net.ipv4.vs.conntrack") == 1
        return NewConnections(wanted) if known else ConnectionTable(wanted)

    def monitors(self) -> tuple[int, ...]:
        """Sockets on which the kernel tells of link, address, route and nftables changes."""
        if self._monitors is None:
            self._monitors = (
                NetlinkSocket(NETLINK_ROUTE, groups=ROUTE_GROUPS),
                NetlinkSocket(NETLINK_NETFILTER, groups=(NFTABLES_GROUP,)),
            )
        return tuple(sock.fileno() for sock in self._monitors)

    def disturbed(self) -> bool:
        """Somebody else changed our device, our addresses or our table, or we cannot know (events were lost)."""
        if self._monitors is None:
            return False
        links, lost_links = self._monitors[0].notifications()
        tables, lost_tables = self._monitors[1].notifications()
        ours = self._route.port
        theirs = [each for each in links if HEADER.unpack_from(each)[4] != ours]
        touched = any(self.vips.concerns(each) for each in theirs)
        touched = touched or (self.delivers and any(map(self.delivery.concerns, theirs)))
        touched = touched or bool(foreign_touches(tables, INET, TABLE, (self._netfilter.port,)))
        return touched or lost_links or lost_tables

    def text(self, language: str) -> str | None:
        """The guard table as `nft` lists it, which `nft -f` reads."""
        if language != "nft":
            return None
        return run_tool(["nft", "list", "table", "inet", TABLE]) if self.guard.exists() else ""

    def remove(self, leave: Collection[str] = ()) -> None:
        """Take away our servers (those in the ledger), what leads to them, and the guard table; put sysctls back."""
        if self.guard.exists():
            ledger = self.guard.observe()
            ours = {one.name: one.value for one in IPVS_SYSCTLS + STRICT_ARP_SYSCTLS if one.name not in leave}
            restore(
                Change(name, before, before, ours[name]) for name, before in ledger.settings.items() if name in ours
            )
            try:
                encoder = self._encoder
            except PreflightError:
                pass  # no IPVS in this kernel, so no servers either
            else:
                self.marks.learn(ledger.marks)
                servers = [VirtualServer(at) for at in ledger.servers if not at.inside or at in self.marks.of]
                failed: dict[VirtualAddress, KernelError] = {}
                self._sort_out(self._genl.batch(encoder.server(DEL_SERVICE, s) for s in servers), failed, set())
                for error in failed.values():
                    raise error
                self.marks.clear()
                self._remove_strays()
        self.vips.remove()
        self.delivery.remove()
        self.delivers = False
        self.guard.delete()

    def close(self) -> None:
        """Give descriptors back."""
        for sock in (self._route, self._netfilter, self._genl, *(self._monitors or ())):
            sock.close()

    # ------------------------------------------------------------------------------------------------- reading

    def _servers(self, at: Iterable[VirtualAddress], *, everything: bool) -> Iterator[ServerEntry]:
        """Entries of the whole table, or of those addresses; then what a torn dump may have left out, by key."""
        missing = set(at)
        if everything:
            for entry in map(decode_server, self._genl.dump(self._encoder.get_servers())):
                named = self._named(entry)
                if named is not None:
                    missing.discard(named.server.at)
                    yield named
        for each in missing:
            if each.inside and each not in self.marks.of:
                continue
            try:
                answer = self._genl.get(self._encoder.get_server(each), "get virtual server", str(each))
                named = self._named(decode_server(answer))
                if named is not None:
                    yield named
            except KernelError as error:
                if error.errno != errno.ESRCH:
                    raise

    def _named(self, entry: ServerEntry) -> ServerEntry | None:
        """The entry with its virtual address; None when it is by somebody else's mark."""
        if not entry.fwmark:
            return entry
        at = self.marks.at.get(entry.fwmark)
        if at is None or len(at.address) != len(entry.server.at.address):
            return None
        return entry._replace(server=msgspec.structs.replace(entry.server, at=at))

    def _remove_strays(self) -> None:
        """Servers by marks of ours whose ledger has been lost: nobody knows any more what they are for."""
        strays = []
        for entry in map(decode_server, self._genl.dump(self._encoder.get_servers())):
            if entry.fwmark in INSIDE_MARKS and entry.fwmark not in self.marks.at:
                service = {"af": entry.family, "fwmark": entry.fwmark}
                strays.append(self._encoder.command(DEL_SERVICE, service=service))
        self._genl.batch(strays)

    def _sort_out(
        self, failures: Iterable[Failure], failed: dict[VirtualAddress, KernelError], unsure: set[VirtualAddress]
    ) -> None:
        """Tell failures that only mean "look again" from those that mean "cannot be done"."""
        for code, message, text in failures:
            named = name_message(message)
            at = self.marks.at.get(named.mark) if named.mark else named.at
            if at is None or (named.command, code) in _ALREADY_GONE:
                continue
            if (named.command, code) in _SURPRISES:
                unsure.add(at)
                continue
            what = COMMAND_NAMES.get(named.command, f"IPVS command {named.command}")
            subject = str(at) if named.real is None else f"{format_endpoint(*named.real)} of {at}"
            hint = _HINTS.get((named.command, code), "").format(scheduler=named.scheduler)
            error = kernel_error(what, subject, code, hint or text)
            if isinstance(error, NotRoot):
                raise error
            failed[at] = error

    def _reals(self, request: bytes) -> list[RealEntry]:
        return [decode_real(answer) for answer in self._genl.dump(request)]


def _load_modules(try_it: Callable[[], object]) -> None:
    """Load modules only when trying fails; raises what the second try raises."""
    try:
        try_it()
    except PreflightError:
        for module in MODULES:
            # built in, or not there at all: using it tells, and says so better
            with contextlib.suppress(ToolError, PreflightError):
                run_tool(["modprobe", module])
        try_it()


def _concerns_guard(plan: Plan) -> bool:
    """More than real servers that come and go or change their settings."""
    for change in plan.change:
        new = change.new
        if (change.server or not new.bound or new.no_servers is NoServers.DROP) and concerns(change.old, new):
            return True
    return bool(plan.add or plan.remove or plan.bind or plan.unbind or plan.hairpin_add or plan.hairpin_remove)


def _any(elements: Elements) -> bool:
    """Whether there is anything in them."""
    return elements is not _NOTHING and any(msgspec.structs.astuple(elements))


def _messages_before(encoder: Encoder, plan: Plan) -> Iterator[bytes]:
    """Everything but the removal of virtual servers; encoded while earlier chunks are already with the kernel."""
    yield from map(encoder.new_server, plan.add)
    for change in plan.change:
        yield from _change_messages(encoder, change)


def _change_messages(encoder: Encoder, change: ServerChange) -> list[bytes]:
    new = change.new
    messages = [encoder.server(SET_SERVICE, new)] if _edited(change) else []
    add, edit, remove = change.reals()
    for real in add:
        messages.append(encoder.real(NEW_DEST, new, real))
    for real in edit:
        messages.append(encoder.real(SET_DEST, new, real))
    for real in remove:
        messages.append(encoder.real(DEL_DEST, new, real))
    return messages


def _messages_after(encoder: Encoder, plan: Plan, marks: Mapping[VirtualAddress, int]) -> Iterator[bytes]:
    for server in plan.remove:
        if not server.at.inside or server.at in marks:
            yield encoder.server(DEL_SERVICE, server)
