"""What the child that attaches the probe hands to its parent: descriptors, and words about them.

One message over a Unix socket: JSON, with the descriptors beside it (SCM_RIGHTS). Where the JSON means a descriptor it
has its position among them.
"""

import json
import os
import socket
from array import array
from typing import NamedTuple

from .hooks import Hook
from .records import Map

_SIZE, _MOST = 1 << 16, 64


class Handed(NamedTuple):
    """An attached probe. `maps`: the descriptors of all maps, or none if they were the receiver's already."""

    hooks: tuple[Hook, ...]
    maps: dict[Map, int]
    refusals: tuple[str, ...] = ()
    """What could not be attached, and why."""


class Refused(Exception):
    """The child's reason for handing over nothing."""


def send(sock: socket.socket, handed: Handed) -> None:
    """Hand it over; the sender keeps its own copies."""
    descriptors: list[int] = []

    def place(fd: int) -> int:
        descriptors.append(fd)
        return len(descriptors) - 1

    words = {
        "hooks": [
            [each.kind, each.function, [place(fd) for fd in each.programs], [place(fd) for fd in each.links]]
            for each in handed.hooks
        ],
        "maps": {each.name: place(fd) for each, fd in handed.maps.items()},
        "refusals": handed.refusals,
    }
    socket.send_fds(sock, [json.dumps(words).encode()], descriptors)


def refuse(sock: socket.socket, reason: str) -> None:
    """Hand over nothing but the reason."""
    sock.send(json.dumps({"reason": reason[: _SIZE // 2]}).encode())


def receive(sock: socket.socket) -> Handed | None:
    """What was handed over; None when the sender ended without a word. Refused tells its reason."""
    # not socket.recv_fds, which drops its flags in Python 3.11
    room = socket.CMSG_SPACE(_MOST * array("i").itemsize)
    data, beside, _, _ = sock.recvmsg(_SIZE, room, socket.MSG_CMSG_CLOEXEC)
    descriptors: list[int] = []
    for level, kind, content in beside:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors += array("i", content[: len(content) // 4 * 4])
    try:
        if not data:
            return None
        words = json.loads(data)
        if "reason" in words:
            raise Refused(words["reason"])
        used = [int(each) for hook in words["hooks"] for each in (*hook[2], *hook[3])] + [*words["maps"].values()]
        if sorted(used) != list(range(len(descriptors))):
            raise Refused("descriptors were lost on the way: too many are open (ulimit -n)")
        return Handed(
            tuple(
                Hook(
                    kind, function, tuple(descriptors[each] for each in programs), tuple(descriptors[e] for e in links)
                )
                for kind, function, programs, links in words["hooks"]
            ),
            {Map[name]: descriptors[each] for name, each in words["maps"].items()},
            tuple(words["refusals"]),
        )
    except BaseException:
        for each in descriptors:
            os.close(each)
        raise
