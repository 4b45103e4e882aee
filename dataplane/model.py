"""The nouns: Kubernetes words for what is asked, LVS words for what the kernel shall do.

Above the line stand Service, ServicePort, EndpointSlice, Endpoint (core/v1 and discovery.k8s.io/v1, reduced to what a
Service proxy reads); below it VirtualServer and RealServer (`ipvsadm(8)`). `desired.py` is the one place that turns
the first into the second. All values are immutable and compare by value.

Addresses are packed bytes in network byte order, 4 (IPv4) or 16 (IPv6) of them: they go to the kernel as they are,
sort numerically and cost a third of an `ipaddress` object.
"""

import socket
from collections.abc import Iterable, Iterator
from enum import Enum, IntEnum
from typing import NamedTuple, NewType

from msgspec import Struct

Address = NewType("Address", bytes)
"""Packed IP address, network byte order; its length (4 or 16) is its family."""


class Family(IntEnum):
    """Address family with the kernel's number (linux/socket.h)."""

    IPV4 = socket.AF_INET
    IPV6 = socket.AF_INET6


class Protocol(IntEnum):
    """Transport with its IANA number."""

    TCP = 6
    UDP = 17
    SCTP = 132


_PROTOCOL_NAMES = {int(one): one.name for one in Protocol}


def family_of(address: bytes) -> Family:
    """The family an address belongs to, told by its length."""
    return Family.IPV4 if len(address) == 4 else Family.IPV6


def parse_address(text: str) -> Address:
    """`"10.0.1.175"` or `"fd00::1"` as packed bytes; ValueError names the text.

    IPv4 octets with leading zeros are read as decimal, as the API server has always done (funny_ips.go).
    """
    try:
        if ":" in text:
            return Address(socket.inet_pton(socket.AF_INET6, text))
        try:
            return Address(socket.inet_pton(socket.AF_INET, text))
        except OSError:
            octets = text.split(".")
            if len(octets) == 4 and all(o.isascii() and o.isdigit() and len(o) <= 16 for o in octets):
                return Address(bytes(map(int, octets)))
            raise
    except (OSError, ValueError, UnicodeError):
        raise ValueError(f"{text!r} is not an IP address") from None


def format_address(address: bytes) -> str:
    """Canonical text of a packed address (RFC 5952 for IPv6, as inet_ntop prints it)."""
    return socket.inet_ntoa(address) if len(address) == 4 else socket.inet_ntop(socket.AF_INET6, address)


def format_endpoint(address: bytes, port: int) -> str:
    """`10.0.1.175:80` or `[fd00::1]:80`."""
    if len(address) == 4:
        return f"{socket.inet_ntoa(address)}:{port}"
    return f"[{format_address(address)}]:{port}"


class Network(Struct, frozen=True, gc=False):
    """An address range in CIDR form; bits below the prefix are zero."""

    address: Address
    prefix: int

    def __contains__(self, address: bytes) -> bool:
        if len(address) != len(self.address):
            return False
        shift = 8 * len(address) - self.prefix
        return int.from_bytes(address) >> shift == int.from_bytes(self.address) >> shift

    @property
    def last(self) -> Address:
        """Its last address."""
        host = (1 << 8 * len(self.address) - self.prefix) - 1
        return Address((int.from_bytes(self.address) | host).to_bytes(len(self.address)))

    def __str__(self) -> str:
        return f"{format_address(self.address)}/{self.prefix}"


def parse_network(text: str) -> Network:
    """`"10.0.0.0/8"`; a bare address is the range of that one address. ValueError names the text."""
    head, slash, tail = text.strip().partition("/")
    address = parse_address(head)
    width = 8 * len(address)
    if slash and not (tail.isascii() and tail.isdigit() and int(tail[:4]) <= width):
        raise ValueError(f"{text!r} is not an address range (prefix length 0 to {width})")
    prefix = int(tail) if slash else width
    shift = width - prefix
    masked = (int.from_bytes(address) >> shift << shift).to_bytes(len(address))
    return Network(Address(masked), prefix)


def between(first: bytes, last: bytes) -> Iterator[Network]:
    """The ranges that hold the addresses from `first` to `last`; one range where it came from one."""
    width, low, high = 8 * len(first), int.from_bytes(first), int.from_bytes(last)
    while low <= high:
        span = min((low & -low).bit_length() - 1 if low else width, (high - low + 1).bit_length() - 1)
        yield Network(Address(low.to_bytes(len(first))), width - span)
        low += 1 << span


