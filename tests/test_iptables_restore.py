"""iptables mode against the real programs, both back ends: the tutorial's lines, damage, strangers, locks, refusals."""

import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dataplane import iptables_chains, iptables_script, iptables_text, run_iptables
from dataplane.backend import Backend, Options
from dataplane.errors import KernelError, PreflightError, ToolError, Unanswered
from dataplane.iptables_restore import IptablesBackend, open_beside
from dataplane.iptables_text import MARKER, chain_name
from dataplane.model import Masquerade, VirtualServer, parse_network
from dataplane.plan import State, diff
from dataplane.run_tool import PIPE_BYTES, run_tool

from .netns import NetNs
from .words import at, server, shown

pytestmark = pytest.mark.root

TUTORIAL = "TCP 10.0.1.175:80 rr label=default/hostnames -> 10.244.1.7:9376, 10.244.2.3:9376, 10.244.3.6:9376"
# kubernetes.io, Debug Services (of the time of `iptables-save | grep hostnames`), in iptables-save's order of chains
GOLDEN = """\
-A KUBE-SEP-57KPRZ3JQVENLNBR -s 10.244.3.6/32 -m comment --comment "default/hostnames:" -j MARK --set-xmark 0x4000/0x4000
-A KUBE-SEP-57KPRZ3JQVENLNBR -p tcp -m comment --comment "default/hostnames:" -m tcp -j DNAT --to-destination 10.244.3.6:9376
-A KUBE-SEP-WNBA2IHDGP2BOBGZ -s 10.244.1.7/32 -m comment --comment "default/hostnames:" -j MARK --set-xmark 0x4000/0x4000
-A KUBE-SEP-WNBA2IHDGP2BOBGZ -p tcp -m comment --comment "default/hostnames:" -m tcp -j DNAT --to-destination 10.244.1.7:9376
-A KUBE-SEP-X3P2623AGDH6CDF3 -s 10.244.2.3/32 -m comment --comment "default/hostnames:" -j MARK --set-xmark 0x4000/0x4000
-A KUBE-SEP-X3P2623AGDH6CDF3 -p tcp -m comment --comment "default/hostnames:" -m tcp -j DNAT --to-destination 10.244.2.3:9376
-A KUBE-SERVICES -d 10.0.1.175/32 -p tcp -m comment --comment "default/hostnames: cluster IP" -m tcp --dport 80 -j KUBE-SVC-NWV5X2332I4OT4T3
-A KUBE-SVC-NWV5X2332I4OT4T3 -m comment --comment "default/hostnames:" -m statistic --mode random --probability 0.33332999982 -j KUBE-SEP-WNBA2IHDGP2BOBGZ
-A KUBE-SVC-NWV5X2332I4OT4T3 -m comment --comment "default/hostnames:" -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-X3P2623AGDH6CDF3
-A KUBE-SVC-NWV5X2332I4OT4T3 -m comment --comment "default/hostnames:" -j KUBE-SEP-57KPRZ3JQVENLNBR
"""  # noqa: E501
CURRENT = """\
-A KUBE-SEP-0123456789ABCDEF -s 10.244.1.7/32 -m comment --comment "default/hostnames" -j KUBE-MARK-MASQ
-A KUBE-SEP-0123456789ABCDEF -p tcp -m comment --comment "default/hostnames" -m tcp -j DNAT --to-destination 10.244.1.7:9376
-A KUBE-SERVICES -d 10.0.1.175/32 -p tcp -m comment --comment "default/hostnames cluster IP" -m tcp --dport 80 -j KUBE-SVC-YN5D6RYVEVZOH44Q
-A KUBE-SVC-YN5D6RYVEVZOH44Q ! -s 10.244.0.0/16 -d 10.0.1.175/32 -p tcp -m comment --comment "default/hostnames cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ
-A KUBE-SVC-YN5D6RYVEVZOH44Q -m comment --comment "default/hostnames -> 10.244.1.7:9376" -j KUBE-SEP-0123456789ABCDEF
""".replace("0123456789ABCDEF", "IQV2T7WZFFJMSXMA")  # noqa: E501

