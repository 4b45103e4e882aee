"""The nf_tables codec and its use: bytes as the kernel header has them, nft(8) as the judge of what arrived."""

import errno
import json
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.errors import NotRoot, WireError
from dataplane.netlink_nftables import (
    GROUP,
    BatchRefused,
    Chain,
    SetShape,
    Touch,
    commit,
    delete_table,
    foreign_touches,
    has_table,
    read_chains,
    read_elements,
    read_generation,
    read_rules,
    read_sets,
)
from dataplane.netlink_socket import HEADER, NETLINK_NETFILTER, DumpInterrupted, NetlinkSocket
from dataplane.nftables_messages import (
    ACCEPT,
    BODY,
    DROP,
    HOST32,
    INET,
    IPV4,
    IPV6,
    PORT,
    PROTOCOL,
    CounterAttrs,
    Element,
    ElementAttrs,
    ExpressionAttrs,
    SetWire,
    comment_of,
    describe,
    goto,
    signed,
)
from dataplane.nlattr import header, u32_bytes, walk
from tests.netns import NetNs

TABLE = "t-1"
SKELETON = f"""
table inet {TABLE} {{
    set servers {{ type ipv4_addr . inet_proto . inet_service; }}
    set clocks {{ type ipv6_addr; flags timeout; }}
    map verdicts {{ type inet_service : verdict; }}
    map ends {{ type ipv4_addr . mark : ipv4_addr . inet_service; }}
    chain first {{
        type filter hook input priority -10; policy drop;
        tcp dport 1 accept comment "one"
        tcp dport {{ 2, 3 }} accept
    }}
    chain second {{ accept comment "two"; }}
}}
table ip other {{ chain first {{ accept comment "not ours"; }}; set servers {{ type ipv4_addr; }}; }}
table inet other {{ chain first {{ accept comment "not ours"; }}; set servers {{ type ipv4_addr; }}; }}
"""
SERVERS = SetWire(INET, TABLE, "servers", (IPV4, PROTOCOL, PORT))
CLOCKS = SetWire(INET, TABLE, "clocks", (IPV6,))
VERDICTS = SetWire(INET, TABLE, "verdicts", (PORT,))
ENDS = SetWire(INET, TABLE, "ends", (IPV4, HOST32), (IPV4, PORT))

ADDRESS = bytes([10, 0, 1, 175])
ADDRESS6 = bytes.fromhex("fd000000000000000000000000000001")


# ---------------------------------------------------------------------------------------------------------- pure


def test_an_element_with_a_comment_byte_for_byte() -> None:
    assert SERVERS.element(ADDRESS, 6, 80, comment="a/b:c").hex(" ", 4).split() == [
        "24000180",  # nlattr NFTA_LIST_ELEM | NESTED, 36 bytes
        "14000180",  # NFTA_SET_ELEM_KEY | NESTED
        "10000100",  # NFTA_DATA_VALUE: three fields of four bytes
        "0a0001af",  # 10.0.1.175
        "06000000",  # tcp, padded
        "00500000",  # port 80 in network order, padded
        "0c000600",  # NFTA_SET_ELEM_USERDATA, 8 bytes
        "0006612f",  # TLV: type 0 (comment), 6 bytes: "a/"
        "623a6300",  # "b:c" and NUL
    ]


