"""Every packet of the conformance cases through iptables mode, natively, over both back ends."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .flows.cases import read_cases

pytestmark = pytest.mark.root

CASES = Path(__file__).parent / "flows"


@pytest.mark.parametrize("tool", ["legacy", "nft"])
@pytest.mark.parametrize("file", ["flows.yaml", "edges.yaml"])
@pytest.mark.parametrize("compat", ["classic", "current"])
def test_every_flow_has_the_outcome_of_kube_proxys_nftables_mode(tool: str, file: str, compat: str) -> None:
    command = [sys.executable, "-m", "tests.flows", "--mode", "iptables", "--iptables-tool", tool]
    command += ["--iptables-compat", compat, str(CASES / file)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False).stdout
    flows = sum(len(case.flows) for case in read_cases(CASES / file).cases)
    passed = re.search(r"^(\d+) passed, \d+ failed, 0 skipped$", told, re.MULTILINE)
    assert passed, told
    assert int(passed[1]) == flows, told
