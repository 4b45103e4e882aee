"""What one family's tables hold of ours, read from iptables-save, and the restore text that takes it on. Pure.

`Books` is made from a look at the kernel and kept by what commits did, so that a change is a text of the changed chains
only: KUBE-SERVICES is edited rule by rule (`-D`, `-I`) and sent whole only when much of it changes. A KUBE-SEP chain
that stays as it is is never sent, which is why its counters go on counting.
"""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec
from msgspec import Struct

from .iptables_text import (
    CLOSED,
    CLUSTER_IPS,
    DAMAGED,
    SERVICE_CHAIN,
    SERVICES,
    Chains,
    Form,
    Table,
    chain_name,
    closed_ports,
    label_of,
    portal,
    refusal,
    render,
    same_rule,
    same_rules,
    seeds,
    service_text,
)
from .model import Address, Family, Masquerade, NoServers, Protocol, RealServer, VirtualAddress, VirtualServer
from .model import parse_address as _address

SECTION = 100
"""Servers whose chains go in one section, and four times as many chains that go: measured, 50 to 250 are alike."""
FEW = 32
"""Rules of a long chain that are edited one by one; more of them, or a fourth of it, and it is sent whole."""

_TO = re.compile(r"(?:^| )-d ([0-9a-f.:]+)(?:/32|/128)? ")
_PROTOCOL = re.compile(r"(?:^| )-p (tcp|udp|sctp) ")
_PORT = re.compile(r" --dport (\d{1,5}) ")
_COMMENT = re.compile(r'--comment "([^"\\]*)"')
_TARGET = re.compile(r" -j (\S+)")
_SEP = re.compile(r" -j (KUBE-SEP-[A-Z2-7]{16})$")
_SECONDS = re.compile(r" --seconds (\d+) ")
_WEIGHT = re.compile(r' weight (\d+)"')
_ENDPOINT = re.compile(r" -j DNAT --to-destination (\S+):(\d{1,5})$")


class Held(Struct, frozen=True):
    """A virtual server in the tables. `chains`: its chains, KUBE-SVC first; none for a server without real servers."""

    server: VirtualServer
    seed: str
    chains: tuple[str, ...]

    @property
    def damaged(self) -> bool:
        """Its rules are not those that we write; it is to be written anew."""
        return self.server.scheduler == DAMAGED


Wanted = Sequence[tuple[VirtualAddress, VirtualServer | None]]
"""Virtual addresses, and the server that each shall have; None = none."""


class Script(Struct, frozen=True):
    """An iptables-restore input. `blame`: ranges of lines (first, behind the last) and whose they are, in order;
    `after`: what the books hold then.
    """

    lines: list[str]
    blame: list[tuple[int, int, VirtualAddress]]
    after: list[tuple[VirtualAddress, Held | None]]
    closed: set[Address]
    whole: bool
    carried: frozenset[str]
    """KUBE-SEP chains that are written anew and whose counters shall go on."""

    def text(self, hits: Mapping[str, int] | None = None) -> str:
        """The input itself; with `hits` the counters of carried chains, for `--counters`."""
        if not hits:
            return "\n".join([*self.lines, ""]) if self.lines else ""
        carried = {f"-A {name} -p ": hits.get(name, 0) for name in self.carried}
        width = len("-A KUBE-SEP-0123456789ABCDEF -p ")
        return "".join(
            f"[{carried[line[:width]]}:0] {line}\n" if line[:width] in carried else line + "\n" for line in self.lines
        )

    def whose(self, line: int) -> VirtualAddress | None:
        """The server that a line, counted from 1, is about."""
        place = bisect_right(self.blame, line - 1, key=lambda each: each[0]) - 1
        return self.blame[place][2] if place >= 0 and line - 1 < self.blame[place][1] else None


