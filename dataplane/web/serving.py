"""The process: what it may do, where it listens, and how it ends."""

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import struct
from typing import Any

import uvicorn

from .application import VIEWERS, Site
from .viewing import Watch

_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
"""linux/prctl.h"""
_CAPABILITY_VERSION_3 = 0x20080522
"""linux/capability.h"""
_CAPABILITIES = 64
_libc = ctypes.CDLL(None, use_errno=True)


def end_with(parent: int) -> None:
    """End at once when the parent does; SystemExit when it has already."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit(0)


def give_up_capabilities() -> None:
    """This process answers questions of strangers; it needs no power over the kernel, now or later."""
    for capability in range(_CAPABILITIES):
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # EINVAL beyond the last one
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    _libc.capset(header, bytes(24))


def serve(listener: socket.socket, *, loopback: bool, node: str, max_series: int) -> None:
    """Serve until SIGTERM or SIGINT. Open connections are given a second."""
    asyncio.run(_serve(listener, loopback=loopback, node=node, max_series=max_series))


async def _serve(listener: socket.socket, *, loopback: bool, node: str, max_series: int) -> None:
    watch = Watch()
    options: dict[str, Any] = {
        "log_config": None,
        "access_log": False,
        "lifespan": "off",
        "ws": "none",
        "http": "h11",
        "loop": "asyncio",
        "proxy_headers": False,
        "server_header": False,
        "limit_concurrency": 4 * VIEWERS,
        "timeout_keep_alive": 30,
        "timeout_graceful_shutdown": 1,
    }
    server = uvicorn.Server(uvicorn.Config(Site(watch, node, max_series).application(loopback=loopback), **options))
    try:
        with contextlib.suppress(KeyboardInterrupt):
            await server.serve([listener])
    finally:
        await watch.close()
