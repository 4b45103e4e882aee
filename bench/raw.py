"""The least that any program must do: bytes that lie ready, sent with a plain socket.

No class of ours is used here on purpose: this is what our own code is measured against.
"""

import contextlib
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33
BUFFER = 8 << 20
NLM_F_ACK = 0x004
NLMSG_ERROR = 2


class Sent(NamedTuple):
    """One send of somebody's, recorded: to which netlink protocol, and what."""

    protocol: int
    data: bytes


class PlainSocket:
    """A netlink socket that sends what it is given and reads one answer."""

    def __init__(self, protocol: int, most: int = BUFFER) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        for option in (SO_SNDBUFFORCE, SO_RCVBUFFORCE):
            self._socket.setsockopt(socket.SOL_SOCKET, option, max(most, BUFFER))
        self._socket.bind((0, 0))
        self._buffer = bytearray(1 << 16)

    def ask(self, data: bytes) -> None:
        """Send, and read the answer; OSError when it is a refusal."""
        self._socket.send(data)
        size = self._socket.recv_into(self._buffer)
        _, kind = struct.unpack_from("=IH", self._buffer)
        if kind == NLMSG_ERROR and size >= 20:
            (code,) = struct.unpack_from("=i", self._buffer, 16)
            if code:
                raise OSError(-code, os.strerror(-code))

    def drain(self) -> None:
        """Read what else has been answered."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._socket.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)

    def close(self) -> None:
        """Give the descriptor back."""
        self._socket.close()


def messages(data: bytes) -> Iterator[bytes]:
    """The single messages of joined ones."""
    start = 0
    while start < len(data):
        (length,) = struct.unpack_from("=I", data, start)
        yield data[start : start + length]
        start += (length + 3) & ~3


def split(data: bytes) -> list[bytes]:
    """The single messages of joined ones, each asking for an ACK of its own."""
    return [acknowledged(each) for each in messages(data)]


def acknowledged(data: bytes) -> bytes:
    """Joined messages of which the last one, and only that one, asks for an ACK."""
    last = len(data) - (len(list(messages(data))[-1]) + 3 & ~3)
    stamped = bytearray(data)
    (flags,) = struct.unpack_from("=H", stamped, last + 6)
    struct.pack_into("=H", stamped, last + 6, flags | NLM_F_ACK)
    return bytes(stamped)


def replay(sent: Iterable[Sent], sockets: dict[int, PlainSocket]) -> None:
    """Send everything again in the same order, each answered before the next."""
    for protocol, data in sent:
        sockets[protocol].ask(data)


def flush_ipvs(family_id: int) -> None:
    """Empty the namespace's IPVS table (IPVS_CMD_FLUSH): a namespace with 40,000 servers takes long to die."""
    sock = PlainSocket(16)
    sock.ask(struct.pack("=IHHIIBBH", 20, family_id, 1 | NLM_F_ACK, 1, 0, 17, 1, 0))
    sock.close()
