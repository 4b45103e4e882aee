"""How an answer comes about: the names that a pod's resolver tries, and for each what the records say and why."""

from typing import Any

from ..model import parse_address
from .answers import Answers
from .names import Labels, as_text, reverse_labels
from .query_log import RCODES
from .rrsets import NOERROR, REFUSED, TYPES, Found

NDOTS = 5
"""A name with fewer dots is tried with the search domains first, as in a pod's resolv.conf."""
SCHEMA_VERSION = 1


def explain(answers: Answers, name: str, qtype: str, namespace: str) -> dict[str, Any]:
    """The document that `dataplane dns query` shows. ValueError for a type or a name that cannot be."""
    kind, candidates = _candidates(name, qtype, namespace, answers.rules.domain)
    tried = []
    for labels in candidates:
        found, steps = answers.explain(labels, TYPES[kind])
        tried.append(_shown(labels, kind, found, steps))
        if found is not None and found.rcode == NOERROR and found.answer:
            break
    last = tried[-1]
    return {
        "schemaVersion": SCHEMA_VERSION,
        "asked": name,
        "type": kind,
        "name": last["name"],
        "result": last["result"],
        "answers": last["answers"],
        "additional": last["additional"],
        "tried": tried,
    }


def _candidates(name: str, qtype: str, namespace: str, domain: str) -> tuple[str, list[Labels]]:
    try:
        return "PTR", [reverse_labels(parse_address(name))]
    except ValueError:
        pass
    kind = qtype.upper() or "A"
    if kind not in TYPES:
        raise ValueError(f"{qtype!r} is none of {', '.join(TYPES)}")
    labels = tuple(name.lower().rstrip(".").split("."))
    if not name or len(name) > 253 or not all(0 < len(label) < 64 and label.isascii() for label in labels):
        raise ValueError(f"{name!r} is not a domain name")
    zone = tuple(domain.rstrip(".").split("."))
    if name.endswith(".") or labels[-len(zone) :] == zone:
        return kind, [labels]
    search = [(namespace, "svc", *zone), ("svc", *zone), zone]
    further = [labels + suffix for suffix in search]
    return kind, [*further, labels] if name.count(".") < NDOTS else [labels, *further]


def _shown(labels: Labels, kind: str, found: Found | None, steps: list[str]) -> dict[str, Any]:
    rcode = REFUSED if found is None else found.rcode
    result = RCODES[rcode]
    if found is not None and rcode == NOERROR and not found.answer and kind != "SOA":
        result = "NODATA"
    if found is not None and found.alias:
        steps = [*steps, f"{found.alias} is for upstreams to tell"]
    return {
        "name": as_text(labels),
        "result": result if found is not None else "OUTSIDE",
        "answers": _records(found.answer) if found else [],
        "additional": _records(found.additional) if found else [],
        "steps": steps,
    }


def _records(rrsets: Any) -> list[dict[str, Any]]:
    return [
        {"name": each.name, "ttl": each.ttl, "type": each.type, "data": data} for each in rrsets for data in each.data
    ]


def as_lines(document: dict[str, Any]) -> list[str]:
    """The same for people."""
    lines = []
    for each in document["tried"]:
        lines.append(f"{each['name']} {document['type']}: {each['result']}")
        lines += [f"    {step}" for step in each["steps"]]
    lines += [""] if document["answers"] else []
    for record in (*document["answers"], *document["additional"]):
        lines.append(f"{record['name']}  {record['ttl']}  IN  {record['type']}  {record['data']}")
    return lines
