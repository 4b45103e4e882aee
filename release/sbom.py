"""The software bill of materials: what requirements.lock pins, as CycloneDX 1.5 JSON (ECMA-424's predecessor).

Read from the lock alone, without a network and without a time, so the same lock makes the same file. What the lock does
not hold, since distributions bring it (python3-bpfcc, python3-nftables), is named as well, without a version.
"""

import argparse
import json
import re
import tomllib
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from dataplane import __version__

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
PROJECT = ROOT / "pyproject.toml"
DISTRIBUTION_PACKAGES = ("python3-bpfcc", "python3-nftables")
_NAMESPACE = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")  # RFC 9562, 6.5: for names that are URLs


class Pin(NamedTuple):
    """One package of the lock."""

    name: str
    version: str
    hashes: tuple[str, ...]
    needed_by: tuple[str, ...]

    @property
    def purl(self) -> str:
        """Its package URL."""
        return f"pkg:pypi/{self.name}@{self.version}"


def read_lock(text: str) -> list[Pin]:
    """The packages of a lock file as `uv pip compile --generate-hashes` writes it."""
    pins = []
    for entry in re.split(r"\n(?=[a-z0-9])", text):
        head = re.match(r"([a-z0-9][a-z0-9._-]*)==([^ ;\\\n]+)", entry)
        if head:
            via = re.search(r"# via((?: .+)?(?:\n +#   .+)*)", entry)
            users = re.findall(r"[a-z0-9][a-z0-9._-]*(?= \(|$)", via[1], re.MULTILINE) if via else []
            pins.append(Pin(head[1], head[2], tuple(re.findall(r"sha256:([0-9a-f]{64})", entry)), tuple(users)))
    return pins


def reached(pins: Iterable[Pin], roots: Iterable[str]) -> set[str]:
    """Names of the packages that the roots need, and of those that these need."""
    needs: dict[str, set[str]] = {}
    for pin in pins:
        for user in pin.needed_by:
            needs.setdefault(user, set()).add(pin.name)
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += needs.get(name, ())
    return found


def sbom(lock: str, project: dict[str, Any]) -> dict[str, Any]:
    """The document. Scope `required`: installed with dataplane; `excluded`: for its tests and measurements only."""
    pins = read_lock(lock)
    direct = [_normal(requirement) for requirement in project["dependencies"]]
    required = reached(pins, direct)
    own = f"pkg:pypi/dataplane@{__version__}"
    by_name = {pin.name: pin for pin in pins}
    components = [
        {
            "type": "library",
            "bom-ref": pin.purl,
            "name": pin.name,
            "version": pin.version,
            "purl": pin.purl,
            "scope": "required" if pin.name in required else "excluded",
            "externalReferences": [
                {
                    "type": "distribution",
                    "url": pin.purl,
                    "hashes": [{"alg": "SHA-256", "content": digest} for digest in pin.hashes],
                }
            ],
        }
        for pin in pins
    ]
    components += [
        {"type": "library", "bom-ref": purl, "name": name, "purl": purl, "scope": "optional"}
        for name in DISTRIBUTION_PACKAGES
        for purl in [f"pkg:deb/debian/{name}"]
    ]
    needs = {pin.purl: sorted(each.purl for each in pins if pin.name in each.needed_by) for pin in pins}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, own + lock)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": own,
                "name": "dataplane",
                "version": __version__,
                "purl": own,
                "description": project["description"],
                "licenses": [{"license": {"id": project["license"]}}],
            }
        },
        "components": components,
        "dependencies": [
            {"ref": own, "dependsOn": sorted(by_name[name].purl for name in direct)},
            *({"ref": ref, "dependsOn": refs} for ref, refs in needs.items()),
        ],
    }


def _normal(requirement: str) -> str:
    """The name of a requirement as the index writes it (PEP 503)."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def write_sbom(path: Path) -> None:
    """Write the bill of materials of this clone."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    path.write_text(json.dumps(sbom(LOCK.read_text(), project), indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m release.sbom", description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    write_sbom(parser.parse_args().file)
