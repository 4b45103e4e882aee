"""What a look costs when nothing has changed, and what reading and deciding cost: no floor, plain figures."""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from dataplane.desired import Desired
from dataplane.manifest_files import ManifestFiles
from dataplane.plan import diff

from . import workload
from .isolation import RunFailed, isolated
from .programming import family_id, prepared_reconciler
from .raw import flush_ipvs

Seconds = dict[str, float]


def run(size: int) -> Seconds:
    """Each figure once."""

    def work() -> Seconds:
        found = _kernel(size)
        flush_ipvs(family_id())
        return found | _reading(size)

    return isolated(work)


def _clock(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _kernel(size: int) -> Seconds:
    found: Seconds = {}
    reconciler = prepared_reconciler(size)
    if reconciler.sync("bench").result != "committed":
        raise RunFailed("the first sync failed")
    found["observe"] = _clock(reconciler.backend.observe)
    found["intact"] = _clock(reconciler.backend.intact)
    cpu = time.process_time()
    found["verify, nothing to do"] = _clock(lambda: _unchanged(reconciler.verify("bench").result))
    found["verify, CPU"] = time.process_time() - cpu
    found["full diff in memory"] = _clock(lambda: diff(reconciler.held, reconciler.desired.servers))
    found["full sync in memory"] = _clock(lambda: _unchanged(reconciler.sync("bench").result))
    return found


def _unchanged(result: str) -> None:
    if result != "unchanged":
        raise RunFailed(f"nothing had changed, and yet it ended {result}")


def _reading(size: int) -> Seconds:
    found: Seconds = {}
    update = workload.update(size)
    found["desired.update"] = _clock(lambda: Desired(workload.RULES).update(update))
    with TemporaryDirectory() as folder:
        for name, write in (("services.json", workload.write_manifests), ("services.yaml", workload.write_yaml)):
            path = Path(folder, name)
            write(size, path)
            files = ManifestFiles([path])
            found[f"read {path.suffix[1:].upper()}"] = _clock(lambda files=files: _all_read(files, size))  # type: ignore[misc]
    return found


def _all_read(files: ManifestFiles, size: int) -> None:
    read = files.read()
    if len(read.changed) != size or read.problems:
        raise RunFailed(f"{len(read.changed)} Services of {size} read; {read.problems[:1]}")
