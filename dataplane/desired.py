"""From Kubernetes words to LVS words: every rule of a Service is decided here, once, for all modes.

    ServiceView ──choose endpoints──▶ RealServers ──one per VIP and port──▶ VirtualServers

Pure. `virtual_servers()` looks at one Service; `Desired` holds the whole wanted state and recomputes only the Services
that changed. Which endpoints serve, and what happens when none does, follows kube-proxy's shared code
(pkg/proxy/topology.go, serviceport.go).
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from .model import (
    Address,
    Endpoint,
    Family,
    Kind,
    Masquerade,
    Network,
    NoServers,
    ObjectName,
    Problem,
    RealServer,
    Service,
    ServicePort,
    ServicePortName,
    ServiceType,
    ServiceView,
    Update,
    VirtualAddress,
    VirtualServer,
    disjoint,
    family_of,
    format_address,
)

DEFAULT_DRAIN_SECONDS = 900


class Rules(Struct, frozen=True):
    """What the node and its administrator add to the objects.

    `node_name`/`zone`: this node's, "" = unknown. `drain_seconds`: how long a removed real server may finish its
    connections. `node_addresses`: this node's own, without loopback and link-local ones. `node_ips`: its main address
    of each family; () = the first of `node_addresses`. `node_port_ranges`: node ports are served on node addresses
    within these; a family without any is served on all of its addresses. `primary_node_ports`: on its main addresses,
    and on those within the ranges.
    `external_ip_ranges`: the externalIPs that a Service may claim (CVE-2020-8554: whoever may write a Service could
    take any address); () = none.
    """

    node_name: str = ""
    zone: str = ""
    scheduler: str = "rr"
    drain_seconds: int = DEFAULT_DRAIN_SECONDS
    node_addresses: tuple[Address, ...] = ()
    node_ips: tuple[Address, ...] = ()
    node_port_ranges: tuple[Network, ...] = ()
    primary_node_ports: bool = False
    external_ip_ranges: tuple[Network, ...] = ()

    def main_address(self, family: Family) -> Address | None:
        """This node's address of a family, if it has one."""
        given = (one for one in (*self.node_ips, *self.node_addresses) if len(one) == WIDTHS[family])
        return next(given, None)

    def node_port_addresses(self, family: Family) -> list[Address]:
        """Where node ports of a family are served."""
        width = WIDTHS[family]
        ranges = [each for each in self.node_port_ranges if len(each.address) == width]
        main = self.main_address(family) if self.primary_node_ports else None
        everywhere = not ranges and not self.primary_node_ports
        mine = (one for one in self.node_addresses if len(one) == width)
        found = [one for one in mine if everywhere or one == main or any(one in each for each in ranges)]
        return found if main is None or main in found else [main, *found]

    def may_claim(self, address: Address) -> bool:
        """Whether a Service may have it as an external IP."""
        return any(address in each for each in self.external_ip_ranges)


WIDTHS = {Family.IPV4: 4, Family.IPV6: 16}


class Chosen(NamedTuple):
    """The endpoints of one service port that may be used, by traffic policy; `anywhere`: some endpoint is usable."""

    cluster: tuple[RealServer, ...]
    local: tuple[RealServer, ...]
    anywhere: bool


class Shares(NamedTuple):
    """Who of the endpoints of one service port serves at which of its addresses, and what becomes of clients if nobody
    does. `inside`: for clients inside the cluster at its external addresses; () = they are served as everybody is.

    Policy Local: clients from outside keep their address and get endpoints of this node only; clients inside the
    cluster need no such favour and get any endpoint, by a virtual server of their own.
    """

    cluster_ip: tuple[RealServer, ...]
    no_cluster_ip: NoServers
    external: tuple[RealServer, ...]
    no_external: NoServers
    inside: tuple[RealServer, ...]


