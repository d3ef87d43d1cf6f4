"""Raw rows of every kind to scores, against dictionaries and formulas; what is refused, by row and column."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from mmlrec import serving
from mmlrec.errors import DataError
from tests.serving.folders import DIM, LOOKUPS, ROWS, encoded_by_hand, raw_rows, scores_by_hand, tables, write_model


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A model, and what gives its scores by hand."""
    folder, contents = tmp_path_factory.mktemp("toy") / "model", tables("fp32", ROWS, DIM)
    weight = write_model(folder, contents)
    return serving.load(folder), lambda rows: scores_by_hand(encoded_by_hand(rows), contents, [LOOKUPS], weight)


def array(scores) -> np.ndarray:
    return np.array([[row["score.click"], row["score.buy"]] for row in scores]).reshape(-1, 2)


@pytest.mark.parametrize("num_rows", [0, 1, 200])
def test_dicts_frames_and_tables_give_the_same_scores(toy, num_rows):
    model, by_hand = toy
    rows = raw_rows(num_rows)
    before, expected = [dict(row) for row in rows], by_hand(rows)
    scores = model.score(rows)
    assert rows == before
    assert isinstance(scores, list)
    assert [list(row) for row in scores] == [["score.click", "score.buy"]] * num_rows
    np.testing.assert_allclose(array(scores), expected, atol=2e-6)
    if not num_rows:
        return
    frame = pd.DataFrame(rows).set_index(pd.Index([f"row-{row}" for row in range(num_rows)]))
    found = model.score(frame)
    assert isinstance(found, pd.DataFrame)
    assert list(found.columns) == ["score.click", "score.buy"]
    assert found.index.equals(frame.index)
    np.testing.assert_array_equal(found.to_numpy(), array(scores).astype(np.float32))
    table = pa.Table.from_pylist(rows)
    found = model.score(table)
    assert isinstance(found, pa.Table)
    np.testing.assert_array_equal(found.to_pandas().to_numpy(), array(scores).astype(np.float32))


def test_values_may_be_text_or_mixed_or_absent(toy):
    model, by_hand = toy
    rows = raw_rows(60)
    expected = by_hand(rows)
    texts = [{name: value if value is None else str(value) for name, value in row.items()} for row in rows]
    np.testing.assert_allclose(array(model.score(texts)), expected, atol=2e-6)
    mixed = [text if at % 2 else row for at, (row, text) in enumerate(zip(rows, texts, strict=True))]
    for row in mixed:
        row["tags"], row["marks"] = (eval(str(row[name])) for name in ("tags", "marks"))
    mixed[3]["tags"] = [str(tag) for tag in mixed[3]["tags"]]
    for row in mixed[4:]:
        if row["user"] is None:
            del row["user"]
    np.testing.assert_allclose(array(model.score(mixed)), expected, atol=2e-6)


def test_a_frame_as_pandas_reads_it(toy, tmp_path):
    model, by_hand = toy
    rows = [row | {"tags": [101], "marks": []} for row in raw_rows(40)]
    frame = pd.DataFrame(rows)
    frame[["tags", "marks"]] = frame[["tags", "marks"]].map(str)
    frame.to_csv(tmp_path / "rows.csv", index=False)
    found = model.score(pd.read_csv(tmp_path / "rows.csv"))
    np.testing.assert_allclose(found.to_numpy(), by_hand(rows), atol=2e-6)


def broken(change):
    rows = [{"user": "u1", "price": 1.0, "tags": [101], "marks": [], "age": 30, "place": "home"} for _ in range(4)]
    change(rows)
    return rows


def put(name, value):
    return lambda rows: rows[2].update({name: value})


REFUSED = {
    "scenario": (put("place", "street"), r"row 2 .*place holds no value of the scenarios, found street"),
    "no scenario": (put("place", None), r"row 2 .*place"),
    "word": (put("price", "cheap"), r"row 2 .*price must be a number, found cheap"),
    "object": (put("user", {"id": 1}), r"row 2 .*user must be text or an integer, found \{'id': 1\}"),
    "list": (put("age", [3]), r"row 2 .*age must be a number, found \[3\]"),
    "fraction": (put("user", 7.5), r"row 2 .*user must be text or an integer, found 7.5"),
    "fraction beside integers": (
        lambda rows: [row.update(user=7.5 if at == 2 else 7) for at, row in enumerate(rows)],
        r"row 2 .*user must be text or an integer, found 7.5",
    ),
    "no list": (put("tags", 5), r"row 2 .*tags must be a list in each row, found 5"),
    "list of lists": (put("tags", [[5]]), r"row 2 .*tags must be an integer, found \[5\]"),
    "list of words": (put("tags", ["x"]), r"row 2 .*tags must be an integer"),
    "infinite": (put("price", float("inf")), r"row 2 .*price must be a finite number"),
    "surrogate": (put("user", "\ud800"), r"row 2 .*user is no text"),
    "no row": (lambda rows: rows.__setitem__(2, 7), r"row 2 .*an object with a value for each column is needed, found 7"),
    "no column": (
        lambda rows: [row.update(Age=row.pop("age"), more=1) for row in rows],
        r"there is no column 'age', which feature age is made of\. Did you mean 'Age'\? Columns: .*more",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_names_row_and_column(toy, name):
    change, words = REFUSED[name]
    rows = broken(change)
    with pytest.raises(DataError, match=words):
        toy[0].score(rows)


def test_without_scenarios_in_the_model_none_is_needed(tmp_path):
    contents = tables("fp32", ROWS, DIM)
    weight = write_model(tmp_path / "model", contents, multi_scenario=False)
    model, rows = serving.load(tmp_path / "model"), raw_rows(40)
    expected = scores_by_hand(encoded_by_hand(rows), contents, [LOOKUPS], weight, multi_scenario=False)
    for given in (rows, [row | {"place": "street"} for row in rows], [row | {"place": None} for row in rows]):
        np.testing.assert_allclose(array(model.score(given)), expected, atol=2e-6)
    without = pd.DataFrame(rows).drop(columns="place")
    np.testing.assert_allclose(model.score(without), expected, atol=2e-6)
    assert "place" not in model.columns
    assert "place" not in model.example()


def test_marks_of_pandas_for_missing_cells_beside_cells_of_several_types(toy):
    rows = broken(put("user", 7))
    rows[1]["user"] = None
    frame = pd.DataFrame(rows)
    frame.loc[1, "user"] = pd.NA
    np.testing.assert_array_equal(toy[0].score(frame).to_numpy(), array(toy[0].score(rows)).astype(np.float32))


def test_wrong_kinds_of_rows(toy):
    with pytest.raises(DataError, match="rows must be a pandas DataFrame, an Arrow table or a list of dicts, found dict"):
        toy[0].score({"user": ["u1"]})
    frame = pd.DataFrame(broken(lambda rows: None))
    with pytest.raises(DataError, match="column 'age' is there 2 times"):
        toy[0].score(pd.concat([frame, frame[["age"]]], axis=1))


def test_huge_integers_are_ids_of_text_and_no_numbers_of_64_bits(toy):
    model, _ = toy
    scores = model.score(broken(put("user", 2**70)))
    assert scores[2] != scores[1]
    with pytest.raises(DataError, match=r"row 2 .*tags does not fit into 64 bits"):
        model.score(broken(put("tags", [2**70])))


def test_the_example_of_the_card_scores(toy):
    row = toy[0].example()
    assert row == {"user": "u1", "price": 0.0, "tags": [100], "marks": None, "age": 20.0, "place": "home"}
    assert len(toy[0].score([row])) == 1
