"""Names from end to end: a pod whose resolver is a cluster IP behind which the agent itself answers."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .lanes import PARAMETERS, Lane, build_world
from .netns import Topology
from .node_agent import NodeAgent, node_agent
from .traffic import eventually

NODE, POD = "10.244.1.1", "10.244.3.6"
"""The node as the second pod sees it, and the first pod; each pod is in a network of its own."""
RESOLV = "nameserver 10.96.0.10\nsearch default.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n"


def document(name: str, vip: str, endpoints: list[str], namespace: str = "default", **ports: list[object]) -> str:
    """A Service and its slice; `ports`: name = [number, protocol, target]."""
    meta = {"name": name, "namespace": namespace}
    listed = [{"name": port, "port": given[0], "protocol": given[1]} for port, given in ports.items()]
    targets = [{"name": port, "port": given[2], "protocol": given[1]} for port, given in ports.items()]
    service = {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {"clusterIP": vip, "ports": listed}}
    one = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {**meta, "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "ports": targets,
        "endpoints": [{"addresses": [each]} for each in endpoints],
    }
    return f"{json.dumps(service)}\n{json.dumps(one)}\n"


DNS = document("kube-dns", "10.96.0.10", [NODE], "kube-system", dns=[53, "UDP", 53], tcp=[53, "TCP", 53])
WEB = document("hostnames", "10.96.0.80", [POD], http=[80, "TCP", 8080])


@contextlib.contextmanager
def cluster(lane: Lane, folder: Path) -> Iterator[tuple[Topology, NodeAgent]]:
    """A node whose agent answers names, a pod with a web server, and another pod, whose resolver that is."""
    (folder / "resolv.conf").write_text(RESOLV)
    (folder / "index.html").write_text("hello from a pod\n")
    with build_world() as built:
        server = subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                built.pods[0].ns.name,
                sys.executable,
                "-m",
                "http.server",
                "8080",
                "-d",
                str(folder),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            with node_agent(built.node, folder, *lane.arguments, "--dns", f"{NODE}:53") as agent:
                agent.write(DNS + WEB)
                agent.start()
                ask = ("curl", "-s", "-m", "5", "-o", "/dev/null", "http://127.0.0.1:8080/index.html")
                eventually("the pod's server", lambda: built.pods[0].ns.run(*ask, check=False).returncode == 0)
                yield built, agent
        finally:
            server.kill()
            server.wait(10)


def in_pod(built: Topology, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A command in the second pod, with its own resolv.conf; `ip netns exec` has mounts of its own."""
    script = f'mount --bind {folder}/resolv.conf /etc/resolv.conf && exec "$@"'
    return built.pods[1].ns.run("sh", "-c", script, "sh", *command, check=False)


@pytest.mark.parametrize("lane", PARAMETERS)
def test_a_pod_reaches_a_service_by_name_through_the_agents_own_service(lane: Lane, tmp_path: Path) -> None:
    with cluster(lane, tmp_path) as (built, agent):
        for name in ("hostnames.default.svc.cluster.local", "hostnames.default", "hostnames"):
            done = in_pod(built, tmp_path, "curl", "-sS", "-m", "20", f"http://{name}/index.html")
            assert done.stdout == "hello from a pod\n", done.stderr
        assert in_pod(built, tmp_path, "curl", "-sS", "-m", "20", "http://nobody/").returncode == 6
        # over TCP as well
        by_tcp = in_pod(built, tmp_path, "env", "RES_OPTIONS=use-vc", "getent", "ahostsv4", "hostnames")
        assert by_tcp.stdout.split()[0] == "10.96.0.80", by_tcp.stderr
        # what the kernel has, names have at once
        agent.change(DNS + WEB + document("late", "10.96.0.81", [POD], http=[80, "TCP", 8080]))
        done = in_pod(built, tmp_path, "curl", "-sS", "-m", "20", "http://late/index.html")
        assert done.stdout == "hello from a pod\n", done.stderr
        status = agent.status()["dns"]
        assert status["listen"] == [f"{NODE}:53"]
        assert status["services"] == 3
        assert status["queries"]["udp"] > 0
        assert status["queries"]["tcp"] > 0
        told = json.loads(agent.run("dns", "query", "late", "-o", "json").stdout)
        assert [each["data"] for each in told["answers"]] == ["10.96.0.81"]
        assert agent.stop() == 0
        assert in_pod(built, tmp_path, "getent", "hosts", "hostnames.default.svc.cluster.local").returncode == 2


@pytest.mark.root
def test_an_address_that_comes_later_is_listened_on_then(tmp_path: Path) -> None:
    with (
        Topology.build([(POD,)]) as built,
        node_agent(built.node, tmp_path, "--mode", "nftables", "--dns", "10.244.9.9:53") as agent,
    ):
        agent.write(WEB)
        agent.start()
        eventually("it tells", lambda: any(line["event"] == "names not served" for line in agent.log()))
        assert "10.244.9.9:53" in agent.status()["dns"]["lastError"]
        built.node.ip("address add 10.244.9.9/32 dev lo")
        eventually("it listens", lambda: any(line["event"] == "names served" for line in agent.log()))
        assert agent.stop() == 0
