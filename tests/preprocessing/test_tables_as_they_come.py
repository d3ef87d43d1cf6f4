"""Tables of one's own as others write them: tabs, names with blanks, booleans, anchors and 1e6."""

import gzip
import json
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmlrec.encoding.cells import Cells
from mmlrec.encoding.encoder import Encoder
from mmlrec.errors import DataError
from preprocessing.reading.json_lines import JsonLines
from preprocessing.reading.raw_files import RawFile, RawFolder
from tests.preprocessing.decoded import content
from tests.preprocessing.table_fake import SMALL, run, small
from tests.preprocessing.test_table import make, read, vocabulary
from tests.test_hashing import plain_buckets, plain_key

FORMS = ["csv", "json", "parquet"]
WHOLE = {"rule": "group", "key": "row"}


def write(folder, form, columns, **config):
    """A table of these columns, and its configuration; None is an empty cell, null, or an absent key."""
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    if form == "csv":
        lines = [",".join("" if cell is None else str(cell) for cell in row.values()) for row in rows]
        return small(folder, "\n".join([",".join(columns), *lines]) + "\n", **config)
    if form == "json":
        lines = [json.dumps({name: cell for name, cell in row.items() if cell is not None}) for row in rows]
        return small(folder, "\n".join(lines) + "\n", "rows.jsonl", **config)
    config = small(folder, b"", "rows.parquet", **config)
    pq.write_table(pa.table(columns), config.parent / "rows.parquet")
    return config


def told(capsys, config, out):
    assert run(config, out) == 2
    assert not out.exists()
    return capsys.readouterr().err


# Types of Parquet.


TYPES = {
    "views of texts": ({"kind": "id"}, ["a", None, "", "b"], pa.string_view(), pa.string()),
    "decimals, as databases write integers": (
        {"kind": "id", "type": "int"},
        [-7, None, 2**53 + 1, 0],
        pa.decimal128(38),
        pa.int64(),
    ),
    "decimals with places": ({"kind": "id", "type": "int"}, [7, None, 1, 0], pa.decimal128(20, 2), pa.int64()),
    "views of lists": ({"kind": "ids", "type": "int"}, [[1, 2], None, [], [3]], pa.list_view(pa.int64()), pa.list_(pa.int64())),
    "lists of views": ({"kind": "ids"}, [["a"], None, [], ["b", ""]], pa.list_(pa.string_view()), pa.list_(pa.string())),
    "nothing but nulls": ({"kind": "id", "type": "int"}, [None] * 4, pa.null(), pa.int64()),
    "nulls for numbers": ({"kind": "number", "fill": 1}, [None] * 4, pa.null(), pa.float64()),
    "nulls for lists": ({"kind": "ids"}, [None] * 4, pa.null(), pa.list_(pa.string())),
    "lists of nothing": ({"kind": "ids"}, [[], None, [], []], pa.list_(pa.null()), pa.list_(pa.string())),
}


@pytest.mark.parametrize("case", TYPES)
@pytest.mark.parametrize("missing", [[], ["NA"]], ids=["plain", "marks"])
def test_types_of_parquet_are_taken_as_what_they_hold(case, missing, tmp_path):
    feature, cells, found, plain = TYPES[case]
    for kind, name in ((found, "found"), (plain, "plain")):
        (tmp_path / name).mkdir()
        config = small(tmp_path / name, b"", "rows.parquet", features={"x": feature, "z": {"kind": "id"}}, missing=missing)
        columns = {"x": pa.array(cells * 10, kind), "z": ["u", "v"] * 20, "y": [0, 1] * 20}
        pq.write_table(pa.table(columns), config.parent / "rows.parquet")
        make(config.parent, tmp_path / f"{name}-out")
    assert content(tmp_path / "found-out") == content(tmp_path / "plain-out")


