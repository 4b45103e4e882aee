"""Builds the wheel and the source archive, and looks into them.

`python -m release.build DIR` is what `make release-check` runs: builds twice and compares, lists what is missing,
installs the wheel into a fresh virtual environment, and writes the bill of materials beside the packages.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

from dataplane import __version__

from .sbom import write_sbom

ROOT = Path(__file__).resolve().parent.parent
EPOCH = "315532800"
"""1980-01-01, the earliest that a zip archive can tell, where git does not say when this commit was made."""


class Packages(NamedTuple):
    """What a build has made."""

    wheel: Path
    source: Path

    def digests(self) -> dict[str, str]:
        """SHA-256 by file name."""
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in self}


def build(folder: Path, root: Path = ROOT) -> Packages:
    """Build both from `root` into an empty folder, by the build backend of the lock, without a network."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)],
        check=True,
        cwd=root,
        env={**os.environ, "SOURCE_DATE_EPOCH": source_date_epoch()},
        capture_output=True,
    )
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return Packages(wheel, source)


def source_date_epoch() -> str:
    """When the commit was made, which is the time of all files of its packages."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return given
    told = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True, check=False)
    return told.stdout.strip() or EPOCH


def wheel_files(wheel: Path) -> set[str]:
    """Names in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def source_files(source: Path) -> set[str]:
    """Names in a source archive, without its folder."""
    with tarfile.open(source) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def package_files(root: Path = ROOT) -> set[str]:
    """What both have to contain: every file of the package that git knows or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "dataplane"]
    told = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return {line for line in told.stdout.splitlines() if (root / line).exists()}


def unpacked(source: Path, folder: Path) -> Path:
    """Unpack a source archive; its folder."""
    with tarfile.open(source) as archive:
        archive.extractall(folder)  # our own archive, just made
    (found,) = folder.iterdir()
    return found


def install(wheel: Path, folder: Path) -> Path:
    """Install the wheel alone into a fresh virtual environment; its Python.

    The dependencies are those of the running interpreter, seen behind it: nothing is fetched.
    """
    venv.create(folder, system_site_packages=True, symlinks=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "-qq", "--no-deps", "--no-index", str(wheel)],
        check=True,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.check_output(where, text=True).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m release.build", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where packages and bill of materials go")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("dataplane-*.whl"), *folder.glob("dataplane-*.tar.gz")):
        old.unlink()
    packages = build(folder)
    problems = []
    for name, files in (("wheel", wheel_files(packages.wheel)), ("sdist", source_files(packages.source))):
        problems += [f"the {name} lacks {missing}" for missing in sorted(package_files() - files)]
    with tempfile.TemporaryDirectory() as second:
        again = build(Path(second))
        if again.digests() != packages.digests():
            problems.append("a second build is not the same")
    with tempfile.TemporaryDirectory() as place:
        rebuilt = build(Path(place, "packages"), unpacked(packages.source, Path(place, "source")))
        if rebuilt.digests()[packages.wheel.name] != packages.digests()[packages.wheel.name]:
            problems.append("the wheel that is built from the sdist is not the same")
        python = install(packages.wheel, Path(place, "venv"))
        told = subprocess.check_output([python.with_name("dataplane"), "--version"], text=True, cwd=place)
        if told != f"dataplane {__version__}\n":
            problems.append(f"the installed program says {told!r}")
    write_sbom(folder / f"dataplane-{__version__}.cdx.json")
    for name, digest in packages.digests().items():
        print(f"{digest}  {name}")
    for problem in problems:
        print(f"release: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
