"""Traces of a kube-proxy that programs, or once programmed, the same kernel."""

from collections.abc import Iterator
from pathlib import Path

from .. import netlink_nftables as nft
from ..errors import PreflightError, ToolError
from ..iptables_text import MARKER
from ..model import Family
from ..netlink_socket import NETLINK_NETFILTER, NetlinkSocket
from ..run_tool import run_tool
from .check import Check, which

FIX = "stop kube-proxy on this node, then: kube-proxy --cleanup"


def traces(may: bool) -> Iterator[Check]:
    findings = [*processes()]
    if may:
        findings += [*_kube_tables(), *_kube_chains(), *_kube_sets()]
    yield from findings or [Check("kube-proxy", "ok", "no trace of it")]


def processes() -> Iterator[Check]:
    """A kube-proxy in our network namespace; those of containers with their own do no harm."""
    own = Path("/proc/self/ns/net").readlink()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "comm").read_text().strip() == "kube-proxy" and (process / "ns/net").readlink() == own:
                detail = f"runs here (pid {process.name}); in ipvs mode it deletes the virtual servers of others"
                yield Check("kube-proxy", "fail", detail, FIX)
        except OSError:
            continue  # it has ended, or is not ours to look at


def _kube_tables() -> Iterator[Check]:
    with NetlinkSocket(NETLINK_NETFILTER) as sock:
        for family, number in (("ip", Family.IPV4), ("ip6", Family.IPV6)):
            if nft.has_table(sock, number, "kube-proxy"):
                fix = f"nft delete table {family} kube-proxy"
                yield Check("kube-proxy", "warn", f"its table {family} kube-proxy is loaded", fix)


def _kube_chains() -> Iterator[Check]:
    seen: set[str] = set()
    for family in ("iptables", "ip6tables"):
        for kind in ("nft", "legacy"):
            program = which(f"{family}-{kind}-save")
            if program is None or program in seen:
                continue
            seen.add(program)
            try:
                rules = run_tool([program])
            except (ToolError, PreflightError):
                continue  # this kernel has not that kind of tables, so it has no rules in them
            chains = [line.split()[0][1:] for line in rules.splitlines() if line.startswith(":KUBE-")]
            if MARKER in chains:
                continue  # our own iptables mode
            # the kubelet's own, which stay when kube-proxy is cleaned up
            chains = [name for name in chains if name not in ("KUBE-FIREWALL", "KUBE-KUBELET-CANARY")]
            if chains:
                detail = f"{len(chains)} {family} chains KUBE-* ({kind})"
                yield Check("kube-proxy", "warn", detail, FIX)


def _kube_sets() -> Iterator[Check]:
    if which("ipset") is None:
        return
    try:
        found = [name for name in run_tool(["ipset", "list", "-n"]).split() if name.startswith("KUBE-")]
    except ToolError:
        return  # no ipset in this kernel
    if found:
        fix = "for set in $(ipset list -n | grep ^KUBE-); do ipset destroy $set; done"
        yield Check("kube-proxy", "warn", f"{len(found)} ipsets KUBE-*", fix)