@pytest.mark.parametrize("case", ["views of texts", "views of lists", "lists of views"])
def test_a_bad_row_of_parquet_beside_views_is_passed_over(case, tmp_path):
    """Arrow takes no rows of views out of a table."""
    feature, cells, found, plain = TYPES[case]
    for kind, name in ((found, "found"), (plain, "plain")):
        (tmp_path / name).mkdir()
        config = small(tmp_path / name, b"", "rows.parquet", features={"x": feature, "z": {"kind": "number"}})
        columns = {"x": pa.array(cells * 10, kind), "z": [float("nan"), *range(39)], "y": [0, 1] * 20}
        pq.write_table(pa.table(columns), config.parent / "rows.parquet")
        make(config.parent, tmp_path / f"{name}-out", "--max-bad-rows", "1")
    assert content(tmp_path / "found-out") == content(tmp_path / "plain-out")
    assert len(read(tmp_path / "found-out")) == 39


def test_a_label_that_a_file_of_parquet_lacks_everywhere_is_unlabelled(tmp_path):
    config = small(tmp_path, b"", "a.parquet", files=["*.parquet"])
    for name, labels in (("a", pa.nulls(20)), ("b", pa.array([0, 1] * 10))):
        pq.write_table(pa.table({"user": ["u"] * 20, "x": range(20), "y": labels}), config.parent / f"{name}.parquet")
    splits = make(config.parent, tmp_path / "out").splits
    assert sum(split.label_counts["y"]["all"][0] for split in splits.values()) == 20


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            ['{"user": "u7", "x": 1, "y": 1}'],
            "user must be an integer, found 'u7'. A text is an id, a key or a scenario with type: string",
        ),
        (
            ['{"user": 7, "x": 1, "y": "yes"}'],
            "y must be a number, found 'yes'. Mend the line. A label of words is a condition, such as \"`y` ==",
        ),
        (
            ['{"user": 7, "x": "NA", "y": 1}'],
            "x must be a number, found 'NA'. If it means a missing value, say so: missing: ['NA'].",
        ),
    ],
)
def test_what_can_be_done_about_a_text_of_json_where_a_number_is_wanted(lines, words, tmp_path, capsys):
    features = {"user": {"kind": "id", "type": "int"}, "x": {"kind": "number"}}
    good = [json.dumps({"user": i, "x": i, "y": i % 2}) for i in range(20)]
    config = small(tmp_path, "\n".join(good + lines) + "\n", "rows.jsonl", features=features)
    message = told(capsys, config, tmp_path / "out")
    assert f"rows.jsonl, line 21: {words}" in message


# Names of files.


def test_a_name_with_brackets_is_the_file_of_that_name(tmp_path):
    config = small(tmp_path, SMALL, "export [1].csv")
    assert make(config.parent, tmp_path / "out").statistics["rows"] == 20


def test_a_folder_of_folders_is_told_the_pattern_of_their_files(tmp_path, capsys):
    (tmp_path / "raw" / "days" / "monday").mkdir(parents=True)
    (tmp_path / "raw" / "days" / "monday" / "rows.csv").write_text(SMALL)
    for pattern in ("days", "days/"):
        message = told(capsys, small(tmp_path, files=[pattern]), tmp_path / "out")
        assert "days: the folder holds no files" in message
        assert "Those in folders below it are days/**/*." in message
    assert make(small(tmp_path, files=["days/**/*"]).parent, tmp_path / "out").statistics["rows"] == 20


# Files without rows.


