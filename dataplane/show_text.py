"""What people and scripts read: the tables of `show`, the text of a plan, and the JSON forms of both.

Pure: values in, text out. Names come from whoever may write a manifest, so every cell is escaped (printable.py), and
JSON and YAML are written in ASCII, which loses nothing and cannot act on a terminal.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from .backend import ServerReport
from .drain import DrainKey
from .ipvsadm_text import scheduler_flags
from .model import (
    Forwarding,
    Problem,
    Protocol,
    ServerFlags,
    VirtualAddress,
    VirtualServer,
    format_address,
    format_endpoint,
)
from .plan import Plan
from .printable import printable

SCHEMA_VERSION = 1
"""Of all JSON and YAML: raised when a field changes its meaning or goes; new fields may come any time."""

_FORWARDING = {
    Forwarding.MASQ: "Masq",
    Forwarding.LOCAL: "Local",
    Forwarding.TUNNEL: "Tunnel",
    Forwarding.ROUTE: "Route",
}


class RealServerRow(Struct, frozen=True, rename="camel"):
    """One real server. `state`: active, draining (a clock runs) or quiescent (weight 0 for another reason)."""

    address: str
    port: int
    weight: int
    state: str
    drain_seconds_left: int | None
    forwarding: str
    active: int
    inactive: int
    connections: int | None
    """All that were ever scheduled to it; null where the mode cannot tell."""
    bytes_in: int | None
    bytes_out: int | None
    upper_threshold: int
    lower_threshold: int


class ServiceRow(Struct, frozen=True, rename="camel"):
    """One virtual server: one port of a Service at one of its addresses."""

    namespace: str
    service: str
    """Name of the Service; "" when the kernel holds no name."""
    port_name: str
    address: str
    """"" for somebody else's server of a firewall mark."""
    port: int
    protocol: str
    kind: str
    """ClusterIP, NodePort, ExternalIP or LoadBalancer: what sort of address of the Service it is."""
    inside: bool
    """Only for clients inside the cluster; there is another one beside it, for everybody else."""
    firewall_mark: int
    scheduler: str
    scheduler_flags: tuple[str, ...]
    one_packet: bool
    persistence_seconds: int
    persistence_prefix: int
    masquerade: str
    """Whose source address is rewritten: detect (by the agent's options), node (processes of this node), always."""
    allowed: tuple[str, ...]
    """Ranges that may connect; none: everybody."""
    no_endpoints: str
    """What clients get when there is no real server: reject or drop."""
    ours: bool
    connections: int
    real_servers: tuple[RealServerRow, ...]

    @property
    def label(self) -> str:
        """`namespace/name:port`, as Services are named everywhere here; "" when there is no name."""
        if not self.service:
            return ""
        return f"{self.namespace}/{self.service}" + (f":{self.port_name}" if self.port_name else "")

    @property
    def vip(self) -> str:
        """`10.0.1.175:80/TCP` or `FWM 7`."""
        if not self.address:
            return f"FWM {self.firewall_mark}"
        return f"{_host(self.address)}:{self.port}/{self.protocol}"


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def service_rows(reports: Iterable[ServerReport], clocks: Mapping[DrainKey, float]) -> list[ServiceRow]:
    """What a backend reports, by name; what has no name comes last, in the backend's order."""
    rows = [_service_row(report, clocks) for report in reports]
    return sorted(rows, key=lambda row: (not row.ours, not row.service, row.namespace, row.service, row.port_name))


def _service_row(report: ServerReport, clocks: Mapping[DrainKey, float]) -> ServiceRow:
    server = report.server
    namespace, _, rest = server.label.partition("/")
    name, _, port_name = rest.partition(":")
    by_mark = report.fwmark and not report.ours
    return ServiceRow(
        namespace,
        name,
        port_name,
        "" if by_mark else format_address(server.at.address),
        server.at.port,
        "" if by_mark else _protocol(server.at.protocol),
        server.kind.value,
        server.at.inside,
        report.fwmark,
        server.scheduler,
        tuple(filter(None, scheduler_flags(server).split(","))),
        bool(server.flags & ServerFlags.ONE_PACKET),
        server.persistence,
        server.persistence_prefix,
        server.masquerade.value,
        tuple(map(str, server.allowed)),
        server.no_servers.value,
        report.ours,
        report.connections,
        tuple(_real_row(server.at, real, counters, clocks) for real, counters in report.reals),
    )


