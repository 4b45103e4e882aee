"""Source: manifest files and directories, YAML or JSON, watched.

What is read: files named (of any name) and, of directories named, the entries `*.yaml`, `*.yml` and `*.json`, one
level deep. Left out there: hidden files, editors' temporaries (`.#x`, `x~`, `x.swp`), and with them the `..data`
directories of a ConfigMap volume, whose files show through the links beside them.

What stands when something is wrong, always with a Problem that says so:

* An invalid object is skipped; the version of it that this file last held in a valid form stays. The other objects
  of the file take effect.
* An object that does not say who it is (no kind, no name, no mapping at all) is skipped. Until that is mended no
  object of the file counts as removed, because the nameless one may be any of them.
* A document that cannot be parsed, a limit exceeded, an emptied file, a file still being written or unreadable: the
  last good content of the whole file stays. A file never read in one piece gives what of it can be read.
* A file that is gone takes its objects with it. A named directory that is gone does not: an unmounted volume is no
  wish to delete everything.
* Of two objects with one identity the first counts, in the order of paths as named, file names and documents; when
  the first goes the second takes over.

"Last" reaches back to the start of this process; nothing is stored.
"""

import asyncio
import contextlib
import ctypes
import gc
import os
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from dataplane.directory_watch import DirectoryWatch, Spots, spots_of
from dataplane.kubernetes_objects import read_object, service_view
from dataplane.kubernetes_reading import Reading
from dataplane.manifest_content import Chunk, FileContent, Identity, Row, cut_short, error_text, file_problem, judge
from dataplane.manifest_text import chunks, is_json, objects
from dataplane.model import Cluster, ObjectName, Problem, ServiceView, Update
from dataplane.printable import printable
from dataplane.safe_yaml import LIBYAML, Budget, DocumentError, Limits, field_lines
from dataplane.stable_file import BeingWritten, NotAFile, Stamp, TooLarge, read_stable, settled, stamp_of

SUFFIXES = (".yaml", ".yml", ".json")
_PENDING_SECONDS = 0.05
_UNWATCHED_SECONDS = 2.0
_LARGE = 1 << 20


