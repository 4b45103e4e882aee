"""Asks the agent for whoever looks: one question at a time, one look a second, however many viewers there are."""

import asyncio
import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from msgspec import DecodeError, Struct

from ..control_socket import ControlClient
from ..counters_text import merged
from ..errors import DataplaneError
from ..procfs_sysctl import read as read_sysctl
from ..rows import Look, ServiceRow, with_rates

SECONDS = 1.0
SHARE = 5
"""Between two looks pass at least so many times the seconds that one takes: the agent answers in its only thread."""
PATIENCE = 8.0
"""Seconds of silence after which the agent counts as not answering: less than the ten that Prometheus waits."""
RATES_WITHIN = 30.0
"""Seconds between two looks beyond which a rate would tell nothing of now."""
HISTORY, HISTORY_POINTS = 300, 100_000
"""Looks that the chart goes back, and the rates kept in all: with very many backends it goes back less."""

Point = tuple[float, dict[str, dict[str, float]]]
"""Seconds since the epoch, and the rate of each backend of each Service port, by VIP."""


class View(Struct, frozen=True):
    """What there is to see at one moment. Without an answer of the agent, `trouble` says why."""

    number: int
    look: Look | None = None
    rows: tuple[ServiceRow, ...] = ()
    """Of ours, one for each VIP and port."""
    status: dict[str, Any] | None = None
    trouble: str = ""
    conntrack: tuple[int | None, int | None] = (None, None)
    """Entries and their limit in this network namespace."""
    names: Mapping[str, int] = {}
    """Answers to names of each Service, where the agent answers names."""

    @property
    def backends(self) -> int:
        """Of all rows."""
        return sum(len(row.real_servers) for row in self.rows)


class Watch:
    """The agent of this network namespace, seen by any number of viewers. Belongs to one event loop."""

    def __init__(self) -> None:
        self.history: deque[Point] = deque(maxlen=HISTORY)
        self.viewers = 0
        self._agent: ControlClient | None = None
        self._raw = b""
        self._view = View(0, trouble="nobody has looked yet")
        self._viewed_at = 0.0
        self._took = 0.0
        self._asking = asyncio.Lock()
        self._news = asyncio.Condition()
        self._ticker: asyncio.Task[None] | None = None
        self._thread = threading.Lock()

    async def now(self) -> View:
        """A view that is a second old at most, or as old as the agent's peace demands."""
        async with self._asking:
            pause = max(SECONDS, SHARE * self._took)
            if not self._view.number or time.monotonic() - self._viewed_at >= 0.9 * pause:
                started = time.monotonic()
                self._view = await asyncio.to_thread(self._ask)
                self._viewed_at = time.monotonic()
                self._took = self._viewed_at - started
        async with self._news:
            self._news.notify_all()
        return self._view

    async def views(self) -> AsyncGenerator[View, None]:
        """One view after another, as long as the caller wants them."""
        self.viewers += 1
        seen = -1

        def news() -> bool:
            return self._view.number != seen

        try:
            if self._ticker is None or self._ticker.done():
                self._ticker = asyncio.create_task(self._tick())
            await self.now()
            while True:
                if news():
                    seen = self._view.number
                    yield self._view
                async with self._news:
                    await self._news.wait_for(news)
        finally:
            self.viewers -= 1

    async def _tick(self) -> None:
        while self.viewers:
            await self.now()
            await asyncio.sleep(max(SECONDS, SHARE * self._took))

    async def close(self) -> None:
        """Give up."""
        if self._ticker is not None:
            self._ticker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ticker
        if self._agent is not None:
            self._agent.close()

    def _ask(self) -> View:
        with self._thread:
            number = self._view.number + 1
            conntrack = (read_sysctl("net.netfilter.nf_conntrack_count"), read_sysctl("net.netfilter.nf_conntrack_max"))
            try:
                if self._agent is None:
                    self._agent = ControlClient(PATIENCE)
                raw = self._agent.ask("look")
                status = self._agent.status()
                names = json.loads(self._agent.ask("names")) if status.get("dns") else {}
                look, rows = self._decode(raw)
            except (DataplaneError, DecodeError) as error:
                if self._agent is not None:
                    self._agent.close()
                self._agent, self._raw = None, b""
                return View(number, trouble=str(error), conntrack=conntrack)
            return View(number, look, rows, status, conntrack=conntrack, names=names)

    def _decode(self, raw: bytes) -> tuple[Look, tuple[ServiceRow, ...]]:
        last = self._view
        if raw == self._raw and last.look is not None:  # the agent keeps a look that cost it much
            return last.look, last.rows
        look = Look.from_json(raw)
        before = last.look
        if before is not None and look.at - before.at <= RATES_WITHIN:
            look = with_rates(look, before)
        self._raw = raw
        rows = tuple(merged(row for row in look.services if row.ours))
        self._remember(look.at, rows)
        return look, rows

    def _remember(self, at: float, rows: tuple[ServiceRow, ...]) -> None:
        if all(row.rate is None for row in rows):
            return
        rates = {
            row.vip: {real.endpoint: real.rate for real in row.real_servers if real.rate is not None} for row in rows
        }
        self.history.append((at, rates))
        depth = HISTORY_POINTS // max(1, sum(map(len, rates.values())))
        while len(self.history) > max(2, depth):
            self.history.popleft()
