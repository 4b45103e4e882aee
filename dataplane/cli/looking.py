"""show, counters, status: what the kernel holds, who gets the traffic, and how the agent is."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from ..printable import printable
from .options import FAILED, common_options, emit, output_option, say
from .viewing import Viewer, watch_options, watched

if TYPE_CHECKING:
    from ..backend import Backend
    from ..rows import Look


TOOLS = ("ipvsadm", "ipvsadm-save", "nft", "iptables")
"""Forms that are a tool's own language: everything, and nothing of ours added."""
NOT_SHOWN = ("schemaVersion", "figures")
"""Of a status, what is for programs (`-o json`, metrics) and not for the table."""


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
@watch_options
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

    HITS are new connections that were led to a real server; the title says who counted them: the agent's probe, or the
    mode's own counters. Without an agent the kernel is read.
    """
    if services and output in TOOLS:
        raise UsageError(f"-o {output} shows everything, as that tool does: leave out the names")

    nothing_found = False
    with Viewer(config_file, given) as viewer:

        def draw() -> str:
            nonlocal nothing_found
            if output in TOOLS:
                return (_ipvsadm if output.startswith("ipvsadm") else _script)(viewer.backend, output)
            picked = _picked(viewer.look(), services, everything)
            nothing_found = bool(services) and not picked.services
            return _shown(picked, services, output, headers=not no_headers)

        clear = output in ("table", "wide", *TOOLS)
        watched(draw, watch=watch, interval=interval, count=count, clear=clear)
    return FAILED if nothing_found else 0


def _picked(look: "Look", services: Sequence[str], everything: bool) -> "Look":
    """The part of a look that was asked for."""
    from msgspec.structs import replace

    from ..rows import chosen

    return replace(look, services=tuple(chosen((r for r in look.services if r.ours or everything), services)))


def _complain_of_nothing(services: Sequence[str]) -> None:
    if services:
        say(f"nothing here is named {' or '.join(services)}")
    else:
        say("the kernel holds no Services of ours; dataplane apply -f PATH programs some, show --all shows others'")


def _shown(look: "Look", services: Sequence[str], output: str, *, headers: bool) -> str:
    """The text of one look; what is only for people goes to stderr at once."""
    from .. import show_text

    if not look.services:
        _complain_of_nothing(services)
    match output:
        case "json" | "yaml":
            return show_text.structured(show_text.document(look), output)
        case "jsonl":
            return show_text.json_lines(look)
        case "name":
            return show_text.names(look.services)
        case _:
            return show_text.service_table(look, wide=output == "wide", headers=headers) if look.services else ""


@click.command(short_help="Count new connections per backend, live.")
@click.argument("services", nargs=-1, metavar="[SERVICE|VIP]...", shell_complete=complete_services)
@common_options
@output_option("table", "wide", "json", "jsonl", "yaml")
@watch_options
def counters(
    services: tuple[str, ...],
    config_file: str | None,
    output: str,
    no_headers: bool,
    watch: bool,
    interval: float,
    count: int | None,
    **given: Any,
) -> int:
    """\b
    dataplane counters
    dataplane counters default/hostnames --watch --interval 1
    dataplane counters -n 2 -o jsonl | jq -r 'select(.rate != null) | [.backend, .rate] | @tsv'

    New connections led to each backend, with its share and, from the second look on, its rate. The first line says who
    counted them: the agent's probe inside the kernel, with what it has missed, or the mode's own counters and why.
    """
    nothing_found = False
    with Viewer(config_file, given) as viewer:

        def draw() -> str:
            nonlocal nothing_found
            from .. import counters_text, show_text

            look = _picked(viewer.look(), services, everything=False)
            nothing_found = bool(services) and not look.services
            if not look.services:
                _complain_of_nothing(services)
            match output:
                case "json" | "yaml":
                    return show_text.structured(counters_text.document(look), output)
                case "jsonl":
                    return counters_text.json_lines(look)
                case _:
                    return counters_text.table(look, wide=output == "wide", headers=not no_headers)

        watched(draw, watch=watch, interval=interval, count=count, clear=output in ("table", "wide"))
    return FAILED if nothing_found else 0


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
        lines = [[f"{name}:", *_told(value)] for name, value in told.items() if name not in NOT_SHOWN]
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
