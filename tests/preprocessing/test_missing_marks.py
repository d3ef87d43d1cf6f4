"""Tables of one's own as others write them: marks of missing values, blanks, comments, 7.0, missing numbers."""

import json
import random
import re
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlrec.encoding.cells import Cells
from mmlrec.exact_sums import exact_sum
from mmlrec.schema import DatasetManifest
from preprocessing.command_line import main
from preprocessing.datasets.table import Table
from preprocessing.encoding.encoder import Mean
from preprocessing.engines import spark_pieces
from preprocessing.reading import raw_files
from preprocessing.reading.raw_files import RawFolder
from preprocessing.split_rules import COPY_COLUMN
from tests.preprocessing.decoded import content
from tests.preprocessing.movielens_fake import folder_bytes
from tests.preprocessing.table_fake import run, small
from tests.preprocessing.test_raw_files import CELLS, INT, NUMBER, TEXT
from tests.preprocessing.test_raw_files import read as read_raw
from tests.preprocessing.test_table import make, read, vocabulary

ROOT = Path(__file__).parents[2]
MARKS = ["NULL", "\\N", "NA", "nan", "?"]
FEATURES = {
    "row": {"kind": "number", "scale": "none"},
    "item": {"kind": "id"},
    "seller": {"kind": "id", "type": "int"},
    "tags": {"kind": "ids", "separator": "|"},
    "price": {"kind": "number", "indicator": True},
    "age": {"kind": "number", "buckets": 3},
}
COLUMNS = ["row", "item", "seller", "tags", "price", "age", "device", "y"]


def suspicious(told):
    """Whether any id is told to look like a missing value, or as if it was written in two ways."""
    return any(words in told for words in ("may mean a missing one", "blanks around it", "stand twice"))


def records(num_rows=300, seed=0):
    """Rows as they are meant; None = missing."""
    draw = random.Random(seed)
    return [
        {
            "row": row,
            "item": draw.choice([None, *(f"i{k}" for k in range(8))]),
            "seller": draw.choice([None, *range(5)]),
            "tags": [f"t{draw.randrange(4)}" for _ in range(draw.choice([0, 1, 3]))],
            "price": draw.choice([None, 1.0, 2.5, 8.0]),
            "age": draw.choice([None, *range(20, 60)]),
            "device": draw.choice([None, "a", "b"]),
            "y": draw.choice([None, 0, 1]),
        }
        for row in range(num_rows)
    ]


def marked_csv(rows, draw, blanks=""):
    """The rows as CSV with any mark for a missing value, and with `blanks` around cells."""
    lines = [",".join(COLUMNS)]
    for row in rows:
        cells = [row[name] for name in COLUMNS]
        cells[COLUMNS.index("tags")] = "|".join([*row["tags"], draw.choice(MARKS)]) if row["tags"] else None
        texts = [draw.choice(["", *MARKS]) if cell is None else str(cell) for cell in cells]
        lines.append(",".join(f"{blanks}{text}{blanks}" for text in texts))
    return "\n".join(lines) + "\n"


def config_of(**more):
    return {
        "features": FEATURES,
        "tasks": [{"name": "y", "label": "y"}],
        "scenario": {"column": "device", "values": ["a", "b"], "others": "drop"},
        "missing": MARKS,
    } | more


def check(out, rows):
    """Each row of the folder against what was meant."""
    found = {int(row["row"]): row for row in read(out)}
    wanted = {row["row"]: row for row in rows if row["device"]}
    assert sorted(found) == sorted(wanted)
    items, sellers, tags = (vocabulary(out, name)[0] for name in ("item", "seller", "tags"))
    train = [wanted[number] for number in found if found[number]["split"] == "train"]
    assert set(items) == {row["item"] for row in train} - {None}
    assert set(sellers) == {row["seller"] for row in train} - {None}
    prices = [Fraction(row["price"]) for row in train if row["price"] is not None]
    low, high = float(min(prices)), float(max(prices))
    mean = float(sum(prices) / len(prices))
    assert DatasetManifest.load(out).preprocessing["dense_fills"]["price"] == mean
    for number, row in wanted.items():
        got = found[number]
        assert got["item"] == items.get(row["item"], 0)
        assert got["seller"] == sellers.get(row["seller"], 0)
        assert got["tags"] == [tags.get(tag, 0) for tag in row["tags"]]
        price = mean if row["price"] is None else row["price"]
        assert got["price"] == np.float32((price - low) / (high - low))
        assert got["price_missing"] == (row["price"] is None)
        assert (got["age"] == 0) == (row["age"] is None)
        assert got["label.y"] == row["y"]
        assert got["sample.scenario"] == ["a", "b"].index(row["device"])


