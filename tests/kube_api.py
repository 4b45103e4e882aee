"""A Kubernetes API server as far as a watcher sees one: lists in pages, watches, bookmarks, 410, on loopback HTTP.

It keeps every object with its resourceVersion and the history of changes, as etcd does: a page's continue token names
the version that the list has, a watch replays what came after the version that it names, and either is answered with
410 Gone once that history is compacted. A selector is honoured, so that an object that no longer matches arrives as a
deletion. `faults` is asked before each answer and each event for what shall go wrong (see `Fault`).

    api = KubeApi(); await api.start(); api.put(service("a")); api.url
"""

import asyncio
import contextlib
import json
import re
import ssl
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

Object = dict[str, Any]
Fault = Literal[
    "",
    "500",  # an internal error
    "429",  # too many requests, with Retry-After
    "410",  # Gone, as the answer or, in a watch, as an ERROR event
    "reset",  # the connection is reset, in the middle of an answer
    "cut",  # the answer ends in the middle without a word
    "silence",  # nothing comes any more, and the connection stays
    "end",  # the watch ends as if its time were over
    "old",  # the list that another server would give that lags behind; a watch replays events that were seen
    "twice",  # an event is sent twice
    "bookmark",  # a bookmark before the event
    "garbage",  # what a proxy says on a bad day
]
PATHS = {
    "/api/v1/services": "Service",
    "/apis/discovery.k8s.io/v1/endpointslices": "EndpointSlice",
    "/api/v1/nodes": "Node",
    "/apis/networking.k8s.io/v1/servicecidrs": "ServiceCIDR",
}
VERSIONS = {
    "Service": "v1",
    "EndpointSlice": "discovery.k8s.io/v1",
    "Node": "v1",
    "ServiceCIDR": "networking.k8s.io/v1",
}
NO_NAMESPACE = ("Node", "ServiceCIDR")
EVENTS = re.compile(r"/apis/events\.k8s\.io/v1/namespaces/([a-z0-9-]+)/events")


@dataclass(frozen=True)
class Change:
    """One entry of the history: the object before and after; None = it was not there, or is gone."""

    version: int
    kind: str
    name: str
    before: Object | None
    after: Object | None


@dataclass
class Asked:
    """One request, as a test may want to look at it."""

    path: str
    query: dict[str, str]
    headers: dict[str, str]