class ManifestFiles:
    """Source: manifest files and directories.

    `read` looks at everything once, `updates` goes on looking; they may be mixed, each Update is delivered once.
    """

    def __init__(self, paths: Sequence[str | Path], limits: Limits = Limits()) -> None:  # noqa: B008 (frozen)
        self._paths = tuple(dict.fromkeys(os.fspath(path) for path in paths))
        self._limits = limits
        self._files: dict[str, FileContent] = {}
        self._listings: dict[str, tuple[str, ...]] = {}
        self._cluster: Cluster = {}
        self._problems: tuple[Problem, ...] = ()
        self._missing: tuple[str, ...] = ()
        self._links: tuple[str, ...] = ()
        self._twice: tuple[Problem, ...] = ()
        self._watch_fault = ""
        self._read_much = False
        self._pending = False
        self._first = True
        self._stale = False
        self._lock = threading.Lock()
        self.notice = "" if LIBYAML else "PyYAML without libyaml: YAML is read about 30 times slower; use JSON for bulk"
        """Something to tell the user once; "" when there is nothing."""

    @property
    def problems(self) -> tuple[Problem, ...]:
        """All problems that stand, in the order of files and lines."""
        return self._problems

    @property
    def missing(self) -> tuple[str, ...]:
        """The paths given that do not exist at the moment."""
        return self._missing

    @property
    def stale(self) -> bool:
        """Whether anything that counts is an earlier content, because the present one cannot be used."""
        return self._stale

    def cluster(self) -> Cluster:
        """The whole present snapshot; the caller's own copy."""
        return dict(self._cluster)

    async def ready(self) -> None:
        """Files can be read at any time."""

    async def close(self) -> None:
        """Nothing is held."""

    def status(self) -> dict[str, Any]:
        """For `dataplane status`."""
        return {"kind": "manifests", "paths": list(self._paths), "files": len(self._files), "stale": self._stale}

    # ------------------------------------------------------------------------------------------------ reading

    def read(self) -> Update:
        """Look at all files again; what changed since the last call, the first time everything.

        Never raises for what it finds. Blocks for the time of reading (seconds for 15 MB of new YAML), and the first
        time up to a second more for a file somebody is just writing.
        """
        with self._lock:
            patience = time.monotonic() + 1 if self._first else 0
            while True:
                changed = self._look()
                if not self._pending or time.monotonic() >= patience:
                    break
                time.sleep(0.02)
            self._first = False
            return Update(changed, self._problems)

    def _look(self) -> dict[ObjectName, ServiceView | None]:
        problems: list[Problem] = []
        if self._watch_fault:
            reason = (
                f"cannot be watched ({printable(self._watch_fault)}); looked at every {_UNWATCHED_SECONDS:g} s instead"
            )
            problems.append(file_problem(self._paths[0], reason))
        files: dict[str, FileContent] = {}
        lost: set[str] = set()
        for path in self._list(problems, lost):
            before = self._files.get(path)
            after = before if path in lost else self._look_at(path, before)
            if after is not None:
                files[path] = after
        known, self._files = self._files, files
        # Merging takes some milliseconds per 10,000 Services, and most looks find nothing.
        same = list(files) == list(known) and all(file is known[path] for path, file in files.items())
        changed = {} if same else self._merge()
        problems.extend(problem for file in files.values() for problem in file.problems)
        self._problems = (*problems, *self._twice)
        self._pending = any(file.pending_since for file in files.values())
        self._stale = bool(lost) or any(file.stale for file in files.values())
        if self._read_much:
            self._read_much = False
            _give_back_memory()
        return changed

    def _list(self, problems: list[Problem], lost: set[str]) -> list[str]:
        """The files to look at, in their order; those of directories that cannot be listed are added to `lost`."""
        found: dict[str, None] = {}
        missing: list[str] = []
        links: list[str] = []
        for path in self._paths:
            try:
                if not Path(path).is_dir():
                    Path(path).stat()
                    self._listings.pop(path, None)
                    found[path] = None
                    continue
                with os.scandir(path) as entries:
                    wanted = sorted((entry.name, entry.is_symlink()) for entry in entries if _wanted(entry))
            except OSError as error:
                earlier = self._listings.get(path)
                stays = "; its last content stays" if earlier else ""
                if isinstance(error, FileNotFoundError):
                    missing.append(path)
                problems.append(file_problem(path, f"{error_text(error)}{stays}"))
                if earlier:
                    lost.update(earlier)
                    found |= dict.fromkeys(earlier)
                elif not isinstance(error, FileNotFoundError) and path in self._files:
                    found[path] = None
                continue
            if len(wanted) > self._limits.files:
                problems.append(
                    file_problem(path, f"{len(wanted)} files; only the first {self._limits.files} are read")
                )
                del wanted[self._limits.files :]
            listing = tuple(str(Path(path, name)) for name, _ in wanted)
            links += [str(Path(path, name)) for name, is_link in wanted if is_link]
            self._listings[path] = listing
            found |= dict.fromkeys(listing)
        self._missing, self._links = tuple(missing), tuple(links)
        return list(found)

    def _look_at(self, path: str, before: FileContent | None) -> FileContent | None:
        """The file's state now; the very same object when nothing changed, None when it is gone."""
        try:
            if before and before.stamp is not None and before.stamp == stamp_of(Path(path).stat()):
                return before
            text, seen = read_stable(path, self._limits.file_bytes)
        except FileNotFoundError:
            return None
        except BeingWritten:
            since = (before.pending_since if before else 0) or time.monotonic()
            late = time.monotonic() - since > 5 or before is None
            return self._stays(path, before, "still being written" if late else "", pending_since=since)
        except NotAFile:
            return self._stays(path, before, "not a regular file")
        except TooLarge:
            return self._stays(path, before, f"larger than {self._limits.file_bytes} bytes")
        except OSError as error:
            return self._stays(path, before, error_text(error))
        stamp = seen if settled(seen, time.time()) else None
        if before and before.chunks and (not text or text.isspace()):
            reason = "the file is empty (to mean no objects, delete it or leave a comment in it)"
            return self._stays(path, before, reason, stamp)
        return self._parse(path, text, stamp, before)

    def _stays(
        self, path: str, before: FileContent | None, reason: str, stamp: Stamp | None = None, pending_since: float = 0.0
    ) -> FileContent:
        before = before or FileContent()
        said = f"{reason}; its last content stays" if before.chunks else reason
        problems = (file_problem(path, said),) if reason else before.problems
        if before.stale and (before.problems, before.stamp, before.pending_since) == (problems, stamp, pending_since):
            return before
        return FileContent(stamp, before.chunks, before.kept, problems, True, before.whole, pending_since)

    # ------------------------------------------------------------------------------------------------ parsing

    def _parse(self, path: str, text: bytes, stamp: Stamp | None, before: FileContent | None) -> FileContent:
        cache = {chunk.digest: chunk for _, chunk in before.chunks} if before else {}
        # A large List is one chunk: whatever in it stayed the same shall not exist twice while the snapshot changes.
        earlier = {
            (row.reading.kind, row.reading.name): row.reading
            for chunk in cache.values()
            if len(chunk.rows) > 1
            for row in chunk.rows
        }
        json = is_json(path, text)
        budget = Budget(self._limits)
        found: list[tuple[int, Chunk]] = []
        broken: list[Problem] = []
        # Thousands of short-lived trees without cycles: the collector would look at them in vain.
        paused = gc.isenabled() and len(text) > _LARGE
        self._read_much |= len(text) > _LARGE
        if paused:
            gc.disable()
        try:
            for line, chunk in chunks(text, json):
                digest = blake2b(chunk, digest_size=16).digest()
                made = cache.get(digest)
                if made is None:
                    try:
                        made = _read_chunk(digest, chunk, json, budget, earlier)
                    except DocumentError as error:
                        where = line + error.line + 1
                        broken.append(Problem(printable(path, 4096), where, "", "", printable(error.reason)))
                        if len(broken) >= 20 or budget.nodes <= 0 or budget.objects <= 0:
                            break
                        continue
                found.append((line, made))
        finally:
            if paused:
                gc.enable()
        return judge(path, stamp, tuple(found), broken, before or FileContent(), self._limits.problems)

    # ------------------------------------------------------------------------------------------------ merging

    def _merge(self) -> dict[ObjectName, ServiceView | None]:
        """Bring the snapshot up to the files; what changed in it. Also finds objects given twice."""
        first: dict[Identity, tuple[str, int]] = {}
        services: dict[ObjectName, Reading] = {}
        mirrored: dict[ObjectName, Reading] = {}
        slices: dict[ObjectName, list[Reading]] = {}
        twice: list[Problem] = []
        for path, file in self._files.items():
            for line, reading in file.standing():
                name = reading.name
                if name is None:
                    continue
                place = (path, line)
                claimed = first.setdefault((reading.kind, name), place)
                if claimed is not place:
                    reason = f"defined already at {printable(claimed[0], 4096)}:{claimed[1]}; this one does not count"
                    twice.append(Problem(printable(path, 4096), line, reading.label, "", reason))
                elif reading.kind == "Service":
                    services[name] = reading
                elif reading.kind == "Endpoints":
                    mirrored[name] = reading
                elif isinstance(reading.value, tuple):
                    slices.setdefault(reading.value[0].service, []).append(reading)
        changed: dict[ObjectName, ServiceView | None] = {}
        cluster: Cluster = {}
        for name in dict.fromkeys((*services, *slices, *mirrored)):
            view = service_view(services.get(name), slices.get(name, ()), mirrored.get(name))
            if view is None:
                continue
            # Equal or not, the new one: the old one would keep a second copy of what was read again.
            cluster[name] = view
            if self._cluster.get(name) != view:
                changed[name] = view
        changed |= {name: None for name in self._cluster if name not in cluster}
        self._cluster = cluster
        self._twice = tuple(cut_short(twice, self._limits.problems))
        return changed

    # ----------------------------------------------------------------------------------------------- watching

    async def updates(self, *, debounce_ms: int = 50, rescan_seconds: float = 60) -> AsyncGenerator[Update, None]:
        """Every change from now on; first everything, unless `read` has delivered it already.

        Events that follow each other within `debounce_ms` become one Update. Everything is looked at again every
        `rescan_seconds`, events or not. Close the generator (`contextlib.aclosing`) to end the watch.
        """
        told: tuple[Problem, ...] | None = None if self._first else self._problems
        async with DirectoryWatch(debounce_ms) as watch:
            while True:
                # Watch first, then look: what happens in between is seen by the look or by the watch.
                await watch.follow(self._spots())
                self._watch_fault = watch.fault
                update = await asyncio.to_thread(self.read)
                moved = await watch.follow(self._spots())
                if update.changed or update.problems != told:
                    told = update.problems
                    yield update
                if watch.fault:
                    await asyncio.sleep(_UNWATCHED_SECONDS)
                elif not moved:
                    await watch.wait(_PENDING_SECONDS if self._pending else rescan_seconds)

    def _spots(self) -> Spots:
        directories = [
            str(Path(path).absolute()) for path in self._paths if path in self._listings or Path(path).is_dir()
        ]
        files = [str(Path(path).absolute()) for path in self._paths if path not in self._listings]
        return spots_of(files + [str(Path(link).absolute()) for link in self._links], directories)


