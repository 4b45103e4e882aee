"""The runner of packet cases is honest: of rules written by hand it sees what they do, and every wrong expectation."""

import contextlib
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from bench.isolation import isolated
from dataplane.model import Address, Protocol, parse_address
from dataplane.run_tool import run_tool
from tests.flows.__main__ import OUR_CASES
from tests.flows.agent import Programmed
from tests.flows.cases import BadCases, Case, read_cases
from tests.flows.judging import tries_for
from tests.flows.packets import Packet, What, build, crc32c, internet_checksum, parse
from tests.flows.running import Result, Runner
from tests.flows.world import World

ROOT = Path(__file__).resolve().parent.parent
POD, CLIENT, NODE = "10.244.9.9", "203.0.113.2", "192.0.2.1"
V4 = (parse_address(POD), parse_address("10.96.0.1"))
V6 = (parse_address("fd00::9"), parse_address("fd00:96::1"))

# What each address of a "Service" gets, in prerouting and output alike. The endpoint .9 loses its answers.
RULES = """
table inet hand {
    chain services {
        ip daddr 10.96.0.1 tcp dport 80 dnat ip to 10.244.0.5:8080
        ip daddr 10.96.0.1 udp dport 53 dnat ip to 10.244.0.5:5353
        ip daddr 10.96.0.1 sctp dport 99 dnat ip to 10.244.0.5:9999
        ip daddr 10.96.0.2 tcp dport 80 dnat ip to numgen random mod 2 map { 0 : 10.244.0.5, 1 : 10.244.0.6 }
        ip daddr 10.96.0.3 tcp dport 80 dnat ip to 10.244.0.5:8080
        ip daddr 10.96.0.7 tcp dport 80 dnat ip to 10.244.0.9:8080
        ip daddr 10.96.0.8 tcp dport 80 dnat ip to 10.244.0.5:8080
        ip daddr 10.96.0.10 tcp dport 80 dnat ip to 192.0.2.1:8080
        ip daddr 10.96.0.11 tcp dport 80 dnat ip to jhash ip saddr mod 2 map { 0 : 10.244.0.5, 1 : 10.244.0.6 }
        ip6 daddr fd00:96::1 tcp dport 80 dnat ip6 to [fd00::5]:8080
    }
    chain prerouting { type nat hook prerouting priority -100; jump services; }
    chain output { type nat hook output priority -100; jump services; }
    chain postrouting {
        type nat hook postrouting priority 100;
        ct original ip daddr 10.96.0.3 masquerade
        ct original ip daddr 10.96.0.8 snat ip to 9.9.9.9
        ip saddr 192.0.2.1 ct status dnat masquerade
    }
    chain closed {
        ip daddr 10.96.0.4 reject with icmpx port-unreachable
        ip daddr 10.96.0.5 drop
        ip daddr 10.96.0.6 meta l4proto tcp reject with tcp reset
        ip daddr 10.96.0.9 reject with icmpx host-unreachable
        ip6 daddr fd00:96::4 reject with icmpx port-unreachable
        ip6 daddr fd00:96::5 drop
        ip saddr 10.244.0.9 drop
    }
    chain input { type filter hook input priority 0; jump closed; }
    chain forward { type filter hook forward priority 0; jump closed; }
    chain filter_output { type filter hook output priority 0; jump closed; }
}
"""


class ByHand:
    """In place of the agent: the rules above, and facts as a test wants them."""

    mode = "nftables"
    names_are_current = False
    iptables_tool = ""

    def __init__(self, **facts: Any) -> None:
        self._facts = facts

    def program(self, case: Case) -> Programmed:
        del case
        run_tool(["nft", "-f", "-"], input="add table inet hand\ndelete table inet hand\n" + RULES)
        return Programmed((), "")

    def affinity_seconds(self) -> set[int]:
        seconds: set[int] = self._facts.get("affinity", set())
        return seconds

    def reconcile_conntrack(self) -> None:
        for address in self._facts.get("forget", ()):
            run_tool(["conntrack", "-D", "-p", "udp", "-d", address])

    def metric(self, name: str) -> dict[str, Any] | None:
        metrics: dict[str, dict[str, Any]] = self._facts.get("metrics", {})
        return metrics.get(name)


