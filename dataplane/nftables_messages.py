"""Messages of nf_tables (linux/netfilter/nf_tables.h, nfnetlink.h): what they look like, and elements in bulk. Pure.

    servers = SetWire(INET, "dataplane-ipvs", "servers4", (IPV4, PROTOCOL, PORT))
    messages = servers.add([servers.element(address, 6, 80, comment="default/web:http")])

Keys: the fields of a concatenation are each padded to four bytes. Comments are nft's: the user data of an object holds
TLVs (u8 type, u8 length, value), and type 0 is the comment with its final NUL (libnftnl/udata.h).
"""

import re
import struct
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple

from .errors import WireError
from .model import Kind
from .netlink_socket import HEADER, NLM_F_CREATE, NLM_F_REQUEST, message
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
    u32_bytes,
    walk,
    width_of,
)

SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
INET = 1  # NFPROTO_INET
IP = 2
IP6 = 10
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
    expression = attr(7, blob)
    key_end = attr(10, nested(DataAttrs))


class CounterAttrs(NlAttrs):
    """NFTA_COUNTER_*."""

    bytes = attr(1, be64)
    packets = attr(2, be64)


class ExpressionAttrs(NlAttrs):
    """NFTA_EXPR_*."""

    name = attr(1, cstring)
    data = attr(2, blob)


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


def owner_comment(owner: str, kind: Kind = Kind.CLUSTER_IP) -> str:
    """The owner as a comment, or "" when it has characters or a length that no kernel tool shall ever see.

    `default/web:http (NodePort)` at other addresses than the cluster IP.
    """
    plain = owner if _OWNER.fullmatch(owner) else ""
    return plain if kind is Kind.CLUSTER_IP else f"{plain} ({kind.value})".lstrip()


def read_owner(comment: str) -> tuple[str, Kind]:
    """The reverse: the owner, "" for what we never write, and the kind."""
    if not comment.endswith(")"):
        return owner_comment(comment), Kind.CLUSTER_IP
    owner, _, kind = comment[:-1].rpartition("(")
    return owner_comment(owner.rstrip(" ")), _KINDS.get(kind, Kind.CLUSTER_IP)


_KINDS = {kind.value: kind for kind in Kind}
_OWNER = re.compile(r"[A-Za-z0-9._:/-]{1,100}")


def request(what: Message, family: int, attributes: bytes = b"", flags: int = 0) -> bytes:
    """One nf_tables message."""
    return message(SUBSYSTEM << 8 | what, NLM_F_REQUEST | flags, NFGENMSG.pack(family, 0, 0) + attributes)


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
HOST32 = Field("4s")  # a mark or an index, which the kernel keeps in host order: give it `nlattr.u32_bytes(n)`

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
    packets: int = 0
    """What its counter says."""
    end: tuple[Any, ...] = ()
    """In an interval set: the last key of the range that begins with `key`."""


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
        # the padding of a single field is the attribute's, and not part of its length
        return [header(key_length(fields), 1), *slots]

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


@lru_cache(maxsize=64)
def _span_template(key: tuple[Field, ...]) -> Callable[..., bytes]:
    """A function of (fields of the first key, fields of the last) that packs one NFTA_LIST_ELEM."""

    def value(number: int, prefix: str) -> list[Part]:
        slots: list[Part] = [header(key_length(key), 1)]
        for index, field in enumerate(key):
            slots += [Slot(f"{prefix}{index}", field.code), bytes(field.pad)]
        return nest(number, slots)

    names = [f"{prefix}{index}" for prefix in ("a", "z") for index in range(len(key))]
    return compile_template(nest(1, [*value(1, "a"), *value(10, "z")]), names)


@lru_cache(maxsize=512)
def _rows_template(key: tuple[Field, ...], data: tuple[Field, ...], count: int) -> Callable[..., bytes]:
    """A function that packs `count` elements in one call, whose keys end in 0, 1, 2 … and are else the same."""
    shared = [f"k{index}" for index in range(len(key) - 1)]
    parameters = list(shared)
    parts: list[Part] = []
    for row in range(count):
        keyed: list[Part] = [header(key_length(key), 1)]
        for name, field in zip(shared, key, strict=False):
            keyed += [Slot(name, field.code), bytes(field.pad)]
        valued: list[Part] = [header(key_length(data), 1)]
        for index, field in enumerate(data):
            parameters.append(f"d{row}_{index}")
            valued += [Slot(parameters[-1], field.code), bytes(field.pad)]
        parts += nest(1, [*nest(1, [*keyed, u32_bytes(row)]), *nest(2, valued)])
    return compile_template(parts, parameters)


