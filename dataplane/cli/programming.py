"""run, apply, diff: from manifests to the kernel."""

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ..errors import PreflightError
from ..printable import printable
from .kube_proxy_flags import GoCommand, kube_proxy_flags, with_flags
from .options import (
    BAD_INPUT,
    DIFFERS,
    FAILED,
    VERBOSE,
    SettledNode,
    answering_options,
    cluster_options,
    colours,
    common_options,
    dns_listen_option,
    emit,
    kernel_options,
    make_reconciler,
    metrics_address,
    open_answers,
    open_cluster,
    open_dns,
    open_input,
    open_kernel,
    open_source,
    open_switch,
    other_modes,
    output_option,
    say,
    say_problems,
    settle,
    settle_and_tell,
    source_options,
    zone_options,
)

if TYPE_CHECKING:
    from ..agent import Log
    from ..configuration import Configuration
    from ..dns.service import NameService
    from ..model import Update, VirtualAddress
    from ..reconciler import Reconciler


@click.command(cls=GoCommand, short_help="Keep the kernel as the manifests or the Kubernetes API say (daemon).")
@common_options
@source_options
@cluster_options
@kernel_options
@click.option(
    "--resync-seconds",
    type=click.FloatRange(1, 86400),
    help="Compare everything with the kernel this often; default 30.",
)
@click.option(
    "--metrics-bind-address",
    metavar="ADDRESS:PORT",
    callback=metrics_address,
    help="Where metrics and the page to watch are served; '' for nowhere; default 127.0.0.1:10249.",
)
@click.option(
    "--healthz-bind-address",
    metavar="ADDRESS:PORT",
    callback=metrics_address,
    help="Where /healthz and /livez are served; '' for nowhere; default 0.0.0.0:10256 with a Kubernetes API.",
)
@click.option(
    "--metrics-max-series",
    type=click.IntRange(0, 10_000_000),
    help="Metrics of Services and backends, beyond which those of backends are left out; default 100000.",
)
@click.option(
    "--log-format",
    type=click.Choice(("auto", "human", "json")),
    help="auto: human on a terminal, else JSON; default auto.",
)
@click.option(
    "--probe",
    type=click.Choice(("auto", "off")),
    help="Count hits by a BPF probe inside the kernel where it allows that; default auto.",
)
@click.option(
    "--init-only", is_flag=True, help="Only do what needs most privileges (sysctls, modules, fixed parts), and end."
)
@kube_proxy_flags
@dns_listen_option("--dns", "Answer names of Services here, over UDP and TCP; repeatable; default: nowhere.")
@zone_options
@answering_options
@click.pass_context
def run(ctx: click.Context, /, config_file: str | None, init_only: bool, **given: Any) -> None:
    """\b
    dataplane run -f /etc/dataplane/services.d
    dataplane run --config /etc/dataplane/config.yaml
    dataplane run --kubeconfig /etc/kubernetes/proxy.conf --mode nftables

    Watches the manifests, or Services and EndpointSlices of a Kubernetes API, programs the kernel, repairs what others
    change, and lets removed real servers finish their connections. While the API cannot be reached nothing changes.
    SIGTERM ends it and leaves the kernel as it is; SIGHUP reads everything again. Started with another --mode than
    before, it programs that mode and then lets the other one go: no connection fails. A KubeProxyConfiguration does
    for --config, and kube-proxy's flags are taken too; what has no meaning here is told in the log.
    """
    import asyncio

    from ..agent import Agent, AgentOptions, NoEvents
    from ..bpf.probe_start import ProbeStart
    from ..configuration import metrics_listen
    from ..journal import open_journal
    from ..systemd_notify import take_service_manager
    from ..web_child import WebChild

    manager = take_service_manager()
    given, unused = with_flags(given)
    settings, notices = settle_and_tell(config_file, given)
    log = open_journal(settings.log_format, verbose=bool(ctx.meta.get(VERBOSE)))
    for notice in (*notices, *unused):
        log.warning("configuration", notice=printable(notice, 500))
    if init_only:
        _prepare_only(settings, log)
        return
    opened = open_cluster(settings, log)
    cluster, events = opened or (None, None)
    source = cluster or open_source(settings)
    backend = open_kernel(settings)
    reconciler = make_reconciler(settings, backend)
    try:
        if source.notice:
            log.warning("slow input", notice=source.notice)

        def tell(step: str, *, warning: bool = False, **fields: object) -> None:
            (log.warning if warning else log.info)("switch", step=step, **fields)

        switch = open_switch(settings, reconciler, tell)
        try:
            with contextlib.closing(SettledNode(settings, cluster.place if cluster else None)) as node:
                options = AgentOptions(resync_seconds=settings.resync_seconds)
                start_probe = ProbeStart if settings.probe == "auto" else None
                listen = metrics_listen(settings.metrics_bind_address)
                web = WebChild(listen, log, settings.metrics_max_series) if listen else None
                agent = Agent(
                    *(reconciler, source, options, log, node, switch, start_probe, web, manager),
                    healthz=settings.healthz(),
                    cluster=cluster,
                    events=events or NoEvents(),
                    names=_open_names(settings, log),
                )
                asyncio.run(agent.run())
        finally:
            switch.close()
    finally:
        backend.close()


