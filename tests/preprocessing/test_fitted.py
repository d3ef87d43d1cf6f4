"""Fitted parts of another dataset, given to the engine: order of days, memory, minimum counts, splits, and what is refused."""

import random
import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmlrec.errors import ConfigError, DataError, UserError
from mmlrec.schema import MANIFEST, DatasetManifest, Scenario, Task
from mmlrec.storage.places import place, put_file
from preprocessing import command_line
from preprocessing.dataset import Dataset, bucketed, dataset_class, dense, multi, sparse
from preprocessing.encoding import dictionaries, ranking
from preprocessing.encoding.fitted import Fitted
from preprocessing.engines.local import build
from preprocessing.reading import raw_files
from preprocessing.reading.delimited import DelimitedText
from preprocessing.reading.raw_files import RawFile, RawFolder
from preprocessing.split_rules import FileSplit, OneSplit, RandomSplit
from tests.preprocessing.fakes import FAKES
from tests.preprocessing.movielens_fake import folder_bytes
from tests.preprocessing.reference import in_order

INT, TEXT = pa.int64(), pa.string()


class Log(Dataset):
    """A table that two features share, integers, lists, numbers of both kinds, scenarios, groups."""

    name = "log"
    raw_files = (RawFile("log.csv"),)
    fields = {"user": INT, "item": TEXT, "last": TEXT, "tags": TEXT, "price": pa.float32(), "page": INT, "click": INT}

    def __init__(self, min_count=2, split=None, scaled=True, scenarios=("a", "b"), more=()):
        self.features = (
            sparse("user", INT),
            sparse("item", min_count=min_count),
            sparse("last", table="item", min_count=min_count),
            multi("tags"),
            dense("price", scaled=scaled),
            bucketed("worth", 4),
            *more,
        )
        self.tasks = (Task(name="click"), Task(name="paid", kind="regression"))
        self.scenario = Scenario(name="page", values=list(scenarios))
        self.keys = {"user": INT}
        self.group_key = "user"
        self.split = split or RandomSplit()

    def sources(self):
        yield DelimitedText("log.csv", ",", self.fields)

    def rows(self, block):
        columns = {name: block.table[name] for name in ("user", "price")} | {"worth": block.table["price"]}
        for name in ("item", "last"):
            columns[name] = pa.compute.if_else(pa.compute.equal(block.table[name], ""), None, block.table[name])
        lists = pa.compute.split_pattern(block.table["tags"], "|").combine_chunks()
        columns["tags"] = pa.compute.if_else(pa.compute.equal(block.table["tags"], ""), pa.scalar(None, lists.type), lists)
        columns |= {"sample.scenario": block.table["page"], "label.click": block.table["click"].cast(pa.float32())}
        return columns | {"label.paid": pa.nulls(len(block.table), pa.float32()), "key.user": block.table["user"]}


def day(folder, number, num_rows=600):
    """Rows of which some users, items and tags are as on all days, and others belong to the day."""
    draw = random.Random(number)
    lines = []
    for _ in range(num_rows):
        names = [f"item-{draw.choice([*range(40), *(1000 * number + k for k in range(25))])}" for _ in range(2)]
        item, last = ("" if draw.random() < 0.05 else name + "x" * (draw.randrange(3) * 7) for name in names)
        tags = "|".join(draw.choice(["new", "sale", f"d{number}", f"t{draw.randrange(12)}"]) for _ in range(draw.randrange(3)))
        price = "" if draw.random() < 0.1 else f"{draw.gauss(0, number):.3f}"
        user = draw.randrange(30) if draw.random() < 0.7 else 10**12 * number + draw.randrange(60)
        lines.append(f"{user},{item},{last},{tags},{price},{draw.randrange(2)},{draw.randrange(2)}")
    return written(folder, lines)


