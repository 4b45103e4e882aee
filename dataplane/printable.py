"""User-made text on its way out: to terminals, logs, status and error messages.

Names, annotations and broken values come from whoever may write an object. A raw ESC or CR in them rewrites the
administrator's screen (CVE-2021-25743), a newline forges a log line, a bidirectional override makes one name look
like another. Everything of that kind leaves the agent through these two functions.
"""


def printable(text: str, limit: int = 256) -> str:
    r"""`text` on one line with everything invisible or active escaped (`\x1b`, `\u202e`), cut after `limit` characters.

    Kept as they are: what `str.isprintable` allows, that is letters, digits, punctuation, symbols, marks and the plain
    space. Escaped: C0 and C1 controls, line and paragraph separators, bidirectional and zero-width controls, other
    spaces, lone surrogates, unassigned and private code points. A cut text says how much is missing.
    """
    rest = len(text) - limit
    if rest > 0:
        text = text[:limit]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return f"{text}… ({rest} more characters)" if rest > 0 else text


def shown(value: object, limit: int = 60) -> str:
    """A decoded JSON value as an error message names it: text in quotes, numbers as they are, containers by kind."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            cut = value[: limit + 1]
            quoted = printable(cut[:limit].replace("\\", "\\\\").replace('"', '\\"'), 2 * limit)
            rest = len(value) - limit
            return f'"{quoted}"… ({rest} more characters)' if rest > 0 else f'"{quoted}"'
        case int():
            # str() of an int of more than 4300 digits raises, and one of 100 tells the reader nothing.
            return str(value) if value.bit_length() < 128 else "a number of more than 38 digits"
        case float():
            return repr(value)
        case dict():
            return "a mapping"
        case list() | tuple():
            return "a list"
        case _:
            return f"a {printable(type(value).__name__)}"
