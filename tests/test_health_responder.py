"""Health check node ports over real sockets on loopback: answers, changes, and clients that mean no good."""

import asyncio
import contextlib
import http.client
import json
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dataplane import health_responder
from dataplane.desired import HealthCheck, Rules
from dataplane.health_responder import HealthResponder, listening_addresses
from dataplane.model import Family, ObjectName, parse_address, parse_network

from .netns import Topology
from .node_agent import node_agent
from .traffic import eventually
from .words import name

LOOPBACK = Rules(
    node_addresses=(parse_address("127.0.0.1"), parse_address("::1")),
    node_port_ranges=(parse_network("127.0.0.0/8"), parse_network("::1")),
)


class Lines:
    """A log that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))

    warning = info


@pytest.fixture
def port() -> int:
    return free_port()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        number: int = one.getsockname()[1]
        return number


def open_clients(one: HealthResponder) -> int:
    return one._turns.open


def retries(one: HealthResponder) -> bool:
    return one.retry_at is not None


@contextlib.asynccontextmanager
async def responder(healthy: bool = True) -> AsyncIterator[HealthResponder]:
    one = HealthResponder(Lines(), lambda: healthy)
    try:
        yield one
    finally:
        await one.close()


def checks(**ports: tuple[int, int, int]) -> dict[ObjectName, HealthCheck]:
    return {name(f"shop/{key}"): HealthCheck(*value) for key, value in ports.items()}


def asked(port: int, address: str = "127.0.0.1", method: str = "GET", path: str = "/") -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(address, port, timeout=10)
    connection.request(method, path)
    answer = connection.getresponse()
    answer.text = answer.read().decode()  # type: ignore[attr-defined]
    connection.close()
    return answer


async def get(port: int, *words: str) -> http.client.HTTPResponse:
    return await asyncio.to_thread(asked, port, *words)


def raw(port: int, data: bytes, seconds: float = 10) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as one:
        with contextlib.suppress(OSError):
            one.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := one.recv(65536):
                answer += part
        return answer


def test_the_answer_is_kube_proxys(port: int) -> None:
    async def check() -> None:
        async with responder() as one:
            await one.follow(checks(web=(port, 2, 0)), LOOPBACK)
            for path in ("/", "/healthz", "/any/where?at=all"):
                answer = await get(port, "127.0.0.1", "GET", path)
                assert answer.status == 200
            headers = {key: value for key, value in answer.getheaders() if key not in ("Content-Length", "Connection")}
            assert headers == {
                "Content-Type": "application/json",
                "X-Content-Type-Options": "nosniff",
                "X-Load-Balancing-Endpoint-Weight": "2",
            }
            assert answer.text == (  # type: ignore[attr-defined]
                '{\n\t"service": {\n\t\t"namespace": "shop",\n\t\t"name": "web"\n\t},\n'
                '\t"localEndpoints": 2,\n\t"serviceProxyHealthy": true\n}'
            )
            head = await get(port, "127.0.0.1", "HEAD")
            assert (head.status, head.text) == (200, "")  # type: ignore[attr-defined]

    asyncio.run(check())


def test_no_endpoint_here_or_an_unhealthy_agent_is_unavailable(port: int) -> None:
    async def check() -> None:
        async with responder() as one:
            await one.follow(checks(web=(port, 0, 3)), LOOPBACK)
            assert (await get(port)).status == 503
            assert (await get(port, "::1")).status == 200  # each family for itself
            await one.follow(checks(web=(port, 1, 0)), LOOPBACK)
            assert (await get(port)).status == 200
            assert (await get(port, "::1")).status == 503
        async with responder(healthy=False) as sick:
            await sick.follow(checks(web=(port, 1, 0)), LOOPBACK)
            answer = await get(port)
            assert (answer.status, json.loads(answer.text)["serviceProxyHealthy"]) == (503, False)  # type: ignore[attr-defined]

    asyncio.run(check())


def test_ports_follow_the_services(port: int) -> None:
    async def check() -> None:
        other = free_port()
        async with responder() as one:
            await one.follow(checks(web=(port, 1, 0)), LOOPBACK)
            await one.follow(checks(web=(other, 1, 0), log=(port, 4, 0)), LOOPBACK)
            answers = [json.loads((await get(each)).text) for each in (port, other)]  # type: ignore[attr-defined]
            assert [each["service"]["name"] for each in answers] == ["log", "web"]
            await one.follow({}, LOOPBACK)
            for each in (port, other):
                with pytest.raises(ConnectionRefusedError):
                    await get(each)
            assert one.status() == []

    asyncio.run(check())


def test_a_port_that_is_taken_is_named_and_tried_again(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_responder, "RETRY_SECONDS", 0.0)

    async def check() -> None:
        async with responder() as one:
            log = one._log
            assert isinstance(log, Lines)
            with socket.socket() as squatter:
                squatter.bind(("127.0.0.1", port))
                squatter.listen()
                for _ in range(2):
                    await one.follow(checks(web=(port, 1, 0)), LOOPBACK)
                assert retries(one)
                reason = "127.0.0.1: address already in use"
                told = {"service": "shop/web", "port": port, "reason": reason}
                assert log.lines == [("health check port not served", told)]  # once
                assert one.status()[0]["error"] == reason
            await one.follow(checks(web=(port, 1, 0)), LOOPBACK)
            assert log.lines[1:] == [("health check port served", {"service": "shop/web", "port": port})]
            assert not retries(one)
            assert (await get(port)).status == 200

    asyncio.run(check())


def test_two_services_with_one_port(port: int) -> None:
    async def check() -> None:
        async with responder() as one:
            await one.follow(checks(web=(port, 1, 0)), LOOPBACK)
            await one.follow(checks(app=(port, 5, 0), web=(port, 1, 0)), LOOPBACK)
            assert [each["error"] for each in one.status()] == ["it is Service shop/web's", ""]
            assert json.loads((await get(port)).text)["localEndpoints"] == 1  # type: ignore[attr-defined]
            await one.follow(checks(app=(port, 5, 0)), LOOPBACK)
            assert json.loads((await get(port)).text)["localEndpoints"] == 5  # type: ignore[attr-defined]
            assert one.status()[0]["error"] == ""

    asyncio.run(check())


GARBAGE = (
    b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"get / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\n\n",
    b"GET / HTTP/1.1 x\r\n\r\n", b"\0" * 100 + b"\n\n", b"A" * 100_000, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 100_000,
)  # fmt: skip


def test_garbage_is_refused_and_harms_nobody(port: int) -> None:
    async def check() -> None:
        async with responder() as one:
            await one.follow(checks(web=(port, 1, 0)), LOOPBACK)
            for data in GARBAGE:
                answer = await asyncio.to_thread(raw, port, data)
                assert answer == b"" or answer.startswith(b"HTTP/1.1 400 Bad Request\r\n"), data[:20]
                assert (await get(port)).status == 200
            assert (await asyncio.to_thread(raw, port, b"GET / HTTP/1.0\n\n")).startswith(b"HTTP/1.1 200 OK\r\n")

    asyncio.run(check())


def test_slow_clients_are_let_go_and_hold_up_nobody(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_responder, "REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(health_responder, "MOST_CLIENTS", 30)

    async def check() -> None:
        async with responder() as one:
            await one.follow(checks(web=(port, 1, 0)), LOOPBACK)
            with contextlib.ExitStack() as stack:
                for data in [b"GET / HT", b""] * 10:
                    slow = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                    slow.send(data)
                assert (await get(port)).status == 200
                begin = time.monotonic()
                while open_clients(one):
                    await asyncio.sleep(0.05)
                    assert time.monotonic() - begin < 10
                for _ in range(40):  # more than are served at once: the rest is turned away, not left waiting
                    stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                await asyncio.sleep(0.1)
                assert open_clients(one) == 30
                while open_clients(one):
                    await asyncio.sleep(0.05)
                assert (await get(port)).status == 200

    asyncio.run(check())


@pytest.fixture
def addresses() -> Rules:
    return Rules(node_addresses=tuple(map(parse_address, ("192.168.0.2", "10.0.0.2", "fd00::2"))))


def test_where_it_listens(addresses: Rules) -> None:
    from msgspec.structs import replace

    def places(**changes: Any) -> list[list[bytes]]:
        rules = replace(addresses, **changes)
        return [list(listening_addresses(rules, family)) for family in Family]

    any4, any6 = [bytes(4)], [bytes(16)]
    assert places() == [any4, any6]
    assert places(node_port_ranges=(parse_network("192.168.0.0/16"),)) == [[parse_address("192.168.0.2")], any6]
    assert places(node_port_ranges=(parse_network("fd00::/8"),)) == [any4, [parse_address("fd00::2")]]
    assert places(node_port_ranges=(parse_network("172.16.0.0/12"),)) == [[], any6]
    assert places(primary_node_ports=True) == [[parse_address("192.168.0.2")], [parse_address("fd00::2")]]


@pytest.mark.root
def test_the_agent_answers_for_its_services(topology: Topology, tmp_path: Path) -> None:
    def manifests(ready: bool, check: int) -> str:
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {
                "type": "LoadBalancer",
                "clusterIP": "10.0.1.175",
                "externalTrafficPolicy": "Local",
                "healthCheckNodePort": check,
                "ports": [{"port": 80}],
            },
        }
        endpoints = {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": "w", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4",
            "ports": [{"name": "", "port": 8080}],
            "endpoints": [{"addresses": ["10.244.0.10"], "nodeName": "here", "conditions": {"ready": ready}}],
        }
        return json.dumps(service) + "\n" + json.dumps(endpoints) + "\n"

    def asked(check: int, address: str = "192.0.2.1") -> int:
        done = topology.client.run(
            *("curl", "-s", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}", f"http://{address}:{check}/"),
            check=False,
        )
        return int(done.stdout)

    with node_agent(topology.node, tmp_path, "--mode", "nftables", "--node-name", "here") as agent:
        agent.write(manifests(True, 32000))
        agent.start()
        eventually("it answers, right behind the first sync", lambda: asked(32000) == 200, 10)
        assert asked(32000, "[2001:db8::1]") == 503
        assert agent.status()["noLocalEndpoints"] == {"internal": 0, "external": 0}
        agent.write(manifests(False, 32000))
        eventually("nothing is here", lambda: asked(32000) == 503, 10)
        agent.write(manifests(True, 32001))
        eventually("another port", lambda: (asked(32000), asked(32001)) == (0, 200), 10)
        [told] = agent.status()["healthChecks"]
        counts = {"ipv4": 1, "ipv6": 0}
        assert told == {"service": "shop/web", "port": 32001, "localEndpoints": counts, "error": ""}
        agent.stop()
        assert asked(32001) == 0
