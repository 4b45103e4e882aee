"""Other people's tables, chains, rules, sets, IPVS servers and addresses: made at random, and looked at without ours.

A `Stranger` does the same, step by step, in each namespace it is given: one where dataplane works and one where it does
not, so that the second tells what the first should hold.
"""

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from dataplane.iptables_text import FIXED_CHAINS, SERVICE_CHAIN
from dataplane.nft_layout import TABLE as NFT_TABLE

from .netns import NetNs

OUR_TABLES = {("inet", NFT_TABLE), ("inet", "dataplane-ipvs")}
OUR_DEVICE = "kube-ipvs0"
OUR_NETWORKS = ("10.96.", "[fd96:")
"""Where Services of a test with strangers have their addresses."""

_TOOLS = [f"{family}tables-{tool}" for tool in ("legacy", "nft") for family in ("ip", "ip6")]
_BUILT_IN = {"nat": ("PREROUTING", "OUTPUT", "POSTROUTING", "INPUT"), "filter": ("INPUT", "FORWARD", "OUTPUT")}
_COMMENTS = ("hello", "-j KUBE-SERVICES", "it's; a #trap", ":KUBE-SVC-AAAAAAAAAAAAAAAA - [0:0]", "COMMIT", "*nat")


def is_ours(chain: str) -> bool:
    """Whether a chain of iptables has a name that dataplane gives."""
    return chain in FIXED_CHAINS or SERVICE_CHAIN.fullmatch(chain) is not None


# ------------------------------------------------------------------------------------------------------- looking


def everything_else(ns: NetNs, *, ipvs: bool, handles: bool = True) -> dict[str, Any]:
    """All there is in a namespace that is not dataplane's, in a form that compares; `handles`: numbers of rules too."""
    seen: dict[str, Any] = {"nft": _ruleset(ns, handles)}
    for tool in ("iptables-legacy", "ip6tables-legacy"):
        seen[tool] = [line for line in ns.run(f"{tool}-save", "-c").stdout.splitlines() if not _skipped(line)]
    if ipvs:
        seen["ipvs"] = sorted(
            line
            for line in ns.run("ipvsadm", "-S", "-n").stdout.splitlines()
            if not line.split()[2].startswith(OUR_NETWORKS)
        )
        seen["addresses"] = [
            (link["ifname"], sorted((each["local"], each["prefixlen"]) for each in link["addr_info"]))
            for link in json.loads(ns.run("ip", "-j", "address").stdout)
            if link["ifname"] != OUR_DEVICE
        ]
    return seen


def _skipped(line: str) -> bool:
    """Lines of iptables-save that are ours, or a comment with the time of day."""
    words = line.split()
    if line.startswith("#") or not words:
        return True
    if line.startswith(":"):
        return is_ours(words[0][1:])
    if words[0].startswith("["):
        return is_ours(words[2]) or is_ours(words[-1])
    return False


def _ruleset(ns: NetNs, handles: bool) -> list[Any]:
    listed = json.loads(ns.run("nft", "-j", "list", "ruleset").stdout)["nftables"]
    kept = []
    for one in listed:
        ((kind, body),) = one.items()
        table = body.get("table", body.get("name"))
        if kind == "metainfo" or (body.get("family"), table) in OUR_TABLES:
            continue
        if kind == "chain" and is_ours(body["name"]):
            continue
        if kind == "rule" and (is_ours(body["chain"]) or is_ours(_target(body["expr"]))):
            continue
        if not handles:
            body.pop("handle", None)
        if "elem" in body:
            body["elem"] = sorted(map(json.dumps, body["elem"]))  # a hash has no order
        kept.append({kind: body})
    return kept


def _target(expressions: Sequence[Any]) -> str:
    for one in expressions:
        for verb in ("jump", "goto"):
            if isinstance(one, dict) and isinstance(one.get(verb), dict):
                return str(one[verb]["target"])
    return ""


# --------------------------------------------------------------------------------------------------------- doing


