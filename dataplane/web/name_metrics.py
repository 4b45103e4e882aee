"""What Prometheus reads of Service DNS, where the agent answers names. Pure."""

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..dns.query_log import RCODES
from ..printable import printable

_COUNTS = (
    ("queries", "Queries by transport.", "transport", "queries"),
    ("limited", "Queries over the limit of their client: dropped, or told to come back over TCP.", "how", "limited"),
)
_FIGURES = (
    ("malformed", "Packets that were no query, and got no answer.", "malformed"),
    ("upstream_answers", "Answers of upstreams that were passed on.", "forwarded"),
    ("upstream_failures", "Questions that no upstream answered.", "upstreamFailures"),
    ("closed_connections", "TCP connections closed since there were too many.", "closedConnections"),
)
_GAUGES = (
    ("services", "Services that have names.", "services"),
    ("prepared_answers", "Answers that are ready.", "prepared"),
    ("connections", "TCP connections that are open.", "connections"),
)


def name_families(told: Mapping[str, Any], services: Mapping[str, int], most: int) -> Iterator[Metric]:
    """Families of the agent's status of DNS; answers of each Service, unless there are more than `most`."""
    if "queries" not in told:
        return  # it does not listen yet
    for name, text, label, field in _COUNTS:
        family = CounterMetricFamily(f"dataplane_dns_{name}", text, labels=[label])
        for value, count in told[field].items():
            family.add_metric([value], count)
        yield family
    answers = CounterMetricFamily("dataplane_dns_answers", "Answers by their rcode.", labels=["rcode"])
    for rcode, text in RCODES.items():
        answers.add_metric([text], told["rcodes"].get(str(rcode), 0))
    yield answers
    for name, text, field in _FIGURES:
        yield CounterMetricFamily(f"dataplane_dns_{name}", text, value=told[field])
    for name, text, field in _GAUGES:
        yield GaugeMetricFamily(f"dataplane_dns_{name}", text, value=told[field])
    if len(services) <= most:
        family = CounterMetricFamily(
            "dataplane_dns_service_answers", "Answers with records of a Service.", labels=["namespace", "service"]
        )
        for service, count in sorted(services.items()):
            namespace, _, name = service.partition("/")
            family.add_metric([printable(namespace), printable(name)], count)
        yield family
