"""docs/reference.md: what `--help` says of every command, in one page. `python -m release.reference` writes it anew."""

import re
from pathlib import Path

import click

from dataplane.cli import cli

FILE = Path(__file__).resolve().parent.parent / "docs" / "reference.md"
WIDTH = 100
_HEAD = """\
# Reference

What `dataplane --help` and `dataplane COMMAND --help` print. This page is made of them by `make docs`.
"""


def reference() -> str:
    """The page."""
    context = _context(cli, "dataplane")
    parts = [_HEAD, _fenced(cli.get_help(context))]
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        if command is not None and not command.hidden:
            parts += [f"\n## dataplane {name}\n", _fenced(command.get_help(_context(command, name, context)))]
    return "\n".join(parts)


def _context(command: click.Command, name: str, parent: click.Context | None = None) -> click.Context:
    return click.Context(
        command,
        parent=parent,
        info_name=name,
        terminal_width=WIDTH,
        max_content_width=WIDTH,
        help_option_names=["-h", "--help"],  # as the program's own; click remembers what it was asked with first
    )


def _fenced(text: str) -> str:
    return f"```text\n{re.sub(r' +$', '', text, flags=re.MULTILINE)}\n```\n"


if __name__ == "__main__":
    FILE.write_text(reference())
