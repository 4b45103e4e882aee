"""The text of iptables rules, without a kernel: names, probabilities, quoting, reading back."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from dataplane.iptables_books import Books
from dataplane.iptables_chains import express, group_of, plain_site, render
from dataplane.iptables_reading import DAMAGED
from dataplane.iptables_save import Table, parse_save, same_rule
from dataplane.iptables_script import SECTION, Group, Newcomer, Script
from dataplane.iptables_text import (
    MARK_CLIENTS,
    MARK_MASQ,
    NODEPORTS,
    SERVICE_CHAIN,
    Form,
    chain_name,
    form_of,
    marker,
    plain_label,
    service_text,
    shares,
)
from dataplane.model import (
    Family,
    Kind,
    Masquerade,
    NoServers,
    RealServer,
    VirtualAddress,
    VirtualServer,
    disjoint,
    parse_address,
    parse_network,
)

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


CLUSTERS = tuple(map(parse_network, ("10.1.0.0/16", "10.2.0.0/16", "fd00::/16")))
FORMS = [
    Form(classic, everyone, *inside, services)
    for classic in (True, False)
    for everyone in (True, False)
    for inside in (((), "", ""), (CLUSTERS[:1], "", ""), (CLUSTERS, "", ""), ((), "br0", ""), ((), "br0", "veth"))
    for services in ((), tuple(map(parse_network, ("10.9.0.0/16", "fd00::/112"))))
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
    kind = draw(st.sampled_from(list(Kind)))
    ranges = ("fd00::/16", "fd00:2::1") if six else ("203.0.113.0/25", "10.0.0.0/8", "1.2.3.4")
    return VirtualServer(
        where,
        tuple(sorted(reals)),
        persistence=draw(st.sampled_from((0, 1, 10800))),
        masquerade=draw(st.sampled_from(list(Masquerade))),
        no_servers=draw(st.sampled_from(list(NoServers))),
        label=draw(LABELS),
        kind=kind,
        allowed=disjoint(map(parse_network, draw(st.lists(st.sampled_from(ranges), max_size=3)))),
    )


class Simulated:
    """The tables of one family, and iptables-restore --noflush as far as our text needs it, with what it refuses."""

    def __init__(self) -> None:
        self.tables: dict[str, Table] = {}

    def restore(self, script: Script) -> None:
        table = Table()
        for line in script.text().splitlines():
            word, _, rest = line.partition(" ")
            name, _, rule = rest.partition(" ")
            if word.startswith("*"):
                table = self.tables.setdefault(word[1:], Table())
            elif word.startswith(":"):
                table.chains[word[1:]] = []
            elif word in ("-A", "-I"):
                target = rule.rpartition(" -j ")[2].split()[0] if "-j " in rule else "RETURN"
                assert not target.startswith("KUBE-") or target in {*table.chains, MARK_MASQ, MARK_CLIENTS}, line
                table.chains[name].insert(0 if word == "-I" else len(table.chains[name]), rule)
            elif word == "-D":
                table.chains[name].remove(rule)
            elif word == "-X":
                assert not table.chains.pop(name)
            else:
                assert word in ("#", "COMMIT"), line
        for one in self.tables.values():
            for chain, rules in one.chains.items():
                for rule in rules:
                    target = rule.rpartition("-j ")[2].split()[0]
                    assert not SERVICE_CHAIN.fullmatch(target) or target in one.chains, (chain, rule)


@given(st.sampled_from(FORMS), servers())
def test_what_is_written_reads_back(form: Form, one: VirtualServer) -> None:
    wanted = express(form, one)
    assert express(form, wanted) == wanted
    family = Family.IPV6 if len(one.at.address) == 16 else Family.IPV4
    kernel = Simulated()
    kernel.restore(Books(form, family).compose([(one.at, wanted)], whole=True))
    books = Books.read(form, family, kernel.tables)
    assert books.held == {one.at: wanted}
    assert books.tidy
    assert books.orphans == frozenset()
    assert not books.compose([(one.at, wanted)])
    gone = books.compose([(one.at, None)])
    assert gone.text().count("\n") >= 4
    books.apply(gone)
    assert (books.held, books.groups, dict(books.uses)) == ({}, {}, {})
    kernel.restore(gone)
    assert not [name for table in kernel.tables.values() for name in table.chains if SERVICE_CHAIN.fullmatch(name)]


@given(st.sampled_from(FORMS), servers())
def test_a_newcomer_says_what_any_group_would(form: Form, one: VirtualServer) -> None:
    wanted = express(form, replace(one, kind=Kind.CLUSTER_IP, allowed=()))
    site = plain_site(group_of(form, wanted), wanted)
    assert (site is None) == (not wanted.real_servers)
    if site is None:
        return
    text = service_text(form, wanted.at, wanted.label)
    group = Group(render(form, ()), render(form, [wanted]), {wanted.at: f"# + {wanted.at} {text}"})
    newcomer = Newcomer(form, site, wanted)
    assert newcomer.edits() == group.edits()
    for table in ("filter", "nat"):
        assert list(newcomer.names(table)) == list(group.names(table))
        for chains, lines, whole in ((True, True, True), (True, False, False), (False, True, False)):
            assert list(newcomer.blocks(table, chains=chains, lines=lines, whole=whole)) == list(
                group.blocks(table, chains=chains, lines=lines, whole=whole)
            )


@pytest.mark.parametrize("sections", [False, True])
def test_a_large_load_comes_in_portions_and_says_the_same_again(sections: bool) -> None:
    kernel, books = Simulated(), Books(CURRENT, Family.IPV4, sections=sections)
    aim = [
        express(CURRENT, server(f"TCP 10.0.{n // 250}.{n % 250}:80 rr label=a/s{n} -> 10.1.0.1:80, 10.1.0.2:80"))
        for n in range(500)
    ]
    script = books.compose([(one.at, one) for one in aim])
    text = script.text()
    first = next(n for n, line in enumerate(text.splitlines()) if line.startswith("-A KUBE-SEP-"))
    assert text.splitlines().index("*nat") < first < 500 + 2 * SECTION  # behind the cluster IPs and a portion's names
    kernel.restore(script)
    books.apply(script)
    assert Books.read(CURRENT, Family.IPV4, kernel.tables).held == {one.at: one for one in aim}
    assert script.text() == text  # whatever has happened since


ADDRESSES = [
    (Kind.CLUSTER_IP, "10.9.0.1:80"),
    (Kind.CLUSTER_IP, "10.9.0.2:80"),
    (Kind.NODE_PORT, "192.168.0.2:30080"),
    (Kind.NODE_PORT, "192.168.1.2:30080"),
    (Kind.EXTERNAL_IP, "1.2.3.3:80"),
    (Kind.LOAD_BALANCER, "1.2.3.4:80"),
    (Kind.LOAD_BALANCER, "1.2.3.5:80"),
]


@st.composite
def states(draw: st.DrawFn) -> dict[VirtualAddress, VirtualServer]:
    """A ServicePort's virtual servers, mostly as `desired` makes them and some as no Service has them; and others."""
    some = st.lists(st.integers(1, 4), max_size=3, unique=True)
    cluster, local = (
        tuple(sorted(RealServer(parse_address(f"10.244.0.{n}"), 80, draw(st.sampled_from((1, 1, 1, 0)))) for n in each))
        for each in (draw(some), draw(some))
    )
    sticky, external = draw(st.sampled_from((0, 0, 300))), draw(st.sampled_from((Masquerade.NODE, Masquerade.ALWAYS)))
    allowed = disjoint(map(parse_network, draw(st.sampled_from(([], ["203.0.113.0/25", "1.2.3.4"])))))
    found = {}
    for kind, where in draw(st.lists(st.sampled_from(ADDRESSES), unique=True)):
        odd = draw(st.integers(0, 9)) == 0
        plain = kind is Kind.CLUSTER_IP
        reals = local if odd or draw(st.booleans()) else cluster
        one = VirtualServer(
            at(f"TCP {where}"),
            reals,
            persistence=draw(st.sampled_from((0, 60))) if odd else sticky,
            masquerade=draw(st.sampled_from(list(Masquerade))) if odd else Masquerade.DETECT if plain else external,
            no_servers=draw(st.sampled_from(list(NoServers))),
            label="other/name" if odd else "a/b:http",
            kind=kind,
            allowed=allowed if kind is Kind.LOAD_BALANCER or odd else (),
        )
        found[one.at] = one
        if not plain and any(real.weight for real in cluster) and draw(st.booleans()):
            inside = replace(one, at=one.at._replace(inside=True), real_servers=cluster, allowed=())
            found[inside.at] = inside
            if draw(st.integers(0, 9)) == 0:
                del found[one.at]
    return found


