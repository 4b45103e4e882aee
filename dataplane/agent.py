"""The daemon: a source's updates, the kernel's notifications and three timers, turned into syncs one after another.

    source.updates() ──┐
    kernel monitors  ──┼─▶ wake ─▶ take ─▶ sync / verify / draining pass ─▶ one log line each
    timers, signals  ──┘

Everything happens in one thread and one task, so no two syncs ever overlap. A second agent in the same network
namespace is refused: the lock is an abstract unix socket, which belongs to the namespace as the kernel state does and
vanishes with the process. Questions are answered on a socket of their own (`control_socket`).
"""

import asyncio
import contextlib
import gc
import json
import os
import signal
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Protocol

from msgspec import Struct

from .backend import Options
from .control_server import ControlServer
from .control_socket import ControlClient
from .desired import Rules
from .drain import DrainKey
from .errors import DataplaneError
from .figures import Figures
from .health_responder import HealthResponder
from .healthz_server import Health, HealthzServer
from .libc_malloc import give_memory_back
from .looks import Looks
from .model import ObjectName, Problem, Update, VirtualAddress
from .printable import printable
from .prober import Prober, ProbeStarter
from .reconciler import Reconciler, SyncReport
from .show_text import plural
from .systemd_notify import ServiceManager
from .tcp_listener import Listen

SOCKET = "\0dataplane-agent"
STATUS_TIMEOUT = 5.0
DISTURBANCE_PAUSE = 0.2
"""Seconds between somebody else's change and our look at it: changes come in bursts, and one look serves a burst."""
BACKOFF_LEAST, BACKOFF_MOST = 1.0, 60.0
MOST_TRIGGERS = 20_000
BIG, BIG_SECONDS = 1 << 20, 2.0
"""Bytes of an answer from which on the memory that it took is given back, and when: it has been read by then."""
FLOWS_PAUSE_MOST = 0.3
"""Seconds at most between two looks at conntrack while UDP Services keep changing: nine times what a look takes."""
STALE_SECONDS = 60.0
"""A watch that has been dead so long makes `/healthz` red, or two pauses between looks, whichever is longer."""


class AgentOptions(Struct, frozen=True):
    """How often the agent looks by itself, in seconds."""

    resync_seconds: float = 30.0
    drain_poll_seconds: float = 1.0


class Source(Protocol):
    """Where Services come from (manifest files, a Kubernetes API)."""

    async def ready(self) -> None:
        """Return when `read` has everything: at once, or when a server has told all."""

    def read(self) -> Update:
        """Everything that changed since the last read; the first time, everything."""

    def updates(self) -> AsyncIterator[Update]:
        """The same, as changes happen."""

    @property
    def problems(self) -> tuple[Problem, ...]:
        """All that is wrong with the input at this moment."""

    def status(self) -> dict[str, Any]:
        """For `dataplane status`: which source it is (`kind`), and how it goes."""

    async def close(self) -> None:
        """Let go of everything."""


class Node(Protocol):
    """The node's own addresses (`netlink_node`), on which node ports are served."""

    def fileno(self) -> int:
        """Readable when they may have changed."""

    def changed(self) -> bool:
        """Whether they may have changed since the last call."""

    def rules(self) -> Rules:
        """The rules that go with what they are now."""

    def options(self) -> Options:
        """The same of the mode's options."""


class Cluster(Protocol):
    """What the agent needs to know of a `kube_source.KubernetesSource` that is its source."""

    @property
    def eligible(self) -> bool:
        """Load balancers may send to this node."""

    def dead_since(self) -> float | None:
        """Since when its watches are dead, in seconds since the epoch; None = they are not."""

    def stuck(self) -> bool:
        """They do not even try any more."""


class Events(Protocol):
    """What the agent needs of a `kube_events.EventWriter`."""

    def tell(self, reason: str, action: str, note: str = "", service: ObjectName | None = None) -> None:
        """Something that the cluster's administrator should see."""

    async def close(self) -> None:
        """Tell nothing more."""


class NoEvents:
    """For an agent without a cluster."""

    def tell(self, reason: str, action: str, note: str = "", service: ObjectName | None = None) -> None:
        """Nothing."""

    async def close(self) -> None:
        """Nothing."""