def test_a_header_alone_is_a_file_without_rows(tmp_path, capsys):
    config = small(tmp_path, files=["rows*.csv"])
    make(config.parent, tmp_path / "alone")
    header = SMALL.partition("\n")[0]
    for number, text in enumerate((header, f"{header}\r\n", f"{header}\n\n")):
        (config.parent / f"rows-{number}.csv").write_bytes(text.encode())
    make(config.parent, tmp_path / "with")
    assert content(tmp_path / "alone") == content(tmp_path / "with")
    (config.parent / "rows-3.csv").write_text(f"{header}\nu1,one,1\n")
    assert "rows-3.csv, line 2: x must be a number, found 'one'." in told(capsys, config, tmp_path / "bad")
    assert run(config, tmp_path / "bad", "--max-bad-rows", "1") == 2
    assert "rows-3.csv, line 2: x must be a number" in (message := capsys.readouterr().err)
    assert "No row of the file is good." in message
    (config.parent / "rows-3.csv").unlink()
    for name, nothing in (("rows-3.csv", b""), ("rows-4.csv.gz", gzip.compress(b""))):
        (config.parent / name).write_bytes(nothing)
        config = small(tmp_path, files=["rows*"])
        assert f"{name}: the file is empty, or has no good row." in told(capsys, config, tmp_path / "bad")
        (config.parent / name).unlink()


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_files_without_rows_alone_are_named(form, tmp_path, capsys):
    config = small(tmp_path, SMALL.partition("\n")[0] + "\n")
    if form == "parquet":
        config = small(tmp_path, b"", "rows.parquet")
        pq.write_table(pa.table({"user": pa.array([], pa.string()), "x": [], "y": []}), config.parent / "rows.parquet")
    assert f"rows.{form}: no rows, at most a header. Name files that have rows." in told(capsys, config, tmp_path / "out")
    scenario = {"column": "d", "values": ["a", "b"], "others": "drop"}
    config = small(tmp_path, "user,x,d,y\n" + "u,1,c,0\n" * 20, scenario=scenario)
    words = "rows.csv: no row is kept; all are passed over (other scenarios: 20)."
    assert words in told(capsys, config, tmp_path / "out")


# Separators.


TABS = SMALL.replace(",", "\t")


@pytest.mark.parametrize("name", ["rows.tsv", "rows.TSV", "rows.tsv.gz", "rows.tsv.zip"])
def test_tsv_has_tabs(name, tmp_path):
    config = small(tmp_path, TABS, name)
    path = config.parent / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(TABS.encode()))
    elif name.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("rows.tsv", TABS)
    make(config.parent, tmp_path / "out")
    (tmp_path / "other").mkdir()
    make(small(tmp_path / "other", SMALL).parent, tmp_path / "csv")
    assert content(tmp_path / "out") == content(tmp_path / "csv")


def test_each_file_has_the_separator_of_its_name_unless_one_is_told(tmp_path, capsys):
    config = small(tmp_path, TABS, "a.tsv", files=["a.tsv", "b.csv"])
    (config.parent / "b.csv").write_text(SMALL)
    assert make(config.parent, tmp_path / "out").statistics["rows"] == 40
    config = small(tmp_path, TABS, "a.tsv", csv={"separator": ","})
    message = told(capsys, config, tmp_path / "none")
    assert (
        "a.tsv, line 1: the header lacks user, x, y; it is 'user\\tx\\ty'. The separator ',' makes 1 column of it." in message
    )
    assert 'Set another: csv: {separator: "\\t"}.' in message


@pytest.mark.parametrize("separator", [";", "|", "::", " ", "\t"])
def test_a_header_of_another_separator_is_told_the_key_that_can_be_pasted(separator, tmp_path, capsys):
    text = SMALL.replace(",", separator)
    message = told(capsys, small(tmp_path, text), tmp_path / "out")
    assert "The separator ',' makes 1 column of it." in message
    assert "again" not in message
    (line,) = [line for line in message.splitlines() if "Set another: " in line]
    config = small(tmp_path, text)
    config.write_text(config.read_text() + line.partition("Set another: ")[2].removesuffix(".") + "\n")
    assert make(config.parent, tmp_path / "out").statistics["rows"] == 20


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("usr,x,y", "The separator ',' makes 3 columns of it. Did you mean 'usr'? Name the columns as the header does;"),
        ("u1,3,1", "where this line is a row, name the columns, csv: {header: false, columns: [...]}"),
        ("user , x,y", "Blanks stand around its names: strip: true drops them."),
        ("user,x,y,user", "the header names user twice. Rename one."),
    ],
)
def test_other_headers_that_lack_a_column(header, words, tmp_path, capsys):
    message = told(capsys, small(tmp_path, SMALL.replace("user,x,y", header)), tmp_path / "out")
    assert words in message
    assert "again" not in message


