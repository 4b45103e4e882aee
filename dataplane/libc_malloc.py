"""The C library's memory allocator, which keeps what a big load needed until it is asked to give it back."""

import contextlib
import ctypes


def give_memory_back() -> None:
    """Hand what the first load needed back to the system (glibc keeps it otherwise); elsewhere nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
