"""UDP in batches: one system call takes up to 64 queries, one sends their answers (recvmmsg(2), sendmmsg(2)).

Two calls for each query take longer than looking up its answer, and each gives up the interpreter's lock, which a busy
agent beside us would keep for milliseconds. Where the layout of the kernel's structures is not the one known here
(64 bits, little-endian), `PlainSocket` does the same by single calls.

A socket at every address of a machine sends an answer from the address that was asked (IP_PKTINFO).
"""

import ctypes
import os
import socket
import struct
import sys
from collections.abc import Iterable

from ..errors import DataplaneError
from ..tcp_listener import Listen

BATCH = 64
RECEIVE_BYTES = 2048
"""Of a query; what is longer is cut, and malformed."""
SEND_BYTES = 4096
BUFFER = 4 << 20
"""Bytes the kernel keeps for us while we are busy, as far as it allows."""
_NAME, _CONTROL = 28, 64
_WORDS = 8
"""struct mmsghdr in words of 64 bits: name, namelen, iov, iovlen, control, controllen, flags, len."""
_EAGAIN = {11}
_IP_PKTINFO = 8
_IPV6_RECVPKTINFO = 49
BATCHES = ctypes.sizeof(ctypes.c_void_p) == 8 and sys.byteorder == "little"


def open_udp(listen: Listen) -> socket.socket:
    """A socket there, that does not block. DataplaneError names the address and the reason."""
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    one = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if is_everywhere(listen):
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
            else:
                one.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        one.bind((listen.host, listen.port))
    except OSError as error:
        one.close()
        raise DataplaneError(f"{listen}: {(error.strerror or str(error)).lower()}") from error
    return one


def is_everywhere(listen: Listen) -> bool:
    """Whether it is every address of the machine."""
    return not any(socket.inet_pton(socket.AF_INET6 if ":" in listen.host else socket.AF_INET, listen.host))


def client_of(name: bytes) -> tuple[str, int]:
    """Address and port in a struct sockaddr_in or sockaddr_in6, for people."""
    port = int.from_bytes(name[2:4])
    if int.from_bytes(name[:2], sys.byteorder) == socket.AF_INET:
        return socket.inet_ntoa(name[4:8]), port
    return socket.inet_ntop(socket.AF_INET6, name[8:24]), port


class Letter:
    """One query and the way back to its sender. `name`: struct sockaddr; `control`: what chose our address."""

    __slots__ = ("control", "name", "packet")

    def __init__(self, packet: bytes, name: bytes, control: bytes = b"") -> None:
        self.packet = packet
        self.name = name
        self.control = control


