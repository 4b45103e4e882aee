"""What the administrator sets: `--config FILE` under the command line, defaults under both.

    apiVersion: dataplane/v1alpha1
    kind: AgentConfiguration
    manifests: [services.d]
    clusterCIDRs: [10.244.0.0/16]

`Configuration` is the file and, merged with the command line, the settings of one run. Every fault of a file is told
with its line, not only the first; `schema()` is the JSON Schema of the file for editors, shipped beside this module
as `configuration.schema.json`. The file may be, or hold beside, kube-proxy's own (`kube_proxy_configuration`).
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

import msgspec
from msgspec import Meta, Struct

from . import kube_proxy_configuration as kube_proxy
from .backend import MODES, PLANNED, Options
from .desired import DEFAULT_DRAIN_SECONDS, Rules
from .dns.names import parse_domain
from .dns.records import Rules as DnsRules
from .errors import InputError, UsageError
from .model import Address, Problem, format_address, parse_address, parse_network
from .printable import printable, shown
from .tcp_listener import Listen, parse_listen

API_VERSION: Final = "dataplane/v1alpha1"
KIND: Final = "AgentConfiguration"
ALL_MODES = (*MODES, *PLANNED)
VIP_BINDINGS = ("device", "routes")
LOG_FORMATS = ("auto", "human", "json")
AUTO = "auto"
HEALTHZ = "0.0.0.0:10256"
"""Where kube-proxy serves `/healthz` and `/livez`."""
PRIMARY = "primary"
"""nodePortAddresses: the node's main addresses, kube-proxy's word."""
DAY = 86400
MAX_BYTES = 1 << 20
EXPECTED = (
    f"expected: one {KIND} ({API_VERSION}), one {kube_proxy.KIND} ({kube_proxy.API_VERSION}), or one of each as two "
    "documents"
)

Seconds = Annotated[int, Meta(ge=0, le=31 * DAY)]


class IpvsTimeouts(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """IPVS connection timeouts in seconds; 0 leaves the kernel's."""

    tcp: Seconds = 0
    tcp_fin: Seconds = 0
    udp: Seconds = 0


_NAMES = {
    "cluster_cidrs": "clusterCIDRs",
    "service_cidrs": "serviceCIDRs",
    "strict_arp": "strictARP",
    "node_ips": "nodeIPs",
    "node_cidr": "nodeCIDR",
    "external_ip_ranges": "externalIPRanges",
    "dns_ttl": "dnsTTL",
}
DNS_PORT = 53


def _field_name(name: str) -> str:
    """Kubernetes' spelling: camelCase, acronyms in capitals."""
    head, *rest = name.split("_")
    return _NAMES.get(name, head + "".join(map(str.capitalize, rest)))


