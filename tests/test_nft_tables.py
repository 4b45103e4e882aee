"""nftables mode as a table: how servers lie in it and are read back, what a commit sends, and what refusals become."""

import errno
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from dataplane import netlink_nftables, nft_tables, run_tool
from dataplane import nft_layout as lay
from dataplane.backend import Options
from dataplane.errors import Unanswered
from dataplane.model import (
    Address,
    Kind,
    Masquerade,
    NoServers,
    RealServer,
    VirtualAddress,
    VirtualServer,
    parse_network,
)
from dataplane.netlink_nftables import BatchRefused
from dataplane.netlink_socket import Failure, NetlinkSocket
from dataplane.nft_layout import NOTHING, Entry, canonical, chain_parts, layout, server_of, slot_counts
from dataplane.nft_tables import NftablesBackend, open_backend
from dataplane.plan import Plan, State, diff

from .netns import NetNs
from .words import at, server, shown

TABLE = "dataplane-nftables"
WEB = "TCP 10.0.0.1:80 rr label=default/web:http -> 10.1.0.1:8080, 10.1.0.2:8080"


# --------------------------------------------------------------------------------------------------------- layout

weights = st.sampled_from([0, 1, 1, 1, 2, 3, 100, 65535])
reals = st.dictionaries(st.integers(1, 12), weights, max_size=8).map(
    lambda each: tuple(RealServer(Address(bytes((10, 1, 0, n))), 80, w, n % 3 == 0) for n, w in sorted(each.items()))
)
addresses = st.builds(
    VirtualAddress,
    st.sampled_from([6, 17]),
    st.integers(1, 4).map(lambda n: Address(bytes((10, 0, 0, n)))),
    st.sampled_from([53, 80]),
    st.booleans(),
)
ranges = st.sampled_from([(), (), (parse_network("10.0.0.0/8"), parse_network("192.0.2.1"))])
servers = st.builds(
    lambda kind, **rest: VirtualServer(kind=kind, bound=kind is Kind.CLUSTER_IP, **rest),
    st.sampled_from(Kind),
    at=addresses,
    real_servers=reals,
    scheduler=st.sampled_from(["rr", "wlc"]),
    persistence=st.sampled_from([0, 0, 30, 10800]),
    masquerade=st.sampled_from(Masquerade),
    no_servers=st.sampled_from(NoServers),
    label=st.sampled_from(["", "a/b:c", "default/web", 'x"; flush ruleset; #']),
    allowed=ranges,
).filter(lambda one: not one.at.inside or any(real.weight for real in one.real_servers))


@given(st.lists(servers, min_size=1, max_size=8))
def test_a_layout_says_what_the_server_says_and_keeps_what_it_can(chain: list[VirtualServer]) -> None:
    held: Entry = NOTHING
    homes = lay.Homes()
    key = chain[0].at
    hairpins = {Address(bytes((10, 1, 0, n))) for n in range(3, 13, 3)}
    for one in chain:
        if key.inside and not any(real.weight for real in one.real_servers):
            continue  # nobody is sent inside for nothing
        wanted = canonical(replace(one, at=key))
        entry = layout(wanted, held, homes)
        assert entry.whole()
        seen = server_of(wanted.at, entry, {wanted.at.address}, hairpins)
        assert shown(seen) == shown(wanted)
        if held.comment == entry.comment and chain_parts(held.chain).kind == chain_parts(entry.chain).kind == "sticky":
            # who stays keeps the number that clients are remembered by
            before = {target: number for number, target in held.shared.items()}
            after = {target: number for number, target in entry.shared.items()}
            assert all(after[target] == number for target, number in before.items() if target in after)
        if chain_parts(held.chain).kind == chain_parts(entry.chain).kind == "pick":
            # no more slots change than have to: what came, and what the last ones had to move for
            same = sum(entry.endpoints.get(slot) == target for slot, target in held.endpoints.items())
            had, has = Counter(held.endpoints.values()), Counter(entry.endpoints.values())
            moved = max(0, len(held.endpoints) - len(entry.endpoints))
            assert same >= (had & has).total() - moved
        homes.replace(held, entry)
        held = entry


