"""Where things are inside the running kernel: /sys/kernel/btf, which everybody may read."""

from pathlib import Path

from .btf import FUNC, Btf, BtfError

ROOT = Path("/sys/kernel/btf")
KERNEL = "vmlinux"


class NotLoaded(BtfError):
    """A module that is not there, or not yet."""


class KernelTypes:
    """The types of the running kernel and of those of its modules that are asked for."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        try:
            self._kernel = Btf((root / KERNEL).read_bytes())
        except OSError as error:
            raise BtfError(f"the kernel does not describe its types ({root / KERNEL}: {error.strerror})") from None
        self._modules: dict[str, Btf] = {}

    def of(self, module: str) -> Btf:
        """Types as a module sees them; those of the kernel where it is built in."""
        if module not in self._modules:
            path = self._root / module
            self._modules[module] = Btf(path.read_bytes(), self._kernel) if path.exists() else self._kernel
        return self._modules[module]

    def function(self, module: str, name: str) -> tuple[int, bool]:
        """The id of a function, and whether the module is a separate one."""
        types = self.of(module)
        try:
            number = types.find(name, FUNC)
        except BtfError:
            if types is self._kernel:
                raise NotLoaded(f"module {module} is not loaded") from None
            raise
        return number, number >= types.first_id and types is not self._kernel


def nat_defines(kernel: KernelTypes) -> dict[str, int]:
    """Macros of dnat_hits.c about conntrack entries."""
    kernel.function("nf_nat", "nf_nat_setup_info")  # is there, or says why not
    types = kernel.of("nf_nat")
    hashed, tuple_size = types.offset("nf_conn", "tuplehash"), types.size("nf_conntrack_tuple")
    original = hashed + types.offset("nf_conntrack_tuple_hash", "tuple")
    reply = original + types.size("nf_conntrack_tuple_hash")
    status, net = types.offset("nf_conn", "status"), types.offset("nf_conn", "ct_net.net")
    return {
        "HOOK_NAT": 1,
        "NAT_ARGUMENTS": types.arguments("nf_nat_setup_info"),
        "CT_ORIGINAL_AT": original,
        "CT_REPLY_AT": reply,
        "CT_STATUS_AT": status,
        "CT_NET_AT": net,
        "CT_FROM": min(original, status, net) & ~7,
        "CT_TO": max(reply + tuple_size, status + 8, net + 8),
        "TUPLE_SRC_ADDRESS_AT": types.offset("nf_conntrack_tuple", "src.u3"),
        "TUPLE_SRC_PORT_AT": types.offset("nf_conntrack_tuple", "src.u"),
        "TUPLE_FAMILY_AT": types.offset("nf_conntrack_tuple", "src.l3num"),
        "TUPLE_DST_ADDRESS_AT": types.offset("nf_conntrack_tuple", "dst.u3"),
        "TUPLE_DST_PORT_AT": types.offset("nf_conntrack_tuple", "dst.u"),
        "TUPLE_PROTOCOL_AT": types.offset("nf_conntrack_tuple", "dst.protonum"),
        "NET_INUM_AT": types.offset("net", "ns.inum"),
    }


_IPVS_MEMBERS = {
    "VS_AF_AT": ("af", 2),
    "VS_PROTOCOL_AT": ("protocol", 2),
    "VS_VPORT_AT": ("vport", 2),
    "VS_DPORT_AT": ("dport", 2),
    "VS_VADDR_AT": ("vaddr", 16),
    "VS_DADDR_AT": ("daddr", 16),
    "VS_IPVS_AT": ("ipvs", 8),
}
"""Macro: member of struct ip_vs_conn, bytes."""


def ipvs_defines(kernel: KernelTypes) -> dict[str, int]:
    """Macros of dnat_hits.c about IPVS connections."""
    kernel.function("ip_vs", "ip_vs_schedule")
    types = kernel.of("ip_vs")
    places = {macro: types.offset("ip_vs_conn", member) for macro, (member, _) in _IPVS_MEMBERS.items()}
    return {
        "HOOK_IPVS": 1,
        "IPVS_ARGUMENTS": types.arguments("ip_vs_schedule"),
        **places,
        "VS_FROM": min(places.values()) & ~7,
        "VS_TO": max(places[macro] + width for macro, (_, width) in _IPVS_MEMBERS.items()),
        "NETNS_IPVS_NET_AT": types.offset("netns_ipvs", "net"),
        "NET_INUM_AT": types.offset("net", "ns.inum"),
    }
