"""Rows that an evaluation computes: those of the split, and little padding."""

import pytest

from mmlrec.config import load_config
from mmlrec.distributed.world import process_group
from mmlrec.evaluation.evaluation import evaluate_split
from mmlrec.session.session import build_session, rows_of_step
from tests.datasets import write_dataset


@pytest.mark.parametrize("most", [1, 7, 128, 200, 8192])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_steps_are_as_few_as_can_be_and_pad_little(most, world_size):
    for num_rows in [1, 2, 5, 127, 128, 129, 1000, 8191, 8192, 8193, 10_000, 65_537]:
        rows = rows_of_step(num_rows, most, world_size)
        steps = -(-num_rows // (most * world_size))  # fewer cannot hold them
        assert 1 <= rows <= most
        assert (steps - 1) * rows * world_size < num_rows <= steps * rows * world_size
        assert rows % 128 == 0 or rows == most
        if most % 128 == 0:
            assert steps * rows - num_rows / world_size < steps * 128 + 1


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
