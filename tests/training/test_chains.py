"""Methods on a chain of tasks, end to end: labels that are no chain, marked reports, conversion rates of clicked rows."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from mmlrec.config import load_config
from mmlrec.data.chain import count_violations
from mmlrec.distributed.world import process_group
from mmlrec.errors import DataError
from mmlrec.evaluation.prediction import write_predictions
from mmlrec.metrics.report import report_table
from mmlrec.run_folder.folder import RunFolder
from mmlrec.session.session import load_session
from mmlrec.training.run import train
from tests.datasets import rewrite_part, write_dataset

CONFIG = """
dataset: {{path: {dataset}, setting: mtmsl}}
model: {{name: esmm, expert_hidden_units: [8, 6]}}
embeddings: {{dim: 4, init_std: 0.3}}
dense: {{optimizer: {{name: adam, lr: 0.02}}}}
training: {{batch_size: 40, max_steps: 12}}
"""


@pytest.fixture(scope="module")
def funnel(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("funnel") / "data", rows=600, num_scenarios=2, funnel=True)


@pytest.fixture
def run(tmp_path):
    def call(dataset, name, *overrides):
        config = tmp_path / "config.yaml"
        config.write_text(CONFIG.format(dataset=dataset))
        with process_group() as world:
            return train(load_config(config, list(overrides)), tmp_path / name, world)

    return call


def spoilt(written, folder, rows, part=1):
    """A copy of the dataset in which `rows` rows of a part have a conversion without a click."""
    shutil.copytree(written.folder, folder)
    copied = type(written)(folder, written.manifest, written.tables)
    table = pq.read_table(folder / written.manifest.splits["train"].parts[part].path)
    for task, value in (("click", 0.0), ("buy", 1.0)):
        labels = table[f"label.{task}"].to_pylist()
        labels[:rows] = [value] * rows
        index = table.column_names.index(f"label.{task}")
        table = table.set_column(index, f"label.{task}", pa.array(labels, pa.float32()))
    rewrite_part(copied, table, part)
    return folder


def test_violations_are_counted_in_each_part_and_missing_labels_are_none(funnel, tmp_path):
    parts = funnel.manifest.splits["train"].parts
    assert count_violations(funnel.folder, parts, ["click", "buy"]) == [0]
    click, buy = (funnel.tables["train"][f"label.{task}"].to_numpy() for task in ("click", "buy"))
    backwards = int((click > buy).sum())
    assert backwards > 50
    assert np.isnan(click).any()
    assert count_violations(funnel.folder, parts, ["buy", "click"]) == [backwards]
    shares = [count_violations(funnel.folder, parts[rank::3], ["buy", "click"])[0] for rank in range(3)]
    assert sum(shares) == backwards
    folder = spoilt(funnel, tmp_path / "spoilt", 5)
    assert count_violations(folder, parts, ["click", "buy", "click"]) == [5, backwards_of(folder, parts)]
    (folder / parts[0].path).write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"part-00000\.parquet: its labels cannot be read"):
        count_violations(folder, parts, ["click", "buy"])


def backwards_of(folder, parts):
    tables = [pq.read_table(folder / part.path) for part in parts]
    click, buy = (np.concatenate([t[f"label.{task}"].to_numpy() for t in tables]) for task in ("click", "buy"))
    return int((click > buy).sum())


@pytest.mark.parametrize("method", ["esmm", "aitm", "escm2"])
def test_labels_that_are_no_chain_are_refused(funnel, run, tmp_path, method):
    folder = spoilt(funnel, tmp_path / "spoilt", 3)
    wanted = rf"{folder}: the labels of click, buy are no chain: of 600 train rows 3 have 'buy' without 'click'\."
    with pytest.raises(DataError, match=wanted + r".*allows 0 \(model\.max_chain_violation\).*model\.roles.*allow_non_chain"):
        run(folder, "refused", f"model.name={method}")
    assert not (tmp_path / "refused").exists()
    assert "allow_non_chain" not in run(folder, "tolerated", f"model.name={method}", "model.max_chain_violation=3")


def test_the_wrong_order_is_refused(funnel, run):
    with pytest.raises(DataError, match=r"the labels of buy, click are no chain: of 600 train rows \d+ have 'click' without"):
        run(funnel.folder, "turned", "model.roles=[buy, click]")


def test_reports_of_labels_that_are_no_chain_are_marked(funnel, run, tmp_path):
    folder = spoilt(funnel, tmp_path / "spoilt", 3)
    report = run(folder, "marked", "model.allow_non_chain=true")
    log = (tmp_path / "marked" / "train.log").read_text()
    assert "3 have 'buy' without 'click'" in log
    assert "reports are marked" in log
    assert report["allow_non_chain"] is True
    assert json.loads((tmp_path / "marked" / "result.json").read_text())["test"]["allow_non_chain"] is True
    lines = [json.loads(line) for line in (tmp_path / "marked" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["report"]["allow_non_chain"] for line in lines if line["split"] == "valid")
    assert report_table(report).startswith("Trained on labels that are no chain (model.allow_non_chain).\n")


@pytest.mark.parametrize("method", ["esmm", "aitm", "escm2"])
def test_conversion_rates_of_clicked_rows_are_reported_and_predicted(funnel, run, tmp_path, method):
    report = run(funnel.folder, "run", f"model.name={method}")
    assert "allow_non_chain" not in report
    output = tmp_path / "scores.parquet"
    with process_group() as world:
        session, *_ = load_session(RunFolder(tmp_path / "run"), world, [])
        write_predictions(session, funnel.folder, "test", output)
    scores, test = pq.read_table(output), funnel.tables["test"]
    ctr, ctcvr, cvr = (scores[f"score.{name}"].to_numpy().astype(np.float64) for name in ("click", "buy", "cvr"))
    np.testing.assert_allclose(cvr, np.minimum(1, ctcvr / ctr), rtol=1e-5)
    click, buy = (test[f"label.{task}"].to_numpy() for task in ("click", "buy"))
    clicked = (click == 1) & ~np.isnan(buy)
    assert report["cvr"]["rows"] == clicked.sum()
    assert report["cvr"]["auc"] == pytest.approx(roc_auc_score(buy[clicked], (ctcvr / ctr)[clicked]), abs=1e-9)
    for index, entry in enumerate(report["cvr"]["scenarios"].values()):
        assert entry["rows"] == (clicked & (test["sample.scenario"].to_numpy() == index)).sum()
    assert any(line.startswith("cvr ") for line in report_table(report).splitlines())


def test_a_resumed_run_is_not_counted_again(funnel, run, monkeypatch):
    run(funnel.folder, "twice", "training.max_steps=4")
    monkeypatch.setattr("mmlrec.training.chain.count_violations", None)
    run(funnel.folder, "twice", "training.max_steps=8")
