"""From Kubernetes words to LVS words: every rule of a Service is decided here, once, for all modes.

    ServiceView ──choose endpoints──▶ RealServers ──one per VIP and port──▶ VirtualServers

Pure. `virtual_servers()` looks at one Service; `Desired` holds the whole wanted state and recomputes only the Services
that changed. Which endpoints serve, and what happens when none does, follows kube-proxy's shared code
(pkg/proxy/topology.go, serviceport.go).
"""

from typing import NamedTuple

from msgspec import Struct

from .model import (
    Address,
    Endpoint,
    Family,
    Masquerade,
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
    family_of,
)

DEFAULT_DRAIN_SECONDS = 900


class Rules(Struct, frozen=True):
    """What the node and its administrator add to the objects.

    `node_name`/`zone`: this node's, "" = unknown. `drain_seconds`: how long a removed real server may finish its
    connections.
    """

    node_name: str = ""
    zone: str = ""
    scheduler: str = "rr"
    drain_seconds: int = DEFAULT_DRAIN_SECONDS


class Chosen(NamedTuple):
    """The endpoints of one service port that may be used, by traffic policy; `anywhere`: some endpoint is usable."""

    cluster: tuple[RealServer, ...]
    local: tuple[RealServer, ...]
    anywhere: bool


def virtual_servers(view: ServiceView, rules: Rules) -> list[VirtualServer]:
    """Every virtual server of one Service; none for headless, ExternalName, unaddressed or another proxy's Services."""
    service = view.service
    if service is None or service.other_proxy or service.headless or service.type is ServiceType.EXTERNAL_NAME:
        return []
    servers = []
    for port in service.ports:
        chosen: dict[Family, Chosen] = {}
        for vip in service.cluster_ips:
            family = family_of(vip)
            if family not in chosen:
                chosen[family] = choose(view, port, family, rules)
            servers.append(_cluster_ip_server(service, port, vip, chosen[family], rules))
    return servers


def _cluster_ip_server(
    service: Service, port: ServicePort, vip: Address, chosen: Chosen, rules: Rules
) -> VirtualServer:
    reals = chosen.local if service.internal_local else chosen.cluster
    elsewhere = chosen.anywhere and not reals
    return VirtualServer(
        VirtualAddress(int(port.protocol), vip, port.port),
        reals,
        service.scheduler or rules.scheduler,
        service.scheduler_flags,
        service.affinity_seconds,
        8 * len(vip) if service.affinity_seconds else 32,
        Masquerade.DETECT,
        NoServers.DROP if elsewhere else NoServers.REJECT,
        True,
        str(ServicePortName(*service.name, port.name)),
    )


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

    def update(self, update: Update) -> set[VirtualAddress]:
        """Take in what a source delivered; returns the virtual addresses whose server may have changed."""
        touched: set[VirtualAddress] = set()
        fresh: dict[tuple[ObjectName, VirtualAddress], VirtualServer] = {}
        for name, view in update.changed.items():
            touched.update(self._forget(name))
            for server in virtual_servers(view, self.rules) if view else ():
                self._claim(name, view, server)
                fresh[name, server.at] = server
                touched.add(server.at)
        for at in touched:
            self._settle(at, fresh)
        return touched

    def drain_seconds(self, at: VirtualAddress) -> int:
        """How long real servers of this virtual address may drain; a Service that is gone leaves the default."""
        return self._drains.get(at, self.rules.drain_seconds)

    @property
    def conflicts(self) -> tuple[Problem, ...]:
        """Services that want a virtual address which another Service has."""
        claimed = [(at, *self._claims[at]) for at in sorted(self._contested)]
        return tuple(
            Problem("services", 0, f"Service {loser}", "spec.clusterIP", f"{at} belongs to Service {owner}")
            for at, owner, *losers in claimed
            for loser in losers
        )

    def _forget(self, name: ObjectName) -> tuple[VirtualAddress, ...]:
        addresses = self._addresses.pop(name, ())
        for at in addresses:
            claims = self._claims[at]
            claims.remove(name)
            if len(claims) < 2:
                self._contested.discard(at)
            if not claims:
                del self._claims[at]
        self._views.pop(name, None)
        return addresses

    def _claim(self, name: ObjectName, view: ServiceView | None, server: VirtualServer) -> None:
        assert view is not None
        self._views[name] = view
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
        claims = self._claims.get(at)
        if not claims:
            self.servers.pop(at, None)
            return
        owner = claims[0]
        view = self._views[owner]
        server = fresh.get((owner, at))
        self.servers[at] = server or next(s for s in virtual_servers(view, self.rules) if s.at == at)
        if view.service and view.service.drain_seconds >= 0:
            self._drains[at] = view.service.drain_seconds
        else:
            self._drains.pop(at, None)
