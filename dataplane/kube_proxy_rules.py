"""Which chains, ipsets and virtual servers are kube-proxy's, by the names it gives. Pure.

The names are those of kube-proxy 1.36 in modes iptables and ipvs (pkg/proxy/iptables, pkg/proxy/ipvs), and of earlier
versions that may still have left something. Other programs have chains KUBE-* too: the kubelet (KUBE-FIREWALL in
filter, KUBE-KUBELET-CANARY), container runtimes (KUBE-HOSTPORTS, KUBE-HP-…), kube-router (KUBE-ROUTER-…,
KUBE-POD-FW-…), and our own iptables mode, whose marker stands in its tables.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

from msgspec import Struct

from .iptables_save import Table
from .iptables_text import MARK_MASQ, POSTROUTING
from .model import Address, Protocol, VirtualAddress, parse_address

BUILT_IN = frozenset(("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"))
ENTRIES = frozenset(
    (
        *("KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES", "KUBE-NODEPORTS", "KUBE-NODE-PORT", POSTROUTING, "KUBE-FORWARD"),
        *("KUBE-PROXY-FIREWALL", "KUBE-SOURCE-RANGES-FIREWALL", "KUBE-IPVS-FILTER", "KUBE-IPVS-OUT-FILTER"),
        *("KUBE-PORTALS-CONTAINER", "KUBE-PORTALS-HOST", "KUBE-NODEPORT-CONTAINER", "KUBE-NODEPORT-HOST"),
    )
)
"""Chains that built-in chains lead to."""
INNER = frozenset((MARK_MASQ, "KUBE-LOAD-BALANCER", "KUBE-PROXY-CANARY"))
_PER_SERVICE = re.compile(r"KUBE-(?:SVC|SVL|EXT|FW|SEP|XLB)-[A-Z2-7]{16}")
_TARGET = re.compile(r"(?:^|\s)-[jg] (KUBE-\S+)")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)

_SETS = (
    *("LOOP-BACK", "CLUSTER-IP", "EXTERNAL-IP", "EXTERNAL-IP-LOCAL", "LOAD-BALANCER", "LOAD-BALANCER-LOCAL"),
    *("LOAD-BALANCER-FW", "LOAD-BALANCER-SOURCE-CIDR", "LOAD-BALANCER-SOURCE-IP", "NODE-PORT-TCP", "NODE-PORT-UDP"),
    *("NODE-PORT-LOCAL-TCP", "NODE-PORT-LOCAL-UDP", "NODE-PORT-SCTP-HASH", "NODE-PORT-LOCAL-SCTP-HASH"),
    *("NODE-PORT-SCTP", "NODE-PORT-LOCAL-SCTP", "HEALTH-CHECK-NODE-PORT", "IPVS-IPS"),
)
SETS = frozenset(f"{prefix}{name}"[:31] for prefix in ("KUBE-", "KUBE-6-") for name in _SETS)
"""kube-proxy's ipsets; the kernel cuts names at 31 characters."""
_SERVED = ("CLUSTER-IP", "EXTERNAL-IP", "EXTERNAL-IP-LOCAL", "LOAD-BALANCER")
_ENTRY = re.compile(r"add (KUBE-\S+) (?:([0-9A-Fa-f.:]+),)?(?:(tcp|udp|sctp):)?([0-9]+)(?: .*)?")


def is_kube_proxy(table: str, chain: str) -> bool:
    """Whether kube-proxy gives this name to a chain of that table. KUBE-FIREWALL: its own in nat, shared in filter."""
    if chain == "KUBE-FIREWALL":
        return table == "nat"
    return chain in ENTRIES or chain in INNER or _PER_SERVICE.fullmatch(chain) is not None


def _targets(rules: Iterable[str]) -> Iterator[str]:
    """Chains KUBE-* that rules lead to; what a comment says does not count."""
    for rule in rules:
        found = _TARGET.search(_QUOTED.sub('""', rule))
        if found:
            yield found[1]


