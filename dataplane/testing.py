"""A public fake of a mode: the same contract over dictionaries, for tests of what stands above a backend.

It passes the contract tests that the real modes pass, and can be told to misbehave like a kernel: refuse an object,
lose an answer before or after the change took effect, or be changed by somebody else. It proves nothing about a kernel.
"""

import errno
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Literal

from msgspec import Struct

from .backend import NO_SETTINGS, Options, Outcome, RealCounters, ServerReport, Transaction
from .drain import DrainKey
from .errors import KernelError, Unanswered
from .model import Address, VirtualAddress, VirtualServer
from .plan import Plan, State
from .sightings import Look, Sighting, Witness
from .walk import Detection, Remembered, Situation, Stage, Walk


class FakeTransaction(Struct, frozen=True):
    """Prints one line per object: + add, ~ change, - remove."""

    plan: Plan

    def __str__(self) -> str:
        plan = self.plan
        lines = [f"+ {server.at} {' '.join(map(str, server.real_servers))}".rstrip() for server in plan.add]
        lines += [f"~ {change.new.at} {' '.join(map(str, change.new.real_servers))}" for change in plan.change]
        lines += [f"- {server.at}" for server in plan.remove]
        return "".join(line + "\n" for line in lines)


class FakeWitness:
    """`sightings.Witness` that sees one connection at each look."""

    name = "a fake"
    blind = ""

    def __init__(self, sightings: list[Sighting]) -> None:
        self._left = sightings
        self.closed = False

    def fileno(self) -> int:
        """Contract."""
        return -1

    def read(self) -> list[Sighting]:
        """Contract."""
        return [self._left.pop(0)] if self._left else []

    def finish(self) -> list[Sighting]:
        """Contract."""
        return []

    def close(self) -> None:
        """Contract."""
        self.closed = True