def flow(src: str, dst: str, port: int, action: str, *endpoints: str, **more: Any) -> dict[str, Any]:
    proto, masquerade = more.pop("proto", "TCP"), more.pop("masquerade", False)
    expect = {"action": action, "endpoints": endpoints, "masquerade": masquerade}
    return {"src_ip": src, "dst_ip": dst, "proto": proto, "dst_port": port, "expect": expect, **more}


def case(name: str, *flows: dict[str, Any], **more: Any) -> Case:
    affinity = {"metadata": {"name": "x"}, "spec": {"sessionAffinity": "ClientIP"}}
    entry = {
        "name": name,
        "node": {"name": "n", "ips": [NODE, "2001:db8::1"], "cluster_cidr": "10.244.0.0/16,fd00::/64"},
        "objects": {"services": [affinity] if any(each.get("sticky") for each in flows) else []},
        "flows": flows,
        **more,
    }
    return msgspec.convert(entry, Case)


def play(cases: list[Case], **facts: Any) -> dict[str, list[Result]]:
    """The results of cases by their names, all in one world that is gone afterwards."""

    def work() -> dict[str, list[Result]]:
        runner = Runner(World(), ByHand(**facts))
        return {each.name: list(runner.run(each)) for each in cases}

    return isolated(work)


FIVE, SIX = "10.244.0.5:80", "10.244.0.6:80"
TRUTH = {
    "a pod to one endpoint": flow(POD, "10.96.0.1", 80, "dnat", "10.244.0.5:8080"),
    "the world to one endpoint": flow(CLIENT, "10.96.0.1", 80, "dnat", "10.244.0.5:8080"),
    "UDP": flow(POD, "10.96.0.1", 53, "dnat", "10.244.0.5:5353", proto="UDP"),
    "SCTP": flow(POD, "10.96.0.1", 99, "dnat", "10.244.0.5:9999", proto="SCTP"),
    "IPv6": flow("fd00::9", "fd00:96::1", 80, "dnat", "[fd00::5]:8080"),
    "two endpoints": flow(POD, "10.96.0.2", 80, "dnat", FIVE, SIX),
    "masquerading": flow(CLIENT, "10.96.0.3", 80, "dnat", "10.244.0.5:8080", masquerade=True),
    "an endpoint that meets itself": flow("10.244.0.5", "10.96.0.3", 80, "dnat", "10.244.0.5:8080", masquerade=True),
    "the node, masqueraded": flow(NODE, "10.96.0.1", 80, "dnat", "10.244.0.5:8080", masquerade=True),
    "an endpoint on the node": flow(POD, "10.96.0.10", 80, "dnat", f"{NODE}:8080"),
    "sticky": flow(POD, "10.96.0.11", 80, "dnat", FIVE, SIX, sticky=True),
    "refused by ICMP": flow(POD, "10.96.0.4", 80, "reject"),
    "UDP refused": flow(CLIENT, "10.96.0.4", 80, "reject", proto="UDP"),
    "SCTP refused": flow(CLIENT, "10.96.0.4", 80, "reject", proto="SCTP"),
    "IPv6 refused": flow("fd00::9", "fd00:96::4", 80, "reject"),
    "the node refused": flow(NODE, "10.96.0.4", 80, "reject"),
    "the node refused, IPv6": flow("2001:db8::1", "fd00:96::4", 80, "reject", proto="UDP"),
    "refused by a reset": flow(POD, "10.96.0.6", 80, "reject"),
    "dropped": flow(POD, "10.96.0.5", 80, "drop"),
    "dropped, IPv6": flow("fd00::9", "fd00:96::5", 80, "drop"),
    "the node dropped": flow(NODE, "10.96.0.5", 80, "drop"),
    "routed on": flow(POD, "8.8.8.8", 80, "none"),
    "between pods": flow(POD, "10.244.3.3", 80, "none", proto="SCTP"),
    "the node to the world": flow(NODE, "8.8.8.8", 80, "none"),
    "delivered without a listener": flow(CLIENT, NODE, 80, "none"),
    "loopback": flow("127.0.0.1", "127.0.0.1", 80, "none", proto="UDP"),
    "loopback, IPv6": flow("::1", "::1", 80, "none"),
}
LIES = {
    "none, and it is dnat": flow(POD, "10.96.0.1", 80, "none"),
    "reject, and it is dnat": flow(POD, "10.96.0.1", 80, "reject"),
    "drop, and it is dnat": flow(POD, "10.96.0.1", 80, "drop"),
    "dnat, and it is routed on": flow(POD, "8.8.8.8", 80, "dnat", FIVE),
    "drop, and it is routed on": flow(POD, "8.8.8.8", 80, "drop"),
    "reject, and it is routed on": flow(POD, "8.8.8.8", 80, "reject"),
    "drop, and it is delivered on the node": flow(CLIENT, NODE, 80, "drop"),
    "reject, and the node only has no listener": flow(CLIENT, NODE, 80, "reject"),
    "reject, and loopback only has no listener": flow("127.0.0.1", "127.0.0.1", 80, "reject"),
    "reject, and it is dropped": flow(POD, "10.96.0.5", 80, "reject"),
    "none, and it is dropped": flow(POD, "10.96.0.5", 80, "none"),
    "dnat, and it is dropped": flow(POD, "10.96.0.5", 80, "dnat", FIVE),
    "reject, and the node is dropped": flow(NODE, "10.96.0.5", 80, "reject"),
    "drop, and it is refused": flow(POD, "10.96.0.4", 80, "drop"),
    "drop, and it is refused, IPv6": flow("fd00::9", "fd00:96::4", 80, "drop"),
    "none, and it is refused": flow(POD, "10.96.0.4", 80, "none"),
    "dnat, and it is refused": flow(POD, "10.96.0.4", 80, "dnat", FIVE),
    "drop, and the node is refused": flow(NODE, "10.96.0.4", 80, "drop"),
    "drop, and it is reset": flow(POD, "10.96.0.6", 80, "drop"),
    "reject, and it is an error of routing": flow(POD, "10.96.0.9", 80, "reject"),
    "another endpoint": flow(POD, "10.96.0.1", 80, "dnat", "10.244.0.6:8080"),
    "another port": flow(POD, "10.96.0.1", 80, "dnat", "10.244.0.5:80"),
    "another port, SCTP": flow(POD, "10.96.0.1", 99, "dnat", "10.244.0.5:9998", proto="SCTP"),
    "another protocol": flow(POD, "10.96.0.1", 80, "dnat", "10.244.0.5:8080", proto="UDP"),
    "an endpoint too few": flow(POD, "10.96.0.2", 80, "dnat", FIVE),
    "an endpoint too many": flow(POD, "10.96.0.2", 80, "dnat", FIVE, SIX, "10.244.0.7:80"),
    "masquerading that is not": flow(POD, "10.96.0.1", 80, "dnat", "10.244.0.5:8080", masquerade=True),
    "masquerading that is": flow(CLIENT, "10.96.0.3", 80, "dnat", "10.244.0.5:8080"),
    "masquerading that is, of the node": flow(NODE, "10.96.0.1", 80, "dnat", "10.244.0.5:8080"),
    "a source of nobody's": flow(POD, "10.96.0.8", 80, "dnat", "10.244.0.5:8080", masquerade=True),
    "an answer that is lost": flow(POD, "10.96.0.7", 80, "dnat", "10.244.0.9:8080"),
    "sticky, and it is random": flow(POD, "10.96.0.2", 80, "dnat", FIVE, SIX, sticky=True),
    "sticky with an endpoint too few": flow(POD, "10.96.0.11", 80, "dnat", FIVE, sticky=True),
    "sticky with an endpoint too many": flow(POD, "10.96.0.11", 80, "dnat", FIVE, SIX, "10.244.0.7:80", sticky=True),
}


