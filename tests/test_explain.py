"""`dataplane explain` on a fake kernel: what it says, in which form, and how it ends."""

import json
from pathlib import Path

import click
import pytest
from click.testing import Result

import dataplane.cli.options
from dataplane.cli import cli
from dataplane.cli.looking import complete_services
from dataplane.model import (
    Address,
    Kind,
    Masquerade,
    NoServers,
    RealServer,
    VirtualAddress,
    VirtualServer,
    parse_address,
    parse_network,
)
from dataplane.sightings import Sighting
from dataplane.walk import Detection, Remembered, Verdict

from .test_cli import Kernel, invoke
from .test_cli import kernel as kernel

PODS = parse_network("10.244.0.0/16")
MANIFEST = """
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec:
  type: NodePort
  clusterIP: 10.96.0.10
  externalIPs: [192.0.2.10]
  ports: [{name: http, port: 80, nodePort: 30080}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: default, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.244.1.7]}, {addresses: [10.244.2.3]}]
---
apiVersion: v1
kind: Service
metadata: {name: headless, namespace: default}
spec: {clusterIP: None, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: broken, namespace: default}
spec: {clusterIP: 127.0.0.1, ports: [{port: 80}]}
"""


def at(text: str, port: int = 80, *, inside: bool = False) -> VirtualAddress:
    return VirtualAddress(6, parse_address(text), port, inside)


def reals(*texts: str, weight: int = 1) -> tuple[RealServer, ...]:
    return tuple(RealServer(parse_address(each), 8080, weight, True) for each in texts)


WEB = VirtualServer(at("10.96.0.10"), reals("10.244.1.7", "10.244.2.3"), label="default/web:http")


@pytest.fixture
def held(kernel: Kernel) -> Kernel:
    """A kernel that holds one Service."""
    kernel.backend.mode = "ipvs"
    kernel.backend.servers[WEB.at] = WEB
    kernel.backend.vips.add(WEB.at.address)
    kernel.backend.hairpins = {each.address for each in WEB.real_servers}
    kernel.backend.detection = Detection(cluster_cidrs=(PODS,))
    kernel.backend.prepared = True
    return kernel


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    path = tmp_path / "services.yaml"
    path.write_text(MANIFEST)
    return path


def explain(*arguments: str) -> Result:
    return invoke("explain", *arguments)


def told(*arguments: str) -> dict[str, object]:
    document: dict[str, object] = json.loads(explain(*arguments, "-o", "json").stdout)
    return document


# ------------------------------------------------------------------------------------------------------ what it says


def test_the_verdict_comes_first_and_the_steps_name_what_decides(held: Kernel) -> None:
    done = explain("--from", "10.244.9.9", "--to", "default/web")
    lines = done.stdout.splitlines()
    assert lines[0] == ("default/web:http: 10.244.9.9 -> 10.96.0.10:80/TCP goes to one of 2 endpoints, not masqueraded")
    assert lines[1].split() == ["50.0%", "10.244.1.7:8080"]
    assert any("10.244.9.9 is inside the cluster: in 10.244.0.0/16" in line for line in lines)
    assert any("fake server TCP 10.96.0.10:80" in line for line in lines)
    assert done.exit_code == 0


def test_a_client_from_outside_is_masqueraded_and_a_pod_that_meets_itself_only_then(held: Kernel) -> None:
    outside = told("--from", "203.0.113.9", "--to", "web")
    assert [one["masquerade"] for one in outside["endpoints"]] == [True, True]  # type: ignore[attr-defined]
    itself = explain("--from", "10.244.1.7", "--to", "web").stdout
    assert "masqueraded to itself only" in itself.splitlines()[0]
    assert "(masqueraded)" in itself.splitlines()[1]


