"""What Prometheus reads: a view of the agent as metric families.

Pure. Label names of addresses are node_exporter's (collector/ipvs_linux.go); names that begin with `kubeproxy_` are
kube-proxy's own (pkg/proxy/metrics), where we have the same fact; ours are for both families together, so their label
ip_family is absent.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from .. import __version__
from ..figures import BUCKETS, PROGRAMMING_BUCKETS
from ..printable import printable
from ..rows import RealServerRow, ServiceRow
from .name_metrics import name_families
from .viewing import View

MAX_SERIES = 100_000
SERIES_PER_BACKEND = 3

_SERVICE_LABELS = ("namespace", "service", "port_name", "local_address", "local_port", "proto", "inside")
_BACKEND_LABELS = (*_SERVICE_LABELS, "remote_address", "remote_port")

Labels = tuple[str, ...]


class Ratchet:
    """Counters as they are exported: what begins again at its source goes on here, so that no value ever falls."""

    def __init__(self, room: int = 4 * MAX_SERIES) -> None:
        self._known: dict[Labels, tuple[int, int]] = {}
        """Of each series the source's last number, and what was counted before it began again."""
        self._room = room

    def value(self, name: str, labels: Labels, count: int) -> int:
        """The number to export where the source now says `count`."""
        key = (name, *labels)
        last, before = self._known.pop(key, (0, 0))  # popped: the dictionary's order is that of the last sight
        if count < last:
            before += last
        self._known[key] = (count, before)
        if len(self._known) > self._room:
            del self._known[next(iter(self._known))]
        return count + before


def service_labels(row: ServiceRow) -> Labels:
    """Of one virtual server. `inside`: it serves only clients inside the cluster, another one everybody else."""
    return (
        printable(row.namespace),
        printable(row.service),
        printable(row.port_name),
        row.address,
        str(row.port),
        row.protocol,
        "true" if row.inside else "false",
    )


