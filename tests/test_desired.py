"""desired.py as a table: a Service and its endpoints in, virtual servers out (kube-proxy: topology.go)."""

from typing import Any

import pytest
from msgspec.structs import replace

from dataplane.desired import Desired, HealthCheck, Rules, virtual_servers
from dataplane.model import (
    EndpointSlice,
    Family,
    Protocol,
    ServicePort,
    ServiceType,
    ServiceView,
    format_address,
    parse_address,
    parse_network,
)

from .words import at, endpoints, hostnames, name, service, shown, update, view

NODE = Rules(
    node_name="here",
    zone="z1",
    node_addresses=(parse_address("192.168.0.2"), parse_address("192.168.1.2")),
    external_ip_ranges=(parse_network("192.0.2.0/24"), parse_network("fd00::/8")),
)
WEB = "default/web 10.0.0.1 http:80/TCP"
LB_CLIENTS = "1.2.3.4/32+192.168.0.0/24+203.0.113.0/25"
WEB_PORT_TEXT = "default/web 10.0.0.1"
WEB_PORT = service(
    WEB_PORT_TEXT, type=ServiceType.NODE_PORT, ports=(ServicePort("http", Protocol.TCP, 80, node_port=30080),)
)


def web(*lines: str, slice_name: str = "") -> EndpointSlice:
    return endpoints("default/web", "http:8080/TCP", *lines, slice_name=slice_name)


