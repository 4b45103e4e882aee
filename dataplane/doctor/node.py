"""This machine and this network namespace as they are: tools, addresses, settings, and who looks after our objects."""

import errno
import importlib
import os
from collections.abc import Collection, Iterator

from ..backend import MODES, open_backend, open_leftover
from ..configuration import Configuration
from ..errors import KernelError, PreflightError
from ..mode_switch import leftovers
from ..model import Address, format_address
from ..netlink_route import DEVICE, Owner, VipDevice, addresses_by_link, link_by_name
from ..netlink_socket import NETLINK_ROUTE, NetlinkSocket
from ..plan import State
from ..procfs_sysctl import (
    IPVS_SYSCTLS,
    REPORTED_SYSCTLS,
    ROOT,
    STRICT_ARP_SYSCTLS,
    check,
    read,
    running_kernel,
)
from .check import Check, Status, which

NEEDED_TOOLS = {
    "ipvs": {"nft": "nftables", "modprobe": "kmod"},
    "nftables": {"nft": "nftables"},
    "iptables": {"iptables-restore": "iptables", "ip6tables-restore": "iptables"},
}
"""Programs that a mode itself calls, with their packages."""
HELPFUL_TOOLS = {"ip": "iproute2", "ipvsadm": "ipvsadm", "conntrack": "conntrack"}
BINDINGS = {"bcc": "python3-bpfcc", "nftables": "python3-nftables"}
IFF_UP = 0x1
CONNTRACK_WARN, CONNTRACK_FAIL = 0.80, 0.95


def tools(mode: str) -> Iterator[Check]:
    users: dict[str, list[str]] = {}
    for each, programs in NEEDED_TOOLS.items():
        for program in programs:
            users.setdefault(program, []).append(each)
    packages = {program: name for programs in NEEDED_TOOLS.values() for program, name in programs.items()}
    for program, package in (packages | HELPFUL_TOOLS).items():
        needed = users.get(program, [])
        found = which(program)
        if found:
            yield Check(f"tool {program}", "ok", found)
        elif mode in needed:
            yield Check(f"tool {program}", "fail", "not installed", f"apt-get install {package}")
        else:
            whose = f"mode {' and '.join(needed)} needs it" if needed else "only people need it"
            yield Check(f"tool {program}", "warn", f"not installed; {whose}", f"apt-get install {package}")


def bindings() -> Iterator[Check]:
    for module, package in BINDINGS.items():
        try:
            importlib.import_module(module)
        except Exception as error:  # a binding to a library that is not there may raise anything
            detail = f"cannot be imported ({type(error).__name__}); only probes and tests need it"
            yield Check(f"python {module}", "warn", detail, f"apt-get install {package}")
        else:
            yield Check(f"python {module}", "ok", "can be imported")


def loopback() -> Iterator[Check]:
    """A namespace whose lo was never up has no table of local addresses, and IPVS refuses every real server."""
    with NetlinkSocket(NETLINK_ROUTE) as sock:
        link = link_by_name(sock, "lo")
    if link is None or link.flags & IFF_UP:
        yield Check("loopback", "ok", "lo is up")
    else:
        yield Check("loopback", "fail", "lo is down; IPVS may refuse real servers (EINVAL)", "ip link set lo up")


def state(settings: Configuration, agent: str) -> Iterator[Check]:
    """Whose the device and the servers here are, and whether somebody looks after them."""
    with NetlinkSocket(NETLINK_ROUTE) as sock:
        owner = VipDevice(sock).owner()
    if owner is Owner.FOREIGN:
        needed = settings.mode == "ipvs" and settings.vip_binding == "device"
        status: Status = "fail" if needed else "warn"
        fix = "dataplane cleanup --kube-proxy"
        yield Check("device", status, f"{DEVICE} is there and not ours (kube-proxy's?)", fix)
    backend = open_backend(settings.mode, settings.options())
    try:
        try:
            held = backend.observe()
        except (PreflightError, KernelError) as error:
            if isinstance(error, KernelError) and error.errno not in (errno.ENODEV, errno.ENOENT):
                raise
            held = State()  # nothing can be held; the trials say why
        intact = backend.intact()
    finally:
        backend.close()
    amount = f"{len(held.servers)} virtual servers of ours"
    if agent:
        health: Status = "ok" if intact else "warn"
        fix = "" if intact else "kill -HUP the agent, or wait for its next look"
        yield Check(
            "agent", health, f"runs ({agent}); {amount}" + ("" if intact else "; its fixed parts are damaged"), fix
        )
    elif held.servers or held.vips or intact:
        yield Check(
            "agent",
            "warn",
            f"{amount} and no agent that looks after them",
            "dataplane run -f PATH   # or: dataplane cleanup",
        )
    else:
        yield Check("agent", "ok", "none runs, and nothing of ours is left")
    if held.foreign:
        yield Check("other servers", "ok", f"{len(held.foreign)} IPVS virtual servers of somebody else; left alone")


