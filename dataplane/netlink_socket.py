"""One netlink socket: requests with an answer, batches with one barrier, dumps, and notifications.

Rules kept here so that nobody above has to think of them (linux/netlink.h, af_netlink.c):

* every call has a deadline; after a missed one the socket is replaced, so that a late answer cannot be taken for the
  next one's;
* answers count only when they come from the kernel (nl_pid 0) and carry the request's sequence number;
* a batch asks for an ACK of its last message only: silence is success, each failure is answered by the errno and a copy
  of the message that failed, and the ACK is the barrier behind which no more answers come;
* an interrupted dump (NLM_F_DUMP_INTR) is read again, a bounded number of times.
"""

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import NamedTuple, Self

from .errors import KernelError, NotRoot, Unanswered, WireError
from .nlattr import NlAttrs, attr, cstring, u16

NLM_F_REQUEST = 0x001
NLM_F_ACK = 0x004
NLM_F_ECHO = 0x008
NLM_F_DUMP_INTR = 0x010
NLM_F_DUMP = 0x300
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_ACK_TLVS = 0x200  # in an NLMSG_ERROR

NLMSG_ERROR = 2
NLMSG_DONE = 3
NLMSG_MIN_TYPE = 0x10

NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12
NETLINK_GENERIC = 16
GENL_ID_CTRL = 0x10
CTRL_CMD_GETFAMILY = 3

SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP = 1
NETLINK_EXT_ACK = 11
NETLINK_GET_STRICT_CHK = 12
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33

HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: len, type, flags, seq, pid
GENL_HEADER = struct.Struct("=BBH")  # struct genlmsghdr: cmd, version, reserved
_read_header = HEADER.unpack_from
_read_error = struct.Struct("=i").unpack_from
_ACK_SIZE = 36
_read_ack = struct.Struct("=4xH2xI4xi").unpack_from  # type, seq and error of an NLMSG_ERROR
_read_swapped_ack = struct.Struct(">4xH2xI4xi").unpack_from
_SWAPPED_ERROR = socket.htons(NLMSG_ERROR)
_MSG_TRUNC = int(socket.MSG_TRUNC)
_stamp_flags = struct.Struct("=HI").pack_into  # nlmsg_flags and nlmsg_seq, at offset 6

SEND_BUFFER = 4 << 20
RECEIVE_BUFFER = 32 << 20  # holds the failures of a whole chunk: about 1 kB of kernel memory each
BUFFER = 1 << 16  # of one answer
CHUNK = 1 << 20  # bytes of messages per sendmsg
DUMP_TRIES = 30
MAX_SEQ = (1 << 30) - 1


class Failure(NamedTuple):
    """A message of a batch that the kernel refused: positive errno, the message itself, the kernel's words if any."""

    errno: int
    message: bytes
    text: str = ""


class _ErrorAttrs(NlAttrs):
    """NLMSGERR_ATTR_* (linux/netlink.h)."""

    msg = attr(1, cstring)


class DumpInterrupted(Unanswered):
    """The kernel said that every try of a dump was torn by concurrent changes."""


def message(kind: int, flags: int, payload: bytes, seq: int = 0) -> bytes:
    """struct nlmsghdr and payload, padded."""
    return HEADER.pack(16 + len(payload), kind, flags, seq, 0) + payload + bytes(-len(payload) % 4)


def genl_message(family: int, command: int, flags: int, attributes: bytes = b"", version: int = 1) -> bytes:
    """A generic netlink request (linux/genetlink.h)."""
    return message(family, NLM_F_REQUEST | flags, GENL_HEADER.pack(command, version, 0) + attributes)


