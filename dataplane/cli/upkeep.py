"""check, doctor, cleanup, and what helps beside."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from .. import __version__
from ..errors import UsageError
from ..printable import printable
from .options import (
    BAD_INPUT,
    FAILED,
    PREFLIGHT,
    Quiet,
    cluster_options,
    colours,
    common_options,
    emit,
    has_net_admin,
    kernel_options,
    open_cluster,
    open_input,
    open_kernel,
    open_source,
    other_modes,
    output_option,
    say,
    say_problems,
    settle,
    settle_and_tell,
    source_options,
)

if TYPE_CHECKING:
    from ..configuration import Configuration
    from ..model import Problem


@click.command(short_help="Take everything of ours out of the kernel.")
@common_options
@click.option("--all", "everything", is_flag=True, help="Every mode; also what happens without --mode.")
@click.option("--dry-run", is_flag=True, help="Say what would go, and change nothing.")
@click.option("--force", is_flag=True, help="Also while an agent (or kube-proxy) runs, which puts it back.")
@click.option("--kube-proxy", is_flag=True, help="Instead of ours: what a kube-proxy has left here, in any mode.")
@click.option("--yes", is_flag=True, help="With --kube-proxy: do not ask.")
def cleanup(
    config_file: str | None,
    everything: bool,
    dry_run: bool,
    force: bool,
    kube_proxy: bool,
    yes: bool,
    **given: Any,
) -> int:
    """\b
    dataplane cleanup --all
    dataplane cleanup --all --dry-run
    dataplane cleanup --mode nftables
    dataplane cleanup --kube-proxy

    Removes the virtual servers, addresses, routes, devices, chains and tables of every mode, or of --mode only. Needs
    no manifests and no configuration, touches nothing of others, and may be run again at any time. Open connections
    through removed virtual servers end.

    With --kube-proxy nothing of ours is removed, but what another proxy has left: kube-proxy's chains (both families,
    both back ends of iptables), nftables tables, virtual servers, device and ipsets. The plan is printed first, in the
    tools' own words, and done when you say so, or with --yes. An agent may run meanwhile, unless it is in iptables
    mode, whose chains have kube-proxy's names.
    """
    import contextlib

    from ..agent import agent_lock
    from ..backend import MODES
    from ..configuration import VIP_BINDINGS

    told_on_the_line = click.get_current_context().get_parameter_source("mode") is ParameterSource.COMMANDLINE
    if kube_proxy:
        if everything or told_on_the_line or config_file:
            raise UsageError("--kube-proxy removes nothing of ours: it goes without --all, --mode and --config")
        return _clean_kube_proxy(dry_run=dry_run, force=force, yes=yes)
    if yes:
        raise UsageError("--yes goes with --kube-proxy")
    settings = settle(config_file, given)
    if settings.mode not in MODES:
        open_kernel(settings)  # raises what every command says of such a mode
    if everything and told_on_the_line:
        raise UsageError("--all is every mode, --mode one of them: say one of the two")
    modes = [given["mode"]] if given.get("mode") and not everything else list(MODES)
    bindings = (settings.vip_binding,) if dry_run else VIP_BINDINGS
    with contextlib.nullcontext() if force or dry_run else agent_lock():
        for mode in modes:
            leave = _needed_elsewhere(settings, modes)
            told = [_clean(settings, mode, binding, dry_run, leave) for binding in bindings]
            for line in dict.fromkeys(filter(None, told)):
                click.echo(f"{mode}: {line}")
            if not any(told):
                click.echo(f"{mode}: nothing of ours is there")
    for table in _killed_traces(dry_run):
        click.echo(f"trace: {'leftover' if dry_run else 'removed'} table {table}")
    return 0


def _clean_kube_proxy(*, dry_run: bool, force: bool, yes: bool) -> int:
    """Another proxy's leftovers: told, and removed when that is wanted."""
    import sys

    from .. import kube_proxy_leftovers
    from ..agent import read_status
    from ..doctor import kube_proxy
    from ..errors import AgentUnreachable, DataplaneError, NotRoot
    from ..show_text import transaction_text

    if not has_net_admin():
        raise NotRoot("the kernel shows and changes these for root only (CAP_NET_ADMIN)")
    if not dry_run:
        try:
            agent = read_status()
        except AgentUnreachable:
            agent = {}
        if "iptables" in (str(agent.get("mode")), *(str(each).split(":")[0] for each in agent.get("leavingModes", ()))):
            raise DataplaneError(
                f"an agent in iptables mode runs here (pid {agent.get('pid', '?')}), whose chains have kube-proxy's "
                "names: switch it to another mode, or stop it first"
            )
        if not force and (pids := list(kube_proxy.running())):
            raise DataplaneError(
                f"kube-proxy runs here (pid {pids[0]}) and would put it back: stop it first, or --force"
            )
    found = kube_proxy_leftovers.find()
    for line in (*found.unread, *found.kept):
        say(line)
    if not found.anything:
        click.echo("kube-proxy: nothing of it is there")
        return 0
    click.echo(f"kube-proxy: {'leftover' if dry_run else 'to be removed'}: {', '.join(found.summary)}")
    click.echo(transaction_text(found.plan(), colour=colours()), nl=False)
    if dry_run:
        return 0
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("nobody can be asked here: --yes does what is printed above, --dry-run only prints it")
        if not click.confirm("Remove all this?", err=True):
            return FAILED
    failed = kube_proxy_leftovers.remove(found)
    for line in failed:
        say(line)
    if failed:
        return FAILED
    click.echo(f"kube-proxy: removed {', '.join(found.summary)}")
    return 0


