"""Rows that an evaluation computes: those of the split, and little padding."""

import numpy as np
import pytest

from mmlrec.config import load_config
from mmlrec.distributed.world import process_group
from mmlrec.evaluation.evaluation import evaluate_split, predict_split
from mmlrec.registry import load
from mmlrec.session import session as session_module
from mmlrec.session.session import build_session, rows_of_step
from tests.datasets import write_dataset


@pytest.mark.parametrize("most", [1, 7, 128, 200, 8192])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_a_split_that_a_step_holds_is_padded_little_and_others_are_divided_as_ever(most, world_size):
    for num_rows in [1, 2, 5, 127, 128, 129, 1000, 8191, 8192, 8193, 10_000, 65_537]:
        rows = rows_of_step(num_rows, most, world_size)
        assert rows == most or (rows % 128 == 0 and rows < most)
        assert rows == most or 0 <= rows * world_size - num_rows < 128 * world_size + world_size
        if num_rows > most * world_size:
            assert rows == most


@pytest.mark.parametrize("name", ["star", "ple"])
def test_scores_are_those_of_padded_steps_to_the_bit(tmp_path, name, monkeypatch):
    """A row's score has other last bits in these methods where other rows are in its step."""
    write_dataset(tmp_path / "data", rows={"train": 64, "valid": 1500, "test": 900})
    config = f"dataset: {{path: {tmp_path / 'data'}, setting: mtmsl}}\nmodel: {{name: {name}}}\n"
    (tmp_path / "config.yaml").write_text(config + "embeddings: {dim: 8, init_std: 1}\ntraining: {eval_batch_size: 1024}\n")
    found = {}
    with process_group() as world:
        session = build_session(load(tmp_path / "config.yaml", []), world, for_training=False)
        for padded in (False, True):
            if padded:
                monkeypatch.setattr(session_module, "rows_of_step", lambda rows, most, ranks: most)
            for split in ("valid", "test"):
                reader = session.reader(split)
                found[split, padded] = predict_split(session, reader.sequential(), total=reader.num_batches).logits
    for split in ("valid", "test"):
        assert np.array_equal(found[split, False], found[split, True])


def _numbers(report, path=""):
    """Path -> number, of everything in a report."""
    if isinstance(report, dict):
        return {key: value for name, inner in report.items() for key, value in _numbers(inner, f"{path}/{name}").items()}
    return {path: report} if isinstance(report, int | float) else {}


def test_the_network_computes_no_rows_that_are_not_there(tmp_path):
    write_dataset(tmp_path / "data", rows={"train": 64, "valid": 300, "test": 40})
    config = f"""
dataset: {{path: {tmp_path / "data"}, setting: mtmsl}}
model: {{name: mmoe, expert_hidden_units: [4], gate_hidden_units: [], tower_hidden_units: []}}
embeddings: {{dim: 8}}
"""
    (tmp_path / "config.yaml").write_text(config)
    reports, computed = {}, {}
    with process_group() as world:
        for most in (8192, 200, 7):
            overrides = [f"training.eval_batch_size={most}"]
            session = build_session(load_config(tmp_path / "config.yaml", overrides), world, for_training=False)
            for split in ("valid", "test"):
                seen: list[int] = []
                hook = session.network.register_forward_hook(lambda *call, seen=seen: seen.append(len(call[2].logits)))
                reports[split, most] = evaluate_split(session, split)
                hook.remove()
                computed[split, most] = seen
    assert [computed["valid", most] for most in (8192, 200)] == [[384], [200, 200]]
    assert [computed["test", most] for most in (8192, 200)] == [[128], [128]]
    for split in ("valid", "test"):
        by_sevens = reports[split, 7]
        assert computed[split, 7] == [7] * len(computed[split, 7])
        for most in (8192, 200):
            assert _numbers(reports[split, most]) == pytest.approx(_numbers(by_sevens), rel=1e-5)
