"""iptables mode against the tool itself: the text that ours sends, given to `iptables-restore` by hand, in one run.

Both back ends. Full: from an empty namespace, ours from plan to the tool's end, and `iptables-restore --noflush -w 5 <
FILE` with the same text. Change: the three endpoints of one Service replaced; ours and the hand take turns in one
namespace, each with a Service of its own. "as one section" is what another program sends: all chains in one section.
"""

import os
import subprocess
from functools import partial

from dataplane.backend import Options
from dataplane.iptables_books import Script
from dataplane.iptables_restore import IptablesBackend, IptablesTransaction
from dataplane.model import Address, Family, RealServer, VirtualAddress, VirtualServer
from dataplane.plan import State, diff

from . import workload
from .isolation import RunFailed, isolated
from .stopwatch import Spent, measured

TOOLS = ("legacy", "nft")
OURS, HAND, ONE_SECTION = "dataplane", "by hand", "by hand, as one section"
WARM_UP = 3
Servers = dict[VirtualAddress, VirtualServer]


def restore(tool: str, text: str) -> None:
    """The tool, fed from a file, as one would by hand; RunFailed when it refuses."""
    with os.fdopen(os.memfd_create("rules"), "w+b") as file:
        file.write(text.encode())
        file.seek(0)
        done = subprocess.run(
            [f"iptables-{tool}-restore", "--noflush", "-w", "5"], stdin=file, capture_output=True, check=False
        )
    if done.returncode:
        raise RunFailed(f"iptables-{tool}-restore: {done.stderr.decode('utf-8', 'replace')[-300:]}")


def _prepared(tool: str, size: int) -> tuple[IptablesBackend, State, Servers]:
    backend = IptablesBackend(Options(iptables_tool=tool))
    backend.prepare()
    wanted = {server.at: backend.express(server) for server in workload.servers(size)}
    return backend, backend.observe(), wanted


def _script(backend: IptablesBackend, held: State, wanted: Servers, only: list[VirtualAddress] | None = None) -> Script:
    transaction = backend.compile(diff(held, wanted, only))
    assert isinstance(transaction, IptablesTransaction)
    return transaction.scripts[Family.IPV4]


def _verify(backend: IptablesBackend, wanted: Servers) -> None:
    held = backend.observe().servers
    if held != wanted:
        raise RunFailed(f"{len(held)} servers in the tables instead of {len(wanted)}, or others")


def full(tool: str, size: int, contender: str) -> Spent:
    """One full load by one contender, in a namespace of its own."""

    def work() -> Spent:
        backend, held, wanted = _prepared(tool, size)
        if contender == OURS:
            spent = measured(partial(_ours, backend, held, wanted))
        else:
            text = _script(backend, held, wanted).text()
            if contender == ONE_SECTION:
                text = as_one_section(text)
            spent = measured(partial(restore, tool, text))
        _verify(backend, wanted)
        return spent

    return isolated(work)


def as_one_section(text: str) -> str:
    """The same lines with all of nat in one section: declarations first, as another program writes it."""
    filters, _, rest = text.partition("*nat\n")
    lines = [line for line in rest.splitlines() if line and line not in ("*nat", "COMMIT")]
    lines.sort(key=lambda line: not line.startswith(":"))  # stable
    return "\n".join([filters + "*nat", *lines, "COMMIT"]) + "\n"


def change(tool: str, size: int, count: int) -> dict[str, list[Spent]]:
    """`count` changes of one Service among `size`, by each of the two in turn."""

    def work() -> dict[str, list[Spent]]:
        backend, held, wanted = _prepared(tool, size)
        _ours(backend, held, wanted)
        held = backend.observe()
        keys = list(wanted)
        samples: dict[str, list[Spent]] = {OURS: [], HAND: []}
        for turn in range(2 * (count + WARM_UP)):
            at = keys[turn * 37 % size]
            reals = tuple(
                RealServer(Address((0x0B000000 + turn * workload.ENDPOINTS + n).to_bytes(4)), 8080)
                for n in range(workload.ENDPOINTS)
            )
            wanted[at] = VirtualServer(at, reals, bound=False, label=wanted[at].label)
            if turn % 2:
                script = _script(backend, held, wanted, [at])
                spent = measured(partial(restore, tool, script.text()))
                backend._book_of(Family.IPV4).apply(script)  # it knows nothing of what others do
            else:
                spent = measured(partial(_ours, backend, held, wanted, at))
            held.put(wanted[at])
            if turn >= 2 * WARM_UP:
                samples[HAND if turn % 2 else OURS].append(spent)
        _verify(backend, wanted)
        return samples

    return isolated(work, timeout=3600)


def _ours(backend: IptablesBackend, held: State, wanted: Servers, at: VirtualAddress | None = None) -> None:
    outcome = backend.commit(backend.compile(diff(held, wanted, at and [at])))
    if outcome.failed or outcome.unsure:
        raise RunFailed(f"ours: {outcome}")
