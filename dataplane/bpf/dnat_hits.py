"""Hits per backend: connections that the kernel has translated from a virtual server's address to a backend.

    with ProbeStart(backends=30_000) as start:
        …                                     # until start.fileno() is readable
        with start.finish() as hits:
            hits.expect(servers)              # before they are programmed: only these addresses are counted
            hits.read()                       # {HitKey: connections}, at any time, as often as wanted

The kernel gives each new way (virtual server, backend) a slot by itself, so endpoints that come and go cost nothing
here; those that are gone keep their slot until `retire`. What could not be counted is in `missed()`. Attached to fexit,
counts and misses together are complete. Kretprobes (`hooks` tells) lose hits while other kprobe programs, or map
operations such as those of `expect` and `retire`, run on the same processor, and the kernel does not tell; reading is
none. Counted is the translation: a packet that is dropped behind it, by a filter, was still a hit.

Not thread-safe. Everything in the kernel ends with the process, however that ends.
"""

import errno
import mmap
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from ..model import VirtualAddress
from . import bpf_syscall as bpf
from .grace_period import GracePeriod
from .handover import Handed
from .hooks import IPVS, NAT, TARGETS, Hook, link_kprobes, target_of
from .records import FRONTEND_VALUE, ID, LOSS, SLOT, Hit, HitKey, Loss, Map, pack_frontend, pack_key
from .slot_table import Retired, SlotTable

__all__ = ["DnatHits", "Hit", "HitKey"]

FUNCTIONS = {"ipvs": IPVS.function, "nftables": NAT.function, "iptables": NAT.function}
"""The function that makes the translations of each mode."""


class _Batch(NamedTuple):
    """Slots retired together."""

    slots: list[Retired]
    grace: GracePeriod


