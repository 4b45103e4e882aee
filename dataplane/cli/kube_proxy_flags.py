"""kube-proxy's flags on `run`: hidden options that mean what the fields of a KubeProxyConfiguration mean.

Those of its flags that are options of ours anyway (--kubeconfig, --cluster-cidr, --masquerade-all,
--metrics-bind-address, --healthz-bind-address) are not here. Flags of Kubernetes 1.36, and some that it has given up.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import click

from ..errors import UsageError
from ..printable import printable


class Flag(NamedTuple):
    """A flag: the field it sets; the form of its value; why it has no meaning, where no field says so."""

    field: str
    form: str = "text"
    why: str = ""


FLAGS: dict[str, Flag] = {
    "proxy-mode": Flag("mode"),
    "hostname-override": Flag("hostnameOverride"),
    "bind-address": Flag("bindAddress"),
    "bind-address-hard-fail": Flag("bindAddressHardFail", "bool"),
    "profiling": Flag("enableProfiling", "bool"),
    "show-hidden-metrics-for-version": Flag("showHiddenMetricsForVersion"),
    "feature-gates": Flag("featureGates", "map"),
    "detect-local-mode": Flag("detectLocalMode"),
    "pod-bridge-interface": Flag("detectLocal.bridgeInterface"),
    "pod-interface-name-prefix": Flag("detectLocal.interfaceNamePrefix"),
    "nodeport-addresses": Flag("nodePortAddresses", "list"),
    "config-sync-period": Flag("configSyncPeriod"),
    "iptables-sync-period": Flag("iptables.syncPeriod"),
    "iptables-min-sync-period": Flag("iptables.minSyncPeriod"),
    "iptables-masquerade-bit": Flag("iptables.masqueradeBit", "int"),
    "iptables-localhost-nodeports": Flag("iptables.localhostNodePorts", "bool"),
    "ipvs-sync-period": Flag("ipvs.syncPeriod"),
    "ipvs-min-sync-period": Flag("ipvs.minSyncPeriod"),
    "ipvs-scheduler": Flag("ipvs.scheduler"),
    "ipvs-exclude-cidrs": Flag("ipvs.excludeCIDRs", "list"),
    "ipvs-strict-arp": Flag("ipvs.strictARP", "bool"),
    "ipvs-tcp-timeout": Flag("ipvs.tcpTimeout"),
    "ipvs-tcpfin-timeout": Flag("ipvs.tcpFinTimeout"),
    "ipvs-udp-timeout": Flag("ipvs.udpTimeout"),
    "oom-score-adj": Flag("oomScoreAdj", "int"),
    "conntrack-max-per-core": Flag("conntrack.maxPerCore", "int"),
    "conntrack-min": Flag("conntrack.min", "int"),
    "conntrack-tcp-timeout-established": Flag("conntrack.tcpEstablishedTimeout"),
    "conntrack-tcp-timeout-close-wait": Flag("conntrack.tcpCloseWaitTimeout"),
    "conntrack-tcp-be-liberal": Flag("conntrack.tcpBeLiberal", "bool"),
    "conntrack-udp-timeout": Flag("conntrack.udpTimeout"),
    "conntrack-udp-timeout-stream": Flag("conntrack.udpStreamTimeout"),
    "kube-api-qps": Flag("clientConnection.qps", "float"),
    "kube-api-burst": Flag("clientConnection.burst", "int"),
    "kube-api-content-type": Flag("clientConnection.contentType"),
    "logging-format": Flag("logging.format"),
    "log-flush-frequency": Flag("logging.flushFrequency"),
    "proxy-port-range": Flag("portRange"),
    "udp-timeout": Flag("udpIdleTimeout"),
    "vmodule": Flag("", why="a log line for each step: --verbose"),
    "log-json-info-buffer-size": Flag("", why="nothing is held back"),
    "log-json-split-stream": Flag("", "bool", "the log goes to stderr"),
    "log-text-info-buffer-size": Flag("", why="nothing is held back"),
    "log-text-split-stream": Flag("", "bool", "the log goes to stderr"),
    "logtostderr": Flag("", "bool", "the log goes to stderr"),
    "alsologtostderr": Flag("", "bool", "the log goes to stderr"),
    "master": Flag("", why="the kubeconfig names the server"),
    "write-config-to": Flag("", why="dataplane check tells what a file says"),
    "healthz-port": Flag("", why="kube-proxy has given it up"),
    "metrics-port": Flag("", why="kube-proxy has given it up"),
    "cleanup-iptables": Flag("", "bool", "kube-proxy has given it up"),
    "cleanup-ipvs": Flag("", "bool", "kube-proxy has given it up"),
}
"""By the flag's name, without its dashes."""

