"""`describe`: its figures against pandas on the same folder, the page, and folders that are no whole dataset."""

import re
import sys
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmlrec.errors import DataError
from mmlrec.hashing import mix64
from mmlrec.schema import DatasetManifest, Task
from preprocessing.command_line import main
from preprocessing.dataset import Dataset, Hashing, sparse
from preprocessing.describing import description
from preprocessing.describing.description import Distinct, IdCounts, KeyCounts, describe
from preprocessing.describing.report import sections
from preprocessing.engines.local import build
from preprocessing.reading.raw_files import RawFolder
from tests.datasets import rewrite_part, write_dataset
from tests.preprocessing.ijcai18_fake import write_ijcai18
from tests.preprocessing.movielens_fake import write_movielens


@pytest.fixture(scope="module")
def movielens(tmp_path_factory):
    """A dataset folder with two tasks, two scenarios, a multi-valued feature and users."""
    folder = tmp_path_factory.mktemp("describe")
    raw = write_movielens(folder / "raw", 3000, num_users=400, num_movies=900)
    assert main(["movielens-1m", "--raw", str(raw), "--out", str(folder / "out")]) == 0
    return folder / "out"


@pytest.fixture
def written(tmp_path):
    """A folder with missing labels, sparse, multi and dense features, and tables without a vocabulary."""
    return write_dataset(tmp_path / "written", rows=400)


def frames(folder):
    manifest = DatasetManifest.load(folder)
    return {
        name: pd.concat([pq.read_table(folder / part.path).to_pandas() for part in split.parts], ignore_index=True)
        for name, split in manifest.splits.items()
    }


def table(found, title):
    """Section as first cell -> header -> text."""
    (section,) = [section for section in found if section.title == title]
    return {row[0]: dict(zip(section.headers, row, strict=True)) for row in section.rows}


def test_the_manifest_records_mean_lengths_of_lists_in_train(movielens):
    manifest, rows = DatasetManifest.load(movielens), frames(movielens)["train"]
    multi = [feature for feature in manifest.features if feature.kind == "multi"]
    wanted = {feature.name: sum(map(len, rows[feature.name])) / len(rows) for feature in multi}
    assert manifest.statistics["mean_lengths"] == pytest.approx(wanted)
    assert min(wanted.values()) > 1
    assert {feature.name: manifest.mean_length(feature) for feature in multi} == manifest.statistics["mean_lengths"]


def test_ids_of_a_fitted_dataset_equal_those_that_pandas_counts(movielens):
    found = describe(movielens, 0)
    rows = frames(movielens)
    for name, ids in found.ids.items():
        column = {split: frame[name] for split, frame in rows.items()}
        flat = {split: pd.Series(np.concatenate([np.atleast_1d(v) for v in values])) for split, values in column.items()}
        counts = flat["train"][flat["train"] > 0].value_counts().sort_index()
        assert ids.every == 1
        assert ids.counts[counts.index - 1].tolist() == counts.tolist()
        assert ids.counts.sum() == counts.sum()
        assert ids.num_seen == len(counts)
        for split in ("valid", "test"):
            assert ids.coverage(split) == pytest.approx((flat[split] > 0).mean(), abs=1e-12)
        lengths = column["train"].map(np.size).value_counts()
        assert ids.lengths[lengths.index].tolist() == lengths.tolist()
        assert ids.mean_length == pytest.approx(len(flat["train"]) / len(rows["train"]))
        assert ids.missing == pytest.approx(column["train"].map(lambda v: not np.any(np.atleast_1d(v) > 0)).mean())
        assert ids.by_rank()[1][0] == counts.max()
        scenario = rows["train"]["sample.scenario"]
        seen = [set(column["train"][scenario == s].explode()) - {0} for s in (0, 1)]
        for a in (0, 1):
            for b in (0, 1):
                assert ids.overlap(a, b) == pytest.approx(len(seen[a] & seen[b]) / len(seen[a]))
    assert found.ids["movie"].coverage("test") < 1  # some movies are unseen in train
    assert set(found.ids) == {f.name for f in found.manifest.sparse_features}