def _killed_traces(dry_run: bool) -> list[str]:
    """Tables that a killed `trace` has left."""
    import contextlib

    from ..errors import KernelError, NotRoot
    from ..netlink_socket import NETLINK_NETFILTER, NetlinkSocket
    from ..netlink_trace import leftovers, remove_leftovers

    with contextlib.suppress(KernelError, NotRoot), NetlinkSocket(NETLINK_NETFILTER) as sock:
        return leftovers(sock) if dry_run else remove_leftovers(sock)
    return []


def _needed_elsewhere(settings: "Configuration", modes: Collection[str]) -> set[str]:
    """Sysctls of modes that stay."""
    names: set[str] = set()
    for backend in other_modes(settings) if len(modes) == 1 else ():
        if backend.mode.partition(" ")[0] not in modes:
            names |= backend.settings().keys()
        backend.close()
    return names


def _clean(settings: "Configuration", mode: str, binding: str, dry_run: bool, leave: Collection[str]) -> str:
    """Clean up after one mode with one way of binding VIPs; what went, "" when there was nothing."""
    import msgspec

    from ..errors import PreflightError
    from ..plan import State, diff
    from ..show_text import plan_summary, removal_summary, transaction_text

    backend = open_kernel(msgspec.structs.replace(settings, mode=mode, vip_binding=binding))
    try:
        try:
            held = backend.observe()
        except PreflightError:
            held = State()  # the kernel lacks the mechanism, so it holds nothing in it; the rest goes all the same
        plan = diff(held, {})
        fixed = backend.present()
        if dry_run:
            text = transaction_text(str(backend.compile(plan)), colour=colours()) if plan else ""
            return f"{plan_summary(plan)}\n{text}".rstrip() if plan else ""
        backend.remove(leave)
    finally:
        backend.close()
    if plan:
        return f"removed {removal_summary(plan)}"
    return "removed what the mode had set up" if fixed and binding == "device" else ""


@click.command(short_help="Check this machine, and say how to mend it.")
@common_options
@source_options
@kernel_options
@output_option("table", "json", "yaml")
def doctor(config_file: str | None, output: str, **given: Any) -> int:
    """\b
    dataplane doctor
    dataplane doctor -f services.d      also whether VIPs collide with the node's own addresses

    Tries what the mode needs, in a network namespace of its own that is thrown away; changes nothing here. Each line is
    ok, warn or fail, with the command that helps. Exit status 5 when one fails.
    """
    from .. import doctor as examination
    from ..agent import read_status
    from ..backend import MODES
    from ..errors import AgentUnreachable
    from ..model import Address
    from ..rows import SCHEMA_VERSION

    settings = settle(config_file, given)
    if settings.mode not in MODES:
        open_kernel(settings)  # raises what every command says of such a mode
    vips: set[Address] = set()
    problems: tuple[Problem, ...] = ()
    if settings.manifests:
        from ..desired import Desired

        source = open_source(settings)
        desired = Desired(settings.rules())
        desired.update(source.read())
        vips = {at.address for at, server in desired.servers.items() if server.bound}
        problems = source.problems
    try:
        agent = f"pid {read_status().get('pid', '?')}"
    except AgentUnreachable:
        agent = ""
    checks = examination.examine(settings, capable=has_net_admin(), agent=agent, vips=vips)
    worst = examination.worst(checks)
    if output == "table":
        click.echo(examination.report(checks, colour=colours()), nl=False)
    else:
        checked = [check._asdict() for check in checks]
        emit({"schemaVersion": SCHEMA_VERSION, "status": worst, "checks": checked}, output)
    say_problems(problems)
    return PREFLIGHT if worst == "fail" else BAD_INPUT if problems else 0


