"""The control socket: who may ask, what is answered, and that nobody can harm the one who answers."""

import asyncio
import json
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dataplane import control_server
from dataplane.control_server import ControlServer
from dataplane.control_socket import ControlClient, socket_path
from dataplane.errors import AgentUnreachable, DataplaneError, KernelError


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DATAPLANE_RUNTIME_DIRECTORY", str(tmp_path / "run"))
    return tmp_path / "run"


def refuse() -> bytes:
    raise KernelError("dump", "everything", 4)


@pytest.fixture
def server(directory: Path) -> Iterator[Callable[[], None]]:
    """A server in a thread of its own; yields what stops it."""
    loop = asyncio.new_event_loop()
    control = ControlServer(
        {"status": lambda: b'{"pid": 7}', "fail": refuse, "long": lambda: b'"' + b"x" * 3_000_000 + b'"'}
    )
    loop.run_until_complete(control.start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def stop() -> None:
        if thread.is_alive():
            asyncio.run_coroutine_threadsafe(control.close(), loop).result(10)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)

    yield stop
    stop()
    loop.close()


def test_it_is_named_after_the_network_namespace_and_reachable_for_its_user_only(
    server: Callable[[], None], directory: Path
) -> None:
    path = socket_path()
    assert path == directory / f"{Path('/proc/self/ns/net').stat().st_ino}.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    server()
    assert not path.exists()


def test_any_number_of_questions_on_one_connection(server: Callable[[], None]) -> None:
    with ControlClient() as agent:
        assert [agent.status() for _ in range(3)] == [{"pid": 7}] * 3
        assert len(json.loads(agent.ask("long"))) == 3_000_000
        with pytest.raises(AgentUnreachable, match="no such question; there are status, fail, long"):
            agent.ask("cookies")
        with pytest.raises(AgentUnreachable, match="could not answer: dump everything: Interrupted"):
            agent.ask("fail")
        assert agent.status() == {"pid": 7}


def test_without_an_agent(directory: Path) -> None:
    with pytest.raises(AgentUnreachable, match="no agent runs in this network namespace"):
        ControlClient()


@pytest.mark.parametrize(
    "rubbish", [b"\n", b"[]\n", b"{}\n", b'{"ask": []}\n', b"\xff\n", b"x" * 100_000 + b"\n", b'{"ask"']
)
def test_rubbish_harms_nobody(server: Callable[[], None], rubbish: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(5)
        raw.connect(str(socket_path()))
        raw.sendall(rubbish)
        raw.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: raw.recv(1 << 16), b""))
    assert not answer or json.loads(answer)["error"]
    with ControlClient() as agent:
        assert agent.status() == {"pid": 7}


def test_who_is_silent_or_one_too_many_keeps_nobody_else_out(
    server: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_server, "CLIENTS", 3)
    silent = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    for one in silent:
        one.connect(str(socket_path()))
    with ControlClient() as agent:
        assert agent.status() == {"pid": 7}
        with pytest.raises(AgentUnreachable), ControlClient() as fourth:
            fourth.status()
    for one in silent:
        one.close()


def test_others_may_not_ask(server: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_server, "_may_ask", lambda _: False)
    with pytest.raises(AgentUnreachable, match="hung up"), ControlClient() as agent:
        agent.status()


def test_what_an_agent_that_was_killed_left_is_replaced(directory: Path) -> None:
    directory.mkdir(mode=0o755)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(socket_path()))
    with pytest.raises(AgentUnreachable):
        ControlClient()

    async def start() -> int:
        control = ControlServer({})
        await control.start()
        mode = stat.S_IMODE(directory.stat().st_mode)
        await control.close()
        return mode

    assert asyncio.run(start()) == 0o700


def test_a_directory_that_is_none_is_told_and_left_alone(directory: Path) -> None:
    directory.symlink_to(directory.parent)
    with pytest.raises(DataplaneError, match="not a directory of this user"):
        asyncio.run(ControlServer({}).start())
    assert list(directory.parent.iterdir()) == [directory]


@pytest.mark.root
def test_another_user_is_refused_although_he_can_reach_the_socket(server: Callable[[], None], directory: Path) -> None:
    for path, mode in (
        (directory.parent.parent, 0o755),
        (directory.parent, 0o755),
        (directory, 0o755),
        (socket_path(), 0o666),
    ):
        path.chmod(mode)
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        answer = b"no"
        try:
            with socket.socket(socket.AF_UNIX) as raw:
                raw.connect(str(socket_path()))
                raw.sendall(b'{"ask": "status"}\n')
                answer = raw.recv(100)
        except OSError:
            answer = b""
        os._exit(len(answer))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
