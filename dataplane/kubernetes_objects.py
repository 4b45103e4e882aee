"""Kubernetes objects, as JSON text or as decoded values, into the nouns of `model`. Pure; one object at a time.

Sources: core/v1 types.go (Service, Endpoints), discovery/v1 types.go (EndpointSlice), kube-proxy's reading of them
(pkg/proxy/serviceport.go, endpointslicecache.go).

Annotations of this program, on the objects named:

| annotation                           | on               | value                                                  |
|--------------------------------------|------------------|--------------------------------------------------------|
| `dataplane.io/scheduler`             | Service          | IPVS scheduler: `rr`, `wrr`, `lc`, `sh`, `mh`, …       |
| `kube-router.io/service.scheduler`   | Service          | the same, read when the first is absent                |
| `dataplane.io/scheduler-flags`       | Service          | flag-1, flag-2, flag-3, sh-fallback, sh-port,          |
|                                      |                  | mh-fallback, mh-port (ipvsadm(8)), joined by commas    |
| `dataplane.io/drain-seconds`         | Service          | seconds, 0 to 86400, or a Go duration: `15m`           |
| `dataplane.io/weights`               | Service, slice,  | `10.244.3.6=3,10.244.1.7=1`, 0 to 65535; an entry of   |
|                                      | Endpoints        | the slice beats the Service's                          |

A faulty annotation is reported and its default used; so are faulty addresses that stand for themselves (endpoints,
external and load balancer addresses). Any other fault refuses the object.
"""

import sys
from collections.abc import Callable, Hashable, Iterable
from functools import lru_cache
from typing import Any, TypeVar, cast

from msgspec import Raw, Struct
from msgspec.structs import replace

from dataplane import kubernetes_fields as fields
from dataplane import kubernetes_wire as wire
from dataplane.kubernetes_fields import Faults
from dataplane.kubernetes_reading import Reading
from dataplane.model import (
    Address,
    Endpoint,
    EndpointPort,
    EndpointSlice,
    Family,
    ObjectName,
    Service,
    ServicePort,
    ServiceType,
    ServiceView,
    family_of,
)
from dataplane.printable import printable, shown

_NO_LABELS, _NO_NOTES = wire.Labels(), wire.Annotations()
_NO_CONDITIONS, _NO_HINTS = wire.Conditions(), wire.Hints()

_T = TypeVar("_T", bound=Hashable)
_kept = lru_cache(maxsize=8192)(lambda value: value)


def _shared(value: _T) -> _T:
    """Ten thousand Services share a handful of tuples of ports and zones; one copy of each is enough."""
    return cast("_T", _kept(value))


def read_object(document: Any, kind: str = "") -> Reading | None:
    """One object from decoded data or `msgspec.Raw` JSON; None when it is of a kind this program does not read.

    `kind` is assumed for an object without one (the items of an EndpointSliceList). Never raises for bad content,
    except msgspec.DecodeError for a Raw that is not JSON and RecursionError for one too deeply nested.
    """
    if not isinstance(document, Raw) and not isinstance(document, dict):
        return _unknown("", f"{shown(document)} is not an object (apiVersion, kind, metadata, …)")
    try:
        head = wire.decode(document, wire.Head)
    except wire.FieldError as error:
        return _unknown(error.field, error.reason)
    kind_said, version = head.kind or kind, head.api_version or ("" if head.kind else wire.GROUP_VERSIONS.get(kind, ""))
    if kind_said in wire.GROUP_VERSIONS and not version:
        return Reading(kind_said, _identity(document), None, (("apiVersion", "required"),))
    if not kind_said or not version:
        return _unknown("apiVersion" if kind_said else "kind", "required")
    if wire.item_kind(version, kind_said) is not None:
        return _unknown("kind", "a list inside a list is not read")
    expected = wire.GROUP_VERSIONS.get(kind_said)
    if expected is None or version.rpartition("/")[0] != expected.rpartition("/")[0]:
        return None
    faults = Faults()
    if version != expected:
        faults.refuse("apiVersion", f"{shown(version)} is not read; use {expected}")
        return Reading(kind_said, _identity(document), None, tuple(faults))
    shape, reader = _READERS[kind_said]
    try:
        decoded: Any = wire.decode(document, shape)
    except wire.FieldError as error:
        faults.refuse(error.field, error.reason)
        return Reading(kind_said, _identity(document), None, tuple(faults))
    meta = decoded.metadata or wire.Metadata()
    pattern = fields.DNS_LABEL if kind_said == "Service" else fields.DNS_SUBDOMAIN
    name = fields.name(meta.name, "metadata.name", faults, pattern)
    namespace = fields.name(meta.namespace or "default", "metadata.namespace", faults)
    if not name or not namespace:
        return Reading(kind_said, None, None, tuple(faults))
    reading: Reading | None = reader(decoded, ObjectName(namespace, name), meta, faults)
    return reading


