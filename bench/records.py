"""What was measured: every raw sample as a JSON line, and the table that people read."""

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import NamedTuple, TextIO

from .figures import ratio, seconds, summarize


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
    """All samples of one run. Baselines are rows of the table like any other."""

    def __init__(self, out: Path | None = None) -> None:
        self.samples: dict[Key, list[float]] = {}
        self.units: dict[Key, str] = {}
        self.failures: list[str] = []
        self._file: TextIO | None = None
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            name = datetime.datetime.now(datetime.UTC).strftime("bench-%Y%m%dT%H%M%SZ.jsonl")
            self._file = (out / name).open("w")
            self._write({"metadata": metadata()})

    def add(self, key: Key, value: float, unit: str = "s") -> None:
        """One more sample."""
        self.samples.setdefault(key, []).append(value)
        self.units[key] = unit
        self._write({**key._asdict(), "value": value, "unit": unit})

    def fail(self, what: str) -> None:
        """A contender failed, so the run has."""
        self.failures.append(what)
        self._write({"failed": what})

    def close(self) -> None:
        """End the file."""
        if self._file is not None:
            self._file.close()

    def _write(self, line: dict[str, object]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()


def metadata() -> dict[str, object]:
    """What decides whether two runs may be compared."""
    with Path("/proc/cpuinfo").open() as lines:
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    asked = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cpu": model,
        "cpus": os.cpu_count(),
        "emulated": os.environ.get("DATAPLANE_GUEST") == "1",
        "commit": asked.stdout.strip() or "unknown",
        "load": os.getloadavg(),
    }


def table(records: Records, bases: dict[str, str], targets: tuple[Target, ...]) -> str:
    """One block for each case, size and part; ratios to the block's base first."""
    blocks: dict[tuple[str, int, str], list[Key]] = {}
    for key in records.samples:
        blocks.setdefault(key[:3], []).append(key)
    lines = []
    for (case, size, part), keys in blocks.items():
        base_key = Key(case, size, part, bases.get(case, ""))
        base = records.samples.get(base_key)
        title = f"{case}, {size} Services" + (f", {part}" if part else "")
        lines += ["", title + (f" (ratio to {base_key.contender})" if base else "")]
        lines.append(f"  {'ratio':>8} {'median':>10} {'spread':>7} {'p99':>10} {'n':>5}  what")
        for key in keys:
            samples, unit = records.samples[key], records.units[key]
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
