"""The nftables table in front of IPVS (`ipvs_guard.nft`): its rules, kept intact, and its elements, kept current.

IPVS forwards whatever reaches a virtual server and nothing else: refusing the other ports of a VIP, masquerading, and
dropping where a Service has no endpoint here are left to this table. Its sets are also our memory in the kernel: which
IPVS servers are ours, of which Service, and how long a draining real server still has.

Rules are written as one `nft -f` transaction, and only if the kernel's differ: each rule's comment ends with a hash of
the whole text, so comparing comments compares everything. Elements travel by netlink, a whole change in one batch.
"""

import errno
import hashlib
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from msgspec import Struct, field

from . import netlink_nftables as netlink
from . import nftables_messages as nft
from .errors import KernelError, ToolError
from .model import Address, Masquerade, Network, Protocol, VirtualAddress, format_address
from .netlink_socket import NetlinkSocket
from .nftables_messages import owner_comment as owner_comment
from .nlattr import u32_bytes
from .run_tool import run_tool

TABLE = "dataplane-ipvs"
_TEXT = Path(__file__).with_suffix(".nft")
_SETTING = re.compile(r"([a-z0-9_.]{1,100})=(\d{1,9})")
_INTERFACE = re.compile(r"[A-Za-z0-9_.-]{1,15}")

_VERDICTS: dict[Masquerade, nft.Verdict] = {
    Masquerade.ALWAYS: nft.goto("masquerade_always"),
    Masquerade.NODE: nft.goto("masquerade_node"),
}
_MASQUERADES = {verdict: meaning for meaning, verdict in _VERDICTS.items()}

_TYPES = {"ipv4_addr": nft.IPV4, "ipv6_addr": nft.IPV6, "inet_proto": nft.PROTOCOL}
_TYPES |= {"inet_service": nft.PORT, "mark": nft.HOST32}
_HOOKS = {"prerouting": 0, "input": 1, "forward": 2, "output": 3, "postrouting": 4}
_PRIORITIES = {"filter": 0, "srcnat": 100}


class GuardOptions(Struct, frozen=True):
    """Whom DETECT masquerades: everyone, else clients that are not local by CIDR or by interface; with none of these
    set, nobody but the node's own processes."""

    masquerade_all: bool = False
    cluster_cidrs: tuple[Network, ...] = ()
    bridge_interface: str = ""
    """Clients behind it are local (kube-proxy's detect-local BridgeInterface)."""
    interface_prefix: str = ""
    """Clients behind interfaces that begin so are local (InterfaceNamePrefix)."""

    def rules(self) -> list[str]:
        """The rules that stand for @options@."""
        if self.masquerade_all:
            return ['masquerade fully-random comment "everyone (masquerade all)"']
        tests = []
        for word, width in (("ip", 4), ("ip6", 16)):
            cidrs = [cidr for cidr in self.cluster_cidrs if len(cidr.address) == width]
            tests.append(" ".join(f"{word} saddr != {cidr}" for cidr in cidrs))
        for name, pattern in ((self.bridge_interface, "{}"), (self.interface_prefix, "{}*")):
            if name and not _INTERFACE.fullmatch(name):
                raise ValueError(f"{name!r} is not an interface name")
            tests.append(f'iifname != "{pattern.format(name)}"' if name else "")
        return [f'{test} masquerade fully-random comment "a client from outside"' for test in tests if test]


DrainKey = tuple[VirtualAddress, Address, int]
"""A real server (address, port) of a virtual server."""


class Elements(Struct):
    """Contents of the table's sets, or a part of them."""

    servers: dict[VirtualAddress, str] = field(default_factory=dict)
    """IPVS servers that are ours -> owner as `namespace/name:port`, "" when it has none that fits a comment."""
    vips: set[Address] = field(default_factory=set)
    hairpins: set[Address] = field(default_factory=set)
    dropped: set[VirtualAddress] = field(default_factory=set)
    masquerade: dict[VirtualAddress, Masquerade] = field(default_factory=dict)
    """ALWAYS and NEVER; what is not here, or DETECT, follows the options."""
    draining: dict[DrainKey, int] = field(default_factory=dict)
    """Seconds: given to the kernel as a timeout, and observed as what is left of it. Its being over removes it."""
    settings: dict[str, int] = field(default_factory=dict)
    """Sysctls that we changed -> their value before."""


def _key(kind: str, width: int) -> tuple[nft.Field, ...]:
    address = nft.IPV4 if width == 4 else nft.IPV6
    server = (address, nft.PROTOCOL, nft.PORT)
    if kind == "draining":
        return (*server, address, nft.PORT)
    return {"vips": (address,), "hairpin": (address, address)}.get(kind, server)


def _wires(kind: str) -> dict[int, nft.SetWire]:
    """Both families' sets of one kind, by the length of their addresses."""
    return {
        width: nft.SetWire(nft.INET, TABLE, f"{kind}{suffix}", _key(kind, width)) for width, suffix in ((4, 4), (16, 6))
    }


