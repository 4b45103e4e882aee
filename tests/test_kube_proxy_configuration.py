"""kube-proxy's own configuration file and flags: what they become, what is told, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from dataplane.cli import cli
from dataplane.cli.kube_proxy_flags import FLAGS, go_arguments, take_flags, with_flags
from dataplane.cli.programming import run
from dataplane.configuration import Configuration, IpvsTimeouts, read_settings
from dataplane.errors import InputError, UsageError
from dataplane.kube_proxy_configuration import FIELDS, translate

HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
OWN = "---\napiVersion: dataplane/v1alpha1\nkind: AgentConfiguration\n"

KUBEADM = """\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: ""
  burst: 0
  contentType: ""
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
  qps: 0
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 0s
conntrack:
  maxPerCore: null
  min: null
  tcpBeLiberal: false
  tcpCloseWaitTimeout: null
  tcpEstablishedTimeout: null
  udpStreamTimeout: 0s
  udpTimeout: 0s
detectLocal:
  bridgeInterface: ""
  interfaceNamePrefix: ""
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables:
  localhostNodePorts: null
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
ipvs:
  excludeCIDRs: null
  minSyncPeriod: 0s
  scheduler: ""
  strictARP: false
  syncPeriod: 0s
  tcpFinTimeout: 0s
  tcpTimeout: 0s
  udpTimeout: 0s
kind: KubeProxyConfiguration
logging:
  flushFrequency: 0
  options:
    json:
      infoBufferSize: "0"
    text:
      infoBufferSize: "0"
  verbosity: 0
metricsBindAddress: ""
mode: ""
nftables:
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
winkernel:
  enableDSR: false
  forwardHealthCheckVip: false
  networkName: ""
  rootHnsEndpointName: ""
  sourceVip: ""
"""
"""As `kubeadm init` writes it into the ConfigMap kube-proxy, pod range given."""

EKS = """\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
clientConnection:
  acceptContentTypes: ""
  burst: 10
  contentType: application/vnd.kubernetes.protobuf
  kubeconfig: /var/lib/kube-proxy/kubeconfig
  qps: 5
clusterCIDR: ""
configSyncPeriod: 15m0s
conntrack:
  maxPerCore: 32768
  min: 131072
  tcpCloseWaitTimeout: 1h0m0s
  tcpEstablishedTimeout: 24h0m0s
enableProfiling: false
healthzBindAddress: 0.0.0.0:10256
hostnameOverride: ""
iptables:
  masqueradeAll: false
  masqueradeBit: 14
  minSyncPeriod: 0s
  syncPeriod: 30s
ipvs:
  excludeCIDRs: null
  minSyncPeriod: 0s
  scheduler: ""
  syncPeriod: 30s
kind: KubeProxyConfiguration
metricsBindAddress: 0.0.0.0:10249
mode: "ipvs"
nodePortAddresses: null
oomScoreAdj: -998
portRange: ""
resourceContainer: ""
udpIdleTimeout: 250ms
"""
"""As Amazon's clusters have it in the ConfigMap kube-proxy-config."""


def settle(folder: Path, text: str, mode: str | None = None) -> tuple[Configuration, list[str]]:
    path = folder / "config.conf"
    path.write_text(text)
    read = read_settings(str(path), mode)
    return read.configuration, [str(each).removeprefix(f"{path}:") for each in read.notices]


