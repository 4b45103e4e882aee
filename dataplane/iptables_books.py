"""What one family's tables hold of ours, and the restore text that takes it on. Pure.

`Books` is made from a look at the kernel and kept by what commits did, so that a change is a text of the changed chains
only: shared chains are edited rule by rule (`-D`, `-I`) and sent whole only when much of them changes. A chain that
stays as it is is never sent, which is why the counters of KUBE-SEP go on counting. A change is made group by group, so
what all addresses of a ServicePort share is sent once.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from msgspec import Struct

from .iptables_chains import ChainKey, Rendered, Site, arrange, group_of, lines_of, render
from .iptables_reading import DAMAGED, Contents, Damage, read
from .iptables_save import Table
from .iptables_text import CLUSTER_IPS, LAST, SHARED, Form, closed_ports, service_text, unallocated
from .model import Address, Family, Kind, VirtualAddress, VirtualServer

FEW = 32
"""Rules of shared chains that are edited one by one; more of them, or a fourth of all, and they are sent whole."""

Wanted = Sequence[tuple[VirtualAddress, VirtualServer | None]]
"""Virtual addresses, and the server that each shall have; None = none."""


class Script(Struct, frozen=True):
    """An iptables-restore input. `lines` and whose each is, by number from 1; `after`: what was wanted."""

    lines: list[str]
    blame: dict[int, tuple[VirtualAddress, ...]]
    after: Wanted
    whole: bool
    carried: frozenset[str]
    """KUBE-SEP chains that are written anew and whose counters shall go on."""

    def text(self, hits: Mapping[str, int] | None = None) -> str:
        """The input itself; with `hits` the counters of carried chains, for `--counters`."""
        if not hits:
            return "".join(line + "\n" for line in self.lines)
        carried = {f"-A {name} -p ": hits.get(name, 0) for name in self.carried}
        width = len("-A KUBE-SEP-0123456789ABCDEF -p ")
        return "".join(
            f"[{carried[line[:width]]}:0] {line}\n" if line[:width] in carried else line + "\n" for line in self.lines
        )


class _Group(Struct):
    """A group that a change touches: its rules before and after, and which of the addresses in it are to change."""

    before: Rendered
    after: Rendered
    moving: list[VirtualAddress]
    heads: dict[VirtualAddress, str]

    def blamed(self, users: Iterable[VirtualAddress]) -> tuple[VirtualAddress, ...]:
        """Whom a refused rule concerns: those of its users that are to change, else all that are."""
        return tuple(at for at in users if at in self.heads) or tuple(self.moving)


_Rows = list[tuple[tuple[VirtualAddress, ...], str]]


class Books:
    """Our servers in the tables of one family."""

    def __init__(self, form: Form, family: Family, contents: Contents | None = None) -> None:
        contents = contents or Contents()
        self.form = form
        self.family = family
        self.held: dict[VirtualAddress, VirtualServer] = {}
        self.damage: dict[VirtualAddress, Damage] = contents.damage
        self.groups: dict[str, tuple[VirtualAddress, ...]] = {}
        """The servers that are as they should be, by what their chains are named after."""
        self.orphans = contents.orphans
        self.tidy = contents.tidy
        self.uses: Counter[Address] = Counter()
        """How many servers each cluster IP has; those in KUBE-CLUSTER-IPS, where the tables are tidy."""
        for server in contents.servers.values():
            self._put(server)

    @classmethod
    def read(cls, form: Form, family: Family, tables: Mapping[str, Table]) -> "Books":
        """From tables that are ours."""
        return cls(form, family, read(form, family, tables))

    def holds(self, at: VirtualAddress) -> bool:
        """There is a server there, and its rules are as they should be."""
        return at in self.held and at not in self.damage

    def sites(self) -> Iterator[list[Site]]:
        """Everything that is as it should be, group by group, with the names of its chains."""
        for members in self.groups.values():
            yield arrange(self.form, (self.held[at] for at in members))

    def _put(self, server: VirtualServer) -> None:
        at = server.at
        self.held[at] = server
        if server.kind is Kind.CLUSTER_IP:
            self.uses[at.address] += 1
        if server.scheduler != DAMAGED:
            group = group_of(self.form, server)
            self.groups[group] = (*self.groups.get(group, ()), at)

    def _drop(self, at: VirtualAddress) -> None:
        old = self.held.pop(at, None)
        if old is None:
            return
        if old.kind is Kind.CLUSTER_IP:
            self.uses[at.address] -= 1
            if not self.uses[at.address]:
                del self.uses[at.address]
        if self.damage.pop(at, None) is None:
            group = group_of(self.form, old)
            left = tuple(each for each in self.groups[group] if each != at)
            if left:
                self.groups[group] = left
            else:
                del self.groups[group]

    def apply(self, script: Script) -> None:
        """Know what a script did that went through."""
        for at, _ in script.after:
            self._drop(at)
        for _, server in script.after:
            if server is not None:
                self._put(server)
        if script.whole:
            self.tidy, self.orphans = True, frozenset()

    # ------------------------------------------------------------------------------------------------- writing

    def compose(self, wanted: Wanted, *, whole: bool = False) -> Script:
        """The text that gives each of these addresses its wanted server; an empty one when they have it."""
        groups = self._touched(wanted)
        previous = {key for group in groups.values() for key in group.before.chains}
        if whole or not self.tidy or any(at in self.damage for at, _ in wanted):
            whole = True
            moving = {at for at, _ in wanted}
            previous |= self.orphans.union(*(one.chains for at, one in self.damage.items() if at in moving))
            previous.difference_update(*(one.chains for at, one in self.damage.items() if at not in moving))
        gone = sorted(previous.difference(*(group.after.chains for group in groups.values())))
        edits = sum(len(set(group.before.lines) ^ set(group.after.lines)) for group in groups.values())
        whole = whole or edits > max(FEW, len(self.held) // 4)
        opened, closed = self._cluster_ips(wanted)
        # chains whose rules cannot be relied on: damaged servers use them, too
        doubtful: frozenset[ChainKey] = frozenset().union(*(damage.chains for damage in self.damage.values()))
        writer = _Writer()
        declared: set[ChainKey] = set()
        for table in ("filter", "nat"):
            rows: _Rows = []
            mine: _Rows = []
            for group in groups.values():
                changed = [
                    key
                    for key, rules in group.after.chains.items()
                    if key[0] == table and (group.before.chains.get(key) != rules or key in doubtful)
                ]
                declared.update(changed)
                rows += [((), f":{name} - [0:0]") for _, name in changed]
                mine += _rows(group, table, changed, whole=whole)
            rows += [((), f":{name} - [0:0]") for one, name in gone if one == table]
            if whole:
                rows += [
                    ((), f":{name} - [0:0]") for name in (*SHARED[table], *([CLUSTER_IPS] if table == "filter" else []))
                ]
                rows += self._others(table, groups, {at for at, _ in wanted})
            rows += mine
            if whole:
                rows += [((), f"-A {key[1]} {rule}") for key, rule in LAST.items() if key[0] == table]
            if table == "filter":
                rows += self._closed_ports(opened, closed, whole=whole)
            rows += [((), f"-X {name}") for one, name in gone if one == table]
            writer.table(table, rows)
        carried = frozenset(name for _, name in declared & previous if name.startswith("KUBE-SEP-"))
        return Script(writer.lines, writer.blame, wanted, whole, carried)

    def _touched(self, wanted: Wanted) -> dict[str, _Group]:
        """The groups in which something changes, as they are and as they shall be."""
        moving: dict[str, dict[VirtualAddress, VirtualServer | None]] = {}
        for at, new in wanted:
            old = self.held.get(at)
            if old is not None and at not in self.damage:
                moving.setdefault(group_of(self.form, old), {})[at] = None
            elif new is None:
                moving.setdefault("", {})[at] = None  # damaged, and to go: nothing is written for it
        for at, new in wanted:
            if new is not None:
                moving.setdefault(group_of(self.form, new), {})[at] = new
        groups = {}
        for name, changes in moving.items():
            members = self.groups.get(name, ())
            stay = [self.held[at] for at in members if at not in changes]
            groups[name] = _Group(
                render(self.form, (self.held[at] for at in members)),
                render(self.form, (*stay, *filter(None, changes.values()))),
                list(changes),
                {at: self._head(at, new) for at, new in changes.items()},
            )
        return groups

    def _head(self, at: VirtualAddress, new: VirtualServer | None) -> str:
        if new is None:
            return f"# - {at}"
        return f"# {'~' if at in self.held else '+'} {at} {service_text(self.form, at, new.label)}"

    def _others(self, table: str, touched: Mapping[str, object], moving: set[VirtualAddress]) -> _Rows:
        """The rules in shared chains of everything that stays, damaged or not."""
        lines = (
            (line.chain, line.rule)
            for group, members in self.groups.items()
            if group not in touched
            for site in arrange(self.form, (self.held[at] for at in members))
            for line in lines_of(self.form, site)
        )
        damaged = (line for at, damage in self.damage.items() if at not in moving for line in damage.lines)
        return [((), f"-A {chain} {rule}") for some in (lines, damaged) for (one, chain), rule in some if one == table]

    def _cluster_ips(self, wanted: Wanted) -> tuple[list[Address], list[Address]]:
        """Cluster IPs that get, and that lose, their rule in KUBE-CLUSTER-IPS."""
        steps: Counter[Address] = Counter()
        for at, new in wanted:
            old = self.held.get(at)
            steps[at.address] += (new is not None and new.kind is Kind.CLUSTER_IP) - (
                old is not None and old.kind is Kind.CLUSTER_IP
            )
        uses = {address: self.uses.get(address, 0) for address in steps}
        opened = [address for address, step in steps.items() if not uses[address] and step > 0]
        closed = [address for address, step in steps.items() if uses[address] and uses[address] + step <= 0]
        return sorted(opened), sorted(closed)

    def _closed_ports(self, opened: list[Address], closed: list[Address], *, whole: bool) -> _Rows:
        if not whole:
            rows = [f"-D {CLUSTER_IPS} {closed_ports(address)}" for address in closed]
            return [((), row) for row in (*rows, *(f"-I {CLUSTER_IPS} {closed_ports(each)}" for each in opened))]
        addresses = self.uses.keys() - set(closed) | set(opened)
        rows = [f"-A {CLUSTER_IPS} {closed_ports(each)}" for each in sorted(addresses)]
        rows += [f"-A {CLUSTER_IPS} {rule}" for rule in unallocated(self.form, self.family)]
        return [((), row) for row in rows]


def _rows(group: _Group, table: str, changed: list[ChainKey], *, whole: bool) -> _Rows:
    """A group's lines of restore text in one table, each part below a heading."""
    parts: dict[VirtualAddress, _Rows] = {at: [] for at in group.moving}
    for key in changed:
        users = group.blamed(group.after.users[key])
        parts[users[0]] += [(users, f"-A {key[1]} {rule}") for rule in group.after.chains[key]]
    for verb, lines, others in (
        ("-D", group.before.lines, set(group.after.lines)),
        ("-A" if whole else "-I", group.after.lines, set() if whole else set(group.before.lines)),
    ):
        if verb == "-D" and whole:
            continue
        for line in lines:
            if line.chain[0] == table and line not in others:
                users = group.blamed((line.at, line.at._replace(inside=True)))
                parts[users[0]].append((users, f"{verb} {line.chain[1]} {line.rule}"))
    # chains that many share are sent once, below the headings of all
    rows: _Rows = [((), group.heads[at]) for at, part in parts.items() if changed and not part]
    for at, part in parts.items():
        rows += [((), group.heads[at]), *part] if part else []
    return rows


class _Writer:
    """Restore text in the making."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.blame: dict[int, tuple[VirtualAddress, ...]] = {}

    def table(self, name: str, rows: _Rows) -> None:
        if rows:
            self.lines.append(f"*{name}")
            for users, line in rows:
                self.lines.append(line)
                if users:
                    self.blame[len(self.lines)] = users
            self.lines.append("COMMIT")
