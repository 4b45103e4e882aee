"""Connections of IPVS as /proc/net/ip_vs_conn lists them: a witness where conntrack does not know them."""

from pathlib import Path

from .ipvs_proc_text import Connection, connections
from .model import Address
from .sightings import Look, Sighting
from .walk import Verdict

CONNECTIONS = Path("/proc/thread-self/net/ip_vs_conn")  # of the calling thread's network namespace


def read_connections() -> str:
    """The table as text; "" where this kernel has no IPVS."""
    try:
        return CONNECTIONS.read_text()
    except OSError:
        return ""


class ConnectionTable:
    """`sightings.Witness` by looking at the table again and again."""

    name = "IPVS connection table (/proc/net/ip_vs_conn)"
    blind = "connections that are refused or dropped, and whether the endpoint sees the client's own address"

    def __init__(self, wanted: Look) -> None:
        self._wanted = wanted
        self._known: set[tuple[Address, int]] = {_client(each) for each in self._mine()}

    def fileno(self) -> int:
        """The kernel does not tell."""
        return -1

    def read(self) -> list[Sighting]:
        """Connections that were not there at the last look."""
        found = []
        for each in self._mine():
            if (client := _client(each)) not in self._known:
                self._known.add(client)
                real = each.real_address, each.real_port
                found.append(Sighting(each.protocol, *client, Verdict.ENDPOINT, real, steps=(f"state {each.state}",)))
        return found

    def finish(self) -> list[Sighting]:
        """One more look."""
        return self.read()

    def close(self) -> None:
        """Nothing was needed."""

    def _mine(self) -> list[Connection]:
        return [
            each
            for each in connections(read_connections())
            if each.client_port
            and self._wanted.fits(each.protocol, each.client, each.virtual_address, each.virtual_port)
        ]


def _client(each: Connection) -> tuple[Address, int]:
    return each.client, each.client_port