def written(folder, lines):
    folder.mkdir(parents=True)
    (folder / "log.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def lines_of(folder):
    return (folder / "log.csv").read_text(encoding="utf-8").splitlines()


def make(raw, out, dataset=None, like=None, *, grows=False, refit_ranges=False, workers=1, parity=False, **options):
    dataset = dataset or Log()
    files = RawFolder(raw, dataset.raw_files, "", workers=workers)
    fitted = like and Fitted.of(like, grows=grows, refit_ranges=refit_ranges)
    return build(dataset, files, out, seed=5, parity=parity, options={}, fitted=fitted, **options)


def values_of(folder, table):
    return pq.read_table(folder / "vocab" / f"{table}.parquet")["value"].to_pylist()


@pytest.fixture(scope="module")
def days(tmp_path_factory):
    """Raw folders of four days, and the dataset of the first."""
    folder = tmp_path_factory.mktemp("days")
    for number in range(1, 5):
        day(folder / f"raw-{number}", number)
    make(folder / "raw-1", folder / "one")
    return folder


def test_days_in_any_order_give_the_same_ids_to_what_both_know(days, tmp_path):
    """What the first day knows has its ids for ever; new values stand behind those that came before them."""
    orders = {"forth": (2, 3, 4), "back": (4, 3, 2)}
    for name, order in orders.items():
        before = days / "one"
        for number in order:
            out = tmp_path / f"{name}-{number}"
            make(days / f"raw-{number}", out, Log(split=OneSplit("train")), before, grows=True)
            counts = Counter(cell for line in lines_of(days / f"raw-{number}") for cell in line.split(",")[1:3] if cell)
            assert values_of(out, "item") == in_order(counts, 2, values_of(before, "item"))
            assert values_of(out, "item")[: len(values_of(before, "item"))] == values_of(before, "item")
            before = out
    for table in ("user", "item", "tags"):
        known = values_of(days / "one", table)
        forth, back = (values_of(tmp_path / last, table) for last in ("forth-4", "back-2"))
        assert forth[: len(known)] == back[: len(known)] == known
        assert len(forth) >= len(known) + 3
        assert table == "item" or set(forth) == set(back)  # every value of train has an id


def test_rows_of_a_day_in_another_order_give_the_same_vocabularies(days, tmp_path):
    lines = lines_of(days / "raw-2")
    written(tmp_path / "raw", random.Random(0).sample(lines, len(lines)))
    for name, raw in (("a", days / "raw-2"), ("b", tmp_path / "raw")):
        make(raw, tmp_path / name, Log(split=OneSplit("train")), days / "one", grows=True)
    for table in ("user", "item", "tags", "worth"):
        file = f"vocab/{table}.parquet"
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("memory_bytes", [1 << 10, 1 << 17])
def test_bytes_do_not_depend_on_memory(days, tmp_path, monkeypatch, grows, memory_bytes):
    """Known and new values go through the disk, together, where neither fits."""
    spilled = []
    close = dictionaries.Dictionary._close
    make(days / "raw-2", tmp_path / "ample", like=days / "one", grows=grows)
    monkeypatch.setattr(dictionaries.Dictionary, "_close", lambda self: spilled.append(self) or close(self))
    monkeypatch.setattr(raw_files, "PIECE_BYTES", 4_000)
    monkeypatch.setattr(ranking, "_MERGED_BYTES", 1 << 20)
    monkeypatch.setattr("preprocessing.encoding.coder._LEAST_SORTED_BYTES", 1 << 9)
    make(days / "raw-2", tmp_path / "tight", like=days / "one", grows=grows, memory_bytes=memory_bytes, workers=3)
    assert memory_bytes > 1 << 10 or len(spilled) > 5
    assert folder_bytes(tmp_path / "tight") == folder_bytes(tmp_path / "ample")


def test_a_known_vocabulary_beyond_the_memory_goes_through_the_disk(days, tmp_path, monkeypatch):
    """Also where the new values themselves fit."""
    partitioned = []
    partition = ranking._partition
    monkeypatch.setattr(ranking, "_partition", lambda *given: partitioned.append(given[0]) or partition(*given))
    make(days / "raw-2", tmp_path / "ample", like=days / "one", grows=True)
    assert partitioned == []
    monkeypatch.setattr("preprocessing.encoding.fitted.GivenVocabulary.num_bytes", lambda self: 1 << 40)
    monkeypatch.setattr("preprocessing.encoding.fitted._BATCH_ROWS", 7)
    monkeypatch.setattr("preprocessing.encoding.coder._LEAST_SORTED_BYTES", 1 << 34)
    make(days / "raw-2", tmp_path / "tight", like=days / "one", grows=True)
    assert len(partitioned) == 3
    assert folder_bytes(tmp_path / "tight") == folder_bytes(tmp_path / "ample")


def test_minimum_counts_are_of_the_new_rows_alone(tmp_path):
    """Seen once before and once now: rare on each day, so it has no id."""

    def rows(*items):
        return [f"{k % 3},{item},,,{k}.0,{k % 2},{k % 2}" for k, item in enumerate(items)]

    written(tmp_path / "raw", rows("a", "a", "b", "b", "b", "rare", *["a"] * 9))
    written(tmp_path / "new", rows("rare", "c", "c", "b", "d", "d", "d", *["e"] * 2, *["a"] * 9))
    make(tmp_path / "raw", tmp_path / "one", Log(split=OneSplit("train")))
    make(tmp_path / "new", tmp_path / "two", Log(split=OneSplit("train")), tmp_path / "one", grows=True)
    entries = pq.read_table(tmp_path / "two/vocab/item.parquet").to_pydict()
    assert values_of(tmp_path / "one", "item") == ["a", "b"]
    assert entries == {"value": ["a", "b", "d", "c", "e"], "id": [1, 2, 3, 4, 5], "count": [20, 4, 3, 2, 2]}


@pytest.mark.parametrize("policy", ["keep", "keep_together", "drop"])
def test_copies_of_rows(policy, days, tmp_path):
    """The same rows, encoded with their own parts, are the same dataset, whatever becomes of copies."""
    lines = lines_of(days / "raw-1")
    written(tmp_path / "raw", [*lines, *lines[:90]])
    for name, like in (("one", None), ("two", tmp_path / "one")):
        dataset = Log()
        dataset.duplicates = policy
        made = make(tmp_path / "raw", tmp_path / name, dataset, like)
        assert made.splits["train"].num_rows == {"keep": 552, "drop": 480}.get(policy, made.splits["train"].num_rows)
    one, two = (folder_bytes(tmp_path / name) for name in ("one", "two"))
    assert [name for name in one if one[name] != two.get(name)] == [MANIFEST]
    statistics = DatasetManifest.load(tmp_path / "two").statistics
    against = statistics.pop("against_train")
    assert statistics == DatasetManifest.load(tmp_path / "one").statistics
    assert all(against["price"]["train"][what] == 0 for what in ("outside", "below", "above"))
    assert against["user"]["train"]["unseen"] == 0 < against["item"]["valid"]["unseen"]


def test_split_names(days, tmp_path):
    manifest = make(days / "raw-2", tmp_path / "out", Log(split=OneSplit("2024-06-01")), days / "one")
    (split,) = manifest.splits.values()
    assert list(manifest.splits) == ["2024-06-01"]
    assert split.num_rows == sum(part.num_rows for part in split.parts) == 600
    assert all(Path(part.path).parent.name == "2024-06-01" for part in split.parts)
    missing = sum(line.split(",")[4] == "" for line in lines_of(days / "raw-2"))
    assert manifest.statistics["missing"]["price"] == {"2024-06-01": missing}
    assert manifest.statistics["against_train"]["price"]["2024-06-01"]["missing"] == missing
    assert DatasetManifest.load(tmp_path / "out") == manifest
    for name in ("", "vocab", "a/b", "..", ".x", "-x", "x" * 65, "manifest.json", "trän"):
        with pytest.raises(ConfigError, match="is no name of a split"):
            OneSplit(name)


def test_a_file_that_says_the_side_can_be_one_split(tmp_path):
    fake, kind = FAKES["criteo by-day"], dataset_class("criteo")
    raw = fake.write(tmp_path / "raw")
    parser = command_line._parser({kind.name: kind}, None)

    def dataset():
        return kind(parser.parse_args([kind.name, "--out", "x", *fake.arguments(raw)]))

    assert isinstance(dataset().split, FileSplit)
    make(raw, tmp_path / "one", dataset())
    one = dataset()
    one.split = OneSplit("later")
    assert make(raw, tmp_path / "two", one, tmp_path / "one").splits["later"].num_rows == 3300


@pytest.mark.parametrize("split", [OneSplit("later"), OneSplit("train")])
@pytest.mark.parametrize("grows", [False, True])
def test_synthetic_data_which_come_encoded(split, grows, tmp_path):
    kind = dataset_class("synthetic")
    parser = command_line._parser({kind.name: kind}, None)

    def dataset(seed):
        options = ["--rows", "2000", "--multi-features", "1", "--scenarios", "2", "--num-ids", "50", "--seed", seed]
        return kind(parser.parse_args(["synthetic", "--out", "x", *options]))

    before = make(Path(), tmp_path / "one", dataset("1"))
    later = dataset("2")
    later.split = split
    if grows and split == OneSplit("later"):
        with pytest.raises(ConfigError, match="nothing can be fitted"):
            make(Path(), tmp_path / "two", later, tmp_path / "one", grows=grows)
        return
    after = make(Path(), tmp_path / "two", later, tmp_path / "one", grows=grows)
    assert after.encoding == before.encoding
    assert sum(of.num_rows for of in after.splits.values()) == 2000
    against = after.statistics["against_train"]["multi_0"]
    assert sum(of["values"] for of in against.values()) > 5000
    assert "unseen" not in against[list(after.splits)[-1]]
    assert after.statistics["bayes_auc_rows"] == 2000


def test_the_parity_form_is_taken_as_it_is_and_does_not_grow(days, tmp_path):
    make(days / "raw-1", tmp_path / "one", parity=True)
    one = DatasetManifest.load(tmp_path / "one")
    assert make(days / "raw-2", tmp_path / "two", like=tmp_path / "one", parity=True).encoding == one.encoding
    for options in ({"grows": True}, {"refit_ranges": True}):
        with pytest.raises(ConfigError, match="the parity form has its ids in the order of the raw values"):
            make(days / "raw-2", tmp_path / "three", like=tmp_path / "one", parity=True, **options)
    with pytest.raises(ConfigError, match="parity: False here, True in"):
        make(days / "raw-2", tmp_path / "three", like=tmp_path / "one")
    assert not (tmp_path / "three").exists()


def test_only_a_manifest_and_vocabularies_are_needed_wherever_they_lie(days, tmp_path):
    """As a run keeps them: without the parts."""
    manifest = DatasetManifest.load(days / "one")
    splits = {name: split.model_copy(update={"parts": []}) for name, split in manifest.splits.items()}
    shutil.copytree(days / "one/vocab", tmp_path / "kept/encoder/vocab")
    manifest.model_copy(update={"splits": splits}).save(tmp_path / "kept/encoder")
    stored = place(f"memory://{tmp_path.name}/kept")
    for path in (tmp_path / "kept").rglob("*.*"):
        put_file(path, stored / path.relative_to(tmp_path / "kept").as_posix())
    for grows in (False, True):
        made = [
            (
                make(days / "raw-2", tmp_path / f"{name}-{grows}", like=like, grows=grows),
                folder_bytes(tmp_path / f"{name}-{grows}"),
            )
            for name, like in (("a", days / "one"), ("b", tmp_path / "kept"), ("c", stored))
        ]
        assert made[0] == made[1] == made[2]


def test_missing_rates_of_train_are_handed_on(days, tmp_path):
    """A dataset that was encoded like another has no train rows of its own to be compared with."""
    make(days / "raw-2", tmp_path / "two", Log(split=OneSplit("two")), days / "one")
    three = make(days / "raw-3", tmp_path / "three", Log(split=OneSplit("three")), tmp_path / "two")
    statistics = DatasetManifest.load(days / "one").statistics["missing"]["price"]
    assert three.statistics["against_train"]["price"]["three"]["missing_rate_in_train"] == statistics["train"] / 480 > 0


def test_a_feature_that_was_never_there(tmp_path):
    """Without a range: all of it is 0, and nothing is outside."""
    written(tmp_path / "raw", [f"{k % 3},a,,,,{k % 2},{k % 2}" for k in range(40)])
    written(tmp_path / "new", [f"{k % 3},a,,x|y,{k}.5,{k % 2},{k % 2}" for k in range(40)])
    make(tmp_path / "raw", tmp_path / "one")
    after = make(tmp_path / "new", tmp_path / "two", Log(split=OneSplit("later")), tmp_path / "one")
    rows = pq.read_table(tmp_path / "two/later/part-00000.parquet").to_pydict()
    assert set(rows["price"]) == {0.0}
    assert set(rows["worth"]) == {1}
    assert all(cell == [0, 0] for cell in rows["tags"])
    against = {name: of["later"] for name, of in after.statistics["against_train"].items()}
    assert against["price"] | {"range": None} == against["price"]
    assert [against["price"][name] for name in ("outside", "least", "greatest")] == [0, 0.5, 39.5]
    assert [against["tags"][name] for name in ("values", "unseen", "rows_with_unseen")] == [80, 80, 40]
    assert against["tags"]["missing_rate_in_train"] == 1


DIFFERENT = {
    "another feature": (Log(more=(sparse("more"),)), {}, "feature 'more': not in"),
    "a number as it is": (Log(scaled=False), {}, r"feature 'price', range: null here, \["),
    "other scenarios": (Log(scenarios=("a", "c")), {}, r"scenario, values: \[\"a\", \"c\"\] here, \[\"a\", \"b\"\] in"),
    "no train rows": (Log(split=OneSplit("test")), {"grows": True}, "nothing can be fitted where all rows are in split 'test'"),
    "nothing to fit": (Log(split=OneSplit("test")), {"refit_ranges": True}, "only rows of train are fitted on"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_what_does_not_go_together_is_refused_before_a_row_is_read(case, days, tmp_path, monkeypatch):
    dataset, options, message = DIFFERENT[case]
    monkeypatch.setattr(Log, "batches", lambda self, raw: pytest.fail("rows were read"))
    with pytest.raises(ConfigError, match=message):
        make(days / "raw-2", tmp_path / "out", dataset, days / "one", **options)
    assert not (tmp_path / "out").exists()


def test_damaged_vocabularies_and_folders_without_a_record_are_refused(days, tmp_path):
    shutil.copytree(days / "one", tmp_path / "one")
    path = tmp_path / "one/vocab/item.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "value", pa.array([*table["value"].to_pylist()[:-1], "other"])), path)
    with pytest.raises(DataError, match=r"item.parquet is damaged: the digest of its values"):
        make(days / "raw-2", tmp_path / "out", like=tmp_path / "one")
    path.unlink()
    with pytest.raises(DataError, match=r"item.parquet is damaged: the vocabulary cannot be read"):
        make(days / "raw-2", tmp_path / "out", like=tmp_path / "one")
    DatasetManifest.load(days / "one").model_copy(update={"encoding": None}).save(tmp_path / "one")
    with pytest.raises(DataError, match="does not say how it is encoded"):
        Fitted.of(tmp_path / "one", grows=False, refit_ranges=False)
    with pytest.raises(UserError, match="is neither a dataset nor a run"):
        Fitted.of(tmp_path / "none", grows=False, refit_ranges=False)
    assert not (tmp_path / "out").exists()


def test_no_row_at_all(days, tmp_path, monkeypatch):
    monkeypatch.setattr(Log, "batches", lambda self, raw: iter(()))
    with pytest.raises(DataError, match=r"raw-2.*: no rows, at most a header\."):
        make(days / "raw-2", tmp_path / "out", Log(split=OneSplit("later")), days / "one")
    assert not (tmp_path / "out").exists()
