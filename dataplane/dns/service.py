"""Service DNS beside the agent: a thread with an event loop of its own, so that a long sync does not silence it.

The agent's thread brings changes (`update`), which stand from the moment that returns.
"""

import asyncio
import sys
import threading
from collections.abc import Callable
from typing import Any

from ..errors import DataplaneError
from ..model import ObjectName, Update
from ..printable import printable
from .answers import Answers
from .explanation import explain
from .query_log import Log
from .server import DnsServer

SWITCH_SECONDS = 0.0005
"""After so long in Python a busy agent lets this thread in, ten times as often as by default: while it computes, one
query takes 0.7 ms, not 5 (median, measured on a noisy machine)."""
RETRY_SECONDS = 5.0
"""How often an address that cannot be had is tried again."""


class NameService:
    """Names for one agent, from `start` to `close`. Nothing of it raises.

    `make`: a server of these answers, made anew for each try to listen.
    """

    def __init__(
        self,
        make: Callable[[], DnsServer],
        answers: Answers,
        log: Log,
    ) -> None:
        self.answers = answers
        self._make = make
        self._log = log
        self._server: DnsServer | None = None
        self._trouble = ""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dns", daemon=True)

    def start(self) -> None:
        """Listen, now or as soon as the addresses can be had; returns when that has been tried."""
        sys.setswitchinterval(SWITCH_SECONDS)
        self._thread.start()
        self._up.wait(10)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:
            self._trouble = f"{type(error).__name__}: {error}"
            self._log.warning("names not served", reason=printable(self._trouble))
        finally:
            self._up.set()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await self._listen()
        if server is None:
            return
        self._server, self._trouble = server, ""
        self._log.info("names served", addresses=list(map(str, server.listens)), zone=self.answers.rules.domain)
        self._up.set()
        await self._stop.wait()
        await server.close()

    async def _listen(self) -> DnsServer | None:
        assert self._stop is not None
        while not self._stop.is_set():
            server = self._make()
            try:
                await server.start()
                return server
            except DataplaneError as error:
                if str(error) != self._trouble:
                    self._log.warning("names not served", reason=printable(str(error)))
                self._trouble = str(error)
            self._up.set()
            try:
                await asyncio.wait_for(self._stop.wait(), RETRY_SECONDS)
            except TimeoutError:
                continue
        return None

    def update(self, update: Update) -> None:
        """Names are so from now on."""
        self.answers.update(update.changed)

    def close(self) -> None:
        """Stop listening."""
        if self._loop is not None and self._stop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(5)

    def status(self) -> dict[str, Any]:
        """For `dataplane status`."""
        server = self._server
        return {"lastError": self._trouble, **(server.status() if server is not None else {"listen": []})}

    def service_counts(self) -> dict[ObjectName, int]:
        """Answers for each Service."""
        return self.answers.counts()[1]

    def explain(self, name: str, qtype: str, namespace: str) -> dict[str, Any]:
        """For `dataplane dns query`."""
        return explain(self.answers, name, qtype, namespace)
