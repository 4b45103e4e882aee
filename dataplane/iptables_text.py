"""iptables rules as text: names of chains, phrases of rules, and the fixed chains around the Services. Pure.

    KUBE-SERVICES ─┬────────cluster IP────────▶ KUBE-SVC-hash ──statistic──▶ KUBE-SEP-hash: mark a hairpin, DNAT
                   ├─external IPs─▶ KUBE-EXT-hash: who is masqueraded, who gets which ─▶ KUBE-SVC-hash, KUBE-SVL-hash
    KUBE-NODEPORTS ┘

Two forms: `classic` is what kubernetes.io's "Debug Services" and the tutorials show (kube-proxy up to about 1.8: a
colon behind every Service's name, five digits of probability, MARK in KUBE-SEP), `current` what kube-proxy 1.36 writes
(pkg/proxy/iptables/proxier.go). Rules are written as `iptables-save` prints them, so that what was sent and what is
read back compare as strings. User-made text gets in by one door, `plain_label`, and is dropped there unless harmless.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import sha256

from msgspec import Struct

from .model import Family, Kind, Network, Protocol, RealServer, VirtualAddress, family_of, format_address, parse_network
from .model import format_endpoint as _endpoint

SERVICES, NODEPORTS = "KUBE-SERVICES", "KUBE-NODEPORTS"
FIREWALL, EXTERNAL_SERVICES, CLUSTER_IPS = "KUBE-PROXY-FIREWALL", "KUBE-EXTERNAL-SERVICES", "KUBE-CLUSTER-IPS"
MARK_MASQ, MARK_CLIENTS, POSTROUTING = "KUBE-MARK-MASQ", "KUBE-MARK-CLIENTS", "KUBE-POSTROUTING"
MARKER = "KUBE-DATAPLANE"
"""The chain that says whose the others are: never jumped to, in each table of ours. kube-proxy has no such chain."""
OWNED = '-m comment --comment "dataplane owns the chains of Services in this table"'
SHARED: dict[str, tuple[str, ...]] = {"filter": (FIREWALL, EXTERNAL_SERVICES, SERVICES), "nat": (SERVICES, NODEPORTS)}
"""Chains in which every Service has its rules, by table."""
FIXED_CHAINS = frozenset((*SHARED["filter"], *SHARED["nat"], CLUSTER_IPS, MARK_MASQ, MARK_CLIENTS, POSTROUTING, MARKER))
SERVICE_CHAIN = re.compile(r"KUBE-(?:SVC|SVL|EXT|FW|SEP)-[A-Z2-7]{16}")
MARK = "0x4000"
"""Bit 14, kube-proxy's --iptables-masquerade-bit."""
PORTALS = '-m comment --comment "kubernetes service portals" -j KUBE-SERVICES'
LAST: dict[tuple[str, str], str] = {
    ("nat", SERVICES): (
        '-m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" '
        f"-m addrtype --dst-type LOCAL -j {NODEPORTS}"
    ),
    # what the nat table sent to an endpoint does not walk through the VIPs
    ("filter", SERVICES): (
        f'-m conntrack ! --ctstate DNAT -m comment --comment "closed ports of cluster IPs" -j {CLUSTER_IPS}'
    ),
}
"""The rule at the end of a shared chain."""

_LABEL = re.compile(r"[A-Za-z0-9._-]{1,63}/[A-Za-z0-9._-]{1,63}(?::[A-Za-z0-9._-]{1,63})?")
PROTOCOLS = {int(one): one.name.lower() for one in Protocol}
PORTAL_WORDS = {
    Kind.CLUSTER_IP: " cluster IP",
    Kind.EXTERNAL_IP: " external IP",
    Kind.LOAD_BALANCER: " loadbalancer IP",
    Kind.NODE_PORT: "",
}
"""What stands behind the Service's name in the comment of a rule that leads to it (kube-proxy's words)."""
REFUSAL_WORDS = PORTAL_WORDS | {Kind.CLUSTER_IP: "", Kind.NODE_PORT: " node port"}
"""The same in front of `has no endpoints`: kube-proxy has no such words; here they tell the kind back."""

Rules = tuple[str, ...]
Chains = dict[str, Rules]
"""Rules by chain, each without the leading `-A CHAIN `."""


