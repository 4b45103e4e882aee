"""What names have, rule by rule, as a second implementation (dnslib) reads the answers."""

from pathlib import Path
from typing import NamedTuple

import dns.message
import dns.rcode
import pytest
from dnslib import DNSRecord

from dataplane.dns.answers import MOST_PREPARED, MOST_VARIANTS, Answers, Elsewhere
from dataplane.dns.names import parse_domain, reverse_address, reverse_labels
from dataplane.dns.records import Rules
from dataplane.model import parse_address

from .dns_world import MANIFEST, answers_of, ask, packet, said, views, with_edns

Z = "svc.cluster.local."
SOA = "cluster.local. SOA ns.dns.cluster.local. hostmaster.cluster.local."


class Case(NamedTuple):
    """`NXDOMAIN` and `NODATA` come with the SOA; anything else is the records of the answer, in any order."""

    name: str
    qtype: str
    outcome: str | list[str]
    additional: list[str] = []  # noqa: RUF012 (is not changed)
    specification: str | list[str] | None = None
    """The outcome with `--dns-answers specification`, where it is another."""


CASES = [
    # cluster IPs
    Case(f"web.default.{Z}", "A", [f"web.default.{Z} A 10.96.0.10"]),
    Case(f"web.default.{Z}", "AAAA", [f"web.default.{Z} AAAA fd00:96::a"]),
    Case(f"plain.default.{Z}", "AAAA", "NODATA"),
    Case(f"web.default.{Z}", "MX", "NODATA"),
    Case(f"pending.default.{Z}", "A", "NODATA"),
    Case(f"pending.default.{Z}", "SRV", "NODATA"),
    Case(f"plain.default.{Z}", "A", [f"plain.default.{Z} A 10.96.0.11"]),
    # SRV of a cluster IP
    Case(
        f"_http._tcp.web.default.{Z}",
        "SRV",
        [f"_http._tcp.web.default.{Z} SRV 0 100 80 web.default.{Z}"],
        [f"web.default.{Z} A 10.96.0.10", f"web.default.{Z} AAAA fd00:96::a"],
    ),
    Case(
        f"_quic._udp.web.default.{Z}",
        "SRV",
        [f"_quic._udp.web.default.{Z} SRV 0 100 443 web.default.{Z}"],
        [f"web.default.{Z} A 10.96.0.10", f"web.default.{Z} AAAA fd00:96::a"],
    ),
    Case(f"_http._udp.web.default.{Z}", "SRV", "NXDOMAIN"),
    Case(f"_http._tcp.plain.default.{Z}", "SRV", "NXDOMAIN"),
    Case(f"_._tcp.plain.default.{Z}", "SRV", "NXDOMAIN"),
    Case(f"_tcp.web.default.{Z}", "SRV", "NXDOMAIN", specification="NODATA"),
    Case(f"_sctp.web.default.{Z}", "SRV", "NXDOMAIN"),
    Case(
        f"web.default.{Z}",
        "SRV",
        [f"web.default.{Z} SRV 0 33 {port} web.default.{Z}" for port in (80, 9090, 443)],
        [f"web.default.{Z} A 10.96.0.10", f"web.default.{Z} AAAA fd00:96::a"],
        specification="NODATA",
    ),
    Case(f"_http._tcp.web.default.{Z}", "A", [f"_http._tcp.web.default.{Z} A 10.96.0.10"], specification="NODATA"),
    Case(f"10-244-0-5.web.default.{Z}", "A", [f"10-244-0-5.web.default.{Z} A 10.244.0.5"], specification="NXDOMAIN"),
    Case(f"10-244-0-6.web.default.{Z}", "A", "NXDOMAIN"),
    # headless
    Case(f"db.data.{Z}", "A", [f"db.data.{Z} A 10.244.1.{host}" for host in (1, 2, 3)]),
    Case(f"db.data.{Z}", "AAAA", [f"db.data.{Z} AAAA fd00:1::1", f"db.data.{Z} AAAA fd00:1::3"]),
    Case(f"db-0.db.data.{Z}", "A", [f"db-0.db.data.{Z} A 10.244.1.1"]),
    Case(f"db-0.db.data.{Z}", "AAAA", [f"db-0.db.data.{Z} AAAA fd00:1::1"]),
    Case(f"db-1.db.data.{Z}", "AAAA", "NODATA"),
    Case(f"10-244-1-3.db.data.{Z}", "A", [f"10-244-1-3.db.data.{Z} A 10.244.1.3"]),
    Case(f"10-244-1-1.db.data.{Z}", "A", "NXDOMAIN"),  # has a hostname, which is its name
    Case(f"fd00-1--3.db.data.{Z}", "AAAA", [f"fd00-1--3.db.data.{Z} AAAA fd00:1::3"]),
    Case(f"db-3.db.data.{Z}", "A", "NXDOMAIN"),  # not ready
    Case(
        f"_sql._tcp.db.data.{Z}",
        "SRV",
        [
            f"_sql._tcp.db.data.{Z} SRV 0 25 15432 {host}.db.data.{Z}"
            for host in ("db-0", "db-1", "10-244-1-3", "fd00-1--3")
        ],
        [
            f"db-0.db.data.{Z} A 10.244.1.1",
            f"db-0.db.data.{Z} AAAA fd00:1::1",
            f"db-1.db.data.{Z} A 10.244.1.2",
            f"10-244-1-3.db.data.{Z} A 10.244.1.3",
            f"fd00-1--3.db.data.{Z} AAAA fd00:1::3",
        ],
    ),
    Case(f"_sql._udp.db.data.{Z}", "SRV", "NXDOMAIN"),
    Case(f"_tcp.db.data.{Z}", "A", "NXDOMAIN", specification="NODATA"),
    Case(f"nobody.data.{Z}", "A", "NXDOMAIN"),
    Case(f"early.data.{Z}", "A", [f"early.data.{Z} A 10.244.2.1"]),
    Case(f"early-0.early.data.{Z}", "A", [f"early-0.early.data.{Z} A 10.244.2.1"]),
    # ExternalName
    Case(f"outside.default.{Z}", "A", [f"outside.default.{Z} CNAME www.example.com."]),
    Case(f"outside.default.{Z}", "CNAME", [f"outside.default.{Z} CNAME www.example.com."]),
    Case(f"x.outside.default.{Z}", "A", "NXDOMAIN"),
    Case(
        f"alias.default.{Z}",
        "A",
        [f"alias.default.{Z} CNAME web.default.{Z}", f"web.default.{Z} A 10.96.0.10"],
    ),
    Case(
        f"second-alias.default.{Z}",
        "AAAA",
        [
            f"second-alias.default.{Z} CNAME alias.default.{Z}",
            f"alias.default.{Z} CNAME web.default.{Z}",
            f"web.default.{Z} AAAA fd00:96::a",
        ],
    ),
    Case(
        f"loop-a.default.{Z}",
        "A",
        [f"loop-a.default.{Z} CNAME loop-b.default.{Z}", f"loop-b.default.{Z} CNAME loop-a.default.{Z}"],
    ),
    # addresses
    Case("10.0.96.10.in-addr.arpa.", "PTR", [f"10.0.96.10.in-addr.arpa. PTR web.default.{Z}"]),
    Case("1.1.244.10.in-addr.arpa.", "PTR", [f"1.1.244.10.in-addr.arpa. PTR db-0.db.data.{Z}"]),
    Case("3.1.244.10.in-addr.arpa.", "PTR", [f"3.1.244.10.in-addr.arpa. PTR 10-244-1-3.db.data.{Z}"]),
    Case("5.0.244.10.in-addr.arpa.", "PTR", "REFUSED"),  # an endpoint of a Service that is not headless
    Case("9.9.9.9.in-addr.arpa.", "PTR", "REFUSED"),
    Case("10.96.0.010.in-addr.arpa.", "PTR", "REFUSED"),
    # the zone and what is between
    Case("dns-version.cluster.local.", "TXT", ['dns-version.cluster.local. TXT "1.1.0"']),
    Case("dns-version.cluster.local.", "A", "NODATA"),
    Case("cluster.local.", "A", "NODATA"),
    Case("cluster.local.", "NS", ["cluster.local. NS ns.dns.cluster.local."], ["ns.dns.cluster.local. A 10.0.0.53"]),
    Case("ns.dns.cluster.local.", "A", ["ns.dns.cluster.local. A 10.0.0.53"]),
    Case("dns.cluster.local.", "A", "NODATA"),
    Case(Z, "A", "NODATA"),
    Case(f"default.{Z}", "A", "NODATA"),
    Case(f"nowhere.{Z}", "A", "NXDOMAIN"),
    Case("pod.cluster.local.", "A", "NODATA", specification="NXDOMAIN"),
    Case("10-244-0-5.default.pod.cluster.local.", "A", "NXDOMAIN"),
    Case("other.cluster.local.", "A", "NXDOMAIN"),
    Case(f"none.default.{Z}", "A", "NXDOMAIN"),
    Case(f"a.b.c.web.default.{Z}", "A", "NXDOMAIN"),
    Case(f"web.default.{Z}default.{Z}", "A", "NXDOMAIN"),  # a search path at work
    Case("www.example.com.", "A", "REFUSED"),
    Case(".", "NS", "REFUSED"),
    Case("local.", "A", "REFUSED"),
    Case("mycluster.local.", "A", "REFUSED"),
    # what nobody gets
    Case(f"web.default.{Z}", "AXFR", "REFUSED"),
    Case("cluster.local.", "AXFR", "REFUSED"),
    Case("cluster.local.", "IXFR", "REFUSED"),
    Case(f"web.default.{Z}", "ANY", [f'web.default.{Z} HINFO "RFC8482",""']),
    Case(f"none.default.{Z}", "ANY", "NXDOMAIN"),
]
PTR6 = ".".join(reverse_labels(parse_address("fd00:96::a"))) + "."
CASES.append(Case(PTR6, "PTR", [f"{PTR6} PTR web.default.{Z}"]))
CASES.append(Case("10.0.96.10.in-addr.arpa.", "A", "NODATA"))


