"""`python -m bench.relay FROM TO`: every connection to FROM goes on to TO. Each is HOST:PORT, or the path of a socket.

A network namespace of a measurement leads nowhere; a Unix socket in the file system leads out of it.
"""

import asyncio
import contextlib
import sys
from pathlib import Path

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def is_path(place: str) -> bool:
    """Whether a place is a Unix socket's."""
    return "/" in place


async def connect(place: str) -> Streams:
    """A connection to a place."""
    if is_path(place):
        return await asyncio.open_unix_connection(place)
    host, _, port = place.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until one side ends."""
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


async def serve(source: str, target: str) -> None:
    """For ever."""

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await connect(target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(copy(reader, back), copy(there, writer))

    if is_path(source):
        Path(source).unlink(missing_ok=True)
        server = await asyncio.start_unix_server(one, source)
    else:
        host, _, port = source.rpartition(":")
        server = await asyncio.start_server(one, host, int(port))
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:3]))
