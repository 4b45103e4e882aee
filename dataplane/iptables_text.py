"""iptables rules as text: chain names, the rules of one virtual server, and the fixed chains around them. Pure.

    KUBE-SERVICES ──portal──▶ KUBE-SVC-hash ──statistic──▶ KUBE-SEP-hash: mark a hairpin, DNAT

Two forms: `classic` is what kubernetes.io's "Debug Services" and the tutorials show (kube-proxy up to about 1.8: a
colon behind every Service's name, five digits of probability, MARK in KUBE-SEP), `current` what kube-proxy 1.36 writes
(pkg/proxy/iptables/proxier.go). Rules are written as `iptables-save` prints them, so that what was sent and what is
read back compare as strings. User-made text gets in by one door, `plain_label`, and is dropped there unless harmless.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple

import msgspec
from msgspec import Struct

from .model import (
    Family,
    Forwarding,
    Masquerade,
    Network,
    NoServers,
    Protocol,
    RealServer,
    VirtualAddress,
    VirtualServer,
    family_of,
    format_address,
    format_endpoint,
)

SERVICES, CLUSTER_IPS = "KUBE-SERVICES", "KUBE-CLUSTER-IPS"
MARK_MASQ, MARK_CLIENTS, POSTROUTING = "KUBE-MARK-MASQ", "KUBE-MARK-CLIENTS", "KUBE-POSTROUTING"
MARKER = "KUBE-DATAPLANE"
"""The chain that says whose the others are: never jumped to, in each table of ours. kube-proxy has no such chain."""
OWNED = '-m comment --comment "dataplane owns the chains of Services in this table"'
FIXED_CHAINS = frozenset((SERVICES, CLUSTER_IPS, MARK_MASQ, MARK_CLIENTS, POSTROUTING, MARKER))
SERVICE_CHAIN = re.compile(r"KUBE-(?:SVC|SEP)-[A-Z2-7]{16}")
MARK = "0x4000"
"""Bit 14, kube-proxy's --iptables-masquerade-bit."""
PORTALS = '-m comment --comment "kubernetes service portals" -j KUBE-SERVICES'
CLOSED = f'-m conntrack ! --ctstate DNAT -m comment --comment "closed ports of cluster IPs" -j {CLUSTER_IPS}'
"""Last rule of KUBE-SERVICES in filter: what the nat table sent to an endpoint does not walk through the VIPs."""

_LABEL = re.compile(r"[A-Za-z0-9._-]{1,63}/[A-Za-z0-9._-]{1,63}(?::[A-Za-z0-9._-]{1,63})?")
_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"  # RFC 4648
_PROTOCOLS = {int(one): one.name.lower() for one in Protocol}
DAMAGED = "damaged"
"""Scheduler of a server whose chains are not as they should be: no wanted server is equal to it."""

Rules = tuple[str, ...]
Chains = dict[str, Rules]
"""Rules by chain, each without the leading `-A CHAIN `."""


class Form(Struct, frozen=True):
    """How rules are written: the options that show in their text."""

    classic: bool = True
    everyone: bool = False
    clusters: tuple[Network, ...] = ()

    def clients(self, family: Family) -> list[Network]:
        """The pod ranges of a family."""
        return [each for each in self.clusters if family_of(each.address) == family]


# ------------------------------------------------------------------------------------------------------- names


def plain_label(label: str) -> str:
    """A label as it may stand in a comment: `namespace/name:port` of plain characters, else "" (reliability, 4d)."""
    return label if _LABEL.fullmatch(label) else ""


def service_text(form: Form, at: VirtualAddress, label: str) -> str:
    """What comments call a virtual server: its Service port's name, or where it is when it has none."""
    label = plain_label(label)
    if not label:
        return f"{format_endpoint(at.address, at.port)}/{_PROTOCOLS[at.protocol]}"
    return label + ":" if form.classic and ":" not in label else label


def label_of(form: Form, at: VirtualAddress, text: str) -> str | None:
    """The reverse; None when the text is nothing that we write."""
    label = text[:-1] if form.classic and text.endswith(":") else text
    label = plain_label(label)
    return label if service_text(form, at, label) == text else None


def seeds(form: Form, at: VirtualAddress, text: str) -> tuple[str, str]:
    """What the chains' names are hashes of: kube-proxy's, and one for when another server has these names already."""
    usual = text + _PROTOCOLS[at.protocol]
    return usual, f"{usual}@{format_endpoint(at.address, at.port)}"