@given(st.sampled_from(FORMS), st.lists(states(), min_size=2, max_size=4), st.randoms())
def test_every_state_of_a_service_follows_every_other(
    form: Form, sequence: list[dict[VirtualAddress, VirtualServer]], rng: random.Random
) -> None:
    kernel = Simulated()
    books = Books(form, Family.IPV4)
    kernel.restore(books.compose((), whole=True))
    for state in sequence:
        aim = {where: express(form, one) for where, one in state.items()}
        changes = [(where, aim.get(where)) for where in {*aim, *books.held} if aim.get(where) != books.held.get(where)]
        places = sorted({where[:3] for where, _ in changes})
        rng.shuffle(changes)
        # in two steps, as when something was refused; what is at one address and port has one name at any time
        first = set(rng.sample(places, rng.randint(0, len(places))))
        for now in (True, False):
            part = [(where, one) for where, one in changes if (where[:3] in first) is now]
            script = books.compose(part)
            assert all(set(blamed) <= {where for where, _ in part} for _, blamed in script.blocks())
            text = script.text()
            kernel.restore(script)
            books.apply(script)
            assert script.text() == text
            seen = Books.read(form, Family.IPV4, kernel.tables)
            assert (seen.held, seen.damage, seen.orphans, seen.tidy) == (books.held, {}, frozenset(), True)
            assert {name: set(members) for name, members in seen.groups.items()} == {
                name: set(members) for name, members in books.groups.items()
            }
        assert books.held == aim