def test_an_element_with_a_timeout_and_one_with_a_verdict() -> None:
    assert CLOCKS.element(ADDRESS6, timeout=1500).hex(" ", 4).split() == [
        "28000180",  # NFTA_LIST_ELEM | NESTED, 40 bytes
        "18000180",  # NFTA_SET_ELEM_KEY | NESTED
        *("14000100", "fd000000", "00000000", "00000000", "00000001"),  # NFTA_DATA_VALUE: the address
        *("0c000400", "00000000", "000005dc"),  # NFTA_SET_ELEM_TIMEOUT: 1500 ms, be64
    ]
    assert VERDICTS.element(80, verdict=goto("second")).hex(" ", 4).split() == [
        "2c000180",  # NFTA_LIST_ELEM | NESTED, 44 bytes
        *("0c000180", "06000100", "00500000"),  # KEY { VALUE: two bytes, and the attribute's own padding }
        *("1c000280", "18000280"),  # NFTA_SET_ELEM_DATA { NFTA_DATA_VERDICT {
        *("08000100", "fffffffc"),  # NFTA_VERDICT_CODE: -4, NFT_GOTO
        *("0b000200", "7365636f", "6e640000"),  # NFTA_VERDICT_CHAIN: "second" }}
    ]


def test_a_whole_message() -> None:
    (message,) = SERVERS.remove([SERVERS.key(ADDRESS, 6, 80)])
    assert message.hex(" ", 4).split() == [
        *("44000000", "0e0a0100", "00000000", "00000000"),  # 68 bytes, subsystem 10, NFT_MSG_DELSETELEM, NLM_F_REQUEST
        "01000000",  # nfgenmsg: NFPROTO_INET
        *("08000100", "742d3100"),  # NFTA_SET_ELEM_LIST_TABLE: "t-1"
        *("0c000200", "73657276", "65727300"),  # NFTA_SET_ELEM_LIST_SET: "servers"
        "1c000380",  # NFTA_SET_ELEM_LIST_ELEMENTS | NESTED
        *("18000180", "14000180", "10000100", "0a0001af", "06000000", "00500000"),
    ]
    assert describe(message) == "DELSETELEM t-1 servers"


COMMENTS = st.text(st.characters(codec="ascii", exclude_characters="\0", exclude_categories=["Cs"]), max_size=127)


@given(
    st.lists(
        st.tuples(
            st.binary(min_size=4, max_size=4),
            st.integers(0, 255),
            st.integers(0, 65535),
            COMMENTS,
            st.sampled_from([0, 1, 86_400_000]),
        ),
        max_size=50,
    )
)
def test_what_is_packed_can_be_read(values: list[tuple[bytes, int, int, str, int]]) -> None:
    packed = [SERVERS.element(*key, comment=comment, timeout=timeout) for *key, comment, timeout in values]
    messages = SERVERS.add(packed)
    assert len(messages) == bool(values)
    read = [element for message in messages for element in SERVERS.elements_in(message)]
    assert read == [Element((a, b, c), comment, None) for a, b, c, comment, _ in values]


def test_a_range_has_a_first_and_a_last_key() -> None:
    first, last = (b"\1\2\3\4", 6, 80), (b"\1\2\3\xff", 6, 80)
    (message,) = SERVERS.add([SERVERS.span(*first, *last)])
    assert SERVERS.elements_in(message) == [Element(first, end=last)]


@given(st.integers(0, 65535), st.sampled_from([ACCEPT, DROP, goto("second"), (-3, "x")]))
def test_verdicts_can_be_read(port: int, verdict: tuple[int, str]) -> None:
    (message,) = VERDICTS.add([VERDICTS.element(port, verdict=verdict)])
    assert VERDICTS.elements_in(message) == [Element((port,), "", None, verdict)]


