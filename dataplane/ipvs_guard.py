"""The nftables table in front of IPVS (`ipvs_guard.nft`): its rules, kept intact, and its elements, kept current.

IPVS forwards whatever reaches a virtual server and nothing else: refusing the other ports of a VIP, taking in packets
to addresses that are not the node's, telling clients inside the cluster from others, source ranges, masquerading, and
dropping where a Service has no endpoint here are left to this table. Its sets are also our memory in the kernel: which
IPVS servers are ours, of which Service, and how long a draining real server still has.

Rules are `nft_skeleton`'s: written as one `nft -f` transaction, and only if the kernel's differ. Elements travel by
netlink, a whole change in one batch.
"""

import errno
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from . import netlink_nftables as netlink
from . import nftables_messages as nft
from .errors import KernelError
from .ipvs_ledger import Elements
from .model import Address, Masquerade, Protocol, VirtualAddress, between, disjoint, format_address
from .netlink_socket import NetlinkSocket
from .nft_clients import Clients
from .nft_skeleton import StaticTable, render
from .nftables_messages import owner_comment as owner_comment
from .nftables_messages import read_owner
from .nlattr import u32, u32_bytes
from .walk import Detection

TABLE = "dataplane-ipvs"
DELIVERED, DELIVERED_MASK = 0xDA60_0000, 0xFFF0_0000
"""The mark of packets that shall be delivered to this node, and which of its bits count (`ipvs_guard.nft`)."""
_TEXT = Path(__file__).with_suffix(".nft")
_SETTING = re.compile(r"([a-z0-9_.]{1,100})=(\d{1,9})")

_VERDICTS: dict[Masquerade, nft.Verdict] = {
    Masquerade.ALWAYS: nft.goto("masquerade_always"),
    Masquerade.NODE: nft.goto("masquerade_node"),
}
_MASQUERADES = {verdict: meaning for meaning, verdict in _VERDICTS.items()}


def _key(kind: str, width: int) -> tuple[nft.Field, ...]:
    address = nft.IPV4 if width == 4 else nft.IPV6
    server = (address, nft.PROTOCOL, nft.PORT)
    if kind in ("draining", "draining_inside"):
        return (*server, address, nft.PORT)
    return {"vips": (address,), "hairpin": (address, address), "allowed": (*server, address)}.get(kind, server)


def _wires(kind: str, *data: nft.Field) -> dict[int, nft.SetWire]:
    """Both families' sets of one kind, by the length of their addresses."""
    return {
        width: nft.SetWire(nft.INET, TABLE, f"{kind}{suffix}", _key(kind, width), data)
        for width, suffix in ((4, 4), (16, 6))
    }


_SERVERS, _VIPS, _HAIRPIN = _wires("servers"), _wires("vips"), _wires("hairpin")
_EXTERNAL, _REFUSED, _DROPPED = _wires("external"), _wires("refused"), _wires("dropped")
_INSIDE, _MARKS = _wires("inside"), _wires("inside_marks", nft.HOST32)
_RANGED, _ALLOWED = _wires("ranged"), _wires("allowed")
_EXCEPTIONS, _DRAINING, _DRAINING_INSIDE = _wires("exceptions"), _wires("draining"), _wires("draining_inside")
_SETTINGS = nft.SetWire(nft.INET, TABLE, "settings", (nft.HOST32,))


def text(clients: Clients) -> str:
    """The table for these options."""
    return render(_TEXT.read_text(), {**clients.rules(), **_unallocated(clients)})


def _unallocated(clients: Clients) -> dict[str, list[str]]:
    """@forward@, @unallocated_output@: drop what is for a cluster IP that no Service has. A bound one never gets to
    `forward`, and where cluster IPs are not known to come from that hook is left alone."""
    rules = clients.unallocated()
    if not rules:
        return {"forward": [], "unallocated_output": []}
    ours = []
    for suffix, word in ((4, "ip"), (6, "ip6")):
        ours.append(f'{word} daddr @vips{suffix} accept comment "a Service has it"')
        ours.append(f'{word} daddr . meta l4proto . th dport @servers{suffix} accept comment "on to IPVS"')
    head = ["chain forward_unallocated {", "\ttype filter hook forward priority filter; policy accept;"]
    return {"forward": [*head, *(f"\t{rule}" for rule in rules), "}"], "unallocated_output": [*ours, *rules]}


