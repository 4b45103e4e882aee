"""What we program is what ipvsadm and pyroute2 read back, and what ipvsadm programs is what we read: at random."""

import random
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dataplane import ipvsadm_text
from dataplane.backend import Options
from dataplane.model import Address, Forwarding, RealServer, VirtualAddress, VirtualServer
from dataplane.netlink_ipvs import IpvsBackend, open_backend
from dataplane.plan import State, diff

from .netns import NetNs
from .words import server

pytestmark = pytest.mark.ipvs

# every scheduler that Debian's kernels have; "twos" they do not
SCHEDULERS = ("rr", "wrr", "lc", "wlc", "lblc", "lblcr", "dh", "sh", "sed", "nq", "fo", "ovf", "mh")


@pytest.fixture(scope="module")
def place() -> Iterator[tuple[NetNs, IpvsBackend]]:
    with NetNs.create("parity") as netns:
        with netns.enter():
            backend = open_backend(Options())
            backend.prepare()
        yield netns, backend
        backend.close()


v4 = st.integers(0x01000001, 0xDFFFFFFE).filter(lambda n: n >> 24 != 127).map(lambda n: Address(n.to_bytes(4)))
v6 = st.integers(1, 2**64).map(lambda n: Address(b"\xfd" + n.to_bytes(15)))
ports = st.integers(1, 65535)


@st.composite
def servers(draw: st.DrawFn) -> VirtualServer:
    addresses = draw(st.sampled_from((v4, v6)))
    scheduler = draw(st.sampled_from(SCHEDULERS))
    persistence = draw(st.sampled_from((0, 0, 1, 300, 10800)))
    width = 32 if addresses is v4 else 128
    reals = draw(
        st.lists(
            st.builds(
                lambda address, port, weight, forwarding, thresholds: RealServer(
                    address, port, weight, False, forwarding, *thresholds
                ),
                addresses,
                ports,
                st.sampled_from((0, 1, 1, 1, 7, 65535)),
                st.sampled_from((Forwarding.MASQ, Forwarding.MASQ, Forwarding.ROUTE)),
                st.sampled_from(((0, 0), (0, 0), (100, 0), (100, 10))),
            ),
            max_size=12,
            unique_by=lambda one: (one.address, one.port),
        )
    )
    return VirtualServer(
        VirtualAddress(draw(st.sampled_from((6, 17, 132))), draw(addresses), draw(ports)),
        tuple(sorted(reals)),
        scheduler,
        draw(st.sampled_from((0, 0x08, 0x10, 0x18, 0x38)))
        if scheduler in ("sh", "mh")
        else draw(st.sampled_from((0, 0x20))),
        persistence,
        draw(st.integers(1, width)) if persistence else 32,
    )


