"""What a Service, an EndpointSlice and Endpoints mean, and what the tool says about bad ones."""

import msgspec
import pytest

from dataplane.kubernetes_objects import read_object, service_view
from dataplane.kubernetes_reading import Reading
from dataplane.model import (
    Endpoint,
    EndpointPort,
    EndpointSlice,
    Family,
    ObjectName,
    Protocol,
    Service,
    ServicePort,
    ServiceType,
    parse_address,
    parse_network,
)
from dataplane.safe_yaml import Budget, Limits, read

SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.10
  ports: [{port: 80}]
"""
SLICE = """
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.244.0.1]}]
"""
ENDPOINTS = """
apiVersion: v1
kind: Endpoints
metadata: {name: web, namespace: shop}
subsets: [{addresses: [{ip: 10.244.0.1}], ports: [{port: 8080}]}]
"""


def reading(text: str) -> Reading | None:
    """The object in a YAML text; the same object as JSON must give the same."""
    (part,) = read(text.encode(), Budget(Limits()))
    found = read_object(part.value)
    assert read_object(msgspec.Raw(msgspec.json.encode(part.value))) == found
    return found


def changed(text: str, *edits: tuple[str, str]) -> Reading:
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    found = reading(text)
    assert found is not None
    return found


def service(*edits: tuple[str, str]) -> Service:
    found = changed(SERVICE, *edits)
    assert isinstance(found.value, Service), found.faults
    return found.value


def slices(text: str, *edits: tuple[str, str]) -> tuple[EndpointSlice, ...]:
    found = changed(text, *edits)
    assert isinstance(found.value, tuple), found.faults
    return found.value


def test_a_small_service() -> None:
    assert service() == Service(
        ObjectName("shop", "web"),
        cluster_ips=(parse_address("10.96.0.10"),),
        ports=(ServicePort("", Protocol.TCP, 80),),
    )


def test_a_service_with_everything() -> None:
    found = reading("""
apiVersion: v1
kind: Service
metadata:
  name: web
  labels: {service.kubernetes.io/service-proxy-name: other, app: x}
  creationTimestamp: 2024-05-01T10:00:00Z
  annotations:
    dataplane.io/scheduler: mh
    kube-router.io/service.scheduler: rr
    dataplane.io/scheduler-flags: mh-port, mh-fallback
    dataplane.io/drain-seconds: 15m
    dataplane.io/weights: 10.244.3.6=3, 10.244.1.7=0
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, "fd00::a"]
  ports:
  - {name: http, port: 80, nodePort: 30080, targetPort: web}
  - {name: dns, port: 53, protocol: UDP}
  externalIPs: [192.0.2.1, 192.0.2.1, 127.0.0.1]
  sessionAffinity: ClientIP
  sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}
  internalTrafficPolicy: Local
  externalTrafficPolicy: Local
  healthCheckNodePort: 32000
  publishNotReadyAddresses: true
  loadBalancerSourceRanges: [" 10.0.0.0/8 ", "::/0", "fd00::/8"]
