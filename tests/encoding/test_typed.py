"""Lists and cells of every Arrow type, whole and sliced."""

import datetime

import pyarrow as pa
import pytest

from mmlrec.encoding.cells import Cells
from mmlrec.encoding.typed import as_lists, as_type

KINDS = (pa.int64(), pa.int16(), pa.uint8(), pa.float64(), pa.float16(), pa.string(), pa.large_string(), pa.string_view())
LISTS = (pa.list_, pa.large_list, pa.list_view, pa.large_list_view, lambda kind: pa.list_(kind, 2))


@pytest.mark.parametrize("of_kind", LISTS)
@pytest.mark.parametrize("kind", KINDS)
def test_lists_of_every_type_hold_the_same_ids(of_kind, kind):
    text = "string" in str(kind)
    rows = [[1, 2], None, [3, None], [4, 5]]
    given = [row and [each if each is None or not text else str(each) for each in row] for row in rows]
    lists = pa.array(given, of_kind(kind))
    for start in range(3):
        found, faults = as_lists(lists.slice(start), pa.int64(), None, "c", Cells())
        assert found.to_pylist() == [row or [] for row in rows[start:]]
        assert all(good.all() for good, _, _ in faults)


def test_a_fault_in_a_list_is_that_of_its_row():
    lists = pa.array([[1.0], None, [2.5, 3.0], [], [0.5]]).slice(1)
    _, faults = as_lists(lists, pa.int64(), None, "c", Cells())
    assert [good.tolist() for good, _, _ in faults] == [[True, False, True, False]]


ISO = datetime.datetime(2024, 5, 31, 12)
CASES = [
    (pa.array([True, None]), pa.float64(), [1.0, None]),
    (pa.array([True, None]), pa.string(), ["true", None]),
    (pa.array([1.0, float("nan"), None]), pa.int64(), [1, None, None]),
    (pa.array([float("nan"), None]), pa.string(), [None, None]),
    (pa.array([float("nan"), 2.5]), pa.float64(), [None, 2.5]),
    (pa.array([7, None], pa.int8()), pa.string(), ["7", None]),
    (pa.array([2**63 - 1, 2**63 + 1025], pa.uint64()), pa.float64(), [float(2**63), float(2**63 + 2048)]),
    (pa.array([2**53 + 1]), pa.float64(), [float(2**53)]),
    (pa.array([" 7.00 ", "-0", ""]), pa.int64(), [7, 0, None]),
    (pa.array(["1e3", ".5", " TRUE", "false", ""]), pa.float64(), [1000.0, 0.5, 1.0, 0.0, None]),
    (pa.array(["", " a"]), pa.string(), ["", " a"]),
    (pa.array([ISO.date(), None]), pa.string(), ["2024-05-31", None]),
    (pa.array([ISO], pa.timestamp("s")), pa.string(), ["2024-05-31 12:00:00"]),
    (pa.nulls(2), pa.int64(), [None, None]),
]


@pytest.mark.parametrize(("given", "kind", "right"), CASES)
def test_cells_of_one_type_as_another(given, kind, right):
    found, faults = as_type(given, kind, "c", Cells())
    assert found.type == kind
    assert found.to_pylist() == right
    assert all(good.all() for good, _, _ in faults)


def test_marks_of_missing_values_name_numbers_texts_and_elements():
    rules = Cells({"c": ("-1", "NULL")}, strip=True)
    for given in (pa.array([-1, 2]), pa.array([-1.0, 2.0]), pa.array(["-1", "2"]), pa.array([" NULL ", "2.0"])):
        assert as_type(given, pa.int64(), "c", rules)[0].to_pylist() == [None, 2]
    assert as_type(pa.array(["-1.0", "2"]), pa.float64(), "c", rules)[0].to_pylist() == [None, 2.0]
    decimal = Cells({"c": ("-1.0", "1")})
    for given in (pa.array([-1, 2, 1]), pa.array(["-1", "2", "1"]), pa.array([-1, 2, 1], pa.decimal128(5, 1))):
        assert as_type(given, pa.float64(), "c", decimal)[0].to_pylist() == [None, 2.0, None]
    assert as_type(pa.array([True, False]), pa.float64(), "c", decimal)[0].to_pylist() == [None, 0.0]  # as in files
    assert as_type(pa.array([-1, 2]), pa.int64(), "other", rules)[0].to_pylist() == [-1, 2]
    found, _ = as_lists(pa.array([[-1, 2], None]), pa.int64(), None, "c", rules)
    assert found.to_pylist() == [[None, 2], []]
