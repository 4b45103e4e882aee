"""What one family's tables hold of ours, and the restore text that takes it on. Pure.

`Books` is made from a look at the kernel and kept by what commits did, so that a change is a text of the changed chains
only: shared chains are edited rule by rule (`-D`, `-I`) and sent whole only when much of them changes. A chain that
stays as it is is never sent, which is why the counters of KUBE-SEP go on counting. A change is made group by group, so
what all addresses of a ServicePort share is sent once.
"""

from collections import Counter
from collections.abc import Iterator, Mapping

from .iptables_chains import ChainKey, Site, arrange, group_of, plain_site, render
from .iptables_reading import DAMAGED, Contents, Damage, read
from .iptables_save import Table
from .iptables_script import Group, Newcomer, Script, Staying, Wanted
from .iptables_text import Form, service_text
from .model import Address, Family, Kind, VirtualAddress, VirtualServer

FEW = 32
"""Rules of shared chains that are edited one by one; more of them, or a fourth of all, and they are sent whole."""


class Books:
    """Our servers in the tables of one family.

    `sections`: many servers' chains go in many short sections of a table, the rules that lead to them in a last one.
    iptables-nft-restore looks each line's chain up in a list of all chains of its section (nft-cache.c), which takes
    minutes for 40,000 of them; iptables-legacy-restore replaces the whole table for each section, and gets one, in
    which chains may be declared portion by portion all the same.
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
        old = self.held.pop(at)
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
            if at in self.held:
                self._drop(at)
        for _, server in script.after:
            if server is not None:
                self._put(server)
        if script.whole:
            self.tidy, self.orphans = True, frozenset()

    # ------------------------------------------------------------------------------------------------- writing

    def compose(self, wanted: Wanted, *, whole: bool = False) -> Script:
        """The text that gives each of these addresses its wanted server; an empty one when they have it."""
        moving = {at for at, _ in wanted}
        mending = whole or not self.tidy or not moving.isdisjoint(self.damage)
        parts = self._touched(wanted, mending=mending)
        groups = [part for part in parts.values() if isinstance(part, Group)]
        previous = {key for group in groups for key in group.before.chains}
        if mending:
            previous |= self.orphans.union(*(one.chains for at, one in self.damage.items() if at in moving))
            previous.difference_update(*(one.chains for at, one in self.damage.items() if at not in moving))
        gone: list[ChainKey] = []
        carried: frozenset[str] = frozenset()
        if previous:
            gone = sorted(previous.difference(*(group.after.chains for group in groups)))
            declared = previous.intersection(key for group in groups for key in group.changed)
            carried = frozenset(name for _, name in declared if name.startswith("KUBE-SEP-"))
        whole = mending or sum(part.edits() for part in parts.values()) > max(FEW, len(self.held) // 4)
        closed, opened = self._cluster_ips(wanted)
        staying = Staying()
        if whole:
            closed, opened = [], sorted((self.uses.keys() - set(closed)) | set(opened))
            staying = Staying(
                [[self.held[at] for at in members] for name, members in self.groups.items() if name not in parts],
                [line for at, damage in self.damage.items() if at not in moving for line in damage.lines],
            )
        return Script(
            self.form,
            self.family,
            self.sections,
            wanted,
            tuple(parts.values()),
            gone,
            whole,
            staying,
            closed,
            opened,
            carried,
        )

    def _touched(self, wanted: Wanted, *, mending: bool) -> dict[str, Group | Newcomer]:
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
        parts: dict[str, Group | Newcomer] = {}
        for name, changes in moving.items():
            members = self.groups.get(name, ())
            come = [new for new in changes.values() if new is not None]
            # when something is mended, chains of such names may be there already
            fresh = len(changes) == len(come) == 1 and not (members or mending or come[0].at in held)
            if fresh and (site := plain_site(name, come[0])):
                parts[name] = Newcomer(form, site, come[0])
                continue
            stay = [held[at] for at in members if at not in changes]
            before, after = render(form, [held[at] for at in members]), render(form, [*stay, *come])
            parts[name] = Group(before, after, {at: self._head(at, new) for at, new in changes.items()})
        return parts

    def _head(self, at: VirtualAddress, new: VirtualServer | None) -> str:
        if new is None:
            return f"# - {at}"
        return f"# {'~' if at in self.held else '+'} {at} {service_text(self.form, at, new.label)}"

    def _cluster_ips(self, wanted: Wanted) -> tuple[list[Address], list[Address]]:
        """The cluster IPs that go, and those that come."""
        steps: Counter[Address] = Counter()
        for at, new in wanted:
            old = self.held.get(at)
            if old is not None and old.kind is Kind.CLUSTER_IP:
                steps[at.address] -= 1
            if new is not None and new.kind is Kind.CLUSTER_IP:
                steps[at.address] += 1
        uses = self.uses
        opened = sorted(address for address, step in steps.items() if step > 0 and address not in uses)
        closed = sorted(address for address, step in steps.items() if step < 0 and uses[address] + step <= 0)
        return closed, opened