def test_lines_of_another_separator_without_a_header(tmp_path, capsys):
    config = small(tmp_path, SMALL.replace(",", ";").partition("\n")[2], csv={"header": False, "columns": ["user", "x", "y"]})
    message = told(capsys, config, tmp_path / "out")
    assert "line 1: 3 fields (user,x,y) expected, 1 found: b'u0;0;0'. Fields are divided by ','" in message
    assert "csv: {separator: ...}" in message


def test_bytes_of_another_encoding_are_told_its_key(tmp_path, capsys):
    text = SMALL.replace("u0", "größe").encode("cp1252")
    message = told(capsys, small(tmp_path, text), tmp_path / "out")
    assert "line 2: bytes that are not utf-8" in message
    assert "Set its encoding, such as csv: {encoding: cp1252}." in message
    make(small(tmp_path, text, csv={"encoding": "cp1252"}).parent, tmp_path / "out")
    assert "größe" in vocabulary(tmp_path / "out", "user")[0]


def test_a_header_that_is_not_utf_8_is_told_its_encoding(tmp_path, capsys):
    text = SMALL.replace("user", "größe").encode("cp1252")
    features = {"user": {"kind": "id", "column": "größe"}, "x": {"kind": "number"}}
    assert "Set its encoding, such as csv: {encoding: cp1252}." in told(
        capsys, small(tmp_path, text, features=features), tmp_path / "out"
    )
    make(small(tmp_path, text, features=features, csv={"encoding": "cp1252"}).parent, tmp_path / "out")


@pytest.mark.parametrize("letters", ["ÿþ", "þÿ"])
def test_letters_of_latin_1_that_begin_utf_16_elsewhere(letters, tmp_path):
    text = SMALL.replace("user", f"{letters}rir")
    features = {"user": {"kind": "id", "column": f"{letters}rir"}, "x": {"kind": "number"}}
    config = small(tmp_path, text.encode("latin-1"), features=features, csv={"encoding": "latin-1"})
    assert make(config.parent, tmp_path / "out").statistics["rows"] == 20


# Names.


@pytest.mark.parametrize("name", ["my label", "clicked in app", "a > 1", "it's"])
def test_labels_of_columns_of_any_name(name, tmp_path):
    columns = {"user": [f"u{k % 7}" for k in range(60)], "x": list(range(60)), name: [k % 2 for k in range(60)]}
    made = []
    for label in (f"`{name}`", f"`{name}` > 0", f"`{name}` == 1 and x >= 0"):
        tasks = [{"name": "y", "label": label}]
        config = write(tmp_path, "csv", columns, tasks=tasks, features={"user": {"kind": "id"}})
        make(config.parent, tmp_path / f"out{len(made)}")
        made.append(sorted((row["user"], row["label.y"]) for row in read(tmp_path / f"out{len(made)}")))
    assert made[0] == made[1] == made[2]
    assert sum(label for _, label in made[0]) == 30


def test_a_label_that_is_no_condition_is_told_its_backquotes(tmp_path, capsys):
    tasks = [{"name": "y", "label": "clicked in app"}]
    message = told(capsys, small(tmp_path, SMALL, tasks=tasks), tmp_path / "out")
    assert """Where it is the name of a column, write "`clicked in app`".""" in message
    config = small(tmp_path, SMALL)
    config.write_text(config.read_text().replace("label: y", "label: `y` > 0"))
    assert "Put a text that begins with it in quotes." in told(capsys, config, tmp_path / "out")
    tasks = [{"name": "y", "label": "`my label`"}]
    config = small(tmp_path, SMALL.replace("y\n", "my label\n", 1).replace(",1\n", ",2\n"), tasks=tasks)
    assert "make the label a condition such as '`my label` > 0'" in told(capsys, config, tmp_path / "out")


