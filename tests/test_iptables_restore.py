"""iptables mode against the real programs, both back ends: the tutorial's lines, damage, strangers, locks, refusals."""

import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from dataplane import run_iptables
from dataplane.backend import Backend, Options
from dataplane.errors import KernelError, PreflightError, ToolError, Unanswered
from dataplane.iptables_restore import IptablesBackend
from dataplane.iptables_text import chain_name
from dataplane.model import Masquerade, VirtualServer, parse_network
from dataplane.plan import State, diff
from dataplane.run_tool import run_tool

from .netns import NetNs
from .words import at, server, shown

pytestmark = pytest.mark.root

TUTORIAL = "TCP 10.0.1.175:80 rr label=default/hostnames -> 10.244.1.7:9376, 10.244.2.3:9376, 10.244.3.6:9376"
# kubernetes.io, Debug Services (of the time of `iptables-save | grep hostnames`), in iptables-save's order of chains
GOLDEN = """\
-A KUBE-SEP-57KPRZ3JQVENLNBR -s 10.244.3.6/32 -m comment --comment "default/hostnames:" -j MARK --set-xmark 0x4000/0x4000
-A KUBE-SEP-57KPRZ3JQVENLNBR -p tcp -m comment --comment "default/hostnames:" -m tcp -j DNAT --to-destination 10.244.3.6:9376
-A KUBE-SEP-WNBA2IHDGP2BOBGZ -s 10.244.1.7/32 -m comment --comment "default/hostnames:" -j MARK --set-xmark 0x4000/0x4000
-A KUBE-SEP-WNBA2IHDGP2BOBGZ -p tcp -m comment --comment "default/hostnames:" -m tcp -j DNAT --to-destination 10.244.1.7:9376
-A KUBE-SEP-X3P2623AGDH6CDF3 -s 10.244.2.3/32 -m comment --comment "default/hostnames:" -j MARK --set-xmark 0x4000/0x4000
-A KUBE-SEP-X3P2623AGDH6CDF3 -p tcp -m comment --comment "default/hostnames:" -m tcp -j DNAT --to-destination 10.244.2.3:9376
-A KUBE-SERVICES -d 10.0.1.175/32 -p tcp -m comment --comment "default/hostnames: cluster IP" -m tcp --dport 80 -j KUBE-SVC-NWV5X2332I4OT4T3
-A KUBE-SVC-NWV5X2332I4OT4T3 -m comment --comment "default/hostnames:" -m statistic --mode random --probability 0.33332999982 -j KUBE-SEP-WNBA2IHDGP2BOBGZ
-A KUBE-SVC-NWV5X2332I4OT4T3 -m comment --comment "default/hostnames:" -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-X3P2623AGDH6CDF3
-A KUBE-SVC-NWV5X2332I4OT4T3 -m comment --comment "default/hostnames:" -j KUBE-SEP-57KPRZ3JQVENLNBR
"""  # noqa: E501
CURRENT = """\
-A KUBE-SEP-0123456789ABCDEF -s 10.244.1.7/32 -m comment --comment "default/hostnames" -j KUBE-MARK-MASQ
-A KUBE-SEP-0123456789ABCDEF -p tcp -m comment --comment "default/hostnames" -m tcp -j DNAT --to-destination 10.244.1.7:9376
-A KUBE-SERVICES -d 10.0.1.175/32 -p tcp -m comment --comment "default/hostnames cluster IP" -m tcp --dport 80 -j KUBE-SVC-YN5D6RYVEVZOH44Q
-A KUBE-SVC-YN5D6RYVEVZOH44Q ! -s 10.244.0.0/16 -d 10.0.1.175/32 -p tcp -m comment --comment "default/hostnames cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ
-A KUBE-SVC-YN5D6RYVEVZOH44Q -m comment --comment "default/hostnames -> 10.244.1.7:9376" -j KUBE-SEP-0123456789ABCDEF
""".replace("0123456789ABCDEF", "IQV2T7WZFFJMSXMA")  # noqa: E501


