"""The reflector against a scripted API server: nothing lost, nothing resurrected, whatever goes wrong between them."""

import asyncio
import datetime
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from dataplane.errors import ApiError
from dataplane.kube_source import KubernetesSource
from dataplane.kube_transport import ConfigFault, KubeTransport, kubeconfig_reader
from dataplane.kube_watch import Pace, older
from dataplane.model import ObjectName, ServiceView, format_address

from .kube_api import Fault, KubeApi, endpoint_slice, kubeconfig, node, service, service_cidr
from .lanes import scaled

QUICK = Pace(watch_seconds=0.2, grace_seconds=0.1, backoff_least=0.005, backoff_most=0.05, older_seconds=60, page=3)
CALM = Pace(watch_seconds=20, grace_seconds=5, backoff_least=0.005, backoff_most=0.05, page=3)


class Log:
    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))

    warning = info


class Follower:
    """A source that follows the server, and all that came out of it."""

    def __init__(self, source: KubernetesSource, log: Log) -> None:
        self.source = source
        self.log = log
        self.seen: dict[ObjectName, ServiceView] = {}
        self.updates: list[dict[ObjectName, ServiceView | None]] = []
        self.triggers: list[float] = []

    async def follow(self) -> None:
        async for update in self.source.updates():
            self.updates.append(update.changed)
            self.triggers += update.triggers
            for name, view in update.changed.items():
                if view is None:
                    self.seen.pop(name, None)
                else:
                    self.seen[name] = view

    def ports(self) -> dict[str, int]:
        return {each.service.name.name: each.service.ports[0].port for each in self.seen.values() if each.service}

    def where(self) -> str:
        known = self.source.place.node
        return known.zone if known else ""

    def endpoints(self) -> dict[str, list[str]]:
        return {
            piece.name.name: [format_address(each.address) for each in piece.endpoints]
            for view in self.seen.values()
            for piece in view.slices
        }


@asynccontextmanager
async def following(
    api: KubeApi, tmp_path: Path, pace: Pace = CALM, configured: Callable[[str], Path] | None = None
) -> AsyncIterator[Follower]:
    path = tmp_path / "kubeconfig"
    if configured is None:
        path.write_text(kubeconfig(api.url, {"token": api.token} if api.token else None))
    else:
        path = configured(api.url)
    read, log = kubeconfig_reader(str(path)), Log()
    answer_seconds = 10 if pace is CALM else 0.3
    source = KubernetesSource(api.url, lambda: KubeTransport(read, answer_seconds), log, "node-1", pace)
    follower = Follower(source, log)
    task = asyncio.create_task(follower.follow())
    try:
        yield follower
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await source.close()
        await api.stop()


async def until(condition: Callable[[], object], seconds: float = 10) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "not in time"
        await asyncio.sleep(0.005)


def played(story: Callable[[KubeApi], Awaitable[None]], **options: Any) -> KubeApi:
    """A server, started, and what is done with it."""
    api = KubeApi(**options)

    async def play() -> None:
        await api.start()
        await story(api)

    asyncio.run(play())
    return api


# ------------------------------------------------------------------------------------------------------- one by one


def test_lists_come_in_pages_with_kube_proxys_selectors_and_then_changes(tmp_path: Path) -> None:
    async def story(api: KubeApi) -> None:
        for number in range(8):
            api.put(service(f"s{number}", port=100 + number))
        api.put(endpoint_slice("s0-a", "s0", "10.244.0.1", "10.244.0.2"))
        api.put(service("other", labels={"service.kubernetes.io/service-proxy-name": "cilium"}))
        async with following(api, tmp_path) as follower:
            await until(lambda: len(follower.seen) == 8)
            assert follower.endpoints() == {"s0-a": ["10.244.0.1", "10.244.0.2"]}
            assert len(follower.updates) == 1
            api.put(service("s0", port=7))
            api.delete("EndpointSlice", "default/s0-a")
            api.delete("Service", "default/s3")
            await until(lambda: not follower.endpoints() and "s3" not in follower.ports())
            assert follower.ports()["s0"] == 7

    api = played(story)
    lists = [each.query for each in api.asked if each.path == "/api/v1/services" and "watch" not in each.query]
    assert [each["limit"] for each in lists] == ["3", "3", "3"]
    assert {each["labelSelector"] for each in lists} == {"!service.kubernetes.io/service-proxy-name"}
    (watch,) = [each.query for each in api.asked if "services" in each.path and "watch" in each.query]
    assert watch["allowWatchBookmarks"] == "true"
    assert int(watch["timeoutSeconds"]) <= 20


