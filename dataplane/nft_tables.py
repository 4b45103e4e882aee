"""nftables mode: one table of our own with a constant skeleton; Services and endpoints are elements, by netlink.

`nft_tables.nft` has the rules, `nft_layout` how a server lies in them, `nft_chains` the few chains made on demand. Here
is the outside: one atomic batch for each commit, tied to the generation of the ruleset that our knowledge (`_entries`)
is of. A commit of somebody else in between makes the kernel refuse it (ERESTART); if that did not touch our table, the
batch is sent again, else the outcome is Unanswered and the caller observes.

Counters: the kernel counts connections on the elements of `endpoints`, and loses a count only with its element. When a
change of a server takes elements away (a slot moves, an affinity begins), the kernel echoes them as they were, and what
they counted is kept in memory. A new process begins with what the elements say. Those of `shared` count for all
addresses of a Service's port: one of them tells that, the others cannot tell theirs.
"""

import errno
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from msgspec import Struct

from . import netlink_nftables as netlink
from . import nft_layout as lay
from . import nftables_messages as nft
from .backend import NO_SETTINGS, Options, Outcome, RealCounters, ServerReport, Transaction
from .drain import DrainKey
from .errors import KernelError, Unanswered
from .model import Address, RealServer, VirtualAddress, VirtualServer, between, disjoint, format_address
from .netlink_socket import HEADER, NETLINK_NETFILTER, NLM_F_ECHO, NetlinkSocket
from .netlink_trace import PacketTrace
from .nft_chains import chain_of, needed
from .nft_clients import Clients, read_detection
from .nft_layout import NOTHING, TABLE, Difference, Entry, Homes, Restocking, Target
from .nft_path import objects
from .nft_skeleton import StaticTable, render
from .nlattr import u32_bytes
from .plan import Plan, State
from .procfs_sysctl import Change, Wanted, apply, check, restore, running_kernel
from .run_tool import run_tool
from .sightings import Look, Witness
from .walk import Detection, Remembered, Situation, Stage, Walk

SYSCTLS = (Wanted("net.ipv4.ip_forward", 1, "packets to a Service leave for endpoints on other machines"),)
_TEXT = Path(__file__).with_suffix(".nft")
_ECHOES = 4096
"""Unread messages about elements that are gone; more of them are read at once."""
_RACES = 20
"""Commits of others that may come in between before a commit of ours gives up."""


def open_backend(options: Options) -> "NftablesBackend":
    """The backend in the calling thread's network namespace."""
    return NftablesBackend(options)


open_leftover = open_backend


class Step(Struct, frozen=True, gc=False):
    """One virtual server on its way: as it lies, and as it shall lie."""

    at: VirtualAddress
    old: Entry
    new: Entry


class NftTransaction(Struct, frozen=True):
    """A plan with the elements it takes; prints as one `nft -f` script."""

    plan: Plan
    steps: tuple[Step, ...]
    refills: Restocking
    """Servers of which nothing but what their numbers lead to differs."""
    stock: Restocking
    """These, and shared endpoints of the others."""
    chains: tuple[str, ...]
    """To be made, as no Service needed them before."""
    unsure: frozenset[VirtualAddress]
    """The plan was made for something else than what lies there."""

    def __str__(self) -> str:
        plan = self.plan
        made = [line for name in self.chains if (chain := chain_of(name)) for line in chain.script()]
        gone, come = lay.printed_stock(self.stock)
        for step in sorted(self.steps, key=lambda each: (len(each.at.address), each.at)):
            old, new = lay.printed(step.at, step.old, step.new)
            name = f"# {step.at} {step.new.comment or step.old.comment}".rstrip()
            gone += [name, *old] if old else []
            come += [name, *new] if new else []
        for verb, lines, vips, hairpins in (
            ("delete", gone, plan.unbind, plan.hairpin_remove),
            ("add", come, plan.bind, plan.hairpin_add),
        ):
            for address in sorted(vips):
                text = format_address(address)
                lines.append(f"{verb} element inet {TABLE} cluster_ips{_suffix(address)} {{ {text} }}")
            for address in sorted(hairpins):
                text = format_address(address)
                lines.append(f"{verb} element inet {TABLE} hairpin{_suffix(address)} {{ {text} . {text} }}")
        return "".join(line + "\n" for line in (*made, *gone, *come))


