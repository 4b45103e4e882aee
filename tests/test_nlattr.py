"""nlattr.py: bytes written by hand from linux/netlink.h; whatever is encoded decodes; whatever lies is refused."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.errors import WireError
from dataplane.nlattr import (
    NlAttrs,
    Slot,
    attr,
    be16,
    be32,
    blob,
    compile_reader,
    compile_template,
    cstring,
    nest,
    nested,
    raw4,
    raw16,
    s32,
    u8,
    u16,
    u32,
    u64,
    walk,
)


class Inner(NlAttrs):
    number = attr(1, u32)


class Outer(NlAttrs):
    tiny = attr(1, u8)
    short = attr(2, u16)
    port = attr(3, be16)
    name = attr(4, cstring)
    address = attr(5, raw16)
    inner = attr(6, nested(Inner))
    wide = attr(7, u64)
    signed = attr(8, s32)
    order = attr(9, be32)
    bits = attr(10, blob)


# length (header included), number, payload, padding to four bytes; this machine's byte order is little-endian
GOLDEN = [
    ({"tiny": 7}, "0500 0100 07 000000"),
    ({"short": 0x0102}, "0600 0200 0201 0000"),
    ({"port": 80}, "0600 0300 0050 0000"),
    ({"name": "rr"}, "0700 0400 727200 00"),
    ({"address": b"\x0a\x00\x01\xaf"}, "1400 0500 0a0001af 000000000000000000000000"),
    ({"inner": {"number": 1}}, "0c00 0600 0800 0100 01000000"),
    ({"wide": 1}, "0c00 0700 0100000000000000"),
    ({"signed": -2}, "0800 0800 feffffff"),
    ({"order": 1}, "0800 0900 00000001"),
    ({"bits": b"abc"}, "0700 0a00 616263 00"),
    ({"tiny": 1, "short": 2}, "0500 0100 01 000000 0600 0200 0200 0000"),
]


@pytest.mark.parametrize(("values", "expected"), GOLDEN, ids=lambda value: str(value)[:40])
def test_golden_bytes(values: dict[str, object], expected: str) -> None:
    assert Outer.encode(**values) == bytes.fromhex(expected)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "tiny": st.integers(0, 255),
            "port": st.integers(0, 65535),
            "name": st.text("abcdefgh_-", max_size=15),
            "inner": st.fixed_dictionaries({"number": st.integers(0, 2**32 - 1)}),
            "wide": st.integers(0, 2**64 - 1),
            "signed": st.integers(-(2**31), 2**31 - 1),
            "bits": st.binary(max_size=40),
        },
    )
)
def test_what_is_encoded_decodes(values: dict[str, object]) -> None:
    assert Outer.decode(Outer.encode(**values)) == values


@given(st.binary(max_size=64))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    with contextlib.suppress(WireError):
        Outer.decode(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("0300 0100", "attribute 1 at offset 0: length 3, 4 left"),
        ("0900 0100 00000000", "attribute 1 at offset 0: length 9, 8 left"),
        ("0800 0200 01000000", "Outer.short at offset 4: 4 bytes instead of u16"),
        ("0500 0100 07 000000 01", "1 stray bytes at offset 8"),
    ],
)
def test_lies_are_named(data: str, message: str) -> None:
    with pytest.raises(WireError, match=message):
        Outer.decode(bytes.fromhex(data))


def test_unknown_attributes_are_passed_over() -> None:
    assert Outer.decode(bytes.fromhex("0800 ff00 01000000") + Outer.encode(tiny=1)) == {"tiny": 1}


def test_flags_in_the_number_are_passed_over() -> None:
    assert walk(bytes.fromhex("0800 0680 01000000")) == [(6, 4, 8)]


def test_a_number_is_given_once() -> None:
    with pytest.raises(TypeError, match="one attribute number to two names"):
        type("Twice", (NlAttrs,), {"a": attr(1, u8), "b": attr(1, u8)})


def test_a_template_is_the_same_bytes() -> None:
    parts = nest(6, Outer.parts({"address": Slot("vip", "4s"), "port": Slot("port", "H"), "tiny": 1}), flag=0)
    fill = compile_template(parts, ["vip", "port"])
    inner = Outer.encode(address=b"\x0a\x00\x00\x01", port=80, tiny=1)
    assert fill(b"\x0a\x00\x00\x01", 80) == (len(inner) + 4).to_bytes(2, "little") + b"\x06\x00" + inner


def test_a_slot_has_to_fit_and_to_be_filled() -> None:
    with pytest.raises(TypeError, match="does not fit"):
        Outer.parts({"port": Slot("port", "4s")})
    with pytest.raises(TypeError, match="without a parameter: port"):
        compile_template(Outer.parts({"port": Slot("port", "H")}), ["vip"])


def test_a_reader_reverses_its_template() -> None:
    class Inner(NlAttrs):
        address = attr(1, raw4)
        port = attr(2, be16)

    slots = Inner.parts({"address": Slot("address", "4s"), "port": Slot("port", "H")})
    parts = [b"head", *nest(7, slots)]
    write, read = compile_template(parts, ("address", "port")), compile_reader(parts)
    message = write(b"\x0a\0\0\1", 80)
    assert read(message, 0) == (b"\x0a\0\0\1", 80)
    assert read(b"before" + message + b"after", 6) == (b"\x0a\0\0\1", 80)
    assert read(message[:-3], 0) is None
    for place in range(len(message)):
        other = bytearray(message)
        other[place] ^= 1
        told = read(other, 0)
        assert told is None or told != (b"\x0a\0\0\1", 80)
