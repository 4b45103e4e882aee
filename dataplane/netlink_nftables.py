"""nf_tables over netlink: atomic batches, dumps, and news of what others change (nfnetlink.c, nf_tables_api.c).

Tables, chains and rules are written in nft's own language (`nft -f`); what changes often, the elements of sets and
maps, travels from here: packed, all of a change in one batch, which the kernel takes or refuses as a whole. Reading is
done here too, so that looking never starts a process. `nftables_messages` has the wire format.
"""

import errno
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .errors import KernelError
from .netlink_socket import (
    HEADER,
    NLM_F_REQUEST,
    DumpInterrupted,
    Failure,
    NetlinkSocket,
    kernel_error,
    message,
)
from .nftables_messages import (
    BODY,
    NFGENMSG,
    SUBSYSTEM,
    BatchAttrs,
    ChainAttrs,
    Element,
    GenerationAttrs,
    Message,
    RuleAttrs,
    SetAttrs,
    SetWire,
    TableAttrs,
    comment_of,
    describe,
    request,
    signed,
)

GROUP = 7  # NFNLGRP_NFTABLES: what `foreign_touches` reads
BATCH_BEGIN = 0x10  # NFNL_MSG_BATCH_*
BATCH_END = 0x11

# ---------------------------------------------------------------------------------------------------------- batches


class BatchRefused(KernelError):
    """The kernel refused a batch and changed nothing; `failures` are all operations it complained about.

    errno ERESTART: the ruleset is not the generation the batch was made for.
    """

    failures: tuple[Failure, ...] = ()


def commit(sock: NetlinkSocket, messages: Sequence[bytes], generation: int | None = None) -> list[bytes]:
    """Carry out messages as one transaction: all of them or, with BatchRefused, none. Returns echoes (NLM_F_ECHO).

    `generation`: refuse (ERESTART) unless the ruleset is still that generation (nfnetlink.c). Unanswered: it is not
    known which of the two happened.
    """
    echoes: list[bytes] = []
    if not messages:
        return echoes
    begin = _BEGIN if generation is None else _edge(BATCH_BEGIN, BatchAttrs.encode(genid=generation))
    data = b"".join((begin, *messages, _END))
    failures = sock.transaction(data, _last(messages[-1], len(data) - len(_END)), echoes)
    if failures:
        first = failures[0]
        refused = kernel_error("nf_tables batch:", describe(first.message), first.errno, first.text)
        if isinstance(refused, KernelError):
            rest = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
            subject, hint = describe(first.message) + rest, first.text or _HINTS.get(first.errno, "")
            refused = BatchRefused("nf_tables batch:", subject, first.errno, hint)
            refused.failures = tuple(failures)
        raise refused
    return echoes


_HINTS = {
    errno.ERESTART: "the ruleset changed meanwhile",
    errno.ENOENT: "there is no such object",
    errno.EBUSY: "still in use, or there with another value",
}


def _edge(kind: int, attributes: bytes = b"") -> bytes:
    return message(kind, NLM_F_REQUEST, NFGENMSG.pack(0, 0, SUBSYSTEM) + attributes)


_BEGIN = _edge(BATCH_BEGIN)
_END = _edge(BATCH_END)


def _last(group: bytes, end: int) -> int:
    """Where in the batch the last message of its last group starts."""
    at = 0
    while (following := at + (HEADER.unpack_from(group, at)[0] + 3 & ~3)) < len(group):
        at = following
    return end - len(group) + at


# ------------------------------------------------------------------------------------------------------------ dumps


class Chain(NamedTuple):
    """A chain; `type`, `hook`, `priority` and `policy` only of a base chain."""

    name: str
    type: str = ""
    hook: int = -1
    priority: int = 0
    policy: int = 1


class Rule(NamedTuple):
    """A rule's place and comment."""

    chain: str
    comment: str
    handle: int


class SetShape(NamedTuple):
    """What makes two sets or maps of one name alike; `flags` are NFT_SET_*."""

    name: str
    key_length: int
    flags: int


