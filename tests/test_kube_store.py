"""The store of a cluster's objects: whatever comes in, what came out adds up to what is there."""

from hypothesis import given
from hypothesis import strategies as st

from dataplane.kube_store import KINDS, MOST_PROBLEMS, NAMELESS, STAYS, Store
from dataplane.kubernetes_objects import read_object, service_view
from dataplane.kubernetes_reading import Reading
from dataplane.model import ObjectName, ServiceView

NAMES = ("a", "b", "c")


def service(name: str, port: int = 80) -> Reading:
    spec = {"clusterIP": f"10.96.0.{ord(name[0]) % 200 + 1}", "ports": [{"port": port}]}
    made = read_object({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec})
    assert made is not None
    return made


def piece(name: str, owner: str, address: str = "10.244.0.1") -> Reading:
    made = read_object(
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": owner}},
            "addressType": "IPv4",
            "ports": [{"port": 8080}],
            "endpoints": [{"addresses": [address]}],
        }
    )
    assert made is not None
    return made


def bad(kind: str, name: str) -> Reading:
    return Reading(kind, ObjectName("default", name), None, (("spec.ports[0].port", "0 is not a number"),))


NOBODY = Reading("Service", None, None, (("metadata.name", "required"),))


def named(name: str) -> ObjectName:
    return ObjectName("default", name)


objects = st.one_of(
    st.builds(service, st.sampled_from(NAMES), st.integers(1, 3)),
    st.builds(
        piece, st.sampled_from(("p", "q", "r")), st.sampled_from(NAMES), st.sampled_from(("10.244.0.1", "10.244.0.2"))
    ),
    st.builds(bad, st.just("Service"), st.sampled_from(NAMES)),
    st.builds(bad, st.just("EndpointSlice"), st.sampled_from(("p", "q", "r"))),
)
moves = st.one_of(
    st.tuples(st.just("put"), objects),
    st.tuples(st.just("remove"), st.tuples(st.sampled_from(KINDS), st.sampled_from((*NAMES, "p", "q", "r")))),
    st.tuples(st.just("replace"), st.tuples(st.sampled_from(KINDS), st.lists(objects, max_size=6))),
    st.tuples(st.just("take"), st.none()),
)


class Plain:
    """The same rules, without any thought of cost."""

    def __init__(self) -> None:
        self.good: dict[tuple[str, ObjectName], Reading] = {}
        self.bad: set[tuple[str, ObjectName]] = set()

    def put(self, reading: Reading) -> None:
        assert reading.name
        at = (reading.kind, reading.name)
        (self.bad.add if reading.faults else self.bad.discard)(at)
        if reading.value is not None:
            self.good[at] = reading

    def remove(self, kind: str, name: ObjectName) -> None:
        self.good.pop((kind, name), None)
        self.bad.discard((kind, name))

    def cluster(self) -> dict[ObjectName, ServiceView]:
        found = {}
        for name in map(named, NAMES):
            slices = [
                each for each in self.good.values() if isinstance(each.value, tuple) and each.value[0].service == name
            ]
            view = service_view(self.good.get(("Service", name)), slices)
            if view is not None:
                found[name] = view
        return found


@given(st.lists(moves, max_size=40))
def test_what_was_taken_adds_up_to_the_model(steps: list[tuple[str, object]]) -> None:
    store, plain, seen = Store(), Plain(), dict[ObjectName, ServiceView]()
    for what, given_ in [*steps, ("take", None)]:
        if isinstance(given_, Reading):
            store.put(given_.kind, given_)
            plain.put(given_)
        elif what == "take":
            for name, view in store.take().items():
                if view is None:
                    seen.pop(name, None)
                else:
                    seen[name] = view
            assert seen == plain.cluster()
            assert not store.take()
        elif isinstance(given_, tuple) and what == "remove":
            store.remove(given_[0], named(given_[1]))
            plain.remove(given_[0], named(given_[1]))
        elif isinstance(given_, tuple):
            kind, listed = given_[0], [each for each in given_[1] if each.kind == given_[0]]
            store.replace(kind, listed)
            for each in listed:
                plain.put(each)
            kept = {each.name for each in listed}
            for at in [*plain.good, *plain.bad]:
                if at[0] == kind and at[1] not in kept:
                    plain.remove(*at)
    assert {problem.object for problem in store.problems("k")} == {f"{kind} {name}" for kind, name in plain.bad}


def test_the_same_object_again_is_no_change() -> None:
    store = Store()
    store.put("Service", service("a"))
    store.put("EndpointSlice", piece("p", "a"))
    assert set(store.take()) == {named("a")}
    store.put("Service", service("a"))
    store.replace("EndpointSlice", [piece("p", "a")])
    assert not store.changed


def test_a_slice_that_changes_its_service_changes_both() -> None:
    store = Store()
    store.put("EndpointSlice", piece("p", "a"))
    store.take()
    store.put("EndpointSlice", piece("p", "b"))
    taken = store.take()
    assert taken[named("a")] is None
    assert taken[named("b")] is not None


def test_a_refused_object_is_named_and_its_last_good_version_stays_until_it_is_deleted() -> None:
    store = Store()
    store.put("Service", service("a"))
    before = store.take()
    store.put("Service", bad("Service", "a"))
    store.replace("Service", [bad("Service", "a"), bad("Service", "b")])
    assert not store.changed
    assert store.view(named("a")) == before[named("a")]
    first, second = store.problems("kubernetes")
    assert str(first).startswith("kubernetes: Service default/a: spec.ports[0].port: ")
    assert str(first).endswith(STAYS)
    assert not str(second).endswith(STAYS)
    store.remove("Service", named("a"))
    assert store.take() == {named("a"): None}
    assert [problem.object for problem in store.problems("kubernetes")] == ["Service default/b"]


def test_a_list_with_a_nameless_object_removes_nothing_of_its_kind() -> None:
    store = Store()
    store.replace("Service", [service("a"), service("b")])
    store.take()
    store.replace("Service", [service("a"), NOBODY])
    assert not store.changed
    assert str(store.problems("k")[0]).endswith(NAMELESS)
    store.replace("Service", [service("a")])
    assert store.take() == {named("b"): None}
    assert not store.problems("k")


def test_there_is_a_most_of_problems() -> None:
    store = Store()
    store.replace("Service", [bad("Service", f"s{number}") for number in range(MOST_PROBLEMS + 5)])
    told = store.problems("k")
    assert len(told) == MOST_PROBLEMS + 1
    assert told[-1].reason == "5 more problems"