class Switch(Protocol):
    """What an agent needs of a `mode_switch.ModeSwitch`: other modes that are still here, and how they go."""

    @property
    def leaving(self) -> Sequence[object]:
        """Those that are still here, in words."""

    @property
    def stuck(self) -> bool:
        """Something of them stays until the input or the kernel is mended."""

    def look(self) -> dict[str, int]:
        """Find them; sysctls as they were before them."""

    def step(self, *, input_is_whole: bool, now: bool = False) -> None:
        """Go on with letting them go."""


class NoSwitch:
    """For an agent that is alone with its mode."""

    leaving = ()
    stuck = False

    def look(self) -> dict[str, int]:
        """Nothing."""
        return {}

    def step(self, *, input_is_whole: bool, now: bool = False) -> None:
        """Nothing."""


class Web(Protocol):
    """What the agent needs of a `web_child.WebChild`."""

    def start(self) -> None:
        """Listen, in the running event loop."""

    def close(self) -> None:
        """End it."""


class Log(Protocol):
    """What the agent needs of a structlog logger."""

    def info(self, event: str, **fields: Any) -> Any: ...
    def warning(self, event: str, **fields: Any) -> Any: ...
    def error(self, event: str, **fields: Any) -> Any: ...


class Agent:
    """One node's agent for one mode. `run` returns after SIGTERM or SIGINT; the kernel keeps what was programmed."""

    def __init__(
        self,
        reconciler: Reconciler,
        source: Source,
        options: AgentOptions,
        log: Log,
        node: Node | None = None,
        switch: Switch = NoSwitch(),  # noqa: B008 (has no state)
        start_probe: ProbeStarter | None = None,
        web: Web | None = None,
        manager: ServiceManager = ServiceManager(),  # noqa: B008 (nobody to tell)
        *,
        healthz: Listen | None = None,
        cluster: Cluster | None = None,
        events: Events = NoEvents(),  # noqa: B008 (has no state)
    ) -> None:
        self._reconciler = reconciler
        self._manager = manager
        self._node = node
        self._switch = switch
        self._source = source
        self._options = options
        self._log = log
        self._wake = asyncio.Event()
        self._stop = asyncio.Event()
        self._updates: list[Update] = []
        self._reload = False
        self._renumbered = node is not None  # an address may have come before we listened
        self._renumber_failed = False
        self._disturbed_at: float | None = None
        self._retry_at: float | None = None
        self._backoff = BACKOFF_LEAST
        self._told: set[Problem] = set()
        self._last: SyncReport | None = None
        self._last_error = ""
        self._events = events
        self._cluster = cluster
        self._health = HealthResponder(log, self._is_healthy, self._port_not_served)
        self._looks = reconciler.audience = Looks(reconciler.backend, self._clocks, lambda: reconciler.held.servers)
        self._prober = Prober(self._looks, lambda: reconciler.held.servers, log, start_probe)
        self._control = ControlServer({"status": self._tell_status, "look": self._tell_look})
        self._figures = Figures()
        self._healthz = healthz and HealthzServer(
            healthz, log, self.proxy_health, self._figures.checked, self._healthz_not_served
        )
        self._options_now = node.options() if node is not None else None
        self._triggers: deque[float] = deque(maxlen=MOST_TRIGGERS)
        """When changes began that the kernel has not acknowledged, in seconds since the epoch."""
        self._behind_since: float | None = None
        """Since when something waits for the kernel, of time.monotonic()."""
        self._web = web
        self._flows_retry_at: float | None = None
        self._flows_error = ""
        self._flows_backoff = BACKOFF_LEAST
        self._started = time.time()
        self._synced_at = 0.0

    # ------------------------------------------------------------------------------------------------------ running

    async def run(self) -> None:
        """Adopt what is there, then keep it right until told to stop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop_now)
        loop.add_signal_handler(signal.SIGHUP, self._reload_now)
        with agent_lock() as lock:
            holder = await asyncio.start_unix_server(hang_up, sock=lock)
            try:
                await self._control.start()
            except DataplaneError as error:
                self._log.warning("nobody can ask", error=printable(str(error)))
            if self._web is not None:
                self._web.start()
            if self._healthz is not None:
                self._healthz.start()
            self._events.tell("Starting", "StartKubeProxy")
            reader = None
            self._manager.waiting("waiting for the source")
            try:
                if await self._has_source():
                    # no pause between these two, so that everything reaches the first sync
                    reader = asyncio.create_task(self._read_source())
                    self._begin()
                    await self._follow_health_checks()
                    watched = dict.fromkeys(self._reconciler.backend.monitors(), self._kernel_spoke)
                    if self._node is not None:
                        watched[self._node.fileno()] = self._node_spoke
                    for descriptor, heed in watched.items():
                        loop.add_reader(descriptor, heed)
                    self._prober.begin()
                    self._manager.ready(self._summary())
                    await self._work(reader)
                    for descriptor in watched:
                        loop.remove_reader(descriptor)
            finally:
                self._manager.stopping()
                if self._web is not None:
                    self._web.close()
                if reader is not None:
                    reader.cancel()
                    with contextlib.suppress(asyncio.CancelledError, Exception):
                        await reader
                await self._events.close()
                await self._source.close()
                if self._healthz is not None:
                    await self._healthz.close()
                await self._control.close()
                holder.close()
                self._prober.end()
                self._looks.close()
                await self._health.close()
        self._log.info("stopped", mode=self._reconciler.backend.mode, kernel="left as it is")

    async def _has_source(self) -> bool:
        """Wait for the source; False when told to stop before it was ready."""
        ready = asyncio.create_task(self._source.ready())
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((ready, stop), return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                ready.result()
            return ready.done() and not self._stop.is_set()
        finally:
            for task in (ready, stop):
                task.cancel()

    def _begin(self) -> None:
        """First sync: the source is read before anything is compared, so nothing is deleted for want of news."""
        reconciler = self._reconciler
        if self._node is not None:  # a source may have told where we are
            reconciler.renew(self._node.rules())
            self._renew(self._node.options())
        update = self._source.read()
        reconciler.take(update)
        self._tell_problems()
        for lack in reconciler.backend.prepare(self._switch.look()):
            self._log.warning("not as wanted", lack=lack)
        reconciler.observe()
        reconciler.keep_unexplained(input_is_whole=not self._source.problems)
        self._report(reconciler.sync("start"))
        self._switch.step(input_is_whole=not self._source.problems)
        self._clean_flows()
        give_memory_back()
        gc.collect()
        gc.freeze()  # what is there now mostly stays; looking through it again and again costs tens of milliseconds

    async def _work(self, reader: "asyncio.Task[None]") -> None:
        next_verify = time.monotonic() + self._options.resync_seconds
        while not self._stop.is_set():
            await self._sleep(next_verify)
            self._manager.alive()
            if reader.done():
                reader.result()  # a dead source is not a quiet one: its error ends the agent
            now = time.monotonic()
            try:
                if self._renumbered:
                    self._renumber()
                elif self._take_updates():
                    pass
                elif self._due(self._disturbed_at, now):
                    self._disturbed_at = None
                    self._report(self._reconciler.verify("disturbed"))
                elif self._reload or now >= next_verify or self._due(self._retry_at, now):
                    cause = "reload" if self._reload else "retry" if now < next_verify else "resync"
                    self._reload, self._retry_at = False, None
                    if self._renumber_failed:
                        self._renumber()
                    took = time.monotonic()
                    self._report(self._reconciler.verify(cause))
                    took = time.monotonic() - took
                    self._manager.reloaded(self._summary())
                    if before := self._switch.look():
                        self._reconciler.backend.prepare(before)
                    self._prober.check()
                    # a look must never cost more than about 1 % of a processor, whatever the table's size
                    next_verify = time.monotonic() + max(self._options.resync_seconds, 100 * took)
                drained = self._reconciler.draining_pass()
                if drained:
                    self._report(drained)
                self._switch.step(input_is_whole=not self._source.problems)
                if not (self._updates or self._last_error):
                    self._behind_since = None
            except (DataplaneError, OSError) as error:
                next_verify = max(next_verify, self._fail(error))  # also a look that is due waits for the pause
                self._manager.reloaded(self._summary())
            self._clean_flows()
            await self._follow_health_checks()

    async def _follow_health_checks(self) -> None:
        desired = self._reconciler.desired
        await self._health.follow(desired.health_checks, desired.rules)

    async def _sleep(self, until: float) -> None:
        """Until something happens or something is due."""
        due = [until]
        own = (self._disturbed_at, self._retry_at, self._flows_retry_at, self._health.retry_at, self._manager.due)
        due += [moment for moment in own if moment is not None]
        if self._reconciler.drains.deadlines or self._switch.leaving:
            due.append(time.monotonic() + self._options.drain_poll_seconds)
        if not (self._updates or self._reload or self._renumbered or self._stop.is_set()):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), max(0.0, min(due) - time.monotonic()))
        self._wake.clear()

    @staticmethod
    def _due(moment: float | None, now: float) -> bool:
        return moment is not None and now >= moment

    def _take_updates(self) -> bool:
        """Everything that has arrived becomes one sync of the Services it names."""
        if not self._updates:
            return False
        waiting, self._updates = self._updates, []
        touched: set[VirtualAddress] = set()
        for update in waiting:
            self._figures.changed_services += len(update.changed)
            touched |= self._reconciler.take(update)
            self._triggers.extend(update.triggers)
        self._tell_problems()
        if self._reconciler.unexplained and not self._source.problems:
            self._reconciler.keep_unexplained(input_is_whole=True)
            self._report(self._reconciler.sync("input is whole"))
        elif touched:
            self._report(self._reconciler.sync("change", touched))
        elif not self._last_error:
            self._programmed()  # such as an endpoint that is not ready: there was nothing to write
        return True

    def _renew(self, options: Options) -> bool:
        """Clients are told by other options from the next `prepare` on; False if they are the same."""
        if options == self._options_now:
            return False
        self._reconciler.backend.renew(options)
        self._options_now = options
        return True

    def _renumber(self) -> None:
        """Node ports follow the node's addresses, hints its zone, and rules the ranges that the cluster names."""
        assert self._node is not None
        self._renumbered, self._renumber_failed = False, True  # what fails is tried again after a pause, not at once
        touched = self._reconciler.renew(self._node.rules())
        before = self._options_now
        if self._renew(self._node.options()):
            try:
                self._reconciler.backend.prepare(self._switch.look())
                self._reconciler.observe()
            except (DataplaneError, OSError):
                self._options_now = before  # so that it is done again
                raise
            self._renumber_failed = False
            self._report(self._reconciler.sync("node ranges"))
            return
        self._renumber_failed = False
        if touched:
            self._report(self._reconciler.sync("node addresses", touched))

    async def _read_source(self) -> None:
        async for update in self._source.updates():
            self._updates.append(update)
            self._renumbered |= update.place and self._node is not None
            self._fall_behind()
            self._wake.set()

    # ------------------------------------------------------------------------------------------------------- events

    def _stop_now(self) -> None:
        self._stop.set()
        self._wake.set()

    def _reload_now(self) -> None:
        self._log.info("reload", reason="SIGHUP")
        self._manager.reloading()
        self._updates.append(self._source.read())
        self._reload = True
        self._wake.set()

    def _kernel_spoke(self) -> None:
        if self._reconciler.backend.disturbed() and self._disturbed_at is None:
            self._disturbed_at = time.monotonic() + DISTURBANCE_PAUSE
            self._wake.set()

    def _node_spoke(self) -> None:
        assert self._node is not None
        if self._node.changed():
            self._renumbered = True
            self._wake.set()

    def _clean_flows(self) -> None:
        """UDP clients leave real servers that are gone; what cannot be done now is tried again, and stops nothing."""
        if self._flows_retry_at is not None and time.monotonic() < self._flows_retry_at:
            return
        started = time.perf_counter()
        try:
            swept = self._reconciler.clean_flows()
        except (DataplaneError, OSError) as error:
            self._flows_retry_at = time.monotonic() + self._flows_backoff
            self._flows_backoff = min(self._flows_backoff * 2, BACKOFF_MOST)
            if str(error) != self._flows_error:
                self._log.warning("conntrack", result="failed", error=printable(str(error)))
            self._flows_error = str(error)
            return
        took = time.perf_counter() - started
        self._flows_retry_at, self._flows_backoff, self._flows_error = None, BACKOFF_LEAST, ""
        if swept is not None:  # of many changes in a row, one look serves several, and clients still move in a second
            self._flows_retry_at = time.monotonic() + min(FLOWS_PAUSE_MOST, 9 * took)
            self._figures.swept(took, swept.deleted)
        if swept is not None and swept.deleted:
            self._log.info("conntrack", deleted=swept.deleted, read=swept.read, milliseconds=round(took * 1000, 3))

    # -------------------------------------------------------------------------------------------------------- telling

    def _report(self, report: SyncReport) -> None:
        held_back_anew = report.held_back and (self._last is None or report.held_back != self._last.held_back)
        self._last = report
        self._synced_at = time.time()
        self._figures.sync(
            report.cause, report.result, report.milliseconds / 1000, report.adds, report.sets, report.deletes
        )
        if report.failed:
            self._retry_at = time.monotonic() + self._backoff
            self._backoff = min(self._backoff * 2, BACKOFF_MOST)
        else:
            self._retry_at, self._backoff, self._last_error = None, BACKOFF_LEAST, ""
            if report.cause != "drain":  # which looks at few virtual servers
                self._programmed()
        if report.result == "unchanged" and report.cause not in ("start", "reload") and not held_back_anew:
            return
        fields = sync_fields(report, self._reconciler.backend.mode)
        if report.failed or report.blocked or report.held_back:
            self._log.warning("sync", **fields)
        else:
            self._log.info("sync", **fields)

    def _fail(self, error: Exception) -> float:
        """A sync that could not be carried out: what we know is stale, so look again after a pause; when that ends."""
        self._last_error = str(error)
        self._fall_behind()
        self._figures.error()
        again = self._retry_at = time.monotonic() + self._backoff
        self._backoff = min(self._backoff * 2, BACKOFF_MOST)
        self._log.error("sync", mode=self._reconciler.backend.mode, result="failed", error=printable(str(error)))
        return again

    def _tell_problems(self) -> None:
        standing = {*self._source.problems, *self._reconciler.problems}
        for problem in sorted(standing - self._told):
            self._log.warning("bad input", problem=printable(str(problem), 500))
        for problem in sorted(self._told - standing):
            self._log.info("input mended", problem=printable(str(problem), 500))
        self._told = standing
        for remark in self._reconciler.remarks():
            self._log.warning("remark", remark=printable(remark, 4000))

    def _summary(self) -> str:
        """The state in a line."""
        servers = plural(len(self._reconciler.held.servers), "virtual server")
        held = f"{servers} in {self._reconciler.backend.mode} mode"
        return held if self._is_healthy() else f"{held}; not healthy, see dataplane status"

    def _is_healthy(self) -> bool:
        return not (self._last_error or self._reconciler.failing or self._reconciler.held_back or self._switch.stuck)

    def _fall_behind(self) -> None:
        """Something waits for the kernel."""
        if self._behind_since is None:
            self._behind_since = time.monotonic()

    def _programmed(self) -> None:
        """What was taken from the source so far is in the kernel."""
        now = time.time()
        for moment in self._triggers:
            self._figures.programmed(now - moment)
        self._triggers.clear()

    def proxy_health(self) -> Health:
        """What `/healthz` and `/livez` go by."""
        patience = 2 * self._options.resync_seconds
        late = 0.0 if self._behind_since is None else time.monotonic() - self._behind_since
        dead = self._cluster.dead_since() if self._cluster is not None else None
        silent = 0.0 if dead is None else time.time() - dead
        eligible = self._cluster is None or self._cluster.eligible
        stuck = self._cluster is not None and self._cluster.stuck()
        reasons = {
            f"a sync is overdue: changes have waited for {late:.0f} s": late > patience,
            "the watch is stuck": stuck,
            f"the watch is dead: nothing heard from the API for {silent:.0f} s": silent > max(STALE_SECONDS, patience),
            "the Node is being deleted": not eligible,
        }
        return Health(
            live=not stuck and late <= patience,
            current=silent <= max(STALE_SECONDS, patience),
            eligible=eligible,
            updated=self._synced_at,
            reasons=tuple(reason for reason, holds in reasons.items() if holds),
        )

    def _healthz_not_served(self, reason: str) -> None:
        self._events.tell("FailedToStartProxierHealthcheck", "StartKubeProxy", f"healthz not served: {reason}")

    def _port_not_served(self, name: ObjectName, port: int, reason: str) -> None:
        note = f"health check port {port} of Service {name} is not served on this node: {reason}"
        self._events.tell("FailedToStartServiceHealthcheck", "Listen", note, name)

    def status(self) -> dict[str, Any]:
        """What `dataplane status` shows. Times in seconds since the epoch."""
        reconciler = self._reconciler
        last = self._last
        drains = reconciler.drains
        self._figures.drains_finished, self._figures.drains_expired = drains.completed, drains.cut_short
        internal, external = reconciler.desired.no_local_endpoints()
        return {
            "schemaVersion": 1,
            "pid": os.getpid(),
            "mode": reconciler.backend.mode,
            "startedAt": self._started,
            "lastSyncAt": self._synced_at,
            "lastSync": sync_fields(last, reconciler.backend.mode) if last else None,
            "lastError": self._last_error,
            "healthy": self._is_healthy(),
            "source": self._source.status(),
            "virtualServers": len(reconciler.held.servers),
            "wantedVirtualServers": len(reconciler.desired.servers),
            "draining": len(reconciler.drains.deadlines),
            "leavingModes": list(map(str, self._switch.leaving)),
            "heldBack": len(reconciler.held_back),
            "keptForFaultyInput": len(reconciler.unexplained),
            "failing": [f"{at}: {error}" for at, error in sorted(reconciler.failing.items())],
            "problems": [str(problem) for problem in sorted(self._told)],
            "noLocalEndpoints": {"internal": internal, "external": external},
            "healthChecks": self._health.status(),
            "hits": str(self._looks.counts),
            "conntrack": {"deleted": self._figures.conntrack_deleted, "lastError": self._flows_error},
            "figures": self._figures.to_builtins(),
        }

    def _tell_status(self) -> bytes:
        return json.dumps(self.status()).encode()

    def _tell_look(self) -> bytes:
        answer = self._looks.answer()
        if len(answer) > BIG:
            asyncio.get_running_loop().call_later(BIG_SECONDS, give_memory_back)
        return answer

    def _clocks(self) -> dict[DrainKey, float]:
        now = time.monotonic()
        return {key: deadline - now for key, deadline in self._reconciler.drains.deadlines.items()}