@given(
    st.sampled_from([ACCEPT, DROP, goto("second"), b"\1\2\3\4\0\x50\0\0"]),
    st.none() | st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
    COMMENTS,
    st.booleans(),
)
def test_values_counters_and_comments_are_read_as_the_codec_does(
    data: bytes | tuple[int, str], counted: tuple[int, int] | None, comment: str, flags: bool
) -> None:
    """As the kernel dumps them: without NLA_F_NESTED, and the comment last."""
    code, chain = (0, "") if isinstance(data, bytes) else data
    verdict = {"code": code & 0xFFFFFFFF} | ({"chain": chain} if chain else {})
    values: dict[str, Any] = {"key": {"value": b"\x1f\x90"}}
    values["data"] = {"value": data} if isinstance(data, bytes) else {"verdict": verdict}
    if counted is not None:
        counter = CounterAttrs.encode(bytes=counted[0], packets=counted[1])
        values["expression"] = ExpressionAttrs.encode(name="counter", data=counter)
    if flags:
        values["flags"] = 2  # nothing of ours: the codec reads it
    if comment:
        values["userdata"] = bytes([0, len(comment) + 1]) + comment.encode() + b"\0"
    element = unflagged(ElementAttrs.encode(**values))
    answer = bytes(BODY) + header(len(element) + 4, 3) + header(len(element), 1) + element
    packets = 0 if counted is None else counted[1]
    assert VERDICTS.elements_in(answer) == [Element((0x1F90,), comment, None, data, packets)]


def unflagged(attributes: bytes) -> bytes:
    """Attributes without NLA_F_NESTED, at every depth."""
    plain = bytearray(attributes)

    def clear(start: int, end: int) -> None:
        for _, first, stop in walk(plain, start, end):
            if plain[first - 1] & 0x80:
                plain[first - 1] &= 0x7F
                clear(first, stop)

    clear(0, len(plain))
    return bytes(plain)


def test_lists_are_cut_before_a_message_gets_too_long_for_its_length_field() -> None:
    messages = SERVERS.add([SERVERS.element(ADDRESS, 6, n, comment="x" * 100) for n in range(2_000)])
    assert max(map(len, messages)) < 61_000
    assert [e.key[2] for message in messages for e in SERVERS.elements_in(message)] == list(range(2_000))
    assert SERVERS.add([]) == []


@given(st.binary(max_size=200))
def test_garbage_is_a_wire_error_or_nothing(garbage: bytes) -> None:
    (message,) = SERVERS.add([SERVERS.element(ADDRESS, 6, 80)])
    for damaged in (message[:BODY] + garbage, message[: -len(garbage) or None], message + garbage):
        try:
            found = SERVERS.elements_in(damaged)
        except WireError:
            continue
        assert all(len(element.key) == 3 for element in found)


@given(st.binary(max_size=300))
def test_any_user_data_has_some_comment(userdata: bytes) -> None:
    assert isinstance(comment_of(userdata), str)


def test_comments_in_user_data() -> None:
    assert comment_of(b"\x00\x03ab\x00") == "ab"
    assert comment_of(b"\x02\x01x\x00\x03ab\x00") == "ab"  # behind another TLV
    assert comment_of(b"\x00\xffab") == "ab"  # a length that lies
    assert comment_of(b"\x01\x02ab") == ""
    assert (signed(0xFFFFFFFC), signed(3)) == (-4, 3)


def note(kind: int, table: str, port: int, family: int = INET) -> bytes:
    text = table.encode() + b"\0"
    attribute = (len(text) + 4).to_bytes(2, "little") + b"\1\0" + text + bytes(-len(text) % 4)
    return HEADER.pack(20 + len(attribute), 10 << 8 | kind, 0, 0, port) + bytes([family, 0, 0, 0]) + attribute


def test_only_other_peoples_changes_of_our_table_count() -> None:
    ours, theirs = 77, 99
    assert foreign_touches([note(12, TABLE, ours), note(12, "other", theirs)], INET, TABLE, [ours]) == []
    assert foreign_touches([note(12, TABLE, theirs, family=2)], INET, TABLE, [ours]) == []
    assert foreign_touches([note(12, TABLE + "x", theirs)], INET, TABLE, [ours]) == []
    assert foreign_touches([note(12, TABLE, theirs)], INET, TABLE, [ours]) == [Touch(0, "")]


# -------------------------------------------------------------------------------------------------------- kernel


@pytest.fixture
def sock(netns: NetNs) -> Iterator[NetlinkSocket]:
    """A socket in a fresh network namespace that holds SKELETON."""
    netns.run("nft", "-f", "-", stdin=SKELETON)
    with netns.enter(), NetlinkSocket(NETLINK_NETFILTER) as opened:
        yield opened


