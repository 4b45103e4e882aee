"""Network namespaces for tests: single ones, and a small cluster of a node, its pods and a client."""

import ctypes
import ipaddress
import os
import secrets
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET) != 0:  # os.setns came with Python 3.12
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), "setns")


def _run(argv: Sequence[str], check: bool, stdin: str | None, timeout: float) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(argv, input=stdin or "", capture_output=True, text=True, check=False, timeout=timeout)
    if check and done.returncode != 0:
        error = subprocess.CalledProcessError(done.returncode, argv, done.stdout, done.stderr)
        error.add_note(f"stdout: {done.stdout}\nstderr: {done.stderr}")  # the exception's own text has neither
        raise error
    return done


@dataclass(frozen=True)
class NetNs:
    """A named network namespace."""

    name: str

    @classmethod
    @contextmanager
    def create(cls, label: str = "ns") -> Iterator["NetNs"]:
        """A new namespace with the loopback device up, for the length of the `with` block.

        Processes that still run in it are the caller's to end; the namespace lives on, nameless, as long as they do.
        """
        namespace = cls(f"dpt-{label}-{secrets.token_hex(4)}")
        _run(["ip", "netns", "add", namespace.name], True, None, 60)
        try:
            for which in ("all", "default"):
                # A link-local address that is being checked for duplicates solicits no neighbours for two seconds.
                namespace.sysctl(f"ipv6.conf.{which}.accept_dad", 0)
            namespace.ip("link set lo up")
            yield namespace
        finally:
            _run(["ip", "netns", "delete", namespace.name], False, None, 60)

    @property
    def path(self) -> Path:
        return Path("/run/netns") / self.name

    def run(
        self, *argv: str, check: bool = True, stdin: str | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the namespace and wait for it."""
        return _run(["ip", "netns", "exec", self.name, *argv], check, stdin, timeout)

    def popen(self, *argv: str) -> subprocess.Popen[str]:
        """Start a command in the namespace; the caller ends it."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ip(self, *commands: str) -> None:
        """Run ip(8) commands, such as `link set lo up`, all in one process."""
        _run(["ip", "-n", self.name, "-batch", "-"], True, "\n".join(commands) + "\n", 60)

    def sysctl(self, key: str, value: int | str) -> None:
        """Set net.KEY, such as `ipv4.ip_forward`."""
        with self.enter():
            Path("/proc/sys/net", *key.split(".")).write_text(str(value))

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Put the calling thread into the namespace: sockets it opens belong there, also after the `with` block."""
        with ExitStack() as stack:
            descriptors = []
            for path in (Path("/proc/thread-self/ns/net"), self.path):
                descriptors.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                stack.callback(os.close, descriptors[-1])
            _setns(descriptors[1])
            try:
                yield
            finally:
                _setns(descriptors[0])


def address_commands(device: str, addresses: Sequence[str]) -> list[str]:
    """The ip(8) commands that give a device addresses like 10.0.0.1/24 or fd00::1/64, usable at once."""
    return [f"address add {each} dev {device}" + (" nodad" if ":" in each else "") for each in addresses]


def connect(
    one: NetNs,
    other: NetNs,
    device: str,
    other_device: str,
    addresses: Sequence[str] = (),
    other_addresses: Sequence[str] = (),
) -> None:
    """Join two namespaces by a veth pair: `device` in the first, `other_device` in the other."""
    one.ip(
        f"link add {device} type veth peer name {other_device} netns {other.name}",
        *address_commands(device, addresses),
        f"link set {device} up",
    )
    other.ip(*address_commands(other_device, other_addresses), f"link set {other_device} up")


@dataclass(frozen=True)
class Pod:
    """A namespace with its addresses, without prefix lengths: one IPv4, one IPv6, or both."""

    ns: NetNs
    addresses: tuple[str, ...]

    @property
    def v4(self) -> str:
        return next(each for each in self.addresses if ":" not in each)

    @property
    def v6(self) -> str:
        return next(each for each in self.addresses if ":" in each)


@dataclass(frozen=True)
class Topology:
    """A node with a bridge, pods on the bridge, and a client that reaches everything through the node.

    The node is .1 of each network and forwards; pods and the client have their default routes by it.
    """

    node: NetNs
    client: NetNs
    pods: list[Pod] = field(default_factory=list)

    bridge = "br0"  # the pods' side of the node
    uplink = "eth0"  # the client's side of the node; also the name of the only device of pods and client
    node_addresses = ("192.0.2.1", "2001:db8::1")  # on the client's side
    client_addresses = ("192.0.2.2", "2001:db8::2")

    @classmethod
    @contextmanager
    def build(
        cls,
        pods: Sequence[Sequence[str]] = (
            ("10.244.0.10", "fd00:244::10"),
            ("10.244.0.11", "fd00:244::11"),
            ("10.244.0.12", "fd00:244::12"),
        ),
    ) -> Iterator["Topology"]:
        """Build it, with one pod for each list of addresses; IPv4 networks are /24 and IPv6 ones /64."""
        with ExitStack() as stack:
            node = stack.enter_context(NetNs.create("node"))
            client = stack.enter_context(NetNs.create("client"))
            for key in ("ipv4.ip_forward", "ipv6.conf.all.forwarding"):
                node.sysctl(key, 1)
            for which in ("all", "default"):
                node.sysctl(f"ipv4.conf.{which}.rp_filter", 0)
            gateways = dict.fromkeys(gateway(each) for addresses in pods for each in addresses)
            node.ip(
                f"link add {cls.bridge} type bridge forward_delay 0 mcast_snooping 0",
                *address_commands(cls.bridge, [with_prefix(each) for each in gateways]),
                f"link set {cls.bridge} up",
            )
            connect(
                node,
                client,
                cls.uplink,
                "eth0",
                [with_prefix(each) for each in cls.node_addresses],
                [with_prefix(each) for each in cls.client_addresses],
            )
            client.ip(*(f"route add default via {each}" for each in cls.node_addresses))
            topology = cls(node, client)
            for number, addresses in enumerate(pods):
                pod = Pod(stack.enter_context(NetNs.create(f"pod{number}")), tuple(addresses))
                connect(node, pod.ns, f"pod{number}", "eth0", (), [with_prefix(each) for each in addresses])
                node.ip(f"link set pod{number} master {cls.bridge}")
                pod.ns.ip(*(f"route add default via {gateway(each)}" for each in addresses))
                topology.pods.append(pod)
            yield topology


def with_prefix(address: str) -> str:
    return f"{address}/{64 if ':' in address else 24}"


def gateway(address: str) -> str:
    """The first address of an address's network, which is the node's."""
    return str(ipaddress.ip_interface(with_prefix(address)).network[1])
