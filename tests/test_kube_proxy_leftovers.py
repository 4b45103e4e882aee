"""What another proxy has left is found and removed, and nothing else: in namespaces, laid out as kube-proxy does it."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from dataplane.cli import cli
from dataplane.iptables_save import parse_save
from dataplane.iptables_text import MARKER, OWNED
from dataplane.kube_proxy_rules import SETS, doomed, is_kube_proxy, its_servers, served
from dataplane.model import Protocol, VirtualAddress, parse_address

from .netns import NetNs
from .node_agent import manifest, node_agent
from .traffic import eventually

SVC, SEP, EXT = "KUBE-SVC-XPGD46QRK7WJZT7O", "KUBE-SEP-SXIVWICOYRO3J4NJ", "KUBE-EXT-XPGD46QRK7WJZT7O"

NAT = f"""\
*nat
:KUBE-PROXY-CANARY - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:{SVC} - [0:0]
:{EXT} - [0:0]
:{SEP} - [0:0]
:MINE - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -m comment --comment "not -j KUBE-SERVICES but mine" -j MINE
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A POSTROUTING -o mine0 -j MASQUERADE
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-SERVICES -m comment --comment "ns1/svc1:p80 cluster IP" -m tcp -p tcp -d @VIP@ --dport 80 -j {SVC}
-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -m comment --comment ns1/svc1:p80 -m tcp -p tcp --dport 30080 -j {EXT}
-A {EXT} -m comment --comment "masquerade traffic for ns1/svc1:p80 external destinations" -j KUBE-MARK-MASQ
-A {EXT} -j {SVC}
-A {SVC} -m comment --comment "ns1/svc1:p80 -> @EP@" -j {SEP}
-A {SEP} -m comment --comment ns1/svc1:p80 -s @POD@ -j KUBE-MARK-MASQ
-A {SEP} -m comment --comment ns1/svc1:p80 -m tcp -p tcp -j DNAT --to-destination @EP@
-A MINE -p tcp --dport 1 -j RETURN
COMMIT
*filter
:KUBE-FIREWALL - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-ROUTER-INPUT - [0:0]
-A INPUT -j KUBE-FIREWALL
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment "kubernetes health check service ports" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
-A INPUT -j KUBE-ROUTER-INPUT
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP
-A KUBE-SERVICES -m comment --comment "ns1/svc2 has no endpoints" -m tcp -p tcp -d @VIP@ --dport 81 -j REJECT
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-ROUTER-INPUT -p tcp --dport 2 -j RETURN
COMMIT
*mangle
:KUBE-PROXY-CANARY - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
COMMIT
"""

MINE = {
    "nat": {"KUBE-KUBELET-CANARY", "MINE"},
    "filter": {"KUBE-FIREWALL", "KUBE-ROUTER-INPUT"},
    "mangle": {"KUBE-KUBELET-CANARY"},
}
MY_RULES = {
    "nat": {
        '-A PREROUTING -m comment --comment "not -j KUBE-SERVICES but mine" -j MINE',
        "-A POSTROUTING -o mine0 -j MASQUERADE",
        "-A MINE -p tcp -m tcp --dport 1 -j RETURN",
    },
    "filter": {
        "-A INPUT -j KUBE-FIREWALL",
        "-A INPUT -j KUBE-ROUTER-INPUT",
        "-A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP",
        "-A KUBE-ROUTER-INPUT -p tcp -m tcp --dport 2 -j RETURN",
    },
    "mangle": set(),
}

LAYOUT = {
    "iptables": NAT.replace("@VIP@", "10.96.0.10/32").replace("@POD@", "10.180.0.1").replace("@EP@", "10.180.0.1:80"),
    "ip6tables": NAT.replace("@VIP@", "fd00:96::a").replace("@POD@", "fd00:10::1").replace("@EP@", "[fd00:10::1]:80"),
}
NFT = """
table FAMILY kube-proxy {
    comment "rules for kube-proxy"
    map service-ips { type TYPE . inet_proto . inet_service : verdict; }
    chain services {
        FAMILY daddr . meta l4proto . th dport vmap @service-ips
    }
    chain nat-prerouting {
        type nat hook prerouting priority -100; policy accept;
        jump services
    }
}
"""


def program(netns: NetNs, *back_ends: str) -> None:
    """As after years with a kube-proxy in iptables mode, then one in nftables mode."""
    for back_end in back_ends:
        for tool, text in LAYOUT.items():
            netns.run(f"{tool}-{back_end}-restore", "--noflush", stdin=text)
    for family, kind in (("ip", "ipv4_addr"), ("ip6", "ipv6_addr")):
        netns.run("nft", "-f", "-", stdin=NFT.replace("FAMILY", family).replace("TYPE", kind))
    netns.run("nft", "add table inet mine")


def chains_and_rules(text: str) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Chains that are not built in, and all rules, by table."""
    chains: dict[str, set[str]] = {}
    rules: dict[str, set[str]] = {}
    table = ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:]
            chains[table], rules[table] = set(), set()
        elif line.startswith(":") and line.split()[1] == "-":
            chains[table].add(line[1:].split()[0])
        elif line.startswith("-A"):
            rules[table].add(line)
    return chains, rules


