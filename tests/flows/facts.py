"""What a case says beyond its flows: health checks, conntrack, metrics, affinity, names in the kernel."""

import http.client
import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from dataplane.configuration import PRIMARY
from dataplane.model import Address, format_address, parse_address, parse_network
from dataplane.model import Protocol as Transport
from dataplane.netlink_socket import NetlinkSocket, message
from dataplane.nlattr import NlAttrs, attr, be16, be32, blob, nested, u8
from dataplane.run_tool import run_tool

from .cases import Case, ConntrackEntry, HealthCheck

_HTTP_SECONDS = 3.0
_NODE_PORTS = range(30000, 32768)
_LISTEN = "0A"  # TCP_LISTEN in /proc/net/tcp
_CLIENT = {4: parse_address("198.18.0.9"), 16: parse_address("2001:2::9")}
_NETLINK_NETFILTER, _CT_NEW, _CT_GET = 12, 0x100, 0x101
_NLM_F_ACK, _NLM_F_CREATE, _NLM_F_EXCL = 0x4, 0x400, 0x200


class Facts(Protocol):
    """What facts ask of the agent."""

    names_are_current: bool
    """The mode is iptables, in the form whose names the cases tell. (Their nftables names are kube-proxy's table's.)"""
    iptables_tool: str

    def affinity_seconds(self) -> set[int]: ...
    def reconcile_conntrack(self) -> None: ...
    def metric(self, name: str) -> dict[str, Any] | None: ...


def faults(case: Case, agent: Facts) -> Iterator[str]:
    """Every fact of a case that does not hold, as a sentence with what was expected and seen."""
    if case.health_checks is not None:
        yield from _health(case, case.health_checks)
    for name, expected in case.metrics.items():
        seen = agent.metric(name)
        if seen != expected:
            told = "the agent has no such metric" if seen is None else f"saw {seen}"
            yield f"metric {name}: expected {expected}, {told}"
    if case.affinity is not None and agent.affinity_seconds() != {case.affinity.timeout_seconds}:
        seen_seconds = sorted(agent.affinity_seconds())
        yield f"affinity: expected {case.affinity.timeout_seconds} s, the kernel holds {seen_seconds or 'none'}"
    if agent.names_are_current:
        yield from _names(case.kernel_names.get("iptables") or {}, agent.iptables_tool)


def conntrack_faults(case: Case, agent: Facts) -> Iterator[str]:
    """The same of conntrack: makes the entries, lets the agent reconcile, looks what is left."""
    if not case.conntrack:
        return
    with NetlinkSocket(_NETLINK_NETFILTER) as conntrack:
        for number, entry in enumerate(case.conntrack):
            _create(conntrack, entry, 1025 + number)
        before = _standing(conntrack, case.conntrack)
        if not all(before):
            yield "conntrack: the entries could not be made"
            return
        agent.reconcile_conntrack()
        for entry, stands in zip(case.conntrack, _standing(conntrack, case.conntrack), strict=True):
            if stands != entry.keep:
                wanted, seen = ("kept", "deleted") if entry.keep else ("deleted", "kept")
                yield f"conntrack: {entry}: expected to be {wanted}, was {seen}"


# ------------------------------------------------------------------------------------------------------ health checks


def _health(case: Case, checks: tuple[HealthCheck, ...]) -> Iterator[str]:
    listening = {port for port in _listening_ports() if port in _NODE_PORTS}
    for check in checks:
        listening.discard(check.port)
        expected = f"{check.status}" + (
            "" if check.local_endpoints is None else f" with localEndpoints {check.local_endpoints}"
        )
        seen = _ask(case, check)
        if seen != expected:
            yield f"health check on port {check.port}: expected {expected}, saw {seen}"
    if listening:
        yield f"health checks: nothing was expected on {', '.join(map(str, sorted(listening)))}, somebody listens there"


def _ask(case: Case, check: HealthCheck) -> str:
    """The answer of the health check server on the first node address that has one."""
    ranges = [parse_network(each) for each in case.config.nodeport_addresses if each != PRIMARY]
    hosts = [each for each in case.node.addresses if not ranges or any(each in one for one in ranges)]
    hosts += case.node.addresses  # where it may listen as well, if it cannot or need not be so choosy
    hosts += [parse_address("127.0.0.1"), parse_address("::1")]
    error = "no address to ask"
    for host in dict.fromkeys(hosts):
        connection = http.client.HTTPConnection(format_address(host), check.port, timeout=_HTTP_SECONDS)
        try:
            connection.request("GET", "/healthz")
            answer = connection.getresponse()
            body = json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError) as failed:
            error = f"no answer ({failed})"
            continue
        finally:
            connection.close()
        endpoints = body.get("localEndpoints") if isinstance(body, dict) else None
        return f"{answer.status}" + ("" if check.local_endpoints is None else f" with localEndpoints {endpoints}")
    return error


