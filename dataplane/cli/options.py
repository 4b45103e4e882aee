"""What all commands share: their options, the settings these make, and the ways to speak."""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from ..errors import InputError, NotRoot, PreflightError, UsageError
from ..printable import printable

if TYPE_CHECKING:
    from ..backend import Backend, Options
    from ..configuration import Configuration
    from ..desired import Rules
    from ..dns.answers import Answers
    from ..dns.query_log import Log as DnsLog
    from ..dns.server import DnsServer
    from ..kube_events import EventWriter
    from ..kube_place import Place
    from ..kube_source import KubernetesSource
    from ..kube_watch import Log
    from ..manifest_files import ManifestFiles
    from ..mode_switch import ModeSwitch, Tell
    from ..model import Problem, Update
    from ..reconciler import Reconciler

Function = TypeVar("Function", bound=Callable[..., Any])

FAILED, BAD_INPUT, DIFFERS, PREFLIGHT = 1, 3, 4, 5
UNREACHABLE_SECONDS, LIST_SECONDS = 5.0, 120.0
"""How long a command that ends by itself waits for an API that does not answer, and for all lists of one that does."""
VERBOSE = "dataplane.verbose"
_CAP_NET_ADMIN = 12


def say(text: str) -> None:
    """One line on stderr."""
    click.echo(f"dataplane: {printable(text, 4096)}", err=True)


def say_problems(problems: Sequence[object]) -> None:
    """Problems as they print themselves, one a line on stderr."""
    for problem in problems:
        click.echo(printable(str(problem), 4096), err=True)


