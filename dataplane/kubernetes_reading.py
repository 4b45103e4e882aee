"""What reading one Kubernetes object gives, whichever source it came from."""

from msgspec import Struct

from dataplane.model import Address, EndpointSlice, Network, ObjectName, Service


class NodeFacts(Struct, frozen=True):
    """A Node, as far as a proxy needs it. `addresses`: its main ones, internal ones first.

    `eligible`: load balancers may send to it (it is not being deleted, and the autoscaler is not about to).
    """

    name: str
    zone: str = ""
    pod_ranges: tuple[Network, ...] = ()
    addresses: tuple[Address, ...] = ()
    eligible: bool = True


class ServiceRanges(Struct, frozen=True):
    """A ServiceCIDR: where cluster IPs come from."""

    ranges: tuple[Network, ...] = ()


Value = Service | tuple[EndpointSlice, ...] | NodeFacts | ServiceRanges


class Reading(Struct, frozen=True, gc=False):
    """One object as read: its model value, or None when it is refused; and what was wrong with it."""

    kind: str
    name: ObjectName | None
    """None: the object does not even say who it is."""
    value: Value | None
    """Of an EndpointSlice one slice; of v1 Endpoints one slice per subset and family; of a Node its facts."""
    faults: tuple[tuple[str, str], ...] = ()
    """(field path, reason)."""
    weights: tuple[tuple[Address, int], ...] = ()
    """Annotation `dataplane.io/weights`."""
    headless: bool = False
    """A slice with the label service.kubernetes.io/headless: for DNS, not for the proxy."""

    @property
    def label(self) -> str:
        """`Kind namespace/name` for `Problem.object`."""
        return f"{self.kind} {self.name}" if self.name else self.kind
