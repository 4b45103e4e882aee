"""The functions of the kernel that the probe listens to, and attaching to them by whatever this kernel takes."""

import errno
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

from . import bpf_syscall as bpf
from .btf import BtfError
from .sysfs_btf import KernelTypes, ipvs_defines, nat_defines


class Target(NamedTuple):
    """A function that makes translations. `defines`: the macros of dnat_hits.c about it."""

    function: str
    module: str
    defines: Callable[[KernelTypes], dict[str, int]]
    fexit: str
    """The program for fexit, by its name in dnat_hits.c."""
    kprobe: str
    """The one at its beginning, "" = none is needed, and …"""
    kretprobe: str
    """… the one at its return, where fexit is refused."""


NAT = Target("nf_nat_setup_info", "nf_nat", nat_defines, "nat_fexit", "nat_kprobe", "nat_kretprobe")
IPVS = Target("ip_vs_schedule", "ip_vs", ipvs_defines, "ipvs_fexit", "", "ipvs_kretprobe")
TARGETS = (NAT, IPVS)


class Hook(NamedTuple):
    """An attached function: prints as `fexit:nf_nat_setup_info`."""

    kind: str
    """fexit or kretprobe."""
    function: str
    programs: tuple[int, ...]
    """Descriptors of programs, and …"""
    links: tuple[int, ...]
    """… of what holds each of them at its place."""

    def __str__(self) -> str:
        return f"{self.kind}:{self.function}"


def target_of(function: str) -> Target:
    """The Target with this function."""
    return next(each for each in TARGETS if each.function == function)


def attach_fexit(target: Target, kernel: KernelTypes, code: Mapping[str, bytes], maps: dict[int, int]) -> Hook:
    """Attach at the return of a function, with its arguments at hand; the module cannot be unloaded meanwhile."""
    number, separate = kernel.function(target.module, target.function)
    try:
        types = bpf.module_types(target.module) if separate else 0
    except KeyError:
        raise BtfError(f"module {target.module} is not loaded any more") from None
    program = bpf.load(
        bpf.TRACING, bpf.with_maps(code[target.fexit], maps), target.fexit, bpf.TRACE_FEXIT, number, types
    )
    return Hook("fexit", target.function, (program,), (bpf.attach_fexit(program),))


def attach_kprobes(target: Target, _: KernelTypes, code: Mapping[str, bytes], maps: dict[int, int]) -> Hook:
    """Attach at the return by a kretprobe; the programs stay good when the module is loaded again, the links do not."""
    if os.uname().machine != "x86_64":
        raise bpf.BpfError(errno.EOPNOTSUPP, f"where arguments are on {os.uname().machine} is not known")
    names = PROGRAMS["kretprobe"](target)
    programs = tuple(bpf.load(bpf.KPROBE, bpf.with_maps(code[name], maps), name) for name in names)
    return Hook("kretprobe", target.function, programs, link_kprobes(target, programs))


def link_kprobes(target: Target, programs: tuple[int, ...]) -> tuple[int, ...]:
    """Put loaded programs at a function's return, and then at its beginning: no beginning without its return."""
    links: list[int] = []
    try:
        for program, returning in zip(reversed(programs), (True, False), strict=False):
            links.append(bpf.attach_kprobe(program, target.function, returning=returning))
    except OSError:
        for each in links:
            os.close(each)
        raise
    return tuple(links)


PROGRAMS: dict[str, Callable[[Target], tuple[str, ...]]] = {
    "fexit": lambda target: (target.fexit,),
    "kretprobe": lambda target: tuple(name for name in (target.kprobe, target.kretprobe) if name),
}
"""By the kind of a hook: the programs that it takes, and …"""
ATTACH: dict[str, Callable[[Target, KernelTypes, Mapping[str, bytes], dict[int, int]], Hook]] = {
    "fexit": attach_fexit,
    "kretprobe": attach_kprobes,
}
"""… how they are attached."""