def test_a_service_that_is_handed_to_another_proxy_goes(tmp_path: Path) -> None:
    async def story(api: KubeApi) -> None:
        api.put(service("a"))
        async with following(api, tmp_path) as follower:
            await until(lambda: follower.seen)
            api.put(service("a", labels={"service.kubernetes.io/service-proxy-name": "cilium"}))
            await until(lambda: not follower.seen)

    played(story)


def test_nothing_is_delivered_before_both_lists_are_complete(tmp_path: Path) -> None:
    async def story(api: KubeApi) -> None:
        held = [True]
        api.faults = lambda what: "500" if held[0] and api.asked[-1].path.endswith("endpointslices") else ""
        api.put(service("a"))
        async with following(api, tmp_path) as follower:
            await until(lambda: follower.source.reflectors[0].listed)
            await asyncio.sleep(0.1)
            assert not follower.updates
            assert not follower.source.read().changed
            held[0] = False
            await until(lambda: follower.seen)

    played(story)


def test_what_was_deleted_while_the_history_was_compacted_goes_by_comparison_and_the_rest_stays(tmp_path: Path) -> None:
    async def story(api: KubeApi) -> None:
        for number in range(5):
            api.put(service(f"s{number}"))
        async with following(api, tmp_path) as follower:
            await until(lambda: len(follower.seen) == 5)
            await api.stop()
            api.delete("Service", "default/s1")
            api.put(service("new"))
            api.compact()
            await api.start()
            await until(lambda: "new" in follower.ports())
            assert follower.updates[1:] == [{ObjectName("default", "s1"): None, **follower.updates[-1]}]
            assert set(follower.updates[-1]) == {ObjectName("default", "s1"), ObjectName("default", "new")}

    played(story)


def test_pages_whose_version_is_compacted_are_asked_for_again_all_at_once(tmp_path: Path) -> None:
    async def story(api: KubeApi) -> None:
        api.faults = lambda what: "410" if what == "page" else ""
        for number in range(7):
            api.put(service(f"s{number}"))
        async with following(api, tmp_path) as follower:
            await until(lambda: len(follower.seen) == 7)

    api = played(story)
    assert any("limit" not in each.query and "watch" not in each.query for each in api.asked)


def test_an_outage_changes_nothing_and_is_told_once_with_its_time(tmp_path: Path) -> None:
    async def story(api: KubeApi) -> None:
        api.put(service("a"))
        async with following(api, tmp_path) as follower:
            await until(lambda: follower.seen)
            before = len(follower.updates)
            await api.stop()
            await until(lambda: all(each.dead_since for each in follower.source.reflectors))
            await asyncio.sleep(0.3)
            watch = follower.source.status()["watches"]["Service"]
            assert abs(watch["deadSince"] - time.time()) < 5
            assert watch["lastError"]
            assert len(follower.updates) == before
            await api.start()
            await until(lambda: not any(each.dead_since for each in follower.source.reflectors))
            assert len(follower.updates) == before
            told = sorted((event, fields["kind"]) for event, fields in follower.log.lines if event.startswith("watch"))
            kinds = ("EndpointSlice", "Node", "Service", "ServiceCIDR")
            assert told == [(event, kind) for event in ("watch lost", "watch restored") for kind in kinds]

    played(story)


