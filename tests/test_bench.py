"""The benchmark's own promises: right statistics, and contenders that all program the same. Nothing here is timed."""

import json
import math
import struct
import subprocess
from pathlib import Path

import pytest

from bench import changes, iptables_programming, kinds, nft_programming, probe, programming, raw, workload
from bench.__main__ import read_command_line
from bench.figures import quantile, ratio, seconds, summarize
from bench.isolation import RunFailed, isolated
from bench.records import Key, Records, Target, table
from bench.witness import changes_something
from dataplane.ipvs_messages import GET_DEST, NEW_DEST
from dataplane.netlink_route import RTM_GETADDR, RTM_NEWADDR
from dataplane.netlink_socket import (
    CTRL_CMD_GETFAMILY,
    GENL_ID_CTRL,
    NETLINK_GENERIC,
    NETLINK_NETFILTER,
    NETLINK_ROUTE,
)

TINY = 7


def test_quantiles_are_interpolated_between_samples() -> None:
    assert quantile([3, 1, 2], 0.5) == 2
    assert quantile([1, 2], 0.25) == 1.25
    assert quantile([5], 0.99) == 5
    with pytest.raises(ValueError, match="no samples"):
        quantile([], 0.5)


def test_a_summary_is_of_all_samples() -> None:
    summary = summarize([float(each) for each in range(101)])
    assert summary[:5] == (101, 50, 10, 90, 99)
    assert summary.spread == pytest.approx(0.8)
    assert summarize([0.0]).spread == 0


def test_ratios_are_of_medians() -> None:
    assert ratio([2, 100, 2], [1, 1, 50]) == 2
    assert math.isnan(ratio([1], [0]))


@pytest.mark.parametrize(
    ("value", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.2e-5, "42 µs"), (3e-8, "30 ns"), (0, "0")]
)
def test_durations_read_well(value: float, text: str) -> None:
    assert seconds(value) == text


def test_the_table_shows_ratios_targets_and_every_sample_is_kept(tmp_path: Path) -> None:
    records = Records(tmp_path)
    for value in (1.0, 1.0, 1.2):
        records.add(Key("program", 10, "ipvs", "raw replay"), value)
        records.add(Key("program", 10, "ipvs", "dataplane"), 2 * value)
    records.close()
    text = table(records, {"program": "raw replay"}, (Target("program", "ipvs", "dataplane", "raw replay", 1.5),))
    assert "2 × raw replay; target ≤ 1.5: MISSED" in text
    (file,) = tmp_path.iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0]["metadata"]["kernel"]
    assert [line["value"] for line in lines[1:] if line["contender"] == "raw replay"] == [1.0, 1.0, 1.2]


def test_the_command_line_has_a_quick_form() -> None:
    assert read_command_line([]).sizes == [100, 1000, 10000]
    assert max(read_command_line(["--quick"]).sizes) < 1000
    assert read_command_line(["--quick", "--sizes", "5,6"]).sizes == [5, 6]


def test_services_of_a_workload_are_distinct() -> None:
    servers = workload.servers(1000)
    assert len({server.at for server in servers}) == 1000
    assert len({(real.address, real.port) for server in servers for real in server.real_servers}) == 3000


def test_split_messages_ask_for_an_answer_each_and_joined_ones_for_one() -> None:
    one = bytes((20, 0, 0, 0, 30, 0, 1, 0)) + bytes(12)
    alone = raw.split(one + one)
    assert [each[6] for each in alone] == [5, 5]
    together = raw.acknowledged(one + one)
    assert (together[6], together[26]) == (1, 5)


def header(kind: int, command: int = 0) -> bytes:
    return struct.pack("=IHHIIBBH", 20, kind, 1, 0, 0, command, 1, 0)


