"""The text of iptables rules, without a kernel: names, probabilities, quoting, reading back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.iptables_books import Books
from dataplane.iptables_text import (
    CLOSED,
    CLUSTER_IPS,
    DAMAGED,
    SERVICES,
    Form,
    Table,
    chain_name,
    closed_ports,
    express,
    parse_save,
    plain_label,
    render,
    same_rule,
    shares,
)
from dataplane.model import Family, Masquerade, RealServer, VirtualServer, parse_address, parse_network

from .words import at, server

CLASSIC, CURRENT = Form(), Form(classic=False)


@pytest.mark.parametrize(
    ("kind", "seed", "name"),
    [
        ("SVC", "default/hostnames:tcp", "KUBE-SVC-NWV5X2332I4OT4T3"),  # kubernetes.io, Debug Services
        ("SEP", "default/hostnames:tcp10.244.1.7:9376", "KUBE-SEP-WNBA2IHDGP2BOBGZ"),
        ("SEP", "default/hostnames:tcp10.244.2.3:9376", "KUBE-SEP-X3P2623AGDH6CDF3"),
        ("SEP", "default/hostnames:tcp10.244.3.6:9376", "KUBE-SEP-57KPRZ3JQVENLNBR"),
        ("SVC", "ns1/svc1:p80tcp", "KUBE-SVC-XPGD46QRK7WJZT7O"),  # kube-proxy's own proxier_test.go
        ("SVC", "ns1/svc1tcp", "KUBE-SVC-AQI2S6QIMU7PVVRP"),
        ("SEP", "ns1/svc1:p80tcp10.180.0.1:80", "KUBE-SEP-SXIVWICOYRO3J4NJ"),
        ("SEP", "ns1/svc1:p80tcp[fd00:10:180::1]:80", "KUBE-SEP-OGYCNMB4EMRUSJ6N"),
    ],
)
def test_chain_names_are_kube_proxys(kind: str, seed: str, name: str) -> None:
    assert chain_name(kind, seed) == name


def split(form: Form, *weights: int) -> list[str]:
    reals = [RealServer(parse_address(f"10.0.0.{n}"), 80, weight) for n, weight in enumerate(weights)]
    return [text.rpartition(" ")[2] for text in shares(form, reals)]


def test_probabilities_are_as_the_kernel_tells_them() -> None:
    assert split(CLASSIC, 1, 1, 1) == ["0.33332999982", "0.50000000000", ""]
    assert split(CURRENT, 1, 1, 1) == ["0.33333333349", "0.50000000000", ""]
    assert split(CLASSIC, 3, 0, 1) == ["0.75000000000", "0.00000000000", ""]
    assert split(CLASSIC, 3, 1, 0) == ["0.75000000000", "", "0.00000000000"]
    assert split(CLASSIC, 0, 0) == ["0.00000000000", "0.00000000000"]
    assert split(CLASSIC, 1) == [""]


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=20))
def test_shares_follow_the_weights(weights: list[int]) -> None:
    left, total = 1.0, sum(weights)
    for weight, share in zip(weights, split(CURRENT, *weights), strict=True):
        taken = left * (float(share) if share else 1.0)
        left -= taken
        assert taken == pytest.approx(weight / total if total else 0, abs=1e-7)


FORMS = [
    Form(classic, everyone, tuple(map(parse_network, clusters)))
    for classic in (True, False)
    for everyone in (True, False)
    for clusters in ((), ("10.1.0.0/16",), ("10.1.0.0/16", "10.2.0.0/16", "fd00::/16"))
]
LABELS = st.one_of(
    st.just(""), st.from_regex(r"[a-z]{1,4}/[a-z]{1,4}(:[a-z]{1,3})?", fullmatch=True), st.text(max_size=9)
)


@st.composite
def servers(draw: st.DrawFn) -> VirtualServer:
    six = draw(st.booleans())
    ends = draw(st.dictionaries(st.integers(1, 250), st.sampled_from((0, 1, 1, 2, 65535)), max_size=5))
    reals = (RealServer(parse_address(f"fd00::{n:x}" if six else f"10.0.0.{n}"), 80, w, True) for n, w in ends.items())
    where = at(f"{draw(st.sampled_from(('TCP', 'UDP', 'SCTP')))} {'[fd00::1]' if six else '10.9.0.1'}:80")
    return VirtualServer(
        where,
        tuple(sorted(reals)),
        persistence=draw(st.sampled_from((0, 1, 10800))),
        masquerade=draw(st.sampled_from(list(Masquerade))),
        label=draw(LABELS),
    )


@given(st.sampled_from(FORMS), servers())
def test_what_is_written_reads_back(form: Form, one: VirtualServer) -> None:
    wanted = express(form, one)
    assert express(form, wanted) == wanted
    family = Family.IPV6 if len(one.at.address) == 16 else Family.IPV4
    script = Books(form, family).compose([(one.at, wanted)], whole=True)
    tables: dict[str, Table] = {}
    for line in script.lines:
        if line.startswith("*"):
            table = tables.setdefault(line[1:], Table())
        elif line.startswith(":"):
            table.chains[line[1:].split()[0]] = []
        elif line.startswith("-A"):
            _, chain, rule = line.split(" ", 2)
            table.chains[chain].append(rule)
    books = Books.read(form, family, tables)
    assert [held.server for held in books.held.values()] == [wanted]
    assert books.tidy
    assert books.orphans == []
    assert books.compose([(one.at, wanted)]).lines == []
    gone = books.compose([(one.at, None)])
    assert len(gone.lines) >= 4
    books.apply(gone)
    assert (books.held, books.owners, books.closed, dict(books.uses)) == ({}, {}, set(), {})


def test_two_servers_of_one_name_have_chains_of_their_own() -> None:
    books = Books(CLASSIC, Family.IPV4)
    one, two = (express(CLASSIC, server(f"TCP 10.0.0.{n}:80 rr label=a/b -> 10.1.0.1:80")) for n in (1, 2))
    books.apply(books.compose([(one.at, one), (two.at, two)]))
    first, second = (books.held[each.at].chains for each in (one, two))
    assert not set(first) & set(second)
    # the name passes on when its owner goes in the same change, and the chains stay
    books = Books(CLASSIC, Family.IPV4)
    books.apply(books.compose([(one.at, one)]))
    script = books.compose([(one.at, None), (two.at, two)])
    assert not [line for line in script.lines if line.startswith("-X")]
    books.apply(script)
    assert books.held[two.at].chains == first


def test_a_comment_with_a_newline_is_one_line_and_no_rule() -> None:
    tables = parse_save(
        "*nat\n:KUBE-SERVICES - [0:0]\n"
        '[0:0] -A INPUT -m comment --comment "x\\" y\n[0:0] -A KUBE-SERVICES -j ACCEPT\n:KUBE-EVIL - [0:0]"\n'
        "[7:420] -A KUBE-SEP-57KPRZ3JQVENLNBR -p tcp -j DNAT --to-destination 10.0.0.1:80\nCOMMIT\n"
    )
    assert tables["nat"].chains.keys() == {"KUBE-SERVICES", "KUBE-SEP-57KPRZ3JQVENLNBR"}
    assert tables["nat"].chains["KUBE-SERVICES"] == []
    assert tables["nat"].hits == {"KUBE-SEP-57KPRZ3JQVENLNBR": 7}


@given(st.text(max_size=300))
def test_a_label_is_plain_or_dropped(label: str) -> None:
    kept = plain_label(label)
    assert kept in ("", label)
    assert all(c.isascii() and (c.isalnum() or c in "._:/-") for c in kept)
    rules = render(
        CURRENT, VirtualServer(at("TCP 10.0.0.1:80"), (RealServer(parse_address("10.1.0.1"), 80),), label=label), "s"
    )
    assert all(rule.count('"') == 2 for chain in rules.chains.values() for rule in chain)


def test_versions_of_iptables_print_one_rule_in_different_ways() -> None:
    mine = '-d 10.0.0.1/32 -p tcp -m comment --comment "a/b: cluster IP" -m tcp --dport 80 -j KUBE-SVC-X'
    assert same_rule(
        mine, '-d 10.0.0.1/32 -p tcp -m tcp --dport 80 -m comment --comment "a/b: cluster IP" -j KUBE-SVC-X'
    )
    assert not same_rule(mine, mine.replace("80", "81"))
    assert not same_rule(mine, mine.replace("cluster IP", "other"))


def test_a_portal_whose_chain_is_not_right_is_damaged_and_rewritten() -> None:
    one = express(CLASSIC, server("TCP 10.0.0.1:80 rr label=a/b -> 10.1.0.1:80, 10.1.0.2:80"))
    rendered = render(CLASSIC, one, "a/b:tcp")
    chains = {name: list(rules) for name, rules in rendered.chains.items()} | {SERVICES: [rendered.portal]}
    (svc,) = [name for name in chains if "SVC" in name]
    chains[svc].reverse()
    filters = Table({SERVICES: [CLOSED], CLUSTER_IPS: [closed_ports(one.at.address)]})
    books = Books.read(CLASSIC, Family.IPV4, {"nat": Table(chains), "filter": filters})
    assert books.tidy
    assert books.held[one.at].server.scheduler == DAMAGED
    assert f":{svc} - [0:0]" in books.compose([(one.at, one)]).lines
