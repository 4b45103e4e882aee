"""The server: UDP in batches and TCP with limits, in one event loop. Strangers may send anything, and as much of it.

Over TCP a client has so many connections, each so much time for a query and between two; when all places are taken the
one that has been silent longest goes.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from ..errors import DataplaneError
from ..tcp_listener import Listen, open_listener
from .answers import Answers, Elsewhere, refusal
from .query import HEADER, Refusal, read_query
from .query_log import Log, QueryLog
from .rate_limit import DROP, PASS, RateLimit
from .rrsets import SERVFAIL
from .udp_batch import BATCH, BatchSocket, Letter, PlainSocket, client_of, open_batches, open_udp
from .upstream import Upstreams

ROUNDS = 8
"""Batches in a row from one socket before others have their turn."""
LATER = b""
"""In place of an answer that an upstream has to give first."""


class Limits(Struct, frozen=True):
    """What clients may take. `rate`: answers a second for one address over UDP, 0 = any number. Seconds of TCP:
    `query` for one to arrive, `idle` between two, `write` for an answer to be taken."""

    rate: int = 20_000
    connections: int = 512
    connections_of_client: int = 16
    query: float = 3.0
    idle: float = 10.0
    write: float = 5.0


class Connection:
    """One of TCP."""

    def __init__(self, client: str, writer: asyncio.StreamWriter) -> None:
        self.client = client
        self.writer = writer
        self.since = time.monotonic()
        """When it last said something whole."""


class DnsServer:
    """Answers on some addresses until closed. Belongs to one event loop."""

    def __init__(
        self,
        answers: Answers,
        listens: Sequence[Listen],
        log: Log,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
        upstreams: Sequence[Listen] = (),
        *,
        log_queries: bool = False,
    ) -> None:
        self.answers = answers
        self.listens = list(listens)
        self.limit = RateLimit(limits.rate)
        self.upstreams = Upstreams(tuple(upstreams))
        self.closed_connections = 0
        """Closed by a limit."""
        self.queries = {"udp": 0, "tcp": 0}
        self._log = log
        self._limits = limits
        self._query_log = QueryLog(log) if log_queries else None
        self._sockets: list[socket.socket] = []
        self._servers: list[asyncio.Server] = []
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen everywhere, or raise DataplaneError and listen nowhere."""
        loop = asyncio.get_running_loop()
        try:
            for index, listen in enumerate(self.listens):
                listener = open_listener(listen)
                listen = self.listens[index] = Listen(*listener.getsockname()[:2])
                self._servers.append(await asyncio.start_server(self._converse, sock=listener, limit=4096))
                one = open_udp(listen)
                self._sockets.append(one)
                batches = open_batches(one, listen)
                loop.add_reader(one.fileno(), self._drain, batches)
        except DataplaneError:
            await self.close()
            raise

    async def close(self) -> None:
        """Stop."""
        loop = asyncio.get_running_loop()
        for one in self._sockets:
            loop.remove_reader(one.fileno())
            one.close()
        self._sockets.clear()
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()
        for connection in tuple(self._connections):
            connection.writer.transport.abort()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.sleep(0)

    # ---------------------------------------------------------------------------------------------------------- UDP

    def _drain(self, batches: BatchSocket | PlainSocket) -> None:
        quick, limit = self.answers.quick, self.limit
        limited, watched = limit.limit > 0, self._query_log is not None
        for _ in range(ROUNDS):
            packets = batches.receive()
            count = len(packets)
            if not count:
                return
            self.queries["udp"] += count
            limit.second(time.monotonic())
            started = time.perf_counter() if watched else 0.0
            out: list[tuple[int, bytes]] = []
            for index, packet in enumerate(packets):
                answer = None
                if limited and (verdict := limit.judge(batches.name(index))) != PASS:
                    answer = None if verdict == DROP else _come_over_tcp(packet)
                else:
                    answer = quick(packet)
                    if answer is None:
                        answer = self._by_hand(packet, batches, index)
                if watched and self._query_log is not None and answer is not LATER:
                    client, port = client_of(batches.letter(index, packet).name)
                    self._query_log.tell(f"{client}#{port}", "udp", packet, answer, started)
                if answer:
                    out.append((index, answer))
            if out:
                batches.send(out)
            batches.renew(count)
            if count < BATCH:
                return

    def _by_hand(self, packet: bytes, batches: BatchSocket | PlainSocket, index: int) -> bytes | None:
        try:
            answer = self.answers.answer(packet)
        except Exception as error:  # one packet must not end the service for all
            self._log.warning("query failed", error=f"{type(error).__name__}: {error}", packet=packet[:512].hex())
            self.answers.count(SERVFAIL)
            return packet[:2] + (0x8000 | SERVFAIL).to_bytes(2) + bytes(8) if len(packet) >= HEADER else None
        if isinstance(answer, Elsewhere):
            self._spawn(self._reply_later(batches, batches.letter(index, packet), answer))
            return LATER
        return answer

    async def _reply_later(self, batches: BatchSocket | PlainSocket, letter: Letter, elsewhere: Elsewhere) -> None:
        started = time.perf_counter()
        answer = await self._from_upstream(letter.packet, elsewhere, udp=True)
        if self._query_log is not None:
            client, port = client_of(letter.name)
            self._query_log.tell(f"{client}#{port}", "udp", letter.packet, answer, started)
        with contextlib.suppress(OSError):
            batches.reply(letter, answer)

    async def _from_upstream(self, packet: bytes, elsewhere: Elsewhere, *, udp: bool) -> bytes:
        query, found = elsewhere
        if found is not None:
            return self.answers.complete(packet, query, await self.upstreams.follow(query, found), udp=udp)
        answer = await self.upstreams.ask(packet, query, udp=udp)
        if answer is None:
            self.answers.count(SERVFAIL)
            return refusal(packet, Refusal(SERVFAIL, query.question_end, query.edns))
        return answer

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---------------------------------------------------------------------------------------------------------- TCP

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername") or ("", 0)
        connection = Connection(str(peer[0]), writer)
        if sum(each.client == connection.client for each in self._connections) >= self._limits.connections_of_client:
            self.closed_connections += 1
            writer.transport.abort()
            return
        if len(self._connections) >= self._limits.connections:
            self.closed_connections += 1
            min(self._connections, key=lambda each: each.since).writer.transport.abort()
        self._connections.add(connection)
        try:
            with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                await self._serve(reader, connection, f"{peer[0]}#{peer[1]}")
        finally:
            self._connections.discard(connection)
            if writer.transport.get_write_buffer_size():
                writer.transport.abort()  # who does not take his answers must not keep us
            else:
                writer.close()

    async def _serve(self, reader: asyncio.StreamReader, connection: Connection, client: str) -> None:
        writer, limits = connection.writer, self._limits
        while True:
            first = await asyncio.wait_for(reader.readexactly(1), limits.idle)
            async with asyncio.timeout(limits.query):  # for the whole query, however slowly it drips
                length = int.from_bytes(first + await reader.readexactly(1))
                packet = await reader.readexactly(length)
            started = time.perf_counter()
            connection.since = time.monotonic()
            self.queries["tcp"] += 1
            answer = self.answers.answer(packet, udp=False)
            if isinstance(answer, Elsewhere):
                answer = await self._from_upstream(packet, answer, udp=False)
            if self._query_log is not None:
                self._query_log.tell(client, "tcp", packet, answer, started)
            if answer is None:
                return
            writer.write(len(answer).to_bytes(2) + answer)
            await asyncio.wait_for(writer.drain(), limits.write)

    def status(self) -> dict[str, Any]:
        """For `dataplane status`."""
        rcodes, _ = self.answers.counts()
        return {
            "listen": list(map(str, self.listens)),
            "synced": self.answers.synced,
            "services": self.answers.services,
            "prepared": self.answers.prepared,
            "queries": dict(self.queries),
            "rcodes": {str(rcode): count for rcode, count in sorted(rcodes.items())},
            "malformed": self.answers.malformed,
            "limited": {"dropped": self.limit.dropped, "truncated": self.limit.truncated},
            "forwarded": self.upstreams.forwarded,
            "upstreamFailures": self.upstreams.failed,
            "connections": len(self._connections),
            "closedConnections": self.closed_connections,
        }


def _come_over_tcp(packet: bytes) -> bytes | None:
    query = read_query(packet)
    if query is None or isinstance(query, Refusal):
        return None
    return refusal(packet, Refusal(0, query.question_end, query.edns), truncated=True)
