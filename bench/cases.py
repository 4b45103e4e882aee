"""The cases that compare all modes on one kernel: baseline, operations, the agent, traffic, and the parts alone."""

import argparse
import subprocess
from collections.abc import Callable
from pathlib import Path

from . import api, end_to_end, kube_proxy, operations, parts, traffic
from .contenders import CONTENDERS
from .isolation import RunFailed, isolated
from .progress import Progress
from .raw import PlainSocket
from .records import Key, Records
from .stopwatch import measured
from .variants import VARIANTS, available, has_ipvs
from .workload import ENDPOINTS

EMPTY = bytes((16, 0, 0, 0, 1, 0, 5, 0)) + bytes(8)
"""NLMSG_NOOP that asks for an ACK."""


class Wanted(argparse.Namespace):
    """What these cases read of the command line."""

    sizes: list[int]
    agent_sizes: list[int]
    endpoints: list[int]
    rounds: int
    changes: int
    seconds: float
    patience: float
    rate: float
    seed: int
    contenders: list[str]
    quick: bool
    kube_proxy: Path | None
    kubeconfig: Path | None

    def as_record(self) -> dict[str, object]:
        """For the first line of the results."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}


def baseline(settings: Wanted, records: Records, progress: Progress) -> None:
    """What the machine takes for the least there is, with nothing of anybody's in the kernel."""
    progress.say("baseline: an empty kernel")

    def ask() -> list[float]:
        sock = PlainSocket(0)
        return [measured(lambda: sock.ask(EMPTY)).wall for _ in range(1000)]

    def start() -> list[float]:
        return [measured(lambda: subprocess.run(["true"], check=True)).wall for _ in range(50)]

    records.add_all(Key("baseline", 0, "", "a netlink request without a meaning, and its ACK"), isolated(ask))
    records.add_all(Key("baseline", 0, "", "a process that does nothing"), isolated(start))


def modes(settings: Wanted, records: Records, progress: Progress) -> None:
    """Every operation by everybody."""
    plan = operations.Plan(
        settings.sizes,
        settings.endpoints,
        settings.rounds,
        settings.patience,
        operations.Task(
            0,
            seed=settings.seed,
            most=settings.changes,
            patience=settings.seconds,
            rate=settings.rate,
            churn=1.0 if settings.quick else 3.0,
        ),
        settings.contenders or [each.name for each in CONTENDERS if not (settings.quick and each.single)],
    )
    here = [each.name for each in available()]
    if absent := [each.name for each in VARIANTS if each.name not in here]:
        progress.say(f"modes: this kernel has no IPVS, so not {' and not '.join(absent)}")
    operations.measure(plan, here, records, progress.say, progress.step)


def agents(settings: Wanted, records: Records, progress: Progress) -> None:
    """The agent in every mode, at the two largest sizes."""
    for size in sorted(settings.agent_sizes)[-2:]:
        for variant in available():
            progress.say(f"end-to-end: {size:,} Services, {variant.name}")
            records.calibrate()
            try:
                found = end_to_end.run(variant, size, max(3, settings.changes // 20))
            except RunFailed as error:
                records.fail(f"end-to-end, {size}, {variant.name}: {error}")
                continue
            for name, (values, unit) in found.items():
                records.add_all(Key("end-to-end", size, name, variant.name), values, unit)
        progress.step()


def connections(settings: Wanted, records: Records, progress: Progress) -> None:
    """New connections: without any mode, then through each with few Services and with many."""
    count, seconds = 2 * settings.changes, 0.2 if settings.quick else 1.0
    progress.say("traffic: nothing in the kernel")
    _seen(records, 0, traffic.NOTHING, traffic.bare(count, seconds))
    for size in settings.agent_sizes:
        for variant in available():
            progress.say(f"traffic: {size:,} Services, {variant.name}")
            records.calibrate()
            try:
                _seen(records, size, variant.name, traffic.through(variant, size, count, seconds))
            except RunFailed as error:
                records.fail(f"traffic, {size}, {variant.name}: {error}")
        progress.step()


def _seen(records: Records, size: int, who: str, seen: traffic.Seen) -> None:
    for place, samples in seen.connect.items():
        records.add_all(Key("traffic", size, f"connect, {place}", who), samples)
    for place, samples in seen.first_byte.items():
        records.add_all(Key("traffic", size, f"first byte, {place}", who), samples)
    records.add_all(Key("traffic", size, "connections", who), seen.rate, "/s")


def alone(settings: Wanted, records: Records, progress: Progress) -> None:
    """Reading, deciding, planning, encoding, without a kernel."""
    size = max(settings.sizes)
    progress.say(f"parts: {size:,} Services")
    for name, values in isolated(lambda: parts.run(size, settings.rounds)).items():
        records.add_all(Key("parts", size, "for each Service", name), values)


def over_the_api(settings: Wanted, records: Records, progress: Progress) -> None:
    """The agent with a Kubernetes API as its source, in nftables mode, at the largest size."""
    size = max(settings.agent_sizes)
    progress.say(f"api: {size:,} Services")
    records.calibrate()
    try:
        found = api.run(size, settings.changes, settings.seed)
    except RunFailed as error:
        records.fail(f"api, {size}: {error}")
        return
    for name, (values, unit) in found.items():
        records.add_all(Key("api", size, name, "nftables"), values, unit)


def real_kube_proxy(settings: Wanted, records: Records, progress: Progress) -> None:
    """kube-proxy with the Services of a cluster, where both were given."""
    if settings.kube_proxy is None or settings.kubeconfig is None:
        return
    modes = [mode for mode in kube_proxy.MODES if mode != "ipvs" or has_ipvs()]
    for mode in modes:
        progress.say(f"kube-proxy: {mode}")
        records.calibrate()
        try:
            found = kube_proxy.run(settings.kube_proxy, settings.kubeconfig, mode)
        except RunFailed as error:
            records.fail(f"kube-proxy, {mode}: {error}")
            continue
        for part, value, unit in (
            ("start to first sync", found.start, "s"),
            ("first sync, by its own clock", found.sync, "s"),
            ("resident memory, most", found.memory, "MiB"),
        ):
            records.add(Key("kube-proxy", found.services, part, mode), value, unit)


MORE_CASES: dict[str, Callable[[Wanted, Records, Progress], None]] = {
    "baseline": baseline,
    "modes": modes,
    "end-to-end": agents,
    "traffic": connections,
    "parts": alone,
    "api": over_the_api,
    "kube-proxy": real_kube_proxy,
}


def steps(case: str, settings: Wanted) -> int:
    """How often a case says that a step is done, and once more at its end."""
    sizes, agents = len(settings.sizes), len(settings.agent_sizes)
    usual = sizes if ENDPOINTS in settings.endpoints else 0
    others = sum(each != ENDPOINTS for each in settings.endpoints)
    each = {"modes": settings.rounds * (usual + others), "end-to-end": min(2, agents), "traffic": agents}
    return each.get(case, 0) + 1