def dataplane(netns: NetNs, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = netns.run(sys.executable, "-m", "dataplane", *arguments, check=False, timeout=120)
    assert done.returncode == status, done.stdout + done.stderr
    return done


# -------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("table", "chain", "expected"),
    [
        ("nat", "KUBE-SERVICES", True),
        ("nat", SVC, True),
        ("nat", "KUBE-SVC-mine", False),
        ("nat", "KUBE-HOSTPORTS", False),
        ("nat", "KUBE-HP-XPGD46QRK7WJZT7O", False),
        ("filter", "KUBE-FIREWALL", False),
        ("nat", "KUBE-FIREWALL", True),
        ("mangle", "KUBE-KUBELET-CANARY", False),
        ("mangle", "KUBE-PROXY-CANARY", True),
        ("filter", "KUBE-IPVS-FILTER", True),
        ("filter", "KUBE-POD-FW-XPGD46QRK7WJZT7O", False),
    ],
)
def test_names_of_kube_proxy_and_of_others(table: str, chain: str, expected: bool) -> None:
    assert is_kube_proxy(table, chain) == expected


def test_what_rules_of_others_lead_to_stays_with_all_it_needs() -> None:
    others = "-A KUBE-HP-XPGD46QRK7WJZT7O -s 10.0.0.9 -j KUBE-MARK-MASQ\n-A MINE -j KUBE-NODEPORTS\n"
    text = LAYOUT["iptables"].replace("COMMIT\n*filter", f"{others}COMMIT\n*filter").replace("-A ", "[0:0] -A ")
    nat = next(each for each in doomed(parse_save(text)) if each.table == "nat")
    assert set(nat.kept) == {"KUBE-MARK-MASQ", "KUBE-POSTROUTING", "KUBE-NODEPORTS", EXT, SVC, SEP}
    assert nat.chains == ("KUBE-PROXY-CANARY", "KUBE-SERVICES")
    assert {chain for chain, _ in nat.jumps} == {"PREROUTING", "OUTPUT"}


def test_where_our_own_mode_is_nothing_is_kube_proxy_s() -> None:
    owned = f":{MARKER} - [0:0]\n[0:0] -A {MARKER} {OWNED}\n"
    text = LAYOUT["iptables"].replace("*nat\n", f"*nat\n{owned}")
    assert doomed(parse_save(text)) == []


def test_the_names_of_sets_are_cut_as_the_kernel_cuts_them() -> None:
    assert {"KUBE-6-LOAD-BALANCER-SOURCE-CID", "KUBE-6-NODE-PORT-LOCAL-SCTP-HAS", "KUBE-LOOP-BACK"} <= SETS
    assert "KUBE-SRC-XPGD46QRK7WJZT7O" not in SETS


def test_virtual_servers_by_sets_device_and_node_ports() -> None:
    said = served(
        "add KUBE-CLUSTER-IP 10.0.0.1,tcp:80\nadd KUBE-6-CLUSTER-IP fd00::1,udp:53\nadd KUBE-NODE-PORT-TCP 30080\n"
        "add KUBE-NODE-PORT-SCTP-HASH 192.0.2.1,sctp:30090 timeout 0\nadd MINE 10.9.9.9,tcp:1\nadd KUBE-LOOP-BACK "
        "10.1.1.1,tcp:80,10.1.1.1\n"
    )
    one, other, node = (parse_address(each) for each in ("10.0.0.1", "10.0.0.2", "192.0.2.1"))
    wanted = [
        VirtualAddress(Protocol.TCP, one, 80),
        VirtualAddress(Protocol.TCP, other, 443),  # bound to its device
        VirtualAddress(Protocol.TCP, node, 30080),
        VirtualAddress(Protocol.SCTP, node, 30090),
        VirtualAddress(Protocol.UDP, parse_address("fd00::1"), 53),
    ]
    foreign = [
        VirtualAddress(Protocol.TCP, one, 81),
        VirtualAddress(Protocol.TCP, parse_address("198.51.100.1"), 30080),  # no address of this node
        VirtualAddress(Protocol.UDP, node, 30080),
    ]
    assert its_servers([*wanted, *foreign], said, [other], [node], ()) == sorted(wanted)
    assert its_servers([*wanted, *foreign], said, [other], [node], wanted[:1]) == sorted(wanted[1:])


