"""What leaves the agent of a text somebody else wrote."""

import pytest

from dataplane.printable import printable, shown

TEXTS = [
    # text, printed
    ("team-a/web", "team-a/web"),
    ("Grüße, 世界 🎉", "Grüße, 世界 🎉"),
    ("\x1b[2J\r\n", r"\x1b[2J\r\n"),
    ("\x9b31m", r"\x9b31m"),
    ("a\u202eb\u2028c\u200bd\ufeff", r"a\u202eb\u2028c\u200bd\ufeff"),
    ("\ud800", r"\ud800"),
    ("a" * 300, "a" * 256 + "… (44 more characters)"),
]


@pytest.mark.parametrize(("text", "printed"), TEXTS)
def test_nothing_invisible_or_active_gets_out(text: str, printed: str) -> None:
    assert printable(text) == printed
    assert printable(text).isprintable()


VALUES: list[tuple[object, str]] = [
    (None, "null"),
    (True, "true"),
    (80, "80"),
    (1 << 200, "a number of more than 38 digits"),
    (1.5, "1.5"),
    ('a"b\\\n', r'"a\"b\\\n"'),
    ("x" * 100, '"' + "x" * 60 + '"… (40 more characters)'),
    ({"a": 1}, "a mapping"),
    ([], "a list"),
]


@pytest.mark.parametrize(("value", "printed"), VALUES)
def test_values_as_error_messages_name_them(value: object, printed: str) -> None:
    assert shown(value) == printed


def test_a_number_too_long_for_str_is_no_trouble() -> None:
    assert shown(1 << 100_000) == "a number of more than 38 digits"