def test_a_list_older_than_what_was_seen_does_not_count(tmp_path: Path) -> None:
    async def story(api: KubeApi) -> None:
        api.put(service("a"))
        async with following(api, tmp_path) as follower:
            await until(lambda: follower.seen)
            api.put(service("b"))
            await until(lambda: len(follower.seen) == 2)
            old = [True]
            api.faults = lambda what: ("410" if what == "watch" else "old" if what == "list" else "") if old[0] else ""
            api.break_all()
            await until(lambda: "older than" in follower.source.reflectors[0].last_error)
            await asyncio.sleep(0.1)
            assert len(follower.seen) == 2
            old[0] = False
            await until(lambda: not follower.source.reflectors[0].dead_since)
            assert len(follower.updates) == 2

    played(story)


def test_only_older_lists_for_a_long_time_mean_a_restored_etcd(tmp_path: Path) -> None:
    pace = Pace(watch_seconds=20, backoff_least=0.005, backoff_most=0.02, older_seconds=0.2)

    async def story(api: KubeApi) -> None:
        api.put(service("a"))
        async with following(api, tmp_path, pace) as follower:
            await until(lambda: follower.seen)
            await api.stop()
            api.version -= 500
            api.history.clear()
            api.compacted = api.version

            def faults(what: str) -> Fault:  # the version that was seen before has gone
                return "410" if what == "watch" and api.asked[-1].query["resourceVersion"] == "1001" else ""

            api.faults = faults
            api.put(service("b"))
            await api.start()
            await until(lambda: len(follower.seen) == 2)

    played(story)


def test_a_watch_that_dies_in_silence_is_noticed_and_begun_again(tmp_path: Path) -> None:
    async def story(api: KubeApi) -> None:
        silent = [True]
        api.faults = lambda what: "silence" if what == "event" and silent[0] else ""
        async with following(api, tmp_path, QUICK) as follower:
            await until(lambda: follower.source.reflectors[0].listed and api.watchers == 4)
            api.put(service("a"))
            await until(lambda: any(event == "watch lost" for event, _ in follower.log.lines))
            assert not follower.seen
            silent[0] = False
            await until(lambda: follower.seen)

    played(story)


def test_by_default_a_dead_watch_is_noticed_in_less_than_a_minute() -> None:
    assert Pace().watch_seconds + Pace().grace_seconds < 60


def test_a_bad_object_is_named_and_its_last_good_version_stays(tmp_path: Path) -> None:
    async def story(api: KubeApi) -> None:
        api.put(service("a", port=80))
        async with following(api, tmp_path) as follower:
            await until(lambda: follower.seen)
            api.put(service("a", port=0))
            await until(lambda: follower.source.problems)
            (problem,) = follower.source.problems
            assert str(problem).startswith("kubernetes: Service default/a: spec.ports[0].port: ")
            assert follower.ports() == {"a": 80}
            api.put(service("a", port=81))
            await until(lambda: follower.ports() == {"a": 81})
            assert not follower.source.problems

    played(story)


def test_an_answer_that_is_no_list_is_not_an_empty_list(tmp_path: Path) -> None:
    async def story(api: KubeApi) -> None:
        bad = [False]
        api.faults = lambda what: ("410" if what == "watch" else "garbage" if what == "list" else "") if bad[0] else ""
        api.put(service("a"))
        async with following(api, tmp_path) as follower:
            await until(lambda: follower.seen)
            bad[0] = True
            api.break_all()
            await until(lambda: "not one" in follower.source.reflectors[0].last_error)
            assert follower.seen

    played(story)


def test_a_burst_of_changes_becomes_a_handful_of_updates(tmp_path: Path) -> None:
    async def story(api: KubeApi) -> None:
        for number in range(100):
            api.put(service(f"s{number}"))
        async with following(api, tmp_path, Pace()) as follower:
            await until(lambda: len(follower.seen) == 100)
            for round_ in range(20):
                for number in range(100):
                    api.put(service(f"s{number}", port=1000 + round_))
                await asyncio.sleep(0)
            await until(lambda: set(follower.ports().values()) == {1019}, 30)
            assert len(follower.updates) < 40

    played(story)


