"""JSON lines against Python's json module, on random records and on lines that are wrong in every way."""

import gzip
import json
import random
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from mmlrec.errors import DataError
from preprocessing.reading.json_lines import JsonLines
from preprocessing.reading.raw_files import RawFile, RawFolder

COLUMNS = {
    "id": pa.int64(),
    "price": pa.float32(),
    "name": pa.string(),
    "sold": pa.bool_(),
    "tags": pa.list_(pa.string()),
    "sizes": pa.list_(pa.float32()),
    "style": pa.json_(),
}


def read(folder, text, max_bad_rows=0, columns=COLUMNS, piece_bytes=1 << 20, name="a.json"):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    raw = RawFolder(folder, (RawFile("a.json"),), "", max_bad_rows)
    blocks = list(raw.blocks(JsonLines("a.json", columns), piece_bytes))
    rows = [row for block in blocks for row in block.table.to_pylist()]
    return rows, [line for block in blocks for line in block.lines.tolist()], raw.bad_rows.counts


def text_of(draw):
    """Strings with what a parser may stumble over, among them the names of keys."""
    parts = [
        "a",
        " ",
        "é",
        "漢",
        "😀",
        '"',
        "\\",
        "\n",
        "\t",
        "\x00",
        "/",
        "{",
        "}",
        "[",
        ",",
        ":",
        "null",
        "style",
        '"style": {',
    ]
    return "".join(draw.choice(parts) for _ in range(draw.randrange(8)))


def nested(draw, depth):
    if depth == 0 or draw.random() < 0.4:
        return draw.choice([None, True, draw.randrange(-9, 9), draw.random(), text_of(draw)])
    if draw.random() < 0.5:
        return [nested(draw, depth - 1) for _ in range(draw.randrange(3))]
    return {draw.choice(["style", "id", f"{text_of(draw)}!"]): nested(draw, depth - 1) for _ in range(draw.randrange(3))}


def record(draw):
    """Any of the wanted keys, or null instead of a value, and others, in any order."""
    values = {
        "id": draw.choice([0, -1, 2**63 - 1, -(2**63), draw.randrange(-(10**6), 10**6)]),
        "price": draw.choice([0, 3, -2.5, 1e-3, draw.random(), 12345678901234567890]),
        "name": text_of(draw),
        "sold": draw.random() < 0.5,
        "tags": [draw.choice([None, text_of(draw)]) for _ in range(draw.randrange(4))],
        "sizes": [draw.choice([None, 1, draw.random()]) for _ in range(draw.randrange(3))],
        "style": {text_of(draw): draw.choice([text_of(draw), 3, None]) for _ in range(draw.randrange(4))},
        "other": nested(draw, 3),
        f"{text_of(draw)}!": nested(draw, 3),
    }
    if draw.random() < 0.1:
        values["style"] = {"deep": nested(draw, 3), "style": {"style": 1}}
    names = [name for name in values if draw.random() < 0.7]
    draw.shuffle(names)
    return {name: None if draw.random() < 0.1 else values[name] for name in names}


def same(found, wanted):
    """A row as read is the record: numbers as float32, the object as text that means the same."""
    for name, value in found.items():
        truth = wanted.get(name)
        if value is None or truth is None:
            assert value is truth is None, name
        elif name == "style":
            assert json.loads(value) == truth
        elif name == "price":
            assert value == pytest.approx(truth, rel=1e-6)
        elif name == "sizes":
            assert [item is None for item in value] == [item is None for item in truth]
            assert np.allclose([item or 0 for item in value], [item or 0 for item in truth], rtol=1e-6, atol=0)
        else:
            assert value == truth, name


@pytest.mark.parametrize("piece_bytes", [200, 1 << 20])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\n\n \n"])
def test_random_records_are_read_as_the_json_module_reads_them(tmp_path, piece_bytes, ascii_only, line_end):
    draw = random.Random(f"{ascii_only} {line_end}")
    records = [record(draw) for _ in range(1500)]
    text = "".join(
        json.dumps(row, ensure_ascii=ascii_only, separators=draw.choice([None, (",", ":"), (" ,", " : ")])) + line_end
        for row in records
    )
    rows, lines, _ = read(tmp_path, text, piece_bytes=piece_bytes)
    assert lines == [1 + i * line_end.count("\n") for i in range(len(records))]
    for found, line in zip(rows, text.split(line_end), strict=False):
        assert list(found) == list(COLUMNS)
        same(found, json.loads(line))


def test_byte_order_mark_and_a_last_line_without_an_end(tmp_path):
    rows, lines, _ = read(tmp_path, '\ufeff{"id": 1}\n{"id": 2}', columns={"id": pa.int64()})
    assert (rows, lines) == ([{"id": 1}, {"id": 2}], [1, 2])


def test_packed_file(tmp_path):
    rows, _, _ = read(tmp_path, gzip.compress(b'{"name": "a"}\n{}\n'), columns={"name": pa.string()}, name="a.json.gz")
    assert rows == [{"name": "a"}, {"name": None}]


