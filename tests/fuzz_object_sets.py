"""Random sets of objects of which some are wrong: every wrong one is named, and the others do not notice.

A case is one number. Services and slices of every kind are drawn, up to 30 % of them are made wrong in one of the ways
of `FAULTS`, all go through the real manifest source and `Desired`, and so do those that are right alone:

    python -m tests.fuzz_object_sets 4711      tells case 4711: its objects, its problems
    python -m tests.fuzz_object_sets 0 100000  runs so many cases
"""

import copy
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from dataplane.desired import Desired, HealthCheck, Rules
from dataplane.manifest_files import ManifestFiles
from dataplane.model import Problem, VirtualAddress, VirtualServer, parse_address, parse_network

Object = dict[str, Any]
Breaker = Callable[[Object, random.Random], str]
"""Makes an object wrong and tells the field it must be named by."""

RULES = Rules(
    node_name="node-1",
    zone="z1",
    node_addresses=(parse_address("192.168.0.2"), parse_address("2001:db8::2")),
    external_ip_ranges=(parse_network("198.51.100.0/24"), parse_network("2001:db8:9::/48")),
)
MOST_WRONG = 0.3


def put(value: Any, *path: str | int) -> Breaker:
    """A fault that is one wrong value at a place, named by that place. Lists grow by one, mappings appear."""

    def breaker(one: Object, _: random.Random) -> str:
        node: Any = one
        for step, following in zip(path, (*path[1:], None), strict=True):
            if isinstance(step, int) and step == len(node):
                node.append({} if isinstance(following, str) else [])
            if following is None:
                node[step] = copy.deepcopy(value)
            elif not isinstance(step, int) and not node.get(step):
                node[step] = [] if isinstance(following, int) else {}
            node = node[step]
        return field(*path)

    return breaker


def field(*path: str | int) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")


def without(*path: str) -> Breaker:
    """A fault that is something missing."""

    def breaker(one: Object, _: random.Random) -> str:
        node = one
        for step in path[:-1]:
            node = node[step]
        node.pop(path[-1], None)
        return field(*path)

    return breaker


def any_of(*breakers: Breaker) -> Breaker:
    return lambda one, rng: rng.choice(breakers)(one, rng)


def alone(address: Any) -> Breaker:
    def breaker(one: Object, _: random.Random) -> str:
        one["spec"].pop("clusterIPs", None)
        one["spec"]["clusterIP"] = address
        return "spec.clusterIP"

    return breaker


def both(*addresses: str, at: str) -> Breaker:
    def breaker(one: Object, _: random.Random) -> str:
        one["spec"] |= {"clusterIP": addresses[0], "clusterIPs": list(addresses)}
        return at

    return breaker


def unlike(one: Object, _: random.Random) -> str:
    one["spec"]["clusterIPs"] = ["10.96.255.254"]
    one["spec"]["clusterIP"] = "10.96.255.253"
    return "spec.clusterIPs[0]"


def second_port(**changes: Any) -> Breaker:
    """The first port again, but for some changes; the field is the one that is not changed."""

    def breaker(one: Object, _: random.Random) -> str:
        ports = one["spec"]["ports"] = [{"name": "first", "port": 80, "protocol": "TCP", "nodePort": 31999}]
        ports.append({**ports[0], **changes})
        (same,) = {"name", "port", "nodePort"} - changes.keys()
        return f"spec.ports[1].{same}"

    return breaker


def affinity(seconds: Any) -> Breaker:
    def breaker(one: Object, _: random.Random) -> str:
        one["spec"] |= {
            "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}},
        }
        return "spec.sessionAffinityConfig.clientIP.timeoutSeconds"

    return breaker


def alias(target: Any) -> Breaker:
    def breaker(one: Object, _: random.Random) -> str:
        one["spec"] |= {"type": "ExternalName", "externalName": target}
        return "spec.externalName"

    return breaker


def noted(key: str, value: str) -> Breaker:
    return put(value, "metadata", "annotations", f"dataplane.io/{key}")