@pytest.fixture(scope="module")
def played() -> dict[str, list[Result]]:
    return play([case(name, each) for name, each in (TRUTH | LIES).items()])


@pytest.mark.root
@pytest.mark.parametrize("name", TRUTH)
def test_what_the_rules_do_is_seen_as_what_they_do(played: dict[str, list[Result]], name: str) -> None:
    (result,) = played[name]
    assert not result.wrong, result


@pytest.mark.root
@pytest.mark.parametrize("name", LIES)
def test_a_wrong_expectation_is_reported(played: dict[str, list[Result]], name: str) -> None:
    (result,) = played[name]
    assert result.wrong, result


# ------------------------------------------------------------------------------------------------------------- facts


@contextlib.contextmanager
def health_server(port: int, status: int, body: bytes) -> Iterator[None]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
            pass

    with http.server.HTTPServer(("0.0.0.0", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def faults(check: Case, *, serving: tuple[int, int, bytes] | None = None, **told: Any) -> str:
    """What the runner complains of, with a health check server where it is wanted."""

    def work() -> str:
        runner = Runner(World(), ByHand(**told))
        with health_server(*serving) if serving else contextlib.nullcontext():
            return "\n".join("; ".join(each.wrong) for each in runner.run(check))

    return isolated(work)


def health(**check: int) -> Case:
    return case("health", health_checks=[{"port": 30000, **check}])


@pytest.mark.root
@pytest.mark.parametrize(
    ("check", "complaint"),
    [
        (health(status=503, local_endpoints=0), ""),
        (health(status=200, local_endpoints=0), "expected 200 with localEndpoints 0, saw 503 with localEndpoints 0"),
        (health(status=503, local_endpoints=1), "expected 503 with localEndpoints 1, saw 503 with localEndpoints 0"),
        (case("none", health_checks=[]), "nothing was expected on 30000, somebody listens there"),
        (case("other port", health_checks=[{"port": 30001, "status": 503}]), "no answer"),
    ],
    ids=["right", "status", "endpoints", "too many", "no server"],
)
def test_a_health_check_is_asked(check: Case, complaint: str) -> None:
    seen = faults(check, serving=(30000, 503, b'{"localEndpoints": 0}'))
    assert complaint in seen
    assert bool(seen) == bool(complaint)


ENTRIES = [
    {"orig_dst": "10.96.0.1", "orig_dport": 53, "proto": "UDP", "reply_src": "10.244.0.5", "reply_sport": 5353},
    {"orig_dst": "10.96.0.2", "orig_dport": 53, "proto": "UDP", "reply_src": "10.244.0.6", "reply_sport": 5353},
    {"orig_dst": "10.96.0.2", "orig_dport": 53, "proto": "TCP", "reply_src": "10.244.0.6", "reply_sport": 5353},
    {"orig_dst": "fd00:96::1", "orig_dport": 53, "proto": "SCTP", "reply_src": "fd00::5", "reply_sport": 5353},
]


@pytest.mark.root
def test_conntrack_is_compared_with_what_was_to_stay() -> None:
    def told(*keep: bool) -> Case:
        return case("ct", conntrack=[{**each, "keep": stays} for each, stays in zip(ENTRIES, keep, strict=True)])

    assert faults(told(True, False, True, True), forget=["10.96.0.2"]) == ""
    assert "10.96.0.1:53/UDP answered by 10.244.0.5:5353: expected to be deleted, was kept" in faults(
        told(False, False, True, True), forget=["10.96.0.2"]
    )
    assert "10.96.0.2:53/UDP answered by 10.244.0.6:5353: expected to be kept, was deleted" in faults(
        told(True, True, True, True), forget=["10.96.0.2"]
    )


@pytest.mark.root
def test_metrics_affinity_and_a_second_sync_are_compared() -> None:
    assert faults(case("m", metrics={"n": {"internal": 1}}), metrics={"n": {"internal": 1}}) == ""
    assert "expected {'internal': 1}, saw {'internal': 0}" in faults(
        case("m", metrics={"n": {"internal": 1}}), metrics={"n": {"internal": 0}}
    )
    assert "no such metric" in faults(case("m", metrics={"n": {"internal": 1}}))
    assert faults(case("a", affinity={"timeout_seconds": 10800}), affinity={10800}) == ""
    assert "expected 10800 s" in faults(case("a", affinity={"timeout_seconds": 10800}), affinity={60})


# ------------------------------------------------------------------------------------------------------------- pure


@pytest.mark.parametrize("protocol", Protocol)
@pytest.mark.parametrize("ends", [V4, V6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("what", [What.OPENING, What.ANSWER])
def test_a_packet_is_read_as_it_was_built(protocol: Protocol, ends: tuple[Address, Address], what: What) -> None:
    data = build(what, protocol, *ends, 1234, 80, 0xDEADBEEF)
    assert parse(data) == Packet(what, protocol, *ends, 1234, 80, 0xDEADBEEF, True)
    damaged = parse(data[:-1] + bytes([data[-1] ^ 1]))
    assert damaged is not None
    assert not damaged.intact
    moved = parse(data.replace(ends[1], ends[1][:-1] + b"\x07"))
    assert moved is not None
    assert moved.intact == (protocol is Protocol.SCTP)  # whose checksum leaves addresses out


def test_checksums_are_those_of_their_documents() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert internet_checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xDDF2 ^ 0xFFFF  # RFC 1071, section 3


def test_tries_are_enough_to_see_every_endpoint_and_one_too_many() -> None:
    for endpoints in (1, 2, 5, 20):
        tries = tries_for(endpoints)
        assert endpoints * (1 - 1 / endpoints) ** tries <= 1e-6
        assert (endpoints / (endpoints + 1)) ** tries <= 1e-6


# ------------------------------------------------------------------------------------------------------ command line


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.flows", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        stdin=subprocess.DEVNULL,
    )


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout.splitlines()[-1]


CLUSTER_IP_CASES = ("slices/*", "readiness/*", "internal-policy/*", "topology/zone-hints-used", "topology/[!z]*")


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("nftables", marks=pytest.mark.root),
        pytest.param("iptables", marks=pytest.mark.root),
        pytest.param("ipvs", marks=pytest.mark.ipvs),
    ],
)
def test_flows_to_cluster_ips_pass(mode: str) -> None:
    done = command("--mode", mode, *(f"--case={each}" for each in CLUSTER_IP_CASES))
    assert done.returncode == 0, done.stdout + done.stderr
    assert last_line(done) == "16 passed, 0 failed, 0 skipped"


@pytest.mark.root
def test_every_wrong_expectation_of_a_file_fails_the_run(tmp_path: Path) -> None:
    cases = yaml.safe_load(OUR_CASES.read_text())
    some = [each for each in cases if each["name"].startswith(("slices/", "readiness/"))]
    for each in some:
        for one in each["flows"]:
            other = {"dnat": "reject", "reject": "drop"}[one["expect"]["action"]]
            one["expect"] = {"action": other, "endpoints": [], "masquerade": False}
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump(some))
    done = command("--mode", "nftables", str(file))
    assert done.returncode == 1, done.stdout + done.stderr
    flows = sum(len(each["flows"]) for each in some)
    assert last_line(done) == f"0 passed, {flows} failed, 0 skipped"
    assert len(done.stdout.splitlines()) == flows + 1
    assert "expected reject; saw dnat to 10.0.1.1:80 not masqueraded" in done.stdout


