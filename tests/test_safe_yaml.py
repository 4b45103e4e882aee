"""What the YAML reader makes of a text, and what it refuses."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.manifest_text import chunks, objects
from dataplane.safe_yaml import Budget, DocumentError, Limits, field_lines, plain, read


def values(text: str, limits: Limits = Limits()) -> list[object]:  # noqa: B008 (frozen)
    return [part.value for part in read(text.encode(), Budget(limits))]


def refusal(text: str | bytes, limits: Limits = Limits()) -> tuple[int, str]:  # noqa: B008 (frozen)
    raw = text.encode() if isinstance(text, str) else text
    with pytest.raises(DocumentError) as caught:
        list(read(raw, Budget(limits)))
    return caught.value.line + 1, caught.value.reason


PLAIN_SCALARS = [
    # text, value: the core schema of YAML 1.2 (§10.3.2), not YAML 1.1
    ("null", None),
    ("~", None),
    ("", None),
    ("Null", None),
    ("nULL", "nULL"),
    ("true", True),
    ("False", False),
    ("yes", "yes"),
    ("no", "no"),
    ("on", "on"),
    ("y", "y"),
    ("0", 0),
    ("010", 10),
    ("-7", -7),
    ("+7", 7),
    ("0o10", 8),
    ("0x1F", 31),
    ("0b1", "0b1"),
    ("1_000", "1_000"),
    ("1:30", "1:30"),
    ("2024-05-01", "2024-05-01"),
    ("10.0.0.1", "10.0.0.1"),
    ("1.5", 1.5),
    (".5", 0.5),
    ("1e3", 1e3),
    ("-", "-"),
    (".", "."),
    ("<<", "<<"),
    ("=", "="),
    ("18446744073709551615", (1 << 64) - 1),
    ("٣", "٣"),
]


@pytest.mark.parametrize(("text", "value"), PLAIN_SCALARS)
def test_plain_scalars_follow_the_core_schema(text: str, value: object) -> None:
    assert plain(text) == value
    assert type(plain(text)) is type(value)


@pytest.mark.parametrize("text", ["18446744073709551616", "9" * 100_000, "0x" + "f" * 10**6, ".nan", "-.inf", "1e999"])
def test_numbers_json_cannot_carry_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="number"):
        plain(text)


def test_keys_are_always_text() -> None:
    assert values("80: a\ntrue: b\n~: c\non: d") == [{"80": "a", "true": "b", "~": "c", "on": "d"}]


def test_quoted_and_block_scalars_are_always_text() -> None:
    assert values("a: '1'\nb: \"null\"\nc: |\n  12\nd: >-\n  true\n'<<': x") == [
        {"a": "1", "b": "null", "c": "12\n", "d": "true", "<<": "x"}
    ]


REFUSED = [
    # text, line, reason
    ("a: 1\nb: &x 2", 2, "anchors are not allowed"),
    ("a: 1\nb: *x", 2, "aliases are not allowed"),
    ("a: !!str 1", 1, "tags are not allowed"),
    ("a: !!python/object/apply:os.system [id]", 1, "tags are not allowed"),
    ("x: {a: 1}\n<<: {b: 1}", 2, "merge keys are not allowed"),
    ("a: 1\nb: 2\na: 3", 3, "duplicate key"),
    ("a: 1\n? [x]\n: 2", 2, "a key must be a scalar"),
    ("a: 1\nb: {", 3, "not YAML: while parsing a flow node, did not find expected node content"),
    ("a: .inf", 1, ".inf is no number that JSON knows"),
]


@pytest.mark.parametrize(("text", "line", "reason"), REFUSED)
def test_refused_with_line_and_reason(text: str, line: int, reason: str) -> None:
    found = refusal(text)
    assert found[1] == reason
    assert abs(found[0] - line) <= (1 if reason.startswith("not YAML") else 0)


@pytest.mark.parametrize("text", [b"\xff\xfea\x00", b"a: \xff\xff", b"a: \x00", b"a: \x1b[31m", b"\xfe\xff\x00a"])
def test_anything_but_clean_utf8_is_refused(text: bytes) -> None:
    assert "UTF-8" in refusal(text)[1] or "not YAML" in refusal(text)[1]


def test_depth_is_bounded_before_anything_recurses() -> None:
    assert values("[" * 32 + "]" * 32)
    assert refusal("[" * 33 + "]" * 33)[1] == "nested deeper than 32"
    assert refusal("[" * 1_000_000)[1] == "nested deeper than 32"
    assert refusal("- " * 100_000)[1] == "nested deeper than 32"
    assert refusal("{a: " * 100_000)[1] == "nested deeper than 32"


def test_nodes_are_bounded_per_object_and_per_file() -> None:
    limits = Limits(object_nodes=10)
    assert values("[1,2,3,4,5,6,7,8,9]", limits)
    assert refusal("[1,2,3,4,5,6,7,8,9,10]", limits)[1] == "too many nodes in one object or file"
    budget = Budget(Limits(file_nodes=8))
    assert list(read(b"[1,2,3]", budget))
    with pytest.raises(DocumentError, match="too many nodes"):
        list(read(b"[1,2,3,4,5]", budget))


def test_items_of_a_list_come_one_by_one_so_that_no_tree_of_all_exists() -> None:
    text = ("items:\n" + "- {a: 1, b: [x, y, z], c: text}\n" * 20_000 + "kind: List\n").encode()
    tracemalloc.start()
    count = sum(1 for part in read(text, Budget(Limits(object_nodes=50))) if part.item >= 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 4 << 20


def test_lines_of_fields() -> None:
    text = b"apiVersion: v1\nitems:\n- spec:\n    ports:\n    - name: a\n      port: 1\n- {spec: 5}\nkind: List\n"
    wanted = {(2, "spec.ports[0].port"), (2, "spec.ports[0].protocol"), (2, ""), (6, "spec"), (2, "metadata.name")}
    assert field_lines(text, wanted) == {
        (2, "spec.ports[0].port"): 5,
        (2, "spec.ports[0].protocol"): 4,
        (2, ""): 2,
        (6, "spec"): 6,
        (2, "metadata.name"): 2,
    }


def whole_and_cut(text: str) -> tuple[object, object]:
    """Every value of a text read in one piece, and read chunk by chunk; "broken" when any of it cannot be read."""
    try:
        whole: object = [value for value in values(text) if value is not None]
    except DocumentError:
        whole = "broken"
    try:
        cut: object = []
        for _, chunk in chunks(text.encode(), json=False):
            cut += [value for value in values(chunk.decode()) if value is not None]  # type: ignore[operator]
    except DocumentError:
        cut = "broken"
    return whole, cut


TRICKY = [
    "a: |\n  x\n---\nb: 1\n",
    'a: "x\n---\ny"\n',
    "a: 'x\n--- y'\n",
    "[a,\n---\nb]\n",
    "a: b\n---x: c\n",
    "--- |\n x\n---\n",
    "--- a\n--- b\n",
    "a: 1\n...\n---\nb: 2\n",
    "# c\n---\n# d\n---\n",
    "a:\n ---\n",
    "%YAML 1.2\n---\na: 1\n",
    "---\t\na: 1\n---\r\nb: 2\r\n",
    "a: x\n  y\n---\n- 1\n",
    "? a\n---\n: b\n",
    "--- >2\n  x\n---\n",
    "a: 1\n---",
    "#\r---a",
    "# \u2028---a",
]


@pytest.mark.parametrize("text", TRICKY)
def test_a_line_of_three_dashes_is_always_a_boundary(text: str) -> None:
    whole, cut = whole_and_cut(text)
    assert whole == cut


@given(
    st.lists(
        st.sampled_from(
            [
                "---",
                "---\n",
                "--- ",
                "---a",
                "\n",
                " ",
                "a: ",
                "b",
                "- ",
                "|\n",
                ">2\n",
                '"',
                "'",
                "[",
                "]",
                "#",
                ": ",
                "?",
                "\t",
                "...\n",
                "\r",
                "  x\n",
                "\u2028",
                "\x85",
            ]
        ),
        max_size=14,
    )
)
def test_cutting_never_changes_what_is_read(parts: list[str]) -> None:
    whole, cut = whole_and_cut("".join(parts))
    # What was broken stays broken, unless the break was only that the first document was cut off by `---`.
    assert whole in (cut, "broken")


JSON_TEXTS = [
    # text, number of documents
    ('{"kind":"A","apiVersion":"v1"}', 1),
    ('{"kind":"A"}\n{"kind":"B"}\n', 2),
    ('{\n "kind": "A"\n}\n\n{\n "kind": "B",\n "x": {}\n}\n', 2),
    ('{"a":"}\\n{"}\n{"b":[{},\n{}]}', 2),
    ('\ufeff{"kind":"A"}', 1),
    ("null", 0),
    ("", 0),
]


@pytest.mark.parametrize(("text", "count"), JSON_TEXTS)
def test_json_documents_by_line_or_pretty_printed(text: str, count: int) -> None:
    found = []
    for _, chunk in chunks(text.encode(), json=True):
        found += objects(chunk, True, Budget(Limits()), lambda line, value, kind: value)
    assert len(found) == count


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('{\n"a": 1,\n"b" 2}', 3, "not JSON: expected ':'"),
        ('{"a":\n[1,', 2, "not JSON: Input data was truncated"),
        ('{"a":1}{"b":2}', 1, "not JSON: trailing characters"),
        ('{"a":' + "[" * 200_000, 1, "nested too deeply"),
        ('{"a":NaN}', 1, "not JSON: invalid character"),
    ],
)
def test_broken_json_is_refused(text: str, line: int, reason: str) -> None:
    ((_, chunk),) = chunks(text.encode(), json=True)
    with pytest.raises(DocumentError) as caught:
        objects(chunk, True, Budget(Limits()), lambda line, value, kind: value)
    assert (caught.value.line + 1, caught.value.reason) == (line, reason)
