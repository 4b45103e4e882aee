"""What the guard table holds of virtual servers, and what it shall hold of one. Pure.

The table's elements decide what packets meet in front of IPVS, and they are the ledger of what is ours. `note` is the
one place that says which elements a server has; plans are turned into elements by it, and what is found in the kernel
is compared with it.
"""

from collections.abc import Mapping

import msgspec
from msgspec import Struct, field

from .model import Address, Kind, Masquerade, Network, NoServers, VirtualAddress, VirtualServer
from .nftables_messages import owner_comment, read_owner

INSIDE_MARKS = range(0xDA70_0001, 0xDA80_0000)
"""Marks by which IPVS knows servers for clients inside the cluster; no other program has reason to use such values."""
UNLISTED = "(not in our ledger)"
"""Label of a server that is ours by what else we know; it differs from any that is wanted, so it gets listed."""

DrainKey = tuple[VirtualAddress, Address, int]
"""A real server (address, port) of a virtual server."""


class Elements(Struct):
    """Contents of the table's sets, or a part of them."""

    servers: dict[VirtualAddress, str] = field(default_factory=dict)
    """IPVS servers that are ours -> whose, as `owner_comment` writes it; "" when there is none that fits a comment."""
    vips: set[Address] = field(default_factory=set)
    hairpins: set[Address] = field(default_factory=set)
    external: set[VirtualAddress] = field(default_factory=set)
    """Servers at addresses that the node need not have."""
    refused: set[VirtualAddress] = field(default_factory=set)
    """Those of them that take no new connection."""
    dropped: set[VirtualAddress] = field(default_factory=set)
    inside: set[VirtualAddress] = field(default_factory=set)
    """Servers for clients inside the cluster, which are in `servers` and `marks` too."""
    marks: dict[VirtualAddress, int] = field(default_factory=dict)
    """Firewall marks of these."""
    ranged: set[VirtualAddress] = field(default_factory=set)
    """Servers that not everybody may reach; who may, is in `allowed`."""
    allowed: dict[VirtualAddress, tuple[Network, ...]] = field(default_factory=dict)
    masquerade: dict[VirtualAddress, Masquerade] = field(default_factory=dict)
    """ALWAYS and NODE; what is not here, or DETECT, follows the options."""
    draining: dict[DrainKey, int] = field(default_factory=dict)
    """Seconds: given to the kernel as a timeout, and observed as what is left of it. Its being over removes it."""
    settings: dict[str, int] = field(default_factory=dict)
    """Sysctls that we changed -> their value before."""

    def addresses(self) -> set[VirtualAddress]:
        """Every virtual address that is in some set, but for clocks."""
        plain = (self.external, self.refused, self.dropped, self.inside, self.ranged)
        return set(self.servers).union(*plain, self.marks, self.allowed, self.masquerade)


class Marks:
    """The firewall marks of servers for clients inside the cluster: a copy of what the kernel's table says."""

    def __init__(self) -> None:
        self.of: dict[VirtualAddress, int] = {}
        self.at: dict[int, VirtualAddress] = {}
        self._next = INSIDE_MARKS.start

    def learn(self, marks: Mapping[VirtualAddress, int]) -> None:
        """What the table says."""
        for at, mark in marks.items():
            self.forget(at)
            self.of[at], self.at[mark] = mark, at

    def take(self, at: VirtualAddress) -> int:
        """The mark of a server, a free one if it has none."""
        mark = self.of.get(at)
        if mark is None:
            for _ in INSIDE_MARKS:
                mark = self._next
                self._next = mark + 1 if mark + 1 in INSIDE_MARKS else INSIDE_MARKS.start
                if mark not in self.at:
                    break
            else:
                raise OverflowError("no free firewall mark")
            self.of[at], self.at[mark] = mark, at
        return mark

    def forget(self, at: VirtualAddress) -> None:
        """A server that is gone."""
        mark = self.of.pop(at, None)
        if mark is not None:
            self.at.pop(mark, None)

    def clear(self) -> None:
        """No server is left."""
        self.of.clear()
        self.at.clear()