BAD_ADDRESSES = ("999.1.1.1", "127.0.0.1", "169.254.1.1", "224.0.0.1", "0.0.0.0", "255.255.255.255", "::1", "fe80::1",
                 "ff02::1", "::ffff:10.0.0.1", "10.0.0.1/32", "web", " ")  # fmt: skip
BAD_PORTS = (0, -1, 65536, "http", 80.5, True, None)

COMMON: tuple[Breaker, ...] = (
    without("kind"),
    without("apiVersion"),
    put(5, "metadata"),
    without("metadata", "name"),
    any_of(*(put(bad, "metadata", "name") for bad in ("Web", "a_b", "-a", "a" * 300, "", 7, "a\x1b[31m"))),
    any_of(*(put(bad, "metadata", "namespace") for bad in ("Shop", "a.b", "a b"))),
    put([], "metadata", "labels"),
    noted("weights", "10.0.0.1=heavy"),
)
FAULTS: dict[str, tuple[Breaker, ...]] = {
    "Service": (
        *COMMON,
        put("v1beta1", "apiVersion"),
        put(5, "spec"),
        any_of(put("Cluster", "spec", "type"), put(7, "spec", "type")),
        any_of(*map(alone, BAD_ADDRESSES)),
        any_of(
            both("10.96.0.1", "10.96.0.2", at="spec.clusterIPs[1]"), both("10.96.0.1", "x", at="spec.clusterIPs[1]")
        ),
        both("10.96.0.1", "fd00::1", "fd00::2", at="spec.clusterIPs"),
        unlike,
        any_of(without("spec", "ports"), put([], "spec", "ports"), put({}, "spec", "ports")),
        any_of(*(put(bad, "spec", "ports", 0, "port") for bad in BAD_PORTS)),
        any_of(put("ICMP", "spec", "ports", 0, "protocol"), put("tcp", "spec", "ports", 0, "protocol")),
        any_of(put("UPPER", "spec", "ports", 0, "name"), put("a" * 64, "spec", "ports", 0, "name")),
        any_of(put(65536, "spec", "ports", 0, "nodePort"), put("x", "spec", "ports", 0, "nodePort")),
        second_port(port=81, nodePort=31998),
        second_port(name="other", nodePort=31998),
        second_port(name="other", port=81),
        put("Cookie", "spec", "sessionAffinity"),
        any_of(affinity(0), affinity(86401), affinity("long")),
        put("local", "spec", "internalTrafficPolicy"),
        put("Locally", "spec", "externalTrafficPolicy"),
        any_of(put(65536, "spec", "healthCheckNodePort"), put("x", "spec", "healthCheckNodePort")),
        any_of(*(put(bad, "spec", "loadBalancerSourceRanges", 0) for bad in ("10.0.0.0/99", "x", "", "10.0.0.0/"))),
        any_of(*(put(bad, "spec", "externalIPs", 0) for bad in BAD_ADDRESSES)),
        any_of(*(put(bad, "status", "loadBalancer", "ingress", 0, "ip") for bad in BAD_ADDRESSES)),
        any_of(alias(""), alias("a b"), alias("-x"), alias(None)),
        put("yesterday", "metadata", "creationTimestamp"),
        any_of(noted("scheduler", "round robin"), noted("scheduler", "x" * 16)),
        noted("scheduler-flags", "bogus"),
        any_of(noted("drain-seconds", "soon"), noted("drain-seconds", "86401"), noted("drain-seconds", "-1")),
        put("yes", "spec", "publishNotReadyAddresses"),
    ),
    "EndpointSlice": (
        *COMMON,
        put("discovery.k8s.io/v1beta1", "apiVersion"),
        any_of(without("addressType"), put("IPv5", "addressType"), put("", "addressType"), put(4, "addressType")),
        any_of(
            without("metadata", "labels", "kubernetes.io/service-name"),
            put("A_b", "metadata", "labels", "kubernetes.io/service-name"),
        ),
        any_of(put([], "endpoints", 0, "addresses"), put(None, "endpoints", 0, "addresses")),
        any_of(*(put(bad, "endpoints", 0, "addresses", 0) for bad in (*BAD_ADDRESSES, 7))),
        put("yes", "endpoints", 0, "conditions", "ready"),
        put(0, "endpoints", 0, "conditions", "terminating"),
        any_of(put("a b", "endpoints", 0, "nodeName"), put("n" * 300, "endpoints", 0, "nodeName")),
        put("z\n1", "endpoints", 0, "zone"),
        put("Host_1", "endpoints", 0, "hostname"),
        put("z 1", "endpoints", 0, "hints", "forZones", 0, "name"),
        put("n 1", "endpoints", 0, "hints", "forNodes", 0, "name"),
        any_of(*(put(bad, "ports", 0, "port") for bad in (-1, 65536, "http", 80.5, True))),
        any_of(put("ICMP", "ports", 0, "protocol"), put(6, "ports", 0, "protocol")),
        put("Not_A_Name", "ports", 0, "name"),
        put("many", "endpoints"),
    ),
    "Endpoints": (
        *COMMON,
        put("v2", "apiVersion"),
        any_of(*(put(bad, "subsets", 0, "addresses", 0, "ip") for bad in BAD_ADDRESSES)),
        put("a b", "subsets", 0, "addresses", 0, "nodeName"),
        any_of(*(put(bad, "subsets", 0, "ports", 0, "port") for bad in (-1, 65536, "http"))),
        put("ICMP", "subsets", 0, "ports", 0, "protocol"),
        put({}, "subsets"),
    ),
}