class Form(Struct, frozen=True):
    """How rules are written: the options that show in their text.

    Who is a client inside the cluster: `clusters`, `bridge`, `prefix` (see backend.Options). `services`: where cluster
    IPs come from.
    """

    classic: bool = True
    everyone: bool = False
    clusters: tuple[Network, ...] = ()
    bridge: str = ""
    prefix: str = ""
    services: tuple[Network, ...] = ()

    @property
    def tells(self) -> bool:
        """Some clients of cluster IPs may have to be masqueraded."""
        return bool(self.everyone or self.clusters or self.bridge or self.prefix)

    def insiders(self, family: Family) -> list[str]:
        """The matches of clients inside the cluster, one for each way to tell them."""
        found = [f"-s {each}" for each in self.clusters if family_of(each.address) == family]
        found += [f"-i {self.bridge}"] if self.bridge else []
        # a name of 15 characters is a whole one (IFNAMSIZ), and iptables refuses a wildcard behind it
        found += [f"-i {self.prefix + '+' if len(self.prefix) < 15 else self.prefix}"] if self.prefix else []
        return found


# ------------------------------------------------------------------------------------------------------- names


def plain_label(label: str) -> str:
    """A label as it may stand in a comment: `namespace/name:port` of plain characters, else "" (reliability, 4d)."""
    return label if _LABEL.fullmatch(label) else ""


def service_text(form: Form, at: VirtualAddress, label: str) -> str:
    """What comments call a virtual server: its Service port's name, or where it is when it has none."""
    label = plain_label(label)
    if not label:
        return f"{_endpoint(at.address, at.port)}/{PROTOCOLS[at.protocol]}"
    return label + ":" if form.classic and ":" not in label else label


def label_of(form: Form, at: VirtualAddress, text: str) -> str | None:
    """The reverse; None when the text is nothing that we write."""
    label = text[:-1] if form.classic and text.endswith(":") else text
    label = plain_label(label)
    return label if service_text(form, at, label) == text else None


def own_seed(usual: str, at: VirtualAddress) -> str:
    """The seed of an address that cannot share its ServicePort's chains."""
    return f"{usual}@{_endpoint(at.address, at.port)}"


_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"  # RFC 4648
_BASE32 = [one + other for one in _DIGITS for other in _DIGITS]
"""Two characters for every ten bits: base64.b32encode takes six times as long, and there are 40,000 names to make."""


def chain_name(kind: str, seed: str) -> str:
    """`KUBE-SVC-NWV5X2332I4OT4T3` (proxier.go portProtoHash)."""
    digest = sha256(seed.encode()).digest()
    high, low, two = int.from_bytes(digest[:5]), int.from_bytes(digest[5:10]), _BASE32
    return (
        f"KUBE-{kind}-{two[high >> 30]}{two[high >> 20 & 0x3FF]}{two[high >> 10 & 0x3FF]}{two[high & 0x3FF]}"
        f"{two[low >> 30]}{two[low >> 20 & 0x3FF]}{two[low >> 10 & 0x3FF]}{two[low & 0x3FF]}"
    )


# ----------------------------------------------------------------------------------------------------- phrases


def to_address(at: VirtualAddress, text: str, *, source: str = "", device: str = "") -> str:
    """The matches of a rule for one VIP and port, with a comment; `source` and `device` are further ones (or "")."""
    protocol = PROTOCOLS[at.protocol]
    head = f"{source}{' ' * bool(source)}-d {single(at.address)} {device}{' ' * bool(device)}"
    return f'{head}-p {protocol} -m comment --comment "{text}" -m {protocol} --dport {at.port}'


def single(address: bytes) -> str:
    """An address as a range of one."""
    return f"{format_address(address)}/{8 * len(address)}"


def comment(text: str) -> str:
    """A comment match."""
    return f'-m comment --comment "{text}"'


def reject(address: bytes) -> str:
    """The target that refuses packets to an address at once."""
    return "REJECT --reject-with " + ("icmp-port-unreachable" if len(address) == 4 else "icmp6-port-unreachable")


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


# ------------------------------------------------------------------------------------------------- fixed chains


def closed_ports(address: bytes) -> str:
    """The rule of KUBE-CLUSTER-IPS that refuses what no Service of a VIP takes, ping included."""
    return f"-d {single(address)} -j {reject(address)}"