class Stranger:
    """Does random things; what it has made is known, so every step is one that works."""

    def __init__(self, rng: random.Random, places: Sequence[NetNs], *, ipvs: bool) -> None:
        self._rng = rng
        self._places = places
        self._tables: dict[str, list[str]] = {}
        self._chains: dict[tuple[str, str], list[str]] = {(tool, table): [] for tool in _TOOLS for table in _BUILT_IN}
        self._servers: list[str] = []
        self._addresses: list[str] = []
        self._count = 0
        self._steps: list[Callable[[], None]] = [self._nft, self._nft, self._iptables, self._iptables]
        if ipvs:
            self._steps += [self._ipvs, self._ipvs, self._address]
            for ns in places:
                ns.ip("link add theirs type veth peer name away", "link set theirs up")
        # what dataplane needs of iptables' own tables and chains is there before: afterwards they stay, being nobody's
        for tool, table in self._chains:
            jumps = "".join(f"-A {chain} -j THEIRS\n" for chain in _BUILT_IN[table])
            self._restore(tool, f"*{table}\n:THEIRS - [0:0]\n{jumps}COMMIT\n")
        for _ in range(12):
            self.act()

    def act(self) -> None:
        """One random change, the same in every place."""
        self._rng.choice(self._steps)()

    def _everywhere(self, *argv: str, stdin: str | None = None) -> None:
        for ns in self._places:
            ns.run(*argv, stdin=stdin)

    def _name(self, *stems: str) -> str:
        self._count += 1
        return f"{self._rng.choice(stems)}{self._count}"

    def _nft(self) -> None:
        rng = self._rng
        if self._tables and rng.random() < 0.2:
            gone = rng.choice(list(self._tables))
            del self._tables[gone]
            self._everywhere("nft", "delete", "table", *gone.split())
        elif self._tables and rng.random() < 0.6:
            table = rng.choice(list(self._tables))
            chain = rng.choice(self._tables[table])
            self._everywhere("nft", "-f", "-", stdin=rng.choice(_CHANGES).format(table=table, chain=chain, n=self._n()))
        else:
            family = rng.choice(("ip", "ip6", "inet", "arp", "bridge"))
            # one of the very name of ours, in a family that is not ours
            name = NFT_TABLE if family in ("ip", "arp") and rng.random() < 0.3 else self._name("theirs", "dataplane-")
            if f"{family} {name}" in self._tables:
                return
            self._tables[f"{family} {name}"] = ["services4", "nat_prerouting"]
            prerouting = "input" if family == "arp" else "prerouting"
            text = _TABLE.format(family=family, name=name, hook=prerouting, priority=self._n(), n=self._n())
            self._everywhere("nft", "-f", "-", stdin=text)

    def _n(self) -> int:
        return self._rng.randint(1, 250)

    def _restore(self, tool: str, text: str) -> None:
        self._everywhere(f"{tool}-restore", "--noflush", "--counters", "-w", "20", stdin=text)

    def _iptables(self) -> None:
        rng = self._rng
        (tool, table), known = rng.choice(list(self._chains.items()))
        built_in = rng.choice(_BUILT_IN[table])
        host = f"fd77::{self._n():x}/128" if tool.startswith("ip6") else f"172.20.0.{self._n()}/32"
        counters = f"[{self._n()}:{self._n()}]"
        rule = f'-s {host} -p tcp -m comment --comment "{rng.choice(_COMMENTS)}" -m tcp --dport {self._n()}'
        if known and rng.random() < 0.3:
            gone = known.pop(rng.randrange(len(known)))
            self._restore(tool, f"*{table}\n-D {built_in_of(gone)} -j {name_of(gone)}\n-F {name_of(gone)}\n"
                                f"-X {name_of(gone)}\nCOMMIT\n")  # fmt: skip
        elif rng.random() < 0.5:
            verb = rng.choice(("-A", "-I"))
            self._restore(tool, f"*{table}\n{counters} {verb} {built_in} {rule} -j RETURN\nCOMMIT\n")
        else:
            name = self._name("KUBE-SVC-", "KUBE-SEP-SHORT", "MINE", "KUBE-SERVICES-")
            known.append(f"{built_in} {name}")
            self._restore(
                tool,
                f"*{table}\n:{name} - [0:0]\n{counters} -A {name} {rule} -j RETURN\n-A {built_in} -j {name}\nCOMMIT\n",
            )

    def _ipvs(self) -> None:
        rng = self._rng
        if self._servers and rng.random() < 0.3:
            gone = self._servers.pop(rng.randrange(len(self._servers)))
            self._everywhere("ipvsadm", "-D", "-t", gone)
            return
        at = f"172.20.0.{self._n()}:{self._n()}"
        if at not in self._servers:
            self._servers.append(at)
            lines = [f"-A -t {at} -s rr", f"-a -t {at} -r 172.21.0.{self._n()}:80 -m -w {self._n()}"]
            self._everywhere("ipvsadm", "-R", stdin="\n".join(lines) + "\n")

    def _address(self) -> None:
        rng = self._rng
        if self._addresses and rng.random() < 0.4:
            gone = self._addresses.pop(rng.randrange(len(self._addresses)))
            self._everywhere("ip", "address", "delete", gone, "dev", "theirs")
            return
        address = f"172.22.0.{self._n()}/32"
        if address not in self._addresses:
            self._addresses.append(address)
            self._everywhere("ip", "address", "add", address, "dev", "theirs")


def built_in_of(entry: str) -> str:
    return entry.split()[0]


def name_of(entry: str) -> str:
    return entry.split()[1]


_TABLE = """table {family} {name} {{
    comment "goto refuse"
    counter hits {{ packets {n} bytes {n} }}
    set endpoints4 {{ type ipv4_addr . inet_service; elements = {{ 10.96.0.1 . {n}, 172.20.0.{n} . 80 }} }}
    set ranges {{ type ipv4_addr; flags interval; elements = {{ 172.20.0.0/24, 172.23.0.0-172.23.0.{n} }} }}
    map services4 {{ type ipv4_addr : verdict; elements = {{ 172.20.0.{n} : jump nat_prerouting }} }}
    chain nat_prerouting {{ counter packets {n} bytes {n} comment "* KUBE-SERVICES"; }}
    chain services4 {{
        type filter hook {hook} priority {priority}; policy accept;
        meta mark {n} counter jump nat_prerouting;
    }}
}}
"""
_CHANGES = (
    "add rule {table} {chain} meta mark {n} counter packets {n} bytes {n} return",
    "insert rule {table} {chain} meta priority {n} counter",
    "flush chain {table} nat_prerouting",
    "add element {table} endpoints4 {{ 172.24.0.{n} . {n} }}",
    "flush set {table} endpoints4",
    "add set {table} more{n} {{ type inet_proto; }}",
)