CASES: dict[str, tuple[ServiceView, list[str]]] = {
    "the tutorial's Service": (
        hostnames("10.244.3.6", "10.244.1.7", "10.244.2.3"),
        [
            "TCP 10.0.1.175:80 rr label=default/hostnames -> "
            + ", ".join(f"{pod}:9376 here" for pod in ("10.244.1.7", "10.244.2.3", "10.244.3.6"))
        ],
    ),
    "an endpoint of another node cannot meet itself here": (
        view(service(WEB), web("10.1.0.1 node=here", "10.1.0.2 node=there")),
        ["TCP 10.0.0.1:80 rr label=default/web:http -> 10.1.0.1:8080 here, 10.1.0.2:8080"],
    ),
    "no endpoints: a server that refuses": (view(service(WEB)), ["TCP 10.0.0.1:80 rr label=default/web:http"]),
    "unready endpoints are never used": (
        view(service(WEB), web("10.1.0.1 node=x unready", "10.1.0.2 node=x gone")),
        ["TCP 10.0.0.1:80 rr label=default/web:http"],
    ),
    "serving terminating endpoints only when nothing is ready": (
        view(service(WEB), web("10.1.0.1 node=x terminating", "10.1.0.2 node=x unready")),
        ["TCP 10.0.0.1:80 rr label=default/web:http -> 10.1.0.1:8080"],
    ),
    "a ready endpoint ends the fallback": (
        view(service(WEB), web("10.1.0.1 node=x terminating", "10.1.0.2 node=x")),
        ["TCP 10.0.0.1:80 rr label=default/web:http -> 10.1.0.2:8080"],
    ),
    "port names join, numbers do not": (
        view(
            service("default/web 10.0.0.1 http:80/TCP"), endpoints("default/web", "metrics:80/TCP", "10.1.0.1 node=x")
        ),
        ["TCP 10.0.0.1:80 rr label=default/web:http"],
    ),
    "protocols join too": (
        view(
            service("default/dns 10.0.0.10 dns:53/UDP dns:53/TCP"),
            endpoints("default/dns", "dns:5353/UDP dns:5300/TCP", "10.1.0.1 node=x"),
        ),
        [
            "UDP 10.0.0.10:53 rr label=default/dns:dns -> 10.1.0.1:5353",
            "TCP 10.0.0.10:53 rr label=default/dns:dns -> 10.1.0.1:5300",
        ],
    ),
    "target ports may differ between slices": (
        view(
            service(WEB),
            web("10.1.0.1 node=x", slice_name="a"),
            endpoints("default/web", "http:9090/TCP", "10.1.0.2 node=x", slice_name="b"),
        ),
        ["TCP 10.0.0.1:80 rr label=default/web:http -> 10.1.0.1:8080, 10.1.0.2:9090"],
    ),
    "an endpoint in two slices counts once": (
        view(service(WEB), web("10.1.0.1 node=x", slice_name="a"), web("10.1.0.1 node=x", slice_name="b")),
        ["TCP 10.0.0.1:80 rr label=default/web:http -> 10.1.0.1:8080"],
    ),
    "of two with one address the running one counts": (
        view(service(WEB), web("10.1.0.1 node=x", slice_name="a"), web("10.1.0.1 node=x gone", slice_name="b")),
        ["TCP 10.0.0.1:80 rr label=default/web:http -> 10.1.0.1:8080"],
    ),
    "each family gets its own endpoints": (
        view(
            service("default/web 10.0.0.1 fd00::1 http:80/TCP"),
            web("10.1.0.1 node=x"),
            web("fd00:1::1 node=x"),
        ),
        [
            "TCP 10.0.0.1:80 rr label=default/web:http -> 10.1.0.1:8080",
            "TCP [fd00::1]:80 rr label=default/web:http -> [fd00:1::1]:8080",
        ],
    ),
    "affinity": (
        view(service(WEB, affinity_seconds=10800), web("10.1.0.1 node=x")),
        ["TCP 10.0.0.1:80 rr sticky=10800 label=default/web:http -> 10.1.0.1:8080"],
    ),
    "a scheduler and its flags by annotation, weights too": (
        view(service(WEB, scheduler="mh", scheduler_flags=0x10), web("10.1.0.1 node=x w3", "10.1.0.2 node=x w0")),
        ["TCP 10.0.0.1:80 mh flags=10 label=default/web:http -> 10.1.0.1:8080 w3, 10.1.0.2:8080 w0"],
    ),
    "internal policy Local: endpoints of this node": (
        view(service(WEB, internal_local=True), web("10.1.0.1 node=here", "10.1.0.2 node=there")),
        ["TCP 10.0.0.1:80 rr label=default/web:http -> 10.1.0.1:8080 here"],
    ),
    "internal policy Local, endpoints only elsewhere: silence": (
        view(service(WEB, internal_local=True), web("10.1.0.2 node=there")),
        ["TCP 10.0.0.1:80 rr drop label=default/web:http"],
    ),
    "internal policy Local, no endpoint anywhere: refused": (
        view(service(WEB, internal_local=True), web("10.1.0.2 node=there gone")),
        ["TCP 10.0.0.1:80 rr label=default/web:http"],
    ),
    "the local list has a fallback of its own": (
        view(service(WEB, internal_local=True), web("10.1.0.1 node=here terminating", "10.1.0.2 node=there")),
        ["TCP 10.0.0.1:80 rr label=default/web:http -> 10.1.0.1:8080 here"],
    ),
    "zone hints": (
        view(service(WEB), web("10.1.0.1 node=x zone-hint=z1", "10.1.0.2 node=x zone-hint=z2")),
        ["TCP 10.0.0.1:80 rr label=default/web:http -> 10.1.0.1:8080"],
    ),
    "one missing zone hint switches hints off": (
        view(service(WEB), web("10.1.0.1 node=x zone-hint=z1", "10.1.0.2 node=x")),
        ["TCP 10.0.0.1:80 rr label=default/web:http -> 10.1.0.1:8080, 10.1.0.2:8080"],
    ),
    "hints that never mean us switch hints off": (
        view(service(WEB), web("10.1.0.1 node=x zone-hint=z3", "10.1.0.2 node=x zone-hint=z2")),
        ["TCP 10.0.0.1:80 rr label=default/web:http -> 10.1.0.1:8080, 10.1.0.2:8080"],
    ),
    "node hints come before zone hints": (
        view(
            service(WEB),
            web("10.1.0.1 node=x zone-hint=z1 node-hint=there", "10.1.0.2 node=x zone-hint=z2 node-hint=here"),
        ),
        ["TCP 10.0.0.1:80 rr label=default/web:http -> 10.1.0.2:8080"],
    ),
    "hints count among ready endpoints only": (
        view(service(WEB), web("10.1.0.1 node=x zone-hint=z1", "10.1.0.2 node=x unready")),
        ["TCP 10.0.0.1:80 rr label=default/web:http -> 10.1.0.1:8080"],
    ),
    "a node port, at every address of the node": (
        view(WEB_PORT, web("10.1.0.1 node=x")),
        [
            "TCP 10.0.0.1:80 rr label=default/web:http -> 10.1.0.1:8080",
            "TCP 192.168.0.2:30080 rr NodePort always label=default/web:http -> 10.1.0.1:8080",
            "TCP 192.168.1.2:30080 rr NodePort always label=default/web:http -> 10.1.0.1:8080",
        ],
    ),
    "addresses of a load balancer, and who may come": (
        view(
            service(
                WEB,
                type=ServiceType.LOAD_BALANCER,
                load_balancer_ips=(parse_address("1.2.3.4"), parse_address("fd00:9::1")),
                source_ranges=(parse_network("203.0.113.0/25"), parse_network("192.168.0.0/24")),
            ),
            web("10.1.0.1 node=x"),
        ),
        [
            "TCP 10.0.0.1:80 rr label=default/web:http -> 10.1.0.1:8080",
            f"TCP 1.2.3.4:80 rr LoadBalancer always from={LB_CLIENTS} label=default/web:http -> 10.1.0.1:8080",
        ],
    ),
    "a range of everything filters nobody": (
        view(
            service(
                WEB,
                type=ServiceType.LOAD_BALANCER,
                load_balancer_ips=(parse_address("1.2.3.4"),),
                source_ranges=(parse_network("203.0.113.0/25"), parse_network("0.0.0.0/0")),
            )
        ),
        ["TCP 10.0.0.1:80 rr label=default/web:http", "TCP 1.2.3.4:80 rr LoadBalancer always label=default/web:http"],
    ),
    "external policy Local: outside the endpoints of this node, inside all": (
        view(
            service(WEB_PORT_TEXT, type=ServiceType.NODE_PORT, ports=WEB_PORT.ports, external_local=True),
            web("10.1.0.1 node=here", "10.1.0.2 node=there"),
        ),
        [
            "TCP 10.0.0.1:80 rr label=default/web:http -> 10.1.0.1:8080 here, 10.1.0.2:8080",
            *(
                f"TCP {node}:30080{words} label=default/web:http -> {reals}"
                for node in ("192.168.0.2", "192.168.1.2")
                for words, reals in (
                    (" rr NodePort node", "10.1.0.1:8080 here"),
                    (" (inside) rr NodePort node", "10.1.0.1:8080 here, 10.1.0.2:8080"),
                )
            ),
        ],
    ),
    "external policy Local, endpoints only elsewhere: silence outside": (
        view(service(WEB, external_ips=(parse_address("192.0.2.7"),), external_local=True), web("10.1.0.2 node=there")),
        [
            "TCP 10.0.0.1:80 rr label=default/web:http -> 10.1.0.2:8080",
            "TCP 192.0.2.7:80 rr ExternalIP node drop label=default/web:http",
            "TCP 192.0.2.7:80 (inside) rr ExternalIP node label=default/web:http -> 10.1.0.2:8080",
        ],
    ),
    "external policy Local where all endpoints are here needs no second server": (
        view(service(WEB, external_ips=(parse_address("192.0.2.7"),), external_local=True), web("10.1.0.1 node=here")),
        [
            "TCP 10.0.0.1:80 rr label=default/web:http -> 10.1.0.1:8080 here",
            "TCP 192.0.2.7:80 rr ExternalIP node label=default/web:http -> 10.1.0.1:8080 here",
        ],
    ),
    "external addresses of a family without a cluster IP are not served": (
        view(service(WEB, external_ips=(parse_address("fd00:8::1"),))),
        ["TCP 10.0.0.1:80 rr label=default/web:http"],
    ),
    "headless": (view(service("default/web :80/TCP", headless=True), web("10.1.0.1")), []),
    "no address yet": (view(service("default/web http:80/TCP"), web("10.1.0.1")), []),
    "ExternalName": (view(service(WEB, type=ServiceType.EXTERNAL_NAME), web("10.1.0.1")), []),
    "another proxy's": (view(service(WEB, other_proxy="cilium"), web("10.1.0.1")), []),
    "slices without a Service": (view(None, web("10.1.0.1")), []),
}


