"""What Prometheus reads, and what is made of it in deploy/."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dataplane.rows import Counts, Look
from dataplane.web.metrics import Exposition, Ratchet
from dataplane.web.viewing import View

from .web_stage import ScriptedAgent, look, real, service

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
TWO = (real("10.244.0.1", 30), real("10.244.0.2", 12, weight=0, state="draining", drain_seconds_left=90))


def view_of(seen: Look, **status: Any) -> View:
    told = {**ScriptedAgent().agent.status(), "mode": seen.mode, **status}
    return View(1, seen, seen.services, told, conntrack=(1000, 4000))


def exposition(max_series: int = 100_000) -> tuple[Exposition, CollectorRegistry]:
    one, registry = Exposition(max_series), CollectorRegistry(auto_describe=False)
    registry.register(one)
    return one, registry


def text_of(view: View, max_series: int = 100_000) -> str:
    one, registry = exposition(max_series)
    one.view = view
    return generate_latest(registry).decode()


def samples(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
    return found


DNS = {
    "listen": ["10.244.0.1:53"],
    "queries": {"udp": 12, "tcp": 3},
    "rcodes": {"0": 9, "3": 5},
    "limited": {"dropped": 1, "truncated": 0},
    **dict.fromkeys(("malformed", "forwarded", "upstreamFailures", "closedConnections"), 0),
    **dict.fromkeys(("services", "prepared", "connections"), 2),
}
FULL = view_of(look(service("default/web:http", "10.0.1.175", *TWO), counts=Counts("probe", (), {"full": 3})), dns=DNS)
FULL = msgspec.structs.replace(FULL, names={"default/web": 9})
EVERYTHING = samples(text_of(FULL)) | samples(
    text_of(view_of(look(service("default/web:http", "10.0.1.175", *TWO), mode="nftables")))
)


def test_answers_to_names_are_told_by_rcode_and_by_service() -> None:
    answers = {labels["rcode"]: value for labels, value in EVERYTHING["dataplane_dns_answers_total"]}
    assert (answers["NOERROR"], answers["NXDOMAIN"], answers["SERVFAIL"]) == (9, 5, 0)
    assert EVERYTHING["dataplane_dns_service_answers_total"] == [({"namespace": "default", "service": "web"}, 9)]


def test_an_agent_without_names_has_no_figures_of_them() -> None:
    assert "dataplane_dns" not in text_of(view_of(look(service("default/web:http", "10.0.1.175", *TWO))))


def test_a_backends_hits_have_its_address_and_its_services_name() -> None:
    hits = EVERYTHING["dataplane_backend_hits_total"]
    assert (
        {
            "source": "probe",
            "namespace": "default",
            "service": "web",
            "port_name": "http",
            "local_address": "10.0.1.175",
            "local_port": "80",
            "proto": "TCP",
            "inside": "false",
            "remote_address": "10.244.0.1",
            "remote_port": "9376",
        },
        30.0,
    ) in hits
    assert [value for _, value in hits] == [30.0, 12.0]


def test_state_and_clock_of_a_backend_that_drains() -> None:
    states = {labels["remote_address"]: labels["state"] for labels, _ in EVERYTHING["dataplane_backend_state"]}
    assert states == {"10.244.0.1": "active", "10.244.0.2": "draining"}
    ((labels, left),) = EVERYTHING["dataplane_backend_drain_remaining_seconds"]
    assert (labels["remote_address"], left) == ("10.244.0.2", 90.0)


def test_missed_hits_have_a_reason() -> None:
    assert samples(text_of(FULL))["dataplane_missed_hits_total"] == [({"reason": "full"}, 3.0)]


def test_hits_that_nobody_can_count_are_left_out_and_not_zero() -> None:
    text = text_of(view_of(look(service("default/web", "10.0.1.175", real("10.244.0.1", None)))))
    assert "dataplane_backend_hits_total{" not in text
    assert "dataplane_backend_weight{" in text


def test_what_somebody_else_programmed_is_not_exported() -> None:
    text = text_of(view_of(look(service("", "10.0.1.9", *TWO, ours=False))))
    assert "10.0.1.9" not in text
    assert samples(text)["dataplane_services"] == [({}, 0.0)]


def test_the_histogram_is_cumulative() -> None:
    agent = ScriptedAgent().agent
    for seconds in (0.0005, 0.003, 100.0):
        agent._figures.sync("change", "committed", seconds, 1, 0, 0)
    found = samples(text_of(View(1, look(), (), agent.status())))
    partial = [
        (labels["le"], value)
        for labels, value in found["dataplane_sync_duration_seconds_bucket"]
        if labels["kind"] == "partial"
    ]
    assert partial[:4] == [("0.001", 1.0), ("0.002", 1.0), ("0.004", 2.0), ("0.008", 2.0)]
    assert partial[-1] == ("+Inf", 3.0)
    assert found["kubeproxy_sync_proxy_rules_duration_seconds_count"] == [({}, 3.0)]


def test_no_exported_value_ever_falls() -> None:
    one, registry = exposition()
    exported = []
    for hits in (5, 9, 0, 2, 1):
        one.view = view_of(look(service("default/web", "10.0.1.175", real("10.244.0.1", hits))))
        exported.append(samples(generate_latest(registry).decode())["dataplane_backend_hits_total"][0][1])
    assert exported == [5, 9, 9, 11, 12]


def test_the_ratchet_forgets_what_it_has_not_seen_for_longest() -> None:
    ratchet = Ratchet(room=2)
    for name in ("a", "b", "a", "c"):
        ratchet.value(name, (), 5)
    assert ratchet.value("a", (), 1) == 6
    assert ratchet.value("b", (), 1) == 1


@pytest.mark.parametrize(
    ("limit", "services", "backends", "left_out"), [(14, True, True, 0), (13, True, False, 12), (1, False, False, 14)]
)
def test_too_many_series_leave_backends_out_first(limit: int, services: bool, backends: bool, left_out: int) -> None:
    rows = [service(f"default/web-{number}", f"10.0.1.{number}", *TWO) for number in range(2)]
    text = text_of(view_of(look(*rows)), limit)
    assert ("dataplane_service_hits_total{" in text) is services
    assert ("dataplane_backend_hits_total{" in text) is backends
    found = samples(text)
    assert found["dataplane_metrics_series_left_out"] == [({}, left_out)]
    assert found["dataplane_metrics_series"] == [({}, 14 - left_out)]
    assert found["dataplane_backends"] == [({}, 4.0)]


def test_hostile_names_break_no_line_and_act_on_no_terminal() -> None:
    name = 'a"} 1\n\x1b[2Jevil{x="\u202e'
    text = text_of(view_of(look(service(f"default/{name}", "10.0.1.175", *TWO))))
    assert "\x1b" not in text
    assert "\u202e" not in text
    ((labels, _),) = samples(text)["dataplane_service_hits_total"]
    assert labels["service"] == 'a"} 1\\n\\x1b[2Jevil{x="\\u202e'


def test_without_an_agent_there_is_a_metric_that_says_so() -> None:
    found = samples(text_of(View(1, trouble="no agent")))
    assert found["dataplane_agent_up"] == [({}, 0.0)]
    assert "dataplane_healthy" not in found


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool (package prometheus) is not here")
def test_promtool_finds_nothing_to_complain_of() -> None:
    # kube-proxy's own name, which breaks the rule
    text = "".join(line + "\n" for line in text_of(FULL).splitlines() if "no_local_endpoints" not in line)
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


# ------------------------------------------------------------------------------------------------------------- deploy


def metrics_in(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:dataplane|kubeproxy)_[a-z_]+", expression))


def dashboard_expressions() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return found + [each["definition"] for each in dashboard["templating"]["list"] if "definition" in each]


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("expression", [*dashboard_expressions(), *(rule["expr"] for rule in rules())])
def test_the_metrics_that_are_asked_for_exist(expression: str) -> None:
    assert metrics_in(expression)
    assert metrics_in(expression) <= EVERYTHING.keys()


@pytest.mark.parametrize("expression", [*dashboard_expressions(), *(rule["expr"] for rule in rules())])
def test_the_labels_that_are_asked_for_exist(expression: str) -> None:
    for name, selector in re.findall(r"\b(dataplane_[a-z_]+)\{([^}]*)\}", expression):
        known = set[str]().union(*(labels for labels, _ in EVERYTHING[name])) | {"instance", "job"}
        assert set(re.findall(r"(\w+)(?:=~|=|!=)\"", selector)) <= known


def test_the_dashboards_panels_do_not_overlap_and_have_names_of_their_own() -> None:
    panels = json.loads((DEPLOY / "grafana-dashboard.json").read_text())["panels"]
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        mine = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not mine & cells, panel["title"]
        assert at["x"] + at["w"] <= 24
        cells |= mine
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)


def test_every_alert_says_what_it_means() -> None:
    for rule in rules():
        assert {"summary", "description"} == rule["annotations"].keys(), rule["alert"]
        assert rule["labels"]["severity"] in ("info", "warning", "critical")


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool (package prometheus) is not here")
def test_promtool_accepts_the_rules() -> None:
    done = subprocess.run(
        ["promtool", "check", "rules", DEPLOY / "alerts.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_documentation_names_every_metric() -> None:
    readme = (ROOT / "docs" / "watching.md").read_text()
    named = set(re.findall(r"`((?:dataplane|kubeproxy)_[a-z_]+)`", readme))
    named |= {f"dataplane_virtual_servers{suffix}" for suffix in re.findall(r"`(_[a-z_]+)`", readme)}
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in EVERYTHING}
    assert {name for name in families if name.startswith("dataplane_")} <= named
    assert named <= families
