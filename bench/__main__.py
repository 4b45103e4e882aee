"""`python -m bench`: measure, show a table, keep every sample."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import (
    changes,
    compare,
    contenders,
    daemon,
    histograms,
    iptables_programming,
    kinds,
    looking,
    names,
    nft_programming,
    probe,
    programming,
    report,
    summary,
    top,
)
from .aims import aims
from .aims import as_text as aims_text
from .cases import MORE_CASES, Wanted, steps
from .isolation import RunFailed, isolated
from .programming import family_id
from .progress import Progress
from .records import Bases, Key, Records, Target, place, table
from .stopwatch import Spent

TARGETS: tuple[Target, ...] = (
    Target("program", "ipvs", "dataplane", "raw replay", 1.5, 10_000),
    Target("program", "ipvs", "dataplane", "ipvsadm -R", 1 / 20, 10_000),
    Target("program", "vips", "dataplane", "raw replay", 1.2, 10_000),
    Target("change", "weight", "to ACK", "floor", 2.0),
    Target("change", "replace", "to ACK", "floor", 2.0),
)
TARGETS += tuple(
    Target(case, part, "dataplane", base, most, least)
    for case, base, most, least in (
        ("nftables", "raw replay", 2.0, 10_000),
        ("nftables", "nft -f, a chain each", 1 / 30, 10_000),
        ("iptables-legacy", "by hand", 1.15, 0),
        ("iptables-nft", "by hand", 1.15, 0),
    )
    for part in ("full", "full, processor time", "change", "change, processor time")
)
TARGETS += tuple(
    Target("kinds", mode, kind.name, kinds.PLAIN.name, 1.5, 10_000)
    for mode in ("nftables", "ipvs")
    for kind in kinds.KINDS
    if kind is not kinds.PLAIN
)
HIT_TARGET, READING_TARGET = 200e-9, 5e-3
"""Seconds."""
TARGETS += tuple(
    Target("probe", "hit", f"{body}: a hit over an empty probe", "the target", 1.0) for body in ("nat", "ipvs")
)
TARGETS += (
    Target("probe", "reading", "dataplane", "the target", 1.0, 30_000),
    *(
        Target("probe", f"connection, {mode}, processor time", contender, "without", most)
        for mode in ("nftables", "ipvs")
        # the first is what is asked, and drowns where samples differ by more; the kernel's own measure never does
        for contender, most in (("with the probe", 1.02), ("the probe's own", 0.02))
    ),
)
BASES: Bases = {
    "modes": contenders.base,
    "program": "raw replay",
    "change": "floor",
    "nftables": "raw replay",
    "iptables-legacy": "by hand",
    "iptables-nft": "by hand",
    "kinds": kinds.PLAIN.name,
    "probe": "without",
}


class Settings(Wanted):
    """The command line."""

    only: list[str]
    idle: float
    contenders: list[str]
    quick: bool
    out: Path | None


_progress = Progress(0)


def say(text: str) -> None:
    """Progress."""
    _progress.say(text)


def measure_programming(settings: Settings, records: Records) -> None:
    """Contenders take turns, round by round; slow ones have one round."""
    for size in settings.sizes:
        for turn in range(settings.rounds):
            for contender in programming.CONTENDERS:
                if settings.contenders and contender.name not in settings.contenders:
                    continue
                if size > contender.most or (contender.slow and turn > 0):
                    continue
                say(f"program: {size} Services, round {turn + 1}, {contender.name}")
                try:
                    spent = programming.run(contender, size)
                except RunFailed as error:
                    records.fail(f"program, {size}, {contender.name}: {error}")
                    continue
                for part in contender.covers:
                    records.add(Key("program", size, part, contender.name), spent[part])
        _extrapolate(records, size)


def _extrapolate(records: Records, size: int) -> None:
    """What is too slow for a size is shown as calculated from the largest it was measured at, and marked so."""
    for contender in programming.CONTENDERS:
        known = [key for key in records.samples if key.case == "program" and key.contender == contender.name]
        if size > contender.most and known:
            source = max(known, key=lambda key: key.size)
            mark = f"{contender.name} (calculated from {source.size})"
            records.add(Key("program", size, source.part, mark), min(records.samples[source]) * size / source.size, "s")


def measure_changes(settings: Settings, records: Records) -> None:
    """Both kinds of change at each size."""
    for size in settings.sizes:
        for kind in changes.KINDS:
            say(f"change: {kind.name}, {settings.changes} times among {size} Services")
            try:
                samples = changes.run(kind, size, settings.changes)
            except RunFailed as error:
                records.fail(f"change, {size}, {kind.name}: {error}")
                continue
            for name, values in samples.items():
                for value in values:
                    records.add(Key("change", size, kind.name, name), value)


def measure_looking(settings: Settings, records: Records) -> None:
    """Reading, deciding, looking."""
    for size in settings.sizes:
        for turn in range(min(settings.rounds, 3)):
            say(f"look: {size} Services, round {turn + 1}")
            try:
                found = looking.run(size)
            except RunFailed as error:
                records.fail(f"look, {size}: {error}")
                continue
            for name, value in found.items():
                records.add(Key("look", size, "", name), value)


def measure_daemon(settings: Settings, records: Records) -> None:
    """The agent as a process, at the largest size."""
    size = max(settings.sizes)
    say(f"agent: {size} Services, {settings.idle:g} s idle")
    try:
        found = daemon.run(size, settings.idle)
    except RunFailed as error:
        records.fail(f"agent, {size}: {error}")
        return
    for name, (value, unit) in found.items():
        records.add(Key("agent", size, "", name), value, unit)


def measure_nftables(settings: Settings, records: Records) -> None:
    """Full programming by all contenders in turns, then changes of one Service."""
    for size in settings.sizes:
        for turn in range(settings.rounds):
            for name, run in nft_programming.CONTENDERS.items():
                if turn == 0 or name not in nft_programming.SLOW:
                    say(f"nftables: {size} Services, round {turn + 1}, {name}")
                    _spend(records, Key("nftables", size, "full", name), partial(run, size))
        say(f"nftables: one of {size} Services changes, {settings.changes} times")
        try:
            for value in nft_programming.change(size, settings.changes):
                records.add(Key("nftables", size, "change", "to ACK"), value)
        except RunFailed as error:
            records.fail(f"nftables, {size}, change: {error}")


def measure_iptables(settings: Settings, records: Records) -> None:
    """Each back end: full programming in turns, then changes of one Service in turns."""
    hands = (iptables_programming.HAND, iptables_programming.OURS)
    for tool in iptables_programming.TOOLS:
        case = f"iptables-{tool}"
        for size in settings.sizes:
            for turn in range(min(settings.rounds, 3)):
                once = (iptables_programming.ONE_SECTION,) if (tool, turn) == ("nft", 0) and size <= _QUADRATIC else ()
                for name in (*hands, *once):
                    say(f"{case}: {size} Services, round {turn + 1}, {name}")
                    key = Key(case, size, "full", name)
                    _spend(records, key, partial(iptables_programming.full, tool, size, name))
            count = max(5, settings.changes // 20)
            say(f"{case}: one of {size} Services changes, {count} times by each")
            try:
                for name, samples in iptables_programming.change(tool, size, count).items():
                    for spent in samples:
                        _note(records, Key(case, size, "change", name), spent)
            except RunFailed as error:
                records.fail(f"{case}, {size}, change: {error}")


def _modes(case: str) -> list[str]:
    """nftables, and ipvs where this kernel has it."""
    try:
        isolated(family_id)
    except (RunFailed, OSError):
        say(f"{case}: this kernel has no IPVS, so nftables mode only")
        return ["nftables"]
    return ["nftables", "ipvs"]


def measure_kinds(settings: Settings, records: Records) -> None:
    """Every kind of Service, in turns, in the modes this kernel has."""
    size = max(settings.sizes)
    for mode in _modes("kinds"):
        for turn in range(settings.rounds):
            for kind in kinds.KINDS:
                say(f"kinds: {mode}, {size} Services, round {turn + 1}, {kind.name}")
                try:
                    for value in kinds.run(mode, kind, size, settings.changes):
                        records.add(Key("kinds", size, mode, kind.name), value)
                    for value in kinds.floor(mode, kind, size, settings.changes):
                        records.add(Key("kinds", size, mode, f"{kind.name}: floor"), value)
                except RunFailed as error:
                    records.fail(f"kinds, {mode}, {size}, {kind.name}: {error}")


def measure_probe(settings: Settings, records: Records) -> None:
    """Hits, readings and starts; then connections in the modes this kernel has."""
    for size in (1, *settings.sizes, 3 * max(settings.sizes)):
        say(f"probe: hits and readings of {size} backends")
        try:
            hits, read = probe.cost(size, 4 * settings.rounds), probe.reading(size, 4 * settings.rounds)
        except RunFailed as error:
            records.fail(f"probe, {size}: {error}")
            continue
        records.add(Key("probe", size, "hit", "the target"), HIT_TARGET)
        for name, values in hits.items():
            for value in values:
                records.add(Key("probe", size, "hit", name), value)
        records.add(Key("probe", size, "reading", "the target"), READING_TARGET)
        for value in read:
            records.add(Key("probe", size, "reading", "dataplane"), value)
    for _ in range(settings.rounds):
        say("probe: a start")
        name, value = probe.starting()
        records.add(Key("probe", 0, "start", name), value)
    for mode in _modes("probe"):
        say(f"probe: connections in {mode} mode")
        try:
            found_here = probe.connecting(mode, 4 * settings.rounds, 10 * settings.changes)
        except RunFailed as error:
            records.fail(f"probe, connections, {mode}: {error}")
            continue
        for contender, samples in (("without", found_here.without), ("with the probe", found_here.with_probe)):
            for spent in samples:
                _note(records, Key("probe", 1, f"connection, {mode}", contender), spent)
        part = f"connection, {mode}, processor time"
        records.add(Key("probe", 1, part, "the probe's own"), found_here.probe)
        say(f"probe: attached by {found_here.hook}")


def measure_top(settings: Settings, records: Records) -> None:
    """A look on the screen of `dataplane top`."""
    for size in settings.sizes:
        say(f"top: {size} Services")
        for part, values in top.run(size).items():
            for value in values:
                records.add(Key("top", size, "", part), value)


def measure_dns(settings: Settings, records: Records) -> None:
    """Answers to names of Services."""
    for size in settings.sizes:
        say(f"dns: {size} Services")
        try:
            found = names.run(size, 5 * settings.seconds)
        except RunFailed as error:
            records.fail(f"dns, {size}: {error}")
            continue
        for part, (values, unit) in found.items():
            records.add_all(Key("dns", size, part, "dataplane"), values, unit)


_QUADRATIC = 3000
"""Services beyond which the tool takes minutes for one section."""


def _spend(records: Records, key: Key, run: Callable[[], Spent]) -> None:
    try:
        _note(records, key, run())
    except RunFailed as error:
        records.fail(f"{', '.join(map(str, key))}: {error}")


def _note(records: Records, key: Key, spent: Spent) -> None:
    records.add(key, spent.wall)
    records.add(key._replace(part=f"{key.part}, processor time"), spent.cpu)


def _more(name: str) -> Callable[[Settings, Records], None]:
    """A case of `cases`, with the progress of this run."""
    return lambda settings, records: MORE_CASES[name](settings, records, _progress)


IPVS_CASES = ("program", "change", "look", "agent")
"""Of ipvs mode, and for kernels that have it."""
CASES: dict[str, Callable[[Settings, Records], None]] = {
    "program": measure_programming,
    "change": measure_changes,
    "look": measure_looking,
    "agent": measure_daemon,
    "nftables": measure_nftables,
    "iptables": measure_iptables,
    "kinds": measure_kinds,
    "probe": measure_probe,
    "top": measure_top,
    "dns": measure_dns,
}
CASES |= {name: _more(name) for name in MORE_CASES}
COMPARISON = tuple(MORE_CASES)
"""What is measured unless --only says otherwise: all modes, and the usual tools, on this kernel."""
QUICK = ("baseline", "modes", "traffic")


def read_command_line(arguments: list[str] | None = None) -> Settings:
    """The settings; --quick changes what is not given, and so does an emulated machine."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="What it costs to maintain the rules, in every mode, beside the usual tools.",
        epilog="python -m bench compare A B: two runs of one machine. python -m bench report FILE... --out DIR: the "
        "report of runs made before. How everything is measured: bench/README.md",
    )
    every = {each.name for each in programming.CONTENDERS} | {each.name for each in contenders.CONTENDERS}
    numbers = lambda text: [int(each) for each in text.split(",")]  # noqa: E731
    parser.add_argument(
        "--only", nargs="+", choices=[*CASES, "everything"], default=None, help="cases to measure", metavar="CASE"
    )
    parser.add_argument("--sizes", type=numbers, metavar="N,N", help="numbers of Services")
    parser.add_argument("--agent-sizes", type=numbers, metavar="N,N", help="the same for the agent and its traffic")
    parser.add_argument("--endpoints", type=numbers, metavar="N,N", help="endpoints of each (3; modes: 1, 3 and 50)")
    parser.add_argument("--rounds", type=int, help="rounds of all contenders (3)")
    parser.add_argument("--changes", type=int, help="changes of each kind (300)")
    parser.add_argument("--idle", type=float, help="seconds of idleness watched (60)")
    parser.add_argument("--seconds", type=float, help="repetitions of one operation stop after these (3)")
    parser.add_argument("--patience", type=float, help="longer full programming is calculated, not measured (100 s)")
    parser.add_argument("--rate", type=float, help="changes a second of churn (100; in the micro-VM 20)")
    parser.add_argument("--seed", type=int, default=1, help="draws which Services change (1)")
    parser.add_argument("--contenders", nargs="+", choices=sorted(every), default=[], metavar="NAME")
    parser.add_argument("--kube-proxy", type=Path, metavar="BINARY", help="measure this kube-proxy too")
    parser.add_argument("--kubeconfig", type=Path, metavar="FILE", help="of the cluster whose Services it programs")
    parser.add_argument("--quick", action="store_true", help="under two minutes: one table, one picture")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the report, pictures and every sample")
    settings = parser.parse_args(arguments, Settings())
    if bool(settings.kube_proxy) != bool(settings.kubeconfig):
        parser.error("--kube-proxy and --kubeconfig need each other")
    quick, slow = settings.quick, os.environ.get("DATAPLANE_GUEST") == "1"
    settings.only = settings.only or list(QUICK if quick else COMPARISON)
    if "everything" in settings.only:
        settings.only = list(CASES)
    settings.sizes = settings.sizes or ([30, 300] if quick and slow else [100, 500] if quick else [100, 1000, 10000])
    settings.agent_sizes = settings.agent_sizes or settings.sizes
    settings.endpoints = settings.endpoints or ([3] if quick else [3, 1, 50])
    settings.rounds = settings.rounds or (1 if quick else 3)
    settings.changes = settings.changes or (50 if quick else 300)
    settings.idle = settings.idle or (5 if quick else 60)
    settings.seconds = settings.seconds or (0.3 if quick else 3)
    settings.patience = settings.patience or (3 if quick else 100)
    settings.rate = settings.rate or (20 if slow else 100)
    return settings


