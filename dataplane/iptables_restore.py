"""iptables mode: kube-proxy's chains, written by iptables-restore and read back from iptables-save.

One process per family and change. A restore is atomic per table; `filter` goes before `nat`, and either order is safe:
refusals in filter meet only what nat has not sent to an endpoint. What is ours: chains of our names in tables that hold
our marker chain. Where chains of such names stand without it, somebody else (a kube-proxy) has them, and this mode does
not start.

When a restore fails, the family is read again and the rest of the plan is made from what is there; if it fails again,
the object of the named line (or, when none is named, the half that fails) is left out, and the rest goes on.
"""

import contextlib
import errno
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import msgspec
from msgspec import Struct

from .backend import NO_SETTINGS, Options, Outcome, RealCounters, ServerReport, Transaction
from .drain import DrainKey
from .errors import KernelError, PreflightError, ToolError
from .iptables_books import Books
from .iptables_chains import arrange, express
from .iptables_path import objects
from .iptables_save import Table, same_rule, same_rules
from .iptables_script import Script, Wanted
from .iptables_text import JUMPS, MARKER, Form, chain_name, fixed, form_of, marker
from .model import Address, Family, Kind, VirtualAddress, VirtualServer, family_of
from .netlink_conntrack import NewConnections
from .netlink_trace import PacketTrace
from .plan import Plan, State
from .procfs_recent import recall
from .procfs_sysctl import Change, apply, check, restore, running_kernel
from .procfs_sysctl import Wanted as WantedSysctl
from .run_iptables import Tools, has_legacy_tables
from .sightings import Look, Witness
from .walk import Detection, Remembered, Situation, Stage, Walk

CULPRITS = 32
"""Refused objects that one commit looks for; what is left then fails with them and is tried again."""
LOOK_SECONDS = 0.1
"""A look that `intact` took serves the `observe` right behind it."""

SCHEDULER = "random"
"""What `statistic --mode random` does, for people."""

SYSCTLS = (WantedSysctl("net.ipv4.ip_forward", 1, "packets to a VIP leave for real servers on other machines"),)
_NOTE = re.compile(r'^-m comment --comment "([a-z0-9_.]+) was (\d+)"$')
_LINE = re.compile(r"(?:occurred at line: |line )(\d+)\b")


def open_backend(options: Options) -> "IptablesBackend":
    """The backend in the calling thread's network namespace."""
    return IptablesBackend(options)


def open_leftover(options: Options) -> "IptablesBackend":
    """The same with the programs in whose tables our chains are."""
    opened = IptablesBackend(options)
    found = [tools.flavour for tools in opened._all_tools() if tools.owned()]
    if not found or opened.flavour in found:
        return opened
    return IptablesBackend(msgspec.structs.replace(options, iptables_tool=found[0]))


def open_beside(options: Options) -> "IptablesBackend | None":
    """What is ours in the tables of the back end that is not used; None = nothing."""
    used = IptablesBackend(options)
    found = [tools.flavour for tools in used._all_tools()[len(used._tools) :] if tools.owned()]
    if not found:
        return None
    beside = IptablesBackend(msgspec.structs.replace(options, iptables_tool=found[0]), alone=True)
    beside.mode = f"iptables ({found[0]})"
    return beside


class IptablesTransaction(Struct, frozen=True):
    """A plan as one iptables-restore input per family, which is what it prints."""

    plan: Plan
    wanted: dict[Family, Wanted]
    scripts: dict[Family, Script]
    unsure: frozenset[VirtualAddress]
    headers: dict[Family, str]

    def __str__(self) -> str:
        return "".join(f"# {self.headers[f]}\n{one.text()}" for f, one in self.scripts.items() if one)