def test_rows_rates_and_groups_equal_those_that_pandas_counts(written):
    found = sections(describe(written.folder, 0))
    rows = frames(written.folder)
    (section,) = [section for section in found if section.title == "Rows and label rates"]
    cells = {(row[0], row[1]): dict(zip(section.headers, row, strict=True)) for row in section.rows}
    assert len(cells) == 3 * 4
    for (split, scenario), row in cells.items():
        frame = rows[split]
        frame = frame if scenario == "all" else frame[frame["sample.scenario"] == int(scenario.removeprefix("s"))]
        assert row["rows"] == str(len(frame))
        for task in ("click", "buy"):
            assert row[f"rate of {task}"] == f"{frame[f'label.{task}'].mean():.6f}"
            assert row[f"labelled {task}"] == str(frame[f"label.{task}"].count())
    users = {split: set(frame["key.user"]) for split, frame in rows.items()}
    groups = table(found, "Groups")
    for split, values in users.items():
        assert groups[split]["groups"] == str(len(values))
        assert groups[split]["share that train has"] == f"{100 * len(values & users['train']) / len(values):.2f} %"


def test_tables_without_vocabulary_are_covered_by_what_train_has(written):
    rows = frames(written.folder)
    ids = describe(written.folder, 0).ids["m0"]
    train = set(rows["train"]["m0"].explode().dropna()) - {0}
    test = rows["test"]["m0"].explode().dropna()
    assert ids.coverage("test") == pytest.approx(test.isin(train).mean())
    assert ids.missing == pytest.approx(rows["train"]["m0"].map(lambda ids: not np.any(ids > 0)).mean())


def test_dense_features(written):
    rows = frames(written.folder)
    for name, counts in describe(written.folder, 0).numbers.items():
        assert [counts.low, counts.high] == [rows["train"][name].min(), rows["train"][name].max()]
        assert counts.total["valid"] == pytest.approx(rows["valid"][name].astype(float).sum())
        assert np.concatenate(counts.sample).tolist() == rows["train"][name].tolist()


def test_examples_are_decoded(movielens):
    examples = describe(movielens, 5).examples
    vocabularies = {
        name: {0: None} | dict(pq.read_table(movielens / f"vocab/{name}.parquet", columns=["id", "value"]).to_pandas().values)
        for name in ("user", "movie", "zip", "genres")
    }
    first = frames(movielens)["train"].head(5)
    assert len(examples) == 5
    for example, (_, row) in zip(examples, first.iterrows(), strict=True):
        for name in ("user", "movie", "zip"):
            assert example[name] == vocabularies[name][row[name]]
        assert example["genres"] == [vocabularies["genres"][i] for i in row["genres"]]
        assert example["sample.scenario"] == "FM"[row["sample.scenario"]]
        assert example["key.user"] == row["key.user"]


def test_examples_of_scaled_numbers_are_in_raw_units(tmp_path):
    from tests.preprocessing.census_fake import write_kdd

    raw = write_kdd(tmp_path / "raw")
    assert main(["census-income", "--raw", str(raw), "--out", str(tmp_path / "out")]) == 0
    ages = {float(line.split(", ")[0]) for line in (raw / "census-income.data").read_text().splitlines()}
    for example in describe(tmp_path / "out", 20).examples:
        assert min(abs(example["age"] - age) for age in ages) < 1e-4


