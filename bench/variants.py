"""The modes as they are measured: both VIP bindings, both back ends of iptables, as far as this kernel has them."""

import shutil
from typing import NamedTuple

from dataplane.backend import Backend, Options, open_backend
from dataplane.desired import Rules
from dataplane.reconciler import Reconciler

from . import workload
from .isolation import RunFailed, isolated
from .programming import family_id

RULES = Rules(node_name=workload.NODE, drain_seconds=0)
"""A removed endpoint goes at once: every change is whole when its ACK is there."""


class Variant(NamedTuple):
    """A mode with options; `name` is its name in every table."""

    name: str
    mode: str
    options: Options = Options()
    arguments: tuple[str, ...] = ()
    """The same options on the agent's command line."""

    def backend(self) -> Backend:
        """The mode in the namespace of this process, with everything made that does not depend on Services."""
        backend = open_backend(self.mode, self.options)
        backend.prepare()
        return backend

    def reconciler(self) -> Reconciler:
        """The same, and what is there has been looked at."""
        reconciler = Reconciler(self.backend(), RULES, allow_mass_delete=True)
        reconciler.observe()
        return reconciler


VARIANTS: tuple[Variant, ...] = (
    Variant("ipvs", "ipvs"),
    Variant("ipvs, routes", "ipvs", Options(vip_binding="routes"), ("--vip-binding", "routes")),
    Variant("nftables", "nftables"),
    Variant("iptables-legacy", "iptables", Options(iptables_tool="legacy"), ("--iptables-tool", "legacy")),
    Variant("iptables-nft", "iptables", Options(iptables_tool="nft"), ("--iptables-tool", "nft")),
)


def has_ipvs() -> bool:
    """Whether this kernel has IPVS."""
    try:
        isolated(family_id, quiet=True)
    except (RunFailed, OSError):
        return False
    return True


def available() -> tuple[Variant, ...]:
    """What this kernel can do; a tool that is not installed is for `make setup`, not to be passed over."""
    for tool in ("nft", "iptables-legacy-restore", "iptables-nft-restore"):
        if shutil.which(tool) is None:
            raise RunFailed(f"{tool} is not installed: run make setup")
    ipvs = has_ipvs()
    return tuple(each for each in VARIANTS if ipvs or each.mode != "ipvs")
