"""Keys and values that the BPF programs and user space share; the C side is dnat_hits.h.

`defines()` compiles every size, offset and number of this file into the programs, whose header asserts them.
"""

from enum import IntEnum
from struct import Struct
from typing import NamedTuple

CONFIG = Struct("=II")
"""Inode number of the network namespace that counts; pad."""
FRONTEND_KEY = Struct("!BBHI16s")
"""Family, protocol, port, pad, address."""
FRONTEND_VALUE = Struct("=I")
HIT_KEY = Struct("!BBHHH16s16s")
"""Family, protocol, port, backend port, pad, address, backend."""
ID = Struct("=I")
LOSS = Struct("=Q")
PARKED_KEY, PARKED_VALUE = Struct("=Q"), Struct("=Q")
SLOT = Struct(f"{HIT_KEY.size}sQ16x")
"""Key, hits, pad."""
SLOT_WORDS, HITS_WORD = SLOT.size // 8, HIT_KEY.size // 8


class Map(IntEnum):
    """Maps of the programs; in compiled instructions these numbers stand for the descriptors."""

    CONFIG = 1
    FRONTENDS = 2
    IDS = 3
    SLOTS = 4
    FREE = 5
    LOSSES = 6
    PARKED = 7


class Loss(IntEnum):
    """Why a hit was not counted; the index in the map of losses."""

    FULL = 0
    INSERT = 1
    READ = 2


class HitKey(NamedTuple):
    """One way that connections take: from a virtual server's address and port to a backend. Packed addresses."""

    protocol: int
    address: bytes
    port: int
    backend: bytes
    backend_port: int


class Hit(NamedTuple):
    """A HitKey and how many connections took it."""

    protocol: int
    address: bytes
    port: int
    backend: bytes
    backend_port: int
    hits: int


_AF_INET, _AF_INET6 = 2, 10


def pack_frontend(protocol: int, address: bytes, port: int) -> bytes:
    """The key of a virtual server's address."""
    family = _AF_INET if len(address) == 4 else _AF_INET6
    return FRONTEND_KEY.pack(family, protocol, port, 0, address)  # the struct module fills up with zeros


def pack_key(key: HitKey) -> bytes:
    family = _AF_INET if len(key.address) == 4 else _AF_INET6
    return HIT_KEY.pack(family, key.protocol, key.port, key.backend_port, 0, key.address, key.backend)


def unpack_key(data: bytes) -> HitKey:
    family, protocol, port, backend_port, _, address, backend = HIT_KEY.unpack_from(data)
    width = 4 if family == _AF_INET else 16
    return HitKey(protocol, address[:width], port, backend[:width], backend_port)


def defines() -> dict[str, int]:
    """What dnat_hits.h asserts and dnat_hits.c uses."""
    sizes = {
        "CONFIG_SIZE": CONFIG.size,
        "FRONTEND_KEY_SIZE": FRONTEND_KEY.size,
        "FRONTEND_ADDRESS_AT": FRONTEND_KEY.size - 16,
        "HIT_KEY_SIZE": HIT_KEY.size,
        "HIT_ADDRESS_AT": HIT_KEY.size - 32,
        "HIT_BACKEND_AT": HIT_KEY.size - 16,
        "SLOT_SIZE": SLOT.size,
        "SLOT_HITS_AT": 8 * HITS_WORD,
    }
    maps = {f"MAP_{each.name}": int(each) for each in Map}
    return sizes | maps | {f"LOST_{each.name}": int(each) for each in Loss}