class FakeBackend:
    """`backend.Backend` in memory. Immutable values in, immutable values out."""

    mode = "fake"
    shares_affinity = True
    remembers_counts = False
    picks = ""

    def __init__(self, *, drains: bool = False) -> None:
        self.drains = drains
        self.servers: dict[VirtualAddress, VirtualServer] = {}
        self.vips: set[Address] = set()
        self.hairpins: set[Address] = set()
        self.foreign: set[VirtualAddress] = set()
        self.connections: dict[tuple[VirtualAddress, Address, int], int] = {}
        self.refused: dict[VirtualAddress, int] = {}
        """Virtual addresses the "kernel" refuses, with the errno."""
        self.answers: list[Literal["ok", "lost before", "lost after"]] = []
        """How the next commits end; "ok" when empty."""
        self.commits: list[FakeTransaction] = []
        self.prepared = False
        self.touched = False
        self.kept: dict[DrainKey, float] = {}
        self.wants: dict[str, int] = {}
        """Sysctls that the mode wants."""
        self.detection = Detection()
        self.clients: dict[tuple[VirtualAddress, Address], Remembered] = {}
        """Clients that the "kernel" remembers."""
        self.sightings: list[Sighting] = []
        """Connections that `watch` sees."""
        self.sysctls: dict[str, int] = {}
        """Those of the "kernel", which several fakes may share."""
        self.noted: dict[str, int] = {}

    def express(self, server: VirtualServer) -> VirtualServer:
        """Contract."""
        return server

    def renew(self, options: Options) -> None:
        """Contract."""
        self.detection = Detection(
            options.masquerade_all,
            options.cluster_cidrs,
            options.bridge_interface,
            options.interface_prefix,
            options.service_cidrs,
        )

    def present(self) -> bool:
        """Contract."""
        return self.prepared or bool(self.servers.keys() - self.foreign)

    def prepare(self, before: Mapping[str, int] = NO_SETTINGS) -> tuple[str, ...]:
        """Contract."""
        self.prepared = True
        found = {name: self.sysctls.get(name, 0) for name, value in self.wants.items()}
        lacking = {name: value for name, value in found.items() if value != self.wants[name]}
        inherited = {name: value for name, value in before.items() if name in self.wants}
        self.noted = lacking | inherited | self.noted
        self.sysctls.update(self.wants)
        return ()

    def settings(self) -> dict[str, int]:
        """Contract."""
        return dict(self.noted)

    def observe(self, only: Collection[VirtualAddress] | None = None) -> State:
        """Contract."""
        servers = (s for at, s in self.servers.items() if only is None or at in only)
        return State(servers, self.vips, self.hairpins, self.foreign if only is None else self.foreign & set(only))

    def suspects(self, held: State) -> set[VirtualAddress] | None:
        """Contract."""
        return None

    def compile(self, plan: Plan) -> Transaction:
        """Contract."""
        return FakeTransaction(plan)

    def commit(self, transaction: Transaction) -> Outcome:
        """Contract."""
        assert isinstance(transaction, FakeTransaction)
        answer = self.answers.pop(0) if self.answers else "ok"
        if answer == "lost before":
            raise Unanswered("wait for", "the kernel", errno.ETIMEDOUT)
        plan = transaction.plan
        self.commits.append(transaction)
        wanted = [*plan.add, *(change.new for change in plan.change)]
        failed = {
            s.at: KernelError("add virtual server", str(s.at), self.refused[s.at])
            for s in wanted
            if s.at in self.refused
        }
        unsure = {s.at for s in plan.add if s.at in self.servers}
        unsure |= {change.new.at for change in plan.change if change.new.at not in self.servers}
        state = self.observe()
        state.apply(plan, failed.keys() | unsure)
        self.servers, self.vips, self.hairpins = state.servers, state.vips, state.hairpins
        if answer == "lost after":
            raise Unanswered("wait for", "the kernel", errno.ENOBUFS)
        return Outcome(failed, frozenset(unsure))

    def intact(self) -> bool:
        """Contract."""
        return self.prepared

    def clocks(self) -> dict[DrainKey, float]:
        """Contract."""
        return dict(self.kept)

    def keep_clocks(self, add: dict[DrainKey, int], remove: Collection[DrainKey]) -> None:
        """Contract."""
        for key in remove:
            self.kept.pop(key, None)
        self.kept.update(add)

    def open_connections(self, at: VirtualAddress) -> dict[tuple[Address, int], int]:
        """Contract."""
        if at not in self.servers:
            raise KernelError("list real servers of", str(at), errno.ESRCH)
        reals = self.servers[at].real_servers
        return {(r.address, r.port): self.connections.get((at, r.address, r.port), 0) for r in reals}

    def report(self) -> Iterator[ServerReport]:
        """Contract."""
        for at, server in sorted(self.servers.items()):
            rows = tuple(
                (r, RealCounters(self.connections.get((at, r.address, r.port), 0), 0, 0)) for r in server.real_servers
            )
            yield ServerReport(server, 0, 0, rows, at not in self.foreign)

    def situation(self) -> Situation:
        """Contract."""
        state = self.observe()
        return Situation(state.servers, state.vips, state.hairpins, self.detection, state.foreign)

    def remembered(self, server: VirtualServer, client: Address) -> Remembered | None:
        """Contract."""
        return self.clients.get((server.at, client))

    def objects(self, walked: Walk) -> dict[Stage, tuple[str, ...]]:
        """Contract."""
        named = f"fake server {walked.server.at}" if walked.server else "no fake server"
        return {Stage.SERVER: (named,)}

    def watch(self, wanted: Look) -> Witness:
        """Contract."""
        return FakeWitness([each for each in self.sightings if wanted.source in (None, each.client)])

    def monitors(self) -> tuple[int, ...]:
        """Contract."""
        return ()

    def disturbed(self) -> bool:
        """Contract."""
        touched, self.touched = self.touched, False
        return touched

    def text(self, language: str) -> str | None:
        """Contract."""
        return "".join(f"+ {at}\n" for at in sorted(self.servers)) if language == "fake" else None

    def remove(self, leave: Collection[str] = ()) -> None:
        """Contract."""
        self.sysctls.update({name: value for name, value in self.noted.items() if name not in leave})
        self.noted = {}
        self.servers = {at: server for at, server in self.servers.items() if at in self.foreign}
        self.vips, self.hairpins, self.kept, self.prepared = set(), set(), {}, False

    def close(self) -> None:
        """Contract."""

    def meddle(self, change: Callable[["FakeBackend"], None]) -> None:
        """Somebody else changes the "kernel" behind our back, and a notification tells of it."""
        change(self)
        self.touched = True
