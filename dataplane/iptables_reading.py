"""From the tables of one family to the virtual servers in them. Pure.

A server counts as seen when its rules are those that we write for it: what looks like one is written anew on paper and
compared with what is there, rule by rule. A group in which anything differs is damaged as a whole.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping

from msgspec import Struct
from msgspec.structs import replace

from .iptables_chains import LOCAL, ChainKey, client_rules, express, group_of, refusal, render
from .iptables_save import Table, same_rule, same_rules
from .iptables_text import (
    CLUSTER_IPS,
    EXTERNAL_SERVICES,
    FIREWALL,
    LAST,
    NODEPORTS,
    PORTAL_WORDS,
    REFUSAL_WORDS,
    SERVICE_CHAIN,
    SERVICES,
    SHARED,
    Form,
    closed_ports,
    label_of,
    service_text,
    unallocated,
)
from .model import (
    Address,
    Family,
    Kind,
    Masquerade,
    Network,
    NoServers,
    Protocol,
    RealServer,
    VirtualAddress,
    VirtualServer,
    parse_address,
    parse_network,
)

DAMAGED = "damaged"
"""Scheduler of a server whose rules are not as they should be: no wanted server is equal to it."""

_TO = re.compile(r"(?:^| )-d ([0-9a-f.:]+)(?:/32|/128)? ")
_FROM = re.compile(r"^-s ([0-9a-f.:/]+) ")
_PROTOCOL = re.compile(r"(?:^| )-p (tcp|udp|sctp) ")
_PORT = re.compile(r" --dport (\d{1,5}) ")
_COMMENT = re.compile(r'--comment "([^"\\]*)"')
_TARGET = re.compile(r"(?:^| )-j (\S+)")
_SECONDS = re.compile(r" --seconds (\d+) ")
_WEIGHT = re.compile(r' weight (\d+)"')
_ENDPOINT = re.compile(r" -j DNAT --to-destination (\S+):(\d{1,5})$")


class Damage(Struct, frozen=True):
    """What there is of a damaged server: its rules in shared chains, and the chains that its group seems to have."""

    lines: tuple[tuple[ChainKey, str], ...]
    chains: frozenset[ChainKey]


class Contents(Struct):
    """What one family's tables hold of ours. `tidy`: shared chains hold their rules and nothing else."""

    servers: dict[VirtualAddress, VirtualServer] = {}
    damage: dict[VirtualAddress, Damage] = {}
    orphans: frozenset[ChainKey] = frozenset()
    """Chains with names of ours that nothing leads to."""
    tidy: bool = True


class _Found(Struct):
    """What shared chains say of one address and port: chain, rule, comment and target."""

    at: VirtualAddress
    rules: dict[ChainKey, tuple[str, str, str]] = {}

    def targets(self) -> list[ChainKey]:
        """Where its rules lead."""
        return [(key[0], target) for key, (_, _, target) in self.rules.items()]

    def one_of(self, *keys: ChainKey) -> tuple[ChainKey, str, str, str] | None:
        return next(((key, *self.rules[key]) for key in keys if key in self.rules), None)


def read(form: Form, family: Family, tables: Mapping[str, Table]) -> Contents:
    """From tables that are ours."""
    contents = Contents()
    chains = {(name, chain): rules for name, table in tables.items() for chain, rules in table.chains.items()}
    places = _places(chains, contents)
    groups: dict[str, list[tuple[_Found, list[VirtualServer]]]] = {}
    for found in places.values():
        servers = _rebuild(form, found, chains)
        if servers is None:
            # no cluster IP before it is known to be one: all ports of those are closed
            unknown = VirtualServer(found.at, kind=Kind.EXTERNAL_IP)
            _damage(contents, found, [unknown], frozenset(_reached(found.targets(), chains)))
            continue
        groups.setdefault(group_of(form, servers[0]), []).append((found, servers))
    healthy: set[ChainKey] = set()
    for group in groups.values():
        servers = [server for _, some in group for server in some]
        rendered = render(form, servers)
        lines: dict[tuple[int, bytes, int], dict[ChainKey, str]] = {}
        for line in rendered.lines:
            lines.setdefault(line.at[:3], {})[line.chain] = line.rule
        whole = all(
            found.rules.keys() == wanted.keys() and all(same_rule(found.rules[key][0], wanted[key]) for key in wanted)
            for found, _ in group
            for wanted in (lines.get(found.at[:3], {}),)
        ) and all(key in chains and same_rules(chains[key], rules) for key, rules in rendered.chains.items())
        if whole:
            contents.servers.update((server.at, server) for server in servers)
            healthy.update(rendered.chains)
            continue
        # also what is there by a name of the group's and nothing leads to, with all that it leads to
        starts = [key for found, _ in group for key in found.targets()]
        together = frozenset(_reached([*starts, *rendered.chains], chains))
        for found, some in group:
            _damage(contents, found, some, together)
    for at, damage in contents.damage.items():
        contents.damage[at] = Damage(damage.lines, damage.chains - healthy)
    known = healthy.union(*(damage.chains for damage in contents.damage.values()))
    contents.orphans = frozenset(key for key in chains if SERVICE_CHAIN.fullmatch(key[1]) and key not in known)
    contents.tidy &= _closed(form, family, chains, contents)
    return contents


