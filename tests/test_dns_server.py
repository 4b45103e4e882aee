"""The server on real sockets: dig as a client of another house, and clients that mean no good."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from dnslib import QTYPE, RR, A, DNSRecord
from msgspec.structs import replace

from dataplane.dns import udp_batch
from dataplane.dns.answers import Answers
from dataplane.dns.rate_limit import DROP, PASS, TRUNCATE, RateLimit
from dataplane.dns.records import Rules
from dataplane.dns.server import DnsServer, Limits
from dataplane.dns.service import NameService
from dataplane.model import Update, parse_address
from dataplane.tcp_listener import Listen

from .dns_world import MANIFEST, answers_of, ask_tcp, ask_udp, packet, receive, said, serving, views, with_edns
from .fuzz_dns import fuzz, seeds
from .kube_api import KubeApi, endpoint_slice, kubeconfig, service
from .lanes import scaled
from .test_dns import CASES, Z, many
from .test_staleness import Lines
from .traffic import eventually

WEB = packet(f"web.default.{Z}")
FAST = Limits(query=0.3, idle=0.6, write=0.5, connections=8, connections_of_client=6)


def dig(port: int, *words: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("dig") is None:
        pytest.skip("dig is not installed (bind9-dnsutils)")
    return subprocess.run(
        ["dig", "@127.0.0.1", "-p", str(port), "+tries=1", "+timeout=5", "+noall", "+comments", "+answer", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_dig_reads_every_answer_as_it_is_meant(tmp_path: Path) -> None:
    """All cases in one process, over UDP and over TCP."""
    cases = [case for case in CASES if case.qtype not in ("AXFR", "IXFR", "ANY")]
    with serving(answers_of(tmp_path)) as (_, port, _):
        for transport in ("+notcp", "+tcp"):
            words = [word for case in cases for word in (case.name, case.qtype)]
            told = dig(port, transport, *words)
            assert told.returncode == 0, told.stdout + told.stderr
            warnings = re.findall(r"^;; (?:WARNING|Warning).*$", told.stdout, re.MULTILINE)
            assert not [each for each in warnings if "recursion requested" not in each and ".local is" not in each]
            parts = told.stdout.split(";; Got answer:")[1:]
            assert len(parts) == len(cases)
            for case, part in zip(cases, parts, strict=True):
                rcode = re.findall(r"status: (\w+)", part)[0]
                lines = [line.split() for line in part.splitlines() if line and not line.startswith(";")]
                found = sorted(" ".join((line[0], line[3], *line[4:])) for line in lines)
                if isinstance(case.outcome, list):
                    assert (rcode, found) == ("NOERROR", sorted(case.outcome)), case
                else:
                    assert (rcode, found) == ({"NODATA": "NOERROR"}.get(case.outcome, case.outcome), []), case


def test_dig_comes_back_over_tcp_for_what_is_cut(tmp_path: Path) -> None:
    with serving(answers_of(tmp_path, many(400))) as (server, port, _):
        told = dig(port, f"many.default.{Z}", "A")
        assert told.stdout.count("\tA\t") == 400
        assert "Truncated, retrying in TCP mode" in told.stdout
        assert server.queries == {"udp": 1, "tcp": 1}
        cut = dig(port, "+ignore", f"many.default.{Z}", "A")
        assert re.search(r"flags: qr aa tc", cut.stdout)


def test_dig_is_refused_a_zone_transfer(tmp_path: Path) -> None:
    with serving(answers_of(tmp_path)) as (_, port, _):
        assert "Transfer failed" in dig(port, "AXFR", "cluster.local").stdout
        assert said(ask_tcp(port, packet("cluster.local", "AXFR")))[0] == "REFUSED"


@pytest.mark.parametrize("batches", [True, False])
def test_every_way_to_read_datagrams_answers_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: bool
) -> None:
    monkeypatch.setattr(udp_batch, "BATCHES", batches and udp_batch.BATCHES)
    with serving(answers_of(tmp_path)) as (_, port, _):
        for host in ("127.0.0.1", "127.0.0.2"):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
                one.bind((host, 0))
                one.settimeout(5)
                for number in range(200):
                    one.sendto(number.to_bytes(2) + WEB[2:], ("127.0.0.1", port))
                ids = {int.from_bytes(one.recv(4096)[:2]) for _ in range(200)}
        assert ids == set(range(200))


def test_a_socket_at_every_address_answers_from_the_one_that_was_asked(tmp_path: Path) -> None:
    answers = answers_of(tmp_path)
    with serving(answers, listen="0.0.0.0") as (_, port, _):
        for host in ("127.0.0.1", "127.0.0.9"):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
                one.settimeout(5)
                one.sendto(WEB, (host, port))
                assert one.recvfrom(4096)[1][0] == host


def test_ipv6_clients_are_answered(tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no ::1")
    with (
        serving(answers_of(tmp_path), listen="::1") as (_, port, _),
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as one,
    ):
        one.settimeout(5)
        one.sendto(WEB, ("::1", port))
        assert said(one.recv(4096))[0] == "NOERROR"


# ------------------------------------------------------------------------------------------------------------ strangers


def test_a_client_that_drips_its_query_is_left_and_others_are_served(tmp_path: Path) -> None:
    with serving(answers_of(tmp_path), FAST) as (server, port, _):
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
        began = time.monotonic()
        over: list[float] = []

        def drip(one: socket.socket) -> None:
            try:
                one.sendall(b"\0")
                while True:
                    one.sendall(b"\1")
                    time.sleep(0.05)
            except OSError:
                over.append(time.monotonic() - began)

        threads = [threading.Thread(target=drip, args=(one,), daemon=True) for one in slow]
        for thread in threads:
            thread.start()
        assert said(ask_tcp(port, WEB))[0] == "NOERROR"
        assert said(ask_udp(port, WEB) or b"")[0] == "NOERROR"
        eventually("all are left", lambda: len(over) == len(slow))
        for one in slow:
            one.close()
        eventually("no connection is left", lambda: server.status()["connections"] == 0)


def test_an_idle_connection_is_closed(tmp_path: Path) -> None:
    with (
        serving(answers_of(tmp_path), FAST) as (_, port, _),
        socket.create_connection(("127.0.0.1", port), 10) as one,
    ):
        one.sendall(len(WEB).to_bytes(2) + WEB)
        assert said(receive(one))[0] == "NOERROR"
        assert one.recv(1) == b""


def test_one_client_has_only_so_many_connections(tmp_path: Path) -> None:
    with serving(answers_of(tmp_path), FAST) as (server, port, _):
        ours = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(6)]
        eventually("they are counted", lambda: server.status()["connections"] == 6)
        with (
            socket.create_connection(("127.0.0.1", port), 10) as one,
            contextlib.suppress(ConnectionResetError),
        ):
            assert one.recv(1) == b""
        assert server.closed_connections == 1
        with socket.create_connection(("127.0.0.1", port), 10, source_address=("127.0.0.2", 0)) as one:
            one.sendall(len(WEB).to_bytes(2) + WEB)
            assert said(receive(one))[0] == "NOERROR"
        for one in ours:
            one.close()


def test_when_all_places_are_taken_the_most_silent_goes(tmp_path: Path) -> None:
    with serving(answers_of(tmp_path), Limits(connections=4, connections_of_client=2)) as (server, port, _):
        ours = [
            socket.create_connection(("127.0.0.1", port), 10, source_address=(f"127.0.0.{number}", 0))
            for number in range(2, 6)
        ]
        eventually("they are counted", lambda: server.status()["connections"] == 4)
        with socket.create_connection(("127.0.0.1", port), 10) as one:
            one.sendall(len(WEB).to_bytes(2) + WEB)
            assert said(receive(one))[0] == "NOERROR"
        with contextlib.suppress(ConnectionResetError):
            assert ours[0].recv(1) == b""
        for one in ours:
            one.close()


def test_several_queries_in_one_connection_are_answered_in_order(tmp_path: Path) -> None:
    with serving(answers_of(tmp_path)) as (_, port, _), socket.create_connection(("127.0.0.1", port), 10) as one:
        for number in range(50):
            one.sendall(len(WEB).to_bytes(2) + number.to_bytes(2) + WEB[2:])
        file = one.makefile("rb")
        assert [int.from_bytes(file.read(int.from_bytes(file.read(2)))[:2]) for _ in range(50)] == list(range(50))


def test_a_flood_of_one_client_leaves_answers_to_others(tmp_path: Path) -> None:
    with serving(answers_of(tmp_path), Limits(rate=200)) as (server, port, _):
        stop = threading.Event()

        def flood() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
                one.bind(("127.0.0.66", 0))
                one.connect(("127.0.0.1", port))
                while not stop.is_set():
                    with contextlib.suppress(OSError):
                        one.send(WEB)

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            eventually("the limit works", lambda: server.limit.dropped > 1000)
            for _ in range(20):
                told = None
                for _ in range(5):  # a datagram may be lost; a resolver asks again
                    told = told or ask_udp(port, WEB, 2)
                assert told is not None
                assert said(told)[0] == "NOERROR"
            assert said(ask_tcp(port, WEB))[0] == "NOERROR"
        finally:
            stop.set()
            thread.join()
        assert server.limit.truncated > 0


def test_the_limit_counts_a_second_and_slips() -> None:
    limit = RateLimit(3)
    limit.second(10.0)
    assert [limit.judge(b"abcd") for _ in range(9)] == [PASS] * 3 + [DROP] * 4 + [TRUNCATE, DROP]
    assert limit.judge(b"efgh") == PASS
    limit.second(10.9)
    assert limit.judge(b"abcd") == DROP
    limit.second(11.0)
    assert limit.judge(b"abcd") == PASS


def test_mutated_packets_get_answers_of_allowed_size_or_none(tmp_path: Path) -> None:
    outcome = fuzz(answers_of(tmp_path), scaled(1_000_000, 20_000), 20261124)
    assert outcome.answered > outcome.packets // 2
    assert outcome.read > 100


def test_mutated_packets_leave_the_server_as_it_was(tmp_path: Path) -> None:
    with serving(answers_of(tmp_path)) as (server, port, log):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.connect(("127.0.0.1", port))
            for seed in seeds():
                for cut in (0, 1, 12, 13, len(seed) - 1):
                    one.send(seed[:cut])
                one.send(seed * 40)
        assert said(ask_udp(port, WEB) or b"")[0] == "NOERROR"
        assert said(ask_tcp(port, WEB))[0] == "NOERROR"
        for size in (0, 1, 11, 65535):
            with socket.create_connection(("127.0.0.1", port), 10) as one:
                one.sendall(size.to_bytes(2) + b"\xff" * size)
                one.shutdown(socket.SHUT_WR)
                receive(one)
        assert not any(event == "query failed" for event, _ in log.lines)
        assert server.status()["connections"] <= 1


# ------------------------------------------------------------------------------------------------------------ upstreams


@contextlib.contextmanager
def upstream(seconds: float = 0.0) -> Iterator[Listen]:
    """A server for all other names, by dnslib: 192.0.2.80 for every A, and a large answer at `large.`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.bind(("127.0.0.1", 0))

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    packet_got, sender = one.recvfrom(4096)
                    if not packet_got:
                        return
                    query = DNSRecord.parse(packet_got)
                    reply = query.reply()
                    count = 100 if str(query.q.qname).startswith("large") else 1
                    for number in range(count):
                        if query.q.qtype == QTYPE.A:
                            reply.add_answer(RR(query.q.qname, QTYPE.A, rdata=A(f"192.0.2.{80 + number}"), ttl=60))
                    time.sleep(seconds)
                    wrong = bytearray(reply.pack())
                    wrong[0] ^= 0xFF
                    one.sendto(bytes(wrong), sender)  # a guess of somebody else's, which must not be taken
                    one.sendto(bytes(reply.pack()), sender)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Listen(*one.getsockname())
        finally:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
                end.sendto(b"", one.getsockname())
            thread.join(10)


