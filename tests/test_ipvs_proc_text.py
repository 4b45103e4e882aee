"""/proc/net/ip_vs: the kernel's words, golden, and that a difference in any of them is seen."""

import pytest

from dataplane.ipvs_proc_text import differing

from .words import server

TABLE = """IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
UDP  0A00000A:0035 rr
TCP  0A0001AF:0050 rr
  -> 0AF40306:24A0      Masq    1      3          14
  -> 0AF40107:24A0      Masq    0      0          0
TCP  0A000001:01BB wlc ops persistent 75000 FFFFFF00
TCP  [fd00:0000:0000:0000:0000:0000:0000:0001]:0050 mh persistent 2700000 80000000
  -> [fd00:0001:0000:0000:0000:0000:0000:0007]:24A0      Masq    7      0          0
"""

SAME = [
    "TCP 10.0.1.175:80 rr -> 10.244.3.6:9376, 10.244.1.7:9376 w0",
    "UDP 10.0.0.10:53 rr",
    "TCP [fd00::1]:80 mh sticky=10800 -> [fd00:1::7]:9376 w7",
]
OTHER = [
    "TCP 10.0.1.175:80 wrr -> 10.244.3.6:9376, 10.244.1.7:9376 w0",
    "TCP 10.0.1.175:80 rr sticky=60 -> 10.244.3.6:9376, 10.244.1.7:9376 w0",
    "TCP 10.0.1.175:80 rr -> 10.244.3.6:9376, 10.244.1.7:9376",
    "TCP 10.0.1.175:80 rr -> 10.244.3.6:9376",
    "TCP 10.0.1.175:80 rr -> 10.244.3.6:9376, 10.244.1.7:9376 w0, 10.244.1.8:9376",
    "TCP 10.0.1.175:80 rr -> 10.244.3.6:9377, 10.244.1.7:9376 w0",
    "UDP 10.0.1.175:80 rr -> 10.244.3.6:9376, 10.244.1.7:9376 w0",
    "TCP 10.0.1.176:80 rr",
    "TCP 10.0.0.1:443 wlc sticky=300",
]


@pytest.mark.parametrize("line", SAME)
def test_what_is_the_same_is_no_suspect(line: str) -> None:
    assert differing(TABLE, [server(line)]) == set()


@pytest.mark.parametrize("line", OTHER)
def test_what_differs_is(line: str) -> None:
    assert differing(TABLE, [server(line)]) == {server(line).at}


def test_times_are_in_jiffies_and_the_odd_one_out_is_seen() -> None:
    lines = [f"TCP  0A00000{n}:0050 rr persistent {n * 250} FFFFFFFF" for n in (1, 2, 3)]
    table = "\n".join([*TABLE.splitlines()[:3], *lines, ""])
    servers = [server(f"TCP 10.0.0.{n}:80 rr sticky={n}") for n in (1, 2)] + [server("TCP 10.0.0.3:80 rr sticky=5")]
    assert differing(table, servers) == {servers[2].at}


def test_an_empty_table_makes_everything_suspect() -> None:
    assert differing("", list(map(server, SAME))) == {server(line).at for line in SAME}