def _prepare_only(settings: "Configuration", log: "Log") -> None:
    """What needs most privileges: for a container that has them only at the beginning (kube-proxy's --init-only)."""
    from ..agent import agent_lock

    backend = open_kernel(settings)
    try:
        with agent_lock():
            switch = open_switch(settings, make_reconciler(settings, backend), lambda *_, **__: None)
            try:
                for lack in backend.prepare(switch.look()):
                    log.warning("not as wanted", lack=lack)
            finally:
                switch.close()
    finally:
        backend.close()
    log.info("prepared", mode=backend.mode)


def _open_names(settings: "Configuration", log: Any) -> "NameService | None":
    """What answers names beside the agent; None when the settings name no place for it."""
    if not settings.dns_listen:
        return None
    from ..dns.service import NameService

    answers = open_answers(settings)
    return NameService(open_dns(settings, answers, settings.dns_listen, log), answers, log)


def _keeps(update: "Update", reconciler: "Reconciler", settings: "Configuration") -> "set[VirtualAddress] | None":
    """The virtual addresses to sync; None = all.

    An object that could not be read may be what the kernel holds from an earlier time. So while the input has
    problems nothing is taken for removed, unless the user says that it is meant.
    """
    touched = reconciler.take(update)
    return touched if update.problems and not settings.allow_mass_delete else None


@click.command(short_help="Program the kernel once.")
@common_options
@source_options
@cluster_options
@kernel_options
@output_option("table", "json", "yaml")
@click.option("--dry-run", is_flag=True, help="Change nothing; the same as diff.")
def apply(config_file: str | None, output: str, dry_run: bool, **given: Any) -> int:
    """\b
    dataplane apply -f services.yaml
    dataplane apply -f services.d --scheduler wlc --cluster-cidr 10.244.0.0/16
    dataplane apply -f services.d --dry-run

    Makes the kernel hold what the manifests say. Objects with faults are named and skipped (exit status 3); while there
    are such, Services that are missing in the manifests stay in the kernel, since one of the faulty objects may be
    theirs (--allow-mass-delete removes them all the same). A real server that is removed while it has connections
    drains: it goes with a later apply, or when an agent runs.
    """
    if dry_run:
        return _diff(settle(config_file, given), output)
    from ..agent import agent_lock, sync_fields
    from ..rows import SCHEMA_VERSION
    from ..show_text import plural, problem_documents

    settings, source = open_input(settle(config_file, given))
    backend = open_kernel(settings)
    try:
        with agent_lock():
            reconciler = make_reconciler(settings, backend)
            switch = open_switch(settings, reconciler, _say_step)
            only = _keeps(source.read(), reconciler, settings)
            backend.prepare(switch.look())
            reconciler.observe()
            report = reconciler.sync("apply", only)
            # what is only kept must not begin to drain because one of its real servers does
            drained = reconciler.draining_pass() if only is None else None
            switch.step(input_is_whole=not source.problems)
            leaving, stuck = list(map(str, switch.leaving)), switch.stuck
            switch.close()
            flows_error = _clean_flows(reconciler)
    finally:
        backend.close()
    kept = 0 if only is None else _kept(reconciler)
    problems = (*source.problems, *reconciler.problems)
    draining = len(reconciler.drains.deadlines)
    failed = report.failed + (drained.failed if drained else ())
    deletes = report.deletes + (drained.deletes if drained else 0)
    if output == "table":
        click.echo(
            f"{report.result}: {plural(report.adds, 'add')}, {plural(report.sets, 'set')}, "
            f"{plural(deletes, 'delete')} in {report.milliseconds:.1f} ms ({backend.mode})"
        )
    else:
        fields = {**sync_fields(report, backend.mode), "deletes": deletes, "failed": list(map(str, failed))}
        fields |= {"blocked": list(map(str, report.blocked)), "heldBack": report.held_back}
        fields.pop("held_back", None)
        fields |= {"draining": draining, "kept": kept, "leavingModes": leaving}
        fields |= {"problems": problem_documents(problems)}
        emit({"schemaVersion": SCHEMA_VERSION, **fields}, output)
    if draining:
        say(
            "1 real server drains; it goes when you run apply again or an agent runs"
            if draining == 1
            else f"{draining} real servers drain; they go when you run apply again or an agent runs"
        )
    for each in leaving:
        say(f"of another mode is still here: {each}; it goes when you run apply again or an agent runs")
    say_problems(problems)
    for text in (*reconciler.remarks(), *map(str, failed)):
        say(text)
    if flows_error:
        say(f"UDP clients may be stuck to real servers that are gone: {flows_error}")
    _say_kept(kept)
    incomplete = _say_withheld(report.blocked, report.held_back) or stuck
    return FAILED if failed or incomplete or flows_error else BAD_INPUT if problems else 0


