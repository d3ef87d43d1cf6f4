"""Integers that stand as text, and texts that stand as integers: the same ids in every format, and in scoring."""

import json

import pyarrow as pa
import pytest

from mmlrec.encoding.encoder import Encoder
from tests.preprocessing.decoded import content
from tests.preprocessing.table_fake import small
from tests.preprocessing.test_table import make, vocabulary
from tests.preprocessing.test_tables_as_they_come import FORMS, told, write

TEXTS = ["7", "-7", "7.0", "007", str(2**53 + 1), str(-(2**63)), "", "NA", None]


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_integers_as_text_are_the_same_ids_in_every_format_and_in_scoring(several, tmp_path):
    """As integers are: which of the two a line has does not count, and no digit gets lost."""
    integers = [7, -7, 7, 7, 2**53 + 1, -(2**63), None, None, None] * 6
    texts = TEXTS * 6
    mixed = [value if row % 2 else text for row, (text, value) in enumerate(zip(texts, integers, strict=True))]
    numbers = {"x": [row + 0.5 for row in range(54)], "k": list(range(54)), "y": [row % 2 for row in range(54)]}
    others = {name: [str(value) for value in column] for name, column in numbers.items()}

    def ids(cells):
        return [[cell, cell] for cell in cells] if several else cells

    in_csv = ['"{}"'.format(json.dumps([text, text]).replace('"', '""')) for text in texts] if several else texts
    forms = {
        "csv": ("csv", {"u": in_csv, **others}),
        "texts": ("json", {"u": ids(texts), **others}),
        "integers": ("json", {"u": ids(integers), **numbers}),
        "mixed": ("json", {"u": ids(mixed), **numbers}),
        "parquet texts": ("parquet", {"u": ids(texts), **others}),
        "parquet": ("parquet", {"u": ids(integers), **numbers}),
    }
    features = {"u": {"kind": "ids" if several else "id", "type": "int"}, "x": {"kind": "number"}}
    made = {}
    for name, (form, columns) in forms.items():
        (tmp_path / name).mkdir()
        config = write(tmp_path / name, form, columns, features=features, missing=["NA"], keys={"k": {"type": "int"}})
        make(config.parent, tmp_path / name / "out")
        made[name] = content(tmp_path / name / "out")
        assert made[name] == made["csv"], name
    assert set(vocabulary(tmp_path / "csv" / "out", "u")[0]) == {7, -7, 2**53 + 1, -(2**63)}
    encoder = Encoder.load(tmp_path / "csv" / "out")
    as_text, as_such = (
        encoder.inputs(pa.table({"u": pa.array(ids(cells)), "x": x}))
        for cells, x in ((texts, others["x"]), (integers, numbers["x"]))
    )
    assert as_text.ids["u"][0].tolist() == as_such.ids["u"][0].tolist()
    assert as_text.dense.tolist() == as_such.dense.tolist()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", ["7.5", "+7", "1,000", "1 000", "0x7", "1e3", "7_0", "٧"])
def test_a_text_that_is_no_integer_is_a_bad_row(form, text, tmp_path, capsys):
    columns = {"u": [str(row) for row in range(30)] + [text], "x": list(range(31)), "y": [row % 2 for row in range(31)]}
    if form == "csv":
        columns["u"][-1] = f'"{text}"'
    features = {"u": {"kind": "id", "type": "int"}, "x": {"kind": "number"}}
    message = told(capsys, write(tmp_path, form, columns, features=features), tmp_path / "out")
    assert f"line {32 if form == 'csv' else 31}: u " in message
    assert f"found {text}" in message or f"found '{text}'" in message


@pytest.mark.parametrize("form", ["csv", "json"])
def test_integers_in_a_json_list_are_ids_of_text(form, tmp_path):
    """As those of a list column of Parquet."""
    lists = [[1, "b", True], [2], [], ["1"]] * 10
    columns = {"u": lists, "y": [row % 2 for row in range(40)]}
    if form == "csv":
        columns["u"] = ['"{}"'.format(json.dumps(each).replace('"', '""')) for each in lists]
    make(write(tmp_path, form, columns, features={"u": {"kind": "ids"}}).parent, tmp_path / "out")
    assert set(vocabulary(tmp_path / "out", "u")[0]) == {"1", "2", "b", "true"}


@pytest.mark.parametrize("ascii_only", [True, False])
def test_keys_that_are_escaped_are_those_of_the_columns(ascii_only, tmp_path):
    """In lines that are mended, and where a key comes late."""
    rows = [
        {"größe": str(row % 7) if row % 2 else row % 7, "y": row % 2} | ({"späte": row} if row > 1500 else {})
        for row in range(1600)
    ]
    text = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    features = {"u": {"kind": "id", "type": "int", "column": "größe"}, "x": {"kind": "number", "column": "späte"}}
    make(small(tmp_path, text, "rows.jsonl", features=features).parent, tmp_path / "out")
    assert set(vocabulary(tmp_path / "out", "u")[0]) == set(range(7))
