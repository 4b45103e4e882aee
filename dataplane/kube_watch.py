"""One kind of object of a Kubernetes API, listed and then watched (a "reflector"), for as long as the process lives.

    list in pages ──▶ whole list, replaced with diff ──▶ watch from its resourceVersion ──▶ events, bookmarks
         ▲                                                      │ the server ends it: watch again from the last version
         └── 410 Gone (history is compacted), 400 ◀─────────────┘ anything else: a pause, then the same

What is promised, whatever the server or the network does:

* Nothing is lost: a watch goes on from the last version seen; when the server has forgotten that one, a new list tells
  by comparison what was deleted meanwhile.
* Nothing is resurrected: events older than what was seen do not count, nor does a list older than that (a server that
  lags behind, kubernetes/kubernetes#83520), unless only such are to be had for `older_seconds` (etcd was restored from
  a backup). resourceVersions compare as whole numbers (KEP-5504); where they are none, any is taken.
* A list counts as a whole or not at all.
* A watch that has died in silence is noticed: each one is asked to end after `watch_seconds`, and `grace_seconds` later
  it counts as dead; a connection whose other end is gone fails earlier by TCP keepalive (`kube_transport`).

Lists ask for no resourceVersion, which means the newest: the server has it from etcd, or proves that its cache is as
new. Of objects, only what `kubernetes_wire` names is decoded, and each but once.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import msgspec
from msgspec import Raw, Struct

from .errors import ApiError
from .kubernetes_nodes import read_place
from .kubernetes_objects import read_object
from .kubernetes_reading import Reading
from .model import ObjectName
from .printable import printable

GONE, BAD_REQUEST, FORBIDDEN, NOT_FOUND = 410, 400, 403, 404


class Resource(Struct, frozen=True):
    """What is listed and watched. `selector` goes by labels, `field` by a field.

    `secondary`: a server that does not have it (404), or does not let us have it (403), is no obstacle.
    """

    kind: str
    path: str
    selector: str = ""
    field: str = ""
    secondary: bool = False
    read: Callable[[Raw, str], Reading | None] = read_object

    def parameters(self) -> dict[str, str]:
        """The selectors, for a request."""
        given = {"labelSelector": self.selector, "fieldSelector": self.field}
        return {name: text for name, text in given.items() if text}


SERVICES = Resource("Service", "/api/v1/services", "!service.kubernetes.io/service-proxy-name")
SLICES = Resource(
    "EndpointSlice",
    "/apis/discovery.k8s.io/v1/endpointslices",
    "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name",
)
"""kube-proxy's selectors (cmd/kube-proxy/app/server.go)."""
SERVICE_CIDRS = Resource("ServiceCIDR", "/apis/networking.k8s.io/v1/servicecidrs", secondary=True, read=read_place)
"""Stable since Kubernetes 1.33; older servers answer 404."""


def node_resource(name: str) -> Resource:
    """The Node of that name, and no other: with each of ten thousand nodes watching all, the API would do nothing
    else."""
    return Resource("Node", "/api/v1/nodes", field=f"metadata.name={name}", secondary=True, read=read_place)


class Pace(Struct, frozen=True):
    """Times in seconds, and the objects in a page."""

    watch_seconds: float = 44.0
    """A watch ends by itself after this, or up to a fifth earlier, so that not all nodes ask at once."""
    grace_seconds: float = 8.0
    backoff_least: float = 0.8
    backoff_most: float = 30.0
    older_seconds: float = 300.0
    absent_seconds: float = 300.0
    """Until a kind that the server does not have is asked for again."""
    page: int = 500


class Transport(Protocol):
    """What a reflector needs of `kube_transport.KubeTransport`."""

    async def get(self, path: str, parameters: Mapping[str, str]) -> bytes: ...
    def stream(
        self, path: str, parameters: Mapping[str, str]
    ) -> AbstractAsyncContextManager[AsyncIterator[list[bytes]]]: ...
    async def close(self) -> None: ...


class Sink(Protocol):
    """Where the objects go."""

    def known(self, reading: Reading) -> Reading: ...
    def put(self, kind: str, reading: Reading, trigger: str = "") -> None:
        """Added or changed; `trigger`: what the object says of when its change began (RFC 3339)."""

    def remove(self, kind: str, name: ObjectName) -> None: ...
    def replace(self, kind: str, readings: list[Reading], triggers: list[str]) -> None:
        """A whole list; `triggers`: of those that are not as they were."""

    def absent(self, kind: str) -> None:
        """The server has no such kind for us."""

    def settled(self) -> None:
        """All that came together is in."""


