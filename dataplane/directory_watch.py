"""Telling that something happened to files, by watching the directories they stand in.

Directories, not files, because files are replaced: by an atomic rename (editors, configuration management) or by a
symbolic link beside them that points elsewhere now (ConfigMap volumes). A watch on the file itself would follow the
old inode into the grave.
"""

import asyncio
import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from watchfiles import Change, awatch


class Spots(NamedTuple):
    """What to watch for: every entry of some directories, and single paths whatever directory they are in."""

    directories: frozenset[str]
    paths: frozenset[str]


class DirectoryWatch:
    """Waits for changes to Spots. Use as an async context manager.

    `fault` is why there is no watch at the moment (the inotify limit, say), "" when there is one.
    """

    def __init__(self, debounce_ms: int) -> None:
        self.fault = ""
        self._debounce_ms = debounce_ms
        self._spots = Spots(frozenset(), frozenset())
        self._named: frozenset[str] = frozenset()
        self._watched: frozenset[tuple[str, int, int]] = frozenset()
        self._stop = asyncio.Event()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "DirectoryWatch":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end()

    async def follow(self, spots: Spots) -> bool:
        """Watch these spots from now on. True when that changed anything: what happened before may have been missed."""
        self._spots = spots
        self._named = spots.paths.union(*(map(str, Path(path).parents) for path in spots.paths | spots.directories))
        directories = {_existing(directory) for directory in spots.directories}
        directories |= {_existing(str(Path(path).parent)) for path in spots.paths}
        # A directory that was deleted and made again is another inode under the same name.
        watched = frozenset(found for directory in directories if (found := _identity(directory)))
        if watched == self._watched and self._task is not None and not self._task.done():
            return False
        await self._end()
        self._watched = watched
        self._stop = asyncio.Event()
        self.fault = ""
        paths = sorted(path for path, _, _ in watched)
        self._task = asyncio.create_task(self._watch(paths, self._stop))
        # The task's first step sets the watches up, before it suspends for the first time.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return True

    async def wait(self, seconds: float) -> bool:
        """Whether something changed within so many seconds (since the last `wait`)."""
        try:
            await asyncio.wait_for(self._changed.wait(), seconds)
        except TimeoutError:
            return False
        self._changed.clear()
        return True

    async def _watch(self, directories: list[str], stop: asyncio.Event) -> None:
        try:
            async for _ in awatch(
                *directories,
                watch_filter=self._concerns_us,
                recursive=False,
                step=self._debounce_ms,
                debounce=max(4 * self._debounce_ms, 1),
                stop_event=stop,
            ):
                self._changed.set()
        except (OSError, RuntimeError) as error:
            self.fault = str(error) or type(error).__name__
            self._changed.set()

    def _concerns_us(self, _: Change, path: str) -> bool:
        directory, base = os.path.split(path)
        # `..data` is the link that a ConfigMap volume swaps; a path above a spot may bring the spot into being.
        return directory in self._spots.directories or path in self._named or base.startswith("..")

    async def _end(self) -> None:
        self._stop.set()
        if self._task is not None:
            # The watching thread looks at the stop event once a step.
            task, self._task = self._task, None
            with contextlib.suppress(asyncio.CancelledError, TimeoutError):
                await asyncio.wait_for(task, 2 + self._debounce_ms / 1000)


def _existing(path: str) -> str:
    """The path itself or the nearest directory above it that exists."""
    while not Path(path).is_dir():
        above = str(Path(path).parent)
        if above == path:
            break
        path = above
    return path


def _identity(directory: str) -> tuple[str, int, int] | None:
    try:
        found = Path(directory).stat()
    except OSError:
        return None
    return directory, found.st_dev, found.st_ino


def spots_of(files: Iterable[str], directories: Iterable[str]) -> Spots:
    """Spots for absolute paths of files and of whole directories: where they are and where their links lead."""
    inside: set[str] = set()
    single: set[str] = set()
    for directory in directories:
        real = os.path.realpath(directory)
        inside |= {directory, real}
        single |= {directory, real}
    for file in files:
        real = os.path.realpath(file)
        single |= {file, real}
    return Spots(frozenset(inside), frozenset(path for path in single if str(Path(path).parent) not in inside))
