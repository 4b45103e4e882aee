"""One connection explained: by what the kernel holds, by what the manifests say, and where the two differ.

No options of a command line and no text of a terminal here: `Inquiry` is asked by the CLI and by tests. What decides is
`walk`; here are the target that somebody names, the comparison, and the reasons why the kernel may hold something else.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from .backend import Backend, Options
from .desired import Desired, proxied
from .errors import UsageError
from .model import (
    Address,
    Kind,
    ObjectName,
    Problem,
    Protocol,
    ServiceType,
    ServiceView,
    VirtualAddress,
    VirtualServer,
    format_address,
    format_endpoint,
    parse_address,
)
from .printable import printable
from .walk import Question, Situation, Stage, Verdict, Walk, walk

# ------------------------------------------------------------------------------------------------------ situations


def wanted_situation(desired: Desired, backend: Backend, options: Options) -> Situation:
    """What a packet would meet if the kernel held just what is desired, in that mode."""
    servers: dict[VirtualAddress, VirtualServer] = {}
    vips: set[Address] = set()
    hairpins: set[Address] = set()
    for at, server in desired.servers.items():
        servers[at] = shown_server(backend, server)
        if server.bound:
            vips.add(at.address)
        hairpins.update(real.address for real in server.real_servers if real.local)
    return Situation(servers, vips, hairpins, options.detection())


def shown_server(backend: Backend, server: VirtualServer) -> VirtualServer:
    """A wanted server as the mode would show it."""
    expressed = backend.express(server)
    return replace(expressed, scheduler=backend.picks) if backend.picks else expressed


# ---------------------------------------------------------------------------------------------------------- targets


class Goal(NamedTuple):
    """What somebody asks for: an address and a port, and what else of the Service there is."""

    at: VirtualAddress
    notes: tuple[str, ...] = ()


class NoAddress(NamedTuple):
    """A Service that is known and has no address of ours, and why."""

    name: str
    reason: str


_ADDRESS = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<v4>[0-9.]+)):(?P<port>[0-9]+)(?:/(?P<protocol>[A-Za-z]+))?")


def parse_protocol(text: str) -> Protocol:
    """TCP, UDP or SCTP in any case; UsageError for others."""
    try:
        return Protocol[text.upper()]
    except KeyError:
        near = get_close_matches(text.upper(), Protocol.__members__, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; protocols: {', '.join(Protocol.__members__)}"
        raise UsageError(f"no protocol {printable(text, 20)}{hint}") from None


def goal_of(
    text: str,
    servers: Sequence[VirtualServer],
    views: Mapping[ObjectName, ServiceView | None],
    problems: Sequence[Problem],
    protocol: Protocol | None,
    source: Address | None,
) -> Goal | NoAddress:
    """What `ADDR:PORT[/PROTO]`, a Service's name or `namespace/name[:port]` means; UsageError with what may be meant.

    `servers`: those that the kernel holds and those desired. Of a Service the cluster IP of the client's family.
    """
    outer = [one for one in servers if not one.at.inside]
    if found := _ADDRESS.fullmatch(text):
        return _goal_at(found, outer, protocol)
    try:
        address = parse_address(text.strip("[]"))
    except ValueError:
        return _goal_named(text, outer, views, problems, protocol, source)
    ports = sorted({one.at.port for one in outer if one.at.address == address})
    example = ports[0] if ports else 80
    known = f"; Services there have {', '.join(map(str, ports[:8]))}" if ports else ""
    raise UsageError(f"{text}: which port? as {format_endpoint(address, example)}{known}")


def _goal_at(found: re.Match[str], outer: Sequence[VirtualServer], protocol: Protocol | None) -> Goal:
    try:
        address = parse_address(found["v6"] or found["v4"])
    except ValueError as error:
        raise UsageError(printable(str(error))) from None
    port = int(found["port"][:6])
    if not 0 < port < 65536:
        raise UsageError(f"{found['port'][:10]} is not a port (1 to 65535)")
    told = parse_protocol(found["protocol"]) if found["protocol"] else None
    if told and protocol and told is not protocol:
        raise UsageError(f"/{told.name} and --protocol {protocol.name} say different things")
    there = [one.at.protocol for one in outer if (one.at.address, one.at.port) == (address, port)]
    chosen = told or protocol or (Protocol(there[0]) if len(there) == 1 else Protocol.TCP)
    return Goal(VirtualAddress(int(chosen), address, port))


def _goal_named(
    text: str,
    outer: Sequence[VirtualServer],
    views: Mapping[ObjectName, ServiceView | None],
    problems: Sequence[Problem],
    protocol: Protocol | None,
    source: Address | None,
) -> Goal | NoAddress:
    name, _, port = text.partition(":")
    mine = [one for one in outer if name in _names(one.label)]
    if not mine:
        return _unserved(text, name, outer, views, problems)
    spaces = sorted({one.label.partition(":")[0] for one in mine})
    if len(spaces) > 1:
        raise UsageError(f"{printable(name)}: which one? {', '.join(map(printable, spaces))}")
    if port:
        ports = sorted({_port_name(one.label) or str(one.at.port) for one in mine})
        mine = [one for one in mine if port in (_port_name(one.label), str(one.at.port))]
        if not mine:
            near = get_close_matches(port, ports, n=1)
            hint = f"did you mean {printable(near[0])}? " if near else ""
            raise UsageError(f"{printable(name)} has no port {printable(port)}; {hint}ports: {_listed(ports)}")
    if protocol is not None:
        served = sorted({Protocol(one.at.protocol).name for one in mine})
        mine = [one for one in mine if one.at.protocol == protocol]
        if not mine:
            raise UsageError(f"{printable(text)} has no {protocol.name}, but {', '.join(served)}")
    labels = sorted({(one.label, Protocol(one.at.protocol).name) for one in mine})
    if len(labels) > 1:
        told = [f"{label} ({proto})" for label, proto in labels]
        raise UsageError(f"{printable(text)}: which port? {_listed(told)}")
    family = len(source) if source is not None else min(len(one.at.address) for one in mine)
    fitting = [one for one in mine if len(one.at.address) == family]
    if not fitting:
        raise UsageError(f"{printable(text)} has no address of the family of {format_address(source or Address(b''))}")
    order = list(Kind)
    fitting.sort(key=lambda one: (order.index(one.kind), one.at))
    at = fitting[0].at
    others = dict.fromkeys(format_endpoint(one.at.address, one.at.port) for one in mine if one.at != at)
    return Goal(at, (f"other addresses of it: {', '.join(others)}",) if others else ())


def _names(label: str) -> set[str]:
    whole = label.partition(":")[0]
    return {whole, whole.partition("/")[2]} - {""}


def _port_name(label: str) -> str:
    return label.partition(":")[2]


def _listed(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - 10} more" if len(texts) > 10 else ""
    return ", ".join(map(printable, texts[:10])) + more


def _unserved(
    text: str,
    name: str,
    outer: Sequence[VirtualServer],
    views: Mapping[ObjectName, ServiceView | None],
    problems: Sequence[Problem],
) -> NoAddress:
    """A Service without a virtual server: why, if it is known at all; else UsageError with near names."""
    for known, view in views.items():
        if name in (known.name, str(known)):
            return NoAddress(str(known), _why_unserved(known, view))
    for problem in problems:
        kind, _, whole = problem.object.partition(" ")
        if kind == "Service" and name in _names(whole):
            return NoAddress(whole, f"it is refused: {problem}")
    candidates = {each for one in outer for each in _names(one.label)}
    candidates |= {each for known in views for each in (known.name, str(known))}
    near = get_close_matches(name, candidates, n=3, cutoff=0.6)
    if near:
        raise UsageError(f"no Service {printable(text)}; did you mean {' or '.join(map(printable, near))}?")
    known_names = sorted({one.label.partition(":")[0] for one in outer if one.label})
    told = f"Services: {_listed(known_names)}" if known_names else "none is known here"
    raise UsageError(f"no Service {printable(text)}; {told}")


def _why_unserved(name: ObjectName, view: ServiceView | None) -> str:
    service = view.service if view else None
    if service is None:
        return f"there are endpoints for {name}, and no Service object"
    if service.headless:
        return "it is headless (clusterIP: None): clients ask DNS and talk to the endpoints themselves"
    if service.type is ServiceType.EXTERNAL_NAME:
        return f"it is of type ExternalName: DNS answers with {service.external_name}"
    if not proxied(service):
        return f"it is left to another proxy ({service.other_proxy}, label service.kubernetes.io/service-proxy-name)"
    if not service.cluster_ips:
        return "it has no cluster IP yet"
    if not service.ports:
        return "it has no ports"
    return "another Service has its address and ports"


# ------------------------------------------------------------------------------------------------------ explanation


class Explanation(Struct, frozen=True):
    """What is told. `kernel` and `desired` are None where nobody looked; the verdict is the kernel's if there is one.

    `differences`: what the two disagree about and what may be the reason; `remarks`: what else is worth knowing.
    """

    mode: str
    question: Question
    kernel: Walk | None
    desired: Walk | None
    objects: dict[Stage, tuple[str, ...]] = {}
    differences: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def decided(self) -> Walk:
        """What becomes of the packet now, or would."""
        found = self.kernel or self.desired
        assert found is not None
        return found

    @property
    def leads(self) -> bool:
        """It goes to an endpoint."""
        return self.decided.verdict is Verdict.ENDPOINT


def explain_kernel(
    backend: Backend, question: Question, situation: Situation
) -> tuple[Walk, dict[Stage, tuple[str, ...]]]:
    """The way through what the kernel holds, and the objects of the mode that decide."""
    client = question.client.address
    walked = walk(question, situation, lambda server: backend.remembered(server, client))
    return walked, backend.objects(walked)


def differences(held: Situation, wanted: Situation, at: VirtualAddress) -> list[str]:
    """How what the kernel holds at one address differs from what is desired there, in words."""
    found = []
    for inside in (False, True):
        key = at._replace(inside=inside)
        now, then = held.servers.get(key), wanted.servers.get(key)
        for_whom = " for clients inside the cluster" if inside else ""
        if now is None and then is not None:
            found.append(f"the manifests have {then.label} here{for_whom}, the kernel has not")
        elif then is None and now is not None:
            found.append(f"the kernel holds {now.label or 'a server'} here{for_whom}, the manifests do not")
        elif now is not None and then is not None:
            found += [f"{text}{for_whom}" for text in _server_differences(now, then)]
    if at.address in wanted.vips and at.address not in held.vips:
        found.append(f"{format_address(at.address)} is a cluster IP in the manifests, and not in the kernel")
    elif at.address in held.vips and at.address not in wanted.vips:
        found.append(f"{format_address(at.address)} is a cluster IP in the kernel, and not in the manifests")
    return found


def _server_differences(now: VirtualServer, then: VirtualServer) -> Iterable[str]:
    held = {(real.address, real.port): real.weight for real in now.real_servers}
    want = {(real.address, real.port): real.weight for real in then.real_servers}
    for place in sorted(held.keys() | want.keys()):
        where = format_endpoint(*place)
        if place not in held:
            yield f"endpoint {where} is in the manifests only"
        elif place not in want:
            yield f"endpoint {where} is in the kernel only{' (it drains)' if not held[place] else ''}"
        elif held[place] != want[place]:
            yield f"endpoint {where} has weight {held[place]} in the kernel and {want[place]} in the manifests"
    if now.label != then.label:
        yield f"it belongs to {now.label or 'nobody by name'} in the kernel and to {then.label} in the manifests"
    for field, words in (
        ("masquerade", "masquerading"),
        ("persistence", "the seconds of session affinity"),
        ("scheduler", "the scheduler"),
        ("allowed", "loadBalancerSourceRanges"),
        ("kind", "the kind of address"),
    ):
        one, other = getattr(now, field), getattr(then, field)
        if one != other:
            yield f"{words}: {_told(one)} in the kernel, {_told(other)} in the manifests"
    if not (now.serves() or then.serves()) and now.no_servers is not then.no_servers:
        yield f"without endpoints: {now.no_servers.value} in the kernel, {then.no_servers.value} in the manifests"


def _told(value: object) -> str:
    match value:
        case tuple():
            return ", ".join(map(str, value)) or "none"
        case Kind():
            return value.value
        case _:
            return str(getattr(value, "value", value))


def refused_here(
    at: VirtualAddress, views: Mapping[ObjectName, ServiceView | None], problems: Iterable[Problem]
) -> list[str]:
    """What of the manifests asks for an address and port without getting it."""
    claims: dict[str, None] = {}
    node_ports = []
    for name, view in views.items():
        service = view.service if view else None
        if service is None or not proxied(service):
            continue
        if at.address in (*service.external_ips, *service.cluster_ips):
            claims[f"Service {name}"] = None
        if any((port.node_port, port.protocol) == (at.port, at.protocol) for port in service.ports):
            node_ports.append(
                f"{at.port} is the node port of Service {name}, which is not served at {format_address(at.address)}"
            )
    return [str(problem) for problem in problems if problem.object in claims] + node_ports
