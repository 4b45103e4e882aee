"""A web server with an agent's control socket behind it, whose answers a test writes; and its clients."""

import asyncio
import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from msgspec.structs import replace

from dataplane.agent import Agent, AgentOptions
from dataplane.control_server import ControlServer
from dataplane.desired import Rules
from dataplane.errors import KernelError
from dataplane.reconciler import Reconciler
from dataplane.rows import Counts, Look, RealServerRow, ServiceRow
from dataplane.tcp_listener import Listen, open_listener
from dataplane.testing import FakeBackend
from dataplane.web.application import Site
from dataplane.web.viewing import Watch

from .test_staleness import Lines

SECONDS = 60
"""A process that starts with the first caller takes its time in the emulated micro-VM."""


def real(address: str, hits: int | None = 0, **fields: Any) -> RealServerRow:
    """One backend on port 9376."""
    row = RealServerRow(address, 9376, 1, "active", None, "Masq", 0, 0, hits, hits, None, None, None, None, 0, 0)
    return replace(row, **fields)


def service(label: str, address: str, *reals: RealServerRow, **fields: Any) -> ServiceRow:
    """One virtual server of ours on port 80/TCP; its hits are those of its backends, unless given."""
    namespace, _, rest = label.partition("/")
    name, _, port_name = rest.partition(":")
    hits = sum(each.hits or 0 for each in reals)
    named = (namespace, name, port_name, address, 80, "TCP", "ClusterIP", False, 0, "rr", (), False, 0, 0)
    row = ServiceRow(*named, "detect", (), "reject", True, hits, hits, None, reals)
    return replace(row, **fields)


def look(*services: ServiceRow, mode: str = "ipvs", counts: Counts | None = None) -> Look:
    """A look of this moment, shares worked out."""
    rows = []
    for row in services:
        here = sum(each.hits or 0 for each in row.real_servers)
        reals = tuple(
            replace(each, share=None if each.hits is None or not here else each.hits / here)
            for each in row.real_servers
        )
        rows.append(replace(row, real_servers=reals))
    return Look(mode, time.time(), counts or Counts("probe", ("fexit:ip_vs_schedule",), {}), tuple(rows))


class ScriptedAgent:
    """Answers on a control socket: the status of a real agent over a fake kernel, and the looks of a test."""

    def __init__(self) -> None:
        log: Any = Lines()
        self.agent = Agent(Reconciler(FakeBackend(drains=True), Rules()), log, AgentOptions(), log)
        self.look = look()
        self.status: dict[str, Any] = {}
        """What differs from the agent's own status."""
        self.asked: dict[str, int] = {"look": 0, "status": 0}
        self.trouble = ""

    def next_look(self) -> Look:
        """What the kernel would hold now; a test may put another function here."""
        return replace(self.look, at=time.time())

    def answers(self) -> dict[str, Any]:
        def tell_look() -> bytes:
            self.asked["look"] += 1
            if self.trouble:
                raise KernelError("dump", self.trouble, 4)
            return self.next_look().to_json()

        def tell_status() -> bytes:
            self.asked["status"] += 1
            return json.dumps({**self.agent.status(), "mode": self.look.mode, **self.status}).encode()

        return {"look": tell_look, "status": tell_status}


class Stage:
    """The server's address, and the agent that it asks."""

    def __init__(self, port: int, agent: ScriptedAgent) -> None:
        self.port = port
        self.agent = agent
        self.url = f"http://127.0.0.1:{port}/"

    def request(
        self, path: str, method: str = "GET", headers: dict[str, str] | None = None
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """One request, one answer."""
        return request(self.port, path, method, headers)

    def metrics(self) -> str:
        """The exposition."""
        return self.request("/metrics")[1].decode()


def request(
    port: int, path: str, method: str = "GET", headers: dict[str, str] | None = None
) -> tuple[http.client.HTTPResponse, bytes]:
    """One request to 127.0.0.1."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    with contextlib.closing(connection):
        connection.putrequest(method, path, skip_host="Host" in (headers or {}))
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer, answer.read()


@contextlib.contextmanager
def events(port: int, query: str = "") -> Iterator[Iterator[tuple[str, Any]]]:
    """Server-sent events, as (kind, data)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    with contextlib.closing(connection):
        connection.request("GET", f"/events{query}")
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        assert answer.headers["Content-Type"].startswith("text/event-stream")

        def read() -> Iterator[tuple[str, Any]]:
            kind = ""
            for line in answer:
                text = line.decode().rstrip("\n")
                if text.startswith("event: "):
                    kind = text[7:]
                elif text.startswith("data: "):
                    yield kind, json.loads(text[6:])

        yield read()


@contextlib.contextmanager
def staged(folder: Path, agent: ScriptedAgent | None = None, max_series: int = 100_000) -> Iterator[Stage]:
    """Serve, in a thread, until the end of the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATAPLANE_RUNTIME_DIRECTORY", str(folder / "run"))
        listener = open_listener(Listen("127.0.0.1", 0))
        stage = Stage(listener.getsockname()[1], agent or ScriptedAgent())
        ready = threading.Event()
        server: uvicorn.Server | None = None

        async def serve() -> None:
            nonlocal server
            control = ControlServer(stage.agent.answers())
            await control.start()
            watch = Watch()
            site = Site(watch, "node-1", max_series).application(loopback=True)
            server = uvicorn.Server(
                uvicorn.Config(site, log_config=None, lifespan="off", timeout_graceful_shutdown=1, access_log=False)
            )
            ready.set()
            await server.serve([listener])
            await watch.close()
            await control.close()

        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        try:
            assert ready.wait(20)
            yield stage
        finally:
            assert server is not None
            server.should_exit = True
            thread.join(20)
            listener.close()
