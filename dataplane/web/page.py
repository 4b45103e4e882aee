"""What a browser is told, as JSON: the node's summary, the Services that are asked for, and one of them in full.

Pure. What is told is bounded whatever there is: some dozens of Services, some backends of each. Text that users made
is escaped as for terminals; the page itself shows text only as text.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from ..figures import BUCKETS, Histogram
from ..printable import printable
from ..rows import RealServerRow, ServiceRow
from .metrics import series_left_out
from .viewing import Point, View

SERVICES, SERVICES_MOST = 25, 200
"""Services that are shown at first, and at most."""
BACKENDS = 4
"""Backends shown of each Service in the list."""
BACKENDS_OF_ONE = 200
"""Backends shown of the Service that is looked at."""
LINES = 8
"""Backends with a line in the chart; the others share one."""
TEXTS = 20
"""Problems that are spelt out."""
OTHERS = "others"
SORTS = ("name", "rate", "hits")


class Query(Struct, frozen=True):
    """What one browser looks at. `text`: a part of a name or an address; `chosen`: a VIP as `ServiceRow.vip`."""

    text: str = ""
    sort: str = "name"
    limit: int = SERVICES
    chosen: str = ""


# ------------------------------------------------------------------------------------------------------------ summary


def overview(view: View, node: str, max_series: int) -> dict[str, Any]:
    """How the agent and the node are."""
    told: dict[str, Any] = {"node": node, "trouble": printable(view.trouble)}
    if view.status is None or view.look is None:
        return told
    status, look, figures = view.status, view.look, view.status["figures"]
    entries, limit = view.conntrack
    rates = [row.rate for row in view.rows if row.rate is not None]
    return told | {
        "mode": status["mode"],
        "healthy": status["healthy"],
        "reasons": reasons(status),
        "pid": status["pid"],
        "startedAt": status["startedAt"],
        "at": look.at,
        "lastSync": status["lastSync"]
        and {key: status["lastSync"][key] for key in ("cause", "result", "milliseconds", "adds", "sets", "deletes")},
        "lastSyncAt": status["lastSyncAt"],
        "counts": {
            "source": look.counts.source,
            "text": printable(str(look.counts), 400),
            "missed": look.counts.lost,
            "reasons": {printable(reason): count for reason, count in look.counts.missed.items() if count},
        },
        "services": len(view.rows),
        "backends": view.backends,
        "rate": sum(rates) if rates else None,
        "hits": sum(row.hits for row in view.rows),
        "draining": status["draining"],
        "drains": {"completed": figures["drainsFinished"], "expired": figures["drainsExpired"]},
        "drift": {"objects": figures["driftObjects"], "syncs": figures["driftSyncs"]},
        "conntrack": {"entries": entries, "limit": limit, "deleted": figures["conntrackDeleted"]},
        "syncs": {"bounds": BUCKETS, "full": _syncs(figures["fullSyncs"]), "partial": _syncs(figures["partialSyncs"])},
        "problems": _texts(status["problems"]),
        "seriesLeftOut": series_left_out([row for row in look.services if row.ours], max_series),
    }


def reasons(status: dict[str, Any]) -> dict[str, Any]:
    """Why the agent is not healthy, or what else is not as it should be."""
    texts = [*status["failing"]]
    if status["lastError"]:
        texts.insert(0, status["lastError"])
    if status["heldBack"]:
        texts.append(f"{status['heldBack']} virtual servers would go at once: held back (--allow-mass-delete)")
    if status["keptForFaultyInput"]:
        texts.append(f"{status['keptForFaultyInput']} virtual servers stay until the input is mended")
    texts += [f"of another mode is still here: {each}" for each in status["leavingModes"]]
    texts += [f"health check port {each['port']}: {each['error']}" for each in status["healthChecks"] if each["error"]]
    if status["conntrack"]["lastError"]:
        texts.append(f"conntrack: {status['conntrack']['lastError']}")
    return _texts(texts)


def _texts(texts: Sequence[str]) -> dict[str, Any]:
    return {"texts": [printable(text, 500) for text in texts[:TEXTS]], "more": max(0, len(texts) - TEXTS)}


def _syncs(told: dict[str, Any]) -> dict[str, Any]:
    histogram = msgspec.convert(told, Histogram)
    return {
        "counts": histogram.counts,
        "count": histogram.count,
        "p50": histogram.quantile(0.5),
        "p99": histogram.quantile(0.99),
    }


# ----------------------------------------------------------------------------------------------------------- services


def services(rows: Sequence[ServiceRow], query: Query) -> dict[str, Any]:
    """The Services that are asked for, and how many there are."""
    found = matching(rows, query.text)
    match query.sort:
        case "rate":
            found = sorted(found, key=lambda row: -(row.rate or 0.0))
        case "hits":
            found = sorted(found, key=lambda row: -row.hits)
    shown = found[: max(1, min(query.limit, SERVICES_MOST))]
    return {"all": len(rows), "found": len(found), "most": SERVICES_MOST, "rows": [_service(row) for row in shown]}


def matching(rows: Sequence[ServiceRow], text: str) -> Sequence[ServiceRow]:
    """Those in whose name, VIP or backends all words of the text occur."""
    words = text.lower().split()
    if not words:
        return rows
    return [row for row in rows if all(_has(row, word) for word in words)]


def _has(row: ServiceRow, word: str) -> bool:
    if word in row.label.lower() or word in row.vip.lower():
        return True
    return any(word in real.endpoint for real in row.real_servers)


def _service(row: ServiceRow, backends: int = BACKENDS) -> dict[str, Any]:
    reals = row.real_servers
    return {
        "id": row.vip,
        "name": printable(row.label),
        "kind": row.kind,
        "hits": row.hits,
        "rate": row.rate,
        "noEndpoints": row.no_endpoints,
        "draining": sum(real.state == "draining" for real in reals),
        "backends": [_backend(real) for real in reals[:backends]],
        "more": max(0, len(reals) - backends),
    }


def _backend(real: RealServerRow) -> dict[str, Any]:
    return {
        "id": real.endpoint,
        "hits": real.hits,
        "share": real.share,
        "rate": real.rate,
        "weight": real.weight,
        "state": real.state,
        "left": real.drain_seconds_left,
        "open": real.active,
    }


# ---------------------------------------------------------------------------------------------------- one of them


def chosen(rows: Iterable[ServiceRow], query: Query) -> dict[str, Any] | None:
    """The Service that is looked at; None when it is not there."""
    for row in rows:
        if row.vip == query.chosen:
            return {**_service(row, BACKENDS_OF_ONE), "scheduler": row.scheduler, "lines": lines(row)}
    return None


def lines(row: ServiceRow) -> list[str]:
    """Backends with a line of their own in the chart: those with the most hits, in the order of the list."""
    most = sorted(row.real_servers, key=lambda real: -(real.hits or 0))[:LINES]
    names = {real.endpoint for real in most}
    return [real.endpoint for real in row.real_servers if real.endpoint in names]


def points(history: Iterable[Point], vip: str, names: Sequence[str], after: float = 0.0) -> list[list[float | None]]:
    """The chart: for each look its time, the rate of each named backend, and of all others together."""
    found: list[list[float | None]] = []
    for at, rates in history:
        if at > after and (here := rates.get(vip)) is not None:
            rest = sum(rate for name, rate in here.items() if name not in names)
            found.append([at, *(here.get(name) for name in names), rest])
    return found
