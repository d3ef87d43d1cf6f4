"""Files that commands write: what a killed one has left goes, and a file of something else is not replaced."""

import fcntl
import gzip
import json
import os
import signal
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from apps.cli import check_replaced
from mmlrec.errors import UserError
from mmlrec.evaluation import score_files
from tests.datasets import write_dataset
from tests.processes import ROOT, run

CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: mmoe, expert_hidden_units: [8], gate_hidden_units: [4], tower_hidden_units: [4]}}
embeddings: {{dim: 4}}
training: {{batch_size: 100, epochs: 1, max_steps: 2, patience: null}}
"""
#: Killed when the rows are written.
KILLED = """
import os, runpy, signal, sys
from mmlrec.evaluation.score_files import ScoreFile

ScoreFile.close = lambda self: os.kill(os.getpid(), signal.SIGKILL)
sys.argv[0] = "apps.predict"
runpy.run_module("apps.predict", run_name="__main__")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    write_dataset(folder / "data", rows=400, table_rows=20)
    (folder / "config.yaml").write_text(CONFIG.format(dataset=folder / "data"))
    done = run([sys.executable, "-m", "apps.train", "--config", str(folder / "config.yaml"), "--run-dir", str(folder / "run")])
    assert done.returncode == 0, done.stderr
    return folder


def scored(root: Path, output: object) -> list[str]:
    return ["--run-dir", str(root / "run"), "--input", str(root / "data"), "--output", str(output)]


@pytest.mark.parametrize("where", ["disk", "store"])
def test_scores_of_a_killed_process_are_deleted_by_the_next(root, tmp_path, run_app, where, request, monkeypatch):
    """On the way to an address they lie in the folder for temporary files."""
    folder, output = tmp_path / "folder", tmp_path / "folder/scores.parquet"
    folder.mkdir()
    if where == "store":
        output = f"{request.getfixturevalue('store').address}/scores.parquet"
        monkeypatch.setenv("TMPDIR", str(folder))
        monkeypatch.setattr("tempfile.tempdir", None)
    mine = folder / "scores.parquet.mine.tmp"
    mine.write_text("mine")

    def leftovers():
        return [path for path in folder.rglob("scores.parquet*") if path not in (output, mine)]

    (tmp_path / "killed.py").write_text(KILLED)
    assert run([sys.executable, str(tmp_path / "killed.py"), *scored(root, output)]).returncode == -signal.SIGKILL
    assert len(leftovers()) == 1
    code, error = run_app("predict", *scored(root, output))
    assert code == 0, error
    assert leftovers() == []
    assert mine.read_text() == "mine"


#: Name of a file -> what else than scores it may hold.
OTHERS = {
    "part.parquet": None,
    "no.parquet": b"no Parquet",
    "people.csv": b"name,age\nscore.,3\n",
    "people.csv.gz": gzip.compress(b"name,age\n"),
    "half.csv.gz": gzip.compress(b"name,age\n" * 100)[:40],
    "metrics.jsonl": b'{"step": 1, "split": "train"}\n',
}


def test_a_file_that_holds_no_scores_is_not_replaced(root, tmp_path, run_app):
    for name, content in OTHERS.items():
        output = tmp_path / name
        if content is None:
            pq.write_table(pa.table({"label.click": [0.0]}), output)
        else:
            output.write_bytes(content)
        before = output.read_bytes()
        with pytest.raises(UserError, match=f"{name} is there, and holds no scores: it is not replaced"):
            score_files.check_replaced(output)
        if name in ("part.parquet", "metrics.jsonl"):
            code, error = run_app("predict", *scored(root, output))
            assert code == 2
            assert f"error: {output} is there, and holds no scores" in error
        assert output.read_bytes() == before


#: Scores as other tools write them again, and files of a split without rows.
REWRITTEN = {
    "pandas.csv": b"key.user,score.click\n1,0.5\n",
    "first.csv.gz": gzip.compress(b"score.click,key.user\n0.5,1\n"),
    "no_rows.jsonl.gz": gzip.compress(b""),
}


def test_scores_that_were_written_again_and_those_of_no_rows_are_replaced(tmp_path):
    for name, content in REWRITTEN.items():
        (tmp_path / name).write_bytes(content)
        score_files.check_replaced(tmp_path / name)


@pytest.mark.parametrize("ending", [".parquet", ".csv.gz", ".jsonl"])
def test_scores_and_empty_files_are_replaced(root, tmp_path, run_app, ending):
    output = tmp_path / f"scores{ending}"
    output.touch()
    for _ in range(2):
        code, error = run_app("predict", *scored(root, output))
        assert code == 0, error


def test_a_plan_replaces_plans_only(tmp_path, run_app):
    out = tmp_path / "plan.json"
    given = ("--config", "scaling/dlrm-v2", "--tables", ROOT / "configs/scaling/tables/dlrm-v2.yaml", "--no-alternatives")
    for content in ('[{"table": "t0"}]', "mine", "{}"):
        out.write_text(content)
        code, error = run_app("plan", *given, "--hosts", 1, "--json", out)
        assert code == 2
        assert f"error: {out} is there, and this command has not written it" in error
        assert out.read_text() == content
    out.unlink()
    for _ in range(2):
        assert run_app("plan", *given, "--hosts", 1, "--json", out)[0] == 0
    assert json.loads(out.read_text())["hardware"]["hosts"] == 1
    link, pipe = tmp_path / "link.json", tmp_path / "pipe"
    link.symlink_to("linked.json")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 1 << 20)
    for there in (link, pipe):
        assert run_app("plan", *given, "--hosts", 1, "--json", there)[0] == 0
    assert os.read(reader, 1 << 20) == (tmp_path / "linked.json").read_bytes() == out.read_bytes()
    os.close(reader)
    assert link.is_symlink()
    assert pipe.is_fifo()


def test_a_file_in_another_encoding_is_none_that_was_written(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match=r"a\.json is there"):
        check_replaced(tmp_path / "a.json", lambda _: True)
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(UserError, match=r"a\.json is there"):
        check_replaced(tmp_path / "a.json", lambda found: all("way" in one for one in found))


@pytest.mark.parametrize("name", ["managed", "methods"])
def test_a_benchmark_says_in_a_line_that_it_replaces_no_other_file(tmp_path, name):
    (tmp_path / "a.json").write_text("{}")
    ended = run([sys.executable, "-m", f"benchmarks.{name}", "--out", str(tmp_path / "a.json")])
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {tmp_path}/a.json is there, and this command has not written it")