def test_of_a_large_table_a_sample_of_the_ids_is_counted():
    """Ids 1..V with frequency ~ 1/id in two scenarios; scenario 1 has the ids that are divisible by 3."""
    random = np.random.default_rng(0)
    num_ids = 300_000
    ids = np.minimum((num_ids ** random.random(2_000_000)).astype(np.int64) + 1, num_ids)
    scenario = ((ids % 3 == 0) & (random.random(len(ids)) < 0.5)).astype(np.int64)
    exact, sampled = (IdCounts(num_ids + 1, 2, size, fitted=True) for size in (1 << 30, 10 * 30_000))
    for counts in (exact, sampled):
        counts.add("train", ids, None, scenario)
    assert (exact.every, sampled.every) == (1, 10)
    assert len(sampled.counts) == 30_000
    assert exact.num_seen == len(np.unique(ids))
    assert sampled.num_seen == pytest.approx(exact.num_seen, rel=0.02)
    for a, b in ((0, 1), (1, 0)):
        assert sampled.overlap(a, b) == pytest.approx(exact.overlap(a, b), abs=0.02)
    # each counted id has its own exact count: the counts of an id out of every run of ten
    runs = exact.counts.reshape(-1, 10)
    assert (runs == sampled.counts[:, None]).any(axis=1).all()
    ranks, counts = sampled.by_rank()
    truth = np.sort(exact.counts)[::-1]
    middle = (ranks > 1000) & (ranks < 100_000)
    np.testing.assert_allclose(counts[middle], truth[ranks[middle].astype(int)], rtol=0.25, atol=1.5)