def test_addresses_of_one_service_port_share_its_numbers_and_give_them_back() -> None:
    homes = lay.Homes()
    web, other = "rr sticky=60 label=a/b:web -> 10.1.0.1:80, 10.1.0.2:80", "rr sticky=60 label=a/c -> 10.1.0.1:80"
    entries = {
        text: layout(server(text), NOTHING, homes)
        for text in (f"TCP 10.0.0.1:80 {web}", f"TCP 10.0.0.9:81 {web}", f"TCP 10.0.0.2:80 {other}")
    }
    one, same, third = entries.values()
    assert (one.home, one.shared) == (same.home, same.shared)
    assert third.home not in (0, one.home)
    for entry in entries.values():
        homes.replace(NOTHING, entry)
    homes.replace(one, NOTHING)
    assert homes.port(server(f"TCP 10.0.0.1:80 {web}")) == one.home
    homes.replace(same, NOTHING)
    assert layout(server("TCP 10.0.0.3:80 rr sticky=60 label=a/d -> 10.1.0.9:80"), NOTHING, homes).home == one.home


@pytest.mark.parametrize(
    ("weights", "slots"),
    [
        ([1, 1, 1], [1, 1, 1]),
        ([5, 10], [1, 2]),
        ([0, 65535], [0, 1]),
        ([0, 0], [0, 0]),
        ([1, 65535], [1, 253]),
        ([], []),
        ([1] * 300, [1] * 300),
        ([2] * 300, [1] * 300),
    ],
)
def test_weights_become_slots(weights: list[int], slots: list[int]) -> None:
    assert slot_counts(weights) == slots


@given(st.lists(st.integers(0, 65535), max_size=400))
def test_slots_are_few_and_nobody_with_a_weight_has_none(weights: list[int]) -> None:
    slots = slot_counts(weights)
    assert sum(slots) <= max(lay.SLOTS, sum(weight > 0 for weight in weights))
    assert [weight > 0 for weight in weights] == [slot > 0 for slot in slots]
    assert slot_counts(slots) == slots


# --------------------------------------------------------------------------------------------------------- kernel


@pytest.fixture
def node() -> Iterator[NetNs]:
    with NetNs.create("tables") as created, created.enter():
        yield created


@pytest.fixture
def backend(node: NetNs) -> Iterator[NftablesBackend]:
    opened = open_backend(Options())
    opened.prepare()
    opened.observe()
    yield opened
    opened.close()


def settle(backend: NftablesBackend, *lines: str) -> nft_tables.NftTransaction:
    wanted = {one.at: backend.express(one) for one in map(server, lines)}
    transaction = backend.compile(diff(backend.observe(), wanted))
    outcome = backend.commit(transaction)
    assert (outcome.failed, outcome.unsure) == ({}, frozenset())
    return transaction


def listed(node: NetNs) -> dict[str, list[Any]]:
    """Elements by set, as nft tells them."""
    found = {}
    for one in json.loads(node.run("nft", "-j", "list", "table", "inet", TABLE).stdout)["nftables"]:
        for kind in ("set", "map"):
            if kind in one:
                found[one[kind]["name"]] = one[kind].get("elem", [])
    return found


GOLDEN = """\
add chain inet dataplane-nftables pick4_2
add rule inet dataplane-nftables pick4_2 meta priority set numgen random mod 2 goto dnat4 \
comment "made on demand 1/1 [e70ccf56]"
# TCP 10.0.0.1:80 default/web:http
add element inet dataplane-nftables services4 { 10.0.0.1 . tcp . 80 comment "default/web:http" : goto pick4_2 }
add element inet dataplane-nftables endpoints4 { 10.0.0.1 . tcp . 80 . none : 10.1.0.1 . 8080 }
add element inet dataplane-nftables endpoints4 { 10.0.0.1 . tcp . 80 . 0:1 : 10.1.0.2 . 8080 }
add element inet dataplane-nftables cluster_ips4 { 10.0.0.1 }
"""


@pytest.mark.root
def test_a_transaction_prints_as_a_script_that_nft_takes(backend: NftablesBackend, node: NetNs) -> None:
    wanted = backend.express(server(WEB))
    sticky = backend.express(server("UDP 10.0.0.1:53 rr sticky=60 -> 10.2.0.1:53 here, 10.2.0.2:53 w2, 10.2.0.3:53 w0"))
    drop = backend.express(server("TCP [fd00::1]:80 rr drop label=a/b"))
    assert str(backend.compile(diff(State(), {wanted.at: wanted}))) == GOLDEN
    everything = {one.at: one for one in (wanted, sticky, drop)}
    script = str(backend.compile(diff(State(), everything)))
    node.run("nft", "-f", "-", stdin=script)
    seen = backend.observe()
    assert sorted(map(shown, seen.servers.values())) == sorted(map(shown, everything.values()))
    assert backend.intact(), "chains made by the script are those that are made by netlink"
    node.run("nft", "-f", "-", stdin=str(backend.compile(diff(seen, {}))))
    assert backend.observe().servers == {}


