"""One endpoint of one Service is replaced, for every kind of Service: `python -m bench.kinds [MODE [SERVICES]]`.

Each kind has a namespace of its own in which all Services are of that kind; the kinds take turns, round by round. What
is measured is the whole way from a source's update to the kernel's ACK (`take`, plan, commit), beside that of Services
with nothing but a cluster IP in the same run.
"""

import statistics
import sys
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from msgspec.structs import replace

from dataplane.backend import Options, open_backend
from dataplane.desired import Rules
from dataplane.model import (
    Address,
    ObjectName,
    ServicePort,
    ServiceType,
    ServiceView,
    Update,
    parse_address,
    parse_network,
)
from dataplane.reconciler import Reconciler

from . import workload
from .isolation import RunFailed, isolated

ROUNDS = 5
CHANGES = 200
WARM_UP = 20
TARGET = 1.5
RULES = Rules(
    node_name=workload.NODE,
    node_addresses=(parse_address("192.168.0.2"),),
    external_ip_ranges=(parse_network("172.16.0.0/12"),),
    drain_seconds=0,
)
RANGES = (parse_network("203.0.113.0/24"), parse_network("198.51.100.0/24"))


class Kind(NamedTuple):
    """What the Services of one namespace have besides a cluster IP."""

    name: str
    traits: Mapping[str, Any] = MappingProxyType({})
    external_ip: bool = False
    load_balancer: bool = False
    node_port: bool = False


LOCAL = {"external_local": True}
KINDS = (
    Kind("ClusterIP"),
    Kind("affinity", {"affinity_seconds": 10800}),
    Kind("internal policy Local", {"internal_local": True}),
    Kind("NodePort", node_port=True),
    Kind("externalIP", external_ip=True),
    Kind("LoadBalancer", load_balancer=True, node_port=True),
    Kind("LoadBalancer, source ranges", {"source_ranges": RANGES}, load_balancer=True, node_port=True),
    Kind("LoadBalancer, policy Local", LOCAL, load_balancer=True, node_port=True),
    Kind(
        "LoadBalancer, policy Local, affinity", {**LOCAL, "affinity_seconds": 600}, load_balancer=True, node_port=True
    ),
)


def view(kind: Kind, number: int, replaced: int = 0) -> ServiceView:
    """A Service of a kind; `replaced` counts how often its first endpoint was replaced."""
    plain = workload.view(number, replaced=replaced)
    assert plain.service is not None
    service = replace(plain.service, **kind.traits)
    if kind.external_ip:
        service = replace(service, external_ips=(Address((0xAC100001 + number).to_bytes(4)),))
    if kind.load_balancer:
        service = replace(
            service,
            type=ServiceType.LOAD_BALANCER,
            load_balancer_ips=(Address((0x0B000001 + number).to_bytes(4)),),
        )
    if kind.node_port:
        (port,) = service.ports
        kind_of = ServiceType.LOAD_BALANCER if kind.load_balancer else ServiceType.NODE_PORT
        ports = (ServicePort(port.name, port.protocol, port.port, 10_000 + number),)
        service = replace(service, type=kind_of, ports=ports)
    if service.internal_local or service.external_local:  # of three endpoints the first two are here
        (one,) = plain.slices
        here = tuple(replace(each, node=workload.NODE) for each in one.endpoints[:2])
        plain = replace(plain, slices=(replace(one, endpoints=here + one.endpoints[2:]),))
    return replace(plain, service=service)


def run(mode: str, kind: Kind, size: int) -> list[float]:
    """Seconds of each change."""

    def work() -> list[float]:
        backend = open_backend(mode, Options(cluster_cidrs=(parse_network("10.128.0.0/9"),)))
        reconciler = Reconciler(backend, RULES, allow_mass_delete=True)
        backend.prepare()
        reconciler.observe()
        names = [ObjectName("bench", f"service-{number}") for number in range(size)]
        reconciler.take(Update({name: view(kind, number) for number, name in enumerate(names)}))
        if reconciler.sync("bench").result != "committed":
            raise RunFailed(f"{kind.name}: the first sync failed")
        samples = []
        for turn in range(CHANGES + WARM_UP):
            number = turn * 37 % size
            update = Update({names[number]: view(kind, number, replaced=1 + turn % 500)})
            started = time.perf_counter()
            report = reconciler.sync("bench", reconciler.take(update))
            samples.append(time.perf_counter() - started)
            if report.failed or report.result != "committed":
                raise RunFailed(f"{kind.name}: change {turn} ended {report.result}: {report.failed}")
        if reconciler.verify("bench").result != "unchanged":
            raise RunFailed(f"{kind.name}: the kernel holds something else than it should")
        return samples[WARM_UP:]

    return isolated(work)


def main() -> int:
    """Print the table; 1 when a run failed."""
    mode = sys.argv[1] if len(sys.argv) > 1 else "nftables"
    size = int(sys.argv[2]) if len(sys.argv) > 2 else 10_000
    samples: dict[str, list[float]] = {kind.name: [] for kind in KINDS}
    failed = False
    for turn in range(ROUNDS):
        for kind in KINDS:
            print(f"kinds: {mode}, {size} Services, round {turn + 1}, {kind.name}", file=sys.stderr)
            try:
                samples[kind.name] += run(mode, kind, size)
            except RunFailed as error:
                print(f"FAILED: {error}")
                failed = True
    base = statistics.median(samples["ClusterIP"] or [float("nan")])
    print(
        f"one endpoint replaced, update to ACK, {mode} mode, {size} Services of one kind, target {TARGET} x ClusterIP"
    )
    for name, values in samples.items():
        if values:
            middle = statistics.median(values)
            print(f"{name:<40} p50 {middle * 1e6:6.0f} us   {middle / base:4.2f} x")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
