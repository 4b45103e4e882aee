"""ipvsadm's own language, byte for byte: the table of `ipvsadm -ln`, the rules of `ipvsadm -S -n` and `-R` (1.31)."""

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from .ipvs_messages import RealEntry, ServerEntry, netmask_of
from .model import Forwarding, Protocol, RealServer, ServerFlags, VirtualServer, format_address, format_endpoint

Listing = Sequence[tuple[ServerEntry, Sequence[RealEntry]]]
"""Virtual servers with their real servers, in any order."""

_SERVICE_OPTIONS = {Protocol.TCP: "-t", Protocol.UDP: "-u", Protocol.SCTP: "--sctp-service"}
_FORWARDING_OPTIONS = {
    Forwarding.MASQ: "-m",
    Forwarding.TUNNEL: "-i",
    Forwarding.LOCAL: "-g",
    Forwarding.ROUTE: "-g",
}
_FORWARDING_NAMES = {
    Forwarding.MASQ: "Masq",
    Forwarding.LOCAL: "Local",
    Forwarding.TUNNEL: "Tunnel",
    Forwarding.ROUTE: "Route",
}
_FLAG_NAMES = {
    "sh": ((ServerFlags.SCHED_1, "sh-fallback"), (ServerFlags.SCHED_2, "sh-port")),
    "mh": ((ServerFlags.SCHED_1, "mh-fallback"), (ServerFlags.SCHED_2, "mh-port")),
}
_PLAIN_FLAGS = tuple((ServerFlags[f"SCHED_{n}"], f"flag-{n}") for n in (1, 2, 3))
_TUNNEL_TYPES = ("ipip", "gue", "gre")
_TUNNEL_FLAGS = ("--tun-nocsum", "--tun-csum", "--tun-remcsum")


def table(listing: Listing, version: int, size: int) -> str:
    """`ipvsadm -ln`; `version` and `size` as GET_INFO gives them."""
    lines = [
        f"IP Virtual Server version {version >> 16 & 255}.{version >> 8 & 255}.{version & 255} (size={size})",
        "Prot LocalAddress:Port Scheduler Flags",
        "  -> RemoteAddress:Port           Forward Weight ActiveConn InActConn",
    ]
    for entry, reals in in_order(listing):
        lines.append(_table_line(entry))
        for one in sorted_reals(reals):
            name = format_endpoint(one.real.address, one.real.port)
            if len(one.real.address) == 4:
                name = name[:28]
            forward = _FORWARDING_NAMES[one.real.forwarding]
            lines.append(f"  -> {name:<28} {forward:<7} {one.real.weight:<6} {one.active:<10} {one.inactive:<10}")
    return "\n".join(lines) + "\n"


def rules(listing: Listing) -> str:
    """`ipvsadm -S -n`."""
    lines = []
    for entry, reals in in_order(listing):
        name = _rule_name(entry)
        lines.append(f"-A {name}" + _rule_traits(entry))
        for one in sorted_reals(reals):
            line = f"-a {name} -r {one.real} {_FORWARDING_OPTIONS[one.real.forwarding]} -w {_signed(one.real.weight)}"
            if one.real.forwarding is Forwarding.TUNNEL:
                line += _tunnel(one.tunnel)
            lines.append(line)
    return "".join(line + "\n" for line in lines)


def server_rule(verb: str, server: VirtualServer, mark: int = 0) -> str:
    """One line for `ipvsadm -R`: verb -A (add), -E (edit) or -D (delete); `mark`: it has one in place of an address."""
    name = service_option(server, mark)
    if verb == "-D":
        return f"-D {name}"
    return f"{verb} {name}" + _traits(server, "")


def real_rule(verb: str, server: VirtualServer, real: RealServer, mark: int = 0) -> str:
    """One line for `ipvsadm -R`: verb -a (add), -e (edit) or -d (delete)."""
    line = f"{verb} {service_option(server, mark)} -r {real}"
    if verb == "-d":
        return line
    line += f" {_FORWARDING_OPTIONS[real.forwarding]} -w {real.weight}"
    if real.upper_threshold or real.lower_threshold:
        line += f" -x {real.upper_threshold} -y {real.lower_threshold}"
    return line


def service_option(server: VirtualServer, mark: int = 0) -> str:
    """`-t 10.0.1.175:80`, or `-f 7`."""
    at = server.at
    if mark:
        return f"-f {mark} -6" if len(at.address) == 16 else f"-f {mark}"
    return f"{_SERVICE_OPTIONS.get(Protocol(at.protocol), '--xxx-service')} {format_endpoint(at.address, at.port)}"