@pytest.mark.parametrize(
    ("target", "verdict", "reason"),
    [
        ("10.96.0.10:81", "refused", "closed port: 10.96.0.10 is the cluster IP of Service default/web"),
        ("10.96.0.10:80/UDP", "refused", "no port 80/UDP"),
        ("10.96.9.9:80", "not ours", "no Service is at 10.96.9.9:80/TCP"),
        ("10.96.0.20:80", "refused", "Service default/empty has no endpoints"),
        ("10.96.0.21:80", "dropped", "no local endpoints, and internalTrafficPolicy is Local"),
        ("192.0.2.1:80", "dropped", "203.0.113.9 is not in loadBalancerSourceRanges (198.51.100.0/24)"),
        ("10.97.0.1:80", "dropped", "no Service has the cluster IP 10.97.0.1"),
        ("10.96.0.22:80", "not ours", "somebody else's virtual server"),
        ("127.0.0.1:30080", "not ours", "node ports are not served at loopback addresses"),
    ],
)
def test_it_says_why_a_connection_leads_nowhere(held: Kernel, target: str, verdict: str, reason: str) -> None:
    backend = held.backend
    backend.detection = Detection(cluster_cidrs=(PODS,), service_cidrs=(parse_network("10.97.0.0/16"),))
    balanced = VirtualServer(
        at("192.0.2.1"),
        reals("10.244.1.7"),
        masquerade=Masquerade.ALWAYS,
        bound=False,
        kind=Kind.LOAD_BALANCER,
        label="default/lb",
        allowed=(parse_network("198.51.100.0/24"),),
    )
    for server in (
        VirtualServer(at("10.96.0.20"), label="default/empty"),
        VirtualServer(at("10.96.0.21"), no_servers=NoServers.DROP, label="default/elsewhere"),
        VirtualServer(at("192.168.7.7", 30080), reals("10.244.1.7"), bound=False, kind=Kind.NODE_PORT, label="x/y"),
        balanced,
    ):
        backend.servers[server.at] = server
    backend.foreign.add(at("10.96.0.22"))
    done = explain("--from", "203.0.113.9", "--to", target, "-o", "json")
    document = json.loads(done.stdout)
    assert document["verdict"] == verdict
    assert reason in document["reason"]
    assert done.exit_code == 1


def test_clients_inside_the_cluster_have_a_server_of_their_own(held: Kernel) -> None:
    outer = VirtualServer(
        at("192.0.2.1"),
        reals("10.244.1.7"),
        masquerade=Masquerade.NODE,
        bound=False,
        kind=Kind.LOAD_BALANCER,
        label="x/y",
    )
    inner = VirtualServer(
        at("192.0.2.1", inside=True),
        reals("10.244.1.7", "10.244.2.3"),
        masquerade=Masquerade.NODE,
        bound=False,
        kind=Kind.LOAD_BALANCER,
        label="x/y",
    )
    held.backend.servers |= {outer.at: outer, inner.at: inner}
    assert len(told("--from", "203.0.113.9", "--to", "192.0.2.1:80")["endpoints"]) == 1  # type: ignore[arg-type]
    assert len(told("--from", "10.244.9.9", "--to", "192.0.2.1:80")["endpoints"]) == 2  # type: ignore[arg-type]


def test_a_client_that_is_remembered_goes_where_it_was(held: Kernel) -> None:
    import msgspec

    server = msgspec.structs.replace(WEB, persistence=600)
    held.backend.servers[server.at] = server
    client = Address(parse_address("10.244.9.9"))
    held.backend.clients[server.at, client] = Remembered(parse_address("10.244.2.3"), 8080, 55)
    document = told("--from", "10.244.9.9", "--to", "web")
    assert [one["probability"] for one in document["endpoints"]] == [0.0, 1.0]  # type: ignore[attr-defined]
    assert "this client had 10.244.2.3:8080, and has it again (55 s left)" in json.dumps(document)
    other = told("--from", "10.244.9.8", "--to", "web")
    assert [one["probability"] for one in other["endpoints"]] == [0.5, 0.5]  # type: ignore[attr-defined]


def test_draining_endpoints_take_nothing_new(held: Kernel) -> None:
    import msgspec

    draining = (*reals("10.244.1.7"), *reals("10.244.2.3", weight=0))
    held.backend.servers[WEB.at] = msgspec.structs.replace(WEB, real_servers=draining)
    done = explain("--from", "10.244.9.9", "--to", "web").stdout
    assert "goes to 10.244.1.7:8080" in done
    assert "0%  10.244.2.3:8080  (drains: open connections only)" in done


@pytest.mark.parametrize(("scheduler", "first"), [("rr", 0.5), ("wrr", 0.75), ("mh", None), ("wlc", None)])
def test_probabilities_follow_the_scheduler(held: Kernel, scheduler: str, first: float | None) -> None:
    import msgspec

    weighted = (*reals("10.244.1.7", weight=3), *reals("10.244.2.3"))
    held.backend.servers[WEB.at] = msgspec.structs.replace(WEB, real_servers=weighted, scheduler=scheduler)
    assert told("--from", "10.244.9.9", "--to", "web")["endpoints"][0]["probability"] == first  # type: ignore[index]


# --------------------------------------------------------------------------------------------- kernel and manifests


