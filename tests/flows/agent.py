"""The agent as the runner drives it: everything that a change of the agent's interfaces touches here is in this file.

A case's node and configuration become the agent's own Configuration, its objects a manifest file, and the node's
addresses are read from the kernel, as in `dataplane run`. Where the mode's options are those of the case before, the
objects, addresses and zone come as an update; else the agent is restarted over what it left in the kernel.
"""

import asyncio
import contextlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import structlog

from dataplane.backend import Backend, Options, open_backend
from dataplane.configuration import Configuration
from dataplane.desired import HealthCheck, Rules
from dataplane.health_responder import HealthResponder
from dataplane.manifest_files import ManifestFiles
from dataplane.model import ObjectName, VirtualServer
from dataplane.netlink_conntrack import Conntrack
from dataplane.netlink_node import NodeAddresses
from dataplane.printable import printable
from dataplane.reconciler import Reconciler, SyncReport

from .cases import Case

EVERYWHERE = ("0.0.0.0/0", "::/0")
"""externalIPs that a case's Services may claim."""


class NotProgrammed(Exception):
    """The agent did not get a case's objects into the kernel."""


class Programmed(NamedTuple):
    """How it went. `notes`: what the agent said of the objects and of this machine; `restless`: a second sync wrote."""

    notes: tuple[str, ...]
    restless: str


class HealthServer:
    """The agent's health responder in an event loop of its own thread, which is in this thread's network namespace."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="health", daemon=True).start()
        self._responder = HealthResponder(structlog.get_logger(), healthy=lambda: True)

    def follow(self, checks: Mapping[ObjectName, HealthCheck], rules: Rules) -> None:
        """Listen on just these ports from now on; NotProgrammed when one cannot be had."""
        work = self._responder.follow(checks, rules)
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)
        if troubles := [one for one in self._responder.status() if one["error"]]:
            raise NotProgrammed(f"health checks: {troubles}")


def configuration_of(case: Case, mode: str, compat: str = "current", tool: str = "") -> Configuration:
    """What the administrator of a case's node would write. Whatever external IPs a case has are allowed."""
    config = case.config
    main = {":" in text: text for text in reversed(case.node.ips)}  # the first of each family
    written = {
        "mode": mode,
        "nodeName": case.node.name,
        "zone": config.zone,
        "drainSeconds": 0,
        "masqueradeAll": config.masquerade_all,
        "clusterCIDRs": list(map(str, case.node.cluster_cidrs)) if config.detect_local == "ClusterCIDR" else [],
        "serviceCIDRs": config.service_cidrs,
        "nodeIPs": list(main.values()),
        "nodePortAddresses": config.nodeport_addresses,
        "externalIPRanges": EVERYWHERE,
        "iptablesCompat": compat,
        "iptablesTool": tool or "auto",
        "allowMassDelete": True,
    }
    return msgspec.convert(written, Configuration)


def write_objects(case: Case, folder: Path) -> Path:
    """A case's objects as a manifest file, put in place at once."""
    items = [*case.objects.services, *case.objects.endpointslices]
    draft, file = folder / ".draft", folder / "objects.json"
    draft.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    draft.rename(file)
    return file


class CaseAgent:
    """One agent for many cases."""

    def __init__(self, mode: str, folder: Path, *, iptables_compat: str = "current", iptables_tool: str = "") -> None:
        self.mode = mode
        self.names_are_current = mode == "iptables" and iptables_compat == "current"
        self.iptables_tool = iptables_tool
        self._folder = folder
        self._compat = iptables_compat
        self._backend: Backend | None = None
        self._options = Options()
        self._source: ManifestFiles
        self._reconciler: Reconciler
        self._conntrack = Conntrack()
        self._health = HealthServer()

    def configuration(self, case: Case) -> Configuration:
        """What the administrator of the case's node would write."""
        return configuration_of(case, self.mode, self._compat, self.iptables_tool)

    # ------------------------------------------------------------------------------------------------------ programming

    def program(self, case: Case) -> Programmed:
        """Make the kernel hold what the case's objects say; NotProgrammed when it cannot be had."""
        try:
            return self._program(case)
        except BaseException:
            self.close()  # the next case finds an agent that starts
            raise

    def _program(self, case: Case) -> Programmed:
        self._write(case)
        settings = self.configuration(case)
        with contextlib.closing(NodeAddresses()) as node:
            rules = settings.rules(node.read())  # as `dataplane run` finds them
        options = settings.options()
        if self._backend is None or options != self._options:
            notes, report = self._restart(rules, options)
        else:
            notes, report = [], self._update(rules)
        if report.failed or report.blocked or report.held_back:
            said = [*map(str, report.failed), *(f"{at}: blocked" for at in report.blocked)]
            raise NotProgrammed("; ".join(said) or f"{report.held_back} deletions held back")
        notes += map(str, (*self._source.problems, *self._reconciler.problems))
        self._health.follow(self._reconciler.desired.health_checks, rules)
        return Programmed(tuple(printable(note, 500) for note in notes), self._second_sync())

    def _write(self, case: Case) -> None:
        write_objects(case, self._folder)

    def _restart(self, rules: Rules, options: Options) -> tuple[list[str], SyncReport]:
        """As the agent begins: read, prepare, look, sync."""
        self.close()
        self._source = ManifestFiles([self._folder / "objects.json"])
        self._backend = open_backend(self.mode, options)
        self._options = options
        self._reconciler = Reconciler(self._backend, rules, allow_mass_delete=True, flow_table=self._conntrack)
        self._reconciler.take(self._source.read())
        lacks = self._backend.prepare()
        self._reconciler.observe()
        return list(lacks), self._reconciler.sync("start")

    def _update(self, rules: Rules) -> SyncReport:
        """As the agent goes on: other node addresses or another zone, other objects, one sync of what they touch."""
        touched = self._reconciler.renew(rules) | self._reconciler.take(self._source.read())
        return self._reconciler.sync("change", touched)

    def _second_sync(self) -> str:
        """What a sync right after the first would write, from a whole new look at the kernel; "" = nothing."""
        self._reconciler.observe()
        plan = self._reconciler.plan()
        if plan:
            assert self._backend is not None
            return printable(str(self._backend.compile(plan)), 500)
        return "" if self._reconciler.backend.intact() else "the fixed parts are not as they were made"

    # ------------------------------------------------------------------------------------------------------------ facts

    @property
    def backend(self) -> Backend:
        """The mode, as it has just programmed a case."""
        return self._reconciler.backend

    def affinity_seconds(self) -> set[int]:
        """Timeouts of all virtual servers with affinity, as read back from the kernel."""
        held: list[VirtualServer] = list(self._reconciler.held.servers.values())
        return {server.persistence for server in held if server.persistence}

    def reconcile_conntrack(self) -> None:
        """Have the agent delete wrong UDP entries of conntrack, as it does when it starts."""
        again = Reconciler(self._reconciler.backend, self._reconciler.desired.rules, flow_table=self._conntrack)
        again.desired, again.held = self._reconciler.desired, self._reconciler.held
        again.clean_flows()

    def metric(self, name: str) -> dict[str, Any] | None:
        """A metric's values by label, from the number that the agent has for it; None when it has none of that name."""
        if name != "kubeproxy_sync_proxy_rules_no_local_endpoints_total":
            return None
        internal, external = self._reconciler.desired.no_local_endpoints()
        return {"internal": internal, "external": external}

    def close(self) -> None:
        self._conntrack.close()
        if self._backend is not None:
            self._backend.close()
            self._backend = None
