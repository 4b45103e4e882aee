"""What `counters` prints: golden tables and JSON, from rows as a look has them."""

import json

from dataplane import counters_text
from dataplane.backend import RealCounters, ServerReport
from dataplane.counters import RealServerAt
from dataplane.rows import Counts, Look, service_rows, with_rates

from . import words

COUNTS = Counts("probe", ("fexit:nf_nat_setup_info",), {"full": 0}, 1000.0)
WEB = words.server("TCP 10.0.0.1:80 rr label=a/web:http -> 10.1.0.1:80, 10.1.0.2:80")
OUTSIDE = words.server("TCP 1.2.3.4:80 rr LoadBalancer node label=a/web:http -> 10.1.0.1:80")
INSIDE = words.server("TCP 1.2.3.4:80 (inside) rr LoadBalancer node label=a/web:http -> 10.1.0.1:80, 10.1.0.2:80")
NOBODY = words.server("UDP [fd00::10]:53 rr label=b/dns")


def look(at: float, **hits: int) -> Look:
    """Hits by the last number of the real server's address, `o` for everybody's and `i` for inside."""

    def count(report: ServerReport) -> tuple[dict[RealServerAt, int], int]:
        which = "i" if report.server.at.inside else "o" if report.server.at == OUTSIDE.at else "c"
        known = {(r.address, r.port): hits.get(f"{which}{r.address[-1]}", 0) for r in report.server.real_servers}
        return known, sum(known.values())

    reports = [
        ServerReport(one, 0, 0, tuple((real, RealCounters(0, 0, 0)) for real in one.real_servers), True)
        for one in (WEB, OUTSIDE, INSIDE, NOBODY)
    ]
    return Look("nftables", at, COUNTS, service_rows(reports, {}, count))


FIRST = look(1000.0, c1=1, c2=3, o1=5, i1=0, i2=5)
SECOND = with_rates(look(1002.0, c1=1, c2=5, o1=7, i1=0, i2=6), FIRST)


def test_a_table_names_who_counted_and_joins_what_only_differs_by_who_asks() -> None:
    table = """
counted by probe (fexit:nf_nat_setup_info), missed 0
SERVICE     VIP                BACKEND      HITS  SHARE   RATE/S
a/web:http  10.0.0.1:80/TCP    all          6     100.0%  1.0
                               10.1.0.1:80  1     16.7%   0.0
                               10.1.0.2:80  5     83.3%   1.0
a/web:http  1.2.3.4:80/TCP     all          13    100.0%  1.5
                               10.1.0.1:80  7     53.8%   1.0
                               10.1.0.2:80  6     46.2%   0.5
b/dns       [fd00::10]:53/UDP  all          0     -       0.0
"""
    assert counters_text.table(SECOND) == table.lstrip()
    assert counters_text.table(FIRST, headers=False).splitlines()[0].split() == [
        *("a/web:http", "10.0.0.1:80/TCP", "all", "4", "100.0%", "-")
    ]


def test_wide_adds_state_and_the_modes_own_counter() -> None:
    titles, total, first, *_ = counters_text.table(SECOND, wide=True).splitlines()[1:]
    assert titles.split()[6:] == ["STATE", "WEIGHT", "ACTIVE", "INACTIVE", "NFTABLES", "COUNTS"]
    assert first.split()[4:] == ["active", "1", "0", "0", "0"]
    assert total.split()[-1] == "0"


def test_nothing_is_a_line_that_says_who_would_count() -> None:
    assert counters_text.table(Look("ipvs", 1.0, Counts("ipvs", reason="no agent runs"), ())) == (
        "counted by ipvs mode's own counters (no agent runs)\n"
    )


def test_json_says_who_counted_and_what_he_missed() -> None:
    document = counters_text.document(SECOND)
    assert document["counts"] == {
        "source": "probe",
        "hooks": ("fexit:nf_nat_setup_info",),
        "missed": {"full": 0},
        "since": 1000.0,
        "reason": "",
    }
    web = document["services"][0]
    assert (web["service"], web["portName"], web["hits"], web["rate"]) == ("web", "http", 6, 1.0)
    assert web["backends"][1] == {
        "backend": "10.1.0.2:80",
        "hits": 5,
        "share": 5 / 6,
        "rate": 1.0,
        "state": "active",
        "weight": 1,
        "connections": 0,
    }
    lines = [json.loads(line) for line in counters_text.json_lines(SECOND).splitlines()]
    assert [(line["address"], line["backend"], line["hits"]) for line in lines] == [
        ("10.0.0.1", "10.1.0.1:80", 1),
        ("10.0.0.1", "10.1.0.2:80", 5),
        ("1.2.3.4", "10.1.0.1:80", 7),
        ("1.2.3.4", "10.1.0.2:80", 6),
    ]