def _places(chains: Mapping[ChainKey, list[str]], contents: Contents) -> dict[VirtualAddress, _Found]:
    """The rules of shared chains by address and port; what is none of ours makes the tables untidy."""
    places: dict[VirtualAddress, _Found] = {}
    for table, names in SHARED.items():
        for name in names:
            key = table, name
            rules = chains.get(key)
            if rules is None:
                contents.tidy = False
                continue
            if key in LAST:
                if not rules or not same_rule(rules[-1], LAST[key]):
                    contents.tidy = False
                else:
                    rules = rules[:-1]
            for rule in rules:
                read_rule = _portal(rule)
                if read_rule is None:
                    contents.tidy = False
                    continue
                at, comment, target = read_rule
                place = places.setdefault(at, _Found(at))
                if key in place.rules:
                    contents.tidy = False
                    continue
                place.rules[key] = rule, comment, target
    for at in [at for at, place in places.items() if place.rules.keys() == {("filter", FIREWALL)}]:
        del places[at]
        contents.tidy = False
    return places


def _closed(form: Form, family: Family, chains: Mapping[ChainKey, list[str]], contents: Contents) -> bool:
    """Whether KUBE-CLUSTER-IPS has a rule for each cluster IP, and no other."""
    rules = chains.get(("filter", CLUSTER_IPS))
    if rules is None:
        return False
    last = unallocated(form, family)
    head, tail = rules[: len(rules) - len(last)], rules[len(rules) - len(last) :]
    if not same_rules(tail, last):
        return False
    wanted = {server.at.address for server in contents.servers.values() if server.kind is Kind.CLUSTER_IP}
    seen = set()
    for rule in head:
        to = _TO.search(rule)
        address = _packed(to[1]) if to else None
        if address is None or address in seen or not same_rule(rule, closed_ports(address)):
            return False
        seen.add(address)
    return seen == wanted


def _portal(rule: str) -> tuple[VirtualAddress, str, str] | None:
    """Where a rule of a shared chain leads: virtual address, comment, target."""
    to, protocol, port = _TO.search(rule), _PROTOCOL.search(rule), _PORT.search(rule)
    comment, target = _COMMENT.search(rule), _TARGET.search(rule)
    address = _packed(to[1]) if to else None
    if address is None or not (protocol and port and comment and target) or int(port[1]) > 65535:
        return None
    return VirtualAddress(int(Protocol[protocol[1].upper()]), address, int(port[1])), comment[1], target[1]


def _leads_to(rule: str, at: VirtualAddress) -> bool:
    found = _portal(rule)
    return found is not None and found[0] == at


def _packed(text: str) -> Address | None:
    try:
        return parse_address(text)
    except ValueError:
        return None


def _damage(contents: Contents, found: _Found, servers: list[VirtualServer], chains: frozenset[ChainKey]) -> None:
    for number, server in enumerate(servers):
        contents.servers[server.at] = replace(server, scheduler=DAMAGED, bound=False)
        lines = tuple((key, rule) for key, (rule, _, _) in found.rules.items()) if number == 0 else ()
        contents.damage[server.at] = Damage(lines, chains)


def _reached(starts: Iterable[ChainKey], chains: Mapping[ChainKey, list[str]]) -> Iterator[ChainKey]:
    """Chains of Services among these, and those that they lead to."""
    waiting = list(starts)
    seen: set[ChainKey] = set()
    while waiting:
        key = waiting.pop()
        if key in seen or key not in chains or not SERVICE_CHAIN.fullmatch(key[1]):
            continue
        seen.add(key)
        yield key
        waiting += [(key[0], target) for target in map(_target, chains[key])]


def _target(rule: str) -> str:
    target = _TARGET.search(rule)
    return target[1] if target else ""


# ------------------------------------------------------------------------------------------------- one site


