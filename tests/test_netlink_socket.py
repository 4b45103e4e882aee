"""netlink_socket.py: what counts as an answer to `exchange`, the shortest way to the kernel (here a socket pair)."""

import errno
import socket
import struct
from collections.abc import Iterator

import pytest

from dataplane.errors import KernelError, Unanswered
from dataplane.netlink_socket import (
    HEADER,
    NETLINK_GENERIC,
    NLM_F_ACK,
    NLM_F_REQUEST,
    NLMSG_ERROR,
    Failure,
    NetlinkSocket,
    message,
)

FIRST = message(0x1E, NLM_F_REQUEST, b"first one")
LAST = message(0x1E, NLM_F_REQUEST | NLM_F_ACK, b"last", socket.htonl(7))
NOOP = message(1, NLM_F_REQUEST, b"")


def answer(seq: int, request: bytes, code: int = 0) -> bytes:
    """NLMSG_ERROR: an ACK, or with an errno a refusal and the whole request."""
    told = struct.pack("=i", -code) + (request if code else request[:16])
    return HEADER.pack(16 + len(told), NLMSG_ERROR, 0, socket.htonl(seq), 0) + told


@pytest.fixture
def sock() -> Iterator[NetlinkSocket]:
    with NetlinkSocket(NETLINK_GENERIC, timeout=0.05) as one:
        yield one


@pytest.fixture
def kernel(sock: NetlinkSocket) -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    limit = struct.pack("@ll", 0, 50_000)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    sock._socket.close()
    sock._socket = ours
    with theirs:
        yield theirs


def test_an_ack_alone_is_success(sock: NetlinkSocket, kernel: socket.socket) -> None:
    kernel.send(answer(7, LAST))
    assert not sock.exchange(FIRST + LAST, 7)
    assert kernel.recv(1000) == FIRST + LAST


def test_what_was_refused_is_told_before_the_ack(sock: NetlinkSocket, kernel: socket.socket) -> None:
    kernel.send(answer(0, FIRST, errno.ENOENT))
    kernel.send(answer(7, LAST))
    assert list(sock.exchange(FIRST + LAST, 7)) == [Failure(errno.ENOENT, FIRST[:-3])]


def test_the_last_one_may_be_the_refused_one(sock: NetlinkSocket, kernel: socket.socket) -> None:
    kernel.send(answer(7, LAST, errno.EEXIST))
    assert list(sock.exchange(FIRST + LAST, 7)) == [Failure(errno.EEXIST, LAST)]


def test_another_requests_ack_is_not_taken_for_ours(sock: NetlinkSocket, kernel: socket.socket) -> None:
    kernel.send(answer(6, LAST))
    kernel.send(answer(7, LAST))
    assert not sock.exchange(LAST, 7)
    kernel.send(answer(6, LAST))
    with pytest.raises(Unanswered):
        sock.exchange(LAST, 7)


def test_a_request_without_an_answer_is_unanswered_and_gets_a_new_socket(sock: NetlinkSocket) -> None:
    before = sock._socket
    with pytest.raises(Unanswered) as caught:
        sock.exchange(NOOP, 7)
    assert caught.value.errno == errno.ETIMEDOUT
    assert sock._socket is not before
    assert before.fileno() == -1


def test_an_answer_that_does_not_fit_is_unanswered(sock: NetlinkSocket, kernel: socket.socket) -> None:
    kernel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
    kernel.send(answer(7, LAST, errno.EINVAL) + bytes(1 << 16))
    with pytest.raises(Unanswered) as caught:
        sock.exchange(LAST, 7)
    assert caught.value.errno == errno.EMSGSIZE


def test_what_cannot_be_sent_is_refused(sock: NetlinkSocket) -> None:
    sock._socket.close()
    with pytest.raises(KernelError) as caught:
        sock.exchange(LAST, 7)
    assert caught.value.errno == errno.EBADF
    assert not isinstance(caught.value, Unanswered)


def test_numbers_start_again_after_the_largest(sock: NetlinkSocket) -> None:
    sock._seq = (1 << 30) - 2
    assert [sock.next_seq() for _ in range(3)] == [(1 << 30) - 1, 1, 2]