def disjoint(networks: Iterable[Network]) -> tuple[Network, ...]:
    """The same addresses without ranges inside of others, sorted (an interval set takes no overlap)."""
    found: list[Network] = []
    for each in sorted(set(networks), key=lambda one: (len(one.address), one.address, one.prefix)):
        if not (found and each.address in found[-1]):  # one that holds it has a lower address, or is wider
            found.append(each)
    return tuple(found)


# ---------------------------------------------------------------------------------------------- Kubernetes words


class Problem(NamedTuple):
    """One thing wrong with one object of the input; the object is skipped, everything else goes on."""

    source: str
    """File name or other origin, as the user gave it."""
    line: int
    """1-based line where the object (or the fault) starts; 0 when the origin has no lines."""
    object: str
    """`Kind namespace/name`, or "" when the document is too broken to tell."""
    field: str
    """Path inside the object, as `spec.ports[0].port`; "" when the whole object is meant."""
    reason: str

    def __str__(self) -> str:
        place = f"{self.source}:{self.line}" if self.line else self.source
        return ": ".join(part for part in (place, self.object, self.field, self.reason) if part)


class ObjectName(NamedTuple):
    """Identity of a namespaced object of one kind; prints as `namespace/name`."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class ServicePortName(NamedTuple):
    """Identity of one port of one Service; prints as `namespace/name:port`, or `namespace/name` for an unnamed port."""

    namespace: str
    name: str
    port: str = ""

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}:{self.port}" if self.port else f"{self.namespace}/{self.name}"


class ServiceType(Enum):
    """core/v1 ServiceType."""

    CLUSTER_IP = "ClusterIP"
    NODE_PORT = "NodePort"
    LOAD_BALANCER = "LoadBalancer"
    EXTERNAL_NAME = "ExternalName"


class ServicePort(Struct, frozen=True, gc=False):
    """One entry of `spec.ports`. `node_port` 0 = none."""

    name: str
    protocol: Protocol
    port: int
    node_port: int = 0


class Service(Struct, frozen=True, gc=False):
    """core/v1 Service, as far as a proxy and a DNS server read it.

    `cluster_ips` is empty for a headless Service (`clusterIP: None`) and for one that has no address yet.
    """

    name: ObjectName
    type: ServiceType = ServiceType.CLUSTER_IP
    cluster_ips: tuple[Address, ...] = ()
    ports: tuple[ServicePort, ...] = ()
    headless: bool = False
    external_ips: tuple[Address, ...] = ()
    load_balancer_ips: tuple[Address, ...] = ()
    """`status.loadBalancer.ingress[].ip` whose ipMode is unset or VIP."""
    source_ranges: tuple[Network, ...] = ()
    affinity_seconds: int = 0
    """sessionAffinity ClientIP timeout; 0 = no affinity."""
    internal_local: bool = False
    """internalTrafficPolicy: Local."""
    external_local: bool = False
    """externalTrafficPolicy: Local."""
    health_check_node_port: int = 0
    external_name: str = ""
    publish_not_ready: bool = False
    other_proxy: str = ""
    """Label service.kubernetes.io/service-proxy-name: left to that proxy."""
    created: str = ""
    """metadata.creationTimestamp, RFC 3339 text; of two Services that claim one address the older wins."""
    scheduler: str = ""
    """Annotation; "" = the agent's default."""
    scheduler_flags: int = 0
    """IP_VS_SVC_F_SCHED1..3, from the annotation's flag names."""
    drain_seconds: int = -1
    """Annotation; -1 = the agent's default."""


class Endpoint(Struct, frozen=True, gc=False):
    """discovery.k8s.io/v1 Endpoint with its conditions resolved (nil = ready, serving, not terminating)."""

    address: Address
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    node: str = ""
    zone: str = ""
    zone_hints: tuple[str, ...] = ()
    node_hints: tuple[str, ...] = ()
    hostname: str = ""
    weight: int = 1


class EndpointPort(Struct, frozen=True, gc=False):
    """One entry of a slice's `ports`; `port` is the real target port."""

    name: str
    protocol: Protocol
    port: int


