"""An explanation for people, and as a document for programs. Pure.

Names in it are user-made, so every line leaves through `printable`.
"""

from collections.abc import Iterator
from typing import Any

from .explanation import Explanation, NoAddress
from .model import Protocol, VirtualAddress, format_address, format_endpoint
from .printable import printable
from .rows import SCHEMA_VERSION
from .walk import Target, Verdict, Walk

_LINE = 2000


def asked(at: VirtualAddress) -> str:
    """`10.0.1.175:80/TCP`."""
    return f"{format_endpoint(at.address, at.port)}/{Protocol(at.protocol).name}"


def verdict_text(walked: Walk) -> str:
    """What becomes of the packet, in a few words."""
    if walked.verdict is not Verdict.ENDPOINT:
        return f"{walked.verdict.value}: {walked.reason}"
    how = {frozenset({True}): ", masqueraded", frozenset({False}): ", not masqueraded"}
    return walked.reason + how.get(frozenset(walked.masquerades), ", masqueraded to itself only")


def percent(probability: float | None) -> str:
    """`33.3%`, `0%`, or `?` where it depends on the moment."""
    if probability is None:
        return "?"
    return f"{100 * probability:.1f}%" if probability % 1 else f"{100 * probability:.0f}%"


def text(explanation: Explanation) -> str:
    """The verdict first, then the steps, then what differs."""
    return "".join(printable(line, _LINE) + "\n" for line in _lines(explanation))


def _lines(explanation: Explanation) -> Iterator[str]:
    decided, question = explanation.decided, explanation.question
    owner = f"{decided.server.label}: " if decided.server and decided.server.label else ""
    source = format_address(question.client.address)
    yield f"{owner}{source} -> {asked(question.at)} {verdict_text(decided)}"
    width = max((len(str(each.real)) for each in decided.targets), default=0)
    for each in decided.targets:
        yield f"  {percent(each.probability):>6}  {each.real!s:<{width}}{_mark(each, decided)}".rstrip()
    yield ""
    where = f"the kernel, mode {explanation.mode}" if explanation.kernel else "the manifests; the kernel was not asked"
    yield f"Why (by {where}):"
    told = set()
    for number, step in enumerate(decided.steps, 1):
        yield f"{number:>3}. {step.text}"
        if explanation.kernel and step.stage not in told:
            told.add(step.stage)
            for name in explanation.objects.get(step.stage, ()):
                yield f"       {name}"
    if explanation.kernel and explanation.desired:
        yield ""
        if not explanation.differences:
            yield "The manifests say the same."
        else:
            then = explanation.desired
            same = then.verdict is decided.verdict and then.targets == decided.targets
            yield "The manifests differ from the kernel" + ("" if same else f"; by them it {_would(then)}") + ":"
    for difference in explanation.differences:
        yield f"  - {difference}"
    if explanation.remarks:
        yield ""
    yield from explanation.remarks


def _would(walked: Walk) -> str:
    if walked.verdict is Verdict.ENDPOINT:
        return verdict_text(walked)
    return f"is {walked.verdict.value}"


def _mark(target: Target, walked: Walk) -> str:
    notes = []
    if walked.remembered and target.probability:
        notes.append("remembered")
    if not target.real.weight:
        notes.append("drains: open connections only")
    if len(walked.masquerades) == 2 and target.masquerade:
        notes.append("masqueraded")
    return f"  ({', '.join(notes)})" if notes else ""


def without_address(found: NoAddress) -> str:
    """A Service that leads nowhere."""
    return f"{printable(found.name)}: not ours: {printable(found.reason, _LINE)}\n"


# ----------------------------------------------------------------------------------------------------- documents


def document(explanation: Explanation) -> dict[str, Any]:
    """`explain -o json`."""
    question, decided = explanation.question, explanation.decided
    told = set()
    steps = []
    for step in decided.steps:
        objects = explanation.objects.get(step.stage, ()) if explanation.kernel and step.stage not in told else ()
        told.add(step.stage)
        steps.append({"stage": step.stage.value, "text": step.text, "objects": list(objects)})
    return {
        "schemaVersion": SCHEMA_VERSION,
        "mode": explanation.mode,
        "by": "kernel" if explanation.kernel else "manifests",
        "from": {
            "address": format_address(question.client.address),
            "node": question.client.node,
            "interface": question.client.interface,
        },
        "to": {
            "address": format_address(question.at.address),
            "port": question.at.port,
            "protocol": Protocol(question.at.protocol).name,
        },
        **_walk(decided),
        "steps": steps,
        "desired": _walk(explanation.desired) if explanation.desired else None,
        "differences": list(explanation.differences),
        "remarks": list(explanation.remarks),
    }


def _walk(walked: Walk) -> dict[str, Any]:
    return {
        "verdict": walked.verdict.value,
        "reason": walked.reason,
        "service": walked.server.label if walked.server else "",
        "type": walked.server.kind.value if walked.server else "",
        "inside": bool(walked.server and walked.server.at.inside),
        "endpoints": [
            {
                "address": format_address(each.real.address),
                "port": each.real.port,
                "probability": each.probability,
                "masquerade": each.masquerade,
                "why": each.why,
                "draining": not each.real.weight,
            }
            for each in walked.targets
        ],
        "remembered": walked.remembered is not None,
    }


def document_without_address(found: NoAddress, mode: str) -> dict[str, Any]:
    """The same for a Service that leads nowhere."""
    return {
        "schemaVersion": SCHEMA_VERSION,
        "mode": mode,
        "verdict": Verdict.NOT_OURS.value,
        "reason": found.reason,
        "service": found.name,
        "endpoints": [],
        "steps": [],
        "differences": [],
        "remarks": [],
    }
