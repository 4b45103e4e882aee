"""The usual tools at the same work: texts and calls. Nothing here is ours but the Services."""

import functools
import hashlib
import os
import shlex
import subprocess
from base64 import b32encode
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from dataplane.model import Endpoint, ServiceView, Update, format_address

from .isolation import RunFailed

Work = Callable[[], object]


class Piece(NamedTuple):
    """A text and the command that reads it."""

    command: tuple[str, ...]
    text: str


Give = Callable[[list[Piece]], Work]
"""Who gets the texts: makes everything ready, and returns what is measured."""


def run(command: Sequence[str], text: str) -> str:
    """A tool with a text on its standard input, from a file; its output, or RunFailed."""
    with os.fdopen(os.memfd_create("text"), "w+b") as file:
        file.write(text.encode())
        file.seek(0)
        done = subprocess.run(command, stdin=file, capture_output=True, check=False)
    if done.returncode:
        raise RunFailed(f"{shlex.join(command)}: {done.stderr.decode('utf-8', 'replace')[-300:]}")
    return done.stdout.decode()


TOOLS = ("nft", "ipvsadm", "ip", "iptables-legacy-restore", "iptables-nft-restore")


def texts(printed: str) -> list[Piece]:
    """A printed transaction, tool by tool. nftables mode prints for one tool only, and names none."""
    pieces: list[Piece] = []
    command: tuple[str, ...] = ("nft", "-f", "-")
    lines: list[str] = []
    for line in printed.splitlines():
        words = line[2:].split() if line.startswith("# ") else []
        if words and words[0] in TOOLS:
            if lines:
                pieces.append(Piece(command, "\n".join(lines) + "\n"))
            command, lines = tuple(each for each in words if not each.startswith("(")), []
        elif line and not line.startswith("#"):
            lines.append(line)
    if lines:
        pieces.append(Piece(command, "\n".join(lines) + "\n"))
    if any(each.command[0] == "ipvsadm" for each in pieces):
        pieces = [each for each in pieces if each.command[0] == "ipvsadm"]
    return pieces


def by_tool(pieces: list[Piece]) -> Work:
    """The tool reads its text."""

    def work() -> None:
        for command, text in pieces:
            run(command, text)

    return work


@functools.cache
def _libnftables() -> Any:
    import nftables

    return nftables.Nftables()


def by_libnftables(pieces: list[Piece]) -> Work:
    """libnftables reads it, in this process."""
    library = _libnftables()

    def work() -> None:
        for _, text in pieces:
            code, _, error = library.cmd(text)
            if code:
                raise RunFailed(f"libnftables: {error[-300:]}")

    return work


def one_by_one(pieces: list[Piece]) -> Work:
    """One process for each line, as people and scripts do."""
    commands = [command for piece in pieces for command in single(piece)]

    def work() -> None:
        for command in commands:
            done = subprocess.run(command, capture_output=True, check=False)
            if done.returncode:
                raise RunFailed(f"{shlex.join(command)}: {done.stderr.decode('utf-8', 'replace')[-300:]}")

    return work


def single(piece: Piece) -> Iterable[list[str]]:
    """The command of each line of a text."""
    tool = piece.command[0]
    if tool == "ipvsadm":
        yield from (["ipvsadm", *line.split()] for line in piece.text.splitlines())
        return
    table = ""
    known: set[str] = set()
    lines = piece.text.splitlines()
    removed = {line.split()[1] for line in lines if line.startswith("-X ")}
    made = {line.split()[1] for line in lines if line.startswith("-A ")}
    for line in lines:
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(":"):
            chain = line[1:].split()[0]
            if chain not in known:
                known.add(chain)
                yield from _declared(tool, table, chain, chain in removed or chain not in made)
        elif line != "COMMIT":
            yield [tool.removesuffix("-restore"), "-w", "-t", table, *shlex.split(line)]


def _declared(tool: str, table: str, chain: str, only_emptied: bool) -> Iterable[list[str]]:
    """A declaration in a text makes a chain, or empties it; the single commands for that differ."""
    command = [tool.removesuffix("-restore"), "-w", "-t", table]
    there = subprocess.run([*command, "-S", chain], capture_output=True, check=False).returncode == 0
    if there or only_emptied:
        yield [*command, "-F", chain]
    else:
        yield [*command, "-N", chain]


# ------------------------------------------------------------------------------------- kube-proxy's nftables layout


