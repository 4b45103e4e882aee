"""Starting the probe in the background: a child compiles and attaches it, and hands over what the agent keeps."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from ..errors import ProbeUnavailable
from ..run_tool import SYSTEM_PATH, last_words
from .dnat_hits import DnatHits
from .handover import Handed, Refused, receive
from .probe_child import Order

LIMIT = 120.0
"""Seconds after which a child that has not finished is ended. Seconds are the rule; tens of them under emulation."""
LEAST_SLOTS, LEAST_FRONTENDS = 16_384, 4_096
ROOM = 4
"""Times what the desired state needs now."""
CHILD = "dataplane.bpf.probe_child"


class ProbeStart:
    """A probe on its way. When `fileno()` is readable, `finish()` does not wait.

    `backends`, `frontends`: how many there are now; there will be room for several times as many, and at least for
    16,384 and 4,096. What does not fit is counted as missed. `more_of`: a probe that shall get the hooks it lacks
    (`check`). `kinds`: ways of attaching to try. Connections of the calling thread's network namespace are counted.
    """

    def __init__(
        self,
        backends: int = 0,
        frontends: int = 0,
        *,
        more_of: DnatHits | None = None,
        limit: float = LIMIT,
        kinds: tuple[str, ...] = ("fexit", "kretprobe"),
    ) -> None:
        self._more_of = more_of
        self._ends = time.monotonic() + limit
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._words: BinaryIO = os.fdopen(os.memfd_create("probe"), "w+b")
        maps = {each.name: fd for each, fd in more_of.maps.items()} if more_of else {}
        order = Order(
            socket=theirs.fileno(),
            seconds=max(1, int(limit)),
            netns=Path("/proc/thread-self/ns/net").stat().st_ino,
            slots=max(LEAST_SLOTS, ROOM * backends),
            frontends=max(LEAST_FRONTENDS, ROOM * frontends),
            maps=maps,
            have=tuple(hook.function for hook in more_of.attached) if more_of else (),
            kinds=kinds,
        )
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-m", CHILD, json.dumps(order._asdict())],
                stdin=subprocess.DEVNULL,
                stdout=self._words,
                stderr=self._words,
                pass_fds=(order.socket, *maps.values()),
                env={"LC_ALL": "C", "PATH": SYSTEM_PATH},
                cwd="/",
            )
        except BaseException:
            self._close()
            raise
        finally:
            theirs.close()

    def __enter__(self) -> "ProbeStart":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def fileno(self) -> int:
        """Readable when the child has finished, also when it failed or has taken too long; -1 after `finish`."""
        return self._socket.fileno()

    def finish(self) -> DnatHits:
        """The probe, attached; waits for the child if need be. ProbeUnavailable says why there is none."""
        try:
            left = max(0.0, self._ends - time.monotonic()) + 1  # a second for the child's own alarm
            waiting = select.poll()  # select takes no descriptor beyond 1023
            waiting.register(self._socket, select.POLLIN)
            ready = waiting.poll(left * 1000)
            try:
                handed = receive(self._socket) if ready else None
            except Refused as refusal:
                raise ProbeUnavailable(self._explained(str(refusal))) from None
            except ConnectionError:
                handed = None
            if handed is None:
                raise ProbeUnavailable(self._how_it_ended())
        finally:
            self.cancel()
        return self._taken(handed)

    def _taken(self, handed: Handed) -> DnatHits:
        if self._more_of is None:
            return DnatHits(handed)
        self._more_of.add(handed)
        return self._more_of

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            code = -signal.SIGALRM
        if code == -signal.SIGALRM:
            return "compiling and attaching the probe took too long"
        how = f"status {code}" if code >= 0 else f"signal {-code}"
        return self._explained(f"the child that compiles the probe ended with {how}")

    def _explained(self, reason: str) -> str:
        """With the last words of BCC, if it had any."""
        self._words.seek(0)
        said = self._words.read()
        return f"{reason}: {last_words(said)}" if said else reason

    def cancel(self) -> None:
        """End the child if it still runs; nothing of it is left."""
        self._socket.close()  # with what it may have handed over
        self._process.kill()  # by its handle: it is our child and not waited for yet
        self._process.wait()
        self._words.close()

    def _close(self) -> None:
        self._socket.close()
        self._words.close()