def _shares(service: Service, chosen: Chosen) -> Shares:
    cluster, local, anywhere = chosen
    cluster_ip = local if service.internal_local else cluster
    external = cluster
    inside: tuple[RealServer, ...] = ()
    if service.external_local:
        external = local
        if cluster != local and any(real.weight for real in cluster):
            inside = cluster
    return Shares(
        cluster_ip,
        NoServers.DROP if anywhere and not cluster_ip else NoServers.REJECT,
        external,
        NoServers.DROP if anywhere and not external else NoServers.REJECT,
        inside,
    )


def virtual_servers(view: ServiceView, rules: Rules) -> list[VirtualServer]:
    """Every virtual server of one Service; none for headless, ExternalName, unaddressed or another proxy's Services.

    A family in which the Service has no cluster IP is not served at all, whatever external addresses it names.
    """
    service = view.service
    if service is None or not proxied(service):
        return []
    external = _external(service)
    servers = []
    for port in service.ports:
        for vip in service.cluster_ips:
            shares = _shares(service, choose(view, port, family_of(vip), rules))
            servers.append(_cluster_ip_server(service, port, vip, shares, rules))
            if external:
                servers += _external_servers(service, port, family_of(vip), shares, rules)
    return _one_at_each(servers) if external and len(service.ports) > 1 else servers


EXTERNAL_TYPES = (ServiceType.NODE_PORT, ServiceType.LOAD_BALANCER)


def proxied(service: Service) -> bool:
    """Whether a Service is this program's business."""
    return not (service.other_proxy or service.headless or service.type is ServiceType.EXTERNAL_NAME)


def _one_at_each(servers: list[VirtualServer]) -> list[VirtualServer]:
    """Where two ports of a Service meet at one address (a node port's number on an external IP that is the node's).

    The node port gives way, as in kube-proxy, and with it what it has for clients inside.
    """
    kept: dict[VirtualAddress, VirtualServer] = {}
    for server in servers:
        other = kept.get(server.at)
        if other is None or (other.kind is Kind.NODE_PORT and server.kind is not Kind.NODE_PORT):
            kept[server.at] = server
    if len(kept) == len(servers):
        return servers
    return [one for at, one in kept.items() if not at.inside or kept[at._replace(inside=False)].label == one.label]


def _label(name: ObjectName, port: ServicePort) -> str:
    return str(ServicePortName(name.namespace, name.name, port.name))


def _cluster_ip_server(
    service: Service, port: ServicePort, vip: Address, shares: Shares, rules: Rules
) -> VirtualServer:
    return VirtualServer(
        VirtualAddress(int(port.protocol), vip, port.port),
        shares.cluster_ip,
        service.scheduler or rules.scheduler,
        service.scheduler_flags,
        service.affinity_seconds,
        8 * len(vip) if service.affinity_seconds else 32,
        Masquerade.DETECT,
        shares.no_cluster_ip,
        True,
        _label(service.name, port),
    )


def _external_servers(
    service: Service, port: ServicePort, family: Family, shares: Shares, rules: Rules
) -> Iterator[VirtualServer]:
    """The virtual servers at node ports, external IPs and load balancer IPs of one port, in one family."""
    width = WIDTHS[family]
    allowed = _allowed(service, family, rules)
    for kind, address, number in _external_addresses(service, port, family, rules):
        server = VirtualServer(
            VirtualAddress(int(port.protocol), address, number),
            shares.external,
            service.scheduler or rules.scheduler,
            service.scheduler_flags,
            service.affinity_seconds,
            8 * width if service.affinity_seconds else 32,
            Masquerade.NODE if service.external_local else Masquerade.ALWAYS,
            shares.no_external,
            False,
            _label(service.name, port),
            kind,
            allowed if kind is Kind.LOAD_BALANCER else (),
        )
        yield server
        if shares.inside:
            at = VirtualAddress(int(port.protocol), address, number, True)
            yield replace(server, at=at, real_servers=shares.inside, no_servers=NoServers.REJECT, allowed=())