NODE_PORT_AND_LOAD_BALANCER = [
    "TCP 172.30.0.42:80 label=ns2/svc2:p80 sticky=300 -> 10.180.0.1:80, 10.180.0.2:80",
    "TCP 192.168.0.2:31001 NodePort node label=ns2/svc2:p80 sticky=300 -> 10.180.0.1:80",
    "TCP 192.168.0.2:31001 (inside) NodePort node label=ns2/svc2:p80 sticky=300 -> 10.180.0.1:80, 10.180.0.2:80",
    "TCP 1.2.3.4:80 LoadBalancer node from=203.0.113.0/25 label=ns2/svc2:p80 sticky=300 -> 10.180.0.1:80",
    "TCP 1.2.3.4:80 (inside) LoadBalancer node label=ns2/svc2:p80 sticky=300 -> 10.180.0.1:80, 10.180.0.2:80",
    "TCP 192.168.99.33:80 ExternalIP always drop label=ns4/svc4:p80",
    "TCP 5.6.7.8:80 LoadBalancer always from=203.0.113.0/25 label=ns5/svc5:p80",
]
# reference/kube_proxy.md, section 5; but the rule of KUBE-NODEPORTS names its address, that of KUBE-EXTERNAL-SERVICES
# the kind, and a firewall that stands where there is no endpoint lets those through who are to be refused
EXTERNAL_NAT = """\
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-EXT-GNZBNJ2PO5MGZ6GT -s 10.0.0.0/8 -m comment --comment "pod traffic for ns2/svc2:p80 external destinations" -j KUBE-SVC-GNZBNJ2PO5MGZ6GT
-A KUBE-EXT-GNZBNJ2PO5MGZ6GT -m comment --comment "masquerade LOCAL traffic for ns2/svc2:p80 external destinations" -m addrtype --src-type LOCAL -j KUBE-MARK-MASQ
-A KUBE-EXT-GNZBNJ2PO5MGZ6GT -m comment --comment "route LOCAL traffic for ns2/svc2:p80 external destinations" -m addrtype --src-type LOCAL -j KUBE-SVC-GNZBNJ2PO5MGZ6GT
-A KUBE-EXT-GNZBNJ2PO5MGZ6GT -j KUBE-SVL-GNZBNJ2PO5MGZ6GT
-A KUBE-FW-GNZBNJ2PO5MGZ6GT -s 203.0.113.0/25 -m comment --comment "ns2/svc2:p80 loadbalancer IP" -j KUBE-EXT-GNZBNJ2PO5MGZ6GT
-A KUBE-FW-GNZBNJ2PO5MGZ6GT -m comment --comment "other traffic to ns2/svc2:p80 will be dropped by KUBE-PROXY-FIREWALL"
-A KUBE-NODEPORTS -d 192.168.0.2/32 -p tcp -m comment --comment "ns2/svc2:p80" -m tcp --dport 31001 -j KUBE-EXT-GNZBNJ2PO5MGZ6GT
-A KUBE-SEP-FKDX4UEXGN6O6BS2 -s 10.180.0.1/32 -m comment --comment "ns2/svc2:p80" -j KUBE-MARK-MASQ
-A KUBE-SEP-FKDX4UEXGN6O6BS2 -p tcp -m comment --comment "ns2/svc2:p80" -m recent --set --name KUBE-SEP-FKDX4UEXGN6O6BS2 --mask 255.255.255.255 --rsource -m tcp -j DNAT --to-destination 10.180.0.1:80
-A KUBE-SEP-RS4RBKLTHTF2IUXJ -s 10.180.0.2/32 -m comment --comment "ns2/svc2:p80" -j KUBE-MARK-MASQ
-A KUBE-SEP-RS4RBKLTHTF2IUXJ -p tcp -m comment --comment "ns2/svc2:p80" -m recent --set --name KUBE-SEP-RS4RBKLTHTF2IUXJ --mask 255.255.255.255 --rsource -m tcp -j DNAT --to-destination 10.180.0.2:80
-A KUBE-SERVICES -d 1.2.3.4/32 -p tcp -m comment --comment "ns2/svc2:p80 loadbalancer IP" -m tcp --dport 80 -j KUBE-FW-GNZBNJ2PO5MGZ6GT
-A KUBE-SERVICES -d 172.30.0.42/32 -p tcp -m comment --comment "ns2/svc2:p80 cluster IP" -m tcp --dport 80 -j KUBE-SVC-GNZBNJ2PO5MGZ6GT
-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-SVC-GNZBNJ2PO5MGZ6GT ! -s 10.0.0.0/8 -d 172.30.0.42/32 -p tcp -m comment --comment "ns2/svc2:p80 cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ
-A KUBE-SVC-GNZBNJ2PO5MGZ6GT -m comment --comment "ns2/svc2:p80 -> 10.180.0.1:80" -m recent --rcheck --seconds 300 --reap --name KUBE-SEP-FKDX4UEXGN6O6BS2 --mask 255.255.255.255 --rsource -j KUBE-SEP-FKDX4UEXGN6O6BS2
-A KUBE-SVC-GNZBNJ2PO5MGZ6GT -m comment --comment "ns2/svc2:p80 -> 10.180.0.2:80" -m recent --rcheck --seconds 300 --reap --name KUBE-SEP-RS4RBKLTHTF2IUXJ --mask 255.255.255.255 --rsource -j KUBE-SEP-RS4RBKLTHTF2IUXJ
-A KUBE-SVC-GNZBNJ2PO5MGZ6GT -m comment --comment "ns2/svc2:p80 -> 10.180.0.1:80" -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-FKDX4UEXGN6O6BS2
-A KUBE-SVC-GNZBNJ2PO5MGZ6GT -m comment --comment "ns2/svc2:p80 -> 10.180.0.2:80" -j KUBE-SEP-RS4RBKLTHTF2IUXJ
-A KUBE-SVL-GNZBNJ2PO5MGZ6GT -m comment --comment "ns2/svc2:p80 -> 10.180.0.1:80" -m recent --rcheck --seconds 300 --reap --name KUBE-SEP-FKDX4UEXGN6O6BS2 --mask 255.255.255.255 --rsource -j KUBE-SEP-FKDX4UEXGN6O6BS2
-A KUBE-SVL-GNZBNJ2PO5MGZ6GT -m comment --comment "ns2/svc2:p80 -> 10.180.0.1:80" -j KUBE-SEP-FKDX4UEXGN6O6BS2
"""  # noqa: E501
EXTERNAL_FILTER = """\
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A KUBE-CLUSTER-IPS -d 172.30.0.42/32 -j REJECT --reject-with icmp-port-unreachable
-A KUBE-CLUSTER-IPS -d 172.30.0.0/16 -m comment --comment "unallocated cluster IPs" -j DROP
-A KUBE-EXTERNAL-SERVICES -d 5.6.7.8/32 -p tcp -m comment --comment "ns5/svc5:p80 loadbalancer IP has no endpoints" -m tcp --dport 80 -j REJECT --reject-with icmp-port-unreachable
-A KUBE-EXTERNAL-SERVICES -d 192.168.99.33/32 -p tcp -m comment --comment "ns4/svc4:p80 external IP has no local endpoints" -m tcp --dport 80 -j DROP
-A KUBE-FW-NUKIZ6OKUXPJNT4C -s 203.0.113.0/25 -j RETURN
-A KUBE-FW-NUKIZ6OKUXPJNT4C -j DROP
-A KUBE-PROXY-FIREWALL -d 5.6.7.8/32 -p tcp -m comment --comment "ns5/svc5:p80 traffic not accepted by KUBE-FW-NUKIZ6OKUXPJNT4C" -m tcp --dport 80 -j KUBE-FW-NUKIZ6OKUXPJNT4C
-A KUBE-PROXY-FIREWALL -d 1.2.3.4/32 -p tcp -m comment --comment "ns2/svc2:p80 traffic not accepted by KUBE-FW-GNZBNJ2PO5MGZ6GT" -m tcp --dport 80 -j DROP
-A KUBE-SERVICES -m conntrack ! --ctstate DNAT -m comment --comment "closed ports of cluster IPs" -j KUBE-CLUSTER-IPS
"""  # noqa: E501


