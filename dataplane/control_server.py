"""The agent's side of the control socket: who may ask, and the answers."""

import asyncio
import contextlib
import errno
import json
import os
import socket
import stat
import struct
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from .control_socket import TIMEOUT, socket_path
from .errors import DataplaneError

CLIENTS = 64
"""Connections at a time; further ones are closed at once."""
_LINE = 1 << 16
_UCRED = struct.Struct("iII")
"""struct ucred of SO_PEERCRED (unix(7)): pid, uid, gid."""

Answers = Mapping[str, Callable[[], bytes]]
"""What can be asked, and how it is answered: JSON in one line."""
AnswersAbout = Mapping[str, Callable[[Mapping[str, Any]], bytes]]
"""The same of questions that say more: the whole question is passed on."""


class ControlServer:
    """Answers questions until closed. To be made by the one agent of a network namespace, who holds its lock."""

    def __init__(self, answers: Answers, about: AnswersAbout = MappingProxyType({})) -> None:
        self._answers = answers
        self._about = about
        self._path = socket_path()
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        """Listen. DataplaneError says why nobody can ask; the agent works all the same."""
        try:
            listener = self._listen()
        except OSError as error:
            raise DataplaneError(f"{self._path}: {error.strerror or error}") from error
        self._server = await asyncio.start_unix_server(self._serve, sock=listener, limit=_LINE)

    def _listen(self) -> socket.socket:
        directory = self._path.parent
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise OSError(errno.EPERM, f"{directory} is not a directory of this user")
        if stat.S_IMODE(found.st_mode) != 0o700:
            directory.chmod(0o700)
        self._path.unlink(missing_ok=True)  # left by an agent that was killed: we hold the lock
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.bind(str(self._path))
            self._path.chmod(0o600)
            listener.listen(CLIENTS)
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
        return listener

    async def close(self) -> None:
        """Stop listening and take the file away."""
        if self._server is None:
            return
        self._server.close()
        for client in self._clients:
            client.close()
        self._server = None
        with contextlib.suppress(OSError):
            self._path.unlink()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients.add(writer)
        try:
            with contextlib.suppress(OSError, TimeoutError, ValueError, asyncio.LimitOverrunError):
                if len(self._clients) <= CLIENTS and _may_ask(writer.get_extra_info("socket")):
                    await self._converse(reader, writer)
        finally:
            self._clients.discard(writer)
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(self._answer(line) + b"\n")
            await asyncio.wait_for(writer.drain(), TIMEOUT)

    def _answer(self, line: bytes) -> bytes:
        try:
            question = json.loads(line)
            asked = question["ask"]
            about = self._about.get(asked)
            answer = self._answers[asked] if about is None else partial(about, question)
        except (ValueError, LookupError, TypeError):
            known = ", ".join((*self._answers, *self._about))
            return json.dumps({"error": f"no such question; there are {known}"}).encode()
        try:
            return answer()
        except (DataplaneError, OSError) as error:
            return json.dumps({"error": str(error)}).encode()


def _may_ask(peer: socket.socket) -> bool:
    _, uid, _ = _UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return uid in (0, os.geteuid())
