"""Can this machine do it, is it well, and what would mend it: a list of checks, each with the command that helps.

What a mode needs is tried, not guessed: in a network namespace of its own, which a thread enters and which vanishes
with that thread, a dummy device is made, virtual servers with each scheduler, the guard table, and a Service in each of
the other modes. Module lists, kernel configurations and versions lie (built in, not installed, back-ported, forbidden
in a container). What only other modes lack than the one that is asked about is a warning. The probe is compiled and
attached, and detached.
"""

from collections.abc import Collection

from ..configuration import Configuration
from ..model import Address
from ..show_text import columns, status_colour
from . import kube_proxy, node, probe, trials
from .check import Check, Status, safely


def examine(settings: Configuration, *, capable: bool, agent: str = "", vips: Collection[Address] = ()) -> list[Check]:
    """Every check. `capable`: we have CAP_NET_ADMIN; `agent`: the one that runs, in words, "" = none; `vips`: those the
    manifests ask for."""
    if capable:
        checks = [Check("capability", "ok", "CAP_NET_ADMIN")]
    else:
        reason = "no CAP_NET_ADMIN; what needs it is not tried"
        checks = [Check("capability", "fail", reason, "sudo dataplane doctor")]
    checks += node.tools(settings.mode)
    if capable:
        checks += trials.in_thrown_away_namespace(lambda: trials.everything(settings))
        checks += safely("probe", lambda: probe.try_probe(settings))  # behind those, which have loaded modules
        checks += safely("loopback", node.loopback)
        checks += safely("state", lambda: node.state(settings, agent))
        checks += safely("other modes", lambda: node.other_modes(settings, agent))
        checks += safely("VIPs", lambda: node.collisions(vips))
    checks += node.sysctls(settings, vips, agent, capable=capable)
    checks += node.conntrack()
    checks += safely("kube-proxy", lambda: kube_proxy.traces(capable))
    checks += node.bindings()
    return checks


def worst(checks: Collection[Check]) -> Status:
    """The status of all checks together."""
    found = {each.status for each in checks}
    return "fail" if "fail" in found else "warn" if "warn" in found else "ok"


def report(checks: Collection[Check], *, colour: bool = False) -> str:
    """The checks as a table, each fix below its line."""
    table = columns([[each.status, each.name, each.detail] for each in checks]).splitlines()
    lines = []
    for each, line in zip(checks, table, strict=True):
        word = status_colour(each.status) if colour else each.status
        lines.append(word + line[len(each.status) :])
        if each.fix:
            lines.append(f"      fix: {each.fix}")
    return "".join(line + "\n" for line in lines)
