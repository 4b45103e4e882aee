"""Source: a Kubernetes API server. One reflector (`kube_watch`) for each kind of object, one store for all.

Services and EndpointSlices are what is programmed; this Node and the ServiceCIDRs say where (`kube_place`). Nothing is
delivered before all lists are complete. After that a change is delivered at once; of many in a row several
are delivered together (`BURST`, `RATE`), so that a storm of changes becomes a handful of syncs and waits, for the rest,
in the sockets' buffers.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any

from .kube_place import PLACE_KINDS, Place
from .kube_store import Store
from .kube_watch import SERVICE_CIDRS, SERVICES, SLICES, Log, Pace, Reflector, Transport, node_resource
from .kubernetes_fields import moment
from .kubernetes_reading import Reading
from .libc_malloc import give_memory_back
from .model import ObjectName, Problem, Update

ORIGIN = "kubernetes"
BURST, RATE = 8.0, 10.0
"""So many updates at once, and so many a second when changes do not end."""
MOST_TRIGGERS = 20_000
"""Moments of changes that are kept until they are delivered."""
STUCK_SECONDS = 300.0
"""A watch that has not even tried for so long never will again: an answer and a pause take half of it at most."""


class KubernetesSource:
    """The Services and EndpointSlices of an API server, as a `Source` for the agent.

    `connect` opens a transport for each kind, since a connection is let go of when its watch fails. `server` is its
    address, for people; `node_name` this node's.
    """

    notice = ""

    def __init__(
        self,
        server: str,
        connect: Callable[[], Transport],
        log: Log,
        node_name: str,
        pace: Pace = Pace(),  # noqa: B008 (frozen)
    ) -> None:
        self.server = server
        self._store = Store()
        self.place = Place(node_name, log)
        """Where this node is, as the cluster says."""
        self._began = time.time()
        self._triggers: deque[float] = deque(maxlen=MOST_TRIGGERS)
        self._wake = asyncio.Event()
        self._listed = False
        self._told: tuple[Problem, ...] = ()
        self._transports: list[Transport] = []
        found = []
        for resource in (SERVICES, SLICES, node_resource(node_name), SERVICE_CIDRS):
            self._transports.append(connect())
            found.append(Reflector(resource, self._transports[-1], self, log, pace))
        self.reflectors = tuple(found)
        self._tasks: tuple[asyncio.Task[None], ...] = ()

    # ------------------------------------------------------------------------------------------- from the reflectors

    def known(self, reading: Reading) -> Reading:
        """The object that is kept already, if it is equal."""
        return reading if reading.kind in PLACE_KINDS else self._store.known(reading)

    def put(self, kind: str, reading: Reading, trigger: str = "") -> None:
        """Added or changed."""
        if kind in PLACE_KINDS:
            self.place.put(kind, reading)
        elif self._store.put(kind, reading):
            self._triggered(trigger)

    def remove(self, kind: str, name: ObjectName) -> None:
        """Deleted."""
        if kind in PLACE_KINDS:
            self.place.remove(kind, name)
        else:
            self._store.remove(kind, name)

    def replace(self, kind: str, readings: list[Reading], triggers: list[str]) -> None:
        """A whole list."""
        if kind in PLACE_KINDS:
            self.place.replace(kind, readings)
            return
        self._store.replace(kind, readings)
        for trigger in triggers:
            self._triggered(trigger)
        del readings[:]
        give_memory_back()  # the text of ten thousand objects

    def absent(self, kind: str) -> None:
        """The server does not let us see these."""
        self.place.absent(kind)

    def _triggered(self, trigger: str) -> None:
        """A change began at a moment; one before this process was is none that it has carried to the kernel."""
        if trigger:
            at = moment(trigger)
            if at is not None and at > self._began:
                self._triggers.append(at)

    def settled(self) -> None:
        """Tell whoever waits, if there is something to tell."""
        if not self._listed and all(each.listed for each in self.reflectors):
            self._listed = True
            self._wake.set()
        if self._listed and self._has_news():
            self._wake.set()

    def _has_news(self) -> bool:
        return self._store.changed or self.place.changed or self.problems != self._told

    # --------------------------------------------------------------------------------------------------- to the agent

    @property
    def problems(self) -> tuple[Problem, ...]:
        """All that is wrong with objects at this moment."""
        return self._store.problems(ORIGIN)

    def read(self) -> Update:
        """What changed since the last Update; nothing before all lists are complete."""
        self._told = self.problems
        if not self._listed:
            return Update({}, self._told)
        triggers = tuple(self._triggers)
        self._triggers.clear()
        return Update(self._store.take(), self._told, self.place.take(), triggers)

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
            while not self._has_news():
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

    @property
    def eligible(self) -> bool:
        """Load balancers may send to this node."""
        return self.place.eligible

    def dead_since(self) -> float | None:
        """Since when nothing has been heard of Services or EndpointSlices, in seconds since the epoch; None = we do."""
        dead = [each.dead_since for each in self.reflectors if each.dead_since and not each.resource.secondary]
        return min(dead, default=None)

    def last_error(self) -> str:
        """Why it does not go on."""
        return next((each.last_error for each in self.reflectors if each.last_error), "no whole list in time")

    def stuck(self) -> bool:
        """Some watch has stopped trying, which only a new process mends."""
        oldest = min(each.tried_at for each in self.reflectors if not each.resource.secondary)
        return bool(self._tasks) and time.time() - oldest > STUCK_SECONDS

    def status(self) -> dict[str, Any]:
        """For `dataplane status`: the server, and of each watch how many objects, and since when it is dead."""
        counts = self._store.counts() | self.place.counts()
        return {
            "kind": "kubernetes",
            "server": self.server,
            "node": self.place.status(),
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