def test_other_names_are_an_upstreams_and_an_alias_is_followed_there(tmp_path: Path) -> None:
    answers = answers_of(tmp_path)
    answers._recursive = True
    with upstream() as server, serving(answers, upstreams=(Listen("127.0.0.1", 9), server)) as (ours, port, _):
        told = ask_udp(port, packet("www.example.com"))
        assert told is not None
        assert said(told)[:2] == ("NOERROR", ["www.example.com. A 192.0.2.80"])
        told = ask_udp(port, packet(f"outside.default.{Z}"))
        assert told is not None
        assert said(told)[1] == [
            f"outside.default.{Z} CNAME www.example.com.",
            "www.example.com. A 192.0.2.80",
        ]
        large = ask_udp(port, packet("large.example.com"))
        assert large is not None
        assert len(large) <= 512
        assert DNSRecord.parse(large).header.tc
        assert ours.upstreams.forwarded == 3


def test_a_slow_upstream_holds_up_nobody_else(tmp_path: Path) -> None:
    answers = answers_of(tmp_path)
    answers._recursive = True
    with (
        upstream(0.5) as server,
        serving(answers, upstreams=(server,)) as (_, port, _),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
    ):
        one.settimeout(10)
        one.connect(("127.0.0.1", port))
        one.send(packet("www.example.com", id=1))
        one.send(packet(f"web.default.{Z}", id=2))
        assert [int.from_bytes(one.recv(4096)[:2]) for _ in range(2)] == [2, 1]


