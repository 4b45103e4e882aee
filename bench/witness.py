"""The agent with a witness: `python -m bench.witness FILE run -f …` is `dataplane run -f …`, and FILE tells at the end
which messages it sent to the kernel, which programs it started and which kernel settings it wrote.
"""

import atexit
import json
import sys
from pathlib import Path

from dataplane.cli import main

from .raw import Sent, messages
from .watching import record

_NETFILTER, _GENERIC = 12, 16
_NFT = 10  # NFNL_SUBSYS_NFTABLES; the edges of a batch have no subsystem
_NFT_GETS = {1, 4, 7, 10, 13, 16, 19, 23}
"""NFT_MSG_GET* (linux/netfilter/nf_tables.h)."""
_IPVS_GETS = {4, 8, 13, 15}
"""IPVS_CMD_GET_* (linux/ip_vs.h)."""
_NFT_EMPTY = b"\4\0\3\x80"
"""An empty NFTA_SET_ELEM_LIST_ELEMENTS: such a batch changes nothing, it waits until another's commit is over."""
_CONTROL = 0x10
"""The generic netlink controller, which is only asked for numbers of families."""


def changes_something(protocol: int, message: bytes) -> bool:
    """Whether a request is more than a question."""
    kind = int.from_bytes(message[4:6], sys.byteorder)
    if protocol == _NETFILTER:
        return kind >> 8 == _NFT and kind & 0xFF not in _NFT_GETS and not message.endswith(_NFT_EMPTY)
    if protocol == _GENERIC:
        return kind != _CONTROL and message[16] not in _IPVS_GETS
    return kind & 3 != 2  # rtnetlink: NEW, DEL, GET, SET in turn


def _watch(out: Path) -> None:
    sent: list[Sent] = record()
    programs: list[str] = []
    settings: list[str] = []

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "subprocess.Popen":
            programs.append(str(arguments[1]))
        elif event == "open" and str(arguments[0]).startswith("/proc/sys/") and str(arguments[1]) not in ("r", "rb"):
            settings.append(f"{arguments[0]} {arguments[1]}")

    def tell() -> None:
        asked = [(one.protocol, each) for one in sent for each in messages(one.data)]
        changing = [(protocol, each[:24].hex()) for protocol, each in asked if changes_something(protocol, each)]
        told = {"requests": len(asked), "changing": changing, "programs": programs, "settings": settings}
        out.write_text(json.dumps(told))

    sys.addaudithook(hook)
    atexit.register(tell)


if __name__ == "__main__":
    _watch(Path(sys.argv.pop(1)))
    main()
