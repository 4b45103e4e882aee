"""The cases' file format, read strictly: what a case means is decided here, once. The file's own header explains it."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import yaml
from msgspec import Struct

from dataplane.model import Address, Network, Protocol, format_endpoint, parse_address, parse_network

Action = Literal["dnat", "reject", "drop", "none"]


class BadCases(Exception):
    """A file that is not of this format."""


class Expect(Struct, frozen=True):
    """What the first packet of a new connection meets. `endpoints`: `10.0.0.1:80`, `[fd00::1]:80`, in any order."""

    action: Action
    endpoints: tuple[str, ...] = ()
    masquerade: bool = False

    @property
    def targets(self) -> frozenset[str]:
        """The endpoints in their canonical form."""
        return frozenset(format_endpoint(*parse_endpoint(each)) for each in self.endpoints)


class Flow(Struct, frozen=True):
    """One kind of connection. `sticky`: all connections of a client reach the same endpoint."""

    src_ip: str
    dst_ip: str
    proto: Literal["TCP", "UDP", "SCTP"]
    dst_port: int
    expect: Expect
    desc: str = ""
    sticky: bool = False
    iptables_filter: str = ""
    """A hole that kube-proxy's iptables mode makes in a host's firewall; its nftables mode makes none, nor do ours."""
    expect_by_mode: dict[str, Expect] = {}
    """What kube-proxy's other modes do; ours do what `expect` says in every mode."""
    verified_by: tuple[str, ...] = ()
    kernel_checked: tuple[str, ...] = ()

    @property
    def protocol(self) -> Protocol:
        return Protocol[self.proto]

    def __str__(self) -> str:
        return f"{self.src_ip} -> {format_endpoint(parse_address(self.dst_ip), self.dst_port)}/{self.proto}"


class Node(Struct, frozen=True):
    """The node the agent runs on. `cluster_cidr`: pod ranges, comma separated."""

    name: str
    ips: tuple[str, ...] = ()
    cluster_cidr: str = ""

    @property
    def addresses(self) -> tuple[Address, ...]:
        return tuple(parse_address(each) for each in self.ips)

    @property
    def cluster_cidrs(self) -> tuple[Network, ...]:
        return tuple(parse_network(each) for each in self.cluster_cidr.split(",") if each.strip())


class Config(Struct, frozen=True):
    """The proxy's configuration. `nodeport_addresses` () = all local addresses; `service_cidrs` () = unknown."""

    nodeport_addresses: tuple[str, ...] = ()
    localhost_nodeports: bool = True
    masquerade_all: bool = False
    detect_local: str = "ClusterCIDR"
    service_cidrs: tuple[str, ...] = ()
    zone: str = ""


class Objects(Struct, frozen=True):
    """Complete v1 Service and discovery.k8s.io/v1 EndpointSlice manifests."""

    services: list[dict[str, Any]] = []
    endpointslices: list[dict[str, Any]] = []


class HealthCheck(Struct, frozen=True):
    """What GET on a healthCheckNodePort answers."""

    port: int
    status: int
    local_endpoints: int | None = None


class ConntrackEntry(Struct, frozen=True):
    """An entry that is there before the reconciling, and whether it has to be there afterwards."""

    orig_dst: str
    orig_dport: int
    proto: Literal["TCP", "UDP", "SCTP"]
    reply_src: str
    reply_sport: int
    keep: bool

    def __str__(self) -> str:
        asked = format_endpoint(parse_address(self.orig_dst), self.orig_dport)
        return f"{asked}/{self.proto} answered by {format_endpoint(parse_address(self.reply_src), self.reply_sport)}"


class Affinity(Struct, frozen=True):
    """How long a client stays with its endpoint."""

    timeout_seconds: int


