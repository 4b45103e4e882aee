"""The parts of the probe that need no root: the kernel's types, layouts, and the hand-over of descriptors."""

import os
import re
import socket
import struct
from pathlib import Path

import pytest

from dataplane.bpf import bcc_compile, bpf_syscall, records
from dataplane.bpf.btf import FUNC, STRUCT, Btf, BtfError
from dataplane.bpf.handover import Handed, Refused, receive, refuse, send
from dataplane.bpf.hooks import Hook
from dataplane.bpf.records import Map
from dataplane.bpf.sysfs_btf import KernelTypes, NotLoaded, nat_defines

needs_btf = pytest.mark.skipif(not Path("/sys/kernel/btf/vmlinux").exists(), reason="this kernel has no BTF")


# ------------------------------------------------------------------------------------------------------------- layouts


def test_every_structure_of_the_header_is_asserted_against_what_python_packs() -> None:
    text = (bcc_compile.HERE / "dnat_hits.h").read_text()
    defines = records.defines()
    structures = set(re.findall(r"^struct (\w+) \{", text, re.MULTILINE))
    asserted = dict(re.findall(r"_Static_assert\(sizeof\(struct (\w+)\) == (\w+),", text))
    assert set(asserted) == structures
    assert set(asserted.values()) | set(re.findall(r"== (\w+_AT),", text)) <= set(defines)


def test_every_number_that_the_programs_use_is_defined() -> None:
    code = re.sub(r"/\*.*?\*/", "", (bcc_compile.HERE / "dnat_hits.c").read_text(), flags=re.DOTALL)
    used = set(re.findall(r"\b(?:MAP|LOST)_\w+", code))
    assert used == {name for name in records.defines() if name.startswith(("MAP_", "LOST_"))}


def test_a_slot_is_one_cache_line() -> None:
    assert records.SLOT.size == 64


def test_descriptors_take_the_place_of_the_numbers_of_maps() -> None:
    load = struct.pack("=BBhi", 0x18, 0x11, 0, int(Map.SLOTS)) + bytes(8)
    constant = struct.pack("=BBhi", 0x18, 0x01, 0, int(Map.SLOTS)) + struct.pack("=BBhi", 0x18, 0x11, 0, 5)
    other = struct.pack("=BBhi", 0xB7, 0, 0, int(Map.SLOTS))
    found = bpf_syscall.with_maps(load + constant + other, {int(Map.SLOTS): 99})
    assert found == struct.pack("=BBhi", 0x18, 0x11, 0, 99) + bytes(8) + constant + other


# ----------------------------------------------------------------------------------------------------------------- BTF


def blob(types: bytes, strings: bytes) -> bytes:
    return struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings)) + types + strings


def record(name: int, kind: int, members: int, size: int, *words: int, flag: int = 0) -> bytes:
    return struct.pack(f"<III{len(words)}I", name, flag << 31 | kind << 24 | members, size, *words)


STRINGS = b"\0int\0outer\0inner\0a\0b\0c\0call\0"
INT, OUTER, INNER, A, B, C, CALL = (STRINGS.index(b"\0" + each + b"\0") + 1 for each in STRINGS.split(b"\0")[1:-1])
TYPES = b"".join(
    [
        record(INT, 1, 0, 4, 32),
        record(INNER, 4, 2, 8, A, 1, 0, B, 1, 32),
        record(0, 5, 1, 8, C, 2, 0),  # an anonymous union
        record(INNER, 8, 0, 2),  # a typedef of the same name
        record(OUTER, 4, 3, 20, A, 1, 0, 0, 3, 32, B, 4, 96, flag=1),
        record(0, 13, 2, 1, 0, 1, 0, 1),
        record(CALL, 12, 0, 6),
    ]
)


def test_members_are_found_through_anonymous_unions_and_typedefs() -> None:
    types = Btf(blob(TYPES, STRINGS))
    assert [types.offset("outer", path) for path in ("a", "c", "c.b", "b", "b.b")] == [0, 4, 8, 12, 16]
    assert (types.size("outer"), types.find("call", FUNC), types.arguments("call")) == (20, 7, 2)


