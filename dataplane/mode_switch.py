"""One mode takes over from another on a node in use: make before break.

    prepare(before) ─▶ first sync ─▶ verified by a look ─▶ the other mode drains ─▶ removed
    B notes A's notes   B holds all    nothing missing      (ipvs; others: at once)

While both are there, one of them has each packet. nftables and iptables rewrite the destination of a new connection in
`prerouting`, and conntrack lets only the first of them do so; whatever neither of them takes reaches IPVS in `input`.
Connections that nftables or iptables mode began live on in conntrack, for which any chain of type nat will do. Those of
IPVS live in its own table, and end with their virtual server or its VIP (tried on 6.1, with either value of
`expire_nodest_conn`); so ipvs mode drains: weight 0, which nobody new sees any more, until connections have ended or
the drain time is over. UDP drains as well: its real servers are alive, it is only the way there that changes.

Nothing is remembered outside of the kernel. An agent that dies in between leaves both modes; the next one, whichever
mode it is told to run, finds the other and goes on from there.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from .backend import Backend
from .desired import Rules
from .drain import Drains
from .errors import DataplaneError, PreflightError
from .model import Protocol as Transport
from .model import VirtualAddress, VirtualServer
from .plan import State
from .procfs_sockets import connected_from
from .reconciler import MASS_DELETE_LEAST, MASS_DELETE_SHARE, Reconciler
from .run_iptables import RESTORE_SECONDS
from .show_text import plural

LOOK_SECONDS = 1.0
"""Between two looks at what the other mode still has; and at most a tenth of the time goes into looking."""


MOST = "most would go at once (--allow-mass-delete removes them)"
FAULTS = "the manifests lack them and have problems"


class Tell(Protocol):
    """Where the steps of a switch are told, one line each."""

    def __call__(self, step: str, *, warning: bool = False, **fields: object) -> object: ...


def leftovers(modes: Iterable[str], opener: Callable[[str], Backend]) -> list[Backend]:
    """The backends, open, of those modes that hold something here; a mode this kernel cannot have holds nothing."""
    found: list[Backend] = []
    for mode in modes:
        try:
            backend = opener(mode)
        except (DataplaneError, OSError):
            continue
        try:
            there = backend.present()
        except (DataplaneError, OSError):
            there = False
        if there:
            found.append(backend)
        else:
            backend.close()
    return found


class Leaving:
    """A mode on its way out."""

    def __init__(self, backend: Backend, drain_seconds: int, clock: Callable[[], float]) -> None:
        self.backend = backend
        self.reconciler = Reconciler(
            backend,
            Rules(node_name="", drain_seconds=drain_seconds),
            allow_mass_delete=True,
            clock=clock,
        )
        self.reconciler.drains = Drains(udp=True)
        self.begun = self.drain_told = False
        self.kept = 0
        """Virtual servers that stay for now: without a replacement, or nobody has said that they go."""
        self.stuck = False
        """They do so for another reason than an input with faults, which tells of itself."""

    def look(self) -> None:
        """What it holds; nothing, where the kernel has lost the mechanism itself."""
        try:
            self.reconciler.observe()
        except PreflightError:
            self.reconciler.held = State()

    def __str__(self) -> str:
        drains, held = len(self.reconciler.drains.deadlines), len(self.reconciler.held.servers)
        parts = [f"{plural(drains, 'real server')} draining"] if drains else []
        parts += [f"{plural(self.kept, 'virtual server')} kept"] if self.kept else []
        parts += [] if parts else [plural(held, "virtual server")]
        return f"{self.backend.mode}: {', '.join(parts)}"


class ModeSwitch:
    """Lets go of other modes as soon as the mode that runs holds everything that is wanted.

    `modes`: the others; `opener`: how one is opened as it was left here; `drain_seconds`: how long connections of a
    mode that has to drain may go on. Each step is told once.
    """

    def __init__(
        self,
        reconciler: Reconciler,
        modes: Iterable[str],
        opener: Callable[[str], Backend],
        tell: Tell,
        *,
        drain_seconds: int = 900,
        allow_mass_delete: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.leaving: list[Leaving] = []
        self._reconciler = reconciler
        self._modes = tuple(modes)
        self._opener = opener
        self._tell = tell
        self._drain_seconds = drain_seconds
        self._allow_mass_delete = allow_mass_delete
        self._clock = clock
        self._verified = False
        self._next = 0.0
        self._until = clock() + RESTORE_SECONDS
        self._told = ""

    def look(self) -> dict[str, int]:
        """Find other modes; returns sysctls as they were before these, for `prepare` of the one that runs.

        A tool that a killed agent had started may finish after our first look, so more are taken for a while.
        """
        if self._clock() > self._until:
            return {}
        known = {one.backend.mode for one in self.leaving}
        before: dict[str, int] = {}
        for backend in leftovers(self._modes, self._opener):
            if backend.mode in known:
                backend.close()
                continue
            self.leaving.append(Leaving(backend, self._drain_seconds, self._clock))
            self._verified = False
            before |= backend.settings()
            self._tell("found", mode=backend.mode, to=self._reconciler.backend.mode)
        return before

    @property
    def stuck(self) -> bool:
        """Something of another mode stays until the input or the kernel is mended."""
        return any(one.stuck for one in self.leaving)

    def step(self, *, input_is_whole: bool, now: bool = False) -> None:
        """Go on as far as that is safe at this moment; costs nothing when there is no other mode."""
        if not self.leaving or (not now and self._clock() < self._next):
            return
        took = time.perf_counter()
        try:
            missing = set() if self._verified else self._missing()
            for one in list(self.leaving):
                if self._let_go(one, missing, input_is_whole):
                    one.backend.close()
                    self.leaving.remove(one)
                    self._tell("removed", mode=one.backend.mode)
        except (DataplaneError, OSError) as error:
            for one in self.leaving:
                one.begun = False  # somebody else meddles, perhaps: look again
            self._tell_once("failed, tried again", error=str(error))
        self._next = self._clock() + max(LOOK_SECONDS, 10 * (time.perf_counter() - took))

    def close(self) -> None:
        """Give descriptors back; what still drains is found by the next agent."""
        for one in self.leaving:
            one.backend.close()
        self.leaving.clear()

    # ------------------------------------------------------------------------------------------------------- steps

    def _missing(self) -> set[VirtualAddress]:
        """What is wanted and, as the kernel shows it, not held by the mode that runs."""
        reconciler = self._reconciler
        if not reconciler.backend.intact():
            reconciler.backend.prepare()
        reconciler.observe()
        plan = reconciler.plan()
        if plan:
            reconciler.sync("switch")
            reconciler.observe()
            plan = reconciler.plan()
        missing = {*plan.blocked, *(server.at for server in plan.add), *(change.new.at for change in plan.change)}
        missing |= {at for at in reconciler.desired.servers if at.address in plan.bind}
        missing &= reconciler.desired.servers.keys()
        if not missing:
            self._verified = True
            self._tell(
                "programmed and verified", mode=reconciler.backend.mode, virtual_servers=len(reconciler.held.servers)
            )
        return missing

    def _let_go(self, one: Leaving, missing: set[VirtualAddress], input_is_whole: bool) -> bool:
        """True when nothing of it is left."""
        backend, leaving = one.backend, one.reconciler
        if not one.begun:
            one.look()
        keep, why = self._kept(leaving.held.servers, missing, input_is_whole)
        one.kept, one.stuck = len(keep), bool(why) and why is not FAULTS
        if keep:
            self._tell_once("kept", mode=backend.mode, virtual_servers=len(keep), reason=why)
        if backend.drains or keep:
            if not one.begun or leaving.unexplained != keep or leaving.failing:
                leaving.unexplained = keep
                leaving.sync("switch")
            one.begun = True
            self._forget_dead(leaving)
            leaving.draining_pass(busy=connected_from)
            drains = len(leaving.drains.deadlines)
            if drains and not one.drain_told:
                one.drain_told = True
                self._tell("draining", mode=backend.mode, real_servers=drains, at_most_seconds=self._drain_seconds)
            if leaving.held.servers:
                return False
        backend.remove(leave=self._reconciler.backend.settings())
        return True

    def _kept(
        self, held: Mapping[VirtualAddress, VirtualServer], missing: set[VirtualAddress], input_is_whole: bool
    ) -> tuple[set[VirtualAddress], str]:
        """What the other mode has to go on with, and why."""
        keep, why = missing & held.keys(), ""
        if keep:
            why = "not programmed in the new mode"
        # what drains already has been said to go
        doomed = {
            at
            for at in held.keys() - self._reconciler.desired.servers.keys()
            if not held[at].real_servers or any(real.weight for real in held[at].real_servers)
        }
        most = len(doomed) >= MASS_DELETE_LEAST and len(doomed) > MASS_DELETE_SHARE * len(held)
        if doomed and not self._allow_mass_delete and (most or not input_is_whole):
            keep |= doomed
            why = why or (MOST if most else FAULTS)
        return keep, why

    def _forget_dead(self, leaving: Reconciler) -> None:
        """A UDP client that never stops would be held by a real server that has gone in the meantime."""
        desired = self._reconciler.desired.servers
        dead = set()
        for key in leaving.drains.deadlines:
            if key.at.protocol == Transport.UDP:
                server = desired.get(key.at)
                reals = server.real_servers if server else ()
                if all((real.address, real.port) != (key.address, key.port) for real in reals):
                    dead.add(key)
        for key in dead:
            leaving.drains.finish(key)
        if dead:
            leaving.sync("switch", {key.at for key in dead})

    def _tell_once(self, step: str, **fields: object) -> None:
        """A trouble that lasts is told once."""
        text = f"{step} {fields}"
        if text != self._told:
            self._told = text
            self._tell(step, warning=True, **fields)