_SERVERS, _VIPS, _HAIRPIN = _wires("servers"), _wires("vips"), _wires("hairpin")
_DROPPED, _EXCEPTIONS, _DRAINING = _wires("dropped"), _wires("exceptions"), _wires("draining")
_SETTINGS = nft.SetWire(nft.INET, TABLE, "settings", (nft.HOST32,))


class Guard:
    """The table, in the network namespace of `sock` (a NETLINK_NETFILTER socket) and of the calling thread."""

    def __init__(self, sock: NetlinkSocket, options: GuardOptions) -> None:
        self._sock = sock
        self._text = render(options)
        self._expected = parse(self._text)

    # ------------------------------------------------------------------------------------------------------- rules

    def exists(self) -> bool:
        """Whether the table is there, whatever is in it."""
        return netlink.has_table(self._sock, nft.INET, TABLE)

    def intact(self) -> bool:
        """Whether sets, chains and rules are exactly what this version writes for these options. Starts no process."""
        return self.exists() and self._skeleton() == self._expected

    def _skeleton(self) -> "Skeleton":
        rules: dict[str, list[str]] = {}
        for rule in netlink.read_rules(self._sock, nft.INET, TABLE):
            rules.setdefault(rule.chain, []).append(rule.comment)
        shapes = netlink.read_sets(self._sock, nft.INET, TABLE)
        return Skeleton(
            {shape.name: (shape.key_length, shape.flags & _SHAPE_FLAGS) for shape in shapes},
            {each.name: each for each in netlink.read_chains(self._sock, nft.INET, TABLE)},
            rules,
        )

    def ensure(self) -> bool:
        """Write the rules unless they are intact; True if something was written.

        One transaction, so that no packet ever meets half of them, and elements stay. Only where a set itself has to be
        another one (by another version, or another's hand) the table is made anew, empty.
        """
        found = self._skeleton() if self.exists() else Skeleton({}, {}, {})
        if found == self._expected:
            return False
        keep = [f"table inet {TABLE}", f"flush table inet {TABLE}"]
        keep += [
            f"delete chain inet {TABLE} {name}"
            for name, each in found.chains.items()
            if each != self._expected.chains.get(name) and _IDENTIFIER.fullmatch(name)
        ]
        if found.sets.items() <= self._expected.sets.items():
            try:
                run_tool(["nft", "-f", "-"], input="\n".join([*keep, self._text]))
            except ToolError:
                if not found.chains:
                    raise
            else:
                return True
        anew = [f"table inet {TABLE}", f"delete table inet {TABLE}", self._text]
        run_tool(["nft", "-f", "-"], input="\n".join(anew))
        return True

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
            seen.servers[VirtualAddress(protocol, address, port)] = owner_comment(comment)
        seen.vips.update(each.key[0] for each in self._read(_VIPS))
        seen.hairpins.update(each.key[0] for each in self._read(_HAIRPIN) if each.key[0] == each.key[1])
        for (address, protocol, port), *_ in self._read(_DROPPED):
            seen.dropped.add(VirtualAddress(protocol, address, port))
        for (address, protocol, port), _, _, verdict, *_ in self._read(_EXCEPTIONS):
            # a verdict that is not ours counts as DETECT, which nobody asks for: so it differs, and is replaced
            meaning = _MASQUERADES.get(verdict, Masquerade.DETECT) if isinstance(verdict, tuple) else Masquerade.DETECT
            seen.masquerade[VirtualAddress(protocol, address, port)] = meaning
        for (address, protocol, port, real, real_port), _, remaining, *_ in self._read(_DRAINING):
            # one without a clock is not ours: over, or it would stay for ever
            seen.draining[VirtualAddress(protocol, address, port), real, real_port] = -(-(remaining or 0) // 1000)
        for _, comment, *_ in self._read({0: _SETTINGS}):
            if found := _SETTING.fullmatch(comment):
                seen.settings[found[1]] = int(found[2])
        return seen

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

    def script(self, add: Elements, remove: Elements) -> str:
        """The same change in nft's language, sorted, one element a line."""
        lines = [f"delete element inet {TABLE} {name} {{ {key} }}" for name, key, _ in _printed(remove)]
        lines += [f"add element inet {TABLE} {name} {{ {key}{rest} }}" for name, key, rest in _printed(add)]
        return "".join(line + "\n" for line in lines)


def _additions(elements: Elements) -> list[bytes]:
    packed: dict[nft.SetWire, list[bytes]] = {}
    put = packed.setdefault
    for (protocol, address, port, _), owner in elements.servers.items():
        wire = _SERVERS[len(address)]
        put(wire, []).append(wire.element(address, protocol, port, comment=owner_comment(owner)))
    for address in elements.vips:
        wire = _VIPS[len(address)]
        put(wire, []).append(wire.element(address))
    for address in elements.hairpins:
        wire = _HAIRPIN[len(address)]
        put(wire, []).append(wire.element(address, address))
    for protocol, address, port, _ in elements.dropped:
        wire = _DROPPED[len(address)]
        put(wire, []).append(wire.element(address, protocol, port))
    for (protocol, address, port, _), meaning in elements.masquerade.items():
        if meaning is not Masquerade.DETECT:
            wire = _EXCEPTIONS[len(address)]
            put(wire, []).append(wire.element(address, protocol, port, verdict=_VERDICTS[meaning]))
    for ((protocol, address, port, _), real, real_port), seconds in elements.draining.items():
        wire = _DRAINING[len(address)]
        # a timeout of 0 would mean: never
        key = (address, protocol, port, real, real_port)
        put(wire, []).append(wire.element(*key, timeout=max(1, seconds) * 1000))
    for name, value in elements.settings.items():
        put(_SETTINGS, []).append(_SETTINGS.element(_setting_key(name), comment=f"{name}={value}"))
    return [message for wire, each in packed.items() for message in wire.add(each)]


def _setting_key(name: str) -> bytes:
    """A number for a sysctl's name: nftables has no set of strings."""
    return u32_bytes(zlib.crc32(name.encode()))


def _removals(elements: Elements) -> list[bytes]:
    packed: dict[nft.SetWire, list[bytes]] = {}
    put = packed.setdefault
    for wires, keys in ((_SERVERS, elements.servers), (_DROPPED, elements.dropped), (_EXCEPTIONS, elements.masquerade)):
        for protocol, address, port, _ in keys:
            wire = wires[len(address)]
            put(wire, []).append(wire.key(address, protocol, port))
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
    for (protocol, address, port, _), real, real_port in elements.draining:
        wire = _DRAINING[len(address)]
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
        dropped=wanted.dropped & seen.dropped,
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
        comment = owner_comment(elements.servers[at])
        yield f"servers{suffix(at.address)}", server(at), f' comment "{comment}"' if comment else ""
    for address in sorted(elements.vips, key=lambda each: (len(each), each)):
        yield f"vips{suffix(address)}", format_address(address), ""
    for address in sorted(elements.hairpins, key=lambda each: (len(each), each)):
        yield f"hairpin{suffix(address)}", f"{format_address(address)} . {format_address(address)}", ""
    for at in by_family(elements.dropped):
        yield f"dropped{suffix(at.address)}", server(at), ""
    for at in by_family(elements.masquerade):
        if verdict := _VERDICTS.get(elements.masquerade[at]):
            text = f"goto {verdict[1]}" if verdict[1] else "accept"
            yield f"exceptions{suffix(at.address)}", server(at), f" : {text}"
    for key in sorted(elements.draining):
        at, real, port = key
        text = f"{server(at)} . {format_address(real)} . {port}"
        yield f"draining{suffix(at.address)}", text, f" timeout {max(1, elements.draining[key])}s"


# ------------------------------------------------------------------------------------------------------ the .nft text


class Skeleton(Struct):
    """What of the table stays the same: sets as (key length, flags), chains, and the comments of each chain's rules."""

    sets: dict[str, tuple[int, int]]
    chains: dict[str, netlink.Chain]
    rules: dict[str, list[str]]


_SHAPE_FLAGS = nft.SET_MAP | nft.SET_TIMEOUT | nft.SET_INTERVAL
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_COMMENT = re.compile(r'comment "([^"]*)"$', re.MULTILINE)
_SET = re.compile(r"(set|map) (\w+) \{ type ([\w. ]+?)(?: : verdict)?;( flags timeout;)? \}")
_BASE = re.compile(r"type (\w+) hook (\w+) priority (?:(\w+)(?: ([+-]) (\d+))?|(-\d+)); policy accept;")


def render(options: GuardOptions) -> str:
    """The table for these options, without the file's remarks, each rule's comment marked with the text's hash."""
    lines = [line for line in _TEXT.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    lines = list(chain.from_iterable(_filled(line, options) for line in lines))
    text = "\n".join(lines) + "\n"
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    return _COMMENT.sub(rf'comment "\1 [{mark}]"', text)


def _filled(line: str, options: GuardOptions) -> list[str]:
    return [line.replace("@options@", rule) for rule in options.rules()] if "@options@" in line else [line]


def parse(text: str) -> Skeleton:
    """What the kernel shows of a text of ours once it is loaded."""
    skeleton = Skeleton({}, {}, {})
    current = ""
    for line in map(str.strip, text.splitlines()):
        if found := _SET.fullmatch(line):
            what, name, types, timed = found.groups()
            fields = [_TYPES[each] for each in types.split(" . ")]
            flags = (nft.SET_MAP if what == "map" else 0) | (nft.SET_TIMEOUT if timed else 0)
            skeleton.sets[name] = nft.key_length(fields), flags
        elif line.startswith("chain "):
            current = line.split()[1]
            skeleton.chains[current] = netlink.Chain(current)
        elif found := _BASE.fullmatch(line):
            kind, hook, word, sign, distance, number = found.groups()
            priority = int(number) if number else _PRIORITIES[word] + int(f"{sign or ''}{distance or 0}")
            skeleton.chains[current] = netlink.Chain(current, kind, _HOOKS[hook], priority)
        elif found := _COMMENT.search(line):
            skeleton.rules.setdefault(current, []).append(found[1])
    return skeleton
