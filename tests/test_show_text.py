"""What `show` prints: golden tables, the JSON schema, names and filters, and nothing that acts on a terminal."""

import json

import pytest

from dataplane import show_text
from dataplane.backend import RealCounters, ServerReport
from dataplane.drain import DrainKey
from dataplane.model import Forwarding, RealServer, VirtualAddress, VirtualServer, parse_address
from dataplane.plan import Plan, compare
from dataplane.rows import Counts, Look, ServiceRow, chosen, service_rows

from . import words


def server(vip: str, port: int, label: str, *reals: str, protocol: int = 6, **traits: object) -> VirtualServer:
    made = tuple(
        RealServer(parse_address(address), int(number), int(weight))
        for address, number, weight in (real.split(" ") for real in reals)
    )
    return VirtualServer(VirtualAddress(protocol, parse_address(vip), port), made, label=label, **traits)  # type: ignore[arg-type]


def report(one: VirtualServer, *counters: tuple[int, int, int], ours: bool = True, fwmark: int = 0) -> ServerReport:
    rows = tuple(zip(one.real_servers, (RealCounters(*each) for each in counters), strict=True))
    return ServerReport(one, fwmark, sum(each[2] for each in counters), rows, ours)


WEB = server("10.0.1.175", 80, "default/web:http", "10.44.1.7 937 1", "10.44.2.3 937 0")
DNS = server(
    "fd00::10",
    53,
    "system/dns",
    protocol=17,
    scheduler="sh",
    flags=0x14,
    persistence=10800,
    persistence_prefix=128,
)
OTHER = server("192.0.2.9", 443, "", "192.0.2.9 443 0")
REPORTS = [
    report(DNS),
    report(OTHER, (0, 0, 3), ours=False),
    report(WEB, (0, 0, 12), (2, 1, 10)),
]
CLOCKS = {DrainKey(WEB.at, parse_address("10.44.2.3"), 937): 9 * 60 + 30.0}
ROWS = service_rows(REPORTS, CLOCKS)


def look(rows: tuple[ServiceRow, ...] = ROWS, counts: Counts = Counts("ipvs")) -> Look:  # noqa: B008 (immutable)
    return Look("ipvs", 1.5, counts, rows)


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines()]


def test_the_table_groups_real_servers_under_their_service() -> None:
    table = """
NAMESPACE  SERVICE    VIP                TYPE       REAL SERVER    WEIGHT  STATE         ACTIVE  HITS(ipvs)  SHARE
default    web:http   10.0.1.175:80/TCP  ClusterIP  10.44.1.7:937  1       active        0       12          54.5%
                                                    10.44.2.3:937  0       draining 9m   2       10          45.5%
system     dns        [fd00::10]:53/UDP  ClusterIP  -              -       no endpoints  -       -           -
-          (foreign)  192.0.2.9:443/TCP  -          192.0.2.9:443  0       quiescent     0       3           100.0%
"""
    assert lines(show_text.service_table(look())) == table.strip().splitlines()


def test_other_kinds_of_address_say_which_they_are() -> None:
    outside = words.server("TCP 1.2.3.4:80 rr LoadBalancer node drop from=10.0.0.0/8 label=a/b")
    inside = words.server("TCP 1.2.3.4:80 (inside) rr LoadBalancer node label=a/b -> 10.1.0.1:80")
    rows = service_rows([report(outside), report(inside, (0, 0, 0))], {})
    table = """
a  b  1.2.3.4:80/TCP  LoadBalancer         -            -  no local endpoints  -  -  -
a  b  1.2.3.4:80/TCP  LoadBalancer/inside  10.1.0.1:80  1  active              0  0  -
"""
    assert lines(show_text.service_table(look(rows), headers=False)) == table.strip().splitlines()
    wide = lines(show_text.service_table(look(rows), wide=True, headers=False))
    assert wide[0].split()[6:8] == ["-", "node"]
    assert "10.0.0.0/8" in wide[0]


def test_wide_adds_columns_and_headers_can_go() -> None:
    head, _, _, dns, _ = lines(show_text.service_table(look(), wide=True))
    for name in ("FLAGS", "PERSISTENT", "FORWARD", "INACTIVE", "CONNS", "BYTES IN", "BYTES OUT"):
        assert name in head
    assert "sh-port,ops" in dns
    assert "10800s/128" in dns
    assert lines(show_text.service_table(look(), headers=False))[0].startswith("default")


def test_json_has_a_version_and_documented_names() -> None:
    document = json.loads(show_text.structured(show_text.document(look()), "json"))
    assert list(document) == ["schemaVersion", "mode", "at", "counts", "services"]
    assert document["counts"] == {"source": "ipvs", "hooks": [], "missed": {}, "since": 0.0, "reason": ""}
    assert document["schemaVersion"] == 1
    web, dns, other = document["services"]
    assert web["realServers"][1] == {
        "address": "10.44.2.3",
        "port": 937,
        "weight": 0,
        "state": "draining",
        "drainSecondsLeft": 570,
        "forwarding": "Masq",
        "active": 2,
        "inactive": 1,
        "connections": 10,
        "hits": 10,
        "share": 10 / 22,
        "rate": None,
        "bytesIn": None,
        "bytesOut": None,
        "upperThreshold": 0,
        "lowerThreshold": 0,
    }
    assert {key: value for key, value in web.items() if key != "realServers"} == {
        "namespace": "default",
        "service": "web",
        "portName": "http",
        "address": "10.0.1.175",
        "port": 80,
        "protocol": "TCP",
        "kind": "ClusterIP",
        "inside": False,
        "firewallMark": 0,
        "scheduler": "rr",
        "schedulerFlags": [],
        "onePacket": False,
        "persistenceSeconds": 0,
        "persistencePrefix": 32,
        "masquerade": "detect",
        "allowed": [],
        "noEndpoints": "reject",
        "ours": True,
        "connections": 22,
        "hits": 22,
        "rate": None,
    }
    assert (dns["schedulerFlags"], dns["onePacket"], other["ours"]) == (["sh-port"], True, False)
    assert [json.loads(line)["service"] for line in show_text.json_lines(look()).splitlines()] == [
        "web",
        "dns",
        "",
    ]