_OWN_SWITCHES = ("masquerade-all", "allow-mass-delete", "strict-arp", "in-cluster", "kubeconfig-exec", "init-only")
_BOOLS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
_VERBOSITY = re.compile(r"(?:--v|-v)=([0-9]{1,4})")
DEBUG = 4
"""The verbosity from which on kube-proxy tells each step."""


def _destination(name: str) -> str:
    return f"kube_proxy_{name.replace('-', '_')}"


def kube_proxy_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """All of them as hidden options."""
    for name in FLAGS:
        function = click.option(f"--{name}", _destination(name), hidden=True, help="kube-proxy's flag.")(function)
    return function


def go_arguments(arguments: Iterable[str]) -> list[str]:
    """A command line as Go's flags are written, for click: `--switch=true`, `--switch`, `--v=4`, `-v 4`."""
    found: list[str] = []
    rest = list(arguments)
    while rest:
        each = rest.pop(0)
        name, equals, value = each.removeprefix("--").partition("=")
        if each == "--":
            return [*found, each, *rest]
        if each in ("-v", "--v") and rest and rest[0].isascii() and rest[0].isdigit():
            each = f"-v={rest.pop(0)[:4]}"
        verbosity = _VERBOSITY.fullmatch(each)
        if verbosity:
            found += ["--verbose"] if int(verbosity[1]) >= DEBUG else []
        elif each.startswith("--") and name in _OWN_SWITCHES and equals and value.lower() in _BOOLS:
            found += [f"--{name}"] if _BOOLS[value.lower()] else []
        elif each.startswith("--") and name in FLAGS and FLAGS[name].form == "bool" and not equals:
            found.append(f"{each}=true")
        else:
            found.append(each)
    return found


class GoCommand(click.Command):
    """A command that takes such a command line too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Rewrite first."""
        return super().parse_args(ctx, go_arguments(args))


def _value(form: str, text: str) -> Any:
    """As it would stand in the file; what is no such value stays text, which the field then refuses."""
    if form == "list":
        return [part.strip() for part in text.split(",") if part.strip()]
    if form == "map":
        return dict(part.partition("=")[::2] for part in text.split(","))
    if form == "bool":
        return _BOOLS.get(text.lower(), text)
    try:
        return {"int": int, "float": float}.get(form, str)(text)
    except ValueError:
        return text


def take_flags(given: dict[str, Any], mode: str | None) -> tuple[dict[str, Any], list[str]]:
    """Take the flags out of `given`: fields of our configuration, and a notice for each flag without a meaning."""
    from ..kube_proxy_configuration import translate

    document: dict[str, Any] = {}
    names: dict[str, str] = {}
    notices = []
    for name, (field, form, why) in FLAGS.items():
        text = given.pop(_destination(name), None)
        if text is None:
            continue
        if not field:
            notices.append(f"--{name} has no meaning here: {why}")
            continue
        section, dot, below = field.rpartition(".")
        (document.setdefault(section, {}) if dot else document)[below] = _value(form, text)
        names[field] = f"--{name}"
    if "iptables" in document:  # as kube-proxy has it: of all modes but ipvs
        document["nftables"] = {key: each for key, each in document["iptables"].items() if key != "localhostNodePorts"}
        names |= {f"nftables.{key}": names[f"iptables.{key}"] for key in document["nftables"]}
    said = translate(document, whole=False, mode=mode)
    if said.faults:
        field, reason = said.faults[0]
        raise UsageError(f"{names.get(field, field)}: {printable(reason)}")
    notices += [f"{names.get(field, field)} {text}" for field, text in said.notices]
    return said.values, list(dict.fromkeys(notices))


def with_flags(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`given` with what kube-proxy's flags say, of which options of ours win; and the notices."""
    values, notices = take_flags(given, given.get("mode"))
    return {**given, **{name: each for name, each in values.items() if given.get(name) in (None, ())}}, notices