class Configuration(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename=_field_name):
    """The AgentConfiguration file."""

    api_version: Annotated[Literal["dataplane/v1alpha1"], Meta(description="Version of this format.")] = API_VERSION
    kind: Annotated[Literal["AgentConfiguration"], Meta(description="What this file is.")] = KIND
    mode: Annotated[Literal["ipvs", "nftables", "iptables"], Meta(description="The kernel mechanism.")] = "ipvs"
    manifests: Annotated[
        tuple[str, ...], Meta(description="Files and directories of manifests; relative to this file.")
    ] = ()
    kubeconfig: Annotated[
        str, Meta(description="Or: a kubeconfig of the Kubernetes API to watch; relative to this file.")
    ] = ""
    in_cluster: Annotated[
        bool, Meta(description="Or: watch the Kubernetes API by the service account of the pod that this runs in.")
    ] = False
    kubeconfig_exec: Annotated[
        bool, Meta(description="Allow the kubeconfig to name a program that gives the credentials (exec).")
    ] = False
    node_name: Annotated[
        str, Meta(max_length=253, description="This node's name in endpoints; by default the host name, lower-cased.")
    ] = ""
    zone: Annotated[str, Meta(max_length=253, description="This node's zone, for topology hints.")] = ""
    scheduler: Annotated[
        str, Meta(pattern="^[a-z0-9_-]{1,15}$", description="Scheduler of Services that name none.")
    ] = "rr"
    drain_seconds: Annotated[
        Seconds, Meta(description="How long a removed real server may finish its connections.")
    ] = DEFAULT_DRAIN_SECONDS
    masquerade_all: Annotated[bool, Meta(description="Masquerade every client.")] = False
    cluster_cidrs: Annotated[
        tuple[str, ...],
        Meta(description="Pod address ranges; clients outside them are masqueraded."),
    ] = ()
    node_cidr: Annotated[
        bool, Meta(description="Or: the pod ranges of this node's Node object are pods; needs a Kubernetes API.")
    ] = False
    bridge_interface: Annotated[
        str, Meta(pattern="^[A-Za-z0-9_.-]{0,15}$", description="Clients behind this bridge are pods.")
    ] = ""
    interface_name_prefix: Annotated[
        str, Meta(pattern="^[A-Za-z0-9_.-]{0,15}$", description="Clients behind interfaces named so are pods.")
    ] = ""
    service_cidrs: Annotated[
        tuple[str, ...], Meta(description="Ranges of cluster IPs; what no Service has of them is dropped.")
    ] = ()
    node_ips: Annotated[
        tuple[str, ...], Meta(description="This node's main addresses; by default its first of each family.")
    ] = ()
    node_port_addresses: Annotated[
        tuple[str, ...],
        Meta(description="Ranges of node addresses that serve node ports, and `primary`; by default all."),
    ] = ()
    external_ip_ranges: Annotated[
        tuple[str, ...],
        Meta(description="externalIPs that Services may claim; by default none (CVE-2020-8554)."),
    ] = ()
    vip_binding: Annotated[
        Literal["device", "routes"],
        Meta(description="VIPs as addresses of kube-ipvs0, or as local routes (for very many)."),
    ] = "device"
    strict_arp: Annotated[bool, Meta(description="Never answer ARP for VIPs on other interfaces.")] = False
    ipvs_timeouts: Annotated[IpvsTimeouts, Meta(description="IPVS connection timeouts.")] = IpvsTimeouts()
    iptables_compat: Annotated[
        Literal["classic", "current"], Meta(description="Rules as in the tutorials, or as kube-proxy writes them now.")
    ] = "classic"
    iptables_tool: Annotated[
        Literal["auto", "legacy", "nft"], Meta(description="Back end of iptables; auto: the one the host has chosen.")
    ] = "auto"
    resync_seconds: Annotated[
        float, Meta(ge=1, le=DAY, description="How often the agent compares everything with the kernel.")
    ] = 30.0
    allow_mass_delete: Annotated[
        bool, Meta(description="Do not hold back an update that removes most virtual servers at once.")
    ] = False
    probe: Annotated[
        Literal["auto", "off"], Meta(description="auto: count hits by a BPF probe where the kernel allows it.")
    ] = "auto"
    metrics_bind_address: Annotated[
        str,
        Meta(
            pattern=r"^([0-9.]+:[0-9]{1,5}|\[[0-9A-Fa-f:.]+\]:[0-9]{1,5})?$",
            description="ADDRESS:PORT of metrics and the page to watch; empty: none.",
        ),
    ] = "127.0.0.1:10249"
    healthz_bind_address: Annotated[
        str,
        Meta(
            pattern=r"^(auto|[0-9.]+:[0-9]{1,5}|\[[0-9A-Fa-f:.]+\]:[0-9]{1,5})?$",
            description="ADDRESS:PORT of /healthz and /livez; empty: none; auto: 0.0.0.0:10256 with a Kubernetes API.",
        ),
    ] = AUTO
    metrics_max_series: Annotated[
        int,
        Meta(ge=0, le=10_000_000, description="Metrics of Services and backends; beyond, backends are left out."),
    ] = 100_000
    dns_listen: Annotated[
        tuple[str, ...],
        Meta(description="ADDRESS:PORT, each, where names of Services are answered; by default nowhere."),
    ] = ()
    cluster_domain: Annotated[
        str, Meta(max_length=180, description="The zone of these names, as the kubelet's clusterDomain.")
    ] = "cluster.local"
    dns_ttl: Annotated[int, Meta(ge=0, le=3600, description="Seconds for which an answer may be kept.")] = 5
    dns_answers: Annotated[
        Literal["coredns", "specification"],
        Meta(description="Whose way, where CoreDNS and the Kubernetes DNS specification differ."),
    ] = "coredns"
    dns_ignore_empty: Annotated[
        bool, Meta(description="Services without a ready endpoint have no name (CoreDNS: ignore empty_service).")
    ] = False
    dns_upstreams: Annotated[
        tuple[str, ...],
        Meta(description="ADDRESS or ADDRESS:PORT of servers for all other names; by default these are refused."),
    ] = ()
    dns_rate_limit: Annotated[
        int, Meta(ge=0, le=10_000_000, description="Answers a second for one client over UDP; 0: any number.")
    ] = 20_000
    dns_log_queries: Annotated[bool, Meta(description="A line of the log for each answer.")] = False
    log_format: Annotated[
        Literal["auto", "human", "json"], Meta(description="auto: human on a terminal, else JSON lines.")
    ] = "auto"

    @property
    def from_cluster(self) -> bool:
        """The Services come from a Kubernetes API."""
        return bool(self.kubeconfig) or self.in_cluster

    def healthz(self) -> Listen | None:
        """Where `/healthz` and `/livez` are served; None = nowhere."""
        text = self.healthz_bind_address
        if text == AUTO:
            text = HEALTHZ if self.from_cluster else ""
        return metrics_listen(text)

    def options(self) -> Options:
        """The part a mode needs."""
        timeouts = self.ipvs_timeouts
        return Options(
            masquerade_all=self.masquerade_all,
            cluster_cidrs=tuple(map(parse_network, self.cluster_cidrs)),
            bridge_interface=self.bridge_interface,
            interface_prefix=self.interface_name_prefix,
            service_cidrs=tuple(map(parse_network, self.service_cidrs)),
            vip_binding=self.vip_binding,
            strict_arp=self.strict_arp,
            timeouts=(timeouts.tcp, timeouts.tcp_fin, timeouts.udp),
            iptables_compat=self.iptables_compat,
            iptables_tool="" if self.iptables_tool == "auto" else self.iptables_tool,
        )

    def dns_rules(self) -> DnsRules:
        """The part that says which names there are."""
        hosts = [parse_address(parse_listen(each).host) for each in self.dns_listen]
        return DnsRules(
            domain=".".join(parse_domain(self.cluster_domain)),
            ttl=self.dns_ttl,
            coredns=self.dns_answers == "coredns",
            ignore_empty=self.dns_ignore_empty,
            addresses=tuple(dict.fromkeys(each for each in hosts if any(each))),
        )

    def rules(self, node_addresses: tuple[Address, ...] = ()) -> Rules:
        """The part that turns Services into virtual servers, on a node with these addresses."""
        return Rules(
            node_name=self.node_name or default_node_name(),
            zone=self.zone,
            scheduler=self.scheduler,
            drain_seconds=self.drain_seconds,
            node_addresses=node_addresses,
            node_ips=tuple(map(parse_address, self.node_ips)),
            node_port_ranges=tuple(parse_network(each) for each in self.node_port_addresses if each != PRIMARY),
            primary_node_ports=PRIMARY in self.node_port_addresses,
            external_ip_ranges=tuple(map(parse_network, self.external_ip_ranges)),
        )