def _unknown(field: str, reason: str) -> Reading:
    return Reading("", None, None, ((field, reason),))


def _identity(document: Any) -> ObjectName | None:
    """Who a refused object is, as far as it says so in a usable way."""
    meta = wire.plain(document).get("metadata")
    if not isinstance(meta, dict):
        return None
    name, namespace = meta.get("name"), meta.get("namespace") or "default"
    if not isinstance(name, str) or not isinstance(namespace, str):
        return None
    if not fields.DNS_SUBDOMAIN.fullmatch(name) or not fields.DNS_LABEL.fullmatch(namespace):
        return None
    return ObjectName(sys.intern(namespace), sys.intern(name))


# ----------------------------------------------------------------------------------------------------- Service

_TYPES = tuple(kind.value for kind in ServiceType)
_EXTERNAL_TYPES = (ServiceType.NODE_PORT, ServiceType.LOAD_BALANCER)


def _service(decoded: wire.Service, name: ObjectName, meta: wire.Metadata, faults: Faults) -> Reading:
    spec = decoded.spec or wire.ServiceSpec()
    labels, notes = meta.labels or _NO_LABELS, meta.annotations or _NO_NOTES
    kind = ServiceType(fields.choice(spec.type, _TYPES, "spec.type", faults))
    headless = kind is not ServiceType.EXTERNAL_NAME and "None" in (spec.cluster_ip, *(spec.cluster_ips or ())[:1])
    cluster_ips: tuple[Address, ...] = ()
    if not headless and kind is not ServiceType.EXTERNAL_NAME:
        cluster_ips = _cluster_ips(spec, faults)
    external_name = ""
    if kind is ServiceType.EXTERNAL_NAME:
        target = (spec.external_name or "").rstrip(".").lower()
        external_name = fields.name(target, "spec.externalName", faults, fields.DNS_SUBDOMAIN)
    ports = _service_ports(spec.ports, faults)
    if not ports and not headless and kind is not ServiceType.EXTERNAL_NAME and not faults.refused:
        faults.refuse("spec.ports", "required")
    external_ips = fields.addresses(spec.external_ips, "spec.externalIPs", faults)
    affinity = 0
    if fields.choice(spec.session_affinity, ("None", "ClientIP"), "spec.sessionAffinity", faults) == "ClientIP":
        config = (spec.affinity_config or wire.AffinityConfig()).client_ip or wire.ClientIP()
        at = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
        affinity = fields.number(config.timeout_seconds, 1, fields.DAY, at, faults, 10_800)
    policies = ("Cluster", "Local")
    internal = fields.choice(spec.internal_policy, policies, "spec.internalTrafficPolicy", faults)
    external = fields.choice(spec.external_policy, policies, "spec.externalTrafficPolicy", faults)
    reachable = kind in _EXTERNAL_TYPES or (kind is ServiceType.CLUSTER_IP and bool(external_ips))
    external_local = external == "Local" and reachable
    check = fields.number(spec.health_check_node_port, 0, 65535, "spec.healthCheckNodePort", faults, 0)
    scheduler_key = "dataplane.io/scheduler" if notes.scheduler else "kube-router.io/service.scheduler"
    scheduler = notes.scheduler or notes.kube_router_scheduler
    noted = "metadata.annotations.dataplane.io/"
    value = Service(
        name=name,
        type=kind,
        cluster_ips=cluster_ips,
        ports=ports,
        headless=headless,
        external_ips=external_ips,
        load_balancer_ips=_load_balancer_ips(decoded.status, faults),
        source_ranges=fields.source_ranges(spec.source_ranges, "spec.loadBalancerSourceRanges", faults),
        affinity_seconds=affinity,
        internal_local=internal == "Local",
        external_local=external_local,
        health_check_node_port=check if kind is ServiceType.LOAD_BALANCER and external_local else 0,
        external_name=external_name,
        publish_not_ready=bool(spec.publish_not_ready),
        # The label's mere presence hands the Service over, as kube-proxy's selector has it.
        other_proxy="" if labels.service_proxy_name is None else printable(labels.service_proxy_name, 63) or '""',
        created=fields.timestamp(meta.creation_timestamp, "metadata.creationTimestamp", faults),
        scheduler=fields.scheduler(scheduler, f"metadata.annotations.{scheduler_key}", faults),
        scheduler_flags=fields.scheduler_flags(notes.scheduler_flags, f"{noted}scheduler-flags", faults),
        drain_seconds=fields.drain_seconds(notes.drain_seconds, f"{noted}drain-seconds", faults),
    )
    weights = fields.weights(notes.weights, f"{noted}weights", faults)
    return Reading("Service", name, None if faults.refused else value, tuple(faults), weights)


