"""What the reader of the demo sees: steps, prose, commands with their output, and claims that hold."""

import difflib
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence

from ..errors import DataplaneError
from ..printable import printable

WIDTH = 78


class ClaimFailed(DataplaneError):
    """What the demo says is not what happened."""


class Page:
    """What the reader sees."""

    def __init__(self, *, pause: bool, steps: int) -> None:
        self._steps = steps
        self._number = 0
        self._pause = pause and sys.stdin.isatty()
        self._colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self.pace = 0.0
        """Seconds that the slowest command took."""
        if pause and not self._pause:
            print("demo: no terminal to press Enter on, so --pause does nothing", file=sys.stderr)

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text

    def heading(self, text: str) -> None:
        print(self._paint(text, "1"))
        print(self._paint("=" * len(text), "1"))

    def step(self, title: str) -> None:
        if self._pause:
            print(self._paint("-- Enter goes on --", "2"), end="", flush=True)
            sys.stdin.readline()
        self._number += 1
        print()
        print(self._paint(f"{self._number}/{self._steps}  {title}", "1"), flush=True)

    def prose(self, text: str) -> None:
        print()
        print(textwrap.fill(text, WIDTH, break_on_hyphens=False, break_long_words=False))
        print(flush=True)

    def command(self, where: str, line: str) -> None:
        print(f"    {self._paint(f'{where}#', '2')} {self._paint(line, '36')}", flush=True)

    def text(self, text: str) -> None:
        """A program's output as it is, indented; what could act on a terminal is escaped."""
        for line in text.rstrip("\n").split("\n") if text.strip() else []:
            print(f"    {printable(line.expandtabs().rstrip(), 500)}")
        sys.stdout.flush()

    def ok(self, text: str) -> None:
        print(f"{self._paint('ok', '32')}  {text}", flush=True)

    def claim(self, text: str, holds: bool, otherwise: str, *, quiet: bool = False) -> None:
        """Say it, if it holds (unless `quiet`); else end the demo."""
        if not holds:
            raise ClaimFailed(f"expected: {text}; but {otherwise}")
        if not quiet:
            self.ok(text)


def number(count: int) -> str:
    """A small number as a word."""
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return words[count] if count < len(words) else str(count)


def quoted(text: str) -> str:
    """Somebody's words in quotes."""
    return f'"{printable(text.strip())}"'


def shares(answers: Sequence[str]) -> str:
    """Who answered how often."""
    counts = Counter(answers)
    return "the answers were " + ", ".join(f"{count} of {quoted(name)}" for name, count in sorted(counts.items()))


def difference(before: str, after: str) -> str:
    """The lines that differ, as diff -u marks them."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=1)
    return "\n".join(list(lines)[3:])
