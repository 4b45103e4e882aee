"""The program behind `dataplane top`: it holds what was seen last, and hands it to the screens."""

import os
import time
from collections.abc import Callable, Sequence
from typing import ClassVar

from textual.app import App
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.theme import Theme

from ..counters_text import merged
from ..errors import DataplaneError
from ..rows import Look, chosen
from . import palette
from .columns import Drawing
from .headings import Situation
from .history import History, Key
from .listing import Entry, Totals, entries, rates, totals
from .looking import Looker, Source
from .screens import Help, Overview, Table

INTERVALS = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Seconds; what + and - choose from."""

_INTERVAL = Binding.Group("pace", compact=True)


class _Begun(Message):
    """A look is under way."""


class _Seen(Message):
    """A look has come."""

    def __init__(self, look: Look, rows: list[Entry], sums: Totals, history: History, from_agent: bool) -> None:
        super().__init__()
        self.look, self.rows, self.sums, self.history, self.from_agent = look, rows, sums, history, from_agent


class _Failed(Message):
    """No look has come."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class Top(App[None]):
    """Services and their backends, live. `failure`: why it ended before it had seen anything."""

    ENABLE_COMMAND_PALETTE = False
    TITLE = "dataplane top"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("p,space", "pause", "pause", key_display="p"),
        Binding("plus", "interval(1)", "longer interval", key_display="+", group=_INTERVAL),
        Binding("minus", "interval(-1)", "shorter interval", key_display="-", group=_INTERVAL),
        Binding("f5", "look", show=False),
        Binding("question_mark", "help", "help", key_display="?"),
        Binding("q", "quit", "quit"),
        Binding("ctrl+c,ctrl+q", "quit", show=False, priority=True),
    ]
    CSS = f"""
    Screen {{ background: {palette.BACKGROUND}; color: {palette.TEXT}; layout: vertical; }}
    .heading {{ height: 5; }}
    .titles {{ height: 1; }}
    Grid {{
        height: 1fr; overflow-x: hidden; overflow-y: auto; scrollbar-gutter: stable; scrollbar-size-vertical: 1;
        background: {palette.BACKGROUND};
        scrollbar-background: {palette.BACKGROUND}; scrollbar-color: {palette.RULE};
        scrollbar-background-hover: {palette.BACKGROUND}; scrollbar-color-hover: {palette.DIM};
        scrollbar-background-active: {palette.BACKGROUND}; scrollbar-color-active: {palette.BLUE};
    }}
    Footer, FooterKey, FooterLabel {{ background: {palette.PANEL}; color: {palette.DIM}; }}
    FooterKey .footer-key--key {{ background: {palette.PANEL}; color: {palette.BLUE}; padding: 0 0 0 1; }}
    FooterKey .footer-key--description {{ background: {palette.PANEL}; color: {palette.TEXT}; padding: 0 0 0 1; }}
    KeyGroup.-compact {{ margin: 0; }}
    FooterLabel {{ margin: 0 0 0 1; color: {palette.TEXT}; }}
    .filter {{ dock: bottom; height: 1; background: {palette.PANEL}; layer: above; }}
    .filter Static {{ width: 3; padding: 0 1; color: {palette.YELLOW}; text-style: bold; }}
    .filter Input, .filter Input:focus {{
        width: 1fr; background: {palette.PANEL}; background-tint: {palette.PANEL} 0%; color: {palette.TEXT};
    }}
    Help {{ align: center middle; }}
    .help {{
        width: 90; max-width: 96%; height: auto; max-height: 96%; padding: 1 2;
        background: {palette.BACKGROUND};
        scrollbar-size-vertical: 1; scrollbar-background: {palette.BACKGROUND}; scrollbar-color: {palette.RULE};
        border: round {palette.BLUE}; border-title-color: {palette.BLUE}; border-subtitle-color: {palette.DIM};
    }}
    .help Static {{ width: 100%; height: auto; }}
    """

    def __init__(
        self,
        source: Source,
        *,
        services: Sequence[str] = (),
        interval: float = 1.0,
        sort: str = "rate",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.plain = bool(os.environ.get("NO_COLOR"))
        super().__init__(ansi_color=True if self.plain else None)
        self.register_theme(Theme("dataplane", palette.BLUE, background=palette.BACKGROUND))
        self.theme = "ansi-dark" if self.plain else "dataplane"
        self.named = palette.styles(plain=self.plain)
        self.look: Look | None = None
        self.entries: list[Entry] = []
        self.history = History()
        self.drawing = Drawing(self.history)
        self.failure: Exception | None = None
        self._services = tuple(services)
        self._interval = interval
        self._clock = clock
        self._totals = totals(())
        self._from_agent = False
        self._paused = False
        self._error, self._failed, self._waiting_since = "", 0, 0.0
        self._sort = sort
        self._last: _Seen | None = None  # only the looks' thread uses it
        self._looker = Looker(
            source,
            interval,
            lambda: self._tell(_Begun()),
            self.prepare,
            lambda error: self._tell(_Failed(error)),
        )

    # -------------------------------------------------------------------------------------------- in the looks' thread

    def prepare(self, look: Look, from_agent: bool) -> None:
        """All that takes long for a big table; then the screen gets it."""
        last = self._last
        if last is None or last.look.counts.source != look.counts.source:
            history = History()
        elif last.look.at == look.at:
            # the agent of a big table tells the same look for a while, which has no news and no rates
            self._tell(_Seen(last.look, last.rows, last.sums, last.history, from_agent))
            return
        else:
            history = last.history
        found = merged(row for row in chosen(look.services, self._services) if row.ours)
        rows = entries(found)
        history.take(look.at, rates(rows))
        self._last = _Seen(look, rows, totals(found), history, from_agent)
        self._tell(self._last)

    def _tell(self, message: Message) -> None:
        if self.is_running:
            self.post_message(message)

    # ----------------------------------------------------------------------------------------------------- what it sees

    def on_mount(self) -> None:
        """Begin to look."""
        self.push_screen(Overview(self, self._sort))
        self.set_interval(1.0, self._tick)
        self._looker.start()

    def on_unmount(self) -> None:
        """No more looks."""
        self._looker.end()

    def on__begun(self, message: _Begun) -> None:
        """Remember since when."""
        self._waiting_since = self._clock()

    def on__seen(self, message: _Seen) -> None:
        """Show it."""
        self._waiting_since = 0.0
        self._error, self._failed = "", 0
        self._from_agent = message.from_agent
        if message.look is self.look:
            self._tick()
            return
        self.look, self.entries, self._totals = message.look, message.rows, message.sums
        self.history = self.drawing.history = message.history
        self.drawing.renew(self.look.at)
        self.drawing.now = self._now()
        if isinstance(self.screen, Table):
            self.screen.rearrange()

    def on__failed(self, message: _Failed) -> None:
        """Show why, and what was there; the next look may succeed. Without any so far the command fails."""
        error = message.error
        self._waiting_since = 0.0
        if self.look is None:
            self.failure = error
            self.exit()
            return
        self._error = str(error) if isinstance(error, DataplaneError) else f"{type(error).__name__}: {error}"
        self._failed += 1
        self._tick()

    def _tick(self) -> None:
        """Clocks go on, and the headings may have something new to say."""
        self.drawing.now = self._now()
        if isinstance(self.screen, Table):
            self.screen.draw()

    def _now(self) -> float:
        """A pause stops the clocks."""
        return self.look.at if self._paused and self.look is not None else self._clock()

    def situation(self, words: tuple[str, ...] = (), shown: int = 0) -> Situation:
        """For a heading."""
        return Situation(
            self.look,
            self._from_agent,
            self._totals,
            self._interval,
            self._paused,
            self._clock(),
            self._error,
            self._failed,
            self._waiting_since,
            words,
            shown,
            len(self.entries),
            self._services,
        )

    def find(self, key: Key) -> Entry | None:
        """The Service's port at that address, if it is still there."""
        return next((entry for entry in self.entries if entry.key == key), None)

    # ------------------------------------------------------------------------------------------------------------- keys

    def action_pause(self) -> None:
        """Stop, or go on."""
        self._paused = not self._paused
        self._looker.pace(self._interval, paused=self._paused)
        if not self._paused:
            self._looker.now()
        self._tick()

    def action_interval(self, by: int) -> None:
        """The next longer one, or the next shorter one."""
        if by > 0:
            self._interval = next((each for each in INTERVALS if each > self._interval), self._interval)
        else:
            self._interval = next((each for each in reversed(INTERVALS) if each < self._interval), self._interval)
        self._looker.pace(self._interval, paused=self._paused)
        self._tick()

    def action_look(self) -> None:
        """At once, also in a pause."""
        self._looker.now()

    def action_help(self) -> None:
        """Keys and terms."""
        if not isinstance(self.screen, Help):
            self.push_screen(Help())
