"""The way of a packet in the words of nftables mode: chains, and the elements of sets and maps that decide. Pure."""

from collections.abc import Iterator, Mapping

from .model import VirtualAddress, format_address
from .nft_clients import Clients
from .nft_layout import NOTHING, Entry, chain_parts, printed, shared_text
from .walk import Detection, Stage, Walk

SHOWN = 8
"""Elements of one map that are named; the others are counted."""


def objects(
    walked: Walk, entries: Mapping[VirtualAddress, Entry], detection: Detection
) -> dict[Stage, tuple[str, ...]]:
    """What decides at each stage, as the table has it."""
    question = walked.question
    at, width = question.at, len(question.at.address)
    suffix = 4 if width == 4 else 6
    hook = "output" if question.client.node else "prerouting"
    end = f"filter_{'output' if question.client.node else 'input' if question.delivered else 'forward'}"
    outer = entries.get(at._replace(inside=False), NOTHING)
    inner = entries.get(at._replace(inside=True), NOTHING)
    decided = inner if walked.server is not None and walked.server.at.inside else outer
    where = format_address(at.address)
    found: dict[Stage, tuple[str, ...]] = {}

    def elements(name: str, entry: Entry, *, inside: bool = False) -> tuple[str, ...]:
        return tuple(_elements(f"{name}{suffix}", at._replace(inside=inside), entry))

    if outer.allowed:
        found[Stage.SOURCES] = (
            f"chain sources_{hook}: set ranged{suffix}, goto sources{suffix}",
            *(f"chain sources{suffix}: {each}" for each in elements("allowed", outer)),
        )
    services = elements("services", outer)
    found[Stage.SERVER] = tuple(f"chain nat_{hook}: {each}" for each in services) or (
        f"chain nat_{hook}: map services{suffix} has no such key",
    )
    insiders = f"chain {outer.chain}: jump insiders{suffix}"
    if decided is inner and inner is not NOTHING:
        found[Stage.INSIDE] = (
            insiders,
            *(f"chain lookup_inside{suffix}: {each}" for each in elements("inside", inner, inside=True)),
        )
    else:
        found[Stage.INSIDE] = (f"{insiders}, which comes back",)
    found[Stage.NO_ENDPOINTS] = tuple(f"chain {end}: {each}" for each in elements("no_endpoints", outer))
    found[Stage.CLOSED] = (f"chain {end}: cluster_ips{suffix} {{ {where} }}, goto refuse",)
    found[Stage.UNALLOCATED] = tuple(
        f"chain {end}: {rule.partition(' comment')[0]}" for rule in Clients.of(detection).unallocated()
    )
    place, kind, _, slots = chain_parts(decided.chain)
    picking = decided.chain.removeprefix("local_") if place == "local" else decided.chain
    inside = place == "inside"
    if kind == "sticky":
        found[Stage.AFFINITY] = (
            f"chain {picking}: jump recall{'_inside' if inside else ''}{suffix}, map affinity{suffix}",
        )
    if slots:
        # the indexes of servers for clients inside are marked as such
        found[Stage.CHOICE] = (
            f"chain {picking}: numgen random mod {slots}{' offset 8000:0' if inside else ''}",
            *_some([f"chain dnat{suffix}: {each}" for each in elements("endpoints", decided, inside=inside)]),
            *_some([f"chain number{suffix}: {each}" for each in elements("numbers", decided, inside=inside)]),
            *_some([f"chain numbered{suffix}: {shared_text(*each)}" for each in sorted(decided.shared.items())]),
        )
    found[Stage.MASQUERADE] = tuple(_masquerade(walked, outer, where, suffix, detection))
    return {stage: texts for stage, texts in found.items() if stage in walked.stages()}


def _elements(name: str, at: VirtualAddress, entry: Entry) -> Iterator[str]:
    """An entry's elements of one set, as `name { … }`."""
    for line in printed(at, NOTHING, entry)[1]:
        _, _, rest = line.partition("element inet ")
        _, named, text = rest.split(" ", 2)
        if named == name:
            yield f"{name} {text}"


def _some(texts: list[str]) -> list[str]:
    rest = len(texts) - SHOWN
    return [*texts[:SHOWN], f"… and {rest} more"] if rest > 1 else texts


def _masquerade(walked: Walk, outer: Entry, where: str, suffix: int, detection: Detection) -> Iterator[str]:
    if outer.masquerade:
        for each in _elements(f"masquerade{suffix}", walked.question.at._replace(inside=False), outer):
            yield f"chain translated: {each}"
    else:
        yield f"chain translated: cluster_ips{suffix} {{ {where} }}, goto masquerade_clients"
    client = walked.question.client.address
    itself = any(target.real.address == client for target in walked.targets)
    if itself and outer.masquerade != "masquerade_always":
        yield f"chain hairpins: hairpin{suffix} {{ {format_address(client)} . {format_address(client)} }}"
    if not outer.masquerade:
        for rule in Clients.of(detection).masquerade():
            yield f"chain masquerade_clients: {rule.partition(' comment')[0]}"
