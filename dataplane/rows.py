"""What the kernel holds, a row for each virtual server and real server, with hits: the form in which it travels.

Pure. The agent answers with a `Look` (control_socket.py), a command without an agent makes one from the kernel; tables,
JSON, metrics, `top` and the web page all read this.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
from msgspec import Struct

from .backend import RealCounters, ServerReport
from .counters import RealServerAt
from .drain import DrainKey
from .ipvsadm_text import scheduler_flags
from .model import Forwarding, Protocol, RealServer, ServerFlags, VirtualAddress, format_address

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
    """All that were ever scheduled to it, by the mode's own counter; null where the mode cannot tell."""
    hits: int | None
    """New connections led to it, as `Look.counts` says who counts; null where nobody can tell."""
    share: float | None
    """Of the hits of all real servers that are here now, 0 to 1; null without hits."""
    rate: float | None
    """Hits per second between two looks; null at the first."""
    bytes_in: int | None
    bytes_out: int | None
    upper_threshold: int
    lower_threshold: int

    @property
    def endpoint(self) -> str:
        """`10.44.1.7:9376` or `[fd00::7]:9376`."""
        return f"{_host(self.address)}:{self.port}"


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
    """By the mode's own counter."""
    hits: int
    """Those of its real servers, and of those that were here before."""
    rate: float | None
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


class Counts(Struct, frozen=True, rename="camel"):
    """Who counted the hits, and how much of them he has missed."""

    source: str
    """probe, or the mode whose own counters these are: ipvs, nftables, iptables."""
    hooks: tuple[str, ...] = ()
    """Of the probe: `fexit:nf_nat_setup_info`."""
    missed: dict[str, int] = {}
    """Hits that the probe could not count, by reason."""
    since: float = 0.0
    """Seconds since the epoch; 0 = since each real server came to be."""
    reason: str = ""
    """Why it is not the probe."""

    @property
    def lost(self) -> int:
        """Hits missed for any reason."""
        return sum(self.missed.values())

    def __str__(self) -> str:
        """`probe (fexit:nf_nat_setup_info), missed 0` or `ipvs mode's own counters (why no probe)`."""
        if self.source != "probe":
            return f"{self.source} mode's own counters" + (f" ({self.reason})" if self.reason else "")
        missed = f"missed {self.lost}"
        if self.lost:
            missed += f" ({', '.join(f'{reason} {count}' for reason, count in self.missed.items() if count)})"
        return f"probe ({', '.join(self.hooks)}), {missed}"


class Look(Struct, frozen=True, rename="camel"):
    """Everything one mode holds at one moment."""

    mode: str
    at: float
    """Seconds since the epoch."""
    counts: Counts
    services: tuple[ServiceRow, ...]
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> bytes:
        """For the control socket."""
        return self.around([msgspec.json.encode(row) for row in self.services])

    def around(self, rows: Iterable[bytes]) -> bytes:
        """The same with rows that are JSON already in the place of its own."""
        head = msgspec.json.encode(msgspec.structs.replace(self, services=()))
        return head.replace(b'"services":[]', b'"services":[' + b",".join(rows) + b"]", 1)

    @classmethod
    def from_json(cls, text: bytes) -> "Look":
        """Its reverse. Raises msgspec.DecodeError."""
        return msgspec.json.decode(text, type=cls)


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def service_rows(
    reports: Iterable[ServerReport], clocks: Mapping[DrainKey, float], hits: "Hits | None" = None
) -> tuple[ServiceRow, ...]:
    """What a backend reports, by name; what has no name comes last, in the backend's order.

    `hits`: who counts them; None = the mode's own counters.
    """
    return tuple(sorted((service_row(report, clocks, hits) for report in reports), key=by_name))


def by_name(row: ServiceRow) -> tuple[object, ...]:
    """The order of rows."""
    return (not row.ours, not row.service, row.namespace, row.service, row.port_name)


Hits = Callable[[ServerReport], tuple[Mapping[RealServerAt, int], int]]
"""Hits of the real servers of a virtual server, as far as somebody can tell, and those of all that it ever had."""


def own_counters(report: ServerReport) -> tuple[dict[RealServerAt, int], int]:
    """Hits as the mode itself has counted them."""
    known = {(real.address, real.port): counters.connections for real, counters in report.reals}
    known = {backend: count for backend, count in known.items() if count >= 0}
    return known, max(report.connections, sum(known.values()))


def service_row(report: ServerReport, clocks: Mapping[DrainKey, float], hits: "Hits | None" = None) -> ServiceRow:
    """One virtual server."""
    server = report.server
    namespace, _, rest = server.label.partition("/")
    name, _, port_name = rest.partition(":")
    by_mark = report.fwmark and not report.ours
    counts, total = (hits or own_counters)(report)
    counted = [counts.get((real.address, real.port)) for real, _ in report.reals]
    here = sum(filter(None, counted))
    return ServiceRow(
        namespace,
        name,
        port_name,
        "" if by_mark else format_address(server.at.address),
        server.at.port,
        "" if by_mark else protocol_name(server.at.protocol),
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
        total,
        None,
        tuple(
            _real_row(server.at, real, counters, clocks, count, here)
            for (real, counters), count in zip(report.reals, counted, strict=True)
        ),
    )


def _real_row(
    at: VirtualAddress,
    real: RealServer,
    counters: RealCounters,
    clocks: Mapping[DrainKey, float],
    hits: int | None,
    all_hits: int,
) -> RealServerRow:
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
        hits,
        hits / all_hits if hits is not None and all_hits else None,
        None,
        _known(counters.bytes_in),
        _known(counters.bytes_out),
        real.upper_threshold,
        real.lower_threshold,
    )


def _known(value: int) -> int | None:
    return None if value < 0 else value


def protocol_name(number: int) -> str:
    """`TCP`, or the number of a protocol without a name here."""
    return Protocol(number).name if number in Protocol.__members__.values() else str(number)


# -------------------------------------------------------------------------------------------------- between two looks


def with_rates(look: Look, before: Look | None) -> Look:
    """The later of two looks, with hits per second between them; what the earlier one lacks has no rate yet."""
    if before is None or look.at <= before.at or look.counts.source != before.counts.source:
        return look
    seconds = look.at - before.at
    earlier = {_identity(row): row for row in before.services}
    services = []
    for row in look.services:
        was = earlier.get(_identity(row))
        if was is not None:
            known = {(real.address, real.port): real.hits for real in was.real_servers}
            reals = tuple(
                msgspec.structs.replace(real, rate=_rate(real.hits, known.get((real.address, real.port)), seconds))
                for real in row.real_servers
            )
            row = msgspec.structs.replace(row, rate=_rate(row.hits, was.hits, seconds), real_servers=reals)
        services.append(row)
    return msgspec.structs.replace(look, services=tuple(services))


def _identity(row: ServiceRow) -> tuple[object, ...]:
    return (row.protocol, row.address, row.port, row.inside, row.firewall_mark)


def _rate(now: int | None, before: int | None, seconds: float) -> float | None:
    return None if now is None or before is None else max(0.0, (now - before) / seconds)


# ------------------------------------------------------------------------------------------------------------ choosing


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