def test_a_label_in_backquotes_is_no_feature(tmp_path, capsys):
    features = {"user": {"kind": "id"}, "x": {"kind": "number", "column": "y"}}
    message = told(capsys, small(tmp_path, SMALL, tasks=[{"name": "y", "label": "`y`"}], features=features), tmp_path / "out")
    assert "features.x is made of column 'y', and so is the label of task 'y'" in message


# Booleans.


@pytest.mark.parametrize("form", FORMS)
def test_booleans_are_labels_numbers_ids_and_scenarios(form, tmp_path):
    """With missing values, beside a condition on the same column."""
    rows = 300
    clicked = [None if k % 7 == 0 else k % 3 == 0 for k in range(rows)]
    member = [None if k % 11 == 0 else k % 2 == 0 for k in range(rows)]
    fresh = [k % 5 < 2 for k in range(rows)]
    columns = {"row": list(range(rows)), "clicked": clicked, "member": member, "fresh": fresh}
    words = {True: "true", False: "false"}
    if form == "csv":
        columns |= {name: [words.get(each) for each in columns[name]] for name in ("member", "fresh")}
        # As Python and others write them.
        spelt = [(str(each), words.get(each), words.get(each, "").upper()) for each in clicked]
        columns["clicked"] = [None if each is None else spelt[k][k % 3] for k, each in enumerate(clicked)]
    number = {"kind": "number", "column": "clicked", "scale": "none", "fill": -1, "allow_label_feature": True}
    config = write(
        tmp_path,
        form,
        columns,
        features={"member": {"kind": "id"}, "as_number": number},
        tasks=[
            {"name": "y", "label": "clicked"},
            {"name": "z", "label": "clicked == true and row > 10"},
            {"name": "m", "label": "clicked == false"},
        ],
        scenario={"column": "fresh", "values": {"true": "new", "false": "old"}},
        keys={"row": {"type": "int"}},
    )
    make(config.parent, tmp_path / "out")
    ids, _ = vocabulary(tmp_path / "out", "member")
    assert set(ids) == {"true", "false"}
    found = read(tmp_path / "out")
    assert len(found) == rows
    for row in found:
        k = row["key.row"]
        label = None if clicked[k] is None else float(clicked[k])
        assert row["label.y"] == label
        assert row["label.m"] == (None if label is None else 1 - label)
        assert row["label.z"] == (0 if k <= 10 else label)
        assert row["as_number"] == (-1 if label is None else label)
        assert row["member"] == (0 if member[k] is None else ids[words[member[k]]])
        assert row["sample.scenario"] == (0 if fresh[k] else 1)


def test_booleans_of_three_formats_are_the_same_dataset(tmp_path):
    rows, made = range(200), []
    columns = {"user": [f"u{k % 9}" for k in rows], "x": [k % 4 == 0 for k in rows], "y": [k % 3 == 0 for k in rows]}
    for form in FORMS:
        (tmp_path / form).mkdir()
        make(write(tmp_path / form, form, columns).parent, tmp_path / form / "out")
        made.append(content(tmp_path / form / "out"))
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize(
    ("form", "value", "words"),
    [
        ("csv", "yes", "y must be a number, found 'yes'. Mend the line. A label of words is a condition, such as y == 'yes'."),
        ("csv", "t", "A label of words is a condition, such as y == 't'."),
        ("csv", "truee", "y must be a number, found 'truee'"),
        ("json", "yes", "y must be a number, found 'yes'. Mend the line."),
        ("parquet", "yes", "A label of words is a condition, such as \"`y` == 'yes'\"."),
        ("json", [0.5], "y must be a number, found [0.5]. A vector is not read yet"),
    ],
)
def test_what_is_no_boolean(form, value, words, tmp_path, capsys):
    good = ["true"] if form == "parquet" else [True]  # whose columns have one type
    columns = {"user": ["u"] * 20, "x": list(range(20)), "y": good * 19 + [value]}
    assert words in told(capsys, write(tmp_path, form, columns), tmp_path / "out")


