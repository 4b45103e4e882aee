"""Questions for others: passed on to configured upstreams, in order, until one answers.

Each goes from a socket of its own, so its port is a secret, with an id of its own and the client's upper and lower
case, which the answer must repeat.
"""

import asyncio
import contextlib
import secrets
import socket

import dns.exception
import dns.message
import dns.rcode
import dns.rdatatype

from ..tcp_listener import Listen
from .query import HEADER, LEAST_SIZE, MOST_SIZE, TC, Query, Refusal, read_query
from .rrsets import SERVFAIL, Found, RRset

SECONDS = 2.0
"""How long one upstream may take, over one transport."""
MOST_WAITING = 512
"""Questions under way; further ones are SERVFAIL at once."""


class Upstreams:
    """Passes questions on. Belongs to one event loop."""

    def __init__(self, servers: tuple[Listen, ...]) -> None:
        self.servers = servers
        self.forwarded = 0
        self.failed = 0
        self._waiting = 0

    async def ask(self, packet: bytes, query: Query, *, udp: bool) -> bytes | None:
        """The answer with the client's id, no larger than it may be; None: nobody answered."""
        if self._waiting >= MOST_WAITING:
            self.failed += 1
            return None
        self._waiting += 1
        try:
            for server in self.servers:
                with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                    answer = await self._one(server, packet, query, udp=udp)
                    self.forwarded += 1
                    if udp and len(answer) > (query.size if query.edns else LEAST_SIZE):
                        flags = int.from_bytes(answer[2:4]) | TC
                        counts = b"\0\1\0\0\0\0\0\0"
                        answer = answer[:2] + flags.to_bytes(2) + counts + answer[HEADER : query.question_end]
                    return packet[:2] + answer[2:]
            self.failed += 1
            return None
        finally:
            self._waiting -= 1

    async def _one(self, server: Listen, packet: bytes, query: Query, *, udp: bool) -> bytes:
        number = secrets.token_bytes(2)
        asked = number + packet[2:]
        if not udp:
            return await self._over_tcp(server, asked, query)
        loop = asyncio.get_running_loop()
        family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as one:
            one.connect(tuple(server))
            async with asyncio.timeout(SECONDS):
                await loop.sock_sendall(one, asked)
                while True:
                    answer = await loop.sock_recv(one, 65535)
                    if is_answer(asked, answer, query):
                        return answer

    async def _over_tcp(self, server: Listen, asked: bytes, query: Query) -> bytes:
        async with asyncio.timeout(SECONDS):
            reader, writer = await asyncio.open_connection(*server)
            try:
                writer.write(len(asked).to_bytes(2) + asked)
                answer = await reader.readexactly(int.from_bytes(await reader.readexactly(2)))
            finally:
                writer.close()
        if not is_answer(asked, answer, query):
            raise OSError("an answer to another question")
        return answer

    async def follow(self, query: Query, found: Found) -> Found:
        """A chain of CNAMEs with what an upstream knows of its end; SERVFAIL when nobody does."""
        message = dns.message.make_query(found.alias, dns.rdatatype.RdataType.make(query.qtype), payload=MOST_SIZE)
        packet = message.to_wire()
        asked = read_query(packet)
        if asked is None or isinstance(asked, Refusal):
            return Found(SERVFAIL, found.zone)
        for udp in (True, False):
            answer = await self.ask(packet, asked, udp=udp)
            if answer is None:
                break
            if udp and answer[2] & TC >> 8:
                continue
            try:
                told = dns.message.from_wire(answer, ignore_trailing=True)
                more = tuple(
                    RRset(each.name.to_text(), dns.rdatatype.to_text(each.rdtype), each.ttl, tuple(map(str, each)))
                    for each in told.answer
                )
            except (dns.exception.DNSException, ValueError):
                break
            if told.rcode() in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
                return found._replace(answer=found.answer + more, alias="")
            break
        return Found(SERVFAIL, found.zone, depends=found.depends)


def is_answer(asked: bytes, answer: bytes, query: Query) -> bool:
    """Whether a packet answers just this question."""
    end = query.question_end
    return (
        len(answer) >= end
        and answer[:2] == asked[:2]
        and answer[2] & 0x80 != 0
        and answer[4:6] == b"\0\1"
        and (answer[HEADER:end] == asked[HEADER:end])
    )
