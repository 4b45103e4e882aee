"""nf_tables over netlink (linux/netfilter/nf_tables.h, nfnetlink.h): elements, dumps, atomic batches, notifications.

Tables, chains and rules are written in nft's own language (`nft -f`); what changes often, the elements of sets and
maps, travels from here: packed into messages of up to 60 kB, all of a change in one batch, which the kernel takes or
refuses as a whole. Reading is done here too, so that looking never starts a process.

    servers = SetWire(INET, "dataplane-ipvs", "servers4", (IPV4, PROTOCOL, PORT))
    commit(sock, servers.add([servers.element(address, 6, 80, comment="default/web:http")]))

Keys: the fields of a concatenation are each padded to four bytes. Comments are nft's: the user data of an object holds
TLVs (u8 type, u8 length, value), and type 0 is the comment with its final NUL (libnftnl/udata.h).
"""

import errno
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple

from .errors import KernelError, WireError
from .netlink_socket import (
    HEADER,
    NLM_F_CREATE,
    NLM_F_REQUEST,
    DumpInterrupted,
    Failure,
    NetlinkSocket,
    kernel_error,
    message,
)
from .nlattr import (
    NlAttrs,
    Part,
    Slot,
    attr,
    be32,
    be64,
    blob,
    compile_template,
    cstring,
    header,
    nest,
    nested,
    padding,
    walk,
    width_of,
)

SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
GROUP = 7  # NFNLGRP_NFTABLES
INET = 1  # NFPROTO_INET
IP = 2
IP6 = 10
BATCH_BEGIN = 0x10  # NFNL_MSG_BATCH_*
BATCH_END = 0x11
NFGENMSG = struct.Struct(">BBH")  # struct nfgenmsg: family, version, res_id
BODY = HEADER.size + NFGENMSG.size
PACKED = 60_000  # bytes of elements in one message: a list is one attribute, whose length is a u16


class Message(IntEnum):
    """NFT_MSG_* (enum nf_tables_msg_types)."""

    NEWTABLE = 0
    GETTABLE = 1
    DELTABLE = 2
    NEWCHAIN = 3
    GETCHAIN = 4
    DELCHAIN = 5
    NEWRULE = 6
    GETRULE = 7
    DELRULE = 8
    NEWSET = 9
    GETSET = 10
    DELSET = 11
    NEWSETELEM = 12
    GETSETELEM = 13
    DELSETELEM = 14
    NEWGEN = 15
    GETGEN = 16


SET_INTERVAL = 0x4  # NFT_SET_*
SET_MAP = 0x8
SET_TIMEOUT = 0x10


class BatchAttrs(NlAttrs):
    """NFNL_BATCH_* (linux/netfilter/nfnetlink.h)."""

    genid = attr(1, be32)


class TableAttrs(NlAttrs):
    """NFTA_TABLE_*."""

    name = attr(1, cstring)
    flags = attr(2, be32)
    handle = attr(4, be64)
    userdata = attr(6, blob)


class HookAttrs(NlAttrs):
    """NFTA_HOOK_*."""

    number = attr(1, be32)
    priority = attr(2, be32)


class ChainAttrs(NlAttrs):
    """NFTA_CHAIN_*."""

    table = attr(1, cstring)
    handle = attr(2, be64)
    name = attr(3, cstring)
    hook = attr(4, nested(HookAttrs))
    policy = attr(5, be32)
    type = attr(7, cstring)
    userdata = attr(12, blob)


class RuleAttrs(NlAttrs):
    """NFTA_RULE_*; expressions stay as they are."""

    table = attr(1, cstring)
    chain = attr(2, cstring)
    handle = attr(3, be64)
    expressions = attr(4, blob)
    userdata = attr(7, blob)


class SetAttrs(NlAttrs):
    """NFTA_SET_*."""

    table = attr(1, cstring)
    name = attr(2, cstring)
    flags = attr(3, be32)
    key_type = attr(4, be32)
    key_length = attr(5, be32)
    data_type = attr(6, be32)
    data_length = attr(7, be32)
    userdata = attr(13, blob)


class VerdictAttrs(NlAttrs):
    """NFTA_VERDICT_*; codes below zero are nft's own (enum nft_verdicts)."""

    code = attr(1, be32)
    chain = attr(2, cstring)


