"""What this program is meant to reach, and what a run found: from its records, never from memory."""

from typing import NamedTuple

from . import operations
from .figures import seconds, summarize
from .records import Key, Records

OURS = ("ipvs", "ipvs, routes", "nftables", "iptables-legacy", "iptables-nft")
LARGE = 10_000
SMALL = 1_000


class Aim(NamedTuple):
    """One line: what is asked, what was found ("" = this run did not measure it), whether that is enough."""

    asked: str
    found: str
    met: bool | None


def _median(records: Records, key: Key) -> float | None:
    samples = records.samples.get(key)
    return summarize(samples).median if samples and key not in records.calculated else None


def _ratio(records: Records, asked: str, key: Key, base: Key, most: float) -> Aim:
    ours, floor = _median(records, key), _median(records, base)
    if not ours or not floor:
        return Aim(asked, "", None)
    found = f"{ours / floor:.2f} × ({seconds(ours)} to {seconds(floor)})"
    return Aim(asked, found, ours / floor <= most)


def _most(records: Records, asked: str, key: Key, most: float, *, here: bool = True) -> Aim:
    found = _median(records, key)
    if found is None or not here:
        return Aim(asked, "", None)
    shown = seconds(found) if records.units[key] == "s" else f"{found:.1f} {records.units[key]}"
    return Aim(asked, shown, found <= most)


def _modes(size: int, part: str, who: str) -> Key:
    return Key("modes", size, part, who)


def aims(records: Records) -> list[Aim]:
    """Every aim, in the order of the issue."""
    native = not records.metadata.get("emulated")
    found = [
        _ratio(
            records,
            f"{mode}: full programming of 10,000 × 3 at most 1.5 × its raw replay",
            _modes(LARGE, operations.FULL, mode),
            _modes(LARGE, operations.FULL, f"{mode}: raw replay"),
            1.5,
        )
        for mode in ("nftables", "ipvs")
    ]
    asked = "nftables: one endpoint replaced among 10,000 Services at most 100 µs (median, natively)"
    found.append(_most(records, asked, _modes(LARGE, operations.REPLACE, "nftables"), 100e-6, here=native))
    largest = max((key.size for key in records.samples if key.case == "modes"), default=0)
    for mode in ("nftables", "ipvs"):
        asked = f"{mode}: one endpoint replaced among {largest:,} Services costs at most 1.2 × that among 1,000"
        if largest > SMALL:
            at = (_modes(largest, operations.REPLACE, mode), _modes(SMALL, operations.REPLACE, mode))
            found.append(_ratio(records, asked, *at, 1.2))
    for mode in OURS:
        key = Key("end-to-end", LARGE, "resident memory", mode)
        found.append(_most(records, f"{mode}: the agent's memory with 10,000 × 3 at most 60 MiB", key, 60))
    for mode in OURS:
        key = Key("end-to-end", LARGE, "restart until verified", mode)
        asked = f"{mode}: restart with 10,000 × 3 until verified at most 1 s (natively)"
        found.append(_most(records, asked, key, 1.0, here=native))
    return [each for each in found if each.found]


def as_text(rows: list[Aim]) -> str:
    """A line each."""
    words = {True: "met", False: "MISSED", None: "not measured"}
    return "".join(f"  {words[row.met]:>6}  {row.asked}: {row.found}\n" for row in rows)