@dataclass(frozen=True)
class Place:
    """A namespace and one of the two back ends."""

    ns: NetNs
    tool: str

    def open(self, **options: object) -> IptablesBackend:
        return IptablesBackend(Options(iptables_tool=self.tool, **options))  # type: ignore[arg-type]

    def save(self, *arguments: str, family: str = "ip") -> str:
        text = self.ns.run(f"{family}tables-{self.tool}-save", *arguments).stdout
        return "".join(line + "\n" for line in text.splitlines() if not line.startswith("#"))

    def nat(self, word: str = "", family: str = "ip") -> str:
        text = self.save("-t", "nat", family=family)
        return "".join(f"{line}\n" for line in text.splitlines() if line.startswith("-A") and word in line)

    def restore(self, text: str, family: str = "ip") -> None:
        self.ns.run(f"{family}tables-{self.tool}-restore", "--noflush", "-w", "5", stdin=text)


@pytest.fixture(params=["legacy", "nft"])
def place(request: pytest.FixtureRequest, netns: NetNs) -> Iterator[Place]:
    with netns.enter():
        yield Place(netns, request.param)


def bring(backend: Backend, *wanted: VirtualServer | str) -> State:
    """Take the backend to these servers, and be sure that it holds exactly them."""
    aim = [backend.express(server(one) if isinstance(one, str) else one) for one in wanted]
    plan = diff(backend.observe(), {one.at: one for one in aim})
    outcome = backend.commit(backend.compile(plan))
    assert (outcome.failed, outcome.unsure) == ({}, frozenset())
    state = backend.observe()
    assert sorted(map(shown, state.servers.values())) == sorted(map(shown, aim))
    assert not diff(state, {one.at: one for one in aim})
    assert backend.intact()
    return state


def test_the_tutorials_lines_come_out_of_iptables_save(place: Place) -> None:
    backend = place.open()
    backend.prepare()
    bring(backend, TUTORIAL)
    assert place.nat("hostnames") == GOLDEN
    assert place.nat("-A KUBE-MARK-MASQ") == "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n"
    assert place.nat("-A PREROUTING") == (
        '-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES\n'
    )


def test_the_current_form_is_kube_proxys(place: Place) -> None:
    backend = place.open(iptables_compat="current", cluster_cidrs=(parse_network("10.244.0.0/16"),))
    backend.prepare()
    bring(backend, "TCP 10.0.1.175:80 rr label=default/hostnames -> 10.244.1.7:9376")
    assert place.nat("hostnames") == CURRENT


def test_node_ports_and_load_balancers_are_kube_proxys(place: Place) -> None:
    cidrs = {"cluster_cidrs": (parse_network("10.0.0.0/8"),), "service_cidrs": (parse_network("172.30.0.0/16"),)}
    backend = place.open(iptables_compat="current", **cidrs)
    backend.prepare()
    for count in range(len(NODE_PORT_AND_LOAD_BALANCER)):  # the latest is on top
        bring(backend, *NODE_PORT_AND_LOAD_BALANCER[: count + 1])
    fixed = ("KUBE-DATAPLANE", "KUBE-MARK", "KUBE-POST")
    for table, lines in (("nat", EXTERNAL_NAT), ("filter", EXTERNAL_FILTER)):
        rules = [line for line in place.save("-t", table).splitlines() if line.startswith("-A")]
        assert [
            line for line in rules if not line.startswith(tuple(f"-A {one}" for one in fixed))
        ] == lines.splitlines()