@pytest.mark.root
def test_chains_made_by_netlink_list_as_their_text(backend: NftablesBackend, node: NetNs) -> None:
    settle(
        backend,
        "TCP 10.0.0.1:80 rr sticky=60 -> 10.1.0.1:1",
        "TCP [fd00::1]:80 rr sticky=60 -> [fd00::2]:1",
        WEB.replace("0.1:80", "0.2:80"),
    )
    text = node.run("nft", "list", "table", "inet", TABLE).stdout
    for line in (
        "update @affinity4 { ip saddr . meta priority & 7fff:0 timeout 1m : meta priority & 7fff:ffff }",
        "delete @affinity6 { ip6 saddr . meta priority & 7fff:0 : meta priority & 7fff:ffff }",
        "meta priority set numgen random mod 1 jump number6",
        "meta priority != none goto keep4_60",
        "meta priority set numgen random mod 2 goto dnat4",
    ):
        assert line in text


@pytest.mark.root
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(servers, max_size=5), min_size=1, max_size=5))
def test_any_sequence_of_states(backend: NftablesBackend, node: NetNs, states: list[list[VirtualServer]]) -> None:
    for state in (*states, []):
        wanted = {one.at: backend.express(one) for one in state}
        outcome = backend.commit(backend.compile(diff(backend.observe(), wanted)))
        assert (outcome.failed, outcome.unsure) == ({}, frozenset())
        seen = backend.observe()
        assert {key: shown(one) for key, one in seen.servers.items()} == {k: shown(one) for k, one in wanted.items()}
        assert not diff(seen, wanted)
        assert not seen.ghosts
        assert backend.suspects(seen) == set()
    assert {name for name, each in listed(node).items() if each} <= {"settings"}
    assert "evil" not in json.dumps(listed(node))


SHARING = """
    TCP 10.0.0.1:80 rr {sticky} label=a/b -> {all}
    TCP 192.0.2.1:80 rr {sticky} LoadBalancer node label=a/b -> {here}
    TCP 192.0.2.1:80 (inside) rr {sticky} LoadBalancer node label=a/b -> {all}
    TCP 192.168.0.2:30080 rr {sticky} NodePort node label=a/b -> {here}
    TCP 192.168.0.2:30080 (inside) rr {sticky} NodePort node label=a/b -> {all}
"""


def sharing(everywhere: str, here: str, sticky: str) -> list[str]:
    text = SHARING.format(all=everywhere, here=here, sticky=sticky)
    return [" ".join(line.split()) for line in text.strip().splitlines()]


@pytest.mark.root
@pytest.mark.parametrize("sticky", ["", "sticky=60"])
def test_addresses_of_a_service_port_share_its_endpoints(backend: NftablesBackend, node: NetNs, sticky: str) -> None:
    """An endpoint is one element, whoever serves it; one that replaces it takes its number, and nothing else moves."""
    one, two, three = "10.1.0.1:80 here", "10.1.0.2:80", "10.1.0.3:80 here"
    settle(backend, *sharing(f"{one}, {two}", one, sticky))
    before = listed(node)
    assert (len(before["shared4"]), before["endpoints4"]) == (2, [])
    wanted = {each.at: backend.express(each) for each in map(server, sharing(f"{two}, {three}", three, sticky))}
    held = backend.observe()
    transaction = backend.compile(diff(held, wanted))
    assert transaction.steps == ()
    assert backend.commit(transaction).failed == {}
    held.apply(transaction.plan)
    after = listed(node)
    assert {name: each for name, each in after.items() if each != before[name]}.keys() == {"shared4", "hairpin4"}
    assert not diff(held, wanted)
    assert not diff(backend.observe(), wanted)
    # what they counted is told once, by the address that has all of them
    known = {str(each.server.at): [counted.connections for _, counted in each.reals] for each in backend.report()}
    assert known.pop("TCP 10.0.0.1:80") == [0, 0]
    assert {count for counts in known.values() for count in counts} == {-1}
    settle(backend)
    assert {name for name, each in listed(node).items() if each} <= {"settings"}


pods = st.dictionaries(st.integers(1, 6), st.sampled_from([0, 1, 1, 1, 1, 2]), max_size=5).map(
    lambda each: tuple(RealServer(Address(bytes((10, 1, 0, n))), 80, w, n % 3 == 0) for n, w in sorted(each.items()))
)
PORTS = ("a/b:c", "default/web")


