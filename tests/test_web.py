"""The web server over real sockets on loopback: who is answered, what browsers and Prometheus get, and at what cost."""

import asyncio
import contextlib
import gzip
import hashlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from dataplane.errors import DataplaneError
from dataplane.rows import Counts, Look
from dataplane.tcp_listener import Listen, open_listener, parse_listen
from dataplane.web import application, page
from dataplane.web.application import may_ask, read_query
from dataplane.web_child import WebChild

from .test_staleness import Lines
from .web_stage import ScriptedAgent, Stage, events, look, real, request, service, staged

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "dataplane" / "web" / "assets"
TWO = (real("10.244.0.1", 30), real("10.244.0.2", 10))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(tmp_path_factory.mktemp("web")) as one:
        one.agent.look = look(service("default/web:http", "10.0.1.175", *TWO), service("shop/cart", "10.0.1.176", *TWO))
        yield one


# ---------------------------------------------------------------------------------------------------------- who may ask


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:10249", "localhost:1", "LOCALHOST", "[::1]:10249", "10.1.2.3"]
)
def test_addresses_and_localhost_may_ask(host: str) -> None:
    assert may_ask(host, loopback=True)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:10249", "localhost.evil.example", "", "127.0.0.1@x", "[::1"]
)
def test_other_names_may_not_ask_on_loopback(host: str) -> None:
    assert not may_ask(host, loopback=True)


def test_an_address_that_others_are_meant_to_reach_may_have_any_name() -> None:
    assert may_ask("node-1.example:10249", loopback=False)
    assert not may_ask("a b", loopback=False)


@pytest.mark.parametrize("path", ["/", "/metrics", "/events", "/healthz", "/assets/page.js", "/nowhere"])
def test_a_rebound_name_gets_nothing(stage: Stage, path: str) -> None:
    answer, body = stage.request(path, headers={"Host": "evil.example"})
    assert answer.status == 421
    assert b"dataplane" not in body


def test_a_request_without_a_host_gets_nothing(stage: Stage) -> None:
    with socket.create_connection(("127.0.0.1", stage.port), 10) as one:
        one.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert one.recv(100).startswith(b"HTTP/1.1 421")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_only_get_is_answered(stage: Stage, method: str) -> None:
    answer, _ = stage.request("/", method)
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ["/", "/assets/page.css", "/metrics", "/nowhere"])
def test_every_answer_forbids_foreign_content(stage: Stage, path: str) -> None:
    answer, _ = stage.request(path)
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize("path", ["/assets/../viewing.py", "/assets/%2e%2e/viewing.py", "/assets/uPlot.LICENSE", "/x"])
def test_only_what_is_meant_is_served(stage: Stage, path: str) -> None:
    assert stage.request(path)[0].status == 404


def test_the_page_needs_nothing_from_elsewhere(stage: Stage) -> None:
    for path in ("/", "/assets/page.css", "/assets/page.js"):
        answer, body = stage.request(path)
        assert answer.status == 200
        assert b"://" not in body.replace(b"http://www.w3.org", b""), path
    assert b"innerHTML" not in stage.request("/assets/page.js")[1]


def test_what_others_have_made_is_as_they_made_it() -> None:
    sums = [
        line.split() for line in (ASSETS / "uPlot.ORIGIN").read_text().splitlines() if re.match(r"[0-9a-f]{64} ", line)
    ]
    assert {name for _, name in sums} == {"uPlot.iife.min.js", "uPlot.min.css", "uPlot.LICENSE"}
    for expected, name in sums:
        assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == expected, name


@pytest.mark.slow
def test_the_page_is_in_the_wheel(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=ROOT, check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name.rpartition("/")[2] for name in archive.namelist() if name.startswith("dataplane/web/assets/")}
    assert packed == {path.name for path in ASSETS.iterdir()}


# -------------------------------------------------------------------------------------------------------------- metrics


def test_metrics_are_text_and_packed_for_those_who_can(stage: Stage) -> None:
    answer, body = stage.request("/metrics")
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert b"dataplane_backend_hits_total{" in body
    answer, packed = stage.request("/metrics", headers={"Accept-Encoding": "gzip"})
    assert answer.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(packed).count(b"\n") == body.count(b"\n")


