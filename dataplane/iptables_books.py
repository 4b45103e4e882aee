"""What one family's tables hold of ours, and the restore text that takes it on. Pure.

`Books` is made from a look at the kernel and kept by what commits did, so that a change is a text of the changed chains
only: shared chains are edited rule by rule (`-D`, `-I`) and sent whole only when much of them changes. A chain that
stays as it is is never sent, which is why the counters of KUBE-SEP go on counting. A change is made group by group, so
what all addresses of a ServicePort share is sent once.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from .iptables_chains import ChainKey, Site, arrange, group_of, lines_of, render
from .iptables_reading import DAMAGED, Contents, Damage, read
from .iptables_save import Table
from .iptables_script import Group, Script, Wanted, Writer
from .iptables_text import CLUSTER_IPS, LAST, SHARED, Form, closed_ports, service_text, unallocated
from .model import Address, Family, Kind, VirtualAddress, VirtualServer

SECTION = 400
"""Chains that come, or go, in one section. 60,000 chains took 28 s with 400, 30 s with 200, 41 s with 1000."""
FEW = 32
"""Rules of shared chains that are edited one by one; more of them, or a fourth of all, and they are sent whole."""


class Books:
    """Our servers in the tables of one family.

    `sections`: many servers' chains go in many short sections of a table, the rules that lead to them in a last one.
    iptables-nft-restore looks each line's chain up in a list of all chains of its section (nft-cache.c), which takes
    minutes for 40,000 of them; iptables-legacy-restore replaces the whole table for each section, and gets one.
    """

    def __init__(self, form: Form, family: Family, contents: Contents | None = None, *, sections: bool = False) -> None:
        contents = contents or Contents()
        self.form = form
        self.family = family
        self.sections = sections
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
    def read(cls, form: Form, family: Family, tables: Mapping[str, Table], *, sections: bool = False) -> "Books":
        """From tables that are ours."""
        return cls(form, family, read(form, family, tables), sections=sections)

    def holds(self, at: VirtualAddress) -> bool:
        """There is a server there, and its rules are as they should be."""
        return at in self.held and at not in self.damage

    def sites(self) -> Iterator[list[Site]]:
        """Everything that is as it should be, group by group, with the names of its chains."""
        for members in self.groups.values():
            yield arrange(self.form, (self.held[at] for at in members))

    def mates(self, server: VirtualServer) -> list[VirtualServer]:
        """The servers that share chains with one of ours, itself among them."""
        return [self.held[at] for at in self.groups.get(group_of(self.form, server), ())]

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
        moving = {at for at, _ in wanted}
        previous = {key for group in groups for key in group.before.chains}
        if whole or not self.tidy or not moving.isdisjoint(self.damage):
            whole = True
            previous |= self.orphans.union(*(one.chains for at, one in self.damage.items() if at in moving))
            previous.difference_update(*(one.chains for at, one in self.damage.items() if at not in moving))
        for group in groups:
            kept, chains = group.before.chains, group.after.chains
            group.changed = [key for key in chains if kept.get(key) != chains[key]] if kept else list(chains)
        gone: list[ChainKey] = []
        carried: frozenset[str] = frozenset()
        if previous:
            gone = sorted(previous.difference(*(group.after.chains for group in groups)))
            declared = previous.intersection(key for group in groups for key in group.changed)
            carried = frozenset(name for _, name in declared if name.startswith("KUBE-SEP-"))
        whole = whole or sum(group.edits() for group in groups) > max(FEW, len(self.held) // 4)
        writer = Writer()
        for table in ("filter", "nat"):
            self._table(writer, table, groups, [name for one, name in gone if one == table], wanted, whole=whole)
        return Script(writer.lines, writer.blame, wanted, whole, carried)

    def _table(
        self, writer: Writer, table: str, groups: list[Group], gone: list[str], wanted: Wanted, *, whole: bool
    ) -> None:
        changed = [[name for one, name in group.changed if one == table] for group in groups]
        split = self.sections and sum(map(len, changed)) + len(gone) > SECTION
        if split:
            # chains that nothing leads to yet, or that stay right whichever section is the last to be carried out
            for part in _parts(groups, changed):
                writer.begin(table)
                writer.lines += _declared(name for _, names in part for name in names)
                for group, names in part:
                    writer.group(group, table, names, (), ())
                writer.commit()
        writer.begin(table)
        if not split:
            writer.lines += _declared(name for names in (*changed, gone) for name in names)
        if whole:
            writer.lines += [f":{name} - [0:0]" for name in SHARED[table]]
            writer.lines += [f":{CLUSTER_IPS} - [0:0]"] if table == "filter" else []
            writer.lines += self._others(table, wanted)
        for group, names in zip(groups, changed, strict=True):
            before = [] if whole else [line for line in group.before.lines if line.chain[0] == table]
            after = [line for line in group.after.lines if line.chain[0] == table]
            if before and after:
                before, after = (
                    [line for line in before if line not in after],
                    [line for line in after if line not in before],
                )
            writer.group(group, table, () if split else names, before, after, verb="-A" if whole else "-I")
        if whole:
            writer.lines += [f"-A {key[1]} {rule}" for key, rule in LAST.items() if key[0] == table]
        if table == "filter":
            writer.lines += self._cluster_ips(wanted, whole=whole)
        if not split:
            writer.lines += [f"-X {name}" for name in gone]
            writer.commit()
            return
        writer.commit()
        # emptied first, all of them: then none leads to another any more
        for verb in (":{} - [0:0]", "-X {}"):
            for start in range(0, len(gone), SECTION):
                writer.begin(table)
                writer.lines += map(verb.format, gone[start : start + SECTION])
                writer.commit()

    def _touched(self, wanted: Wanted) -> list[Group]:
        """The groups in which something changes, as they are and as they shall be."""
        form, held = self.form, self.held
        moving: dict[str, dict[VirtualAddress, VirtualServer | None]] = {}
        for at, new in wanted:
            if (old := held.get(at)) is not None and at not in self.damage:
                moving.setdefault(group_of(form, old), {})[at] = None
            elif new is None:
                moving.setdefault("", {})[at] = None  # damaged, and to go: nothing is written for it
        for at, new in wanted:
            if new is not None:
                moving.setdefault(group_of(form, new), {})[at] = new
        groups = []
        for name, changes in moving.items():
            members = self.groups.get(name, ())
            stay = [held[at] for at in members if at not in changes]
            come = [new for new in changes.values() if new is not None]
            before, after = render(form, [held[at] for at in members]), render(form, [*stay, *come])
            groups.append(Group(before, after, {at: self._head(at, new) for at, new in changes.items()}))
        return groups

    def _head(self, at: VirtualAddress, new: VirtualServer | None) -> str:
        if new is None:
            return f"# - {at}"
        return f"# {'~' if at in self.held else '+'} {at} {service_text(self.form, at, new.label)}"

    def _others(self, table: str, wanted: Wanted) -> list[str]:
        """The rules in shared chains of everything that stays, damaged or not."""
        touched = {group_of(self.form, new) for _, new in wanted if new is not None}
        touched |= {group_of(self.form, self.held[at]) for at, _ in wanted if self.holds(at)}
        moving = {at for at, _ in wanted}
        lines = [
            f"-A {line.chain[1]} {line.rule}"
            for group, members in self.groups.items()
            if group not in touched
            for site in arrange(self.form, [self.held[at] for at in members])
            for line in lines_of(self.form, site)
            if line.chain[0] == table
        ]
        damaged = (line for at, damage in self.damage.items() if at not in moving for line in damage.lines)
        return lines + [f"-A {chain} {rule}" for (one, chain), rule in damaged if one == table]

    def _cluster_ips(self, wanted: Wanted, *, whole: bool) -> list[str]:
        """The lines of KUBE-CLUSTER-IPS, for cluster IPs that come and go or for all."""
        steps: Counter[Address] = Counter()
        for at, new in wanted:
            old = self.held.get(at)
            was, will = (each is not None and each.kind is Kind.CLUSTER_IP for each in (old, new))
            if was != will:
                steps[at.address] += will - was
        uses = self.uses
        opened = sorted(address for address, step in steps.items() if step > 0 and address not in uses)
        closed = sorted(address for address, step in steps.items() if step < 0 and uses[address] + step <= 0)
        if not whole:
            lines = [f"-D {CLUSTER_IPS} {closed_ports(address)}" for address in closed]
            return lines + [f"-I {CLUSTER_IPS} {closed_ports(address)}" for address in opened]
        addresses = sorted((uses.keys() - set(closed)) | set(opened))
        lines = [f"-A {CLUSTER_IPS} {closed_ports(address)}" for address in addresses]
        return lines + [f"-A {CLUSTER_IPS} {rule}" for rule in unallocated(self.form, self.family)]


def _declared(names: Iterable[str]) -> list[str]:
    """From Z to A: both back ends keep chains sorted and look for each one's place from the front."""
    return [f":{name} - [0:0]" for name in sorted(names, reverse=True)]


def _parts(groups: Sequence[Group], chains: Sequence[list[str]]) -> Iterator[list[tuple[Group, list[str]]]]:
    """Groups and their chains, as many together as make a section."""
    part: list[tuple[Group, list[str]]] = []
    count = 0
    for group, names in zip(groups, chains, strict=True):
        if names:
            part.append((group, names))
            count += len(names)
        if count >= SECTION:
            yield part
            part, count = [], 0
    if part:
        yield part