def numbered(name: str, qtype: str) -> bytes:
    """dnslib does not know HINFO and MX by all names; dnspython writes the question, and reads nothing here."""
    return dns.message.make_query(name, qtype).to_wire()


def check(answers: Answers, case: Case, outcome: str | list[str]) -> None:
    query = numbered(case.name, case.qtype)
    for packet_sent in (query, query, with_edns(query)):  # the first is made, the second prepared
        told = ask(answers, packet_sent)
        assert told[:2] == query[:2]
        if isinstance(outcome, list) and "HINFO" in outcome[0]:  # which dnslib does not read
            message = dns.message.from_wire(told)
            assert [rrset.to_text() for rrset in message.answer] == [f'{case.name} 3600 IN HINFO "RFC8482" ""']
            continue
        rcode, answer, authority, additional = said(told)
        parsed = DNSRecord.parse(told)
        if isinstance(outcome, list):
            assert (rcode, sorted(answer), sorted(additional)) == ("NOERROR", sorted(outcome), sorted(case.additional))
            assert authority == []
            assert parsed.header.aa
        elif outcome == "REFUSED":
            assert (rcode, answer, authority) == ("REFUSED", [], [])
        else:
            assert (rcode, answer) == ({"NODATA": "NOERROR"}.get(outcome, outcome), [])
            zone = ".".join(case.name.split(".")[-3:]) if case.name.endswith("arpa.") else "cluster.local."
            assert len(authority) == 1
            assert authority[0].startswith(SOA.replace("cluster.local.", zone))
            assert parsed.auth[0].ttl == 5
            assert authority[0].split()[-1] == "5"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answers]:
    folder = tmp_path_factory.mktemp("names")
    return {"coredns": answers_of(folder), "specification": answers_of(folder, coredns=False)}