class DataAttrs(NlAttrs):
    """NFTA_DATA_*: a value or a verdict."""

    value = attr(1, blob)
    verdict = attr(2, nested(VerdictAttrs))


class ElementAttrs(NlAttrs):
    """NFTA_SET_ELEM_*; times are milliseconds."""

    key = attr(1, nested(DataAttrs))
    data = attr(2, nested(DataAttrs))
    flags = attr(3, be32)
    timeout = attr(4, be64)
    expiration = attr(5, be64)
    userdata = attr(6, blob)


class ElementListAttrs(NlAttrs):
    """NFTA_SET_ELEM_LIST_*; `elements` holds NFTA_LIST_ELEM (1) each."""

    table = attr(1, cstring)
    set = attr(2, cstring)
    elements = attr(3, blob)


class GenerationAttrs(NlAttrs):
    """NFTA_GEN_*."""

    id = attr(1, be32)
    pid = attr(2, be32)
    process = attr(3, cstring)


def comment_of(userdata: bytes) -> str:
    """The comment in an object's user data, "" when there is none; never fails, whoever wrote it."""
    at = 0
    while at + 2 <= len(userdata):
        kind, length = userdata[at], userdata[at + 1]
        if kind == 0:
            return userdata[at + 2 : at + 2 + length].split(b"\0", 1)[0].decode("utf-8", "replace")
        at += 2 + length
    return ""


def request(what: Message, family: int, attributes: bytes = b"", flags: int = 0) -> bytes:
    """One nf_tables message."""
    return message(SUBSYSTEM << 8 | what, NLM_F_REQUEST | flags, NFGENMSG.pack(family, 0, 0) + attributes)


# ---------------------------------------------------------------------------------------------------------- batches


class BatchRefused(KernelError):
    """The kernel refused a batch and changed nothing; `failures` are all operations it complained about.

    errno ERESTART: the ruleset is not the generation the batch was made for.
    """

    failures: tuple[Failure, ...] = ()


def commit(sock: NetlinkSocket, messages: Sequence[bytes], generation: int | None = None) -> None:
    """Carry out messages as one transaction: all of them or, with BatchRefused, none.

    `generation`: refuse (ERESTART) unless the ruleset is still that generation (nfnetlink.c). Unanswered: it is not
    known which of the two happened.
    """
    if not messages:
        return
    begin = _BEGIN if generation is None else _edge(BATCH_BEGIN, BatchAttrs.encode(genid=generation))
    data = b"".join((begin, *messages, _END))
    failures = sock.transaction(data, _last(messages[-1], len(data) - len(_END)))
    if failures:
        first = failures[0]
        refused = kernel_error("nf_tables batch:", describe(first.message), first.errno, first.text)
        if isinstance(refused, KernelError):
            rest = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
            subject, hint = describe(first.message) + rest, first.text or _HINTS.get(first.errno, "")
            refused = BatchRefused("nf_tables batch:", subject, first.errno, hint)
            refused.failures = tuple(failures)
        raise refused


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


def describe(refused: bytes) -> str:
    """What a message was about, for people: `NEWSETELEM dataplane-ipvs servers4`."""
    kind = HEADER.unpack_from(refused)[1]
    if kind >> 8 != SUBSYSTEM:
        return "as a whole"
    try:
        name = Message(kind & 0xFF).name
    except ValueError:
        name = f"message {kind & 0xFF}"
    try:
        texts = [bytes(refused[start:stop]) for number, start, stop in walk(refused, BODY) if number in (1, 2)]
    except WireError:
        texts = []
    if name.endswith("TABLE"):
        texts = texts[:1]
    return " ".join([name, *(text.split(b"\0")[0].decode("ascii", "replace") for text in texts)])


# --------------------------------------------------------------------------------------------------------- elements


class Field(NamedTuple):
    """One part of a key: its struct code."""

    code: str

    @property
    def pad(self) -> int:
        """Bytes that fill it up to four."""
        return -struct.calcsize(">" + self.code) % 4


def key_length(key: Sequence[Field]) -> int:
    """Bytes of a key: a concatenation pads each field to four, a single field is as long as it is."""
    if len(key) == 1:
        return struct.calcsize(">" + key[0].code)
    return sum(struct.calcsize(">" + field.code) + field.pad for field in key)