def listed(netns: NetNs, kind: str, name: str) -> Any:
    """The elements as `nft -j` shows them."""
    told = json.loads(netns.run("nft", "-j", "list", kind, "inet", TABLE, name).stdout)
    return told["nftables"][1][kind].get("elem", [])


@pytest.mark.root
def test_nft_shows_elements_as_they_were_written(netns: NetNs, sock: NetlinkSocket) -> None:
    servers = [SERVERS.element(ADDRESS, 6, 80, comment="default/web:http"), SERVERS.element(ADDRESS, 132, 65535)]
    clocks = [CLOCKS.element(ADDRESS6, timeout=3_600_000)]
    verdicts = [VERDICTS.element(n, verdict=v) for n, v in ((1, ACCEPT), (2, DROP), (3, goto("second")))]
    ends = [ENDS.element(ADDRESS, u32_bytes(7), ADDRESS, 8080)]
    commit(sock, SERVERS.add(servers) + CLOCKS.add(clocks) + VERDICTS.add(verdicts) + ENDS.add(ends))
    assert listed(netns, "set", "servers") == [
        {"elem": {"val": {"concat": ["10.0.1.175", "tcp", 80]}, "comment": "default/web:http"}},
        {"concat": ["10.0.1.175", "sctp", 65535]},
    ]
    (clock,) = listed(netns, "set", "clocks")
    assert clock["elem"]["val"] == "fd00::1"
    assert clock["elem"]["timeout"] == 3600
    assert 3590 <= clock["elem"]["expires"] <= 3600
    told = dict(listed(netns, "map", "verdicts"))
    assert told == {1: {"accept": None}, 2: {"drop": None}, 3: {"goto": {"target": "second"}}}
    text = netns.run("nft", "list", "map", "inet", TABLE, "ends").stdout
    assert "10.0.1.175 . 0x00000007 : 10.0.1.175 . 8080" in text


@pytest.mark.root
def test_what_was_written_is_read(sock: NetlinkSocket) -> None:
    commit(
        sock,
        SERVERS.add([SERVERS.element(ADDRESS, 6, 80, comment="a/b"), SERVERS.element(ADDRESS, 17, 53)])
        + CLOCKS.add([CLOCKS.element(ADDRESS6, timeout=60_000, comment="both")])
        + VERDICTS.add([VERDICTS.element(3, verdict=goto("second")), VERDICTS.element(4, verdict=DROP)])
        + ENDS.add([ENDS.element(ADDRESS, u32_bytes(7), ADDRESS, 8080)]),
    )
    by_port = {element.key[2]: element for element in read_elements(sock, SERVERS)}
    assert by_port == {80: Element((ADDRESS, 6, 80), "a/b"), 53: Element((ADDRESS, 17, 53))}
    (clock,) = read_elements(sock, CLOCKS)
    assert clock.comment == "both"
    assert clock.remaining is not None
    assert 59_000 < clock.remaining <= 60_000
    assert {e.key: e.data for e in read_elements(sock, VERDICTS)} == {(3,): goto("second"), (4,): DROP}
    assert [e.data for e in read_elements(sock, ENDS)] == [ADDRESS + bytes([0x1F, 0x90, 0, 0])]
    commit(sock, [SERVERS.flush()])
    assert read_elements(sock, SERVERS) == []


@pytest.mark.root
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 100, 126, 127])
def test_comments_of_every_length(netns: NetNs, sock: NetlinkSocket, length: int) -> None:
    comment = ("default/web-" * 11)[:length]
    commit(sock, SERVERS.add([SERVERS.element(ADDRESS, 6, 80, comment=comment)]))
    assert [e.comment for e in read_elements(sock, SERVERS)] == [comment]
    assert listed(netns, "set", "servers")[0]["elem"]["comment"] == comment