class NftablesBackend:
    """`backend.Backend` for nftables."""

    mode = "nftables"
    drains = False
    shares_affinity = True
    remembers_counts = True
    picks = lay.SCHEDULER

    def __init__(self, options: Options) -> None:
        self._sock = NetlinkSocket(NETLINK_NETFILTER)
        self.renew(options)
        self._monitor: NetlinkSocket | None = None
        self._touched = False
        self._entries: dict[VirtualAddress, Entry] = {}
        self._chains: set[str] = set()
        self._generation: int | None = None
        self._counted: dict[VirtualAddress, dict[Target, int]] = {}
        """Connections that elements which are gone had counted."""
        self._echoes: list[bytes] = []
        """What the kernel told of them, not yet read: nobody who waits for a change needs it."""
        self._homes = Homes()
        self._plain: tuple[RealServer, ...] = ()
        """Real servers that need no change to be held; addresses of a Service come one after the other."""
        self._shared_counts: dict[str, dict[Target, int]] = {}
        """The same as `_counted` of shared elements, by their Service port's name."""
        self._strays: dict[nft.SetWire, list[bytes]] = {}
        """Shared elements that nothing leads to, to be removed with the next commit."""
        self._refused = False
        """The kernel refused the last batch: the next one is made so that its parts do not depend on each other."""

    # ------------------------------------------------------------------------------------------------ contract

    def express(self, server: VirtualServer) -> VirtualServer:
        """Random choice, weights as slots; see `nft_layout.canonical`."""
        reals = server.real_servers
        held = lay.canonical(server, plain=reals is self._plain)
        if held.real_servers is reals:
            self._plain = reals
        return held

    def renew(self, options: Options) -> None:
        """Other rules, written by the next `prepare`; the elements stay."""
        clients = Clients.of(options.detection())
        self._detection: Detection = clients
        """How the rules tell clients: these options say, until the kernel's rules have been read."""
        self._text = render(_TEXT.read_text(), clients.rules())
        self._table = StaticTable(self._sock, TABLE, self._text, self._made_later)

    def present(self) -> bool:
        """Our table is there."""
        return self._table.exists()

    def prepare(self, before: Mapping[str, int] = NO_SETTINGS) -> tuple[str, ...]:
        """Table and sysctls; nothing is written that is there already."""
        lacking = {one.name: one.before for one in check(SYSCTLS, running_kernel()) if one.error}
        noted = {name: value for name, value in lacking.items() if value is not None} | dict(before)
        self._table.ensure()
        messages = []
        for name, comments in self._table.read()[1].items():
            chain = chain_of(name)
            if chain is not None and chain.comments() != comments:
                messages += chain.messages(there=True)
        # what was there before us is noted before it changes, so that `remove` can put it back whoever runs it
        notes = [
            lay.SETTINGS.element(u32_bytes(number), comment=f"{one.name}={noted[one.name]}")
            for number, one in enumerate(SYSCTLS)
            if one.name in noted
        ]
        netlink.commit(self._sock, [*messages, *lay.SETTINGS.add(notes)])
        self._generation = None  # what we know of the elements has to be looked up
        return tuple(str(one) for one in apply(SYSCTLS, running_kernel()) if one.error)

    def settings(self) -> dict[str, int]:
        """Noted in the table."""
        noted = {}
        if self._table.exists():
            for _, comment, *_ in netlink.read_elements(self._sock, lay.SETTINGS):
                name, _, value = comment.partition("=")
                if value.isdecimal():
                    noted[name] = int(value)
        return noted

    def observe(self, only: Collection[VirtualAddress] | None = None) -> State:
        """What the kernel holds of ours; `ghosts` are virtual addresses of which there are only parts."""
        vips: set[Address] = set()
        hairpins: set[Address] = set()
        for _ in range(_RACES):
            before = netlink.read_generation(self._sock).id
            self._entries, self._chains, self._strays = {}, set(), {}
            if self._table.exists():
                found = self._read()
                self._entries, vips, hairpins, self._strays = found.entries, found.vips, found.hairpins, found.strays
                self._chains = set(self._table.read()[1])
            if netlink.read_generation(self._sock).id == before:
                break
        else:
            raise Unanswered("read", TABLE, errno.EAGAIN, "the ruleset changes all the time")
        self._generation = before
        self._homes = Homes()
        for at, entry in self._entries.items():
            self._homes.learn(at, entry)
        state = State(vips=vips, hairpins=hairpins)
        wanted = self._entries.keys() if only is None else self._entries.keys() & set(only)
        for at in wanted:
            entry = self._entries[at]
            if entry.whole():
                state.put(lay.server_of(at, entry, vips, hairpins))
            else:
                state.ghosts.add(at)
        self._count_echoes()
        for at in self._counted.keys() - self._entries.keys():
            del self._counted[at]
        for name in self._shared_counts.keys() - {_port_name(at, entry) for at, entry in self._entries.items()}:
            del self._shared_counts[name]
        return state

    def suspects(self, held: State) -> set[VirtualAddress] | None:
        """None at all while the ruleset is of the generation we know; what packets write does not raise it."""
        self._count_echoes()
        if self._generation is None or netlink.read_generation(self._sock).id != self._generation:
            return None
        return set()

    def compile(self, plan: Plan) -> NftTransaction:
        """The plan with the elements that turn what lies there into what shall be."""
        if self._generation is None:
            self.observe()
        steps, unsure = [], set()
        chains: dict[str, None] = {}
        entries, layout, homes = self._entries, lay.layout, self._homes
        refills = NO_STOCK
        refilled: set[int] = set()
        if homes.used:
            lost = lay.losses(plan.change, entries)
            homes.begin(() if self._refused else lost)
            refills = Restocking.nothing()
            for loss in lost:
                if homes.refill(loss, refills):
                    refilled.update(map(id, loss.changes))
        adds = [_canonical(server) for server in plan.add]
        for server in adds:
            if not server.bound and (server.persistence or homes.room()):
                homes.port(server)  # so that the cluster IP beside it knows that it is not alone
        for server in adds:
            at = server.at
            old = entries.get(at, NOTHING)
            if old is not NOTHING and old.whole():
                unsure.add(at)
                continue
            steps.append(Step(at, old, layout(server, old, homes)))
        for change in plan.change if len(refilled) < len(plan.change) else ():
            if id(change) in refilled:
                continue
            at = change.new.at
            held = entries.get(at)
            if held is None:
                unsure.add(at)
                continue
            steps.append(Step(at, held, layout(_canonical(change.new), held, homes)))
        for missing in {step.new.chain: None for step in steps if step.new.chain not in self._chains}:
            if missing:
                chains |= dict.fromkeys(name for name in needed(missing) if name not in self._chains)
        for server in plan.remove:
            old = entries.get(server.at, NOTHING)
            if old is not NOTHING:
                steps.append(Step(server.at, old, NOTHING))
        return NftTransaction(
            plan, tuple(steps), refills, self._stock(steps, refills), tuple(chains), frozenset(unsure)
        )

    def _stock(self, steps: Collection[Step], refills: Restocking) -> Restocking:
        if not steps or not self._homes.used:
            return refills
        return refills.joined(self._homes.difference((step.old, step.new) for step in steps))

    def commit(self, transaction: Transaction) -> Outcome:
        """One batch. What the kernel refuses is found, left out, and the rest sent again."""
        assert isinstance(transaction, NftTransaction)
        failed: dict[VirtualAddress, KernelError] = {}
        unsure = set(transaction.unsure)
        self._refused = False
        addresses = _addresses(transaction.plan)
        self._commit(
            transaction.steps, transaction.stock, transaction.refills, transaction.chains, addresses, failed, unsure
        )
        return Outcome(failed, frozenset(unsure))

    def intact(self) -> bool:
        """Sets, chains and rules are as `prepare` left them."""
        if not self._table.exists():
            return False
        found, later = self._table.read()
        made = ((chain_of(name), comments) for name, comments in later.items())
        return self._table.matches(found) and all(chain is not None and chain.comments() == c for chain, c in made)

    def clocks(self) -> dict[DrainKey, float]:
        """None: conntrack keeps the connections of a removed endpoint."""
        return {}

    def keep_clocks(self, add: dict[DrainKey, int], remove: Collection[DrainKey]) -> None:
        """Nothing to keep."""

    def open_connections(self, at: VirtualAddress) -> dict[Target, int]:
        """Conntrack is not asked: as far as this table knows, none."""
        return dict.fromkeys((each for each in self._entries.get(at, NOTHING).slots() if each), 0)

    def report(self) -> Iterator[ServerReport]:
        """Every server of ours with its counters."""
        if not self._table.exists():
            return
        self._count_echoes()
        found = self._read()
        entries = found.entries
        told = self._tellers(entries)
        for at in sorted(entries, key=lambda each: (len(each.address), each)):
            entry = entries[at]
            counts = dict(self._counted.get(at, {}))
            for index, target in entry.endpoints.items():
                counts[target] = counts.get(target, 0) + found.packets[at, index]
            if port := told.get(at):
                for target, count in self._shared_counts.get(port, {}).items():
                    counts[target] = counts.get(target, 0) + count
                for number, target in entry.shared.items():
                    counts[target] = counts.get(target, 0) + found.shared[number]
            unknown = -1 if entry.shared and at not in told else 0
            server = lay.server_of(at, entry, found.vips, found.hairpins)
            rows = tuple(
                (real, RealCounters(0, 0, counts.get((real.address, real.port), unknown)))
                for real in server.real_servers
            )
            yield ServerReport(server, 0, sum(counts.values()), rows, True)

    def situation(self) -> Situation:
        """As the elements say, and the rules: those in the kernel may have been written with other options."""
        state = self.observe()
        flaws: tuple[str, ...] = ()
        if self._table.exists():
            self._detection = read_detection(run_tool(["nft", "-t", "list", "table", "inet", TABLE]))
            text = render(_TEXT.read_text(), Clients.of(self._detection).rules())
            if not StaticTable(self._sock, TABLE, text, self._made_later).matches(self._table.read()[0]):
                flaws = (f"the rules of table inet {TABLE} are not as this version writes them",)
        return Situation(state.servers, state.vips, state.hairpins, self._detection, state.foreign, flaws)

    def remembered(self, server: VirtualServer, client: Address) -> Remembered | None:
        """By `affinity`, which all addresses of a Service port share."""
        home = self._entries.get(server.at._replace(inside=False), NOTHING).home
        wire = lay.AFFINITY[len(client)]
        try:
            answer = self._sock.get(wire.look_up(wire.key(client, u32_bytes(home))))
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
            return None
        for each in wire.elements_in(answer):
            if isinstance(each.data, bytes):
                number = int.from_bytes(each.data, _NATIVE) & ~lay.INSIDE
                target = self._entries.get(server.at, NOTHING).shared.get(number)
                left = None if each.remaining is None else each.remaining // 1000
                return Remembered(*target, left) if target else None
        return None

    def objects(self, walked: Walk) -> dict[Stage, tuple[str, ...]]:
        """Chains of the table, and elements of its sets and maps."""
        return objects(walked, self._entries, self._detection)

    def watch(self, wanted: Look) -> Witness:
        """By nftrace: each rule that a packet meets."""
        return PacketTrace(wanted)

    def _tellers(self, entries: Mapping[VirtualAddress, Entry]) -> dict[VirtualAddress, str]:
        """Of the addresses of each Service port that share endpoints, the one that tells what these have counted: one
        that has all of them, the cluster IP if it can be."""
        best: dict[str, tuple[tuple[int, bool, int, VirtualAddress], VirtualAddress]] = {}
        for at, entry in entries.items():
            if entry.shared or self._shared_counts:
                rank = -len(entry.shared), entry.external or at.inside, len(at.address), at
                name = _port_name(at, entry)
                if name not in best or rank < best[name][0]:
                    best[name] = rank, at
        return {at: name for name, (_, at) in best.items()}

    def monitors(self) -> tuple[int, ...]:
        """The socket on which the kernel tells of nftables changes."""
        if self._monitor is None:
            self._monitor = NetlinkSocket(NETLINK_NETFILTER, groups=(netlink.GROUP,))
        return (self._monitor.fileno(),)

    def disturbed(self) -> bool:
        """Somebody else changed our table, or we cannot know (events were lost)."""
        self._listen()
        touched, self._touched = self._touched, False
        return touched

    def text(self, language: str) -> str | None:
        """The table as `nft` lists it, which `nft -f` reads (1.0.6 not where IPv6 has affinity: it lacks registers)."""
        if language != "nft":
            return None
        return run_tool(["nft", "list", "table", "inet", TABLE]) if self._table.exists() else ""

    def remove(self, leave: Collection[str] = ()) -> None:
        """Delete the table; put sysctls back."""
        if self._table.exists():
            ours = {one.name: one.value for one in SYSCTLS if one.name not in leave}
            restore(Change(name, value, value, ours[name]) for name, value in self.settings().items() if name in ours)
            try:
                netlink.commit(self._sock, [netlink.delete_table(nft.INET, TABLE)])
            except KernelError as error:
                if error.errno != errno.ENOENT:
                    raise
        self._entries, self._chains, self._generation, self._counted, self._homes = {}, set(), None, {}, Homes()
        self._shared_counts, self._strays = {}, {}

    def close(self) -> None:
        """Give descriptors back."""
        self._sock.close()
        if self._monitor is not None:
            self._monitor.close()

    @staticmethod
    def _made_later(chain: str) -> bool:
        """Made when a Service first needs it."""
        return chain_of(chain) is not None

    # ------------------------------------------------------------------------------------------------- writing

    def _commit(
        self,
        steps: Collection[Step],
        stock: Restocking,
        refills: Restocking,
        chains: Iterable[str],
        addresses: "_Addresses | None",
        failed: dict[VirtualAddress, KernelError],
        unsure: set[VirtualAddress],
    ) -> None:
        """Send steps in one batch; when the kernel refuses it, the suspects go one by one behind the rest."""
        try:
            self._send(steps, stock, chains, addresses)
            return
        except netlink.BatchRefused as error:
            suspects = {at for failure in error.failures for at in _named(failure.message)}
            refused = error
        self._refused = True
        doubtful = [step for step in steps if step.at in suspects]
        if len(steps) == 1 and (doubtful or not addresses):
            (step,) = steps
            if refused.errno in (errno.EEXIST, errno.ENOENT, errno.EBUSY):
                unsure.add(step.at)
            else:
                failed[step.at] = KernelError("program", str(step.at), refused.errno, refused.hint)
            return
        if not doubtful:
            # it is no server's element: what we know of the table cannot be true
            raise Unanswered("commit", refused.subject, refused.errno, refused.hint) from refused
        chains = list(chains)
        rest = [step for step in steps if step.at not in suspects]
        wanted = {name for step in rest if step.new.chain for name in needed(step.new.chain)}
        chains = [name for name in chains if name in wanted]
        self._commit(rest, self._stock(rest, refills), refills, chains, addresses, failed, unsure)
        nothing = Restocking.nothing()
        for step in doubtful:
            missing = [name for name in needed(step.new.chain) if name and name not in self._chains]
            self._commit([step], self._stock([step], nothing), nothing, missing, None, failed, unsure)

    def _send(
        self, steps: Collection[Step], stock: Restocking, chains: Iterable[str], addresses: "_Addresses | None"
    ) -> None:
        made = [name for name in chains if name not in self._chains]
        difference = Difference()
        for step in steps:
            difference.apply(step.at, step.old, step.new)
        if stock.uses:
            difference.restock(stock)
        removed, added = addresses or ({}, {})
        messages = [message for name in made if (chain := chain_of(name)) for message in chain.messages()]
        for packed, flags in (
            (difference.remove, 0),
            (removed, 0),
            (difference.counted, NLM_F_ECHO),
            (self._strays, 0),
        ):
            messages += [message for wire, each in packed.items() for message in wire.remove(each, flags)]
        for packed in (difference.add, added):
            messages += [message for wire, each in packed.items() for message in wire.add(each)]
        if not messages:
            return
        self._echoes += self._transact(messages)
        if len(self._echoes) > _ECHOES:
            self._count_echoes()
        self._chains.update(made)
        self._strays = {}
        entries = self._entries
        if stock.uses:
            if any(whose is None and step < 0 for (_, whose), step in stock.uses.items()):
                self._count_echoes()  # while the Service port has its number
            self._homes.apply(stock)
        for step in steps:
            if step.new is NOTHING:
                self._count_echoes()
                entries.pop(step.at, None)
                self._counted.pop(step.at, None)
            else:
                entries[step.at] = step.new

    def _transact(self, messages: list[bytes]) -> list[bytes]:
        """The batch, for the generation we know; again, if another table's change was all that came in between."""
        for _ in range(_RACES):
            try:
                echoes = netlink.commit(self._sock, messages, self._generation)
            except netlink.BatchRefused as error:
                if error.errno != errno.ERESTART:
                    raise
                self._generation = netlink.read_generation(self._sock).id
                if self._monitor is None or self._listen():
                    self._generation = None
                    raise Unanswered("commit", TABLE, errno.ERESTART, "somebody else changes nftables") from error
                continue
            except Unanswered:
                self._generation = None
                raise
            if self._generation is not None:
                self._generation = self._generation % 0xFFFF_FFFF + 1
            return echoes
        raise Unanswered("commit", TABLE, errno.ERESTART, f"others change nftables, {_RACES} times in a row")

    def _listen(self) -> bool:
        """Read the monitor; whether somebody else has touched our table since `disturbed` was asked."""
        if self._monitor is not None:
            notes, lost = self._monitor.notifications()
            touches = netlink.foreign_touches(notes, nft.INET, TABLE, (self._sock.port,))
            self._touched = self._touched or lost or bool(touches)
        return self._touched

    def _count_echoes(self) -> None:
        """Read what the kernel told of elements that are gone."""
        echoes, self._echoes = self._echoes, []
        for echo in echoes:
            self._keep_count(echo)

    def _keep_count(self, echo: bytes) -> None:
        """What elements had counted that a commit of ours took away."""
        kind = HEADER.unpack_from(echo)[1]
        if kind != nft.SUBSYSTEM << 8 | nft.Message.DELSETELEM:
            return
        for wire in (*lay.ENDPOINTS.values(), *lay.SHARED.values()):
            if nft.ElementListAttrs.decode(echo, nft.BODY).get("set") != wire.name:
                continue
            for each in wire.elements_in(echo):
                if each.packets and isinstance(each.data, bytes):
                    if wire in lay.SHARED.values():
                        name = self._homes.name(int.from_bytes(each.key[0], _NATIVE))
                        counts = self._shared_counts.setdefault(name, {})
                    else:
                        counts = self._counted.setdefault(_at(wire, each), {})
                    target = _target(each.data)
                    counts[target] = counts.get(target, 0) + each.packets

    # ------------------------------------------------------------------------------------------------- reading

    def _read(self) -> "_Found":
        """All that is in the table."""
        entries: dict[VirtualAddress, Entry] = {}
        packets: dict[tuple[VirtualAddress, int], int] = {}

        def entry_at(at: VirtualAddress) -> Entry:
            found = entries.get(at)
            if found is None:
                found = entries[at] = Entry()
            return found

        def entry(key: tuple[Address, int, int], index: int = 0) -> Entry:
            return entry_at(VirtualAddress(key[1], key[0], key[2], index >= lay.INSIDE))

        vips: set[Address] = set()
        hairpins: set[Address] = set()
        shared: dict[int, tuple[Target, int]] = {}
        for width in (4, 16):
            for one in self._dump(lay.SHARED[width]):
                if isinstance(one.data, bytes):
                    shared[int.from_bytes(one.key[0], _NATIVE)] = _target(one.data), one.packets
            for one in self._dump(lay.SERVICES[width]):
                found = entry(one.key)
                found.chain = one.data[1] if isinstance(one.data, tuple) else ""
                found.comment = one.comment
            for one in self._dump(lay.INSIDERS[width]):
                found = entry(one.key, lay.INSIDE)
                found.chain = one.data[1] if isinstance(one.data, tuple) else ""
                found.comment = one.comment
            for one in self._dump(lay.NO_ENDPOINTS[width]):
                found = entry(one.key)
                found.refused = next((name for name, verdict in lay.REFUSALS.items() if verdict == one.data), "?")
                found.comment = one.comment
            for one in self._dump(lay.ENDPOINTS[width]):
                address, protocol, port, raw = one.key
                index = int.from_bytes(raw, _NATIVE)
                at = VirtualAddress(protocol, address, port, index >= lay.INSIDE)
                found = entry_at(at)
                if isinstance(one.data, bytes):
                    found.endpoints[index] = _target(one.data)
                packets[at, index] = one.packets
            for one in self._dump(lay.NUMBERS[width]):
                if isinstance(one.data, bytes):
                    slot = int.from_bytes(one.key[3], _NATIVE)
                    entry(one.key, slot).numbers[slot] = int.from_bytes(one.data, _NATIVE)
            for one in self._dump(lay.ALIVE[width]):
                number = int.from_bytes(one.key[3], _NATIVE)
                entry(one.key, number).alive.add(number)
            for one in self._dump(lay.HOMES[width]):
                if isinstance(one.data, bytes):
                    entry(one.key).home = int.from_bytes(one.data, _NATIVE)
            for one in self._dump(lay.IDLE[width]):
                entry(one.key).idle.add((one.key[3], one.key[4]))
            for one in self._dump(lay.EXTERNAL[width]):
                entry(one.key).external = True
            for one in self._dump(lay.MASQUERADE[width]):
                entry(one.key).masquerade = one.data[1] if isinstance(one.data, tuple) else "?"
            self._read_ranges(width, entry)
            vips.update(one.key[0] for one in self._dump(lay.VIPS[width]))
            hairpins.update(one.key[0] for one in self._dump(lay.HAIRPIN[width]) if one.key[0] == one.key[1])
        used: set[int] = set()
        homes = Homes()
        for each in entries.values():
            if each.numbers:
                alike = {number: shared[number][0] for number in each.numbers.values() if number in shared}
                each.shared = homes.same(alike)
                used.update(each.shared)
            each.slim()
        strays: dict[nft.SetWire, list[bytes]] = {}
        for number in shared.keys() - used:
            wire = lay.SHARED[len(shared[number][0][0])]
            strays.setdefault(wire, []).append(wire.key(u32_bytes(number)))
        counts = {number: packets for number, (_, packets) in shared.items()}
        return _Found(entries, vips, hairpins, packets, counts, strays)

    def _read_ranges(self, width: int, entry: Callable[[tuple[Address, int, int]], Entry]) -> None:
        ranged = {one.key for one in self._dump(lay.RANGED[width])}
        for one in self._dump(lay.ALLOWED[width]):
            last = one.end[3] if one.end else one.key[3]
            if one.key[:3] in ranged:
                found = entry(one.key[:3])
                found.allowed = disjoint((*found.allowed, *between(one.key[3], last)))
        for key in ranged:
            if not entry(key).allowed:
                entry(key).refused = "?"  # nobody at all may come in: no server of ours is like that

    def _dump(self, wire: nft.SetWire) -> list[nft.Element]:
        try:
            return netlink.read_elements(self._sock, wire)
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
            return []  # somebody has deleted the set; `intact` says so