def _wanted(entry: "os.DirEntry[str]") -> bool:
    return entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".") and not entry.is_dir()


def _read_chunk(
    digest: bytes,
    chunk: bytes,
    json: bool,
    budget: Budget,
    earlier: dict[tuple[str, ObjectName | None], Reading],
) -> Chunk:
    """The objects of a chunk with the lines of their faults; DocumentError when it cannot be read."""

    def convert(line: int, value: Any, kind: str) -> Row | None:
        reading = read_object(value, kind)
        if reading is None:
            return None
        known = earlier.get((reading.kind, reading.name))
        if known == reading:
            reading = known
        if not json or not reading.faults:
            return Row(line, reading)
        found = field_lines(bytes(value), {(0, field) for field, _ in reading.faults})
        return Row(line, reading, tuple(line + found[0, field] for field, _ in reading.faults))

    try:
        rows = objects(chunk, json, budget, convert)
    except DocumentError:
        raise
    except Exception as error:  # whatever it is, it must not take the agent down, nor the other files
        raise DocumentError(0, f"internal error: {type(error).__name__}: {error}") from error
    if not json and any(row.reading.faults for row in rows):
        wanted = {(row.line, field) for row in rows for field, _ in row.reading.faults}
        found = field_lines(chunk, wanted)
        rows = [
            Row(row.line, row.reading, tuple(found[row.line, field] for field, _ in row.reading.faults)) for row in rows
        ]
    return Chunk(digest, tuple(rows))


def _give_back_memory() -> None:
    """What reading a large file took goes back to the system (glibc would keep it)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
