"""What a service manager hears of the agent, on a real datagram socket."""

import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataplane.systemd_notify import PING_MOST, ServiceManager, take_service_manager

from .netns import NetNs
from .node_agent import manifest, node_agent


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The service manager's end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(30)
        yield sock


def heard(manager: socket.socket) -> list[str]:
    return manager.recv(4096).decode().splitlines()


def test_what_is_told(manager: socket.socket) -> None:
    service = ServiceManager(manager.getsockname())
    service.waiting("waiting")
    assert heard(manager) == ["STATUS=waiting"]
    service.reloaded("there was no reload")
    service.ready("3 virtual servers\nREADY=1")
    assert heard(manager) == ["READY=1", "STATUS=3 virtual servers\\nREADY=1"]  # a name cannot add a line
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    service.reloading()
    first, second = heard(manager)
    assert first == "RELOADING=1"
    assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    service.reloaded("again")
    assert heard(manager) == ["READY=1", "STATUS=again"]
    service.stopping()
    assert heard(manager)[0] == "STOPPING=1"


def test_signs_of_life_come_when_due_and_not_more_often(manager: socket.socket) -> None:
    now = 100.0
    service = ServiceManager(manager.getsockname(), 12.0, lambda: now)
    assert service.due == 104.0
    service.alive()
    now = 104.5
    service.alive()
    service.alive()
    assert (heard(manager), service.due) == (["WATCHDOG=1"], 108.5)
    manager.settimeout(0)
    with pytest.raises(BlockingIOError):
        manager.recv(1)
    assert ServiceManager(manager.getsockname(), 3600, lambda: now).due == now + PING_MOST


def test_an_abstract_socket() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("")  # autobind: an abstract name
        sock.settimeout(5)
        ServiceManager("@" + sock.getsockname()[1:].decode()).ready("x")
        assert heard(sock)[0] == "READY=1"


def test_a_service_manager_that_is_gone_or_deaf_stops_nobody(manager: socket.socket, tmp_path: Path) -> None:
    ServiceManager(str(tmp_path / "nothing")).ready("x")
    service = ServiceManager(manager.getsockname())
    for _ in range(2000):
        service.waiting("x" * 200)


@pytest.mark.parametrize(
    ("given", "watched"),
    [
        ({"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "9000000"}, True),
        ({"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "9000000", "WATCHDOG_PID": "1"}, False),
        ({"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "often"}, False),
        ({"NOTIFY_SOCKET": "vsock:2:1", "WATCHDOG_USEC": "9000000"}, False),
        ({"WATCHDOG_USEC": "9000000"}, False),
        ({}, False),
    ],
)
def test_the_environment_says_whom_to_tell_and_loses_it(given: dict[str, str], watched: bool) -> None:
    environment = {**given, "PATH": "/bin"}
    service = take_service_manager(environment)
    assert environment == {"PATH": "/bin"}
    assert (service.due is not None) == watched


@pytest.mark.root
def test_the_agent_tells_that_it_is_ready_alive_reloading_and_stopping(
    manager: socket.socket, netns: NetNs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    monkeypatch.setenv("WATCHDOG_USEC", "600000")
    with node_agent(netns, tmp_path, "--mode", "nftables", "--probe", "off") as agent:
        agent.write(manifest([("10.244.0.1", "node")]))
        agent.start()
        assert heard(manager) == ["STATUS=waiting for the source"]
        assert heard(manager) == ["READY=1", "STATUS=6 virtual servers in nftables mode"]
        for _ in range(3):
            assert heard(manager) == ["WATCHDOG=1"]
        agent.send(signal.SIGHUP)
        told = [heard(manager) for _ in range(8)]
        assert told.count(["READY=1", "STATUS=6 virtual servers in nftables mode"]) == 1
        begun = next(place for place, lines in enumerate(told) if lines[0] == "RELOADING=1")
        assert begun < told.index(["READY=1", "STATUS=6 virtual servers in nftables mode"])
        assert agent.stop() == 0
        last = heard(manager)
        while last == ["WATCHDOG=1"]:
            last = heard(manager)
        assert last[0] == "STOPPING=1"
