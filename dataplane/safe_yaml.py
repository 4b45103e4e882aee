"""YAML that cannot hurt: values straight from the event stream of libyaml, with limits enforced while events arrive.

PyYAML's own loaders die by segmentation fault on 100 kB of `[`, take 40 s and a gigabyte on 1 kB of merge keys, read
`no` as false and `1:30` as 90. Here nothing recurses and nothing is built that a limit has not counted:

* refused: aliases, anchors, tags, merge keys (`<<`), duplicate keys, keys that are no scalars, numbers beyond 64 bits,
  `.nan`, `.inf`, more depth or nodes than `Limits` allows, any encoding but UTF-8;
* plain scalars follow the core schema of YAML 1.2 (§10.3.2): `no`, `on`, `1:30`, `0b1`, `1_000` and dates are text,
  `010` is ten, `0x10` sixteen, `0o10` eight. Keys are always text.
"""

import re
from collections.abc import Callable, Collection, Iterator
from typing import Any, cast

import yaml
from msgspec import Struct
from yaml.events import (
    AliasEvent,
    DocumentEndEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

try:
    from yaml.cyaml import CParser  # type: ignore[attr-defined]

    LIBYAML = True
except ImportError:  # PyYAML was built without libyaml
    from yaml.parser import Parser
    from yaml.reader import Reader
    from yaml.scanner import Scanner

    LIBYAML = False

    class CParser(Reader, Scanner, Parser):  # type: ignore[no-redef]
        """The same event stream from PyYAML's Python code, about 30 times slower."""

        def __init__(self, stream: bytes) -> None:
            Reader.__init__(self, stream)
            Scanner.__init__(self)
            Parser.__init__(self)


class Limits(Struct, frozen=True, kw_only=True):
    """What one manifest file may ask of the reader; beyond a limit the file counts as broken."""

    file_bytes: int = 64 << 20
    depth: int = 32
    """Nested collections."""
    object_nodes: int = 500_000
    """Keys, scalars and collections in one object (a document, or one item of a List)."""
    file_nodes: int = 10_000_000
    """The same over all documents of a file that are read anew; about ten seconds of work."""
    objects: int = 200_000
    """Documents and List items in one file."""
    files: int = 20_000
    """Files in one directory."""
    problems: int = 1_000
    """Problems listed per file; a last one counts the rest."""


class DocumentError(ValueError):
    """A document that is no YAML or JSON, or breaks a limit; `line` counts from 0 at the start of the text given."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line
        self.reason = reason


class Part(Struct, frozen=True, gc=False):
    """One value read: a whole document (`item` -1), or item number `item` of the `items` list of the document after it.

    `line` counts from 0. A document whose items came before it holds an empty `items`.
    """

    line: int
    value: Any
    item: int = -1


class Budget:
    """Nodes and objects that may still be read; shared by the documents of one file."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.nodes = limits.file_nodes
        self.objects = limits.objects

    def count_object(self) -> None:
        """One object more; DocumentError when that is one too many."""
        self.objects -= 1
        if self.objects < 0:
            raise DocumentError(0, f"more than {self.limits.objects} objects in one file")


_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_NUMBER = re.compile(
    r"(?P<int>[-+]?[0-9]+)|0o(?P<octal>[0-7]+)|0x(?P<hex>[0-9a-fA-F]+)"
    r"|(?P<float>[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?)"
    r"|(?P<odd>[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))"
)
_NUMBER_STARTS = frozenset("+-.0123456789")
_WORD_STARTS = frozenset("~nNtTfF")


def plain(text: str) -> Any:
    """The value of a plain scalar in the core schema; ValueError for a number that JSON could not carry."""
    if text[:1] not in _NUMBER_STARTS:
        return _WORDS.get(text, text)
    found = _NUMBER.fullmatch(text)
    if not found:
        return text
    kind = found.lastgroup or ""
    if kind == "float":
        # float() is linear, but a scalar of megabytes is no number anybody meant.
        value = float(text) if len(text) <= 400 else float("inf")
        if value - value != 0:
            raise ValueError("number too large")
        return value
    if kind == "odd":
        raise ValueError(f"{text} is no number that JSON knows")
    digits = found[kind]
    number = int(digits, {"int": 10, "octal": 8, "hex": 16}[kind]) if len(digits) <= 64 else 1 << 64
    if not -(1 << 63) <= number < 1 << 64:
        raise ValueError("number too large (64 bits at most)")
    return number


def _events(text: bytes) -> Callable[[], Any]:
    if text.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DocumentError(0, "not UTF-8 (this looks like UTF-16)")
    try:
        parser: Any = CParser(text)
        return cast("Callable[[], Any]", parser.get_event)
    except yaml.YAMLError as error:
        raise _syntax_error(error) from None


def _syntax_error(error: yaml.YAMLError) -> DocumentError:
    if isinstance(error, yaml.reader.ReaderError):
        return DocumentError(0, f"not readable as UTF-8 text at byte {error.position}: {error.reason}")
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if "maximum nesting depth" in str(getattr(error, "problem", "")):  # PyYAML's own bound, since 6.0.4
        return DocumentError(mark.line if mark else 0, f"nested deeper than {Limits().depth}")
    words = [str(part) for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part]
    return DocumentError(mark.line if mark else 0, "not YAML: " + (", ".join(words) or "syntax error"))


def read(text: bytes, budget: Budget) -> Iterator[Part]:
    """Every document in `text`, the `items` of a document one by one before it, so that no large tree ever exists.

    Values are dict, list, str, int, float, bool and None, as JSON would give them. Raises DocumentError, possibly
    after some parts were yielded.
    """
    next_event = _events(text)
    limits = budget.limits
    left = allowed = min(limits.object_nodes, budget.nodes)
    parents: list[tuple[Any, str | None]] = []
    container: Any = None  # the collection being filled; None = between documents
    key: str | None = None  # the key waiting for its value, when the container is a dict
    items: list[Any] | None = None
    count = line = start = 0
    event: Any = None
    try:
        while (event := next_event()) is not None:
            kind = type(event)
            if kind is ScalarEvent:
                if event.anchor or event.tag:
                    raise ValueError("tags are not allowed" if event.tag else "anchors are not allowed")
                value = event.value
                if type(container) is dict and key is None:
                    if value in container:
                        raise ValueError("duplicate key")
                    if value == "<<" and not event.style:
                        raise ValueError("merge keys are not allowed")
                    key = value
                    left -= 1
                    continue
                if not event.style and (not value or value[0] in _NUMBER_STARTS or value[0] in _WORD_STARTS):
                    value = plain(value)
            elif kind is MappingStartEvent or kind is SequenceStartEvent:
                if event.anchor or event.tag:
                    raise ValueError("tags are not allowed" if event.tag else "anchors are not allowed")
                if type(container) is dict and key is None:
                    raise ValueError("a key must be a scalar")
                if len(parents) >= limits.depth:
                    raise ValueError(f"nested deeper than {limits.depth}")
                opened: Any = {} if kind is MappingStartEvent else []
                if container is None:
                    start = event.start_mark.line
                elif container is items:
                    line = event.start_mark.line
                elif key == "items" and len(parents) == 1 and kind is SequenceStartEvent:
                    items = opened
                parents.append((container, key))
                container, key = opened, None
                left -= 1
                if left < 0:
                    raise ValueError("too many nodes in one object or file")
                continue
            elif kind is MappingEndEvent or kind is SequenceEndEvent:
                value = container
                container, key = parents.pop()
                left += 1
            elif kind is AliasEvent:
                raise ValueError("aliases are not allowed")
            else:
                if kind is DocumentEndEvent:
                    items, count = None, 0
                continue
            left -= 1
            if left < 0:
                raise ValueError("too many nodes in one object or file")
            if type(container) is dict:
                container[key] = value
                key = None
                continue
            if container is not None and container is not items:
                container.append(value)
                continue
            budget.nodes -= allowed - left
            if container is items and items is not None:
                yield Part(line, value, count)
                count += 1
            else:
                yield Part(start, value)
            left = allowed = min(limits.object_nodes, budget.nodes)
    except yaml.YAMLError as error:
        raise _syntax_error(error) from None
    except DocumentError:
        raise
    except (ValueError, UnicodeError, RecursionError) as error:
        raise DocumentError(event.start_mark.line if event else 0, str(error)) from None


def field_lines(text: bytes, wanted: Collection[tuple[int, str]]) -> dict[tuple[int, str], int]:
    """Where fields stand: (line of the object, `spec.ports[0].port`) -> line, all counted from 0.

    A field that is not there gets the line of the nearest collection around it. This is a second pass over the text,
    made only when there is something to report, so that reading need not remember positions.
    """
    ancestry = {(line, part) for line, path in wanted for part in _ancestors(path)}
    found: dict[tuple[int, str], int] = {}
    stack: list[list[Any]] = []  # [path of the collection, is it a mapping, next index or pending key, object's line]
    try:
        next_event = _events(text)
        while (event := next_event()) is not None:
            kind = type(event)
            if kind is MappingEndEvent or kind is SequenceEndEvent:
                stack.pop()
                continue
            if kind not in (ScalarEvent, MappingStartEvent, SequenceStartEvent):
                continue
            at = event.start_mark.line
            path, owner = "", at
            if stack:
                top = stack[-1]
                owner = top[3]
                if top[1] and top[2] is None:
                    top[2] = event.value if kind is ScalarEvent else ""
                    path = f"{top[0]}.{top[2]}" if top[0] else str(top[2])
                    if (owner, path) in ancestry:
                        found.setdefault((owner, path), at)
                    continue
                if top[1]:
                    path, top[2] = (f"{top[0]}.{top[2]}" if top[0] else str(top[2])), None
                else:
                    path, top[2] = f"{top[0]}[{top[2]}]", top[2] + 1
                if len(stack) == 2 and stack[1][0] == "items" and not top[1]:
                    path, owner = "", at
            if (owner, path) in ancestry:
                found.setdefault((owner, path), at)
            if kind is not ScalarEvent:
                stack.append([path, kind is MappingStartEvent, None if kind is MappingStartEvent else 0, owner])
    except (yaml.YAMLError, ValueError, IndexError):
        pass  # a text that broke half way still tells the lines before the break
    return {
        (line, path): next((found[line, part] for part in _ancestors(path) if (line, part) in found), line)
        for line, path in wanted
    }


def _ancestors(path: str) -> Iterator[str]:
    """`a.b[0]`, `a.b`, `a`, and nothing more: the object itself is the caller's default."""
    while path:
        yield path
        path = path[: max(path.rfind("."), path.rfind("["), 0)]