@click.command(short_help="Validate manifests and configuration.")
@common_options
@source_options
@cluster_options
@kernel_options
@output_option("table", "json", "yaml")
@click.option("--print-schema", is_flag=True, help="Print the JSON Schema of the --config file, and end.")
def check(config_file: str | None, output: str, print_schema: bool, **given: Any) -> int:
    """\b
    dataplane check -f services.d
    dataplane check --config config.yaml
    dataplane check --kubeconfig FILE   the Services and EndpointSlices that the API has now
    dataplane check --print-schema > dataplane.schema.json

    Reads everything as apply would, says what is wrong (exit status 3), and touches no kernel. Needs no root.
    """
    from ..configuration import schema
    from ..rows import SCHEMA_VERSION
    from ..show_text import plural, problem_documents

    if print_schema:
        emit(schema(), "json")
        return 0
    settings, notices = settle_and_tell(config_file, given)
    say_problems(notices)
    live = bool(given.get("kubeconfig") or given.get("in_cluster"))
    if not settings.manifests and not live:
        if not config_file:
            raise UsageError("nothing to check: name manifests with -f, or a configuration with --config")
        if settings.kubeconfig and not Path(settings.kubeconfig).exists():
            say(f"{settings.kubeconfig}: is not on this machine, and not checked")  # a ConfigMap's is a pod's path
        elif settings.kubeconfig:
            open_cluster(settings, Quiet())  # whether it can be used, as far as that shows without asking the server
        click.echo(f"{printable(config_file, 4096)}: ok")
        return 0
    from ..desired import Desired

    settings, source = open_input(settings)
    update = source.read()
    desired = Desired(settings.rules())
    desired.update(update)
    problems = (*update.problems, *desired.conflicts, *desired.refusals)
    servers = desired.servers.values()
    counts = {
        "services": sum(view is not None and view.service is not None for view in update.changed.values()),
        "virtualServers": len(servers),
        "realServers": sum(len(server.real_servers) for server in servers),
    }
    if output == "table":
        told = (("services", "Service"), ("virtualServers", "virtual server"), ("realServers", "real server"))
        text = ", ".join(plural(counts[key], noun) for key, noun in told)
        click.echo(f"{'problems' if problems else 'ok'}: {text}, {plural(len(problems), 'problem')}")
    else:
        emit({"schemaVersion": SCHEMA_VERSION, **counts, "problems": problem_documents(problems)}, output)
    say_problems(problems)
    return BAD_INPUT if problems else 0


@click.command(short_help="Show it all in a network namespace of its own.")
@click.option("--pause", is_flag=True, help="Wait for Enter between the steps.")
@click.option("--keep", is_flag=True, help="Keep everything running after the last step, until Ctrl-C.")
@click.option("--shell", is_flag=True, help="No demo: a shell among its machines, for the guided tour.")
def demo(pause: bool, keep: bool, shell: bool) -> int:
    """\b
    dataplane demo
    dataplane demo --pause
    dataplane demo --shell

    Services, endpoints and connections through them, on this machine and without touching its network.
    """
    from ..demo import open_shell, run_demo

    if shell:
        if pause or keep:
            raise UsageError("--shell plays no demo, so --pause and --keep do nothing with it")
        return int(open_shell())
    status: int = run_demo(pause=pause, keep=keep)
    return status


@click.command(short_help="Print a completion script for a shell.")
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def completion(ctx: click.Context, /, shell: str) -> None:
    """\b
    dataplane completion bash | sudo tee /etc/bash_completion.d/dataplane
    dataplane completion zsh  > ~/.zfunc/_dataplane
    dataplane completion fish > ~/.config/fish/completions/dataplane.fish

    Completes commands and options, and for root also the names of Services in `show`.
    """
    from click.shell_completion import get_completion_class

    made = get_completion_class(shell)
    assert made is not None
    # the template only: `source()` would start bash to ask for its version
    script = made(ctx.find_root().command, {}, "dataplane", "_DATAPLANE_COMPLETE")
    click.echo(script.source_template % script.source_vars())


@click.command(short_help="Print the version.")
def version() -> None:
    """\b
    dataplane version
    """
    click.echo(f"dataplane {__version__}")