def unallocated(form: Form, family: Family) -> Rules:
    """The rules at the end of KUBE-CLUSTER-IPS: silence where cluster IPs come from and no Service has one."""
    networks = [each for each in form.services if family_of(each.address) == family]
    return tuple(f"-d {each} {comment('unallocated cluster IPs')} -j DROP" for each in networks)


def marker(settings: Mapping[str, int], form: Form | None = None) -> Rules:
    """The rules of the marker chain: whose the table's chains are, how they are written, and sysctls as they were
    before us."""
    written = _written(form) if form else ""
    return (
        OWNED,
        *((comment(written),) if written else ()),
        *(comment(f"{name} was {value}") for name, value in settings.items()),
    )


def _written(form: Form) -> str:
    """A form in a comment; "" when it has too many ranges for one."""
    words = {
        "compat": "classic" if form.classic else "current",
        "everyone": "yes" if form.everyone else "",
        "clusters": "+".join(map(str, form.clusters)),
        "bridge": form.bridge,
        "prefix": form.prefix,
        "services": "+".join(map(str, form.services)),
    }
    text = " ".join(["written with", *(f"{name}={value}" for name, value in words.items() if value)])
    return text if len(text) <= _COMMENT_BYTES else ""


def form_of(rules: Sequence[str]) -> Form | None:
    """The form that a marker chain names; None when it names none that we write."""
    for rule in rules:
        if found := _WRITTEN.fullmatch(rule):
            words = dict(word.partition("=")[::2] for word in found[1].split())
            try:
                return Form(
                    words.get("compat") == "classic",
                    words.get("everyone") == "yes",
                    tuple(map(parse_network, filter(None, words.get("clusters", "").split("+")))),
                    words.get("bridge", ""),
                    words.get("prefix", ""),
                    tuple(map(parse_network, filter(None, words.get("services", "").split("+")))),
                )
            except ValueError:
                return None
    return None


_COMMENT_BYTES = 250  # XT_MAX_COMMENT_LEN is 256
_WRITTEN = re.compile(r'-m comment --comment "written with ([A-Za-z0-9._:/+= -]+)"')


def fixed(form: Form, family: Family, *, fully_random: bool) -> dict[str, Chains]:
    """Chains that are the same whatever Services there are, by table."""
    randomly = " --random-fully" if fully_random else ""
    nat: Chains = {
        MARK_MASQ: (f"-j MARK --set-xmark {MARK}/{MARK}",),
        POSTROUTING: (
            f"-m mark ! --mark {MARK}/{MARK} -j RETURN",
            f"-j MARK --set-xmark {MARK}/0x0",
            f"{comment('kubernetes service traffic requiring SNAT')} -j MASQUERADE{randomly}",
        ),
    }
    insiders = form.insiders(family)
    if len(insiders) > 1:
        nat[MARK_CLIENTS] = (*(f"{each} -j RETURN" for each in insiders), f"-j {MARK_MASQ}")
    return {"nat": nat, "filter": {}}


def _new(text: str, chain: str) -> str:
    return f"-m conntrack --ctstate NEW {comment(text)} -j {chain}"


_FIREWALL_JUMP = _new("kubernetes load balancer firewall", FIREWALL)
_EXTERNAL_JUMP = _new("kubernetes externally-visible service portals", EXTERNAL_SERVICES)
_SERVICES_JUMP = _new("kubernetes service portals", SERVICES)
JUMPS: dict[str, dict[str, Rules]] = {
    "nat": {
        "PREROUTING": (PORTALS,),
        "OUTPUT": (PORTALS,),
        "POSTROUTING": (f"{comment('kubernetes postrouting rules')} -j {POSTROUTING}",),
    },
    # unlike kube-proxy's: external refusals for processes of this node, too, and before unallocated cluster IPs end all
    "filter": {
        "INPUT": (_FIREWALL_JUMP, _EXTERNAL_JUMP),
        "FORWARD": (_FIREWALL_JUMP, _EXTERNAL_JUMP, _SERVICES_JUMP),
        "OUTPUT": (_FIREWALL_JUMP, _EXTERNAL_JUMP, _SERVICES_JUMP),
    },
}
"""Rules in built-in chains, by table and chain, put on top in this order as kube-proxy does."""
