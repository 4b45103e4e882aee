"""The agent as the runner drives it: everything that a change of the agent's interfaces touches here is in this file.

A case's node and configuration become the agent's own Rules and Options, its objects a manifest file. Where they are
those of the case before, the objects come as an update; else the agent is restarted over what it left in the kernel.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from dataplane.backend import Backend, Options, open_backend
from dataplane.desired import Rules
from dataplane.manifest_files import ManifestFiles
from dataplane.model import VirtualServer, parse_network
from dataplane.printable import printable
from dataplane.reconciler import Reconciler, SyncReport

from .cases import Case

EVERYWHERE = (parse_network("0.0.0.0/0"), parse_network("::/0"))
"""externalIPs that a case's Services may claim."""


class NotProgrammed(Exception):
    """The agent did not get a case's objects into the kernel."""


class Programmed(NamedTuple):
    """How it went. `notes`: what the agent said of the objects and of this machine; `restless`: a second sync wrote."""

    notes: tuple[str, ...]
    restless: str


class CaseAgent:
    """One agent for many cases."""

    def __init__(self, mode: str, folder: Path, *, iptables_compat: str = "current", iptables_tool: str = "") -> None:
        self.mode = mode
        self.names_are_current = mode == "iptables" and iptables_compat == "current"
        self.iptables_tool = iptables_tool
        self._folder = folder
        self._compat = iptables_compat
        self._backend: Backend | None = None
        self._settings: tuple[Rules, Options] | None = None
        self._source: ManifestFiles
        self._reconciler: Reconciler

    # ------------------------------------------------------------------------------------- a case's node, for the agent

    def rules(self, case: Case) -> Rules:
        return Rules(
            node_name=case.node.name,
            zone=case.config.zone,
            drain_seconds=0,
            node_addresses=case.node.addresses,
            node_port_ranges=tuple(map(parse_network, case.config.nodeport_addresses)),
            external_ip_ranges=EVERYWHERE,
        )

    def options(self, case: Case) -> Options:
        return Options(
            masquerade_all=case.config.masquerade_all,
            cluster_cidrs=case.node.cluster_cidrs if case.config.detect_local == "ClusterCIDR" else (),
            service_cidrs=tuple(map(parse_network, case.config.service_cidrs)),
            iptables_compat=self._compat,
            iptables_tool=self.iptables_tool,
        )

    # ------------------------------------------------------------------------------------------------------ programming

    def program(self, case: Case) -> Programmed:
        """Make the kernel hold what the case's objects say; NotProgrammed when it cannot be had."""
        self._write(case)
        settings = (self.rules(case), self.options(case))
        if self._backend is None or settings != self._settings:
            notes, report = self._restart(settings)
        else:
            notes, report = [], self._update()
        if report.failed or report.blocked or report.held_back:
            said = [*map(str, report.failed), *(f"{at}: blocked" for at in report.blocked)]
            raise NotProgrammed("; ".join(said) or f"{report.held_back} deletions held back")
        notes += map(str, (*self._source.problems, *self._reconciler.problems))
        return Programmed(tuple(printable(note, 500) for note in notes), self._second_sync())

    def _write(self, case: Case) -> None:
        items = [*case.objects.services, *case.objects.endpointslices]
        draft = self._folder / ".draft"
        draft.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
        draft.rename(self._folder / "objects.json")

    def _restart(self, settings: tuple[Rules, Options]) -> tuple[list[str], SyncReport]:
        """As the agent begins: read, prepare, look, sync."""
        self.close()
        rules, options = settings
        self._source = ManifestFiles([self._folder / "objects.json"])
        self._backend = open_backend(self.mode, options)
        self._settings = settings
        self._reconciler = Reconciler(self._backend, rules, allow_mass_delete=True)
        self._reconciler.take(self._source.read())
        lacks = self._backend.prepare()
        self._reconciler.observe()
        return list(lacks), self._reconciler.sync("start")

    def _update(self) -> SyncReport:
        return self._reconciler.sync("change", self._reconciler.take(self._source.read()))

    def _second_sync(self) -> str:
        """What a sync right after the first would write, from a whole new look at the kernel; "" = nothing."""
        self._reconciler.observe()
        plan = self._reconciler.plan()
        if plan:
            assert self._backend is not None
            return printable(str(self._backend.compile(plan)), 500)
        return "" if self._reconciler.backend.intact() else "the fixed parts are not as they were made"

    # ------------------------------------------------------------------------------------------------------------ facts

    def affinity_seconds(self) -> set[int]:
        """Timeouts of all virtual servers with affinity, as read back from the kernel."""
        held: list[VirtualServer] = list(self._reconciler.held.servers.values())
        return {server.persistence for server in held if server.persistence}

    def reconcile_conntrack(self) -> bool:
        """Have the agent delete wrong UDP entries of conntrack; False: it has no such thing yet."""
        return False

    def metric(self, name: str) -> dict[str, Any] | None:
        """A metric's values by label as the agent exposes it; None when it has none of that name."""
        del name
        return None

    def close(self) -> None:
        if self._backend is not None:
            self._backend.close()
            self._backend = None