def _external_addresses(
    service: Service, port: ServicePort, family: Family, rules: Rules
) -> Iterator[tuple[Kind, Address, int]]:
    """Addresses and ports besides the cluster IP, each once; one that comes up twice is the more public kind."""
    width = WIDTHS[family]
    found: dict[tuple[Address, int], Kind] = {}
    if port.node_port and service.type in EXTERNAL_TYPES:
        for address in rules.node_port_addresses(family):
            found[address, port.node_port] = Kind.NODE_PORT
    for address in service.external_ips:
        if len(address) == width and rules.may_claim(address):
            found[address, port.port] = Kind.EXTERNAL_IP
    for address in service.load_balancer_ips:
        if len(address) == width:
            found[address, port.port] = Kind.LOAD_BALANCER
    for address in service.cluster_ips:
        found.pop((address, port.port), None)
    for (address, number), kind in found.items():
        yield kind, address, number


def _allowed(service: Service, family: Family, rules: Rules) -> tuple[Network, ...]:
    """Who may connect to the load balancer's addresses; () = everybody.

    A node within the ranges may also come from such an address itself: that is what its source becomes where the
    address is local (kube-proxy's rule for load balancers that answer on the node).
    """
    width = WIDTHS[family]
    ranges = [each for each in service.source_ranges if len(each.address) == width]
    if not ranges or any(each.prefix == 0 for each in ranges):
        return ()
    main = rules.main_address(family)
    if main is not None and any(main in each for each in ranges):
        ranges += [Network(each, 8 * width) for each in service.load_balancer_ips if len(each) == width]
    return disjoint(ranges)


def choose(view: ServiceView, port: ServicePort, family: Family, rules: Rules) -> Chosen:
    """The usable endpoints of one service port (kube-proxy: CategorizeEndpoints).

    A slice's port belongs to a service port of the same name and protocol; the slice's number is the target port.
    Usable = ready; if none is, serving and terminating: decided separately for the whole cluster and for this node.
    """
    joined = _join(view, port, family)
    if not joined:
        return Chosen((), (), False)
    ready = [entry for entry in joined.items() if entry[1].ready]
    fallback = [entry for entry in joined.items() if entry[1].serving and entry[1].terminating]
    mine = rules.node_name
    local_ready = [entry for entry in ready if mine and entry[1].node == mine]
    local_fallback = [entry for entry in fallback if mine and entry[1].node == mine]
    cluster = _topology(ready, rules) if ready else fallback
    return Chosen(
        _real_servers(cluster, rules), _real_servers(local_ready or local_fallback, rules), bool(ready or fallback)
    )


Joined = tuple[tuple[Address, int], Endpoint]


def _join(view: ServiceView, port: ServicePort, family: Family) -> dict[tuple[Address, int], Endpoint]:
    """Endpoints of all slices by (address, target port); of two with one address a running one beats a terminating."""
    joined: dict[tuple[Address, int], Endpoint] = {}
    for one in view.slices:
        if one.family != family:
            continue
        targets = [p.port for p in one.ports if p.name == port.name and p.protocol == port.protocol and p.port]
        for target in targets:
            for endpoint in one.endpoints:
                key = (endpoint.address, target)
                if key not in joined or not endpoint.terminating:
                    joined[key] = endpoint
    return joined


def serving(view: ServiceView, port: ServicePort, family: Family) -> set[tuple[Address, int]]:
    """Endpoints of a service port that still answer, by whatever policy or hint new clients are kept from them."""
    return {key for key, endpoint in _join(view, port, family).items() if endpoint.serving}


def _topology(ready: list[Joined], rules: Rules) -> list[Joined]:
    """Ready endpoints nearest to this node, if every one of them has a hint and some hint means us (KEP-3015, 4444)."""
    if rules.node_name and all(endpoint.node_hints for _, endpoint in ready):
        near = [entry for entry in ready if rules.node_name in entry[1].node_hints]
        if near:
            return near
    if rules.zone and all(endpoint.zone_hints for _, endpoint in ready):
        near = [entry for entry in ready if rules.zone in entry[1].zone_hints]
        if near:
            return near
    return ready


