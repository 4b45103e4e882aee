"""A second, slow and obvious reading of the rules of a Service, to hold dataplane's own against.

Written from kube-proxy's rules as prose (inputs, endpoint choice, outcomes; nftables mode), not from dataplane's code,
and shares nothing with it: plain Kubernetes objects in, and for any one packet what becomes of it. No indexes, no
reuse: every packet walks through every object. In the same form, `Programmed` says what becomes of a packet by
dataplane's virtual servers, by what their fields mean (model.py).
"""

import functools
import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dataplane.model import (
    Masquerade,
    NoServers,
    Protocol,
    VirtualAddress,
    VirtualServer,
    format_address,
    parse_address,
)

IP = ipaddress.IPv4Address | ipaddress.IPv6Address
Object = dict[str, Any]


@dataclass(frozen=True)
class Node:
    """Where kube-proxy runs. `served`: nodePortAddresses, ranges or "primary"; `claimable`: allowed external IPs."""

    name: str
    zone: str
    addresses: tuple[str, ...]
    served: tuple[str, ...] = ()
    claimable: tuple[str, ...] = ()
    pods: tuple[str, ...] = ()

    def primary(self, version: int) -> IP | None:
        for text in self.addresses:
            if ip(text).version == version:
                return ip(text)
        return None

    def node_port_addresses(self, version: int) -> list[IP]:
        mine = [ip(text) for text in self.addresses if ip(text).version == version]
        if self.served == ("primary",):
            return mine[:1]
        ranges = [network(text) for text in self.served if network(text).version == version]
        return [each for each in mine if not ranges or any(each in one for one in ranges)]


@dataclass(frozen=True)
class Packet:
    """The first of a connection. `client`: "pod", "node" (a process of it) or "outside"."""

    protocol: str
    source: str
    destination: str
    port: int
    client: str


@dataclass(frozen=True)
class Verdict:
    """What becomes of it; `endpoints` and what follows count for "dnat" alone. Hairpin masquerade is left out."""

    action: str
    endpoints: frozenset[str] = frozenset()
    masquerade: bool = False
    sticky: int = 0


@dataclass(frozen=True)
class Endpoint:
    """As a slice has it, for one of its ports."""

    address: str
    port: int
    ready: bool
    serving: bool
    terminating: bool
    node: str
    zones: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def place(self) -> str:
        return f"{self.address}/{self.port}"


@functools.cache
def ip(text: str) -> IP:
    if ":" not in text:  # leading zeros are read as decimal
        text = ".".join(str(int(octet)) for octet in text.split("."))
    return ipaddress.ip_address(text)


@functools.cache
def network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(text.strip(), strict=False)


