"""What is in deploy/: manifests by the models that are generated from Kubernetes' OpenAPI, the image by its parts."""

import copy
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from lightkube.core.resource_registry import resource_registry
from lightkube.resources import apps_v1, core_v1, rbac_authorization_v1

from dataplane.cli.programming import run
from dataplane.cli.upkeep import cleanup
from dataplane.configuration import read_settings
from dataplane.control_socket import DIRECTORY
from dataplane.kube_transport import kubeconfig_reader
from dataplane.run_tool import PACKAGES

ROOT = Path(__file__).resolve().parent.parent
KUBERNETES = ROOT / "deploy/kubernetes"
CONTAINER = ROOT / "deploy/container"
KNOWN = (apps_v1, core_v1, rbac_authorization_v1)  # importing them registers their kinds


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def kustomization(folder: Path = KUBERNETES) -> dict[str, Any]:
    (found,) = documents(folder / "kustomization.yaml")
    return found


def manifests() -> dict[str, dict[str, Any]]:
    found = [each for name in kustomization()["resources"] for each in documents(KUBERNETES / name)]
    return {each["kind"]: each for each in found}


def unknown(value: Any, model: Any, path: str = "") -> Iterator[str]:
    """Fields of a manifest that the model has not."""
    if isinstance(model, msgspec.Struct):
        names = {each.encode_name: each.name for each in msgspec.structs.fields(model)}
        for name, below in value.items():
            if name in names:
                yield from unknown(below, getattr(model, names[name]), f"{path}.{name}")
            else:
                yield f"{path}.{name}"
    elif isinstance(model, list):
        for index, (below, part) in enumerate(zip(value, model, strict=True)):
            yield from unknown(below, part, f"{path}[{index}]")


def validate(manifest: dict[str, Any]) -> None:
    """Types as published, and no field that Kubernetes would drop."""
    model = resource_registry.load(manifest["apiVersion"], manifest["kind"])
    made = msgspec.convert(manifest, model)
    assert list(unknown(manifest, made, manifest["kind"])) == []


@pytest.mark.parametrize("kind", ["ServiceAccount", "ClusterRoleBinding", "ConfigMap", "DaemonSet"])
def test_each_manifest_is_as_kubernetes_publishes_the_kind(kind: str) -> None:
    validate(manifests()[kind])


def test_the_validation_finds_what_is_wrong() -> None:
    wrong = copy.deepcopy(manifests()["DaemonSet"])
    wrong["spec"]["template"]["spec"]["hostnetwork"] = True
    with pytest.raises(AssertionError, match="hostnetwork"):
        validate(wrong)
    wrong = copy.deepcopy(manifests()["DaemonSet"])
    wrong["spec"]["template"]["spec"]["hostNetwork"] = "yes"
    with pytest.raises(msgspec.ValidationError, match="hostNetwork"):
        validate(wrong)


def pod() -> dict[str, Any]:
    spec: dict[str, Any] = manifests()["DaemonSet"]["spec"]["template"]["spec"]
    return spec


def test_the_names_of_the_manifests_meet() -> None:
    found = manifests()
    account, binding, config, daemon = (
        found[kind] for kind in ("ServiceAccount", "ClusterRoleBinding", "ConfigMap", "DaemonSet")
    )
    assert binding["roleRef"]["name"] == "system:node-proxier"
    namespace = kustomization()["namespace"]
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": account["metadata"]["name"], "namespace": namespace}
    ]
    assert {each["metadata"]["namespace"] for each in (account, config, daemon)} == {namespace}
    assert pod()["serviceAccountName"] == account["metadata"]["name"]
    assert daemon["spec"]["selector"]["matchLabels"] == daemon["spec"]["template"]["metadata"]["labels"]
    assert {"name": "config", "configMap": {"name": config["metadata"]["name"]}} in pod()["volumes"]
    (image,) = kustomization()["images"]
    for container in (*pod()["initContainers"], *pod()["containers"]):
        assert container["image"] == image["name"]
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted.keys() == {volume["name"] for volume in pod()["volumes"]}
        assert mounted["runtime"] == DIRECTORY