def test_five_thousand_changes_in_a_moment_are_a_handful_of_updates_that_name_each_service_once(tmp_path: Path) -> None:
    async def story(api: KubeApi) -> None:
        for number in range(500):
            api.put(service(f"s{number}"))
        async with following(api, tmp_path, Pace()) as follower:
            await until(lambda: len(follower.seen) == 500 and api.watchers == 4)
            before = len(follower.updates)
            for round_ in range(10):
                for number in range(500):
                    api.put(service(f"s{number}", port=1000 + round_))
            await until(lambda: set(follower.ports().values()) == {1009}, 60)
            assert len(follower.updates) - before <= 20
            assert all(len(update) <= 500 for update in follower.updates)

    played(story)


# ------------------------------------------------------------------------------------------------------- the place


def test_this_node_alone_is_watched_and_the_service_cidrs(tmp_path: Path) -> None:
    async def story(api: KubeApi) -> None:
        api.put(node("other", "zone-b"))
        api.put(node("node-1", "zone-a", "10.244.1.0/24", "fd00:1::/64", addresses={"InternalIP": "192.0.2.1"}))
        api.put(service_cidr("kubernetes", "10.96.0.0/12", "fd00:96::/112"))
        api.put(service("a"))
        async with following(api, tmp_path) as follower:
            await until(lambda: follower.seen)
            place = follower.source.place
            assert follower.source.status()["node"] == {
                "name": "node-1",
                "there": True,
                "zone": "zone-a",
                "podCIDRs": ["10.244.1.0/24", "fd00:1::/64"],
                "serviceCIDRs": ["10.96.0.0/12", "fd00:96::/112"],
                "eligible": True,
            }
            before = len(follower.updates)
            api.put(node("other", "zone-c"))
            api.put(node("node-1", "zone-z", "10.244.1.0/24"))
            await until(lambda: place.node and place.node.zone == "zone-z")
            await until(lambda: len(follower.updates) > before)
            assert follower.updates[before:] == [{}]
            api.put(service_cidr("more", "10.80.0.0/16"))
            await until(lambda: len(place.service_ranges) == 3)

    api = played(story)
    asked = [each.query for each in api.asked if each.path == "/api/v1/nodes"]
    assert {each["fieldSelector"] for each in asked} == {"metadata.name=node-1"}


