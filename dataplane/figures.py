"""What the agent has done since it started, as counters and histograms that only grow.

Pure; the agent tells, `status` shows (`figures`), metrics and the web page read. Durations in seconds, kube-proxy's
buckets (pkg/proxy/metrics: 0.001 × 2ⁿ, n = 0 … 14).
"""

from bisect import bisect_left
from collections.abc import Sequence

from msgspec import Struct, field, to_builtins

BUCKETS: tuple[float, ...] = tuple(0.001 * 2.0**power for power in range(15))
"""Upper bounds in seconds, 1 ms to 16.384 s; what took longer is in one more."""
PROGRAMMING_BUCKETS: tuple[float, ...] = (
    *(0.25, 0.5),
    *map(float, range(1, 60)),
    *map(float, range(60, 120, 5)),
    *map(float, range(120, 301, 30)),
)
"""The same of network programming: kube-proxy's."""
DRIFT = frozenset({"disturbed", "resync", "reload"})
"""Causes of syncs that compare everything with the kernel: what they change, somebody else had changed."""
PARTIAL = frozenset({"change", "drain", "node addresses"})
"""Causes of syncs that look at some virtual servers only."""
RESULTS = (
    *(f"{kind} {result}" for kind in ("full", "partial") for result in ("unchanged", "committed", "partly", "failed")),
    "full error",
)
"""All are there from the start, at 0: a series that appears with its first failure shows no increase."""


CHECKS = tuple(f"{path} {code}" for path in ("healthz", "livez") for code in (200, 503))


class Histogram(Struct):
    """How long something took, by `BUCKETS` or others. `counts`: each bucket by itself, the last one without an upper
    bound."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    sum: float = 0.0

    def observe(self, seconds: float, bounds: Sequence[float] = BUCKETS) -> None:
        """One more."""
        self.counts[bisect_left(bounds, seconds)] += 1
        self.sum += seconds

    @property
    def count(self) -> int:
        """All."""
        return sum(self.counts)

    def quantile(self, share: float) -> float | None:
        """The upper bound of the bucket that holds this share of all, in seconds; None without any.

        Of the last bucket, which has none, its lower one.
        """
        wanted, seen = share * self.count, 0
        for bound, count in zip((*BUCKETS, BUCKETS[-1]), self.counts, strict=True):
            seen += count
            if count and seen >= wanted:
                return bound
        return None


class Figures(Struct, rename="camel"):
    """All figures of one agent."""

    full_syncs: Histogram = field(default_factory=Histogram)
    partial_syncs: Histogram = field(default_factory=Histogram)
    sync_results: dict[str, int] = field(default_factory=lambda: dict.fromkeys(RESULTS, 0))
    """Syncs by `kind result`: `full committed`, `partial failed`; `full error`: could not be carried out at all."""
    operations: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("add", "set", "delete"), 0))
    """Objects written in the kernel."""
    drift_objects: int = 0
    """Objects that were not as we had left them, and are again."""
    drift_syncs: int = 0
    """Syncs that repaired something."""
    changed_services: int = 0
    """Services in all updates of the input so far."""
    conntrack_sweeps: Histogram = field(default_factory=Histogram)
    conntrack_deleted: int = 0
    drains_finished: int = 0
    """Real servers whose last connection ended in time."""
    drains_expired: int = 0
    """Real servers that were removed with open connections, because their time was over."""

    network_programming: Histogram = field(default_factory=lambda: Histogram([0] * (len(PROGRAMMING_BUCKETS) + 1)))
    """From the change of an endpoint, by the clock of whoever noticed it, to the kernel's answer."""
    proxy_checks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CHECKS, 0))
    """Answers of `/healthz` and `/livez`, by `path code`."""

    def programmed(self, seconds: float) -> None:
        """A change of an endpoint that began so long ago is in the kernel."""
        self.network_programming.observe(max(0.0, seconds), PROGRAMMING_BUCKETS)

    def checked(self, path: str, code: int) -> None:
        """Somebody asked how the proxy is."""
        self.proxy_checks[f"{path} {code}"] += 1

    def sync(self, cause: str, result: str, seconds: float, adds: int, sets: int, deletes: int) -> None:
        """A sync has ended."""
        kind = "partial" if cause in PARTIAL else "full"
        (self.partial_syncs if kind == "partial" else self.full_syncs).observe(seconds)
        self._result(f"{kind} {result}")
        for name, count in (("add", adds), ("set", sets), ("delete", deletes)):
            self.operations[name] += count
        if cause in DRIFT and adds + sets + deletes:
            self.drift_objects += adds + sets + deletes
            self.drift_syncs += 1

    def error(self) -> None:
        """A sync could not be carried out."""
        self._result("full error")

    def _result(self, name: str) -> None:
        self.sync_results[name] += 1

    def swept(self, seconds: float, deleted: int) -> None:
        """Conntrack has been looked through."""
        self.conntrack_sweeps.observe(seconds)
        self.conntrack_deleted += deleted

    def to_builtins(self) -> dict[str, object]:
        """For `status`."""
        told: dict[str, object] = to_builtins(self)
        return told