def _clean_flows(reconciler: "Reconciler") -> str:
    """Delete conntrack entries that lead UDP clients to what is gone; why that failed, or ""."""
    from ..errors import DataplaneError

    try:
        swept = reconciler.clean_flows()
    except (DataplaneError, OSError) as error:
        return printable(str(error))
    if swept is not None and swept.deleted:
        say(f"{swept.deleted} conntrack entries of UDP clients led to what is gone: deleted")
    return ""


def _say_step(step: str, *, warning: bool = False, **fields: object) -> None:
    """Tell a step of a switch of modes."""
    say(" ".join([f"switch: {step}", *(f"{name.replace('_', ' ')} {value}" for name, value in fields.items())]))


def _kept(reconciler: "Reconciler") -> int:
    """Virtual servers in use that the manifests lack."""
    held = reconciler.held.servers
    doomed = held.keys() - reconciler.desired.servers.keys()
    return sum(not held[at].real_servers or any(real.weight for real in held[at].real_servers) for at in doomed)


def _say_kept(kept: int) -> None:
    """Tell what is not removed on purpose."""
    if kept:
        stay = (
            "1 virtual server that the manifests lack stays"
            if kept == 1
            else f"{kept} virtual servers that the manifests lack stay"
        )
        say(f"{stay} until the problems are mended; if it shall go at once: --allow-mass-delete")


def _say_withheld(blocked: Sequence["VirtualAddress"], held_back: int) -> bool:
    """Tell what was wanted and is not done; whether there is such."""
    for at in blocked:
        say(f"{at}: somebody else's virtual server is there; it is left alone")
    if held_back:
        say(f"{held_back} virtual servers would be removed at once: held back; if it is meant: --allow-mass-delete")
    return bool(blocked or held_back)


@click.command(short_help="Show what apply would change.")
@common_options
@source_options
@cluster_options
@kernel_options
@output_option("table", "json", "yaml")
def diff(config_file: str | None, output: str, **given: Any) -> int:
    """\b
    dataplane diff -f services.d
    dataplane diff -f services.d -o json
    dataplane diff --kubeconfig /etc/kubernetes/proxy.conf --mode nftables

    A summary, then the change in the language of the tools that could make it (nft, ipvsadm, ip,
    iptables-restore), and other modes that would go. Changes nothing.
    Exit status 0: in sync, 4: differs, 3: the manifests have problems (whether it differs or not).
    """
    return _diff(settle(config_file, given), output)


def _others(settings: "Configuration") -> dict[str, int]:
    """Other modes that are here, with their virtual servers; apply would let them go."""
    found = {}
    for backend in other_modes(settings):
        try:
            found[backend.mode] = len(backend.observe().servers)
        except PreflightError:
            found[backend.mode] = 0  # the kernel has lost the mechanism itself
        finally:
            backend.close()
    return found


def _diff(settings: "Configuration", output: str) -> int:
    from ..rows import SCHEMA_VERSION
    from ..show_text import (
        plan_objects,
        plan_summary,
        plural,
        problem_documents,
        transaction_text,
    )

    settings, source = open_input(settings)
    backend = open_kernel(settings)
    try:
        reconciler = make_reconciler(settings, backend)
        only = _keeps(source.read(), reconciler, settings)
        reconciler.observe()
        plan = reconciler.plan(only)
        text = str(backend.compile(plan)) if plan else ""
        others = _others(settings)
    finally:
        backend.close()
    problems = (*source.problems, *reconciler.problems)
    held_back = len(reconciler.held_back)
    in_sync = not (plan or plan.blocked or held_back or others)
    kept = 0 if only is None else _kept(reconciler)
    if output == "table":
        held = reconciler.held.servers.values()
        click.echo(
            plan_summary(plan)
            if plan
            else f"in sync: {plural(len(held), 'virtual server')}, "
            f"{plural(sum(len(server.real_servers) for server in held), 'real server')}"
        )
        for mode, count in others.items():
            click.echo(f"{mode} mode goes, when {backend.mode} mode holds all this: {plural(count, 'virtual server')}")
        click.echo(transaction_text(text, colour=colours()), nl=False)
    else:
        adds, sets, deletes = plan.counts()
        emit(
            {
                "schemaVersion": SCHEMA_VERSION,
                "mode": backend.mode,
                "inSync": in_sync,
                "adds": adds,
                "sets": sets,
                "deletes": deletes,
                "objects": plan_objects(plan),
                "blocked": list(map(str, plan.blocked)),
                "otherModes": [{"mode": mode, "virtualServers": count} for mode, count in others.items()],
                "heldBack": held_back,
                "kept": kept,
                "transaction": text,
                "problems": problem_documents(problems),
            },
            output,
        )
    say_problems(problems)
    _say_kept(kept)
    _say_withheld(plan.blocked, held_back)
    return BAD_INPUT if problems else 0 if in_sync else DIFFERS