def test_a_boolean_is_no_integer(tmp_path, capsys):
    columns = {"user": [True, False] * 10, "x": list(range(20)), "y": [0, 1] * 10}
    features = {"user": {"kind": "id", "type": "int"}}
    for form, words in (
        ("csv", "user must be an integer, found 'True'"),
        ("json", "user must be an integer, found True"),
        (
            "parquet",
            "column 'user' is of type bool; integer is needed. Booleans are ids with type: string, 'true' and 'false'.",
        ),
    ):
        assert words in told(capsys, write(tmp_path, form, columns, features=features), tmp_path / "out")
    tasks = [{"name": "y", "label": "y == true"}]
    message = told(
        capsys, write(tmp_path, "parquet", columns, features={"user": {"kind": "id"}}, tasks=tasks), tmp_path / "out"
    )
    assert "column 'y' is of type int64; boolean is needed. Compare it with what it holds, such as 1 or 'true'." in message


def test_integers_of_json_where_text_is_wanted(tmp_path):
    """As those of Parquet; a text of the same digits is the same id."""
    users = [k % 5 if k % 2 else str(k % 5) for k in range(60)]
    rows = "".join(json.dumps({"user": user, "x": k, "y": k % 2, "n": {"user": 7}}) + "\n" for k, user in enumerate(users))
    make(small(tmp_path, rows, "rows.jsonl").parent, tmp_path / "out")
    assert set(vocabulary(tmp_path / "out", "user")[0]) == set("01234")


CELLS = ["true", "false", "7", "7.0", "-7", '"7"', '"true"', "null", '"NA"', "[true]", "1e3", "{}", "7.5", "tru", "true7"]
CELLS += [
    "07",
    '"07.0"',
    '" -7 "',
    '"7x"',
    '"1,5"',
    '"+.5e1"',
    '"nan"',
    '"1e999"',
    '" "',
    '""',
    '"\\u0037"',
    '"9223372036854775808"',
]


@pytest.mark.parametrize("kind", [pa.float64(), pa.int64(), pa.string(), pa.bool_()], ids=str)
@pytest.mark.parametrize("ending", ["}", ' , "b": 1}', ', "n": {"a": true}}'])
def test_a_line_of_json_is_good_or_bad_whatever_its_neighbours_are(kind, ending, tmp_path, capsys):
    """Lines are read as they stand, or mended, as the piece demands."""

    def found(cells, piece_bytes):
        path = tmp_path / "rows.json"
        path.write_text("".join(f'{{"a": {cell}{ending}\n' for cell in cells))
        raw = RawFolder(tmp_path, (RawFile("rows.json"),), "", 999)
        source = JsonLines("rows.json", {"a": kind}, Cells(("NA",)))
        blocks = raw.blocks(source, piece_bytes)
        return {line: row["a"] for block in blocks for line, row in zip(block.lines, block.table.to_pylist(), strict=True)}

    alone = found(CELLS, 1)
    assert found(CELLS, 1 << 20) == alone
    good = [cell for line, cell in enumerate(CELLS, 1) if line in alone]
    assert [*found(good, 1 << 20).values()] == [*alone.values()]
    expected = {
        pa.float64(): {"true": 1, "false": 0, "7": 7, "7.0": 7, "-7": -7, '"7"': 7, '"true"': 1, "null": None, '"NA"': None}
        | {"1e3": 1000, "7.5": 7.5, '"07.0"': 7, '" -7 "': -7, '"+.5e1"': 5, '""': None, '"\\u0037"': 7}
        | {'"9223372036854775808"': 2.0**63},
        pa.int64(): {"7": 7, "7.0": 7, "-7": -7, '"7"': 7, "null": None, '"NA"': None, '"07.0"': 7, '" -7 "': -7, '""': None}
        | {'"\\u0037"': 7},
        pa.string(): {"true": "true", "false": "false", "7": "7", "-7": "-7", '"7"': "7", '"true"': "true", "null": None}
        | {'"NA"': None}
        | {cell: json.loads(cell) for cell in CELLS[15:] if cell.startswith('"')},
        pa.bool_(): {"true": True, "false": False, "null": None, '"NA"': None, '""': None},
    }
    assert dict(zip(good, alone.values(), strict=True)) == expected[kind]


