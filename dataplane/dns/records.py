"""What a name has: every rule of the Kubernetes DNS specification 1.1.0 and of CoreDNS, decided here. Pure.

    <service>.<namespace>.svc.<zone>                    A, AAAA; CNAME of an ExternalName
    <endpoint>.<service>.<namespace>.svc.<zone>         A, AAAA of one endpoint, by hostname or dashed address
    _<port>._<protocol>.<service>.<namespace>.svc.<zone>    SRV
    <reversed address>.in-addr.arpa, .ip6.arpa          PTR of cluster IPs and of endpoints of headless Services
    dns-version.<zone>                                  TXT

Where CoreDNS (plugin/kubernetes: parseRequest, findServices) gives more than the specification asks, or denies a name
that the DNS knows as an empty one, `Rules.coredns` chooses.
"""

from collections.abc import Mapping
from typing import TypeVar

from msgspec import Struct

from ..model import Address, ObjectName, Service, ServiceType, ServiceView, format_address
from .endpoints import Target, cluster_ips, headless_targets, targets
from .names import Labels, as_text, parse_domain, reverse_address
from .rrsets import (
    AAAA,
    ANY,
    CNAME,
    NOERROR,
    NS,
    NXDOMAIN,
    PTR,
    SRV,
    TXT,
    ZONE,
    A,
    Dependency,
    Found,
    RRset,
    address_sets,
)

VERSION, VERSION_TTL = "1.1.0", 28800
ALIASES = 8
"""CNAME records in a row that are followed, as many as CoreDNS follows."""
ANY_TTL = 3600
_Entry = TypeVar("_Entry")


class Rules(Struct, frozen=True):
    """The administrator's part. `ttl`: seconds. `addresses`: where this server listens, the glue of the zone's NS.

    `coredns`: its behaviour where it differs from the specification. `ignore_empty`: a Service without a ready endpoint
    does not exist, so that resolvers go on along their search path (CoreDNS: `ignore empty_service`).
    """

    domain: str = "cluster.local"
    ttl: int = 5
    coredns: bool = True
    ignore_empty: bool = False
    addresses: tuple[Address, ...] = ()


