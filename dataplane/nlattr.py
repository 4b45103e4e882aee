"""Netlink attributes, declared like the kernel header and compiled once.

A set of attributes is a class; each line gives the kernel's number, width and byte order:

    class ServiceAttrs(NlAttrs):
        af = attr(1, u16)
        port = attr(4, be16)

`ServiceAttrs.encode(af=2, port=80)` gives bytes and `ServiceAttrs.decode(buffer)` a dict. For the bulk path a value may
be a `Slot`: the encoded parts then are a template, and `compile_template` turns it into one function that is a single
`struct.Struct.pack` call for a whole message, or for several messages that belong together.

Wire format (linux/netlink.h): struct nlattr { u16 nla_len; u16 nla_type; } payload, padded to 4 bytes; nla_len counts
the header and the payload but not the padding; host byte order unless the attribute says otherwise.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, ClassVar, NamedTuple

from .errors import WireError

NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER

_HEADER = struct.Struct("=HH")
_read_header = _HEADER.unpack_from
_ZERO = bytes(64)


class Slot(NamedTuple):
    """A value that is not known yet: `code` is its struct code in network order ("H", "4s", "16s")."""

    name: str
    code: str

    @property
    def width(self) -> int:
        """Bytes it takes."""
        return struct.calcsize(">" + self.code)


Part = bytes | Slot


class Kind(NamedTuple):
    """How one attribute's payload looks. `width` None = any length."""

    name: str
    width: int | None
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]


def _fixed(name: str, code: str) -> Kind:
    packer = struct.Struct(code)
    unpack = packer.unpack

    def decode(payload: bytes) -> int:
        value: int = unpack(payload)[0]
        return value

    return Kind(name, packer.size, packer.pack, decode)


def _cstring(text: str) -> bytes:
    return text.encode("ascii") + b"\0"


def _same(payload: bytes) -> bytes:
    return payload


u8 = _fixed("u8", "=B")
u16 = _fixed("u16", "=H")
u32 = _fixed("u32", "=I")
s32 = _fixed("s32", "=i")
u64 = _fixed("u64", "=Q")
be16 = _fixed("be16", ">H")
be32 = _fixed("be32", ">I")
be64 = _fixed("be64", ">Q")
raw4 = Kind("raw4", 4, _same, _same)
raw8 = Kind("raw8", 8, _same, _same)
raw16 = Kind("raw16", 16, lambda value: value.ljust(16, b"\0"), _same)
blob = Kind("blob", None, bytes, _same)
cstring = Kind("cstring", None, _cstring, lambda payload: payload.split(b"\0", 1)[0].decode("utf-8", "replace"))


def nested(attrs: "type[NlAttrs]") -> Kind:
    """A payload made of attributes of another set; its value is a mapping of that set's names."""
    return Kind(f"nested {attrs.__name__}", None, lambda values: attrs.encode(**values), attrs.decode)


class attr(NamedTuple):  # noqa: N801 - reads as a declaration
    """One line of a declaration: the kernel's number and the kind of payload."""

    number: int
    kind: Kind


def header(length: int, number: int) -> bytes:
    """struct nlattr for a payload of `length` bytes."""
    return _HEADER.pack(length + 4, number)


def padding(length: int) -> bytes:
    """What fills a payload of `length` bytes up to the next multiple of four."""
    return _ZERO[: -length % 4]


def width_of(parts: Sequence[Part]) -> int:
    """Bytes that encoded parts take."""
    return sum(len(part) if isinstance(part, bytes) else part.width for part in parts)


def nest(number: int, parts: Sequence[Part], flag: int = NLA_F_NESTED) -> list[Part]:
    """Encoded parts wrapped into the nested attribute `number`."""
    return [header(width_of(parts), number | flag), *parts]