def test_the_agent_is_a_node_s_and_has_few_capabilities() -> None:
    assert pod()["hostNetwork"] is True
    assert pod()["priorityClassName"] == "system-node-critical"
    assert pod()["tolerations"] == [{"operator": "Exists"}]
    (agent,) = pod()["containers"]
    context = agent["securityContext"]
    assert "privileged" not in context
    assert context["capabilities"] == {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW", "BPF", "PERFMON"]}
    assert context["allowPrivilegeEscalation"] is False
    assert context["readOnlyRootFilesystem"] is True
    ports = {port["name"]: port["containerPort"] for port in agent["ports"]}
    assert ports == {"healthz": 10256, "metrics": 10249}
    assert [agent[probe]["httpGet"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")] == [
        {"path": "/livez", "port": "healthz"},
        {"path": "/livez", "port": "healthz"},
        {"path": "/healthz", "port": "healthz"},
    ]


@pytest.mark.parametrize("which", ["initContainers", "containers"])
def test_the_command_lines_are_commands_of_ours(which: str) -> None:
    (container,) = pod()[which]
    first, *arguments = [argument.replace("$(NODE_NAME)", "node-1") for argument in container["args"]]
    assert first == "run"
    said = run.make_context("run", arguments).params
    assert (said["config_file"], said["node_name"]) == ("/etc/dataplane/config.yaml", "node-1")
    assert said["init_only"] == (which == "initContainers")


def test_the_config_map_is_a_configuration_and_a_kubeconfig(tmp_path: Path) -> None:
    data = manifests()["ConfigMap"]["data"]
    for name, text in data.items():
        (tmp_path / name).write_text(text)
    settings, _ = read_settings(str(tmp_path / "config.yaml"))
    assert (settings.mode, settings.cluster_cidrs, settings.log_format) == ("nftables", ("10.244.0.0/16",), "json")
    assert Path(settings.kubeconfig).name in data
    config = kubeconfig_reader(str(tmp_path / "kubeconfig.yaml"))()
    assert config.cluster.server == "https://control-plane.example:6443"
    assert config.user is not None
    assert str(config.user.token_file) == "/var/run/secrets/kubernetes.io/serviceaccount/token"


# ---------------------------------------------------------------------------------------------------------- variants


def patched(manifest: dict[str, Any], patches: list[dict[str, Any]]) -> dict[str, Any]:
    """RFC 6902, as far as it is used here."""
    made: dict[str, Any] = copy.deepcopy(manifest)
    for patch in patches:
        *way, last = patch["path"].split("/")[1:]
        at: Any = made
        for step in way:
            at = at[int(step)] if isinstance(at, list) else at[step]
        if isinstance(at, list) and patch["op"] == "add":
            at.insert(len(at) if last == "-" else int(last), patch["value"])
        else:
            key = int(last) if isinstance(at, list) else last
            assert patch["op"] == "replace"
            assert at[key] is not None
            at[key] = patch["value"]
    return made


def variant(folder: str) -> dict[str, Any]:
    """The DaemonSet of a variant."""
    (patch,) = (each for each in kustomization(KUBERNETES / folder)["patches"] if each["target"]["kind"] == "DaemonSet")
    made = patched(manifests()["DaemonSet"], yaml.safe_load(patch["patch"]))
    validate(made)
    spec: dict[str, Any] = made["spec"]["template"]["spec"]
    return spec


def test_the_variant_for_kubeadm_takes_the_cluster_s_own_config_map() -> None:
    spec = variant("kubeadm")
    assert spec["volumes"][0] == {"name": "config", "configMap": {"name": "kube-proxy"}}
    cleaning, prepare = spec["initContainers"]
    for container in (prepare, *spec["containers"]):
        assert container["volumeMounts"][0]["mountPath"] == "/var/lib/kube-proxy"
        assert [each for each in container["args"] if each.startswith("--config")] == [
            "--config=/var/lib/kube-proxy/config.conf"
        ]
        assert container["args"][0] == "run"
    first, *arguments = cleaning["args"]
    assert (first, cleaning["image"]) == ("cleanup", prepare["image"])
    said = cleanup.make_context("cleanup", arguments).params
    assert (said["kube_proxy"], said["yes"], said["dry_run"]) == (True, True, False)


def test_the_variant_with_the_probe_adds_one_capability() -> None:
    context = variant("counting-probe")["containers"][0]["securityContext"]
    assert context["capabilities"]["add"] == ["NET_ADMIN", "NET_RAW", "BPF", "PERFMON", "SYS_ADMIN"]
    assert context["allowPrivilegeEscalation"] is True  # Kubernetes refuses the other with SYS_ADMIN


def test_every_file_is_named_by_a_kustomization() -> None:
    folders = [path.parent for path in KUBERNETES.rglob("kustomization.yaml")]
    named = {(folder / each).resolve() for folder in folders for each in kustomization(folder).get("resources", ())}
    files = {path for path in KUBERNETES.rglob("*.yaml") if path.name != "kustomization.yaml"}
    assert files <= named
    assert all(path.exists() for path in named)
    versions = {"Kustomization": "kustomize.config.k8s.io/v1beta1", "Component": "kustomize.config.k8s.io/v1alpha1"}
    assert all(kustomization(folder)["apiVersion"] == versions[kustomization(folder)["kind"]] for folder in folders)


# ------------------------------------------------------------------------------------------------------------- image


def pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", path.read_text(), re.MULTILINE))


def test_the_image_s_lock_is_a_part_of_the_other_one_and_has_all_dependencies() -> None:
    lock, everything = pins(CONTAINER / "requirements.lock"), pins(ROOT / "requirements.lock")
    assert lock.items() <= everything.items()
    text = (ROOT / "pyproject.toml").read_text().partition("dependencies = [")[2].partition("]")[0]
    assert set(re.findall(r'^    "([a-z0-9-]+)', text, re.MULTILINE)) <= lock.keys()
    entries = re.findall(
        r"^\S+==.*?(?=^\S|\Z)", (CONTAINER / "requirements.lock").read_text(), re.MULTILINE | re.DOTALL
    )
    assert len(entries) == len(lock)
    assert all("--hash=sha256:" in entry for entry in entries)


def test_the_image_has_the_programs_that_are_called() -> None:
    text = (CONTAINER / "Containerfile").read_text().replace("\\\n", " ")
    assert all(line.split()[0].isupper() for line in text.splitlines() if line and line[0] not in "# ")
    *_, stage = text.split("FROM ")
    words = set(shlex.split(stage, comments=True))
    assert {*PACKAGES.values(), "python3-bpfcc", "python3-nftables", "ipset"} <= words
    ignored = (ROOT / ".containerignore").read_text().split()
    for source in re.findall(r"^COPY (?:--chmod=\S+ )?([a-z]\S+) ", text, re.MULTILINE):
        assert (ROOT / source).exists()
        assert any(source == kept[1:] or source.startswith(kept[1:] + "/") for kept in ignored if kept[0] == "!")