status: {loadBalancer: {ingress: [{ip: 192.0.2.9}, {ip: 192.0.2.8, ipMode: Proxy}, {hostname: lb.example}]}}
""")
    assert found is not None
    assert found.value == Service(
        ObjectName("default", "web"),
        ServiceType.LOAD_BALANCER,
        cluster_ips=(parse_address("10.96.0.10"), parse_address("fd00::a")),
        ports=(ServicePort("http", Protocol.TCP, 80, 30080), ServicePort("dns", Protocol.UDP, 53)),
        external_ips=(parse_address("192.0.2.1"),),
        load_balancer_ips=(parse_address("192.0.2.9"),),
        source_ranges=(parse_network("10.0.0.0/8"),),
        affinity_seconds=60,
        internal_local=True,
        external_local=True,
        health_check_node_port=32000,
        publish_not_ready=True,
        other_proxy="other",
        created="2024-05-01T10:00:00Z",
        scheduler="mh",
        scheduler_flags=0x18,
        drain_seconds=900,
    )
    assert found.weights == ((parse_address("10.244.3.6"), 3), (parse_address("10.244.1.7"), 0))
    assert found.faults == (
        ("spec.externalIPs[2]", '"127.0.0.1" is a loopback address; this address is left out'),
    )  # fmt: skip


def test_headless_unaddressed_and_external_services_have_no_cluster_ip() -> None:
    assert service(("10.96.0.10", "None")).headless
    assert service(("10.96.0.10", "None"), ("  ports: [{port: 80}]", "")).headless
    unaddressed = service(("10.96.0.10", '""'))
    assert (unaddressed.headless, unaddressed.cluster_ips) == (False, ())
    external = service(("clusterIP: 10.96.0.10", "type: ExternalName\n  externalName: DB.example.org."))
    assert (external.external_name, external.cluster_ips) == ("db.example.org", ())


def test_policy_local_needs_something_that_comes_from_outside() -> None:
    local = ("  ports:", "  externalTrafficPolicy: Local\n  healthCheckNodePort: 31000\n  ports:")
    assert not service(local).external_local
    assert service(local, ("  clusterIP:", "  externalIPs: [192.0.2.1]\n  clusterIP:")).external_local
    assert service(local, ("  clusterIP:", "  type: NodePort\n  clusterIP:")).health_check_node_port == 0
    assert service(local, ("  clusterIP:", "  type: LoadBalancer\n  clusterIP:")).health_check_node_port == 31000


def test_affinity_lasts_three_hours_unless_told_otherwise() -> None:
    assert service(("  ports:", "  sessionAffinity: ClientIP\n  ports:")).affinity_seconds == 10_800


BAD_SERVICES = [
    # what is written instead of what, problem
    ("name: web", "name: Web_1", 'metadata.name: "Web_1" is not a DNS label (a-z, 0-9 and -, at most 63)'),
    ("name: web, ", "", "metadata.name: required"),
    ("name: web,", "name: 80,", "metadata.name: 80 is not text (put it in quotes)"),
    ("namespace: shop", "namespace: a.b", 'metadata.namespace: "a.b" is not a DNS label (a-z, 0-9 and -, at most 63)'),
    ("port: 80", "port: 0", "spec.ports[0].port: 0 is not a number from 1 to 65535"),
    ("port: 80", "port: 99999", "spec.ports[0].port: 99999 is not a number from 1 to 65535"),
    ("port: 80", "port: http", 'spec.ports[0].port: "http" is not a whole number'),
    ("port: 80", "name: x", "spec.ports[0].port: required"),
    ("{port: 80}", "{port: 80, protocol: ICMP}", 'spec.ports[0].protocol: "ICMP" is none of TCP, UDP, SCTP'),
    ("{port: 80}", "{port: 80, name: A}", 'spec.ports[0].name: "A" is not a DNS label (a-z, 0-9 and -, at most 63)'),
    ("{port: 80}", "{name: a, port: 80}, {name: b, port: 80}", "spec.ports[1].port: TCP 80 is spec.ports[0] already"),
    ("{port: 80}", "{name: a, port: 80}, {name: a, port: 81}", 'spec.ports[1].name: "a" names spec.ports[0] already'),
    ("{port: 80}", "{port: 80}, {port: 81}", "spec.ports[1].name: required with several ports"),
    ("[{port: 80}]", "[]", "spec.ports: required"),
    ("[{port: 80}]", "{port: 80}", "spec.ports: a mapping is not a list"),
    ("[{port: 80}]", "[null]", "spec.ports[0]: null is not a mapping"),
    ("10.96.0.10", "10.96.0.256", 'spec.clusterIP: "10.96.0.256" is not an IP address'),
    ("10.96.0.10", "169.254.1.1", 'spec.clusterIP: "169.254.1.1" is a link-local address'),
    ("10.96.0.10", "224.0.0.1", 'spec.clusterIP: "224.0.0.1" is a multicast address'),
    ("10.96.0.10", "255.255.255.255", 'spec.clusterIP: "255.255.255.255" is the broadcast address'),
    ("10.96.0.10", '"::"', 'spec.clusterIP: "::" is the unspecified address'),
    ("10.96.0.10", '"fe80::1"', 'spec.clusterIP: "fe80::1" is a link-local address'),
    ("10.96.0.10", '"::ffff:10.0.0.1"', 'spec.clusterIP: "::ffff:10.0.0.1" is an IPv4-mapped IPv6 address'),
    (
        "clusterIP: 10.96.0.10",
        "clusterIPs: [10.96.0.1, 10.96.0.2]",
        'spec.clusterIPs[1]: "10.96.0.2" is a second address of the same family',
    ),
    ("clusterIP:", "clusterIPs: [10.96.0.1]\n  clusterIP:", 'spec.clusterIPs[0]: "10.96.0.1" is not spec.clusterIP'),
    (
        "spec:",
        "spec:\n  type: Cluster",
        'spec.type: "Cluster" is none of ClusterIP, NodePort, LoadBalancer, ExternalName',
    ),
    ("spec:", "spec:\n  type: ExternalName", "spec.externalName: required"),
    ("spec:", "spec:\n  sessionAffinity: Cookie", 'spec.sessionAffinity: "Cookie" is none of None, ClientIP'),
    (
        "spec:",
        "spec:\n  sessionAffinity: ClientIP\n  sessionAffinityConfig: {clientIP: {timeoutSeconds: 86401}}",
        "spec.sessionAffinityConfig.clientIP.timeoutSeconds: 86401 is not a number from 1 to 86400",
    ),
    ("spec:", "spec:\n  internalTrafficPolicy: local", 'spec.internalTrafficPolicy: "local" is none of Cluster, Local'),
    (
        "spec:",
        "spec:\n  loadBalancerSourceRanges: [10.0.0.0/33]",
        'spec.loadBalancerSourceRanges[0]: "10.0.0.0/33" is not an address range',
    ),
    ("apiVersion: v1", "apiVersion: v2", 'apiVersion: "v2" is not read; use v1'),
    ("kind: Service", "", "kind: required"),
    ("apiVersion: v1", "", "apiVersion: required"),
    (
        "name: web,",
        r'name: "\e[2J\u202e",',
        r'metadata.name: "\x1b[2J\u202e" is not a DNS label (a-z, 0-9 and -, at most 63)',
    ),
    ("{name: web, namespace: shop}", "5", "metadata: 5 is not a mapping"),
    (
        "name: web,",
        "name: web, labels: {service.kubernetes.io/service-proxy-name: 7},",
        "metadata.labels.service.kubernetes.io/service-proxy-name: 7 is not text (put it in quotes)",
    ),
]


@pytest.mark.parametrize(("old", "new", "problem"), BAD_SERVICES)
def test_bad_services_are_refused(old: str, new: str, problem: str) -> None:
    found = changed(SERVICE, (old, new))
    assert found.value is None
    assert [": ".join(fault) for fault in found.faults] == [problem]


NOTED = [
    (
        "dataplane.io/scheduler: Round Robin",
        'metadata.annotations.dataplane.io/scheduler: "Round Robin" is not a scheduler\'s name; the default is used',
    ),
    (
        "dataplane.io/drain-seconds: 2d",
        (
            'metadata.annotations.dataplane.io/drain-seconds: "2d" is neither seconds (0 to 86400) nor like "15m";'
            " the default is used"
        ),
    ),
    (
        "dataplane.io/drain-seconds: 25h",
        (
            'metadata.annotations.dataplane.io/drain-seconds: "25h" is neither seconds (0 to 86400) nor like "15m";'
            " the default is used"
        ),
    ),
    (
        "dataplane.io/scheduler-flags: 'sh-port,x'",
        (
            'metadata.annotations.dataplane.io/scheduler-flags: "x" is none of flag-1, flag-2, flag-3, sh-fallback,'
            " sh-port, mh-fallback, mh-port; it is left out"
        ),
    ),
    (
        "dataplane.io/weights: '10.0.0.1=2,10.0.0.2'",
        'metadata.annotations.dataplane.io/weights: "10.0.0.2" is not address=weight (0 to 65535); it is left out',
    ),
]


@pytest.mark.parametrize(("annotation", "problem"), NOTED)
def test_a_bad_annotation_is_reported_and_its_default_used(annotation: str, problem: str) -> None:
    found = changed(SERVICE, ("name: web", "name: web, annotations: {" + annotation.replace(": ", ": ", 1) + "}"))
    assert found.value is not None
    assert [": ".join(fault) for fault in found.faults] == [problem]


def test_a_slice() -> None:
    (found,) = slices(
        SLICE,
        ("endpoints:", "endpoints: #"),
        (
            "[{addresses: [10.244.0.1]}]",
            """
