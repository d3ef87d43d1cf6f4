"""Conditions against Python's own evaluation, row by row; missing values as in SQL."""

import pyarrow as pa
import pytest

from preprocessing.rows.expressions import has_operator, parse_condition, quoted_column
from preprocessing.rows.own_columns import in_condition

ROWS = [
    {"a": a, "b": b, "s": s, "on": on}
    for a in (-1, 0, 3, 4, 2**53 + 1)
    for b in (0.5, 3.0)
    for s in ("x", "y z", "yes")
    for on in (True, False)
]
TABLE = pa.Table.from_pylist(ROWS)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "a > 3",
            "3 < a",
            "a >= -1",
            "b != 3",
            "b == 3",
            "a in [3, 4]",
            "a not in (3, 4.5)",
            "s == 'x'",
            's in ["y z", "yes"]',
        ),
        *("a > 0 and b < 1", "a > 0 or b < 1 and s == 'x'", "not (a > 0 or b < 1)", "0 < a <= 4", "a == 9007199254740993"),
        *("on == True", "a>3", " a > 3 ", "on in [True]", "on in [False, True]"),
    ],
)
def test_equals_python(text):
    condition = parse_condition(text.strip())
    assert condition.evaluate(TABLE).to_pylist() == [eval(text.strip(), {}, row) for row in ROWS]


def test_missing_values_leave_open_what_depends_on_them():
    # An empty text is missing, as everywhere.
    table = pa.table({"a": pa.array([1, 5, None, None]), "s": ["x", "", "x", "y"]})
    for text, expected in (
        ("a > 3", [False, True, None, None]),
        ("a in [1, 2]", [True, False, None, None]),
        ("a not in [1, 2]", [False, True, None, None]),
        ("a > 3 and s == 'x'", [False, None, None, False]),
        ("a > 3 or s == 'x'", [True, True, True, None]),
        ("not a > 3", [True, False, None, None]),
        ("s != 'x'", [False, None, False, True]),
        ("s in ['x', '']", [True, None, True, False]),
    ):
        assert parse_condition(text).evaluate(table).to_pylist() == expected


def test_integers_that_float64_does_not_tell_apart_are_compared_as_integers():
    large = 2**53 + 1
    condition = parse_condition(f"a == {large} or a < 1")
    assert condition.columns == {"a": pa.int64()}
    table = pa.table({"a": [large - 1, large, large + 1, 0]})
    assert condition.evaluate(table).to_pylist() == [False, True, False, True]
    assert parse_condition("a == 9007199254740991").columns == {"a": pa.float64()}


def test_columns_are_known_with_their_types():
    condition = parse_condition("a > 3 and s in ['x'] or on == true")
    assert condition.columns == {"a": pa.float64(), "s": pa.string(), "on": pa.bool_()}


ODD_NAMES = ["my label", "click-rate", "it's", 'say "x"', "a`b", "true", "clicked in app", "a > 1", "1st", "größe", "in", "_"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_columns_of_any_name_stand_in_backquotes(name):
    quoted = f"`{name.replace('`', '``')}`"
    table = pa.table({name: [1, 3, None], "other one": ["it's `x`", "y", "y"]})
    for text, expected in (
        (f"{quoted} > 1", [False, True, None]),
        (f"2 > {quoted}", [True, False, None]),
        (f'{quoted} in [3] or `other one` == "it\'s `x`"', [True, True, None]),
        (f"not {quoted} == 1 and {quoted} < 5", [False, True, None]),
    ):
        condition = parse_condition(text)
        assert set(condition.columns) <= {name, "other one"}
        assert condition.evaluate(table).to_pylist() == expected
    assert has_operator(f"{quoted} > 1")
    assert not has_operator(quoted)
    assert quoted_column(f" {quoted} ") == name
    assert quoted_column(f"{quoted} > 1") is None
    assert in_condition(name) == (name if name in ("_",) else quoted)


def test_a_name_in_backquotes_is_the_same_column():
    assert parse_condition("`a` > 3 and on == true").facts() == parse_condition("a > 3 and `on` == true").facts()
    assert parse_condition("`true` == true").columns == {"true": pa.bool_()}


@pytest.mark.parametrize(
    ("text", "likely"),
    [
        ("my label > 0", "`my label` > 0"),
        ("click-rate>=0.5 and b < 1", "`click-rate`>=0.5 and b < 1"),
        ("2nd choice not in [1, 2]", "`2nd choice` not in [1, 2]"),
        ("clicked in app", "`clicked in app`"),
    ],
)
def test_a_name_without_its_backquotes_is_told(text, likely):
    with pytest.raises(ValueError, match=r"backquotes\. ") as error:
        parse_condition(text)
    assert f'"{likely}"' in str(error.value)


def test_booleans_are_compared_with_columns_that_are_read_as_numbers():
    table = pa.table({"a": pa.array([1.0, 0.0, None]), "b": pa.array([0, 1, 2])})
    assert parse_condition("a == true").evaluate(table).to_pylist() == [True, False, None]
    assert parse_condition("b == false or b in [true]").evaluate(table).to_pylist() == [True, True, False]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *(
            (text, "a condition compares columns with constants")
            for text in ("a", "'x'", "a + 1 > 2", "a == b", "f(a) > 1", "a.b > 1")
        ),
        *(
            (text, "a condition compares columns with constants")
            for text in ("a is 3", "3 in a", "a > b > 1", "[a for a in b] == 1")
        ),
        *((text, "cannot be read") for text in ("a >", "a = 3", "a > 1; b", "import os", "a > 1 and")),
        ("a in 3", "a needs a list such as [1, 2] beside it"),
        ("a in []", "a needs a list such as [1, 2] beside it"),
        ("a > [1]", "a needs one constant beside it"),
        ("a in [1, 'x']", "constants beside a must all be numbers, all strings, or true or false"),
        ("a == None", "constants beside a must all be"),
        ("a == 'x' or a > 3", "compares a with constants of two kinds"),
        ("a > 9223372036854775808", "does not fit into 64 bits"),
    ],
)
def test_what_is_no_condition(text, words):
    with pytest.raises(ValueError, match=r".") as error:
        parse_condition(text)
    assert words in str(error.value)