@dataclass
class Model:
    """The rules over one set of objects."""

    node: Node
    services: list[Object] = field(default_factory=list)
    slices: list[Object] = field(default_factory=list)

    # ------------------------------------------------------------------------------------------------------ inputs

    def proxied(self) -> Iterator[Object]:
        for service in self.services:
            labels = service["metadata"].get("labels") or {}
            if "service.kubernetes.io/service-proxy-name" in labels:
                continue
            if service["spec"].get("type") == "ExternalName":
                continue
            if cluster_ips(service):
                yield service

    def seniority(self, service: Object) -> tuple[bool, str, str, str]:
        meta = service["metadata"]
        created = meta.get("creationTimestamp") or ""
        return not created, created, meta["namespace"], meta["name"]

    def endpoints(self, service: Object, port_name: str, protocol: str, version: int) -> list[Endpoint]:
        """All endpoints of a service port in a family, merged over its slices."""
        merged: dict[str, Endpoint] = {}
        for one in sorted(self.slices, key=lambda each: str(each["metadata"]["name"])):
            labels = one["metadata"].get("labels") or {}
            if one["metadata"]["namespace"] != service["metadata"]["namespace"]:
                continue
            if labels.get("kubernetes.io/service-name") != service["metadata"]["name"]:
                continue
            if "service.kubernetes.io/headless" in labels or one["addressType"] != f"IPv{version}":
                continue
            for port in one.get("ports") or []:
                # the API server makes "" of a name that is not given, and TCP of a protocol
                if (port.get("name") or "") != port_name or (port.get("protocol") or "TCP") != protocol:
                    continue
                if not port.get("port"):
                    continue
                for each in one.get("endpoints") or []:
                    found = endpoint(each, port["port"])
                    if found.place not in merged or not found.terminating:
                        merged[found.place] = found
        return list(merged.values())

    # ---------------------------------------------------------------------------------------------- endpoint choice

    def cluster_list(self, endpoints: list[Endpoint]) -> list[Endpoint]:
        ready = [each for each in endpoints if each.ready]
        if not ready:
            return [each for each in endpoints if each.serving and each.terminating]
        if self.node.name and all(each.nodes for each in ready):
            mine = [each for each in ready if self.node.name in each.nodes]
            if mine:
                return mine
        if self.node.zone and all(each.zones for each in ready):
            near = [each for each in ready if self.node.zone in each.zones]
            if near:
                return near
        return ready

    def local_list(self, endpoints: list[Endpoint]) -> list[Endpoint]:
        local = [each for each in endpoints if each.node and each.node == self.node.name]
        ready = [each for each in local if each.ready]
        return ready or [each for each in local if each.serving and each.terminating]

    @staticmethod
    def usable_anywhere(endpoints: list[Endpoint]) -> bool:
        return any(each.ready or (each.serving and each.terminating) for each in endpoints)

    # ------------------------------------------------------------------------------------------------------ outcomes

    def claims(self, packet: Packet) -> list[tuple[Object, Object, str]]:
        """(Service, its port, kind) that want a packet; within one Service the more public kind comes first."""
        to, version = ip(packet.destination), ip(packet.destination).version
        found = []
        for service in sorted(self.proxied(), key=self.seniority):
            if not any(each.version == version for each in cluster_ips(service)):
                continue
            ports = [port for port in service["spec"]["ports"] if (port.get("protocol") or "TCP") == packet.protocol]
            for kind, wanted in (
                ("cluster", cluster_ips(service)),
                ("load balancer", load_balancer_ips(service)),
                ("external", [each for each in external_ips(service) if self.may_claim(each)]),
            ):
                found += [(service, port, kind) for port in ports if to in wanted and port["port"] == packet.port]
            if service["spec"].get("type") in ("NodePort", "LoadBalancer") and to in self.node.node_port_addresses(
                version
            ):
                found += [(service, port, "node port") for port in ports if (port.get("nodePort") or 0) == packet.port]
        return found

    def may_claim(self, address: IP) -> bool:
        return any(
            address.version == network(text).version and address in network(text) for text in self.node.claimable
        )

    def allowed(self, service: Object, source: IP) -> bool:
        """loadBalancerSourceRanges."""
        given = service["spec"].get("loadBalancerSourceRanges") or []
        ranges = [network(text) for text in given if network(text).version == source.version]
        if not ranges or any(each.prefixlen == 0 for each in ranges):
            return True
        node = self.node.primary(source.version)
        extra = load_balancer_ips(service) if node is not None and any(node in each for each in ranges) else []
        return source in extra or any(source in each for each in ranges)

    def verdict(self, packet: Packet) -> Verdict:
        """What becomes of a packet."""
        to = ip(packet.destination)
        claims = self.claims(packet)
        if not claims:
            wrong_port = any(to in cluster_ips(service) for service in self.proxied())
            return Verdict("reject" if wrong_port else "none")
        service, port, kind = claims[0]
        if kind == "load balancer" and not self.allowed(service, ip(packet.source)):
            return Verdict("drop")
        endpoints = self.endpoints(service, port.get("name") or "", packet.protocol, to.version)
        spec = service["spec"]
        if not self.usable_anywhere(endpoints):
            return Verdict("reject")
        everyone, local = self.cluster_list(endpoints), self.local_list(endpoints)
        if kind == "cluster":
            chosen = local if spec.get("internalTrafficPolicy") == "Local" else everyone
            masquerade = bool(self.node.pods) and packet.client != "pod"
        elif external_local(service):
            if packet.client == "outside":
                chosen, masquerade = local, False
            else:
                chosen, masquerade = everyone, packet.client == "node"
        else:
            chosen, masquerade = everyone, True
        if not chosen:
            return Verdict("drop")
        return Verdict("dnat", frozenset(each.place for each in chosen), masquerade, affinity(service))

    # ------------------------------------------------------------------------------------- what is told besides

    def health_checks(self) -> dict[str, tuple[int, int, int]]:
        """Port and local ready endpoint addresses of each family, by Service."""
        found = {}
        for service in self.proxied():
            spec = service["spec"]
            number = spec.get("healthCheckNodePort") or 0
            if spec.get("type") != "LoadBalancer" or not external_local(service) or not number:
                continue
            counts = []
            for version in (4, 6):
                ready = set()
                for port_name, protocol in self.slice_ports():
                    for each in self.endpoints(service, port_name, protocol, version):
                        if each.ready and each.node and each.node == self.node.name:
                            ready.add(each.address)
                counts.append(len(ready))
            found[name_of(service)] = (number, *counts)
        return found  # type: ignore[return-value]

    def slice_ports(self) -> set[tuple[str, str]]:
        return {
            (port.get("name") or "", port.get("protocol") or "TCP")
            for one in self.slices
            for port in one.get("ports") or []
        }

    def serving(self, packet: Packet) -> frozenset[str]:
        """Endpoints whose UDP clients may stay, by conntrack's rules: policies and topology do not count."""
        claims = self.claims(packet)
        if not claims:
            return frozenset()
        service, port, _ = claims[0]
        every = self.endpoints(service, port.get("name") or "", packet.protocol, ip(packet.destination).version)
        return frozenset(each.place for each in every if each.serving)


