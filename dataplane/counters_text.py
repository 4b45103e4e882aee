"""The forms of `dataplane counters`: hits per backend and per Service, with who counted them always in sight.

Pure: values in, text out.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from msgspec import to_builtins
from msgspec.structs import replace

from .rows import SCHEMA_VERSION, Look, RealServerRow, ServiceRow
from .show_text import columns, duration


def merged(rows: Iterable[ServiceRow]) -> list[ServiceRow]:
    """One row for each VIP and port: that for clients inside the cluster joins the one for everybody."""
    found: dict[tuple[str, ...], ServiceRow] = {}
    for row in rows:
        other = found.get(key := (row.label, row.vip))
        found[key] = row if other is None else _joined(other, row)
    return list(found.values())


def _joined(one: ServiceRow, other: ServiceRow) -> ServiceRow:
    reals: dict[str, RealServerRow] = {}
    for real in (*one.real_servers, *other.real_servers):
        known = reals.get(real.endpoint)
        if known is not None:
            real = replace(
                known,
                hits=_sum(known.hits, real.hits),
                rate=_sum(known.rate, real.rate),
                connections=_sum(known.connections, real.connections),
                active=known.active + real.active,
                inactive=known.inactive + real.inactive,
                weight=max(known.weight, real.weight),
                state=known.state if known.weight else real.state,
            )
        reals[real.endpoint] = real
    here = sum(real.hits or 0 for real in reals.values())
    return replace(
        one,
        inside=False,
        hits=one.hits + other.hits,
        rate=_sum(one.rate, other.rate),
        connections=one.connections + other.connections,
        real_servers=tuple(
            replace(real, share=None if real.hits is None or not here else real.hits / here)
            for _, real in sorted(reals.items())
        ),
    )


def _sum(one: Any, other: Any) -> Any:
    return other if one is None else one if other is None else one + other


def _number(value: float | None, form: str = "") -> str:
    return "-" if value is None else format(value, form)


def table(look: Look, *, wide: bool = False, headers: bool = True) -> str:
    """A line for each Service port at each of its addresses, and one for each backend under it."""
    titles = ["SERVICE", "VIP", "BACKEND", "HITS", "SHARE", "RATE/S"]
    if wide:
        titles += ["STATE", "WEIGHT", "ACTIVE", "INACTIVE", f"{look.mode.upper()} COUNTS"]
    lines: list[Sequence[str]] = []
    for row in merged(look.services):
        total = [row.label or "-", row.vip, "all", str(row.hits), "-", _number(row.rate, ".1f")]
        if row.hits:
            total[4] = "100.0%"
        if wide:
            total += ["-", "-", "-", "-", str(row.connections)]
        lines.append(total)
        for real in row.real_servers:
            share, rate = _number(real.share, ".1%"), _number(real.rate, ".1f")
            line = ["", "", real.endpoint, _number(real.hits), share, rate]
            if wide:
                left = real.drain_seconds_left
                state = real.state if left is None else f"{real.state} {duration(left)}"
                line += [state, str(real.weight), str(real.active), str(real.inactive), _number(real.connections)]
            lines.append(line)
    if headers:
        return f"counted by {look.counts}\n" + (columns([titles, *lines]) if lines else "")
    return columns(lines) if lines else ""


def document(look: Look) -> dict[str, Any]:
    """`counters -o json`."""
    return {
        **_head(look),
        "services": [
            {
                **_service(row),
                "hits": row.hits,
                "rate": row.rate,
                "backends": [_backend(real) for real in row.real_servers],
            }
            for row in merged(look.services)
        ],
    }


def json_lines(look: Look) -> str:
    """`counters -o jsonl`: a line for each backend."""
    return "".join(
        json.dumps({**_head(look), **_service(row), **_backend(real)}) + "\n"
        for row in merged(look.services)
        for real in row.real_servers
    )


def _head(look: Look) -> dict[str, Any]:
    counts = to_builtins(look.counts)
    return {"schemaVersion": SCHEMA_VERSION, "mode": look.mode, "at": look.at, "counts": counts}


def _service(row: ServiceRow) -> dict[str, Any]:
    return {
        "namespace": row.namespace,
        "service": row.service,
        "portName": row.port_name,
        "address": row.address,
        "port": row.port,
        "protocol": row.protocol,
        "kind": row.kind,
    }


def _backend(real: RealServerRow) -> dict[str, Any]:
    return {
        "backend": real.endpoint,
        "hits": real.hits,
        "share": real.share,
        "rate": real.rate,
        "state": real.state,
        "weight": real.weight,
        "connections": real.connections,
    }