def test_healthz_and_proxy_mode_are_as_kube_proxys(stage: Stage) -> None:
    answer, body = stage.request("/healthz")
    assert (answer.status, body) == (200, b"ok\n")
    assert stage.request("/proxyMode")[1] == b"ipvs"


def test_without_an_agent_everything_says_so_and_it_comes_back(tmp_path: Path) -> None:
    with staged(tmp_path) as stage:
        stage.agent.trouble = "everything"
        answer, body = stage.request("/healthz")
        assert (answer.status, b"the agent could not answer" in body) == (503, True)
        assert "dataplane_agent_up 0.0" in stage.metrics()
        with events(stage.port) as news:
            kind, told = next(news)
            assert (kind, "Interrupted system call" in told["trouble"]) == ("overview", True)
            stage.agent.trouble = ""
            assert next(told for kind, told in news if kind == "overview" and not told["trouble"])["healthy"]


# --------------------------------------------------------------------------------------------------------------- events


def test_a_viewer_is_told_everything_at_first_and_then_what_is_new(stage: Stage) -> None:
    with events(stage.port, "?open=10.0.1.175:80/TCP") as news:
        first: dict[str, Any] = {}
        while len(first) < 3:
            kind, told = next(news)
            first.setdefault(kind, told)
        assert first["overview"]["node"] == "node-1"
        assert first["overview"]["counts"]["text"] == "probe (fexit:ip_vs_schedule), missed 0"
        assert [row["name"] for row in first["services"]["rows"]] == ["default/web:http", "shop/cart"]
        assert [real["share"] for real in first["chosen"]["backends"]] == [0.75, 0.25]
        kinds = [kind for kind, _ in zip((kind for kind, _ in news), range(4), strict=False)]
    assert "overview" in kinds
    assert kinds.count("services") <= 1  # rates come with the second look, then nothing changes


def test_rates_come_with_the_second_look(tmp_path: Path) -> None:
    with staged(tmp_path) as stage:
        begun = time.time()

        def counting() -> Look:
            now = time.time()
            hits = int(1000 * (now - begun))
            return replace(look(service("default/web", "10.0.1.175", real("10.244.0.1", hits))), at=now)

        stage.agent.next_look = counting  # type: ignore[method-assign]
        with events(stage.port, "?open=10.0.1.175:80/TCP") as news:
            told = next(told for kind, told in news if kind == "points")
        assert told["names"] == ["10.244.0.1:9376"]
        assert told["points"][0][1] == pytest.approx(1000, rel=0.05)