def test_lines_of_json_with_an_open_text_are_bad_alone(tmp_path):
    """One between them, in which values have to be mended, is no part of a text."""
    first, last = '{"l": ["a"], "z": [q", "u": "7", "x": 1}', '{"z": ["p], "u": "8", "l": ["a", "b"], "x": "2"}'
    (tmp_path / "rows.json").write_text(first + '\n{"l": [1], "u": "5", "x": "2", "z": "w"}\n' + last + "\n")
    raw = RawFolder(tmp_path, (RawFile("rows.json"),), "", 9)
    (block,) = raw.blocks(JsonLines("rows.json", {"u": pa.int64(), "x": pa.float64(), "l": pa.list_(pa.string())}, Cells()))
    assert block.table.to_pylist() == [{"u": 5, "x": 2.0, "l": ["1"]}]
    assert [row.line for row in block.bad_rows] == [1, 3]


# What YAML makes of a text.


def test_anchors_merges_and_1e6_in_a_configuration(tmp_path):
    text = """
    x-number: &number {kind: number, scale: log}
    files: [rows.csv]
    features:
      user: {kind: id, hash: {num_buckets: 1e3, seed: 2.0}}
      x: *number
      x_plain: {<<: *number, column: x, scale: none}
    tasks: [{name: y, label: y}]
    """.replace("\n    ", "\n")
    config = small(tmp_path, SMALL)
    config.write_text(text)
    manifest = make(config.parent, tmp_path / "out")
    assert manifest.preprocessing["config"]["features"] == {
        "user": {"kind": "id", "hash": {"num_buckets": 1000, "seed": 2}},
        "x": {"kind": "number", "scale": "log"},
        "x_plain": {"kind": "number", "column": "x", "scale": "none"},
    }
    assert {table.name: table.num_rows for table in manifest.tables}["user"] == 1001


def test_a_feature_called_on_is_told_its_quotes(tmp_path, capsys):
    config = small(tmp_path, SMALL)
    config.write_text(config.read_text().replace("  user:", "  on:"))
    message = told(capsys, config, tmp_path / "out")
    assert "my_table.yaml" in message
    assert "YAML reads the key on as true: put it in quotes" in message
    config.write_text(config.read_text().replace("  on:\n", "  'on':\n    column: user\n"))
    assert [feature.name for feature in make(config.parent, tmp_path / "out").features] == ["on", "x"]


def test_whole_numbers_of_the_command_line_may_be_1e3(tmp_path, capsys):
    config = small(tmp_path, SMALL + "u1,one,1\n")
    manifest = make(config.parent, tmp_path / "out", "--max-bad-rows", "1e3", "--seed", "2e3", "--workers", "1.0")
    assert manifest.preprocessing["seed"] == 2000
    for option in ("--max-bad-rows", "--seed", "--workers"):
        with pytest.raises(SystemExit):
            run(config, tmp_path / "none", option, "1.5")
        assert f"{option}: a whole number of 0 or more is needed, such as 1000 or 1e6, found '1.5'" in capsys.readouterr().err


# Raw ids of 64 bits.


