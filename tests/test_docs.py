"""The documentation as a site: it builds without a warning, shows every block, and asks nobody else for anything."""

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .tour import ROOT, TOUR, TRANSLATIONS, read_chapters

PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "-q", "build", "--strict", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def test_every_page_is_in_the_navigation(site: Path) -> None:
    start = (site / "index.html").read_text()
    for name in PAGES:
        assert f'href="{Path(name).with_suffix(".html")}"' in start, name


@pytest.mark.parametrize("path", [TOUR, *TRANSLATIONS], ids=lambda path: path.name)
def test_the_blocks_of_the_tour_are_shown_whole(site: Path, path: Path) -> None:
    page = (site / path.with_suffix(".html").name).read_text()
    shown = [html.unescape(re.sub(r"<[^>]+>", "", each)) for each in re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)]
    blocks = [block.text for chapter in read_chapters(path) for block in chapter.blocks]
    assert [text for text in shown if text.startswith("node# ")] == blocks


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|iframe)[^>]* src=\"([^\"]+)\"|<link[^>]* href=\"([^\"]+)\"", page.read_text()
        )
        assert [url for pair in loaded for url in pair if url.startswith(("http", "//"))] == [], page.name