IPV4 = Field("4s")
IPV6 = Field("16s")
PROTOCOL = Field("B")
PORT = Field("H")
NUMBER = Field("I")

Verdict = tuple[int, str]
"""enum nft_verdicts and the chain it goes to, if any."""
ACCEPT: Verdict = (1, "")
DROP: Verdict = (0, "")


def goto(chain: str) -> Verdict:
    """NFT_GOTO a chain."""
    return -4, chain


class Element(NamedTuple):
    """A decoded element: the fields of its key, and what hangs on it."""

    key: tuple[Any, ...]
    comment: str = ""
    remaining: int | None = None
    """Milliseconds until the kernel forgets it; None = never."""
    data: bytes | Verdict | None = None


@lru_cache(maxsize=8192)
def _element_template(
    key: tuple[Field, ...], data: tuple[Field, ...], verdict: Verdict | None, timed: bool, comment: int
) -> Callable[..., bytes]:
    """A function of (key fields, data fields, timeout?, comment?) that packs one NFTA_LIST_ELEM.

    There is one for each length of the comment, so that every element is a single pack call.
    """

    def value(fields: Sequence[Field], prefix: str) -> list[Part]:
        slots: list[Part] = []
        for index, field in enumerate(fields):
            slots += [Slot(f"{prefix}{index}", field.code), bytes(field.pad)]
        return [header(width_of(slots), 1), *slots]

    parameters = [f"k{index}" for index in range(len(key))] + [f"d{index}" for index in range(len(data))]
    parts: list[Part] = nest(1, value(key, "k"))
    if data:
        parts += nest(2, value(data, "d"))
    if verdict is not None:
        code, chain = verdict
        told = VerdictAttrs.encode(code=code & 0xFFFF_FFFF, **({"chain": chain} if chain else {}))
        parts += nest(2, nest(2, [told]))
    if timed:
        parts += [header(8, 4), Slot("timeout", "Q")]
        parameters.append("timeout")
    if comment:
        tlv: list[Part] = [bytes((0, comment + 1)), Slot("comment", f"{comment}s"), b"\0"]
        parts += [header(width_of(tlv), 6), *tlv, padding(width_of(tlv))]
        parameters.append("comment")
    return compile_template(nest(1, parts), parameters)