class IptablesBackend:
    """`backend.Backend` for iptables, legacy or nft."""

    mode = "iptables"
    drains = False
    shares_affinity = True
    remembers_counts = False
    picks = SCHEDULER

    def __init__(self, options: Options, clock: Callable[[], float] = time.monotonic, *, alone: bool = False) -> None:
        self._alone = alone
        """The other back end's tables are somebody else's business."""
        self._clock = clock
        families = (Family.IPV4, *([Family.IPV6] if Path("/proc/sys/net/ipv6").exists() else []))
        self._tools = {family: Tools(family, options.iptables_tool) for family in families}
        self._books: dict[Family, Books] = {}
        self._looked: tuple[float, dict[Family, Books]] | None = None
        self.renew(options)
        self._prepared = False
        self._before: dict[str, int] = {}
        self._fully_random = True
        self._refused: dict[VirtualAddress, VirtualServer] = {}
        self._hits: dict[tuple[Family, str], tuple[int, int]] = {}
        """Of each endpoint's chain: what was counted before the count fell, and the last count."""

    @property
    def flavour(self) -> str:
        """`legacy` or `nft`."""
        return self._tools[Family.IPV4].flavour

    # ------------------------------------------------------------------------------------------------ contract

    def express(self, server: VirtualServer) -> VirtualServer:
        """Weights are expressed, by probabilities; schedulers, thresholds and a VIP on this node are not."""
        return express(self._form, server)

    def renew(self, options: Options) -> None:
        """Other rules; chains that are written otherwise are found by the next `observe`."""
        self._form = Form(
            options.iptables_compat == "classic",
            options.masquerade_all,
            options.cluster_cidrs,
            options.bridge_interface,
            options.interface_prefix,
            options.service_cidrs,
        )
        self._looked = None

    def present(self) -> bool:
        """Our marker is in a table of either back end."""
        return any(tools.owned() for tools in self._all_tools())

    def prepare(self, before: Mapping[str, int] = NO_SETTINGS) -> tuple[str, ...]:
        """Marker, fixed chains, jumps and sysctls; chains that are not tidy are written anew."""
        lacks = []
        lacking = [one for one in check(SYSCTLS, running_kernel()) if one.error and one.before is not None]
        for family, tools in list(self._tools.items()):
            tables = tools.save()
            for name in ("nat", "filter"):
                self._refuse_foreign(tables.get(name, Table()), name, tools)
            if family is Family.IPV4:
                # noted before it changes, so that `remove` can put it back whoever runs it
                found = {one.name: one.before for one in lacking if one.before is not None}
                found |= {one.name: before[one.name] for one in SYSCTLS if one.name in before}
                self._before = found | self._before | _settings(tables)
            try:
                self._repair(family, tables)
            except ToolError as error:
                if family is Family.IPV4:
                    raise PreflightError(f"iptables does not work here: {error}", "modprobe iptable_nat") from None
                lacks.append(f"IPv6 Services cannot be had: {error}")
                del self._tools[family]
        self._prepared = True
        lacks += [str(one) for one in apply(SYSCTLS, running_kernel()) if one.error]
        return (*lacks, *self._other_flavour())

    def settings(self) -> dict[str, int]:
        """Noted in the marker chain."""
        noted: dict[str, int] = {}
        for tools in self._all_tools():
            if tools.owned():
                noted |= _settings(tools.save())
        return noted

    def observe(self, only: Collection[VirtualAddress] | None = None) -> State:
        """What the tables hold of ours; nothing, where they have no marker of ours."""
        looked, self._looked = self._looked, None
        if looked is not None and only is None and self._clock() - looked[0] < LOOK_SECONDS:
            self._books = looked[1]
        else:
            self._books = {family: self._read(family, tools.save()) for family, tools in self._tools.items()}
        held = (one for books in self._books.values() for one in books.held.values())
        return State(one for one in held if only is None or one.at in only)

    def suspects(self, held: State) -> set[VirtualAddress] | None:
        """Cannot tell: `intact` has read everything already, and `observe` right behind it costs nothing."""
        return None

    def compile(self, plan: Plan) -> Transaction:
        """What the plan adds and the tables hold already is unsure; what it removes and they lack is done."""
        wanted: dict[Family, list[tuple[VirtualAddress, VirtualServer | None]]] = {}
        unsure = set()
        for server in plan.add:
            at = server.at
            if self._book(at).holds(at):
                unsure.add(at)
            else:
                wanted.setdefault(family_of(at.address), []).append((at, self.express(server)))
        for change in plan.change:
            at = change.new.at
            if self._book(at).held.get(at) is None:
                unsure.add(at)
            else:
                wanted.setdefault(family_of(at.address), []).append((at, self.express(change.new)))
        for server in plan.remove:
            if server.at in self._book(server.at).held:
                wanted.setdefault(family_of(server.at.address), []).append((server.at, None))
        scripts = {family: self._book_of(family).compose(some) for family, some in sorted(wanted.items())}
        headers = {family: self._tools[family].command if family in self._tools else "ip6tables" for family in wanted}
        return IptablesTransaction(plan, dict(wanted), scripts, frozenset(unsure), headers)

    def commit(self, transaction: Transaction) -> Outcome:
        """One restore per family; objects that are refused are left out of a further one."""
        assert isinstance(transaction, IptablesTransaction)
        failed: dict[VirtualAddress, KernelError] = {}
        for family, script in transaction.scripts.items():
            wanted = transaction.wanted[family]
            if family not in self._tools:
                error = KernelError("program", "ip6tables", errno.EAFNOSUPPORT, "this machine has no ip6tables")
                failed.update((at, error) for at, _ in wanted)
                continue
            doubtful = [(at, new) for at, new in wanted if new is not None and self._refused.get(at) == new]
            if not doubtful:
                self._program(family, wanted, failed, script)
                continue
            doubted = {at for at, _ in doubtful}
            self._program(family, [one for one in wanted if one[0] not in doubted], failed)
            self._program(family, doubtful, failed)
        if self._refused or failed:
            for at in transaction.plan.addresses():
                self._refused.pop(at, None)
            wishes = {at: new for some in transaction.wanted.values() for at, new in some if new is not None}
            self._refused.update((at, wishes[at]) for at in failed if at in wishes)
        return Outcome(failed, transaction.unsure)

    def intact(self) -> bool:
        """Marker, fixed chains and jumps stand, shared chains hold nothing else, no chain is left over."""
        looks, whole = {}, True
        for family, tools in self._tools.items():
            tables = tools.save()
            looks[family] = self._read(family, tables)
            whole = whole and not self._flaws(family, tables, looks[family])
        self._looked = (self._clock(), looks)
        return whole

    def clocks(self) -> dict[DrainKey, float]:
        """None: conntrack keeps connections to removed real servers alive."""
        return {}

    def keep_clocks(self, add: dict[DrainKey, int], remove: Collection[DrainKey]) -> None:
        """Nothing to keep."""

    def open_connections(self, at: VirtualAddress) -> dict[tuple[Address, int], int]:
        """Not known here, and not asked: nothing drains in this mode."""
        return {}

    def report(self) -> Iterator[ServerReport]:
        """Our servers, with the connections that the DNAT rule of each endpoint has counted.

        All addresses of a ServicePort share its endpoints' chains: the first of them, its cluster IP where it has one,
        tells the counts of all, and the others cannot tell theirs (-1).
        """
        for family in self._tools:
            books, hits = self._counted(family)
            counts = _told_once(books, hits)
            counts.update((at, {}) for at in books.damage)
            for at, count in sorted(counts.items()):
                server = books.held[at]
                rows = tuple(
                    (real, RealCounters(0, 0, count.get((real.address, real.port), -1))) for real in server.real_servers
                )
                known = sum(counters.connections for _, counters in rows if counters.connections >= 0)
                shown = server if at in books.damage else msgspec.structs.replace(server, scheduler=SCHEDULER)
                yield ServerReport(shown, 0, known, rows, True)

    def situation(self) -> Situation:
        """As the rules say, read in the form in which their marker says they were written."""
        flaws = []
        for family, tools in self._tools.items():
            tables = tools.save()
            # `explain` is not told how the rules were written; they say it
            form = form_of(tables.get("nat", Table()).chains.get(MARKER, ()))
            books = self._books[family] = self._read(family, tables, form=form)
            if books.held and self._flaws(family, tables, books, form):
                flaws.append(f"fixed chains and jumps of {tools.prefix} are not as this version writes them")
        held = {at: server for books in self._books.values() for at, server in books.held.items()}
        forms = [books.form for books in self._books.values() if books.held] or [self._form]
        return Situation(
            {at: msgspec.structs.replace(server, scheduler=SCHEDULER) for at, server in held.items()},
            {at.address for at, server in held.items() if server.kind is Kind.CLUSTER_IP},
            None,
            _detection(forms[0]),
            flaws=tuple(flaws),
        )

    def remembered(self, server: VirtualServer, client: Address) -> Remembered | None:
        """By the `recent` lists of the endpoints' chains, which all addresses of a Service port share."""
        books = self._book(server.at)
        site = next((one for one in arrange(books.form, books.mates(server)) if one.any.at[:3] == server.at[:3]), None)
        for real in server.real_servers if site else ():
            age = recall(chain_name("SEP", f"{site.seed}{real}"), client) if site and real.weight else None
            if age is not None and age < server.persistence:
                return Remembered(real.address, real.port, round(server.persistence - age) if age >= 0 else None)
        return None

    def objects(self, walked: Walk) -> dict[Stage, tuple[str, ...]]:
        """Rules by table and chain."""
        books = self._book(walked.question.at)
        server = walked.outer or walked.server
        return objects(walked, books.form, books.mates(server) if server else ())

    def watch(self, wanted: Look) -> Witness:
        """By nftrace, which knows of iptables-nft's rules; legacy tables are none of nf_tables': by conntrack."""
        return PacketTrace(wanted) if self.flavour == "nft" else NewConnections(wanted)

    def monitors(self) -> tuple[int, ...]:
        """None: legacy tables tell nobody of changes; the agent's timer looks."""
        return ()

    def disturbed(self) -> bool:
        """Not told."""
        return False

    def text(self, language: str) -> str | None:
        """Our chains and the jumps to them, as iptables-save prints them."""
        if language != "iptables":
            return None
        texts = ((tools.command, _restorable(tools.save())) for tools in self._tools.values())
        return "".join(f"# {command}\n{text}" for command, text in texts if text)

    def remove(self, leave: Collection[str] = ()) -> None:
        """Our jumps and chains go, sysctls get back what the marker chain remembers."""
        ours = {one.name: one.value for one in SYSCTLS if one.name not in leave}
        for tools in self._all_tools():
            try:
                tables = tools.save()
            except (PreflightError, ToolError):
                continue  # no such programs, so nothing of ours
            restore(Change(name, old, old, ours[name]) for name, old in _settings(tables).items() if name in ours)
            text = "".join(_removal(name, table) for name, table in tables.items() if table.owned)
            if text:
                tools.restore(text)
        self._books, self._looked, self._prepared, self._before = {}, None, False, {}
        self._hits.clear()

    def close(self) -> None:
        """Nothing is open."""

    # -------------------------------------------------------------------------------------------- fixed parts

    def _refuse_foreign(self, table: Table, name: str, tools: Tools) -> None:
        """Chains of our names without our marker are another kube-proxy's; a lost marker of this process's is not."""
        ours = [chain for chain in table.ours() if chain != MARKER]
        theirs = [chain for chain in table.chains if chain == "KUBE-PROXY-CANARY"]
        if (ours and not table.owned and not self._prepared) or theirs:
            shown = ", ".join(sorted(theirs or ours)[:3])
            raise PreflightError(
                f"table {name} of {tools.prefix} has chains of a kube-proxy that is not this program: {shown}",
                "stop kube-proxy on this node, then: dataplane cleanup --kube-proxy",
            )

    def _flaws(self, family: Family, tables: Mapping[str, Table], books: Books, form: Form | None = None) -> str:
        """The restore text that mends the fixed parts, and leaves alone what is as it should be."""
        form = form or self._form
        settings = (self._before or _settings(tables)) if family is Family.IPV4 else {}
        wanted = fixed(form, family, fully_random=self._fully_random)
        # the marker comes before any other chain: whatever happens next, these chains are known to be ours
        text = []
        for name, rules in (("filter", marker({})), ("nat", marker(settings, form))):
            if not same_rules(tables.get(name, Table()).chains.get(MARKER, ()), rules):
                lines = [f"*{name}", f":{MARKER} - [0:0]", *(f"-A {MARKER} {rule}" for rule in rules), "COMMIT"]
                text.append("\n".join(lines) + "\n")
        if not books.tidy or books.orphans:
            text.append(books.compose((), whole=True).text())
        for name in ("filter", "nat"):
            table = tables.get(name, Table())
            lines = []
            for chain, rules in wanted[name].items():
                if chain not in table.chains or not same_rules(table.chains[chain], rules):
                    lines += [f":{chain} - [0:0]", *(f"-A {chain} {rule}" for rule in rules)]
            for chain, jumps in JUMPS[name].items():
                standing = [rule for at, rule in table.jumps if at == chain and _ours(rule, jumps)]
                if not same_rules(standing, jumps):
                    lines += [f"-D {chain} {rule}" for rule in standing]
                    lines += [f"-I {chain} {rule}" for rule in reversed(jumps)]
            if lines:
                text.append("\n".join([f"*{name}", *lines, "COMMIT"]) + "\n")
        return "".join(text)

    def _repair(self, family: Family, tables: Mapping[str, Table]) -> None:
        tools = self._tools[family]
        books = self._read(family, tables, owned=True)  # where the marker was lost, too
        text = self._flaws(family, tables, books)
        if not text:
            return
        try:
            tools.restore(text)
        except ToolError:
            if not self._fully_random:
                raise
            self._fully_random = False  # iptables before 1.6.2 and kernels before 3.13 lack it
            tools.restore(self._flaws(family, tables, books))
        self._looked = None

    def _other_flavour(self) -> tuple[str, ...]:
        """Chains of ours among the tables of the other back end would take packets twice."""
        for tools in self._all_tools()[len(self._tools) :]:
            with contextlib.suppress(PreflightError, ToolError):
                tables = tools.save().values()  # those with our marker are let go by the switch
                chains = sorted(chain for table in tables if not table.owned for chain in table.ours())
                if chains:
                    told = f"iptables here is {self.flavour}, and {tools.prefix} has chains of Services too"
                    return (f"{told} ({', '.join(chains[:3])}): packets meet both; remove those",)
        return ()

    def _all_tools(self) -> list[Tools]:
        """Those of this back end, then of the other one, as far as it has tables."""
        if self._alone:
            return list(self._tools.values())
        other = "legacy" if self.flavour == "nft" else "nft"
        return [
            *self._tools.values(),
            *(Tools(family, other) for family in self._tools if other == "nft" or has_legacy_tables(family)),
        ]

    # ------------------------------------------------------------------------------------------------- looking

    def _read(
        self, family: Family, tables: Mapping[str, Table], *, owned: bool = False, form: Form | None = None
    ) -> Books:
        ours = {name: table for name, table in tables.items() if owned or table.owned}
        return Books.read(form or self._form, family, ours, sections=self._sections(family))

    def _sections(self, family: Family) -> bool:
        return family in self._tools and self._tools[family].flavour == "nft"

    def _book_of(self, family: Family) -> Books:
        if family not in self._books:
            self._books[family] = Books(self._form, family, sections=self._sections(family))
        return self._books[family]

    def _book(self, at: VirtualAddress) -> Books:
        return self._book_of(family_of(at.address))

    def _counted(self, family: Family) -> tuple[Books, dict[str, int]]:
        """Connections by endpoint chain, which never fall: neither by somebody's `-Z` nor by a look in between.

        iptables-legacy puts the counters back a moment after it has replaced a table, so a fall is looked at twice.
        """
        for attempt in (0, 1):
            tables = self._tools[family].save()
            now = tables.get("nat", Table()).hits
            fell = [name for name, count in now.items() if count < self._hits.get((family, name), (0, 0))[1]]
            if not fell or attempt:
                break
            time.sleep(0.02)
        for name, count in now.items():
            before, last = self._hits.get((family, name), (0, 0))
            self._hits[family, name] = (before + last if count < last else before, count)
        for key in [key for key in self._hits if key[0] == family and key[1] not in now]:
            del self._hits[key]
        # `show` is not told how the rules were written; they say it
        form = form_of(tables.get("nat", Table()).chains.get(MARKER, ()))
        return self._read(family, tables, form=form), {name: sum(self._hits[family, name]) for name in now}

    # ------------------------------------------------------------------------------------------------- writing

    def _program(
        self,
        family: Family,
        wanted: Wanted,
        failed: dict[VirtualAddress, KernelError],
        script: Script | None = None,
    ) -> None:
        """Bring some objects to what they shall be; what is refused is put into `failed`, the rest is done."""
        waiting: list[Wanted] = [wanted]
        seen: set[VirtualAddress] = set()
        culprits = 0
        while waiting:
            some = waiting.pop()
            try:
                self._restore(family, script or self._book_of(family).compose(some))
                script = None
                continue
            except ToolError as error:
                told = str(error)
                blamed = _blamed(told, script or self._book_of(family).compose(some))
            script = None
            self._books[family] = self._read(family, self._tools[family].save())
            fresh = {at for at, _ in some} - seen
            seen |= fresh
            if fresh and len(fresh) == len(some) and culprits == 0:
                waiting.append(some)  # what we knew was old, perhaps: once more from what is there
                continue
            if len(some) == 1 or culprits >= CULPRITS:
                culprits += 1
                for at, _ in some:
                    failed[at] = KernelError("program", str(at), errno.EINVAL, told)
            elif blamed:
                culprits += 1
                failed.update((at, KernelError("program", str(at), errno.EINVAL, told)) for at in blamed)
                waiting.append([one for one in some if one[0] not in blamed])
            else:
                middle = len(some) // 2
                waiting += [some[middle:], some[:middle]]
        if failed and not self._book_of(family).tidy:
            # filter took what nat refused
            self._restore(family, self._book_of(family).compose((), whole=True))

    def _restore(self, family: Family, script: Script) -> None:
        if script:
            tools = self._tools[family]
            hits = tools.save().get("nat", Table()).hits if script.carried else None
            self._looked = None
            tools.restore(script.pieces(hits), counters=bool(hits))
        self._book_of(family).apply(script)


