"""Real traffic between namespaces: servers that say who they are, and clients that count every way to fail."""

import contextlib
import functools
import multiprocessing
import os
import selectors
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .netns import NetNs, Pod

PORT = 9376
_udp_ports = iter(range(10_000, 60_000))
SCTP = 132


@functools.cache
def has_sctp() -> bool:
    """Whether this kernel has sockets for it; its netfilter may know the protocol without."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, SCTP).close()
    except OSError:
        return False
    return True


def _listeners(pod: Pod, name: str) -> list[tuple[socket.socket, bytes]]:
    sockets = []
    with pod.ns.enter():
        for address in pod.addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            kinds = [(socket.SOCK_STREAM, 0), (socket.SOCK_DGRAM, 0)]
            kinds += [(socket.SOCK_STREAM, SCTP)] if family == socket.AF_INET and has_sctp() else []
            for kind, protocol in kinds:
                one = socket.socket(family, kind, protocol)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.bind((address, PORT))
                if kind == socket.SOCK_STREAM:
                    one.listen(1024)
                one.setblocking(False)
                sockets.append((one, name.encode()))
    return sockets


def _serve(listeners: list[tuple[socket.socket, bytes]]) -> None:
    """Say the name to whoever connects (or sends a datagram), then echo."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    selector = selectors.EpollSelector()
    for listener, name in listeners:
        selector.register(listener, selectors.EVENT_READ, name)
    while True:
        for key, _ in selector.select():
            assert isinstance(key.fileobj, socket.socket)
            one = key.fileobj
            try:
                if key.data is None:
                    data = one.recv(4096)
                    if data:
                        one.send(data)
                    else:
                        selector.unregister(one)
                        one.close()
                elif one.type == socket.SOCK_DGRAM:
                    _, peer = one.recvfrom(4096)
                    one.sendto(key.data, peer)
                else:
                    accepted, _ = one.accept()
                    accepted.send(key.data)
                    selector.register(accepted, selectors.EVENT_READ, None)
            except BlockingIOError:
                continue
            except OSError:
                if key.data is None:
                    selector.unregister(one)
                    one.close()


@contextlib.contextmanager
def _serving(listeners: list[tuple[socket.socket, bytes]]) -> Iterator[None]:
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(listeners,), daemon=True)
    process.start()
    for one, _ in listeners:
        one.close()
    try:
        yield
    finally:
        process.kill()
        process.join()


@contextlib.contextmanager
def servers(pods: Sequence[Pod]) -> Iterator[list[str]]:
    """A server in each pod, on TCP, UDP and, where there is SCTP, SCTP port 9376; they are named pod0, pod1, …"""
    names = [f"pod{number}" for number in range(len(pods))]
    with _serving([one for pod, name in zip(pods, names, strict=True) for one in _listeners(pod, name)]):
        yield names


@contextlib.contextmanager
def host_server(node: NetNs) -> Iterator[None]:
    """A server named host on port 9376 of every address of the node, TCP and UDP, as an sshd would be."""
    with node.enter():
        listeners = [socket.socket(socket.AF_INET, kind) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)]
    for one in listeners:
        one.bind(("0.0.0.0", PORT))
        one.setblocking(False)
    listeners[0].listen(8)
    with _serving([(one, b"host") for one in listeners]):
        yield


@dataclass(frozen=True)
class Caller:
    """A client in a namespace. Nothing is ever tried twice: that would hide a loss."""

    ns: NetNs

    def ask(self, address: str, port: int, *, kind: str = "tcp", timeout: float = 5) -> str:
        """Who answers at an address, or how it failed: "refused", "timeout", "reset" or the error's name."""
        with self.ns.enter():
            one = self._socket(address, kind)
        with one:
            one.settimeout(timeout)
            try:
                if kind != "tcp":
                    # a source port used before is an old connection to IPVS and conntrack, with the server it had
                    one.bind(("::" if ":" in address else "0.0.0.0", next(_udp_ports)))
                one.connect((address, port))
                if kind == "udp":
                    one.send(b"?")
                return one.recv(64).decode() or "closed"
            except TimeoutError:
                return "timeout"
            except ConnectionRefusedError:
                return "refused"
            except ConnectionResetError:
                return "reset"
            except OSError as error:
                return error.strerror or repr(error)

    def tally(self, times: int, address: str, port: int, *, kind: str = "tcp") -> Counter[str]:
        """How often each server answered."""
        return Counter(self.ask(address, port, kind=kind) for _ in range(times))

    def hold(self, address: str, port: int) -> "Held":
        """A connection that stays open."""
        with self.ns.enter():
            one = self._socket(address, "tcp")
        one.settimeout(10)
        one.connect((address, port))
        return Held(one, one.recv(64).decode())

    @staticmethod
    def _socket(address: str, kind: str) -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        if kind == "udp":
            return socket.socket(family, socket.SOCK_DGRAM)
        return socket.socket(family, socket.SOCK_STREAM, SCTP if kind == "sctp" else 0)


@dataclass(frozen=True)
class Held:
    """An open connection to a server."""

    socket: socket.socket
    server: str

    def beats(self) -> bool:
        """The server still echoes."""
        try:
            self.socket.send(b"beat")
            return self.socket.recv(64) == b"beat"
        except OSError:
            return False

    def close(self) -> None:
        self.socket.close()


def eventually(what: str, check: object, seconds: float = 30, pause: float = 0.05) -> None:
    """Wait for a condition with a bound, which an emulated kernel gets three times over; the only place in the tests
    that sleeps for one."""
    assert callable(check)
    seconds *= 3 if "DATAPLANE_GUEST" in os.environ else 1
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(pause)
