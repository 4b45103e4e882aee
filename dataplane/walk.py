"""What the first packet of a connection meets, step by step, and why. Pure.

    Question + Situation ──▶ walk() ──▶ Walk: verdict, reason, where it may go, the steps that lead there

A `Situation` is virtual servers and what stands around them: those that `desired.py` decided, or those that a mode read
back from the kernel. What a VirtualServer means to a packet is said here once for both; the modes' rules do it, and
only add the names of their objects (`Backend.objects`). Who counts as inside the cluster is `Detection`'s to say, which
is also what the rules of the modes are made of.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from enum import Enum
from typing import NamedTuple

from msgspec import Struct

from .model import (
    Address,
    Kind,
    Masquerade,
    Network,
    NoServers,
    Protocol,
    RealServer,
    VirtualAddress,
    VirtualServer,
    format_address,
    format_endpoint,
)


class Detection(Struct, frozen=True):
    """How clients inside the cluster are told, and whom `Masquerade.DETECT` masquerades: everyone, else clients that
    are not inside by CIDR or by interface; with none of these set, nobody."""

    masquerade_all: bool = False
    cluster_cidrs: tuple[Network, ...] = ()
    bridge_interface: str = ""
    """Clients behind it are inside (kube-proxy's detect-local BridgeInterface)."""
    interface_prefix: str = ""
    """Clients behind interfaces that begin so are inside (InterfaceNamePrefix)."""
    service_cidrs: tuple[Network, ...] = ()
    """Where cluster IPs come from."""

    def tells(self, address: Address) -> bool:
        """There is a way to tell clients of that address's family."""
        by_range = any(len(each.address) == len(address) for each in self.cluster_cidrs)
        return by_range or bool(self.bridge_interface or self.interface_prefix)

    def by_interface(self) -> bool:
        """The interface by which a client comes matters."""
        return bool(self.bridge_interface or self.interface_prefix)

    def inside(self, address: Address, interface: str) -> str:
        """Why a client that is no process of this node is inside the cluster; "" = it is not."""
        for each in self.cluster_cidrs:
            if address in each:
                return f"in {each}, a range of pods"
        if self.bridge_interface and interface == self.bridge_interface:
            return f"behind the bridge {interface}"
        if self.interface_prefix and interface.startswith(self.interface_prefix):
            return f"behind {interface}, an interface of pods ({self.interface_prefix}…)"
        return ""


class Client(Struct, frozen=True):
    """Who connects. `node`: a process of this node; `interface`: by which its packets come in, "" = not known."""

    address: Address
    node: bool = False
    interface: str = ""


class Question(Struct, frozen=True):
    """The first packet of a connection. `delivered`: the address that is asked for is one of this node's own."""

    client: Client
    at: VirtualAddress
    delivered: bool = False


class Remembered(NamedTuple):
    """The endpoint a client had, by session affinity. `seconds_left`: until that is forgotten; None = not known."""

    address: Address
    port: int
    seconds_left: int | None = None


class Situation(Struct, frozen=True):
    """What a packet meets. `vips`: addresses of which every port is ours (cluster IPs). `hairpins`: endpoints that may
    reach themselves through a Service; None = each may. `foreign`: virtual addresses that somebody else programmed.
    `flaws`: which fixed parts of the mode are not as they were made, so that packets may meet something else."""

    servers: Mapping[VirtualAddress, VirtualServer]
    vips: Collection[Address]
    hairpins: Collection[Address] | None
    detection: Detection
    foreign: Collection[VirtualAddress] = ()
    flaws: tuple[str, ...] = ()


class Verdict(Enum):
    """What becomes of the packet."""

    ENDPOINT = "endpoint"
    """It goes to an endpoint."""
    REFUSED = "refused"
    """The client is told at once (ICMP port unreachable)."""
    DROPPED = "dropped"
    """Silence."""
    NOT_OURS = "not ours"
    """No Service is there: what becomes of it is the node's routing and firewall's business."""


class Stage(Enum):
    """Where something is decided, in the order of the packet's way."""

    CLIENT = "client"
    SOURCES = "sources"
    SERVER = "server"
    INSIDE = "inside"
    NO_ENDPOINTS = "no endpoints"
    CLOSED = "closed port"
    UNALLOCATED = "unallocated"
    AFFINITY = "affinity"
    CHOICE = "choice"
    MASQUERADE = "masquerade"


class Step(NamedTuple):
    """One decision, in words."""

    stage: Stage
    text: str


class Target(NamedTuple):
    """An endpoint and how likely this connection goes there: 0 = it takes nothing new, None = that depends on the
    moment (least connections). `why`: of the masquerade, or of there being none."""

    real: RealServer
    probability: float | None
    masquerade: bool
    why: str


class Walk(Struct, frozen=True):
    """The packet's way. `server`: the virtual server that decided; `outer`: the one for everybody at that address."""

    question: Question
    verdict: Verdict
    reason: str
    steps: tuple[Step, ...]
    server: VirtualServer | None = None
    outer: VirtualServer | None = None
    targets: tuple[Target, ...] = ()
    remembered: Remembered | None = None

    def stages(self) -> list[Stage]:
        """Where something was decided."""
        return [step.stage for step in self.steps]

    @property
    def masquerades(self) -> set[bool]:
        """Whether endpoints that may be chosen see another source than the client's; both, when it depends."""
        return {each.masquerade for each in self.targets if each.probability != 0}


def nobody_remembered(_: VirtualServer) -> Remembered | None:
    """Without a look at a kernel nobody knows which endpoint a client had."""
    return None


def walk(
    question: Question,
    situation: Situation,
    remembered: Callable[[VirtualServer], Remembered | None] = nobody_remembered,
) -> Walk:
    """The way of a connection's first packet. `remembered`: what the kernel knows of this client at a server."""
    client, at = question.client, question.at._replace(inside=False)
    steps: list[Step] = []
    inside = _say_client(question, situation, steps)
    outer, inner = situation.servers.get(at), situation.servers.get(at._replace(inside=True))

    def ended(verdict: Verdict, reason: str, server: VirtualServer | None = None) -> Walk:
        return Walk(question, verdict, reason, tuple(steps), server, outer)

    if at in situation.foreign:
        return ended(Verdict.NOT_OURS, "somebody else's virtual server is there, which is left alone")
    if outer is not None and outer.allowed:
        within = next((each for each in outer.allowed if client.address in each), None)
        if within is None:
            ranges = ", ".join(map(str, outer.allowed))
            reason = f"{format_address(client.address)} is not in loadBalancerSourceRanges ({ranges})"
            steps.append(Step(Stage.SOURCES, reason))
            return ended(Verdict.DROPPED, reason, outer)
        steps.append(Step(Stage.SOURCES, f"{format_address(client.address)} may connect: it is in {within}"))
    server = inner if inside and inner is not None else outer
    if server is None:
        return _nobody(question, situation, steps)
    steps.append(Step(Stage.SERVER, f"{_named(server)} is at this {_KINDS[server.kind]}"))
    if inner is not None:
        told = (
            "a client inside the cluster gets any endpoint"
            if server is inner
            else "a client from outside gets endpoints of this node only"
        )
        steps.append(Step(Stage.INSIDE, f"externalTrafficPolicy Local: {told}"))
    if not server.serves():
        verdict, reason = _empty(server)
        steps.append(Step(Stage.NO_ENDPOINTS, reason))
        return ended(verdict, reason, server)
    memory = remembered(server) if server.persistence else None
    targets, alive = _targets(question, server, situation, memory)
    if server.persistence:
        steps.append(Step(Stage.AFFINITY, _affinity(server, memory, alive)))
    if not alive:
        steps.append(Step(Stage.CHOICE, _choice(server)))
    steps.append(Step(Stage.MASQUERADE, _masquerade_text(targets)))
    taking = [each for each in targets if each.probability != 0]
    reason = f"goes to {taking[0].real}" if len(taking) == 1 else f"goes to one of {len(taking)} endpoints"
    return Walk(question, Verdict.ENDPOINT, reason, tuple(steps), server, outer, targets, memory if alive else None)


_KINDS = {
    Kind.CLUSTER_IP: "cluster IP and port",
    Kind.NODE_PORT: "node port",
    Kind.EXTERNAL_IP: "external IP and port",
    Kind.LOAD_BALANCER: "load balancer IP and port",
}


def _named(server: VirtualServer) -> str:
    return f"Service {server.label}" if server.label else "a Service without a name"


def _say_client(question: Question, situation: Situation, steps: list[Step]) -> bool:
    """Whether the client counts as inside the cluster, told as the first step."""
    client, detection = question.client, situation.detection
    who = format_address(client.address)
    if client.node:
        steps.append(Step(Stage.CLIENT, f"{who} is this node: inside the cluster"))
        return True
    why = detection.inside(client.address, client.interface)
    if why:
        steps.append(Step(Stage.CLIENT, f"{who} is inside the cluster: {why}"))
        return True
    if not detection.tells(client.address):
        steps.append(Step(Stage.CLIENT, f"{who} counts as outside: nothing tells who is inside (clusterCIDRs …)"))
    elif detection.by_interface() and not client.interface:
        steps.append(Step(Stage.CLIENT, f"{who} counts as outside: its interface is not known (--interface tells it)"))
    else:
        steps.append(Step(Stage.CLIENT, f"{who} is outside the cluster"))
    return False


def _nobody(question: Question, situation: Situation, steps: list[Step]) -> Walk:
    """No virtual server is there."""
    at = question.at
    where = f"{format_endpoint(at.address, at.port)}/{Protocol(at.protocol).name}"
    if at.address in situation.vips:
        owner = next((one.label for one in situation.servers.values() if one.at.address == at.address), "")
        of = f" of Service {owner.partition(':')[0]}" if owner else ""
        reason = f"closed port: {format_address(at.address)} is the cluster IP{of}, which has no {_port(at)}"
        steps.append(Step(Stage.CLOSED, reason))
        return Walk(question, Verdict.REFUSED, reason, tuple(steps))
    within = next((each for each in situation.detection.service_cidrs if at.address in each), None)
    if within is not None and not question.delivered:
        reason = f"no Service has the cluster IP {format_address(at.address)}, and {within} is where they come from"
        steps.append(Step(Stage.UNALLOCATED, reason))
        return Walk(question, Verdict.DROPPED, reason, tuple(steps))
    reason = f"no Service is at {where}"
    steps.append(Step(Stage.SERVER, reason))
    others = list(why_not_ours(question, situation))
    steps += [Step(Stage.SERVER, each) for each in others]
    return Walk(question, Verdict.NOT_OURS, "; ".join((reason, *others)), tuple(steps))


def _port(at: VirtualAddress) -> str:
    return f"port {at.port}/{Protocol(at.protocol).name}"


def why_not_ours(question: Question, situation: Situation) -> Iterator[str]:
    """What comes near: the same number as a node port at other addresses, the same address with other ports."""
    at = question.at
    width = len(at.address)
    outer = [one for one in situation.servers.values() if not one.at.inside and len(one.at.address) == width]
    elsewhere = [
        one for one in outer if one.kind is Kind.NODE_PORT and one.at.port == at.port and one.at.protocol == at.protocol
    ]
    if elsewhere and (question.delivered or _is_loopback(at.address)):
        served = ", ".join(sorted(format_address(one.at.address) for one in elsewhere))
        why = (
            "node ports are not served at loopback addresses"
            if _is_loopback(at.address)
            else "this address is not among nodePortAddresses"
        )
        yield f"{at.port} is the node port of Service {elsewhere[0].label}, served at {served}: {why}"
    same = {f"{one.at.port}/{Protocol(one.at.protocol).name}" for one in outer if one.at.address == at.address}
    if same and not elsewhere:
        ports = sorted(same)
        more = f" and {len(ports) - 5} more" if len(ports) > 5 else ""
        yield f"Services have other ports of this address: {', '.join(ports[:5])}{more}"


def _is_loopback(address: Address) -> bool:
    return address[0] == 127 if len(address) == 4 else address == bytes(15) + b"\1"


def _empty(server: VirtualServer) -> tuple[Verdict, str]:
    """A server to which nobody can be sent."""
    drains = f"; {len(server.real_servers)} drain" if server.real_servers else ""
    if server.no_servers is NoServers.DROP:
        policy = "internalTrafficPolicy" if server.kind is Kind.CLUSTER_IP else "externalTrafficPolicy"
        return Verdict.DROPPED, f"{_named(server)} has no local endpoints, and {policy} is Local{drains}"
    return Verdict.REFUSED, f"{_named(server)} has no endpoints{drains}"


_IN_TURN = {"rr"}
_BY_WEIGHT = {"random", "wrr"}
_BY_HASH = {"sh": "the client's address", "mh": "the client's address", "dh": "the virtual address"}


def _targets(
    question: Question, server: VirtualServer, situation: Situation, memory: Remembered | None
) -> tuple[tuple[Target, ...], bool]:
    """Every endpoint with its part, and whether the one that is remembered takes it all."""
    reals = server.real_servers
    kept = next((one for one in reals if memory and (one.address, one.port) == memory[:2] and one.weight), None)
    even = server.scheduler in _IN_TURN
    total = sum((1 if even else each.weight) for each in reals if each.weight)
    taking = sum(1 for each in reals if each.weight)
    targets = []
    for real in reals:
        share: float | None
        if kept is not None:
            share = 1.0 if real is kept else 0.0
        elif real.weight == 0:
            share = 0.0
        elif taking == 1:
            share = 1.0
        elif even or server.scheduler in _BY_WEIGHT:
            share = (1 if even else real.weight) / total
        else:
            share = None
        targets.append(Target(real, share, *_masqueraded(question, server, real, situation)))
    return tuple(targets), kept is not None


def _masqueraded(question: Question, server: VirtualServer, real: RealServer, situation: Situation) -> tuple[bool, str]:
    """Whether the endpoint sees an address of the node in place of the client's, and why."""
    client, detection = question.client, situation.detection
    hairpins = situation.hairpins
    if real.address == client.address and (hairpins is None or real.address in hairpins):
        return True, "the endpoint reaches itself: else its answer would never come here"
    if client.address in situation.vips:
        return True, "a process of this node whose source is the virtual address"
    match server.masquerade:
        case Masquerade.ALWAYS:
            return True, "external traffic with policy Cluster: the answer has to come back this way"
        case Masquerade.NODE:
            if client.node:
                return True, "external traffic of this node's own"
            return False, "externalTrafficPolicy Local: clients keep their address"
    if detection.masquerade_all:
        return True, "everyone is masqueraded (masqueradeAll)"
    if not detection.tells(client.address):
        return False, "nothing tells who is inside, so clients keep their address"
    if detection.inside(client.address, "" if client.node else client.interface):
        return False, "a client inside the cluster keeps its address"
    return True, "a client that is no pod: the answer has to come back this way"


def _affinity(server: VirtualServer, memory: Remembered | None, alive: bool) -> str:
    stays = f"sessionAffinity ClientIP, {server.persistence} s"
    if memory is None:
        return f"{stays}: this client is not remembered, and will be with the endpoint it gets"
    where = format_endpoint(memory.address, memory.port)
    left = "" if memory.seconds_left is None else f" ({memory.seconds_left} s left)"
    if alive:
        return f"{stays}: this client had {where}, and has it again{left}"
    return f"{stays}: this client had {where}, which takes nothing any more: a new choice"


def _choice(server: VirtualServer) -> str:
    taking = [each for each in server.real_servers if each.weight]
    if len(taking) == 1:
        return f"the only endpoint: {taking[0]}"
    if server.scheduler == "random":
        how = "by chance" if len({each.weight for each in taking}) == 1 else "by chance, as weights say"
    elif server.scheduler in _IN_TURN:
        how = "in turn (rr)"
    elif server.scheduler in _BY_WEIGHT:
        how = f"in turn, as weights say ({server.scheduler})"
    elif server.scheduler in _BY_HASH:
        how = f"by a hash of {_BY_HASH[server.scheduler]} ({server.scheduler}): the same one each time"
    else:
        how = f"by what they have to do at that moment ({server.scheduler})"
    return f"one of {len(taking)} endpoints, {how}"


def _masquerade_text(targets: Collection[Target]) -> str:
    taking = [each for each in targets if each.probability != 0]
    masqueraded = [each for each in taking if each.masquerade]
    if not masqueraded:
        return f"not masqueraded: {taking[0].why}"
    if len(masqueraded) == len(taking):
        whys = dict.fromkeys(each.why for each in masqueraded)
        return f"masqueraded: {'; '.join(whys)}"
    to = ", ".join(str(each.real) for each in masqueraded)
    keeps = next(each.why for each in taking if not each.masquerade)
    return f"masqueraded to {to} only: {masqueraded[0].why}; else not: {keeps}"