def _cluster_ips(spec: wire.ServiceSpec, faults: Faults) -> tuple[Address, ...]:
    given = [("spec.clusterIP", spec.cluster_ip)] if spec.cluster_ip else []
    if spec.cluster_ips:
        given = [(f"spec.clusterIPs[{index}]", text) for index, text in enumerate(spec.cluster_ips)]
        if spec.cluster_ip and spec.cluster_ip != spec.cluster_ips[0]:
            faults.refuse("spec.clusterIPs[0]", f"{shown(spec.cluster_ips[0])} is not spec.clusterIP")
    if len(given) > 2:
        faults.refuse("spec.clusterIPs", f"{len(given)} addresses; at most one of each family")
        return ()
    found: list[Address] = []
    for field, text in given:
        packed, reason = fields.address_fault(text)
        if packed is None:
            faults.refuse(field, reason)
        elif found and len(found[0]) == len(packed):
            faults.refuse(field, f"{shown(text)} is a second address of the same family")
        else:
            found.append(packed)
    return tuple(found)


def _service_ports(given: list[wire.Port] | None, faults: Faults) -> tuple[ServicePort, ...]:
    found: list[ServicePort] = []
    names: dict[str, int] = {}
    numbers: dict[tuple[int, int], int] = {}
    node_ports: dict[tuple[int, int], int] = {}
    for index, port in enumerate(given or ()):
        at = f"spec.ports[{index}]"
        protocol = fields.protocol(port.protocol, f"{at}.protocol", faults)
        label = fields.name(port.name, f"{at}.name", faults) if port.name else ""
        number = fields.number(port.port, 1, 65535, f"{at}.port", faults)
        node_port = fields.number(port.node_port, 0, 65535, f"{at}.nodePort", faults, 0)
        first = names.setdefault(label, index)
        if first != index:
            what = f"{shown(label)} names spec.ports[{first}] already" if label else "required with several ports"
            faults.refuse(f"{at}.name", what)
        first = numbers.setdefault((protocol, number), index)
        if first != index:
            faults.refuse(f"{at}.port", f"{protocol.name} {number} is spec.ports[{first}] already")
        first = node_ports.setdefault((protocol, node_port), index) if node_port else index
        if first != index:
            faults.refuse(f"{at}.nodePort", f"{protocol.name} {node_port} is spec.ports[{first}] already")
        found.append(ServicePort(label, protocol, number, node_port))
    return _shared(tuple(found))


