"""The little of HTTP/1.1 that answers to health checks take: read a request's head, write one whole message."""

import asyncio
import contextlib
import re
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import NamedTuple

REQUEST_BYTES = 8192
_REQUEST = re.compile(rb"([A-Z]{1,20}) (\S+) HTTP/1\.[01]\r?\n")


class Request(NamedTuple):
    """A request's first line. `path` is without the query."""

    method: str
    path: str


def requested(head: bytes) -> Request | None:
    """What a request asks for; None when it is none."""
    found = _REQUEST.match(head)
    return found and Request(found[1].decode(), found[2].split(b"?", 1)[0].decode("latin-1"))


async def read_head(reader: asyncio.StreamReader) -> bytes:
    """A request up to its empty line; b"" when there is none within the limit of bytes."""
    head = b""
    while len(head) <= REQUEST_BYTES:
        line = await reader.readline()  # ValueError: longer than the limit
        head += line
        if line in (b"\r\n", b"\n") and len(head) > len(line):
            return head
        if not line.endswith(b"\n"):
            return b""
    return b""


class Turns:
    """Connections of strangers, each of which gets one answer. Belongs to one event loop."""

    def __init__(self) -> None:
        self.open = 0
        """Connections at the moment."""

    async def answer(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        respond: Callable[[bytes], bytes],
        most: int,
        seconds: float,
    ) -> None:
        """What `respond` makes of the request's head, nothing where that is b"", to one of at most so many at once,
        who has so many seconds for all of it."""
        if self.open >= most:
            writer.transport.abort()
            return
        self.open += 1
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, ValueError, TimeoutError):
                async with asyncio.timeout(seconds):
                    head = await read_head(reader)
                    answer = respond(head) if head else b""
                    if answer:
                        writer.write(answer)
                        writer.write_eof()
                        await writer.drain()
                        await reader.read(REQUEST_BYTES)  # closing with unread data would take the answer back
        finally:
            self.open -= 1
            writer.transport.abort()


def message(status: HTTPStatus, headers: Mapping[str, str], body: bytes, with_body: bool) -> bytes:
    """A whole answer, after which the connection ends."""
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", *(f"{name}: {value}" for name, value in headers.items())]
    lines += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
    return "\r\n".join(lines).encode() + (body if with_body else b"")
