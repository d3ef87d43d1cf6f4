"""A run folder from elsewhere runs no code: not when it is evaluated, predicted with, or resumed."""

import enum
import io
import json
import pickle
import re
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from mmlrec.errors import CheckpointError
from mmlrec.run_folder.index import Reader
from tests.datasets import write_dataset

ROOT = Path(__file__).parents[2]
CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: mmoe, num_experts: 2, expert_hidden_units: [8], gate_hidden_units: [], tower_hidden_units: []}}
embeddings: {{dim: 4}}
training: {{batch_size: 32, max_steps: 4}}
"""


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def seal(checkpoint):
    """Make the marker fit the files again, as whoever plants something would."""
    files = [path for path in checkpoint.iterdir() if path.name != "COMPLETE.json"]
    marked = {path.name: {"bytes": path.stat().st_size, "crc32": zlib.crc32(path.read_bytes())} for path in files}
    (checkpoint / "COMPLETE.json").write_text(json.dumps({"files": marked}))


@pytest.fixture
def trained(tmp_path, run_app):
    write_dataset(tmp_path / "data", rows=100)
    (tmp_path / "config.yaml").write_text(CONFIG.format(dataset=tmp_path / "data"))
    assert run_app("train", "--config", tmp_path / "config.yaml", "--run-dir", tmp_path / "run")[0] == 0
    return tmp_path / "run"


def test_a_planted_program_is_refused_by_name_and_does_not_run(trained, tmp_path, run_app):
    output = tmp_path / "scores.parquet"
    commands = {
        "evaluate": ["--run-dir", trained],
        "predict": ["--run-dir", trained, "--input", tmp_path / "data", "--output", output],
        "train": ["--config", tmp_path / "config.yaml", "--run-dir", trained, "training.max_steps=8"],
    }
    assert run_app("evaluate", *commands["evaluate"])[0] == 0
    target = tmp_path / "planted"
    for checkpoint in (trained / "checkpoints").iterdir():
        (checkpoint / ".metadata").write_bytes(pickle.dumps(Payload(target)))
        seal(checkpoint)
    for name, arguments in commands.items():
        code, error = run_app(name, *arguments)
        assert code == 2, (name, error)
        assert re.search(r"error: \S+\.metadata is not the index of a checkpoint: it names (io|_io)\.open", error), (
            name,
            error,
        )
        assert not target.exists()
    assert not output.exists()


@pytest.mark.parametrize("name", [".lock", "train.log", "metrics.jsonl", "logs/rank-00001.log"])
def test_a_link_to_another_file_is_refused_and_that_file_left_alone(trained, tmp_path, run_app, name):
    victim = tmp_path / "victim"
    victim.write_text("mine\n")
    (trained / name).parent.mkdir(exist_ok=True)
    (trained / name).unlink(missing_ok=True)
    (trained / name).symlink_to(victim)
    code, error = run_app("train", "--config", tmp_path / "config.yaml", "--run-dir", trained, "training.max_steps=8")
    assert code == 2, error
    assert error.count("error: ") == 1
    assert str(trained / name) in error
    assert victim.read_text() == "mine\n"


def save(folder):
    dcp.save(
        {"model.w": torch.ones(3), "model.h": torch.ones(2, dtype=torch.bfloat16)}, checkpoint_id=str(folder), no_dist=True
    )


def test_what_dcp_writes_is_read(tmp_path):
    save(tmp_path)
    found = Reader(tmp_path).read_metadata()
    assert found.state_dict_metadata.keys() == {"model.w", "model.h"}
    tensors = {"model.w": torch.zeros(3), "model.h": torch.zeros(2, dtype=torch.bfloat16)}
    dcp.load(tensors, storage_reader=Reader(tmp_path), no_dist=True)
    assert tensors["model.w"].tolist() == [1.0] * 3


def test_bytes_in_place_of_a_tensor_are_refused(tmp_path):
    # DCP hands such entries to torch.load without a restriction.
    save(tmp_path)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    metadata.state_dict_metadata["model.w"] = BytesStorageMetadata()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"metadata is not the index of a checkpoint: it names .*BytesStorageMetadata"):
        Reader(tmp_path).read_metadata()
    metadata.state_dict_metadata["model.w"] = [1]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"entry 'model.w' is no tensor: list"):
        Reader(tmp_path).read_metadata()


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"a": 1})], ids=["empty", "garbage", "another object"])
def test_other_files_are_no_index(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata is not the index of a checkpoint"):
        Reader(tmp_path).read_metadata()


def test_names_reached_through_a_module_are_refused(tmp_path):
    # torch.serialization.os.system: protocol 4 lets a name have dots.
    stream = io.BytesIO()
    stream.write(b"\x80\x04\x8c\x13torch.serialization\x8c\x09os.system\x93.")
    (tmp_path / ".metadata").write_bytes(stream.getvalue())
    with pytest.raises(CheckpointError, match=r"it names torch\.serialization\.os\.system"):
        Reader(tmp_path).read_metadata()


def test_nothing_else_in_the_tree_unpickles_a_file():
    loaders = re.compile(r"[Uu]npickler\(|pickle\.loads?\(|torch\.load\(|allow_pickle|joblib|SystemReader\(|read_pickle")
    found = {
        path.relative_to(ROOT).as_posix()
        for package in ("mmlrec", "apps", "preprocessing")
        for path in (ROOT / package).rglob("*.py")
        if loaders.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"mmlrec/run_folder/index.py"}


class OldPickler(pickle.Pickler):
    """Pickles members of enumerations as Python 3.11.0 to 3.11.3 do."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


def pickled(content) -> bytes:
    file = io.BytesIO()
    OldPickler(file).dump(content)
    return file.getvalue()


def test_an_index_of_an_older_python_is_read_and_its_getattr_gets_nothing_else(tmp_path):
    save(tmp_path / "c")
    index = tmp_path / "c" / ".metadata"
    content = pickle.loads(index.read_bytes())
    index.write_bytes(pickled(content))
    assert b"getattr" in index.read_bytes()
    assert set(Reader(tmp_path / "c").read_metadata().state_dict_metadata) == {"model.w", "model.h"}

    class Planted:
        def __reduce__(self):
            return getattr, (Metadata, "__init__")

    index.write_bytes(pickle.dumps(Planted()))
    with pytest.raises(CheckpointError, match=r"it names builtins\.getattr"):
        Reader(tmp_path / "c").read_metadata()
