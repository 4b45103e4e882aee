"""Desired against held: the one place where a plan is made, committed, and believed only as far as the kernel said so.

No event loop and no files here: `run`, `apply`, `diff`, the tests and the bench all drive this object. What it knows of
the kernel (`held`) changes in two ways only: a commit that the kernel acknowledged, and a look (`observe`).
"""

import errno
import time
from collections.abc import Callable, Collection
from typing import Literal, Protocol

from msgspec import Struct

from .backend import Backend
from .desired import Desired, Rules
from .drain import DrainKey, Drains
from .errors import KernelError, Unanswered
from .model import Address, Problem, Update, VirtualAddress, VirtualServer
from .netlink_conntrack import Swept
from .plan import NO_PLAN, Change, Known, Plan, State, compare, diff, keeping, of_changes
from .staleness import Right, Staleness

TRIES = 3
"""Commits in a row that may end unknown or surprising before a sync gives up until the next one."""
_TRIES = tuple(range(TRIES))
MASS_DELETE_SHARE = 0.5
MASS_DELETE_LEAST = 10
NAMED = 20
"""Services that a remark names; the others are counted."""

Result = Literal["unchanged", "committed", "partly", "failed"]


class SyncReport(Struct, frozen=True):
    """How one sync went. `milliseconds`: from plan to the kernel's last answer."""

    generation: int
    cause: str
    result: Result
    adds: int = 0
    sets: int = 0
    deletes: int = 0
    milliseconds: float = 0.0
    failed: tuple[KernelError, ...] = ()
    blocked: tuple[VirtualAddress, ...] = ()
    held_back: int = 0


class FlowTable(Protocol):
    """The kernel's memory of UDP flows (`netlink_conntrack.Conntrack`)."""

    def sweep(self, right: Right) -> Swept:
        """Delete the entries to some destinations that lead elsewhere than they may."""


class Audience(Protocol):
    """Who has to know which virtual addresses there are before a packet reaches them (`looks.Looks`)."""

    def expect(self, addresses: Collection[VirtualAddress]) -> None:
        """These are about to be programmed."""

    def forget(self, addresses: Collection[VirtualAddress]) -> None:
        """These are gone."""


