"""Batches of the reader against the Parquet rows they come from."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import pyarrow as pa
import pytest
import torch

from mmlrec.data import reader as reader_module
from mmlrec.data.batch import Batch
from mmlrec.data.order import EpochOrder
from mmlrec.data.reader import Reader
from mmlrec.data.row_groups import RowGroups, numbers
from mmlrec.errors import ConfigError, DataError
from tests.datasets import rewrite_part, write_dataset

TASKS = ["buy", "click"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "set", rows=200)


@pytest.fixture
def threads():
    """What sets the number of threads that torch computes with, from which that of the reader follows."""
    number = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(number)


def make(dataset, split="train", **options):
    options = {"tasks": TASKS, "batch_size": 33, "seed": 5} | options
    return Reader(dataset.folder, dataset.manifest, split, **options)


def rows_of(batch):
    """Real rows of a batch as dicts, and a check that the others are padding."""
    valid = batch.valid.numpy()
    assert (batch.row.numpy() >= 0).tolist() == valid.tolist()
    keys = batch.sparse.keys()
    lengths = batch.sparse.lengths().view(len(keys), -1)
    assert lengths.dtype == torch.int32
    assert batch.sparse.values().dtype == torch.int64
    assert lengths[:, ~batch.valid].sum() == 0
    for name in ("dense", "labels", "mask", "scenario", "weight", "group"):
        assert not getattr(batch, name)[~batch.valid].any()
    bags = {}
    flat = iter(batch.sparse.values().tolist())
    for key, counts in zip(keys, lengths.tolist(), strict=True):
        bags[key] = [list(itertools.islice(flat, count)) for count in counts]
    assert next(flat, None) is None
    rows = []
    for i in np.flatnonzero(valid):
        row = {
            name: getattr(batch, name)[i].tolist() for name in ("dense", "labels", "mask", "scenario", "weight", "group", "row")
        }
        rows.append(row | {key: bags[key][i] for key in keys})
    return rows


def expected_row(table, row, manifest, tasks=TASKS):
    source = table.slice(row, 1).to_pylist()[0]
    labels = [source[f"label.{task}"] for task in tasks]
    out = {
        "dense": [np.float32(source[f.name]).item() for f in manifest.dense_features],
        "labels": [label or 0.0 for label in labels],
        "mask": [float(label is not None) for label in labels],
        "scenario": source.get("sample.scenario", 0),
        "weight": source.get("sample.weight", 1.0),
        "group": source["key.user"],
        "row": row,
    }
    for f in manifest.sparse_features:
        out[f.name] = [source[f.name]] if f.kind == "sparse" else source[f.name]
    return out


def global_batches(dataset, world_size, epoch=1, start_row=0, **options):
    ranks = [make(dataset, rank=r, world_size=world_size, **options).epoch(epoch, start_row) for r in range(world_size)]
    return [list(itertools.chain(*map(rows_of, batches))) for batches in zip(*ranks, strict=True)]


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_row_of_an_epoch_equals_its_parquet_row_in_the_defined_order(dataset, world_size):
    batches = global_batches(dataset, world_size)
    group_rows = make(dataset)._groups.num_rows
    # Parts of 70 rows in groups of 16 end with short groups, so these are not all equal.
    assert sorted(set(group_rows.tolist())) == [6, 12, 16]
    first_row = np.concatenate([[0], np.cumsum(group_rows)])
    order = EpochOrder(group_rows, seed=5, epoch=1, batch_size=33, num_lanes=4)
    for number, batch in enumerate(batches):
        positions = [p for _, start, stop in order.segments(number) for p in range(start, stop)]
        disk = []
        for p in positions:
            index = int(np.searchsorted(order.bounds, p, "right")) - 1
            group = order.group_order[index]
            disk.append(int(first_row[group] + order.row_permutation(group)[p - order.bounds[index]]))
        assert batch == [expected_row(dataset.tables["train"], row, dataset.manifest) for row in disk]
    assert sorted(row["row"] for batch in batches for row in batch) == list(range(200))


@pytest.mark.parametrize("batch_size", [2, 7, 64, 500])
@pytest.mark.parametrize("cache_bytes", [0, 5000])
def test_batches_do_not_depend_on_world_size_or_cache(dataset, batch_size, cache_bytes):
    alone = global_batches(dataset, 1, batch_size=batch_size)
    assert [len(b) for b in alone] == [make(dataset, batch_size=batch_size).batch_rows(k) for k in range(len(alone))]
    assert global_batches(dataset, 2, batch_size=batch_size, cache_bytes=cache_bytes) == alone


def contents(batch):
    """Everything in a batch, as bytes."""
    tensors = [batch.sparse.values(), batch.sparse.lengths(), *(getattr(batch, f.name) for f in fields(batch)[1:])]
    return [(str(t.dtype), tuple(t.shape), t.contiguous().numpy().tobytes()) for t in tensors]


@pytest.mark.parametrize("cache_bytes", [0, 5000, 1 << 30])
@pytest.mark.parametrize("shape", [{"weights": True}, {"table_rows": 2**31 - 1, "num_scenarios": 0}])
def test_batches_do_not_depend_on_the_number_of_threads(tmp_path, threads, shape, cache_bytes):
    dataset = write_dataset(tmp_path / "d", rows={"train": 2000}, row_group_size=50, rows_per_part=430, **shape)
    found = []
    for number in (1, 2, 4):
        threads(number)
        reader = make(dataset, cache_bytes=cache_bytes)
        found.append([contents(batch) for epoch in (0, 1) for batch in reader.epoch(epoch)])
        found[-1] += [contents(batch) for batch in reader.sequential()]
    assert found[1:] == found[:1] * 2
    assert len(found[0]) == 3 * 61


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_resume_at_another_world_size_neither_repeats_nor_skips(dataset, world_size):
    whole = global_batches(dataset, 1)
    trained = 0
    for done, batch in enumerate(whole):
        assert global_batches(dataset, world_size, start_row=trained) == whole[done:]
        trained += len(batch)
    assert trained == 200
    assert global_batches(dataset, world_size, start_row=200) == []


def test_skipped_row_groups_are_not_decoded(dataset, monkeypatch):
    decoded = []
    decode = RowGroups.decode
    monkeypatch.setattr(RowGroups, "decode", lambda self, group, *rows: decoded.append(group) or decode(self, group, *rows))
    list(make(dataset).epoch(0, start_row=33 * 5))
    # Behind row 165 of 200, each of the 4 lanes has 50 - 41 rows left or so: at most 2 row groups a lane.
    assert 0 < len(set(decoded)) <= 8
    assert len(set(decoded)) < len(make(dataset)._groups.num_rows)


def test_small_datasets_are_decoded_once(dataset, monkeypatch):
    decoded = []
    decode = RowGroups.decode
    monkeypatch.setattr(RowGroups, "decode", lambda self, group, *rows: decoded.append(group) or decode(self, group, *rows))
    reader = make(dataset)
    for epoch in range(3):
        list(reader.epoch(epoch))
    assert sorted(decoded) == list(range(len(reader._groups.num_rows)))


@pytest.mark.parametrize("share", [0, 0.5])
def test_the_cache_keeps_what_fits_and_its_bound(dataset, monkeypatch, share):
    decoded = []
    decode = RowGroups.decode
    monkeypatch.setattr(RowGroups, "decode", lambda self, group, *rows: decoded.append(group) or decode(self, group, *rows))
    groups = RowGroups(dataset.folder, dataset.manifest, "train", TASKS)
    sizes = [groups.decode(group).num_bytes for group in range(len(groups.num_rows))]
    reader = make(dataset, cache_bytes=int(share * sum(sizes)))
    list(reader.sequential())
    decoded.clear()
    list(reader.sequential())
    kept = set(range(len(sizes))) - set(decoded)
    assert sum(sizes[group] for group in kept) <= share * sum(sizes)
    assert len(kept) >= share * len(sizes) - 1
    # The next epoch finds all of them again, whatever order it has.
    for epoch in (0, 1):
        decoded.clear()
        list(reader.epoch(epoch))
        assert kept.isdisjoint(decoded)


@pytest.mark.parametrize("number", [1, 2, 4, 9])
def test_decoded_row_groups_in_memory_stay_bounded(tmp_path, monkeypatch, threads, number):
    threads(number)
    dataset = write_dataset(tmp_path / "d", rows={"train": 4000}, row_group_size=50, rows_per_part=1000, num_lanes=2)
    alive, most = set(), 0
    load = reader_module._Piece.load

    def counted(self, order, cache):
        nonlocal most
        rows = load(self, order, cache)
        alive.add(id(self))
        most = max(most, len(alive))
        return rows

    monkeypatch.setattr(reader_module._Piece, "load", counted)
    monkeypatch.setattr(reader_module._Piece, "__del__", lambda self: alive.discard(id(self)), raising=False)
    assert sum(int(b.valid.sum()) for b in make(dataset, cache_bytes=0).epoch(0)) == 4000
    # 2 lanes, those ahead, and those that the batches being made and planned still name.
    assert most <= 2 + max(2, min(number, 4)) + 2


@pytest.mark.parametrize(("number", "side_by_side"), [(1, 1), (2, 2), (4, 4), (9, 4)])
def test_row_groups_are_decoded_side_by_side(tmp_path, monkeypatch, threads, number, side_by_side):
    threads(number)
    dataset = write_dataset(tmp_path / "d", rows={"train": 800}, row_group_size=50, rows_per_part=1000, num_lanes=8)
    decode, meeting = RowGroups.decode, threading.Barrier(side_by_side)
    running, most, lock = 0, 0, threading.Lock()

    def counted(self, group, *rows):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        meeting.wait(60)  # breaks unless that many are decoded at the same time; there are 16
        decoded = decode(self, group, *rows)
        with lock:
            running -= 1
        return decoded

    monkeypatch.setattr(RowGroups, "decode", counted)
    assert sum(int(b.valid.sum()) for b in make(dataset, cache_bytes=0).sequential()) == 800
    assert most == side_by_side


@pytest.mark.parametrize("number", [1, 4])
def test_an_error_in_the_middle_comes_after_the_batches_before_it(tmp_path, threads, number):
    threads(number)
    dataset = write_dataset(tmp_path / "d", rows={"train": 1000}, row_group_size=50, rows_per_part=200)
    whole = [contents(batch) for batch in make(dataset).sequential()]
    broken = with_value("f1", 41, 52)(dataset.tables["train"].slice(600, 200))
    dataset.manifest = rewrite_part(dataset, broken, part=3)
    before, found = threading.active_count(), []
    batches = map(contents, make(dataset).sequential())
    with pytest.raises(DataError, match=r"part-00003\.parquet: row 41: feature 'f1' has id 52"):
        found.extend(batches)
    # Row 641 is the first bad one, and the row groups before its own end at row 600.
    assert found == whole[: 600 // 33]
    assert threading.active_count() == before


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sequential_reads_each_row_once_with_equal_steps(dataset, world_size):
    seen = []
    for rank in range(world_size):
        reader = make(dataset, "valid", batch_size=8 * world_size, rank=rank, world_size=world_size)
        batches = list(reader.sequential())
        assert len(batches) == reader.num_batches
        assert {b.num_rows for b in batches} == {8}
        seen += [row for b in batches for row in rows_of(b)]
    assert seen == [expected_row(dataset.tables["valid"], i, dataset.manifest) for i in range(50)]


@pytest.mark.parametrize(
    "shape",
    [
        {"num_multi": 0},
        {"num_sparse": 0, "num_multi": 2},
        {"num_dense": 0},
        {"num_scenarios": 0},
        {"weights": True},
        {"table_rows": 2**31 - 1},  # ids of the first table fit 32 bits, those of others do not
        {"num_sparse": 1, "num_multi": 0, "table_rows": 2**31},
        {"num_sparse": 1, "num_multi": 0, "table_rows": 2**31 + 1},
        {"num_multi": 0, "num_dense": 0, "num_scenarios": 0, "tasks": ("click",)},
    ],
)
def test_datasets_of_other_shapes(tmp_path, shape):
    dataset = write_dataset(tmp_path / "d", rows={"train": 60}, **shape)
    tasks = [t.name for t in dataset.manifest.tasks]
    rows = [row for b in make(dataset, tasks=tasks, batch_size=16).sequential() for row in rows_of(b)]
    assert rows == [expected_row(dataset.tables["train"], i, dataset.manifest, tasks) for i in range(60)]


def test_keys_are_the_sparse_features_in_manifest_order(dataset):
    batch = next(make(dataset).sequential())
    assert batch.sparse.keys() == ["f0", "m0", "f1", "f2"]


def test_a_copy_on_a_device_need_not_be_asked_how_many_ids_a_feature_has(dataset):
    """A device without numbers stands for one that answers late; the last batch is padded."""
    for batch in make(dataset).epoch(0):
        expected = batch.sparse.lengths().view(len(dataset.manifest.sparse_features), -1).sum(1).tolist()
        assert batch.to(torch.device("meta")).sparse.length_per_key() == expected


@pytest.mark.parametrize("number", [1, 4])
def test_closing_an_iterator_stops_its_threads(dataset, threads, number):
    threads(number)
    before = threading.active_count()
    batches = make(dataset, batch_size=2).epoch(0)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("number", [1, 4])
def test_closing_while_row_groups_are_decoded_waits_for_those_only(dataset, monkeypatch, threads, number):
    threads(number)
    decode, started = RowGroups.decode, []
    reader = make(dataset, batch_size=2, cache_bytes=0)
    order = EpochOrder(reader._groups.num_rows, seed=5, epoch=0, batch_size=2, num_lanes=4)
    starts = [start for _, start, _ in order.segments(0)]
    first = {int(order.group_order[np.searchsorted(order.bounds, start, "right") - 1]) for start in starts}
    assert len(first) == 2
    entered, cancelled, go_on = threading.Semaphore(0), threading.Event(), threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, **options):
            super().shutdown(wait=False, **options)
            cancelled.set()
            super().shutdown(wait)

    def slow(self, group, *rows):
        started.append(group)
        entered.release()
        if group not in first:
            go_on.wait(60)
        return decode(self, group, *rows)

    monkeypatch.setattr(RowGroups, "decode", slow)
    monkeypatch.setattr(reader_module, "ThreadPoolExecutor", Pool)
    before = threading.active_count()
    batches = reader.epoch(0)
    next(batches)
    assert all(entered.acquire(timeout=20) for _ in range(2 + number))  # each thread is in one
    closing = threading.Thread(target=batches.close)
    closing.start()
    found = cancelled.wait(20)  # while they are still being decoded
    go_on.set()
    closing.join(60)
    assert found
    assert not closing.is_alive()
    assert threading.active_count() == before
    assert len(started) == 2 + number


def test_position_between_batches_is_refused(dataset):
    with pytest.raises(ConfigError, match=r"no batch begins at row 34 of 200"):
        make(dataset).epoch(0, start_row=34)


def test_unknown_task_is_refused_with_a_suggestion(dataset):
    with pytest.raises(ConfigError, match=r"'clik' is not a task .* Did you mean 'click'\? Tasks: click, buy"):
        make(dataset, tasks=["clik"])


@pytest.mark.parametrize(
    "column",
    [
        pa.chunked_array([pa.array([1.5, None, -0.0, None], pa.float32())[1:], pa.array([2.5], pa.float32())]),
        pa.chunked_array([pa.array([None, None, 3.5], pa.float32())[1:]]),
        pa.chunked_array([pa.array(range(20), pa.int64())[3:17]]),
        pa.chunked_array([[1], [], [2**62]], pa.int64()),
        pa.chunked_array([], pa.int64()),
    ],
)
def test_numbers_of_a_column_are_those_that_arrow_gives(column):
    expected, found = column.to_numpy(), numbers(column)
    assert (found.dtype, found.tobytes()) == (expected.dtype, expected.tobytes())


def replace(table, name, values, kind=None):
    column = pa.array(values, kind or table.schema.field(name).type)
    return table.set_column(table.schema.get_field_index(name), name, column)


def with_value(name, row, value):
    def change(table):
        values = table.column(name).to_pylist()
        values[row] = value
        return replace(table, name, values)

    return change


BAD_CONTENT = [
    (with_value("f1", 41, 52), r"row 41: feature 'f1' has id 52, outside of table 't1' with 52 rows \(0\.\.51\)"),
    (with_value("f0", 3, -1), r"row 3: feature 'f0' has id -1, outside of table 't0'"),
    (with_value("m0", 20, [1, 99]), r"row 20: feature 'm0' has id 99, outside of table 'tm0' with 51 rows"),
    (with_value("m0", 20, [1, None]), r"row 20: feature 'm0' holds a null"),
    (with_value("m0", 20, None), r"row 20: feature 'm0' is null"),
    (with_value("f0", 17, None), r"row 17: column 'f0' is null"),
    (with_value("d1", 33, float("nan")), r"row 33: column 'd1' is nan"),
    (with_value("d1", 33, None), r"row 33: column 'd1' is nan"),
    (with_value("d0", 0, float("inf")), r"row 0: column 'd0' is inf"),
    (with_value("label.buy", 50, 2.0), r"row 50: label of task 'buy' is 2\.0, must be 0 or 1"),
    (with_value("sample.scenario", 5, 3), r"row 5: 'sample\.scenario' is 3, must be in 0\.\.2"),
    (with_value("sample.scenario", 5, None), r"row 5: column 'sample\.scenario' is null"),
    (with_value("sample.weight", 7, -1.0), r"row 7: 'sample\.weight' is -1\.0"),
    (with_value("key.user", 9, None), r"row 9: column 'key\.user' is null"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CONTENT)
def test_bad_content_names_file_row_and_column(tmp_path, change, message):
    dataset = write_dataset(tmp_path / "d", rows={"train": 200}, weights=True)
    dataset.manifest = rewrite_part(dataset, change(dataset.tables["train"].slice(70, 70)), part=1)
    batches = make(dataset).sequential()
    with pytest.raises(DataError, match=r"part-00001\.parquet: " + message):
        list(batches)


BAD_SCHEMA = [
    (lambda t: t.drop_columns(["f0"]), r"column 'f0' is missing"),
    (lambda t: t.append_column("f9", t.column("f0")), r"column 'f9' is not in the manifest\. Run the preprocessing"),
    (lambda t: replace(t, "f0", t.column("f0").to_pylist(), pa.int32()), r"column 'f0' is int32, must be int64"),
    (lambda t: replace(t, "d0", t.column("d0").to_pylist(), pa.float64()), r"column 'd0' is double, must be float"),
    (lambda t: replace(t, "m0", t.column("f0").to_pylist(), pa.int64()), r"column 'm0' is int64, must be list<item: int64>"),
    (lambda t: replace(t, "key.user", ["u"] * 70, pa.string()), r"'key\.user' groups the rows for GAUC and must be int64"),
    (lambda t: t.append_column("sample.weight", pa.array([1.0] * 70, pa.float32())), r"'sample\.weight' is in some parts"),
]


@pytest.mark.parametrize(("change", "message"), BAD_SCHEMA)
def test_bad_columns_are_found_before_reading(tmp_path, change, message):
    dataset = write_dataset(tmp_path / "d", rows={"train": 200})
    dataset.manifest = rewrite_part(dataset, change(dataset.tables["train"].slice(70, 70)), part=1)
    with pytest.raises(DataError, match=message):
        make(dataset)


def test_damaged_parts_are_found_before_reading(tmp_path):
    dataset = write_dataset(tmp_path / "d", rows={"train": 200})
    path = dataset.folder / "train/part-00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"part-00001\.parquet: the file has \d+ bytes, the manifest says \d+: cut off"):
        make(dataset)
    path.write_bytes(content[:-4] + b"XXXX")
    with pytest.raises(DataError, match=r"part-00001\.parquet: not a readable Parquet file"):
        make(dataset)
    path.unlink()
    with pytest.raises(DataError, match=r"part-00001\.parquet: the file is missing"):
        make(dataset)


def test_corrupt_pages_are_an_error_while_reading(tmp_path):
    dataset = write_dataset(tmp_path / "d", rows={"train": 200})
    path = dataset.folder / "train/part-00001.parquet"
    content = bytearray(path.read_bytes())
    content[4:3000] = b"\xff" * 2996
    path.write_bytes(content)
    batches = make(dataset).sequential()
    with pytest.raises(DataError, match=r"part-00001\.parquet: row group 0 cannot be read"):
        list(batches)


def test_counts_must_agree_with_the_manifest(tmp_path):
    dataset = write_dataset(tmp_path / "d", rows={"train": 200})
    split = dataset.manifest.splits["train"]
    wrong_part = split.parts[0].model_copy(update={"num_rows": 71})
    for changed, message in [
        (split.model_copy(update={"num_rows": 201}), r"hold 200 rows, the manifest says 201"),
        (
            split.model_copy(update={"parts": [wrong_part, *split.parts[1:]]}),
            r"part-00000\.parquet: the file has 70 rows, .* 71",
        ),
        (split.model_copy(update={"parts": [], "num_rows": 0}), r"split 'train' has no rows"),
    ]:
        dataset.manifest = dataset.manifest.model_copy(update={"splits": {"train": changed}})
        with pytest.raises(DataError, match=message):
            make(dataset)
    with pytest.raises(DataError, match=r"no split 'valid'\. Splits: train"):
        make(dataset, "valid")


def test_weighted_features_are_refused(dataset):
    features = [f.model_copy(update={"pooling": "sum", "weighted": f.kind == "multi"}) for f in dataset.manifest.features]
    manifest = dataset.manifest.model_copy(update={"features": features})
    with pytest.raises(ConfigError, match=r"weighted multi-valued features are not supported yet: m0"):
        Reader(dataset.folder, manifest, "train", tasks=TASKS, batch_size=8)


def test_regression_labels_take_any_finite_value(tmp_path):
    dataset = write_dataset(tmp_path / "d", rows={"train": 70})
    tasks = [t.model_copy(update={"kind": "regression"}) for t in dataset.manifest.tasks]
    dataset.manifest = dataset.manifest.model_copy(update={"tasks": tasks})
    table = with_value("label.buy", 2, 3.5)(dataset.tables["train"])
    dataset.manifest = rewrite_part(dataset, table)
    assert next(make(dataset).sequential()).labels[2, 0] == 3.5
    dataset.manifest = rewrite_part(dataset, with_value("label.buy", 2, float("inf"))(table))
    with pytest.raises(DataError, match=r"row 2: label of task 'buy' is inf, must be finite"):
        next(make(dataset).sequential())


def test_batches_are_pinned_in_a_thread_that_has_the_gpu_of_its_rank(dataset, monkeypatch):
    pinned, gpus = [], {}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: gpus.update({threading.current_thread(): gpu}))

    def pin_memory(self):
        pinned.append(threading.current_thread())
        return self

    monkeypatch.setattr(Batch, "pin_memory", pin_memory)
    batches = list(make(dataset, pinned=True).epoch(0))
    assert len(pinned) == len(batches) > 1
    assert [gpus[thread] for thread in pinned] == [3] * len(pinned)
    assert threading.current_thread() not in pinned