class Records:
    """The names of all Services. Not safe for threads by itself (`answers` has the lock)."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.zone = parse_domain(rules.domain)
        self._views: dict[ObjectName, ServiceView] = {}
        self._namespaces: dict[str, int] = {}
        self._vips: dict[Address, tuple[ObjectName, ...]] = {}
        self._hosts: dict[Address, tuple[tuple[ObjectName, str], ...]] = {}
        """Of each address of a headless endpoint the Services and its labels in them."""

    @property
    def services(self) -> int:
        """Services that have a name."""
        return sum(self._namespaces.values())

    def update(self, changed: Mapping[ObjectName, ServiceView | None]) -> set[Dependency]:
        """Take over what changed; what answers may have been made from that is no longer so."""
        touched: set[Dependency] = set()
        for name, view in changed.items():
            before = self._views.pop(name, None)
            if view is not None and view.service is None:
                view = None  # slices without a Service have no name
            if view is not None:
                self._views[name] = view
            touched.add(name)
            self._index(name, before, view, touched)
        return touched

    def _index(
        self, name: ObjectName, before: ServiceView | None, after: ServiceView | None, touched: set[Dependency]
    ) -> None:
        count = self._namespaces.get(name.namespace, 0) + (after is not None) - (before is not None)
        if count:
            self._namespaces[name.namespace] = count
        else:
            self._namespaces.pop(name.namespace, None)
        for address in cluster_ips(before):
            _discard(self._vips, address, name)
            touched.add(address)
        for address in cluster_ips(after):
            self._vips[address] = (*self._vips.get(address, ()), name)
            touched.add(address)
        for target in headless_targets(before):
            _discard(self._hosts, target.address, (name, target.label))
            touched.add(target.address)
        for target in headless_targets(after):
            self._hosts[target.address] = (*self._hosts.get(target.address, ()), (name, target.label))
            touched.add(target.address)

    # ------------------------------------------------------------------------------------------------------ looking

    def look(self, labels: Labels, qtype: int, steps: list[str] | None = None) -> Found | None:
        """What the name has of a type; None: it is not ours to say. `steps` takes the explanation."""
        depth = len(self.zone)
        if labels[-depth:] == self.zone:
            _tell(steps, f"it ends with the zone {as_text(self.zone)}")
            found: Found | None = self._inside(labels[:-depth], qtype, steps)
        else:
            address = reverse_address(labels)
            found = None if address is None else self._reverse(labels, address, qtype, steps)
        if found is None:
            _tell(steps, f"it is not in the zone {as_text(self.zone)}, nor an address that is known here")
            return None
        if qtype == ANY and found.rcode == NOERROR and not found.alias:
            minimal = RRset(as_text(labels), "HINFO", ANY_TTL, ('"RFC8482" ""',))
            _tell(steps, "ANY gets one record that says nothing (RFC 8482)")
            return found._replace(answer=(minimal,), additional=())
        return found

    def _inside(self, rest: Labels, qtype: int, steps: list[str] | None) -> Found:
        zone, rules = self.zone, self.rules
        if not rest:
            _tell(steps, "it is the zone itself")
            if qtype == NS:
                server = as_text(("ns", "dns", *zone))
                glue = address_sets(server, rules.addresses, rules.ttl, (A, AAAA))
                return self._some((RRset(as_text(zone), "NS", rules.ttl, (server,)),), glue)
            return self._empty("has no such record", steps)  # its SOA is made where the serial is (`answers`)
        if rest == ("dns-version",):
            _tell(steps, f"it tells the version of the specification, {VERSION}")
            text = RRset(as_text((*rest, *zone)), "TXT", VERSION_TTL, (f'"{VERSION}"',))
            return self._some((text,)) if qtype == TXT else self._empty("has TXT only", steps)
        if rest in (("dns",), ("ns", "dns")):
            _tell(steps, "it is this server's own name")
            answer = address_sets(
                as_text((*rest, *zone)), rules.addresses if len(rest) == 2 else (), rules.ttl, (qtype,)
            )
            return self._some(answer) if answer else self._empty("has no such record", steps)
        if rest[-1] != "svc":
            if rest == ("pod",) and rules.coredns:
                return self._empty("names of pods are gone from the specification", steps)
            return self._none(f"below the zone there is svc, and no {rest[-1]}", steps)
        if len(rest) == 1:
            return self._empty("the parent of all namespaces has no records itself", steps)
        namespace = rest[-2]
        if namespace not in self._namespaces:
            return self._none(f"no Service is in a namespace {namespace}", steps)
        if len(rest) == 2:
            return self._empty(f"namespace {namespace} is there, and has no records itself", steps)
        name = ObjectName(namespace, rest[-3])
        view = self._views.get(name)
        if view is None or view.service is None:
            return self._none(f"no Service {name}", steps)
        return self._service(view.service, view, rest[:-3], qtype, steps)

    def _service(
        self, service: Service, view: ServiceView, extra: Labels, qtype: int, steps: list[str] | None
    ) -> Found:
        name, coredns = service.name, self.rules.coredns
        if service.type is ServiceType.EXTERNAL_NAME:
            return self._external(service, extra, qtype, steps)
        if len(extra) > 2:
            return self._none("that many labels before a Service mean nothing", steps)
        endpoint = extra[0] if len(extra) == 1 else ""
        port, protocol = extra if len(extra) == 2 else ("", "")
        if len(extra) == 2:
            if not coredns and not (port.startswith("_") and protocol.startswith("_")):
                return self._none("a port's name is like _http._tcp", steps)
            port, protocol = port.removeprefix("_"), protocol.removeprefix("_")
            if not port or not protocol:
                return self._none("a port's name is like _http._tcp", steps)
        if endpoint and not coredns:
            if endpoint in {f"_{each.protocol.name.lower()}" for each in service.ports if each.name}:
                return self._empty("names of ports are below it", steps, name)
            if not service.headless:
                return self._none("only endpoints of headless Services have names", steps)
        if service.headless or endpoint:
            _tell(steps, f"Service {name} is headless" if service.headless else f"Service {name} has a cluster IP")
            return self._endpoints(service, view, (endpoint, port, protocol), qtype, steps)
        if self.rules.ignore_empty and next(targets(view), None) is None:
            return self._none(f"Service {name} has no ready endpoint, and such are ignored", steps)
        ports = [
            each for each in service.ports if not port or (each.name, each.protocol.name.lower()) == extra_of(extra)
        ]
        if not ports:
            return self._none(f"Service {name} has no port {port} with {protocol}", steps)
        own = as_text((name.name, name.namespace, "svc", *self.zone))
        _tell(steps, f"Service {name} has {', '.join(map(format_address, service.cluster_ips)) or 'no cluster IP yet'}")
        asked = as_text((*extra, name.name, name.namespace, "svc", *self.zone))
        if qtype == SRV and (port or coredns):
            entries = [(each.port, own) for each in ports] if service.cluster_ips else []
            return self._srv(
                asked, entries, address_sets(own, service.cluster_ips, self.rules.ttl, (A, AAAA)), name, steps
            )
        if port and not coredns:
            return self._empty("a port's name has SRV only", steps, name)
        return self._addressed(asked, service.cluster_ips, qtype, name, steps)

    def _endpoints(
        self, service: Service, view: ServiceView, asked: tuple[str, str, str], qtype: int, steps: list[str] | None
    ) -> Found:
        endpoint, port, protocol = asked
        name, coredns = service.name, self.rules.coredns
        base = (name.name, name.namespace, "svc", *self.zone)
        extra = (endpoint,) if endpoint else (f"_{port}", f"_{protocol}") if port else ()
        found: list[Target] = []
        for each in targets(view):
            ports = tuple(one for one in each.ports if not port or one[:2] == (port, protocol))
            if endpoint in ("", each.label) and (ports or not port):
                found.append(each._replace(ports=ports))
        if not found:
            what = (
                f"no ready endpoint {endpoint}" if endpoint else f"no ready endpoint{' with that port' if port else ''}"
            )
            return self._none(f"Service {name} has {what}", steps)
        _tell(
            steps, f"ready endpoints: {len(found)}, the first is {found[0].label} at {format_address(found[0].address)}"
        )
        own = as_text((*extra, *base))
        if qtype == SRV and (port or coredns):
            entries = [(number, as_text((each.label, *base))) for each in found for _, _, number in each.ports]
            known: dict[str, list[Address]] = {}
            for each in found:
                known.setdefault(as_text((each.label, *base)), []).append(each.address)
            extras = tuple(
                one
                for host, some in known.items()
                for one in address_sets(host, tuple(some), self.rules.ttl, (A, AAAA))
            )
            return self._srv(own, entries, extras, name, steps)
        if port and not coredns:
            return self._empty("a port's name has SRV only", steps, name)
        return self._addressed(own, tuple(dict.fromkeys(each.address for each in found)), qtype, name, steps)

    def _external(self, service: Service, extra: Labels, qtype: int, steps: list[str] | None) -> Found:
        name = service.name
        if extra:
            return self._none(f"Service {name} is an ExternalName: nothing is below it", steps)
        owner = as_text((name.name, name.namespace, "svc", *self.zone))
        alias = service.external_name + "."
        answer: tuple[RRset, ...] = (RRset(owner, "CNAME", self.rules.ttl, (alias,)),)
        depends: tuple[Dependency, ...] = (name,)
        _tell(steps, f"Service {name} is an ExternalName, another name for {alias}")
        labels = tuple(alias[:-1].split("."))
        if qtype in (CNAME, ANY):
            return Found(NOERROR, self.zone, answer, (), depends)
        depth = len(self.zone)
        for _ in range(ALIASES - 1):
            if labels[-depth:] != self.zone:
                return Found(NOERROR, self.zone, answer, (), depends, alias)
            inside = labels[:-depth]
            if any(rrset.name == alias for rrset in answer):
                _tell(steps, "the names go round in a circle")
                break
            if len(inside) >= 3:  # also when it is not there: the answer is another when it comes
                depends += (ObjectName(inside[-2], inside[-3]),)
            view = self._views.get(ObjectName(inside[1], inside[0])) if len(inside) == 3 else None
            target = view.service if view is not None and inside[2] == "svc" else None
            if target is None or target.type is not ServiceType.EXTERNAL_NAME:
                answer += self._inside(inside, qtype, steps).answer
                break
            further = target.external_name + "."
            answer += (RRset(alias, "CNAME", self.rules.ttl, (further,)),)
            _tell(steps, f"Service {target.name} is another name for {further}")
            alias, labels = further, tuple(further[:-1].split("."))
        return Found(NOERROR, self.zone, answer, (), depends)

    def _reverse(self, labels: Labels, address: Address, qtype: int, steps: list[str] | None) -> Found | None:
        owners = self._vips.get(address, ())
        hosts = self._hosts.get(address, ())
        base = ("svc", *self.zone)
        if owners:
            _tell(steps, f"{format_address(address)} is a cluster IP of {', '.join(map(str, owners))}")
            found = [as_text((name.name, name.namespace, *base)) for name in owners]
        elif hosts:
            owners = tuple(name for name, _ in hosts)
            _tell(steps, f"{format_address(address)} is an endpoint of {', '.join(map(str, owners))}, headless")
            found = [as_text((label, name.name, name.namespace, *base)) for name, label in hosts]
        else:
            return None
        depends: tuple[Dependency, ...] = (address, *owners)
        if qtype != PTR:
            _tell(steps, "an address has PTR only")
            return Found(NOERROR, labels[-2:], depends=depends)
        answer = RRset(as_text(labels), "PTR", self.rules.ttl, tuple(dict.fromkeys(found)))
        return Found(NOERROR, labels[-2:], (answer,), (), depends)

    # ----------------------------------------------------------------------------------------------------- outcomes

    def _some(self, answer: tuple[RRset, ...], additional: tuple[RRset, ...] = ()) -> Found:
        return Found(NOERROR, self.zone, answer, additional, (ZONE,))

    def _none(self, why: str, steps: list[str] | None) -> Found:
        _tell(steps, f"{why}: NXDOMAIN")
        return Found(NXDOMAIN, self.zone)

    def _empty(self, why: str, steps: list[str] | None, *depends: Dependency) -> Found:
        _tell(steps, f"{why}: NODATA")
        return Found(NOERROR, self.zone, depends=depends)

    def _addressed(
        self, owner: str, addresses: tuple[Address, ...], qtype: int, name: ObjectName, steps: list[str] | None
    ) -> Found:
        answer = address_sets(owner, addresses, self.rules.ttl, (qtype,))
        if not answer:
            return self._empty("of this type it has nothing", steps, name)
        return Found(NOERROR, self.zone, answer, (), (name,))

    def _srv(
        self,
        owner: str,
        entries: list[tuple[int, str]],
        additional: tuple[RRset, ...],
        name: ObjectName,
        steps: list[str] | None,
    ) -> Found:
        """Priority 0, and 100 of weight shared by all, as in CoreDNS (plugin/backend_lookup.go)."""
        entries = list(dict.fromkeys(entries))
        if not entries:
            return self._empty("it has no port", steps, name)
        weight = max(1, 100 // len(entries))
        data = tuple(f"0 {weight} {port} {target}" for port, target in entries)
        return Found(NOERROR, self.zone, (RRset(owner, "SRV", self.rules.ttl, data),), additional, (name,))


def extra_of(extra: Labels) -> tuple[str, str]:
    """Port and protocol of `_http._tcp`."""
    return extra[0].removeprefix("_"), extra[1].removeprefix("_")


def _discard(index: dict[Address, tuple[_Entry, ...]], address: Address, entry: _Entry) -> None:
    kept = tuple(each for each in index.get(address, ()) if each != entry)
    if kept:
        index[address] = kept
    else:
        index.pop(address, None)


def _tell(steps: list[str] | None, text: str) -> None:
    if steps is not None:
        steps.append(text)
