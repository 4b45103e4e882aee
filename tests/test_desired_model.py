"""desired.py against an independent reading of the rules (service_model.py), over random sets of objects."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataplane.desired import Desired, Rules
from dataplane.kubernetes_objects import read_object, service_view
from dataplane.kubernetes_reading import Reading
from dataplane.model import Cluster, ObjectName, Protocol, Update, VirtualAddress, parse_address, parse_network

from .service_model import Model, Node, Object, Packet, Programmed, Verdict, ip, shown

EXAMPLES = int(os.environ.get("DATAPLANE_TEST_EXAMPLES", "0"))
SLOW = settings(max_examples=EXAMPLES or 4000, suppress_health_check=list(HealthCheck), print_blob=True)
QUICK = settings(SLOW, max_examples=EXAMPLES or 100)

SERVICES = (("shop", "web"), ("shop", "dns"), ("tools", "web"))
CLUSTER_IPS = {4: ("10.96.0.1", "10.96.0.2", "010.96.0.03"), 6: ("fd00:96::1", "fd00:96::2")}
EXTERNAL_IPS = ("198.51.100.1", "203.0.113.9", "192.168.0.2", "192.168.1.2", "2001:db8:9::1", "2001:db8::2")
BALANCER_IPS = ("198.51.100.1", "1.2.3.4", "192.168.0.2", "2001:db8:9::1", "2001:db8:4::4")
RANGES = ("10.9.0.0/16", " 192.168.0.0/24 ", "203.0.113.77", "0.0.0.0/0", "::/0", "2001:db8:77::/48", "10.9.9.0/24")
NODES = (
    Node("me", "z1", ("192.168.0.2", "192.168.1.2", "2001:db8::2"), (), ("198.51.100.0/24", "192.168.0.0/24")),
    Node("me", "", ("192.168.0.2", "192.168.1.2"), ("primary",), ("0.0.0.0/0", "::/0"), ("10.244.0.0/16",)),
    Node("", "z1", ("192.168.1.2", "2001:db8::2", "192.168.0.2"), ("192.168.1.0/24",), (), ("10.244.0.0/16",)),
    Node("me", "z2", ("2001:db8::2",), ("primary",), ("2001:db8::/32",)),
    Node("me", "z1", ("192.168.0.2", "2001:db8::2"), ("2001:db8:ffff::/48",), ("::/0",), ("fd00:244::/48",)),
)
CLIENTS = {
    4: (("10.244.0.9", "pod"), ("192.168.0.2", "node"), ("203.0.113.77", "outside"), ("10.9.9.9", "outside"),
        ("198.51.100.1", "outside")),
    6: (("fd00:244::9", "pod"), ("2001:db8::2", "node"), ("2001:db8:77::1", "outside"), ("2001:db8:99::1", "outside"),
        ("2001:db8:9::1", "outside")),
}  # fmt: skip
PORTS = (53, 80, 31000)
PROTOCOLS = (None, "TCP", "UDP", "SCTP")
PODS = {4: ("10.244.0.1", "10.244.0.2", "10.244.1.3", "10.244.1.4"), 6: ("fd00:244::1", "fd00:244::2", "fd00:244::3")}
MAYBE = (None, True, False)


class Draw:
    """Shorter words for hypothesis' draw."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def one(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def some(self, choices: tuple[Any, ...], most: int = 3) -> list[Any]:
        found: list[Any] = self.draw(st.lists(st.sampled_from(choices), max_size=most, unique=True))
        return found

    def number(self, least: int, most: int) -> int:
        found: int = self.draw(st.integers(least, most))
        return found

    def given(self, **values: Any) -> Object:
        """A mapping without what is None, as often as not."""
        return {key: value for key, value in values.items() if value is not None}