def _real_row(at: VirtualAddress, real: Any, counters: Any, clocks: Mapping[DrainKey, float]) -> RealServerRow:
    left = clocks.get(DrainKey(at, real.address, real.port)) if real.weight == 0 else None
    state = "active" if real.weight else "quiescent" if left is None else "draining"
    return RealServerRow(
        format_address(real.address),
        real.port,
        real.weight,
        state,
        None if left is None else max(0, round(left)),
        _FORWARDING[real.forwarding],
        counters.active,
        counters.inactive,
        _known(counters.connections),
        _known(counters.bytes_in),
        _known(counters.bytes_out),
        real.upper_threshold,
        real.lower_threshold,
    )


def _known(value: int) -> int | None:
    return None if value < 0 else value


def _protocol(number: int) -> str:
    return Protocol(number).name if number in Protocol.__members__.values() else str(number)


def chosen(rows: Iterable[ServiceRow], wanted: Sequence[str]) -> list[ServiceRow]:
    """The rows that a name, `namespace/name`, `namespace/name:port`, VIP, VIP:port or VIP:port/PROTOCOL means."""
    if not wanted:
        return list(rows)
    names = {each.lower() if ":" in each else each for each in wanted}
    return [row for row in rows if names & _handles(row)]


def _handles(row: ServiceRow) -> set[str]:
    handles = {row.vip, row.vip.lower(), row.vip.rpartition("/")[0], row.address}
    if row.service:
        handles |= {row.service, f"{row.namespace}/{row.service}", row.label}
    return handles - {""}


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


_SERVICE_COLUMNS: tuple[tuple[str, bool, _Cell], ...] = (
    ("NAMESPACE", False, lambda row: row.namespace or "-"),
    ("SERVICE", False, _service_cell),
    ("VIP", False, lambda row: row.vip),
    ("TYPE", False, _type),
    ("SCHED", False, lambda row: row.scheduler),
    ("FLAGS", True, lambda row: ",".join((*row.scheduler_flags, *(["ops"] if row.one_packet else []))) or "-"),
    ("PERSISTENT", True, _persistence),
    ("MASQUERADE", True, lambda row: row.masquerade),
    ("FROM", True, lambda row: ",".join(row.allowed) or "-"),
)
_REAL_COLUMNS: tuple[tuple[str, bool, _RealCell], ...] = (
    ("REAL SERVER", False, lambda real: f"{_host(real.address)}:{real.port}"),
    ("WEIGHT", False, lambda real: str(real.weight)),
    ("FORWARD", True, lambda real: real.forwarding),
    ("STATE", False, _state),
    ("ACTIVE", False, lambda real: str(real.active)),
    ("INACTIVE", False, lambda real: str(real.inactive)),
    ("CONNS", False, lambda real: _count(real.connections)),
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


def service_table(rows: Sequence[ServiceRow], *, wide: bool = False, headers: bool = True) -> str:
    """One line per real server, grouped under its virtual server."""
    services = [column for column in _SERVICE_COLUMNS if wide or not column[1]]
    reals = [column for column in _REAL_COLUMNS if wide or not column[1]]
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


def document(rows: Sequence[ServiceRow], mode: str) -> dict[str, Any]:
    """`show -o json`."""
    return {"schemaVersion": SCHEMA_VERSION, "mode": mode, "services": msgspec.to_builtins(rows)}


def json_lines(rows: Sequence[ServiceRow], mode: str) -> str:
    """`show -o jsonl`: one virtual server a line."""
    return "".join(
        json.dumps({"schemaVersion": SCHEMA_VERSION, "mode": mode, **msgspec.to_builtins(row)}) + "\n" for row in rows
    )


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
        _amounts("virtual server", (len(plan.add), "add"), (len(plan.change), "change"), (len(plan.remove), "remove")),
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
            "vip": f"{format_endpoint(at.address, at.port)}/{_protocol(at.protocol)}",
            "type": each.kind.value,
            "inside": at.inside,
            "realServers": reals,
        }

    objects = [server("add", each, add=list(map(str, each.real_servers))) for each in plan.add]
    for change in plan.change:
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
