"""What `dataplane.walk` says of a case's flows, held against what the cases expect. No packets."""

from collections.abc import Iterator

import msgspec

from dataplane.model import VirtualAddress, format_address, parse_address
from dataplane.walk import Client, Question, Situation, Verdict, Walk, walk

from .cases import Case, Flow
from .judging import Outcome, complaints
from .world import is_loopback

_ACTIONS = {Verdict.REFUSED: "reject", Verdict.DROPPED: "drop", Verdict.NOT_OURS: "none"}


def question(case: Case, flow: Flow) -> Question:
    """The flow's packet, from where the runner lets it start."""
    source, destination = parse_address(flow.src_ip), parse_address(flow.dst_ip)
    # a Service's address as a source is the node's: a load balancer put it there
    here = source in case.node.addresses or source in case.virtual_addresses or is_loopback(source)
    delivered = destination in case.node.addresses or is_loopback(destination)
    return Question(Client(source, here), VirtualAddress(flow.protocol, destination, flow.dst_port), delivered)


def answers(case: Case, situation: Situation) -> Iterator[tuple[Flow, Walk, list[str]]]:
    """Each flow with what the walk says, and why that is not what is expected; [] = it is."""
    for flow in case.flows:
        told = walk(question(case, flow), situation)
        yield flow, told, disagreements(flow, told)


def disagreements(flow: Flow, told: Walk) -> list[str]:
    """Why a walk is not what the flow expects, by the judge of real packets."""
    client = told.question.client.address
    if told.verdict is not Verdict.ENDPOINT:
        outcomes = [Outcome(_ACTIONS[told.verdict], client=client)]
    else:
        outcomes = [
            Outcome("dnat", str(each.real), client=client, masquerade=each.masquerade)
            for each in told.targets
            if each.probability != 0
        ]
    sticks = bool(told.server and (told.server.persistence or told.server.scheduler == "mh"))
    once = msgspec.structs.replace(flow, sticky=False)  # that a client stays is not seen in one connection
    wrong = complaints(once, outcomes, every_endpoint=True)
    if flow.sticky and not sticks:
        wrong.append("no affinity")
    total = sum(each.probability or 0 for each in told.targets)
    if told.targets and all(each.probability is not None for each in told.targets) and abs(total - 1) > 1e-9:
        wrong.append(f"probabilities add up to {total}")
    if told.reason == "" or not told.steps:
        wrong.append(f"nothing is said of {format_address(client)}")
    return wrong