class SetWire:
    """The wire form of the elements of one set (or, with `data` fields or verdicts, one map)."""

    def __init__(self, family: int, table: str, name: str, key: Sequence[Field], data: Sequence[Field] = ()) -> None:
        self.family = family
        self.name = name
        self._key = tuple(key)
        self._data = tuple(data)
        self._where = ElementListAttrs.encode(table=table, set=name)
        fields = struct.Struct(">" + "".join(f"{field.code}{field.pad}x" for field in key))
        self.key_length = key_length(key)
        self._padded = fields.size
        self._unpack_key = fields.unpack_from
        # what every dumped element starts with: KEY { VALUE; the kernel sets no NLA_F_NESTED, later ones may
        self._prefix = header(fields.size + 4, 1) + header(self.key_length, 1)
        self._plain = self._template(None, False, 0)
        self.plain = self._plain
        """`element` without options, as fast as it gets: the fields of the key, then those of the data."""
        self.key = _element_template(self._key, (), None, False, 0)
        """One packed element without data, of the fields of its key: what `remove` takes, and all of a set's."""

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

    def going(self, verdict: Verdict, comment: int) -> Callable[..., bytes]:
        """A function that packs elements with that verdict: the fields of the key, then a comment of that length."""
        return self._template(verdict, False, comment)

    def rows(self, count: int) -> Callable[..., bytes]:
        """A function that packs elements 0 to count - 1 of an indexed map as one piece, at most 64.

        The last field of the key is a HOST32, the index; arguments are the fields before it, then each one's data.
        """
        return _rows_template(self._key, self._data, count)

    def span(self, *fields: Any) -> bytes:
        """One packed element of a concatenated interval set: the fields of the first key, then those of the last.

        It serves `add` and `remove`; ranges that overlap are refused (nft_set_pipapo.c).
        """
        return _span_template(self._key)(*fields)

    def add(self, elements: Iterable[bytes], flags: int = 0) -> list[bytes]:
        """NEWSETELEM messages. An element that is there already stays as it is; a map's with other data is refused."""
        return self._packed(Message.NEWSETELEM, elements, NLM_F_CREATE | flags)

    def remove(self, keys: Iterable[bytes], flags: int = 0) -> list[bytes]:
        """DELSETELEM messages. An element that is not there makes the kernel refuse the batch with ENOENT.

        With NLM_F_ECHO the kernel answers with the elements as they were at their end.
        """
        return self._packed(Message.DELSETELEM, keys, flags)

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

    def nothing(self) -> bytes:
        """A message that adds no element: fails where there is no such set, and else changes nothing."""
        return self._message(Message.NEWSETELEM, b"", NLM_F_CREATE)

    def read(self) -> bytes:
        """The request for a dump of all elements."""
        return request(Message.GETSETELEM, self.family, self._where)

    def look_up(self, key: bytes) -> bytes:
        """The request for one element by its key; the answer is a NEWSETELEM, or ENOENT."""
        return self._message(Message.GETSETELEM, key, 0)

    def elements_in(self, answer: bytes) -> list[Element]:
        """The elements in one NEWSETELEM message of the kernel's."""
        found: list[Element] = []
        for number, start, stop in walk(answer, BODY):
            if number == 3:
                self._decode(answer, start, stop, found)
        return found

    def _decode(self, buffer: bytes, at: int, end: int, found: list[Element]) -> None:
        """Elements of one list. Plain ones and those with a comment only, which are nearly all, skip the codec."""
        prefix, unpack_key, length_of = self._prefix, self._unpack_key, struct.Struct("=H").unpack_from
        key_at, rest_at = 4 + len(prefix), 4 + len(prefix) + self._padded
        append, make, known = found.append, Element._make, self._decode_known
        while at < end:
            (length,) = length_of(buffer, at)
            stop = at + length
            if length < rest_at or stop > end or buffer[at + 4 : at + key_at] != prefix:
                found.append(self._decode_any(buffer, at + 4, stop, end))
            elif length == rest_at:
                append(make((unpack_key(buffer, at + key_at), "", None, None, 0, ())))
            elif (  # nothing but user data that starts with a comment
                buffer[at + rest_at + 2 : at + rest_at + 5] == b"\6\0\0"
                and length_of(buffer, at + rest_at)[0] + 3 & ~3 == length - rest_at
            ):
                text = at + rest_at + 6
                comment = buffer[text : text + buffer[text - 1] - 1].decode("utf-8", "replace")
                append(make((unpack_key(buffer, at + key_at), comment, None, None, 0, ())))
            else:
                append(known(buffer, at + key_at, at + rest_at, stop) or self._decode_any(buffer, at + 4, stop, end))
            at = stop + 3 & ~3

    def _decode_known(self, buffer: bytes, key_at: int, at: int, stop: int) -> Element | None:
        """An element of a key and one value or verdict, a counter, and user data, one each at most, from after the key.

        None where anything is otherwise; the codec reads such elements, five times as slowly.
        """
        data: bytes | Verdict | None = None
        comment, packets = "", 0
        while at + 8 <= stop:
            length, number = _LENGTH_NUMBER(buffer, at)
            end = at + length
            if length < 8 or end > stop:
                return None
            if number == 2:  # DATA { VALUE } or { VERDICT … }
                inner, kind = _LENGTH_NUMBER(buffer, at + 4)
                if inner != length - 4 or kind not in (1, 2):
                    return None
                data = buffer[at + 8 : end] if kind == 1 else _verdict(buffer[at + 4 : end])
            elif number == 7:  # EXPR { NAME "counter", DATA { BYTES, PACKETS } }
                packets_at = at + _PACKETS_AT
                if packets_at + 8 != end or buffer[at + 4 : at + 4 + len(_COUNTER)] != _COUNTER:
                    return None
                if buffer[packets_at - 4 : packets_at] != _PACKETS:
                    return None
                (packets,) = _U64(buffer, packets_at)
            elif number == 6:
                comment = comment_of(buffer[at + 4 : end])
            else:
                return None
            at = end + 3 & ~3
        return Element(self._unpack_key(buffer, key_at), comment, None, data, packets, ()) if at >= stop else None

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
            data = (signed(verdict["code"]), verdict.get("chain", "")) if verdict is not None else told["value"]
        comment = comment_of(values.get("userdata", b""))
        packets = counted(values["expression"]) if "expression" in values else 0
        last = values.get("key_end", {}).get("value", b"")
        return Element(
            self._unpack_key(key.ljust(self._padded, b"\0")),
            comment,
            values.get("expiration"),
            data,
            packets,
            self._unpack_key(last.ljust(self._padded, b"\0")) if len(last) == self.key_length else (),
        )


_LENGTH_NUMBER = struct.Struct("=HH").unpack_from
_U64 = struct.Struct(">Q").unpack_from
# what comes before the bytes that a counter has counted, and between them and the packets
_COUNTER = ExpressionAttrs.encode(name="counter") + header(24, 2) + header(8, 1)
_PACKETS = header(8, 2)
_PACKETS_AT = 4 + len(_COUNTER) + 8 + len(_PACKETS)


@lru_cache(maxsize=512)
def _verdict(data: bytes) -> Verdict:
    """The verdict in the payload of an element's DATA; there are few chains."""
    verdict = DataAttrs.decode(data)["verdict"]
    return signed(verdict["code"]), verdict.get("chain", "")


def counted(expression: bytes) -> int:
    """Packets that an element's expression has counted, if it is a counter."""
    told = ExpressionAttrs.decode(expression)
    packets: int = CounterAttrs.decode(told["data"])["packets"] if told.get("name") == "counter" else 0
    return packets


def signed(number: int) -> int:
    """A u32 that stands for an s32."""
    return number - (1 << 32) if number >> 31 else number