def other_modes(settings: Configuration, agent: str) -> Iterator[Check]:
    """What an earlier agent left in another mode than the one that is asked about."""
    others = [mode for mode in MODES if mode != settings.mode]
    for backend in leftovers(others, lambda mode: open_leftover(mode, settings.options())):
        try:
            amount = f"{len(backend.observe().servers)} virtual servers"
        except (PreflightError, KernelError):
            amount = "what it had set up"
        finally:
            backend.close()
        mode = backend.mode
        if agent:
            yield Check("other modes", "ok", f"{mode} mode is here too ({amount}); the agent lets it go")
        else:
            fix = f"dataplane run --mode {settings.mode} -f PATH   # or: dataplane cleanup --mode {mode}"
            yield Check("other modes", "warn", f"{mode} mode is here ({amount}) and no agent that lets it go", fix)


def collisions(vips: Collection[Address]) -> Iterator[Check]:
    if not vips:
        return
    with NetlinkSocket(NETLINK_ROUTE) as sock:
        taken = addresses_by_link(sock)
    bad = sorted(set(vips) & taken.keys())
    for vip in bad:
        name = format_address(vip)
        width = 8 * len(vip)
        for link in taken[vip]:
            fix = f"change the Service's address, or: ip address delete {name}/{width} dev {link}"
            yield Check("VIPs", "fail", f"{name} is also an address of {link}", fix)
    if not bad:
        yield Check("VIPs", "ok", f"none of {len(vips)} is an address of this node")


def sysctls(settings: Configuration, vips: Collection[Address], agent: str, *, capable: bool = True) -> Iterator[Check]:
    """What is not as wanted is a fault only when it will not be set, or was changed behind the agent's back."""
    kernel = running_kernel()
    wanted = IPVS_SYSCTLS + (STRICT_ARP_SYSCTLS if settings.strict_arp else ())
    if settings.mode != "ipvs":
        wanted = tuple(each for each in wanted if each.name == "net.ipv4.ip_forward")
    for change in check(wanted, kernel):
        name = change.name
        path = ROOT / name.replace(".", "/")
        if not change.error:
            yield Check(name, "ok", f"{change.after}")
        elif change.before is None:
            if not name.startswith("net.ipv4.vs."):  # those come with IPVS, which was tried
                yield Check(name, "warn", change.error)
        elif (capable and not os.access(path, os.W_OK)) or os.statvfs(path).f_flag & os.ST_RDONLY:
            yield Check(name, "fail", f"{change.error}; it cannot be written here", _sysctl_fix(name, change.wanted))
        elif agent:
            yield Check(name, "warn", change.error, _sysctl_fix(name, change.wanted))
        else:
            yield Check(name, "ok", f"{change.before}; set to {change.wanted} by run and apply")
    wanted6 = any(len(vip) == 16 for vip in vips)
    for change in check(REPORTED_SYSCTLS, kernel):
        if not change.error:
            yield Check(change.name, "ok", f"{change.after}")
        elif wanted6:
            yield Check(change.name, "warn", change.error, _sysctl_fix(change.name, change.wanted))
        else:
            yield Check(change.name, "ok", f"{change.before}; matters for IPv6 VIPs only")


def _sysctl_fix(name: str, value: int) -> str:
    return f"sysctl -w {name}={value}"


def conntrack() -> Iterator[Check]:
    count, limit = read("net.netfilter.nf_conntrack_count"), read("net.netfilter.nf_conntrack_max")
    if count is None or not limit:
        return
    share = count / limit
    status: Status = "fail" if share >= CONNTRACK_FAIL else "warn" if share >= CONNTRACK_WARN else "ok"
    fix = "" if status == "ok" else f"sysctl -w net.netfilter.nf_conntrack_max={2 * limit}"
    yield Check("conntrack table", status, f"{count} of {limit} entries ({share:.0%})", fix)
