"""A node changes over: kube-proxy's own configuration, its command line, and at last what it left."""

import subprocess
from pathlib import Path

import pytest

from .kube_api import endpoint_slice, kubeconfig, service
from .netns import NetNs
from .node_agent import NodeAgent
from .test_kube_agent import Served, rules
from .test_kube_proxy_leftovers import NFT, SVC, program
from .traffic import eventually

CONFIG = """\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
clientConnection: {kubeconfig: KUBECONFIG, qps: 50}
clusterCIDR: 10.180.0.0/16
healthzBindAddress: 127.0.0.1:10256
nodePortAddresses: [127.0.0.0/8]
---
apiVersion: dataplane/v1alpha1
kind: AgentConfiguration
logFormat: json
probe: "off"
metricsBindAddress: ""
"""


@pytest.mark.root
def test_a_node_changes_over_from_kube_proxy(tmp_path: Path) -> None:
    assert "map service-ips" in NFT
    with NetNs.create("kube") as ns:
        program(ns, "nft")  # kube-proxy has been stopped; what it wrote works on
        served = Served(ns)
        served.api.put(service("web", "10.96.0.7"))
        served.api.put(endpoint_slice("web-a", "web", "10.180.0.9"))
        served.call(lambda api: api.start())
        (tmp_path / "kubeconfig.conf").write_text(kubeconfig(served.api.url))
        config = tmp_path / "config.conf"
        config.write_text(CONFIG.replace("KUBECONFIG", str(tmp_path / "kubeconfig.conf")))
        agent = NodeAgent(ns, tmp_path)
        agent.starts = 1
        with (tmp_path / "agent-1.log").open("wb") as log:
            flags = ("--hostname-override=Node-A", "-v=2", "--oom-score-adj=-5", "--iptables-masquerade-bit=14")
            agent.process = subprocess.Popen(
                agent.command("run", f"--config={config}", *flags),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            eventually("the Service is programmed", lambda: "10.180.0.9" in rules(ns), 60)
            notices = [line["notice"] for line in agent.log() if line["event"] == "configuration"]
            assert [notice.removeprefix(f"{config}:4: KubeProxyConfiguration: ").split()[0] for notice in notices] == [
                "clientConnection.qps:",
                "--oom-score-adj",
            ]
            assert agent.status()["mode"] == "nftables"
            answer = ns.run("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "http://127.0.0.1:10256/livez")
            assert answer.stdout == "200"

            assert SVC in ns.run("iptables-nft-save").stdout
            agent.run("cleanup", "--kube-proxy", "--yes")
            assert SVC not in ns.run("iptables-nft-save").stdout
            assert "table ip kube-proxy" not in rules(ns)
            assert "10.180.0.9" in rules(ns)
            assert agent.status()["healthy"] is True
            assert agent.stop() == 0
        finally:
            if agent.process.poll() is None:
                agent.process.kill()
                agent.process.wait(30)
            served.end()
