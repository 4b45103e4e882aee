"""Addresses that are not the node's: delivered to IPVS for the ports that are ours, left alone for all others."""

import contextlib
import re
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from dataplane.backend import Options, open_backend
from dataplane.desired import Rules
from dataplane.ipvs_guard import DELIVERED, DELIVERED_MASK, TABLE, Guard, text
from dataplane.ipvs_ledger import INSIDE_MARKS, Elements, Marks
from dataplane.model import Network, VirtualAddress, parse_address, parse_network
from dataplane.netlink_delivery import MarkedDelivery
from dataplane.netlink_ipvs import IpvsBackend
from dataplane.netlink_socket import NETLINK_NETFILTER, NETLINK_ROUTE, NetlinkSocket
from dataplane.nft_clients import Clients
from dataplane.plan import diff
from dataplane.reconciler import Reconciler

from .netns import NetNs, Topology, gateway
from .test_ipvs_guard import CIDRS, TCP, UDP, Answerer, ask, ping
from .words import at, server

VIPS = ("203.0.113.9", "2001:db8:9::9")
both_families = pytest.mark.parametrize("vip", VIPS)


def place(vip: str, port: int) -> str:
    return f"[{vip}]:{port}" if ":" in vip else f"{vip}:{port}"


# ------------------------------------------------------------------------------------------------------------- pure


def test_marks_are_given_once_and_again_when_free() -> None:
    marks = Marks()
    one, two = at("TCP 1.2.3.4:80 (inside)"), at("TCP 1.2.3.4:81 (inside)")
    marks.learn({one: INSIDE_MARKS[0]})
    assert marks.take(one) == INSIDE_MARKS[0]
    assert marks.take(two) == INSIDE_MARKS[1]
    marks.forget(one)
    assert (marks.of, marks.at) == ({two: INSIDE_MARKS[1]}, {INSIDE_MARKS[1]: two})
    marks.learn({two: INSIDE_MARKS[7]})
    assert marks.at == {INSIDE_MARKS[7]: two}


def test_marks_of_servers_are_no_marks_of_delivery() -> None:
    assert all(mark & DELIVERED_MASK != DELIVERED for mark in (INSIDE_MARKS[0], INSIDE_MARKS[-1]))
    written = text(Clients())
    assert {f"{DELIVERED:#010x}", f"{DELIVERED_MASK:#010x}", f"{INSIDE_MARKS[0] - 1:#010x}"} <= set(written.split())


# --------------------------------------------------------------------------------------------- rules, without IPVS


@pytest.fixture
def delivery(netns: NetNs) -> Iterator[MarkedDelivery]:
    with netns.enter(), NetlinkSocket(NETLINK_ROUTE) as sock:
        yield MarkedDelivery(sock, DELIVERED, DELIVERED_MASK)


def rules(ns: NetNs) -> list[str]:
    return [
        ns.run("ip", family, *what.split()).stdout
        for family in ("-4", "-6")
        for what in ("rule", "route show table all")
    ]


@pytest.mark.root
def test_delivery_is_made_once_repaired_and_taken_away(netns: NetNs, delivery: MarkedDelivery) -> None:
    before = rules(netns)
    assert not delivery.exists()
    assert delivery.ensure()
    assert delivery.exists()
    assert not delivery.ensure()
    whole = rules(netns)
    assert "87:\tfrom all fwmark 0xda600000/0xfff00000 lookup 8686 proto 86\n" in whole[0]
    assert "local default dev lo table 8686 proto 86 scope host" in whole[1]
    for damage in (
        "rule delete priority 87",
        "rule delete priority 86",
        "-6 rule delete priority 88",
        "-6 route flush table 8686",
    ):
        netns.run("ip", *damage.split())
        assert not delivery.exists(), damage
        assert delivery.ensure()
        assert rules(netns) == whole
    delivery.remove()
    delivery.remove()
    assert rules(netns) == before