class Item(NamedTuple):
    """One object of a set. `owner`: its Service's name; `field`: what it must be named by, None = it is right."""

    owner: str
    value: Object
    kind: str
    label: str
    field: str | None = None


def drawn(rng: random.Random, index: int) -> list[Item]:
    """A Service of any kind with its endpoints, all of it right; numbers keep Services out of each other's way."""
    name = f"s{index}"
    pick, chance = rng.choice, rng.random
    families = pick((("IPv4",), ("IPv4",), ("IPv6",), ("IPv4", "IPv6")))
    addresses = [f"10.96.{index}.1" if each == "IPv4" else f"fd00:96::{index + 1:x}" for each in families]
    ports = [
        {"name": f"p{n}", "port": 80 + n, "protocol": pick(("TCP", "UDP", "SCTP")), "nodePort": 30000 + 10 * index + n}
        for n in range(pick((1, 1, 2, 3)))
    ]
    for port in ports:
        if chance() < 0.5:
            del port["nodePort"]
    spec: Object = {"type": pick(("ClusterIP", "NodePort", "LoadBalancer")), "ports": ports, "clusterIP": addresses[0]}
    if chance() < 0.7:
        spec["clusterIPs"] = addresses
    if chance() < 0.3:
        spec["externalIPs"] = [f"198.51.100.{index + 1}"]
    if chance() < 0.3:
        spec["sessionAffinity"] = "ClientIP"
    for key in ("internalTrafficPolicy", "externalTrafficPolicy"):
        if chance() < 0.5:
            spec[key] = pick(("Cluster", "Local"))
    if chance() < 0.2:
        spec["healthCheckNodePort"] = 32000 + index
    if chance() < 0.2:
        spec["loadBalancerSourceRanges"] = ["203.0.113.0/24"]
    if chance() < 0.05:
        spec = {"type": "ExternalName", "externalName": "db.example.com"}
    elif chance() < 0.05:
        spec = {"clusterIP": "None", "ports": ports}
    meta: Object = {"name": name, "namespace": "shop"}
    if chance() < 0.3:
        meta |= {"annotations": {"dataplane.io/scheduler": "wrr"}, "creationTimestamp": "2024-05-01T10:00:00Z"}
    service: Object = {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec}
    if chance() < 0.4:
        service["status"] = {"loadBalancer": {"ingress": [{"ip": f"1.2.3.{index + 1}"}]}}
    items = [Item(name, service, "Service", f"Service shop/{name}")]
    if chance() < 0.1:
        pods = [{"ip": f"10.244.{index}.{n}"} for n in range(1, 3)]
        given = [{"name": port["name"], "port": 8080, "protocol": port["protocol"]} for port in ports]
        value: Object = {"apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": name, "namespace": "shop"}}
        value["subsets"] = [{"addresses": pods, "ports": given}]
        return [*items, Item(name, value, "Endpoints", f"Endpoints shop/{name}")]
    for number, family in enumerate(families * pick((1, 1, 2))):
        own = f"{name}-{number}"
        value = {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": own, "namespace": "shop", "labels": {"kubernetes.io/service-name": name}},
            "addressType": family,
            "ports": [{"name": port["name"], "port": 8080, "protocol": port["protocol"]} for port in ports],
            "endpoints": [drawn_endpoint(rng, family, index, number, n) for n in range(pick((1, 2, 3)))],
        }
        items.append(Item(name, value, "EndpointSlice", f"EndpointSlice shop/{own}"))
    return items