def endpoint(given: Object, port: int) -> Endpoint:
    conditions = given.get("conditions") or {}
    hints = given.get("hints") or {}
    ready, serving, terminating = (conditions.get(key) for key in ("ready", "serving", "terminating"))
    return Endpoint(
        str(ip(given["addresses"][0])),
        port,
        ready is None or ready,
        serving is None or serving,
        bool(terminating),
        given.get("nodeName") or "",
        tuple(each["name"] for each in hints.get("forZones") or []),
        tuple(each["name"] for each in hints.get("forNodes") or []),
    )


def name_of(service: Object) -> str:
    return f"{service['metadata']['namespace']}/{service['metadata']['name']}"


def cluster_ips(service: Object) -> list[IP]:
    spec = service["spec"]
    given = spec.get("clusterIPs") or [spec.get("clusterIP") or ""]
    return [ip(text) for text in given if text not in ("", "None")]


def external_ips(service: Object) -> list[IP]:
    return [ip(text) for text in service["spec"].get("externalIPs") or []]


def load_balancer_ips(service: Object) -> list[IP]:
    status = (service.get("status") or {}).get("loadBalancer") or {}
    entries = status.get("ingress") or []
    return [ip(each["ip"]) for each in entries if each.get("ip") and each.get("ipMode") in (None, "VIP")]


def external_local(service: Object) -> bool:
    """externalTrafficPolicy Local, where it counts."""
    spec = service["spec"]
    kind = spec.get("type") or "ClusterIP"
    counts = kind in ("LoadBalancer", "NodePort") or (kind == "ClusterIP" and bool(spec.get("externalIPs")))
    return counts and spec.get("externalTrafficPolicy") == "Local"


def affinity(service: Object) -> int:
    spec = service["spec"]
    if spec.get("sessionAffinity") != "ClientIP":
        return 0
    config = (spec.get("sessionAffinityConfig") or {}).get("clientIP") or {}
    return config.get("timeoutSeconds") or 10800


# ------------------------------------------------------------------------------------------- dataplane's own answer


@dataclass
class Programmed:
    """What virtual servers make of a packet, by what their fields mean."""

    servers: Mapping[VirtualAddress, VirtualServer]
    detects: bool
    """The agent knows pod addresses."""

    def verdict(self, packet: Packet) -> Verdict:
        address = parse_address(packet.destination)
        at = VirtualAddress(int(Protocol[packet.protocol]), address, packet.port)
        outside, inside = self.servers.get(at), self.servers.get(at._replace(inside=True))
        if outside is None:
            assert inside is None, f"{at}: for clients inside alone"
            bound = any(one.bound and one.at.address == address for one in self.servers.values())
            return Verdict("reject" if bound else "none")
        if inside is not None:
            assert inside.real_servers
            assert (inside.masquerade, inside.bound, inside.kind) == (Masquerade.NODE, False, outside.kind)
            assert inside.label == outside.label
        if outside.allowed and not any(parse_address(packet.source) in each for each in outside.allowed):
            return Verdict("drop")
        chosen = inside if inside is not None and packet.client != "outside" else outside
        if not chosen.real_servers:
            return Verdict("drop" if chosen.no_servers is NoServers.DROP else "reject")
        masquerade = {
            Masquerade.ALWAYS: True,
            Masquerade.NODE: packet.client == "node",
            Masquerade.DETECT: self.detects and packet.client != "pod",
        }[chosen.masquerade]
        return Verdict("dnat", places(chosen), masquerade, chosen.persistence)


def places(server: VirtualServer) -> frozenset[str]:
    return shown((real.address, real.port) for real in server.real_servers)


def shown(pairs: Iterable[tuple[bytes, int]]) -> frozenset[str]:
    return frozenset(f"{format_address(address)}/{port}" for address, port in pairs)
