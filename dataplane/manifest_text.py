"""The text of one manifest file cut into chunks, and chunks into objects. Pure.

A chunk is a piece of text whose reading depends on nothing outside it, so that equal chunks need reading only once.

* YAML is cut before every line that is `---`, or begins with `---` and white space. In YAML such a line ends whatever
  comes before it (§9.1.2, c-forbidden): no plain, quoted or block scalar and no flow collection can hold it, so a text
  that is cut there is either read as before or was broken before.
* JSON is cut where a `}` is followed, after a line break, by a `{`: inside a document a comma would stand between,
  and inside a string no line break can. One document per line, or several pretty-printed ones, both work.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import msgspec

from dataplane import kubernetes_wire as wire
from dataplane.safe_yaml import Budget, DocumentError, read

_T = TypeVar("_T")

_YAML_CUT = re.compile(rb"\n(?=---[ \t\r\n])")
_JSON_CUT = re.compile(rb"\}[ \t\r]*\n\s*(?=\{)")
# a comment ends at any line break of YAML 1.1; one with other than ASCII characters might hold one of the rarer kinds
_PREAMBLE = re.compile(rb"\s*(?:(?:#|%YAML[ \t]+1\.)[^\r\n\x80-\xff]*(?:[\r\n]\s*|\Z))*")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BETWEEN = re.compile(rb"[\s,]*")
_BYTE = re.compile(r" \(byte (\d+)\)\Z")


def is_json(name: str, text: bytes) -> bool:
    """By extension; a file of any other name is JSON when its first character is a brace."""
    lower = name.lower()
    if lower.endswith((".yaml", ".yml")):
        return False
    return lower.endswith(".json") or text[:256].removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"{")


def chunks(text: bytes, json: bool) -> Iterator[tuple[int, bytes]]:
    """(number of lines before it, chunk) for every chunk that holds more than white space, comments and `%YAML`."""
    begin = line = 0
    if text.startswith(_BYTE_ORDER_MARK):
        begin = len(_BYTE_ORDER_MARK)
    cut = _JSON_CUT if json else _YAML_CUT
    for found in cut.finditer(text):
        chunk = text[begin : found.end()]
        if json or line or not _PREAMBLE.fullmatch(chunk):
            yield line, chunk
        line += chunk.count(b"\n")
        begin = found.end()
    chunk = text[begin:] if begin else text
    if chunk and not chunk.isspace() and (json or not _PREAMBLE.fullmatch(chunk)):
        yield line, chunk


def objects(chunk: bytes, json: bool, budget: Budget, convert: Callable[[int, Any, str], _T | None]) -> list[_T]:
    """What `convert(line, value, kind)` makes of every object in a chunk, the items of lists one by one.

    `line` counts from 0 at the start of the chunk; `value` is decoded YAML or `msgspec.Raw` JSON; `kind` is the kind
    to assume when the object gives none. `convert` answers None for what is to be ignored. Raises DocumentError when
    any part of the chunk cannot be read.
    """
    return _json_objects(chunk, budget, convert) if json else _yaml_objects(chunk, budget, convert)


def _yaml_objects(chunk: bytes, budget: Budget, convert: Callable[[int, Any, str], _T | None]) -> list[_T]:
    made: list[_T | None] = []
    items: list[_T | None] = []
    nameless: list[tuple[int, int, Any]] = []
    for part in read(chunk, budget):
        budget.count_object()
        if part.item >= 0:
            # kubectl writes `items` before `kind`, so whether this is a List shows only at its end.
            if isinstance(part.value, dict) and "kind" not in part.value:
                nameless.append((len(items), part.line, part.value))
                items.append(None)
            else:
                items.append(convert(part.line, part.value, ""))
            continue
        kind = None
        if isinstance(part.value, dict):
            kind = wire.item_kind(part.value.get("apiVersion"), part.value.get("kind"))
        if kind is not None:
            for index, line, value in nameless:
                items[index] = convert(line, value, kind)
            made += items
        elif part.value is not None:
            made.append(convert(part.line, part.value, ""))
        items, nameless = [], []
    return [one for one in made if one is not None]


def _json_objects(chunk: bytes, budget: Budget, convert: Callable[[int, Any, str], _T | None]) -> list[_T]:
    limits = budget.limits
    # Every value of a JSON text is preceded by one of these, except the first.
    budget.nodes -= sum(map(chunk.count, (b",", b":", b"{", b"[")))
    if budget.nodes < 0:
        raise DocumentError(0, "too many nodes in one file")
    try:
        document = msgspec.json.decode(chunk, type=msgspec.Raw)
        head = _head(document)
        kind = wire.item_kind(head.api_version, head.kind) if head else None
        if head is None or kind is None:
            parts = [] if len(chunk) < 64 and chunk.strip() == b"null" else [(0, document)]
        else:
            parts = [(-1, item) for item in head.items or ()]
        made: list[_T] = []
        line = begin = inside = 0
        for known, raw in parts:
            budget.count_object()
            text = bytes(raw)
            if len(text) > limits.object_nodes and sum(map(text.count, (b",", b":", b"{", b"["))) > limits.object_nodes:
                raise DocumentError(line, "too many nodes in one object")
            if known < 0:
                at = _BETWEEN.match(chunk, begin).end() if begin else 0  # type: ignore[union-attr]
                if not chunk.startswith(text, at):
                    at = chunk.find(text, at)
                line += chunk.count(b"\n", begin, at) + inside
                inside = text.count(b"\n")
                begin = at + len(text)
            one = convert(line, raw, kind or "")
            if one is not None:
                made.append(one)
        return made
    except msgspec.DecodeError as error:
        where = _BYTE.search(str(error))
        end = int(where[1]) if where else len(chunk.rstrip())
        reason = str(error).removeprefix("JSON is malformed: ")
        raise DocumentError(chunk.count(b"\n", 0, end), f"not JSON: {_BYTE.sub('', reason)}") from None
    except UnicodeDecodeError as error:
        raise DocumentError(0, f"not readable as UTF-8 text: {error.reason}") from None
    except RecursionError:
        raise DocumentError(0, "nested too deeply") from None


def _head(document: msgspec.Raw) -> wire.Head | None:
    try:
        return wire.decode(document, wire.Head)
    except wire.FieldError:
        return None
