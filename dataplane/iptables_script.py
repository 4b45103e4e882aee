"""iptables-restore input: what it says, whose each line is, and how a group's lines are put down. Pure."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct

from .iptables_chains import ChainKey, Line, Rendered
from .model import VirtualAddress, VirtualServer

Wanted = Sequence[tuple[VirtualAddress, VirtualServer | None]]
"""Virtual addresses, and the server that each shall have; None = none."""


class Script(Struct, frozen=True):
    """An iptables-restore input. `blame`: ranges of lines (first, behind the last) and whose they are, in order;
    `after`: what was wanted.
    """

    lines: list[str]
    blame: list[tuple[int, int, tuple[VirtualAddress, ...]]]
    after: Wanted
    whole: bool
    carried: frozenset[str]
    """KUBE-SEP chains that are written anew and whose counters shall go on."""

    def text(self, hits: Mapping[str, int] | None = None) -> str:
        """The input itself; with `hits` the counters of carried chains, for `--counters`."""
        if not hits:
            return "\n".join([*self.lines, ""]) if self.lines else ""
        carried = {f"-A {name} -p ": hits.get(name, 0) for name in self.carried}
        width = len("-A KUBE-SEP-0123456789ABCDEF -p ")
        return "".join(
            f"[{carried[line[:width]]}:0] {line}\n" if line[:width] in carried else line + "\n" for line in self.lines
        )

    def whose(self, line: int) -> tuple[VirtualAddress, ...]:
        """The servers that a line, counted from 1, is about."""
        place = bisect_right(self.blame, line - 1, key=lambda each: each[0]) - 1
        return self.blame[place][2] if place >= 0 and line - 1 < self.blame[place][1] else ()


class Group(Struct):
    """A group that a change touches: its rules before and after, and which of the addresses in it are to change."""

    before: Rendered
    after: Rendered
    moving: dict[VirtualAddress, str]
    """With a heading for each."""
    changed: list[ChainKey] = []
    """Chains to be written."""

    def blamed(self, users: Iterable[VirtualAddress]) -> tuple[VirtualAddress, ...]:
        """Whom a refused rule concerns: those of its users that are to change, else all that are."""
        return tuple([at for at in users if at in self.moving]) or tuple(self.moving)

    def edits(self) -> int:
        """Rules in shared chains that come or go."""
        if not self.before.lines or not self.after.lines:
            return len(self.before.lines) + len(self.after.lines)
        return len(set(self.before.lines) ^ set(self.after.lines))


class Writer:
    """Restore text in the making."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.blame: list[tuple[int, int, tuple[VirtualAddress, ...]]] = []
        self._name = ""

    def begin(self, name: str) -> None:
        """A section of a table; one that stays empty leaves nothing behind."""
        self._name = f"*{name}"
        self.lines.append(self._name)

    def commit(self) -> None:
        """The end of the section."""
        if self.lines[-1] is self._name:
            self.lines.pop()
        else:
            self.lines.append("COMMIT")

    def group(
        self,
        group: Group,
        table: str,
        names: Sequence[str],
        before: Sequence[Line],
        after: Sequence[Line],
        *,
        verb: str = "-A",
    ) -> None:
        """The lines of one group, below headings that name those in it that change: its chains, then its rules."""
        if len(group.moving) == 1:
            lines = [f"-A {name} {rule}" for name in names for rule in group.after.chains[table, name]]
            lines += [f"-D {line.chain[1]} {line.rule}" for line in before]
            lines += [f"{verb} {line.chain[1]} {line.rule}" for line in after]
            if lines:
                self._block(tuple(group.moving), next(iter(group.moving.values())), lines)
            return
        parts: dict[VirtualAddress, list[tuple[tuple[VirtualAddress, ...], list[str]]]] = {}
        for name in names:
            users = group.blamed(group.after.users.get((table, name), ()))
            rules = [f"-A {name} {rule}" for rule in group.after.chains[table, name]]
            parts.setdefault(users[0], []).append((users, rules))
        for action, edits in (("-D", before), (verb, after)):
            for line in edits:
                users = group.blamed((line.at, line.at._replace(inside=True)))
                parts.setdefault(users[0], []).append((users, [f"{action} {line.chain[1]} {line.rule}"]))
        if names and len(group.moving) > 1:  # chains that many share are sent once, below the headings of all
            self.lines += [head for at, head in group.moving.items() if at not in parts]
        for at, part in parts.items():
            for number, (users, rules) in enumerate(part):
                self._block(users, "" if number else group.moving[at], rules)

    def _block(self, users: tuple[VirtualAddress, ...], head: str, lines: list[str]) -> None:
        if head:
            self.lines.append(head)
        start = len(self.lines)
        self.lines += lines
        self.blame.append((start, len(self.lines), users))