def drawn_service(d: Draw, namespace: str, name: str) -> Object:
    families = d.one((4,), (6,), (4, 6), (6, 4))
    addresses = [d.one(*CLUSTER_IPS[each]) for each in families]
    kind = d.one(None, "ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer", "NodePort", "ExternalName")
    ports: list[Object] = []
    taken: set[tuple[str, str, int]] = set()
    for index in range(d.number(1, 3)):
        protocol, number, node_port = d.one(*PROTOCOLS), d.one(*PORTS), d.one(None, 0, 31000, 31001)
        names = ("a", "b", "c")[index] if index or d.one(True, False) else ""
        transport = protocol or "TCP"
        marks = {("port", transport, number)} | ({("node", transport, node_port)} if node_port else set())
        if marks & taken:
            continue
        taken |= marks
        ports.append(d.given(name=names or d.one(None, ""), protocol=protocol, port=number, nodePort=node_port))
    if len(ports) > 1 and not ports[0].get("name"):
        ports[0]["name"] = "x"
    spec = d.given(
        type=kind,
        ports=ports,
        externalIPs=d.one(None, d.some(EXTERNAL_IPS)),
        sessionAffinity=d.one(None, "None", "ClientIP"),
        sessionAffinityConfig=d.one(None, {"clientIP": None}, {"clientIP": {"timeoutSeconds": 60}}),
        internalTrafficPolicy=d.one(None, "Cluster", "Local"),
        externalTrafficPolicy=d.one(None, "Cluster", "Local", "Local"),
        healthCheckNodePort=d.one(None, 0, 32000),
        loadBalancerSourceRanges=d.one(None, None, d.some(RANGES, 2)),
    )
    if kind == "ExternalName":
        spec["externalName"] = "db.example.com"
    match d.number(0, 9):
        case 0:
            spec["clusterIP"] = d.one("None", "")
        case 1 | 2 | 3:
            spec["clusterIP"] = addresses[0]
        case 4:
            spec["clusterIPs"] = addresses
        case _:
            spec |= {"clusterIP": addresses[0], "clusterIPs": addresses}
    meta = d.given(
        namespace=namespace,
        name=name,
        creationTimestamp=d.one(None, "2024-01-01T00:00:00Z", "2025-01-01T00:00:00Z"),
        labels=d.one(None, None, None, {"app": name}, {"service.kubernetes.io/service-proxy-name": d.one("", "mine")}),
    )
    ingress = [
        {"ip": each, **d.given(ipMode=d.one(None, None, "VIP", "Proxy"))} for each in d.some(BALANCER_IPS)
    ] + d.one([], [{"hostname": "lb.example"}])
    service: Object = {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec}
    service |= d.one({}, {"status": {"loadBalancer": {"ingress": ingress}}})
    return service


def drawn_endpoint(d: Draw, version: int) -> Object:
    conditions = d.given(ready=d.one(*MAYBE), serving=d.one(*MAYBE), terminating=d.one(*MAYBE))
    hints = d.given(
        forZones=d.one(None, [{"name": each} for each in d.some(("z1", "z2"), 2)]),
        forNodes=d.one(None, [{"name": each} for each in d.some(("me", "other"), 2)]),
    )
    return d.given(
        addresses=[d.one(*PODS[version]), *d.one([], [PODS[version][0]])],
        conditions=d.one(None, conditions, conditions),
        nodeName=d.one(None, "me", "me", "other"),
        zone=d.one(None, "z1", "z2"),
        hints=d.one(None, hints, hints),
    )


def drawn_slice(d: Draw, number: int) -> Object:
    namespace, name = d.one(*SERVICES)
    version = d.one(4, 4, 6)
    hinted = d.one(None, "forZones", "forNodes")
    endpoints = [drawn_endpoint(d, version) for _ in range(d.number(0, 4))]
    if hinted:  # hints count only where every endpoint has one: chance alone would hardly ever do that
        value = [{"name": "z1" if hinted == "forZones" else "me"}]
        for each in endpoints:
            each["hints"] = {hinted: d.one(value, value, [{"name": "other"}])}
    labels = {"kubernetes.io/service-name": name, **d.one({}, {}, {}, {"service.kubernetes.io/headless": ""})}
    names = (None, "", "a", "b", "x")
    return d.given(
        apiVersion="discovery.k8s.io/v1",
        kind="EndpointSlice",
        metadata={"namespace": namespace, "name": f"{d.one('x', 'y')}{number}", "labels": labels},
        addressType=f"IPv{version}",
        ports=[
            d.given(name=d.one(*names), protocol=d.one(*PROTOCOLS), port=d.one(None, 0, 8080, 9090))
            for _ in range(d.number(0, 4))
        ],
        endpoints=endpoints,
    )