def faults(folder: Path, text: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        settle(folder, text)
    return [str(each).removeprefix(f"{folder}/") for each in caught.value.problems]


def test_kubeadm_s_configuration_as_it_stands(tmp_path: Path) -> None:
    settings, notices = settle(tmp_path, KUBEADM)
    assert settings == Configuration(
        mode="iptables", kubeconfig="/var/lib/kube-proxy/kubeconfig.conf", cluster_cidrs=("10.244.0.0/16",)
    )
    assert notices == []


def test_eks_s_configuration_as_it_stands(tmp_path: Path) -> None:
    settings, notices = settle(tmp_path, EKS)
    assert (settings.mode, settings.kubeconfig) == ("ipvs", "/var/lib/kube-proxy/kubeconfig")
    assert (settings.metrics_bind_address, settings.resync_seconds) == ("0.0.0.0:10249", 30.0)
    assert settings.healthz_bind_address == "0.0.0.0:10256"
    fields = [notice.split(": ")[2] for notice in notices]
    conntrack = ["maxPerCore", "min", "tcpCloseWaitTimeout", "tcpEstablishedTimeout"]
    assert fields == [*(f"conntrack.{each}" for each in conntrack), "oomScoreAdj"]
    assert notices[0].startswith("12: KubeProxyConfiguration: conntrack.maxPerCore: has no meaning here: ")


def test_every_field_that_means_something_here(tmp_path: Path) -> None:
    text = HEAD + (
        "mode: ipvs\nhostnameOverride: ' Node-A '\nbindAddress: 192.0.2.7\nmetricsBindAddress: 0.0.0.0\n"
        "detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cni0}\nnodePortAddresses: [192.0.2.0/24]\n"
        "iptables: {masqueradeAll: true, syncPeriod: 5s}\nlogging: {format: json}\n"
        "ipvs: {syncPeriod: 1m30s, scheduler: wlc, strictARP: true, tcpTimeout: 15m, tcpFinTimeout: 1.5s}\n"
    )
    settings, notices = settle(tmp_path, text.replace("' Node-A '", "Node-A"))
    assert settings == Configuration(
        mode="ipvs",
        in_cluster=True,
        node_name="node-a",
        node_ips=("192.0.2.7",),
        metrics_bind_address="0.0.0.0:10249",
        bridge_interface="cni0",
        node_port_addresses=("192.0.2.0/24",),
        masquerade_all=True,
        resync_seconds=90.0,
        scheduler="wlc",
        strict_arp=True,
        ipvs_timeouts=IpvsTimeouts(tcp=900, tcp_fin=2),
        log_format="json",
    )
    assert notices == []


def test_sections_count_by_the_mode_that_runs_whoever_names_it(tmp_path: Path) -> None:
    text = HEAD + "iptables: {masqueradeAll: true, syncPeriod: 5s}\nnftables: {syncPeriod: 7s}\n"
    assert settle(tmp_path, text)[0].masquerade_all
    by_line, _ = settle(tmp_path, text, mode="nftables")
    assert (by_line.masquerade_all, by_line.resync_seconds, by_line.node_port_addresses) == (False, 7.0, ("primary",))
    beside, _ = settle(tmp_path, text + OWN + "mode: nftables\n")
    assert (beside.mode, beside.masquerade_all, beside.resync_seconds) == ("nftables", False, 7.0)


def test_node_cidr_asks_the_api(tmp_path: Path) -> None:
    settings, notices = settle(tmp_path, HEAD + "detectLocalMode: NodeCIDR\nclusterCIDR: 10.0.0.0/8\n")
    assert (settings.node_cidr, settings.cluster_cidrs) == (True, ())
    assert notices == ["4: KubeProxyConfiguration: clusterCIDR: has no meaning with detectLocalMode NodeCIDR"]


def test_our_own_document_wins_and_names_another_source(tmp_path: Path) -> None:
    settings, _ = settle(tmp_path, KUBEADM + OWN + "manifests: [a]\ndrainSeconds: 5\nclusterCIDRs: [10.0.0.0/8]\n")
    assert settings.manifests == (str(tmp_path / "a"),)
    assert (settings.kubeconfig, settings.in_cluster, settings.drain_seconds) == ("", False, 5)
    assert settings.cluster_cidrs == ("10.0.0.0/8",)
    first, _ = settle(tmp_path, OWN + "zone: z\n---\n" + HEAD)
    assert (first.zone, first.in_cluster) == ("z", True)


def test_without_a_kubeconfig_it_is_the_pod_s_service_account(tmp_path: Path) -> None:
    assert settle(tmp_path, HEAD)[0] == Configuration(mode="iptables", in_cluster=True)


def test_what_has_no_meaning_is_told_once_and_defaults_are_not(tmp_path: Path) -> None:
    text = HEAD + (
        "clientConnection: {qps: 5, burst: 20}\nfeatureGates: {A: true}\nenableProfiling: true\nfutureField: 1\n"
        "iptables:\n  masqueradeBit: 14\n  minSyncPeriod: 2s\n  localhostNodePorts: true\nwinkernel: {sourceVip: ''}\n"
    )
    _, notices = settle(tmp_path, text)
    assert [notice.split(": ")[0] + " " + notice.split(": ")[2] for notice in notices] == [
        "3 clientConnection.burst",
        "4 featureGates",
        "5 enableProfiling",
        "6 futureField",
        "9 iptables.minSyncPeriod",
        "10 iptables.localhostNodePorts",
    ]
    assert "no such field of a KubeProxyConfiguration" in notices[3]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mode: userspace", 'mode: expected iptables, ipvs, nftables (it is "userspace")'),
        ("ipvs: {scheduler: 1}", "ipvs.scheduler: expected a string (it is 1)"),
        ("ipvs: 7", "ipvs: expected a mapping (it is 7)"),
        ("ipvs: {tcpTimeout: -1s}", 'ipvs.tcpTimeout: expected a duration such as 30s or 1h0m0s (it is "-1s")'),
        ("configSyncPeriod: 30", "configSyncPeriod: expected a string (it is 30)"),
        ("ipvs: {udpTimeout: 800h}", 'ipvs.udpTimeout: expected 31 days at most (it is "800h")'),
        ("clusterCIDR: 10.0.0.0/40", "clusterCIDR: '10.0.0.0/40' is not an address range (prefix length 0 to 32)"),
        (
            "clusterCIDR: '10.0.0.0/8,10.1.0.0/16'",
            'clusterCIDR: expected one range, or one of each family (it is "10.0.0.0/8,10.1.0.0/16")',
        ),
        ("nodePortAddresses: [x]", "nodePortAddresses: 'x' is not an IP address"),
        ("nodePortAddresses: [primary, 10.0.0.0/8]", "nodePortAddresses: primary stands alone"),
        ("bindAddress: here", "bindAddress: 'here' is not an IP address"),
        (
            "metricsBindAddress: ':80'",
            "metricsBindAddress: ':80' is not ADDRESS:PORT, such as 127.0.0.1:10249 or [::1]:10249",
        ),
        ("conntrack: {min: -1}", "conntrack.min: expected a whole number from 0 to 2147483648 (it is -1)"),
        ("iptables: {masqueradeAll: 1}", "iptables.masqueradeAll: expected true or false (it is 1)"),
        ("detectLocalMode: InterfaceNamePrefix", "detectLocal.interfaceNamePrefix: missing; detectLocalMode "),
        ("hostnameOverride: 'a b'", 'hostnameOverride: expected a node\'s name (it is "a b")'),
    ],
)
def test_what_is_wrong_is_named_by_line_and_field(tmp_path: Path, line: str, expected: str) -> None:
    (fault,) = faults(tmp_path, HEAD + line + "\n")
    assert fault.startswith(f"config.conf:{1 if 'missing' in expected else 3}: KubeProxyConfiguration: {expected}")