def test_another_form_or_other_options_rewrite_what_is_there(place: Place) -> None:
    old = place.open()
    old.prepare()
    bring(old, TUTORIAL)
    for options in (
        {"iptables_compat": "current"},
        {"iptables_compat": "current", "masquerade_all": True},
        {"cluster_cidrs": (parse_network("10.1.0.0/16"), parse_network("10.2.0.0/16"))},
        {},
    ):
        backend = place.open(**options)
        backend.prepare()
        bring(backend, TUTORIAL)
    assert place.nat("hostnames") == GOLDEN
    assert place.save().count(":KUBE-S") == 6  # KUBE-SERVICES in both tables, one SVC, three SEP: no chain is left over


@pytest.mark.parametrize("compat", ["classic", "current"])
def test_random_changes_always_read_back(place: Place, compat: str) -> None:
    options = {"cluster_cidrs": (parse_network("10.1.0.0/16"),), "service_cidrs": (parse_network("10.0.0.0/24"),)}
    backend = place.open(iptables_compat=compat, **options)
    backend.prepare()
    before = place.save(), place.save(family="ip6")
    rng = random.Random(f"{compat}{place.tool}")
    pool: dict[str, VirtualServer] = {}
    for _ in range(12):
        for _ in range(rng.randint(1, 30)):
            six = rng.random() < 0.3
            kind = rng.choice(("", "", " NodePort", " ExternalIP", " LoadBalancer"))
            net = {"": 0, " NodePort": 1, " ExternalIP": 2, " LoadBalancer": 3}[kind]
            host = f"[fd00:{net}::{rng.randint(1, 9)}]" if six else f"10.0.{net}.{rng.randint(1, 9)}"
            where = f"{rng.choice(('TCP', 'UDP', 'SCTP'))} {host}:{rng.choice((80, 443))}"
            if rng.random() < 0.3:
                pool.pop(where, None)
                pool.pop(f"{where} (inside)", None)
                continue
            ends = {
                f"[fd00:a::{n}]:80" if six else f"10.1.0.{n}:80" for n in rng.sample(range(1, 40), rng.randint(0, 6))
            }
            reals = ", ".join(f"{end} w{rng.choice((1, 1, 1, 0, 3, 65535))}" for end in sorted(ends))
            words = rng.choice(("rr", "wlc", "rr drop", "rr sticky=300", "rr flags=8"))
            if kind and rng.random() < 0.3:
                words += " from=fd00:b::/64+fd00:c::1" if six else " from=203.0.113.0/25+192.0.2.1"
            label = rng.choice(
                ("", " label=a/b", " label=a/c:p", f" label=n/{where.split()[0]}")
            )  # twice the same, too
            one = server(f"{where} {words}{kind}{label}" + (f" -> {reals}" if reals else ""))
            pool[where] = msgspec.structs.replace(one, masquerade=rng.choice(list(Masquerade)))
            pool.pop(f"{where} (inside)", None)
            if kind and rng.random() < 0.4:
                everywhere = "[fd00:a::99]:80, [fd00:a::98]:80" if six else "10.1.0.99:80, 10.1.0.98:80"
                pool[f"{where} (inside)"] = server(f"{where} (inside) {words}{kind}{label} -> {everywhere}")
        bring(backend, *pool.values())
    fresh = place.open(iptables_compat=compat, **options)
    assert fresh.intact()
    assert fresh.observe().servers == backend.observe().servers
    bring(backend)
    assert (place.save(), place.save(family="ip6")) == before


def test_a_change_of_endpoints_sends_the_changed_chains_only(place: Place) -> None:
    backend = place.open()
    backend.prepare()
    many = [f"TCP 10.0.{n // 200}.{n % 200}:80 rr label=n/s{n} -> 10.1.0.1:80, 10.1.0.2:80" for n in range(300)]
    bring(backend, *many)
    aim = {one.at: backend.express(one) for one in map(server, [many[0].replace("0.2:80", "0.3:80"), *many[1:]])}
    text = str(backend.compile(diff(backend.observe(), aim)))
    assert len(text.splitlines()) < 20
    assert "n/s0" in text
    assert "n/s1" not in text
    assert "KUBE-SERVICES" not in text


def test_counters_go_on_when_chains_are_written_anew(place: Place) -> None:
    backend = place.open()
    backend.prepare()
    bring(backend, TUTORIAL)
    sep = chain_name("SEP", "default/hostnames:tcp10.244.1.7:9376")
    rule = GOLDEN.splitlines()[3]
    place.ns.run(
        f"iptables-{place.tool}-restore", "--noflush", "--counters",
        stdin=f"*nat\n:{sep} - [0:0]\n{GOLDEN.splitlines()[2]}\n[41:2460] {rule}\nCOMMIT\n",
    )  # fmt: skip

    def count() -> int:
        one = next(each for each in backend.report() if each.server.label)
        return one.connections

    assert count() == 41
    bring(backend, TUTORIAL.replace("10.244.2.3", "10.244.2.4"))  # other endpoints
    assert count() == 41
    bring(backend, TUTORIAL.replace("rr", "rr sticky=60"))  # the very chain
    assert count() == 41
    bring(backend, TUTORIAL, "TCP 10.0.0.1:80 rr")
    assert count() == 41
    place.ns.run(f"iptables-{place.tool}", "-t", "nat", "-Z")
    assert count() == 41  # nor when somebody zeroes them


