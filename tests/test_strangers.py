"""What is not ours stays as it is: before, while and after Services come, change and go at random."""

import random
import threading
from collections.abc import Iterator

import pytest

from dataplane.desired import Rules
from dataplane.errors import DataplaneError
from dataplane.model import ObjectName, ServiceView, Update
from dataplane.reconciler import Reconciler

from . import words
from .lanes import PARAMETERS, Lane, scaled
from .netns import NetNs
from .strangers import Stranger, everything_else

NAMES = [f"web-{number}" for number in range(12)]


@pytest.fixture(params=PARAMETERS)
def lane(request: pytest.FixtureRequest) -> Lane:
    chosen: Lane = request.param
    return chosen


@pytest.fixture
def twin() -> Iterator[NetNs]:
    """A namespace in which the stranger does the same, and we nothing."""
    with NetNs.create("twin") as namespace:
        yield namespace


class Ours:
    """Random operations through the reconciler, as the agent does them."""

    def __init__(self, lane: Lane, rng: random.Random) -> None:
        self._lane, self._rng = lane, rng
        self._there: dict[str, ServiceView] = {}
        self.reconciler = self._started()

    def _started(self) -> Reconciler:
        reconciler = Reconciler(self._lane.backend(), Rules(node_name="here"), allow_mass_delete=True)
        reconciler.backend.monitors()
        reconciler.backend.prepare()
        reconciler.take(Update({ObjectName("default", name): view for name, view in self._there.items()}))
        reconciler.observe()
        assert reconciler.sync("start").failed == ()
        return reconciler

    def act(self) -> None:
        """A Service comes, changes or goes; now and then everything is compared, or the agent starts anew."""
        chance = self._rng.random()
        if chance < 0.02:
            self.reconciler.backend.close()
            self.reconciler = self._started()
            return
        if chance < 0.05 or self.reconciler.backend.disturbed():
            assert self.reconciler.verify("look").failed == ()
        name = self._rng.choice(NAMES)
        view = None if name in self._there and chance > 0.8 else self._view(name)
        self._there.pop(name, None)
        if view is not None:
            self._there[name] = view
        touched = self.reconciler.take(Update({ObjectName("default", name): view}))
        report = self.reconciler.sync("change", touched)
        assert (report.failed, report.blocked) == ((), ())

    def _view(self, name: str) -> ServiceView:
        rng, number = self._rng, NAMES.index(name) + 1
        service = words.service(
            f"default/{name} 10.96.0.{number} fd96::{number} http:80/TCP dns:53/UDP" + rng.choice(("", " sig:99/SCTP")),
            affinity_seconds=rng.choice((0, 0, 300)),
            internal_local=rng.random() < 0.2,
        )
        slices = [
            words.endpoints(
                f"default/{name}",
                "http:8080/TCP dns:5353/UDP",
                *(f"{prefix}{n}{rng.choice(('', ' node=here', ' w3'))}" for n in rng.sample(range(1, 9), count)),
                slice_name=prefix,
            )
            for prefix in ("10.128.0.", "fd97::")
            if (count := rng.randint(0, 4))
        ]
        return words.view(service, *slices)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_nothing_of_anybody_else_differs(lane: Lane, netns: NetNs, twin: NetNs, seed: int) -> None:
    """Full size: 2,000 operations of ours, each looked behind; then as many steps of both at the same time."""
    ipvs = lane.mode == "ipvs"
    operations = scaled(400 if ipvs else 2_000, least=20)
    rng = random.Random(f"{lane.name} {seed}")
    stranger = Stranger(rng, (netns, twin), ipvs=ipvs)
    before = everything_else(netns, ipvs=ipvs)
    with netns.enter():
        ours = Ours(lane, random.Random(seed))
        assert everything_else(netns, ipvs=ipvs) == before
        for number in range(operations):
            if rng.random() < 0.3:
                stranger.act()
                before = everything_else(netns, ipvs=ipvs)
            ours.act()
            assert everything_else(netns, ipvs=ipvs) == before, number
        _at_once(ours, stranger, operations // 4)
        before = everything_else(netns, ipvs=ipvs)
        ours.reconciler.verify("end")
        ours.reconciler.backend.remove()
        ours.reconciler.backend.close()
    assert everything_else(netns, ipvs=ipvs) == before
    assert everything_else(netns, ipvs=ipvs, handles=False) == everything_else(twin, ipvs=ipvs, handles=False)


def _at_once(ours: Ours, stranger: Stranger, steps: int) -> None:
    """Both work at the same time. What comes in between a commit of ours may make it look again, and no more."""
    failures: list[BaseException] = []

    def act() -> None:
        try:
            for _ in range(steps):
                stranger.act()
        except BaseException as error:
            failures.append(error)

    other = threading.Thread(target=act)
    other.start()
    try:
        while other.is_alive():
            try:
                ours.act()
            except DataplaneError:
                ours.reconciler.verify("again")
    finally:
        other.join()
    assert failures == []


MEDDLING = (
    "iptables-legacy -t nat -Z",
    "iptables-nft -t filter -Z",
    "iptables-legacy -P FORWARD DROP",
    "ip6tables-nft -P FORWARD DROP",
    "ip6tables-legacy -t nat -D OUTPUT -j THEIRS",
    "iptables-nft -t nat -N KUBE-SVC-TOOSHORT",
    "nft flush chain ip6 filter INPUT",
    "nft insert rule ip nat POSTROUTING counter",
    "nft add table ip dataplane-ipvs",
)


@pytest.mark.root
def test_a_look_sees_what_somebody_changes(netns: NetNs) -> None:
    """The other tests of this file see nothing only because there is nothing."""
    stranger = Stranger(random.Random(7), (netns,), ipvs=False)
    for _ in range(60):
        stranger.act()
    before = everything_else(netns, ipvs=False)
    assert everything_else(netns, ipvs=False) == before
    for command in MEDDLING:
        netns.run(*command.split())
        after = everything_else(netns, ipvs=False)
        assert after != before, command
        before = after