@st.composite
def object_sets(draw: Any) -> tuple[list[Object], list[Object]]:
    d = Draw(draw)
    chosen = d.draw(st.lists(st.sampled_from(SERVICES), min_size=1, max_size=3, unique=True))
    services = [drawn_service(d, *each) for each in chosen]
    return services, [drawn_slice(d, number) for number in range(d.number(0, 4))]


def rules_of(node: Node) -> Rules:
    primary = node.served == ("primary",)
    return Rules(
        node_name=node.name,
        zone=node.zone,
        node_addresses=tuple(map(parse_address, node.addresses)),
        node_port_ranges=() if primary else tuple(map(parse_network, node.served)),
        primary_node_ports=primary,
        external_ip_ranges=tuple(map(parse_network, node.claimable)),
    )


def cluster_of(services: list[Object], slices: list[Object]) -> Cluster:
    """As a source puts it together."""
    read: dict[str, list[Reading]] = {"Service": [], "EndpointSlice": []}
    for one in (*services, *slices):
        reading = read_object(one)
        assert reading is not None
        assert reading.value is not None, (one, reading.faults)
        read[reading.kind].append(reading)
    owned: dict[ObjectName, list[Reading]] = {}
    for reading in read["EndpointSlice"]:
        assert isinstance(reading.value, tuple)
        owned.setdefault(reading.value[0].service, []).append(reading)
    found: Cluster = {}
    by_name = {reading.name: reading for reading in read["Service"] if reading.name}
    for name in (*by_name, *owned):
        view = service_view(by_name.get(name), owned.get(name, ()))
        if view is not None:
            found[name] = view
    return found


def packets(services: list[Object], node: Node) -> Iterator[Packet]:
    """Everything that can be told apart: each address anybody names, each port, each sort of client."""
    addresses = {str(ip(text)) for text in (*EXTERNAL_IPS, *BALANCER_IPS, *node.addresses)}
    addresses |= {"10.96.0.1", "10.96.0.2", "10.96.0.3", *CLUSTER_IPS[6]}
    named = {text for service in services for text in str(service).split("'")}
    for address in sorted(addresses):
        if address not in named and address not in node.addresses and address != "10.96.0.3":
            continue
        for protocol in ("TCP", "UDP", "SCTP"):
            for port in (*PORTS, 31001):
                for source, client in CLIENTS[ip(address).version]:
                    yield Packet(protocol, source, address, port, client)


def agree(services: list[Object], slices: list[Object], node: Node, desired: Desired) -> None:
    model, programmed = Model(node, services, slices), Programmed(desired.servers, bool(node.pods))
    for packet in packets(services, node):
        expected, got = model.verdict(packet), programmed.verdict(packet)
        assert got == expected, packet
    assert {str(name): tuple(check) for name, check in desired.health_checks.items()} == model.health_checks()
    for at in desired.servers:
        to = parse_packet(at)
        assert shown(desired.serving(at)) == model.serving(to), at


def parse_packet(at: VirtualAddress) -> Packet:
    address = str(ip_of(at.address))
    return Packet(Protocol(at.protocol).name, address, address, at.port, "outside")


def ip_of(address: bytes) -> Any:
    import ipaddress

    return ipaddress.ip_address(address)


def check_rules(objects: tuple[list[Object], list[Object]], node: Node) -> None:
    services, slices = objects
    desired = Desired(rules_of(node))
    desired.update(Update(dict(cluster_of(services, slices))))
    agree(services, slices, node, desired)


@QUICK
@given(object_sets(), st.sampled_from(NODES))
def test_every_packet_meets_what_the_rules_say(objects: tuple[list[Object], list[Object]], node: Node) -> None:
    check_rules(objects, node)


@pytest.mark.slow
@SLOW
@given(object_sets(), st.sampled_from(NODES))
def test_every_packet_meets_what_the_rules_say_of_thousands(
    objects: tuple[list[Object], list[Object]], node: Node
) -> None:
    check_rules(objects, node)


History = list[tuple[tuple[list[Object], list[Object]], Node]]