@pytest.mark.root
def test_the_commands_of_a_delivery_make_the_same(netns: NetNs, delivery: MarkedDelivery) -> None:
    for tool, commands in delivery.commands():
        netns.run(*tool.split(), stdin=commands)
    assert delivery.exists()


@pytest.mark.root
def test_other_peoples_routing_rules_are_left_alone(netns: NetNs, delivery: MarkedDelivery) -> None:
    netns.ip(
        "rule add priority 87 fwmark 0xda600000/0xfff00000 lookup 8686", "rule add priority 5 fwmark 1 lookup main"
    )
    before = rules(netns)
    delivery.ensure()
    delivery.remove()
    assert rules(netns) == before


PROBE = """table inet probe {
	counter delivered {}
	counter odd {}
	chain input {
		type filter hook input priority -150; policy accept;
		ip daddr 203.0.113.9 udp dport 80 meta mark 0x11 counter name delivered
		ip6 daddr 2001:db8:9::9 udp dport 80 meta mark 0x11 counter name delivered
		meta mark != { 0, 0x11 } counter name odd
	}
	chain early {
		type filter hook prerouting priority -150; policy accept;
		ip daddr 203.0.113.9 meta mark set 0x11
		ip6 daddr 2001:db8:9::9 meta mark set 0x11
	}
}
"""


class Outside:
    """A node whose network leads on to an owner of VIPS, who answers there, and a client on the other side."""

    def __init__(self, topology: Topology, stack: ExitStack) -> None:
        self.topology = topology
        self.node, self.client = topology.node, topology.client
        self.pods = topology.pods
        for number, pod in enumerate(topology.pods[:2]):
            stack.callback(Answerer(pod.ns, f"pod{number}", 8080).close)
        owner = topology.pods[2]
        owner.ns.ip(*(f"address add {vip}/{128 if ':' in vip else 32} dev lo" for vip in VIPS))
        self.node.ip(f"route add {VIPS[0]} via {owner.v4}", f"route add {VIPS[1]} via {owner.v6}")
        for port in (80, 81, 8080):
            stack.callback(Answerer(owner.ns, "owner", port).close)
        for key in ("ipv4.icmp_ratelimit", "ipv6.icmp.ratelimit"):
            self.node.sysctl(key, 0)
        for ns in (self.node, self.client, *(pod.ns for pod in topology.pods)):
            ns.sysctl("ipv4.conf.all.accept_redirects", 0)
            ns.sysctl("ipv4.conf.all.send_redirects", 0)
        for pod in topology.pods:
            # pods reach each other through the node, as in most pod networks
            pod.ns.sysctl("ipv4.conf.eth0.accept_redirects", 0)
            pod.ns.sysctl("ipv6.conf.eth0.accept_redirects", 0)
            pod.ns.ip(
                "route add 10.244.0.1 dev eth0 scope link",
                "route delete 10.244.0.0/24 dev eth0",
                "route add fd00:244::1 dev eth0",
                "route delete fd00:244::/64 dev eth0",
            )
        for vip, own in zip(VIPS, owner.addresses, strict=True):  # datagrams are answered from there
            owner.ns.ip(
                f"route replace {gateway(own)} dev eth0 src {vip}",
                f"route replace default via {gateway(own)} src {vip}",
            )


@pytest.fixture(scope="module")
def outside() -> Iterator[Outside]:
    with Topology.build() as topology, ExitStack() as stack:
        yield Outside(topology, stack)


@contextlib.contextmanager
def guarded(outside: Outside, elements: Elements, **options: object) -> Iterator[Guard]:
    """The node's rules alone: what is delivered comes to the node itself."""
    with outside.node.enter(), ExitStack() as stack:
        clients = Clients(**options)  # type: ignore[arg-type]
        guard = Guard(stack.enter_context(NetlinkSocket(NETLINK_NETFILTER)), clients)
        delivery = MarkedDelivery(stack.enter_context(NetlinkSocket(NETLINK_ROUTE)), DELIVERED, DELIVERED_MASK)
        guard.ensure()
        assert guard.intact()
        delivery.ensure()
        guard.commit(elements, Elements())
        try:
            yield guard
        finally:
            guard.delete()
            delivery.remove()