FOREIGN = """\
*nat
:DOCKER - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A DOCKER -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
-A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE
COMMIT
*filter
:KUBE-FIREWALL - [0:0]
-A INPUT -j KUBE-FIREWALL
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections" -j DROP
-A FORWARD -i docker0 -j ACCEPT
COMMIT
*mangle
-A PREROUTING -p tcp -m tcp --dport 22 -j MARK --set-xmark 0x1/0x1
COMMIT
"""


def test_strangers_rules_stay_before_during_and_after(place: Place) -> None:
    place.restore(FOREIGN)
    before = place.save()
    backend = place.open()
    backend.prepare()
    bring(backend, TUTORIAL, "TCP 10.0.0.1:80 rr")
    mine = ("KUBE-SVC", "KUBE-SEP", *iptables_text.FIXED_CHAINS)
    during = [line for line in place.save().splitlines() if not any(word in line for word in mine)]
    assert during == before.splitlines()
    backend.remove()
    assert place.save() == before
    backend.remove()


def test_a_chain_of_ours_that_somebody_uses_is_emptied_and_stays(place: Place) -> None:
    backend = place.open()
    backend.prepare()
    bring(backend, TUTORIAL)
    place.restore("*nat\n-A OUTPUT -d 192.0.2.9/32 -j KUBE-MARK-MASQ\nCOMMIT\n")
    backend.remove()
    assert place.nat() == "-A OUTPUT -d 192.0.2.9/32 -j KUBE-MARK-MASQ\n"


def test_another_kube_proxys_chains_are_named_and_left_alone(place: Place) -> None:
    place.restore(
        "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-NWV5X2332I4OT4T3 - [0:0]\n"
        "-A KUBE-SERVICES -d 10.0.1.175/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-NWV5X2332I4OT4T3\nCOMMIT\n"
    )
    before = place.save()
    backend = place.open()
    assert not backend.intact()
    assert backend.observe().servers == {}
    with pytest.raises(PreflightError, match=r"chains of a kube-proxy.*KUBE-SERVICES, KUBE-SVC-NWV5X2332I4OT4T3"):
        backend.prepare()
    backend.remove()
    assert place.save() == before