def _rebuild(form: Form, found: _Found, chains: Mapping[ChainKey, list[str]]) -> list[VirtualServer] | None:
    """The servers that rules at one address and port seem to be of; None when they are nothing like ours."""
    led = found.one_of(("nat", SERVICES), ("nat", NODEPORTS))
    refused = found.one_of(("filter", SERVICES), ("filter", EXTERNAL_SERVICES))
    named = _named(form, found.at, led, refused)
    if named is None:
        return None
    blank = VirtualServer(found.at, bound=False, label=named[0], kind=named[1])
    outside: VirtualServer | None = None
    inside: VirtualServer | None = None
    allowed: tuple[Network, ...] = ()
    if led:
        target = led[3]
        if target.startswith("KUBE-FW-"):
            rules = chains.get(("nat", target), [])
            allowed = _networks(rules)
            target = next(filter(None, map(_target, rules)), "")
        if target.startswith(("KUBE-SVC-", "KUBE-SVL-")):
            outside = _at_cluster_ip(form, blank, target, chains)
        else:
            outside, inside = _external(blank, chains.get(("nat", target), []), chains)
    if refused and outside is None:
        outside = blank
        if same_rule(refused[1], refusal(form, replace(blank, no_servers=NoServers.DROP))):
            outside = replace(blank, no_servers=NoServers.DROP)
    firewall = found.one_of(("filter", FIREWALL))
    if firewall and not allowed:
        allowed = _networks(chains.get(("filter", firewall[3]), []))
    if outside and allowed:
        outside = replace(outside, allowed=allowed)
    return [express(form, server) for server in (outside, inside) if server] or None


_Rule = tuple[ChainKey, str, str, str]


def _named(form: Form, at: VirtualAddress, led: _Rule | None, refused: _Rule | None) -> tuple[str, Kind] | None:
    """Label and kind, as comments tell them."""
    if led:
        words, text = PORTAL_WORDS, led[2]
    elif refused:
        words, text = REFUSAL_WORDS, refused[2].partition(" has no ")[0]
    else:
        return None
    for kind in Kind:
        if (led and (kind is Kind.NODE_PORT) != (led[0][1] == NODEPORTS)) or not text.endswith(words[kind]):
            continue
        if refused and not led and (kind is Kind.CLUSTER_IP) != (refused[0][1] == SERVICES):
            continue
        label = label_of(form, at, text.removesuffix(words[kind]))
        if label is not None:
            return label, kind
    return None


def _at_cluster_ip(form: Form, blank: VirtualServer, pool: str, chains: Mapping[ChainKey, list[str]]) -> VirtualServer:
    server = _with_reals(blank, pool, chains)
    text = service_text(form, blank.at, blank.label)
    mine = [rule for rule in chains.get(("nat", pool), ()) if _leads_to(rule, blank.at)]
    for masquerade in Masquerade:
        one = replace(server, masquerade=masquerade)
        if same_rules(mine, client_rules(form, one, text)):
            return one
    return server


def _external(
    blank: VirtualServer, rules: list[str], chains: Mapping[ChainKey, list[str]]
) -> tuple[VirtualServer | None, VirtualServer | None]:
    """What KUBE-EXT serves to everybody, and to clients inside the cluster."""
    outside = inside = None
    masquerade = Masquerade.NODE
    for rule in rules:
        target = _target(rule)
        if "masquerade traffic for" in rule:
            masquerade = Masquerade.ALWAYS
        elif not target.startswith(("KUBE-SVC-", "KUBE-SVL-")) or "pod traffic for" in rule:
            continue
        elif LOCAL in rule:
            inside = _with_reals(replace(blank, at=blank.at._replace(inside=True)), target, chains)
        else:
            outside = _with_reals(blank, target, chains)
            masquerade = Masquerade.DETECT if _COMMENT.search(rule) else masquerade
    return replace(outside, masquerade=masquerade) if outside else None, inside


def _with_reals(blank: VirtualServer, pool: str, chains: Mapping[ChainKey, list[str]]) -> VirtualServer:
    """The endpoints behind a KUBE-SVC or KUBE-SVL chain."""
    reals: dict[tuple[Address, int], RealServer] = {}
    persistence = 0
    for rule in chains.get(("nat", pool), ()):
        target = _target(rule)
        if not target.startswith("KUBE-SEP-"):
            continue
        if seconds := _SECONDS.search(rule):
            persistence = int(seconds[1])
            continue
        weight = _WEIGHT.search(rule)
        to = _ENDPOINT.search((chains.get(("nat", target)) or [""])[-1])
        address = _packed(to[1].strip("[]")) if to else None
        if to and address is not None:
            reals[address, int(to[2])] = RealServer(address, int(to[2]), int(weight[1]) if weight else 1)
    return replace(blank, real_servers=tuple(sorted(reals.values())), persistence=persistence)


def _networks(rules: list[str]) -> tuple[Network, ...]:
    """Whom a firewall chain lets through."""
    found = []
    for source in filter(None, map(_FROM.search, rules)):
        with contextlib.suppress(ValueError):
            found.append(parse_network(source[1]))
    return tuple(found)
