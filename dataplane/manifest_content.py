"""What counts of one manifest file: its objects, and earlier ones that stand in for what is wrong now. Pure.

The rules stand in `manifest_files`; this is where they are applied to one file.
"""

import os
from collections.abc import Iterator

from msgspec import Struct
from msgspec.structs import replace

from dataplane.kubernetes_reading import Reading
from dataplane.model import ObjectName, Problem
from dataplane.printable import printable
from dataplane.stable_file import Stamp

Identity = tuple[str, ObjectName]


class Row(Struct, frozen=True, gc=False):
    """One object of a chunk; lines count from 0 at the chunk's start, `lines` belong to the reading's faults."""

    line: int
    reading: Reading
    lines: tuple[int, ...] = ()


class Chunk(Struct, frozen=True, gc=False):
    digest: bytes
    rows: tuple[Row, ...]


class FileContent(Struct):
    """One file as it counts at the moment."""

    stamp: Stamp | None = None
    """None: look again whatever its times say."""
    chunks: tuple[tuple[int, Chunk], ...] = ()
    kept: dict[Identity, tuple[int, Reading]] = {}
    """Earlier versions that stand in for refused or missing objects, with the line they had."""
    problems: tuple[Problem, ...] = ()
    stale: bool = False
    """What counts is not what the file says now."""
    whole: bool = False
    """It could be parsed from end to end at least once."""
    pending_since: float = 0.0

    def rows(self) -> Iterator[tuple[int, Row]]:
        for line, chunk in self.chunks:
            for row in chunk.rows:
                yield line + row.line + 1, row

    def standing(self) -> Iterator[tuple[int, Reading]]:
        """(line, reading) of every object that counts."""
        kept = dict(self.kept)
        for line, row in self.rows():
            reading = row.reading
            if reading.value is not None:
                yield line, reading
            elif reading.name is not None and (earlier := kept.pop((reading.kind, reading.name), None)):
                yield earlier
        yield from kept.values()


def judge(
    path: str,
    stamp: Stamp | None,
    found: tuple[tuple[int, Chunk], ...],
    broken: list[Problem],
    before: FileContent,
    most: int,
) -> FileContent:
    """The file's new state, given what could be read of it and what could not; at most so many problems.

    `before` itself when nothing changed.
    """
    if broken and before.whole:
        stays = "; the file's last content stays"
        said = tuple(problem._replace(reason=problem.reason + stays) for problem in broken)
        after = FileContent(stamp, before.chunks, before.kept, said, stale=True, whole=True)
    else:
        after = FileContent(stamp, found, whole=not broken)
        after.kept = _substitutes(after, before)
        after.stale = bool(broken or after.kept)
        after.problems = tuple(broken) + _problems(path, after, most)
    if before == replace(after, stamp=before.stamp):
        before.stamp = stamp
        return before
    return after


def _substitutes(after: FileContent, before: FileContent) -> dict[Identity, tuple[int, Reading]]:
    """What of the file's earlier objects stays: for each refused one its last version, and all if one has no name."""
    refused: set[Identity] = set()
    present: set[Identity] = set()
    nameless = False
    for _, row in after.rows():
        reading = row.reading
        if reading.name is None:
            nameless = True
        else:
            (refused if reading.value is None else present).add((reading.kind, reading.name))
    refused -= present
    if not nameless and not refused:
        return {}
    kept: dict[Identity, tuple[int, Reading]] = {}
    for line, reading in before.standing():
        if reading.name is None:
            continue
        identity = (reading.kind, reading.name)
        if identity in refused or (nameless and identity not in present):
            kept.setdefault(identity, (line, reading))
    return kept


def _problems(path: str, file: FileContent, limit: int) -> tuple[Problem, ...]:
    source = printable(path, 4096)
    found: list[Problem] = []
    for chunk_line, chunk in file.chunks:
        for row in chunk.rows:
            reading = row.reading
            for (field, reason), line in zip(reading.faults, row.lines, strict=True):
                if reading.value is None and reading.name and (reading.kind, reading.name) in file.kept:
                    reason += "; its last good version stays"
                elif reading.name is None and file.kept:
                    reason += "; until it says who it is nothing of this file counts as removed"
                found.append(Problem(source, chunk_line + line + 1, reading.label, field, reason))
    return tuple(cut_short(found, limit))


def cut_short(problems: list[Problem], limit: int) -> list[Problem]:
    rest = len(problems) - limit
    return problems if rest <= 0 else [*problems[:limit], file_problem(problems[limit].source, f"{rest} more problems")]


def file_problem(path: str, reason: str) -> Problem:
    return Problem(printable(path, 4096), 0, "", "", reason)


def error_text(error: OSError) -> str:
    return os.strerror(error.errno).lower() if error.errno else printable(str(error))
