"""The same Services for every contender: as model objects, as virtual servers, as ipvsadm's rules, as manifests."""

import json
from pathlib import Path

from msgspec.structs import replace

from dataplane.desired import Rules, virtual_servers
from dataplane.ipvsadm_text import real_rule, server_rule
from dataplane.model import (
    Address,
    Endpoint,
    EndpointPort,
    EndpointSlice,
    Family,
    ObjectName,
    Protocol,
    Service,
    ServicePort,
    ServiceView,
    Update,
    VirtualServer,
    format_address,
)

ENDPOINTS = 3
NODE = "node-0"
MOST_ENDPOINTS = 64
NODES = 64
"""Endpoints are spread over so many nodes, so a few of them are local to NODE, as on a real one."""
RULES = Rules(node_name=NODE)


def vip(number: int) -> Address:
    """The cluster IP of a Service: 10.96.0.0/12."""
    return Address((0x0A600001 + number).to_bytes(4))


def endpoint_address(number: int) -> Address:
    """The address of an endpoint: 10.128.0.0/9, room for spare ones above a million."""
    return Address((0x0A800001 + number).to_bytes(4))


def view(number: int, weights: tuple[int, ...] = (1,) * ENDPOINTS, replaced: int = 0) -> ServiceView:
    """One Service with its endpoints; `replaced` counts how often its first endpoint was replaced by another."""
    name = ObjectName("bench", f"service-{number}")
    port = ServicePort("http", Protocol.TCP, 80)
    numbers = [number * ENDPOINTS + index for index in range(ENDPOINTS)]
    numbers[0] += replaced << 20
    endpoints = tuple(
        Endpoint(endpoint_address(each), node=f"node-{each % NODES}", weight=weight)
        for each, weight in zip(numbers, weights, strict=True)
    )
    ports = (EndpointPort("http", Protocol.TCP, 8080),)
    one = EndpointSlice(ObjectName("bench", f"service-{number}-0"), name, Family.IPV4, ports, endpoints)
    return ServiceView(Service(name, cluster_ips=(vip(number),), ports=(port,)), (one,))


def sized(number: int, endpoints: int, replaced: int = 0) -> ServiceView:
    """The same with any number of endpoints; beyond the usual ones they come from the top of the range."""
    usual = view(number, replaced=replaced)
    (one,) = usual.slices
    more = tuple(
        Endpoint(Address((0x0B000000 + number * MOST_ENDPOINTS + index).to_bytes(4)), node=f"node-{index % NODES}")
        for index in range(ENDPOINTS, endpoints)
    )
    return (
        usual
        if endpoints == ENDPOINTS
        else replace(usual, slices=(replace(one, endpoints=one.endpoints[:endpoints] + more),))
    )


def nodes(number: int) -> set[str]:
    """Where the endpoints of a Service are."""
    return {endpoint.node for one in view(number).slices for endpoint in one.endpoints}


def update(size: int) -> Update:
    """What a source delivers first: all of it."""
    return Update({ObjectName("bench", f"service-{number}"): view(number) for number in range(size)})


def servers(size: int) -> list[VirtualServer]:
    """The virtual servers that these Services become."""
    return [server for number in range(size) for server in virtual_servers(view(number), RULES)]


def ipvsadm_rules(size: int) -> bytes:
    """The same as `ipvsadm -R` reads it."""
    lines = []
    for server in servers(size):
        lines.append(server_rule("-A", server))
        lines += [real_rule("-a", server, real) for real in server.real_servers]
    return "".join(line + "\n" for line in lines).encode()


def write_manifests(size: int, path: Path, *, changed: int = -1) -> None:
    """The same as a JSON List of Services and EndpointSlices; `changed`: one Service with another weight."""
    items: list[dict[str, object]] = []
    for number in range(size):
        one = view(number)
        assert one.service is not None
        name = one.service.name.name
        items.append(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"namespace": "bench", "name": name},
                "spec": {
                    "clusterIP": format_address(one.service.cluster_ips[0]),
                    "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}],
                },
            }
        )
        endpoints = one.slices[0].endpoints[: ENDPOINTS - 1] if number == changed else one.slices[0].endpoints
        items.append(
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "namespace": "bench",
                    "name": one.slices[0].name.name,
                    "labels": {"kubernetes.io/service-name": name},
                },
                "addressType": "IPv4",
                "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
                "endpoints": [
                    {
                        "addresses": [format_address(each.address)],
                        "nodeName": each.node,
                        "conditions": {"ready": True},
                    }
                    for each in endpoints
                ],
            }
        )
    path.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))


def write_yaml(size: int, path: Path) -> None:
    """The same as YAML documents, block style, as people write it."""
    text = []
    for number in range(size):
        one = view(number)
        assert one.service is not None
        name = one.service.name.name
        text.append(
            f"apiVersion: v1\nkind: Service\nmetadata:\n  namespace: bench\n  name: {name}\nspec:\n"
            f"  clusterIP: {format_address(one.service.cluster_ips[0])}\n"
            "  ports:\n  - name: http\n    port: 80\n    protocol: TCP\n    targetPort: 8080\n---\n"
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  namespace: bench\n"
            f"  name: {name}-0\n  labels:\n    kubernetes.io/service-name: {name}\naddressType: IPv4\n"
            "ports:\n- name: http\n  port: 8080\n  protocol: TCP\nendpoints:\n"
        )
        text += [
            f"- addresses: [{format_address(each.address)}]\n  nodeName: {each.node}\n  conditions: {{ready: true}}\n"
            for each in one.slices[0].endpoints
        ]
        text.append("---\n")
    path.write_text("".join(text))