@pytest.mark.parametrize("case", CASES, ids=[f"{case.name} {case.qtype}" for case in CASES])
def test_a_name_has_what_the_rules_say(both: dict[str, Answers], case: Case) -> None:
    check(both["coredns"], case, case.outcome)
    strict = case.outcome if case.specification is None else case.specification
    check(both["specification"], case, strict)


def test_the_zones_soa_is_an_answer(both: dict[str, Answers]) -> None:
    told = ask(both["coredns"], packet("cluster.local", "SOA"))
    rcode, answer, authority, _ = said(told)
    assert (rcode, authority) == ("NOERROR", [])
    assert answer[0].startswith(SOA)


def test_a_service_without_a_ready_endpoint_has_no_name_if_such_are_ignored(tmp_path: Path) -> None:
    answers = answers_of(tmp_path, ignore_empty=True)
    for name, outcome in (("plain", "NXDOMAIN"), ("web", "NOERROR"), ("outside", "NOERROR")):
        told = ask(answers, packet(f"{name}.default.{Z}"))
        assert said(told)[0] == outcome


def test_zone_and_ttl_are_options(tmp_path: Path) -> None:
    answers = answers_of(tmp_path, domain="k8s.example", ttl=30)
    told = ask(answers, packet("web.default.svc.k8s.example"))
    assert DNSRecord.parse(told).rr[0].ttl == 30
    assert said(told)[1] == ["web.default.svc.k8s.example. A 10.96.0.10"]
    gone = ask(answers, packet(f"web.default.{Z}"))
    assert said(gone)[0] == "REFUSED"


