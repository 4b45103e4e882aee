"""What witnesses tell, from bytes and texts alone: nftrace messages, conntrack events, IPVS's table, `recent` lists."""

from typing import Any

import pytest

from dataplane.ipvs_proc_text import connections, remembered
from dataplane.model import Address, Network, parse_address, parse_network
from dataplane.netlink_conntrack import NEW, SUBSYSTEM, EntryAttrs, new_connection
from dataplane.netlink_socket import message
from dataplane.nft_clients import Clients, read_detection
from dataplane.nft_trace import TRACE, UNTOLD, RuleKey, RuleTold, TraceAttrs, Tracer, owner_of, script, table_name
from dataplane.nftables_messages import INET, NFGENMSG
from dataplane.nftables_messages import SUBSYSTEM as NFTABLES
from dataplane.procfs_recent import jiffies, last_seen
from dataplane.sightings import Look, Sighting
from dataplane.walk import Verdict

from .words import server

VIP, CLIENT, POD, NODE = map(parse_address, ("10.0.1.175", "192.0.2.2", "10.244.1.7", "10.244.1.1"))
LOOK = Look(server("TCP 10.0.1.175:80 rr").at)
MINE = table_name(7, 99)


def headers(source: Address, destination: Address, sport: int = 40000, dport: int = 80) -> dict[str, Any]:
    network = bytes((0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0)) + source + destination
    return {"network": network, "transport": sport.to_bytes(2) + dport.to_bytes(2) + bytes(16)}


def traced(chain: str, number: int = 1, table: str = "t", **values: Any) -> bytes:
    told = TraceAttrs.encode(table=table, chain=chain, id=number, **values)
    return message(NFTABLES << 8 | TRACE, 0, NFGENMSG.pack(INET, 0, 0) + told)


def rule(chain: str, code: int, target: str = "", handle: int = 1, **values: Any) -> bytes:
    verdict: dict[str, Any] = {"code": code & 0xFFFF_FFFF} | ({"chain": target} if target else {})
    return traced(chain, type=3, handle=handle, verdict=verdict, **values)


def tracer(**rules: RuleTold) -> Tracer:
    def look_up(key: RuleKey) -> RuleTold:
        return rules.get(key[2], UNTOLD)

    return Tracer(LOOK, MINE, look_up)


BEGUN = traced("prerouting", table=MINE, type=3, handle=1, **headers(CLIENT, VIP))
LEFT: dict[str, Any] = {"table": MINE, "type": 1, "policy": 1}


def test_a_packet_is_put_together_from_its_messages() -> None:
    told = tracer(nat=RuleTold("to a Service", False))
    assert told.take([BEGUN, rule("nat", -4, "pick4_3", **headers(CLIENT, VIP))]) == []
    (seen,) = told.take([traced("postrouting", **LEFT, **headers(NODE, POD, dport=9376))])
    assert seen == Sighting(
        6, CLIENT, 40000, Verdict.ENDPOINT, (POD, 9376), NODE, "", ("t nat: goto pick4_3 (to a Service)",)
    )
    assert seen.masqueraded


def test_packets_between_each_other_are_told_apart_and_a_connection_is_told_once() -> None:
    told = tracer()
    other = traced("prerouting", 2, MINE, type=3, handle=1, **headers(CLIENT, VIP, 40001))
    ends = [traced("postrouting", n, **LEFT, **headers(CLIENT, POD, 39999 + n, 9376)) for n in (2, 1)]
    assert [each.client_port for each in told.take([BEGUN, other, *ends])] == [40001, 40000]
    again = traced("prerouting", 3, MINE, type=3, handle=1, **headers(CLIENT, VIP))
    assert told.take([again, traced("postrouting", 3, **LEFT, **headers(CLIENT, POD, dport=9376))]) == []


@pytest.mark.parametrize(("refuses", "verdict"), [(True, Verdict.REFUSED), (False, Verdict.DROPPED)])
def test_a_rule_that_ends_a_packet_is_named(refuses: bool, verdict: Verdict) -> None:
    (seen,) = tracer(deny=RuleTold("why", refuses)).take([BEGUN, rule("deny", 0)])
    assert (seen.verdict, seen.reason) == (verdict, "by a rule of chain deny in table t (why)")


def test_a_policy_that_ends_a_packet_is_named() -> None:
    (seen,) = tracer().take([BEGUN, traced("input", type=1, policy=0)])
    assert (seen.verdict, seen.reason) == (Verdict.DROPPED, "by the policy of chain input in table t")


def test_what_others_have_traced_is_nothing_of_ours() -> None:
    foreign = traced("prerouting", 5, "theirs", type=3, handle=1, **headers(CLIENT, POD))
    assert tracer().take([foreign, rule("deny", 0)]) == []


def test_an_untranslated_packet_goes_on_as_it_came() -> None:
    (seen,) = tracer().take([BEGUN, traced("postrouting", **LEFT, **headers(CLIENT, VIP))])
    assert seen.verdict is Verdict.NOT_OURS


def test_a_packet_of_whose_end_nothing_is_told_is_told_at_the_end() -> None:
    told = tracer()
    told.take([BEGUN, traced("forward", type=3, handle=1, **headers(CLIENT, POD, dport=9376))])
    (seen,) = told.finish()
    assert seen.real == (POD, 9376)


