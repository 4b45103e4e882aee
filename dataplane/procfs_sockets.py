"""Which addresses of this node its own processes talk from: /proc/net/tcp, udp and their IPv6 forms."""

import sys
from pathlib import Path

from .model import Address

ROOT = Path("/proc/thread-self/net")
_FILES = ("tcp", "tcp6", "udp", "udp6")
_OVER = {"06", "07", "0A"}  # TCP_TIME_WAIT, TCP_CLOSE (an unconnected UDP socket), TCP_LISTEN (net/tcp_states.h)


def connected_from() -> set[Address]:
    """Local addresses of connected sockets in the calling thread's network namespace."""
    found: set[str] = set()
    for name in _FILES:
        try:
            text = (ROOT / name).read_text()
        except OSError:
            continue  # a kernel without IPv6
        for line in text.splitlines()[1:]:
            words = line.split(maxsplit=4)
            if len(words) == 5 and words[3] not in _OVER:
                found.add(words[1].partition(":")[0])
    return {_address(each) for each in found}


def _address(text: str) -> Address:
    """Of the kernel's hexadecimal words, each in this machine's byte order."""
    words = bytes.fromhex(text)
    if sys.byteorder == "little":
        words = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
    # a socket of the IPv6 kind may talk IPv4
    return Address(words[12:] if len(words) == 16 and words[:12] == bytes(10) + b"\xff\xff" else words)