def drawn_endpoint(rng: random.Random, family: str, index: int, number: int, n: int) -> Object:
    address = (
        f"10.244.{index}.{10 * number + n + 1}" if family == "IPv4" else f"fd00:244:{index}::{10 * number + n + 1}"
    )
    one: Object = {"addresses": [address], "nodeName": rng.choice(("node-1", "node-2"))}
    if rng.random() < 0.5:
        one["conditions"] = {key: rng.random() < 0.6 for key in ("ready", "serving", "terminating")}
    if rng.random() < 0.3:
        one["hints"] = {"forZones": [{"name": rng.choice(("z1", "z2"))}]}
    return one


def broken(item: Item, rng: random.Random) -> Item:
    """The same object with one fault."""
    value = copy.deepcopy(item.value)
    if item.kind == "Service" and value["spec"].get("clusterIP", "None") == "None":
        # not even looked at is much of a Service without an address
        value["spec"] |= {"type": "ClusterIP", "clusterIP": f"10.96.{item.owner[1:]}.1", "ports": [{"port": 80}]}
    wrong = rng.choice(FAULTS[item.kind])(value, rng)
    if "kind" not in value:
        return Item(item.owner, value, item.kind, "", wrong)
    nameless = wrong in ("metadata", "metadata.name", "metadata.namespace")
    return Item(item.owner, value, item.kind, item.kind if nameless else item.label, wrong)


def drawn_set(seed: int) -> list[Item]:
    """The objects of a case, in the order of its file."""
    rng = random.Random(seed)
    items = [item for index in range(rng.randrange(2, 6)) for item in drawn(rng, index)]
    share = rng.choice((0.0, 0.1, 0.2, MOST_WRONG, MOST_WRONG))
    wrong = rng.sample(range(len(items)), int(share * len(items) + 0.5 * (share > 0)) or int(share > 0))
    for index in wrong[: max(1, int(MOST_WRONG * len(items)))]:
        items[index] = broken(items[index], rng)
    rng.shuffle(items)
    right = [item for item in items if item.field is None]
    if right and rng.random() < 0.1:  # the same object once more with other content: the first one counts
        again = rng.choice(right)
        value = copy.deepcopy(again.value)
        value["metadata"]["labels"] = {**(value["metadata"].get("labels") or {}), "again": "yes"}
        if again.kind == "Service":
            value["spec"]["ports"] = [{"port": 9999}]
        items.append(Item("", value, again.kind, again.label, ""))
    return items


def text_of(items: list[Item], as_json: bool) -> str:
    """One object a line; as YAML each line is a document of its own."""
    return "".join(("" if as_json else "---\n") + json.dumps(item.value) + "\n" for item in items)


Outcome = tuple[dict[VirtualAddress, VirtualServer], dict[str, HealthCheck]]