@pytest.mark.root
def test_a_run_of_nothing_is_no_success() -> None:
    done = command("--mode", "nftables", "--case", "nothing of this name")
    assert done.returncode == 1
    assert last_line(done) == "0 passed, 0 failed, 0 skipped"


@pytest.mark.root
def test_objects_that_cannot_be_programmed_fail_all_their_flows(tmp_path: Path) -> None:
    file = tmp_path / "bare.yaml"
    bare = {"name": "x", "node": {"name": "n", "ips": ["300.1.1.1"]}, "flows": [flow(POD, "10.96.0.1", 80, "none")]}
    file.write_text(yaml.safe_dump([json.loads(json.dumps(bare))]))
    done = command("--mode", "nftables", str(file))
    assert done.returncode == 1
    assert last_line(done) == "0 passed, 1 failed, 0 skipped"
    assert "is not an IP address" in done.stdout


def test_our_cases_have_no_key_that_is_not_looked_at() -> None:
    read = read_cases(OUR_CASES)
    assert (len(read.cases), sum(len(each.flows) for each in read.cases), read.unknown) == (51, 195, ())


def test_keys_that_nobody_looks_at_are_told_and_broken_files_refused(tmp_path: Path) -> None:
    file = tmp_path / "cases.yaml"
    file.write_text("- {name: x, node: {name: n, ip: 1.2.3.4}, flows: [], weather: fine}\n")
    assert set(read_cases(file).unknown) == {"weather", "node.ip"}
    one = flow(POD, "fd00::1", 80, "none")
    for text in ("{}", "[{name: x}]", "- {", json.dumps([{"name": "x", "node": {"name": "n"}, "flows": [one]}])):
        file.write_text(text)
        with pytest.raises(BadCases):
            read_cases(file)