@pytest.mark.parametrize("case", CASES)
def test_virtual_servers(case: str) -> None:
    given, expected = CASES[case]
    assert [shown(one) for one in virtual_servers(given, NODE)] == expected


def test_external_ips_need_leave() -> None:
    desired = Desired(Rules())
    desired.update(update(web=view(service(WEB, external_ips=(parse_address("192.0.2.7"), parse_address("10.9.9.9"))))))
    assert [shown(one) for one in desired.servers.values()] == ["TCP 10.0.0.1:80 rr label=default/web:http"]
    (problem,) = desired.refusals
    assert (problem.object, problem.field) == ("Service default/web", "spec.externalIPs")
    assert problem.reason == "192.0.2.7, 10.9.9.9: not among the allowed external IPs (externalIPRanges)"
    touched = desired.renew(Rules(external_ip_ranges=(parse_network("192.0.2.0/24"),)))
    assert at("TCP 192.0.2.7:80") in touched


def test_node_ports_follow_the_nodes_addresses() -> None:
    desired = Desired(NODE)
    desired.update(update(web=view(WEB_PORT), hostnames=hostnames()))
    fewer = replace(NODE, node_addresses=NODE.node_addresses[:1])
    assert desired.renew(fewer) == {at(f"TCP {each}") for each in ("10.0.0.1:80", "192.168.0.2:30080")} | {
        at("TCP 192.168.1.2:30080")
    }
    assert at("TCP 192.168.1.2:30080") not in desired.servers
    assert desired.renew(fewer) == set()


