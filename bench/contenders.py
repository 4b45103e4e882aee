"""Whoever programs Services, as one table: our modes, the floor under each, and the usual tools.

A contender's driver makes everything that it needs before the clock starts; what is measured is one call without
arguments. After each change it may look at the kernel again, and at the end it says whether the kernel holds what it
should, both with the clock stopped.
"""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

from dataplane.model import ObjectName, ServiceView, Update
from dataplane.netlink_socket import NETLINK_GENERIC, NETLINK_NETFILTER, NETLINK_ROUTE
from dataplane.reconciler import Reconciler, SyncReport

from . import peers
from .isolation import RunFailed, isolated
from .programming import family_id, held
from .raw import PlainSocket, Sent, flush_ipvs
from .variants import VARIANTS, Variant
from .watching import record

Work = Callable[[], object]
BATCH_BEGIN = 16
"""NFNL_MSG_BATCH_BEGIN."""


class Driver(Protocol):
    """One contender at work, in a namespace of its own."""

    def load(self, everything: Update) -> Work:
        """Program all Services into the empty namespace."""

    def pair(self, do: Update, undo: Update) -> Iterator[Work]:
        """A change and then the way back; each is to be done before the next is asked for."""

    def check(self, everything: Update) -> None:
        """RunFailed unless the kernel holds just that."""


def committed(report: SyncReport) -> None:
    """RunFailed unless a sync did what it should."""
    if report.failed or report.result != "committed":
        raise RunFailed(f"a sync ended {report.result}: {report.failed[:3]}")


class Ours:
    """This program: `take`, plan, commit; of a load plan and commit."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.reconciler = variant.reconciler()

    def load(self, everything: Update) -> Work:
        """From plan to the last answer."""
        self.reconciler.take(everything)
        return lambda: committed(self.reconciler.sync("bench"))

    def pair(self, do: Update, undo: Update) -> Iterator[Work]:
        """From the source's update to the last answer."""
        yield lambda: self.apply(do)
        yield lambda: self.apply(undo)

    def apply(self, update: Update) -> None:
        """An update becomes kernel state."""
        committed(self.reconciler.sync("bench", self.reconciler.take(update)))

    def check(self, everything: Update) -> None:
        """Compared with a look at the kernel, by another backend."""
        look_at(self.variant, everything)


def look_at(variant: Variant, everything: Update) -> None:
    """RunFailed unless the kernel holds what a mode makes of everything, by a fresh look."""
    other = variant.reconciler()
    other.take(everything)
    report = other.sync("bench")
    if report.result != "unchanged":
        raise RunFailed(
            f"the kernel held something else: {report.adds} added, {report.sets} set, {report.deletes} deleted"
        )
    other.backend.close()


class Replayer(PlainSocket):
    """A plain socket whose further answers can be thrown away."""

    def rest(self) -> None:
        """Read what else has been answered."""
        with suppress(BlockingIOError):
            while True:
                self._socket.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)


class Replay:
    """The bytes that ours sends for the same, ready beforehand, by plain sockets: the floor."""

    def __init__(self, variant: Variant) -> None:
        self._variant = variant
        self._ours: Ours | None = None
        protocols = (NETLINK_GENERIC, NETLINK_ROUTE, NETLINK_NETFILTER)
        self._sockets = {each: Replayer(each, 64 << 20) for each in protocols}

    def load(self, everything: Update) -> Work:
        """Recorded in another namespace."""

        def work() -> list[Sent]:
            ours = Ours(self._variant)
            load = ours.load(everything)
            sent = record()
            load()
            found = of_any_generation(sent)
            empty(self._variant)
            return found

        sent = isolated(work)
        self._variant.backend().close()
        return lambda: self._send(sent)

    def pair(self, do: Update, undo: Update) -> Iterator[Work]:
        """Recorded here: done by ours, and undone."""
        if self._ours is None:
            self._ours = Ours(self._variant)
            self._sent = record()
            self._ours.reconciler.take(self._everything)
            self._ours.reconciler.sync("bench")
        both = []
        for update in (do, undo):  # what is made on demand and stays shall be there
            self._ours.apply(update)
        for update in (do, undo):
            self._sent.clear()
            self._ours.apply(update)
            both.append(of_any_generation(self._sent))
        for sent in both:
            yield lambda sent=sent: self._send(sent)  # type: ignore[misc]
            for each in self._sockets.values():
                each.rest()

    def expect(self, everything: Update) -> None:
        """What is loaded, for the one who records."""
        self._everything = everything

    def _send(self, sent: Sequence[Sent]) -> None:
        for protocol, data in sent:
            self._sockets[protocol].ask(data)

    def check(self, everything: Update) -> None:
        """As ours."""
        look_at(self._variant, everything)


