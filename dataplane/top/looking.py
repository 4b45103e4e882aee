"""The thread that takes looks: a slow agent or a big table never stops the screen."""

import threading
import time
from collections.abc import Callable
from typing import Protocol

from ..rows import Look


class Source(Protocol):
    """Where looks come from (`cli.viewing.Viewer`)."""

    def look(self) -> Look:
        """What is there now, with rates since the look before."""

    @property
    def from_agent(self) -> bool:
        """Whether the agent has told the last one; else it was read from the kernel."""


class Looker(threading.Thread):
    """Takes looks one after the other, never two at once, and hands on what came of each.

    A daemon: a process that wants to end does not wait for an agent that is silent.
    """

    def __init__(
        self,
        source: Source,
        interval: float,
        begun: Callable[[], None],
        seen: Callable[[Look, bool], None],
        failed: Callable[[Exception], None],
    ) -> None:
        super().__init__(name="looks", daemon=True)
        self._source = source
        self._begun, self._seen, self._failed = begun, seen, failed
        self._condition = threading.Condition()
        self._interval = interval
        self._paused = self._wanted = self._ended = False

    def run(self) -> None:
        """Until `end`."""
        while not self._ended:
            started = time.monotonic()
            self._begun()
            try:
                look = self._source.look()
                from_agent = self._source.from_agent
            except Exception as error:  # whatever it is, somebody is to read it, and the next look may succeed
                self._failed(error)
            else:
                self._seen(look, from_agent)
            with self._condition:
                while not self._ended and not self._wanted:
                    due = started + self._interval - time.monotonic()
                    if not self._paused and due <= 0:
                        break
                    self._condition.wait(None if self._paused else due)
                self._wanted = False

    def pace(self, interval: float, *, paused: bool) -> None:
        """Seconds from the beginning of a look to that of the next; paused: none is taken unless `now` asks for it."""
        with self._condition:
            self._interval, self._paused = interval, paused
            self._condition.notify()

    def now(self) -> None:
        """Take one at once, or after the one that is under way."""
        with self._condition:
            self._wanted = True
            self._condition.notify()

    def end(self) -> None:
        """Take no more."""
        with self._condition:
            self._ended = True
            self._condition.notify()