class EndpointSlice(Struct, frozen=True, gc=False):
    """discovery.k8s.io/v1 EndpointSlice of the Service named by its label; family is that of `addressType`."""

    name: ObjectName
    service: ObjectName
    family: Family
    ports: tuple[EndpointPort, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()


class ServiceView(Struct, frozen=True, gc=False):
    """Everything known of one Service: the object, if there is one, and the slices that name it, sorted by name."""

    service: Service | None = None
    slices: tuple[EndpointSlice, ...] = ()


Cluster = dict[ObjectName, ServiceView]
"""One consistent snapshot of every Service known, by name."""


class Update(Struct, frozen=True):
    """What a source delivers: the Services that changed since its last Update, each with its whole new content.

    The first Update of a source holds everything it knows. None = no object names this Service any more.
    `problems` are all that stand at this moment, not only the new ones. `place`: what the source says of this node
    itself is no longer what it was. `triggers`: when the changes began that make up this Update, in seconds since the
    epoch, as far as their objects say so.
    """

    changed: dict[ObjectName, ServiceView | None]
    problems: tuple[Problem, ...] = ()
    place: bool = False
    triggers: tuple[float, ...] = ()


# ----------------------------------------------------------------------------------------------------- LVS words


class Forwarding(IntEnum):
    """IP_VS_CONN_F_* forwarding methods (linux/ip_vs.h)."""

    MASQ = 0
    LOCAL = 1
    TUNNEL = 2
    ROUTE = 3


class ServerFlags(IntEnum):
    """IP_VS_SVC_F_* (linux/ip_vs.h) a VirtualServer may carry; PERSISTENT follows from `persistence`."""

    ONE_PACKET = 0x04
    SCHED_1 = 0x08
    SCHED_2 = 0x10
    SCHED_3 = 0x20


class Masquerade(Enum):
    """Whose source address is rewritten on the way to a real server (hairpin traffic always is)."""

    DETECT = "detect"
    """Clients that are not local by the agent's detect-local method, or everyone with masquerade-all."""
    NODE = "node"
    """Processes of this node only (externalTrafficPolicy Local: everybody else keeps his address)."""
    ALWAYS = "always"
    """Everybody (external addresses with policy Cluster: the answer has to come back this way)."""


class NoServers(Enum):
    """What a client gets when a VirtualServer has no real server (kube-proxy: no endpoints / no local endpoints)."""

    REJECT = "reject"
    DROP = "drop"


class Kind(Enum):
    """What sort of address of its Service a VirtualServer is at."""

    CLUSTER_IP = "ClusterIP"
    NODE_PORT = "NodePort"
    EXTERNAL_IP = "ExternalIP"
    LOAD_BALANCER = "LoadBalancer"


class VirtualAddress(NamedTuple):
    """What identifies a VirtualServer: protocol number, packed address, port, and for whom.

    `inside`: it serves clients inside the cluster only (pods, told by the detect-local method, and processes of this
    node); there is always another one beside it, for everybody else (kube-proxy's short circuits, KEP-1138).
    """

    protocol: int
    address: Address
    port: int
    inside: bool = False

    def __str__(self) -> str:
        text = f"{_PROTOCOL_NAMES[self.protocol]} {format_endpoint(self.address, self.port)}"
        return f"{text} (inside)" if self.inside else text


class RealServer(Struct, frozen=True, gc=False, order=True):
    """One backend of a VirtualServer.

    `weight` 0 takes no new connections (draining). `local`: it runs, or may run, on this node, so it may reach itself
    through the VIP (hairpin). Thresholds are connection counts, 0 = none.
    """

    address: Address
    port: int
    weight: int = 1
    local: bool = False
    forwarding: Forwarding = Forwarding.MASQ
    upper_threshold: int = 0
    lower_threshold: int = 0

    def __str__(self) -> str:
        return format_endpoint(self.address, self.port)


class VirtualServer(Struct, frozen=True, gc=False):
    """A VIP:port and how its connections are spread; desired and observed state are both made of these.

    `real_servers` is sorted and holds no (address, port) twice. `persistence`: seconds a client sticks to its real
    server, 0 = not at all; `persistence_prefix`: bits of the client address that make a client.
    """

    at: VirtualAddress
    real_servers: tuple[RealServer, ...] = ()
    scheduler: str = "rr"
    flags: int = 0
    persistence: int = 0
    persistence_prefix: int = 32
    masquerade: Masquerade = Masquerade.DETECT
    no_servers: NoServers = NoServers.REJECT
    bound: bool = True
    """The address is a cluster IP: made local on this node where the mode needs that, and other ports are refused."""
    label: str = ""
    """Whose it is, for people: `namespace/name:port`; kept in the kernel as a comment where the mode has comments."""
    kind: Kind = Kind.CLUSTER_IP
    allowed: tuple[Network, ...] = ()
    """Who may connect (loadBalancerSourceRanges), sorted, none inside another; () = everybody."""

    def serves(self) -> bool:
        """Some real server takes new connections."""
        reals = self.real_servers
        return bool(reals) and (reals[0].weight > 0 or any(real.weight for real in reals))
