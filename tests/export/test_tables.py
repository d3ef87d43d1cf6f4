"""Tables of checkpoints read in pieces, and written in three precisions."""

import json
import math
import tracemalloc

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.numpy import load_file

from mmlrec.errors import CheckpointError, DataError
from mmlrec.export.card import table_file
from mmlrec.export.tables import quantised, write_table
from mmlrec.run_folder.table_rows import TableRows


def pieces(table, rows):
    return (torch.from_numpy(table[start : start + rows].copy()) for start in range(0, len(table), rows))


def hard_rows():
    """Ordinary rows, and those that go wrong in float32: constant, huge, tiny, one number that stands out."""
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=8) * 10.0**power for power in range(-30, 31, 3)]
    rows += [np.zeros(8), np.full(8, -3.25), np.full(8, 1e-45), np.linspace(-3.4e38, 3.4e38, 8), np.linspace(0, 3e-45, 8)]
    rows += [np.r_[1e6, rng.normal(size=7)]]
    return np.array(rows).astype(np.float32)


def test_quantised_rows_equal_brute_force_and_are_half_a_scale_off_at_most():
    rows = hard_rows()
    weight, scale, offset = quantised(rows)
    assert (weight.dtype, scale.dtype, offset.dtype) == (np.uint8, np.float32, np.float32)
    for r, row in enumerate(rows.tolist()):
        low, high = min(row), max(row)
        assert offset[r] == np.float32(low)
        assert scale[r] == np.float32((high - low) / 255)
        for d, number in enumerate(row):
            steps = (number - low) / float(scale[r]) if scale[r] else 0.0
            assert abs(int(weight[r, d]) - min(max(steps, 0), 255)) <= 0.5 + 1e-6
            back = float(weight[r, d]) * float(scale[r]) + float(offset[r])
            # Where a 255th of the range is no float32 any more, the range itself is next to nothing.
            assert abs(back - number) <= float(scale[r]) * 0.501 + (1e-42 if high - low < 1e-36 else 0.0)
        if high > low and scale[r] > 1e-38:
            assert {int(weight[r].min()), int(weight[r].max())} == {0, 255}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_files_are_safetensors_that_hold_the_rows(tmp_path, precision):
    table = np.random.default_rng(1).normal(size=(1001, 12)).astype(np.float32)
    path = tmp_path / "t.safetensors"
    write_table(path, "t", pieces(table, 64), table.shape, precision)
    found = load_file(path)
    if precision == "int8":
        weight, scale, offset = quantised(table)
        assert set(found) == {"weight", "scale", "offset"}
        np.testing.assert_array_equal(found["weight"], weight)
        np.testing.assert_array_equal(found["scale"], scale)
        np.testing.assert_array_equal(found["offset"], offset)
        # A quarter of float32, plus scales and offsets, plus the header.
        assert path.stat().st_size <= table.nbytes / 4 + 8 * len(table) + 512
    else:
        np.testing.assert_array_equal(found["weight"], table.astype(np.float16 if precision == "fp16" else np.float32))
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
        json.loads(file.read(header))
    assert (8 + header) % 64 == 0
    with safe_open(path, framework="pt") as file:
        assert tuple(file.get_tensor("weight").shape) == table.shape


def test_numbers_that_do_not_fit_are_told_with_table_and_row(tmp_path):
    table = np.ones((300, 4), np.float32)
    table[257, 3] = -65520.0  # rounds to infinity; 65519 does not
    with pytest.raises(DataError, match=r"table 'user', row 257: 65520 is too large for fp16"):
        write_table(tmp_path / "a", "user", pieces(table, 100), table.shape, "fp16")
    table[257, 3] = -65519.0
    write_table(tmp_path / "b", "user", pieces(table, 100), table.shape, "fp16")
    assert load_file(tmp_path / "b")["weight"][257, 3] == -65504
    for bad in (math.nan, math.inf):
        table[258, 0] = bad
        for precision in ("fp32", "fp16", "int8"):
            with pytest.raises(DataError, match=r"table 'user', row 258: a number is not finite"):
                write_table(tmp_path / f"{precision}{bad}", "user", pieces(table, 100), table.shape, precision)


def write_checkpoint(folder, tensors):
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)


def test_a_table_is_read_and_written_in_little_memory(tmp_path):
    """16 MiB in pieces of 64 KiB: numpy and bytes, which tracemalloc sees, never hold a tenth of it."""
    table = torch.arange(1 << 22, dtype=torch.float32).view(-1, 16).sin()
    write_checkpoint(tmp_path / "checkpoint", {"model.t.weight": table, "other": torch.ones(3)})
    rows = TableRows(tmp_path / "checkpoint", ["model.t.weight"])
    assert rows.shape("model.t.weight") == (1 << 18, 16)
    for precision in ("fp32", "int8"):
        tracemalloc.start()
        write_table(tmp_path / precision, "t", rows.read("model.t.weight", 1024), tuple(table.shape), precision)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < table.nbytes / 10
    assert np.array_equal(load_file(tmp_path / "fp32")["weight"], table.numpy())
    assert np.array_equal(load_file(tmp_path / "int8")["weight"], quantised(table.numpy())[0])


@pytest.mark.parametrize("num_rows", [1, 7, 30, 1000])
def test_pieces_of_any_size_are_the_table(tmp_path, num_rows):
    table = torch.randn(30, 4)
    write_checkpoint(tmp_path, {"t": table})
    assert torch.equal(torch.cat(list(TableRows(tmp_path, ["t"]).read("t", num_rows))), table)


def test_what_is_no_table_is_told(tmp_path):
    write_checkpoint(tmp_path, {"double": torch.ones(3, 4, dtype=torch.float64), "vector": torch.ones(3)})
    with pytest.raises(CheckpointError, match="lacks 'absent'"):
        TableRows(tmp_path, ["absent"])
    for name in ("double", "vector"):
        with pytest.raises(CheckpointError, match=f"'{name}' is no table of float32"):
            TableRows(tmp_path, [name])


def test_damage_that_no_checksum_of_the_folder_has_seen_is_told(tmp_path):
    write_checkpoint(tmp_path, {"t": torch.full((100, 4), 1.5)})
    file = next(tmp_path.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    place = content.find(np.full(64, 1.5, np.float32).tobytes()) + 100
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="'t' cannot be read"):
        list(TableRows(tmp_path, ["t"]).read("t", 10))
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="'t' cannot be read"):
        list(TableRows(tmp_path, ["t"]).read("t", 10))


def test_names_of_files_are_safe_whatever_a_branch_is_called():
    branches = ["click:a%2Fb", "click:..", "click:\n*"]
    names = [table_file(name, branches) for name in ("user", *(f"{branch}/user" for branch in branches))]
    assert names == [f"tables/user{number}.safetensors" for number in ("", ".0", ".1", ".2")]