def _real_servers(entries: list[Joined], rules: Rules) -> tuple[RealServer, ...]:
    mine = rules.node_name
    servers = [
        # hand-written slices rarely name a node: an endpoint of unknown place may be here, so it may meet itself
        RealServer(address, port, endpoint.weight, not endpoint.node or endpoint.node == mine)
        for (address, port), endpoint in entries
    ]
    servers.sort()
    return tuple(servers)


class HealthCheck(NamedTuple):
    """A health check node port (KEP-1669): a load balancer asks there whether this node has endpoints.

    Addresses of ready endpoints on this node, in each family.
    """

    port: int
    ipv4: int
    ipv6: int


def local_ready(view: ServiceView, node_name: str) -> tuple[int, int]:
    """How many different addresses of ready endpoints are on this node: IPv4, IPv6."""
    joined: dict[tuple[str, int, Address, int], Endpoint] = {}
    for one in view.slices:
        for port in one.ports:
            for endpoint in one.endpoints:
                key = (port.name, port.protocol, endpoint.address, port.port)
                if key not in joined or not endpoint.terminating:
                    joined[key] = endpoint
    found = {each.address for each in joined.values() if each.ready and node_name and each.node == node_name}
    ipv4 = sum(len(address) == 4 for address in found)
    return ipv4, len(found) - ipv4


def _external(service: Service) -> bool:
    """Whether it has, or may have, addresses besides its cluster IPs."""
    return bool(service.external_ips or service.load_balancer_ips) or service.type in EXTERNAL_TYPES


_FIELDS = {
    Kind.CLUSTER_IP: "spec.clusterIP",
    Kind.NODE_PORT: "spec.ports[].nodePort",
    Kind.EXTERNAL_IP: "spec.externalIPs",
    Kind.LOAD_BALANCER: "status.loadBalancer.ingress",
}