BAD_LINES = {
    b'{"id": 1': "no JSON (Expecting ',' delimiter",
    b"{'id': 1}": "no JSON (Expecting property name",
    b'{"id": 1,}': "no JSON (",
    b'{"id": 01}': "no JSON (",
    b'{"name": "a\tb"}': "no JSON (Invalid control character",
    b'{"id": 1} {"id": 2}': "no JSON (Extra data",
    b'{"id": 1}, ': "no JSON (Extra data",
    b'{"id": 1} null {"id": 2}': "no JSON (Extra data",
    b"id,price": "no JSON (Expecting value",
    b"null": "a JSON object is needed, found b'null'",
    b"7": "a JSON object is needed, found b'7'",
    b'[{"id": 1}]': "a JSON object is needed, found b'[{",
    b'"text"': "a JSON object is needed",
    b'{"other": "\xff"}': "bytes that are not utf-8 (invalid start byte)",
    b'{"name": "caf\xe9"}': "bytes that are not utf-8",
    b'{"name": "\\ud83d"}': "surrogate",
    b'{"id": 1.0}': "id must be an integer, found 1.0",
    b'{"id": "1"}': "id must be an integer, found '1'",
    b'{"id": true}': "id must be an integer, found True",
    b'{"id": 9223372036854775808}': "id does not fit into 64 bits, found 9223372036854775808. Mend the line or fetch",
    b'{"id": -9223372036854775809}': "does not fit into 64 bits",
    b'{"id": 1, "id": 2}': "the key id stands twice in the line",
    b'{"price": "2"}': "price must be a number, found '2'",
    b'{"price": NaN}': "price is nan or infinite, or too large",
    b'{"price": -Infinity}': "price is nan or infinite, or too large",
    b'{"price": 1e99}': "price is nan or infinite, or too large",
    b'{"price": 1e999}': "too big",
    b'{"sizes": [1, NaN]}': "sizes is nan or infinite, or too large",
    b'{"sizes": [1, "2"]}': "sizes holds a value that must be a number, found '2'",
    b'{"name": 5}': "name must be a string, found 5",
    b'{"name": {"a": 1}}': "name must be a string, found {'a': 1}",
    b'{"sold": 1}': "sold must be true or false, found 1",
    b'{"tags": "a"}': "tags must be a list, found 'a'",
    b'{"tags": {}}': "tags must be a list, found {}",
    b'{"tags": [["a"]]}': "tags holds a value that must be a string, found ['a']",
    b'{"style": "a"}': "style must be an object, found 'a'",
    b'{"style": []}': "style must be an object, found []",
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_stops_the_run_or_is_passed_over(tmp_path, bad, capsys):
    good = b"".join(b'{"id": %d, "name": "n", "unwanted": NaN}\n' % i for i in range(1, 51))
    text = good + bad + b"\n" + good
    with pytest.raises(DataError) as stop:
        read(tmp_path, text)
    message = str(stop.value)
    assert message.startswith(f"{tmp_path / 'a.json'}, line 51: ")
    assert BAD_LINES[bad] in message
    rows, lines, counts = read(tmp_path, text, max_bad_rows=1)
    assert [row["id"] for row in rows] == [*range(1, 51)] * 2
    assert lines == [*range(1, 51), *range(52, 102)]
    assert counts == {"a.json": 1}
    assert f"skipped: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64()])
def test_numbers_of_both_sizes(tmp_path, kind):
    text = '{"price": 0.1}\n{"price": "x"}\n{"price": 1e999}\n{"price": 7}\n'
    rows, lines, _ = read(tmp_path, text, columns={"price": kind}, max_bad_rows=2)
    assert [row["price"] for row in rows] == pa.array([0.1, 7], kind).to_pylist()
    assert lines == [1, 4]


def test_many_bad_lines_are_told_in_their_order(tmp_path, capsys):
    lines = [json.dumps({"id": "x" if i % 3 == 0 else i, "price": 1}) for i in range(1, 100)]
    lines[9:12] = ['{"price": NaN}', "]", '{"price": 1e999}']
    rows, numbers, counts = read(tmp_path, "\n".join(lines), max_bad_rows=40)
    good = [i for i in range(1, 100) if i % 3 and i not in (10, 11, 12)]
    assert [row["id"] for row in rows] == numbers == good
    assert counts == {"a.json": 99 - len(good)}
    assert "line 3: id must be an integer, found 'x'. Mend the line" in capsys.readouterr().err.splitlines()[0]


def test_a_key_that_no_line_has_is_null(tmp_path):
    rows, _, _ = read(tmp_path, '{"a": 1}\n{}\n')
    assert rows == [dict.fromkeys(COLUMNS)] * 2


@pytest.mark.parametrize(
    "text", ['[{"id": 1}, {"id": 2}]', '[\n  {"id": 1},\n  {"id": 2}\n]\n', '\ufeff \n[{"id": 1},\n{"id": 2}]']
)
def test_an_array_instead_of_lines_is_told_with_the_remedy(tmp_path, text):
    with pytest.raises(DataError, match=r"a\.json, line 1: the file begins with '\[', so it is one JSON array") as stop:
        read(tmp_path, text, max_bad_rows=1000)
    program = str(stop.value).split("python -c '")[1].split("'")[0]
    array = text.lstrip("\ufeff")
    unpacked = subprocess.run([sys.executable, "-c", program], input=array, capture_output=True, text=True, check=True).stdout
    rows, _, _ = read(tmp_path, unpacked)
    assert [row["id"] for row in rows] == [row["id"] for row in json.loads(array)]


def test_a_long_array_without_line_ends_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("preprocessing.reading.raw_files.LONGEST_LINE", 1000)
    with pytest.raises(DataError, match=r"no line end within .* of a JSON array, put each object on a line of its own"):
        read(tmp_path, json.dumps([{"id": 1}] * 500), piece_bytes=100)


@pytest.mark.parametrize("text", ["", "\n \n", "{}x\n"])
def test_a_file_without_a_row(tmp_path, text):
    with pytest.raises(DataError, match=r"No row of the file is good|the file is empty"):
        read(tmp_path, text, max_bad_rows=1)


def test_pretty_printed_objects_are_told(tmp_path):
    with pytest.raises(DataError, match="line 1: no JSON"):
        read(tmp_path, json.dumps({"id": 1, "price": 2}, indent=1))