def test_the_table_says_whose_it_is_and_ends_by_itself() -> None:
    assert owner_of(MINE) == (7, 99)
    assert owner_of("dataplane-nftables") is None
    text = script(MINE, LOOK._replace(source=CLIENT, seconds=5))
    assert "10.0.1.175 . tcp . 80 timeout 7s" in text
    assert text.count("ip saddr 192.0.2.2 ip daddr . meta l4proto . th dport @wanted") == 2
    assert text.count("limit rate 50/second") == 2


# ----------------------------------------------------------------------------------------------------- conntrack


def event(source: Address, zone: int = 0) -> bytes:
    ports = {"number": 6, "source": 40000, "destination": 80}
    entry = EntryAttrs.encode(
        original={"ip": {"v4_source": CLIENT, "v4_destination": VIP}, "ports": ports},
        reply={
            "ip": {"v4_source": POD, "v4_destination": source},
            "ports": {"number": 6, "source": 9376, "destination": 40000},
        },
        **({"zone": zone} if zone else {}),
    )
    return message(SUBSYSTEM << 8 | NEW, 0, NFGENMSG.pack(2, 0, 0) + entry)


@pytest.mark.parametrize(("source", "masqueraded"), [(CLIENT, False), (NODE, True)])
def test_a_conntrack_event_tells_both_ends(source: Address, masqueraded: bool) -> None:
    seen = new_connection(event(source), LOOK)
    assert seen is not None
    assert (seen.client, seen.client_port, seen.real, seen.masqueraded) == (CLIENT, 40000, (POD, 9376), masqueraded)


def test_events_of_other_zones_clients_and_addresses_are_passed_over() -> None:
    assert new_connection(event(CLIENT, zone=5), LOOK) is None
    assert new_connection(event(CLIENT), LOOK._replace(source=NODE)) is None
    assert new_connection(event(CLIENT), Look(server("TCP 10.0.1.176:80 rr").at)) is None


# ---------------------------------------------------------------------------------------------------------- /proc

IP_VS_CONN = """Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Expires PEName PEData
TCP C0000202 9C40 0A0001AF 0050 0AF40107 24A0 ESTABLISHED     899
TCP C0000202 0000 0A0001AF 0050 0AF40107 24A0 NONE            55
"""
IP_VS_CONN += (
    "TCP [fd00:0000:0000:0000:0000:0000:0000:0002] 0000 [fd00:0000:0000:0000:0000:0000:0000:0001] 0050 "
    "[fd00:0001:0000:0000:0000:0000:0000:0007] 24A0 NONE 7\n"
)


def test_ipvs_connections_and_templates() -> None:
    first, template, _ = connections(IP_VS_CONN)
    assert (first.client, first.client_port, first.state) == (CLIENT, 40000, "ESTABLISHED")
    assert template.client_port == 0
    sticky = server("TCP 10.0.1.175:80 rr sticky=60 -> 10.244.1.7:9376")
    assert remembered(IP_VS_CONN, sticky, CLIENT) == (POD, 9376, 55)
    assert remembered(IP_VS_CONN, sticky, NODE) is None
    sticky = server("TCP [fd00::1]:80 rr sticky=60 -> [fd00:1::7]:9376")
    found = remembered(IP_VS_CONN, sticky, parse_address("fd00::2"))
    assert found == (parse_address("fd00:1::7"), 9376, 7)


def test_recent_lists_and_their_clock() -> None:
    listed = "src=192.0.2.2 ttl: 63 last_seen: 4298137661 oldest_pkt: 1 4298137661\n"
    assert last_seen(listed, CLIENT) == 4298137661
    assert last_seen(listed, NODE) is None
    wide = "src=fd00:0000:0000:0000:0000:0000:0000:0002 ttl: 63 last_seen: 5 oldest_pkt: 1 5\n"
    assert last_seen(wide, parse_address("fd00::2")) == 5
    # 250 a second, 1000 s after boot
    ticks = (1 << 32) - 300 * 250 + 1000 * 250
    assert jiffies(f"now at {1000 * 10**9} nsecs\n\ncpu: 0\njiffies: {ticks}\n") == (ticks, 250)
    assert jiffies("") is None


CIDRS = tuple(map(parse_network, ("10.244.0.0/16", "192.0.2.7/32", "fd00:244::/64")))
SERVICES: tuple[Network, ...] = tuple(map(parse_network, ("10.96.0.0/12", "10.112.0.0/16", "fd00:96::/112")))


@pytest.mark.parametrize(
    "clients",
    [
        Clients(),
        Clients(masquerade_all=True, cluster_cidrs=CIDRS),
        Clients(cluster_cidrs=CIDRS[2:], bridge_interface="br0", interface_prefix="cali"),
        Clients(cluster_cidrs=CIDRS, service_cidrs=SERVICES),
    ],
)
def test_rules_tell_the_options_that_made_them(clients: Clients) -> None:
    listed = "\n".join(rule.replace("/32", "") for rules in clients.rules().values() for rule in rules)
    found = read_detection(listed)
    assert Clients.of(found) == clients
