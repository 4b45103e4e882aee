"""Every kind of Service by packets, in each mode: protocols, families, sources and policies in all combinations.

The cases of tests/flows/flows.yaml are of upstream's making; these are made here, for what those leave out: both
families and three protocols everywhere, ports at the ends of their range, clients that are endpoints, endpoints on the
node's own address, many endpoints with affinity. What to expect is what kube-proxy's nftables mode does.
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from .test_flows_runner import command, flow, last_line

PORTS = (("TCP", 1, 65535, 30001), ("UDP", 1, 65534, 30001), ("SCTP", 65535, 1, 32767))
"""Protocol, port, target port, node port."""


class Ground(NamedTuple):
    """The addresses of one family."""

    family: str
    prefix: str
    """Of cluster IPs."""
    pods: str
    """Prefix of pods, of which 5 is on this node and 6 and 7 are not."""
    cidr: str
    node: tuple[str, str]
    world: str
    balancer: str
    external: str

    def vip(self, number: int) -> str:
        return f"{self.prefix}{number}"

    def pod(self, number: int) -> str:
        return f"{self.pods}{number}"


GROUNDS = (
    Ground(
        "IPv4",
        "10.97.3.",
        "10.244.0.",
        "10.244.0.0/16",
        ("203.0.113.77", "198.51.100.4"),
        "8.8.8.8",
        "1.2.3.4",
        "5.6.7.8",
    ),
    Ground(
        "IPv6",
        "fd99::",
        "fd10::",
        "fd10::/32",
        ("2001:db8:77::1", "2001:db8:78::1"),
        "2600::8",
        "2600:1::1",
        "2600:2::1",
    ),
)


def endpoint(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def service(ground: Ground, number: int, addresses: Iterable[str], **spec: Any) -> tuple[Any, Any]:
    """A Service with all three ports and its slice; the first endpoint is on this node."""
    name, is_external = f"s{number}", spec.get("type", "ClusterIP") != "ClusterIP"
    ingress = spec.pop("ingress", [])
    ports = [
        {"name": proto.lower(), "protocol": proto, "port": port, "targetPort": target}
        | ({"nodePort": node_port} if is_external else {})
        for proto, port, target, node_port in PORTS
    ]
    vip = ground.vip(number)
    spec = {
        "type": "ClusterIP",
        "clusterIP": vip,
        "clusterIPs": [vip],
        "ipFamilies": [ground.family],
        "ports": ports,
    } | spec
    metadata = {"name": name, "namespace": "x"}
    slice_ports = [{"name": proto.lower(), "protocol": proto, "port": target} for proto, _, target, _ in PORTS]
    endpoints = [{"addresses": [each], "nodeName": "n1" if not at else "n2"} for at, each in enumerate(addresses)]
    status = {"loadBalancer": {"ingress": [{"ip": each} for each in ingress]}}
    return (
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec, "status": status},
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {**metadata, "labels": {"kubernetes.io/service-name": name}},
            "addressType": ground.family,
            "ports": slice_ports,
            "endpoints": endpoints,
        },
    )


def meets(
    src: str, dst: str, proto: str, port: int, action: str, endpoints: Iterable[str] = (), masquerade: bool = False
) -> dict[str, Any]:
    return flow(src, dst, port, action, *endpoints, proto=proto, masquerade=masquerade)


def case(name: str, ground: Ground, services: Iterable[tuple[Any, Any]], flows: Iterable[Any], **config: Any) -> Any:
    pairs = list(services)
    return {
        "name": f"{name}/{ground.family}",
        "node": {"name": "n1", "ips": list(ground.node), "cluster_cidr": ground.cidr},
        "config": config,
        "objects": {"services": [one for one, _ in pairs], "endpointslices": [other for _, other in pairs]},
        "flows": list(flows),
    }


def cluster_ip_cases() -> Iterator[Any]:
    """Services without external addresses."""
    for ground in GROUNDS:
        three, many = [ground.pod(n) for n in (5, 6, 7)], [ground.pod(n) for n in range(11, 29)]
        services = [
            service(ground, 1, three),
            service(ground, 2, [ground.node[0]]),
            service(ground, 3, three[:1]),
            service(ground, 4, many, sessionAffinity="ClientIP"),
            service(ground, 5, []),
        ]
        vip, on_node, lone, sticky, empty = (ground.vip(number) for number in range(1, 6))
        unknown, pod, world, (node, node2) = ground.vip(99), ground.pod(9), ground.world, ground.node
        flows: list[Any] = []
        for proto, port, target, _ in PORTS:
            all_three = [endpoint(each, target) for each in three]
            all_many = [endpoint(each, target) for each in many]
            mine = [endpoint(node, target)]
            flows += [
                meets(pod, vip, proto, port, "dnat", all_three),
                *(meets(each, vip, proto, port, "dnat", all_three, True) for each in (world, node, node2)),
                meets(three[0], vip, proto, port, "dnat", all_three),
                meets(three[0], lone, proto, port, "dnat", [endpoint(three[0], target)], True),
                meets(pod, on_node, proto, port, "dnat", mine),
                *(meets(each, on_node, proto, port, "dnat", mine, True) for each in (world, node)),
                meets(pod, sticky, proto, port, "dnat", all_many) | {"sticky": True},
                meets(world, sticky, proto, port, "dnat", all_many, True) | {"sticky": True},
                *(meets(each, vip, proto, 777, "reject") for each in (pod, world, node)),
                *(meets(each, empty, proto, port, "reject") for each in (pod, world, node)),
                *(meets(each, unknown, proto, port, "none") for each in (pod, world, node)),
                meets(node, node2, proto, port, "none"),
                meets(world, node, proto, port, "none"),
            ]
        yield case("cluster-ips", ground, services, flows)
        udp = [endpoint(each, 65534) for each in three]
        yield case(
            "nobody-is-local", ground, services[:1], [meets(pod, vip, "UDP", 1, "dnat", udp)], detect_local="none"
        )


def external_cases() -> Iterator[Any]:
    """Node ports, external and load balancer addresses, with both policies."""
    for ground in GROUNDS:
        pod, world, (node, node2) = ground.pod(9), ground.world, ground.node
        for policy in ("Cluster", "Local"):
            addresses = {"type": "LoadBalancer", "externalIPs": [ground.external], "ingress": [ground.balancer]}
            some = [ground.pod(n) for n in (5, 6, 7)]
            services = [service(ground, 1, some, externalTrafficPolicy=policy, **addresses)]
            flows: list[Any] = []
            for proto, port, target, node_port in PORTS:
                everywhere = [endpoint(each, target) for each in some]
                if policy == "Cluster":
                    outcomes = dict.fromkeys((pod, world, node), (everywhere, True))
                else:
                    outcomes = {pod: (everywhere, False), world: (everywhere[:1], False), node: (everywhere, True)}
                asked = ((node, node_port), (node2, node_port), (ground.external, port), (ground.balancer, port))
                for (source, (endpoints, masquerade)), (address, number) in itertools.product(outcomes.items(), asked):
                    flows.append(meets(source, address, proto, number, "dnat", endpoints, masquerade))
                flows += [meets(world, each, proto, 777, "none") for each in (node, ground.external, ground.balancer)]
                flows.append(meets(world, node, proto, port, "none"))
            yield case(f"external-{policy}", ground, services, flows, nodeport_addresses=[])


NFTABLES = pytest.param("nftables", marks=pytest.mark.root)
IPTABLES = pytest.param("iptables", marks=pytest.mark.root)
IPVS = pytest.param("ipvs", marks=pytest.mark.ipvs)


def play(mode: str, cases: Iterable[Any], folder: Path) -> None:
    """All flows of the cases are as expected."""
    listed = list(cases)
    file = folder / "cases.yaml"
    file.write_text(yaml.safe_dump(listed))
    done = command("--mode", mode, str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert last_line(done) == f"{sum(len(each['flows']) for each in listed)} passed, 0 failed, 0 skipped"


@pytest.mark.parametrize("mode", [NFTABLES, IPTABLES, IPVS])
def test_cluster_ips_in_every_family_and_protocol(mode: str, tmp_path: Path) -> None:
    play(mode, cluster_ip_cases(), tmp_path)


@pytest.mark.parametrize("mode", [NFTABLES, IPTABLES, IPVS])
def test_external_addresses_in_every_family_and_protocol(mode: str, tmp_path: Path) -> None:
    play(mode, external_cases(), tmp_path)


@pytest.mark.parametrize("mode", [NFTABLES, IPTABLES, IPVS])
@pytest.mark.parametrize(("name", "flows"), [("flows.yaml", 195), ("edges.yaml", 42)])
def test_the_cases_in_files(mode: str, name: str, flows: int) -> None:
    """kube-proxy's own, and what they leave at the edges."""
    done = command("--mode", mode, str(Path(__file__).parent / "flows" / name))
    assert done.returncode == 0, done.stdout + done.stderr
    assert last_line(done) == f"{flows} passed, 0 failed, 0 skipped"