class DnatHits:
    """The attached probe; ends with `close`."""

    def __init__(self, handed: Handed) -> None:
        self._hooks: list[Hook] = list(handed.hooks)
        self.maps = handed.maps
        self.refusals = handed.refusals
        """What could not be attached, and why."""
        self._expected: dict[bytes, set[VirtualAddress]] = {}
        self._unwatched: set[VirtualAddress] = set()
        self._retiring: list[_Batch] = []
        self._modules = {target.module: _instance(target.module) for target in TARGETS}
        with ExitStack() as undo:
            undo.callback(self._close_descriptors)
            self.capacity = _entries(self.maps[Map.SLOTS])
            """Backends that can be counted at once."""
            self._memory = mmap.mmap(self.maps[Map.SLOTS], _pages(SLOT.size * self.capacity), mmap.MAP_SHARED)
            undo.callback(self._memory.close)
            self._lost = mmap.mmap(self.maps[Map.LOSSES], mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ)
            undo.callback(self._lost.close)
            self._table = SlotTable(memoryview(self._memory)[: SLOT.size * self.capacity], self.capacity)
            undo.pop_all()

    def __enter__(self) -> "DnatHits":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Detach; twice does no harm."""
        if self.maps:
            self._table.close()
            self._memory.close()
            self._lost.close()
            self._close_descriptors()

    def _close_descriptors(self) -> None:
        for hook in self._hooks:
            for fd in (*hook.links, *hook.programs):
                os.close(fd)
        for fd in self.maps.values():
            os.close(fd)
        self._hooks, self.maps = [], {}

    # ------------------------------------------------------------------------------------------------- what is counted

    def expect(self, addresses: Iterable[VirtualAddress]) -> None:
        """Count connections to these from now on. Those for which the kernel has no room are in `unwatched`."""
        for at in addresses:
            key = pack_frontend(at.protocol, at.address, at.port)
            sharers = self._expected.setdefault(key, set())
            if not sharers:
                try:
                    bpf.update(self.maps[Map.FRONTENDS], key, FRONTEND_VALUE.pack(1))
                except bpf.BpfError as error:
                    del self._expected[key]
                    if error.errno not in (errno.E2BIG, errno.ENOMEM):
                        raise
                    self._unwatched.add(at)
                    continue
            sharers.add(at)
            self._unwatched.discard(at)

    def forget(self, addresses: Iterable[VirtualAddress]) -> None:
        """No new backend of these is counted any more; those that have been go on until they are retired."""
        for at in addresses:
            self._unwatched.discard(at)
            key = pack_frontend(at.protocol, at.address, at.port)
            sharers = self._expected.get(key)
            if sharers is None:
                continue
            sharers.discard(at)
            if not sharers:
                del self._expected[key]
                bpf.delete(self.maps[Map.FRONTENDS], key)
        if self._unwatched:
            self.expect(tuple(self._unwatched))

    @property
    def unwatched(self) -> frozenset[VirtualAddress]:
        """Virtual servers that were expected and are not counted, since there is no room for them."""
        return frozenset(self._unwatched)

    def counts(self, mode: str) -> bool:
        """Whether connections that this mode translates are counted."""
        return any(hook.function == FUNCTIONS[mode] for hook in self._hooks)

    @property
    def hooks(self) -> tuple[str, ...]:
        """What is attached: `fexit:nf_nat_setup_info`, `kretprobe:ip_vs_schedule`, …"""
        return tuple(map(str, self._hooks))

    @property
    def attached(self) -> tuple[Hook, ...]:
        """The same, with descriptors."""
        return tuple(self._hooks)

    # -------------------------------------------------------------------------------------------------------- reading

    def read(self) -> dict[HitKey, int]:
        """Connections by the way they took, since the probe was attached; no value is ever less than it was before."""
        return self._table.read()

    def hits(self) -> Iterator[Hit]:
        """The same, one by one."""
        for key, hits in self.read().items():
            yield Hit(*key, hits)

    def missed(self) -> dict[str, int]:
        """Connections that are in no count, by reason: no free slot (full), no room for its key (insert), a failed read
        of the kernel's memory (read), a program that was running already (recursion)."""
        found = {each.name.lower(): LOSS.unpack_from(self._lost, each * LOSS.size)[0] for each in Loss}
        found["recursion"] = sum(bpf.program_runs(program).missed for hook in self._hooks for program in hook.programs)
        return found

    # ---------------------------------------------------------------------------------------------------- looking after

    def retire(self, keep: Collection[HitKey]) -> None:
        """Take back the slots of all other ways; totals are remembered, should they come back. It takes two steps,
        the second one at a later call, since the kernel may be counting in them at this very moment.
        """
        self._reclaim()
        self.read()
        batch = []
        for slot, key in self._table.others(keep):
            bpf.delete(self.maps[Map.IDS], pack_key(key))
            batch.append(self._table.retire(slot))
        if batch:
            self._retiring.append(_Batch(batch, GracePeriod()))

    def _reclaim(self) -> None:
        free = self.maps[Map.FREE]
        while self._retiring and self._retiring[0].grace.over():
            self._table.reclaim(self._retiring.pop(0).slots, lambda slot: bpf.update(free, b"", ID.pack(slot)))

    def check(self) -> bool:
        """Renew what a reload of a module has broken. False: a function is there now that has no hook; another
        `ProbeStart(more_of=…)` gives it one."""
        self._reclaim()
        complete = True
        for target in TARGETS:
            now = _instance(target.module)
            if now == self._modules[target.module]:
                continue
            hook = next((each for each in self._hooks if each.function == target.function), None)
            if hook is None:
                complete = complete and not now
            elif now and hook.kind == "kretprobe":  # a fexit program does not let its module go
                self._renew(hook)
                self._modules[target.module] = now
        return complete

    def _renew(self, hook: Hook) -> None:
        """The function is another one of the same name, and the old links are dead."""
        for fd in hook.links:
            os.close(fd)
        self._hooks.remove(hook)
        try:
            links = link_kprobes(target_of(hook.function), hook.programs)
        except bpf.BpfError:
            links = ()
        self._hooks.append(hook._replace(links=links))

    def add(self, handed: Handed) -> None:
        """Take over more hooks, whose programs use the maps of this probe."""
        self._hooks += handed.hooks
        self.refusals = handed.refusals
        self._modules |= {target.module: _instance(target.module) for target in TARGETS}


def _instance(module: str) -> tuple[int, int] | None:
    """What changes when a module is unloaded and loaded again; None: it is not loaded, or not a module."""
    try:
        found = Path("/sys/module", module).stat()
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns


def _entries(fd: int) -> int:
    """A map's max_entries, from its descriptor's description."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "max_entries":
            return int(value)
    raise OSError(errno.EINVAL, "not a map")


def _pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