def _load_balancer_ips(status: wire.ServiceStatus | None, faults: Faults) -> tuple[Address, ...]:
    ingress = ((status or wire.ServiceStatus()).load_balancer or wire.LoadBalancer()).ingress
    found: dict[Address, None] = {}
    for index, entry in enumerate(ingress or ()):
        if entry.ip and entry.ip_mode in (None, "VIP"):
            packed, reason = fields.address_fault(entry.ip)
            if packed is None:
                at = f"status.loadBalancer.ingress[{index}].ip"
                faults.note(at, f"{reason}; this address is left out")
            else:
                found[packed] = None
    return tuple(found)


# ------------------------------------------------------------------------------------- EndpointSlice, Endpoints


def _slice(decoded: wire.EndpointSlice, name: ObjectName, meta: wire.Metadata, faults: Faults) -> Reading | None:
    labels, notes = meta.labels or _NO_LABELS, meta.annotations or _NO_NOTES
    if decoded.address_type == "FQDN":
        return None
    families = {"IPv4": Family.IPV4, "IPv6": Family.IPV6}
    if not decoded.address_type:
        faults.refuse("addressType", "required")
    elif decoded.address_type not in families:
        faults.refuse("addressType", f"{shown(decoded.address_type)} is none of IPv4, IPv6, FQDN")
    family = families.get(decoded.address_type or "", Family.IPV4)
    owner = fields.name(labels.service_name, "metadata.labels.kubernetes.io/service-name", faults)
    weights = fields.weights(notes.weights, "metadata.annotations.dataplane.io/weights", faults)
    own = dict(weights)
    found: list[Endpoint] = []
    for index, endpoint in enumerate(decoded.endpoints or ()):
        at = f"endpoints[{index}]"
        if not endpoint.addresses:
            faults.note(f"{at}.addresses", "required; this endpoint is left out")
            continue
        packed = _endpoint_address(endpoint.addresses[0], at, "addresses[0]", faults, family)
        if packed is None:
            continue
        state = endpoint.conditions or _NO_CONDITIONS
        ready = state.ready is not False
        hints = endpoint.hints or _NO_HINTS
        found.append(
            Endpoint(
                address=packed,
                ready=ready,
                serving=state.serving is not False,
                terminating=bool(state.terminating),
                node=fields.word(endpoint.node_name, at, "nodeName", faults),
                zone=fields.word(endpoint.zone, at, "zone", faults),
                zone_hints=_hints(hints.for_zones, f"{at}.hints.forZones", faults) if hints.for_zones else (),
                node_hints=_hints(hints.for_nodes, f"{at}.hints.forNodes", faults) if hints.for_nodes else (),
                hostname=fields.word(endpoint.hostname, at, "hostname", faults, fields.DNS_LABEL),
                weight=own.get(packed, 1),
            )
        )
    ports = _endpoint_ports(decoded.ports, "ports", faults)
    if faults.refused:
        return Reading("EndpointSlice", name, None, tuple(faults))
    value = EndpointSlice(name, ObjectName(name.namespace, owner), family, ports, tuple(found))
    return Reading("EndpointSlice", name, (value,), tuple(faults), weights, labels.headless is not None)


def _endpoints(decoded: wire.Endpoints, name: ObjectName, meta: wire.Metadata, faults: Faults) -> Reading | None:
    """v1 Endpoints as slices, one per subset and family, as the mirroring controller would make them."""
    labels, notes = meta.labels or _NO_LABELS, meta.annotations or _NO_NOTES
    if "true" in (labels.skip_mirror, notes.skip_mirror) or notes.leader is not None:
        return None
    weights = fields.weights(notes.weights, "metadata.annotations.dataplane.io/weights", faults)
    own = dict(weights)
    slices: list[EndpointSlice] = []
    for index, subset in enumerate(decoded.subsets or ()):
        at = f"subsets[{index}]"
        ports = _endpoint_ports(subset.ports, f"{at}.ports", faults)
        found: dict[Family, list[Endpoint]] = {}
        for ready, key, group in (
            (True, "addresses", subset.addresses),
            (False, "notReadyAddresses", subset.not_ready_addresses),
        ):
            for place, entry in enumerate(group or ()):
                here = f"{at}.{key}[{place}]"
                packed = _endpoint_address(entry.ip, here, "ip", faults)
                if packed is None:
                    continue
                endpoint = Endpoint(
                    address=packed,
                    ready=ready,
                    serving=ready,
                    node=fields.word(entry.node_name, here, "nodeName", faults),
                    hostname=fields.word(entry.hostname, here, "hostname", faults, fields.DNS_LABEL),
                    weight=own.get(packed, 1),
                )
                found.setdefault(family_of(packed), []).append(endpoint)
        for family, members in found.items():
            made = ObjectName(name.namespace, f"{name.name}-{index}-{'ipv4' if family is Family.IPV4 else 'ipv6'}")
            slices.append(EndpointSlice(made, name, family, ports, tuple(members)))
    value = None if faults.refused else tuple(slices)
    return Reading("Endpoints", name, value, tuple(faults), weights, labels.headless is not None)


