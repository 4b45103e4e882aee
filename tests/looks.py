"""Looks without a kernel: a small cluster with traffic that a fixed rule makes, and a table of any size."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from msgspec.structs import replace
from textual.pilot import Pilot

from dataplane.rows import Counts, Look, RealServerRow, ServiceRow, with_rates
from dataplane.top.app import Top

START = 1_767_225_600.0
"""2026-01-01 00:00:00 UTC."""

PROBE = Counts("probe", ("fexit:ip_vs_schedule",), {"map full": 0}, START)


def real_row(endpoint: str, hits: int | None = 0, **fields: object) -> RealServerRow:
    """`10.244.1.7:9376`, active, unless fields say otherwise."""
    address, _, port = endpoint.rpartition(":")
    given: dict[str, object] = {
        "weight": 1,
        "state": "active",
        "drain_seconds_left": None,
        "forwarding": "Masq",
        "active": 0,
        "inactive": 0,
        "connections": hits,
        "share": None,
        "rate": None,
        "bytes_in": None,
        "bytes_out": None,
        "upper_threshold": 0,
        "lower_threshold": 0,
    }
    return RealServerRow(address=address.strip("[]"), port=int(port), hits=hits, **(given | fields))  # type: ignore[arg-type]


def service_row(label: str, vip: str, reals: Iterable[RealServerRow] = (), **fields: object) -> ServiceRow:
    """`default/web:http` at `10.0.1.175:80/TCP`, with the hits of its backends and their shares."""
    namespace, _, rest = label.partition("/")
    name, _, port_name = rest.partition(":")
    where, _, protocol = vip.partition("/")
    address, _, port = where.rpartition(":")
    found = tuple(reals)
    here = sum(real.hits or 0 for real in found)
    given: dict[str, object] = {
        "kind": "ClusterIP",
        "inside": False,
        "firewall_mark": 0,
        "scheduler": "rr",
        "scheduler_flags": (),
        "one_packet": False,
        "persistence_seconds": 0,
        "persistence_prefix": 0,
        "masquerade": "detect",
        "allowed": (),
        "no_endpoints": "reject",
        "ours": True,
        "connections": here,
        "hits": here,
        "rate": None,
    }
    shared = tuple(replace(real, share=real.hits / here if real.hits is not None and here else None) for real in found)
    return ServiceRow(
        namespace=namespace,
        service=name,
        port_name=port_name,
        address=address.strip("[]"),
        port=int(port),
        protocol=protocol,
        real_servers=shared,
        **(given | fields),  # type: ignore[arg-type]
    )


@dataclass
class Fake:
    """A source of looks whose clock is the test's: `look` tells what is there at `now`."""

    at: Callable[[float], Look]
    now: float = START
    from_agent: bool = True
    trouble: Exception | None = None
    looks: int = 0
    _before: Look | None = field(default=None, repr=False)

    def clock(self) -> float:
        return self.now

    def look(self) -> Look:
        self.looks += 1
        if self.trouble is not None:
            raise self.trouble
        look = with_rates(self.at(self.now), self._before)
        self._before = look
        return look


async def until(pilot: Pilot[None], check: Callable[[], bool], what: str = "that") -> None:
    """Wait for a condition, with a bound."""
    deadline = time.monotonic() + 30
    while not check():
        assert time.monotonic() < deadline, f"not within 30 s: {what}"
        await pilot.pause(0.002)


async def play(pilot: Pilot[None], source: Fake, *seconds: float) -> None:
    """Looks at these seconds after the start, each on the screen before the next is taken."""
    app = pilot.app
    assert isinstance(app, Top)
    for second in seconds:
        source.now = START + second
        app.action_look()
        await until(pilot, lambda: app.look is not None and app.look.at == source.now, f"the look at {second} s")
    await pilot.pause()


# ------------------------------------------------------------------------------------------------------ a small cluster


@dataclass(frozen=True)
class Load:
    """Connections to a backend: `mean` per second, `swing` being the part that comes and goes in waves."""

    mean: float
    swing: float = 0.25
    period: float = 37.0
    since: float = -1e9
    until: float = 1e9
    before: int = 0
    """Hits before the story begins."""

    def hits(self, second: float) -> int:
        """At a second of the story: the integral of mean · (1 + swing · sin)."""
        begin, end = max(self.since, 0.0), min(second, self.until)
        if end <= begin:
            return self.before
        turn = 2 * math.pi / self.period
        waves = (math.cos(turn * begin) - math.cos(turn * end)) / turn
        beat = 2 + self.mean % 1.7
        ripple = 0.5 * (math.sin(end * beat + self.mean) - math.sin(begin * beat + self.mean))
        return self.before + max(0, round(self.mean * (end - begin + self.swing * (waves + ripple))))


