"""The query log: a line for each answer, for as long as somebody wants that."""

import time
from typing import Any, Protocol

from ..printable import printable
from .names import as_text
from .query import Query, read_query
from .rrsets import TYPES

MOST_LINES = 1000
"""A second; further ones are counted."""
RCODES = {0: "NOERROR", 1: "FORMERR", 2: "SERVFAIL", 3: "NXDOMAIN", 4: "NOTIMP", 5: "REFUSED"}
_TYPE_NAMES = {number: name for name, number in TYPES.items()}


class Log(Protocol):
    """What is needed of a structlog logger."""

    def info(self, event: str, **fields: Any) -> Any: ...
    def warning(self, event: str, **fields: Any) -> Any: ...


class QueryLog:
    """Writes lines, at most so many a second."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._second = 0
        self._lines = 0

    def tell(self, client: str, transport: str, packet: bytes, answer: bytes | None, started: float) -> None:
        """One query and what became of it. `started`: time.perf_counter when it was read."""
        second = int(time.monotonic())
        if second != self._second:
            if self._lines > MOST_LINES:
                self._log.info("query", left_out=self._lines - MOST_LINES)
            self._second, self._lines = second, 0
        self._lines += 1
        if self._lines > MOST_LINES:
            return
        query = read_query(packet)
        if isinstance(query, Query):
            name, kind = printable(as_text(query.labels)), type_name(query.qtype)
        else:
            name, kind = "malformed", ""
        outcome = "dropped" if answer is None else RCODES.get(answer[3] & 15, str(answer[3] & 15))
        self._log.info(
            "query",
            client=client,
            transport=transport,
            name=name,
            type=kind,
            result=outcome,
            answers=int.from_bytes(answer[6:8]) if answer else 0,
            truncated=bool(answer and answer[2] & 2),
            bytes=len(answer) if answer else 0,
            microseconds=round((time.perf_counter() - started) * 1e6),
        )


def type_name(qtype: int) -> str:
    """`AAAA`, or `TYPE65`."""
    return _TYPE_NAMES.get(qtype, f"TYPE{qtype}")
