"""top: who gets the traffic, on the whole screen. The only command that needs textual."""

import gc
import signal
import sys
from typing import Any

import click

from ..errors import UsageError
from .looking import complete_services
from .options import common_options
from .viewing import Viewer

SORTS = ("rate", "hits", "name", "vip", "state")


@click.command(short_help="Watch Services and backends on the whole screen.")
@click.argument("services", nargs=-1, metavar="[SERVICE|VIP]...", shell_complete=complete_services)
@common_options
@click.option(
    "--interval",
    type=click.FloatRange(0.1),
    default=1.0,
    show_default=True,
    help="Seconds between looks (keys + and -).",
)
@click.option(
    "--sort", type=click.Choice(SORTS), default="rate", show_default=True, help="What is first (keys s and r)."
)
def top(services: tuple[str, ...], config_file: str | None, interval: float, sort: str, **given: Any) -> int:
    """\b
    dataplane top
    dataplane top default/hostnames 10.0.1.175 --interval 0.5
    dataplane top --sort state          draining backends first

    Services and backends with new connections per second, shares, the last minute, and the clocks of drains; `?`
    explains keys and columns. The numbers are those of `dataplane counters`; the line under the sums says who counted.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty() and sys.stderr.isatty()):
        raise UsageError("top needs a terminal; without one: dataplane counters --watch")
    from ..top.app import Top

    # a look of a big table is 100,000 objects without a cycle: looking for cycles among them stops the screen
    gc.set_threshold(200_000, 20, 100)
    with Viewer(config_file, given) as viewer:
        app = Top(viewer, services=services, interval=interval, sort=sort)

        def end(number: int, _: object) -> None:
            app.exit(return_code=128 + number)

        # the terminal is given back as it was, also when somebody else ends it
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, end)
        app.run()
    if app.failure is not None:
        raise app.failure
    return app.return_code or 0