DRAIN_BEGINS = 22.0
STORY = 67.0
"""Seconds into the story at which the pictures are taken."""


def cluster(now: float) -> Look:
    """A small cluster: some Services are busy, one backend drains, one has joined, one Service has none."""
    second = now - START

    def pod(endpoint: str, load: Load, **fields: object) -> RealServerRow:
        open_now = int(load.mean * 1.7) if second < load.until else max(0, int(19 - (second - load.until) / 4))
        given = {"active": open_now, "inactive": int(load.mean * 0.8), "bytes_in": load.hits(second) * 913}
        return real_row(endpoint, load.hits(second), **(given | {"bytes_out": load.hits(second) * 14_211} | fields))

    drains = second >= DRAIN_BEGINS
    leaving: dict[str, object] = (
        {"weight": 0, "state": "draining", "drain_seconds_left": round(900 - (second - DRAIN_BEGINS))} if drains else {}
    )
    checkout = [
        pod("10.244.1.7:9376", Load(61, before=402_118)),
        pod("10.244.2.3:9376", Load(61, until=DRAIN_BEGINS, before=401_977), **leaving),
        pod("10.244.3.6:9376", Load(63, before=402_040)),
    ]
    if drains:
        checkout.append(pod("10.244.3.11:9376", Load(58, since=DRAIN_BEGINS)))
    rows = [
        service_row("shop/checkout:http", "10.0.1.175:80/TCP", checkout, scheduler="wlc"),
        service_row(
            "shop/catalogue:grpc",
            "10.0.1.31:50051/TCP",
            [
                pod("10.244.1.19:50051", Load(118, 0.5, 29, before=1_804_223)),
                pod("10.244.2.20:50051", Load(120, 0.5, 29, before=1_803_911)),
            ],
            persistence_seconds=10_800,
            persistence_prefix=32,
        ),
        service_row(
            "kube-system/kube-dns:dns",
            "10.0.0.10:53/UDP",
            [
                pod("10.244.1.2:53", Load(212, 0.12, 53, before=9_120_034)),
                pod("10.244.3.2:53", Load(208, 0.12, 47, before=9_118_870)),
            ],
        ),
        service_row(
            "shop/web:https",
            "192.0.2.80:443/TCP",
            [
                pod("10.244.1.33:8443", Load(27, 0.6, 21, before=88_230), weight=3),
                pod("10.244.2.34:8443", Load(9, 0.6, 21, before=29_412)),
                pod("10.244.3.35:8443", Load(0, until=-1, before=12_002), weight=0, state="quiescent"),
            ],
            kind="LoadBalancer",
            scheduler="wrr",
            allowed=("198.51.100.0/24",),
        ),
        service_row(
            "monitoring/grafana",
            "[fd00:10::40]:3000/TCP",
            [pod("[fd00:244::1:8]:3000", Load(0.7, 0.9, 11, before=5_120))],
        ),
        service_row("batch/reports:http", "10.0.7.14:8080/TCP", [], no_endpoints="reject"),
        service_row("shop/mail:smtp", "10.0.1.90:25/TCP", [pod("10.244.2.61:2525", Load(0, before=310))]),
    ]
    return Look("ipvs", now, PROBE, tuple(rows))


def table(services: int, backends: int, now: float, share_of_busy: float = 1.0) -> Look:
    """`services` Services of `backends` backends each; the first part of them has traffic."""
    second = int(now - START)
    rows = []
    for number in range(services):
        busy = number < services * share_of_busy
        reals = [
            real_row(
                f"10.{128 + each}.{number // 250 % 250}.{number % 250 + 1}:8080", (number % 97 + 1) * second * busy
            )
            for each in range(backends)
        ]
        vip = f"10.{number // 62_500}.{number // 250 % 250}.{number % 250 + 1}:80/TCP"
        rows.append(service_row(f"team-{number % 40}/service-{number}:http", vip, reals))
    return Look("nftables", now, Counts("nftables", reason="no probe"), tuple(rows))
