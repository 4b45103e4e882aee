"""What a mode needs, tried in a network namespace of its own that is thrown away."""

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial

from ..backend import Options, open_backend
from ..configuration import Configuration
from ..errors import DataplaneError, KernelError, PreflightError, ToolError
from ..ipvs_guard import DELIVERED, DELIVERED_MASK, Guard
from ..ipvs_messages import FAMILY_NAME, Encoder
from ..model import Address, Family, Protocol, RealServer, VirtualAddress, VirtualServer, format_address, parse_address
from ..netlink_delivery import MarkedDelivery
from ..netlink_route import DEVICE, VipDevice, bring_loopback_up
from ..netlink_socket import NETLINK_GENERIC, NETLINK_NETFILTER, NETLINK_ROUTE, NetlinkSocket, resolve_family
from ..nft_clients import Clients
from ..plan import diff
from ..procfs_sysctl import read
from ..run_iptables import Tools
from ..run_tool import run_tool
from .check import KERNEL_FIX, Check, Status, safely

SCHEDULERS = ("rr", "wrr", "lc", "wlc", "sh", "mh")
TRIAL_SECONDS = 60
_CLONE_NEWNET = 0x40000000


def in_thrown_away_namespace(trials: Callable[[], Iterator[Check]]) -> list[Check]:
    """Run checks in a thread that has a new network namespace; programs it starts are in there too."""
    done: list[Check] = []

    def work() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNET) != 0:
            reason = os.strerror(ctypes.get_errno())
            fix = "run it as root outside of the container (CAP_SYS_ADMIN)"
            done.append(Check("trials", "warn", f"no network namespace to try things in: {reason}", fix))
            return
        done.extend(safely("trials", trials))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(TRIAL_SECONDS)
    if thread.is_alive():
        done.append(Check("trials", "fail", f"not finished after {TRIAL_SECONDS} s", "dmesg | tail"))
    return done


def everything(settings: Configuration) -> Iterator[Check]:
    """What each mode needs; a failure of another mode than the one that is asked about is a warning."""
    device = settings.mode == "ipvs" and settings.vip_binding == "device"
    for mode, needed, name, trial in (
        ("ipvs", device, "dummy device", try_device),
        ("ipvs", settings.mode == "ipvs", "IPVS", try_ipvs),
        ("ipvs", settings.mode == "ipvs", "guard table", try_guard),
        ("ipvs", False, "marked delivery", try_delivery),
        ("nftables", settings.mode == "nftables", "mode nftables", partial(try_mode, "nftables", "mode nftables", "")),
        ("iptables", settings.mode == "iptables", "iptables", partial(try_iptables, settings)),
    ):
        for found in safely(name, trial):
            if found.status == "fail" and not needed:
                yield found._replace(status="warn", detail=f"{found.detail} (mode {mode} needs it)")
            else:
                yield found


def try_iptables(settings: Configuration) -> Iterator[Check]:
    """The host's choice of back end, its version, and whether each back end works."""
    chosen = "" if settings.iptables_tool == "auto" else settings.iptables_tool
    tools = Tools(Family.IPV4, chosen)
    whose = "as configured" if chosen else "the host's choice"
    yield Check("iptables", "ok", f"{tools.flavour}, {whose}: {tools.version}")
    for flavour in ("legacy", "nft"):
        name = f"iptables {flavour}"
        for found in safely(name, partial(try_mode, "iptables", name, flavour)):
            if found.status == "fail" and flavour != tools.flavour:
                yield found._replace(status="warn", detail=f"{found.detail} (not the one that is used)")
            else:
                yield found


def try_mode(mode: str, name: str, tool: str) -> Iterator[Check]:
    """A Service with affinity and one without endpoints, for both families, programmed and read back."""
    backend = open_backend(mode, Options(iptables_tool=tool, masquerade_all=True))
    try:
        lacks = backend.prepare()
        wanted = {}
        for vip, real in (("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")):
            for port, reals, persistence in ((80, (RealServer(parse_address(real), 80),), 60), (81, (), 0)):
                at = VirtualAddress(int(Protocol.TCP), parse_address(vip), port)
                wanted[at] = backend.express(VirtualServer(at, reals, persistence=persistence))
        outcome = backend.commit(backend.compile(diff(backend.observe(), wanted)))
        held = backend.observe().servers
        bad = [str(at) for at, server in wanted.items() if held.get(at) != server]
        errors = [str(error) for error in outcome.failed.values()]
    finally:
        with contextlib.suppress(DataplaneError):
            backend.remove()
        backend.close()
    for lack in lacks:
        yield Check(name, "warn", lack)
    if bad:
        detail = f"these read back otherwise: {', '.join(bad)}" + (f" ({errors[0]})" if errors else "")
        yield Check(name, "fail", detail, f"{KERNEL_FIX}  # netfilter with NAT, and the matches named here")
    else:
        yield Check(name, "ok", "Services can be programmed, with affinity, for IPv4 and IPv6")


def try_device() -> Iterator[Check]:
    with NetlinkSocket(NETLINK_ROUTE) as sock:
        device = VipDevice(sock)
        try:
            _with_module("dummy", device.ensure)
        except KernelError as error:
            detail = f"the kernel makes no dummy device: {os.strerror(error.errno)}"
            yield Check("dummy device", "fail", detail, f"modprobe dummy || {{ {KERNEL_FIX}; }}")
            return
        refused = device.bind([parse_address("192.0.2.1"), parse_address("2001:db8::1")])
        for address, refusal in refused:
            fix = "sysctl -w net.ipv6.conf.all.disable_ipv6=0" if len(address) == 16 else ""
            yield Check("dummy device", "warn", f"{format_address(address)} cannot be bound: {refusal}", fix)
        if not refused:
            yield Check("dummy device", "ok", f"{DEVICE} can be made and holds IPv4 and IPv6 addresses")
        device.remove()


