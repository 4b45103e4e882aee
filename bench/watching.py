"""What our own sockets do: which bytes they send, and how long each kernel subsystem takes.

Only for processes of `isolation.isolated`: it changes NetlinkSocket for the whole process.
"""

import time
from collections.abc import Iterable
from typing import Any

from dataplane.netlink_socket import NetlinkSocket

from .raw import Sent

PARTS = {16: "ipvs", 0: "vips", 12: "guard"}
"""Netlink protocol numbers (generic, route, netfilter) and what ipvs mode uses them for."""


def record() -> list[Sent]:
    """From now on everything our sockets send is noted, also, in the list that is returned."""
    sent: list[Sent] = []
    plain, exchange = NetlinkSocket._send, NetlinkSocket.exchange

    def send(self: NetlinkSocket, data: bytes | bytearray) -> None:
        sent.append(Sent(self._protocol, bytes(data)))
        plain(self, data)

    def exchanged(self: NetlinkSocket, data: bytes, seq: int) -> Any:
        sent.append(Sent(self._protocol, data))
        return exchange(self, data, seq)

    NetlinkSocket._send = send  # type: ignore[method-assign]
    NetlinkSocket.exchange = exchanged  # type: ignore[method-assign]
    return sent


def keep_time() -> dict[str, float]:
    """From now on the seconds spent in batches are summed up by subsystem, encoding included."""
    spent = dict.fromkeys(PARTS.values(), 0.0)
    batch, transaction, exchange = NetlinkSocket.batch, NetlinkSocket.transaction, NetlinkSocket.exchange

    def timed_batch(self: NetlinkSocket, groups: Iterable[bytes]) -> Any:
        started = time.perf_counter()
        try:
            return batch(self, groups)
        finally:
            spent[PARTS[self._protocol]] += time.perf_counter() - started

    def timed_transaction(self: NetlinkSocket, messages: bytes, barrier: int, echoes: list[bytes] | None = None) -> Any:
        started = time.perf_counter()
        try:
            return transaction(self, messages, barrier, echoes)
        finally:
            spent[PARTS[self._protocol]] += time.perf_counter() - started

    def timed_exchange(self: NetlinkSocket, data: bytes, seq: int) -> Any:
        started = time.perf_counter()
        try:
            return exchange(self, data, seq)
        finally:
            spent[PARTS[self._protocol]] += time.perf_counter() - started

    NetlinkSocket.exchange = timed_exchange  # type: ignore[method-assign]
    NetlinkSocket.batch = timed_batch  # type: ignore[method-assign]
    NetlinkSocket.transaction = timed_transaction  # type: ignore[method-assign]
    return spent
