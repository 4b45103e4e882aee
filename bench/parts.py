"""The parts of this program alone, without a kernel: reading, deciding, planning, encoding; for each Service."""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from dataplane.desired import Desired
from dataplane.ipvs_messages import NEW_DEST, Encoder
from dataplane.manifest_files import ManifestFiles
from dataplane.model import ObjectName, Update
from dataplane.plan import State, diff

from . import workload
from .isolation import RunFailed
from .variants import RULES

FAMILY = 34
"""Any number does: nothing is sent."""


def run(size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a Service, several times each."""
    found: dict[str, list[float]] = {}

    def clocked(what: str, each: int, work: Callable[[], object]) -> None:
        for _ in range(rounds):
            began = time.perf_counter()
            work()
            found.setdefault(what, []).append((time.perf_counter() - began) / each)

    update, servers = workload.update(size), workload.servers(size)
    held = State(servers)
    wanted = {server.at: server for server in servers}
    one = servers[0].at
    encoder = Encoder(FAMILY)
    clocked("decide: Services to virtual servers", size, lambda: Desired(RULES).update(update))
    desired = Desired(RULES)
    desired.update(update)
    small = Update({ObjectName("bench", "service-0"): workload.view(0)})
    clocked("decide: one Service again", 1000, lambda: [desired.update(small) for _ in range(1000)])
    clocked("plan: everything new", size, lambda: diff(State(), wanted))
    clocked("plan: nothing differs", size, lambda: diff(held, wanted))
    clocked("plan: one Service", 1000, lambda: [diff(held, wanted, [one]) for _ in range(1000)])
    clocked(
        "encode: ipvs, real servers",
        size,
        lambda: [encoder.real(NEW_DEST, server, real) for server in servers for real in server.real_servers],
    )
    with TemporaryDirectory() as folder:
        for name, write in (("services.json", workload.write_manifests), ("services.yaml", workload.write_yaml)):
            path = Path(folder, name)
            write(size, path)

            def read(path: Path = path) -> None:
                if len(ManifestFiles([path]).read().changed) != size:
                    raise RunFailed(f"{path.name} was not read whole")

            clocked(f"load: {path.suffix[1:].upper()}", size, read)
    return found
