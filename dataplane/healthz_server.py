"""`/healthz` and `/livez`, where kube-proxy has them (port 10256): is this node's proxy all right?

The meaning is kube-proxy's (pkg/proxy/healthcheck/proxy_health.go). Both are 200 unless something that came from the
source has waited for the kernel for too long. `/healthz`, which load balancers ask, is 503 also while the Node is
being deleted, and while the watch is dead. A restart would mend neither, so `/livez`, which the kubelet asks, stays 200
then: it is 503 only for what a new process would mend.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, NamedTuple, Protocol

from .errors import DataplaneError
from .http_answer import REQUEST_BYTES, Turns, message, requested
from .printable import printable
from .tcp_listener import Listen, open_listener

REQUEST_SECONDS = 5.0
MOST_CLIENTS = 64
BUSY_SECONDS = 5.0
"""How often a port that is in use is tried again: kube-proxy's."""
PATHS = ("/healthz", "/livez")
_HEADERS = {"Content-Type": "application/json", "X-Content-Type-Options": "nosniff"}


class Health(NamedTuple):
    """How the proxy is. `reasons`: why not well, for people.

    `live`: a new process would be no better. `updated`: when the kernel last was as the source wants it, seconds since
    the epoch.
    """

    live: bool
    current: bool
    eligible: bool
    updated: float
    reasons: tuple[str, ...] = ()


class Log(Protocol):
    """What is needed of a structlog logger."""

    def info(self, event: str, **fields: Any) -> Any: ...
    def warning(self, event: str, **fields: Any) -> Any: ...


class HealthzServer:
    """Belongs to one event loop, from `start` to `close`. `health` is asked for each answer; `count` is told of it.

    `failed` is told once why the port cannot be had.
    """

    def __init__(
        self,
        listen: Listen,
        log: Log,
        health: Callable[[], Health],
        count: Callable[[str, int], None],
        failed: Callable[[str], None],
    ) -> None:
        self._listen = listen
        self._log = log
        self._health = health
        self._count = count
        self._failed = failed
        self._server: asyncio.Server | None = None
        self._task: asyncio.Task[None] | None = None
        self._trouble = ""
        self._turns = Turns()

    def start(self) -> None:
        """Listen, now or as soon as the port is free."""
        self._task = asyncio.create_task(self._begin())

    async def _begin(self) -> None:
        while True:
            try:
                one = open_listener(self._listen)
                self._server = await asyncio.start_server(self._answer, sock=one, limit=REQUEST_BYTES, backlog=64)
            except (DataplaneError, OSError) as error:
                if not self._trouble:
                    self._trouble = printable(str(error))
                    self._log.warning("healthz not served", reason=self._trouble)
                    self._failed(self._trouble)
                await asyncio.sleep(BUSY_SECONDS)
                continue
            if self._trouble:
                self._log.info("healthz served", address=str(self._listen))
            return

    async def close(self) -> None:
        """Stop listening."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._server is not None:
            self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._turns.answer(reader, writer, self._response, MOST_CLIENTS, REQUEST_SECONDS)

    def _response(self, head: bytes) -> bytes:
        asked = requested(head)
        if asked is None:
            return message(HTTPStatus.BAD_REQUEST, {}, b"", True)
        with_body = asked.method != "HEAD"
        if asked.path not in PATHS:
            return message(HTTPStatus.NOT_FOUND, {"Content-Type": "text/plain"}, b"404 page not found\n", with_body)
        name = asked.path[1:]
        health = self._health()
        well = health.live and (name == "livez" or (health.current and health.eligible))
        status = HTTPStatus.OK if well else HTTPStatus.SERVICE_UNAVAILABLE
        self._count(name, status.value)
        return message(status, _HEADERS, healthz_body(name, health, well, time.time()), with_body)


def healthz_body(name: str, health: Health, well: bool, now: float) -> bytes:
    """The JSON text: kube-proxy's fields, and for people why it is not well. Who is well was updated just now."""
    document: dict[str, object] = {
        "lastUpdated": _shown(now if well else health.updated),
        "currentTime": _shown(now),
        "healthy": well,
    }
    if name == "healthz":
        document["nodeEligible"] = health.eligible
    if not well:
        document["reasons"] = list(health.reasons)
    return json.dumps(document).encode()


def _shown(moment: float) -> str:
    """RFC 3339; Go's zero time for never."""
    if not moment:
        return "0001-01-01T00:00:00Z"
    return datetime.fromtimestamp(moment, UTC).isoformat().replace("+00:00", "Z")
