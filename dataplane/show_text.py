"""What people and scripts read: the tables of `show`, the text of a plan, and the JSON forms of both.

Pure: values in, text out. Names come from whoever may write a manifest, so every cell is escaped (printable.py), and
JSON and YAML are written in ASCII, which loses nothing and cannot act on a terminal.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from .model import Problem, VirtualServer, format_address, format_endpoint
from .plan import Plan
from .printable import printable
from .rows import SCHEMA_VERSION, Counts, Look, RealServerRow, ServiceRow, protocol_name

# ----------------------------------------------------------------------------------------------------------- tables

_Cell = Callable[[ServiceRow], str]
_RealCell = Callable[[RealServerRow], str]


def _service_cell(row: ServiceRow) -> str:
    if not row.ours:
        return "(foreign)"
    return row.label.partition("/")[2] or "-"


def _type(row: ServiceRow) -> str:
    if not row.ours:
        return "-"
    return f"{row.kind}/inside" if row.inside else row.kind


def _persistence(row: ServiceRow) -> str:
    if not row.persistence_seconds:
        return "-"
    return f"{row.persistence_seconds}s/{row.persistence_prefix}"


def _state(real: RealServerRow) -> str:
    return real.state if real.drain_seconds_left is None else f"{real.state} {duration(real.drain_seconds_left)}"


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def _share(real: RealServerRow) -> str:
    return "-" if real.share is None else f"{real.share:.1%}"


def _rate(row: RealServerRow | ServiceRow) -> str:
    return "-" if row.rate is None else f"{row.rate:.1f}"


def _hits_header(counts: Counts) -> str:
    return f"HITS({counts.source}{f', {counts.lost} missed' if counts.lost else ''})"


_SERVICE_COLUMNS: tuple[tuple[str, bool, _Cell], ...] = (
    ("NAMESPACE", False, lambda row: row.namespace or "-"),
    ("SERVICE", False, _service_cell),
    ("VIP", False, lambda row: row.vip),
    ("TYPE", False, _type),
    ("SCHED", True, lambda row: row.scheduler),
    ("FLAGS", True, lambda row: ",".join((*row.scheduler_flags, *(["ops"] if row.one_packet else []))) or "-"),
    ("PERSISTENT", True, _persistence),
    ("MASQUERADE", True, lambda row: row.masquerade),
    ("FROM", True, lambda row: ",".join(row.allowed) or "-"),
)
_REAL_COLUMNS: tuple[tuple[str, bool, _RealCell], ...] = (
    ("REAL SERVER", False, lambda real: real.endpoint),
    ("WEIGHT", False, lambda real: str(real.weight)),
    ("FORWARD", True, lambda real: real.forwarding),
    ("STATE", False, _state),
    ("ACTIVE", False, lambda real: str(real.active)),
    ("INACTIVE", True, lambda real: str(real.inactive)),
    ("CONNS", True, lambda real: _count(real.connections)),
    ("BYTES IN", True, lambda real: _count(real.bytes_in)),
    ("BYTES OUT", True, lambda real: _count(real.bytes_out)),
)


def duration(seconds: float) -> str:
    """`45s`, `14m`, `3h`, `2d`: the largest unit, rounded down."""
    whole = int(seconds)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if whole >= size:
            return f"{whole // size}{unit}"
    return f"{whole}s"


def service_table(look: Look, *, wide: bool = False, headers: bool = True) -> str:
    """One line per real server, grouped under its virtual server. The header says who counted the hits."""
    rows = look.services
    services = [column for column in _SERVICE_COLUMNS if wide or not column[1]]
    reals = [column for column in _REAL_COLUMNS if wide or not column[1]]
    reals += [(_hits_header(look.counts), False, lambda real: _count(real.hits)), ("SHARE", False, _share)]
    if any(row.rate is not None for row in rows):
        reals.append(("RATE/S", False, _rate))
    lines = [[name for name, _, _ in (*services, *reals)]] if headers else []
    for row in rows:
        group = [cell(row) for _, _, cell in services]
        if not row.real_servers:
            state = "no endpoints" if row.no_endpoints == "reject" else "no local endpoints"
            lines.append([*group, "-", *(state if name == "STATE" else "-" for name, _, _ in reals[1:])])
        for real in row.real_servers:
            lines.append([*group, *(cell(real) for _, _, cell in reals)])
            group = [""] * len(group)
    return columns(lines)


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, aligned and escaped."""
    cells = [[printable(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() + "\n"
        for line in cells
    )


def names(rows: Iterable[ServiceRow]) -> str:
    """`namespace/name:port`, each once; what has no name by its VIP."""
    return "".join(f"{printable(name)}\n" for name in dict.fromkeys(row.label or row.vip for row in rows))


# ----------------------------------------------------------------------------------------------------- JSON and YAML


def document(look: Look) -> dict[str, Any]:
    """`show -o json`."""
    return {
        "schemaVersion": SCHEMA_VERSION,
        "mode": look.mode,
        "at": look.at,
        "counts": msgspec.to_builtins(look.counts),
        "services": msgspec.to_builtins(look.services),
    }


def json_lines(look: Look) -> str:
    """`show -o jsonl`: one virtual server a line."""
    head = {key: value for key, value in document(look).items() if key != "services"}
    return "".join(json.dumps({**head, **msgspec.to_builtins(row)}) + "\n" for row in look.services)


def structured(value: object, output: str) -> str:
    """A document as JSON or YAML text."""
    if output == "yaml":
        import yaml  # slow to import

        text: str = yaml.safe_dump(value, sort_keys=False)
        return text
    return json.dumps(value, indent=2) + "\n"


def problem_documents(problems: Iterable[Problem]) -> list[dict[str, Any]]:
    """Problems as JSON objects: source, line, object, field, reason."""
    return [problem._asdict() for problem in problems]


# ------------------------------------------------------------------------------------------------------------- plans


def plan_summary(plan: Plan) -> str:
    """`2 virtual servers to add, 1 to change; 6 real servers to add; 2 VIPs to bind`."""
    reals = [change.reals() for change in plan.change]
    parts = [
        _amounts(
            "virtual server",
            (len(plan.add), "add"),
            (sum(map(bool, plan.change)), "change"),
            (len(plan.remove), "remove"),
        ),
        _amounts(
            "real server",
            (sum(len(s.real_servers) for s in plan.add) + sum(len(add) for add, _, _ in reals), "add"),
            (sum(len(edit) for _, edit, _ in reals), "change"),
            (sum(len(s.real_servers) for s in plan.remove) + sum(len(gone) for _, _, gone in reals), "remove"),
        ),
        _amounts("VIP", (len(plan.bind), "bind"), (len(plan.unbind), "unbind")),
        _amounts("hairpin address", (len(plan.hairpin_add), "add"), (len(plan.hairpin_remove), "remove")),
    ]
    return "; ".join(filter(None, parts)) or "nothing to do"


def removal_summary(plan: Plan) -> str:
    """What a plan that only removes has removed: `2 virtual servers, 6 real servers, 2 VIPs`."""
    counts = (
        (len(plan.remove), "virtual server"),
        (sum(len(server.real_servers) for server in plan.remove), "real server"),
        (len(plan.unbind), "VIP"),
        (len(plan.hairpin_remove), "hairpin address"),
    )
    return ", ".join(plural(count, noun) for count, noun in counts if count)


def _amounts(noun: str, *counts: tuple[int, str]) -> str:
    """`2 virtual servers to add, 1 to change`; "" when all are 0."""
    told = [(count, verb) for count, verb in counts if count]
    return ", ".join(
        f"{plural(count, noun) if index == 0 else count} to {verb}" for index, (count, verb) in enumerate(told)
    )


def plural(count: int, noun: str) -> str:
    """`1 VIP`, `2 VIPs`, `2 hairpin addresses`."""
    if count == 1:
        return f"{count} {noun}"
    return f"{count} {noun}{'es' if noun.endswith('ss') else 's'}"


def plan_objects(plan: Plan) -> list[dict[str, Any]]:
    """Each virtual server and address of a plan, with what happens to it."""

    def server(action: str, each: VirtualServer, **reals: list[str]) -> dict[str, Any]:
        at = each.at
        return {
            "action": action,
            "kind": "VirtualServer",
            "service": each.label,
            "vip": f"{format_endpoint(at.address, at.port)}/{protocol_name(at.protocol)}",
            "type": each.kind.value,
            "inside": at.inside,
            "realServers": reals,
        }

    objects = [server("add", each, add=list(map(str, each.real_servers))) for each in plan.add]
    for change in filter(None, plan.change):
        add, edit, gone = (list(map(str, part)) for part in change.reals())
        objects.append(server("change", change.new, add=add, change=edit, remove=gone))
    objects += [server("remove", each, remove=list(map(str, each.real_servers))) for each in plan.remove]
    for action, kind, addresses in (
        ("bind", "VIP", plan.bind),
        ("unbind", "VIP", plan.unbind),
        ("add", "HairpinAddress", plan.hairpin_add),
        ("remove", "HairpinAddress", plan.hairpin_remove),
    ):
        objects += [{"action": action, "kind": kind, "address": format_address(each)} for each in addresses]
    return objects


_GREEN, _YELLOW, _RED, _BOLD, _OFF = "\x1b[32m", "\x1b[33m", "\x1b[31m", "\x1b[1m", "\x1b[0m"
_COLOURS = (
    (("-A ", "-a ", "add ", "address add ", "route add ", "+ "), _GREEN),
    (("-E ", "-e ", "~ "), _YELLOW),
    (("-D ", "-d ", "delete ", "address delete ", "route delete ", "- "), _RED),
    (("# ",), _BOLD),
)


def transaction_text(text: str, *, colour: bool) -> str:
    """A transaction in its tools' language, escaped line by line; with colours added lines are green, removed red."""
    return "".join(_coloured(printable(line, 1 << 16), colour) + "\n" for line in text.splitlines())


def _coloured(line: str, colour: bool) -> str:
    found = next((code for starts, code in _COLOURS if line.startswith(starts)), "") if colour else ""
    return f"{found}{line}{_OFF}" if found else line


def status_colour(word: str) -> str:
    """A status word of a table (ok, warn, fail) in its colour."""
    return {"ok": _GREEN, "warn": _YELLOW, "fail": _RED}.get(word, "") + word + _OFF
