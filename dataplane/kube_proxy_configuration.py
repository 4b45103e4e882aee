"""kube-proxy's own configuration (kubeproxy.config.k8s.io/v1alpha1) and flags, in our words. Pure.

`translate` reads a KubeProxyConfiguration as a cluster's ConfigMap holds it, or the same fields by flags, and gives
values for fields of our configuration; what has no meaning here is told in one notice each, unless it asks for nothing
(null, zero or kube-proxy's default). As kube-proxy does it, unknown fields are told and passed over, and null is unset.

Field names and defaults: k8s.io/kube-proxy/config/v1alpha1, k8s.io/component-base/config and /logs/api of Kubernetes
1.36; fields of earlier versions that clusters still carry are known by name.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from math import ceil
from typing import Any, Final

from msgspec import Struct

from .kubernetes_fields import DAY, go_duration
from .model import parse_address, parse_network
from .printable import printable, shown
from .tcp_listener import parse_listen

GROUP: Final = "kubeproxy.config.k8s.io/"
API_VERSION: Final = f"{GROUP}v1alpha1"
KIND: Final = "KubeProxyConfiguration"
MODES: Final = ("iptables", "ipvs", "nftables")
METRICS_PORT, HEALTHZ_PORT = 10249, 10256
INT32 = 1 << 31


class Translated(Struct, frozen=True):
    """What a KubeProxyConfiguration says: fields of ours by their Python names, and (field, text) of the rest."""

    values: dict[str, Any]
    faults: tuple[tuple[str, str], ...]
    notices: tuple[tuple[str, str], ...]


Check = Callable[[Any], Any]
"""Takes a value from YAML; returns what it means; ValueError says what is wrong."""


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a string (it is {shown(value)})")
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false (it is {shown(value)})")
    return value


def _whole(least: int, most: int) -> Check:
    def check(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"expected a whole number from {least} to {most} (it is {shown(value)})")
        return value

    return check


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"expected a number (it is {shown(value)})")
    return value


def seconds(value: Any) -> float:
    """A duration in seconds; it is not negative."""
    read = go_duration(_text(value))
    if read is None:
        raise ValueError(f"expected a duration such as 30s or 1h0m0s (it is {shown(value)})")
    return read


def _ipvs_timeout(value: Any) -> int:
    """Whole seconds, rounded up: IPVS knows no less."""
    read = ceil(seconds(value))
    if read > 31 * DAY:
        raise ValueError(f"expected 31 days at most (it is {shown(value)})")
    return read


def _address(value: Any) -> str:
    text = _text(value)
    if text:
        parse_address(text)
    return text


def _cluster_cidr(value: Any) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in _text(value).split(",")) if value else ()
    families = [len(parse_network(part).address) for part in parts]
    if len(parts) > 2 or (len(parts) == 2 and families[0] == families[1]):
        raise ValueError(f"expected one range, or one of each family (it is {shown(value)})")
    return parts


def _texts(each: Check) -> Check:
    def check(value: Any) -> tuple[str, ...]:
        if not isinstance(value, list):
            raise ValueError(f"expected a list (it is {shown(value)})")
        for one in value:
            each(one)
        return tuple(value)

    return check


def _cidr(value: Any) -> str:
    parse_network(_text(value))
    return str(value)


def _node_port_addresses(value: Any) -> tuple[str, ...]:
    if isinstance(value, list) and "primary" in value and len(value) > 1:
        raise ValueError("primary stands alone")
    return tuple(_texts(lambda one: one if one == "primary" else _cidr(one))(value))


def _listen(port: int) -> Check:
    def check(value: Any) -> str:
        text = _text(value)
        if not text:
            return ""
        try:
            parse_address(text)
        except ValueError:
            return str(parse_listen(text))
        return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"

    return check


def _one_of(*words: str) -> Check:
    def check(value: Any) -> str:
        if value not in words:
            raise ValueError(f"expected {', '.join(word for word in words if word)} (it is {shown(value)})")
        return str(value)

    return check


def _flush(value: Any) -> float:
    """Nanoseconds, or a duration; both are in use."""
    return value if isinstance(value, int) and not isinstance(value, bool) else seconds(value)


def _matching(pattern: str, what: str) -> Check:
    def check(value: Any) -> str:
        if not re.fullmatch(pattern, _text(value)):
            raise ValueError(f"expected {what} (it is {shown(value)})")
        return str(value)

    return check


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected a mapping (it is {shown(value)})")
    return value


def _log_options(value: Any) -> bool:
    """Whether one of them asks for something."""
    return any(
        each not in (None, 0, "0", "", False) for form in _mapping(value).values() for each in _mapping(form).values()
    )


class Known(Struct, frozen=True):
    """A field: how it is read; and if it has no meaning here why, and the values that ask for nothing."""

    check: Check
    why: str = ""
    silent: tuple[Any, ...] = ()


_INTERFACE = _matching("[A-Za-z0-9_.-]{0,15}", "the name of an interface")
_SYNC_PAUSE = "changes are written as they come, several together when there are many"
_CLIENT = "the client has its own pace and encoding"
_MARK = "the bit of the masquerade mark is not a setting here"
_LIMITS = "conntrack's limits and timeouts are left as they are; set the sysctl"
_WINDOWS = "for Windows only"
_GONE = "kube-proxy has given it up, and it has no meaning here"
_LOG = "the log has one form and destination: see logFormat"

FIELDS: dict[str, Known] = {
    "mode": Known(_one_of("", *MODES)),
    "clientConnection.kubeconfig": Known(_text),
    "clientConnection.acceptContentTypes": Known(_text, _CLIENT),
    "clientConnection.contentType": Known(_text, _CLIENT, ("application/vnd.kubernetes.protobuf",)),
    "clientConnection.qps": Known(_number, _CLIENT, (5,)),
    "clientConnection.burst": Known(_whole(0, INT32), _CLIENT, (10,)),
    "hostnameOverride": Known(_matching("[^\\s/]{0,253}", "a node's name")),
    "bindAddress": Known(_address),
    "healthzBindAddress": Known(_listen(HEALTHZ_PORT)),
    "metricsBindAddress": Known(_listen(METRICS_PORT)),
    "bindAddressHardFail": Known(_truth, "a port that is taken is tried again, and the agent works on"),
    "enableProfiling": Known(_truth, "there is no profiling over HTTP"),
    "showHiddenMetricsForVersion": Known(_text, "no metric is hidden"),
    "featureGates": Known(_mapping, "there are no feature gates"),
    "clusterCIDR": Known(_cluster_cidr),
    "detectLocalMode": Known(_one_of("", "ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix")),
    "detectLocal.bridgeInterface": Known(_INTERFACE),
    "detectLocal.interfaceNamePrefix": Known(_INTERFACE),
    "nodePortAddresses": Known(_node_port_addresses),
    "configSyncPeriod": Known(seconds, "watched objects are not listed again by the clock", (900.0,)),
    "iptables.masqueradeBit": Known(_whole(0, 31), _MARK, (14,)),
    "iptables.masqueradeAll": Known(_truth),
    "iptables.localhostNodePorts": Known(_truth, "node ports are not served at loopback addresses"),
    "iptables.syncPeriod": Known(seconds),
    "iptables.minSyncPeriod": Known(seconds, _SYNC_PAUSE, (1.0,)),
    "nftables.masqueradeBit": Known(_whole(0, 31), _MARK, (14,)),
    "nftables.masqueradeAll": Known(_truth),
    "nftables.syncPeriod": Known(seconds),
    "nftables.minSyncPeriod": Known(seconds, _SYNC_PAUSE, (1.0,)),
    "ipvs.syncPeriod": Known(seconds),
    "ipvs.minSyncPeriod": Known(seconds, _SYNC_PAUSE, (1.0,)),
    "ipvs.scheduler": Known(_matching("[a-z0-9_-]{0,15}", "the name of a scheduler")),
    "ipvs.excludeCIDRs": Known(_texts(_cidr), "virtual servers of others are never touched, whatever their address"),
    "ipvs.strictARP": Known(_truth),
    "ipvs.tcpTimeout": Known(_ipvs_timeout),
    "ipvs.tcpFinTimeout": Known(_ipvs_timeout),
    "ipvs.udpTimeout": Known(_ipvs_timeout),
    "oomScoreAdj": Known(_whole(-1000, 1000), "who starts the agent sets it (OOMScoreAdjust= of its unit)", (-999,)),
    "conntrack.maxPerCore": Known(_whole(0, INT32), _LIMITS),
    "conntrack.min": Known(_whole(0, INT32), _LIMITS),
    "conntrack.tcpEstablishedTimeout": Known(seconds, _LIMITS),
    "conntrack.tcpCloseWaitTimeout": Known(seconds, _LIMITS),
    "conntrack.tcpBeLiberal": Known(_truth, _LIMITS),
    "conntrack.udpTimeout": Known(seconds, _LIMITS),
    "conntrack.udpStreamTimeout": Known(seconds, _LIMITS),
    "logging.format": Known(_one_of("", "text", "json")),
    "logging.flushFrequency": Known(_flush, _LOG, (5.0, 5 * 10**9)),
    "logging.verbosity": Known(_whole(0, INT32), "a log line for each step: --verbose"),
    "logging.vmodule": Known(_texts(_mapping), _LOG),
    "logging.options": Known(_log_options, _LOG),
    "winkernel.networkName": Known(_text, _WINDOWS),
    "winkernel.sourceVip": Known(_text, _WINDOWS),
    "winkernel.enableDSR": Known(_truth, _WINDOWS),
    "winkernel.rootHnsEndpointName": Known(_text, _WINDOWS),
    "winkernel.forwardHealthCheckVip": Known(_truth, _WINDOWS),
    "windowsRunAsService": Known(_truth, _WINDOWS),
    "portRange": Known(_text, _GONE),
    "udpIdleTimeout": Known(seconds, _GONE, (0.25,)),
    "resourceContainer": Known(_text, _GONE, ("/kube-proxy",)),
}
"""Every field by its path."""

SECTIONS = {path.partition(".")[0] for path in FIELDS if "." in path}


def _flat(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(path, value) of each field; those of a section that is no mapping come as the section itself."""
    for name, value in given.items():
        if name in SECTIONS and isinstance(value, dict):
            yield from ((f"{name}.{below}", each) for below, each in value.items())
        else:
            yield name, value