@pytest.mark.parametrize(
    ("protocol", "message", "changes"),
    [
        (NETLINK_ROUTE, header(RTM_NEWADDR), True),
        (NETLINK_ROUTE, header(RTM_GETADDR), False),
        (NETLINK_GENERIC, header(30, NEW_DEST), True),
        (NETLINK_GENERIC, header(30, GET_DEST), False),
        (NETLINK_GENERIC, header(GENL_ID_CTRL, CTRL_CMD_GETFAMILY), False),
        (NETLINK_NETFILTER, header(10 << 8 | 12), True),
        (NETLINK_NETFILTER, header(10 << 8 | 13), False),
    ],
)
def test_questions_are_told_from_changes(protocol: int, message: bytes, changes: bool) -> None:
    assert changes_something(protocol, message) is changes


def test_a_failed_run_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    if subprocess.run(["unshare", "-n", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no network namespaces for this user")

    def work() -> None:
        raise RunFailed("not what it should be")

    with pytest.raises(RunFailed, match="ended with 1"):
        isolated(work)
    assert "not what it should be" in capfd.readouterr().err


@pytest.mark.ipvs
def test_all_contenders_program_the_same() -> None:
    def rules(contender: programming.Contender) -> str:
        def work() -> str:
            contender.run(TINY)
            return subprocess.run(["ipvsadm", "-S", "-n"], capture_output=True, text=True, check=True).stdout

        programming.recorded(TINY)
        return isolated(work)

    found = {contender.name: sorted(rules(contender).splitlines()) for contender in programming.CONTENDERS}
    assert len(found["dataplane"]) == TINY * (1 + workload.ENDPOINTS)
    assert all(each == found["dataplane"] for each in found.values()), found


@pytest.mark.ipvs
@pytest.mark.parametrize("kind", changes.KINDS, ids=lambda kind: kind.name)
def test_changes_are_measured_and_undone(kind: changes.Kind) -> None:
    samples = changes.run(kind, TINY, 5)
    assert {name: len(values) for name, values in samples.items()} == dict.fromkeys(
        ("floor", "to ACK", "sync", "take+sync"), 5
    )


@pytest.mark.root
@pytest.mark.parametrize("tool", iptables_programming.TOOLS)
def test_the_text_given_to_the_tool_by_hand_leaves_what_ours_does(tool: str) -> None:
    many = 4 * TINY  # each run verifies what it left, RunFailed else
    for contender in (iptables_programming.OURS, iptables_programming.HAND, iptables_programming.ONE_SECTION):
        assert iptables_programming.full(tool, many, contender).cpu > 0
    samples = iptables_programming.change(tool, many, 3)
    assert {name: len(values) for name, values in samples.items()} == {"dataplane": 3, "by hand": 3}


def test_one_section_has_the_same_lines() -> None:
    text = "*filter\n:F - [0:0]\nCOMMIT\n*nat\n:A - [0:0]\n-A A x\nCOMMIT\n*nat\n:B - [0:0]\n-A B -j A\nCOMMIT\n"
    assert iptables_programming.as_one_section(text) == (
        "*filter\n:F - [0:0]\nCOMMIT\n*nat\n:A - [0:0]\n:B - [0:0]\n-A A x\n-A B -j A\nCOMMIT\n"
    )


@pytest.mark.root
def test_nftables_bytes_sent_again_leave_what_ours_does() -> None:
    for run in nft_programming.CONTENDERS.values():
        assert run(TINY).wall > 0
    assert len(nft_programming.change(TINY, 5)) == 5


@pytest.mark.root
@pytest.mark.parametrize("kind", kinds.KINDS, ids=lambda kind: kind.name)
def test_every_kind_of_service_is_changed_and_verified(kind: kinds.Kind) -> None:
    assert len(kinds.run("nftables", kind, 10, 30)) == 30


@pytest.mark.root
def test_hits_readings_and_connections_of_the_probe_are_measured_and_counted() -> None:
    # each run compares what was counted with what was done, RunFailed else
    assert len(probe.cost(TINY, 2)["nat: a hit over an empty probe"]) == 2
    assert len(probe.reading(TINY, 3)) == 3
    found = probe.connecting("nftables", 2, 50)
    assert (len(found.without), len(found.with_probe)) == (2, 2)
    assert found.probe > 0
    assert probe.starting()[1] > 0