def test_keys_of_managed_tables(tmp_path, capsys):
    """Against pandas; in scenario 1 of a log that drifts."""
    options = ("--rows", "6000", "--managed", "50", "--num-ids", "900", "--sparse-features", "1", "--multi-features", "1")
    for day in (1, 2):
        more = ("--day", str(day), "--drift", "0.5", "--scenarios", "2", "--multi-length", "1")
        assert main(["synthetic", *options, *more, "--out", str(tmp_path / f"{day}")]) == 0
    rows, found = frames(tmp_path / "1"), describe(tmp_path / "1", 3)
    for name, ids in found.ids.items():
        flat = {split: frame[name].explode().dropna().astype("int64") for split, frame in rows.items()}
        counts = flat["train"].value_counts()
        assert (ids.every, ids.num_seen) == (1, len(counts))
        assert sorted(ids.counts) == sorted(counts)
        assert ids.by_rank()[1][0] == counts.max()
        for split in ("valid", "test"):
            known = flat[split].isin(counts.index).mean()
            assert 0.5 < known < 1
            assert ids.coverage(split) == pytest.approx(known)
            assert ids.unseen(split, None) == pytest.approx(1 - known)
        seen = [set(rows["train"][name][rows["train"]["sample.scenario"] == s].explode().dropna()) for s in (0, 1)]
        assert ids.overlap(0, 1) == pytest.approx(len(seen[0] & seen[1]) / len(seen[0]))
        assert ids.missing == pytest.approx(rows["train"][name].map(lambda v: len(np.atleast_1d(v)) == 0).mean())
        assert found.manifest.statistics["managed_ids"][name] == {"values": len(counts)}
    first = rows["train"].iloc[0]
    assert found.examples[0]["sparse_0"] == f"key {np.uint64(first['sparse_0'].astype(np.uint64)):016x}"
    capsys.readouterr()
    assert main(["describe", str(tmp_path / "1")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    num_users = rows["train"]["sparse_0"].nunique()
    assert f"sparse_0 {num_users} 50 {num_users / 50:.2f}" in shown
    # The day after has half of its ids in common with this one, frequent and rare ones.
    both = set(frames(tmp_path / "2")["train"]["sparse_0"]) & set(rows["train"]["sparse_0"])
    assert 0.3 < len(both) / num_users < 0.6


def test_of_many_keys_a_sample_is_counted():
    random = np.random.default_rng(0)
    keys = random.integers(-(2**63), 2**63, 40_000)
    keys = keys[np.minimum((40_000 ** random.random(400_000)).astype(np.int64), 39_999)]
    train, test = np.where(random.random(400_000) < 0.1, 0, keys)[:300_000], keys[300_000:]
    scenario = (train % 3 == 0).astype(np.int64)
    exact, sampled = (KeyCounts(2, size) for size in (1 << 30, 18 * 2000))
    for counts in (exact, sampled):
        for part in np.split(np.arange(300_000), 6):
            counts.add("train", train[part], None, scenario[part])
        counts.add("test", test, None, None)
    assert exact.every == 1
    assert sampled.every in (16, 32)
    assert len(sampled.counts) <= 2000
    assert exact.num_seen == len(np.unique(train)) - 1
    assert sampled.num_seen == pytest.approx(exact.num_seen, rel=0.06)
    assert exact.coverage("test") == pytest.approx(np.isin(test, train).mean())
    assert sampled.coverage("test") == pytest.approx(exact.coverage("test"), abs=0.06)
    assert exact.missing == sampled.missing == np.mean(train == 0)
    # Each that is counted has its own count.
    values, counts = np.unique(train[train != 0], return_counts=True)
    assert sorted(exact.counts) == sorted(counts)
    own = dict(zip(mix64(values.view(np.uint64)).tolist(), counts.tolist(), strict=True))
    assert [own[key] for key in sampled._hashes.tolist()] == sampled.counts.tolist()


def test_distinct_values_beyond_the_limit_are_estimated(monkeypatch):
    monkeypatch.setattr(description, "_MAX_DISTINCT", 1 << 14)
    random = np.random.default_rng(0)
    train, test, few = Distinct(), Distinct(), Distinct()
    few.add(np.array([5, 5, -5]))
    assert (few.count(), few.share_in(few)) == (2, 1.0)
    for start in range(0, 400_000, 1000):
        train.add(random.permutation(np.arange(start, start + 1000)).repeat(2))
    test.add(np.arange(300_000, 500_000))
    assert train.count() == pytest.approx(400_000, rel=0.03)
    assert test.count() == pytest.approx(200_000, rel=0.03)
    assert test.share_in(train) == pytest.approx(0.5, abs=0.03)


class Elements(HTMLParser):
    """Tags and the addresses that a page would fetch."""

    def __init__(self):
        super().__init__()
        self.tags, self.fetched, self.texts = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [
            v for k, v in attributes if k in ("src", "href", "xlink:href", "data", "action") and not v.startswith("#")
        ]

    def handle_data(self, text):
        self.texts.append(text.strip())


def test_page_is_one_file_with_tables_and_plots(movielens, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["describe", str(movielens), "--page", str(page), "--rows", "2"]) == 0
    shown = capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    elements = Elements()
    elements.feed(text)
    assert elements.fetched == []
    assert not {"script", "link", "img", "iframe"} & set(elements.tags)
    assert "url(http" not in text
    assert "@import" not in text
    titles = ["Rows and label rates", "Equal rows", "Groups", "Sparse and multi-valued features"]
    titles += ["Raw rows left out", "Examples"]
    plots = ["Label rates", "Frequency of ids", "Overlap of scenarios", "Lengths of lists"]
    assert re.findall("<h2>(.*?)</h2>", text) == titles + plots
    assert elements.tags.count("svg") == len(plots)
    assert elements.tags.count("table") == len(titles)
    for title in titles:
        assert title in shown
    # texts of the plots are texts, not outlines
    assert {"label2", "occurrences", "genres", "F", "M"} <= set(elements.texts)
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    main(["describe", str(movielens), "--page", str(tmp_path / "again.html"), "--rows", "2"])
    assert (tmp_path / "again.html").read_text() == text.replace("page.html", "again.html")


def test_names_from_the_data_are_no_markup(tmp_path):
    """Scenario names and key values with HTML, formulas and other alphabets."""
    written = write_dataset(tmp_path / "written")
    names = ["<script>alert(1)</script>", "$x^", "女性"]
    old = written.manifest
    renamed = {f"s{i}": name for i, name in enumerate(names)} | {"all": "all"}
    splits = {
        split: content.model_copy(
            update={
                "scenario_rows": {renamed[n]: c for n, c in content.scenario_rows.items()},
                "label_counts": {t: {renamed[n]: c for n, c in v.items()} for t, v in content.label_counts.items()},
            }
        )
        for split, content in old.splits.items()
    }
    scenario = old.scenario.model_copy(update={"values": names})
    old.model_copy(update={"scenario": scenario, "splits": splits}).save(written.folder)
    assert main(["describe", str(written.folder), "--page", str(tmp_path / "page.html")]) == 0
    elements = Elements()
    elements.feed((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "script" not in elements.tags
    assert {"$x^", "女性", names[0]} <= set(elements.texts)


def test_datasets_without_scenarios_lists_or_groups(tmp_path, capsys):
    written = write_dataset(tmp_path / "written", num_scenarios=0, num_multi=0, num_sparse=0, missing_labels=0)
    written.manifest.model_copy(update={"group_key": None}).save(written.folder)
    assert main(["describe", str(written.folder), "--page", str(tmp_path / "page.html"), "--rows", "0"]) == 0
    titles = re.findall("<h2>(.*?)</h2>", (tmp_path / "page.html").read_text(encoding="utf-8"))
    assert titles == ["Rows and label rates", "Dense features", "Raw rows left out", "Label rates", "Dense features"]
    assert "labelled" not in capsys.readouterr().out


def test_rows_left_out_are_told(tmp_path, capsys):
    raw = write_movielens(tmp_path / "raw")
    (raw / "ratings.dat").write_bytes((raw / "ratings.dat").read_bytes() + b"1::3::6::1\nx\n")
    assert main(["movielens-1m", "--raw", str(raw), "--out", str(tmp_path / "out"), "--max-bad-rows", "2"]) == 0
    capsys.readouterr()
    assert main(["describe", str(tmp_path / "out")]) == 0
    assert re.search(r"^ratings\.dat +bad +2$", capsys.readouterr().out, re.MULTILINE)


def test_rows_that_are_no_part_of_the_dataset_are_told_with_their_reason(tmp_path, capsys):
    assert main(["ijcai18", "--raw", str(write_ijcai18(tmp_path / "raw")), "--out", str(tmp_path / "out")]) == 0
    (reasons,) = DatasetManifest.load(tmp_path / "out").statistics["passed_over"].values()
    capsys.readouterr()
    assert main(["describe", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    for reason, count in reasons.items():
        assert re.search(rf"^round1_\S+ +{reason} +{count}$", shown, re.MULTILINE)


def test_hashed_ids(tmp_path, capsys):
    class Hashed(Dataset):
        name = "hashed"
        features = (sparse("user", pa.int64(), hashing=Hashing(50, seed=3)),)
        tasks = (Task(name="click"),)

        def batches(self, raw):
            rows = {"user": np.arange(1000), "label.click": np.zeros(1000, np.float32)}
            yield pa.RecordBatch.from_pydict(rows, schema=self.canonical_schema())

    build(Hashed(None), RawFolder(tmp_path, (), ""), tmp_path / "out", seed=1, parity=False, options={})
    assert main(["describe", str(tmp_path / "out"), "--rows", "1"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^user +800 +800 +100\.00 %$", shown, re.MULTILINE)  # 800 values in 50 buckets: none is alone
    assert "Task 'click' has labels of one class only in train (0 of 800 positive), valid (0 of 100" in shown
    (first,) = pq.read_table(tmp_path / "out/train/part-00000.parquet", columns=["user"])["user"].to_pylist()[:1]
    assert re.search(rf"^user +hash {first}$", shown, re.MULTILINE)


def test_parity_datasets_are_marked_and_their_coverage_is_that_of_train(tmp_path, capsys):
    raw = write_movielens(tmp_path / "raw", 3000, num_users=400, num_movies=900)
    assert main(["movielens-1m", "--raw", str(raw), "--out", str(tmp_path / "out"), "--parity"]) == 0
    capsys.readouterr()
    assert main(["describe", str(tmp_path / "out")]) == 0
    assert "have seen valid and test" in capsys.readouterr().out
    rows = frames(tmp_path / "out")
    share = rows["test"]["movie"].isin(set(rows["train"]["movie"])).mean()
    assert share < 1
    assert describe(tmp_path / "out", 0).ids["movie"].coverage("test") == pytest.approx(share)


def part_of(written):
    return written.folder / written.manifest.splits["train"].parts[1].path


FAULTS = {
    "no folder": (lambda w: w.folder.rename(w.folder.with_name("gone")), "the folder does not exist"),
    "half a dataset": (lambda w: (w.folder / "manifest.json").unlink(), r"it has no manifest\.json"),
    "damaged manifest": (lambda w: (w.folder / "manifest.json").write_text("{"), r"manifest\.json is damaged"),
    "missing part": (lambda w: part_of(w).unlink(), r"part-00001\.parquet is missing or cut. Make the dataset again"),
    "cut part": (lambda w: part_of(w).write_bytes(part_of(w).read_bytes()[:-9]), r"part-00001\.parquet is missing or cut"),
    "garbled part": (lambda w: part_of(w).write_bytes(bytes(part_of(w).stat().st_size)), r"part-00001\.parquet is damaged"),
    "flipped bits": (lambda w: flip(part_of(w)), r"part-00001\.parquet is damaged: its checksum"),
    "ids beyond the table": (
        lambda w: rewrite_part(w, with_column(w, "f0", lambda column: column.to_numpy() + 100), 1),
        r"part-00001\.parquet is damaged: ids of f0 must lie in 0\.\.49",
    ),
    "scenarios beyond the list": (
        lambda w: rewrite_part(w, with_column(w, "sample.scenario", lambda column: column.to_numpy() - 1), 1),
        r"part-00001\.parquet: scenarios must lie in 0\.\.2",
    ),
    "missing column": (lambda w: rewrite_part(w, pq.read_table(part_of(w)).drop_columns(["d1"]), 1), "column d1 is missing"),
}


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def with_column(written, name, change):
    rows = pq.read_table(part_of(written))
    return rows.set_column(rows.column_names.index(name), name, [change(rows[name])])


@pytest.mark.parametrize("fault", FAULTS)
def test_folders_that_are_no_whole_dataset_are_refused(fault, written, capsys):
    spoil, complaint = FAULTS[fault]
    spoil(written)
    page = written.folder.parent / "page.html"
    assert main(["describe", str(written.folder), "--page", str(page)]) == 2
    message = capsys.readouterr().err
    assert re.search(complaint, message), message
    assert "Traceback" not in message
    assert not page.exists()


def test_missing_vocabulary_is_refused(movielens, tmp_path):
    import shutil

    folder = shutil.copytree(movielens, tmp_path / "copy")
    (folder / "vocab/zip.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"vocab/zip\.parquet is damaged"):
        describe(folder, 1)
    (folder / "vocab/zip.parquet").unlink()
    with pytest.raises(DataError, match=r"vocab/zip\.parquet is missing"):
        describe(folder, 1)


def test_page_needs_matplotlib_and_says_so_before_reading(movielens, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["describe", str(movielens), "--page", str(tmp_path / "page.html")]) == 2
    message = capsys.readouterr().err
    assert "pip install 'mmlrec[plots]'" in message
    assert "read:" not in message


def test_place_of_the_page_that_cannot_be_written_is_told(written, capsys):
    assert main(["describe", str(written.folder), "--page", str(written.folder / "none" / "page.html")]) == 2
    assert "page.html: the page cannot be written: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize("rows", ["-1", "1001", "x"])
def test_number_of_examples_is_checked(rows, written, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["describe", str(written.folder), "--rows", rows])
    assert "a whole number from 0 to 1000 is needed" in capsys.readouterr().err