class Reconciler:
    """Keeps one backend's kernel state equal to the desired state.

    `allow_mass_delete`: without it, an update that takes away more than half of the virtual servers (and at least ten)
    is held back and shows in every report until the sources change their mind or `release` is called. `flow_table`:
    where `clean_flows` looks; None = it does nothing.
    """

    def __init__(
        self,
        backend: Backend,
        rules: Rules,
        *,
        allow_mass_delete: bool = False,
        flow_table: FlowTable | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.backend = backend
        self.desired = Desired(rules)
        self.held = State()
        self.drains = Drains()
        self.failing: dict[VirtualAddress, KernelError] = {}
        self.held_back: set[VirtualAddress] = set()
        self.unexplained: set[VirtualAddress] = set()
        """Held by the kernel and missing from an input that is not whole: kept until it is (`keep_unexplained`)."""
        self.generation = 0
        self._allow_mass_delete = allow_mass_delete
        self._clock = clock
        self._kept: set[DrainKey] = set()
        self._patient = backend.drains
        self._flow_table = flow_table
        self.audience: Audience | None = None
        self._staleness = Staleness()

    # -------------------------------------------------------------------------------------------------- learning

    def take(self, update: Update) -> set[VirtualAddress]:
        """A source's update becomes desired state; returns the virtual addresses to sync."""
        touched = self.desired.update(update)
        self._staleness.touch(touched)  # endpoints that are in no virtual server may have stopped serving
        return touched

    def renew(self, rules: Rules) -> set[VirtualAddress]:
        """Other rules apply from now on; returns the virtual addresses to sync."""
        touched = self.desired.renew(rules)
        self._staleness.touch(touched)
        return touched

    def observe(self) -> None:
        """Look at the kernel. The clocks of real servers that drain already go on where they stand."""
        self.held = self.backend.observe()
        self.share_objects()
        if not self.backend.drains:
            return
        now = self._clock()
        clocks = self.backend.clocks()
        self._kept = set(clocks)
        for at, server in self.held.servers.items():
            for real in server.real_servers:
                key = DrainKey(at, real.address, real.port)
                if real.weight == 0 and key in clocks and key not in self.drains.deadlines:
                    self.drains.restore(key, clocks[key], now)
        self.drains.changed |= self._kept ^ self.drains.deadlines.keys()

    def share_objects(self) -> None:
        """What is as desired is kept once in memory, not once as seen and once as wanted."""
        held, express = self.held.servers, self.backend.express
        for at, wanted in self.desired.servers.items():
            expressed = express(wanted)
            if held.get(at) == expressed:
                held[at] = expressed

    def keep_unexplained(self, input_is_whole: bool) -> None:
        """Right after start an input with faults proves nothing about what it lacks; a whole one ends the doubt."""
        if input_is_whole:
            self.unexplained.clear()
        else:
            self.unexplained = set(self.held.servers.keys() - self.desired.servers.keys())

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Services that cannot have what they ask for."""
        return (*self.desired.conflicts, *self.desired.refusals)

    def remarks(self) -> tuple[str, ...]:
        """What this mode does otherwise for some Service, in words that name it; each is told once."""
        news = self.desired.newly_scattered()
        if not news or self.backend.shares_affinity:
            return ()
        names = ", ".join(map(str, sorted(news)[:NAMED]))
        more = f" and {len(news) - NAMED} more" if len(news) > NAMED else ""
        what = "remembers a client's endpoint (sessionAffinity) for each address of a Service on its own"
        return (f"{self.backend.mode} mode {what}: {names}{more}",)

    # --------------------------------------------------------------------------------------------------- planning

    def plan(self, only: Collection[VirtualAddress] | None = None) -> Plan:
        """What a sync would do now. Keeps the drain clocks of what the plan starts to drain."""
        if only is not None and not self.held_back:
            changes = self._changes(only)
            if changes is not None:
                plan = of_changes(self.held, changes)
                return diff(self.held, {each.new.at: each.new for each in changes}, only) if plan is None else plan
        desired, held = self.desired.servers, self.held.servers
        keys = desired.keys() | held.keys() if only is None else only
        self._guard_against_mass_delete(keys)
        wanted: dict[VirtualAddress, VirtualServer] = {}
        now = self._clock()
        express = self.backend.express
        for at in keys:
            target = desired.get(at)
            if target is not None:
                target = express(target)
            before = held.get(at)
            if target is None and (at in self.held_back or at in self.unexplained):
                target = before
            if self.backend.drains and before is not None:
                target = self.drains.retain(at, target, before, self.desired.drain_seconds(at), now)
            if target is not None:
                wanted[at] = target
        return diff(self.held, wanted, only)

    def _changes(self, only: Collection[VirtualAddress]) -> list[Change] | None:
        """What becomes of servers that are there and stay; None if not all of them are like that. A shorter way to the
        same plan, on which addresses of a Service with the same endpoints share the work."""
        desired, held, express = self.desired.servers, self.held.servers, self.backend.express
        known: Known = {}
        changes: list[Change] = []
        for at in only:
            target, before = desired.get(at), held.get(at)
            if target is None or before is None:
                return None
            changes.append(compare(before, express(target), known))
        if self._patient:
            drains = self.drains
            for index, change in enumerate(changes):
                if change.differing.remove or drains.deadlines:
                    at = change.new.at
                    drains.revive(at, change.new.real_servers)
                    leaving = change.differing.remove
                    kept = drains.let_finish(at, leaving, self.desired.drain_seconds(at), self._clock())
                    if kept:
                        changes[index] = keeping(change, kept)
        return changes

    def _guard_against_mass_delete(self, keys: Collection[VirtualAddress]) -> None:
        if self._allow_mass_delete:
            return
        desired, held = self.desired.servers, self.held.servers
        if not self.held_back and len(keys) < MASS_DELETE_LEAST:
            return
        if self.held_back:
            self.held_back = {at for at in self.held_back if at in held and at not in desired}
        doomed = {
            at
            for at in keys
            if at in held
            and at not in desired
            and at not in self.unexplained
            and (not held[at].real_servers or any(r.weight for r in held[at].real_servers))
        }
        doomed |= self.held_back
        if len(doomed) >= MASS_DELETE_LEAST and len(doomed) > MASS_DELETE_SHARE * len(held):
            self.held_back = doomed
        else:
            self.held_back.clear()

    def release(self) -> None:
        """Somebody said that the mass delete is meant."""
        self._allow_mass_delete = True
        self.held_back.clear()

    # ---------------------------------------------------------------------------------------------------- syncing

    def sync(self, cause: str, only: Collection[VirtualAddress] | None = None) -> SyncReport:
        """Plan, commit, learn. With `only`, just those virtual addresses, at a cost of O(len(only))."""
        started = time.perf_counter()
        adds = sets = deletes = 0
        plan = NO_PLAN
        failed: dict[VirtualAddress, KernelError] = {}
        keys = only
        for _ in _TRIES:
            plan = self.plan(keys)
            if not plan.reals_only and not plan:
                break
            unsure = self._commit(plan, failed)
            step = plan.counts(skip=failed.keys())
            adds, sets, deletes = adds + step[0], sets + step[1], deletes + step[2]
            if unsure is None:
                keys = None
            elif unsure:
                keys = unsure
            else:
                break
        else:
            for at in plan.addresses():
                failed.setdefault(at, Unanswered("settle", str(at), errno.EAGAIN, f"no clear answer {TRIES} times"))
        if failed:
            self._take_back(failed)
        milliseconds = (time.perf_counter() - started) * 1000
        self._remember(failed, only)
        self._keep_clocks()
        changed = adds + sets + deletes
        if changed:
            self.generation += 1
        result: Result = "committed" if changed else "unchanged"
        if failed:
            result = "partly" if any(at not in failed for at in plan.addresses()) else "failed"
        return SyncReport(
            self.generation,
            cause,
            result,
            adds,
            sets,
            deletes,
            milliseconds,
            tuple(failed.values()),
            plan.blocked,
            len(self.held_back),
        )

    def verify(self, cause: str) -> SyncReport:
        """Look at everything of ours, fixed parts included, and repair what differs. Writes only what differs."""
        if not self.backend.intact():
            self.backend.prepare()
        suspects = None if self.held.irregular() else self.backend.suspects(self.held)
        if suspects is None:
            self.observe()
        elif suspects:
            self._look_again(suspects)
        return self.sync(cause)

    def _commit(self, plan: Plan, failed: dict[VirtualAddress, KernelError]) -> set[VirtualAddress] | None:
        """What must be planned again: some addresses, or everything (None) when the outcome is unknown."""
        backend = self.backend
        if self.audience is not None and plan.add:
            self.audience.expect([server.at for server in plan.add])
        try:
            outcome = backend.commit(backend.compile(plan))
        except Unanswered:
            self._staleness.touch_everything()
            self.observe()
            return None
        finally:  # behind the ACK, and also when only a part was done
            self._staleness.touch(plan.addresses())
            self._staleness.remove(plan.remove)
        again = set(outcome.unsure)
        failed.update(outcome.failed)
        doubtful = again | outcome.failed.keys()
        self.held.apply(plan, doubtful)
        if self.audience is not None and (plan.remove or (plan.add and doubtful)):
            gone = {server.at for server in (*plan.add, *plan.remove)} - self.held.servers.keys() - again
            self.audience.forget(gone)
        if doubtful:
            self._look_again(doubtful)
        return again

    def _take_back(self, failed: Collection[VirtualAddress]) -> None:
        """What a refused server would have needed goes again: a VIP without its server leads to the node itself."""
        kept = {at: self.held.servers[at] for at in failed if at in self.held.servers}
        leftovers = diff(self.held, kept, failed)
        if leftovers:
            self._commit(leftovers, {})

    def _look_again(self, at: Collection[VirtualAddress]) -> None:
        """Replace what we believe of some addresses by what is there."""
        seen = self.backend.observe(at)
        for one in at:
            self.held.drop(one)
            self.held.adoptable.pop(one, None)
        self.held.adoptable.update(seen.adoptable)
        for server in seen.servers.values():
            self.held.put(server)
        for mine, theirs in ((self.held.foreign, seen.foreign), (self.held.ghosts, seen.ghosts)):
            mine.difference_update(at)
            mine.update(theirs)
        self.held.vips, self.held.hairpins = seen.vips, seen.hairpins
        self.held.partial = seen.partial

    def _remember(self, failed: dict[VirtualAddress, KernelError], only: Collection[VirtualAddress] | None) -> None:
        if only is None:
            self.failing = dict(failed)
        elif self.failing or failed:
            for at in only:
                self.failing.pop(at, None)
            self.failing.update(failed)

    # ------------------------------------------------------------------------------------------------------ flows

    def clean_flows(self, *, everything: bool = False) -> Swept | None:
        """Delete UDP conntrack entries that the state reached has made wrong; None = there was nothing to look for.

        Costs nothing when no UDP virtual server has changed since the last call, unless `everything` is to be looked
        at. Raises KernelError; what was to be done is then done by a later call.
        """
        if everything:
            self._staleness.touch_everything()
        questions = self._staleness.questions(self.held.servers, self.desired.serving)
        if not questions:
            return None
        if self._flow_table is None:
            self._staleness.answered(questions)
            return None
        try:
            swept = self._flow_table.sweep(questions)
        except Exception:
            self._staleness.failed(questions)
            raise
        self._staleness.answered(questions)
        return swept

    # --------------------------------------------------------------------------------------------------- draining

    def draining_pass(self, limit: int = 500, busy: Callable[[], Collection[Address]] = tuple) -> SyncReport | None:
        """Let go of real servers whose connections have ended or whose deadline has passed; None = nothing to do.

        Asks the kernel for at most `limit` virtual servers, oldest deadline first. `busy`: VIPs that are in use though
        no connection of a real server shows it.
        """
        if not self.drains.deadlines:
            return None
        now = self._clock()
        ripe = {key.at for key in self.drains.expired(now)}
        deadlines = self.drains.deadlines
        waiting: dict[VirtualAddress, list[DrainKey]] = {}
        for key in sorted(deadlines, key=deadlines.__getitem__):
            waiting.setdefault(key.at, []).append(key)
        used: Collection[Address] | None = None
        for at, keys in list(waiting.items())[:limit]:
            try:
                open_now = self.backend.open_connections(at)
            except KernelError:
                ripe.add(at)  # gone already: the sync will see
                continue
            done = [key for key in keys if not open_now.get((key.address, key.port), 0)]
            if done and used is None:
                used = busy()
            if done and used is not None and at.address not in used:
                ripe.add(at)
                for key in done:
                    self.drains.finish(key)
        return self.sync("drain", ripe) if ripe else None

    def _keep_clocks(self) -> None:
        """The kernel keeps a copy of each clock, so that a restart goes on with it. Behind the ACK, not before it."""
        if not self.backend.drains:
            return
        changed = self.drains.changed
        if not changed:
            return
        deadlines, kept, now = self.drains.deadlines, self._kept, self._clock()
        add = {key: max(1, round(deadlines[key] - now)) for key in changed if key in deadlines and key not in kept}
        remove = {key for key in changed if key in kept and key not in deadlines}
        try:
            self.backend.keep_clocks(add, remove)
        except KernelError:
            return  # tried again at the next sync; until then a restart would start these clocks afresh
        kept.difference_update(remove)
        kept.update(add)
        changed.clear()
