"""The bench's frame: what is kept, calculated, compared, shown. From fixed records; the last test measures a little."""

import gzip
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hdrh.histogram import HdrHistogram

from bench import contenders, histograms, kube_proxy, noise, operations, peers, pictures, report, summary, workload
from bench.__main__ import BASES, TARGETS, read_command_line
from bench.aims import aims
from bench.compare import Unlike, as_text, compare, find, join
from bench.contenders import CONTENDERS
from bench.extrapolation import mark, predict
from bench.isolation import RunFailed, isolated
from bench.operations import FULL, REPLACE, Plan, Task
from bench.records import Key, Records, base_of, table
from bench.stopwatch import Spent
from bench.variants import VARIANTS

ROOT = Path(__file__).resolve().parent.parent


def fixed(folder: Path | None = None, factor: float = 1.0) -> Records:
    """A run of nftables mode at three sizes, with its floor, a tool, an agent and connections."""
    records = Records(folder)
    records.metadata |= {"emulated": False, "kernel": "6.1", "date": "2026-11-24T00:00:00+00:00"}
    for size in (100, 1_000, 10_000):
        for number in (0.9, 1.0, 1.1):
            for operation, scale in ((FULL, size), (REPLACE, 1)):
                for who, share in (("nftables", 2), ("nftables: raw replay", 1), ("iptables-legacy", size)):
                    key = Key("modes", size, operation, who)
                    records.add(key, factor * share * scale * number * 1e-5)
            for place in ("first", "middle", "last"):
                records.add(Key("traffic", size, f"connect, {place}", "nftables"), number * 4e-5)
                records.add(Key("traffic", size, f"first byte, {place}", "nftables"), number * 9e-5)
            records.add(Key("traffic", size, "connections", "nftables"), 2000 * number, "/s")
    known = {100: 1.0, 1_000: 20.0}
    tool = mark("iptables-legacy: iptables, one by one", known)
    records.add(Key("modes", 10_000, FULL, tool), predict(known, 10_000), calculated=True)
    records.add(Key("end-to-end", 10_000, "resident memory", "nftables"), 61.0, "MiB")
    records.add(Key("end-to-end", 10_000, "restart until verified", "nftables"), 0.7)
    for _ in range(9):
        records.calibrations.append(1e-3)
        records.loads.append(0.3)
    return records


def test_records_read_back_are_the_same(tmp_path: Path) -> None:
    written = Records(tmp_path, {"seed": 1})
    key = Key("modes", 10, FULL, "nftables")
    written.add(key, 1.5)
    written.add_all(key, [2.5, 3.5])
    written.add_all(key, [])
    written.add(key._replace(part="x"), 9.0, "MiB", calculated=True)
    written.fail("somebody")
    written.calibrate()
    written.close()
    read = Records.read(find(tmp_path))
    assert (read.samples, read.units, read.calculated) == (written.samples, written.units, written.calculated)
    assert (read.failures, read.calibrations, read.loads) == (["somebody"], written.calibrations, written.loads)
    assert read.metadata["settings"] == {"seed": 1}
    assert {"kernel", "cpu", "commit", "tools", "memory"} <= read.metadata.keys()


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, 0.0),
        ({100: 1.0}, 10.0),  # linear from one
        ({10: 0.01, 100: 1.0}, 100.0),  # quadratic, as it was between the two
        ({10: 1.0, 100: 1.0}, 10.0),  # never less than linear: what did not grow among few may among many
    ],
)
def test_what_is_too_slow_is_calculated_by_the_growth_that_was_measured(
    known: dict[int, float], expected: float
) -> None:
    assert predict(known, 1000) == pytest.approx(expected)


def test_a_calculated_row_says_from_what() -> None:
    assert mark("tool", {10: 1.0, 100: 2.0, 1000: 3.0}) == "tool (calculated from 100 and 1,000)"
    assert summary.plain(mark("tool", {10: 1.0})) == "tool"


def test_a_noisy_machine_is_told() -> None:
    assert not noise.judge([1.0] * 10, [0.5], 2).noisy
    stretched = noise.judge([1.0] * 8 + [1.5] * 2, [0.5], 2)
    assert stretched.noisy
    assert "± 25%" in stretched.words
    assert noise.judge([1.0] * 10, [4.0], 2).words == "load 4.0 on 2 processors"
    assert noise.judge([1.0], [], 2).noisy
    assert noise.calibrate() > 0