def kube_proxy_tables() -> str:
    """Its table with base chains, maps and sets (kubernetes/kubernetes pkg/proxy/nftables/proxier.go, 1.36), IPv4."""
    return """\
table ip kube-proxy {
  set cluster-ips { type ipv4_addr; }
  set hairpin-connections { type ipv4_addr . ipv4_addr . inet_proto . inet_service; }
  map service-ips { type ipv4_addr . inet_proto . inet_service : verdict; }
  map service-nodeports { type inet_proto . inet_service : verdict; }
  map no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict; }
  chain services {
    ip daddr . meta l4proto . th dport vmap @service-ips
    fib daddr type local ip daddr != 127.0.0.0/8 meta l4proto . th dport vmap @service-nodeports
  }
  chain service-endpoints-check { ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }
  chain cluster-ips-check { ip daddr @cluster-ips reject; }
  chain masquerading {
    meta mark & 0x4000 != 0 meta mark set meta mark ^ 0x4000 masquerade fully-random
    ct status dnat ip saddr . ip daddr . meta l4proto . th dport @hairpin-connections masquerade fully-random
  }
  chain nat-prerouting { type nat hook prerouting priority -100; jump services; }
  chain nat-output { type nat hook output priority -100; jump services; }
  chain nat-postrouting { type nat hook postrouting priority 100; jump masquerading; }
  chain filter-forward {
    type filter hook forward priority 0
    ct state new jump service-endpoints-check
    ct state new jump cluster-ips-check
  }
  chain filter-output {
    type filter hook output priority 0
    ct state new jump service-endpoints-check
    ct state new jump cluster-ips-check
  }
}
"""


def _chain(view: ServiceView) -> str:
    assert view.service is not None
    name, (port,) = view.service.name, view.service.ports
    base = f"{name.namespace}/{name.name}/{port.protocol.name.lower()}/{port.name}"
    return f"service-{b32encode(hashlib.sha256(base.encode()).digest()).decode()[:8]}-{base}"


def _endpoints(view: ServiceView) -> list[tuple[Endpoint, int]]:
    return [(each, one.ports[0].port or 0) for one in view.slices for each in one.endpoints]


def kube_proxy_service(view: ServiceView) -> str:
    """One Service: its chain with its rule anew, and its elements."""
    assert view.service is not None
    chain, address, port = _chain(view), format_address(view.service.cluster_ips[0]), view.service.ports[0].port
    reals = [f"{format_address(each.address)} . {to}" for each, to in _endpoints(view)]
    picks = ", ".join(f"{number} : {each}" for number, each in enumerate(reals))
    return (
        f"add chain ip kube-proxy {chain}\n"
        f"flush chain ip kube-proxy {chain}\n"
        f"add rule ip kube-proxy {chain} meta l4proto tcp dnat ip addr . port to "
        f"numgen random mod {len(reals)} map {{ {picks} }}\n"
        f"add element ip kube-proxy cluster-ips {{ {address} }}\n"
        f"add element ip kube-proxy service-ips {{ {address} . tcp . {port} : goto {chain} }}\n"
    )


def kube_proxy_without(view: ServiceView) -> str:
    """One Service goes: its elements, and its chain is emptied."""
    assert view.service is not None
    chain, address, port = _chain(view), format_address(view.service.cluster_ips[0]), view.service.ports[0].port
    return (
        f"delete element ip kube-proxy cluster-ips {{ {address} }}\n"
        f"delete element ip kube-proxy service-ips {{ {address} . tcp . {port} }}\n"
        f"flush chain ip kube-proxy {chain}\n"
    )


def kube_proxy_without_chain(view: ServiceView) -> str:
    """The emptied chain goes, in a later transaction as it does."""
    return f"delete chain ip kube-proxy {_chain(view)}\n"


# ------------------------------------------------------------------------------------------------------- pyroute2


class Pyroute2:
    """Its IPVS class."""

    def __init__(self) -> None:
        import pyroute2

        self._library = pyroute2
        self._socket = pyroute2.IPVS()

    def _service(self, view: ServiceView) -> Any:
        assert view.service is not None
        address, (port,) = format_address(view.service.cluster_ips[0]), view.service.ports
        return self._library.IPVSService(addr=address, port=port.port, protocol=port.protocol, sched_name="rr")

    def _dest(self, endpoint: Endpoint, port: int) -> Any:
        address = format_address(endpoint.address)
        return self._library.IPVSDest(addr=address, port=port, weight=endpoint.weight, fwd_method=0)

    def add(self, views: Iterable[ServiceView]) -> None:
        """Servers and their real servers."""
        for view in views:
            service = self._service(view)
            self._socket.service("add", service=service)
            for endpoint, port in _endpoints(view):
                self._socket.dest("add", service=service, dest=self._dest(endpoint, port))

    def change(self, before: Update, after: Update) -> None:
        """What differs between two updates of the same Services."""
        for name, new in after.changed.items():
            old = before.changed[name]
            if old is None and new is not None:
                self.add([new])
            elif new is None and old is not None:
                self._socket.service("del", service=self._service(old))
            elif old is not None and new is not None:
                service, was, now = self._service(new), set(_endpoints(old)), set(_endpoints(new))
                for endpoint, port in now - was:
                    self._socket.dest("add", service=service, dest=self._dest(endpoint, port))
                for endpoint, port in was - now:
                    self._socket.dest("del", service=service, dest=self._dest(endpoint, port))