def chain_name(kind: str, seed: str) -> str:
    """`KUBE-SVC-NWV5X2332I4OT4T3` (proxier.go portProtoHash)."""
    digest = sha256(seed.encode()).digest()
    high, low, two = int.from_bytes(digest[:5]), int.from_bytes(digest[5:10]), _BASE32
    return (
        f"KUBE-{kind}-{two[high >> 30]}{two[high >> 20 & 0x3FF]}{two[high >> 10 & 0x3FF]}{two[high & 0x3FF]}"
        f"{two[low >> 30]}{two[low >> 20 & 0x3FF]}{two[low >> 10 & 0x3FF]}{two[low & 0x3FF]}"
    )


_BASE32 = [one + other for one in _DIGITS for other in _DIGITS]
"""Two characters for every ten bits: base64.b32encode takes six times as long, and there are 40,000 names to make."""


# -------------------------------------------------------------------------------------------------- one server


class Rendered(NamedTuple):
    """A virtual server in rules. `portal`: its rule in KUBE-SERVICES of nat; `refusal`: that of filter; "" = none."""

    portal: str
    refusal: str
    chains: Chains


def express(form: Form, server: VirtualServer) -> VirtualServer:
    """The server as rules can hold it and tell it back: what rules have no way to say takes its default."""
    reals = server.real_servers
    if any(
        real.local or real.forwarding is not Forwarding.MASQ or real.upper_threshold or real.lower_threshold
        for real in reals
    ):
        reals = tuple(RealServer(real.address, real.port, real.weight) for real in reals)
    masquerade = server.masquerade if reals else Masquerade.DETECT
    if masquerade is not Masquerade.DETECT and _client_rule(form, server, masquerade) == _client_rule(
        form, server, Masquerade.DETECT
    ):
        masquerade = Masquerade.DETECT
    return VirtualServer(
        server.at,
        reals,
        persistence=server.persistence if any(real.weight for real in reals) else 0,
        masquerade=masquerade,
        no_servers=NoServers.REJECT if reals else server.no_servers,
        bound=False,
        label=plain_label(server.label),
    )


def render(form: Form, server: VirtualServer, seed: str) -> Rendered:
    """Every rule of one virtual server, as iptables-save prints them."""
    at = server.at
    text = service_text(form, at, server.label)
    if not server.real_servers:
        return Rendered("", refusal(form, server), {})
    svc = chain_name("SVC", seed)
    clients = _client_rule(form, server, server.masquerade)
    balance = [clients] if clients else []
    chains: Chains = {svc: ()}
    ends = [str(real) for real in server.real_servers]
    seps = [chain_name("SEP", f"{seed}{end}") for end in ends]
    remember = ""
    mask, width = ("255.255.255.255", 32) if len(at.address) == 4 else ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 128)
    if server.persistence:
        for real, end, sep in zip(server.real_servers, ends, seps, strict=True):
            if real.weight:
                balance.append(
                    f"{_comment(_arrow(form, text, real, end))} -m recent --rcheck --seconds {server.persistence} "
                    f"--reap --name {sep} --mask {mask} --rsource -j {sep}"
                )
    comment = _comment(text)
    protocol = _PROTOCOLS[at.protocol]
    to = f" -m {protocol} -j DNAT --to-destination "
    hairpin = f"/{width} {comment} -j " + (f"MARK --set-xmark {MARK}/{MARK}" if form.classic else MARK_MASQ)
    for real, end, sep, share in zip(server.real_servers, ends, seps, shares(form, server.real_servers), strict=True):
        balance.append(f"{_comment(_arrow(form, text, real, end))}{share} -j {sep}")
        if server.persistence and real.weight:
            remember = f" -m recent --set --name {sep} --mask {mask} --rsource"
        host = end[: end.rindex(":")].strip("[]")
        chains[sep] = (f"-s {host}{hairpin}", f"-p {protocol} {comment}{remember}{to}{end}")
    chains[svc] = tuple(balance)
    return Rendered(portal(form, server, svc), "", chains)


def portal(form: Form, server: VirtualServer, svc: str) -> str:
    """The rule that leads a VIP's packets to their chain."""
    return f"{_to(server.at, f'{service_text(form, server.at, server.label)} cluster IP')} -j {svc}"


def refusal(form: Form, server: VirtualServer) -> str:
    """The rule for a server without real servers."""
    at = server.at
    text = service_text(form, at, server.label)
    if server.no_servers is NoServers.DROP:
        return f"{_to(at, f'{text} has no local endpoints')} -j DROP"
    return f"{_to(at, f'{text} has no endpoints')} -j REJECT --reject-with {_unreachable(at.address)}"