@pytest.mark.root
def test_dumps_show_our_table_alone(sock: NetlinkSocket) -> None:
    assert [(rule.chain, rule.comment) for rule in read_rules(sock, INET, TABLE)] == [
        ("first", "one"),
        ("first", ""),
        ("second", "two"),
    ]
    assert read_chains(sock, INET, TABLE) == [Chain("first", "filter", 1, -10, 0), Chain("second")]
    assert read_sets(sock, INET, TABLE) == [
        SetShape("servers", 12, 0),
        SetShape("clocks", 16, 0x10),
        SetShape("verdicts", 2, 0x8),
        SetShape("ends", 8, 0x8),
    ]
    assert has_table(sock, INET, TABLE)
    assert not has_table(sock, INET, "nothing")
    assert read_rules(sock, INET, "nothing") == []
    assert read_sets(sock, INET, "nothing") == []


@pytest.mark.root
def test_a_batch_that_fails_changes_nothing_and_names_what_failed(sock: NetlinkSocket) -> None:
    commit(sock, SERVERS.add([SERVERS.element(ADDRESS, 6, 1)]))
    good = SERVERS.add([SERVERS.element(ADDRESS, 6, 2)])
    missing = SERVERS.remove([SERVERS.key(ADDRESS, 6, 99)])
    unknown = SetWire(INET, TABLE, "nothing", (IPV4,))
    for batch in ([*good, *missing], [*missing, *good]):
        with pytest.raises(BatchRefused) as caught:
            commit(sock, batch)
        assert caught.value.errno == errno.ENOENT
        assert [describe(failure.message) for failure in caught.value.failures] == [f"DELSETELEM {TABLE} servers"]
        assert [e.key[2] for e in read_elements(sock, SERVERS)] == [1]
    with pytest.raises(BatchRefused, match=rf"DELSETELEM {TABLE} servers \(and 1 more\)") as caught:
        commit(sock, [*missing, *good, *unknown.add([unknown.element(ADDRESS)])])
    assert [describe(failure.message) for failure in caught.value.failures] == [
        f"DELSETELEM {TABLE} servers",
        f"NEWSETELEM {TABLE} nothing",
    ]
    # the socket is in step: no late answer is taken for the next one's
    commit(sock, good)
    assert sorted(e.key[2] for e in read_elements(sock, SERVERS)) == [1, 2]


@pytest.mark.root
def test_adding_twice_is_fine_but_not_with_another_verdict(sock: NetlinkSocket) -> None:
    for _ in range(2):
        commit(sock, VERDICTS.add([VERDICTS.element(1, verdict=ACCEPT)]))
    with pytest.raises(BatchRefused) as caught:
        commit(sock, VERDICTS.add([VERDICTS.element(1, verdict=DROP)]))
    assert caught.value.errno in (errno.EBUSY, errno.EEXIST)
    # removed and added in one batch it is: packets see the one or the other
    commit(sock, VERDICTS.remove([VERDICTS.key(1)]) + VERDICTS.add([VERDICTS.element(1, verdict=DROP)]))
    assert [e.data for e in read_elements(sock, VERDICTS)] == [DROP]


@pytest.mark.root
def test_a_stale_generation_is_refused(netns: NetNs, sock: NetlinkSocket) -> None:
    now = read_generation(sock)
    commit(sock, SERVERS.add([SERVERS.element(ADDRESS, 6, 1)]), generation=now.id)
    with pytest.raises(BatchRefused, match="the ruleset changed meanwhile") as caught:
        commit(sock, SERVERS.add([SERVERS.element(ADDRESS, 6, 2)]), generation=now.id)
    assert caught.value.errno == errno.ERESTART
    assert [e.key[2] for e in read_elements(sock, SERVERS)] == [1]
    commit(sock, SERVERS.add([SERVERS.element(ADDRESS, 6, 2)]), generation=read_generation(sock).id)
    assert len(read_elements(sock, SERVERS)) == 2


