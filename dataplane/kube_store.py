"""What is known of a cluster's objects: readings go in, changed Services come out. Pure.

One store takes the EndpointSlices and Services of one API server. It keeps readings only (`kubernetes_reading`); a
`ServiceView` is made when it is asked for. The rules for what is wrong, as for manifest files:

* A refused object is named in a Problem; its last good version stays until the object is mended or deleted.
* While a list holds an object that does not say who it is, nothing that the list lacks counts as removed: the nameless
  one may be any of them.
* A list replaces what is known *with diff*: what it lacks is removed, what it has unchanged is no change.
"""

from collections.abc import Iterable

from .kubernetes_objects import service_view
from .kubernetes_reading import Reading
from .model import ObjectName, Problem, Service, ServiceView

KINDS = ("Service", "EndpointSlice")
MOST_PROBLEMS = 1000
_MOST_NAMELESS = 20
STAYS = "; its last good version stays"
NAMELESS = "; until it says who it is nothing of its kind counts as removed"

_Identity = tuple[str, ObjectName]


class Store:
    """The objects of one API server, and which Services changed since the last `take`."""

    def __init__(self) -> None:
        self._services: dict[ObjectName, Reading] = {}
        self._slices: dict[ObjectName, dict[ObjectName, Reading]] = {}
        self._owners: dict[ObjectName, ObjectName] = {}
        """Of every slice that counts: the Service it belongs to."""
        self._faulty: dict[_Identity, Reading] = {}
        """The present version of every object that has faults."""
        self._nameless: dict[str, tuple[Reading, ...]] = {}
        self._changed: set[ObjectName] = set()
        self._problems: tuple[Problem, ...] | None = ()

    # ---------------------------------------------------------------------------------------------------- going in

    def put(self, kind: str, reading: Reading) -> bool:
        """An object of one kind was added or changed; whether that changes a Service."""
        name = reading.name
        if name is None:
            self._nameless[kind] = (*self._nameless.get(kind, ())[-_MOST_NAMELESS:], reading)
            self._problems = None
            return False
        self._note(kind, name, reading)
        if kind == "Service" and isinstance(reading.value, Service):
            if self._services.get(name) == reading:
                return False
            self._services[name] = reading
            self._changed.add(name)
            return True
        if kind == "EndpointSlice" and isinstance(reading.value, tuple):
            return self._put_slice(reading, name, reading.value[0].service)
        return False

    def remove(self, kind: str, name: ObjectName) -> None:
        """An object was deleted, or no longer is among those asked for."""
        if self._faulty.pop((kind, name), None) is not None:
            self._problems = None
        if kind == "Service":
            if self._services.pop(name, None) is not None:
                self._changed.add(name)
        elif kind == "EndpointSlice":
            self._remove_slice(name)

    def replace(self, kind: str, readings: Iterable[Reading]) -> None:
        """A whole list of one kind."""
        if self._nameless.pop(kind, ()):
            self._problems = None
        present: set[ObjectName] = set()
        for reading in readings:
            self.put(kind, reading)
            if reading.name is not None:
                present.add(reading.name)
        if self._nameless.get(kind):
            return
        known = self._services if kind == "Service" else self._owners
        faulty = {name for kind_, name in self._faulty if kind_ == kind}
        for name in (known.keys() | faulty) - present:
            self.remove(kind, name)

    def known(self, reading: Reading) -> Reading:
        """The very object that is kept already, if it is equal: a list that changes little shall not cost twice."""
        if reading.name is None:
            return reading
        if reading.kind == "Service":
            before = self._services.get(reading.name)
        else:
            owner = self._owners.get(reading.name)
            before = self._slices[owner][reading.name] if owner is not None else None
        return before if before is not None and before == reading else reading

    def _note(self, kind: str, name: ObjectName, reading: Reading) -> None:
        """Keep in mind what is wrong with it now."""
        if reading.faults:
            if self._faulty.get((kind, name)) != reading:
                self._faulty[kind, name] = reading
                self._problems = None
        elif self._faulty.pop((kind, name), None) is not None:
            self._problems = None

    def _put_slice(self, reading: Reading, name: ObjectName, owner: ObjectName) -> bool:
        before = self._owners.get(name)
        if before is not None and before != owner:
            self._remove_slice(name)
        members = self._slices.setdefault(owner, {})
        if members.get(name) == reading:
            return False
        members[name] = reading
        self._owners[name] = owner
        self._changed.add(owner)
        return True

    def _remove_slice(self, name: ObjectName) -> None:
        owner = self._owners.pop(name, None)
        if owner is None:
            return
        members = self._slices[owner]
        del members[name]
        if not members:
            del self._slices[owner]
        self._changed.add(owner)

    # -------------------------------------------------------------------------------------------------- coming out

    @property
    def changed(self) -> bool:
        """Whether there is something to take."""
        return bool(self._changed)

    def take(self) -> dict[ObjectName, ServiceView | None]:
        """The Services that changed since the last call, each with all its content; None = nothing is left of it."""
        names, self._changed = self._changed, set()
        return {name: self.view(name) for name in names}

    def view(self, name: ObjectName) -> ServiceView | None:
        """One Service as it is now."""
        return service_view(self._services.get(name), self._slices.get(name, {}).values())

    def counts(self) -> dict[str, int]:
        """How many objects count, by kind."""
        return {"Service": len(self._services), "EndpointSlice": len(self._owners)}

    def problems(self, origin: str) -> tuple[Problem, ...]:
        """All that is wrong now, at most `MOST_PROBLEMS` and a count of the rest; `origin` names the source."""
        if self._problems is None:
            self._problems = tuple(self._told(origin))
        return self._problems

    def _told(self, origin: str) -> list[Problem]:
        found: list[Problem] = []
        for (kind, name), reading in sorted(self._faulty.items(), key=lambda item: item[0]):
            known = self._services if kind == "Service" else self._owners
            stays = STAYS if reading.value is None and name in known else ""
            found += [Problem(origin, 0, reading.label, field, reason + stays) for field, reason in reading.faults]
        for kind, readings in sorted(self._nameless.items()):
            for reading in readings:
                found += [Problem(origin, 0, kind, field, reason + NAMELESS) for field, reason in reading.faults]
        rest = len(found) - MOST_PROBLEMS
        return found if rest <= 0 else [*found[:MOST_PROBLEMS], Problem(origin, 0, "", "", f"{rest} more problems")]
