"""The contract every mode fulfils, and the table of modes.

A backend turns plans into one kernel mechanism and reads that mechanism back. It never sees a Service, never computes a
difference and keeps no desired state: `observe → plan.diff → compile → commit`, and the caller (agent, apply, tests,
bench) holds the `State`. A fourth mode is one file with a `Backend` in it and one line in `MODES`.
"""

import importlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from msgspec import Struct

from .drain import DrainKey
from .errors import KernelError, UsageError
from .model import Address, Network, RealServer, VirtualAddress, VirtualServer
from .plan import Plan, State
from .sightings import Look, Witness
from .walk import Detection, Remembered, Situation, Stage, Walk


class Options(Struct, frozen=True):
    """What the administrator sets for a mode; the same for all modes where they share the notion.

    Clients inside the cluster are told by `cluster_cidrs` (pod ranges), `bridge_interface` (behind this bridge) or
    `interface_prefix` (behind interfaces whose names begin so): kube-proxy's detect-local modes; other clients of
    cluster IPs are masqueraded. None of them set: nobody is known to be inside but the node itself.
    `service_cidrs`: where cluster IPs come from; what no Service has of them is dropped (KEP-1880 ServiceCIDRs).
    `vip_binding`: "device" (addresses on kube-ipvs0) or "routes" (local routes, for very many VIPs).
    `timeouts`: IPVS tcp, tcp-fin, udp seconds, 0 = leave. `iptables_compat`: "classic" (the tutorials' text) or
    "current" (kube-proxy's present text). `iptables_tool`: "legacy", "nft", or "" for the host's choice.
    """

    masquerade_all: bool = False
    cluster_cidrs: tuple[Network, ...] = ()
    bridge_interface: str = ""
    interface_prefix: str = ""
    service_cidrs: tuple[Network, ...] = ()
    vip_binding: str = "device"
    strict_arp: bool = False
    timeouts: tuple[int, int, int] = (0, 0, 0)
    iptables_compat: str = "classic"
    iptables_tool: str = ""

    def detection(self) -> Detection:
        """How clients inside the cluster are told."""
        return Detection(*(getattr(self, name) for name in Detection.__struct_fields__))


NO_SETTINGS: Mapping[str, int] = {}


class Transaction(Protocol):
    """A printable commit. `str()` is the mode's own tools' language, ready to be read or piped into them."""

    @property
    def plan(self) -> Plan:
        """What was compiled."""

    def __str__(self) -> str: ...


class Outcome(Struct, frozen=True):
    """How a commit ended, per virtual address.

    `failed`: refused, with the reason. `unsure`: the kernel held something else than we knew (EEXIST, ESRCH …), so look
    again before anything is said. Everything else of the plan is committed.
    """

    failed: dict[VirtualAddress, KernelError] = {}
    unsure: frozenset[VirtualAddress] = frozenset()


class RealCounters(NamedTuple):
    """The kernel's own numbers for one real server. `connections`: total scheduled to it; -1 = the mode cannot tell."""

    active: int
    inactive: int
    connections: int
    bytes_in: int = -1
    bytes_out: int = -1


class ServerReport(NamedTuple):
    """One virtual server with live numbers, for people."""

    server: VirtualServer
    fwmark: int
    """Firewall mark of a server that has no address, else 0."""
    connections: int
    reals: tuple[tuple[RealServer, RealCounters], ...]
    ours: bool