def _blamed(told: str, script: Script) -> tuple[VirtualAddress, ...]:
    """The objects whose line a failed restore names."""
    found = _LINE.search(told)
    return script.whose(int(found[1])) if found else ()


def _ours(rule: str, jumps: Collection[str]) -> bool:
    """Whether a rule of a built-in chain is one that we put there."""
    return any(same_rule(rule, one) for one in jumps)


def _told_once(books: Books, hits: Mapping[str, int]) -> dict[VirtualAddress, dict[tuple[Address, int], int]]:
    """What the KUBE-SEP chains have counted, told once each, by virtual address and endpoint."""
    counts: dict[VirtualAddress, dict[tuple[Address, int], int]] = {}
    for sites in books.sites():
        told = set()
        for site in sorted(sites, key=lambda one: not one.plain):
            for server in filter(None, (site.outside, site.inside)):
                mine = counts.setdefault(server.at, {})
                for real in server.real_servers:
                    name = chain_name("SEP", f"{site.seed}{real}")
                    if name not in told:
                        told.add(name)
                        mine[real.address, real.port] = hits.get(name, 0)
    return counts


def _detection(form: Form) -> Detection:
    """How rules of a form tell clients."""
    return Detection(form.everyone, form.clusters, form.bridge, form.prefix, form.services)