@dataclass(frozen=True)
class Place:
    """A namespace and one of the two back ends."""

    ns: NetNs
    tool: str

    def open(self, **options: object) -> IptablesBackend:
        return IptablesBackend(Options(iptables_tool=self.tool, **options))  # type: ignore[arg-type]

    def save(self, *arguments: str, family: str = "ip") -> str:
        text = self.ns.run(f"{family}tables-{self.tool}-save", *arguments).stdout
        return "".join(line + "\n" for line in text.splitlines() if not line.startswith("#"))

    def nat(self, word: str = "", family: str = "ip") -> str:
        text = self.save("-t", "nat", family=family)
        return "".join(f"{line}\n" for line in text.splitlines() if line.startswith("-A") and word in line)

    def restore(self, text: str, family: str = "ip") -> None:
        self.ns.run(f"{family}tables-{self.tool}-restore", "--noflush", "-w", "5", stdin=text)


@pytest.fixture(params=["legacy", "nft"])
def place(request: pytest.FixtureRequest, netns: NetNs) -> Iterator[Place]:
    with netns.enter():
        yield Place(netns, request.param)


def bring(backend: Backend, *wanted: VirtualServer | str) -> State:
    """Take the backend to these servers, and be sure that it holds exactly them."""
    aim = [backend.express(server(one) if isinstance(one, str) else one) for one in wanted]
    plan = diff(backend.observe(), {one.at: one for one in aim})
    outcome = backend.commit(backend.compile(plan))
    assert (outcome.failed, outcome.unsure) == ({}, frozenset())
    state = backend.observe()
    assert sorted(map(shown, state.servers.values())) == sorted(map(shown, aim))
    assert not diff(state, {one.at: one for one in aim})
    assert backend.intact()
    return state


def test_the_tutorials_lines_come_out_of_iptables_save(place: Place) -> None:
    backend = place.open()
    backend.prepare()
    bring(backend, TUTORIAL)
    assert place.nat("hostnames") == GOLDEN
    assert place.nat("-A KUBE-MARK-MASQ") == "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n"
    assert place.nat("-A PREROUTING") == (
        '-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES\n'
    )


def test_the_current_form_is_kube_proxys(place: Place) -> None:
    backend = place.open(iptables_compat="current", cluster_cidrs=(parse_network("10.244.0.0/16"),))
    backend.prepare()
    bring(backend, "TCP 10.0.1.175:80 rr label=default/hostnames -> 10.244.1.7:9376")
    assert place.nat("hostnames") == CURRENT


def test_another_form_or_other_options_rewrite_what_is_there(place: Place) -> None:
    old = place.open()
    old.prepare()
    bring(old, TUTORIAL)
    for options in (
        {"iptables_compat": "current"},
        {"iptables_compat": "current", "masquerade_all": True},
        {"cluster_cidrs": (parse_network("10.1.0.0/16"), parse_network("10.2.0.0/16"))},
        {},
    ):
        backend = place.open(**options)
        backend.prepare()
        bring(backend, TUTORIAL)
    assert place.nat("hostnames") == GOLDEN
    assert place.save().count(":KUBE-S") == 6  # KUBE-SERVICES in both tables, one SVC, three SEP: no chain is left over


@pytest.mark.parametrize("compat", ["classic", "current"])
def test_random_changes_always_read_back(place: Place, compat: str) -> None:
    backend = place.open(iptables_compat=compat, cluster_cidrs=(parse_network("10.1.0.0/16"),))
    backend.prepare()
    before = place.save(), place.save(family="ip6")
    rng = random.Random(f"{compat}{place.tool}")
    pool: dict[str, VirtualServer] = {}
    for _ in range(12):
        for _ in range(rng.randint(1, 30)):
            six = rng.random() < 0.3
            vip = f"[fd00::{rng.randint(1, 9)}]" if six else f"10.0.0.{rng.randint(1, 9)}"
            port = rng.choice((80, 443))
            protocol = rng.choice(("TCP", "UDP", "SCTP"))
            where = f"{protocol} {vip}:{port}"
            if rng.random() < 0.3:
                pool.pop(where, None)
                continue
            ends = {
                f"[fd00:1::{n}]:80" if six else f"10.1.0.{n}:80" for n in rng.sample(range(1, 40), rng.randint(0, 6))
            }
            reals = ", ".join(f"{end} w{rng.choice((1, 1, 1, 0, 3, 65535))}" for end in sorted(ends))
            words = rng.choice(("rr", "wlc", "rr drop", "rr sticky=300", "rr flags=8"))
            label = rng.choice(("", " label=a/b", " label=a/c:p", f" label=n/{protocol}{port}"))  # twice the same, too
            one = server(f"{where} {words}{label}" + (f" -> {reals}" if reals else ""))
            pool[where] = msgspec.structs.replace(one, masquerade=rng.choice(list(Masquerade)))
        bring(backend, *pool.values())
    fresh = place.open(iptables_compat=compat, cluster_cidrs=(parse_network("10.1.0.0/16"),))
    assert fresh.intact()
    assert fresh.observe().servers == backend.observe().servers
    bring(backend)
    assert (place.save(), place.save(family="ip6")) == before