def _read(names: list[str]) -> list[Records]:
    return [Records.read(compare.find(Path(name))) for name in names]


def compare_command(arguments: list[str]) -> int:
    """`compare A B`: 0, or 2 when they are of unlike machines."""
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=compare.__doc__)
    parser.add_argument("before", help="file of records, or a folder with one")
    parser.add_argument("after")
    given = parser.parse_args(arguments)
    try:
        print(compare.as_text(*_read([given.before, given.after])))
    except (compare.Unlike, FileNotFoundError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


def report_command(arguments: list[str]) -> int:
    """`report FILE… --out DIR`."""
    parser = argparse.ArgumentParser(prog="python -m bench report", description=report.__doc__)
    parser.add_argument("runs", nargs="+", help="files of records or folders with one; A,B: sittings of one run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    given = parser.parse_args(arguments)
    try:
        runs = [compare.join(_read(each.split(","))) for each in given.runs]
    except (compare.Unlike, FileNotFoundError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print(report.write(runs, given.out, BASES, TARGETS))
    print("".join(f"{summary.as_text(run)}\n{aims_text(aims(run))}\n" for run in runs))
    return 0


def _write_results(records: Records, settings: Settings) -> None:
    """Everything but the samples, which are there already."""
    assert settings.out is not None
    only = ("latency",) if settings.quick else None
    page = report.write([records], settings.out, BASES, TARGETS, only)
    histograms.write(records, settings.out / "samples.hdr.log")
    (settings.out / "table.txt").write_text(table(records, BASES, TARGETS))
    say(f"bench: {page}")


def main() -> int:
    """0: everything was measured; 1: something failed; 2: this kernel cannot do it, or was asked nonsense."""
    global _progress
    given = sys.argv[1:]
    if given[:1] == ["compare"]:
        return compare_command(given[1:])
    if given[:1] == ["report"]:
        return report_command(given[1:])
    settings = read_command_line()
    if os.geteuid() != 0:
        say("bench: root is needed, for network namespaces")
        return 2
    if any(name in IPVS_CASES for name in settings.only):
        try:
            isolated(family_id, quiet=True)
        except (RunFailed, OSError) as error:
            rest = " ".join(sorted(CASES.keys() - set(IPVS_CASES)))
            say(f"bench: a kernel with IPVS is needed, or --only {rest}: {error}")
            return 2
    records = Records(settings.out, settings.as_record())
    began = time.monotonic()
    with Progress(sum(steps(name, settings) for name in settings.only)) as _progress:
        for name in settings.only:
            for _ in range(3):
                records.calibrate()
            try:
                CASES[name](settings, records)
            except RunFailed as error:
                records.fail(f"{name}: {error}")
            _progress.step()
    records.close()
    print(f"{place(records.metadata)}, {records.metadata['commit']}")
    verdict = records.verdict()
    print(f"{'NOISY MACHINE' if verdict.noisy else 'quiet machine'}: {verdict.words}")
    if not settings.quick:
        print(table(records, BASES, TARGETS))
    print(summary.as_text(records))
    print(aims_text(aims(records)))
    for failure in records.failures:
        print(f"FAILED: {failure}")
    if settings.out is not None:
        _write_results(records, settings)
    say(f"bench: {time.monotonic() - began:.0f} s")
    return 1 if records.failures else 0


if __name__ == "__main__":
    sys.exit(main())
