"""The generator against brute force: distributions, the known best AUC, correlation of tasks, determinism."""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from mmlrec.schema import DatasetManifest
from preprocessing.command_line import main
from preprocessing.datasets import synthetic
from preprocessing.datasets.synthetic import Synthetic, auc
from preprocessing.reading.raw_files import RawFolder
from preprocessing.rows.zipf import Zipf
from tests.preprocessing.movielens_fake import folder_bytes


def make(**options):
    parser = argparse.ArgumentParser()
    Synthetic.add_options(parser)
    parsed = parser.parse_args([])
    return Synthetic(argparse.Namespace(**(vars(parsed) | {"seed": 2024} | options)))


def generate(out, **options):
    arguments = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["synthetic", "--out", str(out), *arguments]) == 0
    return DatasetManifest.load(out)


def read(out, split):
    return pd.concat([pq.read_table(path).to_pandas() for path in sorted((out / split).iterdir())], ignore_index=True)


@pytest.mark.parametrize(("num_ids", "exponent"), [(5, 1.0), (5, 0.0), (1000, 1.3), (6000, 0.8), (100_000, 1.0), (10**9, 1.05)])
def test_ids_follow_zipf_s_law(num_ids, exponent):
    ids = Zipf(num_ids, exponent).draw(np.random.default_rng(0), 400_000)
    assert ids.min() >= 1
    assert ids.max() <= num_ids
    # exact mass of octaves of ids; beyond 1e6 terms by Euler-Maclaurin
    exact = np.cumsum(np.arange(1, min(num_ids, 10**6) + 1, dtype=float) ** -exponent)

    def mass(k):
        if k <= len(exact):
            return exact[k - 1]
        n, s = len(exact), exponent
        return exact[-1] + (k ** (1 - s) - n ** (1 - s)) / (1 - s) + (k**-s - n**-s) / 2

    edges = [k for k in (1, 2, 3, 4, 8, 100, 3000, 4096, 4097, 5000, 20_000, 10**6, 10**8) if k < num_ids] + [num_ids]
    share = np.diff([0.0, *(mass(k) for k in edges)]) / mass(num_ids)
    observed = np.bincount(np.searchsorted(edges, ids), minlength=len(edges))
    kept = share * len(ids) > 5
    chi_square = ((observed - share * len(ids)) ** 2 / (share * len(ids)))[kept].sum()
    assert chi_square < 45  # 12 degrees of freedom: p = 1e-5


def test_auc_equals_scikit_learn_and_brute_force_over_pairs():
    random = np.random.default_rng(0)
    score = np.round(random.random(2000), 2).astype(np.float32)  # many ties
    label = (random.random(2000) < score).astype(np.float32)
    assert auc(score, label) == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    p, q = score[:200], random.random(200).astype(np.float32)
    correct = pairs = 0.0
    for i in range(200):
        for j in range(200):
            if i != j:
                weight = float(q[i]) * (1 - float(q[j]))
                pairs += weight
                correct += weight * ((p[i] > p[j]) + 0.5 * (p[i] == p[j]))
    assert auc(p, q) == pytest.approx(correct / pairs, abs=1e-9)
    assert auc(score, np.zeros(2000, np.float32)) is None
    assert auc(score[:0], label[:0]) is None


def test_bayes_auc_is_that_of_the_true_probabilities_on_the_test_split(tmp_path):
    """Probabilities recomputed for the written rows, from the ids on disk and the documented score."""
    options = {
        "rows": 30_000,
        "sparse_features": 3,
        "num_ids": "50,10000,100000000",
        "dense_features": 2,
        "tasks": 3,
        "scenarios": 3,
    }
    manifest = generate(tmp_path / "out", **options)
    data = make(**options)
    rows = read(tmp_path / "out", "test")
    scenario = rows["sample.scenario"].to_numpy()
    score = data._bias[:, scenario] + data._slopes @ (rows[["dense_0", "dense_1"]].to_numpy().T - 0.5)
    for f in range(3):
        score += data._heed[scenario, f] * data.effects(f, rows[f"sparse_{f}"].to_numpy())
    for t in range(3):
        label = rows[f"label.task_{t}"]
        assert manifest.statistics["bayes_auc"][f"task_{t}"]["all"] == pytest.approx(roc_auc_score(label, score[t]), abs=1e-6)
        for s in range(3):
            chosen = scenario == s
            found = manifest.statistics["bayes_auc"][f"task_{t}"][f"s{s}"]
            assert found == pytest.approx(roc_auc_score(label[chosen], score[t][chosen]), abs=1e-6)
        # the labels are drawn with these probabilities: mean and calibration in ten bins, 5 standard errors
        p = 1 / (1 + np.exp(-score[t]))
        for bin_rows in np.array_split(np.argsort(p), 10):
            error = np.sqrt((p[bin_rows] * (1 - p[bin_rows])).sum()) / len(bin_rows)
            assert abs(label.iloc[bin_rows].mean() - p[bin_rows].mean()) < 5 * error
        expected = manifest.statistics["bayes_auc_expected"][f"task_{t}"]["all"]
        assert abs(expected - manifest.statistics["bayes_auc"][f"task_{t}"]["all"]) < 0.03
    assert manifest.statistics["bayes_auc_rows"] == 3000