def test_a_change_of_endpoints_sends_the_changed_chains_only(place: Place) -> None:
    backend = place.open()
    backend.prepare()
    many = [f"TCP 10.0.{n // 200}.{n % 200}:80 rr label=n/s{n} -> 10.1.0.1:80, 10.1.0.2:80" for n in range(300)]
    bring(backend, *many)
    aim = {one.at: backend.express(one) for one in map(server, [many[0].replace("0.2:80", "0.3:80"), *many[1:]])}
    text = str(backend.compile(diff(backend.observe(), aim)))
    assert len(text.splitlines()) < 20
    assert "n/s0" in text
    assert "n/s1" not in text
    assert "KUBE-SERVICES" not in text


def test_counters_go_on_when_chains_are_written_anew(place: Place) -> None:
    backend = place.open()
    backend.prepare()
    bring(backend, TUTORIAL)
    sep = chain_name("SEP", "default/hostnames:tcp10.244.1.7:9376")
    rule = GOLDEN.splitlines()[3]
    place.ns.run(
        f"iptables-{place.tool}-restore", "--noflush", "--counters",
        stdin=f"*nat\n:{sep} - [0:0]\n{GOLDEN.splitlines()[2]}\n[41:2460] {rule}\nCOMMIT\n",
    )  # fmt: skip

    def count() -> int:
        one = next(each for each in backend.report() if each.server.label)
        return one.connections

    assert count() == 41
    bring(backend, TUTORIAL.replace("10.244.2.3", "10.244.2.4"))  # other endpoints
    assert count() == 41
    bring(backend, TUTORIAL.replace("rr", "rr sticky=60"))  # the very chain
    assert count() == 41
    bring(backend, TUTORIAL, "TCP 10.0.0.1:80 rr")
    assert count() == 41
    place.ns.run(f"iptables-{place.tool}", "-t", "nat", "-Z")
    assert count() == 41  # nor when somebody zeroes them


FOREIGN = """\
*nat
:DOCKER - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A DOCKER -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
-A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE
COMMIT
*filter
:KUBE-FIREWALL - [0:0]
-A INPUT -j KUBE-FIREWALL
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections" -j DROP
-A FORWARD -i docker0 -j ACCEPT
COMMIT
*mangle
-A PREROUTING -p tcp -m tcp --dport 22 -j MARK --set-xmark 0x1/0x1
COMMIT
"""


def test_strangers_rules_stay_before_during_and_after(place: Place) -> None:
    place.restore(FOREIGN)
    before = place.save()
    backend = place.open()
    backend.prepare()
    bring(backend, TUTORIAL, "TCP 10.0.0.1:80 rr")
    mine = ("KUBE-SVC", "KUBE-SEP", "KUBE-SERVICES", "KUBE-MARK-MASQ", "KUBE-POSTROUTING", "KUBE-CLUSTER-IPS")
    during = [line for line in place.save().splitlines() if not any(w in line for w in (*mine, "KUBE-DATAPLANE"))]
    assert during == before.splitlines()
    backend.remove()
    assert place.save() == before
    backend.remove()


def test_a_chain_of_ours_that_somebody_uses_is_emptied_and_stays(place: Place) -> None:
    backend = place.open()
    backend.prepare()
    bring(backend, TUTORIAL)
    place.restore("*nat\n-A OUTPUT -d 192.0.2.9/32 -j KUBE-MARK-MASQ\nCOMMIT\n")
    backend.remove()
    assert place.nat() == "-A OUTPUT -d 192.0.2.9/32 -j KUBE-MARK-MASQ\n"