class NetlinkSocket:
    """A socket in the network namespace of the thread that makes it. Not for use by two threads at once.

    `timeout`: seconds one answer may take.
    """

    def __init__(self, protocol: int, *, timeout: float = 10.0, groups: Iterable[int] = ()) -> None:
        self._protocol = protocol
        self._timeout = timeout
        self._groups = tuple(groups)
        self._seq = int.from_bytes(os.urandom(3))
        self._buffer = bytearray(BUFFER)
        self._view = memoryview(self._buffer)
        self._socket = self._open()

    def _open(self) -> socket.socket:
        opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, self._protocol)
        for force, plain, size in (
            (SO_SNDBUFFORCE, socket.SO_SNDBUF, SEND_BUFFER),
            (SO_RCVBUFFORCE, socket.SO_RCVBUF, RECEIVE_BUFFER),
        ):
            try:
                opened.setsockopt(socket.SOL_SOCKET, force, size)
            except PermissionError:
                opened.setsockopt(socket.SOL_SOCKET, plain, size)
        whole = int(self._timeout)
        limit = struct.pack("@ll", whole, int((self._timeout - whole) * 1e6))
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        opened.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        if self._protocol == NETLINK_ROUTE:
            opened.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)  # dumps by interface or protocol only
        opened.bind((0, 0))
        opened.connect((0, 0))  # unicast from anybody but the kernel is refused, so answers need no look at the sender
        for group in self._groups:
            opened.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        return opened

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the descriptor back."""
        self._socket.close()

    def fileno(self) -> int:
        """For select and event loops."""
        return self._socket.fileno()

    @property
    def port(self) -> int:
        """This socket's address (nl_pid): notifications of changes made through it carry it."""
        port: int = self._socket.getsockname()[0]
        return port

    # ------------------------------------------------------------------------------------------------- requests

    def request(self, request: bytes, operation: str = "", subject: str = "") -> None:
        """Send one message and wait for its ACK; KernelError with the kernel's errno when it is refused."""
        failures = self.batch([request])
        if failures:
            raise kernel_error(operation, subject, failures[0].errno, failures[0].text)

    def batch(self, groups: Iterable[bytes]) -> list[Failure]:
        """Send groups of messages (one or more whole messages each); returns what the kernel refused. Not atomic.

        Groups travel joined, about CHUNK bytes per sendmsg; an ACK is asked of the last message of each chunk only, so
        that no more failures than those of one chunk ever wait in the receive buffer.
        """
        failures: list[Failure] = []
        waiting: list[bytes] = []
        size = 0
        for group in groups:
            waiting.append(group)
            size += len(group)
            if size >= CHUNK:
                self._send_chunk(waiting, failures)
                waiting, size = [], 0
        if waiting:
            self._send_chunk(waiting, failures)
        return failures

    def next_seq(self) -> int:
        """The number of the next request."""
        self._seq = seq = self._seq + 1 if self._seq < MAX_SEQ else 1
        return seq

    def exchange(self, data: bytes, seq: int) -> Sequence[Failure]:
        """`batch` for a few messages that lie ready: joined, the last one with `seq` and NLM_F_ACK, the others without.

        What the commonest errand of all takes, and nothing else. `seq` is in network order, as templates pack it (to
        the kernel it is four bytes that come back).
        """
        try:
            self._socket.send(data)
        except OSError as error:
            raise _not_sent(error, len(data)) from error
        try:
            size = self._socket.recv_into(self._buffer, 0, _MSG_TRUNC)
        except OSError as error:
            raise self._not_read(error) from error
        if size == _ACK_SIZE and _read_swapped_ack(self._buffer) == (_SWAPPED_ERROR, seq, 0):
            return ()  # nothing but the ACK
        if size > BUFFER:
            raise self._too_long(size)
        failures: list[Failure] = []
        self._collect(socket.ntohl(seq), failures, None, size)
        return failures

    def _send_chunk(self, groups: list[bytes], failures: list[Failure]) -> None:
        seq = self.next_seq()
        data = bytearray().join(groups)
        # the last message is looked for in the last group only: netlink messages have no trailer
        end = len(data)
        start = end - len(groups[-1])
        while True:
            length, _, flags, _, _ = _read_header(data, start)
            following = start + ((length + 3) & ~3)
            if following >= end:
                break
            start = following
        _stamp_flags(data, start + 6, flags | NLM_F_ACK, seq)
        self._send(data)
        self._collect(seq, failures)

    def transaction(self, messages: bytes, barrier: int, echoes: list[bytes] | None = None) -> list[Failure]:
        """Send messages that the kernel takes or refuses as one (an nfnetlink batch); returns what it refused.

        `echoes` takes in what the kernel tells of messages with NLM_F_ECHO, which it does before it acknowledges.

        The ACK is asked of the message at offset `barrier`, the last one before the batch's end: kernels before 6.10 do
        not answer the end itself. The batch's header gets the same number, since a refusal of the whole batch is
        answered with it, and then nothing else comes.
        """
        seq = self.next_seq()
        stamped = bytearray(messages)
        _stamp_flags(stamped, 6, _read_header(stamped, 0)[2], seq)
        _stamp_flags(stamped, barrier + 6, _read_header(stamped, barrier)[2] | NLM_F_ACK, seq)
        if len(stamped) > SEND_BUFFER:  # one sendmsg or it is not one batch
            self._socket.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, len(stamped))
        self._send(stamped)
        failures: list[Failure] = []
        self._collect(seq, failures, echoes)
        return failures

    def dump(self, request: bytes, select: Callable[[bytearray, int, int], bool] | None = None) -> list[bytes]:
        """The messages (header included) that answer a dump request; torn dumps are read again.

        `select(buffer, start, stop)`: which messages to keep; the rest of a large table is never copied.
        """
        for _ in range(DUMP_TRIES):
            seq = self.next_seq()
            stamped = bytearray(request)
            flags = HEADER.unpack_from(request)[2] | NLM_F_DUMP | NLM_F_REQUEST
            _stamp_flags(stamped, 6, flags, seq)
            self._send(stamped)
            answers, torn = self._read_dump(seq, select)
            if not torn:
                return answers
        raise DumpInterrupted("dump", "", errno.EINTR, f"torn by concurrent changes {DUMP_TRIES} times in a row")

    def get(self, request: bytes, operation: str = "", subject: str = "") -> bytes:
        """Send one request that is answered by one message (no dump); returns that message."""
        seq = self.next_seq()
        stamped = bytearray(request)
        _stamp_flags(stamped, 6, HEADER.unpack_from(request)[2] | NLM_F_REQUEST, seq)
        self._send(stamped)
        while True:
            for kind, _, answer_seq, start, stop in self._messages(self._receive()):
                if answer_seq != seq:
                    continue
                if kind == NLMSG_ERROR:
                    (code,) = _read_error(self._buffer, start + 16)
                    raise kernel_error(operation, subject, -code)
                return bytes(self._view[start:stop])

    def notifications(self) -> tuple[list[bytes], bool]:
        """What multicast groups brought since the last call, without waiting; True = some were lost (ENOBUFS)."""
        arrived: list[bytes] = []
        lost = False
        while True:
            try:
                size, (sender, _) = self._socket.recvfrom_into(self._buffer, 0, socket.MSG_DONTWAIT | socket.MSG_TRUNC)
            except BlockingIOError:
                return arrived, lost
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = True
                continue
            if sender == 0 and size <= len(self._buffer):
                arrived += [bytes(self._view[start:stop]) for _, _, _, start, stop in self._messages(size)]
            elif sender == 0:
                lost = True

    # ------------------------------------------------------------------------------------------------- plumbing

    def _send(self, data: bytes | bytearray) -> None:
        try:
            self._socket.send(data)
        except OSError as error:
            raise _not_sent(error, len(data)) from error

    def _receive(self) -> int:
        """Bytes read into the buffer from the kernel; an unknown outcome replaces the socket and raises Unanswered."""
        try:
            size = self._socket.recv_into(self._buffer, 0, _MSG_TRUNC)
        except OSError as error:
            raise self._not_read(error) from error
        if size > BUFFER:
            raise self._too_long(size)
        return size

    def _not_read(self, error: OSError) -> Unanswered:
        self._replace()
        if isinstance(error, BlockingIOError):
            return Unanswered("wait for", "the kernel", errno.ETIMEDOUT, f"no answer in {self._timeout} s")
        return Unanswered("read", "the kernel's answer", error.errno or 0)

    def _too_long(self, size: int) -> Unanswered:
        self._replace()
        return Unanswered("read", "the kernel's answer", errno.EMSGSIZE, f"{size} bytes in one message")

    def _replace(self) -> None:
        self._socket.close()
        self._socket = self._open()

    def _messages(self, size: int) -> Iterator[tuple[int, int, int, int, int]]:
        """(type, flags, seq, start, stop) of each message in the first `size` bytes of the buffer."""
        start = 0
        while start + 16 <= size:
            length, kind, flags, seq, _ = _read_header(self._buffer, start)
            if length < 16 or start + length > size:
                raise WireError(f"netlink message at offset {start}: length {length}, {size - start} left")
            yield kind, flags, seq, start, start + length
            start += (length + 3) & ~3

    def _collect(
        self, barrier: int, failures: list[Failure], echoes: list[bytes] | None = None, arrived: int = 0
    ) -> None:
        """Read answers up to the barrier's; `arrived`: bytes of them that are in the buffer already."""
        while True:
            size, arrived = arrived or self._receive(), 0
            if size == _ACK_SIZE and _read_ack(self._buffer) == (NLMSG_ERROR, barrier, 0):
                return  # nothing but the ACK: what nearly every answer is
            done = False
            for kind, flags, seq, start, stop in self._messages(size):
                if kind != NLMSG_ERROR:
                    if echoes is not None:
                        echoes.append(bytes(self._view[start:stop]))
                    continue
                (code,) = _read_error(self._buffer, start + 16)
                if code:
                    failures.append(self._failure(-code, flags, start + 20, stop))
                done = done or seq == barrier
            if done:
                return

    def _failure(self, code: int, flags: int, start: int, stop: int) -> Failure:
        """What an NLMSG_ERROR tells behind its errno: the refused message, then extended ACK attributes."""
        end = min(start + _read_header(self._buffer, start)[0], stop)
        told = _ErrorAttrs.decode(self._buffer, (end + 3) & ~3, stop) if flags & NLM_F_ACK_TLVS else {}
        return Failure(code, bytes(self._view[start:end]), told.get("msg", ""))

    def _read_dump(self, seq: int, select: Callable[[bytearray, int, int], bool] | None) -> tuple[list[bytes], bool]:
        answers: list[bytes] = []
        torn = False
        while True:
            for kind, flags, answer_seq, start, stop in self._messages(self._receive()):
                if answer_seq != seq:
                    continue
                torn = torn or bool(flags & NLM_F_DUMP_INTR)
                if kind in (NLMSG_DONE, NLMSG_ERROR):
                    (code,) = _read_error(self._buffer, start + 16) if stop - start >= 20 else (0,)
                    if code:
                        raise kernel_error("dump", "", -code)
                    return answers, torn
                if select is None or select(self._buffer, start, stop):
                    answers.append(bytes(self._view[start:stop]))


def _not_sent(error: OSError, size: int) -> KernelError | NotRoot:
    if isinstance(error, PermissionError):
        return NotRoot("the kernel asks for CAP_NET_ADMIN: run as root")
    return KernelError("send", f"{size} bytes", error.errno or 0)


def kernel_error(operation: str, subject: str, code: int, hint: str = "") -> KernelError | NotRoot:
    """The exception for an errno the kernel gave."""
    if code in (errno.EPERM, errno.EACCES):
        return NotRoot(f"{operation} {subject}: the kernel asks for CAP_NET_ADMIN: run as root".strip())
    return KernelError(operation, subject, code, hint)


class _FamilyAttrs(NlAttrs):
    """CTRL_ATTR_* (linux/genetlink.h)."""

    family_id = attr(1, u16)
    family_name = attr(2, cstring)


def resolve_family(sock: NetlinkSocket, name: str) -> int:
    """The message type of a generic netlink family; KernelError(ENOENT) when the kernel has no such family."""
    request = genl_message(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, 0, _FamilyAttrs.encode(family_name=name))
    answer = sock.get(request, "look up generic netlink family", name)
    family: int = _FamilyAttrs.decode(answer, HEADER.size + GENL_HEADER.size)["family_id"]
    return family