def test_in_sync_with_the_manifests(held: Kernel, manifests: Path) -> None:
    done = explain("--from", "10.244.9.9", "--to", "10.96.0.10:80", "-f", str(manifests), "--cluster-cidr", str(PODS))
    assert "The manifests say the same." in done.stdout


def test_it_says_where_the_manifests_differ_and_what_to_do(held: Kernel, manifests: Path) -> None:
    del held.backend.servers[WEB.at]
    document = told("--from", "10.244.9.9", "--to", "10.96.0.10:80", "-f", str(manifests))
    assert document["verdict"] == "refused"
    assert document["desired"]["verdict"] == "endpoint"  # type: ignore[index]
    said = json.dumps(document["differences"])
    assert "the manifests have default/web:http here, the kernel has not" in said
    assert "no agent runs here" in said or "one runs" in said


def test_an_endpoint_that_only_one_side_has_is_named(held: Kernel, manifests: Path) -> None:
    manifests.write_text(MANIFEST.replace(", {addresses: [10.244.2.3]}", ", {addresses: [10.244.3.6]}"))
    said = "\n".join(told("--to", "web", "-f", str(manifests))["differences"])  # type: ignore[arg-type]
    assert "endpoint 10.244.2.3:8080 is in the kernel only" in said
    assert "endpoint 10.244.3.6:8080 is in the manifests only" in said


def test_an_external_ip_that_is_not_allowed_is_told_with_the_objects_problem(held: Kernel, manifests: Path) -> None:
    done = explain("--from", "203.0.113.9", "--to", "192.0.2.10:80", "-f", str(manifests))
    assert "not ours: no Service is at 192.0.2.10:80/TCP" in done.stdout
    assert "Service default/web: spec.externalIPs: 192.0.2.10: not among the allowed external IPs" in done.stdout
    assert done.exit_code == 1


def test_a_node_port_that_is_not_served_here_is_told(held: Kernel, manifests: Path) -> None:
    arguments = ["--node-port-addresses", "198.51.100.0/24", "-f", str(manifests)]
    done = explain("--from", "203.0.113.9", "--to", "192.168.5.5:30080", *arguments)
    assert "30080 is the node port of Service default/web, which is not served at 192.168.5.5" in done.stdout


def test_a_mass_delete_that_is_held_back_is_told(kernel: Kernel, tmp_path: Path) -> None:
    for number in range(20):
        server = VirtualServer(at(f"10.96.1.{number}"), reals("10.244.1.7"), label=f"default/old{number}")
        kernel.backend.servers[server.at] = server
    kernel.backend.prepared, kernel.backend.mode = True, "ipvs"
    (tmp_path / "web.yaml").write_text(MANIFEST)
    done = explain("--to", "old3", "--from", "10.244.9.9", "-f", str(tmp_path))
    assert "the kernel holds default/old3 here, the manifests do not" in done.stdout
    assert "held back: 20 virtual servers would go at once" in done.stdout


def test_the_manifests_alone_need_no_root(kernel: Kernel, manifests: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataplane.cli.options, "has_net_admin", lambda: False)
    done = explain("--to", "web", "--from", "10.244.9.9", "-f", str(manifests), "--manifests-only")
    assert done.exit_code == 0, done.stderr
    assert "Why (by the manifests; the kernel was not asked):" in done.stdout
    assert explain("--to", "web", "-f", str(manifests)).exit_code == 7


@pytest.mark.parametrize(
    ("name", "reason"),
    [("headless", "it is headless"), ("broken", 'spec.clusterIP: "127.0.0.1" is a loopback address')],
)
def test_a_service_without_addresses_is_told_with_the_reason(
    held: Kernel, manifests: Path, name: str, reason: str
) -> None:
    done = explain("--to", name, "-f", str(manifests))
    assert done.stdout.startswith(f"default/{name}: not ours: ")
    assert reason in done.stdout
    assert done.exit_code == 1