@pytest.mark.parametrize("blanks", ["", " ", "\t "])
def test_marks_are_missing_in_every_column_of_csv(blanks, tmp_path, capsys):
    rows = records()
    text = marked_csv(rows, random.Random(1), blanks)
    make(small(tmp_path, text, **config_of(strip=bool(blanks))).parent, tmp_path / "out")
    check(tmp_path / "out", rows)
    assert not suspicious(capsys.readouterr().out)


def test_marks_of_json_and_parquet(tmp_path):
    """In JSON a text stands where a number should; in Parquet numbers do that mean none."""
    rows, draw = records(), random.Random(2)
    lines = []
    for row in rows:
        cells = {name: draw.choice([*MARKS, None]) if value is None else value for name, value in row.items()}
        cells["tags"] = "|".join([*row["tags"], "NA"])
        cells["seller"] = float(cells["seller"]) if isinstance(cells["seller"], int) else cells["seller"]
        lines.append(json.dumps(cells))
    make(small(tmp_path, "\n".join(lines) + "\n", "rows.jsonl", **config_of()).parent, tmp_path / "json")
    check(tmp_path / "json", rows)
    frame = pd.DataFrame(rows)
    frame["tags"] = ["|".join([*row["tags"], "NA"]) for row in rows]
    frame["item"] = pd.Categorical([row["item"] or draw.choice(MARKS) for row in rows])
    frame["seller"] = [-1 if row["seller"] is None else row["seller"] for row in rows]
    table = pa.Table.from_pandas(frame)
    price = pa.array([np.nan if row["price"] is None else row["price"] for row in rows], pa.float32(), from_pandas=False)
    table = table.set_column(table.column_names.index("price"), "price", price)
    path = tmp_path / "raw" / "rows.parquet"
    pq.write_table(table, path)
    config = config_of(missing=[*MARKS, "-1"])
    make(small(tmp_path, path.read_bytes(), "rows.parquet", **config).parent, tmp_path / "parquet")
    check(tmp_path / "parquet", rows)
    assert content(tmp_path / "json") == content(tmp_path / "parquet")


def test_elements_of_lists(tmp_path):
    features = {"row": {"kind": "number", "scale": "none"}, "tags": {"kind": "ids"}, "codes": {"kind": "ids", "type": "int"}}
    lists = [(["a", "NA", "b"], [1, -1, 2]), (["?"], [-1]), ([], [3.0, 1])]
    rows = [(number, *lists[number % 3], number % 2) for number in range(60)]

    def quoted(value):
        return '"' + json.dumps(value).replace('"', '""') + '"'

    texts = [",".join([str(row[0]), quoted(row[1]), quoted(row[2]), str(row[3])]) for row in rows]
    texts[4] = texts[4].replace("[-1]", '[""NA"", -1]')
    config = small(tmp_path, "row,tags,codes,y\n" + "\n".join(texts) + "\n", features=features, missing=["NA", "?", "-1"])
    make(config.parent, tmp_path / "out")
    tags, codes = (vocabulary(tmp_path / "out", name)[0] for name in ("tags", "codes"))
    for row in read(tmp_path / "out"):
        kind = int(row["row"]) % 3
        assert row["tags"] == [tags[tag] for tag in (["a", "b"], [], [])[kind]]
        assert row["codes"] == [codes[code] for code in ([1, 2], [], [3, 1])[kind]]