def test_until_all_is_known_names_are_servfail(tmp_path: Path) -> None:
    answers = Answers(Rules())
    for name, outcome in ((f"web.default.{Z}", "SERVFAIL"), ("www.example.com", "REFUSED")):
        told = ask(answers, packet(name))
        assert said(told)[0] == outcome
    answers.update(views(tmp_path))
    told = ask(answers, packet(f"web.default.{Z}"))
    assert said(told)[0] == "NOERROR"


def test_upper_and_lower_case_come_back_as_they_were(both: dict[str, Answers]) -> None:
    for name in (f"wEb.DEFault.{Z}", f"WEB.default.{Z}", f"NoNe.default.{Z}"):
        query = packet(name)
        told = ask(both["coredns"], query)
        assert told[12 : len(query)] == query[12:]
        assert len(told) > len(query) + 10
        for rr in DNSRecord.parse(told).rr:
            assert str(rr.rname) == name


def test_headless_addresses_take_turns(both: dict[str, Answers]) -> None:
    firsts = []
    for _ in range(6):
        told = ask(both["coredns"], packet(f"db.data.{Z}"))
        found = said(told)[1]
        assert len(set(found)) == 3
        firsts.append(found[0])
    assert all(firsts.count(first) == 2 for first in firsts)


def many(count: int) -> str:
    """A headless Service with very many endpoints."""
    endpoints = ", ".join(f"{{addresses: [10.{number >> 8}.{number & 255}.1]}}" for number in range(1, count + 1))
    return f"""
apiVersion: v1
kind: Service
metadata: {{name: many}}
spec: {{clusterIP: None, ports: [{{name: http, port: 80}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: many-1, labels: {{kubernetes.io/service-name: many}}}}
addressType: IPv4
endpoints: [{endpoints}]
ports: [{{name: http, port: 80}}]
"""


@pytest.mark.parametrize("count", [20, 100, 3000])
def test_what_is_too_large_is_cut_and_says_so(tmp_path: Path, count: int) -> None:
    answers = answers_of(tmp_path, many(count))
    for qtype, name in (("A", f"many.default.{Z}"), ("SRV", f"_http._tcp.many.default.{Z}")):
        for query, size in (
            (packet(name, qtype), 512),
            *((with_edns(packet(name, qtype), n), n) for n in (512, 1232, 4096)),
        ):
            for _ in range(3):
                told = ask(answers, query)
                assert len(told) <= min(size, 1232)
                parsed = DNSRecord.parse(told)
                if parsed.header.tc == 0:
                    assert len(parsed.rr) == min(count, 1024)
                elif qtype == "A":
                    assert len(set(records_of(parsed))) == len(parsed.rr) > 20
                else:
                    assert not parsed.rr
        whole = ask(answers, packet(name, qtype), udp=False)
        assert len(whole) <= 65535
        parsed = DNSRecord.parse(whole)
        assert not parsed.header.tc
        assert len(parsed.rr) == min(count, 1024)