# ------------------------------------------------------------------------------------------------------------- kernel


@pytest.fixture
def legacy(netns: NetNs) -> bool:
    """Whether this kernel has the legacy tables."""
    return netns.run("iptables-legacy-save", "-t", "nat", check=False).returncode == 0


@pytest.mark.root
def test_only_what_is_kube_proxy_s_goes(netns: NetNs, legacy: bool) -> None:
    back_ends = ("nft", "legacy") if legacy else ("nft",)
    program(netns, *back_ends)
    before = {tool: netns.run(f"{tool}-nft-save").stdout for tool in LAYOUT}
    netns.run("ipset", "create", "KUBE-CLUSTER-IP", "hash:ip,port")
    netns.run("ipset", "create", "KUBE-6-CLUSTER-IP", "hash:ip,port", "family", "inet6")
    netns.run("ipset", "create", "KUBE-SRC-XPGD46QRK7WJZT7O", "hash:ip")
    rule = ("-m", "set", "--match-set", "KUBE-CLUSTER-IP", "dst,dst", "-j", "KUBE-MARK-MASQ")
    netns.run("iptables-nft", "-t", "nat", "-A", "KUBE-SERVICES", *rule)

    told = dataplane(netns, "doctor", "--mode", "nftables", "-o", "json", status=0).stdout
    assert '"dataplane cleanup --kube-proxy"' in told
    planned = dataplane(netns, "cleanup", "--kube-proxy", "--dry-run").stdout
    assert planned.startswith("kube-proxy: leftover: 15 iptables chains (nft), ")
    assert "its table ip kube-proxy, its table ip6 kube-proxy, 2 ipsets\n" in planned
    assert f"-X {SVC}\n" in planned
    assert "delete table ip6 kube-proxy\n" in planned
    assert "destroy KUBE-CLUSTER-IP\n" in planned
    assert {tool: netns.run(f"{tool}-nft-save").stdout.count("KUBE") for tool in LAYOUT}["ip6tables"] == before[
        "ip6tables"
    ].count("KUBE")
    assert "--yes" in dataplane(netns, "cleanup", "--kube-proxy", status=2).stderr  # nobody can be asked

    done = dataplane(netns, "cleanup", "--kube-proxy", "--yes").stdout
    assert done.splitlines()[-1].startswith("kube-proxy: removed 15 iptables chains (nft), ")
    for back_end in back_ends:
        for tool in LAYOUT:
            chains, rules = chains_and_rules(netns.run(f"{tool}-{back_end}-save").stdout)
            assert chains == MINE, (tool, back_end)
            assert rules == MY_RULES, (tool, back_end)
    assert "kube-proxy" not in netns.run("nft", "list", "tables").stdout
    assert "table inet mine" in netns.run("nft", "list", "tables").stdout
    assert netns.run("ipset", "list", "-n").stdout.split() == ["KUBE-SRC-XPGD46QRK7WJZT7O"]
    assert dataplane(netns, "cleanup", "--kube-proxy", "--yes").stdout == "kube-proxy: nothing of it is there\n"


@pytest.mark.root
def test_nothing_there_is_nothing_to_do(netns: NetNs) -> None:
    assert dataplane(netns, "cleanup", "--kube-proxy").stdout == "kube-proxy: nothing of it is there\n"


@pytest.mark.root
def test_beside_an_agent_in_iptables_mode_it_refuses_and_its_chains_stay(netns: NetNs, tmp_path: Path) -> None:
    with node_agent(netns, tmp_path, "--mode", "iptables", "--iptables-tool", "nft", "--probe", "off") as agent:
        agent.write(manifest([("10.244.0.1", "node")]))
        agent.start()
        refused = dataplane(netns, "cleanup", "--kube-proxy", "--yes", status=1)
        assert "an agent in iptables mode runs here" in refused.stderr
        agent.stop()
    before = chains_and_rules(netns.run("iptables-nft-save").stdout)
    assert "KUBE-SERVICES" in before[0]["nat"]
    program_nft = NFT.replace("FAMILY", "ip").replace("TYPE", "ipv4_addr")
    netns.run("nft", "-f", "-", stdin=program_nft)
    done = dataplane(netns, "cleanup", "--kube-proxy", "--yes").stdout
    assert done.splitlines()[-1] == "kube-proxy: removed its table ip kube-proxy"
    assert chains_and_rules(netns.run("iptables-nft-save").stdout) == before


@pytest.mark.root
def test_beside_an_agent_in_nftables_mode_traffic_rules_of_ours_stay(netns: NetNs, tmp_path: Path) -> None:
    with node_agent(netns, tmp_path, "--mode", "nftables", "--probe", "off") as agent:
        agent.write(manifest([("10.244.0.1", "node")]))
        agent.start()
        program(netns, "nft")
        dataplane(netns, "cleanup", "--kube-proxy", "--yes")
        assert "table inet dataplane-nftables" in netns.run("nft", "list", "tables").stdout
        assert agent.status()["healthy"] is True


