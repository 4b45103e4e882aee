"""The language the tests are written in: one line of text for a virtual server, a Service, or a set of endpoints."""

import re

from dataplane.model import (
    Address,
    Endpoint,
    EndpointPort,
    EndpointSlice,
    Family,
    Kind,
    Masquerade,
    NoServers,
    ObjectName,
    Protocol,
    RealServer,
    Service,
    ServicePort,
    ServiceView,
    Update,
    VirtualAddress,
    VirtualServer,
    disjoint,
    parse_address,
    parse_network,
)


def split(endpoint: str) -> tuple[Address, int]:
    """`10.0.0.1:80` or `[fd00::1]:80`."""
    host, _, port = endpoint.rpartition(":")
    return parse_address(host.strip("[]")), int(port)


def at(text: str) -> VirtualAddress:
    """`TCP 10.0.1.175:80`, with ` (inside)` behind it when it is for clients inside the cluster."""
    protocol, endpoint, *inside = text.split()
    address, port = split(endpoint)
    return VirtualAddress(int(Protocol[protocol]), address, port, bool(inside))


def real(text: str) -> RealServer:
    """`10.244.1.7:9376`, with ` w0` for its weight and ` here` when it is on this node."""
    endpoint, *words = text.split()
    address, port = split(endpoint)
    weight = next((int(word[1:]) for word in words if re.fullmatch(r"w\d+", word)), 1)
    return RealServer(address, port, weight, "here" in words)


def server(text: str) -> VirtualServer:
    """`TCP 10.0.1.175:80 wlc sticky=300 drop label=a/b -> 10.244.1.7:9376, 10.244.2.3:9376 w0`.

    Other addresses than the cluster IP say which: `TCP 1.2.3.4:80 LoadBalancer node from=10.0.0.0/8+1.2.3.4/32 -> …`,
    `TCP 192.168.0.2:30080 (inside) NodePort node -> …`; who is masqueraded is `always` or `node`.
    """
    head, _, tail = text.partition("->")
    protocol, endpoint, *words = head.split()
    if words and words[0] == "(inside)":
        endpoint = " ".join((endpoint, words.pop(0)))
    values = dict(word.partition("=")[::2] for word in words)
    reals = tuple(sorted(real(each) for each in tail.split(",") if each.strip()))
    key = at(f"{protocol} {endpoint}")
    sticky = int(values.get("sticky", 0))
    kind = next((Kind(word) for word in words if word in {each.value for each in Kind}), Kind.CLUSTER_IP)
    masquerade = next((Masquerade(word) for word in words if word in {each.value for each in Masquerade}), None)
    plain = [word for word in words if "=" not in word and word not in ("drop", kind.value)]
    plain = [word for word in plain if masquerade is None or word != masquerade.value]
    scheduler = plain[0] if plain else "rr"
    return VirtualServer(
        key,
        reals,
        scheduler,
        int(values.get("flags", "0"), 16),
        sticky,
        8 * len(key.address) if sticky else 32,
        masquerade or Masquerade.DETECT,
        NoServers.DROP if "drop" in words else NoServers.REJECT,
        kind is Kind.CLUSTER_IP,
        values.get("label", ""),
        kind,
        disjoint(map(parse_network, values["from"].split("+"))) if "from" in values else (),
    )


def shown(one: VirtualServer) -> str:
    """The reverse of `server`."""
    words = [str(one.at), one.scheduler]
    words += [f"flags={one.flags:x}"] if one.flags else []
    words += [f"sticky={one.persistence}"] if one.persistence else []
    words += [one.kind.value] if one.kind is not Kind.CLUSTER_IP else []
    words += [one.masquerade.value] if one.masquerade is not Masquerade.DETECT else []
    words += ["from=" + "+".join(map(str, one.allowed))] if one.allowed else []
    words += ["drop"] if one.no_servers is NoServers.DROP else []
    words += [f"label={one.label}"] if one.label else []
    reals = ", ".join(
        str(r) + (f" w{r.weight}" if r.weight != 1 else "") + (" here" if r.local else "") for r in one.real_servers
    )
    return " ".join(words) + (f" -> {reals}" if reals else "")


def name(text: str) -> ObjectName:
    """`default/hostnames`."""
    return ObjectName(*text.split("/"))


def endpoint(text: str) -> Endpoint:
    """`10.244.1.7` with words: unready, terminating (serving), gone (terminating, not serving), node=a, zone-hint=z,
    node-hint=n, w3.
    """
    address, *words = text.split()
    values = dict(word.partition("=")[::2] for word in words)
    ending = "terminating" in words or "gone" in words
    return Endpoint(
        parse_address(address),
        ready=not ending and "unready" not in words,
        serving="gone" not in words and "unready" not in words,
        terminating=ending,
        node=values.get("node", ""),
        zone_hints=tuple(values["zone-hint"].split("+")) if "zone-hint" in values else (),
        node_hints=tuple(values["node-hint"].split("+")) if "node-hint" in values else (),
        weight=next((int(word[1:]) for word in words if re.fullmatch(r"w\d+", word)), 1),
    )


def endpoints(service: str, ports: str, *lines: str, slice_name: str = "") -> EndpointSlice:
    """A slice: ports as `http:9376/TCP dns:53/UDP` (`:9376` for an unnamed one), endpoints one a line."""
    family = Family.IPV6 if any(":" in line.split()[0] for line in lines) else Family.IPV4
    owner = name(service)
    return EndpointSlice(
        ObjectName(owner.namespace, slice_name or f"{owner.name}-{family.name.lower()}"),
        owner,
        family,
        tuple(EndpointPort(p, q, n) for p, n, q in map(_port, ports.split())),
        tuple(map(endpoint, lines)),
    )


def service(text: str, **fields: object) -> Service:
    """`default/hostnames 10.0.1.175 fd00::1 http:80/TCP dns:53/UDP`."""
    owner, *words = text.split()
    vips = [word for word in words if "/" not in word]
    ports = [ServicePort(p, q, n) for p, n, q in (_port(word) for word in words if "/" in word)]
    values: dict[str, object] = {"cluster_ips": tuple(map(parse_address, vips)), "ports": tuple(ports), **fields}
    return Service(name(owner), **values)  # type: ignore[arg-type]


def _port(text: str) -> tuple[str, int, Protocol]:
    label, number, protocol = re.fullmatch(r"(.*):(\d+)/(\w+)", text).groups()  # type: ignore[union-attr]
    return label, int(number), Protocol[protocol]


def view(one: Service | None, *slices: EndpointSlice) -> ServiceView:
    """A Service with its slices."""
    return ServiceView(one, tuple(sorted(slices, key=lambda each: each.name)))


def update(**changed: ServiceView | None) -> Update:
    """An update of Services in namespace default, by name."""
    return Update({ObjectName("default", key): value for key, value in changed.items()})


def hostnames(*pods: str, **fields: object) -> ServiceView:
    """The tutorial's Service with these endpoints."""
    return view(
        service("default/hostnames 10.0.1.175 :80/TCP", **fields), endpoints("default/hostnames", ":9376/TCP", *pods)
    )