- addresses: [10.244.0.1, 10.244.0.9]
- {addresses: [10.244.0.2], conditions: {ready: false, serving: true, terminating: true}, nodeName: n1, zone: z1,
   hostname: web-0, hints: {forZones: [{name: z1}, {name: z2}], forNodes: [{name: n1}]}}
- {addresses: [10.244.0.3], conditions: {ready: false}}
- {addresses: [10.244.0.4], conditions: null}
""",
        ),
        (
            "[{name: http, port: 8080}]",
            "[{name: http, port: 8080}, {name: none}, {name: null, port: 53, protocol: UDP}]",
        ),
        ("labels:", "annotations: {dataplane.io/weights: 10.244.0.1=7}, labels:"),
    )
    assert found.ports == (EndpointPort("http", Protocol.TCP, 8080), EndpointPort("", Protocol.UDP, 53))
    assert found.service == ObjectName("shop", "web")
    assert found.family is Family.IPV4
    assert found.endpoints == (
        Endpoint(parse_address("10.244.0.1"), weight=7),
        Endpoint(parse_address("10.244.0.2"), False, True, True, "n1", "z1", ("z1", "z2"), ("n1",), "web-0"),
        Endpoint(parse_address("10.244.0.3"), ready=False),
        Endpoint(parse_address("10.244.0.4")),
    )


BAD_SLICES = [
    ("labels: {kubernetes.io/service-name: web}", "labels: {}", "metadata.labels.kubernetes.io/service-name: required"),
    ("addressType: IPv4", "", "addressType: required"),
    ("addressType: IPv4", "addressType: IPX", 'addressType: "IPX" is none of IPv4, IPv6, FQDN'),
    ("port: 8080", "port: 70000", "ports[0].port: 70000 is not a number from 1 to 65535"),
    (
        "discovery.k8s.io/v1",
        "discovery.k8s.io/v1beta1",
        'apiVersion: "discovery.k8s.io/v1beta1" is not read; use discovery.k8s.io/v1',
    ),
    ("[10.244.0.1]", "10.244.0.1", 'endpoints[0].addresses: "10.244.0.1" is not a list'),
]


@pytest.mark.parametrize(("old", "new", "problem"), BAD_SLICES)
def test_bad_slices_are_refused(old: str, new: str, problem: str) -> None:
    found = changed(SLICE, (old, new))
    assert found.value is None
    assert [": ".join(fault) for fault in found.faults] == [problem]


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("127.0.0.1", '"127.0.0.1" is a loopback address'),  # CVE-2021-25737
        ("169.254.169.254", '"169.254.169.254" is a link-local address'),
        ("'fd00::1'", '"fd00::1" is not of the slice\'s addressType'),
        ("nowhere", '"nowhere" is not an IP address'),
    ],
)
def test_a_bad_endpoint_is_left_out_alone(address: str, problem: str) -> None:
    found = changed(SLICE, ("[{addresses: [10.244.0.1]}]", f"[addresses: [{address}], addresses: [10.244.0.2]]"))
    assert isinstance(found.value, tuple)
    assert [endpoint.address for endpoint in found.value[0].endpoints] == [parse_address("10.244.0.2")]
    assert found.faults == (("endpoints[0].addresses[0]", f"{problem}; this endpoint is left out"),)


def test_many_faults_are_counted_not_listed() -> None:
    many = "[" + "{addresses: [127.0.0.1]}," * 1000 + "]"
    found = changed(SLICE, ("[{addresses: [10.244.0.1]}]", many))
    assert len(found.faults) == 21
    assert found.faults[-1] == ("", "980 more faults")


IGNORED = [
    SLICE.replace("IPv4", "FQDN"),
    ENDPOINTS.replace("{name: web", "{labels: {endpointslice.kubernetes.io/skip-mirror: 'true'}, name: web"),
    ENDPOINTS.replace("{name: web", "{annotations: {control-plane.alpha.kubernetes.io/leader: '{}'}, name: web"),
    "{apiVersion: apps/v1, kind: Deployment}",
    "{apiVersion: serving.knative.dev/v1, kind: Service, metadata: 5}",
    "{apiVersion: v1, kind: ConfigMap, data: {a: 'kind: Service'}}",
]


@pytest.mark.parametrize("text", IGNORED)
def test_what_is_not_for_us_is_passed_over_in_silence(text: str) -> None:
    assert reading(text) is None


def test_endpoints_become_slices_by_subset_and_family() -> None:
    found = slices(
        ENDPOINTS,
        (
            "[{ip: 10.244.0.1}]",
            "[{ip: 10.244.0.1, nodeName: n1}, {ip: 'fd00::1'}], notReadyAddresses: [{ip: 10.244.0.2}]",
        ),
    )
    assert [(str(part.name), part.family, [(e.ready, e.serving) for e in part.endpoints]) for part in found] == [
        ("shop/web-0-ipv4", Family.IPV4, [(True, True), (False, False)]),
        ("shop/web-0-ipv6", Family.IPV6, [(True, True)]),
    ]
    assert {str(part.service) for part in found} == {"shop/web"}


def test_views_prefer_slices_to_endpoints_and_fill_in_weights() -> None:
    weighted = changed(SERVICE, ("name: web", "name: web, annotations: {dataplane.io/weights: '10.244.0.1=5'}"))
    own = changed(SLICE, ("labels:", "annotations: {dataplane.io/weights: 10.244.0.1=7}, labels:"))
    old = changed(ENDPOINTS)
    view = service_view(weighted, [changed(SLICE)], old)
    assert view is not None
    assert [(str(part.name), part.endpoints[0].weight) for part in view.slices] == [("shop/web-1", 5)]
    view = service_view(weighted, [own])
    assert view is not None
    assert view.slices[0].endpoints[0].weight == 7
    view = service_view(None, [], old)
    assert view is not None
    assert (view.service, len(view.slices)) == (None, 1)
    assert service_view(None, [], None) is None


def test_headless_slices_serve_headless_services_only() -> None:
    labelled = changed(SLICE, ("labels: {", "labels: {service.kubernetes.io/headless: '', "))
    headless, normal = changed(SERVICE, ("10.96.0.10", "None")), changed(SERVICE)
    assert [len(view.slices) for one in (headless, normal) if (view := service_view(one, [labelled]))] == [1, 0]


def test_items_of_typed_lists_need_no_kind() -> None:
    (part,) = read(SLICE.replace("kind: EndpointSlice\n", "").replace("apiVersion: discovery.k8s.io/v1\n", "").encode(),
                   Budget(Limits()))  # fmt: skip
    found = read_object(part.value, "EndpointSlice")
    assert found is not None
    assert found.label == "EndpointSlice shop/web-1"