class Desired:
    """The wanted state of the whole node, kept current Service by Service.

    `servers` is what plans are made from. Two Services that claim one virtual address: the older Service has it (then
    the name that sorts first), the other is reported in `conflicts` and takes over when the address becomes free.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.servers: dict[VirtualAddress, VirtualServer] = {}
        self._views: dict[ObjectName, ServiceView] = {}
        self._claims: dict[VirtualAddress, list[ObjectName]] = {}
        self._contested: set[VirtualAddress] = set()
        self._addresses: dict[ObjectName, tuple[VirtualAddress, ...]] = {}
        self._drains: dict[VirtualAddress, int] = {}
        self._refused: dict[ObjectName, tuple[Address, ...]] = {}
        self._health: dict[ObjectName, HealthCheck] = {}
        self._scattered: set[ObjectName] = set()
        self._news: list[ObjectName] = []

    def update(self, update: Update) -> set[VirtualAddress]:
        """Take in what a source delivered; returns the virtual addresses whose server may have changed."""
        return self._take(update.changed, same_rules=True)

    def _take(self, changed: Mapping[ObjectName, ServiceView | None], *, same_rules: bool) -> set[VirtualAddress]:
        disputed = bool(self._contested)
        filled: list[VirtualAddress] = []
        touched: set[VirtualAddress] = set()
        fresh: dict[tuple[ObjectName, VirtualAddress], VirtualServer] = {}
        for name, view in changed.items():
            if same_rules and view is not None and self._refill(name, view):
                filled += self._addresses[name]
                continue
            touched.update(self._forget(name))
            if view is None:
                continue
            self._views[name] = view
            self._note(name, view)
            for server in virtual_servers(view, self.rules):
                self._claim(name, server)
                fresh[name, server.at] = server
                touched.add(server.at)
        if disputed or self._contested:
            # who has an address has it for clients inside as well
            touched |= {twin for at in touched if (twin := at._replace(inside=True)) in self._claims}
        for at in touched:
            self._settle(at, fresh)
        touched.update(filled)
        return touched

    def _refill(self, name: ObjectName, view: ServiceView) -> bool:
        """Take in a Service of which nothing but endpoints has changed, at the addresses it has and nobody disputes.

        What most updates are, hence by a short way to the same as `virtual_servers`; False: it has to go the long way,
        and nothing is changed.
        """
        before, addresses = self._views.get(name), self._addresses.get(name)
        service = view.service
        if before is None or service is None or not addresses or before.service != service:
            return False
        if self._contested and not self._contested.isdisjoint(addresses):
            return False
        ports = {(_label(name, port), int(port.protocol)): port for port in service.ports}
        if len(ports) < len(service.ports):
            return False
        held = self.servers
        shares: dict[tuple[str, int, int], Shares] = {}
        balance: dict[tuple[str, int, int], int] = {}
        filled: list[VirtualServer] = []
        for at in addresses:
            old = held[at]
            protocol, address, _, inside = at
            key = (old.label, protocol, len(address))
            share = shares.get(key)
            if share is None:
                port = ports[old.label, protocol]
                share = shares[key] = _shares(service, choose(view, port, family_of(address), self.rules))
                balance[key] = 0
            if inside:
                reals, nobody = share.inside, NoServers.REJECT
                balance[key] -= 1
            elif old.bound:
                reals, nobody = share.cluster_ip, share.no_cluster_ip
            else:
                reals, nobody = share.external, share.no_external
                if share.inside:
                    balance[key] += 1
            if old.no_servers is nobody and old.real_servers == reals:
                continue
            filled.append(
                VirtualServer(
                    at,
                    reals,
                    old.scheduler,
                    old.flags,
                    old.persistence,
                    old.persistence_prefix,
                    old.masquerade,
                    nobody,
                    old.bound,
                    old.label,
                    old.kind,
                    old.allowed,
                )
            )
        if any(balance.values()):
            return False  # servers for clients inside come or go
        for server in filled:
            held[server.at] = server
        self._views[name] = view
        if service.health_check_node_port:
            self._health[name] = HealthCheck(service.health_check_node_port, *local_ready(view, self.rules.node_name))
        return True

    def drain_seconds(self, at: VirtualAddress) -> int:
        """How long real servers of this virtual address may drain; a Service that is gone leaves the default."""
        return self._drains.get(at, self.rules.drain_seconds)

    def serving(self, at: VirtualAddress) -> set[tuple[Address, int]]:
        """The endpoints that still answer of the Service that has a virtual address, whatever its policies are."""
        server = self.servers.get(at)
        if server is None:
            return set()
        owner = self._claims[at][0]
        view = self._views[owner]
        return {
            place
            for port in (view.service.ports if view.service else ())
            if port.protocol == at.protocol and _label(owner, port) == server.label
            for place in serving(view, port, family_of(at.address))
        }

    def renew(self, rules: Rules) -> set[VirtualAddress]:
        """Go by other rules from now on (a node address came or went, another zone); what may have changed by it."""
        before, self.rules = self.rules, rules
        if before == rules:
            return set()
        same_place = (before.node_name, before.zone, before.scheduler) == (rules.node_name, rules.zone, rules.scheduler)
        if same_place:
            changed = {name: view for name, view in self._views.items() if view.service and _external(view.service)}
        else:
            changed = dict(self._views)
        return self._take(changed, same_rules=False)

    @property
    def health_checks(self) -> dict[ObjectName, "HealthCheck"]:
        """The health check node ports of Services with externalTrafficPolicy Local."""
        return self._health

    def newly_scattered(self) -> list[ObjectName]:
        """Services with affinity that may have several addresses, each told once: not every mode remembers a client for
        all of them together."""
        news, self._news = self._news, []
        return news

    def no_local_endpoints(self) -> tuple[int, int]:
        """Service ports whose traffic is dropped since no endpoint is on this node: internal, external policy."""
        silent = [one for one in self.servers.values() if one.no_servers is NoServers.DROP and not one.real_servers]
        return (
            len({(one.label, len(one.at.address)) for one in silent if one.bound}),
            len({(one.label, len(one.at.address)) for one in silent if not one.bound}),
        )

    @property
    def refusals(self) -> tuple[Problem, ...]:
        """External IPs that Services name and may not have."""
        return tuple(
            Problem(
                "services",
                0,
                f"Service {name}",
                "spec.externalIPs",
                f"{', '.join(map(format_address, addresses))}: not among the allowed external IPs (externalIPRanges)",
            )
            for name, addresses in sorted(self._refused.items())
        )

    @property
    def conflicts(self) -> tuple[Problem, ...]:
        """Services that want a virtual address which another Service has."""
        return tuple(
            Problem(
                "services",
                0,
                f"Service {loser}",
                self._field(loser, at),
                f"{at} belongs to Service {self._claims[at][0]}",
            )
            for at in sorted(self._contested)
            if not at.inside
            for loser in self._claims[at][1:]
        )

    def _field(self, name: ObjectName, at: VirtualAddress) -> str:
        """What of a Service asks for a virtual address."""
        kinds = (one.kind for one in virtual_servers(self._views[name], self.rules) if one.at == at)
        return _FIELDS[next(kinds, Kind.CLUSTER_IP)]

    def _forget(self, name: ObjectName) -> tuple[VirtualAddress, ...]:
        addresses = self._addresses.pop(name, ())
        for at in addresses:
            claims = self._claims[at]
            claims.remove(name)
            if len(claims) < 2:
                self._contested.discard(at)
            if not claims:
                del self._claims[at]
        for book in (self._views, self._refused, self._health):
            book.pop(name, None)
        return addresses

    def _note(self, name: ObjectName, view: ServiceView) -> None:
        """What a Service wants besides virtual servers."""
        service = view.service
        if service is None or not proxied(service) or not service.cluster_ips:
            return
        if service.external_ips:
            refused = tuple(each for each in service.external_ips if not self.rules.may_claim(each))
            if refused:
                self._refused[name] = refused
        if not service.affinity_seconds or not _external(service):
            self._scattered.discard(name)
        elif name not in self._scattered:
            self._scattered.add(name)
            self._news.append(name)
        if service.health_check_node_port:
            self._health[name] = HealthCheck(service.health_check_node_port, *local_ready(view, self.rules.node_name))

    def _claim(self, name: ObjectName, server: VirtualServer) -> None:
        claims = self._claims.setdefault(server.at, [])
        if name not in claims:
            claims.append(name)
            self._addresses[name] = (*self._addresses.get(name, ()), server.at)
            if len(claims) > 1:
                self._contested.add(server.at)
                claims.sort(key=self._seniority)

    def _seniority(self, name: ObjectName) -> tuple[bool, str, ObjectName]:
        service = self._views[name].service
        created = service.created if service else ""
        return not created, created, name

    def _settle(self, at: VirtualAddress, fresh: dict[tuple[ObjectName, VirtualAddress], VirtualServer]) -> None:
        """Give `at` to the first of its claims."""
        claims = self._claims.get(at, ())
        owners = self._claims.get(at._replace(inside=False), ()) if at.inside else claims
        if not owners or owners[0] not in claims:
            self.servers.pop(at, None)
            return
        owner = owners[0]
        view = self._views[owner]
        server = fresh.get((owner, at))
        self.servers[at] = server or next(s for s in virtual_servers(view, self.rules) if s.at == at)
        if view.service and view.service.drain_seconds >= 0:
            self._drains[at] = view.service.drain_seconds
        else:
            self._drains.pop(at, None)