def ours(port: int, *protocols: int) -> set[VirtualAddress]:
    return {VirtualAddress(protocol, parse_address(vip), port) for vip in VIPS for protocol in protocols}


@pytest.mark.root
@both_families
def test_only_our_ports_are_delivered_and_marks_are_as_before(outside: Outside, vip: str) -> None:
    outside.node.run("nft", "-f", "-", stdin=PROBE)
    try:
        with guarded(outside, Elements(external=ours(80, UDP))):
            assert ask(outside.client, vip, 81, UDP).startswith("owner ")
            assert ask(outside.client, vip, 81, TCP).startswith("owner ")
            assert ask(outside.client, vip, 80, TCP).startswith("owner ")
            assert ping(outside.client, vip) == "echo"
            counters = outside.node.run("nft", "list", "counters", "table", "inet", "probe").stdout
            assert counters.count("packets 0 ") == 2
            # nobody listens on the node, and for IPv4 it has no address from which to say so
            assert ask(outside.client, vip, 80, UDP, patience=1) == ("refused" if ":" in vip else "nothing")
            counters = outside.node.run("nft", "list", "counters", "table", "inet", "probe").stdout
            assert "packets 1 " in counters
            assert counters.count("packets 0 ") == 1
    finally:
        outside.node.run("nft", "delete", "table", "inet", "probe")


@pytest.mark.root
@both_families
@pytest.mark.parametrize("who", ["client", "node", "pod"])
def test_a_server_without_endpoints_refuses_at_once(outside: Outside, vip: str, who: str) -> None:
    ns = {"client": outside.client, "node": outside.node, "pod": outside.pods[0].ns}[who]
    with guarded(outside, Elements(external=ours(80, TCP, UDP), refused=ours(80, TCP, UDP))):
        for protocol in (TCP, UDP):
            # a datagram of a process of the node is not taken (EPERM)
            assert ask(ns, vip, 80, protocol) == ("nothing" if (who, protocol) == ("node", UDP) else "refused")
            assert ask(ns, vip, 81, protocol).startswith("owner ")


@pytest.mark.root
@both_families
def test_source_ranges_come_first(outside: Outside, vip: str) -> None:
    ranges: dict[VirtualAddress, tuple[Network, ...]] = {
        each: (parse_network("10.244.0.0/24" if len(each.address) == 4 else "fd00:244::/64"),)
        for each in ours(80, TCP, UDP)
    }
    with guarded(outside, Elements(ranged=set(ranges), allowed=ranges, refused=ours(80, UDP), external=ours(80, UDP))):
        assert ask(outside.client, vip, 80, TCP, patience=1.5) == "nothing"
        assert ask(outside.client, vip, 80, UDP, patience=1) == "nothing"
        assert ask(outside.client, vip, 81, TCP).startswith("owner ")
        assert ask(outside.node, vip, 80, TCP).startswith("owner ")  # from the pods' gateway
        assert ask(outside.pods[0].ns, vip, 80, TCP).startswith("owner ")
        assert ask(outside.pods[0].ns, vip, 80, UDP) == "refused"


@pytest.mark.root
@both_families
@pytest.mark.parametrize("who", ["client", "node", "pod"])
def test_what_no_service_has_of_the_service_cidrs_is_dropped(outside: Outside, vip: str, who: str) -> None:
    ns = {"client": outside.client, "node": outside.node, "pod": outside.pods[0].ns}[who]
    cidrs = (parse_network("203.0.113.0/24"), parse_network("2001:db8:9::/48"))
    with guarded(outside, Elements(), service_cidrs=cidrs):
        assert ask(ns, vip, 80, TCP, patience=1.5) == "nothing"
        assert ask(ns, vip, 80, UDP, patience=1) == "nothing"
        own = outside.topology.node_addresses[":" in vip]
        assert ping(ns, own) == "echo"