def walk(buffer: bytes | bytearray, start: int = 0, end: int | None = None) -> "list[tuple[int, int, int]]":
    """(number, payload start, payload end) of each attribute in buffer[start:end]; WireError where lengths lie."""
    end = len(buffer) if end is None else end
    found = []
    while start + 4 <= end:
        length, number = _read_header(buffer, start)
        stop = start + length
        if length < 4 or stop > end:
            raise WireError(
                f"attribute {number & NLA_TYPE_MASK} at offset {start}: length {length}, {end - start} left"
            )
        found.append((number & NLA_TYPE_MASK, start + 4, stop))
        start += (length + 3) & ~3
    if start < end:
        raise WireError(f"{end - start} stray bytes at offset {start}")
    return found


class NlAttrs:
    """Base of a declared attribute set; subclasses hold `name = attr(number, kind)` lines and nothing else."""

    by_name: ClassVar[dict[str, attr]]
    by_number: ClassVar[dict[int, tuple[str, Kind]]]

    def __init_subclass__(cls) -> None:
        cls.by_name = {name: line for name, line in vars(cls).items() if isinstance(line, attr)}
        cls.by_number = {line.number: (name, line.kind) for name, line in cls.by_name.items()}
        if len(cls.by_number) != len(cls.by_name):
            raise TypeError(f"{cls.__name__} gives one attribute number to two names")

    @classmethod
    def parts(cls, values: Mapping[str, Any]) -> list[Part]:
        """Encoded values in the order given; a Slot stays a hole of its own width."""
        parts: list[Part] = []
        for name, value in values.items():
            number, kind = cls.by_name[name]
            if isinstance(value, Slot):
                if kind.width is None or value.width > kind.width:
                    raise TypeError(f"{cls.__name__}.{name}: a {value.code!r} slot does not fit into {kind.name}")
                rest = kind.width - value.width
                parts += [header(kind.width, number), value, _ZERO[:rest] + padding(kind.width)]
            else:
                payload = kind.encode(value)
                if kind.width is not None and len(payload) != kind.width:
                    raise WireError(f"{cls.__name__}.{name}: {len(payload)} bytes instead of {kind.width}")
                parts.append(header(len(payload), number) + payload + padding(len(payload)))
        return parts

    @classmethod
    def encode(cls, **values: Any) -> bytes:
        """Values as attributes, in the order given."""
        parts = cls.parts(values)
        return b"".join(part for part in parts if isinstance(part, bytes))

    @classmethod
    def decode(cls, buffer: bytes | bytearray, start: int = 0, end: int | None = None) -> dict[str, Any]:
        """Attributes by name; numbers that are not declared are passed over (newer kernels add some)."""
        values: dict[str, Any] = {}
        declared = cls.by_number
        for number, first, stop in walk(buffer, start, end):
            if number in declared:
                name, (kind_name, width, _, decode) = declared[number]
                if width is not None and stop - first != width:
                    raise WireError(
                        f"{cls.__name__}.{name} at offset {first}: {stop - first} bytes instead of {kind_name}"
                    )
                values[name] = decode(bytes(buffer[first:stop]))
        return values