def test_a_module_goes_on_where_the_kernel_ends() -> None:
    kernel = Btf(blob(TYPES, STRINGS))
    mine = b"mine\0a\0"
    first = len(STRINGS)
    module = Btf(blob(record(first, 4, 1, 8, first + 5, 2, 0), mine), kernel)
    assert (module.find("mine", STRUCT), module.offset("mine", "a.b"), module.find("call", FUNC)) == (8, 4, 7)
    assert module.offset("outer", "c.b") == 8


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0" * 24,
        blob(TYPES, STRINGS)[:60],
        blob(TYPES[:-4], STRINGS),
        blob(TYPES + record(0, 31, 0, 0), STRINGS),
        blob(TYPES + b"\0", STRINGS),
    ],
)
def test_what_is_no_btf_is_told(raw: bytes) -> None:
    with pytest.raises(BtfError):
        Btf(raw)


def test_what_is_not_there_is_told() -> None:
    types = Btf(blob(TYPES, STRINGS))
    with pytest.raises(BtfError, match="no struct nothing"):
        types.size("nothing")
    with pytest.raises(BtfError, match="no function inner"):
        types.find("inner", FUNC)
    with pytest.raises(BtfError, match="struct outer has no z"):
        types.offset("outer", "z")
    with pytest.raises(BtfError, match="no type 99"):
        types._type(99)


def test_a_kernel_without_btf_is_told(tmp_path: Path) -> None:
    with pytest.raises(BtfError, match="does not describe its types"):
        KernelTypes(tmp_path)


def test_a_module_that_is_not_loaded_is_told(tmp_path: Path) -> None:
    (tmp_path / "vmlinux").write_bytes(blob(TYPES, STRINGS))
    with pytest.raises(NotLoaded, match="module ip_vs is not loaded"):
        KernelTypes(tmp_path).function("ip_vs", "ip_vs_schedule")


@needs_btf
def test_the_running_kernel_describes_its_connections() -> None:
    kernel = KernelTypes()
    try:
        found = nat_defines(kernel)
    except NotLoaded:
        pytest.skip("nf_nat is not loaded")
    assert found["NAT_ARGUMENTS"] == 3
    assert found["CT_FROM"] <= found["CT_ORIGINAL_AT"] < found["CT_REPLY_AT"] < found["CT_TO"] <= found["CT_FROM"] + 256


# ----------------------------------------------------------------------------------------------------------- hand-over


def test_descriptors_and_words_arrive_together() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    files = [os.memfd_create(f"m{number}") for number in range(4)]
    with ours, theirs:
        hook = Hook("fexit", "nf_nat_setup_info", (files[0],), (files[1],))
        send(theirs, Handed((hook,), {Map.IDS: files[2], Map.SLOTS: files[3]}, ("ip_vs_schedule: no",)))
        found = receive(ours)
    assert found is not None
    assert (str(found.hooks[0]), found.refusals, set(found.maps)) == (
        "fexit:nf_nat_setup_info",
        ("ip_vs_schedule: no",),
        {Map.IDS, Map.SLOTS},
    )
    arrived = [*found.hooks[0].programs, *found.hooks[0].links, found.maps[Map.IDS], found.maps[Map.SLOTS]]
    assert [os.fstat(each).st_ino for each in arrived] == [os.fstat(each).st_ino for each in files]
    assert not any(os.get_inheritable(each) for each in arrived)
    for each in (*arrived, *files):
        os.close(each)


def test_a_reason_arrives_as_a_reason() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        refuse(theirs, "no kprobes")
        with pytest.raises(Refused, match="no kprobes"):
            receive(ours)


def test_an_end_without_a_word_is_none() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    with ours:
        assert receive(ours) is None


def test_lost_descriptors_are_noticed_and_the_others_closed() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with ours, theirs, Path(os.devnull).open() as file:
        words = b'{"hooks": [["fexit", "x", [0], [1]]], "maps": {}, "refusals": []}'
        socket.send_fds(theirs, [words], [file.fileno()])
        with pytest.raises(Refused, match="descriptors were lost"):
            receive(ours)
        assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