def together(*options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """Several options as one decorator."""

    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _verbose(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    ctx.meta[VERBOSE] = value
    return value


def _each_of(field: str) -> Callable[[click.Context, click.Parameter, tuple[str, ...]], tuple[str, ...]]:
    """Comma-separated values of an option that may be repeated, each as the field of the configuration takes it."""

    def read(_ctx: click.Context, _: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
        from ..configuration import ADDRESS_FIELDS

        parts = tuple(part.strip() for value in values for part in value.split(","))
        try:
            for part in parts:
                ADDRESS_FIELDS[field](part)
        except ValueError as error:
            raise click.BadParameter(printable(str(error))) from None
        return parts

    return read


def metrics_address(_ctx: click.Context, _: click.Parameter, value: str | None) -> str | None:
    """ADDRESS:PORT of an option, or ""."""
    from ..configuration import AUTO, metrics_listen

    try:
        metrics_listen("" if value in (None, AUTO) else value)
    except ValueError as error:
        raise click.BadParameter(printable(str(error))) from None
    return value


def _domain(_ctx: click.Context, _: click.Parameter, value: str | None) -> str | None:
    from ..dns.names import parse_domain

    try:
        parse_domain(value or "cluster.local")
    except ValueError as error:
        raise click.BadParameter(printable(str(error))) from None
    return value


def _timeouts(_ctx: click.Context, _: click.Parameter, value: str | None) -> object:
    from ..configuration import DAY, IpvsTimeouts

    if value is None:
        return None
    parts = value.split(",")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() and int(part[:9]) <= 31 * DAY for part in parts):
        raise click.BadParameter("three numbers of seconds are expected: TCP,FIN,UDP (0 leaves one as it is)")
    tcp, fin, udp = map(int, parts)
    return IpvsTimeouts(tcp=tcp, tcp_fin=fin, udp=udp)


def output_option(*formats: str) -> Callable[[Function], Function]:
    """-o with the formats of one command; the first is the default."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(formats),
        default=formats[0],
        show_default=True,
        help="Form of what goes to stdout.",
    )


verbose_option = click.option(
    "-v",
    "--verbose",
    is_flag=True,
    expose_value=False,
    callback=_verbose,
    help="Tracebacks of unexpected errors; run: debug log lines.",
)
common_options = together(
    click.option(
        "--mode",
        type=click.Choice(("ipvs", "nftables", "iptables")),
        envvar="DATAPLANE_MODE",
        show_envvar=True,
        help="Kernel mechanism; default ipvs.",
    ),
    click.option(
        "-c",
        "--config",
        "config_file",
        metavar="FILE",
        help="AgentConfiguration, KubeProxyConfiguration, or both as two documents; options here win over it.",
    ),
    verbose_option,
)
manifests_option = click.option(
    "-f", "--manifests", multiple=True, metavar="PATH", help="Manifest file or directory (YAML, JSON); repeatable."
)
source_options = together(
    manifests_option,
    click.option("--node-name", help="This node's name in endpoints; default: the host name, lower-cased."),
    click.option("--zone", help="This node's zone, for topology hints; default: none."),
    click.option("--scheduler", metavar="NAME", help="Scheduler of Services that name none; default rr."),
    click.option(
        "--drain-seconds",
        type=click.IntRange(0, 31 * 86400),
        help="How long a removed real server may finish its connections; default 900.",
    ),
    click.option(
        "--node-ip",
        "node_ips",
        multiple=True,
        metavar="ADDRESS",
        callback=_each_of("node_ips"),
        help="This node's main address, one of each family; default: its first.",
    ),
    click.option(
        "--node-port-addresses",
        multiple=True,
        metavar="CIDR",
        callback=_each_of("node_port_addresses"),
        help="Node addresses that serve node ports, as ranges or `primary`; repeatable; default: all.",
    ),
    click.option(
        "--external-ip-ranges",
        multiple=True,
        metavar="CIDR",
        callback=_each_of("external_ip_ranges"),
        help="externalIPs that Services may claim; repeatable; default: none (CVE-2020-8554).",
    ),
    click.option("--allow-mass-delete", is_flag=True, default=None, help="Remove also most virtual servers at once."),
)
cluster_options = together(
    click.option("--kubeconfig", metavar="FILE", help="Instead of manifests: the Kubernetes API this file names."),
    click.option(
        "--in-cluster", is_flag=True, default=None, help="Or: the Kubernetes API, by this pod's service account."
    ),
    click.option(
        "--kubeconfig-exec", is_flag=True, default=None, help="Run the program that a kubeconfig names for credentials."
    ),
)
kernel_options = together(
    click.option("--masquerade-all", is_flag=True, default=None, help="Masquerade every client."),
    click.option(
        "--cluster-cidr",
        "cluster_cidrs",
        multiple=True,
        metavar="CIDR",
        callback=_each_of("cluster_cidrs"),
        help="Pod address range: clients outside are masqueraded; repeatable, or comma-separated.",
    ),
    click.option(
        "--node-cidr", is_flag=True, default=None, help="Or: the pod ranges that the cluster gave this node are pods."
    ),
    click.option("--bridge-interface", metavar="NAME", help="Or: clients behind this bridge are pods."),
    click.option(
        "--interface-name-prefix", metavar="PREFIX", help="Or: clients behind interfaces whose names begin so are pods."
    ),
    click.option(
        "--service-cidr",
        "service_cidrs",
        multiple=True,
        metavar="CIDR",
        callback=_each_of("service_cidrs"),
        help="Range of cluster IPs: what no Service has of it is dropped; repeatable, or comma-separated.",
    ),
    click.option(
        "--vip-binding",
        type=click.Choice(("device", "routes")),
        help="VIPs as addresses of kube-ipvs0, or as local routes (for very many); default device.",
    ),
    click.option("--strict-arp", is_flag=True, default=None, help="Never answer ARP for VIPs on other interfaces."),
    click.option(
        "--ipvs-timeouts",
        metavar="TCP,FIN,UDP",
        callback=_timeouts,
        help="IPVS connection timeouts in seconds, 0 leaves one as it is; default: all as they are.",
    ),
    click.option(
        "--iptables-compat",
        type=click.Choice(("classic", "current")),
        help="Rules as the tutorials show them, or as kube-proxy writes them now; default classic.",
    ),
    click.option(
        "--iptables-tool",
        type=click.Choice(("auto", "legacy", "nft")),
        help="Back end of iptables; default auto, the one the host has chosen.",
    ),
)

zone_options = together(
    click.option(
        "--cluster-domain", metavar="NAME", callback=_domain, help="Zone of Services' names; default cluster.local."
    ),
    click.option("--dns-ttl", type=click.IntRange(0, 3600), help="Seconds an answer may be kept; default 5."),
    click.option(
        "--dns-answers",
        type=click.Choice(("coredns", "specification")),
        help="Whose way, where the two differ; default coredns.",
    ),
    click.option(
        "--dns-ignore-empty", is_flag=True, default=None, help="Services without a ready endpoint have no name."
    ),
)
answering_options = together(
    click.option(
        "--dns-upstream",
        "dns_upstreams",
        multiple=True,
        metavar="ADDRESS[:PORT]",
        callback=_each_of("dns_upstreams"),
        help="Server for all other names; repeatable; default: these are refused.",
    ),
    click.option(
        "--dns-rate-limit",
        type=click.IntRange(0, 10_000_000),
        help="Answers a second for one client over UDP, 0 for any number; default 20000.",
    ),
    click.option("--log-queries", "dns_log_queries", is_flag=True, default=None, help="Log every answer."),
)


def dns_listen_option(name: str, text: str) -> Callable[[Function], Function]:
    """Where names are answered."""
    return click.option(
        name, "dns_listen", multiple=True, metavar="ADDRESS:PORT", callback=_each_of("dns_listen"), help=text
    )


def settle(config_file: str | None, given: dict[str, Any]) -> "Configuration":
    """Command line over file over defaults."""
    return settle_and_tell(config_file, given)[0]


def settle_and_tell(config_file: str | None, given: dict[str, Any]) -> "tuple[Configuration, list[str]]":
    """The same, and what was said that has no meaning here."""
    import msgspec

    from ..configuration import SOURCES, Configuration, read_settings, with_overrides

    if not config_file:
        return with_overrides(Configuration(), given), []
    base, notices = read_settings(config_file, given.get("mode"))
    if any(given.get(each) for each in SOURCES):  # who names a source means none of the file's
        base = msgspec.structs.replace(base, manifests=(), kubeconfig="", in_cluster=False)
    return with_overrides(base, given), list(map(str, notices))


def has_net_admin() -> bool:
    """Whether this thread has CAP_NET_ADMIN in effect."""
    from pathlib import Path

    for line in Path("/proc/thread-self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_NET_ADMIN & 1)
    return os.geteuid() == 0


def open_kernel(settings: "Configuration") -> "Backend":
    """The backend of the mode; NotRoot rather than half of an answer."""
    from ..backend import MODES, open_backend

    if settings.mode in MODES and not has_net_admin():
        raise NotRoot("the kernel shows and changes Services for root only (CAP_NET_ADMIN)")
    return open_backend(settings.mode, settings.options())


def open_answers(settings: "Configuration") -> "Answers":
    """Answers to names, of nothing so far."""
    from ..dns.answers import Answers

    return Answers(settings.dns_rules(), recursive=bool(settings.dns_upstreams))


def open_dns(
    settings: "Configuration", answers: "Answers", listens: Sequence[str], log: "DnsLog"
) -> "Callable[[], DnsServer]":
    """What makes a server of these answers that does not listen yet."""
    from functools import partial

    from ..configuration import dns_server
    from ..dns.server import DnsServer, Limits
    from ..tcp_listener import parse_listen

    limits, upstreams = Limits(rate=settings.dns_rate_limit), list(map(dns_server, settings.dns_upstreams))
    where = list(map(parse_listen, listens))
    return partial(DnsServer, answers, where, log, limits, upstreams, log_queries=settings.dns_log_queries)


def open_cluster(settings: "Configuration", log: "Log") -> "tuple[KubernetesSource, EventWriter] | None":
    """The Kubernetes API as the source, and where its Events go; None when the settings name none. InputError when it
    cannot be used."""
    if not settings.from_cluster:
        if settings.node_cidr:
            raise UsageError("--node-cidr needs a Kubernetes API (--kubeconfig or --in-cluster), which knows the range")
        return None
    if bool(settings.kubeconfig) + settings.in_cluster + bool(settings.manifests) > 1:
        raise UsageError("one source is expected: manifests (-f), --kubeconfig or --in-cluster")
    from ..configuration import default_node_name
    from ..kube_events import EventWriter
    from ..kube_source import KubernetesSource
    from ..kube_transport import ConfigFault, KubeTransport, kubeconfig_reader, server_name, service_account_reader
    from ..model import Problem

    path = settings.kubeconfig
    read = kubeconfig_reader(path, allow_exec=settings.kubeconfig_exec) if path else service_account_reader()
    try:
        server = server_name(read)
    except ConfigFault as fault:
        reason = printable(str(fault), 500)
        raise InputError([Problem(printable(path or "--in-cluster", 4096), 0, "", "", reason)]) from None
    name = settings.node_name or default_node_name()
    return KubernetesSource(server, lambda: KubeTransport(read), log, name), EventWriter(KubeTransport(read), name, log)


class Input(Protocol):
    """Where a command that ends by itself reads from."""

    def read(self) -> "Update":
        """Everything."""

    @property
    def problems(self) -> "tuple[Problem, ...]":
        """All that is wrong with it."""


def open_input(settings: "Configuration") -> "tuple[Configuration, Input]":
    """The manifests, or what the Kubernetes API has at this moment; and the settings with what that says of this
    node."""
    if not settings.from_cluster:
        return settings, open_source(settings)
    import asyncio

    return asyncio.run(_list_cluster(settings))


class Quiet:
    """For a list that is asked for once: what goes wrong is told when it is given up."""

    def info(self, event: str, **fields: Any) -> None:
        """Nothing."""

    def warning(self, event: str, **fields: Any) -> None:
        """What concerns the objects, and not the way to them."""
        if not event.startswith("watch"):
            say(" ".join([event, *(f"{name} {value}" for name, value in fields.items())]))


async def _list_cluster(settings: "Configuration") -> "tuple[Configuration, Input]":
    import asyncio
    import time

    from ..errors import ApiError

    opened = open_cluster(settings, Quiet())
    assert opened is not None
    source, events = opened
    began = time.monotonic()
    listed = asyncio.create_task(source.ready())
    try:
        while not (await asyncio.wait((listed,), timeout=0.1))[0]:
            waited = time.monotonic() - began
            if waited > (UNREACHABLE_SECONDS if source.dead_since() else LIST_SECONDS):
                raise ApiError(f"{source.server}: {source.last_error()}")
        listed.result()
        return at_place(settings, source.place), source
    finally:
        listed.cancel()
        await source.close()
        await events.close()


def at_place(settings: "Configuration", place: "Place") -> "Configuration":
    """The settings, with what the cluster says of this node where they say nothing."""
    from msgspec.structs import replace

    from ..model import format_address

    node = place.node
    pods = tuple(map(str, node.pod_ranges)) if node is not None and settings.node_cidr else ()
    return replace(
        settings,
        zone=settings.zone or (node.zone if node is not None else ""),
        node_ips=settings.node_ips or (tuple(map(format_address, node.addresses)) if node is not None else ()),
        cluster_cidrs=tuple(dict.fromkeys((*settings.cluster_cidrs, *pods))),
        service_cidrs=settings.service_cidrs or tuple(map(str, place.service_ranges)),
    )


def open_source(settings: "Configuration") -> "ManifestFiles":
    """The manifests; nothing is done when one of the paths does not exist."""
    from pathlib import Path

    from ..manifest_files import ManifestFiles
    from ..model import Problem

    if not settings.manifests:
        raise UsageError("no manifests: name a file or directory with -f, or in the file of --config")
    missing = [path for path in settings.manifests if not Path(path).exists()]
    if missing:
        raise InputError([Problem(printable(path, 4096), 0, "", "", "no such file or directory") for path in missing])
    return ManifestFiles(settings.manifests)


class SettledNode:
    """This node as the settings have it, its addresses as the kernel has them, and the rest as the cluster says."""

    def __init__(self, settings: "Configuration", place: "Place | None" = None) -> None:
        from ..netlink_node import NodeAddresses

        self._settings = settings
        self._place = place
        self._addresses = NodeAddresses()
        self.fileno, self.changed, self.close = self._addresses.fileno, self._addresses.changed, self._addresses.close

    def rules(self) -> "Rules":
        """The rules that go with the addresses of this moment."""
        return self._settled().rules(self._addresses.read())

    def options(self) -> "Options":
        """The mode's options: ranges of pods and of cluster IPs may come from the cluster."""
        return self._settled().options()

    def _settled(self) -> "Configuration":
        return self._settings if self._place is None else at_place(self._settings, self._place)


def make_reconciler(settings: "Configuration", backend: "Backend") -> "Reconciler":
    """The reconciler of these settings, on this node with the addresses it has now."""
    from ..netlink_conntrack import Conntrack
    from ..reconciler import Reconciler

    with contextlib.closing(SettledNode(settings)) as node:
        rules = node.rules()
    return Reconciler(backend, rules, allow_mass_delete=settings.allow_mass_delete, flow_table=Conntrack())


def open_switch(settings: "Configuration", reconciler: "Reconciler", tell: "Tell") -> "ModeSwitch":
    """What lets go of the other modes, which an earlier agent may have left here."""
    from ..mode_switch import ModeSwitch

    return ModeSwitch(
        reconciler,
        *_openers(settings),
        tell,
        drain_seconds=settings.drain_seconds,
        allow_mass_delete=settings.allow_mass_delete,
    )


def other_modes(settings: "Configuration") -> "list[Backend]":
    """The backends, open, of other modes that hold something here."""
    from ..mode_switch import leftovers

    return leftovers(*_openers(settings))


def modes_here(mode: str | None) -> "list[Backend]":
    """The backends, open, of all modes that hold something here, or of one; [] for who may not look."""
    from .. import backend
    from ..mode_switch import leftovers

    return leftovers([mode] if mode else backend.MODES, backend.open_leftover) if has_net_admin() else []


def _openers(settings: "Configuration") -> "tuple[list[str], Callable[[str], Backend]]":
    """The other modes and this one in another place, and how one is opened as it was left here."""
    from .. import backend

    def opener(mode: str) -> "Backend":
        if mode != settings.mode:
            return backend.open_leftover(mode, settings.options())
        beside = backend.open_beside(mode, settings.options())
        if beside is None:
            raise PreflightError(f"{mode} mode is in no other place")
        return beside

    return list(backend.MODES), opener


def emit(value: object, output: str) -> None:
    """A document on stdout."""
    from ..show_text import structured

    click.echo(structured(value, output), nl=False)


def colours() -> bool:
    """Whether stdout is a terminal and nobody minds."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