# ------------------------------------------------------------------------------------------------------ with IPVS


class Node:
    """ipvs mode on that node."""

    def __init__(self, outside: Outside, backend: IpvsBackend) -> None:
        self.outside, self.backend = outside, backend

    def holds(self, *lines: str) -> None:
        """Program exactly these servers."""
        with self.outside.node.enter():
            wanted = {one.at: self.backend.express(one) for one in map(server, lines)}
            held = self.backend.observe()
            plan = diff(held, wanted)
            outcome = self.backend.commit(self.backend.compile(plan))
            assert (outcome.failed, outcome.unsure) == ({}, frozenset())
            assert not diff(self.backend.observe(), wanted)
            assert self.backend.suspects(self.backend.observe()) == set()
            assert self.backend.intact()


@pytest.fixture
def node(outside: Outside) -> Iterator[Node]:
    with outside.node.enter():
        backend = open_backend("ipvs", Options(cluster_cidrs=CIDRS))
        assert isinstance(backend, IpvsBackend)
        backend.prepare()
        try:
            yield Node(outside, backend)
        finally:
            backend.remove()
            backend.close()
        assert outside.node.run("ipvsadm", "-S", "-n").stdout == ""
        assert "da6" not in outside.node.run("ip", "rule").stdout


def reals(vip: str, *numbers: int) -> str:
    return ", ".join(f"[fd00:244::1{n}]:8080 here" if ":" in vip else f"10.244.0.1{n}:8080 here" for n in numbers)


def masqueraded(vip: str) -> str:
    """Who a pod sees then."""
    return "fd00:244::1" if ":" in vip else "10.244.0.1"


def own_address(outside: Outside, vip: str, pod: int) -> str:
    return outside.pods[pod].v6 if ":" in vip else outside.pods[pod].v4


@pytest.mark.ipvs
@both_families
def test_a_load_balancers_address_is_served_though_it_is_not_bound(outside: Outside, node: Node, vip: str) -> None:
    assert ask(outside.client, vip, 80).startswith("owner ")
    node.holds(
        f"TCP {place(vip, 80)} LoadBalancer always label=a/b -> {reals(vip, 0, 1)}",
        f"UDP {place(vip, 80)} LoadBalancer always label=a/b -> {reals(vip, 0, 1)}",
    )
    for protocol in (TCP, UDP):
        for ns in (outside.client, outside.node, outside.pods[2].ns):
            if ns is outside.pods[2].ns:
                continue  # the address is its own
            seen = {ask(ns, vip, 80, protocol) for _ in range(4)}
            assert seen == {f"pod0 {masqueraded(vip)}", f"pod1 {masqueraded(vip)}"}, (ns.name, protocol)
        assert ask(outside.pods[0].ns, vip, 80, protocol).endswith(masqueraded(vip))
        for ns in (outside.client, outside.node, outside.pods[0].ns):
            assert ask(ns, vip, 81, protocol).startswith("owner ")
    assert ping(outside.client, vip) == "echo"
    assert vip not in outside.node.run("ip", "address").stdout