def test_without_an_answer_of_an_upstream_it_is_servfail(tmp_path: Path) -> None:
    answers = answers_of(tmp_path)
    answers._recursive = True
    with serving(answers, upstreams=(Listen("127.0.0.1", 9),)) as (_, port, _):
        for name in ("www.example.com", f"outside.default.{Z}"):
            told = ask_udp(port, packet(name), 10)
            assert told is not None
            assert said(told)[0] == "SERVFAIL"
        assert said(ask_udp(port, WEB) or b"")[0] == "NOERROR"


def test_the_query_log_has_a_line_for_each_answer(tmp_path: Path) -> None:
    with serving(answers_of(tmp_path), log_queries=True) as (_, port, log):
        ask_udp(port, WEB)
        ask_udp(port, packet("\x1b[2J.default." + Z))
        ask_tcp(port, with_edns(packet(f"none.default.{Z}", "AAAA")))
        lines = [fields for event, fields in log.lines if event == "query"]
    assert [(line["transport"], line["type"], line["result"]) for line in lines] == [
        ("udp", "A", "NOERROR"),
        ("udp", "A", "NXDOMAIN"),
        ("tcp", "AAAA", "NXDOMAIN"),
    ]
    assert lines[0]["name"] == f"web.default.{Z}"
    assert "\x1b" not in str(lines[1]["name"])
    assert str(lines[0]["client"]).startswith("127.0.0.1#")


