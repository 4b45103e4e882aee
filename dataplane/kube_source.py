"""Source: a Kubernetes API server. One reflector (`kube_watch`) for each kind of object, one store for all.

Nothing is delivered before all lists are complete. After that a change is delivered at once; of many in a row several
are delivered together (`BURST`, `RATE`), so that a storm of changes becomes a handful of syncs and waits, for the rest,
in the sockets' buffers.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from .kube_store import Store
from .kube_watch import SERVICES, SLICES, Log, Pace, Reflector, Transport
from .kubernetes_reading import Reading
from .libc_malloc import give_memory_back
from .model import ObjectName, Problem, Update

ORIGIN = "kubernetes"
BURST, RATE = 8.0, 10.0
"""So many updates at once, and so many a second when changes do not end."""


class KubernetesSource:
    """The Services and EndpointSlices of an API server, as a `Source` for the agent.

    `transports`: one for each kind, since a connection is let go of when its watch fails. `server` is its address, for
    people.
    """

    notice = ""

    def __init__(
        self,
        server: str,
        transports: Sequence[Transport],
        log: Log,
        pace: Pace = Pace(),  # noqa: B008 (frozen)
    ) -> None:
        self._server = server
        self._transports = tuple(transports)
        self._store = Store()
        self._wake = asyncio.Event()
        self._listed = False
        self._told: tuple[Problem, ...] = ()
        self.reflectors = tuple(
            Reflector(resource, transport, self, log, pace)
            for resource, transport in zip((SERVICES, SLICES), self._transports, strict=True)
        )
        self._tasks: tuple[asyncio.Task[None], ...] = ()

    # ------------------------------------------------------------------------------------------- from the reflectors

    def known(self, reading: Reading) -> Reading:
        """The object that is kept already, if it is equal."""
        return self._store.known(reading)

    def put(self, kind: str, reading: Reading) -> None:
        """Added or changed."""
        self._store.put(kind, reading)

    def remove(self, kind: str, name: ObjectName) -> None:
        """Deleted."""
        self._store.remove(kind, name)

    def replace(self, kind: str, readings: list[Reading]) -> None:
        """A whole list."""
        self._store.replace(kind, readings)
        del readings[:]
        give_memory_back()  # the text of ten thousand objects

    def settled(self) -> None:
        """Tell whoever waits, if there is something to tell."""
        if not self._listed and all(each.listed for each in self.reflectors):
            self._listed = True
            self._wake.set()
        if self._listed and (self._store.changed or self.problems != self._told):
            self._wake.set()

    # --------------------------------------------------------------------------------------------------- to the agent

    @property
    def problems(self) -> tuple[Problem, ...]:
        """All that is wrong with objects at this moment."""
        return self._store.problems(ORIGIN)

    def read(self) -> Update:
        """What changed since the last Update; nothing before all lists are complete."""
        self._told = self.problems
        return Update(self._store.take() if self._listed else {}, self._told)

    async def ready(self) -> None:
        """Begin, if that has not been done, and return when all lists are complete."""
        if not self._tasks:
            self._tasks = tuple(asyncio.create_task(each.run()) for each in self.reflectors)
        while not self._listed:
            await self._wait()

    async def updates(self) -> AsyncGenerator[Update, None]:
        """Changes as they happen; first everything, unless `read` has delivered it already."""
        await self.ready()
        tokens, since = BURST, time.monotonic()
        while True:
            while not self._store.changed and self.problems == self._told:
                await self._wait()
            now = time.monotonic()
            tokens, since = min(BURST, tokens + (now - since) * RATE), now
            if tokens < 1:
                await asyncio.sleep((1 - tokens) / RATE)
                continue
            tokens -= 1
            yield self.read()

    async def _wait(self) -> None:
        """Until there is news; a reflector that ends has a bug, which must not pass for silence."""
        news = asyncio.create_task(self._wake.wait())
        try:
            await asyncio.wait((news, *self._tasks), return_when=asyncio.FIRST_COMPLETED)
        finally:
            news.cancel()
        for task in self._tasks:
            if task.done():
                task.result()
        self._wake.clear()

    async def close(self) -> None:
        """End the watches."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
        for transport in self._transports:
            await transport.close()

    def status(self) -> dict[str, Any]:
        """For `dataplane status`: the server, and of each watch how many objects, and since when it is dead."""
        counts = self._store.counts()
        return {
            "kind": "kubernetes",
            "server": self._server,
            "watches": {
                each.resource.kind: {
                    "objects": counts[each.resource.kind],
                    "listed": each.listed,
                    "resourceVersion": each.version,
                    "deadSince": each.dead_since,
                    "lastError": each.last_error,
                }
                for each in self.reflectors
            },
        }