def of_any_generation(sent: Sequence[Sent]) -> list[Sent]:
    """The same; nf_tables batches for whatever generation there is."""
    return [each._replace(data=_without_generation(each.data)) for each in sent]


def _without_generation(batch: bytes) -> bytes:
    length, kind = int.from_bytes(batch[:4], "little"), int.from_bytes(batch[4:6], "little")
    return batch if kind != BATCH_BEGIN else (20).to_bytes(4, "little") + batch[4:20] + batch[length:]


class Text:
    """What ours would do, in the language of the usual tools (as `dataplane diff` prints it), given to these tools.

    Of ipvs mode only what ipvsadm reads: the virtual and real servers.
    """

    def __init__(self, variant: Variant, give: peers.Give) -> None:
        self._variant, self._give = variant, give
        self._shadow: Reconciler = variant.reconciler()

    def load(self, everything: Update) -> Work:
        """The whole text lies ready."""
        self._shadow.take(everything)
        plan = self._shadow.plan()
        text = str(self._shadow.backend.compile(plan))
        self._shadow.held.apply(plan)
        return self._give(peers.texts(text))

    def pair(self, do: Update, undo: Update) -> Iterator[Work]:
        """The text of each lies ready; then the shadow looks at what the tool has done."""
        for update in (do, undo):
            touched = self._shadow.take(update)
            if self._variant.mode == "ipvs":  # its books are not the tool's business: what was done is known
                plan = self._shadow.plan(touched)
            else:
                self._shadow.observe()
                plan = self._shadow.plan(touched)
            yield self._give(peers.texts(str(self._shadow.backend.compile(plan))))
            self._shadow.held.apply(plan)

    def check(self, everything: Update) -> None:
        """IPVS servers are counted, the rest is looked at as ours is."""
        if self._variant.mode == "ipvs":
            count_ipvs(everything)
        else:
            look_at(self._variant, everything)


def counted(everything: Update) -> tuple[int, int]:
    """Services and endpoints."""
    views = [each for each in everything.changed.values() if each is not None]
    return len(views), sum(len(one.endpoints) for each in views for one in each.slices)


def count_ipvs(everything: Update) -> None:
    """RunFailed unless IPVS has as many virtual and real servers as there are Services and endpoints."""
    if held() != counted(everything):
        raise RunFailed(f"{held()} virtual and real servers in the kernel instead of {counted(everything)}")


class Layout:
    """kube-proxy's nftables layout: a chain with an anonymous map for each Service, by `nft -f`."""

    def load(self, everything: Update) -> Work:
        """The whole text lies ready."""
        text = peers.kube_proxy_tables() + "".join(map(peers.kube_proxy_service, views(everything)))
        return lambda: peers.run(["nft", "-f", "-"], text)

    def pair(self, do: Update, undo: Update) -> Iterator[Work]:
        """As kube-proxy does: a chain's rules anew; a chain that nobody needs any more goes later."""
        for update, other in ((do, undo), (undo, do)):
            gone = [each for each in views(other) if update.changed[_name(each)] is None]
            text = "".join(map(peers.kube_proxy_service, views(update))) + "".join(map(peers.kube_proxy_without, gone))
            yield lambda text=text: peers.run(["nft", "-f", "-"], text)  # type: ignore[misc]
            for one in gone:
                peers.run(["nft", "-f", "-"], peers.kube_proxy_without_chain(one))

    def check(self, everything: Update) -> None:
        """The chains of Services are counted."""
        shown = peers.run(["nft", "-t", "list", "table", "ip", "kube-proxy"], "").splitlines()
        listed = sum("chain service-" in line and "/" in line for line in shown)
        if listed != len(everything.changed):
            raise RunFailed(f"{listed} chains of Services instead of {len(everything.changed)}")


