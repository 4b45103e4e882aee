"""One Service changes: what it costs until the kernel has acknowledged it, among few Services and among many.

Two changes, each beside its floor: the very same kernel operations, encoded beforehand, in one send, and the read of
its ACK. Ours and the floor take turns, change by change, in one process, so both see the same kernel.

* "weight": one endpoint gets another weight (one SET_DEST).
* "replace": one endpoint is replaced by another: the new one is added, the old one drains (NEW_DEST, SET_DEST).
"""

import gc
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from dataplane.desired import virtual_servers
from dataplane.ipvs_messages import DEL_DEST, NEW_DEST, SET_DEST, Encoder
from dataplane.model import ObjectName, RealServer, ServiceView, Update, VirtualServer
from dataplane.netlink_socket import NETLINK_GENERIC, NetlinkSocket
from dataplane.reconciler import Reconciler

from . import workload
from .isolation import RunFailed, isolated
from .programming import family_id, prepared_reconciler, verify
from .raw import PlainSocket, acknowledged, flush_ipvs

Samples = dict[str, list[float]]

WARM_UP = 20


class Kind(NamedTuple):
    """A kind of change: how a Service looks after it, and the raw messages that do and undo the same in the kernel."""

    name: str
    view: Callable[[int], ServiceView]
    raw: Callable[[Encoder, VirtualServer], tuple[bytes, bytes]]


def _reweighted(number: int) -> ServiceView:
    return workload.view(number, weights=(1,) * (workload.ENDPOINTS - 1) + (2,))


def _raw_reweighted(encoder: Encoder, server: VirtualServer) -> tuple[bytes, bytes]:
    last = server.real_servers[-1]
    other = RealServer(last.address, last.port, 2)
    return encoder.real(SET_DEST, server, other), encoder.real(SET_DEST, server, last)


def _replaced(number: int) -> ServiceView:
    return workload.view(number, replaced=1)


def _raw_replaced(encoder: Encoder, server: VirtualServer) -> tuple[bytes, bytes]:
    first = server.real_servers[0]
    new = RealServer(workload.endpoint_address(1 << 22), first.port)
    drained = RealServer(first.address, first.port, 0)
    do = encoder.real(NEW_DEST, server, new) + encoder.real(SET_DEST, server, drained)
    return do, encoder.real(DEL_DEST, server, new) + encoder.real(SET_DEST, server, first)


KINDS = (
    Kind("weight", _reweighted, _raw_reweighted),
    Kind("replace", _replaced, _raw_replaced),
)


def run(kind: Kind, size: int, count: int) -> Samples:
    """Seconds of `count` changes among `size` Services.

    "floor": one raw request with its ACK. "to ACK": from `plan` to the kernel's answer. "sync": the whole sync, with
    the books and the drain clocks that follow the ACK. "take+sync": with the Service's rules decided before.
    """

    def work() -> Samples:
        reconciler = prepared_reconciler(size)
        if reconciler.sync("bench").result != "committed":
            raise RunFailed("the first sync failed")
        verify(size, vips=True)
        samples = _measure(reconciler, kind, size, count)
        flush_ipvs(family_id())
        return samples

    return isolated(work)


def _measure(reconciler: Reconciler, kind: Kind, size: int, count: int) -> Samples:
    encoder = Encoder(family_id())
    plain = PlainSocket(NETLINK_GENERIC)
    answered = _watch_answers()
    samples: Samples = {"floor": [], "to ACK": [], "sync": [], "take+sync": []}
    gc.collect()
    gc.freeze()
    # endpoints of this node concern the guard table too, which is another change
    remote = [number for number in range(size) if workload.NODE not in workload.nodes(number)]
    for turn in range(count + WARM_UP):
        number = remote[turn * 37 % len(remote)]
        (server,) = virtual_servers(workload.view(number), workload.RULES)
        do, undo = (acknowledged(each) for each in kind.raw(encoder, server))
        started = time.perf_counter()
        plain.ask(do)
        floor = time.perf_counter() - started
        plain.ask(undo)
        update = Update({ObjectName("bench", f"service-{number}"): kind.view(number)})
        answered[0] = 0.0
        began = time.perf_counter()
        touched = reconciler.take(update)
        started = time.perf_counter()
        report = reconciler.sync("bench", touched)
        ended = time.perf_counter()
        if report.result != "committed":
            raise RunFailed(f"change {turn} ended {report.result}: {report.failed}")
        if not answered[0]:
            raise RunFailed(f"change {turn} did not go the way that is watched")
        if turn >= WARM_UP:
            samples["floor"].append(floor)
            samples["to ACK"].append(answered[0] - started)
            samples["sync"].append(ended - started)
            samples["take+sync"].append(ended - began)
        # back again, not measured; the drained endpoint is wanted again, the other goes at once
        reconciler.take(Update({ObjectName("bench", f"service-{number}"): workload.view(number)}))
        reconciler.sync("bench", touched)
        reconciler.draining_pass()
    plain.close()
    verify(size)
    return samples


def _watch_answers() -> list[float]:
    """From now on the first item of the list is the moment at which the last change's answer was read and checked."""
    moment = [0.0]
    exchange, clock = NetlinkSocket.exchange, time.perf_counter

    def watched(self: NetlinkSocket, data: bytes, seq: int) -> Any:
        failures = exchange(self, data, seq)
        moment[0] = clock()
        return failures

    NetlinkSocket.exchange = watched  # type: ignore[method-assign]
    return moment
