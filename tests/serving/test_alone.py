"""An exported model scores where nothing of training is installed, and takes the memory of what it touches."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests import processes
from tests.serving.folders import DIM, LOOKUPS, ROWS, encoded_by_hand, raw_rows, scores_by_hand, tables, write_model

SCORE = """
import json, sys
from mmlrec import serving
rows = json.load(open(sys.argv[2]))
print(json.dumps(serving.load(sys.argv[1]).score(rows)))
"""
#: As where these are not installed.
BLOCK = """
from importlib.machinery import PathFinder
found = PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {blocked} else found(name, path, target)
PathFinder.find_spec = find_spec
"""
TRAINING = (
    "torchrec",
    "fbgemm_gpu",
    "pydantic",
    "yaml",
    "pandas",
    "sklearn",
    "tensorboard",
    "tabulate",
    "tqdm",
    "upath",
    "s3fs",
    "fsspec",
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Folder of a model, file of raw rows, their scores by hand."""
    folder, contents, rows = tmp_path_factory.mktemp("toy"), tables("int8", ROWS, DIM), raw_rows(30)
    weight = write_model(folder / "model", contents, dtype="int8")
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder, scores_by_hand(encoded_by_hand(rows), contents, [LOOKUPS], weight)


def check(done: subprocess.CompletedProcess[str], expected: np.ndarray) -> None:
    assert done.returncode == 0, done.stderr
    found = [[row["score.click"], row["score.buy"]] for row in json.loads(done.stdout)]
    np.testing.assert_allclose(np.array(found), expected, atol=2e-6)


def test_nothing_of_training_is_imported(toy):
    folder, expected = toy
    command = [sys.executable, "-c", BLOCK.format(blocked=TRAINING) + SCORE, str(folder / "model"), str(folder / "rows.json")]
    check(subprocess.run(command, env=processes.environment(), capture_output=True, text=True, check=False), expected)
