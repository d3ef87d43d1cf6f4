"""Raw text as blocks: bad rows passed over and counted, headers, comments, numbers, archives."""

import csv
import gzip
import io
import zipfile

import numpy as np
import pyarrow as pa
import pytest

from mmlrec.errors import ConfigError, DataError
from mmlrec.schema import DatasetManifest
from preprocessing.command_line import main
from preprocessing.reading import packed as packing
from preprocessing.reading.delimited import DelimitedText
from preprocessing.reading.raw_files import RawFile, RawFolder
from preprocessing.rows.join import IdIndex

INT, NUMBER, TEXT = pa.int64(), pa.float32(), pa.string()
COLUMNS = {"id": INT, "price": NUMBER, "name": TEXT}
CSV = DelimitedText("a.csv", ",", COLUMNS)


def read(folder, text, max_bad_rows=0, columns=COLUMNS, block_bytes=1 << 20, separator=",", **form):
    (folder / "a.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    raw = RawFolder(folder, (RawFile("a.csv"),), "", max_bad_rows)
    blocks = list(raw.blocks(DelimitedText("a.csv", separator, columns, **form), block_bytes))
    rows = [tuple(row.values()) for block in blocks for row in block.table.to_pylist()]
    return rows, [line for block in blocks for line in block.lines.tolist()], raw.bad_rows.counts


def test_numbers_and_missing_numbers(tmp_path):
    rows, lines, _ = read(tmp_path, "1,2.5,a\n-7,,b\n,1e-3,\n4,-.5E2, c \n5, 7 ,d\n")
    assert rows == [
        (1, 2.5, "a"),
        (-7, None, "b"),
        (None, pytest.approx(1e-3), ""),
        (4, -50.0, " c "),
        (5, 7.0, "d"),
    ]
    assert lines == [1, 2, 3, 4, 5]


BAD_LINES = {
    b"1,2": "3 fields (id,price,name) expected, 2 found",
    b"1,2,3,4": "4 found",
    b"x,2,a": "id must be an integer, found 'x'",
    b"99999999999999999999,2,a": "does not fit into 64 bits",
    b"1,two,a": "price must be a number, found 'two'",
    b"1,2_0,a": "price must be a number, found '2_0'",
    b"1,nan,a": "price is nan or infinite, or too large",
    b"1,-inf,a": "price is nan or infinite, or too large",
    b"1,1e99,a": "price is nan or infinite, or too large",
    b"1,2,\xff\xfe": "not utf-8",
    b"1,2,a\rb": "a carriage return stands within the line",
    b"": "1 found",
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_stops_the_run_or_is_passed_over(tmp_path, bad, capsys):
    good = b"".join(b"%d,%d.5,n%d\n" % (i, i, i) for i in range(1, 51))
    text = good + bad + b"\n" + good
    with pytest.raises(DataError) as stop:
        read(tmp_path, text)
    message = str(stop.value)
    assert message.startswith(f"{tmp_path / 'a.csv'}, line 51: ")
    assert BAD_LINES[bad] in message
    rows, lines, counts = read(tmp_path, text, max_bad_rows=1)
    expected = [(i, i + 0.5, f"n{i}") for i in range(1, 51)]
    assert rows == expected * 2
    assert lines == [*range(1, 51), *range(52, 102)]
    assert counts == {"a.csv": 1}
    assert f"skipped: {message}" in capsys.readouterr().err


def test_one_bad_row_more_than_allowed_stops(tmp_path, capsys):
    text = "".join(f"{'x' if i % 3 == 0 else i},1,a\n" for i in range(1, 100))
    rows, lines, counts = read(tmp_path, text, max_bad_rows=33, block_bytes=64)
    assert [row[0] for row in rows] == lines == [i for i in range(1, 100) if i % 3]
    assert counts == {"a.csv": 33}
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 10
    assert told[-1].endswith("(further ones are only counted)")
    with pytest.raises(DataError, match=r"line 99: .*It is bad row 33; --max-bad-rows allows 32\."):
        read(tmp_path, text, max_bad_rows=32, block_bytes=64)


def test_a_file_of_bad_rows_only_is_refused_whatever_is_allowed(tmp_path):
    with pytest.raises(DataError, match=r"line 1: 3 fields .*No row of the file is good"):
        read(tmp_path, "x;y;z\n" * 5, max_bad_rows=100)


def test_header_gives_the_columns_by_name(tmp_path):
    text = "\ufeffname,more,id,price\r\na,7,1,2.5\r\nb,x,2,\r\n"
    rows, lines, _ = read(tmp_path, text, header=True)
    assert rows == [(1, 2.5, "a"), (2, None, "b")]
    assert lines == [2, 3]
    with pytest.raises(DataError, match=r"a\.csv, line 1: the header lacks price; it is 'name,more,id,cost'"):
        read(tmp_path, text.replace("price", "cost"), header=True)
    with pytest.raises(DataError, match=r"a\.csv, line 3: id must be an integer, found 'q'"):
        read(tmp_path, text.replace(",2,", ",q,"), header=True, block_bytes=30)
    with pytest.raises(DataError, match="is empty"):
        read(tmp_path, "name,id,price\n", header=True)


def test_quoted_fields_hold_separators_and_quotes(tmp_path):
    text = '"name","more, or less",id,"price"\r\n"American President, The (1995)",x,"7","2.5"\r\n""" is ""a""",,8,""\r\n'
    rows, lines, _ = read(tmp_path, text, header=True, quoted=True)
    assert rows == [(7, 2.5, "American President, The (1995)"), (8, None, '" is "a"')]
    assert lines == [2, 3]
    with pytest.raises(ConfigError, match="a separator of one ASCII character, not '::'"):
        DelimitedText("a.csv", "::", COLUMNS, quoted=True)


@pytest.mark.parametrize("seed", range(20))
def test_random_quoted_text_is_read_as_the_csv_module_does(tmp_path, seed):
    """Of every line by itself; a line that csv reads on from, or that has too few or too many fields, is a bad row."""
    random = np.random.default_rng(seed)
    line_ends = "\n" if seed % 2 else "\r\n"
    lines = ["".join(random.choice(list('",ab '), random.integers(1, 14))) for _ in range(3000)]
    expected = []
    for number, line in enumerate(lines, start=1):
        reader = csv.reader([line + "\n", ""])
        fields = next(reader)
        if reader.line_num == 1 and len(fields) == 3:
            expected.append((number, tuple(fields)))
    assert len(expected) > 100
    columns = dict.fromkeys("xyz", TEXT)
    text = line_ends.join(lines) + line_ends
    rows, numbers, counts = read(tmp_path, text, len(lines), columns, block_bytes=10_000, quoted=True)
    assert list(zip(numbers, rows, strict=True)) == expected
    assert counts == {"a.csv": len(lines) - len(expected)}


@pytest.mark.parametrize("seed", range(5))
def test_random_values_written_by_the_csv_module_come_back(tmp_path, seed):
    random = np.random.default_rng(seed)
    values = [tuple("".join(random.choice(list('",;é x1'), random.integers(0, 9))) for _ in range(3)) for _ in range(3000)]
    text = io.StringIO()
    csv.writer(text, delimiter=";", quoting=csv.QUOTE_ALL if seed % 2 else csv.QUOTE_MINIMAL).writerows(values)
    (tmp_path / "a.csv").write_text(text.getvalue(), encoding="iso-8859-1", newline="")
    source = DelimitedText("a.csv", ";", dict.fromkeys("xyz", TEXT), encoding="iso-8859-1", quoted=True)
    blocks = RawFolder(tmp_path, (RawFile("a.csv"),), "").blocks(source, 5000)
    assert [tuple(row.values()) for block in blocks for row in block.table.to_pylist()] == values


BAD_QUOTED_LINES = {
    b'1,2,"a': "a quote is not closed on the line: '\"a'",
    b'1,2,"a""': "a quote is not closed",
    b'1,"2,a\nb",c': "a quote is not closed on the line: '\"2,a'",  # a line end within quotes: both lines are bad
    b'1,"2,5",a,b': "3 fields (id,price,name) expected, 4 found",
    b'"x",2,a': "id must be an integer, found 'x'",
    b'1,2,"a\rb"': "a carriage return stands within the line",
    b'1,"2,a\nb\r",c': "a quote is not closed",  # as many rows as lines
}


@pytest.mark.parametrize("bad", BAD_QUOTED_LINES)
def test_a_bad_quoted_line_stops_the_run_or_is_passed_over(tmp_path, bad):
    good = "".join(f'{i},"{i}.5","n, ""{i}"""\n' for i in range(1, 51)).encode()
    text = good + bad + b"\n" + good
    with pytest.raises(DataError) as stop:
        read(tmp_path, text, quoted=True)
    assert str(stop.value).startswith(f"{tmp_path / 'a.csv'}, line 51: ")
    assert BAD_QUOTED_LINES[bad] in str(stop.value)
    num_bad = 1 + bad.count(b"\n")
    rows, lines, counts = read(tmp_path, text, max_bad_rows=num_bad, quoted=True)
    assert rows == [(i, i + 0.5, f'n, "{i}"') for i in range(1, 51)] * 2
    assert lines == [*range(1, 51), *range(51 + num_bad, 101 + num_bad)]
    assert counts == {"a.csv": num_bad}


def test_an_unclosed_quote_in_the_header_is_told(tmp_path):
    with pytest.raises(DataError, match=r"a\.csv, line 1: a quote is not closed on the line: '\"price'"):
        read(tmp_path, 'id,name,"price\n1,a,2\n', header=True, quoted=True)


@pytest.mark.parametrize("block_bytes", [8, 1 << 20])
def test_comments_and_blank_lines_are_passed_over_and_lines_keep_their_numbers(tmp_path, block_bytes):
    text = "|first\n1,2,a\n\n3,4,|b\n| last,\n5,6,c\n\n"
    rows, lines, counts = read(tmp_path, text, comment="|", block_bytes=block_bytes)
    assert rows == [(1, 2.0, "a"), (3, 4.0, "|b"), (5, 6.0, "c")]
    assert lines == [2, 4, 6]
    assert counts == {}
    with pytest.raises(DataError, match="line 6: id must be an integer"):
        read(tmp_path, text.replace("5,6", "five,6"), comment="|", block_bytes=block_bytes)


@pytest.mark.parametrize("block_bytes", [8, 1 << 20])
def test_blank_lines_alone_are_passed_over_where_that_is_asked_for(tmp_path, block_bytes):
    text = "\n1,2,a\n \t\n3,4,b\n\r\n5,6,c\n,,\n"
    rows, lines, counts = read(tmp_path, text, skip_blank=True, block_bytes=block_bytes)
    assert rows == [(1, 2.0, "a"), (3, 4.0, "b"), (5, 6.0, "c"), (None, None, "")]
    assert (lines, counts) == ([2, 4, 6, 7], {})
    with pytest.raises(DataError, match=r"a\.csv, line 1: 3 fields .* expected, 1 found"):
        read(tmp_path, text, block_bytes=block_bytes)
    assert read(tmp_path, "1\n\n2\n", columns={"id": INT}, skip_blank=True)[0] == [(1,), (None,), (2,)]


def packed(path, text):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(path.name.removesuffix(".zip"), text)


@pytest.mark.parametrize("form", ["gz", "zip"])
def test_what_unpacks_to_too_much_is_refused(tmp_path, form, monkeypatch):
    """Rows like any others: neither their length nor their number is out of the ordinary, only that they pack so well."""
    text = b"1,2,a\n" * 500_000
    path = tmp_path / f"a.csv.{form}"
    packed(path, text)
    most = packing.MOST_TIMES * path.stat().st_size
    assert most < len(text)
    assert sum(len(block.table) for block in RawFolder(tmp_path, (RawFile("a.csv"),), "").blocks(CSV)) == 500_000
    monkeypatch.setattr(packing, "FREE_BYTES", 1 << 20)
    rows = []
    with pytest.raises(DataError, match=r"packed bytes unpack to more than [\d,]+, as only .* unpack it by hand") as stop:
        rows.extend(len(block.table) for block in RawFolder(tmp_path, (RawFile("a.csv"),), "").blocks(CSV, 1 << 16))
    assert str(stop.value).startswith(f"{path}")
    assert 6 * sum(rows) <= max(most, 1 << 20)
    path.unlink()
    (tmp_path / "a.csv").write_bytes(text)  # as the message advises
    assert sum(len(block.table) for block in RawFolder(tmp_path, (RawFile("a.csv"),), "").blocks(CSV)) == 500_000


def test_a_zip_gives_no_more_than_it_says_beforehand(tmp_path, monkeypatch):
    """A size that is told too small gets nothing past the bound."""
    path = tmp_path / "a.csv.zip"
    packed(path, b"1,2,a\n" * 500_000)
    content = path.read_bytes().replace((3_000_000).to_bytes(4, "little"), (600_000).to_bytes(4, "little"))
    path.write_bytes(content)
    monkeypatch.setattr(packing, "FREE_BYTES", 1 << 20)
    with pytest.raises(DataError, match="the zip file is truncated or damaged"):
        list(RawFolder(tmp_path, (RawFile("a.csv"),), "").blocks(CSV))


@pytest.mark.parametrize("member", ["../a.csv", "/a.csv", "x/../../a.csv", "..\\a.csv", "C:\\a.csv"])
def test_an_archive_with_a_path_out_of_its_folder_is_refused(tmp_path, member):
    with zipfile.ZipFile(tmp_path / "a.csv.zip", "w") as archive:
        archive.writestr("a.csv", "1,2,a\n")
        archive.writestr(member, "1,2,a\n")
    with pytest.raises(DataError, match=r"a\.csv\.zip: the archive holds '.*', a path that leads out of its folder"):
        list(RawFolder(tmp_path, (RawFile("a.csv"),), "").blocks(CSV))


@pytest.mark.parametrize("name", ["a.csv.zip", "a.zip", "A.ZIP", "a.csv.gz", "A.csv"])
def test_packed_files_and_other_case_are_found(tmp_path, name):
    if name.lower().endswith("zip"):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("folder/", "")
            archive.writestr("folder/b.csv", "9,9,z\n")
            archive.writestr("folder/A.csv", "1,2,a\n" * 3)
    else:
        (tmp_path / name).write_bytes(gzip.compress(b"1,2,a\n" * 3) if name.endswith("gz") else b"1,2,a\n" * 3)
    raw = RawFolder(tmp_path, (RawFile("a.csv"),), "")
    (block,) = raw.blocks(CSV)
    assert block.table.to_pylist() == [{"id": 1, "price": 2.0, "name": "a"}] * 3
    assert list(raw.sha256()) == [name]


def test_damaged_and_wrong_archives_are_told(tmp_path):
    path = tmp_path / "a.csv.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.csv", "".join(f"{i},{i * i},text\n" for i in range(9999)))
    whole = path.read_bytes()
    middle = len(whole) // 2
    for content in (whole[:middle], whole[:middle] + bytes(64) + whole[middle + 64 :]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.csv\.zip: the zip file is truncated or damaged"):
            list(RawFolder(tmp_path, (RawFile("a.csv"),), "").blocks(CSV))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("b.csv", "")
        archive.writestr("c.csv", "")
    with pytest.raises(DataError, match=r"the archive holds no a\.csv"):
        list(RawFolder(tmp_path, (RawFile("a.csv"),), "").blocks(CSV))


def test_files_in_subfolders_keep_their_path_in_the_fingerprints(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.csv").write_text(name)
    raw = RawFolder(tmp_path, (RawFile("x/t.csv"), RawFile("y/t.csv")), "")
    assert list(raw.sha256()) == ["x/t.csv", "y/t.csv"]


@pytest.mark.parametrize("packed", [False, True])
def test_files_are_found_in_the_folders_of_an_unpacked_archive(tmp_path, packed):
    inner = tmp_path / "Data 2.0" / "data"
    inner.mkdir(parents=True)
    (tmp_path / ".download-x").mkdir()
    (tmp_path / ".download-x" / "a.csv").write_text("half")
    if packed:
        (inner / "a.csv.gz").write_bytes(gzip.compress(b"7\n"))
    else:
        (inner / "a.csv").write_text("7\n")
    raw = RawFolder(tmp_path, (RawFile("a.csv"),), "advice")
    assert [block.table["id"].to_pylist() for block in raw.blocks(DelimitedText("a.csv", ",", {"id": pa.int64()}))] == [[7]]
    assert list(raw.sha256()) == [f"Data 2.0/data/a.csv{'.gz' if packed else ''}"]
    (tmp_path / "a.csv").write_text("8\n")  # what lies at the top comes first
    assert RawFolder(tmp_path, (RawFile("a.csv"),), "advice").paths["a.csv"] == tmp_path / "a.csv"


@pytest.mark.parametrize("workers", [1, 4])
def test_rows_that_are_left_out_for_a_reason_are_counted(tmp_path, workers):
    (tmp_path / "a.csv").write_text("".join(f"{k}\n" for k in range(1000)))
    raw = RawFolder(tmp_path, (RawFile("a.csv"),), "advice", workers=workers)

    def odd(block):
        ids = block.table["id"].to_numpy()
        return block.only(ids % 2 == 1, "even").only(ids[ids % 2 == 1] < 900).table["id"].to_pylist()

    source = DelimitedText("a.csv", ",", {"id": pa.int64()})
    list(raw.map(odd, source, 64, count_bad_rows=False))
    assert raw.passed_over == {}
    assert [number for numbers in raw.map(odd, source, 64) for number in numbers] == list(range(1, 900, 2))
    assert raw.passed_over == {"a.csv": {"even": 500}}


def test_ids_are_found_over_many_blocks_and_a_second_occurrence_is_a_bad_row(tmp_path):
    random = np.random.default_rng(0)
    ids = random.permutation(np.arange(-500, 500) * 7)
    ids[700] = ids[100]  # the second occurrence; the first stays
    (tmp_path / "left.csv").write_text("".join(f"{i}\n" for i in ids))
    wanted = random.choice(ids, 300)
    wanted[[5, 250]] = 1, 10**9  # unknown
    (tmp_path / "right.csv").write_text("".join(f"{i}\n" for i in wanted))
    files = (RawFile("left.csv"), RawFile("right.csv"))

    def found(max_bad_rows):
        raw = RawFolder(tmp_path, files, "", max_bad_rows)
        index = IdIndex("id", raw.blocks(DelimitedText("left.csv", ",", {"id": INT}), 200), raw.bad_rows)
        ((*found, counts),) = raw.map(
            lambda right: (*index.find(right), raw.bad_rows.counts), DelimitedText("right.csv", ",", {"id": INT})
        )
        return *found, counts

    block, rows, counts = found(3)
    known = [i for i in wanted.tolist() if i in set(ids.tolist())]
    assert block.table["id"].to_pylist() == known
    assert rows.tolist() == [ids.tolist().index(i) for i in known]
    assert counts == {"left.csv": 1, "right.csv": 2}
    with pytest.raises(DataError, match=r"left\.csv, line 701: id -?\d+ appears a second time"):
        found(0)
    with pytest.raises(DataError, match=r"right\.csv, line 6: id 1 is not in left\.csv"):
        found(1)


def test_a_dataset_without_its_bad_rows_equals_that_of_the_mended_file(raw, tmp_path, capsys):
    """Bad lines of all kinds, one a block or several, in ratings, users and movies."""
    assert main(["movielens-1m", "--raw", str(raw), "--out", str(tmp_path / "good")]) == 0
    for name, bad in (
        ("ratings.dat", ["1::3::9::1", "1::4::5::1", "77::3::5::1", "", "1::3", "::3::4::5"]),
        ("users.dat", ["41::X::1::2::03", "3::F::1::2::03"]),
        ("movies.dat", ["999::A::"]),
    ):
        lines = (raw / name).read_text(encoding="iso-8859-1").splitlines()
        for number, line in enumerate(bad):
            lines.insert(17 + 3 * number, line)
        (raw / name).write_text("\n".join(lines) + "\n", encoding="iso-8859-1")
    command = ["movielens-1m", "--raw", str(raw), "--out", str(tmp_path / "out")]
    assert main([*command, "--max-bad-rows", "8"]) == 2
    assert "It is bad row 9; --max-bad-rows allows 8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--max-bad-rows", "9"]) == 0
    assert "bad rows passed over in ratings.dat: 6" in capsys.readouterr().out
    good, out = (DatasetManifest.load(tmp_path / name) for name in ("good", "out"))
    assert out.statistics.pop("bad_rows") == {"ratings.dat": 6, "users.dat": 2, "movies.dat": 1}
    assert out.statistics == good.statistics
    assert out.splits == good.splits  # with the parts' checksums


@pytest.mark.parametrize("bad", ["-1", "many", "1.5"])
def test_max_bad_rows_is_a_count(raw, tmp_path, bad, capsys):
    with pytest.raises(SystemExit):
        main(["movielens-1m", "--raw", str(raw), "--out", str(tmp_path / "out"), "--max-bad-rows", bad])
    assert "a whole number of 0 or more is needed" in capsys.readouterr().err


def test_the_last_line_may_lack_its_end(tmp_path):
    for block_bytes in (1, 5, 8, 9, 10, 1 << 20):
        assert read(tmp_path, "1,2,a\n3,4,b", block_bytes=block_bytes)[:2] == ([(1, 2.0, "a"), (3, 4.0, "b")], [1, 2])
    raw = RawFolder(tmp_path, (RawFile("a.csv"),), "")
    assert len(raw.table(CSV).table) == 2


CELLS = [
    *(
        "",
        " ",
        "\t",
        " 5",
        "5 ",
        "+5",
        "-5",
        "- 5",
        "0x1F",
        "0X1f",
        " 0x1F",
        "-0x1F",
        "00012",
        "1_000",
        "1.",
        ".5",
        "1.5",
        "+1.5",
    ),
    *(
        "1e5",
        "1e400",
        "-1e400",
        "1d5",
        "nan",
        "-nan",
        "NaN",
        "inf",
        "infinity",
        "0b1",
        "1 2",
        "\u0663",
        "\u00a05",
        "null",
        "NA",
        "--1",
    ),
    *("9223372036854775807", "9223372036854775808", "-9223372036854775808", "-9223372036854775809", "9" * 5000, "0" * 30 + "7"),
]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("form", [{"separator": "|"}, {"separator": "|", "quoted": True}, {"separator": "::"}], ids=str)
@pytest.mark.parametrize("kind", [INT, NUMBER, pa.bool_()], ids=str)
def test_a_line_is_good_or_bad_whatever_its_neighbours_are(tmp_path, kind, form, cell):
    """Bad lines are found one by one only in a piece that Arrow refuses: both ways must agree on every other line."""
    line = f"{cell}{form['separator']}b\n"
    columns = {"a": kind, "b": TEXT}

    good = f"{'1' if kind != NUMBER else '.5'}{form['separator']}b\n"  # so that the file has a row

    def lines(text):
        return read(tmp_path, text, max_bad_rows=2, columns=columns, **form)[1]

    assert lines(line + good) == lines(line + good + "a line of one field\n")


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    text = b"\xef\xbb\xbf1,2,a\n3,4,b\n"
    assert read(tmp_path, text)[0] == read(tmp_path, text + b"bad\n", max_bad_rows=1)[0] == [(1, 2.0, "a"), (3, 4.0, "b")]
    latin = b"\xef\xbb\xbf1,2,\xe9\n"
    assert read(tmp_path, latin, encoding="iso-8859-1")[0] == [(1, 2.0, "\u00e9")]


def test_a_header_is_read_in_the_encoding_of_the_file(tmp_path):
    text = "gr\u00f6\u00dfe,id\n1.5,7\n".encode("iso-8859-1")
    assert read(tmp_path, text, columns={"gr\u00f6\u00dfe": NUMBER}, header=True, encoding="iso-8859-1")[0] == [(1.5,)]


def test_a_wanted_column_that_stands_twice_in_the_header_is_told(tmp_path):
    with pytest.raises(DataError, match="line 1: the header names id twice"):
        read(tmp_path, "id,x,id\n1,2,3\n", columns={"id": INT}, header=True)
    assert read(tmp_path, "id,x,x\n1,2,3\n", columns={"id": INT}, header=True)[0] == [(1,)]


def test_the_byte_that_stands_for_a_separator_is_a_bad_line(tmp_path):
    rows, _, counts = read(tmp_path, "1::2::a\n1\x012\x01a\n", max_bad_rows=1, separator="::")
    assert (rows, counts) == ([(1, 2.0, "a")], {"a.csv": 1})


def test_a_separator_beyond_ascii(tmp_path):
    assert read(tmp_path, "1\u00a72\u00a7a\n", separator="\u00a7")[0] == [(1, 2.0, "a")]


def test_a_file_in_several_folders_below_is_refused(tmp_path):
    for name in ("ml-20m", "ml-25m"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.csv").write_text("1,2,a\n")
    with pytest.raises(DataError, match=r"holds a\.csv in several folders: .*ml-20m/a\.csv, .*ml-25m/a\.csv"):
        RawFolder(tmp_path, (RawFile("a.csv"),), "")
    (tmp_path / "a.csv").write_text("7,8,b\n")
    assert RawFolder(tmp_path, (RawFile("a.csv"),), "").paths == {"a.csv": tmp_path / "a.csv"}


def test_an_archive_made_on_macos(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.csv.zip", "w") as archive:
        archive.writestr("__MACOSX/._a.csv", "resource fork")
        archive.writestr("a.csv", "1,2,a\n")
    for name in ("a.csv", "a.csv.zip"):
        raw = RawFolder(tmp_path, (RawFile(name),), "")
        (block,) = raw.blocks(DelimitedText(name, ",", COLUMNS))
        assert block.table["id"].to_pylist() == [1]


def test_bad_rows_of_files_of_one_name_are_counted_apart(tmp_path):
    for folder in ("d1", "d2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.csv").write_text("bad\n1,2,a\n")
    raw = RawFolder(tmp_path, (RawFile("d1/a.csv"), RawFile("d2/a.csv")), "", 5)
    for name in raw.paths:
        assert len(list(raw.blocks(DelimitedText(name, ",", COLUMNS)))) == 1
    assert raw.bad_rows.counts == {"d1/a.csv": 1, "d2/a.csv": 1}


def test_long_cells_are_cut_in_complaints(tmp_path):
    (tmp_path / "a.csv").write_text(f"1,2,{'x' * 5000}\n")
    raw = RawFolder(tmp_path, (RawFile("a.csv"),), "", 1)
    (block,) = raw.blocks(CSV)
    block.require(np.array([False]), "name is bad, found {name}.")
    assert block.bad_rows[0].complaint == f"name is bad, found {'x' * 80}...."