class Backend(Protocol):
    """One mode. Every method may raise KernelError, Unanswered (unknown outcome: observe again) or NotRoot."""

    mode: str
    drains: bool
    """Removed real servers need weight 0 and patience in this mode (elsewhere conntrack keeps connections alive)."""
    shares_affinity: bool
    """A client's endpoint is remembered for a Service's port, and not for each of its addresses on its own."""

    remembers_counts: bool
    """What a real server that is gone had counted is counted on when it comes back, as long as the process lives."""
    picks: str
    """How an endpoint is chosen in this mode, in the words of a scheduler; "" = as the virtual server says."""

    def express(self, server: VirtualServer) -> VirtualServer:
        """The server as this mode can hold it; what it has no way to say takes its default, so that states compare."""

    def renew(self, options: Options) -> None:
        """Clients inside the cluster and cluster IPs are told by these options from the next `prepare` on, after which
        the caller observes; whatever else the mode was opened with stays."""

    def present(self) -> bool:
        """Whether anything of this mode is here, by its own marker. Cheap, never writes."""

    def prepare(self, before: Mapping[str, int] = NO_SETTINGS) -> tuple[str, ...]:
        """Make what the mode needs (modules, devices, tables, sysctls); writes nothing that is there already.

        `before`: sysctls as they were before another mode of ours that is still here; of those that this mode wants too
        they are noted as if it had found them so. Returns what could not be had and does not stop the mode, in words.
        """

    def settings(self) -> dict[str, int]:
        """Sysctls as they were before us, as far as they had to change; the kernel keeps these notes."""

    def observe(self, only: Collection[VirtualAddress] | None = None) -> State:
        """What the kernel holds of ours; with `only`, as far as those virtual addresses go. Never writes."""

    def suspects(self, held: State) -> set[VirtualAddress] | None:
        """A cheap comparison of the kernel with what we know: virtual addresses that have to be looked at.

        None = it cannot tell, observe everything. What it calls equal is equal in all that carries traffic.
        """

    def compile(self, plan: Plan) -> Transaction:
        """The plan as a printable transaction."""

    def commit(self, transaction: Transaction) -> Outcome:
        """Do it, in an order in which every prefix is safe for traffic."""

    def intact(self) -> bool:
        """The fixed parts (tables, rules, devices) are as `prepare` left them. Cheap; never writes."""

    def clocks(self) -> dict[DrainKey, float]:
        """Seconds left of the drain clocks that the kernel keeps for us."""

    def keep_clocks(self, add: dict[DrainKey, int], remove: Collection[DrainKey]) -> None:
        """Have the kernel keep (or drop) drain clocks, in seconds, so that they survive this process."""

    def open_connections(self, at: VirtualAddress) -> dict[tuple[Address, int], int]:
        """Connections each real server of a virtual server still has."""

    def report(self) -> Iterator[ServerReport]:
        """Everything the mode's mechanism holds, also what is not ours, with counters."""

    def situation(self) -> Situation:
        """What a packet meets now, by what the kernel holds, also how its rules tell clients. Never writes."""

    def remembered(self, server: VirtualServer, client: Address) -> Remembered | None:
        """The endpoint that the kernel keeps for a client of a virtual server with affinity."""

    def objects(self, walked: Walk) -> dict[Stage, tuple[str, ...]]:
        """The objects of the mode (rules, elements, servers) that decide on a walk through `situation`, by stage."""

    def watch(self, wanted: Look) -> Witness:
        """Look at real connections to one virtual address, by the best witness this mode has here; close it."""

    def monitors(self) -> tuple[int, ...]:
        """Descriptors that become readable when somebody changes something near ours."""

    def disturbed(self) -> bool:
        """Read the monitors: True when somebody else touched what is ours, or events were lost."""

    def text(self, language: str) -> str | None:
        """What the kernel holds of ours as input of a tool ("nft", "iptables"); None: not this mode's language."""

    def remove(self, leave: Collection[str] = ()) -> None:
        """Take away everything of ours, also leftovers of an earlier agent; fine when there is nothing.

        Sysctls are put back, without those named in `leave`, which another mode of ours needs.
        """

    def close(self) -> None:
        """Give descriptors back; the kernel keeps what was programmed."""


class Mode(NamedTuple):
    """One line of the table: where a mode lives and what it is, in a sentence."""

    module: str
    about: str


MODES: dict[str, Mode] = {
    "ipvs": Mode("dataplane.netlink_ipvs", "IPVS virtual servers over generic netlink, VIPs on kube-ipvs0"),
    "nftables": Mode("dataplane.nft_tables", "one nftables table of our own, Services and endpoints as its elements"),
    "iptables": Mode("dataplane.iptables_restore", "kube-proxy's chains, by iptables-restore (legacy or nft)"),
}
PLANNED: tuple[str, ...] = ()


def open_backend(mode: str, options: Options | None = None) -> Backend:
    """The backend of a mode, in the calling thread's network namespace."""
    backend: Backend = _module(mode).open_backend(options or Options())
    return backend


def open_leftover(mode: str, options: Options | None = None) -> Backend:
    """The same for what an earlier agent left: where it bound VIPs and which tools it used is seen, not told."""
    backend: Backend = _module(mode).open_leftover(options or Options())
    return backend


def open_beside(mode: str, options: Options | None = None) -> Backend | None:
    """The same mode as an earlier agent left it in another place than these options say; None = it did not."""
    opener = getattr(_module(mode), "open_beside", None)
    beside: Backend | None = opener(options or Options()) if opener else None
    return beside


def _module(mode: str) -> Any:
    if mode not in MODES:
        if mode in PLANNED:
            raise UsageError(f"mode {mode} is not there yet in this version; modes: {', '.join(MODES)}")
        raise UsageError(f"no mode {mode!r}; modes: {', '.join(MODES)}")
    return importlib.import_module(MODES[mode].module)