def default_node_name() -> str:
    """The host name as the kubelet makes a node name of it: trimmed and lower-cased."""
    return Path("/proc/sys/kernel/hostname").read_text().strip().lower()


def with_overrides(base: Configuration, given: dict[str, Any]) -> Configuration:
    """`base` with what the command line says; None and () mean that it says nothing. UsageError for a bad value."""
    said = {name: value for name, value in given.items() if value is not None and value != ()}
    types = {each.name: each.type for each in msgspec.structs.fields(Configuration)}
    for name, value in said.items():
        try:
            said[name] = msgspec.convert(value, types[name])
        except msgspec.ValidationError as error:
            _, reason = _told(name, str(error), value)
            raise UsageError(f"--{name.replace('_', '-')}: {reason}") from None
    return msgspec.structs.replace(base, **said)


class Settings(NamedTuple):
    """A file read: what it sets, and what it says that has no meaning here."""

    configuration: Configuration
    notices: tuple[Problem, ...]


def read_configuration(path: str, mode: str | None = None) -> Configuration:
    """The file's settings; InputError with every fault of it, by line. `mode`: see `read_settings`."""
    return read_settings(path, mode).configuration


def read_settings(path: str, mode: str | None = None) -> Settings:
    """A file with an AgentConfiguration, a KubeProxyConfiguration, or both as two documents; ours wins then.

    `mode`: the one the command line says, by which fields of a KubeProxyConfiguration count. InputError as above.
    """
    from .safe_yaml import Budget, DocumentError, Limits, field_lines, read  # yaml is slow to import

    name = printable(path, 4096)
    try:
        with Path(path).open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError([Problem(name, 0, "", "", (error.strerror or str(error)).lower())]) from None
    if len(text) > MAX_BYTES:
        raise InputError([Problem(name, 0, "", "", f"larger than {MAX_BYTES} bytes")])
    try:
        parts = list(read(text, Budget(Limits(file_bytes=MAX_BYTES))))
    except DocumentError as error:
        raise InputError([Problem(name, error.line + 1, "", "", printable(error.reason))]) from None
    documents = {_kind(part.value): part for part in parts if part.item < 0}
    if len(documents) != len(parts) or "" in documents or not documents:
        raise InputError([Problem(name, 0, "", "", EXPECTED)])

    faults: list[tuple[int, str, str, str]] = []  # line of the document, kind, field, reason
    remarks: list[tuple[int, str, str, str]] = []
    own: dict[str, Any] = {}
    values: dict[str, Any] = {}
    if part := documents.get(KIND):
        own, found = _convert(part.value)
        faults += [(part.line, KIND, *fault) for fault in found]
    if part := documents.get(kube_proxy.KIND):
        said = kube_proxy.translate(part.value, mode=mode or own.get("mode"))
        types = {each.name: each.type for each in msgspec.structs.fields(Configuration)}
        values = {field: msgspec.convert(value, types[field]) for field, value in said.values.items()}
        faults += [(part.line, kube_proxy.KIND, *fault) for fault in (*_versions(part.value), *said.faults)]
        remarks += [(part.line, kube_proxy.KIND, *notice) for notice in said.notices]

    def told(entries: list[tuple[int, str, str, str]]) -> tuple[Problem, ...]:
        lines = field_lines(text, {(line, field) for line, _, field, _ in entries}) if entries else {}
        entries = sorted(entries, key=lambda entry: lines[entry[0], entry[2]])
        return tuple(
            Problem(name, lines[at, field] + 1, kind, printable(field), why) for at, kind, field, why in entries
        )

    if faults:
        raise InputError(told(faults))
    settings = msgspec.structs.replace(Configuration(), **with_source(values, own))
    folder = Path(path).parent
    manifests = tuple(str(folder / each) for each in settings.manifests)  # an absolute path stays what it is
    kubeconfig = str(folder / Path(settings.kubeconfig).expanduser()) if settings.kubeconfig else ""
    return Settings(msgspec.structs.replace(settings, manifests=manifests, kubeconfig=kubeconfig), told(remarks))