# -------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "wbe"], "no Service wbe; did you mean web"),
        (["--to", "default/web:htp"], "default/web has no port htp; did you mean http?"),
        (["--to", "10.96.0.10"], "which port? as 10.96.0.10:80"),
        (["--to", "10.96.0.10:0"], "0 is not a port"),
        (["--to", "10.96.0.10:80/TPC"], "no protocol TPC; did you mean TCP?"),
        (["--to", "10.96.0.10:80/TCP", "--protocol", "udp"], "say different things"),
        (["--to", "web", "--protocol", "udp"], "web has no UDP, but TCP"),
        (["--to", "web", "--from", "fd00::1"], "no address of the family of fd00::1"),
        (["--to", "10.96.0.10:80", "--from", "fd00::1"], "two families"),
        (["--to", "web", "--from", "nobody"], "'nobody' is not an IP address"),
        (["--to", "shop"], "which one? a/shop, b/shop"),
        (["--to", "many"], "which port? x/many:http (TCP), x/many:https (TCP)"),
        ([], "Missing option '--to'"),
        (["--to", "web", "--manifests-only"], "--manifests-only needs manifests"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(held: Kernel, arguments: list[str], said: str) -> None:
    for number, label in enumerate(("a/shop", "b/shop", "x/many:http", "x/many:https")):
        server = VirtualServer(at(f"10.96.2.{number}"), reals("10.244.1.7"), label=label)
        held.backend.servers[server.at] = server
    done = explain(*arguments)
    assert said in done.stderr
    assert done.exit_code == 2


def test_a_port_is_named_by_its_name_or_number(held: Kernel) -> None:
    for target in ("default/web:http", "web:80", "10.96.0.10:80/tcp"):
        assert explain("--to", target, "--from", "10.244.9.9").exit_code == 0


def test_without_a_client_it_is_this_node(held: Kernel) -> None:
    document = told("--to", "web")
    assert document["from"]["node"] is True  # type: ignore[index]


def test_names_of_services_are_completed(held: Kernel) -> None:
    command = cli.get_command(click.Context(cli), "explain")
    assert command is not None
    option = next(each for each in command.params if each.name == "target")
    assert complete_services(click.Context(command), option, "default/w") == ["default/web"]


def test_text_of_users_is_escaped(held: Kernel) -> None:
    import msgspec

    held.backend.servers[WEB.at] = msgspec.structs.replace(WEB, label="default/we\x1b[2Jb")
    assert "\x1b" not in explain("--to", "10.96.0.10:80", "--from", "10.244.9.9").stdout


# ----------------------------------------------------------------------------------------------------------- trace


def sighting(client: str, port: int = 40000) -> Sighting:
    real = (parse_address("10.244.1.7"), 8080)
    return Sighting(6, parse_address(client), port, Verdict.ENDPOINT, real, parse_address(client), "", ("a step",))


def test_connections_are_told_as_they_come_and_counted(held: Kernel) -> None:
    held.backend.sightings = [sighting("10.244.9.9", 40000 + number) for number in range(5)]
    done = invoke("trace", "--to", "web", "-n", "3")
    assert done.exit_code == 0
    assert done.stdout.splitlines()[:2] == [
        "default/web:http: 10.244.9.9:40000 -> 10.96.0.10:80/TCP goes to 10.244.1.7:8080, not masqueraded",
        "    a step",
    ]
    assert len(done.stdout.splitlines()) == 6
    assert "looking at default/web:http (10.96.0.10:80/TCP) for 10 s by a fake" in done.stderr


def test_nothing_seen_is_status_1_and_says_what_the_rules_would_do(held: Kernel) -> None:
    done = invoke("trace", "--to", "10.96.0.10:81", "--seconds", "0.1")
    assert done.exit_code == 1
    assert "nothing was seen in 0.1 s; by its rules such a connection is refused: closed port" in done.stderr


def test_a_trace_as_documents(held: Kernel) -> None:
    held.backend.sightings = [sighting("10.244.9.9"), sighting("10.244.9.8")]
    done = invoke("trace", "--from", "10.244.9.8", "--to", "web", "--seconds", "0.1", "-o", "json")
    document = json.loads(done.stdout)
    assert (document["witness"], document["service"]) == ("a fake", "default/web:http")
    assert [each["client"] for each in document["connections"]] == ["10.244.9.8"]
    held.backend.sightings = [sighting("10.244.9.9")]
    (line,) = invoke("trace", "--to", "web", "-n", "1", "-o", "jsonl").stdout.splitlines()
    assert json.loads(line)["endpoint"] == {"address": "10.244.1.7", "port": 8080}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Missing option '--to'"),
        (["--to", "10.96.0.10"], "which port?"),
        (["--to", "wbe"], "did you mean web"),
        (["--to", "web", "--seconds", "3600"], "0.1<=x<=600"),
        (["--to", "web", "-n", "100000"], "1<=x<=1000"),
        (["--to", "10.96.0.10:80", "--from", "fd00::1"], "two families"),
    ],
)
def test_a_look_without_bounds_is_a_usage_error(held: Kernel, arguments: list[str], said: str) -> None:
    done = invoke("trace", *arguments)
    assert said in done.stderr
    assert done.exit_code == 2