def test_another_kube_proxys_chains_are_named_and_left_alone(place: Place) -> None:
    place.restore(
        "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-NWV5X2332I4OT4T3 - [0:0]\n"
        "-A KUBE-SERVICES -d 10.0.1.175/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-NWV5X2332I4OT4T3\nCOMMIT\n"
    )
    before = place.save()
    backend = place.open()
    assert not backend.intact()
    assert backend.observe().servers == {}
    with pytest.raises(PreflightError, match=r"chains of a kube-proxy.*KUBE-SERVICES, KUBE-SVC-NWV5X2332I4OT4T3"):
        backend.prepare()
    backend.remove()
    assert place.save() == before


DAMAGE = {
    "the nat table flushed": "-t nat -F",
    "everything in nat deleted": "-t nat -F;-t nat -X",
    "the filter table flushed": "-t filter -F;-t filter -X",
    "a jump removed": "-t nat -D PREROUTING 1",
    "a shared chain flushed": "-t nat -F KUBE-SERVICES",
    "the masquerade flushed": "-t nat -F KUBE-POSTROUTING",
    "the marker flushed": "-t nat -F KUBE-DATAPLANE",
    "a Service's chain flushed": "-t nat -F KUBE-SVC-NWV5X2332I4OT4T3",
    "an endpoint's chain flushed": "-t nat -F KUBE-SEP-57KPRZ3JQVENLNBR",
    "a rule on top of a Service's chain": "-t nat -I KUBE-SVC-NWV5X2332I4OT4T3 -j RETURN",
    "a rule in a shared chain": "-t nat -I KUBE-SERVICES -j ACCEPT",
    "a rule behind the last": "-A KUBE-SERVICES -j ACCEPT",
    "a closed port opened": "-D KUBE-CLUSTER-IPS 1",
    "a refusal removed": "-D KUBE-SERVICES 1",
    "a left-over chain": "-t nat -N KUBE-SEP-AAAAAAAAAAAAAAAA",
    "another endpoint": "-t nat -R KUBE-SEP-57KPRZ3JQVENLNBR 2 -p tcp -j DNAT --to-destination 10.9.9.9:1",
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_seen_and_mended(place: Place, what: str) -> None:
    backend = place.open()
    backend.prepare()
    wanted = [TUTORIAL, "TCP 10.0.0.1:80 rr label=a/none"]
    bring(backend, *wanted)
    whole = place.save()
    for command in DAMAGE[what].split(";"):
        place.ns.run(f"iptables-{place.tool}", *command.split())
    time.sleep(0.11)  # a look serves for a tenth of a second
    aim = {one.at: backend.express(one) for one in map(server, wanted)}
    assert not backend.intact() or diff(backend.observe(), aim)
    if not backend.intact():
        backend.prepare()
    bring(backend, *wanted)
    assert sorted(place.save().splitlines()) == sorted(whole.splitlines())


def test_old_knowledge_is_mended_within_the_commit(place: Place) -> None:
    backend = place.open()
    backend.prepare()
    bring(backend, TUTORIAL, "TCP 10.0.0.1:80 rr")
    aim = {one.at: backend.express(one) for one in map(server, [TUTORIAL.replace("2.3", "2.4")])}
    transaction = backend.compile(diff(backend.observe(), aim))
    for command in ("-t nat -F KUBE-SERVICES", "-F KUBE-SERVICES"):
        place.ns.run(f"iptables-{place.tool}", *command.split())
    assert backend.commit(transaction).failed == {}
    assert not diff(backend.observe(), aim)


def test_a_refused_object_is_named_and_the_rest_goes_on(place: Place) -> None:
    backend = place.open()
    backend.prepare()
    bad = msgspec.structs.replace(
        server("TCP 10.0.0.66:80 rr sticky=1 label=a/bad -> 10.1.0.1:80"), persistence=1 << 40
    )
    good = [server(f"TCP 10.0.0.{n}:80 rr label=a/s{n} -> 10.1.0.{n}:80") for n in range(1, 20)]
    aim = {one.at: backend.express(one) for one in (*good[:9], bad, *good[9:])}
    for _ in range(2):
        outcome = backend.commit(backend.compile(diff(backend.observe(), aim)))
        assert list(outcome.failed) == [bad.at]
        error = outcome.failed[bad.at]
        assert "TCP 10.0.0.66:80" in str(error)
        assert "--seconds" in str(error)
        assert set(backend.observe().servers) == {one.at for one in good}
        assert "10.0.0.66" not in place.save()
        assert backend.intact()


def test_what_a_restore_refuses_without_a_line_is_found_by_halves(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a kernel that lacks a module: the text with one Service's name is refused at COMMIT."""
    backend = place.open()
    backend.prepare()
    real = run_tool
    runs = 0

    def refuse(argv: list[str], *, input: str | None = None, timeout: float = 30) -> str:  # noqa: A002
        nonlocal runs
        if input and "a/s13" in input:
            runs += 1
            raise ToolError("iptables-restore: status 1: iptables-restore: line 99999 failed")
        return real(argv, input=input, timeout=timeout)

    monkeypatch.setattr(run_iptables, "run_tool", refuse)
    aim = {one.at: backend.express(one) for one in map(server, [
        f"TCP 10.0.0.{n}:80 rr label=a/s{n} -> 10.1.0.{n}:80" for n in range(1, 65)])}  # fmt: skip
    outcome = backend.commit(backend.compile(diff(State(), aim)))
    assert set(outcome.failed) == {at("TCP 10.0.0.13:80")}
    assert set(backend.observe().servers) == aim.keys() - outcome.failed.keys()
    assert runs <= 9


def test_a_deadline_leaves_the_outcome_unknown(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = place.open()
    backend.prepare()
    plan = diff(backend.observe(), {at("TCP 10.0.1.175:80"): server(TUTORIAL)})
    transaction = backend.compile(plan)
    monkeypatch.setattr(run_iptables, "RESTORE_SECONDS", -1.0)  # over before it begins
    with pytest.raises(Unanswered):
        backend.commit(transaction)


def test_the_lock_is_waited_for_with_a_bound_and_its_holder_named(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = place.open()
    backend.prepare()
    aim = {one.at: backend.express(one) for one in map(server, [TUTORIAL])}
    transaction = backend.compile(diff(backend.observe(), aim))
    monkeypatch.setattr(run_iptables, "LOCK_SECONDS", 1)
    hold = f"import fcntl, time; f = open('{run_iptables.LOCK_FILE}', 'r+'); fcntl.flock(f, 2)"
    hold += "; print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        try:
            if place.tool == "nft":
                assert backend.commit(transaction).failed == {}
                return
            started = time.monotonic()
            with pytest.raises(KernelError, match=rf"pid {holder.pid} \(python.*holds the lock"):
                backend.commit(transaction)
            assert time.monotonic() - started < 5
            threading.Timer(0.3, holder.kill).start()
            assert backend.commit(transaction).failed == {}  # waits, and goes on
        finally:
            holder.kill()
    assert not diff(backend.observe(), aim)


HOSTILE = [
    'a/b"; add table ip evil; #',
    'x" -j ACCEPT\n-A INPUT -j ACCEPT',
    "a/b\nCOMMIT\n*filter\n-A INPUT -j DROP",
    "a/b -j ACCEPT",
    "a/b\x1b[2J",
    'a/b\\"',
    "a/$(reboot)",
    "a/" + "b" * 300,
    "a/b:c:d",
    "a/b'",
    "ä/b",
]


def test_names_never_become_syntax_through_save_and_restore_too(place: Place) -> None:
    backend = place.open()
    backend.prepare()
    rng = random.Random(4)
    names = HOSTILE + [
        "".join(rng.choices("ab/:\"\\\n\r\t\x00\x1b-# ;$`'é\u202e*", k=rng.randint(1, 40))) for _ in range(300)
    ]
    bring(backend, *(
        msgspec.structs.replace(server(f"TCP 10.0.{n // 200}.{n % 200}:80 rr -> 10.1.0.1:80"), label=name)
        for n, name in enumerate(names)
    ))  # fmt: skip
    saved = place.save()
    assert all(line.startswith(("*", ":KUBE-", ":", "-A KUBE-", "-A ", "COMMIT")) for line in saved.splitlines())
    assert "evil" not in saved
    assert not [line for line in saved.splitlines() if "-j ACCEPT" in line]
    place.ns.run(f"iptables-{place.tool}-restore", stdin=saved)  # what boot-time persistence does: all flushed and back
    assert place.save() == saved
    assert backend.intact()


def test_a_strangers_comment_with_newlines_is_read_as_a_comment(place: Place) -> None:
    backend = place.open()
    backend.prepare()
    bring(backend, TUTORIAL)
    rule = (
        '-d 10.66.6.6/32 -p tcp -m comment --comment "a/b: cluster IP" -m tcp --dport 80 -j KUBE-SVC-AAAAAAAAAAAAAAAA'
    )
    fake = f'x" \\\n[0:0] -A KUBE-SERVICES {rule}\n'
    place.ns.run(f"iptables-{place.tool}", "-t", "nat", "-I", "INPUT", "-m", "comment", "--comment", fake)
    time.sleep(0.11)
    assert backend.intact()
    assert [str(one) for one in backend.observe().servers] == ["TCP 10.0.1.175:80"]


def test_the_other_back_ends_chains_are_told(netns: NetNs) -> None:
    with netns.enter():
        old = IptablesBackend(Options(iptables_tool="legacy"))
        old.prepare()
        assert old.flavour == "legacy"
        new = IptablesBackend(Options(iptables_tool="nft"))
        (told,) = new.prepare()
        assert new.flavour == "nft"
        assert told.startswith("iptables here is nft, and iptables-legacy has chains of Services too (KUBE-")
        assert "iptables-nft-restore (nft) --noflush" in str(
            new.compile(diff(State(), {at("TCP 10.0.1.175:80"): server(TUTORIAL)}))
        )


def test_forwarding_is_switched_on_and_put_back(place: Place) -> None:
    setting = Path("/proc/sys/net/ipv4/ip_forward")
    place.ns.sysctl("ipv4.ip_forward", 0)
    place.open().prepare()
    assert setting.read_text() == "1\n"
    place.open().prepare()
    place.open().remove()
    assert setting.read_text() == "0\n"


def test_preparing_twice_and_looking_write_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = place.open()
    backend.prepare()
    bring(backend, TUTORIAL)
    monkeypatch.setattr(run_iptables.Tools, "restore", lambda *_, **__: pytest.fail("a write"))
    for one in (backend, place.open()):
        one.prepare()
        assert one.intact()
        bring(one, TUTORIAL)


def many(count: int, first: int = 0) -> list[str]:
    """Services with two endpoints each, of which the second is all their own."""
    return [
        f"TCP 10.{96 + number // 250}.0.{number % 250 + 1}:80 rr label=many/s{number} -> "
        f"10.1.{number // 250}.{number % 250 + 1}:80, 10.2.{(number + first) // 250}.{(number + first) % 250 + 1}:80"
        for number in range(count)
    ]


def test_many_services_come_change_and_go(place: Place) -> None:
    """On the nft back end in sections, that the tool is not slow; the tables end as if it had been one."""
    backend = place.open()
    backend.prepare()
    empty = place.save()
    texts = []
    for states in (many(450), many(450, first=1), many(3), []):
        aim = {one.at: backend.express(one) for one in map(server, states)}
        transaction = backend.compile(diff(backend.observe(), aim))
        texts.append(str(transaction))
        outcome = backend.commit(transaction)
        assert (outcome.failed, outcome.unsure) == ({}, frozenset())
        assert backend.intact()
        fresh = place.open()
        assert {each.at: shown(each) for each in fresh.observe().servers.values()} == {
            each.at: shown(each) for each in aim.values()
        }
    assert place.save() == empty
    sections = [text.count("*nat") for text in texts]
    assert min(sections[:3]) > 5 if place.tool == "nft" else sections == [1, 1, 1, 1]
    # what leads to chains comes behind them, and goes before them
    if place.tool == "nft":
        coming, going = texts[0], texts[2]
        assert coming.rindex("-A KUBE-SVC-") < coming.index("-A KUBE-SERVICES -d", coming.index("*nat"))
        assert going.rindex("A KUBE-SERVICES ") < going.index("-X KUBE-S")


def test_each_line_of_many_is_known_by_its_service(place: Place) -> None:
    backend = place.open()
    backend.prepare()
    aim = {one.at: backend.express(one) for one in map(server, many(450))}
    transaction = backend.compile(diff(backend.observe(), aim))
    (script,) = transaction.scripts.values()  # type: ignore[attr-defined]
    line = next(n for n, each in enumerate(script.lines, 1) if "many/s7:" in each and each.startswith("-A KUBE-SEP"))
    assert str(script.whose(line)) == "TCP 10.96.0.8:80"
    assert script.whose(1) is None
    assert script.whose(len(script.lines)) is None