def test_faults_of_both_documents_are_told(tmp_path: Path) -> None:
    assert faults(tmp_path, HEAD + "mode: x\n" + OWN + "zonee: z\n") == [
        'config.conf:3: KubeProxyConfiguration: mode: expected iptables, ipvs, nftables (it is "x")',
        "config.conf:7: AgentConfiguration: zonee: no such field; did you mean zone?",
    ]


@pytest.mark.parametrize("text", [HEAD + "---\n" + HEAD, OWN + "---\n" + HEAD + "---\n[]\n", HEAD + OWN + OWN])
def test_one_document_of_each_kind_at_most(tmp_path: Path, text: str) -> None:
    assert faults(tmp_path, text)[0].startswith("config.conf: expected: one AgentConfiguration (")


def test_another_version_is_refused(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path, HEAD.replace("v1alpha1", "v1alpha2"))
    assert fault.endswith('must be kubeproxy.config.k8s.io/v1alpha1 (it is "kubeproxy.config.k8s.io/v1alpha2")')


def test_nulls_are_unset_wherever_they_stand() -> None:
    nothing: dict[str, Any] = {}
    for path in FIELDS:
        section, dot, field = path.rpartition(".")
        (nothing.setdefault(section, {}) if dot else nothing)[field] = None
    assert translate(nothing) == translate({})


# ---------------------------------------------------------------------------------------------------------------- flags

KUBE_PROXY_1_36 = """
bind-address bind-address-hard-fail cleanup cluster-cidr config config-sync-period conntrack-max-per-core
conntrack-min conntrack-tcp-be-liberal conntrack-tcp-timeout-close-wait conntrack-tcp-timeout-established
conntrack-udp-timeout conntrack-udp-timeout-stream detect-local-mode feature-gates healthz-bind-address help
hostname-override init-only iptables-localhost-nodeports iptables-masquerade-bit iptables-min-sync-period
iptables-sync-period ipvs-exclude-cidrs ipvs-min-sync-period ipvs-scheduler ipvs-strict-arp ipvs-sync-period
ipvs-tcp-timeout ipvs-tcpfin-timeout ipvs-udp-timeout kube-api-burst kube-api-content-type kube-api-qps kubeconfig
log-flush-frequency log-json-info-buffer-size log-json-split-stream log-text-info-buffer-size log-text-split-stream
logging-format masquerade-all master metrics-bind-address nodeport-addresses oom-score-adj pod-bridge-interface
pod-interface-name-prefix profiling proxy-mode show-hidden-metrics-for-version vmodule write-config-to
"""