@given(st.sampled_from(FORMS), states(), st.randoms())
def test_one_rule_less_or_moved_is_seen_and_mended(
    form: Form, state: dict[VirtualAddress, VirtualServer], rng: random.Random
) -> None:
    aim = {where: express(form, one) for where, one in state.items()}
    kernel = Simulated()
    kernel.restore(Books(form, Family.IPV4).compose(list(aim.items()), whole=True))
    whole = {name: {chain: sorted(r) for chain, r in one.chains.items()} for name, one in kernel.tables.items()}
    table = rng.choice(sorted(kernel.tables))
    rules = kernel.tables[table].chains
    chain = rng.choice(sorted(name for name in rules if rules[name]))
    if rng.random() < 0.5:
        rules[chain].pop(rng.randrange(len(rules[chain])))
    else:
        rules[chain][rng.randrange(len(rules[chain]))] = "-j RETURN"
    books = Books.read(form, Family.IPV4, kernel.tables)
    different = [(where, aim.get(where)) for where in {*aim, *books.held} if aim.get(where) != books.held.get(where)]
    assert different or not books.tidy or books.orphans
    if not books.tidy or books.orphans:  # what `prepare` does
        script = books.compose((), whole=True)
        kernel.restore(script)
        books.apply(script)
    places = sorted({where[:3] for where, _ in different})
    first = set(rng.sample(places, rng.randint(0, len(places))))
    for now in (True, False):  # in two steps, as when something was refused
        script = books.compose([each for each in different if (each[0][:3] in first) is now])
        kernel.restore(script)
        books.apply(script)
    assert books.held == aim
    assert {name: {c: sorted(r) for c, r in one.chains.items()} for name, one in kernel.tables.items()} == whole
    assert Books.read(form, Family.IPV4, kernel.tables).held == aim


def brought(books: Books, *texts: str) -> tuple[list[str], dict[str, VirtualServer]]:
    """The lines that bring books to these servers, after which they hold them."""
    aim = [express(books.form, server(text)) for text in texts]
    wanted = [(one.at, one) for one in aim]
    gone = [(where, None) for where in books.held if where not in dict(wanted)]
    script = books.compose([*wanted, *gone])
    books.apply(script)
    return script.text().splitlines(), {str(one.at): one for one in aim}


def test_two_servers_of_one_name_that_differ_have_chains_of_their_own() -> None:
    books = Books(CLASSIC, Family.IPV4)
    brought(books, "TCP 10.0.0.1:80 rr label=a/b -> 10.1.0.1:80", "TCP 10.0.0.2:80 rr label=a/b -> 10.1.0.2:80")
    ((one, two),) = books.sites()
    assert (one.seed, two.seed) == ("a/b:tcp", "a/b:tcp@10.0.0.2:80")
    # the name passes on when its owner goes in the same change
    lines, _ = brought(books, "TCP 10.0.0.2:80 rr label=a/b -> 10.1.0.2:80")
    ((two,),) = books.sites()
    assert two.seed == "a/b:tcp"
    assert f"-X {chain_name('SVC', 'a/b:tcp@10.0.0.2:80')}" in lines


