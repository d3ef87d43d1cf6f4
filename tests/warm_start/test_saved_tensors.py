"""Tensors of a checkpoint read by ranges: what torch's own code reads, and no more bytes than asked for."""

import pickle

import pytest
import torch

from mmlrec.distributed.world import process_group
from mmlrec.errors import CheckpointError
from mmlrec.run_folder import checkpoint, index
from mmlrec.run_folder.index import saved_tensors
from tests.training.launch import tensors

CONTENT = {
    "model.table": torch.randn(1000, 8),
    "model.counts": torch.arange(7),
    "model.scalar": torch.tensor(3.5),
    "model.half": torch.randn(5, 2, 3).bfloat16(),
    "model.empty": torch.empty(0, 4),
}


@pytest.fixture
def folder(tmp_path):
    with process_group() as world:
        checkpoint.save(tmp_path / "step", CONTENT, {}, world)
    return tmp_path / "step"


def test_ranges_are_what_torch_reads(folder):
    found, expected = saved_tensors(folder), tensors(folder)
    assert found.keys() == expected.keys() == CONTENT.keys()
    for key, value in expected.items():
        assert found[key].size == tuple(value.shape)
        assert found[key].read().dtype == value.dtype
        assert torch.equal(found[key].read(), value)
    table = found["model.table"]
    for start, stop in ((0, 1), (999, 1000), (17, 801), (500, 500)):
        assert torch.equal(table.read(start, stop), CONTENT["model.table"][start:stop])


def test_no_more_is_read_than_asked_for(folder, monkeypatch):
    plain, asked = index._range, []

    def counted(path, start, num_bytes):
        asked.append(num_bytes)
        return plain(path, start, num_bytes)

    monkeypatch.setattr(index, "_range", counted)
    table = saved_tensors(folder)["model.table"]
    table.read(3, 5)
    assert asked[-1] == 2 * 8 * 4
    assert sum(asked[:-1]) < 16_000  # where the archive says that its numbers lie
    asked.clear()
    table.read(100, 200)
    assert asked == [100 * 8 * 4]


def test_files_that_are_not_what_the_index_says_are_refused(folder):
    (file,) = folder.glob("*.distcp")
    content = file.read_bytes()
    file.write_bytes(content[:200] + bytes(len(content) - 200))
    with pytest.raises(CheckpointError, match="holds no tensor where its index says so"):
        saved_tensors(folder)["model.half"].read()
    file.write_bytes(content)
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())  # written by this test
    chunk = metadata.state_dict_metadata["model.table"].chunks[0]
    chunk.sizes = torch.Size([1000, 9])
    metadata.state_dict_metadata["model.table"].size = torch.Size([1000, 9])
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="a tensor has 32000 bytes, its index says 36000"):
        saved_tensors(folder)["model.table"].read(0, 1)