@pytest.mark.parametrize(
    ("rules", "served"),
    [
        ({}, "192.168.0.2 192.168.1.2"),
        ({"node_port_ranges": (parse_network("192.168.1.0/24"),)}, "192.168.1.2"),
        ({"node_port_ranges": (parse_network("fd00::/8"),)}, "192.168.0.2 192.168.1.2"),
        ({"node_port_ranges": (parse_network("127.0.0.0/8"),)}, ""),
        ({"primary_node_ports": True}, "192.168.0.2"),
        (
            {"primary_node_ports": True, "node_port_ranges": (parse_network("192.168.1.0/24"),)},
            "192.168.0.2 192.168.1.2",
        ),
        ({"primary_node_ports": True, "node_ips": (parse_address("192.168.1.2"),)}, "192.168.1.2"),
    ],
)
def test_which_addresses_serve_node_ports(rules: dict[str, Any], served: str) -> None:
    found = replace(NODE, **rules).node_port_addresses(Family.IPV4)
    assert " ".join(map(format_address, found)) == served


def test_two_services_with_one_node_port() -> None:
    desired = Desired(NODE)
    old = view(replace(WEB_PORT, created="2026-01-01T00:00:00Z"), web("10.1.0.1 node=there"))
    young = view(
        service("default/young 10.0.0.9 :80/TCP", type=ServiceType.NODE_PORT, external_local=True), web("10.1.0.1")
    )
    port = replace(young.service.ports[0], node_port=30080) if young.service else None
    assert young.service is not None
    young = view(
        replace(young.service, ports=(port,)),
        endpoints("default/young", ":1/TCP", "10.1.0.5 node=there"),
    )
    desired.update(update(young=young))
    assert at("TCP 192.168.0.2:30080 (inside)") in desired.servers
    desired.update(update(web=old))
    assert at("TCP 192.168.0.2:30080 (inside)") not in desired.servers
    assert {problem.field for problem in desired.conflicts} == {"spec.ports[].nodePort"}
    desired.update(update(web=None))
    assert at("TCP 192.168.0.2:30080 (inside)") in desired.servers


