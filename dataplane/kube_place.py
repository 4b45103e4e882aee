"""Where this node is, as the cluster says: its Node object and the ServiceCIDRs. Pure, but for the log.

What cannot be read of these objects is told once and left out: they are not the user's input, and a fault in them must
not hold anything back. What was known stays known while the server cannot be asked.
"""

from collections.abc import Iterable
from typing import Any, Protocol

from .kubernetes_reading import NodeFacts, Reading, ServiceRanges
from .model import Network, ObjectName, disjoint

PLACE_KINDS = frozenset(("Node", "ServiceCIDR"))


class Log(Protocol):
    """What is needed of a structlog logger."""

    def info(self, event: str, **fields: Any) -> Any: ...
    def warning(self, event: str, **fields: Any) -> Any: ...


class Place:
    """The Node of one name and all ServiceCIDRs. `changed`: something has, since the last `take`."""

    def __init__(self, node_name: str, log: Log) -> None:
        self.node_name = node_name
        self.node: NodeFacts | None = None
        self.changed = False
        self._log = log
        self._ranges: dict[ObjectName, ServiceRanges] = {}
        self._missing = False
        """The server has told that there is no such Node; before it has told anything, there may be."""
        self._told: set[tuple[str, tuple[tuple[str, str], ...]]] = set()

    # ---------------------------------------------------------------------------------------------------- going in

    def put(self, kind: str, reading: Reading) -> None:
        """Added or changed."""
        if reading.faults and (reading.label, reading.faults) not in self._told:
            self._told = {(reading.label, reading.faults)}
            for field, reason in reading.faults:
                self._log.warning("bad object", object=reading.label, field=field, reason=reason)
        if isinstance(reading.value, NodeFacts) and reading.value.name == self.node_name:
            self._become(reading.value, False)
        elif isinstance(reading.value, ServiceRanges) and reading.name is not None:
            self._rerange({**self._ranges, reading.name: reading.value})

    def remove(self, kind: str, name: ObjectName) -> None:
        """Deleted."""
        if kind == "Node" and name.name == self.node_name:
            self._become(None, True)
        elif kind == "ServiceCIDR":
            self._rerange({one: value for one, value in self._ranges.items() if one != name})

    def replace(self, kind: str, readings: Iterable[Reading]) -> None:
        """A whole list."""
        found = list(readings)
        for reading in found:
            self.put(kind, reading)
        present = {reading.name for reading in found if reading.name is not None}
        if kind == "Node" and not any(reading.kind == "Node" for reading in found):
            self._become(None, True)
        elif kind == "ServiceCIDR" and all(reading.name is not None for reading in found):
            self._rerange({one: value for one, value in self._ranges.items() if one in present})

    def absent(self, kind: str) -> None:
        """The server does not tell; so nothing is known."""
        if kind == "Node" and self.node is None:
            self._missing = False

    def _become(self, node: NodeFacts | None, missing: bool) -> None:
        if missing and not self._missing:
            self._log.warning(
                "no Node of this name",
                name=self.node_name,
                hint="if the node's name is not its host name: --node-name",
            )
        before = self.node
        # a Node that is gone says nothing new of where we are; only load balancers shall leave
        self.node, self._missing = node or self.node, missing
        if node is not None and before != node:
            self.changed = True

    def _rerange(self, ranges: dict[ObjectName, ServiceRanges]) -> None:
        if ranges != self._ranges:
            self._ranges, self.changed = ranges, True

    # -------------------------------------------------------------------------------------------------- coming out

    def take(self) -> bool:
        """Whether something changed since the last call."""
        changed, self.changed = self.changed, False
        return changed

    @property
    def eligible(self) -> bool:
        """Load balancers may send to this node (kube-proxy's nodeEligible), as long as nobody says otherwise."""
        return not self._missing and (self.node is None or self.node.eligible)

    @property
    def service_ranges(self) -> tuple[Network, ...]:
        """Where cluster IPs come from; () = not known."""
        return disjoint(each for one in self._ranges.values() for each in one.ranges)

    def counts(self) -> dict[str, int]:
        """How many objects count, by kind."""
        return {"Node": int(self.node is not None and not self._missing), "ServiceCIDR": len(self._ranges)}

    def status(self) -> dict[str, Any]:
        """For `dataplane status`."""
        node = self.node or NodeFacts(self.node_name)
        return {
            "name": self.node_name,
            "there": None if self.node is None and not self._missing else not self._missing,
            "zone": node.zone,
            "podCIDRs": list(map(str, node.pod_ranges)),
            "serviceCIDRs": list(map(str, self.service_ranges)),
            "eligible": self.eligible,
        }