def test_every_flag_of_kube_proxy_is_taken() -> None:
    options = {name for parameter in run.params for name in parameter.opts}
    # --cleanup is a command of its own here
    assert {f"--{name}" for name in KUBE_PROXY_1_36.split()} - options == {"--cleanup", "--help"}
    assert {flag.field for flag in FLAGS.values()} - {""} <= FIELDS.keys()


def parsed(line: str) -> tuple[dict[str, Any], list[str]]:
    context = run.make_context("run", line.split())
    given = {name: value for name, value in context.params.items() if name not in ("config_file", "init_only")}
    given, notices = with_flags(given)
    return {name: value for name, value in given.items() if value not in (None, ())}, notices


def test_a_command_line_of_kube_proxy() -> None:
    line = (
        "--kubeconfig=/k --proxy-mode=ipvs --cluster-cidr=10.0.0.0/8,fd00::/8 --hostname-override=N "
        "--masquerade-all=true --ipvs-strict-arp --conntrack-max-per-core=0 --ipvs-scheduler rr --ipvs-tcp-timeout=1m "
        "--ipvs-exclude-cidrs=10.9.0.0/16 --nodeport-addresses=primary --iptables-sync-period=10s --profiling=false "
        "--metrics-bind-address=0.0.0.0:10249 --oom-score-adj=-5 --master=x -v=2"
    )
    given, notices = parsed(line)
    assert given == {
        "kubeconfig": "/k",
        "mode": "ipvs",
        "cluster_cidrs": ("10.0.0.0/8", "fd00::/8"),
        "node_name": "n",
        "masquerade_all": True,
        "strict_arp": True,
        "scheduler": "rr",
        "ipvs_timeouts": {"tcp": 60, "tcpFin": 0, "udp": 0},
        "node_port_addresses": ("primary",),
        "metrics_bind_address": "0.0.0.0:10249",
    }
    assert [notice.split()[0] for notice in notices] == ["--master", "--ipvs-exclude-cidrs", "--oom-score-adj"]


def test_the_flags_of_iptables_count_in_nftables_mode_too() -> None:
    assert parsed("--proxy-mode nftables --iptables-sync-period=10s")[0]["resync_seconds"] == 10.0
    assert "resync_seconds" not in parsed("--proxy-mode ipvs --iptables-sync-period=10s")[0]


def test_an_option_of_ours_wins_over_a_flag() -> None:
    assert parsed("--proxy-mode ipvs --mode nftables --hostname-override a --node-name b")[0] == {
        "mode": "nftables",
        "node_name": "b",
    }


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--proxy-mode x", '--proxy-mode: expected iptables, ipvs, nftables (it is "x")'),
        ("--oom-score-adj much", '--oom-score-adj: expected a whole number from -1000 to 1000 (it is "much")'),
        ("--profiling=perhaps", '--profiling: expected true or false (it is "perhaps")'),
    ],
)
def test_a_flag_that_is_wrong_is_named(line: str, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        parsed(line)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("-v 4 -f x", "--verbose -f x"),
        ("--v=3", ""),
        ("-v -f x", "-v -f x"),
        ("--masquerade-all=false --in-cluster=true", "--in-cluster"),
        ("--masquerade-all=maybe", "--masquerade-all=maybe"),
        ("--profiling -- --profiling", "--profiling=true -- --profiling"),
    ],
)
def test_go_s_way_to_write_flags(line: str, expected: str) -> None:
    assert go_arguments(line.split()) == expected.split()


def test_nothing_said_is_nothing_set() -> None:
    assert take_flags({"mode": None}, None) == ({}, [])


def test_check_tells_what_has_no_meaning_and_is_content(tmp_path: Path) -> None:
    path = tmp_path / "config.conf"
    path.write_text(HEAD + "enableProfiling: true\n")
    done = CliRunner().invoke(cli, ["check", "-c", str(path)])
    assert done.exit_code == 0
    assert done.stdout == f"{path}: ok\n"
    assert done.stderr == f"{path}:3: KubeProxyConfiguration: enableProfiling: has no meaning here: {WHY}\n"


def test_check_is_content_with_the_path_of_a_kubeconfig_in_a_pod(tmp_path: Path) -> None:
    path = tmp_path / "config.conf"
    path.write_text(KUBEADM)
    done = CliRunner().invoke(cli, ["check", "-c", str(path)])
    assert (done.exit_code, done.stdout) == (0, f"{path}: ok\n")
    assert done.stderr == "dataplane: /var/lib/kube-proxy/kubeconfig.conf: is not on this machine, and not checked\n"


WHY = "there is no profiling over HTTP"


def test_the_configurations_above_are_yaml_that_others_read_alike() -> None:
    assert yaml.safe_load(KUBEADM)["mode"] == ""
    assert yaml.safe_load(EKS)["oomScoreAdj"] == -998
