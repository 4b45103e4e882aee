"""One endpoint of one Service is replaced, for every kind of Service.

Each kind has a namespace of its own in which all Services are of that kind; the kinds take turns, round by round. What
is measured is the whole way from a source's update to the kernel's ACK (`take`, plan, commit), beside that of Services
with nothing but a cluster IP in the same run. The floor is what the kernel needs: the bytes that ours sends for the
same changes, ready before the clock starts, sent by plain sockets.
"""

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
from dataplane.netlink_socket import NETLINK_GENERIC, NETLINK_NETFILTER, NETLINK_ROUTE
from dataplane.reconciler import Reconciler

from . import workload
from .isolation import RunFailed, isolated
from .nft_programming import without_generation
from .raw import PlainSocket, Sent, replay
from .watching import record

WARM_UP = 20
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
PLAIN = Kind("ClusterIP")
KINDS = (
    PLAIN,
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


def _prepared(mode: str, kind: Kind, size: int) -> tuple[Reconciler, list[ObjectName]]:
    """All Services in the kernel, and their names."""
    backend = open_backend(mode, Options(cluster_cidrs=(parse_network("10.128.0.0/9"),)))
    reconciler = Reconciler(backend, RULES, allow_mass_delete=True)
    backend.prepare()
    reconciler.observe()
    names = [ObjectName("bench", f"service-{number}") for number in range(size)]
    reconciler.take(Update({name: view(kind, number) for number, name in enumerate(names)}))
    if reconciler.sync("bench").result != "committed":
        raise RunFailed(f"{kind.name}: the first sync failed")
    return reconciler, names


def run(mode: str, kind: Kind, size: int, count: int) -> list[float]:
    """Seconds of `count` changes among `size` Services, each from a source's update to the kernel's ACK."""

    def work() -> list[float]:
        reconciler, names = _prepared(mode, kind, size)
        samples = []
        for turn in range(count + WARM_UP):
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


def floor(mode: str, kind: Kind, size: int, count: int) -> list[float]:
    """Seconds of the same changes as `run` makes, by bytes that lie ready."""

    def work() -> list[float]:
        reconciler, names = _prepared(mode, kind, size)
        sent = record()
        changes: list[tuple[list[Sent], list[Sent]]] = []
        for turn in range(count + WARM_UP):
            number = turn * 37 % size
            both = []
            for replaced in (1 + turn % 500, 0):  # there and back
                sent.clear()
                update = Update({names[number]: view(kind, number, replaced=replaced)})
                if reconciler.sync("bench", reconciler.take(update)).result != "committed":
                    raise RunFailed(f"{kind.name}: change {turn} failed")
                both.append([each._replace(data=without_generation(each.data)) for each in sent])
            changes.append((both[0], both[1]))
        sockets = {number: PlainSocket(number) for number in (NETLINK_GENERIC, NETLINK_ROUTE, NETLINK_NETFILTER)}
        samples = []
        for do, undo in changes:
            started = time.perf_counter()
            replay(do, sockets)
            samples.append(time.perf_counter() - started)
            replay(undo, sockets)
            for plain in sockets.values():
                plain.drain()
        return samples[WARM_UP:]

    return isolated(work)