class BatchSocket:
    """Batches on a socket. What it gives out is good until the next `receive`, but for copies (`letter`)."""

    def __init__(self, one: socket.socket, *, everywhere: bool) -> None:
        self.socket = one
        self._fd = one.fileno()
        libc = ctypes.CDLL(None, use_errno=True)
        self._recvmmsg, self._sendmmsg = libc.recvmmsg, libc.sendmmsg
        self._recvmmsg.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p]
        self._sendmmsg.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int]
        self._control_size = _CONTROL if everywhere else 0
        self._in, at_in = _block(BATCH * RECEIVE_BYTES)
        self._out, at_out = _block(BATCH * SEND_BYTES)
        self._names, at_names = _block(BATCH * _NAME)
        self._controls, at_controls = _block(BATCH * _CONTROL)
        iov_in, at_iov_in = _block(BATCH * 16)
        iov_out, at_iov_out = _block(BATCH * 16)
        heads_in, self._at_heads_in = _block(BATCH * 64)
        heads_out, self._at_heads_out = _block(BATCH * 64)
        self._lengths = iov_out.cast("Q")
        self._received, self._sent = heads_in.cast("Q"), heads_out.cast("Q")
        self._iovs = iovs = iov_in.cast("Q")  # kept: the kernel reads it
        for index in range(BATCH):
            iovs[2 * index : 2 * index + 2] = memoryview(
                struct.pack("QQ", at_in + index * RECEIVE_BYTES, RECEIVE_BYTES)
            ).cast("Q")
            self._lengths[2 * index] = at_out + index * SEND_BYTES
            control = at_controls + index * _CONTROL if everywhere else 0
            for words, iov in ((self._received, at_iov_in), (self._sent, at_iov_out)):
                fields = (at_names + index * _NAME, _NAME, iov + 16 * index, 1, control, self._control_size, 0, 0)
                words[_WORDS * index : _WORDS * (index + 1)] = memoryview(struct.pack("8Q", *fields)).cast("Q")
        self._at_names, self._at_controls = at_names, at_controls

    def receive(self) -> list[bytes]:
        """What has come, at most a batch; [] = nothing."""
        words = self._received
        count: int = self._recvmmsg(self._fd, self._at_heads_in, BATCH, socket.MSG_DONTWAIT, None)
        if count <= 0:
            return []
        packets = []
        start = 0
        for index in range(count):
            base = _WORDS * index
            length = words[base + 7] & 0xFFFFFFFF
            packets.append(bytes(self._in[start : start + length]))
            start += RECEIVE_BYTES
        return packets

    def renew(self, count: int) -> None:
        """The kernel has written how long names and controls were: make room again."""
        words, control = self._received, self._control_size
        for base in range(0, count * _WORDS, _WORDS):
            words[base + 1] = _NAME
            words[base + 5] = control

    def name(self, index: int) -> bytes:
        """Whose query it is: the bytes of the address, without the port."""
        start = index * _NAME
        if self._names[start] == socket.AF_INET:
            return bytes(self._names[start + 4 : start + 8])
        return bytes(self._names[start + 8 : start + 24])

    def letter(self, index: int, packet: bytes) -> Letter:
        """A copy of a query for later."""
        name = bytes(self._names[index * _NAME : (index + 1) * _NAME])
        length = self._received[_WORDS * index + 5]
        control = bytes(self._controls[index * _CONTROL : index * _CONTROL + length]) if self._control_size else b""
        return Letter(packet, name, control)

    def send(self, answers: Iterable[tuple[int, bytes]]) -> None:
        """Answers to queries of the batch, by their places in it. What the kernel does not take is lost."""
        words, lengths, out, received = self._sent, self._lengths, self._out, self._received
        count = 0
        for index, answer in answers:
            length = len(answer)
            start = count * SEND_BYTES
            out[start : start + length] = answer
            lengths[2 * count + 1] = length
            base, origin = _WORDS * count, _WORDS * index
            words[base] = self._at_names + index * _NAME
            words[base + 1] = received[origin + 1]
            if self._control_size:
                self._aim(index)
                words[base + 4] = self._at_controls + index * _CONTROL
                words[base + 5] = received[origin + 5]
            count += 1
        first = 0
        while first < count:
            at = self._at_heads_out + 8 * _WORDS * first
            sent: int = self._sendmmsg(self._fd, at, count - first, socket.MSG_DONTWAIT)
            if sent > 0:
                first += sent
            elif ctypes.get_errno() in _EAGAIN:
                return
            else:
                first += 1  # this one cannot be sent (no route, a firewall): the others can

    def _aim(self, index: int) -> None:
        """Of what came with a query, keep the address it was sent to, and not the device it came by."""
        start = index * _CONTROL + 16
        if self._names[index * _NAME] == socket.AF_INET:
            self._controls[start : start + 4] = bytes(4)  # struct in_pktinfo: ifindex, spec_dst, addr
        elif bytes(self._controls[start : start + 2]) != b"\xfe\x80":  # in6_pktinfo: addr, ifindex
            self._controls[start + 16 : start + 20] = bytes(4)

    def reply(self, letter: Letter, answer: bytes) -> None:
        """Answer a copied query."""
        address = client_of(letter.name)
        where: tuple[object, ...] = address
        control: list[tuple[int, int, bytes]] = []
        if int.from_bytes(letter.name[:2], sys.byteorder) == socket.AF_INET6:
            where = (*address, 0, int.from_bytes(letter.name[24:28], sys.byteorder))
            if letter.control:
                info = letter.control[16:32] + (
                    letter.control[32:36] if letter.control[16:18] == b"\xfe\x80" else bytes(4)
                )
                control.append((socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, info))
        elif letter.control:
            control.append((socket.IPPROTO_IP, _IP_PKTINFO, bytes(4) + letter.control[20:28]))
        self.socket.sendmsg([answer], control, 0, where)


class PlainSocket:
    """The same by single calls."""

    def __init__(self, one: socket.socket, *, everywhere: bool) -> None:
        self.socket = one
        self._from: list[tuple[object, ...]] = []

    def receive(self) -> list[bytes]:
        """What has come, at most a batch."""
        packets: list[bytes] = []
        self._from.clear()
        for _ in range(BATCH):
            try:
                packet, sender = self.socket.recvfrom(RECEIVE_BYTES)
            except OSError:
                break
            packets.append(packet)
            self._from.append(sender)
        return packets

    def renew(self, count: int) -> None:
        """Nothing to be done."""

    def name(self, index: int) -> bytes:
        """Whose query it is."""
        host = str(self._from[index][0]).partition("%")[0]
        return socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)

    def letter(self, index: int, packet: bytes) -> Letter:
        """A copy of a query for later."""
        host, port = self.name(index), int(str(self._from[index][1]))
        family = socket.AF_INET if len(host) == 4 else socket.AF_INET6
        head = struct.pack("=H", family) + port.to_bytes(2)
        return Letter(packet, head + (host if len(host) == 4 else bytes(4) + host + bytes(4)))

    def send(self, answers: Iterable[tuple[int, bytes]]) -> None:
        """Answers to queries of the batch."""
        for index, answer in answers:
            try:
                self.socket.sendto(answer, self._from[index])
            except OSError:
                continue

    def reply(self, letter: Letter, answer: bytes) -> None:
        """Answer a copied query."""
        self.socket.sendto(answer, client_of(letter.name))


def _block(size: int) -> tuple[memoryview, int]:
    """Memory, and where it is."""
    array = (ctypes.c_char * size)()
    return memoryview(array).cast("B"), ctypes.addressof(array)


def open_batches(one: socket.socket, listen: Listen) -> BatchSocket | PlainSocket:
    """The quicker way that there is here."""
    kind = BatchSocket if BATCHES and os.uname().sysname == "Linux" else PlainSocket
    return kind(one, everywhere=is_everywhere(listen))
