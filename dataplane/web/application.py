"""The routes, and who may ask: GET only, under a name that can only be this machine's (no DNS rebinding)."""

import asyncio
import gzip
import ipaddress
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from . import page
from .metrics import Exposition
from .viewing import View, Watch

VIEWERS = 32
"""Pages open at a time; further ones are told to come again."""
STILL_SECONDS = 15.0
"""After so long without news a comment keeps the connection alive."""
_ASSETS = Path(__file__).parent / "assets"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9_.-]+))(?::[0-9]{1,5})?")

Scope = Any
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


def may_ask(host: str, *, loopback: bool) -> bool:
    """Whether a request with this Host header is answered.

    A stranger's page reaches this server through a name of his that he lets lead to 127.0.0.1, and only so. Addresses
    and localhost are no such names; on an address that others are meant to reach, names are theirs to choose.
    """
    found = _HOST.fullmatch(host)
    if found is None:
        return False
    name = found[1] or found[2]
    if not loopback or name.lower() == "localhost":
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Guard:
    """ASGI: refuses what is not for us before anything else sees it, and gives each answer the headers of safety."""

    def __init__(self, app: Any, *, loopback: bool) -> None:
        self._app = app
        self._loopback = loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection's request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_safely(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or not may_ask(hosts[0], loopback=self._loopback):
            refusal = PlainTextResponse("ask for this page by address, or as localhost\n", 421)
            await refusal(scope, receive, send_safely)
        elif scope["method"] not in ("GET", "HEAD"):
            await PlainTextResponse("GET only\n", 405, {"Allow": "GET, HEAD"})(scope, receive, send_safely)
        else:
            await self._app(scope, receive, send_safely)


class Site:
    """What is served, of one `Watch`."""

    def __init__(self, watch: Watch, node: str, max_series: int) -> None:
        self._watch = watch
        self._node = node
        self._max_series = max_series
        self._exposition = Exposition(max_series)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self._exposition)
        self._rendering = asyncio.Lock()
        self._files = {
            path.name: (path.read_bytes(), _TYPES[path.suffix]) for path in _ASSETS.iterdir() if path.suffix in _TYPES
        }

    def application(self, *, loopback: bool) -> Guard:
        """The ASGI application."""
        routes = [
            Route("/", self._index),
            Route("/assets/{name}", self._asset),
            Route("/events", self._events),
            Route("/metrics", self._metrics),
            Route("/healthz", self._healthz),
            Route("/proxyMode", self._proxy_mode),
        ]
        return Guard(Starlette(routes=routes), loopback=loopback)

    async def _index(self, _: Request) -> Response:
        return self._file("index.html")

    async def _asset(self, request: Request) -> Response:
        return self._file(request.path_params["name"])

    def _file(self, name: str) -> Response:
        if name not in self._files:
            return PlainTextResponse("no such page\n", 404)
        body, kind = self._files[name]
        return Response(body, headers={"Content-Type": kind})

    async def _metrics(self, request: Request) -> Response:
        async with self._rendering:
            self._exposition.view = await self._watch.now()
            body = await asyncio.to_thread(generate_latest, self._registry)
        headers = {"Content-Type": METRICS_TYPE, "Vary": "Accept-Encoding"}
        if any("gzip" in value for value in request.headers.getlist("accept-encoding")):
            body = await asyncio.to_thread(gzip.compress, body, 1)
            headers["Content-Encoding"] = "gzip"
        return Response(body, headers=headers)

    async def _healthz(self, _: Request) -> Response:
        view = await self._watch.now()
        if view.status is None:
            return PlainTextResponse(f"{view.trouble}\n", 503)
        return PlainTextResponse("ok\n") if view.status["healthy"] else PlainTextResponse("not healthy\n", 503)

    async def _proxy_mode(self, _: Request) -> Response:
        view = await self._watch.now()
        return PlainTextResponse(view.look.mode) if view.look else PlainTextResponse(f"{view.trouble}\n", 503)

    # --------------------------------------------------------------------------------------------------------- events

    async def _events(self, request: Request) -> Response:
        if self._watch.viewers >= VIEWERS:
            return PlainTextResponse("too many viewers\n", 503, {"Retry-After": "10"})
        query = read_query(request.query_params)
        return StreamingResponse(self._stream(query), headers={"Content-Type": "text/event-stream"})

    async def _stream(self, query: page.Query) -> AsyncIterator[bytes]:
        """News as they come; what is as it was is not sent again."""
        sent: dict[str, bytes] = {}
        shown_until = 0.0
        names: list[str] = []
        yield b"retry: 2000\n\n"
        async for view in _with_pauses(self._watch.views()):
            if view is None:
                yield b": still here\n\n"
                continue
            news: dict[str, object] = {"overview": page.overview(view, self._node, self._max_series)}
            if view.look is not None:
                news["services"] = page.services(view.rows, query)
                if query.chosen:
                    one = page.chosen(view.rows, query)
                    news["chosen"] = one
                    lines = one["lines"] if one else []
                    if lines and set(lines) - set(names):  # who is new among the lines changes all of them
                        names, shown_until = lines, 0.0
                    if names:
                        more = page.points(self._watch.history, query.chosen, names, shown_until)
                        if more:
                            news["points"] = {"names": names, "anew": not shown_until, "points": more}
                            shown_until = more[-1][0] or 0.0
            text = b""
            for kind, value in news.items():
                data = msgspec.json.encode(value)
                if sent.get(kind) != data:
                    sent[kind] = data
                    text += b"event: %s\ndata: %s\n\n" % (kind.encode(), data)
            if text:
                yield text


async def _with_pauses(views: AsyncGenerator[View, None]) -> AsyncIterator[View | None]:
    """The same, with None where nothing has come for a while."""
    waiting: asyncio.Task[View] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(_next(views))
            done, _ = await asyncio.wait({waiting}, timeout=STILL_SECONDS)
            if not done:
                yield None
                continue
            result, waiting = waiting.result(), None
            yield result
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.wait({waiting})
        await views.aclose()


async def _next(views: AsyncGenerator[View, None]) -> View:
    return await anext(views)


def read_query(given: Mapping[str, str]) -> page.Query:
    """What a browser asks for; nonsense becomes the default."""
    sort, limit = given.get("sort", ""), given.get("limit", "")
    return page.Query(
        given.get("q", "")[:200],
        sort if sort in page.SORTS else page.SORTS[0],
        int(limit) if limit.isascii() and limit.isdigit() and len(limit) < 10 else page.SERVICES,
        given.get("open", "")[:100],
    )
