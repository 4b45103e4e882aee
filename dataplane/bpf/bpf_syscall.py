"""bpf(2) and what belongs to it: maps, programs, and what attaches programs to functions of the kernel.

Layouts are those of union bpf_attr and struct perf_event_attr (linux/bpf.h, linux/perf_event.h); the kernel takes a
shorter attribute than its own as one whose rest is zero. All is descriptors, and gone when its last copy is closed.
BCC has bindings for some of this, but importing it takes 80 MB and several seconds.
"""

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_NUMBERS = {"x86_64": (321, 298), "aarch64": (280, 241)}
"""bpf and perf_event_open, by machine."""
_libc = ctypes.CDLL(None, use_errno=True)
ENOTSUPP = 524
"""The kernel's own, which has no text in libc: a function that BPF cannot attach to."""

_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _PROG_LOAD = 0, 1, 2, 3, 5
_PROG_TEST_RUN, _PROG_GET_NEXT_ID, _MAP_GET_NEXT_ID = 10, 11, 12
_OBJ_GET_INFO_BY_FD, _RAW_TRACEPOINT_OPEN, _BTF_GET_FD_BY_ID, _BTF_GET_NEXT_ID = 15, 17, 19, 23
_LINK_CREATE, _LINK_GET_NEXT_ID, _ENABLE_STATS = 28, 31, 32

HASH, ARRAY, QUEUE = 1, 2, 22
"""BPF_MAP_TYPE_*"""
MMAPABLE = 1 << 10
"""BPF_F_MMAPABLE"""
KPROBE, SCHED_CLS, TRACING, NETFILTER = 2, 3, 26, 32
"""BPF_PROG_TYPE_*"""
TRACE_FEXIT, NETFILTER_HOOK = 25, 45
"""BPF_TRACE_FEXIT, BPF_NETFILTER"""

_LOG_SIZE = 1 << 20
_LOAD_MAP_FD = 0x18  # BPF_LD | BPF_IMM | BPF_DW, with BPF_PSEUDO_MAP_FD as its source register


class BpfError(OSError):
    """The kernel refused; `log` holds the verifier's last lines, if it was asked for its opinion."""

    log = ""