def test_marks_of_single_columns(tmp_path):
    rows = "".join(f"{('NA', 'SE')[k % 2]},{k if k % 3 else 'NA'},{k % 2}\n" for k in range(60))
    features = {"country": {"kind": "id"}, "x": {"kind": "number", "fill": 7, "scale": "none"}}
    config = small(tmp_path, f"country,x,y\n{rows}", features=features, missing={"x": ["NA"]})
    make(config.parent, tmp_path / "out")
    assert set(vocabulary(tmp_path / "out", "country")[0]) == {"NA", "SE"}
    assert sorted(row["x"] for row in read(tmp_path / "out")) == sorted(k if k % 3 else 7 for k in range(60))


BAD = {
    "null": ("missing: [NULL, '?']", ["missing: None is no text: write the marks in quotes"]),
    "number": ("missing: [-1]", ["-1 is no text", "in quotes"]),
    "no list": ("missing: NA", ["missing: give a list of texts", "found 'NA'"]),
    "no list in a column": ("missing: {x: NA}", ["missing: give a list of texts"]),
    "no such column": ("missing: {usr: ['NA']}", ["no feature, label, key or scenario reads a column 'usr'", "'user'"]),
    "a scenario": (
        "missing: ['NA']\nscenario: {column: user, values: ['NA', u1]}",
        ["scenario.values: 'NA' means a missing value there, too", "{COLUMN: [...]}"],
    ),
    "a comment of blanks": ("csv: {comment: '  '}", ["csv: comment: give what begins a line of comment"]),
    "an indicator of the name of a feature": (
        "features: {x: {kind: number, indicator: true}, x_missing: {kind: id, column: user}}",
        ["features.x.indicator: there is a feature 'x_missing'"],
    ),
    "buckets and a fill value": ("features: {x: {kind: number, buckets: 3, fill: 0}}", ["buckets have id 0 for a missing"]),
    "another fill value": ("features: {x: {kind: number, fill: median}}", ["features.x.fill: give mean, or a number"]),
    "too large a fill value": ("features: {x: {kind: number, fill: 1e39}}", ["features.x.fill: give mean, or a number"]),
    "half a surrogate pair": ('terms: "\\ud800"', ["half a surrogate pair is no text"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_named(case, tmp_path, capsys):
    text, words = BAD[case]
    config = small(tmp_path)
    added = {line.partition(":")[0] for line in text.splitlines()}
    kept = [block for block in re.split(r"\n(?=\w)", config.read_text()) if block.partition(":")[0] not in added]
    config.write_text("\n".join([*kept, text]) + "\n")
    assert run(config, tmp_path / "out") == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert "Traceback" not in message


def test_a_bad_number_that_looks_like_a_mark_names_the_key(tmp_path, capsys):
    rows = "".join(f"u{k % 3},{k},{k % 2}\n" for k in range(20))
    assert run(small(tmp_path, f"user,x,y\n{rows}u1,NA,1\n"), tmp_path / "out") == 2
    words = "line 22: x must be a number, found 'NA'. If it means a missing value, say so: missing: ['NA']."
    assert words in capsys.readouterr().err
    assert run(small(tmp_path, f"user,x,y\n{rows}u1,nan,1\n"), tmp_path / "out") == 2
    assert "say so: missing: ['nan']." in capsys.readouterr().err


MORE_CELLS = ["NA", " NA", "-1", " -1 ", "-1.0", "7.0", "7.", " 7.00", "7.5", "-0.0", "1" * 19 + ".0", "9" * 19 + ".0", "true"]


@pytest.mark.parametrize(
    "cells", [Cells(), Cells(("NA", "-1", "inf")), Cells(strip=True), Cells(("NA ", "nan"), True)], ids=str
)
@pytest.mark.parametrize("kind", [INT, NUMBER, pa.bool_(), TEXT], ids=str)
def test_a_line_is_good_or_bad_whatever_its_neighbours_are(tmp_path, kind, cells, capsys):
    """Cells are read as numbers, as texts, or one by one in Python, as the piece demands: all three take a cell alike."""
    cells_of_lines = [*CELLS, *MORE_CELLS]

    def found(chosen, last="", **options):
        text = "".join(f"{cells_of_lines[place]}|b{place}\n" for place in chosen) + last
        columns = {"a": kind, "b": TEXT}
        rows, _, _ = read_raw(tmp_path, text, 999, columns, separator="|", cells=cells, **options)
        return {int(name[1:]): value for value, name in rows if name != "b"}

    alone = found(range(len(cells_of_lines)), block_bytes=1)
    assert found(range(len(cells_of_lines)), "a line of one field\n") == alone
    assert found(alone) == alone
    assert found(alone, "1.0|b\n" if kind == INT else "") == alone
    if kind == INT:
        assert (alone[cells_of_lines.index("7.0")], cells_of_lines.index("7.5") in alone) == (7, False)
    assert ("NA" in cells.marks("a")) == (alone.get(cells_of_lines.index("NA"), "bad") is None)


@pytest.mark.parametrize("form", ["csv", "json"])
def test_integers_with_a_point_are_one_id(form, tmp_path, capsys):
    users = [str(k % 9) if k % 2 else f"{k % 9}.0" for k in range(180)]
    features = {"user": {"kind": "id", "type": "int"}, "users": {"kind": "ids", "type": "int", "separator": "|"}}
    if form == "csv":
        text = "user,users,y\n" + "".join(f"{user},{user}|3.0,{k % 2}\n" for k, user in enumerate(users))
    else:
        text = "".join(f'{{"user": {user}, "users": "{user}|3.0", "y": {k % 2}}}\n' for k, user in enumerate(users))
    make(small(tmp_path, text, f"rows.{form}", features=features).parent, tmp_path / "out")
    assert set(vocabulary(tmp_path / "out", "user")[0]) == set(vocabulary(tmp_path / "out", "users")[0]) == set(range(9))
    assert not suspicious(capsys.readouterr().out)
    if form == "csv":
        make(small(tmp_path, text, features={"user": {"kind": "id"}}).parent, tmp_path / "text")
        assert len(vocabulary(tmp_path / "text", "user")[0]) == 18
        assert "* user: 9 ids stand twice, such as '" in (out := capsys.readouterr().out)
        assert ".0'. type: int makes them one" in out


def test_ids_that_a_spreadsheet_has_rounded_are_told(tmp_path, capsys):
    users = ["1.23457E+11", "9E+15", "-1.5e+12", "4,7E+10", "E+12", "1.5", "12E+1", "1E-7"] * 10
    rows = "".join(f'"{user}",{k % 2}\n' for k, user in enumerate(users))
    make(small(tmp_path, f"user,y\n{rows}", features={"user": {"kind": "id"}}).parent, tmp_path / "out")
    told = re.search(r"\* user: 4 values look like a number whose last digits .*", capsys.readouterr().out)
    assert told is not None
    assert all(each in ("1.23457E+11", "9E+15", "-1.5e+12", "4,7E+10") for each in re.findall("'(.*?)'", told[0]))


def test_ids_that_look_like_marks_are_told_with_the_key_that_mends_them(tmp_path, capsys):
    texts = {"NULL": 40, "\\N": 30, "N/A": 20, " ?": 20, "it's": 50, "b ": 30}
    items = [text for text, count in texts.items() for _ in range(count)]
    rows = "".join(f"{k % 5},{item},{k % 2}\n" for k, item in enumerate(items))
    features = {name: {"kind": "id", "column": "item"} for name in ("item", "last")}
    features = {"user": {"kind": "id", "type": "int"}} | features
    features["last"]["table"] = "item"
    make(small(tmp_path, f"user,item,y\n{rows}", features=features).parent, tmp_path / "out")
    counts = dict(zip(*[vocabulary(tmp_path / "out", "item")[1][name] for name in ("value", "count")], strict=True))
    told = capsys.readouterr().out
    ordered = [mark for mark in counts if mark in ("NULL", "\\N", "N/A", " ?")]
    shown = ", ".join(f"'{mark}' ({counts[mark]})" for mark in ordered)
    written = ", ".join(f"'{mark}'" for mark in ordered)
    assert f"* item, last: 4 values may mean a missing one, but got ids (occurrences in train): {shown}." in told
    assert f"If so, say: missing: [{written}]\n" in told
    assert "* item, last: 2 values have blanks around it, such as " in told
    assert ". strip: true drops them\n" in told
    # What the note advises can be pasted.
    config = small(tmp_path, f"user,item,y\n{rows}", features=features, strip=True)
    config.write_text(config.read_text() + f"missing: [{written}]\n")
    make(config.parent, tmp_path / "mended")
    assert set(vocabulary(tmp_path / "mended", "item")[0]) == {"it's", "b"}
    assert not suspicious(capsys.readouterr().out)


ROWS = [f"u{k % 3},{k},{k % 2}\n" for k in range(40)]
TEXTS = ["# exported\n", "\n", "user,x,y\n", "# of: user, x, y\n", "  \t\n", *ROWS, "\r\n", "#\n", "\n"]


@pytest.mark.parametrize("piece_bytes", [1, 17, 100, 1 << 20])
def test_blank_lines_and_comments_are_counted_and_lines_keep_their_numbers(piece_bytes, tmp_path, capsys):
    config = small(tmp_path, "".join(TEXTS), csv={"comment": "#"})
    with mock.patch.object(raw_files, "PIECE_BYTES", piece_bytes):
        manifest = make(config.parent, tmp_path / "out")
        assert manifest.statistics["rows"] == 40
        assert manifest.statistics["passed_over"] == {"rows.csv": {"comments": 3, "blank lines": 4}}
        assert "passed over in rows.csv: 3 comments, 4 blank lines" in capsys.readouterr().out
        assert "bad_rows" not in manifest.statistics
        for place, line in ((20, "u1,x,1\n"), (43, "u1,1\n")):
            config = small(tmp_path, "".join([*TEXTS[:place], line, *TEXTS[place:]]), csv={"comment": "#"})
            assert run(config, tmp_path / "bad") == 2
            assert f"rows.csv, line {place + 1}: " in capsys.readouterr().err


@pytest.mark.parametrize("piece_bytes", [13, 60, 1 << 20])
def test_pieces_as_the_tasks_of_spark_cut_them(piece_bytes, tmp_path, monkeypatch):
    """Each piece by itself, with no word of the others: the same rows, the same counts, the same numbers of lines."""
    monkeypatch.setattr(spark_pieces, "PIECE_BYTES", piece_bytes)
    config = small(tmp_path, "".join([*TEXTS, "u1,one,0\n"]), csv={"comment": "#"})
    dataset = Table(Namespace(config=config, raw=None))
    raw = RawFolder(config.parent, dataset.raw_files, "", 1)
    expected = [row for batch in dataset.batches(raw) for row in batch.to_pylist()]
    (source,) = dataset.sources()
    found, num_lines, passed_over, bad = [], 0, Counter(), []
    for order in spark_pieces.stretches(0, source, raw):
        cuts, lines, failure = order.cut(raw, tmp_path)
        assert failure is None
        for cut in cuts:
            piece = spark_pieces.canonical_rows(0, replace(cut, first_line=cut.first_line + num_lines), dataset, None, 1)
            found += [row for batch in piece.batches() for row in batch.drop_columns([COPY_COLUMN]).to_pylist()]
            passed_over += Counter(piece.work.passed_over)
            bad += [row.line for row in piece.work.bad_rows]
        num_lines += lines
    assert found == expected
    assert passed_over == raw.passed_over["rows.csv"] == {"comments": 3, "blank lines": 4}
    assert bad == [len(TEXTS) + 1]


def test_a_table_without_its_blank_lines_and_comments_is_the_same(tmp_path):
    make(small(tmp_path, "".join(TEXTS), csv={"comment": "#"}).parent, tmp_path / "odd")
    rows = [text for text in TEXTS if text.strip() and not text.startswith("#")]
    make(small(tmp_path, "".join(rows), csv={"comment": "#"}).parent, tmp_path / "plain")
    assert content(tmp_path / "odd") == content(tmp_path / "plain")


def test_lines_of_separators_are_no_blank_lines(tmp_path):
    rows = "".join(f"u{k % 3}\t{k}\t{k % 2}\n" for k in range(30))
    config = small(tmp_path, f"user\tx\ty\n{rows}\t\t\n\n", csv={"separator": "\t"})
    manifest = make(config.parent, tmp_path / "out")
    assert manifest.statistics["rows"] == 31
    assert manifest.statistics["passed_over"] == {"rows.csv": {"blank lines": 1}}


def test_a_header_that_is_a_comment_or_missing_is_told(tmp_path, capsys):
    assert run(small(tmp_path, "".join(TEXTS)), tmp_path / "out") == 2
    assert "line 1: the header lacks user, x, y; it is '# exported'. With csv: {comment: '#'}" in capsys.readouterr().err
    assert run(small(tmp_path, "# a\n\n# b\n", csv={"comment": "#"}), tmp_path / "out") == 2
    assert "rows.csv: there is no header: its lines are blank or begin with '#'" in capsys.readouterr().err


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.floats(-3.4e38, 3.4e38, allow_subnormal=True), max_size=40), st.integers(0, 40))
def test_sums_are_exact_in_any_order(numbers, cut):
    exact = sum(map(Fraction, numbers), Fraction(0))
    assert exact_sum(np.array(numbers, np.float64)) == exact
    first, second = Mean(), Mean()
    first.add(pa.array([None, *numbers[:cut]], pa.float64()))
    second.add(pa.array([*numbers[cut:], None], pa.float64()))
    second.merge(first)
    assert second.value() == (float(exact / len(numbers)) if numbers else 0.0)


@pytest.mark.parametrize("options", [["--workers", "3"], ["--workers", "1"]])
def test_the_mean_hangs_neither_on_workers_nor_on_pieces(options, tmp_path):
    draw = random.Random(0)
    rows = "".join(f"u{k % 3},{draw.choice(['', repr(draw.lognormvariate(0, 9))])},{k % 2}\n" for k in range(2000))
    config = small(tmp_path, f"user,x,y\n{rows}")
    make(config.parent, tmp_path / "whole")
    with mock.patch.object(raw_files, "PIECE_BYTES", 1000):
        make(config.parent, tmp_path / "pieces", *options)
    assert folder_bytes(tmp_path / "whole") == folder_bytes(tmp_path / "pieces")


@pytest.mark.parametrize("scale", ["min_max", "log", "none"])
@pytest.mark.parametrize("fill", ["mean", 0, 30, -5, 1000])
def test_missing_numbers_become_the_fill_value(scale, fill, tmp_path):
    def raw(k):
        return k % 50 + 1 if k % 4 else None

    def taken(number):
        return np.sign(number) * np.log1p(abs(number)) if scale == "log" else number

    rows = "".join(f"{k},{'' if raw(k) is None else raw(k)},{k % 2}\n" for k in range(200))
    features = {"row": {"kind": "number", "scale": "none"}, "x": {"kind": "number", "scale": scale, "fill": fill}}
    manifest = make(small(tmp_path, f"row,x,y\n{rows}", features=features).parent, tmp_path / "out")
    found = {int(row["row"]): row for row in read(tmp_path / "out")}
    train = [taken(raw(k)) for k, row in found.items() if row["split"] == "train" and raw(k) is not None]
    filled = np.mean(train) if fill == "mean" else taken(fill)
    assert manifest.preprocessing["dense_fills"]["x"] == pytest.approx(filled, rel=1e-12)
    for k, row in found.items():
        value = filled if raw(k) is None else taken(raw(k))
        if scale != "none":
            value = np.clip((value - min(train)) / (max(train) - min(train)), 0, 1)
        assert row["x"] == pytest.approx(value, rel=1e-6, abs=1e-6)


def test_the_fill_value_changes_nothing_where_no_number_is_missing(tmp_path):
    rows = "".join(f"u{k % 3},{k % 50 + 1},{k % 2}\n" for k in range(200))
    made = []
    for fill in ("mean", 7):
        features = {
            "x": {"kind": "number", "fill": fill},
            "z": {"kind": "number", "fill": fill, "scale": "none", "column": "x"},
        }
        make(small(tmp_path, f"user,x,y\n{rows}", features=features).parent, tmp_path / f"{fill}")
        made.append(folder_bytes(tmp_path / f"{fill}"))
    assert [name for name in made[0] if made[0][name] != made[1][name]] == ["manifest.json"]


def test_adult_through_table_in_one_try(tmp_path, capsys):
    """Rows in the form of Adult's files, with the configuration of the page."""
    page = (ROOT / "docs/datasets/table.md").read_text(encoding="utf-8")
    (config,) = re.findall(r"```yaml\n(split: .*?)```", page, re.DOTALL)
    draw = random.Random(0)

    def people(num_rows):
        for _ in range(num_rows):
            yield {
                **{"age": draw.randrange(17, 90), "workclass": draw.choice(["Private", "?"]), "fnlwgt": draw.randrange(9999)},
                **{"education": draw.choice(["HS-grad", "Bachelors"]), "education_num": draw.randrange(1, 17)},
                **{"marital_status": draw.choice(["Never-married", "Divorced"]), "occupation": draw.choice(["Sales", "?"])},
                **{"relationship": "Own-child", "race": "White", "sex": draw.choice(["Male", "Female"])},
                **{"capital_gain": draw.choice([0, 2174]), "capital_loss": 0, "hours_per_week": draw.randrange(1, 99)},
                **{"native_country": draw.choice(["United-States", "?"]), "income": draw.choice(["<=50K", ">50K"])},
            }

    train, test = list(people(300)), list(people(100))
    for name, rows, start, end in (("adult.data", train, "", ""), ("adult.test", test, "|1x3 Cross validator\n", ".")):
        text = "".join(", ".join(map(str, row.values())) + end + "\n" for row in rows)
        (tmp_path / name).write_text(f"{start}{text}\n")
    (tmp_path / "adult.yaml").write_text(config)
    assert run(tmp_path / "adult.yaml", tmp_path / "out") == 0
    assert not suspicious(capsys.readouterr().out)
    manifest = DatasetManifest.load(tmp_path / "out")
    assert [split.num_rows for split in manifest.splits.values()] == [300, 50, 50]
    assert manifest.statistics["passed_over"] == {
        "adult.data": {"blank lines": 1},
        "adult.test": {"blank lines": 1, "comments": 1},
    }
    assert set(vocabulary(tmp_path / "out", "workclass")[0]) == {"Private"}
    assert set(vocabulary(tmp_path / "out", "native_country")[0]) == {"United-States"}
    rich = sum(row["income"] == ">50K" for row in [*train, *test])
    assert sum(split.label_counts["income"]["all"][1] for split in manifest.splits.values()) == rich
    single = sum(row["marital_status"] == "Never-married" for row in train)
    assert manifest.splits["train"].label_counts["marital"]["all"] == (300, single)


def test_describe_names_the_fill_value(tmp_path, capsys):
    rows = "".join(f"u{k % 3},{k % 2 * 10 if k % 4 else ''},{k % 2}\n" for k in range(80))
    make(small(tmp_path, f"user,x,y\n{rows}").parent, tmp_path / "out")
    mean = DatasetManifest.load(tmp_path / "out").preprocessing["dense_fills"]["x"]
    assert main(["describe", str(tmp_path / "out")]) == 0
    assert f"A missing value became, before scaling: x {mean:g}." in capsys.readouterr().out
