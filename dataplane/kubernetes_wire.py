"""The fields of Kubernetes objects that this program reads, as they are spelled on the wire; nothing else is decoded.

Sources: core/v1 types.go (Service, Endpoints), discovery/v1 types.go (EndpointSlice), the annotations of
`kubernetes_objects`. Kubernetes means the same by `null` and by an absent field, so every field may be None. Unknown
fields are skipped without building a value. Labels and annotations are structs, not dictionaries: the few keys we
know cost nothing, the many we do not know cost nothing either.
"""

import re
from typing import Any, TypeVar

import msgspec
from msgspec import Raw, Struct

from dataplane.printable import printable, shown


class Labels(
    Struct,
    gc=False,
    rename={
        "service_name": "kubernetes.io/service-name",
        "service_proxy_name": "service.kubernetes.io/service-proxy-name",
        "headless": "service.kubernetes.io/headless",
        "skip_mirror": "endpointslice.kubernetes.io/skip-mirror",
    },
):
    """`metadata.labels`. `headless` and `skip_mirror` count by being there or by being "true"."""

    service_name: str | None = None
    service_proxy_name: str | None = None
    headless: str | None = None
    skip_mirror: str | None = None


class Annotations(
    Struct,
    gc=False,
    rename={
        "scheduler": "dataplane.io/scheduler",
        "kube_router_scheduler": "kube-router.io/service.scheduler",
        "scheduler_flags": "dataplane.io/scheduler-flags",
        "drain_seconds": "dataplane.io/drain-seconds",
        "weights": "dataplane.io/weights",
        "skip_mirror": "endpointslice.kubernetes.io/skip-mirror",
        "leader": "control-plane.alpha.kubernetes.io/leader",
    },
):
    """`metadata.annotations`; what they mean stands in `kubernetes_objects`."""

    scheduler: str | None = None
    kube_router_scheduler: str | None = None
    scheduler_flags: str | None = None
    drain_seconds: str | None = None
    weights: str | None = None
    skip_mirror: str | None = None
    leader: str | None = None


class Metadata(Struct, gc=False, rename="camel"):
    """meta/v1 ObjectMeta."""

    name: str | None = None
    namespace: str | None = None
    labels: Labels | None = None
    annotations: Annotations | None = None
    creation_timestamp: str | None = None


class Port(Struct, gc=False, rename="camel"):
    """core/v1 ServicePort, core/v1 EndpointPort and discovery/v1 EndpointPort: the union of what is read of them."""

    name: str | None = None
    protocol: str | None = None
    port: int | None = None
    node_port: int | None = None


class ClientIP(Struct, gc=False, rename="camel"):
    """core/v1 ClientIPConfig."""

    timeout_seconds: int | None = None


class AffinityConfig(Struct, gc=False, rename={"client_ip": "clientIP"}):
    """core/v1 SessionAffinityConfig."""

    client_ip: ClientIP | None = None


class ServiceSpec(
    Struct,
    gc=False,
    rename={
        "cluster_ip": "clusterIP",
        "cluster_ips": "clusterIPs",
        "external_ips": "externalIPs",
        "external_name": "externalName",
        "session_affinity": "sessionAffinity",
        "affinity_config": "sessionAffinityConfig",
        "internal_policy": "internalTrafficPolicy",
        "external_policy": "externalTrafficPolicy",
        "health_check_node_port": "healthCheckNodePort",
        "source_ranges": "loadBalancerSourceRanges",
        "publish_not_ready": "publishNotReadyAddresses",
    },
):
    """core/v1 ServiceSpec."""

    type: str | None = None
    cluster_ip: str | None = None
    cluster_ips: list[str] | None = None
    external_ips: list[str] | None = None
    external_name: str | None = None
    ports: list[Port] | None = None
    session_affinity: str | None = None
    affinity_config: AffinityConfig | None = None
    internal_policy: str | None = None
    external_policy: str | None = None
    health_check_node_port: int | None = None
    source_ranges: list[str] | None = None
    publish_not_ready: bool | None = None


class Ingress(Struct, gc=False, rename="camel"):
    """core/v1 LoadBalancerIngress."""

    ip: str | None = None
    ip_mode: str | None = None


class LoadBalancer(Struct, gc=False):
    """core/v1 LoadBalancerStatus."""

    ingress: list[Ingress] | None = None


class ServiceStatus(Struct, gc=False, rename="camel"):
    """core/v1 ServiceStatus."""

    load_balancer: LoadBalancer | None = None


class Service(Struct, gc=False):
    """core/v1 Service."""

    metadata: Metadata | None = None
    spec: ServiceSpec | None = None
    status: ServiceStatus | None = None