@dataclass
class KubeApi:
    """The server. `faults(what)` with what = "list", "page", "watch" (a new one) or "event" says what goes wrong."""

    faults: Callable[[str], Fault] = lambda what: ""
    token: str = ""
    """The bearer token that is asked for; "" = none."""
    longest_watch: float = 60.0
    """Seconds after which a watch ends, whatever timeoutSeconds says."""
    refused: dict[str, int] = field(default_factory=dict)
    """Paths that are answered with a failure, and its code."""
    tls: ssl.SSLContext | None = None
    version: int = 1000
    asked: list[Asked] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.objects: dict[tuple[str, str], Object] = {}
        self.history: list[Change] = []
        self.compacted = self.version
        self.watchers = 0
        self.events: list[Object] = []
        """What was posted."""
        self._news = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._port = 0
        self._open: set[asyncio.StreamWriter] = set()

    # ------------------------------------------------------------------------------------------------ what it holds

    def put(self, given: Object) -> None:
        """Create or update an object."""
        made = deepcopy(given)
        kind, name = made["kind"], self._name(made)
        self.version += 1
        made["metadata"]["resourceVersion"] = str(self.version)
        before = self.objects.get((kind, name))
        self.objects[kind, name] = made
        self._changed(Change(self.version, kind, name, before, made))

    def delete(self, kind: str, name: str) -> None:
        """Delete an object, `namespace/name`."""
        before = self.objects.pop((kind, name))
        self.version += 1
        self._changed(Change(self.version, kind, name, before, None))

    def compact(self) -> None:
        """Forget the history: older versions are Gone."""
        self.history.clear()
        self.compacted = self.version

    @staticmethod
    def _name(made: Object) -> str:
        meta = made["metadata"]
        if made["kind"] in NO_NAMESPACE:
            return str(meta["name"])
        return f"{meta.setdefault('namespace', 'default')}/{meta['name']}"

    def _changed(self, change: Change) -> None:
        self.history.append(change)
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _at(self, version: int, kind: str) -> dict[str, Object]:
        """The objects of a kind as they were at a version."""
        found = {name: made for (kind_, name), made in self.objects.items() if kind_ == kind}
        for change in reversed(self.history):
            if change.version <= version:
                break
            if change.kind == kind:
                found.pop(change.name, None)
                if change.before is not None:
                    found[change.name] = change.before
        return found

    # ------------------------------------------------------------------------------------------------- the server

    async def start(self, host: str = "127.0.0.1") -> None:
        """Listen; again on the same port after `stop`."""
        self._server = await asyncio.start_server(self._serve, host, self._port, ssl=self.tls)
        self._port = self._server.sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self._port}"

    async def stop(self) -> None:
        """Refuse connections and break those that are open."""
        if self._server is not None:
            self._server.close()
            self.break_all()
            self._server = None
            await asyncio.sleep(0)

    def break_all(self) -> None:
        """Reset every connection."""
        for writer in [*self._open]:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while True:
                lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, target, _ = lines[0].split()
                split = urlsplit(target)
                query = {key: values[0] for key, values in parse_qs(split.query).items()}
                headers = {key.lower(): value for key, _, value in (line.partition(": ") for line in lines[1:] if line)}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                self.asked.append(Asked(split.path, query, headers))
                if self.token and headers.get("authorization") != f"Bearer {self.token}":
                    await self._answer(writer, status(401, "Unauthorized"), 401)
                elif split.path in self.refused:
                    code = self.refused[split.path]
                    await self._answer(writer, status(code, "refused by the test"), code)
                elif method == "POST" and EVENTS.fullmatch(split.path):
                    self.events.append(json.loads(body))
                    await self._answer(writer, self.events[-1], 201)
                elif split.path not in PATHS:
                    await self._answer(writer, status(404, "not found"), 404)
                elif query.get("watch") == "true":
                    await self._watch(reader, writer, PATHS[split.path], query)
                else:
                    await self._list(writer, PATHS[split.path], query)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:
            raise
        finally:
            self._open.discard(writer)
            writer.transport.abort()

    async def _answer(self, writer: asyncio.StreamWriter, body: Any, code: int = 200, extra: str = "") -> None:
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"HTTP/1.1 {code} X\r\nContent-Type: application/json\r\n{extra}Content-Length: {len(text)}\r\n\r\n"
        writer.write(head.encode() + text)
        await writer.drain()

    async def _fails(self, writer: asyncio.StreamWriter, fault: Fault, body: Any) -> bool:
        """Whether the answer is a failure, which has been given."""
        text = json.dumps(body).encode()
        if fault == "500":
            await self._answer(writer, status(500, "etcdserver: leader changed"), 500)
        elif fault == "429":
            await self._answer(writer, status(429, "too many requests"), 429, "Retry-After: 0\r\n")
        elif fault == "410":
            await self._answer(writer, status(410, "The resourceVersion for the provided list is too old."), 410)
        elif fault == "garbage":
            await self._answer(writer, b"<html>502 Bad Gateway</html>")
        elif fault in ("reset", "cut", "silence"):
            head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
            writer.write(head.encode() + text[: len(text) // 2])
            await writer.drain()
            if fault == "silence":
                await asyncio.sleep(3600)
            if fault == "cut":
                writer.close()
            raise ConnectionResetError
        else:
            return False
        return True

    # ---------------------------------------------------------------------------------------------- list and watch

    async def _list(self, writer: asyncio.StreamWriter, kind: str, query: dict[str, str]) -> None:
        version, start = self.version, ""
        if "continue" in query:
            token = json.loads(query["continue"])
            version, start = token["v"], token["start"]
        fault = self.faults("page" if start else "list")
        if not start and fault == "old":
            version = max(self.compacted, self.version - 5)
        found = self._at(version, kind)
        names = sorted(name for name, made in found.items() if matches(made, query))
        names = [name for name in names if name > start]
        limit = int(query.get("limit", "0")) or len(names)
        meta: Object = {"resourceVersion": str(version)}
        if len(names) > limit:
            meta["continue"] = json.dumps({"v": version, "start": names[limit - 1]})
            meta["remainingItemCount"] = len(names) - limit
        items = [
            {key: each for key, each in found[name].items() if key not in ("kind", "apiVersion")} for name in names
        ]
        body = {"kind": f"{kind}List", "apiVersion": VERSIONS[kind], "metadata": meta, "items": items[:limit]}
        if await self._fails(writer, fault, body):
            return
        if start and version < self.compacted:
            await self._answer(writer, status(410, "The provided continue parameter is too old"), 410)
            return
        await self._answer(writer, body)

    async def _watch(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kind: str, query: dict[str, str]
    ) -> None:
        since = int(query["resourceVersion"])
        fault = self.faults("watch")
        if await self._fails(writer, fault, {}):
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
        if fault == "old" and since >= self.compacted:
            since = max(self.compacted, since - 5)
        loop = asyncio.get_running_loop()
        ends = loop.time() + min(self.longest_watch, float(query.get("timeoutSeconds", "3600")))
        self.watchers += 1
        try:
            while True:
                news = self._news
                if since < self.compacted:
                    await self._event(writer, "ERROR", status(410, "too old resource version"))
                    writer.write(b"0\r\n\r\n")
                    return
                for change in [each for each in self.history if each.version > since]:
                    since = change.version
                    before = change.before is not None and matches(change.before, query)
                    after = change.after is not None and matches(change.after, query)
                    if change.kind != kind or not (before or after):
                        continue
                    fault = self.faults("event")
                    if fault == "silence":
                        await asyncio.sleep(3600)
                    if fault == "410":
                        await self._event(writer, "ERROR", status(410, "too old resource version"))
                        writer.write(b"0\r\n\r\n")
                        return
                    if fault == "reset":
                        writer.transport.abort()
                        raise ConnectionResetError
                    if fault == "end":
                        writer.write(b"0\r\n\r\n")
                        return
                    if fault == "garbage":
                        await self._chunk(writer, b'{"type":"MODIFIED","object":{"meta\n')
                        raise ConnectionResetError
                    if fault == "bookmark":
                        await self._bookmark(writer, kind, since - 1)
                    body = deepcopy((change.after if after else change.before) or {})
                    body["metadata"]["resourceVersion"] = str(change.version)
                    what = "ADDED" if not before else "MODIFIED" if after else "DELETED"
                    if fault == "cut":
                        text = json.dumps({"type": what, "object": body}).encode()
                        await self._chunk(writer, text[: len(text) // 2])
                        writer.close()
                        raise ConnectionResetError
                    for _ in range(2 if fault == "twice" else 1):
                        await self._event(writer, what, body)
                if loop.time() >= ends:
                    await self._bookmark(writer, kind, since)
                    writer.write(b"0\r\n\r\n")
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), max(0.0, ends - loop.time()))
                if writer.transport.is_closing() or reader.at_eof():
                    raise ConnectionResetError
        finally:
            self.watchers -= 1

    async def _bookmark(self, writer: asyncio.StreamWriter, kind: str, version: int) -> None:
        body = {"kind": kind, "apiVersion": VERSIONS[kind], "metadata": {"resourceVersion": str(version)}}
        await self._event(writer, "BOOKMARK", body)

    async def _event(self, writer: asyncio.StreamWriter, what: str, body: Any) -> None:
        await self._chunk(writer, json.dumps({"type": what, "object": body}).encode() + b"\n")

    async def _chunk(self, writer: asyncio.StreamWriter, text: bytes) -> None:
        writer.write(f"{len(text):x}\r\n".encode() + text + b"\r\n")
        await writer.drain()


def status(code: int, message: str) -> Object:
    """meta/v1 Status of a failure."""
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}


def matches(made: Object, query: dict[str, str]) -> bool:
    """A label selector of the form `!a,!b`, and a field selector of the form `metadata.name=a`."""
    labels = made["metadata"].get("labels") or {}
    name = query.get("fieldSelector", "").removeprefix("metadata.name=")
    if name and made["metadata"]["name"] != name:
        return False
    return not any(part.removeprefix("!") in labels for part in query.get("labelSelector", "").split(",") if part)


def node(name: str, zone: str = "", *ranges: str, addresses: dict[str, str] | None = None, **spec: Any) -> Object:
    """A Node; `addresses` by type."""
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone} if zone else {}},
        "spec": {"podCIDR": ranges[0], "podCIDRs": list(ranges), **spec} if ranges else spec,
        "status": {"addresses": [{"type": kind, "address": each} for kind, each in (addresses or {}).items()]},
    }


def service_cidr(name: str, *ranges: str) -> Object:
    """A ServiceCIDR."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": name},
        "spec": {"cidrs": list(ranges)},
    }


def service(name: str, address: str = "10.96.0.10", port: int = 80, labels: dict[str, str] | None = None) -> Object:
    """A Service of namespace default."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default", "labels": labels or {}},
        "spec": {"type": "ClusterIP", "clusterIP": address, "clusterIPs": [address], "ports": [{"port": port}]},
    }


def endpoint_slice(name: str, owner: str, *addresses: str, port: int = 8080) -> Object:
    """An EndpointSlice of namespace default."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": owner}},
        "addressType": "IPv4",
        "ports": [{"port": port}],
        "endpoints": [{"addresses": [address]} for address in addresses],
    }


def kubeconfig(url: str, user: Object | None = None) -> str:
    """The text of a kubeconfig (JSON is YAML)."""
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "there", "cluster": {"server": url}}],
            "users": [{"name": "me", "user": user or {}}],
            "contexts": [{"name": "here", "context": {"cluster": "there", "user": "me"}}],
        }
    )