# ----------------------------------------------------------------------------------------------------- beside an agent


def test_a_change_stands_in_answers_when_it_has_been_told(tmp_path: Path) -> None:
    """Told by one thread and answered by another, again and again, with everything prepared."""
    log = Lines()
    answers = Answers(Rules())
    names = NameService(partial(DnsServer, answers, [Listen("127.0.0.1", 0)], log), answers, log)
    names.start()
    try:
        (served,) = [fields for event, fields in log.lines if event == "names served"]
        port = int(str(served["addresses"]).rpartition(":")[2].strip("]'"))
        assert said(ask_udp(port, WEB) or b"")[0] == "SERVFAIL"
        changed = views(tmp_path)
        web = next(name for name in changed if name.name == "web")
        names.update(Update(dict(changed)))
        for number in range(200):
            view = changed[web]
            assert view is not None
            assert view.service is not None
            vip = parse_address(f"10.96.1.{number}")
            names.update(Update({web: replace(view, service=replace(view.service, cluster_ips=(vip,)))}))
            for _ in range(2):
                assert said(ask_udp(port, WEB) or b"")[1] == [f"web.default.{Z} A 10.96.1.{number}"]
        assert names.service_counts()[web] == 400
    finally:
        names.close()
    assert ask_udp_refused(port)