@pytest.mark.root
def test_a_batch_larger_than_the_send_buffer_is_still_one(sock: NetlinkSocket) -> None:
    many = [SERVERS.element(n.to_bytes(4), 6, 80, comment="x" * 100) for n in range(80_000)]
    missing = SERVERS.remove([SERVERS.key(ADDRESS, 17, 1)])
    messages = SERVERS.add(many)
    assert sum(map(len, messages)) > 10 << 20
    with pytest.raises(BatchRefused):
        commit(sock, [*messages, *missing])
    assert read_elements(sock, SERVERS) == []
    commit(sock, messages)
    assert len(read_elements(sock, SERVERS)) == 80_000


@pytest.mark.root
def test_reading_while_another_writes_shows_every_element_that_stays(netns: NetNs, sock: NetlinkSocket) -> None:
    """The other one fills and empties the set, so that the kernel resizes it under the reader."""
    kept = {(n.to_bytes(4), 6, 80) for n in range(3_000)}
    commit(sock, SERVERS.add([SERVERS.element(*key, comment="kept") for key in kept]))
    ended = threading.Event()

    def write() -> None:
        with netns.enter(), NetlinkSocket(NETLINK_NETFILTER) as other:
            keys = [((1 << 24 | n).to_bytes(4), 6, 80) for n in range(9_000)]
            for _ in range(10):
                commit(other, SERVERS.add([SERVERS.element(*key) for key in keys]))
                commit(other, SERVERS.remove([SERVERS.key(*key) for key in keys]))
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    try:
        while not ended.is_set():
            try:
                found = read_elements(sock, SERVERS)
            except DumpInterrupted:
                continue  # torn every time, and it is said
            reads += 1
            assert {element.key for element in found if element.comment} == kept
    finally:
        writer.join()
    assert {element.key for element in read_elements(sock, SERVERS)} == kept
    assert reads


@pytest.mark.root
def test_what_nft_changes_in_our_table_is_news(netns: NetNs, sock: NetlinkSocket) -> None:
    with NetlinkSocket(NETLINK_NETFILTER, groups=[GROUP]) as news:
        commit(sock, SERVERS.add([SERVERS.element(ADDRESS, 6, 1)]))
        netns.run("nft", "add", "element", "inet", "other", "servers", "{ 10.0.0.1 }")
        assert foreign_touches(news.notifications()[0], INET, TABLE, [sock.port]) == []
        netns.run("nft", "flush", "chain", "inet", TABLE, "first")
        (touch,) = foreign_touches(news.notifications()[0], INET, TABLE, [sock.port])
        assert touch.process == "nft"
        assert touch.pid > 0
        netns.run("nft", "delete", "table", "inet", TABLE)
        assert len(foreign_touches(news.notifications()[0], INET, TABLE, [sock.port])) == 1


@pytest.mark.root
def test_tables_are_deleted_with_all_that_is_in_them(sock: NetlinkSocket) -> None:
    commit(sock, [delete_table(INET, TABLE)])
    assert not has_table(sock, INET, TABLE)
    assert has_table(sock, INET, "other")
    with pytest.raises(BatchRefused, match=f"DELTABLE {TABLE}: "):
        commit(sock, [delete_table(INET, TABLE)])
    commit(sock, [])


@pytest.mark.root
def test_without_the_capability_the_error_says_so(netns: NetNs, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import os, sys; sys.path.insert(0, os.getcwd())\n"
        "from dataplane.netlink_socket import *; from dataplane.netlink_nftables import *\n"
        "os.setuid(65534)\n"
        "try: commit(NetlinkSocket(NETLINK_NETFILTER), [delete_table(1, 'x')])\n"
        "except Exception as error: print(type(error).__name__)"
    )
    assert netns.run(sys.executable, "-c", program).stdout == f"{NotRoot.__name__}\n"