NO_STOCK = Restocking.nothing()
"""Never written to."""
_NATIVE: Literal["little", "big"] = sys.byteorder
_Addresses = tuple[lay.Packed, lay.Packed]
"""Addresses to take away and to add, packed."""


class _Found(NamedTuple):
    """The content of the table. `packets`: what slots counted; `shared`: what numbers did."""

    entries: dict[VirtualAddress, Entry]
    vips: set[Address]
    hairpins: set[Address]
    packets: dict[tuple[VirtualAddress, int], int]
    shared: dict[int, int]
    strays: dict[nft.SetWire, list[bytes]]


def _port_name(at: VirtualAddress, entry: Entry) -> str:
    return lay.port_name(at, nft.read_owner(entry.comment)[0])


def _canonical(server: VirtualServer) -> VirtualServer:
    """The server as `express` gives it; what has been there is known by its scheduler, which is no other mode's."""
    return server if server.scheduler == lay.SCHEDULER else lay.canonical(server)


def _addresses(plan: Plan) -> _Addresses:
    """VIPs and hairpin addresses of a plan."""
    remove: lay.Packed = {}
    add: lay.Packed = {}
    for packed, vips, hairpins in ((remove, plan.unbind, plan.hairpin_remove), (add, plan.bind, plan.hairpin_add)):
        for width, wire in lay.VIPS.items():
            if keys := [wire.key(address) for address in vips if len(address) == width]:
                packed[wire] = keys
        for address in hairpins:
            wire = lay.HAIRPIN[len(address)]
            packed.setdefault(wire, []).append(wire.key(address, address))
    return remove, add