@pytest.mark.root
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.dictionaries(st.sampled_from(PORTS), st.tuples(pods, pods, st.integers(0, 31), st.booleans())),
        min_size=2,
        max_size=6,
    )
)
def test_what_is_shared_is_right_at_every_address(
    backend: NftablesBackend, node: NetNs, states: list[dict[str, tuple[Any, Any, int, bool]]]
) -> None:
    """Endpoints of Service ports come, go and are replaced, at some of their addresses or at all; without looks in
    between, so that what the backend believes has to be what is there."""
    witness = open_backend(Options())
    held = backend.observe()
    for state in (*states, {}):
        wanted: dict[VirtualAddress, VirtualServer] = {}
        for label, (everywhere, here, which, sticky) in state.items():
            for number in range(5):
                inside = number == 4
                if not which >> number & 1 or (inside and (not which & 8 or not any(r.weight for r in everywhere))):
                    continue
                vip = VirtualAddress(6, Address(bytes((10, 0, PORTS.index(label), min(number, 3)))), 80, inside)
                one = VirtualServer(
                    vip,
                    everywhere if number in (0, 1, 4) else here,
                    persistence=60 if sticky else 0,
                    bound=number == 0,
                    kind=Kind.CLUSTER_IP if number == 0 else Kind.LOAD_BALANCER,
                    masquerade=Masquerade.NODE if number > 2 else Masquerade.DETECT,
                    label=label,
                )
                wanted[vip] = backend.express(one)
        plan = diff(held, wanted)
        outcome = backend.commit(backend.compile(plan))
        assert (outcome.failed, outcome.unsure) == ({}, frozenset())
        held.apply(plan)
        seen = witness.observe()
        assert {key: shown(one) for key, one in seen.servers.items()} == {k: shown(one) for k, one in wanted.items()}
        assert not seen.ghosts
        assert not diff(held, wanted)
    witness.close()
    assert {name for name, each in listed(node).items() if each} <= {"settings"}