def shares(form: Form, reals: Sequence[RealServer]) -> Sequence[str]:
    """How each of the rules in a row takes its part of what the ones before have left; the last takes the rest.

    With equal weights that is 1/3, 1/2, 1. Weights are written in the comment, since no probability tells them back; a
    rule of probability 0 keeps a server of weight 0 with its Service.
    """
    return _shares(form.classic, tuple([real.weight for real in reals]))


@lru_cache(4096)
def _shares(classic: bool, weights: tuple[int, ...]) -> tuple[str, ...]:
    equal = all(weight == 1 for weight in weights)
    digits = 5 if classic and equal else 10
    left = sum(weights)
    texts = []
    for weight in weights:
        last = left == weight and weight
        texts.append("" if last else " " + probability(weight / left if left else 0.0, digits))
        left -= weight
        if last:
            left = 0
    return tuple(texts)


@lru_cache(4096)
def probability(share: float, digits: int) -> str:
    """A statistic match as iptables-save prints it: the kernel keeps probabilities in units of 2^-31."""
    return f"-m statistic --mode random --probability {round(float(f'{share:.{digits}f}') * 2**31) / 2**31:.11f}"


def closed_ports(address: bytes) -> str:
    """The rule of KUBE-CLUSTER-IPS that refuses what no Service of a VIP takes, ping included."""
    return f"-d {_single(address)} -j REJECT --reject-with {_unreachable(address)}"


def _unreachable(address: bytes) -> str:
    return "icmp-port-unreachable" if len(address) == 4 else "icmp6-port-unreachable"


def _arrow(form: Form, text: str, real: RealServer, end: str) -> str:
    weight = f" weight {real.weight}" if real.weight != 1 else ""
    return text + weight if form.classic else f"{text} -> {end}{weight}"


def _client_rule(form: Form, server: VirtualServer, masquerade: Masquerade) -> str:
    """The rule that marks clients to be masqueraded; "" = nobody is."""
    everyone = masquerade is Masquerade.ALWAYS or form.everyone
    if not everyone and not form.clusters:
        return ""
    clusters = form.clients(family_of(server.at.address))
    if masquerade is Masquerade.NODE or not (everyone or clusters):
        return ""
    rule = _to(server.at, f"{service_text(form, server.at, server.label)} cluster IP")
    if everyone:
        return f"{rule} -j {MARK_MASQ}"
    if len(clusters) == 1:
        return f"! -s {clusters[0]} {rule} -j {MARK_MASQ}"
    return f"{rule} -j {MARK_CLIENTS}"


def _to(at: VirtualAddress, comment: str) -> str:
    protocol = _PROTOCOLS[at.protocol]
    return f"-d {_single(at.address)} -p {protocol} {_comment(comment)} -m {protocol} --dport {at.port}"


def _single(address: bytes) -> str:
    return f"{format_address(address)}/{8 * len(address)}"


def _comment(text: str) -> str:
    return f'-m comment --comment "{text}"'


# ------------------------------------------------------------------------------------------------- fixed chains


def marker(settings: Mapping[str, int]) -> Rules:
    """The rules of the marker chain: whose the table's chains are, and sysctls as they were before us."""
    return (OWNED, *(_comment(f"{name} was {value}") for name, value in settings.items()))


def fixed(form: Form, family: Family, *, fully_random: bool) -> dict[str, Chains]:
    """Chains that are the same whatever Services there are, by table."""
    randomly = " --random-fully" if fully_random else ""
    nat: Chains = {
        MARK_MASQ: (f"-j MARK --set-xmark {MARK}/{MARK}",),
        POSTROUTING: (
            f"-m mark ! --mark {MARK}/{MARK} -j RETURN",
            f"-j MARK --set-xmark {MARK}/0x0",
            f"{_comment('kubernetes service traffic requiring SNAT')} -j MASQUERADE{randomly}",
        ),
    }
    clusters = form.clients(family)
    if len(clusters) > 1:
        nat[MARK_CLIENTS] = (*(f"-s {each} -j RETURN" for each in clusters), f"-j {MARK_MASQ}")
    return {"nat": nat, "filter": {}}


JUMPS: dict[str, tuple[tuple[str, str], ...]] = {
    "nat": (
        ("PREROUTING", PORTALS),
        ("OUTPUT", PORTALS),
        ("POSTROUTING", f'-m comment --comment "kubernetes postrouting rules" -j {POSTROUTING}'),
    ),
    "filter": (
        ("FORWARD", f"-m conntrack --ctstate NEW {PORTALS}"),
        ("OUTPUT", f"-m conntrack --ctstate NEW {PORTALS}"),
    ),
}
"""Rules in built-in chains, put on top as kube-proxy does."""


# ------------------------------------------------------------------------------------------------ iptables-save


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