def test_yaml_holds_the_same() -> None:
    import yaml

    document = json.loads(show_text.structured(show_text.document(look()), "json"))
    assert yaml.safe_load(show_text.structured(document, "yaml")) == document


def test_firewall_marks_have_no_address() -> None:
    (row,) = service_rows([report(OTHER, (0, 0, 0), ours=False, fwmark=7)], {})
    assert (row.vip, row.address, row.protocol, row.firewall_mark) == ("FWM 7", "", "", 7)


def test_forwarding_methods_by_name() -> None:
    one = VirtualServer(OTHER.at, (RealServer(parse_address("192.0.2.10"), 443, forwarding=Forwarding.TUNNEL),))
    (row,) = service_rows([report(one, (0, 0, 0))], {})
    assert row.real_servers[0].forwarding == "Tunnel"


def test_names_once_each_and_the_vip_where_there_is_none() -> None:
    assert lines(show_text.names([*ROWS, ROWS[0]])) == [
        "default/web:http",
        "system/dns",
        "192.0.2.9:443/TCP",
    ]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ([], ["web", "dns", ""]),
        (["default/web"], ["web"]),
        (["default/web:http"], ["web"]),
        (["default/web:https"], []),
        (["web", "dns"], ["web", "dns"]),
        (["10.0.1.175"], ["web"]),
        (["10.0.1.175:80"], ["web"]),
        (["10.0.1.175:80/tcp"], ["web"]),
        (["10.0.1.175:80/UDP"], []),
        (["fd00::10"], ["dns"]),
        (["FD00::10"], ["dns"]),
        (["[fd00::10]:53/UDP"], ["dns"]),
        (["192.0.2.9"], [""]),
        (["default"], []),
    ],
)
def test_filters(wanted: list[str], found: list[str]) -> None:
    assert [row.service for row in chosen(ROWS, wanted)] == found


def test_nothing_active_reaches_the_terminal() -> None:
    evil = server("10.0.0.1", 80, "default/\x1b[2Jweb\u202e:p\n", scheduler="r\rr")
    rows = service_rows([report(evil)], {})
    table = show_text.service_table(look(rows)) + show_text.names(rows)
    assert table.count("\n") == 3
    assert not set(table) & {"\x1b", "\u202e", "\r"}
    assert show_text.structured(show_text.document(look(rows)), "json").isascii()
    assert show_text.structured(show_text.document(look(rows)), "yaml").isascii()
    assert "\x1b" not in show_text.transaction_text("# \x1b[2J\n-A \r", colour=False)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.9, "59s"), (60, "1m"), (3599, "59m"), (3600, "1h"), (90000, "1d")]
)
def test_durations(seconds: float, text: str) -> None:
    assert show_text.duration(seconds) == text


def test_a_plan_in_one_line_and_by_object() -> None:
    new = VirtualServer(WEB.at, WEB.real_servers[:1], label=WEB.label)
    plan = Plan(add=(DNS,), change=(compare(WEB, new),), remove=(OTHER,), bind=(DNS.at.address,))
    assert show_text.plan_summary(plan) == (
        "1 virtual server to add, 1 to change, 1 to remove; 2 real servers to remove; 1 VIP to bind"
    )
    assert show_text.plan_summary(Plan()) == "nothing to do"
    objects = show_text.plan_objects(plan)
    assert [(each["action"], each["kind"]) for each in objects] == [
        ("add", "VirtualServer"),
        ("change", "VirtualServer"),
        ("remove", "VirtualServer"),
        ("bind", "VIP"),
    ]
    assert objects[1] == {
        "action": "change",
        "kind": "VirtualServer",
        "service": "default/web:http",
        "vip": "10.0.1.175:80/TCP",
        "type": "ClusterIP",
        "inside": False,
        "realServers": {"add": [], "change": [], "remove": ["10.44.2.3:937"]},
    }


def test_colours_only_when_asked_for() -> None:
    text = "# ipvsadm -R\n-A -t 10.0.0.1:80 -s rr\n-e x\n-D -t 10.0.0.1:80\n"
    assert show_text.transaction_text(text, colour=False) == text
    assert [line[:5] for line in show_text.transaction_text(text, colour=True).splitlines()] == [
        "\x1b[1m#",
        "\x1b[32m",
        "\x1b[33m",
        "\x1b[31m",
    ]


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [(1, "VIP", "1 VIP"), (2, "VIP", "2 VIPs"), (2, "hairpin address", "2 hairpin addresses")],
)
def test_plurals(count: int, noun: str, text: str) -> None:
    assert show_text.plural(count, noun) == text