def test_each_contender_has_the_floor_of_its_own_mechanism() -> None:
    names = {each.name for each in CONTENDERS}
    assert len(names) == len(CONTENDERS)
    assert {contenders.base(name) for name in names} <= names
    assert contenders.base("ipvs, routes") == "ipvs: raw replay"
    assert base_of(Key("modes", 1, FULL, "iptables-nft"), BASES) == "iptables-nft: iptables-restore by hand"
    assert base_of(Key("program", 1, "ipvs", "dataplane"), BASES) == "raw replay"
    assert "(ratio to raw replay)" not in table(fixed(), BASES, TARGETS)


def test_runs_of_unlike_machines_are_not_compared(tmp_path: Path) -> None:
    before, after = fixed(), fixed()
    after.metadata["kernel"] = "6.12"
    with pytest.raises(Unlike, match=r"kernel: 6\.1 and 6\.12"):
        compare(before, after)


def test_sittings_of_one_machine_are_one_run(tmp_path: Path) -> None:
    first, second = fixed(), fixed()
    second.samples = {Key("parts", 1, "", "x"): [1.0]}
    second.units, second.calculated = {Key("parts", 1, "", "x"): "s"}, set()
    joined = join([first, second])
    assert joined.samples == first.samples | second.samples
    assert (len(joined.calibrations), joined.metadata, joined.calculated) == (18, first.metadata, first.calculated)
    second.metadata = second.metadata | {"commit": "another"}
    with pytest.raises(Unlike, match="commit"):
        join([first, second])


def test_records_are_read_from_a_packed_file_too(tmp_path: Path) -> None:
    written = Records(tmp_path)
    written.add(Key("parts", 1, "", "x"), 2.0)
    written.close()
    assert written.path is not None
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(written.path.read_bytes()))
    assert Records.read(packed).samples == written.samples


def test_a_comparison_tells_what_differs_and_whether_to_believe_it() -> None:
    before, after = fixed(), fixed(factor=1.5)
    lines = compare(before, after)
    changed = [line for line in lines if line.key.case == "modes"]
    assert {round(line.change, 3) for line in changed} == {0.5}
    assert not any(line.key in before.calculated for line in lines)
    assert "noisy" not in as_text(before, after).splitlines()[-1]
    after.loads = [9.0 + 2 * (after.metadata["cpus"] or 1)]
    told = as_text(before, after)
    assert f"{len(changed)} differ by more than 10% (!)" in told
    assert "after: commit" in told
    assert told.splitlines()[-1].startswith("The machine was noisy")


def test_the_summary_shows_ratios_first_and_marks_what_was_calculated() -> None:
    text = summary.as_text(fixed())
    assert text.startswith("10,000 Services:")
    assert "2 × 200 ms" in text
    assert "* calculated from smaller sizes" in text
    (row,) = [line for line in text.splitlines() if "one by one" in line]
    assert row.rstrip().endswith("400 s*")  # 20 s at 1,000 after 1 s at 100: power 1.3


def test_aims_are_told_from_the_records() -> None:
    found = {row.asked.split(":")[0] + row.asked[-20:]: row.met for row in aims(fixed())}
    rows = aims(fixed())
    assert [row.met for row in rows] == [False, True, True, False, True], found
    assert "2.00 ×" in rows[0].found
    emulated = fixed()
    emulated.metadata["emulated"] = True
    assert len(aims(emulated)) == 3  # what is asked natively is not told of the micro-VM


def test_histograms_hold_every_sample(tmp_path: Path) -> None:
    records = fixed()
    count = histograms.write(records, tmp_path / "log")
    seconds = [key for key, unit in records.units.items() if unit == "s" and key not in records.calculated]
    assert count == len(seconds)
    found: dict[str, Any] = {}
    for line in (tmp_path / "log").read_text().splitlines()[3:]:
        name, _, _, _, encoded = line.split(",")
        found[name] = HdrHistogram.decode(encoded)
    one = found[f"Tag={histograms.tag(f'modes/100/{FULL}/nftables')}"]
    assert one.get_total_count() == 3
    assert one.get_value_at_percentile(50) == pytest.approx(2e6, rel=0.01)