def _table_line(entry: ServerEntry) -> str:
    server = entry.server
    if entry.fwmark:
        name = f"FWM  {entry.fwmark} IPv6" if entry.family == 10 else f"FWM  {entry.fwmark}"
    else:
        name = f"{Protocol(server.at.protocol).name:<4} {format_endpoint(server.at.address, server.at.port)}"
        if len(server.at.address) == 4:
            name = name[:33]
    flags = scheduler_flags(server)
    line = f"{name} {server.scheduler}"
    if server.flags & 0x38:
        line += f" ({flags})"
    if server.persistence:
        line += f" persistent {server.persistence}" + _mask(server, entry.family, " mask ")
        if entry.engine:
            line += f" pe {entry.engine}"
    if server.flags & ServerFlags.ONE_PACKET:
        line += " ops"
    return line


def _rule_name(entry: ServerEntry) -> str:
    if entry.fwmark:
        return f"-f {entry.fwmark} -6" if entry.family == 10 else f"-f {entry.fwmark}"
    return service_option(entry.server)


def _rule_traits(entry: ServerEntry) -> str:
    return _traits(entry.server, entry.engine)


def _traits(server: VirtualServer, engine: str) -> str:
    text = f" -s {server.scheduler}"
    if server.persistence:
        family = 2 if len(server.at.address) == 4 else 10
        text += f" -p {server.persistence}" + _mask(server, family, " -M ")
    if engine:
        text += f" --pe {engine}"
    if server.flags & ServerFlags.ONE_PACKET:
        text += " -o"
    if server.flags & 0x38:
        text += f" -b {scheduler_flags(server)}"
    return text


def _mask(server: VirtualServer, family: int, word: str) -> str:
    if family == 2 and server.persistence_prefix != 32:
        return word + format_address(struct.pack("=I", netmask_of(4, server)))
    if family == 10 and server.persistence_prefix != 128:
        return word + str(server.persistence_prefix)
    return ""


def scheduler_flags(server: VirtualServer) -> str:
    """Names of the scheduler flags as `-b` takes them; what a flag is called depends on the scheduler."""
    names = _FLAG_NAMES.get(server.scheduler, _PLAIN_FLAGS)
    return ",".join(name for flag, name in names if server.flags & flag)


def _tunnel(tunnel: tuple[int, int, int]) -> str:
    kind, port, flags = tunnel
    if kind >= len(_TUNNEL_TYPES):
        return ""
    text = f" --tun-type {_TUNNEL_TYPES[kind]}"
    if _TUNNEL_TYPES[kind] == "gue":
        text += f" --tun-port {port}"
    if kind:
        text += f" {_TUNNEL_FLAGS[flags]}"
    return text


def _signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


# -------------------------------------------------------------------------------------------------------- order

T = TypeVar("T")


def in_order(listing: Listing) -> Listing:
    """Virtual servers in ipvsadm's order: firewall mark, family, protocol, address, port."""
    return _msort(
        list(listing),
        lambda item: (
            item[0].fwmark,
            item[0].family,
            item[0].server.at.protocol,
            *_words(item[0].server.at.address),
            item[0].server.at.port,
        ),
    )


def sorted_reals(reals: Iterable[RealEntry]) -> list[RealEntry]:
    """Real servers in ipvsadm's order: address, port."""
    return _msort(list(reals), lambda one: (*_words(one.real.address), one.real.port))


def _words(address: bytes) -> tuple[int, ...]:
    return struct.unpack(f">{len(address) // 4}I", address)


def _msort(items: list[T], key: Callable[[T], tuple[int, ...]]) -> list[T]:
    """glibc's merge sort with ipvsadm's comparison.

    ipvsadm subtracts 32-bit words and takes the sign of the wrapped result, so that addresses 2^31 apart compare the
    wrong way round and the order depends on the algorithm: it has to be the same one, halves first.
    """
    keyed = [(key(item), item) for item in items]

    def merge_sort(part: list[tuple[tuple[int, ...], T]]) -> list[tuple[tuple[int, ...], T]]:
        if len(part) <= 1:
            return part
        middle = len(part) // 2
        left, right = merge_sort(part[:middle]), merge_sort(part[middle:])
        merged = []
        i = j = 0
        while i < len(left) and j < len(right):
            if _compare(left[i][0], right[j][0]) <= 0:
                merged.append(left[i])
                i += 1
            else:
                merged.append(right[j])
                j += 1
        return merged + left[i:] + right[j:]

    return [item for _, item in merge_sort(keyed)]


def _compare(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    for a, b in zip(left, right, strict=False):
        if a != b:
            wrapped = (a - b) & 0xFFFF_FFFF
            return -1 if wrapped >> 31 else 1
    return 0