def test_load_balancers_leave_a_node_that_goes_and_come_back_to_one_that_stays(tmp_path: Path) -> None:
    async def story(api: KubeApi) -> None:
        api.put(node("node-1", "zone-a"))
        async with following(api, tmp_path) as follower:
            await until(lambda: follower.source.place.node)
            assert follower.source.eligible
            taint = {"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}
            api.put(node("node-1", "zone-a", taints=[taint]))
            await until(lambda: not follower.source.eligible)
            api.put(node("node-1", "zone-a", taints=[{"key": "other"}]))
            await until(lambda: follower.source.eligible)
            leaving = node("node-1", "zone-a")
            leaving["metadata"]["deletionTimestamp"] = "2026-11-24T20:00:00Z"
            api.put(leaving)
            await until(lambda: not follower.source.eligible)
            api.put(node("node-1", "zone-a"))
            await until(lambda: follower.source.eligible)
            api.delete("Node", "node-1")
            await until(lambda: not follower.source.eligible)
            assert follower.where() == "zone-a"

    played(story)


def test_a_server_without_service_cidrs_or_that_hides_nodes_is_no_obstacle(tmp_path: Path) -> None:
    async def story(api: KubeApi) -> None:
        api.refused = {"/apis/networking.k8s.io/v1/servicecidrs": 404, "/api/v1/nodes": 403}
        api.put(service("a"))
        async with following(api, tmp_path) as follower:
            await until(lambda: follower.seen)
            assert follower.source.eligible
            assert follower.source.dead_since() is None
            assert sorted(fields["kind"] for event, fields in follower.log.lines if event == "not watched") == [
                "Node",
                "ServiceCIDR",
            ]

    played(story)


def test_a_name_that_no_node_has_is_told(tmp_path: Path) -> None:
    async def story(api: KubeApi) -> None:
        api.put(node("node-1.example.org", "zone-a"))
        async with following(api, tmp_path) as follower:
            await until(lambda: any(event == "no Node of this name" for event, _ in follower.log.lines))
            assert not follower.source.eligible

    played(story)


def test_when_a_change_began_goes_with_the_update_that_it_makes(tmp_path: Path) -> None:
    def triggered(seconds: float, address: str) -> dict[str, Any]:
        made = endpoint_slice("a-1", "a", address)
        moment = datetime.datetime.fromtimestamp(time.time() + seconds, datetime.UTC)
        made["metadata"]["annotations"] = {"endpoints.kubernetes.io/last-change-trigger-time": moment.isoformat()}
        return made

    async def story(api: KubeApi) -> None:
        api.put(service("a"))
        api.put(triggered(5, "10.244.0.1"))  # what a first list says is no change
        async with following(api, tmp_path) as follower:
            await until(lambda: follower.seen and api.watchers == 4)
            assert not follower.triggers
            api.put(triggered(0.5, "10.244.0.2"))
            await until(lambda: len(follower.triggers) == 1)
            assert abs(follower.triggers[0] - time.time()) < 5
            api.put(triggered(0.6, "10.244.0.2"))  # the annotation alone
            api.put(triggered(-3600, "10.244.0.3"))  # before this process was
            await until(lambda: follower.endpoints() == {"a-1": ["10.244.0.3"]})
            assert len(follower.triggers) == 1
            await api.stop()  # what changes in an outage is found by a list
            api.put(triggered(0.7, "10.244.0.4"))
            api.compact()
            await api.start()
            await until(lambda: follower.endpoints() == {"a-1": ["10.244.0.4"]})
            assert len(follower.triggers) == 2

    played(story)


# --------------------------------------------------------------------------------------------------- configuration


def test_a_token_file_is_read_again_when_the_token_has_rotated(tmp_path: Path) -> None:
    async def story(api: KubeApi) -> None:
        token = tmp_path / "token"
        token.write_text("first\n")
        path = tmp_path / "config"
        path.write_text(kubeconfig(api.url, {"tokenFile": "token"}))
        transport = KubeTransport(kubeconfig_reader(str(path)))
        await transport.get("/api/v1/services", {})
        token.write_text("second\n")
        api.token = "second"
        await transport.get("/api/v1/services", {})
        api.token = "third"
        with pytest.raises(ApiError, match="401: Unauthorized") as caught:
            await transport.get("/api/v1/services", {})
        assert caught.value.status == 401
        await transport.close()
        await api.stop()

    played(story, token="first")


def test_a_program_for_credentials_runs_only_when_that_is_allowed(tmp_path: Path) -> None:
    program = tmp_path / "credentials"
    told = '{"kind":"ExecCredential","status":{"token":"from-program"}}'
    program.write_text(f"#!/bin/sh\n[ -n \"$KUBERNETES_EXEC_INFO\" ] && echo '{told}'\n")
    program.chmod(0o755)
    plugin = {"apiVersion": "client.authentication.k8s.io/v1", "command": str(program)}

    async def story(api: KubeApi) -> None:
        path = tmp_path / "config"
        path.write_text(kubeconfig(api.url, {"exec": plugin}))
        with pytest.raises(ConfigFault, match="only when allowed"):
            kubeconfig_reader(str(path))()
        transport = KubeTransport(kubeconfig_reader(str(path), allow_exec=True))
        await transport.get("/api/v1/services", {})
        await transport.close()
        await api.stop()

    played(story, token="from-program")


@pytest.mark.parametrize(
    "text", ["", "a: [", "[]", "{}", "clusters: 1", '{"clusters": [{"name": "x"}], "contexts": []}', "\x00"]
)
def test_what_is_no_kubeconfig_says_so(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    with pytest.raises(ConfigFault):
        kubeconfig_reader(str(path))()


def test_versions_compare_as_numbers_and_others_not_at_all() -> None:
    assert older("9", "10")
    assert not older("10", "9")
    assert not older("10", "10")
    assert not older("abc", "10")
    assert not older("", "10")


# ----------------------------------------------------------------------------------------------- random schedules

EVENT_FAULTS: tuple[Fault, ...] = ("410", "reset", "cut", "silence", "end", "garbage", "twice", "twice", "bookmark")
FAULTS: dict[str, tuple[Fault, ...]] = {
    "list": ("500", "429", "410", "reset", "cut", "silence", "old", "old", "garbage"),
    "page": ("500", "410", "410", "reset", "cut", "garbage"),
    "watch": ("500", "429", "410", "reset", "cut", "old", "old", "garbage"),
    "event": EVENT_FAULTS,
}


class History:
    """All states that each object ever had, each unlike the others but for not being there."""

    def __init__(self) -> None:
        self.states: dict[str, list[object]] = {}
        self.reached: dict[str, int] = {}

    def add(self, name: str, state: object) -> None:
        self.states.setdefault(name, [None]).append(state)

    def check(self, delivered: dict[str, Any]) -> None:
        """What was delivered is a state that each object had, and none that came before one delivered earlier."""
        for name, states in self.states.items():
            state, reached = delivered.get(name), self.reached.get(name, 0)
            later = [index for index in range(reached, len(states)) if states[index] == state]
            assert later, f"{name}: {state} came after {states[reached]}; it was {states}"
            self.reached[name] = later[0]


@contextmanager
def told(seed: int) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        error.add_note(f"seed {seed}")
        raise


async def schedule(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    trouble = chance.choice((0.05, 0.2, 0.5))
    calm = [False]
    places: list[str] = []

    def faults(what: str) -> Fault:
        return "" if calm[0] or chance.random() > trouble else chance.choice(FAULTS[what])

    api, ports, addresses = KubeApi(faults=faults), History(), History()
    api.longest_watch = chance.choice((0.03, 60.0))
    numbers = iter(range(1, 10_000))

    def move() -> None:
        name, number = f"s{chance.randrange(8)}", next(numbers)
        what = chance.random()
        if what < 0.4:
            api.put(service(name, port=number))
            ports.add(name, number)
        elif what < 0.7:
            address = f"10.244.{number // 250}.{number % 250 + 1}"
            api.put(endpoint_slice(f"{name}-x", name, address))
            addresses.add(f"{name}-x", [address])
        elif what < 0.75:
            places.append(f"zone-{number}")
            api.put(node("node-1", places[-1]))
            api.put(service_cidr("kubernetes", f"10.{number % 200}.0.0/16"))
        elif what < 0.9:
            kind, key = chance.choice((("Service", name), ("EndpointSlice", f"{name}-x")))
            if (kind, f"default/{key}") in api.objects:
                api.delete(kind, f"default/{key}")
                (ports if kind == "Service" else addresses).add(key, None)
        else:
            api.compact()

    for _ in range(12):
        move()
    await api.start()
    async with following(api, tmp_path, QUICK) as follower:
        checked = [0]

        def check() -> None:
            if len(follower.updates) > checked[0]:
                checked[0] = len(follower.updates)
                ports.check(follower.ports())
                addresses.check(follower.endpoints())

        for _ in range(chance.randrange(10, 60)):
            move()
            if chance.random() < 0.03:
                await api.stop()
                move()
                await asyncio.sleep(chance.random() * 0.05)
                await api.start()
            elif chance.random() < 0.05:
                api.break_all()
            await asyncio.sleep(chance.choice((0, 0, 0.002, 0.02)))
            check()
        calm[0] = True

        def right() -> bool:
            check()
            return follower.ports() == {name: states[-1] for name, states in ports.states.items() if states[-1]} and (
                follower.endpoints() == {name: states[-1] for name, states in addresses.states.items() if states[-1]}
                and follower.where() == (places[-1] if places else "")
            )

        try:
            await until(right, 20)
        except AssertionError as error:
            wanted = {name: states[-1] for name, states in (ports.states | addresses.states).items()}
            seen = follower.ports() | follower.endpoints()
            error.add_note(f"wanted {wanted}, have {seen}, status {follower.source.status()}")
            raise


@pytest.mark.parametrize("part", range(3))
def test_whatever_goes_wrong_the_end_is_right_and_nothing_goes_back(tmp_path: Path, part: int) -> None:
    for seed in range(part, scaled(1000), 3):
        with told(seed):
            asyncio.run(schedule(seed, tmp_path))
