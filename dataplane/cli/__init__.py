"""The command line. Commands are imported when they are asked for, and import what they need when they run.

Data goes to stdout, everything else to stderr. Every error this program raises on purpose knows its exit status
(errors.py); here it becomes one line.
"""

import importlib
import os
import sys
from typing import Any

import click

from .. import __version__
from ..errors import DataplaneError, InputError, NotRoot
from .options import FAILED, VERBOSE, say, say_problems

COMMANDS = {
    "run": "programming",
    "apply": "programming",
    "diff": "programming",
    "show": "looking",
    "counters": "looking",
    "web": "serving",
    "dns": "naming",
    "top": "top",
    "status": "looking",
    "explain": "explaining",
    "trace": "tracing",
    "check": "upkeep",
    "doctor": "upkeep",
    "cleanup": "upkeep",
    "demo": "upkeep",
    "completion": "upkeep",
    "version": "upkeep",
}
"""Each command's module in this package, in the order of the help text."""

EPILOG = """\b
Exit status:
  0  ok
  1  failed: the kernel or a tool refused something; explain: it leads nowhere; trace: nothing was seen
  2  usage: the command line is wrong
  3  bad input: named objects or files were skipped, the rest was done
  4  diff found differences
  5  preflight failed: this machine lacks something
  6  no agent answers
  7  needs root (CAP_NET_ADMIN)
Of several the first of 1, 3, 4 counts."""


class Program(click.Group):
    """The command group, with the one place where exceptions become exit statuses."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"{__name__}.{COMMANDS[cmd_name]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; its return value is the exit status."""
        try:
            status = super().invoke(ctx)
            sys.stdout.flush()
        except (click.ClickException, click.exceptions.Exit):
            raise
        except KeyboardInterrupt:
            status = 130
        except BrokenPipeError:
            # the reader has seen enough; the interpreter's own flush at exit must not complain either
            _discard_output()
            status = 0
        except DataplaneError as error:
            _complain(error)
            status = error.exit_code
        except Exception as error:
            if ctx.meta.get(VERBOSE):
                raise
            say(f"{type(error).__name__}: {error}; rerun with --verbose for the traceback")
            status = FAILED
        ctx.exit(status if isinstance(status, int) else 0)


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(error: DataplaneError) -> None:
    if isinstance(error, InputError):
        say_problems(error.problems)
        return
    hint = f"; try: sudo dataplane {' '.join(sys.argv[1:])}" if isinstance(error, NotRoot) else ""
    say(f"{error}{hint}")


_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


@click.group(cls=Program, epilog=EPILOG, context_settings=_CONTEXT)
@click.version_option(__version__, message="dataplane %(version)s")
def cli() -> None:
    """\b
    dataplane diff -f services.d        what would change
    dataplane apply -f services.d       change it, once
    dataplane run -f services.d         keep it so
    dataplane show                      what the kernel holds
    dataplane counters --watch          who gets the traffic
    dataplane top                       the same on the whole screen

    Kubernetes-style Services in the Linux kernel, from manifest files, without a cluster.
    """


def main() -> None:
    """Console entry."""
    cli(prog_name="dataplane")