def test_the_report_is_one_file_with_tables_and_pictures(tmp_path: Path) -> None:
    records = fixed()
    records.fail("<b>somebody</b> failed")
    path = report.write([records], tmp_path, BASES, TARGETS)
    page = path.read_text()
    assert page.count("<svg") == len(pictures.PICTURES)
    assert "<b>somebody</b>" not in page
    assert "FAILED: &lt;b&gt;somebody" in page
    for outside in ("src=", "<link", "@import", "<script"):
        assert outside not in page
    assert "10,000 Services × 3 endpoints" in page
    for name in pictures.PICTURES:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{name}.svg").stat().st_size < 400_000


def test_two_runs_in_one_report_have_pictures_of_their_own(tmp_path: Path) -> None:
    other = fixed()
    other.metadata |= {"emulated": True}
    page = report.write([fixed(), other], tmp_path, BASES, TARGETS, ("latency",)).read_text()
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == ["native-latency.svg", "vm-latency.svg"]
    assert "micro-VM" in page


def test_a_picture_of_what_was_not_measured_is_not_drawn(tmp_path: Path) -> None:
    assert pictures.draw(Records(), tmp_path) == []


# ---------------------------------------------------------------------------------------------------- contenders


def test_printed_transactions_are_cut_by_tool() -> None:
    text = "# nft -f -\nadd x\n# ipvsadm -R\n-A -t 1:2\n# ip -batch -\naddress add\n"
    assert peers.texts(text) == [peers.Piece(("ipvsadm", "-R"), "-A -t 1:2\n")]
    assert peers.texts("add a\n# TCP 10.0.0.1:80 ns/name\nadd b\n") == [
        peers.Piece(("nft", "-f", "-"), "add a\nadd b\n")
    ]
    (piece,) = peers.texts("# iptables-nft-restore (nft) --noflush -w 5\n*nat\nCOMMIT\n")
    assert piece.command == ("iptables-nft-restore", "--noflush", "-w", "5")


def test_kube_proxys_layout_has_a_chain_and_a_map_for_each_service() -> None:
    text = peers.kube_proxy_service(workload.view(0))
    # the name as kube-proxy makes it: base32 of the SHA-256 of namespace/name/protocol/port, 8 characters of it
    assert "add chain ip kube-proxy service-" in text
    assert "-bench/service-0/tcp/http\n" in text
    assert "numgen random mod 3 map { 0 : 10.128.0.1 . 8080, 1 :" in text


def test_services_can_have_any_number_of_endpoints() -> None:
    for endpoints in (1, 3, 30, 50):
        seen = {each.address for number in range(50) for each in workload.sized(number, endpoints).slices[0].endpoints}
        assert len(seen) == 50 * endpoints
    assert workload.sized(7, 3, 2) == workload.view(7, replaced=2)


