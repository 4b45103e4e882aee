"""`python -m dataplane.bpf.probe_child ORDER`: compile, load and attach the probe, hand it over, and end.

ORDER is JSON: an Order, made by probe_start.py. A process of its own, because compiling takes 80 MB and seconds.
"""

import contextlib
import json
import resource
import signal
import socket
import struct
import sys
from collections.abc import Iterable
from typing import NamedTuple

from . import bpf_syscall as bpf
from .bcc_compile import CompileError, compile_programs
from .btf import BtfError
from .handover import Handed, refuse, send
from .hooks import ATTACH, PROGRAMS, TARGETS, Target
from .records import (
    CONFIG,
    FRONTEND_KEY,
    FRONTEND_VALUE,
    HIT_KEY,
    ID,
    LOSS,
    PARKED_KEY,
    PARKED_VALUE,
    SLOT,
    Loss,
    Map,
    defines,
)
from .sysfs_btf import KernelTypes

PARKED = 4096
"""Calls of one function that may be running at once."""


class Order(NamedTuple):
    """What the child is to do."""

    socket: int
    """Descriptor to hand over by."""
    seconds: int
    """The child ends itself after so long."""
    netns: int
    slots: int
    frontends: int
    maps: dict[str, int] | None = None
    """Descriptors of the maps of a probe that is there already and gets more hooks; else they are made."""
    have: tuple[str, ...] = ()
    """Functions that have a hook already."""
    kinds: tuple[str, ...] = ("fexit", "kretprobe")
    """Ways of attaching to try, in this order."""


def make_maps(order: Order) -> dict[Map, int]:
    """All maps, with the namespace set and every slot free."""
    maps = {
        Map.CONFIG: bpf.create_map(bpf.ARRAY, 4, CONFIG.size, 1, "config"),
        # Everything is allocated now: programs that trace must not allocate (memory.c could be what they trace).
        Map.FRONTENDS: bpf.create_map(bpf.HASH, FRONTEND_KEY.size, FRONTEND_VALUE.size, order.frontends, "frontends"),
        Map.IDS: bpf.create_map(bpf.HASH, HIT_KEY.size, ID.size, order.slots, "ids"),
        Map.SLOTS: bpf.create_map(bpf.ARRAY, 4, SLOT.size, order.slots, "slots", bpf.MMAPABLE),
        Map.FREE: bpf.create_map(bpf.QUEUE, 0, ID.size, order.slots, "free"),
        Map.LOSSES: bpf.create_map(bpf.ARRAY, 4, LOSS.size, len(Loss), "losses", bpf.MMAPABLE),
        Map.PARKED: bpf.create_map(bpf.HASH, PARKED_KEY.size, PARKED_VALUE.size, PARKED, "parked"),
    }
    bpf.update(maps[Map.CONFIG], struct.pack("=I", 0), CONFIG.pack(order.netns, 0))
    bpf.push_all(maps[Map.FREE], range(order.slots))
    return maps


def attach(order: Order) -> Handed:
    """Compile for this kernel, and attach to each function by the first way it takes."""
    kernel = KernelTypes()
    refusals: dict[str, list[str]] = {target.function: [] for target in TARGETS}
    left: list[tuple[Target, dict[str, int]]] = []
    for target in TARGETS:
        if target.function not in order.have:
            try:
                left.append((target, target.defines(kernel)))
            except BtfError as error:
                refusals[target.function].append(str(error))
    made = make_maps(order) if left and not order.maps else {}
    known = {Map[name]: fd for name, fd in (order.maps or {}).items()}
    maps = {int(each): fd for each, fd in (made or known).items()}
    hooks = []
    for kind in order.kinds:  # all of one kind are compiled at once, and another kind only if it is needed
        names = [name for target, _ in left for name in PROGRAMS[kind](target)]
        if not names:
            break
        code = compile_programs(_macros(kind, [macros for _, macros in left]), tuple(names))
        for target, macros in left.copy():
            try:
                hooks.append(ATTACH[kind](target, kernel, code, maps))
                left.remove((target, macros))
                refusals[target.function].clear()
            except (bpf.BpfError, BtfError) as error:
                refusals[target.function].append(f"{kind}: {getattr(error, 'strerror', '') or error}")
    return Handed(
        tuple(hooks), made, tuple(f"{name}: {', '.join(reasons)}" for name, reasons in refusals.items() if reasons)
    )


def _macros(kind: str, parts: Iterable[dict[str, int]]) -> dict[str, int]:
    macros = {f"HOOK_{kind.upper()}": 1, **defines()}
    for each in parts:
        macros |= each
    return macros


def main(arguments: list[str]) -> int:
    """0: something was handed over, and be it a reason."""
    order = Order(**json.loads(arguments[0]))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])  # what the parent blocks is blocked here, too
    signal.alarm(order.seconds)
    with socket.socket(fileno=order.socket) as sock:
        try:
            with contextlib.suppress(OSError, ValueError):  # maps count as locked memory on kernels before 5.11
                resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            handed = attach(order)
        except (OSError, BtfError, CompileError) as error:
            refuse(sock, str(error))
            return 0
        if handed.hooks:
            send(sock, handed)
        else:
            refuse(sock, "; ".join(handed.refusals))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
