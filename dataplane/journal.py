"""The agent's log: one event a line on stderr, for people on a terminal, else JSON.

Everything in a line is data: names and messages may come from whoever may write a manifest, so JSON carries them in
ASCII and the human form shows them escaped (printable.py). Timestamps are ISO 8601 in UTC.
"""

import os
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO

_absent = {"rich", "greenlet"} - sys.modules.keys()
sys.modules.update(dict.fromkeys(_absent))  # type: ignore[arg-type]
# structlog takes these in where they are, and an agent would be 6 MiB larger for nothing that it uses
import structlog  # noqa: E402
from structlog.typing import FilteringBoundLogger  # noqa: E402

for _name in _absent:
    del sys.modules[_name]

from .printable import printable  # noqa: E402

DEBUG, INFO = 10, 20
_LIMIT = 2048


def open_journal(
    log_format: str = "auto", *, verbose: bool = False, stream: TextIO | None = None
) -> FilteringBoundLogger:
    """The logger of this process; `log_format` is auto, human or json."""
    out = stream or sys.stderr
    human = log_format == "human" or (log_format == "auto" and out.isatty())
    processors: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if human:
        colours = out.isatty() and not os.environ.get("NO_COLOR")
        # tracebacks are text of their own, not values: they are formatted here and shown as they are, line by line
        processors += [
            structlog.processors.format_exc_info,
            escape,
            structlog.dev.ConsoleRenderer(colors=colours, pad_event_to=10),
        ]
    else:
        processors += [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(DEBUG if verbose else INFO),
        logger_factory=structlog.WriteLoggerFactory(out),
        cache_logger_on_first_use=stream is None,
    )
    logger: FilteringBoundLogger = structlog.get_logger()
    return logger


def escape(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor: every value of the line in a form that cannot act on a terminal."""
    return {
        printable(str(key)): "\n".join(printable(line, _LIMIT) for line in value.split("\n"))
        if key == "exception"
        else _escaped(value)
        for key, value in event.items()
    }


def _escaped(value: object) -> object:
    match value:
        case bool() | int() | float() | None:
            return value
        case list() | tuple():
            return [_escaped(each) for each in value]
        case dict():
            return {printable(str(key)): _escaped(each) for key, each in value.items()}
        case _:
            return printable(str(value), _LIMIT)