def _settings(tables: Mapping[str, Table]) -> dict[str, int]:
    """Sysctls as they were before us, from the marker chain."""
    notes = map(_NOTE.match, tables.get("nat", Table()).chains.get(MARKER, ()))
    return {note[1]: int(note[2]) for note in notes if note}


def _restorable(tables: Mapping[str, Table]) -> str:
    """What of tables is ours, as text for `iptables-restore --noflush`."""
    lines: list[str] = []
    for name, table in tables.items():
        if table.owned:
            ours = table.ours()
            lines += [f"*{name}", *(f":{chain} - [0:0]" for chain in ours)]
            lines += [f"-A {chain} {rule}" for chain, rule in table.jumps if _ours(rule, JUMPS[name].get(chain, ()))]
            lines += [f"-A {chain} {rule}" for chain in ours for rule in table.chains[chain]]
            lines.append("COMMIT")
    return "".join(line + "\n" for line in lines)


def _removal(name: str, table: Table) -> str:
    """The text that takes our chains out of a table; one that somebody else jumps to is only emptied."""
    ours = table.ours()
    mine = [(chain, rule) for chain, rule in table.jumps if _ours(rule, JUMPS[name].get(chain, ()))]
    lines = [f"*{name}", *(f":{chain} - [0:0]" for chain in ours)]
    lines += [f"-D {chain} {rule}" for chain, rule in mine]
    used = " ".join(rule for chain, rule in table.jumps if (chain, rule) not in mine) + " "
    used += " ".join(rule for chain, rules in table.chains.items() if chain not in ours for rule in rules) + " "
    lines += [f"-X {chain}" for chain in ours if f"-j {chain} " not in used and f"-g {chain} " not in used]
    return "\n".join([*lines, "COMMIT"]) + "\n"
