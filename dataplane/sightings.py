"""What a witness saw of real connections to one address and port, in words that every mode shares. Pure.

A witness is opened by a backend (`Backend.watch`), looks for a limited time at one virtual address only, and takes away
what it needed for that when it is closed.
"""

from typing import NamedTuple, Protocol

from msgspec import Struct

from .model import Address, VirtualAddress
from .walk import Verdict


class Look(NamedTuple):
    """Which connections: those to `at`, from `source` or anybody. `seconds`: how long it will be looked."""

    at: VirtualAddress
    source: Address | None = None
    seconds: float = 10.0

    def fits(self, protocol: int, client: Address, address: Address, port: int) -> bool:
        """Whether a connection is one of those."""
        at = self.at
        return (protocol, address, port) == at[:3] and self.source in (None, client)


class Sighting(Struct, frozen=True):
    """One connection. `real`: the endpoint it was sent to, if any; `source`: the address that the endpoint sees.

    `steps`: what happened to its first packet, where the witness can tell. `verdict`: NOT_OURS = it went through as it
    came.
    """

    protocol: int
    client: Address
    client_port: int
    verdict: Verdict
    real: tuple[Address, int] | None = None
    source: Address | None = None
    reason: str = ""
    steps: tuple[str, ...] = ()

    @property
    def masqueraded(self) -> bool:
        """The endpoint sees another source than the client's."""
        return self.source is not None and self.source != self.client


class Witness(Protocol):
    """A running look. `name`: what tells; `blind`: what it cannot see, "" = nothing that matters."""

    name: str
    blind: str

    def fileno(self) -> int:
        """Becomes readable when there is something; -1 = look again after a moment."""

    def read(self) -> list[Sighting]:
        """What was seen since the last call, without waiting; of a connection once."""

    def finish(self) -> list[Sighting]:
        """What is half seen at the end."""

    def close(self) -> None:
        """Take away what was added for the look."""


def seen(
    protocol: int,
    client: tuple[Address, int],
    asked: tuple[Address, int],
    answers: tuple[Address, int],
    to: Address,
) -> Sighting:
    """A connection by its two directions: from `client` to `asked`, answered by `answers` to `to`."""
    if answers == asked:
        return Sighting(protocol, *client, Verdict.NOT_OURS, None, None, "untranslated: it goes on as it came")
    return Sighting(protocol, *client, Verdict.ENDPOINT, answers, to)
