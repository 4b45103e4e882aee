"""This node's own addresses, and word of their coming and going (rtnetlink): node ports are served on them."""

from .model import Address
from .netlink_route import ADDRESS_GROUPS, DEVICE, Way, addressed_link, link_by_name, node_addresses, way_to
from .netlink_socket import NETLINK_ROUTE, NetlinkSocket


class NodeAddresses:
    """The addresses of the calling thread's network namespace, without loopback, link-local ones and VIPs."""

    def __init__(self) -> None:
        self._sock = NetlinkSocket(NETLINK_ROUTE)
        self._monitor: NetlinkSocket | None = None

    def read(self) -> tuple[Address, ...]:
        """What they are now, in the kernel's order."""
        return node_addresses(self._sock)

    def way_to(self, address: Address) -> Way | None:
        """Where a packet of this node's own for an address goes; None when there is no route."""
        return way_to(self._sock, address)

    def fileno(self) -> int:
        """A descriptor that becomes readable when an address has come or gone."""
        if self._monitor is None:
            self._monitor = NetlinkSocket(NETLINK_ROUTE, groups=ADDRESS_GROUPS)
        return self._monitor.fileno()

    def changed(self) -> bool:
        """Whether an address came or went since the last call, or may have; VIPs on kube-ipvs0 do not count."""
        if self._monitor is None:
            return False
        notes, lost = self._monitor.notifications()
        links = {addressed_link(each) for each in notes}
        if not links or lost:
            return lost
        device = link_by_name(self._sock, DEVICE)
        return bool(links - {device.number if device else 0})

    def close(self) -> None:
        """Give descriptors back."""
        self._sock.close()
        if self._monitor is not None:
            self._monitor.close()