tables = st.lists(servers(), max_size=8, unique_by=lambda one: one.at)
relaxed = settings(
    max_examples=40,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # an emulated machine has no time to shrink
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def program(backend: IpvsBackend, table: list[VirtualServer]) -> State:
    plan = diff(backend.observe(), {one.at: one for one in table})
    outcome = backend.commit(backend.compile(plan))
    assert outcome.failed == {}
    return backend.observe()


@relaxed
@given(tables)
def test_what_we_program_is_what_everyone_reads(place: tuple[NetNs, IpvsBackend], table: list[VirtualServer]) -> None:
    netns, backend = place
    state = program(backend, table)
    assert state.servers == {one.at: one for one in table}
    with netns.enter():  # the kernel's table in /proc is the thread's
        assert backend.suspects(state) == {one.at for one in table if one.flags}
    listing = backend.listing()
    assert ipvsadm_text.rules(listing) == netns.run("ipvsadm", "-S", "-n").stdout
    assert ipvsadm_text.table(listing, *backend.info()) == netns.run("ipvsadm", "-l", "-n").stdout


@relaxed
@given(tables)
def test_our_printed_transaction_programs_the_same_in_ipvsadm(
    place: tuple[NetNs, IpvsBackend], table: list[VirtualServer]
) -> None:
    netns, backend = place
    program(backend, [])
    # with -g ipvsadm takes the virtual server's port whatever port it is given
    table = [
        msgspec.structs.replace(
            one,
            real_servers=tuple(msgspec.structs.replace(r, forwarding=Forwarding.MASQ) for r in one.real_servers),
        )
        for one in table
    ]
    transaction = str(backend.compile(diff(State(), {one.at: one for one in table})))
    rules = "".join(line + "\n" for line in transaction.splitlines() if line.startswith(("-A", "-a")))
    with NetNs.create("copy") as copy, copy.enter():
        copy.run("ipvsadm", "-R", stdin=rules)
        theirs = open_backend(Options())
        told = ipvsadm_text.rules(theirs.listing())
        theirs.close()
    program(backend, table)
    assert told == ipvsadm_text.rules(backend.listing())
    assert told == netns.run("ipvsadm", "-S", "-n").stdout


def test_pyroute2_reads_the_same(place: tuple[NetNs, IpvsBackend]) -> None:
    from pyroute2 import IPVS  # heavy, and an oracle only

    netns, backend = place
    table = [
        VirtualServer(
            VirtualAddress(protocol, Address(bytes([10, 9, 0, number])), 80 + number),
            tuple(RealServer(Address(bytes([10, 8, number, n])), 8080, n) for n in range(number % 4)),
            scheduler,
        )
        for number, (protocol, scheduler) in enumerate([(6, "rr"), (17, "wlc"), (132, "sh"), (6, "mh"), (6, "lc")], 1)
    ]
    program(backend, table)
    seen = {}
    with netns.enter(), IPVS() as ipvs:
        for service in ipvs.service("dump"):
            one = service.get_attr("IPVS_CMD_ATTR_SERVICE")
            key = (
                one.get_attr("IPVS_SVC_ATTR_PROTOCOL"),
                one.get_attr("IPVS_SVC_ATTR_ADDR"),
                one.get_attr("IPVS_SVC_ATTR_PORT"),
            )
            seen[key] = one.get_attr("IPVS_SVC_ATTR_SCHED_NAME")
    wanted = {(s.at.protocol, ".".join(map(str, s.at.address)), s.at.port): s.scheduler for s in table}
    assert seen == wanted


def test_the_listing_is_ipvsadms_also_for_what_is_not_ours(place: tuple[NetNs, IpvsBackend]) -> None:
    netns, backend = place
    program(backend, [])
    rules = """
    -A -t 10.0.0.1:80 -s rr
    -a -t 10.0.0.1:80 -r 10.1.0.1:80 -m -w 1
    -A -t 200.0.0.1:80 -s wlc -p 300 -M 255.255.255.0
    -a -t 200.0.0.1:80 -r 10.1.0.1:80 -g -w 1
    -a -t 200.0.0.1:80 -r 210.1.0.1:80 -i -w 3
    -a -t 200.0.0.1:80 -r 110.1.0.1:80 -i -w 3 --tun-type gue --tun-port 6080 --tun-nocsum
    -A -u 130.0.0.1:80 -s sh -b sh-port,sh-fallback -o
    -A -u 2.0.0.1:80 -s mh -b mh-port
    -A -t 9.0.0.1:443 -s rr -b flag-1,flag-3
    -A -f 7 -s rr -p 50
    -a -f 7 -r 10.1.0.7:0 -g -w 1
    -A -f 8 -6 -s wrr
    -A -t [fd00::1]:80 -s lc -p 60 -M 64
    -a -t [fd00::1]:80 -r [fd00:1::1]:80 -m -w 2
    -A -t [2001:db8:ffff:ffff:ffff:ffff:ffff:ffff]:65535 -s rr
    """
    lines = "".join(line.strip() + "\n" for line in rules.strip().splitlines())
    netns.run("ipvsadm", "-R", stdin=lines)
    many = [f"-A -t {a}.{b}.0.1:{c} -s rr\n" for a in (1, 99, 140, 222) for b in (0, 128) for c in (80, 8080)]
    random.Random(1).shuffle(many)
    netns.run("ipvsadm", "-R", stdin="".join(many))
    listing = backend.listing()
    assert len(listing) == len(lines.splitlines()) - lines.count("-a ") + len(many)
    assert ipvsadm_text.table(listing, *backend.info()) == netns.run("ipvsadm", "-l", "-n").stdout
    assert ipvsadm_text.rules(listing) == netns.run("ipvsadm", "-S", "-n").stdout
    # none of it is ours: it blocks what we want there, and survives us
    assert VirtualAddress(6, Address(bytes([10, 0, 0, 1])), 80) in backend.observe().foreign
    before = netns.run("ipvsadm", "-S", "-n").stdout
    with netns.enter():  # nft runs in the namespace of the thread
        backend.remove()
        assert netns.run("ipvsadm", "-S", "-n").stdout == before
        backend.prepare()
    netns.run("ipvsadm", "-C")


def test_a_scheduler_the_kernel_lacks_is_named_and_harms_only_its_server(place: tuple[NetNs, IpvsBackend]) -> None:
    _, backend = place
    program(backend, [])
    good, bad = server("TCP 10.0.0.1:80 rr -> 10.1.0.1:80"), server("TCP 10.0.0.2:80 twos -> 10.1.0.2:80")
    outcome = backend.commit(backend.compile(diff(State(), {good.at: good, bad.at: bad})))
    (error,) = outcome.failed.values()
    assert str(error) == (
        "add virtual server TCP 10.0.0.2:80: No such file or directory (ENOENT):"
        " the kernel has no scheduler twos (module ip_vs_twos)"
    )
    assert list(backend.observe().servers) == [good.at]