class Log(Protocol):
    """What a reflector needs of a structlog logger."""

    def info(self, event: str, **fields: Any) -> Any: ...
    def warning(self, event: str, **fields: Any) -> Any: ...


class _PageMeta(Struct, frozen=True, gc=False, rename={"version": "resourceVersion", "onward": "continue"}):
    version: str = ""
    onward: str | None = None


class _Page(Struct, gc=False):
    kind: str = ""
    metadata: _PageMeta = _PageMeta()
    items: list[Raw] | None = None


class _Event(Struct, gc=False):
    type: str
    object: Raw


class _Trigger(Struct, frozen=True, gc=False, rename={"at": "endpoints.kubernetes.io/last-change-trigger-time"}):
    at: str = ""


_NO_TRIGGER = _Trigger()


class _Version(Struct, frozen=True, gc=False, rename={"version": "resourceVersion", "annotations": "annotations"}):
    version: str = ""
    annotations: _Trigger | None = None


class _Versioned(Struct, gc=False):
    metadata: _Version = _Version()


class _Status(Struct, gc=False):
    code: int = 0
    message: str = ""


_page = msgspec.json.Decoder(_Page)
_event = msgspec.json.Decoder(_Event)
_versioned = msgspec.json.Decoder(_Versioned)
_status = msgspec.json.Decoder(_Status)


def older(version: str, than: str) -> bool:
    """Whether a resourceVersion comes before another; False where they cannot be compared."""
    if not (version.isascii() and version.isdigit() and than.isascii() and than.isdigit()):
        return False
    return int(version) < int(than)