@pytest.mark.ipvs
@both_families
def test_policy_local_outside_inside_and_on_the_node(outside: Outside, node: Node, vip: str) -> None:
    own = outside.topology.node_addresses[":" in vip]
    for protocol in ("TCP", "UDP"):
        node.holds(
            f"{protocol} {place(vip, 80)} LoadBalancer node label=a/b -> {reals(vip, 0)}",
            f"{protocol} {place(vip, 80)} (inside) LoadBalancer node label=a/b -> {reals(vip, 0, 1)}",
            f"{protocol} {place(own, 30080)} NodePort node drop label=a/b",
            f"{protocol} {place(own, 30080)} (inside) NodePort node label=a/b -> {reals(vip, 0, 1)}",
        )
        number = TCP if protocol == "TCP" else UDP
        me = outside.topology.client_addresses[":" in vip]
        assert {ask(outside.client, vip, 80, number) for _ in range(4)} == {f"pod0 {me}"}
        assert ask(outside.client, own, 30080, number, patience=1.5) == "nothing"
        pod1 = own_address(outside, vip, 1)
        for target, port in ((vip, 80), (own, 30080)):
            seen = {ask(outside.pods[1].ns, target, port, number) for _ in range(4)}
            assert seen == {f"pod0 {pod1}", f"pod1 {masqueraded(vip)}"}  # itself by a masqueraded address
            seen = {ask(outside.node, target, port, number) for _ in range(4)}
            assert seen == {f"pod0 {masqueraded(vip)}", f"pod1 {masqueraded(vip)}"}
    table = outside.node.run("ipvsadm", "-l", "-n").stdout
    assert table.count("FWM ") == 2


@pytest.mark.ipvs
@both_families
def test_an_endpoint_with_the_nodes_network(outside: Outside, node: Node, vip: str) -> None:
    """A process of the node reaches a process of the node by an address that is routed elsewhere."""
    own = outside.topology.node_addresses[":" in vip]
    answerer = Answerer(outside.node, "host", 2222)
    host, inside = f"{place(own, 2222)} here", f"TCP {place(vip, 80)} (inside) LoadBalancer node label=a/b"
    try:
        node.holds(f"TCP {place(vip, 80)} LoadBalancer node label=a/b -> {host}")
        for ns in (outside.node, outside.pods[0].ns, outside.client):
            assert ask(ns, vip, 80).startswith("host "), ns.name
        node.holds(f"TCP {place(vip, 80)} LoadBalancer node drop label=a/b", f"{inside} -> {host}")
        for ns in (outside.node, outside.pods[0].ns):
            assert ask(ns, vip, 80).startswith("host "), ns.name
        assert ask(outside.client, vip, 80, patience=1.5) == "nothing"
    finally:
        answerer.close()


@pytest.mark.ipvs
@both_families
@pytest.mark.parametrize("verdict", ["drop", ""])
def test_no_endpoints(outside: Outside, node: Node, vip: str, verdict: str) -> None:
    own = outside.topology.node_addresses[":" in vip]
    node.holds(
        *(
            f"{protocol} {place(address, port)} {kind} always {verdict} label=a/b"
            for protocol in ("TCP", "UDP")
            for address, port, kind in ((vip, 80, "ExternalIP"), (own, 30080, "NodePort"))
        )
    )
    for ns in (outside.client, outside.node, outside.pods[0].ns):
        for target, port in ((vip, 80), (own, 30080)):
            for protocol in (TCP, UDP):
                # a datagram of a process of the node is not even taken (EPERM)
                taken = not (ns is outside.node and protocol == UDP)
                wanted = "refused" if taken and not verdict else "nothing"
                met = ask(ns, target, port, protocol, patience=1.5 if verdict else 4)
                assert met == wanted, (ns.name, target, protocol)


@pytest.mark.ipvs
@both_families
def test_affinity_of_clients_inside(outside: Outside, node: Node, vip: str) -> None:
    node.holds(
        f"TCP {place(vip, 80)} sticky=600 LoadBalancer node label=a/b -> {reals(vip, 0)}",
        f"TCP {place(vip, 80)} (inside) sticky=600 LoadBalancer node label=a/b -> {reals(vip, 0, 1)}",
    )
    for ns in (outside.node, outside.pods[0].ns, outside.pods[1].ns):
        assert len({ask(ns, vip, 80).split()[0] for _ in range(6)}) == 1


# --------------------------------------------------------------------------------------------------------- damage

