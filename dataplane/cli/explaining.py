"""explain: what one new connection would meet, and why."""

import contextlib
from typing import TYPE_CHECKING, Any

import click

from ..errors import AgentUnreachable, NotRoot, UsageError
from ..printable import printable
from . import options
from .looking import complete_services
from .options import (
    FAILED,
    cluster_options,
    common_options,
    emit,
    kernel_options,
    modes_here,
    open_kernel,
    output_option,
    settle,
    source_options,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..backend import Backend
    from ..configuration import Configuration
    from ..explanation import Explanation, Goal, NoAddress
    from ..model import Address, ObjectName, Problem, Protocol, ServiceView, VirtualServer
    from ..walk import Question, Situation
    from .options import Input


def address_of(_ctx: click.Context, _: click.Parameter, value: str | None) -> "Address | None":
    from ..model import parse_address

    try:
        return None if value is None else parse_address(value.strip("[]"))
    except ValueError as error:
        raise click.BadParameter(printable(str(error))) from None


def _protocol(_ctx: click.Context, _: click.Parameter, value: str | None) -> "Protocol | None":
    from ..explanation import parse_protocol

    return None if value is None else parse_protocol(value)


to_option = click.option(
    "--to",
    "target",
    required=True,
    metavar="SERVICE|ADDR:PORT[/PROTO]",
    shell_complete=complete_services,
    help="Service (name, namespace/name[:port]), or address and port.",
)
protocol_option = click.option(
    "--protocol",
    callback=_protocol,
    metavar="PROTOCOL",
    help="tcp, udp or sctp; default: the one that is served there, else tcp.",
)


@click.command(short_help="Explain what one connection would meet.")
@click.option(
    "--from", "source", callback=address_of, metavar="ADDR", help="Address of the client; default: this node itself."
)
@to_option
@protocol_option
@click.option("--interface", metavar="NAME", help="Where its packets come in; default: where this node would answer.")
@click.option("--manifests-only", is_flag=True, help="Do not look at the kernel; needs no root.")
@common_options
@source_options
@cluster_options
@kernel_options
@output_option("text", "json", "yaml")
def explain(
    source: "Address | None",
    target: str,
    protocol: "Protocol | None",
    interface: str | None,
    manifests_only: bool,
    config_file: str | None,
    output: str,
    **given: Any,
) -> int:
    """\b
    dataplane explain --to default/hostnames
    dataplane explain --from 10.244.1.5 --to 10.0.1.175:80
    dataplane explain --from 203.0.113.9 --to 192.0.2.1:30080/TCP -f services.d
    dataplane explain --to dns:dns --protocol udp -o json

    Walks the first packet of one new connection through what the kernel holds now: which rule, element or server
    decides, whose turn it may be, masqueraded or not, and why it would be refused. Sends nothing, changes nothing. With
    manifests (-f, or in the file of --config) or a Kubernetes API (--kubeconfig) it says where these differ from the
    kernel. Exit status 0 when the connection leads to an endpoint, 1 when it is refused, dropped, or no Service is
    there. Without --mode and --config it looks at the mode that is here.
    """
    from .. import explain_text
    from ..explanation import NoAddress

    settings = mode_here(settle(config_file, given), config_file, given)
    if manifests_only and not (settings.manifests or settings.from_cluster):
        raise UsageError("--manifests-only needs manifests: name them with -f, or in the file of --config")
    told_how = config_file or given.get("iptables_tool") or given.get("vip_binding")
    with contextlib.closing(_Inquiry(settings, kernel=not manifests_only, told_how=bool(told_how))) as inquiry:
        goal = inquiry.goal(target, protocol, source)
        if isinstance(goal, NoAddress):
            if output == "text":
                click.echo(explain_text.without_address(goal), nl=False)
            else:
                emit(explain_text.document_without_address(goal, settings.mode), output)
            return FAILED
        told = inquiry.explain(goal, source, interface)
    if output == "text":
        click.echo(explain_text.text(told), nl=False)
    else:
        emit(explain_text.document(told), output)
    return 0 if told.leads else FAILED


def mode_here(settings: "Configuration", config_file: str | None, given: dict[str, Any]) -> "Configuration":
    """The mode that is named, else the one that is here."""
    import msgspec

    if config_file or given.get("mode"):
        return settings
    here = modes_here(None)
    for each in here:
        each.close()
    modes = [each.mode.partition(" ")[0] for each in here]
    return settings if not modes or settings.mode in modes else msgspec.structs.replace(settings, mode=modes[0])


def open_held(settings: "Configuration", *, told_how: bool) -> "Backend":
    """The backend of the mode as it is here: with the tools and the way of binding that were used, unless told."""
    from .. import backend

    if told_how or settings.mode not in backend.MODES or not options.has_net_admin():
        return open_kernel(settings)
    return backend.open_leftover(settings.mode, settings.options())


class _Inquiry:
    """The manifests, if there are any, and the kernel, if it may be asked."""

    def __init__(self, settings: "Configuration", *, kernel: bool, told_how: bool = False) -> None:
        from .. import backend
        from ..netlink_node import NodeAddresses
        from ..reconciler import Reconciler

        reads = bool(settings.manifests) or settings.from_cluster
        if kernel and reads and not options.has_net_admin():
            raise NotRoot("the kernel shows Services to root only (CAP_NET_ADMIN); --manifests-only does without")
        self.source: Input | None = None
        if reads:
            settings, self.source = options.open_input(settings)
        self.settings = settings
        self.backend: Backend = (
            open_held(settings, told_how=told_how)
            if kernel
            else backend.open_backend(settings.mode, settings.options())
        )
        self.node: NodeAddresses = NodeAddresses()
        rules = settings.rules(self.node.read())
        self.reconciler: Reconciler = Reconciler(self.backend, rules, allow_mass_delete=settings.allow_mass_delete)
        self.views: Mapping[ObjectName, ServiceView | None] = {}
        if self.source is not None:
            update = self.source.read()
            self.views = update.changed
            self.reconciler.take(update)
        self.held: Situation | None = self.backend.situation() if kernel else None

    @property
    def problems(self) -> "tuple[Problem, ...]":
        """What is wrong with the manifests."""
        return (*self.source.problems, *self.reconciler.problems) if self.source else ()

    def servers(self) -> "list[VirtualServer]":
        """Those in the kernel, and those desired."""
        held = self.held.servers.values() if self.held else ()
        return [*held, *self.reconciler.desired.servers.values()]

    def goal(self, text: str, protocol: "Protocol | None", source: "Address | None") -> "Goal | NoAddress":
        """What somebody wants to reach."""
        from ..explanation import goal_of

        return goal_of(text, self.servers(), self.views, self.problems, protocol, source)

    def explain(self, goal: "Goal", source: "Address | None", interface: str | None) -> "Explanation":
        """Everything that is to be said of it."""
        from ..explanation import Explanation, differences, explain_kernel, refused_here, wanted_situation
        from ..model import format_address
        from ..walk import Verdict, walk

        at, chosen = goal.at, self.settings.options()
        question = self._question(goal, source, interface)
        remarks = list(goal.notes)
        kernel = desired = None
        objects: Any = {}
        told: list[str] = []
        if self.held is not None:
            kernel, objects = explain_kernel(self.backend, question, self.held)
        if self.source is not None:
            wanted = wanted_situation(self.reconciler.desired, self.backend, chosen)
            desired = walk(question, wanted)
            if self.held is not None:
                told = differences(self.held, wanted, at)
                if self.held.detection != chosen.detection() and self.backend.present():
                    told.append("rules in the kernel tell clients inside the cluster otherwise than these options")
                told += self._reasons(at, bool(told))
            if desired.verdict is Verdict.NOT_OURS:
                remarks += refused_here(at, self.views, self.problems)
        if self.held is not None:
            remarks += [f"careful: {each}{self._agent_text()}" for each in self.held.flaws]
        if kernel is not None and not self.backend.present():
            remarks.append(f"nothing of {self.settings.mode} mode is in the kernel{self._agent_text()}")
        if source is None:
            remarks.append(
                f"--from names another client; this is the node itself, {format_address(question.client.address)}"
            )
        return Explanation(self.settings.mode, question, kernel, desired, objects, tuple(told), tuple(remarks))

    def _question(self, goal: "Goal", source: "Address | None", interface: str | None) -> "Question":
        """The client as this node sees it: one of its own processes, or by which interface it comes."""
        from ..model import family_of, format_address
        from ..walk import Client, Question

        if source is not None and len(source) != len(goal.at.address):
            raise UsageError(
                f"{format_address(source)} and {format_address(goal.at.address)} are of two families: IPv4 and IPv6"
            )
        there = self.node.way_to(goal.at.address)
        if source is None:
            main = self.reconciler.desired.rules.main_address(family_of(goal.at.address))
            source = (there.source if there else None) or main
            if source is None:
                raise UsageError("this node has no address of that family: name a client with --from")
            return Question(Client(source, True), goal.at, bool(there and there.local))
        way = self.node.way_to(source)
        node = bool(way and way.local) and interface is None
        came = interface or ("" if node or way is None else way.interface)
        return Question(Client(source, node, came), goal.at, bool(there and there.local))

    def _reasons(self, at: Any, differ: bool) -> list[str]:
        """Why the kernel may hold something else than the manifests say."""
        if not differ:
            return []
        reconciler, found = self.reconciler, []
        reconciler.observe()
        plan = reconciler.plan()
        if at in plan.blocked:
            found.append("somebody else's virtual server is there; it is left alone")
        if at in reconciler.held_back:
            found.append(
                f"held back: {len(reconciler.held_back)} virtual servers would go at once (--allow-mass-delete)"
            )
        names = {server.label.partition(":")[0] for server in self.servers() if server.at[:3] == at[:3]}
        found += [str(each) for each in self.problems if each.object.partition(" ")[2] in names]
        found.append(f"what to do: dataplane apply, or an agent{self._agent_text()}")
        return found

    def _agent_text(self) -> str:
        from ..agent import read_status

        try:
            return f" (one runs: pid {read_status().get('pid', '?')}, dataplane status)"
        except AgentUnreachable:
            return " (no agent runs here)"

    def close(self) -> None:
        """Give descriptors back."""
        self.backend.close()
        self.node.close()