SOURCES: Final = ("manifests", "kubeconfig", "in_cluster")
"""Fields that name where Services come from: whoever names one means none of the others."""


def with_source(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two sets of fields, of which `above` wins."""
    if any(above.get(each) for each in SOURCES):
        below = {name: value for name, value in below.items() if name not in SOURCES}
    return {**below, **above}


def _kind(value: object) -> str:
    """Which of the documents that may stand in the file this is; "" = none."""
    if not isinstance(value, dict):
        return ""
    version = value.get("apiVersion")
    if value.get("kind") == kube_proxy.KIND or (isinstance(version, str) and version.startswith(kube_proxy.GROUP)):
        return kube_proxy.KIND
    return KIND


def _versions(given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for field, wanted in (("apiVersion", kube_proxy.API_VERSION), ("kind", kube_proxy.KIND)):
        if given.get(field) != wanted:
            got = f"it is {shown(given[field])}" if field in given else "it is missing"
            yield field, f"must be {wanted} ({got})"


def metrics_listen(text: str) -> Listen | None:
    """Where metrics are served; None = nowhere. ValueError for what is no address."""
    return parse_listen(text) if text else None


def dns_server(text: str) -> Listen:
    """ADDRESS or ADDRESS:PORT of a name server; ValueError for what is neither."""
    try:
        return parse_listen(text)
    except ValueError:
        return Listen(format_address(parse_address(text)), DNS_PORT)


def _node_port_range(text: str) -> object:
    return text if text == PRIMARY else parse_network(text)


ADDRESS_FIELDS: dict[str, Callable[[str], object]] = {
    "cluster_cidrs": parse_network,
    "service_cidrs": parse_network,
    "external_ip_ranges": parse_network,
    "node_port_addresses": _node_port_range,
    "node_ips": parse_address,
    "dns_listen": parse_listen,
    "dns_upstreams": dns_server,
}
"""Fields that hold addresses, and how one is read."""


def _convert(given: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The fields that are set, and (field, reason) of each fault."""
    fields = {each.encode_name: each for each in msgspec.structs.fields(Configuration)}
    faults: list[tuple[str, str]] = []
    for required, value in (("apiVersion", API_VERSION), ("kind", KIND)):
        if required not in given:
            faults.append((required, f"missing; it must be {value}"))
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in fields:
            faults.append((name, f"no such field{_nearest(name, list(fields))}"))
            continue
        try:
            values[fields[name].name] = msgspec.convert(value, fields[name].type)
        except msgspec.ValidationError as error:
            faults.append(_told(name, str(error), value))
    for field, read in ADDRESS_FIELDS.items():
        for index, text in enumerate(values.get(field, ())):
            try:
                read(text)
            except ValueError as error:
                faults.append((f"{_field_name(field)}[{index}]", printable(str(error))))
    for name in ("metrics_bind_address", "healthz_bind_address"):
        text = values.get(name, "")
        try:
            metrics_listen("" if text == AUTO else text)
        except ValueError as error:
            faults.append((_field_name(name), printable(str(error))))
    try:
        parse_domain(values.get("cluster_domain", "cluster.local"))
    except ValueError as error:
        faults.append(("clusterDomain", printable(str(error))))
    return values, faults


_PLACE = re.compile(r"(?s)(.*?)(?: - at `\$(.*)`)?")


def _told(name: str, message: str, value: object) -> tuple[str, str]:
    """msgspec's message as (path of the field, reason)."""
    found = _PLACE.fullmatch(message)
    assert found is not None
    reason, below = found[1].replace("`", ""), found[2] or ""
    unknown = re.fullmatch(r"Object contains unknown field (.*)", reason, re.DOTALL)
    if unknown:
        known = [each.encode_name for each in msgspec.structs.fields(IpvsTimeouts)]
        return f"{name}{below}.{unknown[1]}", f"no such field{_nearest(unknown[1], known)}"
    got = "" if below else f" (it is {shown(value)})"
    return f"{name}{below}", printable(reason[:1].lower() + reason[1:]) + got


def _nearest(name: str, known: list[str]) -> str:
    from difflib import get_close_matches

    lowered = {each.lower(): each for each in known}
    near = get_close_matches(name.lower(), lowered, n=1)
    return f"; did you mean {lowered[near[0]]}?" if near else f"; fields: {', '.join(known)}"


def schema() -> dict[str, Any]:
    """JSON Schema of the file."""
    _, components = msgspec.json.schema_components([Configuration], ref_template="#/$defs/{name}")
    defs = dict(components)
    main = defs.pop("Configuration")
    main |= {"title": KIND, "required": ["apiVersion", "kind"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **main, "$defs": defs}
