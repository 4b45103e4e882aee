"""iptables-restore input: what it says, whose each part of it is, and in which order it is put down. Pure.

A `Script` is a snapshot: what it says depends on nothing that happens later. It says it block by block, so that the
tool reads the beginning while the end is being made.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from msgspec import Struct

from .iptables_chains import (
    ChainKey,
    Line,
    Rendered,
    Site,
    arrange,
    balance,
    client_rules,
    endpoint_rules,
    lines_of,
    portal,
)
from .iptables_text import CLUSTER_IPS, LAST, SERVICES, SHARED, Form, chain_name, closed_ports, unallocated
from .model import Address, Family, RealServer, VirtualAddress, VirtualServer, format_address

SECTION = 400
"""Chains that come, or go, in one section. 60,000 chains took 28 s with 400, 30 s with 200, 41 s with 1000."""

Wanted = Sequence[tuple[VirtualAddress, VirtualServer | None]]
"""Virtual addresses, and the server that each shall have; None = none."""
Users = tuple[VirtualAddress, ...]


class Block(NamedTuple):
    """Some whole lines, and the servers that they are about."""

    text: str
    users: Users = ()


class Newcomer(Struct, gc=False):
    """A group that comes as a plain cluster IP, as most do: what `Group` would say of it, made when it is asked for."""

    form: Form
    site: Site
    server: VirtualServer
    hosts: tuple[str, ...] = ()
    chains: tuple[str, ...] = ()

    def names(self, table: str) -> Sequence[str]:
        """The chains to be written: the Service's, and one for each endpoint."""
        if table != "nat":
            return ()
        if not self.chains:
            seed, hosts = self.site.seed, []
            chains = [chain_name("SVC", seed)]
            for real in self.server.real_servers:
                host = format_address(real.address)
                hosts.append(host)
                end = f"[{host}]:{real.port}" if ":" in host else f"{host}:{real.port}"
                chains.append(chain_name("SEP", seed + end))
            self.chains, self.hosts = tuple(chains), tuple(hosts)
        return self.chains

    def edits(self) -> int:
        """Its rule in KUBE-SERVICES."""
        return 1

    def blocks(self, table: str, *, chains: bool, lines: bool, whole: bool) -> Iterator[Block]:
        """What it says in one table, below a heading."""
        if table != "nat":
            return
        form, server, words = self.form, self.server, self.site.text
        at, service = server.at, self.names(table)[0]
        body = lead = ""
        if chains:
            ports, weights = zip(*[(real.port, real.weight) for real in server.real_servers], strict=True)
            shape = _shape(form, at.protocol, len(at.address), server.persistence, weights)
            body = shape.format(words, *self.chains, *self.hosts, *ports)
            if clients := client_rules(form, server, words):
                body = _text(f"-A {service} {rule}" for rule in clients) + body
        if lines:
            lead = f"{'-A' if whole else '-I'} {SERVICES} {portal(self.site, service)}\n"
        yield Block(f"# + {at} {words}\n{body}{lead}", (at,))


@lru_cache(256)
def _shape(form: Form, protocol: int, width: int, persistence: int, weights: tuple[int, ...]) -> str:
    """The chains of a plain cluster IP, to be filled in: comment, chain, and the endpoints: chains, hosts, ports."""
    count = len(weights)
    seps, hosts, ports = ([f"{{{2 + kind * count + n}}}" for n in range(count)] for kind in range(3))
    ends = [f"{host}:{port}" if width == 4 else f"[{host}]:{port}" for host, port in zip(hosts, ports, strict=True)]
    nowhere = Address(bytes(width))
    reals = tuple(RealServer(nowhere, n, weight) for n, weight in enumerate(weights))
    server = VirtualServer(VirtualAddress(protocol, nowhere, 0), reals, persistence=persistence)
    lines = [f"-A {{1}} {rule}" for rule in balance(form, server, "{0}", ends, seps)]
    remembers = [bool(persistence and weight) for weight in weights]
    for sep, rules in endpoint_rules(form, Site(server, None, "{0}"), zip(seps, ends, remembers, strict=True)):
        lines += [f"-A {sep} {rule}" for rule in rules]
    return _text(lines)