class Library:
    """pyroute2's IPVS class, one call for each virtual and real server."""

    def load(self, everything: Update) -> Work:
        """All calls."""
        calls = peers.Pyroute2()
        return lambda: calls.add(views(everything))

    def pair(self, do: Update, undo: Update) -> Iterator[Work]:
        """What differs."""
        calls = peers.Pyroute2()
        yield lambda: calls.change(undo, do)
        yield lambda: calls.change(do, undo)

    def check(self, everything: Update) -> None:
        """Counted."""
        count_ipvs(everything)


def views(update: Update) -> list[ServiceView]:
    """The Services of an update that are there."""
    return [each for each in update.changed.values() if each is not None]


def _name(view: ServiceView) -> ObjectName:
    assert view.service is not None
    return view.service.name


class Contender(NamedTuple):
    """One line of the table. `mechanism`: the variant of ours beside which it stands; `slow`: loads once only."""

    name: str
    mechanism: Variant
    driver: Callable[[Variant], Driver]
    about: str
    ours: bool = False
    slow: bool = False
    single: bool = False
    """One process for each line."""


def _by_tool(variant: Variant) -> Driver:
    return Text(variant, peers.by_tool)


def _by_libnftables(variant: Variant) -> Driver:
    return Text(variant, peers.by_libnftables)


def _one_by_one(variant: Variant) -> Driver:
    return Text(variant, peers.one_by_one)


def _table() -> Iterator[Contender]:
    ipvs, routes, nftables, legacy, nft = VARIANTS
    for variant in (ipvs, nftables):
        yield Contender(f"{variant.name}: raw replay", variant, Replay, "our bytes, ready beforehand: the floor")
    for variant in (legacy, nft):
        yield Contender(f"{variant.name}: iptables-restore by hand", variant, _by_tool, "the same text", slow=True)
    for variant in (ipvs, routes, nftables, legacy, nft):
        yield Contender(variant.name, variant, Ours, "dataplane", ours=True)
    yield Contender("ipvs: ipvsadm -R", ipvs, _by_tool, "the same servers", slow=True)
    yield Contender("ipvs: ipvsadm, one by one", ipvs, _one_by_one, "a process a line", slow=True, single=True)
    yield Contender("ipvs: pyroute2", ipvs, lambda _: Library(), "one call for each server", slow=True)
    yield Contender("nftables: nft -f, same rules", nftables, _by_tool, "the same elements")
    yield Contender("nftables: libnftables, same rules", nftables, _by_libnftables, "the same in process")
    layout = "nftables: nft -f, kube-proxy's layout"
    yield Contender(layout, nftables, lambda _: Layout(), "a chain and an anonymous map for each Service", slow=True)
    for variant in (legacy, nft):
        one = f"{variant.name}: iptables, one by one"
        yield Contender(one, variant, _one_by_one, "a process a line", slow=True, single=True)


CONTENDERS: tuple[Contender, ...] = tuple(_table())


def base(contender: str) -> str:
    """Beside which contender another one stands."""
    mechanism = contender.split(":")[0].split(",")[0]
    return f"{mechanism}: " + ("iptables-restore by hand" if mechanism.startswith("iptables") else "raw replay")


def empty(variant: Variant) -> None:
    """A namespace with many IPVS servers takes long to die, and would disturb the next one."""
    if variant.mode == "ipvs":
        flush_ipvs(family_id())