class Case(Struct, frozen=True, dict=True):
    """A node, its configuration, objects, and what then holds. `health_checks` None: the case says nothing of them."""

    name: str
    node: Node
    flows: tuple[Flow, ...]
    config: Config = Config()
    objects: Objects = Objects()
    about: str = ""
    source: dict[str, Any] = {}
    health_checks: tuple[HealthCheck, ...] | None = None
    metrics: dict[str, Any] = {}
    conntrack: tuple[ConntrackEntry, ...] = ()
    affinity: Affinity | None = None
    kernel_names: dict[str, dict[str, str]] = {}

    @cached_property
    def endpoint_addresses(self) -> frozenset[Address]:
        """Every address that some slice names, whether a packet may reach it or not."""
        return frozenset(
            parse_address(address)
            for one in self.objects.endpointslices
            if one.get("addressType") != "FQDN"
            for endpoint in one.get("endpoints") or ()
            for address in endpoint.get("addresses") or ()
        )

    @cached_property
    def virtual_addresses(self) -> frozenset[Address]:
        """Every cluster, external and load balancer address of the Services."""
        found: set[Address] = set()
        for service in self.objects.services:
            spec = service.get("spec") or {}
            texts = [spec.get("clusterIP"), spec.get("loadBalancerIP")]
            texts += [*(spec.get("clusterIPs") or ()), *(spec.get("externalIPs") or ())]
            status = (service.get("status") or {}).get("loadBalancer") or {}
            texts += [ingress.get("ip") for ingress in status.get("ingress") or ()]
            found.update(parse_address(text) for text in texts if text and text != "None")
        return frozenset(found)

    @cached_property
    def has_affinity(self) -> bool:
        return any(
            (service.get("spec") or {}).get("sessionAffinity") == "ClientIP" for service in self.objects.services
        )

    @cached_property
    def networks(self) -> tuple[Network, ...]:
        """Every address range of the case: what separates one kind of client from another."""
        texts = [*self.config.nodeport_addresses, *self.config.service_cidrs]
        for service in self.objects.services:
            texts += (service.get("spec") or {}).get("loadBalancerSourceRanges") or ()
        found = list(self.node.cluster_cidrs)
        for text in texts:
            try:
                found.append(parse_network(text))
            except ValueError:
                continue  # the agent's to complain about
        return tuple(found)


def parse_endpoint(text: str) -> tuple[Address, int]:
    """`10.0.0.1:80` or `[fd00::1]:80`."""
    host, _, port = text.rpartition(":")
    return parse_address(host.strip("[]")), int(port)


class CaseFile(NamedTuple):
    """What a file holds, and its keys that nobody here reads: facts that would go unchecked."""

    cases: tuple[Case, ...]
    unknown: tuple[str, ...]


def read_cases(path: Path) -> CaseFile:
    """The cases of a file; BadCases says what is wrong with it."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        document = yaml.load(path.read_bytes(), Loader=loader)
    except (OSError, yaml.YAMLError) as error:
        raise BadCases(f"{path}: {error}") from error
    if isinstance(document, dict):
        document = document.get("cases")
    if not isinstance(document, list):
        raise BadCases(f"{path}: not a list of cases")
    cases: list[Case] = []
    unknown: dict[str, None] = {}
    for number, entry in enumerate(document, 1):
        name = entry.get("name") if isinstance(entry, dict) else None
        try:
            case: Case = msgspec.convert(_without_nulls(entry), Case)
            for flow in case.flows:
                if len(parse_address(flow.src_ip)) != len(parse_address(flow.dst_ip)):
                    raise ValueError(f"{flow}: source and destination of two families")
                assert flow.expect.targets is not None  # parses all of them
        except (msgspec.ValidationError, ValueError) as error:
            raise BadCases(f"{path}: case {number} ({name}): {error}") from error
        cases.append(case)
        unknown |= dict.fromkeys(_unknown(entry))
    return CaseFile(tuple(cases), tuple(unknown))


def _without_nulls(value: Any) -> Any:
    """A null says no more than a missing key; objects stay as they are, since there the agent decides."""
    if isinstance(value, dict):
        return {
            key: each if key == "objects" and each else _without_nulls(each)
            for key, each in value.items()
            if each is not None
        }
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _unknown(entry: dict[str, Any]) -> Iterator[str]:
    parts: list[tuple[str, type[Struct], Any]] = [("", Case, entry)]
    parts += [(f"{name}.", of, entry.get(name)) for name, of in _PARTS]
    parts += [(f"{name}[].", of, each) for name, of in _LISTS for each in entry.get(name) or ()]
    parts += [("flows[].expect.", Expect, flow.get("expect")) for flow in entry.get("flows") or ()]
    for prefix, of, value in parts:
        for key in value if isinstance(value, dict) else ():
            if key not in of.__struct_fields__:
                yield f"{prefix}{key}"


_PARTS: tuple[tuple[str, type[Struct]], ...] = (
    ("node", Node),
    ("config", Config),
    ("objects", Objects),
    ("affinity", Affinity),
)
_LISTS: tuple[tuple[str, type[Struct]], ...] = (
    ("flows", Flow),
    ("health_checks", HealthCheck),
    ("conntrack", ConntrackEntry),
)