class Group(Struct):
    """A group that a change touches: its rules before and after, and which of the addresses in it are to change."""

    before: Rendered
    after: Rendered
    moving: dict[VirtualAddress, str]
    """With a heading for each."""
    changed: list[ChainKey] = []
    """The chains to be written."""

    def __post_init__(self) -> None:
        kept, chains = self.before.chains, self.after.chains
        self.changed = [key for key in chains if kept.get(key) != chains[key]] if kept else list(chains)

    def names(self, table: str) -> Sequence[str]:
        """The chains to be written in one table."""
        return [name for one, name in self.changed if one == table]

    def edits(self) -> int:
        """Rules in shared chains that come or go."""
        if not self.before.lines or not self.after.lines:
            return len(self.before.lines) + len(self.after.lines)
        return len(set(self.before.lines) ^ set(self.after.lines))

    def blocks(self, table: str, *, chains: bool, lines: bool, whole: bool) -> Iterator[Block]:
        """What it says in one table, its chains and then its rules, below headings that name those that change."""
        names = self.names(table) if chains else ()
        before, after = self._edited(table, whole=whole) if lines else ([], [])
        verb = "-A" if whole else "-I"
        if len(self.moving) == 1:
            rules = [f"-A {name} {rule}" for name in names for rule in self.after.chains[table, name]]
            rules += [f"-D {line.chain[1]} {line.rule}" for line in before]
            rules += [f"{verb} {line.chain[1]} {line.rule}" for line in after]
            if rules:
                yield Block(_text([*self.moving.values(), *rules]), tuple(self.moving))
            return
        parts: dict[VirtualAddress, list[tuple[Users, list[str]]]] = {}
        for name in names:
            users = self._blamed(self.after.users.get((table, name), ()))
            rules = [f"-A {name} {rule}" for rule in self.after.chains[table, name]]
            parts.setdefault(users[0], []).append((users, rules))
        for action, edits in (("-D", before), (verb, after)):
            for line in edits:
                users = self._blamed((line.at, line.at._replace(inside=True)))
                parts.setdefault(users[0], []).append((users, [f"{action} {line.chain[1]} {line.rule}"]))
        if names:  # chains that many share are sent once, below the headings of all
            yield Block(_text(head for at, head in self.moving.items() if at not in parts))
        for at, part in parts.items():
            yield Block(self.moving[at] + "\n")
            for users, rules in part:
                yield Block(_text(rules), users)

    def _edited(self, table: str, *, whole: bool) -> tuple[list[Line], list[Line]]:
        """Its rules in shared chains that go, and those that come."""
        before = [] if whole else [line for line in self.before.lines if line.chain[0] == table]
        after = [line for line in self.after.lines if line.chain[0] == table]
        if before and after:
            return [line for line in before if line not in after], [line for line in after if line not in before]
        return before, after

    def _blamed(self, users: Iterable[VirtualAddress]) -> Users:
        """Whom a refused rule concerns: those of its users that are to change, else all that are."""
        return tuple([at for at in users if at in self.moving]) or tuple(self.moving)


class Staying(NamedTuple):
    """What else stands in shared chains: it is said again where these are written whole."""

    groups: Sequence[Sequence[VirtualServer]] = ()
    damaged: Sequence[tuple[ChainKey, str]] = ()

    def lines(self, form: Form, table: str) -> Iterator[str]:
        """Its rules in the shared chains of one table."""
        for servers in self.groups:
            for site in arrange(form, servers):
                yield from (
                    f"-A {line.chain[1]} {line.rule}" for line in lines_of(form, site) if line.chain[0] == table
                )
        yield from (f"-A {chain} {rule}" for (one, chain), rule in self.damaged if one == table)


