"""The example manifest: what the demo needs to know of it, and how it is edited."""

import re
from pathlib import Path
from typing import NamedTuple

from ..errors import PreflightError
from .stage import PodSpec

EXAMPLE = Path(__file__).with_name("hostnames.yaml")
"""A link to examples/hostnames.yaml, so that an installed package has it too."""


class Tutorial(NamedTuple):
    """What the demo needs to know of the manifest."""

    text: str
    vip: str
    port: int
    pods: tuple[PodSpec, ...]


def read_tutorial(path: Path) -> Tutorial:
    """The Service and the pods of the example manifest."""
    import yaml  # slow to import

    try:
        text = path.read_text()
    except OSError:
        raise PreflightError(f"{path} is not there", "install the package again") from None
    service, endpoint_slice = yaml.safe_load_all(text)
    target = endpoint_slice["ports"][0]["port"]
    pods = [
        PodSpec(endpoint["targetRef"]["name"], endpoint["addresses"][0], target)
        for endpoint in endpoint_slice["endpoints"]
    ]
    return Tutorial(text, service["spec"]["clusterIP"], service["spec"]["ports"][0]["port"], tuple(pods))


def without_endpoint(text: str, address: str) -> str:
    """The manifest without the endpoint of that address."""
    return re.sub(rf"^- addresses: \[{re.escape(address)}\]\n(?:  .*\n)*", "", text, flags=re.MULTILINE)