@pytest.mark.slow
def test_many_viewers_cost_the_agent_one_look_a_second(tmp_path: Path) -> None:
    with staged(tmp_path) as stage, contextlib.ExitStack() as stack:
        stage.agent.look = look(service("default/web", "10.0.1.175", *TWO))
        viewers = [stack.enter_context(events(stage.port)) for _ in range(10)]
        before, begun = stage.agent.asked["look"], time.monotonic()
        threads = [threading.Thread(target=lambda each=each: [next(each) for _ in range(6)]) for each in viewers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert stage.agent.asked["look"] - before <= (time.monotonic() - begun) + 2


@pytest.mark.slow
def test_nobody_looks_when_nobody_watches(tmp_path: Path) -> None:
    with staged(tmp_path) as stage:
        with events(stage.port) as news:
            next(news)
        time.sleep(2.5)  # the server notices at its next word that the viewer has gone
        before = stage.agent.asked["look"]
        time.sleep(1.5)
        assert stage.agent.asked["look"] == before


def test_too_many_viewers_are_told_to_come_again(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(application, "VIEWERS", 1)
    with events(stage.port) as news:
        next(news)
        answer, _ = stage.request("/events")
        assert (answer.status, answer.headers["Retry-After"]) == (503, "10")


def test_ten_thousand_services_are_a_bounded_page_that_can_be_searched(tmp_path: Path) -> None:
    many = look(
        *(
            service(
                f"default/svc-{i}:http",
                f"10.{i >> 8}.{i & 255}.1",
                *(real(f"10.244.{i & 255}.{j}", i) for j in range(3)),
            )
            for i in range(10_000)
        )
    )
    with staged(tmp_path) as stage:
        stage.agent.look = many
        with events(stage.port, "?sort=hits&limit=999999") as news:
            told = next(told for kind, told in news if kind == "services")
            assert (told["all"], told["found"], len(told["rows"])) == (10_000, 10_000, page.SERVICES_MOST)
            assert told["rows"][0]["name"] == "default/svc-9999:http"
            assert len(json.dumps(told)) < 300_000
        with events(stage.port, "?q=SVC-9998+10.244") as news:
            told = next(told for kind, told in news if kind == "services")
            assert [row["name"] for row in told["rows"]] == ["default/svc-9998:http"]
        begun = time.monotonic()
        assert stage.metrics().count("dataplane_backend_hits_total{") == 30_000
        assert time.monotonic() - begun < 20


@pytest.mark.parametrize(
    "query", ["", "?sort=evil&limit=-1", "?limit=1e9", "?open=nothing&q=%00%ff", "?q=" + "x" * 5000]
)
def test_any_query_is_answered(stage: Stage, query: str) -> None:
    with events(stage.port, query) as news:
        assert next(news)[0] == "overview"


def test_nonsense_in_a_query_becomes_the_default() -> None:
    assert read_query({"sort": "evil", "limit": "x"}) == page.Query()


def test_hostile_names_are_escaped_for_the_page() -> None:
    row = service("default/<img src=x>\x1b[2J\u202e", "10.0.1.175", *TWO)
    (told,) = page.services([row], page.Query())["rows"]
    assert told["name"] == "default/<img src=x>\\x1b[2J\\u202e"


def test_the_chart_has_a_line_for_those_with_the_most_hits_and_one_for_the_others() -> None:
    row = service("default/web", "10.0.1.175", *(real(f"10.244.0.{i}", i) for i in range(20)))
    names = page.lines(row)
    assert names == [f"10.244.0.{i}:9376" for i in range(12, 20)]
    history = [(1.0, {row.vip: {real.endpoint: 1.0 for real in row.real_servers}})]
    assert page.points(history, row.vip, names) == [[1.0, *[1.0] * 8, 12.0]]
    assert page.points(history, row.vip, names, after=1.0) == []


def test_what_is_wrong_is_told() -> None:
    agent = ScriptedAgent()
    status = agent.agent.status() | {"heldBack": 12, "lastError": "dump: no", "leavingModes": ["iptables"]}
    texts = page.reasons(status)["texts"]
    assert texts[0] == "dump: no"
    assert texts[1].startswith("12 virtual servers would go at once")
    assert texts[2] == "of another mode is still here: iptables"


# ------------------------------------------------------------------------------------------------------------ addresses


@pytest.mark.parametrize("text", ["127.0.0.1:10249", "[::1]:0", "0.0.0.0:80", "[::]:65535"])
def test_addresses_are_read_as_they_are_written(text: str) -> None:
    assert str(parse_listen(text)) == text


@pytest.mark.parametrize(
    "text", ["", "localhost:1", "127.0.0.1", ":10249", "::1:80", "1.2.3.4:65536", "1.2.3:4", "[x]:1"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_listen(text)


def test_only_loopback_is_loopback() -> None:
    assert parse_listen("[::1]:1").loopback
    assert not parse_listen("0.0.0.0:1").loopback


def test_a_port_in_use_is_named() -> None:
    with open_listener(Listen("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
        with pytest.raises(DataplaneError, match=rf"^127\.0\.0\.1:{port}: address already in use$"):
            open_listener(Listen("127.0.0.1", port))


# -------------------------------------------------------------------------------------------------- the agent's process


async def eventually(true: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def free_port() -> int:
    with open_listener(Listen("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def test_the_agents_process_starts_with_the_first_caller_is_replaced_and_ends_with_it(tmp_path: Path) -> None:
    log: Any = Lines()
    port = free_port()

    async def play() -> int:
        child = WebChild(Listen("127.0.0.1", port), log, 1000)
        child.start()
        await asyncio.sleep(0.2)
        idle: int | None = child.pid
        answer, body = await asyncio.to_thread(request, port, "/metrics")
        assert (answer.status, b"dataplane_agent_up 0.0" in body) == (200, True)
        first = child.pid
        assert idle is None
        assert first is not None
        subprocess.run(["kill", "-KILL", str(first)], check=True)
        await eventually(lambda: child.pid is None)
        await asyncio.to_thread(request, port, "/metrics")  # waits in the queue of the listening socket
        second = child.pid
        assert second not in (None, first)
        child.close()
        assert second is not None
        return second

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATAPLANE_RUNTIME_DIRECTORY", str(tmp_path))
        last = asyncio.run(play())
    assert not Path(f"/proc/{last}").exists()
    assert [event for event, _ in log.lines] == ["web"]
    assert log.lines[0][1]["reason"] == "ended with status -9"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 1)


def test_a_port_in_use_is_told_once_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    log: Any = Lines()
    monkeypatch.setattr("dataplane.web_child.BUSY_SECONDS", 0.05)
    with open_listener(Listen("127.0.0.1", 0)) as squatter:
        port = squatter.getsockname()[1]

        async def play() -> None:
            child = WebChild(Listen("127.0.0.1", port), log, 1000)
            child.start()
            await asyncio.sleep(0.3)
            assert [event for event, _ in log.lines] == ["metrics not served"]
            squatter.close()
            await eventually(lambda: len(log.lines) == 2)
            child.close()

        asyncio.run(play())
    assert log.lines[0][1]["reason"] == f"127.0.0.1:{port}: address already in use"
    assert log.lines[1][0] == "metrics served"


def test_the_process_ends_when_its_agent_is_killed(tmp_path: Path) -> None:
    script = (
        "import socket, subprocess, sys, time\n"
        "one = socket.create_server(('127.0.0.1', 0))\n"
        "import os\n"
        "command = [sys.executable, '-P', '-m', 'dataplane', 'web', '--descriptor', str(one.fileno())]\n"
        "child = subprocess.Popen([*command, '--of-agent', str(os.getpid())], pass_fds=[one.fileno()])\n"
        "print(one.getsockname()[1], child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        port, pid = map(int, agent.stdout.readline().split())
        assert request(port, "/metrics")[0].status == 200
        status = Path(f"/proc/{pid}/status").read_text()
        assert "CapBnd:\t0000000000000000" in status or "CapEff:\t0000000000000000" in status
        assert "NoNewPrivs:\t1" in status
        agent.kill()
        deadline = time.monotonic() + 10
        while Path(f"/proc/{pid}").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_the_command_serves_says_where_and_waits_for_an_agent(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "dataplane", "web", "--listen", "127.0.0.1:0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"DATAPLANE_RUNTIME_DIRECTORY": str(tmp_path), "PYTHONUNBUFFERED": "1", "PATH": "/usr/bin:/bin"},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        port = int(process.stdout.readline().rstrip("/\n").rpartition(":")[2])
        assert "no agent runs in this network namespace: the page waits for one" in process.stderr.readline()
        assert request(port, "/")[0].status == 200
        process.terminate()
        process.communicate(timeout=20)


def test_the_command_says_where_to_look_when_the_port_is_taken(tmp_path: Path) -> None:
    with open_listener(Listen("127.0.0.1", 0)) as one:
        at = f"127.0.0.1:{one.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-m", "dataplane", "web", "--listen", at],
            env={"DATAPLANE_RUNTIME_DIRECTORY": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert f"{at}: address already in use; if that is the agent, http://{at}/ is there already" in done.stderr


def test_missed_hits_are_in_the_overview(tmp_path: Path) -> None:
    with staged(tmp_path) as stage:
        counts = Counts("probe", ("fexit:x",), {"full": 2, "recursion": 0})
        stage.agent.look = look(service("default/web", "10.0.1.175", *TWO), counts=counts)
        with events(stage.port) as news:
            told = next(news)[1]["counts"]
        assert (told["missed"], told["reasons"]) == (2, {"full": 2})
