"""Cases one after another in one world: program, look at the facts, play the flows."""

import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from dataplane.model import Address, Network, parse_address
from dataplane.printable import printable

from . import facts
from .agent import NotProgrammed, Programmed
from .cases import Case, Flow
from .judging import Outcome, Probe, answered, complaints, expected_text, outcome_of, seen_text, tries_for
from .packets import What, build
from .world import GATEWAYS, Place, Sighting, World, WorldStuck, is_loopback

_STICKY_TRIES = 8
_NEIGHBOURS = 2000
"""How far from a client other clients of its kind are looked for, in addresses."""


class Programmer(facts.Facts, Protocol):
    """Who gets a case's objects into the kernel: the agent, or a test's own rules."""

    def program(self, case: Case) -> Programmed: ...


class Result(NamedTuple):
    """One flow, or one fact, of a case. `wrong` () = as expected."""

    case: str
    what: str
    expected: str
    seen: str
    wrong: tuple[str, ...]
    is_flow: bool = True


class Runner:
    """Plays cases. `world` is this network namespace's; the programmer works in it too."""

    def __init__(self, world: World, programmer: Programmer) -> None:
        self._world = world
        self._programmer = programmer
        self._known: set[Address] = set()
        """Clients that affinity may remember from an earlier flow, rightly so: others are taken while there are any."""

    def run(self, case: Case) -> Iterator[Result]:
        """The result of every flow of a case, and one more for each fact that does not hold."""
        done = 0
        try:
            self._shape(case)
            programmed = self._programmer.program(case)
            if programmed.restless:
                yield _fact(case, f"a second sync writes: {programmed.restless}")
            self._world.forget_connections()
            for fault in facts.faults(case, self._programmer):
                yield _fact(case, fault)
            for flow in case.flows:
                result = self._play(case, flow)
                done += 1
                said = tuple(f"the agent said: {note}" for note in programmed.notes)
                yield result._replace(wrong=(*result.wrong, *said)) if result.wrong else result
            self._world.forget_connections()
            for fault in facts.conntrack_faults(case, self._programmer):
                yield _fact(case, fault)
        except NotProgrammed as error:
            yield from self._rest(case, done, f"not programmed: {error}")
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            reason = printable(f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})", 600)
            yield from self._rest(case, done, reason)

    def _rest(self, case: Case, done: int, reason: str) -> Iterator[Result]:
        for flow in case.flows[done:]:
            yield Result(case.name, _title(flow), expected_text(flow), "nothing was played", (reason,))
        if done == len(case.flows):
            yield _fact(case, reason)

    def _shape(self, case: Case) -> None:
        pods: list[Network] = list(case.node.cluster_cidrs)
        mine = case.node.addresses
        pods += [
            Network(each, 8 * len(each))
            for each in sorted(case.endpoint_addresses)
            if each not in mine and not is_loopback(each) and not any(each in one for one in pods)
        ]
        self._world.shape(case.node.addresses, pods)

    # ------------------------------------------------------------------------------------------------------- one flow

    def _play(self, case: Case, flow: Flow) -> Result:
        source = parse_address(flow.src_ip)
        place = self._place(case, source)
        borrowed = place is Place.NODE and not self._world.is_node(source)
        with self._world.local(source) if borrowed else contextlib.nullcontext():
            try:
                outcomes, complete = self._outcomes(case, flow, place, source)
            except WorldStuck as error:
                return Result(case.name, _title(flow), expected_text(flow), "nothing", (str(error),))
        wrong = complaints(flow, outcomes, every_endpoint=complete)
        return Result(case.name, _title(flow), expected_text(flow), seen_text(outcomes), tuple(wrong))

    def _place(self, case: Case, source: Address) -> Place:
        """Where an address lives. A Service's address as a source is the node's: a load balancer put it there."""
        if self._world.is_node(source) or source in case.virtual_addresses:
            return Place.NODE
        if source in case.endpoint_addresses or any(source in one for one in case.node.cluster_cidrs):
            return Place.PODS
        return Place.WORLD

    def _outcomes(self, case: Case, flow: Flow, place: Place, source: Address) -> tuple[list[Outcome], bool]:
        """What connections met, and whether there were enough for every endpoint to have shown itself."""
        targets = flow.expect.targets
        tries = tries_for(len(targets))
        answered_by: set[str] = set()
        connect = self._connector(case, flow, place, answered_by)
        if not case.has_affinity and not flow.sticky:
            return [connect(source) for _ in range(tries)], True
        outcomes = [connect(source) for _ in range(_STICKY_TRIES)]
        if len({each.endpoint for each in outcomes}) > 1 and not flow.sticky:
            return outcomes + [connect(source) for _ in range(tries)], True  # another Service has the affinity
        others = self._others_like(case, source, place, tries)
        self._known.update(others)
        for other in others:
            outcomes += [connect(other), connect(other)]
        return outcomes, len(others) == tries

    def _others_like(self, case: Case, source: Address, place: Place, wanted: int) -> list[Address]:
        """Clients that differ from one only in their address, as far as anything in the case can tell."""
        if place is Place.NODE or source in case.endpoint_addresses:
            return []
        kind = tuple(source in one for one in case.networks)
        taken = {*case.endpoint_addresses, *case.virtual_addresses, *case.node.addresses, source}
        taken |= {parse_address(flow.dst_ip) for flow in case.flows}
        fresh: list[Address] = []
        known: list[Address] = []
        for other in _near(source):
            if other in taken or tuple(other in one for one in case.networks) != kind:
                continue
            if self._place(case, other) is place:
                (known if other in self._known else fresh).append(other)
            if len(fresh) == wanted:
                break
        return (fresh + known)[:wanted]

    def _connector(self, case: Case, flow: Flow, place: Place, answered_by: set[str]) -> Callable[[Address], Outcome]:
        world, destination = self._world, parse_address(flow.dst_ip)
        nodes = frozenset(case.node.addresses) | GATEWAYS
        family = len(destination)

        def connect(client: Address) -> Outcome:
            probe = Probe(place, flow.protocol, client, destination, world.next_port(), flow.dst_port, world.next_tag())
            refused = world.send(place, build(What.OPENING, *probe[1:]))
            sightings = world.follow(place, family)
            outcome = outcome_of(probe, sightings, refused, nodes)
            if outcome.action == "dnat" and outcome.endpoint not in answered_by and not outcome.fault:
                answered_by.add(outcome.endpoint)
                fault = self._answer(probe, sightings)
                outcome = outcome._replace(fault=fault)
            return outcome

        return connect

    def _answer(self, probe: Probe, sightings: Sequence[Sighting]) -> str:
        """Let the endpoint answer, and see that the client takes the answer for its partner's."""
        arrival = next(each for each in sightings if each.packet.what is What.OPENING and each.packet.tag == probe.tag)
        at = arrival.packet
        if at.src == at.dst or arrival.place is Place.NODE:
            # To itself without masquerading nothing can be answered; and a server of the node would have to be real.
            return ""
        answer = build(What.ANSWER, probe.protocol, at.dst, at.src, at.dport, at.sport, probe.tag)
        self._world.send(arrival.place, answer)
        return answered(probe, self._world.follow(arrival.place, len(at.dst)))


def _near(address: Address) -> Iterator[Address]:
    """Its neighbours, the nearest first."""
    number, width = int.from_bytes(address), len(address)
    for distance in range(1, _NEIGHBOURS):
        for value in (number + distance, number - distance):
            if 0 < value < 1 << 8 * width:
                yield Address(value.to_bytes(width))


def _title(flow: Flow) -> str:
    return f"{flow.desc}: {flow}" if flow.desc else str(flow)


def _fact(case: Case, text: str) -> Result:
    return Result(case.name, text, "", "", (text,), is_flow=False)