def test_health_checks_count_addresses_of_ready_endpoints_here() -> None:
    desired = Desired(NODE)
    one = service(WEB, type=ServiceType.LOAD_BALANCER, external_local=True, health_check_node_port=32000)
    here = web("10.1.0.1 node=here", "10.1.0.2 node=here terminating", "10.1.0.3 node=there")
    desired.update(update(web=view(one, here, web("fd00::1 node=here"))))
    assert desired.health_checks == {name("default/web"): HealthCheck(32000, 1, 1)}
    desired.update(update(web=None))
    assert desired.health_checks == {}


def test_an_update_touches_only_what_it_names() -> None:
    desired = Desired(NODE)
    desired.update(update(web=view(service(WEB), web("10.1.0.1")), hostnames=hostnames("10.244.1.7")))
    assert desired.update(update(web=view(service(WEB), web("10.1.0.2")))) == {at("TCP 10.0.0.1:80")}
    assert set(desired.servers) == {at("TCP 10.0.0.1:80"), at("TCP 10.0.1.175:80")}


def test_a_port_that_moves_leaves_its_old_address() -> None:
    desired = Desired(NODE)
    desired.update(update(web=view(service(WEB))))
    moved = desired.update(update(web=view(service("default/web 10.0.0.1 http:81/TCP"))))
    assert moved == {at("TCP 10.0.0.1:80"), at("TCP 10.0.0.1:81")}
    assert set(desired.servers) == {at("TCP 10.0.0.1:81")}


def test_the_older_of_two_services_has_the_address_and_the_other_is_named() -> None:
    desired = Desired(NODE)
    young = view(service("default/young 10.0.0.1 :80/TCP", created="2026-02-01T00:00:00Z"))
    old = view(service("default/old 10.0.0.1 :80/TCP", created="2026-01-01T00:00:00Z"))
    desired.update(update(young=young))
    desired.update(update(old=old))
    assert desired.servers[at("TCP 10.0.0.1:80")].label == "default/old"
    assert [str(problem) for problem in desired.conflicts] == [
        "services: Service default/young: spec.clusterIP: TCP 10.0.0.1:80 belongs to Service default/old"
    ]
    desired.update(update(old=None))
    assert desired.servers[at("TCP 10.0.0.1:80")].label == "default/young"
    assert desired.conflicts == ()


def test_one_address_may_have_many_ports_of_many_protocols() -> None:
    desired = Desired(NODE)
    desired.update(update(dns=view(service("default/dns 10.0.0.10 a:53/UDP b:53/TCP c:53/SCTP"))))
    assert [str(key) for key in sorted(desired.servers)] == [
        "TCP 10.0.0.10:53",
        "UDP 10.0.0.10:53",
        "SCTP 10.0.0.10:53",
    ]


def test_drain_seconds_are_the_services_own_or_the_nodes() -> None:
    desired = Desired(Rules(drain_seconds=60))
    desired.update(update(web=view(service(WEB, drain_seconds=5)), hostnames=hostnames()))
    assert desired.drain_seconds(at("TCP 10.0.0.1:80")) == 5
    assert desired.drain_seconds(at("TCP 10.0.1.175:80")) == 60
