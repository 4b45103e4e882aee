"""The agent's control socket, where `status`, `show`, `counters` and `top` ask: one line of JSON each way.

    → {"ask": "status"}
    ← {"schemaVersion": 1, "pid": 4711, ...}

The socket's file is named after the network namespace, as everything an agent programs belongs to one; it is 0600 in a
directory that is 0700, and whoever connects must be root or the agent's own user (`control_server`).
"""

import json
import os
import socket
from pathlib import Path
from typing import Any

from .errors import AgentUnreachable, NotRoot

DIRECTORY = "/run/dataplane"
TIMEOUT = 5.0
"""Seconds that either side waits for the other."""


def socket_path() -> Path:
    """Where the agent of the calling thread's network namespace listens.

    The directory is DATAPLANE_RUNTIME_DIRECTORY, or RUNTIME_DIRECTORY as systemd sets it, or /run/dataplane.
    """
    directory = os.environ.get("DATAPLANE_RUNTIME_DIRECTORY") or os.environ.get("RUNTIME_DIRECTORY") or DIRECTORY
    return Path(directory) / f"{Path('/proc/thread-self/ns/net').stat().st_ino}.sock"


class ControlClient:
    """A connection to the agent of the calling thread's network namespace, open for any number of questions."""

    def __init__(self, timeout: float = TIMEOUT) -> None:
        path = socket_path()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(str(path))
        except PermissionError as error:
            self._socket.close()
            raise NotRoot("the agent answers root only") from error
        except OSError as error:
            self._socket.close()
            raise AgentUnreachable("no agent runs in this network namespace") from error

    def __enter__(self) -> "ControlClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def ask(self, question: str, **about: str) -> bytes:
        """The agent's answer as JSON. `about`: what else the question says.

        AgentUnreachable: it hung up, was silent too long, or could not say.
        """
        try:
            self._socket.sendall(json.dumps({**about, "ask": question}).encode() + b"\n")
            chunks: list[bytes] = []
            while not chunks or not chunks[-1].endswith(b"\n"):
                chunk = self._socket.recv(1 << 20)
                if not chunk:
                    raise AgentUnreachable("the agent hung up")
                chunks.append(chunk)
        except ConnectionError as error:
            raise AgentUnreachable("the agent hung up") from error
        except OSError as error:
            raise AgentUnreachable(f"the agent did not answer: {error}") from error
        answer = b"".join(chunks)
        if answer.startswith(b'{"error"'):
            raise AgentUnreachable(f"the agent could not answer: {json.loads(answer)['error']}")
        return answer

    def status(self) -> dict[str, Any]:
        """What `dataplane status` shows."""
        told: dict[str, Any] = json.loads(self.ask("status"))
        return told