class Script(Struct, frozen=True):
    """An iptables-restore input.

    `after`: what was wanted. `whole`: shared chains are written anew, with `staying`; else they are edited.
    `sections`: many chains go in many short sections of a table, the rules that lead to them in a last one.
    `closed`, `opened`: cluster IPs that leave KUBE-CLUSTER-IPS and come into it.
    """

    form: Form
    family: Family
    sections: bool
    after: Wanted
    parts: Sequence[Group | Newcomer] = ()
    gone: Sequence[ChainKey] = ()
    whole: bool = False
    staying: Staying = Staying()
    closed: Sequence[Address] = ()
    opened: Sequence[Address] = ()
    carried: frozenset[str] = frozenset()
    """KUBE-SEP chains that are written anew and whose counters shall go on."""

    def __bool__(self) -> bool:
        """It says something."""
        return next(self.blocks(), None) is not None

    def text(self, hits: Mapping[str, int] | None = None) -> str:
        """The input itself; with `hits` the counters of carried chains, for `--counters`."""
        return "".join(self.pieces(hits))

    def pieces(self, hits: Mapping[str, int] | None = None) -> Iterator[str]:
        """The same, piece by piece as it is made."""
        texts = (block.text for block in self.blocks())
        if not hits:
            return texts
        carried = {name: hits.get(name, 0) for name in self.carried}
        return (
            _SEND.sub(lambda rule: f"[{carried[rule[1]]}:0] {rule[0]}" if rule[1] in carried else rule[0], text)
            for text in texts
        )

    def whose(self, line: int) -> Users:
        """The servers that a line, counted from 1, is about."""
        for block in self.blocks():
            line -= block.text.count("\n")
            if line <= 0:
                return block.users
        return ()

    def blocks(self) -> Iterator[Block]:
        """Everything it says, in order; nothing, where there is nothing to do."""
        for table in ("filter", "nat"):
            gone = [name for one, name in self.gone if one == table]
            split = self.sections and sum(len(part.names(table)) for part in self.parts) + len(gone) > SECTION
            if not split:
                yield from _section(table, self._one_section(table, gone))
                continue
            # chains that nothing leads to yet, or that stay right whichever section is the last to be carried out
            for portion in self._portions(table):
                yield from _section(table, self._chains(table, portion, lines=False))
            yield from _section(table, self._rules(table, self._edits(table)))
            # emptied first, all of them: then none leads to another any more
            for verb in (":{} - [0:0]", "-X {}"):
                for start in range(0, len(gone), SECTION):
                    yield from _section(table, [Block(_text(map(verb.format, gone[start : start + SECTION])))])

    def _one_section(self, table: str, gone: Sequence[str]) -> Iterator[Block]:
        """Everything about a table."""
        yield Block(_declared(gone))
        yield from self._rules(
            table, (block for portion in self._portions(table) for block in self._chains(table, portion, lines=True))
        )
        yield Block(_text(f"-X {name}" for name in gone))

    def _portions(self, table: str) -> Iterator[list[Group | Newcomer]]:
        """The parts, as many together as have the chains of a section."""
        portion: list[Group | Newcomer] = []
        count = 0
        for part in self.parts:
            portion.append(part)
            count += len(part.names(table))
            if count >= SECTION:
                yield portion
                portion, count = [], 0
        yield portion

    def _chains(self, table: str, portion: Sequence[Group | Newcomer], *, lines: bool) -> Iterator[Block]:
        """The chains of some parts, with their rules in shared chains or without."""
        yield Block(_declared(name for part in portion for name in part.names(table)))
        for part in portion:
            yield from part.blocks(table, chains=True, lines=lines, whole=self.whole)

    def _edits(self, table: str) -> Iterator[Block]:
        """The rules of all parts in shared chains."""
        for part in self.parts:
            yield from part.blocks(table, chains=False, lines=True, whole=self.whole)

    def _rules(self, table: str, parts: Iterable[Block]) -> Iterator[Block]:
        """What the parts say, amid what stands in shared chains before and behind it."""
        if self.whole:
            shared = (*SHARED[table], CLUSTER_IPS) if table == "filter" else SHARED[table]
            yield Block(_text(f":{name} - [0:0]" for name in shared))
            yield Block(_text(self.staying.lines(self.form, table)))
        yield from parts
        if self.whole:
            yield Block(_text(f"-A {key[1]} {rule}" for key, rule in LAST.items() if key[0] == table))
        if table == "filter":
            yield Block(_text(self._cluster_ips()))

    def _cluster_ips(self) -> Iterator[str]:
        yield from (f"-D {CLUSTER_IPS} {closed_ports(address)}" for address in self.closed)
        verb = "-A" if self.whole else "-I"
        yield from (f"{verb} {CLUSTER_IPS} {closed_ports(address)}" for address in self.opened)
        if self.whole:
            yield from (f"-A {CLUSTER_IPS} {rule}" for rule in unallocated(self.form, self.family))


_SEND = re.compile(r"^-A (KUBE-SEP-[A-Z2-7]{16}) -p ", re.MULTILINE)


def _text(lines: Iterable[str]) -> str:
    text = "\n".join(lines)
    return text + "\n" if text else ""


def _declared(names: Iterable[str]) -> str:
    """From Z to A: both back ends keep chains sorted and look for each one's place from the front."""
    return _text([f":{name} - [0:0]" for name in sorted(names, reverse=True)])


def _section(table: str, blocks: Iterable[Block]) -> Iterator[Block]:
    """A section of a table; one that stays empty leaves nothing behind."""
    begun = False
    for block in blocks:
        if block.text:
            if not begun:
                yield Block(f"*{table}\n")
                begun = True
            yield block
    if begun:
        yield Block("COMMIT\n")
