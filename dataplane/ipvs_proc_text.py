"""/proc/net/ip_vs, the kernel's own table of IPVS as text (ip_vs_ctl.c: ip_vs_info_seq_show).

It shows everything that carries traffic, not thresholds and scheduler flags, and reading it costs a hundredth of
asking for ten thousand servers one by one. Like the netlink dumps it may be torn: what it says is a reason to look.
"""

from collections.abc import Collection

from .model import Forwarding, Protocol, RealServer, VirtualAddress, VirtualServer

_FORWARDING = {
    Forwarding.MASQ: "Masq",
    Forwarding.LOCAL: "Local",
    Forwarding.TUNNEL: "Tunnel",
    Forwarding.ROUTE: "Route",
}

Shown = dict[str, tuple[str, frozenset[str]]]
"""A virtual server's address as the table writes it -> what stands behind the address, and its real servers."""


def parse(text: str) -> Shown:
    """The table; connection counts left out."""
    shown: Shown = {}
    key = traits = ""
    reals: list[str] = []
    for line in text.split("\n")[3:]:
        if line.startswith("  -> "):
            reals.append(" ".join(line.split()[1:4]))
            continue
        if key:
            shown[key] = traits, frozenset(reals)
        words = line.split(None, 2)
        key = " ".join(words[:2])
        traits = words[2].rstrip() if len(words) > 2 else ""
        reals = []
    return shown


def place(address: bytes, port: int) -> str:
    """`0A0001AF:0050`, or `[fd00:0000:…:0001]:0050`."""
    if len(address) == 4:
        return f"{address.hex().upper()}:{port:04X}"
    text = address.hex()
    return f"[{':'.join(text[i : i + 4] for i in range(0, 32, 4))}]:{port:04X}"


def server_traits(server: VirtualServer) -> str:
    """Scheduler, persistence and one-packet scheduling as the table writes them."""
    text = server.scheduler
    if server.persistence:
        width = 8 * len(server.at.address)
        bits = server.persistence_prefix
        # the kernel prints ntohl() of what IPv4 keeps as a mask and IPv6 as a prefix length
        mask = (
            0xFFFF_FFFF << (width - bits) & 0xFFFF_FFFF if width == 32 else int.from_bytes(bits.to_bytes(4, "little"))
        )
        text += f" persistent {server.persistence} {mask:08X}"
    return text + " ops" if server.flags & 0x04 else text


def real_text(real: RealServer) -> str:
    """A real server as the table writes it."""
    return f"{place(real.address, real.port)} {_FORWARDING[real.forwarding]} {real.weight}"


def differing(text: str, servers: Collection[VirtualServer]) -> set[VirtualAddress]:
    """Servers that the table shows otherwise, or not at all. What else is in the table is somebody else's."""
    shown = parse(text)
    names = {number: Protocol(number).name for number in {server.at.protocol for server in servers}}
    found = set()
    for server in servers:
        at = server.at
        seen = shown.get(f"{names[at.protocol]} {place(at.address, at.port)}")
        if seen is None or seen[0] != server_traits(server) or seen[1] != set(map(real_text, server.real_servers)):
            found.add(at)
    return found