class SetWire:
    """The wire form of the elements of one set (or, with `data` fields or verdicts, one map)."""

    def __init__(self, family: int, table: str, name: str, key: Sequence[Field], data: Sequence[Field] = ()) -> None:
        self.family = family
        self.name = name
        self._key = tuple(key)
        self._data = tuple(data)
        self._where = ElementListAttrs.encode(table=table, set=name)
        fields = struct.Struct(">" + "".join(f"{field.code}{field.pad}x" for field in key))
        self.key_length = fields.size
        self._unpack_key = fields.unpack_from
        # what every dumped element starts with: KEY { VALUE; the kernel sets no NLA_F_NESTED, later ones may
        self._prefix = header(fields.size + 4, 1) + header(fields.size, 1)
        self._plain = self._template(None, False, 0)

    def _template(self, verdict: Verdict | None, timed: bool, comment: int) -> Callable[..., bytes]:
        return _element_template(self._key, () if verdict is not None else self._data, verdict, timed, comment)

    def element(self, *fields: Any, timeout: int = 0, comment: str = "", verdict: Verdict | None = None) -> bytes:
        """One packed element: the fields of the key, then those of the data; `timeout` in milliseconds.

        The caller has checked the comment: ASCII, at most 127 characters.
        """
        if not timeout and not comment and verdict is None:
            return self._plain(*fields)
        if timeout:
            fields = (*fields, timeout)
        if comment:
            fields = (*fields, comment.encode("ascii"))
        return self._template(verdict, timeout > 0, len(comment))(*fields)

    def key(self, *fields: Any) -> bytes:
        """One packed element without data: what `remove` takes."""
        return _element_template(self._key, (), None, False, 0)(*fields)

    def add(self, elements: Iterable[bytes]) -> list[bytes]:
        """NEWSETELEM messages. An element that is there already stays as it is; a map's with other data is refused."""
        return self._packed(Message.NEWSETELEM, elements, NLM_F_CREATE)

    def remove(self, keys: Iterable[bytes]) -> list[bytes]:
        """DELSETELEM messages. An element that is not there makes the kernel refuse the batch with ENOENT."""
        return self._packed(Message.DELSETELEM, keys, 0)

    def flush(self) -> bytes:
        """The message that removes all elements."""
        return request(Message.DELSETELEM, self.family, self._where)

    def _packed(self, what: Message, elements: Iterable[bytes], flags: int) -> list[bytes]:
        messages: list[bytes] = []
        waiting: list[bytes] = []
        size = 0
        for element in elements:
            if size + len(element) > PACKED:
                messages.append(self._message(what, b"".join(waiting), flags))
                waiting, size = [], 0
            waiting.append(element)
            size += len(element)
        if waiting:
            messages.append(self._message(what, b"".join(waiting), flags))
        return messages

    def _message(self, what: Message, elements: bytes, flags: int) -> bytes:
        return request(what, self.family, self._where + header(len(elements), 0x8003) + elements, flags)

    def dump(self, sock: NetlinkSocket) -> list[Element]:
        """All elements the kernel holds; expired ones are not among them.

        A hash set that was just filled or emptied is resized later, by a worker, and a dump is resumed by position: it
        may then miss elements, and the kernel does not tell (the generation stays the same). It shows in others that
        come twice, since just as many are passed over as were sent before.
        """
        for pause in (0.002, 0.01, 0.05, 0.2, 0.5, 0.0):
            found: list[Element] = []
            for answer in sock.dump(request(Message.GETSETELEM, self.family, self._where)):
                for number, start, stop in walk(answer, BODY):
                    if number == 3:
                        self._decode(answer, start, stop, found)
            if len({element.key for element in found}) == len(found):
                return found
            time.sleep(pause)
        raise DumpInterrupted("dump", f"elements of {self.name}", errno.EINTR, "the kernel resizes the set all the time")

    def _decode(self, buffer: bytes, at: int, end: int, found: list[Element]) -> None:
        """Elements of one list. Plain ones and those with a comment only, which are nearly all, skip the codec."""
        prefix, unpack_key, length_of = self._prefix, self._unpack_key, struct.Struct("=H").unpack_from
        key_at, rest_at = 4 + len(prefix), 4 + len(prefix) + self.key_length
        append, make = found.append, Element._make
        while at < end:
            (length,) = length_of(buffer, at)
            stop = at + length
            if length < rest_at or stop > end or buffer[at + 4 : at + key_at] != prefix:
                found.append(self._decode_any(buffer, at + 4, stop, end))
            elif length == rest_at:
                append(make((unpack_key(buffer, at + key_at), "", None, None)))
            elif (  # nothing but user data that starts with a comment
                buffer[at + rest_at + 2 : at + rest_at + 5] == b"\6\0\0"
                and length_of(buffer, at + rest_at)[0] + 3 & ~3 == length - rest_at
            ):
                text = at + rest_at + 6
                comment = buffer[text : text + buffer[text - 1] - 1].decode("utf-8", "replace")
                append(make((unpack_key(buffer, at + key_at), comment, None, None)))
            else:
                found.append(self._decode_any(buffer, at + 4, stop, end))
            at = stop + 3 & ~3

    def _decode_any(self, buffer: bytes, start: int, stop: int, end: int) -> Element:
        if not start <= stop <= end:
            raise WireError(f"element of {self.name} at offset {start}: {stop - start} bytes, {end - start} left")
        values = ElementAttrs.decode(buffer, start, stop)
        key = values.get("key", {}).get("value", b"")
        if len(key) != self.key_length:
            raise WireError(f"element of {self.name} at offset {start}: a key of {len(key)} bytes")
        data: bytes | Verdict | None = None
        if told := values.get("data"):
            verdict = told.get("verdict")
            data = _signed(verdict) if verdict is not None else told["value"]
        comment = comment_of(values.get("userdata", b""))
        return Element(self._unpack_key(key), comment, values.get("expiration"), data)


def _signed(verdict: dict[str, Any]) -> Verdict:
    code: int = verdict["code"]
    return code - (1 << 32) if code >> 31 else code, verdict.get("chain", "")


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
            priority = hook["priority"] - (1 << 32) if hook["priority"] >> 31 else hook["priority"]
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