def _with_module(module: str, use: Callable[[], object]) -> None:
    """Use it; if that fails load its module, which may be built in or missing, and use it again."""
    try:
        use()
    except KernelError:
        with contextlib.suppress(ToolError, PreflightError):
            run_tool(["modprobe", module])
        use()


def try_ipvs() -> Iterator[Check]:
    with NetlinkSocket(NETLINK_GENERIC) as sock:
        try:
            _with_module("ip_vs", lambda: resolve_family(sock, FAMILY_NAME))
        except KernelError:
            yield Check("IPVS", "fail", "this kernel has no IPVS", f"modprobe ip_vs || {{ {KERNEL_FIX}; }}")
            return
        encoder = Encoder(resolve_family(sock, FAMILY_NAME))
        yield Check("IPVS", "ok", "answers over generic netlink")
        vip, real = parse_address("192.0.2.1"), parse_address("192.0.2.2")

        def tried(protocol: Protocol, port: int, scheduler: str, vip: Address = vip, real: Address = real) -> int:
            """0, or the errno of adding such a virtual server with one real server."""
            at = VirtualAddress(int(protocol), vip, port)
            server = VirtualServer(at, (RealServer(real, 80),), scheduler)
            failures = sock.batch([encoder.new_server(server)])
            return failures[0].errno if failures else 0

        bad = [name for port, name in enumerate(SCHEDULERS, 1000) if tried(Protocol.TCP, port, name)]
        good = " ".join(name for name in SCHEDULERS if name not in bad)
        if good:
            yield Check("IPVS schedulers", "ok", good)
        for name in bad:
            status: Status = "fail" if name == "rr" else "warn"
            fix = f"modprobe ip_vs_{name} || {{ {KERNEL_FIX}; }}"
            yield Check(f"scheduler {name}", status, "the kernel does not have it", fix)
        for protocol in (Protocol.UDP, Protocol.SCTP):
            if code := tried(protocol, 2000, "rr"):
                detail = f"virtual servers are refused: {os.strerror(code)}"
                yield Check(
                    f"IPVS {protocol.name}", "warn", detail, f"{KERNEL_FIX}  # CONFIG_IP_VS_PROTO_{protocol.name}=y"
                )
        if code := tried(Protocol.TCP, 3000, "rr", parse_address("2001:db8::1"), parse_address("2001:db8::2")):
            detail = f"IPv6 virtual servers are refused: {os.strerror(code)}"
            yield Check("IPVS IPv6", "warn", detail, f"{KERNEL_FIX}  # CONFIG_IP_VS_IPV6=y")
        else:
            yield Check("IPVS IPv6", "ok", "IPv6 virtual servers can be made")
        if read("net.ipv4.vs.conntrack") is None:
            detail = "no net.ipv4.vs.conntrack: masquerade and the guard would not see IPVS connections"
            yield Check("IPVS conntrack", "fail", detail, f"{KERNEL_FIX}  # CONFIG_IP_VS_NFCT=y")
        else:
            yield Check("IPVS conntrack", "ok", "net.ipv4.vs.conntrack is there")


def try_delivery() -> Iterator[Check]:
    """Only Services with external or load balancer IPs need it."""
    with NetlinkSocket(NETLINK_ROUTE) as sock:
        delivery = MarkedDelivery(sock, DELIVERED, DELIVERED_MASK)
        bring_loopback_up(sock)
        try:
            delivery.ensure()
        except KernelError as error:
            detail = f"external and load balancer IPs cannot be served: {error}"
            yield Check("marked delivery", "fail", detail, f"{KERNEL_FIX}  # CONFIG_IP_MULTIPLE_TABLES=y")
            return
        there = delivery.exists()
        delivery.remove()
    if there:
        yield Check("marked delivery", "ok", "routing rules by mark can be made, for external and load balancer IPs")
    else:
        yield Check("marked delivery", "fail", "routing rules by mark read back otherwise", "report a bug")


def try_guard() -> Iterator[Check]:
    version = run_tool(["nft", "--version"]).split()[1:2]
    with NetlinkSocket(NETLINK_NETFILTER) as sock:
        guard = Guard(sock, Clients(masquerade_all=True))
        try:
            guard.ensure()
        except ToolError as error:
            fix = f"modprobe -a nf_tables nft_ct nft_masq nft_reject_inet || {{ {KERNEL_FIX}; }}"
            yield Check("guard table", "fail", f"the guard table cannot be loaded: {error}", fix)
            return
        intact = guard.intact()
        guard.delete()
    name = " ".join(["nft", *version])
    if intact:
        yield Check("guard table", "ok", f"{name} loads the guard table (sets, conntrack, masquerade, reject)")
    else:
        yield Check("guard table", "fail", f"{name} loads the guard table, but it reads back otherwise", "report a bug")
    if read("net.netfilter.nf_conntrack_max") is None:
        yield Check("conntrack", "fail", "connections are not tracked", f"modprobe nf_conntrack || {{ {KERNEL_FIX}; }}")