class Guard:
    """The table, in the network namespace of `sock` (a NETLINK_NETFILTER socket) and of the calling thread."""

    def __init__(self, sock: NetlinkSocket, clients: Clients) -> None:
        self._sock = sock
        self._table = StaticTable(sock, TABLE, text(clients), lambda name: False)

    # ------------------------------------------------------------------------------------------------------- rules

    def exists(self) -> bool:
        """Whether the table is there, whatever is in it."""
        return self._table.exists()

    def intact(self) -> bool:
        """Whether sets, chains and rules are exactly what this version writes for these options. Starts no process."""
        return self._table.exists() and self._table.matches(self._table.read()[0])

    def written_with(self, detection: Detection) -> bool:
        """Whether sets, chains and rules are exactly what this version writes for other options."""
        table = StaticTable(self._sock, TABLE, text(Clients.of(detection)), lambda name: False)
        return table.exists() and table.matches(table.read()[0])

    def ensure(self) -> bool:
        """Write the rules unless they are intact; True if something was written. Elements stay where they can."""
        return self._table.ensure()

    def delete(self) -> None:
        """Remove the table with all that is in it; that it is not there is fine."""
        try:
            netlink.commit(self._sock, [netlink.delete_table(nft.INET, TABLE)])
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise

    # ---------------------------------------------------------------------------------------------------- elements

    def observe(self) -> Elements:
        """All elements the kernel holds; KernelError(ENOENT) when there is no table."""
        seen = Elements()
        for (address, protocol, port), comment, *_ in self._read(_SERVERS):
            seen.servers[VirtualAddress(protocol, address, port)] = _owner(comment)
        for (address, protocol, port), comment, _, data, *_ in self._read(_MARKS):
            at = VirtualAddress(protocol, address, port, True)
            seen.servers[at] = _owner(comment)
            if isinstance(data, bytes):
                seen.marks[at] = u32.decode(data)
        for wires, found in _plain(seen):
            inside = wires is _INSIDE
            found.update(VirtualAddress(key[1], key[0], key[2], inside) for key, *_ in self._read(wires))
        seen.vips.update(each.key[0] for each in self._read(_VIPS))
        seen.hairpins.update(each.key[0] for each in self._read(_HAIRPIN) if each.key[0] == each.key[1])
        for (address, protocol, port, first), *_, last in self._read(_ALLOWED):
            at = VirtualAddress(protocol, address, port)
            ranges = between(first, last[3] if last else first)
            seen.allowed[at] = disjoint((*seen.allowed.get(at, ()), *ranges))
        for (address, protocol, port), _, _, verdict, *_ in self._read(_EXCEPTIONS):
            # a verdict that is not ours counts as DETECT, which nobody asks for: so it differs, and is replaced
            meaning = _MASQUERADES.get(verdict, Masquerade.DETECT) if isinstance(verdict, tuple) else Masquerade.DETECT
            seen.masquerade[VirtualAddress(protocol, address, port)] = meaning
        for wires, inside in ((_DRAINING, False), (_DRAINING_INSIDE, True)):
            for (address, protocol, port, real, real_port), _, remaining, *_ in self._read(wires):
                # one without a clock is not ours: over, or it would stay for ever
                key = VirtualAddress(protocol, address, port, inside), real, real_port
                seen.draining[key] = -(-(remaining or 0) // 1000)
        for _, comment, *_ in self._read({0: _SETTINGS}):
            if found_setting := _SETTING.fullmatch(comment):
                seen.settings[found_setting[1]] = int(found_setting[2])
        return seen

    def has_external(self) -> bool:
        """Whether some server is at an address that the node need not have."""
        return self.exists() and any(True for _ in self._read(_EXTERNAL))

    def _read(self, wires: dict[int, nft.SetWire]) -> Iterator[nft.Element]:
        for wire in wires.values():
            yield from netlink.read_elements(self._sock, wire)

    def commit(self, add: Elements, remove: Elements) -> None:
        """Remove, then add, in one atomic batch; what is there already or missing already is fine.

        An element that is there keeps its comment, timeout and verdict: to change these, have it in both.
        BatchRefused: nothing was changed. Unanswered: unknown, observe.
        """
        additions = _additions(add)
        try:
            netlink.commit(self._sock, _removals(remove) + additions)
        except netlink.BatchRefused as error:
            if error.errno != errno.ENOENT:
                raise
            # some of it was gone already, the kernel does not say which; without a table this raises ENOENT again
            netlink.commit(self._sock, _removals(_common(remove, self.observe())) + additions)

    def add_hairpins(self, addresses: Iterable[Address]) -> None:
        """`commit` of nothing but hairpin addresses that come."""
        netlink.commit(self._sock, [each for wire, keys in _hairpins(addresses) for each in wire.add(keys)])

    def remove_hairpins(self, addresses: Iterable[Address]) -> None:
        """The same of such that go."""
        try:
            netlink.commit(
                self._sock, [message for wire, keys in _hairpins(addresses) for message in wire.remove(keys)]
            )
        except netlink.BatchRefused as error:
            if error.errno != errno.ENOENT:
                raise
            self.commit(Elements(), Elements(hairpins=set(addresses)))

    def script(self, add: Elements, remove: Elements) -> str:
        """The same change in nft's language, sorted, one element a line."""
        lines = [f"delete element inet {TABLE} {name} {{ {key} }}" for name, key, _ in _printed(remove)]
        lines += [f"add element inet {TABLE} {name} {{ {key}{rest} }}" for name, key, rest in _printed(add)]
        return "".join(line + "\n" for line in lines)


def _hairpins(addresses: Iterable[Address]) -> Iterator[tuple[nft.SetWire, list[bytes]]]:
    for width, wire in _HAIRPIN.items():
        if keys := [wire.key(address, address) for address in addresses if len(address) == width]:
            yield wire, keys


def _owner(comment: str) -> str:
    """Whose something is, and nothing else that a comment may say."""
    return owner_comment(*read_owner(comment))


def _additions(elements: Elements) -> list[bytes]:
    packed: dict[nft.SetWire, list[bytes]] = {}
    put = packed.setdefault
    for (protocol, address, port, inside), owner in elements.servers.items():
        if not inside:
            wire = _SERVERS[len(address)]
            put(wire, []).append(wire.element(address, protocol, port, comment=_owner(owner)))
    for at, mark in elements.marks.items():
        protocol, address, port, _ = at
        wire = _MARKS[len(address)]
        owner = _owner(elements.servers.get(at, ""))
        put(wire, []).append(wire.element(address, protocol, port, u32_bytes(mark), comment=owner))
    for address in elements.vips:
        wire = _VIPS[len(address)]
        put(wire, []).append(wire.element(address))
    for address in elements.hairpins:
        wire = _HAIRPIN[len(address)]
        put(wire, []).append(wire.element(address, address))
    for wires, keys in _plain(elements):
        for protocol, address, port, _ in keys:
            wire = wires[len(address)]
            put(wire, []).append(wire.element(address, protocol, port))
    for (protocol, address, port, _), meaning in elements.masquerade.items():
        if meaning is not Masquerade.DETECT:
            wire = _EXCEPTIONS[len(address)]
            put(wire, []).append(wire.element(address, protocol, port, verdict=_VERDICTS[meaning]))
    _put_ranges(packed, elements)
    for ((protocol, address, port, inside), real, real_port), seconds in elements.draining.items():
        wire = (_DRAINING_INSIDE if inside else _DRAINING)[len(address)]
        # a timeout of 0 would mean: never
        key = (address, protocol, port, real, real_port)
        put(wire, []).append(wire.element(*key, timeout=max(1, seconds) * 1000))
    for name, value in elements.settings.items():
        put(_SETTINGS, []).append(_SETTINGS.element(_setting_key(name), comment=f"{name}={value}"))
    return [message for wire, each in packed.items() for message in wire.add(each)]


def _plain(elements: Elements) -> Iterator[tuple[dict[int, nft.SetWire], set[VirtualAddress]]]:
    """Sets of nothing but servers."""
    yield _EXTERNAL, elements.external
    yield _REFUSED, elements.refused
    yield _DROPPED, elements.dropped
    yield _INSIDE, elements.inside
    yield _RANGED, elements.ranged


def _put_ranges(packed: dict[nft.SetWire, list[bytes]], elements: Elements) -> None:
    for (protocol, address, port, _), ranges in elements.allowed.items():
        wire = _ALLOWED[len(address)]
        spans = packed.setdefault(wire, [])
        for each in ranges:
            spans.append(wire.span(address, protocol, port, each.address, address, protocol, port, each.last))


def _setting_key(name: str) -> bytes:
    """A number for a sysctl's name: nftables has no set of strings."""
    return u32_bytes(zlib.crc32(name.encode()))


def _removals(elements: Elements) -> list[bytes]:
    packed: dict[nft.SetWire, list[bytes]] = {}
    put = packed.setdefault
    outside = (at for at in elements.servers if not at.inside)
    keyed = (_SERVERS, outside), (_MARKS, elements.marks), (_EXCEPTIONS, elements.masquerade)
    for wires, keys in (*keyed, *_plain(elements)):
        for protocol, address, port, _ in keys:
            wire = wires[len(address)]
            put(wire, []).append(wire.key(address, protocol, port))
    _put_ranges(packed, elements)
    for address in elements.vips:
        wire = _VIPS[len(address)]
        put(wire, []).append(wire.key(address))
    for address in elements.hairpins:
        wire = _HAIRPIN[len(address)]
        put(wire, []).append(wire.key(address, address))
    for name in elements.settings:
        put(_SETTINGS, []).append(_SETTINGS.key(_setting_key(name)))
    messages = [message for wire, each in packed.items() for message in wire.remove(each)]
    drained: dict[nft.SetWire, list[bytes]] = {}
    for (protocol, address, port, inside), real, real_port in elements.draining:
        wire = (_DRAINING_INSIDE if inside else _DRAINING)[len(address)]
        drained.setdefault(wire, []).append(wire.key(address, protocol, port, real, real_port))
    for wire, each in drained.items():
        # the clock may have run out at any moment: added first, so that there is something to remove
        messages += wire.add(each) + wire.remove(each)
    return messages


def _common(wanted: Elements, seen: Elements) -> Elements:
    """What of `wanted` is there. The clocks of drains are left alone: `_removals` does not mind."""
    return Elements(
        servers={at: owner for at, owner in wanted.servers.items() if at in seen.servers},
        vips=wanted.vips & seen.vips,
        hairpins=wanted.hairpins & seen.hairpins,
        external=wanted.external & seen.external,
        refused=wanted.refused & seen.refused,
        dropped=wanted.dropped & seen.dropped,
        inside=wanted.inside & seen.inside,
        marks={at: mark for at, mark in wanted.marks.items() if at in seen.marks},
        ranged=wanted.ranged & seen.ranged,
        allowed={at: seen.allowed[at] for at in wanted.allowed if at in seen.allowed},
        masquerade={at: meaning for at, meaning in wanted.masquerade.items() if at in seen.masquerade},
        draining=wanted.draining,
        settings={name: value for name, value in wanted.settings.items() if name in seen.settings},
    )


def _printed(elements: Elements) -> Iterator[tuple[str, str, str]]:
    """(set, key, what follows it) of each element, in nft's language."""

    def suffix(address: bytes) -> str:
        return "4" if len(address) == 4 else "6"

    def server(at: VirtualAddress) -> str:
        return f"{format_address(at.address)} . {Protocol(at.protocol).name.lower()} . {at.port}"

    def by_family(keys: Iterable[VirtualAddress]) -> list[VirtualAddress]:
        return sorted(keys, key=lambda at: (len(at.address), at.address, at.protocol, at.port))

    for at in by_family(elements.servers):
        comment = _owner(elements.servers[at])
        told = f' comment "{comment}"' if comment else ""
        if not at.inside:
            yield f"servers{suffix(at.address)}", server(at), told
        elif at in elements.marks:
            yield f"inside_marks{suffix(at.address)}", server(at), f"{told} : {elements.marks[at]:#010x}"
    for address in sorted(elements.vips, key=lambda each: (len(each), each)):
        yield f"vips{suffix(address)}", format_address(address), ""
    for address in sorted(elements.hairpins, key=lambda each: (len(each), each)):
        yield f"hairpin{suffix(address)}", f"{format_address(address)} . {format_address(address)}", ""
    for wires, keys in _plain(elements):
        for at in by_family(keys):
            yield wires[len(at.address)].name, server(at), ""
    for at in by_family(elements.allowed):
        for each in elements.allowed[at]:
            yield f"allowed{suffix(at.address)}", f"{server(at)} . {each}", ""
    for at in by_family(elements.masquerade):
        if verdict := _VERDICTS.get(elements.masquerade[at]):
            yield f"exceptions{suffix(at.address)}", server(at), f" : goto {verdict[1]}"
    for key in sorted(elements.draining):
        at, real, port = key
        name = "draining_inside" if at.inside else "draining"
        text = f"{server(at)} . {format_address(real)} . {port}"
        yield f"{name}{suffix(at.address)}", text, f" timeout {max(1, elements.draining[key])}s"
