"""The guided tour (docs/tour.md) as a program: its console blocks, run in the world that the reader has too.

A chapter (`## …`) begins in a fresh world, `dataplane demo --shell`. Remarks that a reader does not see steer it:

    <!-- kernel: ipvs -->          after a heading: this chapter needs a kernel with IPVS
    <!-- varies: REGEX -->         before a block: what matches is another one in each run (times, ports, chance)

In a block each line that begins with the prompt is a command; what follows is what it printed.
`python -m tests.tour` (as root) runs everything and writes the blocks anew where they differ by more than what varies,
into all languages.
"""

import argparse
import json
import os
import re
import secrets
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TOUR = ROOT / "docs" / "tour.md"
TRANSLATIONS = (ROOT / "docs" / "tour.zh.md",)
PROMPT = "node# "
CHAPTER_SECONDS = 600
"""Of an emulated machine; a real one takes seconds."""

_PARTS = re.compile(
    r"^## (?P<title>.+)\n|^<!-- kernel: (?P<kernel>\w+) -->\n|^<!-- varies: (?P<varies>.+) -->\n"
    r"|^```console\n(?P<block>(?:.*\n)*?)```$",
    re.MULTILINE,
)


class Block(NamedTuple):
    """One console block."""

    text: str
    varies: str

    @property
    def commands(self) -> list[str]:
        """What the reader types."""
        return [line.removeprefix(PROMPT) for line in self.text.splitlines() if line.startswith(PROMPT)]

    def comparable(self, text: str) -> str:
        """A text of this block without what varies, and where something does without the padding that follows it."""
        if not self.varies:
            return text
        return re.sub(" +", " ", re.sub(self.varies, "~", text, flags=re.MULTILINE))


class Chapter(NamedTuple):
    """What runs in one world."""

    title: str
    kernel: str
    blocks: list[Block]


def read_chapters(path: Path) -> list[Chapter]:
    """The chapters that have console blocks."""
    chapters: list[Chapter] = []
    varies = ""
    for part in _PARTS.finditer(path.read_text()):
        if part["title"]:
            chapters.append(Chapter(part["title"], "any", []))
        elif part["kernel"]:
            chapters[-1] = chapters[-1]._replace(kernel=part["kernel"])
        elif part["varies"]:
            varies = part["varies"]
        else:
            chapters[-1].blocks.append(Block(part["block"], varies))
            varies = ""
    return [chapter for chapter in chapters if chapter.blocks]


def play(chapter: Chapter) -> list[str]:
    """Run a chapter in a fresh world; the text of each of its blocks as it came out."""
    token = secrets.token_hex(8)
    commands = [command for block in chapter.blocks for command in block.commands]
    script = "exec 2>&1\n" + "".join(f"eval {shlex.quote(line)} </dev/null\necho {token}\n" for line in commands)
    with tempfile.TemporaryFile("w+") as output:  # not a pipe, which a program left in the background would hold open
        done = subprocess.run(
            [sys.executable, "-m", "dataplane", "demo", "--shell"],
            input=script,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=CHAPTER_SECONDS,
            check=False,
            cwd=ROOT,
            env={**os.environ, "NO_COLOR": "1", "COLUMNS": "120"},
        )
        output.seek(0)
        pieces = output.read().split(f"{token}\n")
    if len(pieces) != len(commands) + 1 or pieces[-1].strip():
        raise RuntimeError(f"{chapter.title}: the shell ended with status {done.returncode} after {pieces!r}")
    rest = iter(zip(commands, pieces, strict=False))
    return ["".join(_told(*next(rest)) for _ in block.commands) for block in chapter.blocks]


def _told(command: str, output: str) -> str:
    lines = [line.expandtabs().rstrip() for line in output.splitlines()]
    return "\n".join([PROMPT + command, *lines]) + "\n"


def has_ipvs() -> bool:
    """Whether this kernel can run the chapters that need it."""
    return subprocess.run([ROOT / "vagrant" / "has-ipvs.sh"], check=False).returncode == 0


def _play_everywhere(chapters: Sequence[Chapter]) -> Iterator[list[str]]:
    """Each chapter here, or else in the micro-VM."""
    if has_ipvs():
        yield from map(play, chapters)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [str(ROOT / "vagrant" / "microvm.sh"), "-o", folder, "-m", "4096", "-t", "3600", "--"]
        subprocess.run([*command, sys.executable, "-m", "tests.tour", "--record", f"{folder}/told"], check=True)
        told = iter(json.loads(Path(folder, "told").read_text()))
        for chapter in chapters:
            yield next(told) if chapter.kernel == "ipvs" else play(chapter)


def _write(path: Path, texts: Sequence[str]) -> int:
    """Replace the blocks that differ by more than what varies; how many."""
    blocks = [block for chapter in read_chapters(path) for block in chapter.blocks]
    changed = [
        block.comparable(text) != block.comparable(block.text) for block, text in zip(blocks, texts, strict=True)
    ]
    pairs = iter(zip(texts, changed, strict=True))

    def replaced(part: "re.Match[str]") -> str:
        if part["block"] is None:
            return part[0]
        text, differs = next(pairs)
        return f"```console\n{text}```" if differs else part[0]

    path.write_text(_PARTS.sub(replaced, path.read_text()))
    return sum(changed)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.tour", description=__doc__.partition("\n")[0])
    parser.add_argument("--record", type=Path, metavar="FILE", help="only run the chapters that need IPVS, here")
    parser.add_argument("--here", action="store_true", help="leave out what needs IPVS, where this kernel has none")
    given = parser.parse_args()
    chapters = read_chapters(TOUR)
    if given.record:
        given.record.write_text(json.dumps([play(chapter) for chapter in chapters if chapter.kernel == "ipvs"]))
        return
    if given.here and not has_ipvs():
        texts = [
            text
            for chapter in chapters
            for text in ([block.text for block in chapter.blocks] if chapter.kernel == "ipvs" else play(chapter))
        ]
    else:
        texts = [text for told in _play_everywhere(chapters) for text in told]
    print(f"{TOUR.name}: {_write(TOUR, texts)} blocks written anew")
    english = [block.text for chapter in read_chapters(TOUR) for block in chapter.blocks]
    for path in TRANSLATIONS:
        if path.exists():
            print(f"{path.name}: {_write(path, english)} blocks written anew")


if __name__ == "__main__":
    main()
