"""show, status: what the kernel holds, and how the agent is."""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from ..printable import printable
from .options import FAILED, colours, common_options, emit, open_kernel, output_option, say, settle

if TYPE_CHECKING:
    from ..backend import Backend


TOOLS = ("ipvsadm", "ipvsadm-save", "nft", "iptables")
"""Forms that are a tool's own language: everything, and nothing of ours added."""


def complete_services(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Names from the kernel for the shell, of the mode that is named or of those that are there.

    In half a second or not at all, and never a word of complaint.
    """
    import signal

    from . import options

    def give_up(*_: object) -> None:
        raise TimeoutError

    try:
        signal.signal(signal.SIGALRM, give_up)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        labels: set[str] = set()
        for backend in options.modes_here(ctx.params.get("mode")):
            labels |= {server.label for server in backend.observe().servers.values()}
            backend.close()
    except Exception:
        return []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    # a colon divides words in bash: the name without its port will do
    return sorted({label.partition(":")[0] for label in labels if label.startswith(incomplete)} - {""})


@click.command(short_help="Show what the kernel holds, with names.")
@click.argument("services", nargs=-1, metavar="[SERVICE|VIP]...", shell_complete=complete_services)
@common_options
@output_option("table", "wide", "json", "yaml", "jsonl", "name", *TOOLS)
@click.option("--all", "everything", is_flag=True, help="Also what somebody else programmed.")
@click.option("--no-headers", is_flag=True, help="Leave out the line of column names.")
@click.option("-w", "--watch", is_flag=True, help="Show it again and again, until interrupted.")
@click.option(
    "--interval",
    type=click.FloatRange(0.1),
    default=2.0,
    show_default=True,
    help="Seconds between looks (with --watch).",
)
@click.option("-n", "--count", type=click.IntRange(1), help="Look that many times, then end (implies --watch).")
def show(
    services: tuple[str, ...],
    config_file: str | None,
    output: str,
    everything: bool,
    no_headers: bool,
    watch: bool,
    interval: float,
    count: int | None,
    **given: Any,
) -> int:
    """\b
    dataplane show
    dataplane show default/hostnames 10.0.1.175 -o wide
    dataplane show --watch
    dataplane show -o json | jq '.services[].realServers[].address'
    dataplane show -o ipvsadm           byte for byte what `ipvsadm -ln` prints
    dataplane show --mode nftables -o nft                what is ours, for nft -f
    dataplane show --mode iptables -o iptables           what is ours, for iptables-restore

    Read from the kernel, no agent needed. CONNS counts all connections that a real server was ever given.
    """
    if services and output in TOOLS:
        raise UsageError(f"-o {output} shows everything, as that tool does: leave out the names")
    backend = open_kernel(settle(config_file, given))
    looks = count or (0 if watch else 1)
    shown = 0
    status = 0
    try:
        while True:
            text, status = _shown(backend, services, output, everything, headers=not no_headers)
            if shown and output in ("table", "wide", *TOOLS):
                click.echo("\x1b[H\x1b[J" if colours() else "", nl=not colours())
            click.echo(text, nl=False)
            sys.stdout.flush()
            shown += 1
            if shown == looks:
                return status
            time.sleep(interval)
    finally:
        backend.close()


def _shown(
    backend: "Backend", services: Sequence[str], output: str, everything: bool, *, headers: bool
) -> tuple[str, int]:
    """The text of one look, and its exit status; what is only for people goes to stderr at once."""
    from .. import show_text

    if output in TOOLS:
        return (_ipvsadm if output.startswith("ipvsadm") else _script)(backend, output), 0
    reports = [report for report in backend.report() if report.ours or everything]
    rows = show_text.service_rows(reports, backend.clocks())
    picked = show_text.chosen(rows, services)
    if services and not picked:
        say(f"nothing here is named {' or '.join(services)}")
    elif not picked:
        say("the kernel holds no Services of ours; dataplane apply -f PATH programs some, show --all shows others'")
    match output:
        case "json" | "yaml":
            text = show_text.structured(show_text.document(picked, backend.mode), output)
        case "jsonl":
            text = show_text.json_lines(picked, backend.mode)
        case "name":
            text = show_text.names(picked)
        case _:
            text = show_text.service_table(picked, wide=output == "wide", headers=headers) if picked else ""
    return text, FAILED if services and not picked else 0


def _ipvsadm(backend: "Backend", output: str) -> str:
    from .. import ipvsadm_text

    listing = getattr(backend, "listing", None)
    info = getattr(backend, "info", None)
    if listing is None or info is None:
        raise UsageError(f"-o {output} is for --mode ipvs")
    if output == "ipvsadm-save":
        return ipvsadm_text.rules(listing())
    version, size = info()
    return ipvsadm_text.table(listing(), version, size)


def _script(backend: "Backend", output: str) -> str:
    """What is ours as a script for the tool."""
    text = backend.text(output)
    if text is None:
        raise UsageError(f"-o {output} is not for --mode {backend.mode}")
    return "".join(printable(line.expandtabs(), 1 << 20) + "\n" for line in text.splitlines())


@click.command(short_help="Ask the running agent how it is.")
@common_options
@output_option("table", "json", "yaml")
def status(config_file: str | None, output: str, **_given: Any) -> int:
    """\b
    dataplane status
    dataplane status -o json | jq .healthy

    Asks the agent of this network namespace. Exit status 6 when none answers, 1 when it is not healthy.
    """
    from ..agent import read_status
    from ..show_text import columns

    told = read_status()
    if output == "table":
        lines = [[f"{name}:", *_told(value)] for name, value in told.items() if name != "schemaVersion"]
        click.echo(columns([[name, *(rest or [""])] for name, *rest in lines]), nl=False)
    else:
        emit(told, output)
    return 0 if told.get("healthy", True) else FAILED


def _told(value: object) -> list[str]:
    match value:
        case dict():
            return [", ".join(f"{key} {_told(each)[0]}" for key, each in value.items())]
        case list():
            return ["; ".join(_told(each)[0] for each in value) or "none"]
        case bool():
            return ["yes" if value else "no"]
        case float() if value > 1e9:
            return [time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(value))]
        case None | "":
            return ["-"]
        case _:
            return [str(value)]
