"""Connections that a witness saw, for people and as documents. Pure.

Names in it are user-made, so every line leaves through `printable`.
"""

import json
from typing import Any

from .model import Protocol, VirtualAddress, format_address, format_endpoint
from .printable import printable
from .rows import SCHEMA_VERSION
from .sightings import Sighting
from .walk import Verdict

_LINE = 1000


def sighting_text(each: Sighting, at: VirtualAddress, service: str) -> str:
    """One connection: what became of it, and what happened on the way."""
    client, protocol = format_endpoint(each.client, each.client_port), Protocol(each.protocol).name
    owner = f"{service}: " if service else ""
    lines = [f"{owner}{client} -> {format_endpoint(at.address, at.port)}/{protocol} {_outcome(each)}"]
    lines += [f"    {step}" for step in each.steps]
    return "".join(printable(line, _LINE) + "\n" for line in lines)


def _outcome(each: Sighting) -> str:
    if each.verdict is Verdict.NOT_OURS:
        return each.reason
    if each.real is None:
        return f"{each.verdict.value}: {each.reason}"
    where = f"goes to {format_endpoint(*each.real)}"
    if each.source is None:
        return where
    return f"{where}, " + (f"masqueraded as {format_address(each.source)}" if each.masqueraded else "not masqueraded")


def json_line(each: Sighting, mode: str, service: str) -> str:
    """`trace -o jsonl`: one connection a line."""
    head = {"schemaVersion": SCHEMA_VERSION, "mode": mode, "service": service}
    return json.dumps({**head, **sighting_document(each)}) + "\n"


def sighting_document(each: Sighting) -> dict[str, Any]:
    """One connection as JSON."""
    return {
        "client": format_address(each.client),
        "clientPort": each.client_port,
        "protocol": Protocol(each.protocol).name,
        "verdict": each.verdict.value,
        "reason": each.reason,
        "endpoint": {"address": format_address(each.real[0]), "port": each.real[1]} if each.real else None,
        "source": format_address(each.source) if each.source is not None else None,
        "masquerade": each.masqueraded if each.source is not None else None,
        "steps": list(each.steps),
    }


def document(
    mode: str, witness: str, blind: str, at: VirtualAddress, service: str, seen: list[Sighting]
) -> dict[str, Any]:
    """`trace -o json`."""
    return {
        "schemaVersion": SCHEMA_VERSION,
        "mode": mode,
        "witness": witness,
        "blind": blind,
        "service": service,
        "to": {
            "address": format_address(at.address),
            "port": at.port,
            "protocol": Protocol(at.protocol).name,
        },
        "connections": [sighting_document(each) for each in seen],
    }