DAMAGE = {
    "the nat table flushed": "-t nat -F",
    "everything in nat deleted": "-t nat -F;-t nat -X",
    "the filter table flushed": "-t filter -F;-t filter -X",
    "a jump removed": "-t nat -D PREROUTING 1",
    "a shared chain flushed": "-t nat -F KUBE-SERVICES",
    "the masquerade flushed": "-t nat -F KUBE-POSTROUTING",
    "the marker flushed": "-t nat -F KUBE-DATAPLANE",
    "a Service's chain flushed": "-t nat -F KUBE-SVC-NWV5X2332I4OT4T3",
    "an endpoint's chain flushed": "-t nat -F KUBE-SEP-57KPRZ3JQVENLNBR",
    "a rule on top of a Service's chain": "-t nat -I KUBE-SVC-NWV5X2332I4OT4T3 -j RETURN",
    "a rule in a shared chain": "-t nat -I KUBE-SERVICES -j ACCEPT",
    "a rule behind the last": "-A KUBE-SERVICES -j ACCEPT",
    "a closed port opened": "-D KUBE-CLUSTER-IPS 1",
    "a refusal removed": "-D KUBE-SERVICES 1",
    "a left-over chain": "-t nat -N KUBE-SEP-AAAAAAAAAAAAAAAA",
    "another endpoint": "-t nat -R KUBE-SEP-57KPRZ3JQVENLNBR 2 -p tcp -j DNAT --to-destination 10.9.9.9:1",
    "a node port removed": "-t nat -D KUBE-NODEPORTS 1",
    "node ports out of reach": "-t nat -D KUBE-SERVICES 4",
    "node ports flushed": "-t nat -F KUBE-NODEPORTS",
    "an external address removed": "-t nat -D KUBE-SERVICES 2",
    "a short circuit cut": "-t nat -D KUBE-EXT-GNZBNJ2PO5MGZ6GT 1",
    "the policy flushed": "-t nat -F KUBE-EXT-GNZBNJ2PO5MGZ6GT",
    "endpoints of this node flushed": "-t nat -F KUBE-SVL-GNZBNJ2PO5MGZ6GT",
    "a range let in": "-t nat -I KUBE-FW-GNZBNJ2PO5MGZ6GT -s 198.51.100.0/24 -j KUBE-EXT-GNZBNJ2PO5MGZ6GT",
    "a range locked out": "-D KUBE-FW-NUKIZ6OKUXPJNT4C 1",
    "the firewall flushed": "-F KUBE-PROXY-FIREWALL",
    "external refusals flushed": "-F KUBE-EXTERNAL-SERVICES",
    "unallocated addresses routed on": "-D KUBE-CLUSTER-IPS 4",
    "the jump to the firewall removed": "-D FORWARD 1",
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_seen_and_mended(place: Place, what: str) -> None:
    backend = place.open(service_cidrs=(parse_network("10.0.0.0/16"),))
    backend.prepare()
    wanted = [TUTORIAL, "TCP 10.0.0.1:80 rr label=a/none", *NODE_PORT_AND_LOAD_BALANCER]
    bring(backend, *wanted)
    whole = place.save()
    for command in DAMAGE[what].split(";"):
        place.ns.run(f"iptables-{place.tool}", *command.split())
    time.sleep(0.11)  # a look serves for a tenth of a second
    aim = {one.at: backend.express(one) for one in map(server, wanted)}
    assert not backend.intact() or diff(backend.observe(), aim)
    if not backend.intact():
        backend.prepare()
    bring(backend, *wanted)
    assert sorted(place.save().splitlines()) == sorted(whole.splitlines())


def test_old_knowledge_is_mended_within_the_commit(place: Place) -> None:
    backend = place.open()
    backend.prepare()
    bring(backend, TUTORIAL, "TCP 10.0.0.1:80 rr")
    aim = {one.at: backend.express(one) for one in map(server, [TUTORIAL.replace("2.3", "2.4")])}
    transaction = backend.compile(diff(backend.observe(), aim))
    for command in ("-t nat -F KUBE-SERVICES", "-F KUBE-SERVICES"):
        place.ns.run(f"iptables-{place.tool}", *command.split())
    assert backend.commit(transaction).failed == {}
    assert not diff(backend.observe(), aim)


def test_a_refused_object_is_named_and_the_rest_goes_on(place: Place) -> None:
    backend = place.open()
    backend.prepare()
    bad = msgspec.structs.replace(
        server("TCP 10.0.0.66:80 rr sticky=1 label=a/bad -> 10.1.0.1:80"), persistence=1 << 40
    )
    good = [server(f"TCP 10.0.0.{n}:80 rr label=a/s{n} -> 10.1.0.{n}:80") for n in range(1, 20)]
    aim = {one.at: backend.express(one) for one in (*good[:9], bad, *good[9:])}
    for _ in range(2):
        outcome = backend.commit(backend.compile(diff(backend.observe(), aim)))
        assert list(outcome.failed) == [bad.at]
        error = outcome.failed[bad.at]
        assert "TCP 10.0.0.66:80" in str(error)
        assert "--seconds" in str(error)
        assert set(backend.observe().servers) == {one.at for one in good}
        assert "10.0.0.66" not in place.save()
        assert backend.intact()


def test_a_refused_object_amid_a_text_that_is_still_being_made_is_named(place: Place) -> None:
    backend = place.open()
    backend.prepare()
    bad = msgspec.structs.replace(
        server("TCP 10.0.0.66:80 rr sticky=1 label=a/bad -> 10.1.0.1:80"), persistence=1 << 40
    )
    good = [server(text) for text in many(1500)]
    aim = {one.at: backend.express(one) for one in (*good[:200], bad, *good[200:])}
    transaction = backend.compile(diff(backend.observe(), aim))
    assert len(str(transaction)) > PIPE_BYTES
    assert list(backend.commit(transaction).failed) == [bad.at]
    assert backend.observe().servers.keys() == {one.at for one in good}
    assert backend.intact()


def test_what_cannot_be_composed_to_its_end_is_not_committed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a fault of ours in the middle of a large load: no packet meets a half of it."""
    backend = place.open()
    backend.prepare()
    bring(backend, TUTORIAL)
    before = place.nat()
    aim = {one.at: backend.express(one) for one in map(server, [TUTORIAL, *many(1500)])}
    made = 0

    def portal(*arguments: Any) -> str:
        nonlocal made
        made += 1
        if made > 1000:
            raise ValueError("a fault")
        return str(iptables_chains.portal(*arguments))

    monkeypatch.setattr(iptables_script, "portal", portal)
    with pytest.raises(ValueError, match="a fault"):
        backend.commit(backend.compile(diff(backend.observe(), aim)))
    if place.tool == "legacy":
        assert place.nat() == before
    else:  # sections of chains that nothing leads to
        assert place.nat("KUBE-SERVICES ") == "".join(
            line + "\n" for line in before.splitlines() if "KUBE-SERVICES " in line
        )
    monkeypatch.undo()
    again = place.open()
    again.prepare()
    outcome = again.commit(again.compile(diff(again.observe(), aim)))
    assert (outcome.failed, outcome.unsure) == ({}, frozenset())
    assert again.observe().servers == aim
    assert again.intact()


def test_a_refused_endpoint_concerns_all_addresses_that_share_it(place: Place) -> None:
    backend = place.open()
    backend.prepare()
    good = [server(f"TCP 10.0.0.{n}:80 rr label=a/s{n} -> 10.1.0.{n}:80") for n in range(1, 20)]
    bad = [
        msgspec.structs.replace(server(f"{text} sticky=1 label=a/bad -> 10.1.0.1:80"), persistence=1 << 40)
        for text in ("TCP 10.0.0.66:80", *(f"TCP 192.168.0.{n}:30080 NodePort always" for n in range(40)))
    ]
    kept = server("TCP 1.2.3.4:80 ExternalIP label=a/bad")
    aim = {one.at: backend.express(one) for one in (*good, *bad, kept)}
    outcome = backend.commit(backend.compile(diff(backend.observe(), aim)))
    assert set(outcome.failed) == {one.at for one in bad}
    assert set(backend.observe().servers) == {one.at for one in (*good, kept)}
    assert backend.intact()


def test_the_jumps_stand_in_order_and_once(place: Place) -> None:
    backend = place.open()
    backend.prepare()
    jumps = [line for line in place.save("-t", "filter").splitlines() if line.startswith("-A FORWARD")]
    assert len(jumps) == 3
    for mess in (jumps[::-1], [*jumps, jumps[0]], jumps[1:], []):
        place.restore("*filter\n" + "".join(f"-D{line[2:]}\n" for line in jumps) + "COMMIT\n")
        place.restore("*filter\n" + "".join(line + "\n" for line in mess) + "COMMIT\n")
        assert not backend.intact()
        backend.prepare()
        assert backend.intact()
        assert [line for line in place.save("-t", "filter").splitlines() if line.startswith("-A FORWARD")] == jumps


def test_what_a_restore_refuses_without_a_line_is_found_by_halves(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a kernel that lacks a module: the text with one Service's name is refused at COMMIT."""
    backend = place.open()
    backend.prepare()
    real = run_tool
    runs = 0

    def refuse(argv: list[str], *, input: str | Iterable[str] = "", timeout: float = 30) -> str:  # noqa: A002
        nonlocal runs
        text = "".join(input)
        if "a/s13" in text:
            runs += 1
            raise ToolError("iptables-restore: status 1: iptables-restore: line 99999 failed")
        return real(argv, input=text, timeout=timeout)

    monkeypatch.setattr(run_iptables, "run_tool", refuse)
    aim = {one.at: backend.express(one) for one in map(server, [
        f"TCP 10.0.0.{n}:80 rr label=a/s{n} -> 10.1.0.{n}:80" for n in range(1, 65)])}  # fmt: skip
    outcome = backend.commit(backend.compile(diff(State(), aim)))
    assert set(outcome.failed) == {at("TCP 10.0.0.13:80")}
    assert set(backend.observe().servers) == aim.keys() - outcome.failed.keys()
    assert runs <= 9


def test_a_deadline_leaves_the_outcome_unknown(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = place.open()
    backend.prepare()
    plan = diff(backend.observe(), {at("TCP 10.0.1.175:80"): server(TUTORIAL)})
    transaction = backend.compile(plan)
    monkeypatch.setattr(run_iptables, "RESTORE_SECONDS", -1.0)  # over before it begins
    with pytest.raises(Unanswered):
        backend.commit(transaction)


def test_the_lock_is_waited_for_with_a_bound_and_its_holder_named(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = place.open()
    backend.prepare()
    aim = {one.at: backend.express(one) for one in map(server, [TUTORIAL])}
    transaction = backend.compile(diff(backend.observe(), aim))
    monkeypatch.setattr(run_iptables, "LOCK_SECONDS", 1)
    hold = f"import fcntl, time; f = open('{run_iptables.LOCK_FILE}', 'r+'); fcntl.flock(f, 2)"
    hold += "; print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        try:
            if place.tool == "nft":
                assert backend.commit(transaction).failed == {}
                return
            started = time.monotonic()
            with pytest.raises(KernelError, match=rf"pid {holder.pid} \(python.*holds the lock"):
                backend.commit(transaction)
            assert time.monotonic() - started < 5
            threading.Timer(0.3, holder.kill).start()
            assert backend.commit(transaction).failed == {}  # waits, and goes on
        finally:
            holder.kill()
    assert not diff(backend.observe(), aim)


HOSTILE = [
    'a/b"; add table ip evil; #',
    'x" -j ACCEPT\n-A INPUT -j ACCEPT',
    "a/b\nCOMMIT\n*filter\n-A INPUT -j DROP",
    "a/b -j ACCEPT",
    "a/b\x1b[2J",
    'a/b\\"',
    "a/$(reboot)",
    "a/" + "b" * 300,
    "a/b:c:d",
    "a/b'",
    "ä/b",
]


def test_names_never_become_syntax_through_save_and_restore_too(place: Place) -> None:
    backend = place.open()
    backend.prepare()
    rng = random.Random(4)
    names = HOSTILE + [
        "".join(rng.choices("ab/:\"\\\n\r\t\x00\x1b-# ;$`'é\u202e*", k=rng.randint(1, 40))) for _ in range(300)
    ]
    kinds = (
        "-> 10.1.0.1:80",
        "NodePort node -> 10.1.0.1:80",
        "ExternalIP",
        "LoadBalancer from=10.0.0.0/8 -> 10.1.0.1:80",
    )
    bring(backend, *(
        msgspec.structs.replace(server(f"TCP 10.0.{n // 200}.{n % 200}:80 {kinds[n % 4]}"), label=name)
        for n, name in enumerate(names)
    ))  # fmt: skip
    saved = place.save()
    assert all(line.startswith(("*", ":KUBE-", ":", "-A KUBE-", "-A ", "COMMIT")) for line in saved.splitlines())
    assert "evil" not in saved
    assert not [line for line in saved.splitlines() if "-j ACCEPT" in line]
    place.ns.run(f"iptables-{place.tool}-restore", stdin=saved)  # what boot-time persistence does: all flushed and back
    assert place.save() == saved
    assert backend.intact()


def test_a_strangers_comment_with_newlines_is_read_as_a_comment(place: Place) -> None:
    backend = place.open()
    backend.prepare()
    bring(backend, TUTORIAL)
    rule = (
        '-d 10.66.6.6/32 -p tcp -m comment --comment "a/b: cluster IP" -m tcp --dport 80 -j KUBE-SVC-AAAAAAAAAAAAAAAA'
    )
    fake = f'x" \\\n[0:0] -A KUBE-SERVICES {rule}\n'
    place.ns.run(f"iptables-{place.tool}", "-t", "nat", "-I", "INPUT", "-m", "comment", "--comment", fake)
    time.sleep(0.11)
    assert backend.intact()
    assert [str(one) for one in backend.observe().servers] == ["TCP 10.0.1.175:80"]


def test_the_other_back_ends_chains_are_told(netns: NetNs) -> None:
    with netns.enter():
        old = IptablesBackend(Options(iptables_tool="legacy"))
        old.prepare()
        assert old.flavour == "legacy"
        new = IptablesBackend(Options(iptables_tool="nft"))
        # ours are let go by the switch, those of a kube-proxy are not
        beside = open_beside(Options(iptables_tool="nft"))
        assert beside is not None
        assert (beside.mode, beside.flavour) == ("iptables (legacy)", "legacy")
        assert new.prepare() == ()
        netns.run("iptables-legacy", "-t", "nat", "-F", MARKER)
        (told,) = new.prepare()
        assert new.flavour == "nft"
        assert told.startswith("iptables here is nft, and iptables-legacy has chains of Services too (KUBE-")
        assert "iptables-nft-restore (nft) --noflush" in str(
            new.compile(diff(State(), {at("TCP 10.0.1.175:80"): server(TUTORIAL)}))
        )


def test_forwarding_is_switched_on_and_put_back(place: Place) -> None:
    setting = Path("/proc/sys/net/ipv4/ip_forward")
    place.ns.sysctl("ipv4.ip_forward", 0)
    place.open().prepare()
    assert setting.read_text() == "1\n"
    place.open().prepare()
    place.open().remove()
    assert setting.read_text() == "0\n"


def test_preparing_twice_and_looking_write_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = place.open()
    backend.prepare()
    bring(backend, TUTORIAL)
    monkeypatch.setattr(run_iptables.Tools, "restore", lambda *_, **__: pytest.fail("a write"))
    for one in (backend, place.open()):
        one.prepare()
        assert one.intact()
        bring(one, TUTORIAL)


def many(count: int, first: int = 0) -> list[str]:
    """Services with two endpoints each, of which the second is all their own."""
    return [
        f"TCP 10.{96 + number // 250}.0.{number % 250 + 1}:80 rr label=many/s{number} -> "
        f"10.1.{number // 250}.{number % 250 + 1}:80, 10.2.{(number + first) // 250}.{(number + first) % 250 + 1}:80"
        for number in range(count)
    ]


def test_many_services_come_change_and_go(place: Place) -> None:
    """On the nft back end in sections, that the tool is not slow; the tables end as if it had been one."""
    backend = place.open()
    backend.prepare()
    empty = place.save()
    texts = []
    for states in (many(450), many(450, first=1), many(3), []):
        aim = {one.at: backend.express(one) for one in map(server, states)}
        transaction = backend.compile(diff(backend.observe(), aim))
        texts.append(str(transaction))
        outcome = backend.commit(transaction)
        assert (outcome.failed, outcome.unsure) == ({}, frozenset())
        assert backend.intact()
        fresh = place.open()
        assert {each.at: shown(each) for each in fresh.observe().servers.values()} == {
            each.at: shown(each) for each in aim.values()
        }
    assert place.save() == empty
    sections = [text.count("*nat") for text in texts]
    assert min(sections[:3]) > 4 if place.tool == "nft" else sections == [1, 1, 1, 1]
    # what leads to chains comes behind them, and goes before them
    if place.tool == "nft":
        coming, going = texts[0], texts[2]
        assert coming.rindex("-A KUBE-SVC-") < coming.index("-A KUBE-SERVICES -d", coming.index("*nat"))
        assert going.rindex("A KUBE-SERVICES ") < going.index("-X KUBE-S")


def test_each_line_of_many_is_known_by_its_service(place: Place) -> None:
    backend = place.open()
    backend.prepare()
    aim = {one.at: backend.express(one) for one in map(server, many(450))}
    transaction = backend.compile(diff(backend.observe(), aim))
    (script,) = transaction.scripts.values()  # type: ignore[attr-defined]
    lines = script.text().splitlines()
    line = next(n for n, each in enumerate(lines, 1) if "many/s7:" in each and each.startswith("-A KUBE-SEP"))
    assert list(map(str, script.whose(line))) == ["TCP 10.96.0.8:80"]
    assert script.whose(1) == ()
    assert script.whose(len(lines)) == ()
