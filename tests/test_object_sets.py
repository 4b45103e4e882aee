"""Random sets with up to 30 % wrong objects: every wrong one is named, no healthy Service is affected.

DATAPLANE_TEST_SETS=100000 runs so many in place of a tenth of them (a minute or two on two idle processors).
"""

import os

import pytest

from tests.fuzz_object_sets import run, run_all

SETS = int(os.environ.get("DATAPLANE_TEST_SETS", "10000"))


def test_three_hundred_sets() -> None:
    tally = run(0, 300)
    assert tally.failures == ()
    assert tally.faults.total() > 300


@pytest.mark.slow
def test_ten_thousand_sets() -> None:
    tally = run_all(SETS, 2)
    print(f"{tally.cases} sets, {tally.faults.total()} wrong objects of {len(tally.faults)} sorts")
    assert tally.failures == ()
    assert len(tally.faults) >= 70  # kinds and fields; several ways to be wrong share a field
