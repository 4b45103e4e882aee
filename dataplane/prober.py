"""The probe's life beside the agent: compiled by a child while the agent works already, used, looked after, given up.

The agent never waits for it, and whatever goes wrong with it is a line in the log and a reason beside the numbers,
which are the mode's own then.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol

from .counters import Probe
from .errors import DataplaneError
from .model import VirtualAddress, VirtualServer
from .printable import printable

COMPILING = "the probe is being compiled"


class Starting(Protocol):
    """A probe on its way (`bpf.probe_start.ProbeStart`)."""

    def fileno(self) -> int:
        """Readable when `finish` does not wait."""

    def finish(self) -> Probe:
        """The probe; DataplaneError says why there is none."""

    def cancel(self) -> None:
        """It is not wanted any more."""


ProbeStarter = Callable[[int, int], Starting]
"""Starts a probe for so many real servers and virtual servers."""


class User(Protocol):
    """Who shows its counts (`looks.Looks`)."""

    def use(self, probe: Probe, addresses: Collection[VirtualAddress]) -> None:
        """From now on it counts."""

    def give_up_probe(self, reason: str) -> None:
        """There is none."""

    def check(self, servers: Iterable[VirtualServer]) -> bool:
        """Whether it is where it was; False: it has to be started anew."""


class Log(Protocol):
    """A structlog logger."""

    def info(self, event: str, **fields: Any) -> Any: ...


class Prober:
    """Starts a probe and hands it to its user. `starter` None: it is switched off. Lives in one event loop."""

    def __init__(
        self,
        user: User,
        servers: Callable[[], Mapping[VirtualAddress, VirtualServer]],
        log: Log,
        starter: ProbeStarter | None,
    ) -> None:
        self._user = user
        self._servers = servers
        self._log = log
        self._starter = starter
        self._starting: Starting | None = None
        self._began = 0.0

    def begin(self) -> None:
        """Start one; `end` is due in any case."""
        if self._starter is None:
            self._user.give_up_probe("the probe is switched off")
            return
        servers = self._servers()
        self._user.give_up_probe(COMPILING)
        try:
            starting = self._starter(sum(len(each.real_servers) for each in servers.values()), len(servers))
        except (DataplaneError, OSError) as error:
            self._give_up(error)
            return
        self._starting, self._began = starting, time.monotonic()
        asyncio.get_running_loop().add_reader(starting.fileno(), self._finished)

    def _finished(self) -> None:
        starting = self._starting
        if starting is None:
            return
        asyncio.get_running_loop().remove_reader(starting.fileno())
        self._starting = None
        try:
            probe = starting.finish()
            self._user.use(probe, self._servers().keys())
        except (DataplaneError, OSError) as error:
            self._give_up(error)
            return
        milliseconds = round((time.monotonic() - self._began) * 1000)
        self._log.info("probe", result="counts", hooks=", ".join(probe.hooks), milliseconds=milliseconds)

    def _give_up(self, error: Exception) -> None:
        self._user.give_up_probe(str(error))
        self._log.info("probe", result="none, the mode's own counters count", reason=printable(str(error), 500))

    def check(self) -> None:
        """Look after it; of what a reloaded module broke a new probe is made."""
        try:
            if not self._user.check(self._servers().values()):
                self.begin()
        except (DataplaneError, OSError) as error:
            self._give_up(error)

    def end(self) -> None:
        """Do not wait for one any more."""
        if self._starting is not None:
            asyncio.get_running_loop().remove_reader(self._starting.fileno())
            self._starting.cancel()
            self._starting = None
