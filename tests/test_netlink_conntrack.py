"""Conntrack over netlink against the kernel, with conntrack(8) as the witness: only wrong UDP entries go."""

import contextlib
import errno
import time
from collections.abc import Iterator

import pytest

from dataplane import netlink_conntrack
from dataplane.errors import KernelError
from dataplane.model import Family, Protocol, parse_address
from dataplane.netlink_conntrack import SUBSYSTEM, Conntrack, EntryAttrs, IpAttrs, PortAttrs, Swept, Way
from dataplane.netlink_socket import (
    HEADER,
    NETLINK_NETFILTER,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REQUEST,
    NetlinkSocket,
    message,
)
from dataplane.nftables_messages import NFGENMSG
from dataplane.nlattr import Part, nest
from dataplane.staleness import Place

from .netns import NetNs
from .words import split

pytestmark = pytest.mark.root


def places(*texts: str) -> frozenset[Place]:
    return frozenset(map(split, texts))


def insert(ns: NetNs, client: str, to: str, real: str, *more: str, protocol: str = "udp") -> None:
    """An entry: client -> to, answered by real; all as address:port."""
    source, sport = client.rsplit(":", 1)
    vip, vport = to.rsplit(":", 1)
    answerer, rport = real.rsplit(":", 1)
    strip = [each.strip("[]") for each in (source, vip, answerer)]
    state = ["--state", "ESTABLISHED"] if protocol == "tcp" else []
    ns.run(
        *("conntrack", "-I", "-p", protocol, "-s", strip[0], "-d", strip[1], "--sport", sport, "--dport", vport),
        *("-r", strip[2], "-q", strip[0], "--reply-port-src", rport, "--reply-port-dst", sport),
        *("-t", "600", "-u", "SEEN_REPLY,ASSURED", *state, *more),
    )


def held(ns: NetNs) -> set[str]:
    """`udp 1.2.3.4:53 <- 10.244.1.7:9053 4711` of each entry: original destination, reply source, client's port."""
    found = set()
    for family in ("ipv4", "ipv6"):
        for line in ns.run("conntrack", "-L", "-f", family).stdout.splitlines():
            words = line.split()
            values = [word.partition("=") for word in words if "=" in word]
            dst = next(value for key, _, value in values if key == "dst")
            dport = next(value for key, _, value in values if key == "dport")
            sport = next(value for key, _, value in values if key == "sport")
            src = [value for key, _, value in values if key == "src"][1]
            rport = [value for key, _, value in values if key == "sport"][1]
            found.add(f"{words[0]} {dst}:{dport} <- {src}:{rport} {sport}")
    return found


@pytest.fixture(params=["each", "udp", "all", "filter ignored", "filter refused"])
def table(request: pytest.FixtureRequest, netns: NetNs, monkeypatch: pytest.MonkeyPatch) -> Iterator[Conntrack]:
    """Every way to read: they must all come to the same."""
    with netns.enter():
        conntrack = Conntrack(way=request.param if request.param in ("each", "udp", "all") else "each")
        if request.param in ("filter ignored", "filter refused"):
            refuse = request.param == "filter refused"

            class OldKernel(NetlinkSocket):
                def dump(self, request: bytes, *more: object) -> list[bytes]:
                    if len(request) > HEADER.size + NFGENMSG.size:
                        if refuse:
                            raise KernelError("dump", "", errno.EOPNOTSUPP)
                        request = message(SUBSYSTEM << 8 | 1, NLM_F_REQUEST, request[16:20])
                    return super().dump(request, *more)  # type: ignore[arg-type]

            monkeypatch.setattr(netlink_conntrack, "NetlinkSocket", OldKernel)
        yield conntrack
    conntrack.close()