def records_of(parsed: DNSRecord) -> list[str]:
    return [str(rr.rdata) for rr in parsed.rr]


@pytest.mark.parametrize(
    ("query", "rcode"),
    [
        (packet(f"web.default.{Z}", opcode=4), 4),  # NOTIFY
        (packet(f"web.default.{Z}", opcode=5), 4),  # UPDATE
        (packet(f"web.default.{Z}")[:4] + b"\0\2" + packet(f"web.default.{Z}")[6:], 1),  # two questions
        (packet(f"web.default.{Z}")[:4] + b"\0\0" + packet(f"web.default.{Z}")[6:], 1),
        (packet(f"web.default.{Z}")[:-3], 1),
        (packet(f"web.default.{Z}") + b"x", 1),
        (packet(f"web.default.{Z}")[:12] + b"\xc0\x0c\0\1\0\1", 1),  # a pointer to itself
        (packet(f"web.default.{Z}")[:12] + (b"\x3f" + b"a" * 63) * 5 + b"\0\0\1\0\1", 1),  # too long
        (packet(f"web.default.{Z}")[:-2] + b"\0\3", 5),  # class CHAOS
        (with_edns(packet(f"web.default.{Z}"), version=1), 0),  # BADVERS: the upper bits are in OPT
    ],
)
def test_what_is_no_question_of_ours_is_told_so(both: dict[str, Answers], query: bytes, rcode: int) -> None:
    told = ask(both["coredns"], query)
    assert told[:2] == query[:2]
    assert told[3] & 15 == rcode
    assert told[2] & 0x80
    assert int.from_bytes(told[6:8]) == 0
    message = dns.message.from_wire(told)
    if query[-10:-9] == b"\1":
        assert message.rcode() == dns.rcode.BADVERS


def test_answers_and_stumps_are_not_answered(both: dict[str, Answers]) -> None:
    query = packet(f"web.default.{Z}")
    assert both["coredns"].answer(query[:11]) is None
    assert both["coredns"].answer(query[:2] + b"\x80" + query[3:]) is None
    assert both["coredns"].answer(b"") is None


def test_edns_answers_have_edns_and_others_not(both: dict[str, Answers]) -> None:
    query = packet(f"web.default.{Z}")
    for options in (b"", b"\0\x0a\0\x08abcdefgh"):
        told = ask(both["coredns"], with_edns(query, 4096, dnssec_ok=True, options=options))
        (opt,) = DNSRecord.parse(told).ar
        assert (opt.rtype, opt.edns_len, opt.edns_do) == (41, 1232, 1)
    told = ask(both["coredns"], query)
    assert DNSRecord.parse(told).ar == []


def test_a_change_of_one_service_touches_only_its_names(tmp_path: Path) -> None:
    answers = answers_of(tmp_path)
    asked = [packet(case.name, case.qtype) for case in CASES if case.qtype in ("A", "AAAA", "SRV", "PTR")]
    for query in asked:
        answers.answer(query)
    before, made = answers.prepared, answers.made
    changed = views(tmp_path, MANIFEST.replace("10.96.0.11", "10.96.0.12"))
    name = next(name for name in changed if name.name == "plain")
    answers.update({name: changed[name]})
    assert before - 3 <= answers.prepared < before
    for query in asked:
        answers.answer(query)
    assert answers.made == made + 1
    told = ask(answers, packet(f"plain.default.{Z}"))
    assert said(told)[1] == [f"plain.default.{Z} A 10.96.0.12"]
    old, new = (answers.answer(packet(f"{last}.0.96.10.in-addr.arpa", "PTR")) for last in (11, 12))
    assert isinstance(old, bytes)
    assert isinstance(new, bytes)
    assert (said(old)[0], said(new)[1]) == ("REFUSED", [f"12.0.96.10.in-addr.arpa. PTR plain.default.{Z}"])