def test_an_endpoint_of_many_addresses_is_sent_once() -> None:
    books = Books(CURRENT, Family.IPV4)
    nodes = [f"TCP 192.168.0.{n}:30080 NodePort always label=a/b" for n in range(1, 30)]
    where = ["TCP 10.0.0.1:80 rr label=a/b", "TCP 1.2.3.4:80 LoadBalancer always label=a/b", *nodes]
    brought(books, *(f"{each} -> 10.1.0.1:80" for each in where))
    lines, _ = brought(books, *(f"{each} -> 10.1.0.1:80, 10.1.0.2:80" for each in where))
    assert [line.partition(" ")[0] for line in lines if "#" not in line] == [
        "*nat", f":{chain_name('SVC', 'a/btcp')}", f":{chain_name('SEP', 'a/btcp10.1.0.2:80')}",
        "-A", "-A", "-A", "-A", "COMMIT",
    ]  # fmt: skip
    lines, _ = brought(books, *(f"{each} -> 10.1.0.1:80, 10.1.0.2:80" for each in where[:-1]))
    (line,) = [line for line in lines if line.startswith("-")]
    assert line == (
        f'-D {NODEPORTS} -d 192.168.0.29/32 -p tcp -m comment --comment "a/b" -m tcp --dport 30080 '
        f"-j {chain_name('EXT', 'a/btcp')}"
    )


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
    one = VirtualServer(at("TCP 10.0.0.1:80"), (RealServer(parse_address("10.1.0.1"), 80),), label=label)
    for kind in Kind:
        for reals in (one.real_servers, ()):
            rendered = render(CURRENT, [replace(one, kind=kind, real_servers=reals, allowed=CLUSTERS[:1])])
            rules = [rule for chain in rendered.chains.values() for rule in chain]
            rules += [line.rule for line in rendered.lines]
            assert all(rule.count('"') in (0, 2) for rule in rules)


def test_versions_of_iptables_print_one_rule_in_different_ways() -> None:
    mine = '-d 10.0.0.1/32 -p tcp -m comment --comment "a/b: cluster IP" -m tcp --dport 80 -j KUBE-SVC-X'
    assert same_rule(
        mine, '-d 10.0.0.1/32 -p tcp -m tcp --dport 80 -m comment --comment "a/b: cluster IP" -j KUBE-SVC-X'
    )
    assert not same_rule(mine, mine.replace("80", "81"))
    assert not same_rule(mine, mine.replace("cluster IP", "other"))


def test_a_portal_whose_chain_is_not_right_is_damaged_and_rewritten() -> None:
    one = express(CLASSIC, server("TCP 10.0.0.1:80 rr label=a/b -> 10.1.0.1:80, 10.1.0.2:80"))
    kernel = Simulated()
    kernel.restore(Books(CLASSIC, Family.IPV4).compose([(one.at, one)], whole=True))
    (svc,) = [name for name in kernel.tables["nat"].chains if "SVC" in name]
    kernel.tables["nat"].chains[svc].reverse()
    books = Books.read(CLASSIC, Family.IPV4, kernel.tables)
    assert books.tidy
    assert books.held[one.at].scheduler == DAMAGED
    assert f":{svc} - [0:0]" in books.compose([(one.at, one)]).text()


@pytest.mark.parametrize(
    "form",
    [
        Form(),
        Form(False, True),
        Form(clusters=(parse_network("10.244.0.0/16"), parse_network("fd00::/8")), bridge="br0", prefix="veth-"),
        Form(services=(parse_network("10.96.0.0/12"),)),
    ],
)
def test_the_marker_says_how_rules_are_written(form: Form) -> None:
    assert form_of(marker({"net.ipv4.ip_forward": 0}, form)) == form
    assert form_of(marker({})) is None


def test_a_form_that_no_comment_can_hold_is_left_out() -> None:
    form = Form(clusters=tuple(parse_network(f"10.{number}.0.0/16") for number in range(40)))
    assert form_of(marker({}, form)) is None
