"""What a look of a big table costs `dataplane top`, by processor time: its thread of looks, and the screen's.

No kernel and no root: the look is made of the workload, with every backend busy, and the screen is one of 120 × 40
cells that nobody sees.
"""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

from dataplane.backend import RealCounters, ServerReport
from dataplane.rows import Counts, Look, service_rows, with_rates
from dataplane.top.app import Top
from dataplane.top.listing import arranged
from dataplane.top.screens import Table

from . import workload

LOOKS = 6
SIZE = (120, 40)


class _Looks:
    """The next look, each time; the last one again and again."""

    from_agent = True

    def __init__(self, looks: list[Look]) -> None:
        self._looks = looks

    def look(self) -> Look:
        """What `Viewer.look` would give."""
        return self._looks.pop(0) if len(self._looks) > 1 else self._looks[0]


def looks(size: int) -> list[Look]:
    """One a second, as the agent tells them: with hits, and no rates yet."""
    servers = workload.servers(size)

    def look(second: int) -> Look:
        reports = [
            ServerReport(
                server,
                0,
                second * (number % 97 + 1),
                tuple((real, RealCounters(1, 1, second * (number % 97 + 1))) for real in server.real_servers),
                True,
            )
            for number, server in enumerate(servers)
        ]
        return Look("nftables", 1e9 + second, Counts("nftables"), service_rows(reports, {}))

    return [look(second) for second in range(LOOKS)]


def run(size: int) -> dict[str, list[float]]:
    """Seconds of processor time of each part, several times each."""
    found: dict[str, list[float]] = {}

    def clocked(name: str, work: Callable[[], object]) -> object:
        began = time.process_time()
        done = work()
        found.setdefault(name, []).append(time.process_time() - began)
        return done

    plain = looks(size)
    rated = [plain[0]]
    for before, look in pairwise(plain):
        text = look.to_json()
        clocked("thread: decode", lambda text=text: Look.from_json(text))  # type: ignore[misc]
        rated.append(clocked("thread: rates", lambda look=look, before=before: with_rates(look, before)))  # type: ignore[arg-type,misc]
    asyncio.run(_on_screen(rated, clocked))
    return found


async def _on_screen(rated: list[Look], clocked: Callable[[str, Callable[[], object]], object]) -> None:
    app = Top(_Looks(rated[:1]), interval=3600)
    async with app.run_test(size=SIZE) as pilot:
        await pilot.pause(0.5)
        for look in rated[1:]:
            clocked("thread: twins, history, sums", lambda look=look: app.prepare(look, True))  # type: ignore[misc]
            await pilot.pause(0.5)
            screen = app.screen
            if not isinstance(screen, Table) or app.look is not look:
                raise AssertionError("the look is not on the screen")
            clocked("screen: sort", lambda: arranged(app.entries, "rate"))
            clocked("screen: a new look", screen.rearrange)
            clocked("screen: draw everything", partial(screen._compositor.render_update, full=True))