def _endpoint_address(
    text: str | None, place: str, leaf: str, faults: Faults, family: Family | None = None
) -> Address | None:
    packed, reason = fields.address_fault(text) if text else (None, "required")
    if packed is not None:
        if family is None or family_of(packed) is family:
            return packed
        reason = f"{shown(text)} is not of the slice's addressType"
    faults.note(f"{place}.{leaf}", f"{reason}; this endpoint is left out")
    return None


def _endpoint_ports(given: list[wire.Port] | None, at: str, faults: Faults) -> tuple[EndpointPort, ...]:
    found: list[EndpointPort] = []
    for index, port in enumerate(given or ()):
        if not port.port:
            continue
        number = fields.number(port.port, 1, 65535, f"{at}[{index}].port", faults)
        protocol = fields.protocol(port.protocol, f"{at}[{index}].protocol", faults)
        label = fields.name(port.name, f"{at}[{index}].name", faults) if port.name else ""
        found.append(EndpointPort(label, protocol, number))
    return _shared(tuple(found))


def _hints(given: list[wire.Hint], at: str, faults: Faults) -> tuple[str, ...]:
    named = (fields.word(hint.name, f"{at}[{index}]", "name", faults) for index, hint in enumerate(given))
    return _shared(tuple(filter(None, named)))


_Reader = Callable[[Any, ObjectName, wire.Metadata, Faults], Reading | None]
_READERS: dict[str, tuple[type[Struct], _Reader]] = {
    "Service": (wire.Service, _service),
    "EndpointSlice": (wire.EndpointSlice, _slice),
    "Endpoints": (wire.Endpoints, _endpoints),
}


# -------------------------------------------------------------------------------------------------------- view


def service_view(
    service: Reading | None, slices: Iterable[Reading], mirrored: Reading | None = None
) -> ServiceView | None:
    """All that was read of one Service, put together; None when nothing is left of it.

    `slices` are the readings of its EndpointSlices; `mirrored` that of the v1 Endpoints of its name, which counts
    only when there are no slices. Slices labelled headless belong to a headless Service alone (a slice that outlived
    the change of its Service must not serve the proxy). Weights of the Service fill in where a slice says nothing.
    """
    owner = service.value if service is not None and isinstance(service.value, Service) else None
    chosen = list(slices) or ([mirrored] if mirrored is not None else [])
    found: list[EndpointSlice] = []
    for reading in chosen:
        if not isinstance(reading.value, tuple) or (reading.headless and owner is not None and not owner.headless):
            continue
        if service is not None and service.weights:
            found.extend(_weighted(part, dict(service.weights), dict(reading.weights)) for part in reading.value)
        else:
            found.extend(reading.value)
    if owner is None and not found:
        return None
    if len(found) > 1:
        found.sort(key=lambda part: (part.name, part.family))
    return ServiceView(owner, tuple(found))


def _weighted(given: EndpointSlice, weights: dict[Address, int], own: dict[Address, int]) -> EndpointSlice:
    return replace(
        given,
        endpoints=tuple(
            endpoint
            if endpoint.address in own or endpoint.address not in weights
            else replace(endpoint, weight=weights[endpoint.address])
            for endpoint in given.endpoints
        ),
    )
