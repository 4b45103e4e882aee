"""Node and ServiceCIDR objects: what a proxy needs to know of the place it works in. Pure; one object at a time.

Sources: core/v1 types.go (Node), networking/v1 types.go (ServiceCIDR), kube-proxy's reading of them
(pkg/proxy/node.go, pkg/proxy/healthcheck, pkg/util/node). Both kinds are of no namespace.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import msgspec
from msgspec import Raw, Struct

from .kubernetes_reading import NodeFacts, Reading, ServiceRanges
from .model import Address, Network, ObjectName, parse_address, parse_network
from .printable import printable, shown

TAINT = "ToBeDeletedByClusterAutoscaler"
"""The cluster autoscaler puts it on a node that it is going to delete; load balancers shall send nothing new there."""
ADDRESS_TYPES = ("InternalIP", "ExternalIP")
"""In the order in which a node's main address is looked for."""


class _Labels(Struct, gc=False, rename={"zone": "topology.kubernetes.io/zone"}):
    zone: str | None = None


class _Metadata(Struct, gc=False, rename="camel"):
    name: str | None = None
    labels: _Labels | None = None
    deletion_timestamp: str | None = None


class _Taint(Struct, gc=False):
    key: str | None = None


class _NodeSpec(Struct, gc=False, rename={"pod_cidr": "podCIDR", "pod_cidrs": "podCIDRs", "taints": "taints"}):
    pod_cidr: str | None = None
    pod_cidrs: list[str] | None = None
    taints: list[_Taint] | None = None


class _NodeAddress(Struct, gc=False):
    type: str | None = None
    address: str | None = None


class _NodeStatus(Struct, gc=False):
    addresses: list[_NodeAddress] | None = None


class _Node(Struct, gc=False):
    metadata: _Metadata | None = None
    spec: _NodeSpec | None = None
    status: _NodeStatus | None = None


class _RangesSpec(Struct, gc=False):
    cidrs: list[str] | None = None


class _ServiceCIDR(Struct, gc=False):
    metadata: _Metadata | None = None
    spec: _RangesSpec | None = None


_node = msgspec.json.Decoder(_Node)
_ranges = msgspec.json.Decoder(_ServiceCIDR)
_Read = TypeVar("_Read")


def read_place(document: Raw, kind: str) -> Reading | None:
    """A Node or a ServiceCIDR. Bad content is a fault of the Reading; only text that is no JSON raises."""
    try:
        if kind == "Node":
            return _read_node(_node.decode(document))
        return _read_ranges(_ranges.decode(document))
    except msgspec.ValidationError as error:
        return Reading(kind, None, None, (("", printable(str(error), 300)),))


def _read_node(node: _Node) -> Reading:
    meta, spec, status = node.metadata or _Metadata(), node.spec or _NodeSpec(), node.status or _NodeStatus()
    if not meta.name:
        return Reading("Node", None, None, (("metadata.name", "required"),))
    faults: list[tuple[str, str]] = []
    given = spec.pod_cidrs or ([spec.pod_cidr] if spec.pod_cidr else [])
    found = [each for each in status.addresses or () if each.type in ADDRESS_TYPES and each.address]
    found.sort(key=lambda each: ADDRESS_TYPES.index(each.type or ""))
    addresses: tuple[Address, ...] = _each(
        parse_address, "status.addresses", (each.address or "" for each in found), faults
    )
    facts = NodeFacts(
        name=printable(meta.name, 253),
        zone=printable((meta.labels or _Labels()).zone or "", 253),
        pod_ranges=_each(parse_network, "spec.podCIDRs", given, faults),
        addresses=addresses,
        eligible=not meta.deletion_timestamp and not any(each.key == TAINT for each in spec.taints or ()),
    )
    return Reading("Node", ObjectName("", facts.name), facts, tuple(faults))


def _read_ranges(decoded: _ServiceCIDR) -> Reading:
    name = (decoded.metadata or _Metadata()).name
    if not name:
        return Reading("ServiceCIDR", None, None, (("metadata.name", "required"),))
    faults: list[tuple[str, str]] = []
    ranges: tuple[Network, ...] = _each(
        parse_network, "spec.cidrs", (decoded.spec or _RangesSpec()).cidrs or (), faults
    )
    return Reading("ServiceCIDR", ObjectName("", printable(name, 253)), ServiceRanges(ranges), tuple(faults))


def _each(
    read: Callable[[str], _Read], field: str, texts: Iterable[Any], faults: list[tuple[str, str]]
) -> tuple[_Read, ...]:
    """What can be read; of the rest a fault."""
    found: list[_Read] = []
    for index, text in enumerate(texts):
        try:
            found.append(read(text))
        except ValueError:
            faults.append((f"{field}[{index}]", f"{shown(text)} cannot be read; it is left out"))
    return tuple(found)
