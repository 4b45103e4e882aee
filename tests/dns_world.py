"""Services to ask for, a client that is not the library which wrote the answers (dnslib), and servers to ask."""

import asyncio
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dnslib import CLASS, QTYPE, RCODE, DNSRecord

from dataplane.dns.answers import Answers
from dataplane.dns.records import Rules
from dataplane.dns.server import DnsServer, Limits
from dataplane.manifest_files import ManifestFiles
from dataplane.model import ObjectName, ServiceView, parse_address
from dataplane.tcp_listener import Listen

from .test_staleness import Lines

MANIFEST = """
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, "fd00:96::a"]
  ports: [{name: http, port: 80}, {name: metrics, port: 9090}, {name: quic, port: 443, protocol: UDP}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
endpoints: [{addresses: [10.244.0.5]}, {addresses: [10.244.0.6], conditions: {ready: false}}]
ports: [{name: http, port: 8080}]
---
apiVersion: v1
kind: Service
metadata: {name: plain}
spec: {clusterIP: 10.96.0.11, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: pending}
spec: {ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: data}
spec: {clusterIP: None, ports: [{name: sql, port: 5432}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-4, namespace: data, labels: {kubernetes.io/service-name: db}}
addressType: IPv4
endpoints:
- {addresses: [10.244.1.1], hostname: db-0}
- {addresses: [10.244.1.2], hostname: db-1}
- {addresses: [10.244.1.3]}
- {addresses: [10.244.1.4], hostname: db-3, conditions: {ready: false}}
ports: [{name: sql, port: 15432}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-6, namespace: data, labels: {kubernetes.io/service-name: db}}
addressType: IPv6
endpoints: [{addresses: ["fd00:1::1"], hostname: db-0}, {addresses: ["fd00:1::3"]}]
ports: [{name: sql, port: 15432}]
---
apiVersion: v1
kind: Service
metadata: {name: early, namespace: data}
spec: {clusterIP: None, publishNotReadyAddresses: true, ports: [{name: gossip, port: 7000, protocol: UDP}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: early-1, namespace: data, labels: {kubernetes.io/service-name: early}}
addressType: IPv4
endpoints: [{addresses: [10.244.2.1], hostname: early-0, conditions: {ready: false, serving: false}}]
ports: [{name: gossip, port: 7000, protocol: UDP}]
---
apiVersion: v1
kind: Service
metadata: {name: nobody, namespace: data}
spec: {clusterIP: None, ports: [{name: x, port: 1}]}
---
apiVersion: v1
kind: Service
metadata: {name: outside}
spec: {type: ExternalName, externalName: www.example.com}
---
apiVersion: v1
kind: Service
metadata: {name: alias}
spec: {type: ExternalName, externalName: web.default.svc.cluster.local}
---
apiVersion: v1
kind: Service
metadata: {name: second-alias}
spec: {type: ExternalName, externalName: alias.default.svc.cluster.local}
---
apiVersion: v1
kind: Service
metadata: {name: loop-a}
spec: {type: ExternalName, externalName: loop-b.default.svc.cluster.local}
---
apiVersion: v1
kind: Service
metadata: {name: loop-b}
spec: {type: ExternalName, externalName: loop-a.default.svc.cluster.local}
"""


DEFAULTS = Limits()


def views(folder: Path, manifest: str = MANIFEST) -> Mapping[ObjectName, ServiceView | None]:
    """What a manifest says."""
    file = folder / "names.yaml"
    file.write_text(manifest)
    update = ManifestFiles([file]).read()
    assert not update.problems, update.problems
    return update.changed


def answers_of(folder: Path, manifest: str = MANIFEST, **rules: Any) -> Answers:
    """All that is answered for a manifest."""
    made = Answers(Rules(addresses=(parse_address("10.0.0.53"),), **rules))
    made.update(views(folder, manifest))
    return made


def packet(name: str, qtype: str = "A", **header: int) -> bytes:
    """A query by dnslib."""
    record = DNSRecord.question(name, qtype)
    for field, value in header.items():
        setattr(record.header, field, value)
    return bytes(record.pack())


def with_edns(
    query: bytes, size: int = 1232, *, dnssec_ok: bool = False, version: int = 0, options: bytes = b""
) -> bytes:
    """With an OPT record (RFC 6891, 6.1.2)."""
    opt = b"\0" + (41).to_bytes(2) + size.to_bytes(2) + bytes((0, version, 0x80 * dnssec_ok, 0))
    return query[:10] + b"\0\1" + query[12:] + opt + len(options).to_bytes(2) + options


def records(section: Any) -> list[str]:
    """`name type data`, each, as dnslib prints them."""
    return [f"{rr.rname} {QTYPE[rr.rtype]} {rr.rdata}" for rr in section if rr.rtype != 41]


def ask(answers: Answers, query: bytes, *, udp: bool = True) -> bytes:
    """The answer, which there must be."""
    told = answers.answer(query, udp=udp)
    assert isinstance(told, bytes)
    return told


def said(answer: bytes) -> tuple[str, list[str], list[str], list[str]]:
    """Rcode, and the records of answer, authority and additional section, as dnslib reads them."""
    parsed = DNSRecord.parse(answer)
    assert all(CLASS[rr.rclass] == "IN" for rr in parsed.rr)
    return RCODE[parsed.header.rcode], records(parsed.rr), records(parsed.auth), records(parsed.ar)


@contextmanager
def serving(
    answers: Answers,
    limits: Limits = DEFAULTS,
    upstreams: tuple[Listen, ...] = (),
    *,
    log_queries: bool = False,
    listen: str = "127.0.0.1",
) -> Iterator[tuple[DnsServer, int, Lines]]:
    """A server on loopback in a thread of its own, and its port."""
    log = Lines()
    server = DnsServer(answers, [Listen(listen, 0)], log, limits, upstreams, log_queries=log_queries)
    loop = asyncio.new_event_loop()
    up = threading.Event()
    over = asyncio.Event()

    async def serve() -> None:
        await server.start()
        up.set()
        await over.wait()
        await server.close()

    def work() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert up.wait(10)
        yield server, server.listens[0].port, log
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(10)


def ask_udp(port: int, query: bytes, seconds: float = 5.0, host: str = "127.0.0.1") -> bytes | None:
    """One datagram there and one back; None when there is none in time."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.settimeout(seconds)
        one.connect((host, port))
        one.send(query)
        try:
            return one.recv(65535)
        except TimeoutError:
            return None


def ask_tcp(port: int, query: bytes, seconds: float = 10.0) -> bytes:
    """The same over TCP; b"" when the server hangs up."""
    with socket.create_connection(("127.0.0.1", port), seconds) as one:
        one.sendall(len(query).to_bytes(2) + query)
        return receive(one)


def receive(one: socket.socket) -> bytes:
    """One answer of a TCP connection."""
    with one.makefile("rb") as file:
        length = file.read(2)
        return file.read(int.from_bytes(length)) if len(length) == 2 else b""
