"""What the agent counts of its own work."""

import json

import pytest

from dataplane.figures import BUCKETS, Figures, Histogram


def test_the_buckets_are_kube_proxys() -> None:
    assert len(BUCKETS) == 15
    assert (BUCKETS[0], BUCKETS[1], BUCKETS[-1]) == (0.001, 0.002, 16.384)


@pytest.mark.parametrize(("seconds", "bucket"), [(0.0, 0), (0.001, 0), (0.0011, 1), (16.384, 14), (17.0, 15)])
def test_a_duration_is_in_the_first_bucket_that_is_not_smaller(seconds: float, bucket: int) -> None:
    histogram = Histogram()
    histogram.observe(seconds)
    assert [index for index, count in enumerate(histogram.counts) if count] == [bucket]


def test_quantiles_are_upper_bounds() -> None:
    histogram = Histogram()
    assert histogram.quantile(0.5) is None
    for _ in range(98):
        histogram.observe(0.0015)
    histogram.observe(0.1)
    histogram.observe(99.0)
    assert (histogram.quantile(0.5), histogram.quantile(0.99), histogram.quantile(1.0)) == (0.002, 0.128, 16.384)
    assert histogram.count == 100


def test_syncs_are_full_or_partial_by_their_cause() -> None:
    figures = Figures()
    for cause in ("start", "resync", "change", "drain"):
        figures.sync(cause, "committed", 0.01, 1, 2, 3)
    figures.error()
    assert (figures.full_syncs.count, figures.partial_syncs.count) == (2, 2)
    counted = {name: count for name, count in figures.sync_results.items() if count}
    assert counted == {"full committed": 2, "partial committed": 2, "full error": 1}
    assert figures.operations == {"add": 4, "set": 8, "delete": 12}


def test_drift_is_what_a_look_at_everything_has_to_change() -> None:
    figures = Figures()
    figures.sync("start", "committed", 0.01, 5, 0, 0)
    figures.sync("change", "committed", 0.01, 5, 0, 0)
    figures.sync("retry", "committed", 0.01, 5, 0, 0)
    figures.sync("resync", "unchanged", 0.01, 0, 0, 0)
    assert (figures.drift_objects, figures.drift_syncs) == (0, 0)
    figures.sync("disturbed", "committed", 0.01, 1, 0, 2)
    assert (figures.drift_objects, figures.drift_syncs) == (3, 1)


def test_figures_travel_as_json() -> None:
    figures = Figures()
    figures.swept(0.5, 7)
    told = json.loads(json.dumps(figures.to_builtins()))
    assert told["conntrackDeleted"] == 7
    assert told["conntrackSweeps"]["sum"] == 0.5
    assert len(told["fullSyncs"]["counts"]) == 16
