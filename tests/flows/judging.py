"""What a connection's first packet met, and whether that is what was expected. Pure."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from dataplane.model import Address, Protocol, format_address, format_endpoint, parse_address

from .cases import Expect, Flow
from .packets import REFUSALS, Packet, What
from .world import Place, Sighting

CERTAINTY = 1e-6
"""How often a correct random choice may look wrong, or a wrong one right, per flow."""
FEWEST_TRIES = 4


class Outcome(NamedTuple):
    """What one connection met. `action`: dnat, none, reject, drop, or in words something that is never right."""

    action: str
    endpoint: str = ""
    source: Address = Address(b"")
    """The source that arrived."""
    masquerade: bool = False
    client: Address = Address(b"")
    unrewritable: bool = False
    """It came from elsewhere and was delivered on the node, which is behind no postrouting hook in any mode."""
    detail: str = ""
    fault: str = ""
    """What is wrong whatever was expected."""

    def __str__(self) -> str:
        text = self.action
        if self.action == "dnat":
            how = f"masqueraded as {format_address(self.source)}" if self.masquerade else "not masqueraded"
            text = f"dnat to {self.endpoint} {how}"
        elif self.masquerade:
            text += f", but masqueraded as {format_address(self.source)}"
        notes = [note for note in (self.detail, self.fault) if note]
        return f"{text} ({'; '.join(notes)})" if notes else text


class Probe(NamedTuple):
    """The first packet of a connection, and where it starts."""

    place: Place
    protocol: Protocol
    src: Address
    dst: Address
    sport: int
    dport: int
    tag: int


def outcome_of(
    probe: Probe, sightings: Sequence[Sighting], refused: str, node_addresses: frozenset[Address]
) -> Outcome:
    """What became of a probe. `refused`: the kernel's word when the node's own send failed."""
    ours = [each for each in sightings if each.packet.tag == probe.tag and each.packet.protocol == probe.protocol]
    arrivals = [each for each in ours if each.packet.what is What.OPENING]
    answers = [each.packet for each in ours if each.packet.what in (What.RESET, What.ERROR) and _reaches(each, probe)]
    detail = f"send: {refused}" if refused else ""
    if not arrivals:
        return _unarrived(probe, answers, detail)
    place, packet = arrivals[0]
    faults = []
    if len(arrivals) > 1:
        faults.append(f"arrived {len(arrivals)} times")
    if not packet.intact:
        faults.append("with a wrong checksum")
    # Delivered on the node without a listener the kernel itself refuses, which is not the rules' doing.
    if answers and place is not Place.NODE:
        faults.append(f"and refused as well: {_refusal(answers[0])}")
    # from the node to itself masquerading may well take the address that is there already, but a port of its own
    rewritten = packet.src != probe.src or (place is Place.NODE and packet.sport != probe.sport)
    if packet.src not in (probe.src, *node_addresses):
        faults.append("that is no address of the node")
    same = (packet.dst, packet.dport) == (probe.dst, probe.dport)
    return Outcome(
        "none" if same else "dnat",
        format_endpoint(packet.dst, packet.dport),
        packet.src,
        rewritten,
        probe.src,
        place is Place.NODE and probe.place is not Place.NODE,
        f"at {place.value}" if same else detail,
        "; ".join(faults),
    )


def _unarrived(probe: Probe, answers: Sequence[Packet], detail: str) -> Outcome:
    if not answers:
        return Outcome("drop", client=probe.src, detail=detail)
    refusal = answers[0]
    said = "; ".join(part for part in (_refusal(refusal), detail) if part)
    deliberate = refusal.what is What.RESET or refusal.code in REFUSALS
    return Outcome("reject" if deliberate else "error", client=probe.src, detail=said)


def _reaches(sighting: Sighting, probe: Probe) -> bool:
    """Whether a refusal came to the sender, and speaks of what the sender has sent."""
    place, packet = sighting
    if place is not probe.place:
        return False
    asked = (probe.src, probe.sport, probe.dst, probe.dport)
    if packet.what is What.RESET:
        return (packet.dst, packet.dport, packet.src, packet.sport) == asked
    return packet.told == probe.src and (packet.src, packet.sport, packet.dst, packet.dport) == asked


def _refusal(packet: Packet) -> str:
    if packet.what is What.RESET:
        return "reset"
    protocol, code = packet.code
    return f"ICMP{'' if protocol == 1 else 'v6'} unreachable, code {code}, from {format_address(packet.reporter)}"


def answered(probe: Probe, sightings: Sequence[Sighting]) -> str:
    """What is wrong with how an endpoint's answer came back; "" when the client took it for its partner's."""
    answers = [each for each in sightings if each.packet.tag == probe.tag and each.packet.what is What.ANSWER]
    if not answers:
        return "its answer did not come back"
    place, packet = answers[0]
    wanted = (probe.dst, probe.dport, probe.src, probe.sport)
    if place is not probe.place or (packet.src, packet.sport, packet.dst, packet.dport) != wanted:
        return f"its answer came to {place.value} as {packet}"
    return "" if packet.intact else "its answer came back with a wrong checksum"


def tries_for(endpoints: int) -> int:
    """Connections until a random choice of that many has shown each, and one too many would have shown itself."""
    if endpoints < 1:
        return FEWEST_TRIES
    tries = FEWEST_TRIES
    while endpoints * (1 - 1 / endpoints) ** tries > CERTAINTY or (1 - 1 / (endpoints + 1)) ** tries > CERTAINTY:
        tries += 1
    return tries


def complaints(flow: Flow, outcomes: Sequence[Outcome], *, every_endpoint: bool) -> list[str]:
    """Why the outcomes are not what the flow expects; [] = they are. `every_endpoint`: each must have been seen."""
    expect = flow.expect
    wrong = list(dict.fromkeys(each.fault for each in outcomes if each.fault))
    if expect.action != "dnat":
        if any(each.action != expect.action for each in outcomes):
            wrong.append(f"not all connections met: {expect.action}")
        if any(each.masquerade for each in outcomes):
            wrong.append("the source was rewritten")
        return wrong
    targets = expect.targets
    # an endpoint at the very address and port that was asked for: translated or not is the same
    served = [
        each for each in outcomes if each.action == "dnat" or (each.action == "none" and each.endpoint in targets)
    ]
    if len(served) < len(outcomes):
        wrong.append("not all connections met: dnat")
    if not served:
        return wrong
    seen = {each.endpoint for each in served}
    if seen - targets:
        wrong.append(f"unexpected: {', '.join(sorted(seen - targets))}")
    if every_endpoint and targets - seen:
        wrong.append(f"never chosen: {', '.join(sorted(targets - seen))}")
    wrong += _masquerade_complaints(flow, served)
    if flow.sticky and (fickle := _fickle(served)):
        wrong.append(f"not sticky: {fickle}")
    return wrong


def _masquerade_complaints(flow: Flow, outcomes: Sequence[Outcome]) -> list[str]:
    """Rewritten sources where they should not be, and the other way round.

    A client that is one of several endpoints meets itself sometimes, and only that connection needs a rewritten source:
    then the flag speaks of that connection. What is delivered on the node keeps its source, whatever the rules wish.
    """
    expect = flow.expect
    source = format_address(parse_address(flow.src_ip))
    mixed = len(expect.targets) > 1 and any(_host_of(each) == source for each in expect.targets)
    wrong = set()
    for each in outcomes:
        if each.masquerade == expect.masquerade:
            continue
        to_itself = _host_of(each.endpoint) == source
        if each.unrewritable and expect.masquerade:
            continue
        if mixed and to_itself != expect.masquerade:
            continue
        wrong.add("masqueraded" if each.masquerade else "not masqueraded")
    return sorted(wrong)


def _host_of(endpoint: str) -> str:
    return endpoint.rpartition(":")[0].strip("[]")


def _fickle(outcomes: Sequence[Outcome]) -> str:
    """Clients that met more than one endpoint."""
    met: dict[Address, set[str]] = {}
    for each in outcomes:
        met.setdefault(each.client, set()).add(each.endpoint)
    return ", ".join(
        f"{format_address(client)} met {' and '.join(sorted(some))}" for client, some in met.items() if len(some) > 1
    )


def expected_text(flow: Flow) -> str:
    expect: Expect = flow.expect
    if expect.action != "dnat":
        return expect.action
    where = ", ".join(sorted(expect.targets))
    how = "masqueraded" if expect.masquerade else "not masqueraded"
    return f"dnat to {where} {how}{', sticky' if flow.sticky else ''}"


def seen_text(outcomes: Sequence[Outcome]) -> str:
    """All outcomes, equal ones counted."""
    counted = Counter(str(each) for each in outcomes)
    if len(counted) == 1:
        return next(iter(counted))
    return "; ".join(f"{number} x {text}" for text, number in sorted(counted.items(), key=lambda item: -item[1])[:8])
