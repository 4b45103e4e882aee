"""Answers on health check node ports: a load balancer asks there whether this node has endpoints (KEP-1669).

Services with externalTrafficPolicy Local have such a port. Over HTTP, at any path: 200 while an endpoint of the Service
that is ready runs on this node and the agent is healthy, else 503; headers and body are kube-proxy's
(pkg/proxy/healthcheck/service_health.go). Each family answers for its own endpoints, on every address of the node, or
on those that serve node ports.

Clients are strangers: what they send is read for some seconds and kilobytes at most, and only so many are served at
once.
"""

import asyncio
import contextlib
import errno
import json
import socket
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, NamedTuple, Protocol

from .desired import HealthCheck, Rules
from .http_answer import REQUEST_BYTES, Turns, message, requested
from .model import Address, Family, ObjectName, format_address

REQUEST_SECONDS = 5.0
MOST_CLIENTS = 256
"""Open connections to all ports together; more are closed at once."""
RETRY_SECONDS = 5.0
_ANY = {Family.IPV4: Address(bytes(4)), Family.IPV6: Address(bytes(16))}
_NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)


class Log(Protocol):
    """What is needed of a structlog logger."""

    def info(self, event: str, **fields: Any) -> Any: ...
    def warning(self, event: str, **fields: Any) -> Any: ...


class Listener(NamedTuple):
    """Where one port of one family is listened on; an address of zeros is every address."""

    port: int
    address: Address


class HealthResponder:
    """The listeners of all health check node ports, kept as the Services are. Belongs to one event loop.

    `healthy`: asked for each answer. `failed`: told which Service's port could not be had, and why. `retry_at`: when it
    is tried again, in seconds of time.monotonic(); None = all are there.
    """

    def __init__(
        self,
        log: Log,
        healthy: Callable[[], bool],
        failed: Callable[[ObjectName, int, str], None] = lambda name, port, reason: None,
    ) -> None:
        self.retry_at: float | None = None
        self._log = log
        self._healthy = healthy
        self._failed = failed
        self._checks: dict[ObjectName, HealthCheck] = {}
        self._rules: Rules | None = None
        self._owners: dict[int, ObjectName] = {}
        self._servers: dict[Listener, asyncio.Server] = {}
        self._troubles: dict[tuple[ObjectName, int], str] = {}
        self._turns = Turns()

    async def follow(self, checks: Mapping[ObjectName, HealthCheck], rules: Rules) -> None:
        """Listen on just these ports from now on, and answer with these counts. Costs nothing when nothing changed."""
        due = self.retry_at is not None and time.monotonic() >= self.retry_at
        if not due and checks == self._checks and rules is self._rules:
            return
        self._checks, self._rules = dict(checks), rules
        troubles = self._share_out()
        wanted = {
            Listener(port, address)
            for port in self._owners
            for family in Family
            for address in listening_addresses(rules, family)
        }
        for gone in self._servers.keys() - wanted:
            await _end(self._servers.pop(gone))
        for listener in sorted(wanted - self._servers.keys()):
            error = await self._listen(listener)
            if error:
                troubles[self._owners[listener.port], listener.port] = error
        self._tell(troubles)
        self.retry_at = time.monotonic() + RETRY_SECONDS if troubles else None

    def _share_out(self) -> dict[tuple[ObjectName, int], str]:
        """Give each port to one Service, the one that has it already if it can be; who goes without, and why."""
        claims: dict[int, list[ObjectName]] = {}
        for name, check in sorted(self._checks.items()):
            claims.setdefault(check.port, []).append(name)
        troubles = {}
        owners = {}
        for port, names in claims.items():
            before = self._owners.get(port)
            owners[port] = owner = before if before in names else names[0]
            for name in names:
                if name != owner:
                    troubles[name, port] = f"it is Service {owner}'s"
        self._owners = owners
        return troubles

    async def _listen(self, listener: Listener) -> str:
        """Start to listen; why that failed, or ""."""
        family = Family.IPV4 if len(listener.address) == 4 else Family.IPV6
        one = None
        try:
            one = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family is Family.IPV6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind((format_address(listener.address), listener.port))
            self._servers[listener] = await asyncio.start_server(
                lambda reader, writer: self._answer(listener, reader, writer),
                sock=one,
                limit=REQUEST_BYTES,
                backlog=64,
            )
        except OSError as error:
            if one is not None:
                one.close()
            if listener.address == _ANY[Family.IPV6] and error.errno in _NO_IPV6:
                return ""  # this machine has no IPv6
            return f"{format_address(listener.address)}: {(error.strerror or str(error)).lower()}"
        return ""

    def _tell(self, troubles: dict[tuple[ObjectName, int], str]) -> None:
        for (name, port), reason in troubles.items():
            if self._troubles.get((name, port)) != reason:
                self._log.warning("health check port not served", service=str(name), port=port, reason=reason)
                self._failed(name, port, reason)
        for name, port in self._troubles.keys() - troubles.keys():
            if name in self._checks and self._checks[name].port == port:
                self._log.info("health check port served", service=str(name), port=port)
        self._troubles = troubles

    def status(self) -> list[dict[str, Any]]:
        """What `dataplane status` shows of each port."""
        return [
            {
                "service": str(name),
                "port": check.port,
                "localEndpoints": {"ipv4": check.ipv4, "ipv6": check.ipv6},
                "error": self._troubles.get((name, check.port), ""),
            }
            for name, check in sorted(self._checks.items())
        ]

    async def close(self) -> None:
        """Stop listening: a load balancer then sees that nobody looks after this node."""
        servers, self._servers = self._servers, {}
        for server in servers.values():
            await _end(server)

    # ----------------------------------------------------------------------------------------------------- answering

    async def _answer(self, listener: Listener, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def respond(request: bytes) -> bytes:
            owner = self._owners.get(listener.port)
            return self._response(request, owner, self._checks[owner], len(listener.address)) if owner else b""

        await self._turns.answer(reader, writer, respond, MOST_CLIENTS, REQUEST_SECONDS)

    def _response(self, request: bytes, owner: ObjectName, check: HealthCheck, width: int) -> bytes:
        asked = requested(request)
        if asked is None:
            return message(HTTPStatus.BAD_REQUEST, {}, b"", True)
        count = check.ipv4 if width == 4 else check.ipv6
        healthy = self._healthy()
        status = HTTPStatus.OK if count and healthy else HTTPStatus.SERVICE_UNAVAILABLE
        headers = {
            "Content-Type": "application/json",
            "X-Content-Type-Options": "nosniff",
            "X-Load-Balancing-Endpoint-Weight": str(count),
        }
        return message(status, headers, health_body(owner, count, healthy), asked.method != "HEAD")


def health_body(owner: ObjectName, count: int, healthy: bool) -> bytes:
    """The JSON text, laid out as kube-proxy's."""
    document = {
        "service": {"namespace": owner.namespace, "name": owner.name},
        "localEndpoints": count,
        "serviceProxyHealthy": healthy,
    }
    return json.dumps(document, indent="\t").encode()


def listening_addresses(rules: Rules, family: Family) -> list[Address]:
    """Where health check ports of a family are served: everywhere, unless node ports are kept to some addresses."""
    width = len(_ANY[family])
    kept = rules.primary_node_ports or any(len(each.address) == width for each in rules.node_port_ranges)
    return rules.node_port_addresses(family) if kept else [_ANY[family]]


async def _end(server: asyncio.Server) -> None:
    server.close()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(server.wait_closed(), 1)