class LayoutReader:
    """Reads a few attributes, all of a fixed width, out of many messages that look the same.

    The kernel lays out its answers to one request alike, so one walk through the first message of each length tells
    where everything is; after that reading is one `unpack`, and every attribute header before the last value is
    compared with the first message's. A message that looks different is walked through again.
    """

    def __init__(self, attrs: type[NlAttrs], names: Sequence[str]) -> None:
        self._wanted = [attrs.by_name[name] for name in names]
        self._known: dict[int, tuple[Callable[..., tuple[Any, ...]], tuple[Any, ...], list[tuple[int, Any]]]] = {}

    def read(self, message: bytes, start: int) -> list[Any]:
        """Values in the order of the names, None for what is missing; attributes begin at `start`, after a nesting
        attribute's header (which is compared too)."""
        known = self._known.get(len(message))
        if known is not None:
            unpack, headers, decoders = known
            values = unpack(message, start - 4)
            if values[::2] == headers:
                return [decode(values[index]) if index else None for index, decode in decoders]
        return self._learn(message, start)

    def _learn(self, message: bytes, start: int) -> list[Any]:
        found = walk(message, start)
        numbers = [number for number, _, _ in found]
        codes = "".join(f"4s{stop - first}s{-stop % 4}x" for _, first, stop in found)
        layout = struct.Struct("=4s0s" + codes[:-2])  # behind the last attribute no padding need be there
        values = layout.unpack_from(message, start - 4)
        decoders = []
        for number, kind in self._wanted:
            index = 2 * numbers.index(number) + 3 if number in numbers else 0
            if index and len(values[index]) != kind.width:
                raise WireError(f"attribute {number}: {len(values[index])} bytes instead of {kind.name}")
            decoders.append((index, kind.decode))
        if len(self._known) < 64:
            self._known[len(message)] = layout.unpack_from, values[::2], decoders
        return [decode(values[index]) if index else None for index, decode in decoders]


def compile_template(parts: Sequence[Part], parameters: Sequence[str]) -> Callable[..., bytes]:
    """A function of `parameters` that fills the slots of `parts`: one `Struct.pack`, constants folded.

    A slot's name is a parameter or an attribute of one (`real0.address`), and may come several times. Values are bytes
    for "Ns" slots and ints for "H" slots.
    """
    folded: list[Part] = []
    for part in parts:
        if isinstance(part, bytes) and folded and isinstance(folded[-1], bytes):
            folded[-1] += part
        elif part:
            folded.append(part)
    unknown = {part.name for part in folded if isinstance(part, Slot) and part.name.split(".")[0] not in parameters}
    if unknown:
        raise TypeError(f"slots without a parameter: {', '.join(sorted(unknown))}")
    codes = ">" + "".join(f"{len(part)}s" if isinstance(part, bytes) else part.code for part in folded)
    # like namedtuple: the source is ours alone (identifiers from declarations), constants stand in it, one frame a call
    arguments = [repr(part) if isinstance(part, bytes) else part.name for part in folded]
    source = f"lambda {', '.join(parameters)}: _pack({', '.join(arguments)})"
    function: Callable[..., bytes] = eval(source, {"_pack": struct.Struct(codes).pack})
    return function


def compile_reader(parts: Sequence[Part]) -> Callable[[bytes | bytearray, int], tuple[Any, ...] | None]:
    """The reverse of a template: a function of a buffer and an offset that gives the slots' values, in their order.

    None where the bytes between the slots (attribute headers, constants, padding) differ from the template's, or there
    are too few: then the message has to be walked through. One `unpack` and one comparison a message.
    """
    folded: list[Part] = []
    for part in parts:
        if isinstance(part, bytes) and folded and isinstance(folded[-1], bytes):
            folded[-1] += part
        elif part:
            folded.append(part)
    layout = struct.Struct(">" + "".join(f"{len(part)}s" if isinstance(part, bytes) else part.code for part in folded))
    constants = tuple(part for part in folded if isinstance(part, bytes))
    fixed = itemgetter(*(index for index, part in enumerate(folded) if isinstance(part, bytes)))
    slots = itemgetter(*(index for index, part in enumerate(folded) if not isinstance(part, bytes)))
    if len(constants) < 2 or len(folded) - len(constants) < 2:
        raise TypeError("a reader needs two constants and two slots at least")  # or itemgetter gives no tuples
    unpack = layout.unpack_from

    def read(buffer: bytes | bytearray, start: int) -> tuple[Any, ...] | None:
        try:
            values = unpack(buffer, start)
        except struct.error:
            return None
        found: tuple[Any, ...] = slots(values)
        return found if fixed(values) == constants else None

    return read


@lru_cache(maxsize=4096)
def u32_bytes(value: int) -> bytes:
    """A host-order u32 for a "4s" slot."""
    return u32.encode(value)
