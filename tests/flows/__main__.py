"""`python -m tests.flows --mode nftables FILE…`: play files of cases in a network namespace of this process's own."""

import argparse
import fnmatch
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.isolation import enter_new_namespace
from dataplane.backend import MODES
from dataplane.printable import printable

from .agent import CaseAgent
from .cases import BadCases, Case, read_cases
from .running import Result, Runner
from .world import World

ROOT = Path(__file__).resolve().parent.parent.parent
OUR_CASES = Path(__file__).with_name("flows.yaml")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.flows", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, default=[OUR_CASES], metavar="FILE", help="default: our own")
    parser.add_argument("--mode", required=True, choices=sorted(MODES))
    parser.add_argument("--case", action="append", metavar="PATTERN", help="only cases whose name matches; repeatable")
    parser.add_argument("-v", "--verbose", action="store_true", help="a line for every flow")
    parser.add_argument(
        "--keep-going", action=argparse.BooleanOptionalAction, default=True, help="go on after a failure (default)"
    )
    parser.add_argument("--iptables-compat", choices=("current", "classic"), default="current")
    parser.add_argument("--iptables-tool", choices=("auto", "legacy", "nft"), default="auto")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0: every flow and fact as expected; 1: not so, or nothing to play; 2: no such file or format."""
    given = arguments(argv)
    cases: list[Case] = []
    for file in given.files:
        try:
            read = read_cases(file)
        except BadCases as error:
            print(f"flows: {printable(str(error), 500)}", file=sys.stderr)
            return 2
        cases += read.cases
        if read.unknown:
            print(
                f"flows: {file}: keys that are not looked at: {', '.join(map(printable, read.unknown))}",
                file=sys.stderr,
            )
    if given.case:
        cases = [case for case in cases if any(_matches(case.name, pattern) for pattern in given.case)]
    flows = sum(len(case.flows) for case in cases)
    if given.mode == "ipvs" and subprocess.run([ROOT / "vagrant" / "has-ipvs.sh", "-v"], check=False).returncode:
        print("flows: this kernel cannot play ipvs mode; make vm CMD='.venv/bin/python -m tests.flows --mode ipvs'")
        print(f"0 passed, 0 failed, {flows} skipped")
        return 1
    if os.geteuid() != 0:
        print("flows: needs root, for a network namespace of its own", file=sys.stderr)
        return 2
    passed = failed = played = 0
    with tempfile.TemporaryDirectory(prefix="dataplane-flows-") as folder:
        enter_new_namespace()
        tool = "" if given.iptables_tool == "auto" else given.iptables_tool
        agent = CaseAgent(given.mode, Path(folder), iptables_compat=given.iptables_compat, iptables_tool=tool)
        runner = Runner(World(), agent)
        for case in cases:
            for result in runner.run(case):
                played += result.is_flow
                passed += result.is_flow and not result.wrong
                failed += bool(result.wrong)
                if result.wrong or given.verbose:
                    print(line(result), flush=True)
                if result.wrong and not given.keep_going:
                    break
            if failed and not given.keep_going:
                break
        agent.close()
    print(f"{passed} passed, {failed} failed, {flows - played} skipped")
    return 0 if passed and not failed else 1


def _matches(name: str, pattern: str) -> bool:
    """A shell pattern, or a part of the name."""
    return fnmatch.fnmatchcase(name, pattern) or pattern in name


def line(result: Result) -> str:
    """A result for people."""
    case, what = printable(result.case), printable(result.what, 600)
    if not result.is_flow:
        return f"FAIL {case}: {what}"
    if not result.wrong:
        return f"ok   {case}: {what}: {result.seen}"
    why = printable("; ".join(result.wrong), 800)
    return f"FAIL {case}: {what}: expected {result.expected}; saw {printable(result.seen, 800)}; {why}"


if __name__ == "__main__":
    sys.exit(main())
