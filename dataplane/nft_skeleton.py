"""A table whose chains, sets and rules are a text of ours: written by `nft -f` if the kernel's differ, else untouched.

Each rule's comment ends with a hash of the whole text, so comparing comments compares everything. Chains that
`made_later` knows are somebody else's business; they and all elements stay where they are.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence

from msgspec import Struct

from . import netlink_nftables as netlink
from . import nftables_messages as nft
from .errors import ToolError
from .netlink_socket import NetlinkSocket
from .run_tool import run_tool

_OPTIONS = re.compile(r"(\s*)@(\w+)@")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_COMMENT = re.compile(r'comment "([^"]*)"$', re.MULTILINE)
_SET = re.compile(r"(set|map) (\w+) \{ type ([\w. ]+?)(?: : ([\w. ]+))?;(.*) \}")
_BASE = re.compile(r"type (\w+) hook (\w+) priority (?:([a-z]+)(?: ([+-]) (\d+))?|(-\d+)); policy accept;")
_TYPES = {"ipv4_addr": nft.IPV4, "ipv6_addr": nft.IPV6, "inet_proto": nft.PROTOCOL, "inet_service": nft.PORT}
_TYPES |= {"mark": nft.HOST32, "classid": nft.HOST32}
_HOOKS = {"prerouting": 0, "input": 1, "forward": 2, "output": 3, "postrouting": 4}
_PRIORITIES = {"dstnat": -100, "filter": 0, "srcnat": 100}
_SHAPE_FLAGS = nft.SET_MAP | nft.SET_TIMEOUT | nft.SET_INTERVAL


class Skeleton(Struct):
    """What of a table stays the same: sets as (key length, flags), chains, and the comments of each chain's rules."""

    sets: dict[str, tuple[int, int]]
    chains: dict[str, netlink.Chain]
    rules: dict[str, list[str]]


def render(source: str, options: Mapping[str, Sequence[str]]) -> str:
    """A text without its remarks, each @word@ replaced by the rules of that word, each rule's comment marked with the
    text's hash."""
    lines = [line for line in source.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    filled: list[str] = []
    for line in lines:
        if found := _OPTIONS.fullmatch(line):
            filled += [found[1] + rule for rule in options[found[2]]]
        else:
            filled.append(line)
    text = "\n".join(filled) + "\n"
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    return _COMMENT.sub(rf'comment "\1 [{mark}]"', text)


def parse(text: str) -> Skeleton:
    """What the kernel shows of a rendered text once it is loaded."""
    skeleton = Skeleton({}, {}, {})
    current = ""
    for line in map(str.strip, text.splitlines()):
        if found := _SET.fullmatch(line):
            what, name, types, _, more = found.groups()
            flags = nft.SET_MAP if what == "map" else 0
            flags |= (nft.SET_TIMEOUT if "timeout" in more else 0) | (nft.SET_INTERVAL if "interval" in more else 0)
            skeleton.sets[name] = nft.key_length([_TYPES[each] for each in types.split(" . ")]), flags
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


class StaticTable:
    """The table of family inet, in the network namespace of `sock` and of the calling thread."""

    def __init__(self, sock: NetlinkSocket, name: str, text: str, made_later: Callable[[str], bool]) -> None:
        self._sock = sock
        self._name = name
        self._text = text
        self._made_later = made_later
        self._expected = parse(text)

    def exists(self) -> bool:
        """Whether the table is there, whatever is in it."""
        return netlink.has_table(self._sock, nft.INET, self._name)

    def read(self) -> tuple[Skeleton, dict[str, list[str]]]:
        """What is there: the skeleton, and the comments of the rules of each chain made later."""
        fixed: dict[str, list[str]] = {}
        later: dict[str, list[str]] = {}
        chains = {each.name: each for each in netlink.read_chains(self._sock, nft.INET, self._name)}
        for name in chains:
            if self._made_later(name):
                later[name] = []
        for rule in netlink.read_rules(self._sock, nft.INET, self._name):
            (later if rule.chain in later else fixed).setdefault(rule.chain, []).append(rule.comment)
        shapes = netlink.read_sets(self._sock, nft.INET, self._name)
        sets = {shape.name: (shape.key_length, shape.flags & _SHAPE_FLAGS) for shape in shapes}
        return Skeleton(sets, {name: each for name, each in chains.items() if name not in later}, fixed), later

    def matches(self, found: Skeleton) -> bool:
        """It is what the text says."""
        return found == self._expected

    def ensure(self) -> bool:
        """Write the text unless it is there; True if something was written.

        One transaction, so that no packet ever meets half of it, and elements stay. Only where a set itself has to be
        another one (by another version, or another's hand) the table is made anew, empty.
        """
        found = self.read()[0] if self.exists() else Skeleton({}, {}, {})
        if found == self._expected:
            return False
        if found.sets.items() <= self._expected.sets.items():
            keep = [f"table inet {self._name}"]
            known = [name for name in found.chains if _IDENTIFIER.fullmatch(name)]
            keep += [f"flush chain inet {self._name} {name}" for name in known]
            keep += [
                f"delete chain inet {self._name} {name}"
                for name in known
                if found.chains[name] != self._expected.chains.get(name)
            ]
            try:
                run_tool(["nft", "-f", "-"], input="\n".join([*keep, self._text]))
            except ToolError:
                if not found.chains:
                    raise
            else:
                return True
        anew = [f"table inet {self._name}", f"delete table inet {self._name}", self._text]
        run_tool(["nft", "-f", "-"], input="\n".join(anew))
        return True