@pytest.mark.parametrize("conflict", [-1.0, -0.6, 0.0, 0.7, 1.0])
def test_effects_of_neighbouring_tasks_correlate_as_asked(conflict):
    effects = make(tasks=6, conflict=conflict).effects(0, np.arange(1, 200_001))
    assert np.allclose(effects.mean(axis=1), 0, atol=0.01)
    assert np.allclose(effects.var(axis=1), 1, atol=0.01)
    found = np.corrcoef(effects)
    assert np.allclose([found[t, t + 1] for t in range(5)], conflict, atol=0.01)


def test_effects_differ_by_feature_and_seed():
    ids = np.arange(1, 50_001)
    first = make().effects(0, ids)[0]
    for other in (make().effects(1, ids)[0], make(seed=7).effects(0, ids)[0]):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.02


def test_multi_features_have_the_mean_length_and_contribute_the_mean():
    data = make(rows=20_000, sparse_features=1, multi_features=1, multi_length=3.0, dense_features=0, num_ids="100")
    (batch,) = data.batches(RawFolder(Path(), (), ""))
    lengths = batch.column("multi_0").value_lengths().to_numpy()
    assert abs(lengths.mean() - 3) < 0.06
    assert (lengths == 0).any()
    lists = batch.column("multi_0").to_pylist()
    effects = data.effects(1, np.arange(101))
    means = np.array([effects[:, ids].mean(axis=1) if ids else np.zeros(2) for ids in lists]).T
    score = data._bias + data._heed[0, 0] * data.effects(0, batch.column("sparse_0").to_numpy()) + data._heed[0, 1] * means
    _, probability, _, _ = data._chunk(0)
    assert np.allclose(probability, 1 / (1 + np.exp(-score)), atol=1e-5)


def test_rows_stream_to_parts_with_identity_tables_and_a_user_key(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "CHUNK_ROWS", 700)
    options = {"rows": 5000, "num_ids": "10:1e9", "sparse_features": 4, "scenarios": 2}
    manifest = generate(tmp_path / "out", **options)
    assert {name: split.num_rows for name, split in manifest.splits.items()} == {"train": 4000, "valid": 500, "test": 500}
    # 10 * 10^(8 f / 3): 10, 4641.59, 2154434.69, 1e9; and row 0
    assert [t.num_rows for t in manifest.tables] == [11, 4643, 2_154_436, 10**9 + 1]
    assert all(t.vocabulary is None for t in manifest.tables)
    rows = read(tmp_path / "out", "train")
    assert np.array_equal(rows["key.user"], rows["sparse_0"])
    assert manifest.group_key == "user"
    assert rows["sparse_3"].max() > 2**24  # ids of full width survive
    assert manifest.splits["train"].label_counts["task_0"]["all"] == (4000, int(rows["label.task_0"].sum()))


