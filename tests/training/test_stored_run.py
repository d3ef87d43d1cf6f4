"""A run folder on object storage: trained by two ranks, resumed, refused to a second start, evaluated, predicted from."""

import pytest

from tests.datasets import write_dataset

CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: mmoe, expert_hidden_units: [12, 8], gate_hidden_units: [4], tower_hidden_units: [4]}}
embeddings: {{dim: 4}}
training: {{batch_size: 50, epochs: 4, log_every_steps: 1, checkpoint_every_steps: 5, keep_checkpoints: 2}}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    write_dataset(folder / "data", rows=690, table_rows=30)
    (folder / "config.yaml").write_text(CONFIG.format(dataset=folder / "data"))
    return folder
