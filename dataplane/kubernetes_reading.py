"""What reading one Kubernetes object gives, whichever source it came from."""

from msgspec import Struct

from dataplane.model import Address, EndpointSlice, ObjectName, Service

Value = Service | tuple[EndpointSlice, ...]


class Reading(Struct, frozen=True, gc=False):
    """One object as read: its model value, or None when it is refused; and what was wrong with it."""

    kind: str
    name: ObjectName | None
    """None: the object does not even say who it is."""
    value: Value | None
    """Of an EndpointSlice one slice; of v1 Endpoints one slice per subset and family."""
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
