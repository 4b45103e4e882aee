"""A release: its packages hold what the program reads, can be built again, work elsewhere, and are listed."""

import json
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataplane import __version__
from release.build import Packages, build, install, package_files, source_files, unpacked, wheel_files
from release.reference import FILE, reference
from release.sbom import LOCK, PROJECT, read_lock, sbom

DATA = {
    "dataplane/bpf/dnat_hits.c",
    "dataplane/nft_tables.nft",
    "dataplane/ipvs_guard.nft",
    "dataplane/web/assets/page.js",
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    return build(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def python(packages: Packages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(packages.wheel, tmp_path_factory.mktemp("fresh"))


def test_both_packages_have_every_file_of_the_package(packages: Packages) -> None:
    assert package_files() >= DATA
    assert package_files() - wheel_files(packages.wheel) == set()
    assert package_files() - source_files(packages.source) == set()
    strangers = {name for name in wheel_files(packages.wheel) if not name.startswith(("dataplane/", "dataplane-"))}
    assert strangers == set()
    assert not [name for name in wheel_files(packages.wheel) if "__pycache__" in name or "/tests/" in name]


def test_a_second_build_is_the_same_to_the_byte(packages: Packages, tmp_path: Path) -> None:
    assert build(tmp_path).digests() == packages.digests()


def test_the_source_archive_builds_the_same_wheel(packages: Packages, tmp_path: Path) -> None:
    again = build(tmp_path / "packages", unpacked(packages.source, tmp_path / "source"))
    assert again.wheel.name == packages.wheel.name
    assert again.digests()[again.wheel.name] == packages.digests()[again.wheel.name]


def test_the_version_is_told_in_one_place(packages: Packages, python: Path, tmp_path: Path) -> None:
    told = subprocess.check_output([python.with_name("dataplane"), "--version"], text=True, cwd=tmp_path)
    assert told == f"dataplane {__version__}\n"
    assert packages.wheel.name.split("-")[1] == __version__
    assert "version" not in tomllib.loads(PROJECT.read_text())["project"]


def test_what_is_installed_reads_its_own_files(python: Path, tmp_path: Path) -> None:
    script = (
        "import dataplane; from dataplane.demo.tutorial import EXAMPLE, read_tutorial; print(dataplane.__file__);"
        "print(read_tutorial(EXAMPLE).vip, EXAMPLE.is_symlink())"
    )
    told = subprocess.check_output([python, "-c", script], text=True, cwd=tmp_path).splitlines()
    assert Path(told[0]).is_relative_to(python.parent.parent)
    assert told[1] == "10.0.1.175 False"


@pytest.mark.root
def test_what_is_installed_programs_a_kernel_and_serves(python: Path, tmp_path: Path) -> None:
    """The demo's world, by the wheel alone: its manifest, and the rules of nftables."""
    done = subprocess.run(
        [python.with_name("dataplane"), "demo", "--shell"],
        input="dataplane apply -f hostnames.yaml --mode nftables >&2 && client curl -sS -m 10 10.0.1.175\n",
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        check=False,
    )
    assert re.fullmatch(r"hostnames-632524106-\w{5}\n", done.stdout), done.stderr


def test_the_bill_of_materials_lists_the_lock() -> None:
    lock = LOCK.read_text()
    document = sbom(lock, tomllib.loads(PROJECT.read_text())["project"])
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.5")
    by_name = {each["name"]: each for each in document["components"]}
    assert set(re.findall(r"^([a-z0-9._-]+)==", lock, re.MULTILINE)) | {"python3-bpfcc", "python3-nftables"} == set(
        by_name
    )
    assert by_name["click"]["scope"] == by_name["h11"]["scope"] == "required"  # h11 comes with uvicorn
    assert by_name["pytest"]["scope"] == by_name["matplotlib"]["scope"] == "excluded"
    hashes = [each["content"] for each in by_name["click"]["externalReferences"][0]["hashes"]]
    assert len(hashes) >= 2
    assert all(f"--hash=sha256:{each}" in lock for each in hashes)
    references = {each["bom-ref"] for each in document["components"]}
    for entry in document["dependencies"]:
        assert set(entry["dependsOn"]) <= references
    assert json.dumps(document) == json.dumps(sbom(lock, tomllib.loads(PROJECT.read_text())["project"]))


def lock_entries() -> Iterator[str]:
    yield from re.findall(r"^[a-z0-9._-]+==.*\n(?:    .*\n?)*", LOCK.read_text(), re.MULTILINE)


def test_every_package_of_the_lock_has_hashes() -> None:
    assert len(read_lock(LOCK.read_text())) == len(list(lock_entries()))
    assert all(pin.hashes and pin.needed_by for pin in read_lock(LOCK.read_text()))


def test_the_reference_is_current() -> None:
    assert FILE.read_text() == reference(), "run: make docs"
