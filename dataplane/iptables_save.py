"""What iptables-save tells, as far as it concerns Services, and when two texts are one rule. Pure."""

import re
from collections.abc import Sequence

import msgspec
from msgspec import Struct

from .iptables_text import FIXED_CHAINS, MARKER, OWNED, SERVICE_CHAIN


class Table(Struct):
    """One table as iptables-save told it, as far as it concerns Services."""

    chains: dict[str, list[str]] = msgspec.field(default_factory=dict)
    """Chains named KUBE-*."""
    jumps: list[tuple[str, str]] = msgspec.field(default_factory=list)
    """(chain, rule) of rules in other chains that lead to one of those."""
    hits: dict[str, int] = msgspec.field(default_factory=dict)
    """Packets that the last rule of each KUBE-SEP chain has counted: nat sees only the first of a connection."""

    @property
    def owned(self) -> bool:
        """Our marker stands in it."""
        return OWNED in self.chains.get(MARKER, ())

    def ours(self) -> list[str]:
        """Chains with names that we give."""
        return [name for name in self.chains if name in FIXED_CHAINS or SERVICE_CHAIN.fullmatch(name)]


def parse_save(text: str) -> dict[str, Table]:
    """What `iptables-save -c` printed, by table.

    A comment may hold a newline, which iptables-save prints as it is: what follows is still the comment, however much
    it looks like a rule.
    """
    tables: dict[str, Table] = {}
    table = Table()
    lines = iter(text.split("\n"))
    for line in lines:
        while '"' in line and _open_quote(line):
            following = next(lines, None)
            if following is None:
                break
            line = f"{line}\n{following}"
        start = line[:1]
        if start == "[":
            counters, _, rule = line.partition(" -A ")
            chain, _, rule = rule.partition(" ")
            if chain.startswith("KUBE-"):
                table.chains.setdefault(chain, []).append(rule)
                if chain.startswith("KUBE-SEP-"):
                    table.hits[chain] = int(counters[1:].partition(":")[0])
            elif "-j KUBE-" in rule or "-g KUBE-" in rule:
                table.jumps.append((chain, rule))
        elif start == ":":
            chain = line[1:].partition(" ")[0]
            if chain.startswith("KUBE-"):
                table.chains.setdefault(chain, [])
        elif start == "*":
            table = tables.setdefault(line[1:], Table())
    return tables


def _open_quote(line: str) -> bool:
    if "\\" in line:
        line = re.sub(r"\\.", "", line, flags=re.DOTALL)
    return line.count('"') % 2 == 1


_ASIDE = re.compile(r" -m \w+| --mask \S+| --rsource| --reject-with icmp6?-port-unreachable")


def same_rule(one: str, other: str) -> bool:
    """Two texts of one rule; versions of iptables differ in the order of matches and in the defaults they print."""
    return one == other or _gist(one) == _gist(other)


def _gist(rule: str) -> list[str]:
    comments = re.findall(r'"[^"]*"', rule)
    return sorted(_ASIDE.sub("", " " + re.sub(r'"[^"]*"', '""', rule)).split()) + comments


def same_rules(one: Sequence[str], other: Sequence[str]) -> bool:
    """The same rules in the same order."""
    return len(one) == len(other) and all(map(same_rule, one, other))