def _call(which: int, *arguments: object) -> int:
    numbers = _NUMBERS.get(os.uname().machine)
    if numbers is None:
        raise BpfError(errno.ENOSYS, f"system calls of {os.uname().machine} are not known")
    result: int = _libc.syscall(numbers[which], *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise BpfError(code, "not supported (ENOTSUPP)" if code == ENOTSUPP else os.strerror(code))
    return result


def _bpf(command: int, attribute: bytes) -> tuple[int, bytes]:
    """Result and the attribute as the kernel has left it."""
    buffer = ctypes.create_string_buffer(attribute, len(attribute))
    return _call(0, command, buffer, len(attribute)), buffer.raw


def _buffer(data: bytes) -> "ctypes.Array[ctypes.c_char]":
    return ctypes.create_string_buffer(data, len(data))


# ------------------------------------------------------------------------------------------------------------- maps


def create_map(kind: int, key: int, value: int, entries: int, name: str, flags: int = 0) -> int:
    """A map's descriptor; sizes in bytes. CAP_BPF."""
    attribute = struct.pack("=IIIIIII16s", kind, key, value, entries, flags, 0, 0, name.encode()[:15])
    return _bpf(_MAP_CREATE, attribute)[0]


def update(fd: int, key: bytes, value: bytes, flags: int = 0) -> None:
    """Set an entry; of a queue, whose keys are empty, add one."""
    held, to = _buffer(key), _buffer(value)
    where = ctypes.addressof(held) if key else 0
    _bpf(_MAP_UPDATE, struct.pack("=I4xQQQ", fd, where, ctypes.addressof(to), flags))


def push_all(fd: int, values: range) -> None:
    """Add numbers to a queue of u32; one attribute for all, since there may be a hundred thousand."""
    number = ctypes.c_uint32()
    buffer = _buffer(struct.pack("=I4xQQQ", fd, 0, ctypes.addressof(number), 0))
    size = len(buffer)
    for each in values:
        number.value = each
        _call(0, _MAP_UPDATE, buffer, size)


def delete(fd: int, key: bytes) -> bool:
    """Delete an entry of a hash; False when there is none."""
    held = _buffer(key)
    try:
        _bpf(_MAP_DELETE, struct.pack("=I4xQ", fd, ctypes.addressof(held)))
    except BpfError as error:
        if error.errno != errno.ENOENT:
            raise
        return False
    return True


def lookup(fd: int, key: bytes, size: int) -> bytes | None:
    """The value of an entry; None when there is none."""
    held, found = _buffer(key), ctypes.create_string_buffer(size)
    try:
        _bpf(_MAP_LOOKUP, struct.pack("=I4xQQQ", fd, ctypes.addressof(held), ctypes.addressof(found), 0))
    except BpfError as error:
        if error.errno != errno.ENOENT:
            raise
        return None
    return found.raw


# --------------------------------------------------------------------------------------------------------- programs


def with_maps(instructions: bytes, maps: dict[int, int]) -> bytes:
    """Compiled instructions with descriptors in place of the numbers of maps."""
    code = bytearray(instructions)
    at = 0
    while at < len(code):
        operation, registers = code[at], code[at + 1]
        if operation == _LOAD_MAP_FD:
            if registers >> 4 == 1:
                (number,) = struct.unpack_from("=i", code, at + 4)
                struct.pack_into("=i", code, at + 4, maps[number])
            at += 8  # it takes two instructions
        at += 8
    return bytes(code)


def load(
    kind: int,
    instructions: bytes,
    name: str,
    attach_type: int = 0,
    function: int = 0,
    types: int = 0,
    log: bool = False,
) -> int:
    """A program's descriptor. `function`: id in the BTF of a module (`types`, a descriptor) or of the kernel (0)."""
    code, license_ = _buffer(instructions), ctypes.create_string_buffer(b"GPL")
    words = ctypes.create_string_buffer(_LOG_SIZE if log else 1)
    attribute = struct.pack(
        "=IIQQIIQII16sIIIIQIIQIIIIQ",
        *(kind, len(instructions) // 8, ctypes.addressof(code), ctypes.addressof(license_)),
        *(int(log), _LOG_SIZE if log else 0, ctypes.addressof(words) if log else 0),
        *(0, 0, name.encode()[:15], 0, attach_type, 0, 0, 0, 0, 0, 0, 0, function, types, 0, 0),
    )
    try:
        return _bpf(_PROG_LOAD, attribute)[0]
    except BpfError as error:
        error.log = words.value.decode("utf-8", "replace")
        raise


class Runs(NamedTuple):
    """A program's figures. `seconds` and `runs` only while somebody keeps `enable_statistics` open."""

    seconds: float
    runs: int
    missed: int
    """Times that it was not run since it was running already on that processor."""


def program_runs(fd: int) -> Runs:
    """struct bpf_prog_info: run_time_ns at 192, run_cnt, recursion_misses (0 on kernels before 5.12)."""
    info = _info(fd, 232)
    seconds, count, missed = struct.unpack_from("=QQQ", info, 192)
    return Runs(seconds / 1e9, count, missed)


def enable_statistics() -> int:
    """Programs are timed as long as this descriptor is open. CAP_SYS_ADMIN."""
    return _bpf(_ENABLE_STATS, struct.pack("=I", 0))[0]


def test_run(fd: int, repeat: int) -> float:
    """Run a SCHED_CLS program on a packet of zeros, `repeat` times; the mean duration in seconds, of whole ns."""
    data = ctypes.create_string_buffer(64)
    attribute = struct.pack("=IIIIQQIIIIQQII", fd, 0, 64, 0, ctypes.addressof(data), 0, repeat, 0, 0, 0, 0, 0, 0, 0)
    done = _bpf(_PROG_TEST_RUN, attribute)[1]
    return float(struct.unpack_from("=I", done, 36)[0]) / 1e9


def _info(fd: int, size: int) -> bytes:
    found = ctypes.create_string_buffer(size)
    _bpf(_OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", fd, size, ctypes.addressof(found)))
    return found.raw


def module_types(module: str) -> int:
    """A descriptor of a loaded module's BTF; KeyError when it has none. CAP_SYS_ADMIN."""
    for number in _ids(_BTF_GET_NEXT_ID):
        try:
            fd = _bpf(_BTF_GET_FD_BY_ID, struct.pack("=III", number, 0, 0))[0]
        except BpfError as error:
            if error.errno != errno.ENOENT:  # it went in between
                raise
            continue
        name = ctypes.create_string_buffer(64)
        info = _buffer(struct.pack("=QIIQII", 0, 0, 0, ctypes.addressof(name), len(name), 0))
        _bpf(_OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", fd, len(info), ctypes.addressof(info)))
        if name.value.decode() == module:
            return fd
        os.close(fd)
    raise KeyError(module)


def _ids(command: int) -> Iterator[int]:
    number = 0
    while True:
        try:
            attribute = _bpf(command, struct.pack("=III", number, 0, 0))[1]
        except BpfError as error:
            if error.errno == errno.ENOENT:
                return
            raise
        number = struct.unpack_from("=I", attribute, 4)[0]
        yield number


def everything_loaded() -> dict[str, set[int]]:
    """Ids of all programs, maps and links of this machine, whoever's: what bpftool lists. CAP_SYS_ADMIN."""
    commands = {"programs": _PROG_GET_NEXT_ID, "maps": _MAP_GET_NEXT_ID, "links": _LINK_GET_NEXT_ID}
    return {what: set(_ids(command)) for what, command in commands.items()}


# ----------------------------------------------------------------------------------------------------------- hooks


def attach_fexit(program: int) -> int:
    """Attach a TRACING program to the function it was loaded for, whose module stays loaded as long as this is open."""
    return _bpf(_RAW_TRACEPOINT_OPEN, struct.pack("=QI4x", 0, program))[0]


def attach_netfilter(program: int, family: int, hook: int, priority: int) -> int:
    """Attach a NETFILTER program in the calling thread's network namespace. Kernel 6.4 (84601d6ee68a)."""
    attribute = struct.pack("=IIIIIIiI16x", program, 0, NETFILTER_HOOK, 0, family, hook, priority, 0)
    return _bpf(_LINK_CREATE, attribute)[0]


_PMU = Path("/sys/bus/event_source/devices/kprobe")
_SET_BPF, _ENABLE = 0x40042408, 0x2400
_CLOEXEC = 8


def attach_kprobe(program: int, function: str, *, returning: bool) -> int:
    """Attach a KPROBE program to where a function begins or returns, by a perf event, which dies with its descriptor.

    It dies silently with the module of the function too. CAP_PERFMON.
    """
    try:
        kind = int((_PMU / "type").read_text())
        flag = 1 << int((_PMU / "format/retprobe").read_text().split(":")[1]) if returning else 0
    except OSError:
        raise BpfError(errno.EOPNOTSUPP, "no kprobes") from None
    name = ctypes.create_string_buffer(function.encode())
    attribute = bytearray(128)  # struct perf_event_attr: type, size, config, sample_period; kprobe_func at 56
    struct.pack_into("=IIQQ", attribute, 0, kind, len(attribute), flag, 1)
    struct.pack_into("=QQ", attribute, 56, ctypes.addressof(name), 0)
    event = _call(1, _buffer(bytes(attribute)), -1, 0, -1, _CLOEXEC)
    try:
        fcntl.ioctl(event, _SET_BPF, program)
        fcntl.ioctl(event, _ENABLE, 0)
    except OSError as error:
        os.close(event)
        raise BpfError(error.errno, error.strerror) from None
    return event
