"""A terminal for tests: a program runs in it, and the test reads what stands on its screen.

It understands what textual writes: text, cursor positions, and nothing else that changes the text.
"""

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import threading
from collections.abc import Iterator, Sequence

from .traffic import eventually

_SEQUENCE = re.compile(
    r"\x1b\[(?P<numbers>[\d;]*)(?P<final>[A-Za-z])|\x1b\[[<=>?][\d;$]*[A-Za-z]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"
    r"|\x1bP[^\x1b]*\x1b\\|\x1b[=>78]|\x1b[()][A-Z0-9]"
)
_UNFINISHED = re.compile(r"\x1b(\[[<=>?]?[\d;$]*|\][^\x07\x1b]*|P[^\x1b]*|[()])?\Z")


class Terminal:
    """Its screen, and the keyboard."""

    def __init__(self, command: Sequence[str], columns: int, lines: int, variables: dict[str, str]) -> None:
        self._columns, self._lines = columns, lines
        self._cells = [[" "] * columns for _ in range(lines)]
        self._row = self._column = 0
        self._lock = threading.Lock()
        self._rest = ""
        self.written = ""
        """Everything that was written, with all sequences."""
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
        environment.pop("NO_COLOR", None)
        environment |= variables
        try:
            self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
        finally:
            os.close(slave)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        held = b""
        with contextlib.suppress(OSError):  # EIO: nobody has the other side open any more
            while True:
                select.select([self._master], [], [])
                held += os.read(self._master, 1 << 16)
                text = held.decode(errors="ignore")
                # a character that is not complete yet stays for the next time
                held = held[len(text.encode()) :] if len(held) - len(text.encode()) < 4 else b""
                with self._lock:
                    self.written += text
                    self._take(text)

    def _take(self, text: str) -> None:
        text = self._rest + text
        place = 0
        self._rest = ""
        while place < len(text):
            if text[place] == "\x1b":
                found = _SEQUENCE.match(text, place)
                if found is None:
                    if _UNFINISHED.match(text, place):
                        self._rest = text[place:]
                        return
                    place += 1
                    continue
                self._obey(found)
                place = found.end()
                continue
            self._put(text[place])
            place += 1

    def _obey(self, sequence: re.Match[str]) -> None:
        numbers = [int(each) if each else 0 for each in (sequence["numbers"] or "").split(";")]
        if sequence["final"] in ("H", "f"):
            row, column = (*numbers, 1)[:2] if len(numbers) > 1 else (numbers[0], 1)
            self._row, self._column = max(1, row) - 1, max(1, column) - 1
        elif sequence["final"] == "J" and numbers[0] == 2:
            self._cells = [[" "] * self._columns for _ in range(self._lines)]

    def _put(self, character: str) -> None:
        if character == "\n":
            self._row += 1
        elif character == "\r":
            self._column = 0
        elif character.isprintable():
            if self._row < self._lines and self._column < self._columns:
                self._cells[self._row][self._column] = character
            self._column += 1

    def screen(self) -> list[str]:
        """The lines of the screen."""
        with self._lock:
            return ["".join(cells).rstrip() for cells in self._cells]

    def line(self, *words: str) -> str:
        """The first line that has all of the words; "" if none has."""
        return next((line for line in self.screen() if all(word in line for word in words)), "")

    def shows(self, *words: str, seconds: float = 30) -> None:
        """Wait for a line with all of the words."""
        try:
            eventually(f"the screen shows {words}", lambda: self.line(*words), seconds)
        except AssertionError as error:
            error.add_note("\n".join(self.screen()))
            raise

    def press(self, keys: str) -> None:
        """Type."""
        os.write(self._master, keys.encode())

    def close(self) -> None:
        """Whatever runs in it is over."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
        self._reader.join(10)
        os.close(self._master)


@contextlib.contextmanager
def terminal(
    command: Sequence[str], columns: int = 120, lines: int = 32, variables: dict[str, str] | None = None
) -> Iterator[Terminal]:
    """A terminal in which a command runs; no process of it outlives the block."""
    one = Terminal(command, columns, lines, variables or {})
    try:
        yield one
    finally:
        one.close()
