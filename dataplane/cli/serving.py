"""web: the page and the metrics of the agent in this network namespace."""

import socket
from typing import TYPE_CHECKING

import click

from ..errors import DataplaneError, UsageError
from .options import say

if TYPE_CHECKING:
    from ..tcp_listener import Listen

DEFAULT_LISTEN = "127.0.0.1:10249"


def _listen(_ctx: click.Context, _: click.Parameter, value: str) -> "Listen":
    from ..tcp_listener import parse_listen

    try:
        return parse_listen(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command(short_help="Serve metrics and a page to watch, for a browser.")
@click.option(
    "--listen",
    metavar="ADDRESS:PORT",
    default=DEFAULT_LISTEN,
    show_default=True,
    callback=_listen,
    help="Where; port 0: any that is free.",
)
@click.option(
    "--max-series",
    type=click.IntRange(0),
    default=100_000,
    show_default=True,
    help="Metrics of Services and backends, above which those of backends are left out.",
)
@click.option("--descriptor", type=click.IntRange(0), hidden=True, help="Listen on this open socket.")
@click.option("--of-agent", type=click.IntRange(1), hidden=True, help="End with this process, which started us.")
def web(listen: "Listen", max_series: int, descriptor: int | None, of_agent: int | None) -> None:
    """\b
    dataplane web
    dataplane web --listen 127.0.0.1:8080
    curl -s http://127.0.0.1:10249/metrics

    The agent serves the same by itself (`run --metrics-bind-address`); this is for another address, or an agent that
    does not. Serves until Ctrl-C; without an agent the page says so and waits for one.
    """
    from pathlib import Path

    from ..control_socket import ControlClient
    from ..errors import AgentUnreachable
    from ..tcp_listener import Listen, open_listener
    from ..web import serving

    if of_agent is not None:
        if descriptor is None:
            raise UsageError("--of-agent goes with --descriptor")
        serving.end_with(of_agent)
        listener = socket.socket(fileno=descriptor)
        listener.setblocking(False)
        listen = Listen(*listener.getsockname()[:2])
    else:
        try:
            ControlClient().close()
        except AgentUnreachable as error:
            say(f"{error}: the page waits for one")
        try:
            listener = open_listener(listen)
        except DataplaneError as error:
            hint = f"if that is the agent, http://{listen}/ is there already; --listen names another address"
            raise DataplaneError(f"{error}; {hint}") from error
        listen = Listen(*listener.getsockname()[:2])
        click.echo(f"http://{listen}/")
        if not listen.loopback:
            say(f"everybody who reaches {listen} can look")
    serving.give_up_capabilities()
    node = Path("/proc/sys/kernel/hostname").read_text().strip()
    serving.serve(listener, loopback=listen.loopback, node=node, max_series=max_series)
