"""The probe's body without its hooks, for kernels that let nobody attach; C side in probe_body.c.

Everything but the hooks is the real thing: the same C, the same maps, read by the same DnatHits.
"""

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dataplane.bpf import bpf_syscall as bpf
from dataplane.bpf.bcc_compile import compile_programs
from dataplane.bpf.btf import BtfError
from dataplane.bpf.dnat_hits import DnatHits
from dataplane.bpf.handover import Handed
from dataplane.bpf.hooks import NAT, TARGETS, Hook
from dataplane.bpf.probe_child import Order, make_maps
from dataplane.bpf.records import Map, defines
from dataplane.bpf.sysfs_btf import KernelTypes
from dataplane.errors import PreflightError, ToolError
from dataplane.run_tool import run_tool

SOURCE = Path(__file__).with_name("probe_body.c")
IMAGES, TURN = len(Map) + 1, len(Map) + 2
IMAGE_SIZE = 4096
_NF_INET_PRE_ROUTING, _NF_INET_LOCAL_OUT = 0, 3
_BEHIND_DNAT = -98  # NF_IP_PRI_NAT_DST is -100, and a BPF program shares its number with nobody
VIP, PORT, BACKEND_PORT = bytes([10, 96, 0, 1]), 80, 8080


def netns_here() -> int:
    """The number of the calling thread's network namespace."""
    return Path("/proc/thread-self/ns/net").stat().st_ino


def load_modules() -> None:
    """The modules whose functions are the hooks, where they are modules; a mode loads them when it is prepared."""
    for module in (target.module for target in TARGETS):
        with contextlib.suppress(ToolError, PreflightError):
            run_tool(["modprobe", module])


def _order(slots: int) -> Order:
    return Order(socket=-1, seconds=0, netns=netns_here(), slots=slots, frontends=1024)


@contextlib.contextmanager
def behind_dnat(slots: int = 4096) -> Iterator[DnatHits]:
    """The body as a netfilter program of the calling thread's network namespace; the second of its programs, which is
    not attached, is the same without counting.
    """
    load_modules()
    kernel = KernelTypes()
    macros = {**defines(), **NAT.defines(kernel), "HOOK_NETFILTER": 1}
    macros["SKB_NFCT_AT"] = kernel.of("vmlinux").offset("sk_buff", "_nfct")
    compiled = compile_programs(macros, ("behind_dnat", "behind_dnat_empty"), SOURCE)
    maps = make_maps(_order(slots))
    placed = {int(each): fd for each, fd in maps.items()}
    programs = tuple(
        bpf.load(bpf.NETFILTER, bpf.with_maps(code, placed), name, bpf.NETFILTER_HOOK)
        for name, code in compiled.items()
    )
    links = link_behind_dnat(programs[0])
    with DnatHits(Handed((Hook("netfilter", NAT.function, programs, links),), maps)) as hits:
        yield hits


def link_behind_dnat(program: int) -> tuple[int, ...]:
    """Put the loaded program at its places in the calling thread's network namespace."""
    return tuple(
        bpf.attach_netfilter(program, int(family), hook, _BEHIND_DNAT)
        for family in (socket.AF_INET, socket.AF_INET6)
        for hook in (_NF_INET_PRE_ROUTING, _NF_INET_LOCAL_OUT)
    )


class Images(NamedTuple):
    """The body over images: `run` makes so many hits, of `backends` backends in turns, and tells seconds per hit."""

    hits: DnatHits
    programs: dict[str, int]
    turn: int

    def run(self, program: str, backends: int, times: int) -> float:
        bpf.update(self.turn, struct.pack("=I", 0), struct.pack("=I", 0))
        bpf.update(self.turn, struct.pack("=I", 1), struct.pack("=I", backends))
        return bpf.test_run(self.programs[program], times)


@contextlib.contextmanager
def images(slots: int) -> Iterator[Images]:
    """The body over an image of each structure that this kernel knows, with its offsets."""
    load_modules()
    kernel, macros = KernelTypes(), {**defines(), "HOOK_IMAGES": 1}
    names: list[str] = []
    for target, programs in zip(TARGETS, (("nat_image", "nat_empty"), ("ipvs_image", "ipvs_empty")), strict=True):
        with contextlib.suppress(BtfError):
            macros |= target.defines(kernel)
            names += programs
    macros |= {"MAP_IMAGES": IMAGES, "MAP_TURN": TURN}
    compiled = compile_programs(macros, tuple(names), SOURCE)
    maps = make_maps(_order(slots))
    store = bpf.create_map(bpf.ARRAY, 4, IMAGE_SIZE, 2, "images")
    turn = bpf.create_map(bpf.ARRAY, 4, 4, 2, "turn")
    placed = {int(each): fd for each, fd in maps.items()} | {IMAGES: store, TURN: turn}
    loaded = {name: bpf.load(bpf.SCHED_CLS, bpf.with_maps(code, placed), name) for name, code in compiled.items()}
    for number, make in enumerate((_connection, _ipvs_connection)):
        with contextlib.suppress(KeyError):
            bpf.update(store, struct.pack("=I", number), make(macros))
    hooks = (Hook("test", NAT.function, tuple(loaded.values()), ()),)
    try:
        with DnatHits(Handed(hooks, maps)) as hits:
            yield Images(hits, loaded, turn)
    finally:
        for each in (store, turn):
            os.close(each)


def _connection(at: dict[str, int]) -> bytes:
    """A struct nf_conn whose destination was translated."""
    image = bytearray(IMAGE_SIZE)
    original, reply = at["CT_ORIGINAL_AT"], at["CT_REPLY_AT"]
    image[original + at["TUPLE_FAMILY_AT"]] = socket.AF_INET
    image[original + at["TUPLE_PROTOCOL_AT"]] = socket.IPPROTO_TCP
    struct.pack_into("=4s", image, original + at["TUPLE_DST_ADDRESS_AT"], VIP)
    struct.pack_into("!H", image, original + at["TUPLE_DST_PORT_AT"], PORT)
    struct.pack_into("!H", image, reply + at["TUPLE_SRC_PORT_AT"], BACKEND_PORT)
    struct.pack_into("=Q", image, at["CT_STATUS_AT"], 1 << 5)  # IPS_DST_NAT
    struct.pack_into("=I", image, at["NET_INUM_AT"], netns_here())
    return bytes(image)


def _ipvs_connection(at: dict[str, int]) -> bytes:
    """A struct ip_vs_conn, which is its own struct netns_ipvs and struct net."""
    image = bytearray(IMAGE_SIZE)
    struct.pack_into("=H", image, at["VS_AF_AT"], socket.AF_INET)
    struct.pack_into("=H", image, at["VS_PROTOCOL_AT"], socket.IPPROTO_TCP)
    struct.pack_into("=4s", image, at["VS_VADDR_AT"], VIP)
    struct.pack_into("!H", image, at["VS_VPORT_AT"], PORT)
    struct.pack_into("!H", image, at["VS_DPORT_AT"], BACKEND_PORT)
    struct.pack_into("=I", image, at["NET_INUM_AT"], netns_here())
    return bytes(image)