class Reflector:
    """Keeps one kind of object in the sink as the API server has it. `run` never returns, and raises only for bugs."""

    def __init__(
        self,
        resource: Resource,
        transport: Transport,
        sink: Sink,
        log: Log,
        pace: Pace = Pace(),  # noqa: B008 (frozen)
    ) -> None:
        self.resource = resource
        self.listed = False
        """A whole list has been taken."""
        self.version = ""
        """The newest resourceVersion seen."""
        self.dead_since: float | None = None
        """Seconds since the epoch; None = the watch (or the list before it) goes well."""
        self.tried_at = time.time()
        """When something was last asked of the server, or came from it: who still tries is not stuck."""
        self.last_error = "no list yet"
        self._transport = transport
        self._sink = sink
        self._log = log
        self._pace = pace
        self._relist = True
        self._backoff = pace.backoff_least
        self._older_since: float | None = None
        self._garbled = 0
        self._heard = time.time()
        self._told = False

    async def run(self) -> None:
        """List, watch, and begin again where it broke."""
        while True:
            self.tried_at = time.time()
            try:
                if self._relist:
                    await self._list()
                await self._watch()
            except ApiError as error:
                if self.resource.secondary and not self.version and error.status in (FORBIDDEN, NOT_FOUND):
                    await self._do_without(error)
                    continue
                if error.status in (GONE, BAD_REQUEST):
                    self._relist = True
                await self._pause(error)

    async def _pause(self, error: ApiError) -> None:
        """After a failure: tell it once, let go of the connection, wait, the longer the more often it fails."""
        if self.dead_since is None:
            self.dead_since = self._heard
        self.last_error = printable(str(error), 500)
        if not self._told:
            self._told = True
            self._log.warning("watch lost", kind=self.resource.kind, error=self.last_error)
        await self._transport.close()
        pause = max(self._backoff * random.uniform(0.5, 1.0), error.retry_after)
        self._backoff = min(self._backoff * 2, self._pace.backoff_most)
        await asyncio.sleep(pause)

    async def _do_without(self, error: ApiError) -> None:
        """The server never had this kind for us: go on, and ask again after a long while."""
        if self.last_error != str(error):
            self._log.info("not watched", kind=self.resource.kind, reason=printable(str(error), 500))
        self.last_error, self.dead_since, self.listed = printable(str(error), 500), None, True
        self._sink.absent(self.resource.kind)
        self._sink.settled()
        await self._transport.close()
        await asyncio.sleep(self._pace.absent_seconds * random.uniform(0.8, 1.0))

    def _alive(self) -> None:
        """Something came from the server."""
        self._heard = self.tried_at = time.time()
        if self.dead_since is not None:
            if self._told:
                seconds = round(self._heard - self.dead_since, 1)
                self._log.info("watch restored", kind=self.resource.kind, seconds=seconds)
            self.dead_since, self.last_error, self._told = None, "", False

    # ---------------------------------------------------------------------------------------------------- the list

    async def _list(self) -> None:
        """Take a whole list, page by page."""
        try:
            version, readings, triggers = await self._pages(self._pace.page)
        except ApiError as error:
            if error.status != GONE:
                raise
            version, readings, triggers = await self._pages(
                0
            )  # the pages' version was compacted meanwhile: all at once then
        if self._out_of_date(version):
            raise ApiError(f"the server lists version {printable(version, 64)}, older than {self.version}, seen before")
        self._sink.replace(self.resource.kind, readings, triggers)
        self.version, self._relist, self.listed = version, False, True
        self._heard = time.time()
        self._sink.settled()

    def _out_of_date(self, version: str) -> bool:
        """Whether a list must not count because a newer one was seen."""
        if not older(version, self.version):
            self._older_since = None
            return False
        now = time.monotonic()
        self._older_since = now if self._older_since is None else self._older_since
        return now - self._older_since < self._pace.older_seconds

    async def _pages(self, limit: int) -> tuple[str, list[Reading], list[str]]:
        kind, sink = self.resource.kind, self._sink
        readings: list[Reading] = []
        triggers: list[str] = []
        version, onward = "", ""
        while True:
            parameters = self.resource.parameters()
            if limit:
                parameters["limit"] = str(limit)
            if onward:
                parameters["continue"] = onward
            self.tried_at = time.time()
            text = await self._transport.get(self.resource.path, parameters)
            try:
                page = _page.decode(text)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise ApiError(f"a list that is not one: {error}") from None
            if page.kind != f"{kind}List" or not page.metadata.version:
                raise ApiError(f"not a {kind}List: {printable(page.kind, 64)}")
            if version and page.metadata.version != version:
                raise ApiError("pages of one list are of different versions")
            version, onward = page.metadata.version, page.metadata.onward or ""
            for item in page.items or ():
                reading = self._read(item)
                if reading is not None:
                    known = sink.known(reading)
                    readings.append(known)
                    if known is reading and self.listed:
                        triggers.append((_versioned.decode(item).metadata.annotations or _NO_TRIGGER).at)
            if not onward:
                return version, readings, triggers

    # --------------------------------------------------------------------------------------------------- the watch

    async def _watch(self) -> None:
        """Take events until the server ends the watch as asked; ApiError for any other end."""
        seconds = self._pace.watch_seconds * random.uniform(0.8, 1.0)
        parameters = self.resource.parameters() | {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self.version,
            "timeoutSeconds": str(max(1, int(seconds))),
        }
        started, came = time.monotonic(), False
        try:
            async with (
                asyncio.timeout(seconds + self._pace.grace_seconds) as limit,
                self._transport.stream(self.resource.path, parameters) as pieces,
            ):
                self._alive()
                async for lines in pieces:
                    self._heard = self.tried_at = time.time()
                    came = True
                    try:
                        for line in lines:
                            self._take(line)
                    finally:
                        self._sink.settled()
                    self._backoff = self._pace.backoff_least
                    # so much may have come that its end is still to be read: who talks is not dead
                    ends = asyncio.get_running_loop().time() + self._pace.grace_seconds
                    if ends > (limit.when() or ends):
                        limit.reschedule(ends)
        except TimeoutError:
            raise ApiError("the watch did not end when it should have: it is dead") from None
        if not came and time.monotonic() - started < min(1.0, seconds / 4):
            raise ApiError("the server ended the watch at once")
        self._backoff = self._pace.backoff_least

    def _take(self, line: bytes) -> None:
        """One event."""
        kind = self.resource.kind
        try:
            event = _event.decode(line)
            if event.type == "ERROR":
                status = _status.decode(event.object)
                raise ApiError(f"watch: {printable(status.message, 400)} ({status.code})", status.code)
            metadata = _versioned.decode(event.object).metadata
            version = metadata.version
            reading = None if event.type == "BOOKMARK" else self._read(event.object)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self._garbled += 1
            self._relist |= self._garbled > 1  # the same again: a list goes round it
            raise ApiError(f"an event that cannot be read: {error}") from None
        self._garbled = 0
        if older(version, self.version):
            return
        if reading is not None and event.type in ("ADDED", "MODIFIED"):
            self._sink.put(kind, reading, (metadata.annotations or _NO_TRIGGER).at)
        elif reading is not None and event.type == "DELETED" and reading.name is not None:
            self._sink.remove(kind, reading.name)
        self.version = version or self.version

    def _read(self, document: Raw) -> Reading | None:
        """An object of the kind that is asked for; None for one that is none of our business."""
        kind = self.resource.kind
        reading = self.resource.read(document, kind)
        return reading if reading is None or reading.kind in (kind, "") else None