def test_an_alias_follows_what_it_stands_for(tmp_path: Path) -> None:
    answers = answers_of(tmp_path)
    answers.answer(packet(f"second-alias.default.{Z}"))
    answers.update(views(tmp_path, MANIFEST.replace("10.96.0.10", "10.96.0.99")))
    told = ask(answers, packet(f"second-alias.default.{Z}"))
    assert said(told)[1][-1] == f"web.default.{Z} A 10.96.0.99"
    answers.update({name: None for name in views(tmp_path) if name.name == "web"})
    told = ask(answers, packet(f"second-alias.default.{Z}"))
    assert [line.split()[1] for line in said(told)[1]] == ["CNAME", "CNAME"]
    answers.update(views(tmp_path))
    told = ask(answers, packet(f"second-alias.default.{Z}"))
    assert said(told)[1][-1] == f"web.default.{Z} A 10.96.0.10"


def test_all_that_goes_takes_its_names_along(tmp_path: Path) -> None:
    answers = answers_of(tmp_path)
    for case in CASES:
        answers.answer(numbered(case.name, case.qtype))
    answers.update(dict.fromkeys(views(tmp_path)))
    assert answers.services == 0
    assert answers.prepared == 3  # of the zone itself
    for case in CASES:
        told = ask(answers, numbered(case.name, case.qtype))
        if f"default.{Z}" in case.name and case.outcome != "REFUSED":
            assert said(told)[0] == ("REFUSED" if case.qtype == "AXFR" else "NXDOMAIN")
        if case.qtype == "PTR":
            assert said(told)[0] == "REFUSED"


def test_names_that_are_made_up_are_not_kept(tmp_path: Path) -> None:
    answers = answers_of(tmp_path)
    for number in range(1000):
        answers.answer(packet(f"x{number}.default.{Z}"))
        answers.answer(with_edns(packet(f"web.default.{Z}"), options=b"\0\x0a\0\x08" + number.to_bytes(8)))
        answers.answer(with_edns(packet(f"web.default.{Z}"), 512 + number))
        answers.answer(packet(f"web.default.{Z}", bitmap=0x100 + (number & 15)))
        answers.answer(numbered(f"web.default.{Z}", f"TYPE{1000 + number}"))
    assert answers.prepared <= MOST_VARIANTS
    assert len(answers._bodies) == 1
    assert MOST_PREPARED > 2 * 10_000  # A and AAAA of ten thousand Services


def test_answers_are_counted_by_rcode_and_service(tmp_path: Path) -> None:
    answers = answers_of(tmp_path)
    for _ in range(3):
        answers.answer(packet(f"web.default.{Z}"))
        answers.answer(packet(f"none.default.{Z}"))
        answers.answer(packet("example.com"))
    rcodes, services = answers.counts()
    assert rcodes == {0: 3, 3: 3, 5: 3}
    assert {str(name): count for name, count in services.items()} == {"default/web": 3}
    answers.update({name: view for name, view in views(tmp_path).items() if name.name == "web"})
    answers.answer(packet(f"web.default.{Z}"))
    assert answers.counts()[0][0] == 4
    assert {str(name): count for name, count in answers.counts()[1].items()} == {"default/web": 4}


def test_what_is_an_upstreams_is_passed_on(tmp_path: Path) -> None:
    answers = Answers(Rules(), recursive=True)
    answers.update(views(tmp_path))
    assert isinstance(answers.answer(packet("www.example.com")), Elsewhere)
    outside = answers.answer(packet(f"outside.default.{Z}"))
    assert isinstance(outside, Elsewhere)
    assert outside.found is not None
    assert outside.found.alias == "www.example.com."


@pytest.mark.parametrize("text", ["", ".", "a..b", "-a.b", "a_b", "a" * 64, "x." * 120])
def test_a_zone_must_be_a_name(text: str) -> None:
    with pytest.raises(ValueError, match="domain name"):
        parse_domain(text)


@pytest.mark.parametrize("text", ["10.0.1.175", "255.255.255.255", "fd00::1", "::"])
def test_a_reverse_name_leads_back(text: str) -> None:
    address = parse_address(text)
    assert reverse_address(reverse_labels(address)) == address