def outcome(path: Path, items: list[Item]) -> tuple[Outcome, tuple[Problem, ...]]:
    """What a set comes to, through the source that `run` has."""
    path.write_text(text_of(items, path.suffix == ".json"))
    files = ManifestFiles([str(path)])
    desired = Desired(RULES)
    desired.update(files.read())
    return (desired.servers, {name.name: check for name, check in desired.health_checks.items()}), files.problems


def of_services(found: Outcome, names: set[str]) -> Outcome:
    servers, checks = found
    mine = {at: one for at, one in servers.items() if one.label.partition("/")[2].partition(":")[0] in names}
    return mine, {name: check for name, check in checks.items() if name in names}


def complaints(seed: int, folder: Path) -> tuple[list[str], Counter[str]]:
    """What is not as it must be in a case; and the faults it had."""
    items = drawn_set(seed)
    as_json = seed % 20 > 0
    kind = "json" if as_json else "yaml"
    (mixed, problems), step = outcome(folder / f"mixed.{kind}", items), 1 if as_json else 2
    right = [item for item in items if item.field is None]
    clean, _ = outcome(folder / f"right.{kind}", right)
    found: list[str] = []
    unwell = {item.owner for item in items if item.field is not None}
    well = {item.owner for item in right} - unwell
    if of_services(mixed, well) != of_services(clean, well):
        found.append(f"case {seed}: healthy Services among {sorted(well)} were affected")
    told = {(problem.line, problem.object, problem.field) for problem in problems}
    lines = set()
    for number, item in enumerate(items, 1):
        if item.field is not None:
            lines.add(step * number)
            if (step * number, item.label, item.field) not in told:
                found.append(f"case {seed}: not named: {step * number, item.label, item.field}: {sorted(told)}")
    if extra := [problem for problem in problems if problem.line not in lines]:
        found.append(f"case {seed}: what is right was complained of: {extra[0]}")
    if unclear := [
        str(problem) for problem in problems if not str(problem).isprintable() or "internal error" in str(problem)
    ]:
        found.append(f"case {seed}: {unclear[0]!r}")
    return found, Counter(f"{item.kind} {item.field}" for item in items if item.field is not None)


class Tally(NamedTuple):
    """Figures of a run: cases, objects that were wrong, by kind and field, failures."""

    cases: int
    faults: Counter[str]
    failures: tuple[str, ...]


def run(first: int, count: int) -> Tally:
    """Cases `first` to `first + count`."""
    faults: Counter[str] = Counter()
    failures: list[str] = []
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="fuzz-sets-", dir=shared if shared.is_dir() else None) as name:
        for seed in range(first, first + count):
            found, seen = complaints(seed, Path(name))
            failures += found
            faults.update(seen)
    return Tally(count, faults, tuple(failures[:5]))


def run_all(cases: int, workers: int, first: int = 0) -> Tally:
    """So many cases in several processes."""
    batch = max(1, min(1000, cases // workers))
    firsts = range(first, first + cases, batch)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        tallies = list(pool.map(run, firsts, [min(batch, first + cases - each) for each in firsts]))
    faults: Counter[str] = Counter()
    for tally in tallies:
        faults.update(tally.faults)
    failures = tuple(failure for tally in tallies for failure in tally.failures)
    return Tally(sum(tally.cases for tally in tallies), faults, failures[:20])


if __name__ == "__main__":
    begin = time.monotonic()
    if len(sys.argv) > 2:
        done = run_all(int(sys.argv[2]), 2, int(sys.argv[1]))
        sys.stdout.write(f"{done.cases} sets, {done.faults.total()} wrong objects of {len(done.faults)} sorts\n")
    else:
        for item in drawn_set(int(sys.argv[1])):
            sys.stdout.write(f"{item.field!r:40} {json.dumps(item.value)}\n")
        done = run(int(sys.argv[1]), 1)
    sys.stdout.write("\n".join((*done.failures, f"{len(done.failures)} failures, {time.monotonic() - begin:.1f} s\n")))
    sys.exit(bool(done.failures))
