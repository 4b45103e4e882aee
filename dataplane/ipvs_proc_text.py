"""/proc/net/ip_vs, the kernel's own table of IPVS as text (ip_vs_ctl.c: ip_vs_info_seq_show).

It shows everything that carries traffic, not thresholds and scheduler flags, and reading it costs a hundredth of
asking for ten thousand servers one by one. Like the netlink dumps it may be torn: what it says is a reason to look.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from .model import Address, Forwarding, Protocol, RealServer, ServerFlags, VirtualAddress, VirtualServer
from .walk import Remembered

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
        traits = " ".join(words[2].split()) if len(words) > 2 else ""
        reals = []
    return shown


def place(address: bytes, port: int) -> str:
    """`0A0001AF:0050`, or `[fd00:0000:…:0001]:0050`."""
    if len(address) == 4:
        return f"{address.hex().upper()}:{port:04X}"
    text = address.hex()
    return f"[{':'.join(text[i : i + 4] for i in range(0, 32, 4))}]:{port:04X}"


def server_traits(server: VirtualServer, hertz: int) -> str:
    """Scheduler, one-packet scheduling and persistence as the table writes them; its times are in jiffies."""
    text = server.scheduler + (" ops" if server.flags & ServerFlags.ONE_PACKET else "")
    if server.persistence:
        width, bits = 8 * len(server.at.address), server.persistence_prefix
        # the kernel prints ntohl() of what IPv4 keeps as a mask and IPv6 as a prefix length
        mask = (
            0xFFFF_FFFF << (width - bits) & 0xFFFF_FFFF if width == 32 else int.from_bytes(bits.to_bytes(4, "little"))
        )
        text += f" persistent {server.persistence * hertz} {mask:08X}"
    return text


def clock_rate(shown: Shown, servers: Iterable[VirtualServer]) -> int:
    """Jiffies per second of this kernel, by what most sticky servers show; 0 = no server is sticky.

    User space is not told CONFIG_HZ. A wrong guess makes servers suspects, no more.
    """
    rates: Counter[int] = Counter()
    for server in servers:
        if server.persistence and not server.at.inside:
            words = shown.get(server_key(server.at), ("", frozenset()))[0].split()
            if "persistent" in words:
                rates[int(words[words.index("persistent") + 1]) // server.persistence] += 1
    return rates.most_common(1)[0][0] if rates else 0


def server_key(at: VirtualAddress) -> str:
    """A virtual address as the table writes it."""
    return f"{Protocol(at.protocol).name} {place(at.address, at.port)}"


def real_text(real: RealServer) -> str:
    """A real server as the table writes it."""
    return f"{place(real.address, real.port)} {_FORWARDING[real.forwarding]} {real.weight}"


def differing(
    text: str, servers: Collection[VirtualServer], marks: Mapping[VirtualAddress, int] | None = None
) -> set[VirtualAddress]:
    """Servers that the table shows otherwise, or not at all. What else is in the table is somebody else's.

    `marks`: firewall marks of servers for clients inside the cluster.
    """
    marks = marks or {}
    shown = parse(text)
    hertz = clock_rate(shown, servers)
    names = {number: Protocol(number).name for number in {server.at.protocol for server in servers}}
    found = set()
    for server in servers:
        at = server.at
        if at.inside:
            seen = shown.get(f"FWM {marks.get(at, 0):08X}")
        else:
            seen = shown.get(f"{names[at.protocol]} {place(at.address, at.port)}")
        if (
            seen is None
            or seen[0] != server_traits(server, hertz)
            or seen[1] != set(map(real_text, server.real_servers))
        ):
            found.add(at)
    return found


def remembered(text: str, server: VirtualServer, client: Address) -> Remembered | None:
    """The template of a client in /proc/net/ip_vs_conn (ip_vs_conn.c: ip_vs_conn_seq_show): its port is 0."""
    prefix = server.persistence_prefix
    width = 8 * len(client)
    masked = (int.from_bytes(client) >> (width - prefix) << (width - prefix)).to_bytes(width // 8)
    for each in connections(text):
        here = (each.protocol, each.virtual_address, each.virtual_port) == (
            server.at.protocol,
            server.at.address,
            server.at.port,
        )
        if here and each.client_port == 0 and each.client == masked:
            return Remembered(each.real_address, each.real_port, each.seconds_left)
    return None


class Connection(NamedTuple):
    """One line of /proc/net/ip_vs_conn; client port 0: a template, which remembers a client."""

    protocol: int
    client: Address
    client_port: int
    virtual_address: Address
    virtual_port: int
    real_address: Address
    real_port: int
    state: str
    seconds_left: int


def connections(text: str) -> Iterator[Connection]:
    """What /proc/net/ip_vs_conn lists."""
    for line in text.splitlines()[1:]:
        words = line.split()
        if len(words) < 9 or words[0] not in Protocol.__members__:
            continue
        client, client_port, vip, port, real, real_port = words[1:7]
        yield Connection(
            Protocol[words[0]],
            _packed(client),
            int(client_port, 16),
            _packed(vip),
            int(port, 16),
            _packed(real),
            int(real_port, 16),
            words[7],
            int(words[8]),
        )


def _packed(text: str) -> Address:
    """`0A0001AF`, or `[fd00:0000:…:0001]`."""
    return Address(bytes.fromhex(text.strip("[]").replace(":", "")))
