"""Equal rows: found by hash as by comparing them, counted in bounded memory, and kept, dropped or held together."""

import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmlrec.errors import ConfigError
from mmlrec.schema import DatasetManifest, Task
from preprocessing.command_line import main
from preprocessing.dataset import Dataset, dense, multi, sparse
from preprocessing.encoding.row_hashes import row_hashes
from preprocessing.engines.local import build
from preprocessing.reading.raw_files import RawFolder
from preprocessing.split_rules import FileSplit, GroupSplit, RandomSplit, TimeSplit
from preprocessing.writing.copies import Copies, CopyCounter, count_copies, later_copies, marked
from tests.preprocessing.movielens_fake import folder_bytes, write_movielens
from tests.preprocessing.table_fake import run, small

SPLITS = ("train", "valid", "test")


def hashes(**columns):
    rows = pa.RecordBatch.from_pydict(columns)
    return row_hashes(rows, rows.schema.names).to_pylist()


INT, TEXT, FLOAT = pa.int64(), pa.string(), pa.float32()
DIFFERENT = {
    "integers": pa.array([0, 1, -1, 2**62, None], INT),
    "texts": pa.array(["", "a", "b", "aaaaaaaa", "aaaaaaaaa", "a" * 70 + "b", "a" * 70 + "c", None], TEXT),
    "numbers": pa.array([0.0, 1.0, -1.0, 1e-38, None], FLOAT),
    "float64": pa.array([0.0, 1.0, -1.0, 2.0, 3.0, 4.0, 0.5, 1e300, None], pa.float64()),
    "lists of integers": pa.array([[], [1], [2], [1, 2], [2, 1], [4, 1], [1, 1], [1, 1, 1], [3], [0]], pa.list_(INT)),
    "lists of texts": pa.array([[], ["a"], ["b"], ["a", "b"], ["b", "a"], ["ab"], ["a", "a"], [""]], pa.list_(TEXT)),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_rows_that_differ_in_one_cell_have_different_hashes(kind):
    values = DIFFERENT[kind]
    beside = pa.array(["x"] * len(values))
    assert len(set(hashes(a=values, b=beside))) == len(values)
    assert len(set(hashes(a=beside, b=values))) == len(values)
    # the value of one column is not taken for that of another
    pairs = list(itertools.product(range(len(values)), repeat=2))
    first, second = (values.take(pa.array([pair[k] for pair in pairs])) for k in (0, 1))
    assert len(set(hashes(a=first, b=second))) == len(pairs)


@pytest.mark.parametrize("kind", DIFFERENT)
def test_equal_rows_have_equal_hashes_wherever_they_stand(kind):
    values = DIFFERENT[kind]
    once, moved = hashes(a=values), hashes(a=pa.concat_arrays([values[3:], values])[2:])
    assert moved == (once[3:] + once)[2:]


def test_an_empty_list_is_a_missing_one():
    assert len(set(hashes(a=pa.array([[], None], pa.list_(INT))))) == 1


def brute_force(keys, splits):
    sets = {}
    for key, split in zip(keys, splits, strict=True):
        sets.setdefault(key, []).append(split)
    return Copies(
        sum(len(found) - 1 for found in sets.values()),
        max(len(found) for found in sets.values()),
        sum(found.count(1) for found in sets.values() if 0 in found),
        sum(found.count(2) for found in sets.values() if 0 in found),
    )


@pytest.mark.parametrize("distinct", [1, 30, 4000, 10**9])
@pytest.mark.parametrize("limit", [1 << 20, 3000])
def test_counts_are_those_of_comparing_all_rows(distinct, limit, tmp_path):
    random = np.random.default_rng(distinct)
    keys, splits = random.integers(0, distinct, 5000), random.choice(3, 5000, p=[0.8, 0.1, 0.1])
    found = row_hashes(pa.RecordBatch.from_pydict({"a": keys}), ["a"]).to_numpy()
    counter = CopyCounter(tmp_path / "copies", 5000, limit)
    for start in range(0, 5000, 700):
        counter.add(marked(found[start : start + 700], splits[start : start + 700]))
    if distinct >= 4000:
        assert len(list((tmp_path / "copies").iterdir())) == (1 if limit > 5000 * 8 else 14)
    assert counter.count() == brute_force(keys.tolist(), splits.tolist())
    assert list((tmp_path / "copies").iterdir()) == []
    later = later_copies(np.array_split(found, 9), 5000, tmp_path / "later", limit)
    seen = set()
    assert later.tolist() == [key in seen or seen.add(key) is not None for key in keys.tolist()]


def test_no_rows_have_no_copies():
    assert count_copies(np.empty(0, np.uint64)) == Copies()


class Log(Dataset):
    """Some rows of a log many times; a line number that tells them apart, but does not make them differ."""

    name = "log"
    features = (sparse("item"), multi("tags", pa.int64()), dense("price"))
    tasks = (Task(name="click"),)
    keys = {"user": pa.int64(), "line": pa.int64()}
    numbering = ("line",)

    def __init__(self, columns, duplicates="keep", split=None):
        self.columns, self.duplicates, self.split = columns, duplicates, split or RandomSplit()

    def batches(self, raw):
        schema = self.canonical_schema()
        yield from pa.table({name: self.columns[name] for name in schema.names}, schema=schema).to_batches(max_chunksize=137)


def log(num_rows=3000, distinct=1200):
    random = np.random.default_rng(1)
    row = random.integers(0, distinct, num_rows)
    return {
        "item": [None if k % 7 == 0 else f"i{k % 50}" for k in row],
        "tags": [None if k % 3 == 0 else [int(k % 5), int(k % 4)][: k % 4] for k in row],
        "price": [None if k % 11 == 0 else float(k % 13) for k in row],
        "label.click": [None if k % 17 == 0 else float(k % 2) for k in row],
        "key.user": [int(k) // 2 for k in row],
        "key.line": list(range(num_rows)),
        "split.side": random.choice(3, num_rows, p=[0.8, 0, 0.2]).tolist(),
    }


def identity(columns):
    """What makes a row equal to another, as Python compares it."""
    names = [name for name in columns if name not in ("key.line", "split.side")]
    return list(zip(*([tuple(v or ()) if name == "tags" else v for v in columns[name]] for name in names), strict=True))


def make(out, columns, duplicates, split=None, **options):
    raw = RawFolder(out, (), "", workers=options.pop("workers", 2))
    dataset = Log(columns, duplicates, split)
    manifest = build(dataset, raw, out, seed=5, parity=False, options={}, **options)
    lines = {
        name: [line for part in of.parts for line in pq.read_table(out / part.path)["key.line"].to_pylist()]
        for name, of in manifest.splits.items()
    }
    return manifest, lines


def test_kept_rows_are_where_they_were_and_are_counted(tmp_path):
    columns = log()
    manifest, lines = make(tmp_path / "out", columns, "keep")
    assert sorted(itertools.chain(*lines.values())) == list(range(3000))
    assert [len(lines[split]) for split in SPLITS] == [2400, 300, 300]
    rows = identity(columns)
    order = [(rows[line], split) for split, name in enumerate(SPLITS) for line in lines[name]]
    expected = brute_force(*zip(*order, strict=True))
    assert expected.rows > 1000
    assert min(expected.valid_in_train, expected.test_in_train) > 200
    assert manifest.statistics["duplicates"] == {
        "policy": "keep",
        "rows": expected.rows,
        "most": expected.most,
        "valid_in_train": expected.valid_in_train,
        "test_in_train": expected.test_in_train,
    }


def test_rows_kept_together_are_on_one_side_and_none_is_lost(tmp_path):
    columns = log()
    manifest, lines = make(tmp_path / "out", columns, "keep_together")
    rows, sides = identity(columns), {}
    for split, of_split in lines.items():
        for line in of_split:
            sides.setdefault(rows[line], set()).add(split)
    assert sorted(itertools.chain(*lines.values())) == list(range(3000))
    assert {len(found) for found in sides.values()} == {1}
    assert len(lines["train"]) == pytest.approx(2400, abs=200)
    counts = manifest.statistics["duplicates"]
    assert (counts["policy"], counts["valid_in_train"], counts["test_in_train"]) == ("keep_together", 0, 0)
    assert counts["rows"] == 3000 - len(set(rows))


def test_of_dropped_rows_the_first_stays(tmp_path):
    columns = log()
    manifest, lines = make(tmp_path / "out", columns, "drop")
    rows = identity(columns)
    first = {row: line for line, row in reversed(list(enumerate(rows)))}
    assert sorted(itertools.chain(*lines.values())) == sorted(first.values())
    assert manifest.statistics["duplicates"] == {
        "policy": "drop",
        "dropped": 3000 - len(first),
        **{"rows": 0, "most": 1, "valid_in_train": 0, "test_in_train": 0},
    }
    assert manifest.statistics["rows"] == len(first)
    # the same folder as of the first rows alone, but for what is told of the others
    alone = {name: [values[line] for line in sorted(first.values())] for name, values in columns.items()}
    make(tmp_path / "alone", alone, "keep")
    found, expected = folder_bytes(tmp_path / "out"), folder_bytes(tmp_path / "alone")
    assert [name for name in expected if found[name] != expected[name]] == ["manifest.json"]


@pytest.mark.parametrize("policy", ["keep", "keep_together", "drop"])
def test_neither_memory_nor_workers_change_a_byte(policy, tmp_path):
    columns = log()
    make(tmp_path / "plenty", columns, policy, workers=1)
    make(tmp_path / "little", columns, policy, workers=3, memory_bytes=1 << 16)
    assert folder_bytes(tmp_path / "plenty") == folder_bytes(tmp_path / "little")


def test_a_valid_side_that_is_drawn_from_a_file_takes_equal_rows_together(tmp_path):
    columns, rows = log(), identity(log())
    for policy, several in (("keep", True), ("keep_together", False)):
        _, lines = make(tmp_path / policy, columns, policy, FileSplit(valid_from="test", one_in=2))
        assert sorted(lines["train"]) == [line for line in range(3000) if columns["split.side"][line] == 0]
        valid, test = ({rows[line] for line in lines[split]} for split in ("valid", "test"))
        assert bool(valid & test) == several
        assert valid


@pytest.mark.parametrize("split", [GroupSplit("user"), TimeSplit("user")])
def test_a_split_by_a_key_keeps_equal_rows_together_by_itself(split, tmp_path):
    columns, found = log(), []
    for policy in ("keep", "keep_together"):
        counts = make(tmp_path / policy, columns, policy, split)[0].statistics["duplicates"]
        assert (counts["valid_in_train"], counts["rows"]) == (0, 3000 - len(set(identity(columns))))
        found.append(folder_bytes(tmp_path / policy))
    assert [name for name in found[0] if found[0][name] != found[1][name]] == ["manifest.json"]


ROWS = "user,x,y\n" + "".join(f"u{i % 3},{i},{i % 2}\n" for i in range(40)) * 2


def test_a_table_says_its_policy_and_the_command_line_may_say_otherwise(tmp_path, capsys):
    config = small(tmp_path, ROWS, duplicates="drop")
    assert run(config, tmp_path / "a") == 0
    assert "copies of rows (duplicates: drop): 40 left out" in capsys.readouterr().out
    assert run(config, tmp_path / "b", "--duplicates", "keep") == 0
    shown = capsys.readouterr().out
    assert "copies of rows (duplicates: keep): 40, at most 2 rows alike; " in shown
    assert "--duplicates keep_together or drop" in shown.partition("Look at this")[2]
    for name, rows in (("a", 40), ("b", 80)):
        assert DatasetManifest.load(tmp_path / name).statistics["rows"] == rows
    assert run(config, tmp_path / "a") == 0
    assert "already there" in capsys.readouterr().out
    assert run(config, tmp_path / "a", "--duplicates", "keep_together") == 2
    assert "duplicates='drop' (now 'keep_together')" in capsys.readouterr().err
    assert main(["describe", str(tmp_path / "a")]) == 0
    assert "They were left out." in capsys.readouterr().out


def test_a_folder_made_before_there_were_policies_is_the_same_dataset(tmp_path, capsys):
    raw, out = write_movielens(tmp_path / "raw"), tmp_path / "out"
    arguments = ["movielens-1m", "--raw", str(raw), "--out", str(out)]
    assert main(arguments) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    for key in ("duplicates", "missing", "within_ranges", "label_values"):
        manifest["statistics"].pop(key, None)
    assert "duplicates" not in manifest["preprocessing"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert main(arguments) == 0
    assert "already there" in capsys.readouterr().out
    assert main(["describe", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "Look at this" not in shown
    assert "unseen in valid" in shown


def test_spark_does_not_drop(tmp_path):
    from preprocessing.datasets.kuairec import KuaiRec
    from preprocessing.engines import spark

    dataset = KuaiRec.__new__(KuaiRec)
    dataset.duplicates = "drop"
    with pytest.raises(ConfigError, match="copies of rows are dropped on one machine only"):
        spark.build(dataset, None, tmp_path / "out", seed=1, parity=False, options={})
    assert list(tmp_path.iterdir()) == []