def _listening_ports() -> set[int]:
    """TCP ports somebody listens on in this network namespace."""
    ports = set()
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/thread-self/net", name).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == _LISTEN:
                ports.add(int(words[1].rpartition(":")[2], 16))
    return ports


# ------------------------------------------------------------------------------------------------------------ conntrack


class _IpAttrs(NlAttrs):
    """CTA_IP_* (linux/netfilter/nfnetlink_conntrack.h), and below the other parts of an entry."""

    v4_src = attr(1, blob)
    v4_dst = attr(2, blob)
    v6_src = attr(3, blob)
    v6_dst = attr(4, blob)


class _ProtoAttrs(NlAttrs):
    num = attr(1, u8)
    src_port = attr(2, be16)
    dst_port = attr(3, be16)


class _TupleAttrs(NlAttrs):
    ip = attr(1, nested(_IpAttrs))
    proto = attr(2, nested(_ProtoAttrs))


class _TcpAttrs(NlAttrs):
    state = attr(1, u8)


class _SctpAttrs(NlAttrs):
    state = attr(1, u8)
    vtag_original = attr(2, be32)
    vtag_reply = attr(3, be32)


class _ProtocolInfo(NlAttrs):
    tcp = attr(1, nested(_TcpAttrs))
    sctp = attr(3, nested(_SctpAttrs))


class _EntryAttrs(NlAttrs):
    original = attr(1, nested(_TupleAttrs))
    reply = attr(2, nested(_TupleAttrs))
    status = attr(3, be32)
    protocol_info = attr(4, nested(_ProtocolInfo))
    timeout = attr(7, be32)


def _tuple(protocol: int, src: Address, dst: Address, sport: int, dport: int) -> dict[str, Any]:
    ip = {"v4_src": src, "v4_dst": dst} if len(src) == 4 else {"v6_src": src, "v6_dst": dst}
    return {"ip": ip, "proto": {"num": protocol, "src_port": sport, "dst_port": dport}}


def _create(conntrack: NetlinkSocket, entry: ConntrackEntry, port: int) -> None:
    """An entry of some client, as a translated connection leaves it; `port` tells it from the others."""
    asked, served = parse_address(entry.orig_dst), parse_address(entry.reply_src)
    client, protocol = _CLIENT[len(asked)], Transport[entry.proto]
    values: dict[str, Any] = {
        "original": _tuple(protocol, client, asked, port, entry.orig_dport),
        "reply": _tuple(protocol, served, client, entry.reply_sport, port),
        "status": 0xE,  # IPS_SEEN_REPLY, ASSURED, CONFIRMED
        "timeout": 120,
    }
    if protocol is Transport.TCP:
        values["protocol_info"] = {"tcp": {"state": 3}}  # established
    elif protocol is Transport.SCTP:
        values["protocol_info"] = {"sctp": {"state": 3, "vtag_original": port, "vtag_reply": port}}
    head = struct.pack("=BBH", socket.AF_INET if len(asked) == 4 else socket.AF_INET6, 0, 0)
    flags = 0x1 | _NLM_F_ACK | _NLM_F_CREATE | _NLM_F_EXCL
    conntrack.request(message(_CT_NEW, flags, head + _EntryAttrs.encode(**values)), "create", str(entry))


def _standing(conntrack: NetlinkSocket, entries: tuple[ConntrackEntry, ...]) -> list[bool]:
    """Which of the entries there are, told by the client's ports."""
    found = set()
    for family in (socket.AF_INET, socket.AF_INET6):
        for answer in conntrack.dump(message(_CT_GET, 0x1, struct.pack("=BBH", family, 0, 0))):
            original = _EntryAttrs.decode(answer, 20)["original"]
            ip, proto = original["ip"], original["proto"]
            if (ip.get("v4_src") or ip.get("v6_src")) in _CLIENT.values() and "src_port" in proto:
                found.add((proto["num"], proto["src_port"]))
    return [(int(Transport[entry.proto]), 1025 + number) in found for number, entry in enumerate(entries)]


# -------------------------------------------------------------------------------------------------- names in the kernel


def _chains(table: str, tool: str) -> dict[str, list[str]]:
    """Chains of a table of both families with their rules, as iptables-save prints them."""
    chains: dict[str, list[str]] = {}
    for program in ("iptables", "ip6tables"):
        for line in run_tool([f"{program}{'-' if tool else ''}{tool}-save", "-t", table]).splitlines():
            if line.startswith(":"):
                chains.setdefault(line[1:].split()[0], [])
            elif line.startswith("-A "):
                chains.setdefault(line.split()[1], []).append(line)
    return chains


def _names(names: dict[str, str], tool: str) -> Iterator[str]:
    if not names:
        return
    chains = _chains("nat", tool).keys() | _chains("filter", tool).keys()
    for what, name in names.items():
        if name not in chains:
            yield f"kernel name of {what}: expected the chain {name}, there is none"
