"""What `show`, `counters` and `top` share: a look through the agent or into the kernel, once or again and again."""

import contextlib
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from ..errors import AgentUnreachable, DataplaneError
from .options import colours, has_net_admin, open_kernel, settle, together

if TYPE_CHECKING:
    from ..backend import Backend
    from ..control_socket import ControlClient
    from ..looks import Looks
    from ..rows import Look

watch_options = together(
    click.option("--no-headers", is_flag=True, help="Leave out the lines of titles."),
    click.option("-w", "--watch", is_flag=True, help="Show it again and again, until interrupted."),
    click.option(
        "--interval",
        type=click.FloatRange(0.1),
        default=2.0,
        show_default=True,
        help="Seconds between looks (with --watch).",
    ),
    click.option("-n", "--count", type=click.IntRange(1), help="Look that many times, then end (implies --watch)."),
)


class Viewer:
    """Takes looks; each has rates since the one before.

    The agent of this network namespace is asked, if it is of the mode that `--mode` or `--config` names, or none is
    named; else the kernel is read by this process, in that mode or the one that is here.
    """

    def __init__(self, config_file: str | None, given: dict[str, Any]) -> None:
        self._settings = settle(config_file, given)
        self._mode = self._settings.mode if config_file or given.get("mode") else None
        self._agent: ControlClient | None = None
        self._backend: Backend | None = None
        self._kernel: Looks | None = None
        self.from_agent = False
        """Whether the agent has told the last look; else it was read from the kernel."""
        self._before: Look | None = None

    def __enter__(self) -> "Viewer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give descriptors back."""
        if self._agent is not None:
            self._agent.close()
        if self._backend is not None:
            self._backend.close()
        self._agent = self._backend = self._kernel = None

    def look(self) -> "Look":
        """What is there now. AgentUnreachable is never raised: there is always the kernel."""
        from ..rows import with_rates

        told = self._ask_agent()
        self.from_agent = told is not None
        if told is not None and self._backend is not None:
            # should it go again, its mode may be another one than it was
            self._backend.close()
            self._backend = self._kernel = None
        look = with_rates(told or self._read_kernel(), self._before)
        self._before = look
        return look

    @property
    def backend(self) -> "Backend":
        """The mode itself, for its own languages."""
        if self._backend is None:
            self._backend = (None if self._mode else self._open_what_is_here()) or open_kernel(self._settings)
        return self._backend

    def _open_what_is_here(self) -> "Backend | None":
        """The one mode that is here, when nobody said which is meant."""
        from ..backend import MODES, open_leftover

        if not has_net_admin():
            return None
        here = []
        for mode in MODES:
            with contextlib.suppress(DataplaneError):
                backend = open_leftover(mode, self._settings.options())
                if backend.present():
                    here.append(backend)
                else:
                    backend.close()
        if len(here) == 1:
            return here[0]
        for backend in here:
            backend.close()
        return None

    def _ask_agent(self) -> "Look | None":
        from ..control_socket import ControlClient
        from ..rows import Look

        try:
            if self._agent is None:
                self._agent = ControlClient()
            look = Look.from_json(self._agent.ask("look"))
        except AgentUnreachable:
            if self._agent is not None:
                self._agent.close()
            self._agent = None
            return None
        return look if self._mode in (None, look.mode) else None

    def _read_kernel(self) -> "Look":
        from ..looks import Looks

        if self._kernel is None:
            self._kernel = Looks(self.backend, self.backend.clocks)
            self._kernel.no_probe = "no agent runs"
        return self._kernel.look()


def watched(draw: Callable[[], str], *, watch: bool, interval: float, count: int | None, clear: bool) -> None:
    """Print what `draw` returns, once or again and again; on a terminal each time over the time before."""
    looks = count or (0 if watch else 1)
    shown = 0
    while True:
        text = draw()
        if shown and clear:
            click.echo("\x1b[H\x1b[J" if colours() else "", nl=not colours())
        click.echo(text, nl=False)
        sys.stdout.flush()
        shown += 1
        if shown == looks:
            return
        time.sleep(interval)
