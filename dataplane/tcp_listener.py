"""Where a program of ours listens on TCP: `127.0.0.1:10249`, `[::1]:10249`, `0.0.0.0:0`."""

import ipaddress
import re
import socket
from typing import NamedTuple

from .errors import DataplaneError

_FORM = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)):([0-9]{1,5})")
BACKLOG = 64


class Listen(NamedTuple):
    """An address and a port; port 0 = any that is free."""

    host: str
    port: int

    @property
    def loopback(self) -> bool:
        """Only programs of this machine (of this network namespace) reach it."""
        return ipaddress.ip_address(self.host).is_loopback

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_listen(text: str) -> Listen:
    """Read ADDRESS:PORT; ValueError says what is wrong. Names are not looked up: they may change."""
    found = _FORM.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not ADDRESS:PORT, such as 127.0.0.1:10249 or [::1]:10249")
    port = int(found[3])
    if port > 65535:
        raise ValueError(f"{port} is not a port")
    return Listen(str(ipaddress.ip_address(found[1] or found[2])), port)


def open_listener(listen: Listen) -> socket.socket:
    """A socket that listens there. DataplaneError names the address and the reason."""
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    one = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind((listen.host, listen.port))
        one.listen(BACKLOG)
        one.setblocking(False)
    except OSError as error:
        one.close()
        raise DataplaneError(f"{listen}: {(error.strerror or str(error)).lower()}") from error
    return one
