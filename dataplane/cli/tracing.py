"""trace: real connections to one address and port, for a moment."""

import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from .explaining import address_of, mode_here, open_held, protocol_option, to_option
from .options import FAILED, common_options, emit, output_option, say, settle

if TYPE_CHECKING:
    from ..backend import Backend
    from ..explanation import Goal
    from ..model import Address, Protocol
    from ..sightings import Sighting, Witness
    from ..walk import Situation

_LOOK_SECONDS = 0.1
_MOST_SECONDS = 600
_MOST_CONNECTIONS = 1000


@click.command(short_help="Watch real connections for a moment.")
@click.option("--from", "source", callback=address_of, metavar="ADDR", help="Only this client; default: everybody.")
@to_option
@protocol_option
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, _MOST_SECONDS),
    default=10.0,
    show_default=True,
    help="How long to look.",
)
@click.option(
    "-n",
    "--count",
    type=click.IntRange(1, _MOST_CONNECTIONS),
    default=20,
    show_default=True,
    help="End after that many connections.",
)
@common_options
@output_option("text", "json", "jsonl")
def trace(
    source: "Address | None",
    target: str,
    protocol: "Protocol | None",
    seconds: float,
    count: int,
    config_file: str | None,
    output: str,
    **given: Any,
) -> int:
    """\b
    dataplane trace --to default/hostnames
    dataplane trace --from 10.244.1.5 --to 10.0.1.175:80 --seconds 30 -n 1
    dataplane trace --to dns:dns --protocol udp -o jsonl

    Tells of new connections to one address and port, as they come: where each went, masqueraded or not, and with
    nftables and iptables-nft every rule that its first packet met. The witness is named: a trace of nftables (by a
    table of our own, which is removed at the end, or by the next trace or cleanup if this one is killed), conntrack's
    news, or IPVS's connection table. Exit status 0 when something was seen, 1 when nothing was. Without --mode and
    --config it looks at the mode that is here.
    """
    from .. import trace_text

    backend = open_held(mode_here(settle(config_file, given), config_file, given), told_how=bool(config_file))
    try:
        situation = backend.situation()
        goal = _goal(situation, target, protocol, source)
        label = _label(situation, goal)
        told, witness = _look(backend, goal, source, seconds, count, output, label)
        if output == "json":
            emit(trace_text.document(backend.mode, witness.name, witness.blind, goal.at, label, told), output)
        if witness.blind and output == "text":
            say(f"not seen by {witness.name}: {witness.blind}")
        if not told:
            say(f"nothing was seen in {seconds:g} s{_expected(backend, situation, goal, source)}")
    finally:
        backend.close()
    return 0 if told else FAILED


def _goal(situation: "Situation", target: str, protocol: "Protocol | None", source: "Address | None") -> "Goal":
    from ..explanation import NoAddress, goal_of
    from ..model import format_address

    goal = goal_of(target, list(situation.servers.values()), {}, (), protocol, source)
    if isinstance(goal, NoAddress):
        raise UsageError(f"{goal.name}: {goal.reason}")
    if source is not None and len(source) != len(goal.at.address):
        told = format_address(source), format_address(goal.at.address)
        raise UsageError(f"{told[0]} and {told[1]} are of two families: IPv4 and IPv6")
    return goal


def _label(situation: "Situation", goal: "Goal") -> str:
    server = situation.servers.get(goal.at)
    return server.label if server else ""


def _look(
    backend: "Backend",
    goal: "Goal",
    source: "Address | None",
    seconds: float,
    count: int,
    output: str,
    label: str,
) -> "tuple[list[Sighting], Witness]":
    """Look until time, number or the user ends it; what the look needed is gone afterwards."""
    from .. import trace_text
    from ..explain_text import asked
    from ..sightings import Look

    told: list[Sighting] = []

    def tell(seen: "list[Sighting]") -> None:
        for each in seen[: count - len(told)]:
            told.append(each)
            if output == "text":
                click.echo(trace_text.sighting_text(each, goal.at, label), nl=False)
            elif output == "jsonl":
                click.echo(trace_text.json_line(each, backend.mode, label), nl=False)
        sys.stdout.flush()

    with _ended_by_signals() as ended:
        witness = backend.watch(Look(goal.at, source, seconds))
        try:
            name = f"{label} ({asked(goal.at)})" if label else asked(goal.at)
            say(f"{backend.mode}: looking at {name} for {seconds:g} s by {witness.name}")
            deadline = time.monotonic() + seconds
            while len(told) < count and not ended and (left := deadline - time.monotonic()) > 0:
                descriptors = [witness] if witness.fileno() >= 0 else []
                select.select(descriptors, [], [], min(left, _LOOK_SECONDS))
                tell(witness.read())
            tell(witness.finish())
        finally:
            witness.close()
    return told, witness


@contextmanager
def _ended_by_signals() -> "Iterator[list[int]]":
    """A list that gets the number of a signal which asks for the end; nothing is cut off in its middle."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _expected(backend: "Backend", situation: "Situation", goal: "Goal", source: "Address | None") -> str:
    """What becomes of a connection as the rules are, where that is not an endpoint."""
    from ..explain_text import verdict_text
    from ..model import Address
    from ..walk import Client, Question, Verdict, walk

    client = Client(source if source is not None else Address(bytes(len(goal.at.address))))
    walked = walk(Question(client, goal.at), situation)
    return "" if walked.verdict is Verdict.ENDPOINT else f"; by its rules such a connection is {verdict_text(walked)}"