def check_history(history: History) -> None:
    """Whatever the way to a set of objects and to a node: its result is that of starting with them."""
    desired = Desired(rules_of(history[0][1]))
    known: Cluster = {}
    for objects, node in history:
        before = dict(desired.servers)
        touched = desired.renew(rules_of(node))
        cluster = cluster_of(*objects)
        news = {
            name: cluster.get(name) for name in known.keys() | cluster.keys() if known.get(name) != cluster.get(name)
        }
        touched |= desired.update(Update(dict(news)))
        known = cluster
        fresh = Desired(rules_of(node))
        fresh.update(Update(dict(cluster)))
        assert desired.servers == fresh.servers
        assert desired.health_checks == fresh.health_checks
        assert desired.conflicts == fresh.conflicts
        assert desired.refusals == fresh.refusals
        assert desired.no_local_endpoints() == fresh.no_local_endpoints()
        differing = {at for at in before.keys() | fresh.servers.keys() if before.get(at) != fresh.servers.get(at)}
        assert differing <= touched
        agree(*objects, node, desired)


HISTORIES = st.lists(st.tuples(object_sets(), st.sampled_from(NODES)), min_size=2, max_size=4)


@settings(QUICK, max_examples=EXAMPLES or 25)
@given(HISTORIES)
def test_the_way_there_does_not_matter(history: History) -> None:
    check_history(history)


@pytest.mark.slow
@settings(SLOW, max_examples=EXAMPLES or 1000)
@given(HISTORIES)
def test_the_way_there_does_not_matter_of_a_thousand_ways(history: History) -> None:
    check_history(history)


@pytest.mark.parametrize("policy", ["Cluster", "Local"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_node_port_gives_way_to_an_external_address_of_its_service(policy: str, order: int) -> None:
    """192.168.0.2:31000 is both the node port of one port and an external IP of the other."""
    ports = [{"name": "a", "port": 53, "nodePort": 31000}, {"name": "b", "port": 31000, "nodePort": 31001}]
    service: Object = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": "shop", "name": "web"},
        "spec": {
            "type": "NodePort",
            "clusterIP": "10.96.0.1",
            "ports": ports[::order],
            "externalIPs": ["192.168.0.2"],
            "externalTrafficPolicy": policy,
        },
    }
    pods: Object = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"namespace": "shop", "name": "x", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "a", "port": 8080}, {"name": "b", "port": 9090}],
        "endpoints": [{"addresses": ["10.244.0.1"], "nodeName": "other"}],
    }
    check_rules(([service], [pods]), NODES[0])


def test_the_model_tells_what_the_rules_say() -> None:
    """The model itself, by two rows of kube-proxy's table: policy Local with endpoints elsewhere only."""
    service: Object = {
        "metadata": {"namespace": "a", "name": "b"},
        "spec": {
            "type": "LoadBalancer",
            "clusterIP": "10.96.0.1",
            "externalTrafficPolicy": "Local",
            "internalTrafficPolicy": "Local",
            "ports": [{"port": 80}],
        },
        "status": {"loadBalancer": {"ingress": [{"ip": "1.2.3.4"}]}},
    }
    pods: Object = {
        "metadata": {"namespace": "a", "name": "s", "labels": {"kubernetes.io/service-name": "b"}},
        "addressType": "IPv4",
        "ports": [{"name": "", "port": 8080}],
        "endpoints": [{"addresses": ["10.244.0.1"], "nodeName": "other"}],
    }
    model = Model(NODES[0], [service], [pods])
    there = frozenset({"10.244.0.1/8080"})
    assert model.verdict(Packet("TCP", "203.0.113.77", "1.2.3.4", 80, "outside")) == Verdict("drop")
    assert model.verdict(Packet("TCP", "10.244.0.9", "1.2.3.4", 80, "pod")) == Verdict("dnat", there)
    assert model.verdict(Packet("TCP", "192.168.0.2", "1.2.3.4", 80, "node")) == Verdict("dnat", there, True)
    assert model.verdict(Packet("TCP", "10.244.0.9", "10.96.0.1", 80, "pod")) == Verdict("drop")
    assert model.verdict(Packet("TCP", "10.244.0.9", "10.96.0.1", 81, "pod")) == Verdict("reject")
    assert model.verdict(Packet("TCP", "10.244.0.9", "1.2.3.4", 81, "pod")) == Verdict("none")