class Conditions(Struct, gc=False):
    """discovery/v1 EndpointConditions."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class Hint(Struct, gc=False):
    """discovery/v1 ForZone and ForNode."""

    name: str | None = None


class Hints(Struct, gc=False, rename="camel"):
    """discovery/v1 EndpointHints."""

    for_zones: list[Hint] | None = None
    for_nodes: list[Hint] | None = None


class Endpoint(Struct, gc=False, rename="camel"):
    """discovery/v1 Endpoint."""

    addresses: list[str] | None = None
    conditions: Conditions | None = None
    hostname: str | None = None
    node_name: str | None = None
    zone: str | None = None
    hints: Hints | None = None


class EndpointSlice(Struct, gc=False, rename="camel"):
    """discovery/v1 EndpointSlice."""

    metadata: Metadata | None = None
    address_type: str | None = None
    ports: list[Port] | None = None
    endpoints: list[Endpoint] | None = None


class EndpointAddress(Struct, gc=False, rename="camel"):
    """core/v1 EndpointAddress."""

    ip: str | None = None
    hostname: str | None = None
    node_name: str | None = None


class Subset(Struct, gc=False, rename="camel"):
    """core/v1 EndpointSubset."""

    addresses: list[EndpointAddress] | None = None
    not_ready_addresses: list[EndpointAddress] | None = None
    ports: list[Port] | None = None


class Endpoints(Struct, gc=False):
    """core/v1 Endpoints."""

    metadata: Metadata | None = None
    subsets: list[Subset] | None = None


class Head(Struct, gc=False, rename="camel"):
    """What tells one document from another; `items` stay undecoded JSON."""

    api_version: str | None = None
    kind: str | None = None
    items: list[Raw] | None = None


# ------------------------------------------------------------------------------------------------------ decoding

_Shape = TypeVar("_Shape", bound=Struct)
_DECODERS: dict[type[Struct], msgspec.json.Decoder[Any]] = {
    shape: msgspec.json.Decoder(shape) for shape in (Head, Service, EndpointSlice, Endpoints)
}
_WORDS = {"int": "a whole number", "str": "text", "bool": "true or false", "array": "a list", "object": "a mapping"}
_COMPLAINT = re.compile(r"Expected `([a-z]+)(?: \| null)?`, got `([a-z]+)`(?: - at `(.*)`)?", re.DOTALL)
_STEP = re.compile(r"\[(\d+)\]|\.?([^.\[\]]+)")


class FieldError(ValueError):
    """A field holds a value of the wrong type; `field` is its path, `reason` names the value."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


def decode(document: Any, shape: type[_Shape]) -> _Shape:
    """`msgspec.Raw` JSON or decoded data as one of the structs above; FieldError when a type does not fit.

    A Raw that is not JSON raises msgspec.DecodeError, one nested too deeply RecursionError.
    """
    try:
        if isinstance(document, Raw):
            decoded: _Shape = _DECODERS[shape].decode(document)
            return decoded
        return msgspec.convert(document, shape)
    except msgspec.ValidationError as error:
        raise FieldError(*_explained(str(error), document)) from None


def plain(document: Any) -> Any:
    """Raw JSON as plain values; anything else is that already."""
    if not isinstance(document, Raw):
        return document
    # Only error messages need this; a text that would become millions of objects is not worth one.
    return msgspec.json.decode(document) if len(bytes(document)) <= 1 << 20 else {}


def _explained(complaint: str, document: Any) -> tuple[str, str]:
    """msgspec's complaint as (field path, reason), with the offending value where it can be found."""
    found = _COMPLAINT.fullmatch(complaint)
    if not found:
        text, _, place = complaint.partition(" - at `$")
        return printable(place.rstrip("`").lstrip(".")), printable(text)
    path = (found[3] or "$").removeprefix("$").removeprefix(".")
    value, key = plain(document), ""
    for index, name in _STEP.findall(path):
        if index and isinstance(value, list) and int(index) < len(value):
            value = value[int(index)]
        elif isinstance(value, dict):
            # Keys of labels and annotations hold dots themselves.
            key = f"{key}.{name}" if key else name
            if key in value:
                value, key = value[key], ""
    offender = shown(value) if not key else "this"
    hint = " (put it in quotes)" if found[1] == "str" and found[2] in ("int", "float", "bool") else ""
    return printable(path), f"{offender} is not {_WORDS.get(found[1], found[1])}{hint}"


GROUP_VERSIONS = {"Service": "v1", "Endpoints": "v1", "EndpointSlice": "discovery.k8s.io/v1"}
"""The kinds that are read and the only version of each."""
_LISTS = {"v1": {"List": "", "ServiceList": "Service", "EndpointsList": "Endpoints"}} | {
    "discovery.k8s.io/v1": {"EndpointSliceList": "EndpointSlice"}
}


def item_kind(api_version: object, kind: object) -> str | None:
    """Whether a document is a list: the kind its items have when they do not say, "" for any, None for no list."""
    if not isinstance(api_version, str) or not isinstance(kind, str):
        return None
    return _LISTS.get(api_version, {}).get(kind)