def read_elements(sock: NetlinkSocket, wire: SetWire) -> list[Element]:
    """All elements the kernel holds of one set; expired ones are not among them.

    The kernel resumes a dump by position, and other than for rules and chains it does not say when it was torn:

    * by another transaction: the generation tells, if it is the same before and after;
    * by the rest of one, which raises the generation first and takes removed elements out afterwards: a batch of ours
      that changes nothing waits until it is over, as there is one commit at a time (nft_net->commit_mutex);
    * by a worker, which resizes a hash set some time after it was filled or emptied: elements come twice then, since
      just as many are passed over as were sent before.
    """
    for pause in _PAUSES:
        commit(sock, [wire.nothing()])
        before = read_generation(sock).id
        answers = sock.dump(wire.read())
        if read_generation(sock).id == before:
            found: list[Element] = []
            for answer in answers:
                found += wire.elements_in(answer)
            if len({element.key for element in found}) == len(found):
                return found
        time.sleep(pause)
    raise DumpInterrupted("dump", f"elements of {wire.name}", errno.EINTR, "the ruleset changes all the time")


_PAUSES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


def has_table(sock: NetlinkSocket, family: int, table: str) -> bool:
    """Whether the table exists."""
    try:
        sock.get(request(Message.GETTABLE, family, TableAttrs.encode(name=table)), "look up table", table)
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return False
        raise
    return True


def read_rules(sock: NetlinkSocket, family: int, table: str) -> list[Rule]:
    """A table's rules, in order within each chain."""
    rules = []
    for answer in sock.dump(request(Message.GETRULE, family, RuleAttrs.encode(table=table))):
        values = RuleAttrs.decode(answer, BODY)
        if values["table"] == table:
            rules.append(Rule(values["chain"], comment_of(values.get("userdata", b"")), values["handle"]))
    return rules


def read_chains(sock: NetlinkSocket, family: int, table: str) -> list[Chain]:
    """A table's chains. The kernel can filter by family only."""
    chains = []
    for answer in sock.dump(request(Message.GETCHAIN, family)):
        values = ChainAttrs.decode(answer, BODY)
        if values["table"] != table:
            continue
        if hook := values.get("hook"):
            priority = signed(hook["priority"])
            chains.append(Chain(values["name"], values.get("type", ""), hook["number"], priority, values["policy"]))
        else:
            chains.append(Chain(values["name"]))
    return chains


def read_sets(sock: NetlinkSocket, family: int, table: str) -> list[SetShape]:
    """A table's sets and maps, without the anonymous ones of rules; [] when there is no such table."""
    sets = []
    try:
        answers = sock.dump(request(Message.GETSET, family, SetAttrs.encode(table=table)))
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return []
        raise
    for answer in answers:
        values = SetAttrs.decode(answer, BODY)
        flags = values.get("flags", 0)
        if values["table"] == table and not flags & 1:  # NFT_SET_ANONYMOUS
            sets.append(SetShape(values["name"], values["key_length"], flags))
    return sets


def delete_table(family: int, table: str) -> bytes:
    """The message that removes a table and all that is in it."""
    return request(Message.DELTABLE, family, TableAttrs.encode(name=table))


class Generation(NamedTuple):
    """A state of the whole ruleset, and who made it."""

    id: int
    pid: int = 0
    process: str = ""


def read_generation(sock: NetlinkSocket) -> Generation:
    """The generation that a batch may be tied to."""
    return Generation(**GenerationAttrs.decode(sock.get(request(Message.GETGEN, 0), "read", "the generation"), BODY))


# ---------------------------------------------------------------------------------------------------- notifications


class Touch(NamedTuple):
    """Somebody else's transaction changed a table."""

    pid: int
    process: str


def foreign_touches(notifications: Iterable[bytes], family: int, table: str, own_ports: Iterable[int]) -> list[Touch]:
    """Who else changed `table`, of what group 7 brought; `own_ports`: sockets whose changes are ours.

    The kernel tells each change and then, as the transaction's last message, its generation with pid and process name
    (nf_tables_gen_notify). A transaction whose end is missing counts with pid 0: an event only means: look again.
    """
    own = set(own_ports)
    wanted = table.encode() + b"\0"
    touches = []
    touched = False
    for note in notifications:
        _, kind, _, _, port = HEADER.unpack_from(note)
        if kind >> 8 != SUBSYSTEM or port in own:
            continue
        if kind & 0xFF == Message.NEWGEN:
            if touched:
                values = GenerationAttrs.decode(note, BODY)
                touches.append(Touch(values.get("pid", 0), values.get("process", "")))
            touched = False
        elif not touched and note[HEADER.size] == family:
            # the first attribute of every object's message is its table's name
            touched = note[BODY + 4 : BODY + 4 + len(wanted)] == wanted
    if touched:
        touches.append(Touch(0, ""))
    return touches