def test_the_same_seed_draws_the_same_changes() -> None:
    import random

    def drawn(seed: int) -> list[Any]:
        task = Task(1000, seed=seed)
        make = operations.changes(task)[REPLACE, REPLACE]
        return [make(turn, random.Random(f"{seed} {turn}"))[0] for turn in range(5)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def plan(**more: Any) -> Plan:
    return Plan((10, 100), (3,), 1, 5.0, Task(0), **more)


def measured(monkeypatch: pytest.MonkeyPatch, run: Any, wanted: Plan) -> Records:
    records = Records()
    monkeypatch.setattr(operations, "run", run)
    operations.measure(wanted, [each.name for each in VARIANTS], records, lambda _: None, lambda: None)
    return records


def test_a_contender_that_fails_is_a_failed_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(contender: Any, task: Task, *, only_load: bool = False) -> operations.Samples:
        if contender.name == "nftables":
            raise RunFailed("refused")
        return {FULL: [Spent(1e-3, 1e-3)]}

    records = measured(monkeypatch, run, plan())
    assert records.failures == ["modes, 10, nftables: refused", "modes, 100, nftables: refused"]


def test_what_would_take_too_long_is_calculated_and_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    tool = "iptables-legacy: iptables, one by one"
    asked = []

    def run(contender: Any, task: Task, *, only_load: bool = False) -> operations.Samples:
        asked.append((contender.name, task.size))
        return {FULL: [Spent(task.size / 10 if contender.name == tool else 1e-3, 0.0)]}

    records = measured(monkeypatch, run, plan(contenders=[tool]))
    assert asked == [(tool, 5), (tool, 10), (tool, 20)]
    (key,) = records.calculated
    assert key == Key("modes", 100, FULL, f"{tool} (calculated from 10 and 20)")
    assert records.samples[key] == [pytest.approx(10)]


def test_the_command_line_tells_what_it_means() -> None:
    settings = read_command_line([])
    assert settings.only == ["baseline", "modes", "end-to-end", "traffic", "parts", "api", "kube-proxy"]
    assert settings.endpoints == [3, 1, 50]
    assert {"program", "kinds", "modes"} <= set(read_command_line(["--only", "everything"]).only)
    with pytest.raises(SystemExit):
        read_command_line(["--kube-proxy", "/x"])
    assert json.dumps(settings.as_record())


KUBECONFIG = """
current-context: b
contexts: [{name: a, context: {cluster: other}}, {name: b, context: {cluster: mine, user: me}}]
clusters:
- {name: other, cluster: {server: "https://elsewhere"}}
- {name: mine, cluster: {server: "https://api.example:6443", certificate-authority-data: abc}}
users: [{name: me, user: {token: secret}}]
"""


def test_kube_proxy_is_led_to_its_api_server_by_another_address() -> None:
    text, server = kube_proxy.inside(KUBECONFIG, kube_proxy.INSIDE)
    assert server == "api.example:6443"
    document = yaml.safe_load(text)
    assert document["clusters"][1]["cluster"] == {
        "server": "https://127.0.0.1:16443",
        "tls-server-name": "api.example",
        "certificate-authority-data": "abc",
    }
    assert document["users"] == [{"name": "me", "user": {"token": "secret"}}]


def test_the_first_sync_is_read_from_kube_proxys_metrics() -> None:
    name = "kubeproxy_sync_proxy_rules_duration_seconds"
    assert kube_proxy.first_sync(f'{name}_sum{{ip_family="IPv4"}} 1.5\n{name}_sum{{ip_family="IPv6"}} 0.25\n') == 1.75
    assert kube_proxy.first_sync(f"# TYPE {name} histogram\n{name}_count 0\n") == 0


@pytest.mark.root
def test_a_relay_leads_out_of_a_namespace(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as outside:
        way = str(tmp_path / "way")

        def ask() -> bytes:
            with kube_proxy.running(kube_proxy.relay(kube_proxy.INSIDE, way)):
                limit = time.monotonic() + 30
                while True:
                    try:
                        host, port = kube_proxy.INSIDE.split(":")
                        with socket.create_connection((host, int(port)), timeout=30) as one:
                            one.sendall(b"ping")
                            return one.recv(10)
                    except OSError:
                        if time.monotonic() > limit:
                            raise
                        time.sleep(0.05)

        def answer() -> None:
            while True:
                one, _ = outside.accept()
                with one:
                    if one.recv(10) == b"ping":
                        one.sendall(b"pong")
                        return

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with kube_proxy.running(kube_proxy.relay(way, f"127.0.0.1:{outside.getsockname()[1]}")):
            limit = time.monotonic() + 30
            while not Path(way).exists() and time.monotonic() < limit:
                time.sleep(0.05)
            assert isolated(ask) == b"pong"


@pytest.mark.root
@pytest.mark.slow
def test_a_tiny_run_measures_all_contenders_and_reports(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "--quick", "--sizes", "12", "--changes", "20", "--seconds", "0.1"]
    done = subprocess.run(
        [*command, "--only", "baseline", "modes", "end-to-end", "traffic", "parts", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = Records.read(find(tmp_path))
    names = {key.contender for key in records.samples if key.case == "modes"}
    here = {"nftables", "iptables-legacy", "iptables-nft"}
    # a process a line is not for a quick look
    assert names == {each.name for each in CONTENDERS if each.mechanism.name in here and not each.single}
    assert {key.part for key in records.samples if key.contender == "nftables" and key.case == "modes"} >= {
        *operations.OPERATIONS
    }
    for name in ("report.html", "latency.svg", "latency.png", "samples.hdr.log", "table.txt"):
        assert (tmp_path / name).stat().st_size > 100
