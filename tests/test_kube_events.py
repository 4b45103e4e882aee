"""Events: written when possible, few, and never waited for."""

import asyncio
from collections.abc import Mapping

import pytest

from dataplane.errors import ApiError
from dataplane.kube_events import BURST, EventWriter
from dataplane.model import ObjectName

from .test_staleness import Lines


class Poster:
    """An API server's side of it."""

    def __init__(self, seconds: float = 0, refuses: bool = False) -> None:
        self.posted: list[tuple[str, Mapping[str, object]]] = []
        self.closed = 0
        self._seconds, self._refuses = seconds, refuses

    async def post(self, path: str, body: Mapping[str, object]) -> None:
        await asyncio.sleep(self._seconds)
        if self._refuses:
            raise ApiError("HTTP 403: forbidden", 403)
        self.posted.append((path, body))

    async def close(self) -> None:
        self.closed += 1


def test_they_are_as_kube_proxy_writes_them() -> None:
    async def check() -> None:
        poster = Poster()
        events = EventWriter(poster, "node-1", Lines())
        events.tell("Starting", "StartKubeProxy")
        events.tell("FailedToStartServiceHealthcheck", "Listen", "port 31000: in use", ObjectName("shop", "web"))
        await asyncio.sleep(0.05)
        (path, first), (other_path, second) = poster.posted
        assert path == "/apis/events.k8s.io/v1/namespaces/default/events"
        assert (first["reason"], first["action"], first["type"]) == ("Starting", "StartKubeProxy", "Normal")
        assert first["regarding"] == {"kind": "Node", "name": "node-1", "uid": "node-1"}
        assert first["reportingInstance"] == "dataplane-node-1"
        assert other_path == "/apis/events.k8s.io/v1/namespaces/shop/events"
        assert second["regarding"] == {"kind": "Service", "namespace": "shop", "name": "web", "uid": "shop/web"}
        assert (second["type"], second["note"]) == ("Warning", "port 31000: in use")
        assert poster.closed
        await events.close()

    asyncio.run(check())


def test_the_same_again_and_more_than_a_burst_are_left_out() -> None:
    async def check() -> None:
        poster = Poster()
        events = EventWriter(poster, "node-1", Lines())
        for _ in range(5):
            events.tell("Starting", "StartKubeProxy")
        for number in range(100):
            events.tell("Failed", "Listen", f"port {number}")
        await asyncio.sleep(0.05)
        assert len(poster.posted) == events.written == BURST
        assert events.dropped == 80
        await events.close()

    asyncio.run(check())


@pytest.mark.parametrize("poster", [Poster(refuses=True), Poster(seconds=60)], ids=["refuses", "is silent"])
def test_a_server_that_does_not_take_them_holds_nothing_up(poster: Poster) -> None:
    async def check() -> None:
        log = Lines()
        events = EventWriter(poster, "node-1", log)
        events.tell("Starting", "StartKubeProxy")
        events.tell("Failed", "Listen", "why\x1b[31m")
        await asyncio.sleep(0.05)
        await asyncio.wait_for(events.close(), 1)
        assert not poster.posted
        assert len(log.lines) <= 1

    asyncio.run(check())
