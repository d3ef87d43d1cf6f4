"""Running statistics of normalised layers under the trainer."""

import torch

from mmlrec.config import load_config
from mmlrec.distributed.stopping import StopSignal
from mmlrec.distributed.world import process_group
from mmlrec.run_folder.folder import RunFolder
from mmlrec.session.session import build_session
from mmlrec.training.trainer import Trainer
from tests.datasets import write_dataset

EPOCHS = 3
CONFIG = """
dataset: {{path: {dataset}, setting: mtmsl}}
model: {{name: mmoe, use_bn: true, expert_hidden_units: [8], gate_hidden_units: [4], tower_hidden_units: [4]}}
embeddings: {{dim: 4, init_std: 0.1}}
training: {{batch_size: 30, epochs: {epochs}, patience: null}}
"""


def test_statistics_move_in_every_epoch_and_not_in_evaluation(tmp_path, monkeypatch):
    write_dataset(tmp_path / "data", rows={"train": 120, "valid": 60, "test": 30})
    (tmp_path / "config.yaml").write_text(CONFIG.format(dataset=tmp_path / "data", epochs=EPOCHS))
    with process_group() as world:
        session = build_session(load_config(tmp_path / "config.yaml"), world, for_training=True)
        folder = RunFolder(tmp_path / "run")
        folder.create()
        trainer = Trainer(session, folder)

        def statistics():
            return {key: value.clone() for key, value in session.network.named_buffers() if "running" in key}

        seen = [statistics()]
        validate = trainer._validate

        def noted(reporter, stop):
            seen.append(statistics())
            validate(reporter, stop)
            seen.append(statistics())

        monkeypatch.setattr(trainer, "_validate", noted)
        with StopSignal(world) as stop:
            trainer.fit(stop)
    assert len(seen) == 1 + 2 * EPOCHS
    assert {key.split(".")[0] for key in seen[0]} == {"experts", "gates", "towers"}
    for epoch in range(EPOCHS):
        start, end, evaluated = seen[2 * epoch : 2 * epoch + 3]
        for key, value in end.items():
            assert not torch.equal(value, start[key]), (key, epoch)
            assert torch.equal(value, evaluated[key]), (key, epoch)
