"""Kubernetes Events about this node's proxy (events.k8s.io/v1): written when possible, and never waited for.

Reasons and actions are kube-proxy's (cmd/kube-proxy/app/server.go, pkg/proxy/healthcheck). As in client-go's spam
filter (tools/events) there is a burst and then one in a few minutes; the same again within that time is left out. An
Event that the server refuses or does not answer is dropped.
"""

import asyncio
import contextlib
import secrets
import time
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

from .errors import ApiError
from .model import ObjectName
from .printable import printable

BURST = 25
REFILL_SECONDS = 300.0
SAME_SECONDS = 360.0
"""The same Event again within these is no new one (client-go's finishTime)."""
NOTE_BYTES = 1024
"""events.k8s.io/v1 allows so much in a note."""
CONTROLLER = "dataplane"


class Poster(Protocol):
    """What is needed of `kube_transport.KubeTransport`."""

    async def post(self, path: str, body: Mapping[str, object]) -> None: ...
    async def close(self) -> None: ...


class Log(Protocol):
    """What is needed of a structlog logger."""

    def info(self, event: str, **fields: Any) -> Any: ...


class EventWriter:
    """Belongs to one event loop. `tell` only puts into a queue; a task of its own writes."""

    def __init__(self, poster: Poster, node_name: str, log: Log) -> None:
        self.written = 0
        self.dropped = 0
        """Left out because there were too many, or because the server did not take them."""
        self._poster = poster
        self._node_name = node_name
        self._log = log
        self._tokens, self._since = float(BURST), time.monotonic()
        self._recent: dict[tuple[str, str, str], float] = {}
        self._queue: deque[dict[str, object]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._told = False

    def tell(self, reason: str, action: str, note: str = "", service: ObjectName | None = None) -> None:
        """An Event about this node, or about a Service. With a note it is a warning."""
        now = time.monotonic()
        key = (reason, note, str(service or ""))
        self._recent = {one: at for one, at in self._recent.items() if now - at < SAME_SECONDS}
        self._tokens = min(BURST, self._tokens + (now - self._since) / REFILL_SECONDS)
        self._since = now
        if key in self._recent or self._tokens < 1:
            self.dropped += 1
            return
        self._tokens -= 1
        self._recent[key] = now
        self._queue.append(self._event(reason, action, note, service))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._write())

    def _event(self, reason: str, action: str, note: str, service: ObjectName | None) -> dict[str, object]:
        if service is None:
            about = {"kind": "Node", "name": self._node_name, "uid": self._node_name}
        else:
            about = {"kind": "Service", "namespace": service.namespace, "name": service.name, "uid": str(service)}
        return {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {
                "name": f"{about['name'][:230]}.{secrets.token_hex(8)}",
                "namespace": about.get("namespace", "default"),
            },
            "eventTime": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "reportingController": CONTROLLER,
            "reportingInstance": f"{CONTROLLER}-{self._node_name}"[:128],
            "action": action,
            "reason": reason,
            "regarding": about,
            "type": "Warning" if note else "Normal",
            "note": printable(note, NOTE_BYTES),
        }

    async def _write(self) -> None:
        while self._queue:
            event = self._queue.popleft()
            metadata: Any = event["metadata"]
            try:
                await self._poster.post(f"/apis/events.k8s.io/v1/namespaces/{metadata['namespace']}/events", event)
                self.written += 1
            except ApiError as error:
                self.dropped += 1
                if not self._told:
                    self._told = True
                    self._log.info("event not written", reason=event["reason"], error=printable(str(error), 500))
        await self._poster.close()  # the next one comes in hours, or never

    async def close(self) -> None:
        """Write nothing more."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._poster.close()