def test_only_what_is_wrong_is_deleted(table: Conntrack, netns: NetNs) -> None:
    wrong = [
        ("192.0.2.2:1001", "172.30.0.10:53", "10.240.2.6:9053"),  # an endpoint that has gone
        ("192.0.2.2:1002", "172.30.0.10:53", "10.240.0.4:8053"),  # another port of one that is there
        ("192.0.2.2:1003", "172.30.0.10:53", "172.30.0.10:53"),  # never translated: the black hole
        ("192.0.2.2:1004", "192.168.0.2:31053", "10.240.2.6:9053"),
        ("[2001:db8::2]:1005", "[fd00::10]:53", "[fd00:1::9]:9053"),
    ]
    right = [
        ("192.0.2.2:2001", "172.30.0.10:53", "10.240.0.4:9053"),
        ("192.0.2.2:2002", "192.168.0.2:31053", "10.240.0.4:9053"),
        ("[2001:db8::2]:2003", "[fd00::10]:53", "[fd00:1::7]:9053"),
        ("192.0.2.2:2004", "172.30.0.10:3000", "10.240.2.6:9053"),  # another port of our address
        ("192.0.2.2:2005", "172.30.0.99:53", "10.240.2.6:9053"),  # somebody else's translation
        ("192.0.2.2:2006", "192.168.1.2:31053", "192.168.1.2:31053"),  # a node address that serves no node ports
        ("192.0.2.2:2007", "8.8.8.8:53", "8.8.8.8:53"),
        ("172.30.0.10:53", "192.0.2.2:2008", "192.0.2.2:2008"),  # from our address, not to it
        ("192.0.2.2:2009", "10.9.9.9:53", "10.9.9.9:53"),  # given up, and it answers for itself
    ]
    for entry in (*wrong, *right):
        insert(netns, *entry)
    insert(netns, "192.0.2.2:3001", "172.30.0.10:53", "10.240.2.6:9053", protocol="tcp")
    insert(netns, "192.0.2.2:3002", "172.30.0.10:53", "10.240.2.6:9053", "-w", "7")
    insert(netns, "192.0.2.2:1006", "10.9.9.9:53", "10.240.2.6:9053")  # given up, still translated
    before = held(netns)
    assert len(before) == 17
    swept = table.sweep(
        {
            split("172.30.0.10:53"): places("10.240.0.4:9053", "10.240.1.5:9053"),
            split("192.168.0.2:31053"): places("10.240.0.4:9053", "10.240.1.5:9053"),
            split("[fd00::10]:53"): places("[fd00:1::7]:9053"),
            split("10.9.9.9:53"): places("10.9.9.9:53"),
        }
    )
    assert (swept.wrong, swept.deleted) == (6, 6)
    gone = before - held(netns)
    assert {entry.rsplit(" ", 1)[1] for entry in gone} == {"1001", "1002", "1003", "1004", "1005", "1006"}


def test_a_destination_without_real_servers_keeps_nothing(table: Conntrack, netns: NetNs) -> None:
    insert(netns, "192.0.2.2:1001", "172.30.0.10:53", "10.240.2.6:9053")
    insert(netns, "192.0.2.2:1002", "172.30.0.10:54", "10.240.2.6:9053")
    assert table.sweep({split("172.30.0.10:53"): frozenset()}).deleted == 1
    assert held(netns) == {"udp 172.30.0.10:54 <- 10.240.2.6:9053 1002"}
    assert table.sweep({split("172.30.0.10:53"): frozenset()}).deleted == 0


def test_nothing_to_ask_opens_no_socket(netns: NetNs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netlink_conntrack, "NetlinkSocket", None)
    assert Conntrack().sweep({}) == Swept(0, 0, 0)


def entry(number: int, vip: bytes, real: bytes) -> bytes:
    """The request that makes an entry; numbers make clients."""
    client = (0xAC100000 + number // 50_000).to_bytes(4)

    def one(source: bytes, sport: int, destination: bytes, dport: int) -> list[Part]:
        ip = IpAttrs.parts({"v4_source": source, "v4_destination": destination})
        return [
            *nest(1, ip),
            *nest(2, PortAttrs.parts({"number": Protocol.UDP, "source": sport, "destination": dport})),
        ]

    port = 1024 + number % 50_000
    parts = [*nest(1, one(client, port, vip, 53)), *nest(2, one(real, 9053, client, port))]
    parts += EntryAttrs.parts({"status": 0xE, "timeout": 600})
    flags = NLM_F_REQUEST | NLM_F_CREATE | NLM_F_EXCL
    data = b"".join(part for part in parts if isinstance(part, bytes))
    return message(SUBSYSTEM << 8, flags, NFGENMSG.pack(Family.IPV4, 0, 0) + data)


@pytest.mark.slow
def test_a_large_table_is_read_in_little_time(netns: NetNs) -> None:
    count = 100_000
    vips = [parse_address(f"10.96.0.{number}") for number in range(1, 101)]
    good, bad = parse_address("10.244.1.7"), parse_address("10.244.2.3")
    with netns.enter():
        sock = NetlinkSocket(NETLINK_NETFILTER)
        assert sock.batch(entry(n, vips[n % 100], bad if n % 1000 == 0 else good) for n in range(count)) == []
        sock.close()
        one, every = (
            {(vips[1], 53): frozenset(((good, 9053),))},
            {(vip, 53): frozenset(((good, 9053),)) for vip in vips},
        )
        figures = {}
        ways: tuple[Way, ...] = ("each", "udp", "all")
        for way in ways:
            for destinations in (one, every) if way != "each" else (one,):
                with contextlib.closing(Conntrack(way=way)) as conntrack:
                    begin = time.perf_counter()
                    wrong = conntrack.sweep(destinations).wrong
                    figures[f"{way}, {len(destinations)} destinations"] = round(time.perf_counter() - begin, 3)
                    assert wrong == (count // 1000 if (destinations is every and way == "udp") else 0)
        with contextlib.closing(Conntrack()) as conntrack:
            assert conntrack.sweep(one).read == count // 100
    print(figures)
    assert figures["each, 1 destinations"] < 1
    assert max(figures.values()) < 5
