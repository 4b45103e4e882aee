"""The walk of a first packet: every flow of the cases, from desired state alone, without root and without packets."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataplane.backend import MODES, open_backend
from dataplane.desired import Desired
from dataplane.explanation import wanted_situation
from dataplane.manifest_files import ManifestFiles

from .flows.agent import configuration_of, write_objects
from .flows.cases import Case, read_cases
from .flows.walking import answers

FOLDER = Path(__file__).with_name("flows")
CASES = [case for name in ("flows.yaml", "edges.yaml") for case in read_cases(FOLDER / name).cases]


@pytest.mark.parametrize("mode", list(MODES))
def test_a_walk_through_desired_state_says_what_every_flow_expects(mode: str, tmp_path: Path) -> None:
    wrong = [line for case in CASES for line in _wrong(case, mode, tmp_path)]
    assert not wrong, "\n".join(wrong)
    assert sum(len(case.flows) for case in CASES) >= 195


def _wrong(case: Case, mode: str, folder: Path) -> Iterator[str]:
    settings = configuration_of(case, mode)
    desired = Desired(settings.rules(case.node.addresses))
    desired.update(ManifestFiles([write_objects(case, folder)]).read())
    with contextlib.closing(open_backend(mode, settings.options())) as backend:
        situation = wanted_situation(desired, backend, settings.options())
    for flow, told, complaints in answers(case, situation):
        if complaints:
            yield f"{case.name}: {flow}: expected {flow.expect}; said {told.verdict} {told.reason}: {complaints}"
