"""Progress on stderr: a bar on a terminal, else one line a step."""

import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    """What is being done now. `total`: how many steps there will be, as far as that is known."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._bar: Any = None
        self._task: Any = None
        self._began = time.monotonic()

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("", total=self._total)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, text: str) -> None:
        """What comes next."""
        if self._bar is None:
            print(f"[{time.monotonic() - self._began:5.0f} s] {text}", file=sys.stderr, flush=True)
        else:
            self._bar.update(self._task, description=text[:70])

    def add(self, steps: int) -> None:
        """There are more steps than was known."""
        self._total += steps
        if self._bar is not None:
            self._bar.update(self._task, total=self._total)

    def step(self) -> None:
        """One is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.advance(self._task)
