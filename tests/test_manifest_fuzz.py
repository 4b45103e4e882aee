"""100,000 mutated manifests: no crash, no uncaught exception, bounded time and memory, healthy objects unaffected."""

import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.fuzz_manifests import run

BATCH = 1000


def check(cases: int, workers: int) -> None:
    begin = time.monotonic()
    # Not forked: a fault in libyaml shall show as a broken pool, and the parent's memory count for nothing.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        firsts = range(0, cases, BATCH)
        tallies = list(pool.map(run, firsts, [min(BATCH, cases)] * len(firsts)))
    figures = {
        "cases": sum(tally.cases for tally in tallies),
        "with problems": sum(tally.reported for tally in tallies),
        "slowest case, seconds": round(max(tally.slowest for tally in tallies), 4),
        "most memory a batch added, kB": max(tally.growth_kb for tally in tallies),
        "seconds": round(time.monotonic() - begin, 1),
    }
    print(json.dumps(figures))
    failures = [failure for tally in tallies for failure in tally.failures]
    assert failures == []
    assert figures["slowest case, seconds"] < 2
    assert figures["most memory a batch added, kB"] < 64 << 10


def test_two_thousand_mutated_manifests() -> None:
    check(2_000, 1)


@pytest.mark.slow
def test_a_hundred_thousand_mutated_manifests() -> None:
    check(100_000, 2)