class Exposition:
    """A custom collector (prometheus_client): families of the latest view, at most `max_series` of Services."""

    def __init__(self, max_series: int = MAX_SERIES) -> None:
        self.view = View(0)
        self._max_series = max_series
        self._ratchet = Ratchet()

    def collect(self) -> Iterator[Metric]:
        """All families."""
        view = self.view
        yield _gauge("agent_up", "Whether the agent answers.", int(view.status is not None))
        entries, limit = view.conntrack
        if entries is not None:
            yield _gauge("conntrack_entries", "Entries of conntrack in this network namespace.", entries)
        if limit is not None:
            yield _gauge("conntrack_entries_limit", "Entries that conntrack may have (nf_conntrack_max).", limit)
        if view.status is not None:
            yield from _agent(view.status)
            yield from _figures(view.status)
            yield from _kube_proxy(view.status)
            if view.status.get("dns"):
                yield from name_families(view.status["dns"], view.names, self._max_series)
        if view.look is not None:
            yield from self._services(view)

    # ------------------------------------------------------------------------------------------------------ services

    def _services(self, view: View) -> Iterator[Metric]:
        assert view.look is not None
        counts = view.look.counts
        missed = CounterMetricFamily("dataplane_missed_hits", "Hits that the probe could not count.", labels=["reason"])
        for reason, count in counts.missed.items():
            missed.add_metric([reason], self._ratchet.value("missed", (reason,), count))
        yield missed
        source = GaugeMetricFamily("dataplane_hits_source_info", "Who counts the hits.", labels=["source"])
        source.add_metric([counts.source], 1)
        yield source

        rows = [row for row in view.look.services if row.ours]
        left_out = series_left_out(rows, self._max_series)
        backends, services = backend_series(rows), len(rows)
        yield _gauge("metrics_series", "Series of Services and backends in this exposition.", _kept(rows, left_out))
        yield _gauge("metrics_series_left_out", "Series left out, since there would be too many.", left_out)
        yield _gauge("metrics_series_limit", "Series of Services and backends there may be.", self._max_series)
        yield _gauge("services", "Virtual servers of ours: ports of Services at their addresses.", services)
        yield _gauge("backends", "Backends of all virtual servers.", backends // SERIES_PER_BACKEND)
        if left_out > backends:
            return
        yield self._hits("dataplane_service_hits", "New connections led to a Service.", rows, counts.source)
        if not left_out:
            yield from self._backends(rows, counts.source)

    def _hits(self, name: str, text: str, rows: Sequence[ServiceRow], source: str) -> Metric:
        family = CounterMetricFamily(name, text, labels=["source", *_SERVICE_LABELS])
        for row in rows:
            labels = (source, *service_labels(row))
            family.add_metric(labels, self._ratchet.value("service", labels, row.hits))
        return family

    def _backends(self, rows: Sequence[ServiceRow], source: str) -> Iterator[Metric]:
        hits = CounterMetricFamily(
            "dataplane_backend_hits", "New connections led to a backend.", labels=["source", *_BACKEND_LABELS]
        )
        weight = GaugeMetricFamily("dataplane_backend_weight", "Its weight; 0: none new.", labels=_BACKEND_LABELS)
        state = GaugeMetricFamily(
            "dataplane_backend_state",
            "Always 1: active, draining (a clock runs) or quiescent (weight 0 for another reason).",
            labels=[*_BACKEND_LABELS, "state"],
        )
        clock = GaugeMetricFamily(
            "dataplane_backend_drain_remaining_seconds",
            "Time that is left to a draining backend.",
            labels=_BACKEND_LABELS,
        )
        for row, real in _each(rows):
            labels = (*service_labels(row), real.address, str(real.port))
            if real.hits is not None:
                counted = (source, *labels)
                hits.add_metric(counted, self._ratchet.value("backend", counted, real.hits))
            weight.add_metric(labels, real.weight)
            state.add_metric((*labels, real.state), 1)
            if real.drain_seconds_left is not None:
                clock.add_metric(labels, real.drain_seconds_left)
        yield from (hits, weight, state, clock)


def _each(rows: Sequence[ServiceRow]) -> Iterator[tuple[ServiceRow, RealServerRow]]:
    for row in rows:
        for real in row.real_servers:
            yield row, real


def backend_series(rows: Sequence[ServiceRow]) -> int:
    """Series of all backends, without the few that drain."""
    return SERIES_PER_BACKEND * sum(len(row.real_servers) for row in rows)


def series_left_out(rows: Sequence[ServiceRow], limit: int) -> int:
    """Those of backends are left out first, then those of Services; never some of a kind and others not."""
    backends, services = backend_series(rows), len(rows)
    if backends + services <= limit:
        return 0
    return backends if services <= limit else backends + services


def _kept(rows: Sequence[ServiceRow], left_out: int) -> int:
    return backend_series(rows) + len(rows) - left_out


# --------------------------------------------------------------------------------------------------------- the agent


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"dataplane_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"dataplane_{name}", text, value=value)


def _agent(status: Mapping[str, Any]) -> Iterator[Metric]:
    info = GaugeMetricFamily("dataplane_build_info", "Always 1.", labels=["version", "mode"])
    info.add_metric([__version__, status["mode"]], 1)
    yield info
    yield _gauge("healthy", "Whether the agent is content with the kernel and with its input.", int(status["healthy"]))
    yield _gauge("start_time_seconds", "When the agent started, since the epoch.", status["startedAt"])
    yield _gauge("last_sync_timestamp_seconds", "When the last sync ended, since the epoch.", status["lastSyncAt"])
    yield _gauge("virtual_servers", "Virtual servers that the kernel holds.", status["virtualServers"])
    yield _gauge("virtual_servers_wanted", "Virtual servers that the input asks for.", status["wantedVirtualServers"])
    yield _gauge("virtual_servers_failing", "Virtual servers that the kernel refuses.", len(status["failing"]))
    yield _gauge("virtual_servers_held_back", "Virtual servers of a mass delete that is held back.", status["heldBack"])
    yield _gauge("input_problems", "Faults in the input.", len(status["problems"]))
    yield _gauge("draining_backends", "Backends that drain.", status["draining"])
    yield _gauge("leaving_modes", "Other modes that have not gone yet.", len(status["leavingModes"]))


def _histogram(
    family: HistogramMetricFamily, labels: Sequence[str], told: Mapping[str, Any], bounds: Sequence[float] = BUCKETS
) -> None:
    total, buckets = 0, []
    for bound, count in zip((*map(str, bounds), "+Inf"), told["counts"], strict=True):
        total += count
        buckets.append((bound, float(total)))
    family.add_metric(labels, buckets, told["sum"])


def _figures(status: Mapping[str, Any]) -> Iterator[Metric]:
    figures = status["figures"]
    durations = HistogramMetricFamily(
        "dataplane_sync_duration_seconds",
        "From plan to the kernel's last answer; partial: some virtual servers, full: all.",
        labels=["kind"],
    )
    _histogram(durations, ["full"], figures["fullSyncs"])
    _histogram(durations, ["partial"], figures["partialSyncs"])
    yield durations
    syncs = CounterMetricFamily("dataplane_syncs", "Syncs by kind and result.", labels=["kind", "result"])
    for name, count in sorted(figures["syncResults"].items()):
        syncs.add_metric(name.split(), count)
    yield syncs
    operations = CounterMetricFamily("dataplane_kernel_operations", "Objects written in the kernel.", labels=["op"])
    for name, count in figures["operations"].items():
        operations.add_metric([name], count)
    yield operations
    yield _counter(
        "drift_objects", "Objects that somebody else had changed, and that were put right.", figures["driftObjects"]
    )
    yield _counter("drift_syncs", "Syncs that put such objects right.", figures["driftSyncs"])
    yield _counter("changed_services", "Services in updates of the input.", figures["changedServices"])
    drains = CounterMetricFamily(
        "dataplane_drains",
        "Drains that ended: completed with the last connection, or expired with connections open.",
        labels=["end"],
    )
    drains.add_metric(["completed"], figures["drainsFinished"])
    drains.add_metric(["expired"], figures["drainsExpired"])
    yield drains
    yield _counter(
        "conntrack_deleted_entries", "Entries of UDP clients of backends that had gone.", figures["conntrackDeleted"]
    )


def _kube_proxy(status: Mapping[str, Any]) -> Iterator[Metric]:
    figures = status["figures"]
    full, partial, sweeps = figures["fullSyncs"], figures["partialSyncs"], figures["conntrackSweeps"]
    both = {
        "counts": [one + other for one, other in zip(full["counts"], partial["counts"], strict=True)],
        "sum": full["sum"] + partial["sum"],
    }
    for name, text, told in (
        ("sync_proxy_rules_duration_seconds", "Syncs.", both),
        ("sync_full_proxy_rules_duration_seconds", "Syncs of everything.", full),
        ("sync_partial_proxy_rules_duration_seconds", "Syncs of some virtual servers.", partial),
        ("conntrack_reconciler_sync_duration_seconds", "Looks through conntrack.", sweeps),
    ):
        family = HistogramMetricFamily(f"kubeproxy_{name}", text)
        _histogram(family, [], told)
        yield family
    programming = HistogramMetricFamily(
        "kubeproxy_network_programming_duration_seconds",
        "From the change of an endpoint (its EndpointSlice's last-change-trigger-time) to the kernel's answer.",
    )
    _histogram(programming, [], figures["networkProgramming"], PROGRAMMING_BUCKETS)
    yield programming
    for path in ("healthz", "livez"):
        checks = CounterMetricFamily(f"kubeproxy_proxy_{path}", f"Answers of /{path}.", labels=["code"])
        for name, count in figures["proxyChecks"].items():
            if name.startswith(f"{path} "):
                checks.add_metric([name.split()[1]], count)
        yield checks
    yield CounterMetricFamily(
        "kubeproxy_conntrack_reconciler_deleted_entries", "Entries deleted.", value=figures["conntrackDeleted"]
    )
    yield GaugeMetricFamily(
        "kubeproxy_sync_proxy_rules_last_timestamp_seconds", "The last sync.", value=status["lastSyncAt"]
    )
    local = GaugeMetricFamily(
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
        "Service ports with a traffic policy Local and no endpoint of this node.",
        labels=["traffic_policy"],
    )
    for policy, count in status["noLocalEndpoints"].items():
        local.add_metric([policy], count)
    yield local
    if status["mode"] == "nftables":
        failures = sum(
            count for name, count in figures["syncResults"].items() if name.split()[1] in ("failed", "partly", "error")
        )
        yield CounterMetricFamily(
            "kubeproxy_sync_proxy_rules_nftables_sync_failures", "Syncs that failed.", value=failures
        )
