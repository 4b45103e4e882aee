"""What was measured: every raw sample as a JSON line, and the table that people read."""

import datetime
import gzip
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from .figures import ratio, seconds, summarize
from .noise import Verdict, calibrate, judge


class Key(NamedTuple):
    """What a sample is a sample of."""

    case: str
    size: int
    part: str
    contender: str


class Target(NamedTuple):
    """What is asked: the median of `ours` to that of `base` is `most` at the most, from `least` Services on."""

    case: str
    part: str
    ours: str
    base: str
    most: float
    least: int = 0


class Records:
    """All samples of one run. Baselines are rows of the table like any other.

    `calculated`: keys whose values were not measured but calculated from smaller sizes, as their names say.
    """

    def __init__(self, out: Path | None = None, settings: dict[str, object] | None = None) -> None:
        self.samples: dict[Key, list[float]] = {}
        self.units: dict[Key, str] = {}
        self.calculated: set[Key] = set()
        self.failures: list[str] = []
        self.calibrations: list[float] = []
        self.loads: list[float] = []
        self.metadata: dict[str, Any] = {}
        self.path: Path | None = None
        self._file: TextIO | None = None
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            name = datetime.datetime.now(datetime.UTC).strftime("bench-%Y%m%dT%H%M%SZ.jsonl")
            self.path = out / name
            self._file = self.path.open("w")
        self.metadata = {**metadata(), "settings": settings or {}}
        self._write({"metadata": self.metadata})

    @classmethod
    def read(cls, path: Path) -> "Records":
        """What an earlier run has written, packed by gzip or not."""
        records = cls()
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            for line in file:
                one = json.loads(line)
                if "metadata" in one:
                    records.metadata = one["metadata"]
                elif "failed" in one:
                    records.failures.append(one["failed"])
                elif "calibration" in one:
                    records.calibrations.append(one["calibration"])
                    records.loads.append(one["load"])
                else:
                    key = Key(one["case"], one["size"], one["part"], one["contender"])
                    values = one["values"] if "values" in one else [one["value"]]
                    records.add_all(key, values, one["unit"], calculated=one.get("calculated", False))
        records.path = path
        return records

    def add(self, key: Key, value: float, unit: str = "s", *, calculated: bool = False) -> None:
        """One more sample."""
        self._keep(key, (value,), unit, calculated)
        self._write({**key._asdict(), "value": value, "unit": unit} | ({"calculated": True} if calculated else {}))

    def add_all(self, key: Key, values: Sequence[float], unit: str = "s", *, calculated: bool = False) -> None:
        """More samples, on one line of the file."""
        if values:
            self._keep(key, values, unit, calculated)
            line = {**key._asdict(), "values": list(values), "unit": unit}
            self._write(line | ({"calculated": True} if calculated else {}))

    def _keep(self, key: Key, values: Iterable[float], unit: str, calculated: bool) -> None:
        self.samples.setdefault(key, []).extend(values)
        self.units[key] = unit
        if calculated:
            self.calculated.add(key)

    def fail(self, what: str) -> None:
        """A contender failed, so the run has."""
        self.failures.append(what)
        self._write({"failed": what})

    def calibrate(self) -> None:
        """See how quiet the machine is now."""
        took, load = calibrate(), os.getloadavg()[0]
        self.calibrations.append(took)
        self.loads.append(load)
        self._write({"calibration": took, "load": load})

    def verdict(self) -> Verdict:
        """Whether the machine was quiet enough."""
        return judge(self.calibrations, self.loads, self.metadata.get("cpus"))

    def close(self) -> None:
        """End the file."""
        if self._file is not None:
            self._file.close()

    def _write(self, line: dict[str, object]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()


TOOLS = {
    "nft": ["nft", "--version"],
    "iptables": ["iptables", "--version"],
    "ipvsadm": ["ipvsadm", "--version"],
}


def metadata() -> dict[str, object]:
    """What decides whether two runs may be compared."""
    with Path("/proc/cpuinfo").open() as lines:
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    with Path("/proc/meminfo").open() as lines:
        memory = int(next(line.split()[1] for line in lines if line.startswith("MemTotal:"))) // 1024
    commit = _first_line(["git", "-c", "safe.directory=*", "describe", "--always", "--dirty"])
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cpu": model,
        "cpus": os.cpu_count(),
        "memory": memory,
        "emulated": os.environ.get("DATAPLANE_GUEST") == "1",
        "commit": commit or "unknown",
        "tools": {name: _first_line(command) or "not here" for name, command in TOOLS.items()},
        "load": os.getloadavg(),
    }


def _first_line(command: list[str]) -> str:
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return (asked.stdout.splitlines() or [""])[0].strip()


def place(about: dict[str, Any]) -> str:
    """Where a run was made, in words."""
    where = "micro-VM, emulated" if about.get("emulated") else "this machine's own kernel"
    return f"kernel {about['kernel']} ({where}), {about['cpus']} × {about['cpu']}, Python {about['python']}"


Bases = Mapping[str, str | Callable[[str], str]]
"""The contender that the others of a case are compared with; or what says it for each contender."""


def base_of(key: Key, bases: Bases) -> str:
    """The contender that another one is compared with; "" = none."""
    base = bases.get(key.case, "")
    return base if isinstance(base, str) else base(key.contender)


def table(records: Records, bases: Bases, targets: tuple[Target, ...]) -> str:
    """One block for each case, size and part; ratios to the block's base first."""
    blocks: dict[tuple[str, int, str], list[Key]] = {}
    for key in records.samples:
        blocks.setdefault(key[:3], []).append(key)
    lines = []
    for (case, size, part), keys in blocks.items():
        common = {base_of(key, bases) for key in keys}
        title = f"{case}, {size} Services" + (f", {part}" if part else "")
        lines += ["", title + (f" (ratio to {common.pop()})" if len(common) == 1 and all(common) else "")]
        lines.append(f"  {'ratio':>8} {'median':>10} {'spread':>7} {'p99':>10} {'n':>5}  what")
        for key in keys:
            samples, unit = records.samples[key], records.units[key]
            base = records.samples.get(key._replace(contender=base_of(key, bases)))
            summary = summarize(samples)
            notes = []
            for asked in targets:
                other = records.samples.get(Key(case, size, part, asked.base))
                if asked[:3] == (case, part, key.contender) and size >= asked.least and other:
                    found = ratio(samples, other)
                    verdict = "met" if found <= asked.most else "MISSED"
                    notes.append(f"   {found:.3g} × {asked.base}; target ≤ {asked.most:g}: {verdict}")
            note = "".join(notes)
            show = seconds if unit == "s" else lambda value, unit=unit: f"{value:.4g} {unit}"
            share = f"{ratio(samples, base):8.2f}" if base else " " * 8
            lines.append(
                f"  {share} {show(summary.median):>10} {'±' + format(summary.spread, '.0%'):>7}"
                f" {show(summary.p99):>10} {summary.samples:>5}  {key.contender}{note}"
            )
    return "\n".join(lines) + "\n"