SERVERS = (
    "TCP 10.0.0.1:80 rr label=a/b:http -> 10.1.0.1:80 here, 10.1.0.2:80",
    "TCP 192.168.0.2:30080 rr NodePort always label=a/b:http -> 10.1.0.1:80 here, 10.1.0.2:80",
    "TCP 1.2.3.4:80 rr LoadBalancer node from=10.0.0.0/8+203.0.113.0/25 label=a/b:http -> 10.1.0.1:80 here",
    "TCP 1.2.3.4:80 (inside) rr LoadBalancer node label=a/b:http -> 10.1.0.1:80 here, 10.1.0.2:80",
    "TCP 1.2.3.5:80 rr LoadBalancer node drop label=a/c",
    "TCP 1.2.3.6:80 rr ExternalIP always label=a/d",
    "UDP [2001:db8::9]:53 rr LoadBalancer node from=2001:db8::/32 label=a/e -> [fd00:1::1]:53",
    "UDP [2001:db8::9]:53 (inside) rr LoadBalancer node label=a/e -> [fd00:1::2]:53",
)
STRANGER, OURS = "9.9.9.9 . tcp . 80", "1.2.3.4 . tcp . 80"
DAMAGE = [
    *(
        f"flush set inet {TABLE} {kind}{family}"
        for kind in ("vips", "servers", "external", "refused", "dropped", "ranged", "allowed", "inside", "hairpin")
        for family in (4, 6)
    ),
    *(f"flush map inet {TABLE} {kind}{family}" for kind in ("inside_marks", "exceptions") for family in (4, 6)),
    *(
        f"add element inet {TABLE} {kind}4 {{ {STRANGER} }}"
        for kind in ("servers", "external", "refused", "dropped", "ranged", "inside")
    ),
    f"add element inet {TABLE} allowed4 {{ {STRANGER} . 10.0.0.0/8 }}",
    f"add element inet {TABLE} inside_marks4 {{ {STRANGER} : 0xda7fffff }}",
    f"add element inet {TABLE} exceptions4 {{ {STRANGER} : drop }}",
    f"add element inet {TABLE} refused4 {{ {OURS} }}",
    f"add element inet {TABLE} dropped4 {{ {OURS} }}",
    f"add element inet {TABLE} allowed4 {{ {OURS} . 99.0.0.0/8 }}",
    f"delete element inet {TABLE} exceptions4 {{ {OURS} }}\nadd element inet {TABLE} exceptions4 {{ {OURS} : drop }}",
    f"delete table inet {TABLE}",
]


@pytest.mark.ipvs
def test_whatever_is_damaged_is_as_before_after_one_look(netns: NetNs) -> None:
    def picture() -> list[str]:
        told = [
            netns.run(*what.split()).stdout
            for what in ("nft -s list ruleset", "ipvsadm -S -n", "ip rule", "ip -6 rule")
        ]
        return sorted(re.findall(r"[^\s,{}]+", "\n".join(told)))

    with netns.enter():
        backend = open_backend("ipvs")
        reconciler = Reconciler(backend, Rules())
        reconciler.desired.servers = {one.at: one for one in map(server, SERVERS)}
        backend.prepare()
        backend.monitors()
        assert reconciler.sync("start").result == "committed"
        assert reconciler.verify("look").result == "unchanged"
        assert not backend.disturbed()
        whole = picture()
        for damage in (*DAMAGE, "rule delete priority 87", "-6 route flush table 8686"):
            if damage.startswith(("rule", "-6")):
                netns.run("ip", *damage.split())
            else:
                netns.run("nft", "-f", "-", stdin=damage + "\n")
            assert backend.disturbed() or picture() == whole, damage  # there may have been nothing in it
            reconciler.verify("look")
            assert picture() == whole, damage
            assert reconciler.verify("look").result == "unchanged", damage
        another = open_backend("ipvs")
        assert another.prepare() == ()
        assert another.observe().servers == reconciler.held.servers
        another.close()
        backend.remove()
        assert netns.run("ipvsadm", "-S", "-n").stdout == ""
        assert "8686" not in netns.run("ip", "rule").stdout
        backend.close()