BORDERS = [-(2**63), -1, 0, 2**53 + 1, 2**63 - 1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "mapping", [{"managed": {"slots": 3}}, {"hash": {"num_buckets": 2**40}}, {}], ids=["managed", "hash", "vocabulary"]
)
def test_every_integer_of_64_bits_is_an_id(form, mapping, tmp_path):
    values = [value for value in (*BORDERS, None) for _ in range(6)]
    columns = {"u": values, "x": list(range(36)), "y": [row % 2 for row in range(36)], "row": list(range(36))}
    features = {"u": {"kind": "id", "type": "int", **mapping}, "x": {"kind": "number"}}
    config = write(tmp_path, form, columns, features=features, keys={"row": {"type": "int"}}, split=WHOLE)
    make(config.parent, tmp_path / "out")
    found = {row["key.row"]: row["u"] for row in read(tmp_path / "out")}
    if "managed" in mapping:
        expected = [plain_key(value, 0) for value in values]
    elif "hash" in mapping:
        expected = [0 if value is None else plain_buckets(value, 0, 2**40, 1)[0] for value in values]
    else:
        ids, _ = vocabulary(tmp_path / "out", "u")
        assert set(ids) == set(BORDERS)
        expected = [ids.get(value, 0) for value in values]
    assert [found[row] for row in range(36)] == expected
    raw = pa.table({"u": pa.array(values, pa.int64()), "x": pa.array([1.0] * 36)})
    encoder = Encoder.load(tmp_path / "out")
    assert encoder.inputs(raw).ids["u"][0].tolist() == expected
    assert encoder.encode(encoder.canonical(raw)).column("u").to_pylist() == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [2**63, 2**64 - 1])
def test_an_unsigned_integer_beyond_is_refused_as_int_and_taken_as_text(form, value, tmp_path, capsys):
    column = pa.array([*range(30), value], pa.uint64()) if form == "parquet" else [*range(30), value]
    columns = {"u": column, "y": [row % 2 for row in range(31)], "row": list(range(31))}
    keys = {"keys": {"row": {"type": "int"}}, "split": WHOLE}
    config = write(tmp_path, form, columns, features={"u": {"kind": "id", "type": "int", "managed": {"slots": 3}}}, **keys)
    message = told(capsys, config, tmp_path / "out")
    assert f"line {32 if form == 'csv' else 31}:" in message
    assert str(value) in message
    assert form == "json" or "Integers have a sign; as text, type: string, it can be an id." in message
    config = write(tmp_path, form, columns, features={"u": {"kind": "id", "managed": {"slots": 3}}}, **keys)
    make(config.parent, tmp_path / "out")
    found = {row["key.row"]: row["u"] for row in read(tmp_path / "out")}
    assert found[30] == plain_key(str(value), 0)
    rows = pa.table({"u": pa.array([value], pa.uint64())})
    assert Encoder.load(tmp_path / "out").inputs(rows).ids["u"][0].tolist() == [plain_key(str(value), 0)]


@pytest.mark.parametrize(("kind", "exact"), [(pa.float64(), 2**53), (pa.float32(), 2**24)])
def test_floats_that_may_have_been_rounded_are_no_integers(kind, exact, tmp_path, capsys):
    """2^53 + 1 is written as 2^53: two ids would be one, and none would tell."""
    features = {"u": {"kind": "id", "type": "int", "managed": {"slots": 3}}}
    for value, code in ((exact - 1, 0), (exact, 2), (-exact, 2)):
        columns = {"u": pa.array([*map(float, range(30)), float(value)], kind), "y": [row % 2 for row in range(31)]}
        config = write(tmp_path, "parquet", columns, features=features)
        assert run(config, tmp_path / f"{value}") == code
        if code:
            assert "rounded from 2^53 on, in float32 from 2^24 on: give integers, or text." in capsys.readouterr().err
        rows, encoder = pa.table({"u": pa.array([float(value)], kind)}), Encoder.load(tmp_path / f"{exact - 1}")
        if code:
            with pytest.raises(DataError, match=r"u must be an integer of 64 bits, found .* Floats are rounded"):
                encoder.inputs(rows)
        else:
            assert encoder.inputs(rows).ids["u"][0].tolist() == [plain_key(value, 0)]


def test_a_list_of_json_with_a_float_that_may_have_been_rounded_is_refused(tmp_path, capsys):
    text = "u,y\n" + "".join(f'"[{row}]",{row % 2}\n' for row in range(30)) + '"[1.0, 9007199254740993.0]",1\n'
    config = small(tmp_path, text, features={"u": {"kind": "ids", "type": "int", "managed": {"slots": 3}}})
    assert "line 32: u must be a JSON list of integers of 64 bits" in told(capsys, config, tmp_path / "out")
