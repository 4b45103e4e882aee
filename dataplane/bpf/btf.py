"""BTF, the kernel's description of its own types, as far as a probe reads it: offsets of members, ids of functions.

One blob is a header, types, and strings (Documentation/bpf/btf.rst). A module's blob goes on where that of the kernel
itself (`base`) ends, with type ids as well as with offsets of strings. Pure: bytes in, numbers out.
"""

import struct
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

MAGIC = 0xEB9F
_HEADER = struct.Struct("<HBBIIIII")
STRUCT, UNION, FUNC, FUNC_PROTO = 4, 5, 12, 13
_ALIASES = (8, 9, 10, 11, 18)
"""typedef, volatile, const, restrict, type_tag: names of another type."""
# Words (of 4 bytes) that a type takes: a fixed part, and so many for each of its `vlen` members; by kind.
_FIXED = (3, 4, 3, 6, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 3, 3, 4, 3, 3)
_EACH = (0, 0, 0, 0, 3, 3, 2, 0, 0, 0, 0, 0, 0, 2, 0, 3, 0, 0, 0, 3)


class BtfError(ValueError):
    """The blob is not what it should be, or has no such type or member."""


class Type(NamedTuple):
    """The fixed part of one type. `size`: bytes, or the id of another type; `owner`, `at`: where it stands."""

    owner: "Btf"
    at: int
    name: int
    kind: int
    members: int
    bitfields: bool
    size: int


class Btf:
    """The types of the kernel or, over those of the kernel, of one module."""

    def __init__(self, raw: bytes, base: "Btf | None" = None) -> None:
        if len(raw) < _HEADER.size:
            raise BtfError("BTF: no header")
        magic, _, _, header, types_at, types_size, strings_at, strings_size = _HEADER.unpack_from(raw)
        if magic != MAGIC:
            raise BtfError(f"BTF: magic {magic:#x}, not {MAGIC:#x}")
        self.base = base
        self.strings_end: int
        self.next_id: int
        """The id after that of the last type."""
        self._strings = raw[header + strings_at : header + strings_at + strings_size]
        self._first_string = base.strings_end if base else 0
        self.strings_end = self._first_string + strings_size
        self._types = raw[header + types_at : header + types_at + types_size]
        if len(self._types) != types_size or types_size % 4:
            raise BtfError("BTF: cut short")
        self._words = memoryview(self._types).cast("I")
        self._starts = self._scan()
        self.first_id = base.next_id if base else 1
        self.next_id = self.first_id + len(self._starts)

    def _scan(self) -> list[int]:
        """Where each type starts; a plain list is read twice as fast as the memory behind it."""
        words, starts, at = self._words.tolist(), [], 0
        try:
            while at < len(words):
                starts.append(at)
                info = words[at + 1]
                kind = info >> 24 & 0x1F
                at += _FIXED[kind] + _EACH[kind] * (info & 0xFFFF)
        except IndexError:
            raise BtfError(f"BTF: a type of unknown kind at {4 * at}") from None
        if at != len(words):
            raise BtfError("BTF: the last type is cut short")
        return starts

    def _type(self, number: int) -> Type:
        if number < self.first_id and self.base:
            return self.base._type(number)
        if not self.first_id <= number < self.next_id:
            raise BtfError(f"BTF: no type {number}")
        at = self._starts[number - self.first_id]
        name, info, size = self._words[at : at + 3]
        return Type(self, at, name, info >> 24 & 0x1F, info & 0xFFFF, bool(info >> 31), size)

    def _resolved(self, number: int) -> Type:
        found = self._type(number)
        while found.kind in _ALIASES:
            found = self._type(found.size)
        return found

    def _text(self, offset: int) -> str:
        if offset < self._first_string and self.base:
            return self.base._text(offset)
        start = offset - self._first_string
        return self._strings[start : self._strings.index(b"\0", start)].decode()

    def _offsets(self, name: str) -> Iterator[int]:
        """Where a name stands among the strings; a module may repeat one of the kernel's."""
        found = self._strings.find(b"\0" + name.encode() + b"\0")
        if found >= 0:
            yield self._first_string + found + 1
        elif self._strings.startswith(name.encode() + b"\0"):
            yield self._first_string
        if self.base:
            yield from self.base._offsets(name)

    def find(self, name: str, kind: int) -> int:
        """The id of the type with this name, looked for here first and in the base then."""
        for offset in self._offsets(name):
            wanted, at = struct.pack("=I", offset), -1
            while (at := self._types.find(wanted, at + 1)) >= 0:  # nearly always the first: much faster than a loop
                index = bisect_left(self._starts, at // 4)
                starts_here = at % 4 == 0 and index < len(self._starts) and self._starts[index] == at // 4
                if starts_here and self._words[at // 4 + 1] >> 24 & 0x1F == kind:
                    return self.first_id + index
        if self.base:
            return self.base.find(name, kind)
        raise BtfError(f"the kernel's BTF has no {'function' if kind == FUNC else 'struct'} {name}")

    def size(self, name: str) -> int:
        """Bytes of a struct."""
        return self._type(self.find(name, STRUCT)).size

    def offset(self, name: str, path: str) -> int:
        """Bytes from the start of a struct to a member; `path` may go into members: `src.u3`."""
        total, number = 0, self.find(name, STRUCT)
        for part in path.split("."):
            found = self._member(self._resolved(number), part)
            if found is None:
                raise BtfError(f"the kernel's struct {name} has no {path}")
            total += found[0]
            number = found[1]
        return total

    def _member(self, holder: Type, name: str) -> tuple[int, int] | None:
        """Offset and type of a member, also of one in an anonymous struct or union."""
        if holder.kind not in (STRUCT, UNION):
            return None
        owner = holder.owner
        for at in range(holder.at + 3, holder.at + 3 + 3 * holder.members, 3):
            named, number, bits = owner._words[at : at + 3]
            offset = (bits & 0xFFFFFF if holder.bitfields else bits) // 8
            if named == 0:
                inner = self._member(self._resolved(number), name)
                if inner is not None:
                    return offset + inner[0], inner[1]
            elif self._text(named) == name:
                return offset, number
        return None

    def arguments(self, function: str) -> int:
        """How many arguments a function takes."""
        return self._type(self._type(self.find(function, FUNC)).size).members