def note(elements: Elements, server: VirtualServer, marks: Mapping[VirtualAddress, int]) -> None:
    """A server's own elements."""
    at = server.at
    elements.servers[at] = owner_comment(server.label, server.kind)
    if at.inside:
        elements.inside.add(at)
        elements.marks[at] = marks[at]
        return
    external = not server.bound and server.kind is not Kind.NODE_PORT
    if external:
        elements.external.add(at)
    if (external or server.no_servers is NoServers.DROP) and not server.serves():
        (elements.dropped if server.no_servers is NoServers.DROP else elements.refused).add(at)
    if server.masquerade is not Masquerade.DETECT:
        elements.masquerade[at] = server.masquerade
    if server.allowed:
        elements.ranged.add(at)
        elements.allowed[at] = server.allowed


def note_all(elements: Elements, at: VirtualAddress, marks: Mapping[VirtualAddress, int]) -> None:
    """Whatever there may be of a virtual address, to be removed."""
    elements.servers[at] = ""
    if at.inside:
        elements.inside.add(at)
        elements.marks[at] = marks.get(at, 0)
        return
    for each in (elements.external, elements.refused, elements.dropped, elements.ranged):
        each.add(at)
    elements.masquerade[at] = Masquerade.ALWAYS
    elements.allowed[at] = ()


def concerns(old: VirtualServer, new: VirtualServer) -> bool:
    """Whether the change of a server may change its elements; cheap for what changes all the time."""
    if new.no_servers is not old.no_servers or new.label != old.label or new.masquerade is not old.masquerade:
        return True
    if new.kind is not old.kind or new.bound != old.bound or new.allowed != old.allowed:
        return True
    return (not new.bound or new.no_servers is NoServers.DROP) and old.serves() != new.serves()


def note_change(
    removed: Elements, added: Elements, old: VirtualServer, new: VirtualServer, marks: Mapping[VirtualAddress, int]
) -> None:
    """The elements that a change of a server takes away and adds."""
    if old.label == UNLISTED:
        note_all(removed, old.at, marks)
        note(added, new, marks)
        return
    before, after = Elements(), Elements()
    note(before, old, marks)
    note(after, new, marks)
    for name in Elements.__struct_fields__:
        gone, come = getattr(before, name), getattr(after, name)
        if gone == come:
            continue
        if isinstance(gone, set):
            getattr(removed, name).update(gone - come)
            getattr(added, name).update(come - gone)
        else:
            getattr(removed, name).update((key, gone[key]) for key in gone if come.get(key) != gone[key])
            getattr(added, name).update((key, come[key]) for key in come if gone.get(key) != come[key])


def seen_server(found: VirtualServer, ledger: Elements, marks: Mapping[VirtualAddress, int]) -> VirtualServer:
    """What IPVS holds of a server of ours, completed by what the table says. Where the table says anything else than it
    would of such a server, the label is UNLISTED."""
    at = found.at
    label, kind = read_owner(ledger.servers.get(at, ""))
    server = msgspec.structs.replace(
        found,
        masquerade=Masquerade.NODE if at.inside else ledger.masquerade.get(at, Masquerade.DETECT),
        no_servers=NoServers.DROP if at in ledger.dropped else NoServers.REJECT,
        bound=kind is Kind.CLUSTER_IP,
        label=label,
        kind=kind,
        allowed=ledger.allowed.get(at, ()),
    )
    if at not in ledger.servers or not _agrees(server, ledger, marks):
        return msgspec.structs.replace(server, label=UNLISTED)
    return server


def _agrees(server: VirtualServer, ledger: Elements, marks: Mapping[VirtualAddress, int]) -> bool:
    at = server.at
    if at.inside:
        return at in ledger.inside and at in ledger.marks and ledger.marks[at] == marks.get(at)
    if ledger.masquerade.get(at) is Masquerade.DETECT:
        return False  # a verdict that is not ours
    expected = Elements()
    note(expected, server, marks)
    plain = ("external", "refused", "dropped", "ranged")
    return all((at in getattr(expected, name)) == (at in getattr(ledger, name)) for name in plain)
