"""Two runs side by side: `python -m bench compare A B`. Refused when they are of unlike machines."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .figures import seconds, summarize
from .records import Key, Records

ALIKE = ("kernel", "machine", "python", "cpu", "cpus", "emulated", "tools")
"""What two runs must share before their figures may stand side by side."""
SAME = 0.10
"""Medians of the same thing on the same machine differ by less than this, or the machine was noisy."""


class Unlike(Exception):
    """The runs were made on different machines."""


class Line(NamedTuple):
    """One thing that both runs measured."""

    key: Key
    before: float
    after: float
    unit: str

    @property
    def change(self) -> float:
        """0.1: ten per cent more than before."""
        return self.after / self.before - 1 if self.before else 0.0


def find(path: Path) -> Path:
    """A file of records, or the newest in a folder."""
    if path.is_file():
        return path
    files = sorted(path.glob("*.jsonl*"))
    if not files:
        raise FileNotFoundError(f"no file of records in {path}")
    return files[-1]


def insist_alike(before: Records, after: Records, fields: Sequence[str] = ALIKE) -> None:
    """Unlike when two runs must not stand side by side."""
    other = [each for each in fields if before.metadata.get(each) != after.metadata.get(each)]
    if other:
        told = "; ".join(f"{each}: {before.metadata.get(each)} and {after.metadata.get(each)}" for each in other)
        raise Unlike(f"these runs were made on unlike machines: {told}")


def join(runs: Sequence[Records]) -> Records:
    """Sittings of one machine and one commit as one run: what several have measured has the samples of all."""
    first, *others = runs
    joined = Records()
    joined.metadata = first.metadata
    for each in runs:
        if each in others:
            insist_alike(first, each, (*ALIKE, "commit"))
        for key, samples in each.samples.items():
            joined.add_all(key, samples, each.units[key], calculated=key in each.calculated)
        joined.failures += each.failures
        joined.calibrations += each.calibrations
        joined.loads += each.loads
    return joined


def compare(before: Records, after: Records) -> list[Line]:
    """What both have measured; Unlike when that means nothing."""
    insist_alike(before, after)
    return [
        Line(key, summarize(samples).median, summarize(after.samples[key]).median, before.units[key])
        for key, samples in before.samples.items()
        if key in after.samples and key not in before.calculated and key not in after.calculated
    ]


def as_text(before: Records, after: Records) -> str:
    """The ratios, and whether they can be believed."""
    lines = compare(before, after)
    told = [f"  {'ratio':>7} {'before':>10} {'after':>10}  what"]
    for line in lines:
        first, second = (
            seconds(value) if line.unit == "s" else f"{value:.4g} {line.unit}" for value in (line.before, line.after)
        )
        mark = "" if abs(line.change) <= SAME else " !"
        told.append(f"  {1 + line.change:7.2f} {first:>10} {second:>10}  {', '.join(map(str, line.key))}{mark}")
    apart = sum(abs(line.change) > SAME for line in lines)
    told.append(f"{len(lines)} figures; {apart} differ by more than {SAME:.0%} (!)")
    for name, records in (("before", before), ("after", after)):
        verdict = records.verdict()
        told.append(
            f"{name}: commit {records.metadata['commit']}; {'NOISY' if verdict.noisy else 'quiet'}: {verdict.words}"
        )
    if apart and any(records.verdict().noisy for records in (before, after)):
        told.append("The machine was noisy: differences may be its doing.")
    return "\n".join(told) + "\n"