def sync_fields(report: SyncReport, mode: str) -> dict[str, Any]:
    """A sync as the fields of its one log line."""
    fields: dict[str, Any] = {
        "mode": mode,
        "generation": report.generation,
        "cause": report.cause,
        "adds": report.adds,
        "sets": report.sets,
        "deletes": report.deletes,
        "milliseconds": round(report.milliseconds, 3),
        "result": report.result,
    }
    if report.failed:
        fields["failed"] = [printable(str(error)) for error in report.failed]
    if report.blocked:
        fields["blocked"] = [f"{at}: somebody else's virtual server is there" for at in report.blocked]
    if report.held_back:
        fields["held_back"] = (
            f"{report.held_back} virtual servers would go at once: not removed (--allow-mass-delete removes them)"
        )
    return fields


async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Whoever connects to the lock has learned from the kernel who holds it, which is all there is to know."""
    writer.close()


@contextlib.contextmanager
def agent_lock() -> Iterator[socket.socket]:
    """Be the only one who programs this network namespace; DataplaneError names the process that already does."""
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        lock.bind(SOCKET)
        lock.listen(16)
        lock.setblocking(False)
    except OSError:
        lock.close()
        holder = _holder()
        raise DataplaneError(
            f"an agent runs in this network namespace already{f' (pid {holder})' if holder else ''}: "
            "change its manifests, or stop it first"
        ) from None
    with lock:
        yield lock


def _holder() -> int:
    """The process at the other end of the lock; 0 when it has just gone."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
        probe.settimeout(STATUS_TIMEOUT)
        probe.connect(SOCKET)
        return int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")
    return 0


def read_status() -> dict[str, Any]:
    """The status of the agent in this network namespace; AgentUnreachable when none answers, NotRoot for others."""
    with ControlClient() as agent:
        return agent.status()
