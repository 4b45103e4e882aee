"""Reading a file that others write: all of it, within a limit, and not while a writer is still at it.

A manifest cut short is often a valid manifest with fewer objects, so a half-written file must not be taken for the
wish to delete the rest. Linux can tell: a read lease (fcntl(2), F_SETLEASE) is refused while anybody has the file
open for writing. Where leases are not to be had (NFS, a file of somebody else without CAP_LEASE) a file counts as
still being written until it has been left alone for a moment.

The text is read, never mapped: a mapped file that somebody truncates kills the reader with SIGBUS.
"""

import fcntl
import os
import signal
import stat
import time
from typing import NamedTuple

_F_SETSIG = 10  # linux/fcntl.h; the fcntl module of Python 3.11 does not name it
_QUIET_SECONDS = 0.2
_PATIENCE_SECONDS = 10.0
"""A writer that keeps the file open this long without writing is no reason to wait on."""
_TICK_SECONDS = 2.0
"""File times advance by the kernel's tick, on some network file systems by seconds."""


class Stamp(NamedTuple):
    """What tells whether a file is the one read before, without reading it."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int


class BeingWritten(Exception):
    """Somebody has the file open for writing, or it changed under the reader; look again in a moment."""


class NotAFile(Exception):
    """A directory, FIFO, socket or device."""


class TooLarge(Exception):
    """The file exceeds the limit."""


def stamp_of(found: os.stat_result) -> Stamp:
    """The Stamp in a stat result."""
    return Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def settled(stamp: Stamp, now: float) -> bool:
    """Whether an equal stamp later means equal content: no write can hide within the clock tick of the last one."""
    return not 0 <= now - max(stamp.modified_ns, stamp.changed_ns) / 1e9 < _TICK_SECONDS


def read_stable(path: str, limit: int) -> tuple[bytes, Stamp]:
    """The content of a regular file of at most `limit` bytes, and its Stamp.

    Raises BeingWritten, NotAFile, TooLarge, OSError. Symbolic links are followed; opening never blocks.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        before = os.fstat(fd)
        if not stat.S_ISREG(before.st_mode):
            raise NotAFile(path)
        if before.st_size > limit:
            raise TooLarge(path)
        age = time.time() - before.st_mtime
        writing = _open_for_writing(fd)
        # A time in the future tells nothing about the age.
        if writing is None:
            writing = 0 <= age < _QUIET_SECONDS
        if writing and age < _PATIENCE_SECONDS:
            raise BeingWritten(path)
        parts: list[bytes] = []
        size = 0
        while part := os.read(fd, min(1 << 20, limit + 1 - size)):
            parts.append(part)
            size += len(part)
            if size > limit:
                raise TooLarge(path)
        stamp = stamp_of(os.fstat(fd))
        if stamp != stamp_of(before) or size != stamp.size:
            raise BeingWritten(path)
        return b"".join(parts), stamp
    finally:
        os.close(fd)


def _open_for_writing(fd: int) -> bool | None:
    """Whether any process has the file open for writing; None when the kernel will not say."""
    try:
        # A writer that comes in these few microseconds makes the kernel signal us; the default SIGIO would be fatal,
        # SIGURG is ignored unless somebody asked for it.
        fcntl.fcntl(fd, _F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False