class Doomed(Struct, frozen=True):
    """What of one table is kube-proxy's: rules of built-in chains that lead to its chains, and these."""

    table: str
    jumps: tuple[tuple[str, str], ...]
    chains: tuple[str, ...]
    kept: tuple[str, ...] = ()
    """Chains of kube-proxy's names that others' rules lead to; they and what they need stay."""

    def script(self) -> str:
        """For iptables-restore --noflush: one transaction."""
        lines = [f"*{self.table}"]
        lines += [f":{chain} - [0:0]" for chain in self.chains]
        lines += [f"-D {chain} {rule}" for chain, rule in self.jumps]
        lines += [f"-X {chain}" for chain in self.chains]
        return "".join(line + "\n" for line in (*lines, "COMMIT"))


def doomed(tables: Mapping[str, Table]) -> list[Doomed]:
    """By table, in one family of one back end; nothing where our own iptables mode is."""
    if any(table.owned for table in tables.values()):
        return []
    found = []
    for name, table in tables.items():
        own = {chain for chain in table.chains if is_kube_proxy(name, chain)}
        jumps = [(chain, rule, next(_targets([rule]), "")) for chain, rule in table.jumps]
        usual = ENTRIES | {"KUBE-FIREWALL"}
        wanted = [target for chain, _, target in jumps if chain not in BUILT_IN or target not in usual]
        wanted += [target for chain, rules in table.chains.items() if chain not in own for target in _targets(rules)]
        kept: set[str] = set()
        while wanted:
            chain = wanted.pop()
            if chain in own and chain not in kept:
                kept.add(chain)
                wanted += _targets(table.chains[chain])
                wanted += [POSTROUTING] if chain == MARK_MASQ else []  # the mark means nothing without it
        going = sorted(own - kept)
        led = tuple((chain, rule) for chain, rule, target in jumps if target in going)
        if going or led or kept:
            found.append(Doomed(name, led, tuple(going), tuple(sorted(kept))))
    return found


class ServedSets(Struct, frozen=True):
    """What kube-proxy's ipsets say of its virtual servers."""

    at: frozenset[VirtualAddress]
    node_ports: frozenset[tuple[Protocol, int]]
    """At whichever address of the node."""


def served(text: str) -> ServedSets:
    """Of `ipset save`."""
    at: set[VirtualAddress] = set()
    ports: set[tuple[Protocol, int]] = set()
    for line in text.splitlines():
        entry = _ENTRY.fullmatch(line)
        if entry is None or entry[1] not in SETS:
            continue
        kind, address, protocol, port = entry[1].removeprefix("KUBE-").removeprefix("6-"), entry[2], entry[3], entry[4]
        if kind in _SERVED and address and protocol:
            at.add(VirtualAddress(Protocol[protocol.upper()], parse_address(address), int(port)))
        elif kind in ("NODE-PORT-TCP", "NODE-PORT-UDP"):
            ports.add((Protocol[kind[-3:]], int(port)))
        elif kind.startswith("NODE-PORT-SCTP") and protocol:
            ports.add((Protocol.SCTP, int(port)))
    return ServedSets(frozenset(at), frozenset(ports))


def its_servers(
    servers: Iterable[VirtualAddress],
    said: ServedSets,
    bound: Iterable[Address],
    node: Iterable[Address],
    ours: Iterable[VirtualAddress],
) -> list[VirtualAddress]:
    """kube-proxy's of these: at the addresses `bound` to its device, or named by its sets; never one of `ours`.

    `node`: this node's addresses, at which node ports are served.
    """
    addresses, local, others = set(bound), set(node), set(ours)
    return sorted(
        at
        for at in servers
        if at not in others
        and (
            at in said.at
            or at.address in addresses
            or (at.address in local and (at.protocol, at.port) in said.node_ports)
        )
    )