@pytest.fixture
def ipvs_mode(netns: NetNs) -> NetNs:
    """As a kube-proxy in ipvs mode leaves it, and a virtual server of somebody else."""
    netns.run("ip", "link", "add", "kube-ipvs0", "type", "dummy")
    netns.run("ip", "address", "add", "10.96.0.10/32", "dev", "kube-ipvs0")
    netns.run("ip", "address", "add", "192.0.2.1/24", "dev", "lo")
    netns.run("ipset", "create", "KUBE-CLUSTER-IP", "hash:ip,port")
    netns.run("ipset", "add", "KUBE-CLUSTER-IP", "10.96.0.10,tcp:80")
    netns.run("ipset", "create", "KUBE-NODE-PORT-TCP", "bitmap:port", "range", "0-65535")
    netns.run("ipset", "add", "KUBE-NODE-PORT-TCP", "30080")
    servers = "-A -t 10.96.0.10:80 -s rr\n-a -t 10.96.0.10:80 -r 10.180.0.1:80 -m\n-A -t 192.0.2.1:30080 -s rr\n"
    netns.run("ipvsadm", "-R", stdin=servers + "-A -t 203.0.113.7:80 -s rr\n")
    return netns


@pytest.mark.root
@pytest.mark.ipvs
def test_the_virtual_servers_of_an_ipvs_mode_go_and_those_of_others_stay(ipvs_mode: NetNs) -> None:
    planned = dataplane(ipvs_mode, "cleanup", "--kube-proxy", "--dry-run").stdout
    assert "2 IPVS virtual servers, its device kube-ipvs0, 2 ipsets\n" in planned
    assert "-D -t 10.96.0.10:80\n-D -t 192.0.2.1:30080\n" in planned
    dataplane(ipvs_mode, "cleanup", "--kube-proxy", "--yes")
    assert ipvs_mode.run("ipvsadm", "-Sn").stdout.split("\n")[0].startswith("-A -t 203.0.113.7:80 ")
    assert len(ipvs_mode.run("ipvsadm", "-Sn").stdout.split("\n")) == 2
    assert "kube-ipvs0" not in ipvs_mode.run("ip", "link").stdout
    assert ipvs_mode.run("ipset", "list", "-n").stdout == ""


@pytest.mark.root
@pytest.mark.ipvs
def test_a_device_and_servers_of_ours_are_not_taken_for_kube_proxy_s(netns: NetNs, tmp_path: Path) -> None:
    with node_agent(netns, tmp_path, "--mode", "ipvs", "--probe", "off") as agent:
        agent.write(manifest([("10.244.0.1", "node")]))
        agent.start()
        before = netns.run("ipvsadm", "-Sn").stdout
        assert before
        assert dataplane(netns, "cleanup", "--kube-proxy", "--yes").stdout == "kube-proxy: nothing of it is there\n"
        assert netns.run("ipvsadm", "-Sn").stdout == before


@pytest.mark.root
def test_while_a_kube_proxy_runs_it_refuses(netns: NetNs, tmp_path: Path) -> None:
    netns.run("nft", "add", "table", "ip", "kube-proxy")
    fake = tmp_path / "kube-proxy"
    fake.symlink_to("/bin/sleep")
    with subprocess.Popen(["ip", "netns", "exec", netns.name, str(fake), "60"]) as process:
        try:
            comm = Path(f"/proc/{process.pid}/comm")
            eventually("it runs", lambda: comm.read_text() == "kube-proxy\n")
            refused = dataplane(netns, "cleanup", "--kube-proxy", "--yes", status=1).stderr
            assert f"kube-proxy runs here (pid {process.pid})" in refused
            assert "leftover" in dataplane(netns, "cleanup", "--kube-proxy", "--dry-run").stdout
            assert "kube-proxy" in netns.run("nft", "list", "tables").stdout
            dataplane(netns, "cleanup", "--kube-proxy", "--yes", "--force")
            assert "kube-proxy" not in netns.run("nft", "list", "tables").stdout
        finally:
            process.kill()


@pytest.mark.parametrize("options", ["--kube-proxy --all", "--kube-proxy --mode ipvs", "--kube-proxy -c x", "--yes"])
def test_it_goes_alone(options: str) -> None:
    assert CliRunner().invoke(cli, ["cleanup", *options.split()]).exit_code == 2


@pytest.mark.root
def test_a_mode_in_the_environment_does_not_matter(netns: NetNs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATAPLANE_MODE", "ipvs")
    assert dataplane(netns, "cleanup", "--kube-proxy").stdout == "kube-proxy: nothing of it is there\n"