def _target(data: bytes) -> Target:
    """Endpoint of an element's data: address, port, padding."""
    return Address(data[:-4]), int.from_bytes(data[-4:-2])


def _suffix(address: Address) -> int:
    return 4 if len(address) == 4 else 6


_KEYED = {
    wire.name: wire
    for kind in (
        lay.SERVICES,
        lay.INSIDERS,
        lay.NO_ENDPOINTS,
        lay.ENDPOINTS,
        lay.NUMBERS,
        lay.ALIVE,
        lay.HOMES,
        lay.IDLE,
        lay.EXTERNAL,
        lay.MASQUERADE,
        lay.RANGED,
        lay.ALLOWED,
    )
    for wire in kind.values()
}


def _named(message: bytes) -> Iterator[VirtualAddress]:
    """The virtual addresses whose elements a message of ours carries."""
    kind = HEADER.unpack_from(message)[1]
    if kind & 0xFF not in (nft.Message.NEWSETELEM, nft.Message.DELSETELEM) or kind >> 8 != nft.SUBSYSTEM:
        return
    wire = _KEYED.get(nft.ElementListAttrs.decode(message, nft.BODY).get("set", ""))
    if wire is not None:
        for element in wire.elements_in(message):
            yield _at(wire, element)


def _at(wire: nft.SetWire, element: nft.Element) -> VirtualAddress:
    """Whose element it is: of the server for everybody, or of that for clients inside."""
    address, protocol, port, *rest = element.key
    indexed = wire in _INDEXED and int.from_bytes(rest[0], _NATIVE) >= lay.INSIDE
    return VirtualAddress(protocol, address, port, indexed or wire in lay.INSIDERS.values())


_INDEXED = {wire for kind in (lay.ENDPOINTS, lay.NUMBERS, lay.ALIVE) for wire in kind.values()}
