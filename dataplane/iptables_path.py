"""The way of a packet in the words of iptables mode: the rules, by table and chain, that decide. Pure."""

from collections.abc import Iterable, Iterator

from .iptables_chains import Site, arrange, client_rules, external_rules, lines_of, render
from .iptables_text import (
    CLUSTER_IPS,
    FIREWALL,
    MARK_MASQ,
    NODEPORTS,
    POSTROUTING,
    SERVICES,
    Form,
    chain_name,
    closed_ports,
    single,
    unallocated,
)
from .model import VirtualServer, family_of
from .walk import Stage, Walk

SHOWN = 8
"""Rules of one chain that are named; the others are counted."""


def objects(walked: Walk, form: Form, group: Iterable[VirtualServer]) -> dict[Stage, tuple[str, ...]]:
    """What decides at each stage. `group`: the virtual servers that share chains with the one that is asked for."""
    at = walked.question.at
    group = list(group)
    found: dict[Stage, list[str]] = {
        Stage.SERVER: [f"nat {SERVICES}: no rule for {single(at.address)} port {at.port}"],
        Stage.CLOSED: [f"filter {CLUSTER_IPS}: {closed_ports(at.address)}"],
        Stage.UNALLOCATED: [f"filter {CLUSTER_IPS}: {rule}" for rule in unallocated(form, family_of(at.address))],
    }
    site = next((one for one in arrange(form, group) if one.any.at[:3] == at[:3]), None)
    if site is not None:
        found |= _site(walked, form, site, group)
    return {stage: tuple(_some(texts)) for stage, texts in found.items() if stage in walked.stages()}


def _some(texts: list[str]) -> list[str]:
    rest = len(texts) - SHOWN
    return [*texts[:SHOWN], f"… and {rest} more"] if rest > 1 else texts


def _site(walked: Walk, form: Form, site: Site, group: list[VirtualServer]) -> dict[Stage, list[str]]:
    shared = {line.chain: line.rule for line in lines_of(form, site)}
    chains = render(form, group).chains
    external, firewall = chain_name("EXT", site.seed), chain_name("FW", site.seed)
    leading = [f"nat {name}: {shared['nat', name]}" for name in (SERVICES, NODEPORTS) if ("nat", name) in shared]
    ending = [
        f"filter {name}: {rule}" for (table, name), rule in shared.items() if table == "filter" and name != FIREWALL
    ]
    decided = walked.server
    pool = "SVC" if decided is not None and decided.at.inside else site.pool
    picking = chain_name(pool, site.seed)
    picks = chains.get(("nat", picking), ())
    if site.plain:
        clients = [f"nat {picking}: {rule}" for rule in client_rules(form, site.any, site.text)]
    else:
        clients = [f"nat {external}: {rule}" for rule in external_rules(form, site) if MARK_MASQ in rule]
    found: dict[Stage, list[str]] = {
        Stage.SERVER: leading or ending,
        Stage.INSIDE: [
            f"nat {external}: {rule}" for rule in external_rules(form, site) if f"-j {MARK_MASQ}" not in rule
        ],
        Stage.NO_ENDPOINTS: ending or [f"filter {CLUSTER_IPS}: {closed_ports(site.any.at.address)}"],
        Stage.AFFINITY: [f"nat {picking}: {rule}" for rule in picks if "-m recent --rcheck" in rule],
        Stage.CHOICE: [f"nat {picking}: {rule}" for rule in picks if "-j KUBE-SEP-" in rule and "--rcheck" not in rule],
    }
    if ("filter", FIREWALL) in shared:
        found[Stage.SOURCES] = [
            *(f"nat {firewall}: {rule}" for rule in chains.get(("nat", firewall), ())),
            f"filter {FIREWALL}: {shared['filter', FIREWALL]}",
        ]
    found[Stage.MASQUERADE] = [
        *clients,
        *_hairpins(walked, site, chains),
        f"nat {POSTROUTING}: MASQUERADE what is marked",
    ]
    return found


def _hairpins(walked: Walk, site: Site, chains: dict[tuple[str, str], tuple[str, ...]]) -> Iterator[str]:
    """The rules that mark an endpoint which reaches itself."""
    client = walked.question.client.address
    for target in walked.targets:
        if target.real.address == client:
            name = chain_name("SEP", f"{site.seed}{target.real}")
            for rule in chains.get(("nat", name), ())[:1]:
                yield f"nat {name}: {rule}"
