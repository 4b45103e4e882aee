"""Endpoints and addresses of a Service, as far as they have names. Pure."""

from collections.abc import Iterator
from typing import NamedTuple

from ..model import Address, Protocol, ServiceType, ServiceView
from .names import dashed


class Target(NamedTuple):
    """One usable endpoint of a Service: its label, its address and its ports (name, protocol, number)."""

    label: str
    address: Address
    ports: tuple[tuple[str, str, int], ...]


def targets(view: ServiceView) -> Iterator[Target]:
    """Endpoints that have names: ready ones, or all of a Service that publishes those too; one address once."""
    assert view.service is not None
    unready = view.service.publish_not_ready
    seen: dict[tuple[str, Address], Target] = {}
    for one in view.slices:
        ports = tuple((port.name, Protocol(port.protocol).name.lower(), port.port) for port in one.ports if port.port)
        for endpoint in one.endpoints:
            if endpoint.ready or unready:
                target = Target(endpoint.hostname or dashed(endpoint.address), endpoint.address, ports)
                before = seen.get(target[:2])
                merged = ports if before is None else tuple(dict.fromkeys((*before.ports, *ports)))
                seen[target[:2]] = target._replace(ports=merged)
    yield from seen.values()


def headless_targets(view: ServiceView | None) -> Iterator[Target]:
    """Those of a headless Service; of another one none."""
    if view is not None and view.service is not None and view.service.headless:
        yield from targets(view)


def cluster_ips(view: ServiceView | None) -> tuple[Address, ...]:
    """Where the Service itself is."""
    if view is None or view.service is None or view.service.type is ServiceType.EXTERNAL_NAME:
        return ()
    return view.service.cluster_ips
