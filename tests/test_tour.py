"""The guided tour cannot rot: every block of it is what the commands print, and all languages have the same blocks."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .tour import ROOT, TOUR, TRANSLATIONS, Chapter, play, read_chapters

CHAPTERS = read_chapters(TOUR)
MARKS = {"any": [pytest.mark.root], "ipvs": [pytest.mark.ipvs, pytest.mark.slow]}


@pytest.mark.parametrize("chapter", [pytest.param(each, id=each.title, marks=MARKS[each.kernel]) for each in CHAPTERS])
def test_each_block_is_what_its_commands_print(chapter: Chapter) -> None:
    for block, told in zip(chapter.blocks, play(chapter), strict=True):
        assert block.comparable(told) == block.comparable(block.text), told


@pytest.mark.parametrize("path", TRANSLATIONS, ids=lambda path: path.name)
def test_a_translation_has_the_same_blocks(path: Path) -> None:
    translated = read_chapters(path)
    assert [(each.kernel, each.blocks) for each in translated] == [(each.kernel, each.blocks) for each in CHAPTERS]
    drawings = re.compile(r"^```(?:text|sh)\n(?:.*\n)*?```$", re.MULTILINE)
    assert drawings.findall(path.read_text()) == drawings.findall(TOUR.read_text())
    assert path.read_text().count("\n## ") == TOUR.read_text().count("\n## ")


@pytest.mark.parametrize("path", [TOUR, *TRANSLATIONS], ids=lambda path: path.name)
def test_nothing_that_looks_like_output_escapes_the_check(path: Path) -> None:
    fences = re.findall(r"^```(.*)$", path.read_text(), re.MULTILINE)
    assert set(fences) == {"", "console", "text", "sh"}
    assert all(block.commands for each in read_chapters(path) for block in each.blocks)


def test_what_varies_is_little() -> None:
    """A pattern that takes too much would let a block rot."""
    for chapter in CHAPTERS:
        for block in chapter.blocks:
            assert block.comparable(block.text).count("~") == 0 or len(
                re.sub(r"[~\s]", "", block.comparable(block.text))
            ) > 0.6 * len(re.sub(r"\s", "", block.text)), block.text


@pytest.mark.root
def test_leaving_the_shell_ends_what_runs_in_its_machines() -> None:
    script = "dataplane run -f hostnames.yaml --mode nftables 2>/dev/null & client sleep 600 & echo $!; exit 3\n"
    done = subprocess.run(
        [sys.executable, "-m", "dataplane", "demo", "--shell"],
        input=script,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 3
    with contextlib.suppress(FileNotFoundError):  # what nobody has waited for yet has no command line any more
        assert Path("/proc", done.stdout.strip(), "cmdline").read_bytes() == b""
    assert not list(Path("/run/netns").glob("dataplane-demo-*-client"))