def test_equal_options_give_equal_bytes_and_another_seed_does_not(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        generate(tmp_path / name, rows=150_000, sparse_features=2, multi_features=1, seed=seed)
    a, b, c = (folder_bytes(tmp_path / name) for name in "abc")
    assert a == b
    assert a["train/part-00000.parquet"] != c["train/part-00000.parquet"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--num-ids", "3,4"], "2 numbers for 8 features"),
        (["--num-ids", "many"], "give one number, LOW:HIGH"),
        (["--conflict", "2"], "--conflict must lie in -1..1"),
        (["--zipf", "-1"], "--zipf must lie in 0..10"),
        (["--zipf", "nan"], "--zipf must lie in 0..10"),
        (["--multi-length", "-2"], "--multi-length must lie in 0..10000"),
        (["--rows", "9"], "9 rows are too few"),
        (["--drift", "0.2"], "give --day, too"),
        (["--day", "2", "--drift", "1.5"], "--drift must lie in 0..1"),
    ],
)
def test_options_that_do_not_fit_are_named(tmp_path, capsys, options, words):
    assert main(["synthetic", "--out", str(tmp_path / "out"), *options]) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rows", ["abc", "1.5", "inf", "nan", "-3", "0"])
def test_row_counts_that_are_no_counts_are_refused(tmp_path, capsys, rows):
    with pytest.raises(SystemExit) as stop:
        main(["synthetic", "--out", str(tmp_path / "out"), f"--rows={rows}"])
    assert stop.value.code == 2
    assert "--rows" in capsys.readouterr().err


def test_a_log_that_drifts_renews_a_share_of_its_ids_and_of_its_effects_each_day():
    ranks, drift = np.arange(1, 100_001), 0.2
    days = {day: make(day=day, drift=drift, num_ids="100000", sparse_features=1) for day in (1, 2, 3, 5)}
    ids = {day: data.ids_of_ranks(0, ranks, 100_000) for day, data in days.items()}
    assert np.array_equal(ids[1], ranks)
    for day, of_day in ids.items():
        assert len(np.unique(of_day)) == len(ranks)
        assert np.array_equal((of_day - 1) % 100_000 + 1, ranks)  # whoever has a rank has it alone
        for later, of_later in ids.items():
            if later > day:
                kept = np.isin(of_later, of_day)
                assert np.array_equal(of_later[kept], of_day[kept])  # an id keeps its rank until it is gone
                assert abs(kept.mean() - 0.8 ** (later - day)) < 0.005
                before, after = (days[d].effects(0, of_later)[0] for d in (day, later))
                assert abs(np.corrcoef(before, after)[0, 1] - 0.8 ** (later - day)) < 0.015
                assert abs(after.var() - 1) < 0.015
    frequent = ranks <= 1000  # which go as often as others
    assert abs((ids[2] != ids[1])[frequent].mean() - drift) < 0.05


def test_the_first_day_has_the_rows_of_a_log_without_days_and_other_days_have_others(tmp_path):
    options = {"rows": 3000, "num_ids": "40", "sparse_features": 2, "dense_features": 1, "multi_features": 1}
    (plain,) = make(**options).batches(RawFolder(Path(), (), ""))
    (first,) = make(**options, day=1).batches(RawFolder(Path(), (), ""))
    (second,) = make(**options, day=2, drift=0.0).batches(RawFolder(Path(), (), ""))
    assert first.equals(plain)
    assert not second.column("dense_0").equals(plain.column("dense_0"))
    one, two = (generate(tmp_path / str(day), **options, day=day, drift=0.5) for day in (1, 2))
    assert one.preprocessing["day"] == 1
    assert one.table("sparse_0").vocabulary is not None
    of_all = two.statistics["of_all_rows"]
    assert of_all["bayes_auc_rows"] == 3000
    # The true probabilities of the ids that are written, through the vocabulary, against the labels.
    rows = pd.concat([read(tmp_path / "2", split) for split in ("train", "valid", "test")])
    data = make(**options, day=2, drift=0.5)
    score = data._slopes[0] * (rows["dense_0"].to_numpy() - 0.5) + data._bias[0, 0]
    for f in range(2):
        values = pq.read_table(tmp_path / "2" / two.table(f"sparse_{f}").vocabulary)["value"].to_numpy()
        known = rows[f"sparse_{f}"].to_numpy() > 0
        effects = data.effects(f, values[np.maximum(rows[f"sparse_{f}"].to_numpy(), 1) - 1])[0]
        score += data._heed[0, f] * np.where(known, effects, 0)
    found = roc_auc_score(rows["label.task_0"], score)  # without the list
    assert 0.6 < found <= of_all["bayes_auc"]["task_0"]["all"] < found + 0.08