def translate(given: Mapping[str, Any], *, whole: bool = True, mode: str | None = None) -> Translated:
    """What it says in our words.

    `whole`: it is a KubeProxyConfiguration, in which what is not said has kube-proxy's default; else it is some fields
    of one. `mode`: said elsewhere, by which the sections' fields count then.
    """
    said: dict[str, Any] = {}
    faults: list[tuple[str, str]] = []
    notices: list[tuple[str, str]] = []
    for path, value in _flat(given):
        known = FIELDS.get(path)
        if path in ("apiVersion", "kind") or value is None:
            continue
        if path in SECTIONS:
            faults.append((path, f"expected a mapping (it is {shown(value)})"))
        elif known is None:
            notices.append((path, f"no such field of a {KIND}: passed over, as kube-proxy does"))
        else:
            try:
                meant = known.check(value)
            except ValueError as error:
                faults.append((path, printable(str(error))))
                continue
            if not known.why:
                said[path] = meant
            elif meant and meant not in known.silent:
                notices.append((path, f"has no meaning here: {known.why}"))
    values = {} if faults else dict(_values(said, faults, notices, whole, mode))
    return Translated(values, tuple(faults), tuple(notices))


def _values(
    said: Mapping[str, Any],
    faults: list[tuple[str, str]],
    notices: list[tuple[str, str]],
    whole: bool,
    mode: str | None,
) -> Iterator[tuple[str, Any]]:
    """Fields of our configuration."""
    own = said.get("mode") or ("iptables" if whole else "")
    if own:
        yield "mode", own
    mode = mode or own or "ipvs"
    section = "nftables" if mode == "nftables" else "iptables"  # also of ipvs mode, as in kube-proxy
    if said.get(f"{section}.masqueradeAll"):
        yield "masquerade_all", True
    period = said.get(f"{mode}.syncPeriod")
    if period:
        yield "resync_seconds", min(max(1.0, float(period)), DAY)
    for path, name in (
        ("clientConnection.kubeconfig", "kubeconfig"),
        ("ipvs.scheduler", "scheduler"),
        ("ipvs.strictARP", "strict_arp"),
        ("metricsBindAddress", "metrics_bind_address"),
        ("healthzBindAddress", "healthz_bind_address"),
    ):
        if said.get(path):
            yield name, said[path]
    if whole and not said.get("clientConnection.kubeconfig"):
        yield "in_cluster", True
    if name := said.get("hostnameOverride", "").strip().lower():
        yield "node_name", name
    if said.get("logging.format") == "json":
        yield "log_format", "json"
    timeouts = [said.get(f"ipvs.{name}", 0) for name in ("tcpTimeout", "tcpFinTimeout", "udpTimeout")]
    if any(timeouts):
        yield "ipvs_timeouts", dict(zip(("tcp", "tcpFin", "udp"), timeouts, strict=True))
    bind = said.get("bindAddress", "")
    if bind and any(parse_address(bind)):
        yield "node_ips", (bind,)
    elif bind and ":" in bind and whole and not said.get("metricsBindAddress"):
        yield "metrics_bind_address", f"[::1]:{METRICS_PORT}"
    addresses = said.get("nodePortAddresses") or (("primary",) if whole and mode == "nftables" else ())
    if addresses:
        yield "node_port_addresses", addresses
    yield from _insiders(said, faults, notices)


def _insiders(
    said: Mapping[str, Any], faults: list[tuple[str, str]], notices: list[tuple[str, str]]
) -> Iterator[tuple[str, Any]]:
    """Who is a pod: by one of the ways, the one that detectLocalMode names."""
    way = said.get("detectLocalMode") or "ClusterCIDR"
    cidr = said.get("clusterCIDR", ())
    if way == "ClusterCIDR" and cidr:
        yield "cluster_cidrs", cidr
    elif way == "NodeCIDR":
        yield "node_cidr", True
    elif way != "ClusterCIDR":
        field = {"BridgeInterface": "bridgeInterface", "InterfaceNamePrefix": "interfaceNamePrefix"}[way]
        name = said.get(f"detectLocal.{field}")
        if not name:
            faults.append((f"detectLocal.{field}", f"missing; detectLocalMode {way} needs it"))
            return
        yield {"bridgeInterface": "bridge_interface", "interfaceNamePrefix": "interface_name_prefix"}[field], name
    if cidr and way != "ClusterCIDR":
        notices.append(("clusterCIDR", f"has no meaning with detectLocalMode {way}"))