class Books:
    """Our servers in the tables of one family.

    `sections`: many servers' chains go in many short sections of nat, the rules that lead to them in a last one.
    iptables-nft-restore looks each line's chain up in a list of all chains of its section (nft-cache.c), which takes
    minutes for 40,000 of them; iptables-legacy-restore replaces the whole table for each section, and gets one.
    """

    def __init__(self, form: Form, family: Family, *, sections: bool = False) -> None:
        self.form = form
        self.family = family
        self.sections = sections
        self.held: dict[VirtualAddress, Held] = {}
        self.owners: dict[str, VirtualAddress] = {}
        """KUBE-SVC chains and whose they are."""
        self.closed: set[Address] = set()
        """VIPs in KUBE-CLUSTER-IPS."""
        self.orphans: list[str] = []
        """Chains with names of ours that nothing leads to."""
        self.tidy = True
        """The chains that all servers share hold their rules and nothing else."""
        self.uses: Counter[Address] = Counter()

    # -------------------------------------------------------------------------------------------------- reading

    @classmethod
    def read(cls, form: Form, family: Family, tables: Mapping[str, Table], *, sections: bool = False) -> "Books":
        """From tables that are ours."""
        books = cls(form, family, sections=sections)
        nat, filters = tables.get("nat", Table()), tables.get("filter", Table())
        for rule in nat.chains.get(SERVICES, ()):
            found = _portal(rule)
            if found is None or found[0] in books.held or not SERVICE_CHAIN.fullmatch(found[2]):
                books.tidy = False
                continue
            at, comment, svc = found
            held = _rebuild(form, at, comment, svc, nat.chains, rule) if svc not in books.owners else None
            books._put(at, held or _damaged(VirtualServer(at), ()))
        refusals = filters.chains.get(SERVICES, [])
        if not refusals or not same_rule(refusals[-1], CLOSED):
            books.tidy = False
        for rule in refusals[:-1]:
            found = _portal(rule)
            if found is None or found[0] in books.held or found[2] not in ("REJECT", "DROP"):
                books.tidy = False
                continue
            books._put(found[0], _rebuild_refusal(form, found[0], found[1], rule))
        for rule in filters.chains.get(CLUSTER_IPS, ()):
            to = _TO.search(rule)
            address = _packed(to[1]) if to else None
            if address is None or address in books.closed or not same_rule(rule, closed_ports(address)):
                books.tidy = False
            else:
                books.closed.add(address)
        books.tidy &= books.closed == books.uses.keys() and CLUSTER_IPS in filters.chains
        known = {name for held in books.held.values() for name in held.chains}
        books.orphans = [name for name in nat.chains if SERVICE_CHAIN.fullmatch(name) and name not in known]
        return books

    def _put(self, at: VirtualAddress, held: Held) -> None:
        self.drop(at)
        self.held[at] = held
        self.uses[at.address] += 1
        if held.chains:
            self.owners[held.chains[0]] = at

    def drop(self, at: VirtualAddress) -> None:
        """Forget a server."""
        old = self.held.pop(at, None)
        if old is None:
            return
        self.uses[at.address] -= 1
        if not self.uses[at.address]:
            del self.uses[at.address]
        if old.chains and self.owners.get(old.chains[0]) == at:
            del self.owners[old.chains[0]]

    def apply(self, script: Script) -> None:
        """Know what a script did that went through."""
        for at, _ in script.after:
            self.drop(at)
        for at, held in script.after:
            if held is not None:
                self._put(at, held)
        self.closed = script.closed
        if script.whole:
            self.tidy, self.orphans = True, []

    # ------------------------------------------------------------------------------------------------- writing

    def compose(self, wanted: Wanted, *, whole: bool = False) -> Script:
        """The text that gives each of these addresses its wanted server; an empty one when they have it."""
        form = self.form
        named = self._names(wanted)
        held = self.held
        whole = whole or not self.tidy or any(at in held and held[at].damaged for at, _ in wanted)
        declare: Chains = {}
        after: list[tuple[VirtualAddress, Held | None]] = []
        nat_edits: list[tuple[VirtualAddress, str, list[str], str, str]] = []
        filter_edits: list[tuple[VirtualAddress, str, str, str]] = []
        previous: set[str] = set(self.orphans) if whole else set()
        uses = Counter(self.uses)
        for at, new in wanted:
            old, before = held.get(at), None
            if old is not None:
                before = render(form, old.server, old.seed) if not old.damaged else None
                previous.update(old.chains)
                uses[at.address] -= 1
            portal_before, refusal_before = (before.portal, before.refusal) if before else ("", "")
            uses[at.address] += new is not None
            if new is None:
                after.append((at, None))
                nat_edits.append((at, f"# - {at}", [], portal_before, ""))
                filter_edits.append((at, f"# - {at}", refusal_before, ""))
                continue
            rendered = render(form, new, named[at])
            after.append((at, Held(new, named[at], tuple(rendered.chains))))
            kept = before.chains if before else {}
            changed = {name: rules for name, rules in rendered.chains.items() if kept.get(name) != rules}
            declare.update(changed)
            head = f"# {'~' if old else '+'} {at} {service_text(form, at, new.label)}"
            if changed or portal_before or rendered.portal:
                nat_edits.append((at, head, list(changed), portal_before, rendered.portal))
            if refusal_before or rendered.refusal:
                filter_edits.append((at, head, refusal_before, rendered.refusal))
        if previous:
            gone = sorted(previous.difference(*(one.chains for _, one in after if one)))
            carried = frozenset(name for name in declare if name in previous and name.startswith("KUBE-SEP-"))
        else:
            gone, carried = [], frozenset()
        closed = {address for address, count in uses.items() if count > 0}
        edits = sum(was != now for *_, was, now in nat_edits) + sum(was != now for *_, was, now in filter_edits)
        whole = whole or edits > max(FEW, len(self.held) // 4)
        writer = _Writer()
        moving = {at for at, _ in wanted}
        self._filter(writer, filter_edits, closed, whole, moving)
        self._nat(writer, nat_edits, declare, gone, whole, moving)
        return Script(writer.lines, writer.blame, after, closed, whole, carried)

    def _names(self, wanted: Wanted) -> dict[VirtualAddress, str]:
        """What each server's chains are named after. Who has a usual name keeps it; a second one gets its own."""
        moving = {at for at, _ in wanted}
        named: dict[VirtualAddress, str] = {}
        taken: set[str] = set()
        choices = {at: seeds(self.form, at, service_text(self.form, at, new.label)) for at, new in wanted if new}
        for at, both in choices.items():
            old = self.held.get(at)
            if old is not None and old.chains and not old.damaged and old.seed in both:
                named[at] = old.seed
                taken.add(old.seed)
        for at, both in choices.items():
            if at not in named:
                usual, own = both
                owner = self.owners.get(chain_name("SVC", usual)) if self.owners else None
                named[at] = own if usual in taken or (owner is not None and owner not in moving) else usual
                taken.add(named[at])
        return named

    def _filter(
        self,
        writer: "_Writer",
        edits: list[tuple[VirtualAddress, str, str, str]],
        closed: set[Address],
        whole: bool,
        moving: set[VirtualAddress],
    ) -> None:
        writer.begin("filter")
        if whole:
            writer.lines += [f":{SERVICES} - [0:0]", f":{CLUSTER_IPS} - [0:0]"]
            rest = (held.server for at, held in self.held.items() if at not in moving and not held.chains)
            writer.lines += [f"-A {SERVICES} {refusal(self.form, server)}" for server in rest]
        for at, head, was, now in edits:
            if whole:
                if now:
                    writer.block(at, head, (f"-A {SERVICES} {now}",))
            elif was != now:
                writer.block(at, head, _edits(was, now))
        if whole:
            writer.lines.append(f"-A {SERVICES} {CLOSED}")
            writer.lines += [f"-A {CLUSTER_IPS} {closed_ports(address)}" for address in sorted(closed)]
        else:
            writer.lines += [f"-D {CLUSTER_IPS} {closed_ports(each)}" for each in sorted(self.closed - closed)]
            writer.lines += [f"-I {CLUSTER_IPS} {closed_ports(each)}" for each in sorted(closed - self.closed)]
        writer.commit()

    def _nat(
        self,
        writer: "_Writer",
        edits: list[tuple[VirtualAddress, str, list[str], str, str]],
        declare: Chains,
        gone: list[str],
        whole: bool,
        moving: set[VirtualAddress],
    ) -> None:
        split = self.sections and len(declare) + len(gone) > 4 * SECTION
        if split:
            self._chains_in_sections(writer, edits, declare)
        writer.begin("nat")
        if not split:
            writer.lines += _declared((*declare, *gone))
        if whole:
            writer.lines.append(f":{SERVICES} - [0:0]")
            rest = (held for at, held in self.held.items() if at not in moving and held.chains)
            writer.lines += [f"-A {SERVICES} {portal(self.form, held.server, held.chains[0])}" for held in rest]
        for at, head, chains, was, now in edits:
            lines = [] if split else _appended(declare, chains)
            if whole:
                lines += [f"-A {SERVICES} {now}"] if now else []
            elif was != now:
                lines += _edits(was, now)
            if lines:
                writer.block(at, head, lines)
        if split:
            writer.commit()
            # emptied first, all of them: then none leads to another any more
            for verb in (":{} - [0:0]", "-X {}"):
                for start in range(0, len(gone), 4 * SECTION):
                    writer.begin("nat")
                    writer.lines += map(verb.format, gone[start : start + 4 * SECTION])
                    writer.commit()
        else:
            writer.lines += [f"-X {name}" for name in gone]
            writer.commit()

    def _chains_in_sections(
        self, writer: "_Writer", edits: list[tuple[VirtualAddress, str, list[str], str, str]], declare: Chains
    ) -> None:
        """Chains that nothing leads to yet, or that stay right whichever section is the last to be carried out."""
        some = [edit for edit in edits if edit[2]]
        for start in range(0, len(some), SECTION):
            writer.begin("nat")
            part = some[start : start + SECTION]
            writer.lines += _declared([name for _, _, chains, _, _ in part for name in chains])
            for at, head, chains, _, _ in part:
                writer.block(at, head, _appended(declare, chains))
            writer.commit()


def _declared(names: Iterable[str]) -> list[str]:
    """From Z to A: both back ends keep chains sorted and look for each one's place from the front."""
    return [f":{name} - [0:0]" for name in sorted(names, reverse=True)]


def _appended(declare: Chains, chains: Sequence[str]) -> list[str]:
    return [f"-A {name} {rule}" for name in chains for rule in declare[name]]


def _edits(was: str, now: str) -> list[str]:
    """One rule of KUBE-SERVICES in place of another."""
    return [*([f"-D {SERVICES} {was}"] if was else ()), *([f"-I {SERVICES} {now}"] if now else ())]


class _Writer:
    """Restore text in the making."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.blame: list[tuple[int, int, VirtualAddress]] = []
        self._name = ""

    def begin(self, name: str) -> None:
        """A section of a table; one that stays empty leaves nothing behind."""
        self._name = f"*{name}"
        self.lines.append(self._name)

    def block(self, at: VirtualAddress, head: str, lines: Sequence[str]) -> None:
        """The lines of one server, behind a comment that names it."""
        self.lines.append(head)
        start = len(self.lines)
        self.lines += lines
        self.blame.append((start, len(self.lines), at))

    def commit(self) -> None:
        """The end of the section."""
        if self.lines[-1] is self._name:
            self.lines.pop()
        else:
            self.lines.append("COMMIT")


def _portal(rule: str) -> tuple[VirtualAddress, str, str] | None:
    """Where a rule of KUBE-SERVICES leads: virtual address, comment, target."""
    to, protocol, port = _TO.search(rule), _PROTOCOL.search(rule), _PORT.search(rule)
    comment, target = _COMMENT.search(rule), _TARGET.search(rule)
    address = _packed(to[1]) if to else None
    if address is None or not (protocol and port and comment and target) or int(port[1]) > 65535:
        return None
    return VirtualAddress(int(Protocol[protocol[1].upper()]), address, int(port[1])), comment[1], target[1]


def _packed(text: str) -> Address | None:
    try:
        return _address(text)
    except ValueError:
        return None


def _damaged(server: VirtualServer, chains: tuple[str, ...]) -> Held:
    return Held(msgspec.structs.replace(server, scheduler=DAMAGED, bound=False), "", chains)


def _rebuild(
    form: Form, at: VirtualAddress, comment: str, svc: str, chains: Mapping[str, list[str]], rule: str
) -> Held:
    """The server behind a portal; damaged unless its rules are what we write for it."""
    names = {svc: None}
    reals: dict[tuple[Address, int], RealServer] = {}
    persistence = 0
    for each in chains.get(svc, ()):
        jump = _SEP.search(each)
        if not jump:
            continue
        names[jump[1]] = None
        seconds = _SECONDS.search(each)
        if seconds:
            persistence = int(seconds[1])
            continue
        weight = _WEIGHT.search(each)
        rules = chains.get(jump[1]) or [""]
        to = _ENDPOINT.search(rules[-1])
        address = _packed(to[1].strip("[]")) if to else None
        if to and address is not None:
            reals[address, int(to[2])] = RealServer(address, int(to[2]), int(weight[1]) if weight else 1)
    label = label_of(form, at, comment.removesuffix(" cluster IP"))
    found = VirtualServer(at, tuple(sorted(reals.values())), persistence=persistence, bound=False, label=label or "")
    text = service_text(form, at, found.label)
    seed = next((one for one in seeds(form, at, text) if chain_name("SVC", one) == svc), None)
    if label is None or seed is None or not reals:
        return _damaged(found, tuple(names))
    for masquerade in Masquerade:
        server = msgspec.structs.replace(found, masquerade=masquerade)
        rendered = render(form, server, seed)
        if (
            rendered.chains.keys() == names.keys()
            and same_rule(rule, rendered.portal)
            and all(same_rules(rules, chains.get(name, ())) for name, rules in rendered.chains.items())
        ):
            return Held(server, seed, tuple(rendered.chains))
    return _damaged(found, tuple(names))


def _rebuild_refusal(form: Form, at: VirtualAddress, comment: str, rule: str) -> Held:
    text, _, _ = comment.partition(" has no ")
    label = label_of(form, at, text)
    for no_servers in NoServers:
        server = VirtualServer(at, no_servers=no_servers, bound=False, label=label or "")
        if label is not None and same_rule(rule, refusal(form, server)):
            return Held(server, "", ())
    return _damaged(VirtualServer(at), ())