def ask_udp_refused(port: int) -> bool:
    """Whether nobody listens there any more."""
    try:
        return ask_udp(port, WEB, 1) is None
    except ConnectionRefusedError:
        return True


# --------------------------------------------------------------------------------------------------------- command line


def command(*words: str) -> list[str]:
    return [sys.executable, "-P", "-m", "dataplane", *words]


def test_the_command_serves_follows_its_manifests_and_ends(tmp_path: Path) -> None:
    file = tmp_path / "names.yaml"
    file.write_text(MANIFEST)
    words = command("dns", "-f", str(file), "--listen", "127.0.0.1:0", "--log-format", "json")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as process:
        assert process.stderr is not None
        try:
            served = json.loads(process.stderr.readline())
            assert served["event"] == "names served", served
            port = int(served["addresses"][0].rpartition(":")[2])
            eventually("it has read all", lambda: said(ask_udp(port, WEB) or b"")[0] == "NOERROR")
            file.write_text(MANIFEST.replace("10.96.0.10", "10.96.0.77"))
            eventually("it follows", lambda: "10.96.0.77" in said(ask_udp(port, WEB) or b"")[1][0])
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0


def test_names_come_from_a_kubernetes_api_as_well(tmp_path: Path) -> None:
    """The API has one Service, and then another one."""
    api = KubeApi()
    api.put(service("web", "10.96.0.10"))
    api.put(endpoint_slice("web-1", "web", "10.244.0.5"))
    loop = asyncio.new_event_loop()
    over = asyncio.Event()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:  # which cancels what is left
            runner.run(over.wait())

    thread = threading.Thread(target=run)
    thread.start()

    def call(work: Coroutine[Any, Any, Any]) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result(30)

    async def put(name: str, vip: str) -> None:
        api.put(service(name, vip))

    process = None
    try:
        call(api.start())
        config = tmp_path / "kubeconfig"
        config.write_text(kubeconfig(api.url))
        words = command("dns", "--kubeconfig", str(config), "--listen", "127.0.0.1:0", "--log-format", "json")
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        port = int(json.loads(process.stderr.readline())["addresses"][0].rpartition(":")[2])
        eventually("all is listed", lambda: said(ask_udp(port, WEB) or b"")[0] == "NOERROR")
        late = packet(f"late.default.{Z}")
        assert said(ask_udp(port, late) or b"")[0] == "NXDOMAIN"
        call(put("late", "10.96.0.11"))
        eventually(
            "the watch tells", lambda: said(ask_udp(port, late) or b"")[1][-1:] == [f"late.default.{Z} A 10.96.0.11"]
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        if process is not None:
            process.kill()
            process.communicate()
        call(api.stop())
        loop.call_soon_threadsafe(over.set)
        thread.join(10)


def test_query_explains_how_an_answer_comes_about(tmp_path: Path) -> None:
    views(tmp_path)
    done = subprocess.run(
        command("dns", "query", "web", "-f", str(tmp_path), "-o", "json"),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    document = json.loads(done.stdout)
    assert document["name"] == f"web.default.{Z}"
    assert document["answers"] == [{"name": f"web.default.{Z}", "ttl": 5, "type": "A", "data": "10.96.0.10"}]
    none = subprocess.run(
        command("dns", "query", "none.data", "SRV", "-f", str(tmp_path), "-n", "data"),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert none.returncode == 1
    assert none.stdout.splitlines()[0] == f"none.data.data.{Z} SRV: NXDOMAIN"
    assert "    no Service data/none: NXDOMAIN" in none.stdout.splitlines()
    before = subprocess.run(
        command("dns", "-f", str(tmp_path), "query", "web"), capture_output=True, text=True, check=False, timeout=60
    )
    assert (before.returncode, before.stderr) == (2, "dataplane: options of query go behind its name\n")
