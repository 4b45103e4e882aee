"""The little of HTTP/1.1 that answers to health checks take: read a request's head, write one whole message."""

import asyncio
import re
from collections.abc import Mapping
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


def message(status: HTTPStatus, headers: Mapping[str, str], body: bytes, with_body: bool) -> bytes:
    """A whole answer, after which the connection ends."""
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", *(f"{name}: {value}" for name, value in headers.items())]
    lines += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
    return "\r\n".join(lines).encode() + (body if with_body else b"")
