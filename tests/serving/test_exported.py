"""Real exported models, of runs on a table of one's own, score raw rows as `apps.predict` scores the dataset."""

import json
import sys

import httpx
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from mmlrec import serving
from tests import processes
from tests.preprocessing.table_fake import UNMANAGED, records, write_config, write_table
from tests.serving.served import served

NUM_ROWS = 1200
CHAINS = ("esmm", "escm2", "aitm")


def command(*arguments: object) -> None:
    done = processes.run([sys.executable, "-m", *map(str, arguments)])
    assert done.returncode == 0, done.stderr


def frame(rows: list[dict]) -> pd.DataFrame:
    """With large integers as such, among which some are missing: as floats they would be rounded."""
    return pd.DataFrame(rows).assign(visitor=pd.array([row["visitor"] for row in rows], "Int64"))


class Runs:
    """A dataset, and runs on it that are exported and predict when they are asked for."""

    def __init__(self, folder) -> None:
        self.folder = folder
        write_table(folder / "raw", "json", NUM_ROWS)
        command("preprocessing", "table", "--config", folder / "raw/my_table.yaml", "--out", folder / "data")
        files = yaml.safe_load((folder / "raw/my_table.yaml").read_text())["files"]
        unmanaged = write_config(folder / "unmanaged", UNMANAGED | {"files": files})
        command("preprocessing", "table", "--config", unmanaged, "--raw", folder / "raw", "--out", folder / "unmanaged/data")
        self.raw = {row["row"]: row | {"bought": "|".join(row["bought"])} for row in records(NUM_ROWS)}

    def run(self, method: str, setting: str):
        """Folder of a run, and its predictions of the test rows, with the raw rows in the same order."""
        folder = self.folder / f"{method}-{setting}"
        tasks = "[click]" if setting == "msl" else "[click, buy]"
        roles = ", roles: [click, buy]" if method in CHAINS else ""
        if not folder.exists():
            data, embeddings = self.folder / "data", "{dim: 4, managed: {update_every: 2}}"
            if method == "single_task":  # whose branches have tables of their own
                data, embeddings = self.folder / "unmanaged/data", "{dim: 4}"
            config = self.folder / f"{method}-{setting}.yaml"
            config.write_text(
                f"dataset: {{path: {data}, setting: {setting}, tasks: {tasks}}}\n"
                f"model: {{name: {method}{roles}}}\nembeddings: {embeddings}\ntraining: {{batch_size: 256, max_steps: 4}}\n"
            )
            command("apps.train", "--config", config, "--run-dir", folder)
            command("apps.predict", "--run-dir", folder, "--input", data, "--output", folder / "scores.parquet")
        scores = pq.read_table(folder / "scores.parquet").to_pandas()
        rows = [self.raw[row] for row in scores["row" if "row" in scores else "key.row"]]
        return folder, scores[[name for name in scores if name.startswith("score.")]], rows

    def exported(self, method: str, setting: str, *options: str):
        run, scores, rows = self.run(method, setting)
        model = self.folder / "-".join(["model", method, setting, *options])
        if not model.exists():
            command("apps.export", "--run-dir", run, "--out", model, *options)
        return model, scores, rows


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


MORE = [("single_task", "mtl"), ("single_task", "msl"), ("star", "msl"), ("ple", "mtmsl"), ("pepnet", "mtmsl")]
MORE += [("esmm", "mtl"), ("escm2", "mtmsl"), ("aitm", "mtmsl")]
METHODS = [("mmoe", "mtmsl"), *(pytest.param(*of, marks=pytest.mark.long) for of in MORE)]


@pytest.mark.parametrize(("method", "setting"), METHODS)
def test_raw_rows_score_as_the_run_predicts(runs, method, setting):
    folder, scores, rows = runs.exported(method, setting)
    model = serving.load(folder)
    found = model.score(frame(rows))
    names = list(scores.columns)
    if method in CHAINS:  # a chain gives its steps by their names, too
        assert {"score.ctr", "score.cvr", "score.ctcvr"} <= set(found.columns)
    else:
        assert list(found.columns) == names
    np.testing.assert_allclose(found[names], scores, atol=1e-6)
    np.testing.assert_allclose(pd.DataFrame(model.score(rows))[names], scores, atol=1e-6)
    alone = [model.score([row])[0] for row in rows[:20]]
    np.testing.assert_allclose(pd.DataFrame(alone)[names], scores[:20], atol=1e-6)
    assert list(model.score([model.example()])[0]) == list(found.columns)


@pytest.mark.long
@pytest.mark.parametrize(("options", "tolerance"), [(("--format", "onnx"), 1e-6), (("--tables", "int8"), 2e-3)])
def test_other_formats_and_precisions(runs, options, tolerance):
    folder, scores, rows = runs.exported("mmoe", "mtmsl", *options)
    np.testing.assert_allclose(serving.load(folder).score(frame(rows)), scores, atol=tolerance)


def test_over_http(runs, tmp_path):
    folder, scores, rows = runs.exported("mmoe", "mtmsl")
    with served(folder, tmp_path / "log") as service, httpx.Client(base_url=service.url, timeout=20) as client:
        found = client.post("/score", content=json.dumps({"rows": rows}))
        assert found.status_code == 200, found.text
        np.testing.assert_allclose(pd.DataFrame(found.json()["scores"]), scores, atol=1e-6)
        refused = client.post("/score", content=json.dumps({"rows": [rows[0] | {"device": "watch"}]}))
        assert refused.status_code == 422
        assert "device" in refused.json()["error"]