@pytest.mark.root
def test_a_refused_batch_changes_nothing_and_names_its_object(backend: NftablesBackend, node: NetNs) -> None:
    """The kernel refuses one of three servers; the others are programmed, and the one is found."""
    lines = [f"TCP 10.0.0.{n}:80 rr -> 10.1.0.{n}:80" for n in (1, 2, 3)]
    # a chain in the way: the second server wants pick4_2, which somebody else has
    wanted = {one.at: backend.express(one) for one in map(server, [*lines, WEB.replace("0.1:80", "0.9:80")])}
    transaction = backend.compile(diff(backend.observe(), wanted))
    bad = at("TCP 10.0.0.2:80")
    original = netlink_nftables.commit

    def refuse(sock: NetlinkSocket, messages: list[bytes], generation: int | None = None) -> list[bytes]:
        culprit = [each for each in messages if bad in set(nft_tables._named(each))]
        if culprit:
            error = BatchRefused("nf_tables batch:", "", errno.ENOSPC)
            error.failures = (Failure(errno.ENOSPC, culprit[0]),)
            raise error
        return original(sock, messages, generation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(netlink_nftables, "commit", refuse)
        outcome = backend.commit(transaction)
    assert list(outcome.failed) == [bad]
    assert outcome.failed[bad].errno == errno.ENOSPC
    assert set(backend.observe().servers) == wanted.keys() - {bad}


@pytest.mark.root
def test_elements_of_somebody_else_are_found_by_the_generation(backend: NftablesBackend, node: NetNs) -> None:
    settle(backend, WEB)
    backend.monitors()
    more = backend.express(server("TCP 10.0.0.2:80 rr -> 10.1.0.1:80"))
    plan = diff(State(), {more.at: more})
    # another table: our batch is sent again
    node.run("nft", "add", "table", "ip", "other")
    assert backend.commit(backend.compile(plan)).failed == {}
    # our table: the outcome is unknown, nothing was changed
    node.run("nft", "delete", "element", "inet", TABLE, "cluster_ips4", "{ 10.0.0.2 }")
    gone = diff(State([more], vips={more.at.address}), {})
    with pytest.raises(Unanswered):
        backend.commit(backend.compile(gone))
    assert backend.disturbed()
    assert not backend.disturbed()
    assert more.at in backend.observe().servers


@pytest.mark.root
def test_parts_of_a_server_are_ghosts_and_are_completed(backend: NftablesBackend, node: NetNs) -> None:
    settle(backend, WEB)
    for damage in (
        "delete element inet {} services4 {{ 10.0.0.1 . tcp . 80 }}",
        "delete element inet {} endpoints4 {{ 10.0.0.1 . tcp . 80 . 0:1 }}",
        "add element inet {} endpoints4 {{ 10.0.0.1 . tcp . 80 . 0:7 : 10.9.9.9 . 1 }}",
        "add element inet {} alive4 {{ 10.0.0.1 . tcp . 80 . 0:7 }}",
    ):
        node.run("nft", "-f", "-", stdin=damage.format(TABLE) + "\n")
        assert backend.suspects(State()) is None
        assert backend.observe().ghosts == {at("TCP 10.0.0.1:80")}
        settle(backend, WEB)
        state = backend.observe()
        assert not state.ghosts
        assert [shown(one) for one in state.servers.values()] == [shown(backend.express(server(WEB)))]


@pytest.mark.root
def test_one_service_changes_without_a_dump_or_a_process(
    backend: NftablesBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(backend, *(f"TCP 10.0.{n}.1:80 rr -> 10.1.0.1:80, 10.1.0.2:80" for n in range(50)))
    held = backend.observe()

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("not for one Service")

    sends: list[int] = []
    original = NetlinkSocket._send
    monkeypatch.setattr(NetlinkSocket, "dump", forbidden)
    monkeypatch.setattr(NetlinkSocket, "get", forbidden)
    monkeypatch.setattr(run_tool, "run_tool", forbidden)
    monkeypatch.setattr("subprocess.Popen", forbidden)

    def send(self: NetlinkSocket, data: bytes | bytearray) -> None:
        sends.append(len(data))
        original(self, data)

    monkeypatch.setattr(NetlinkSocket, "_send", send)
    for pods in ("10.1.0.3:80, 10.1.0.4:80", "10.1.0.3:80", "10.1.0.3:80, 10.1.0.5:80 w2", ""):
        wanted = backend.express(server(f"TCP 10.0.7.1:80 rr -> {pods}"))
        plan = diff(held, {wanted.at: wanted}, [wanted.at])
        assert backend.commit(backend.compile(plan)).failed == {}
        held.apply(plan)
    assert len(sends) == 4
    assert max(sends) < 2000


@pytest.mark.root
def test_a_lost_answer_is_unknown_and_a_look_clears_it(
    backend: NftablesBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = backend.express(server(WEB))
    transaction = backend.compile(diff(backend.observe(), {wanted.at: wanted}))

    def lost(*_: object) -> None:
        raise Unanswered("read", "the kernel's answer", errno.ENOBUFS)

    with monkeypatch.context() as patch:
        patch.setattr(NetlinkSocket, "_collect", lost)
        with pytest.raises(Unanswered):
            backend.commit(transaction)
    # the change took effect all the same, as after ENOBUFS
    assert backend.suspects(State()) is None
    assert [shown(one) for one in backend.observe().servers.values()] == [shown(wanted)]
    settle(backend)


@pytest.mark.root
def test_hostile_labels_never_reach_the_kernel(backend: NftablesBackend, node: NetNs) -> None:
    before = node.run("nft", "list", "tables").stdout
    hostile = [
        VirtualServer(VirtualAddress(6, Address(bytes((10, 0, 1, n))), 80), label=label)
        for n, label in enumerate(['a"; add table ip evil; #', "a\nadd table ip evil", "x" * 200, "é/è", "a/b\x00c"])
    ]
    transaction = backend.compile(Plan(add=tuple(hostile)))
    assert "evil" not in str(transaction)
    assert backend.commit(transaction).failed == {}
    assert node.run("nft", "list", "tables").stdout == before
    assert {one.label for one in backend.observe().servers.values()} == {""}


@pytest.mark.root
def test_the_table_goes_and_sysctls_come_back(node: NetNs) -> None:
    node.sysctl("ipv4.ip_forward", 0)
    first = open_backend(Options())
    assert first.prepare() == ()
    assert node.run("sysctl", "-n", "net.ipv4.ip_forward").stdout == "1\n"
    settle(first, WEB)
    first.close()
    second = open_backend(Options())
    second.prepare()
    second.remove()
    assert node.run("sysctl", "-n", "net.ipv4.ip_forward").stdout == "0\n"
    assert node.run("nft", "list", "ruleset").stdout == ""
    second.close()


@pytest.mark.root
def test_changed_options_rewrite_rules_and_keep_elements(backend: NftablesBackend, node: NetNs) -> None:
    settle(backend, WEB, "TCP 10.0.0.2:80 rr sticky=60 -> 10.1.0.1:80")
    other = open_backend(Options(masquerade_all=True))
    assert not other.intact()
    other.prepare()
    assert other.intact()
    assert not backend.intact()
    assert len(other.observe().servers) == 2
    assert node.run("nft", "list", "table", "inet", TABLE).stdout.count("masquerade all") == 1
    other.close()
