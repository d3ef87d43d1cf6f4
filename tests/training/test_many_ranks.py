"""On three and four ranks, too, a training that is killed and resumed is the unbroken one to the bit.

Three numbers have several sums, two have one: only here does it show that ranks add up in the same order after every start.
"""

import json
import signal
import sys
from pathlib import Path

import pytest

from tests.datasets import write_dataset
from tests.slots.support import write_managed
from tests.training.launch import launch, losses, start_ranks, tensors, validations

pytestmark = pytest.mark.timeout(1800)

SCRIPT = str(Path(__file__).with_name("counted.py"))
BATCH, STEPS = 50, 8  # of an epoch
LAST, KILLED = 14, 7  # in an epoch, in an interval between boundaries of managed tables, and between checkpoints
CONFIG = """
dataset: {{path: {dataset}, setting: {setting}}}
model: {{name: mmoe}}
model_defaults:
  expert_hidden_units: [12, 8]
  bottom_hidden_units: [12, 8]
  dnn_hidden_units: [12, 8]
  aux_hidden_units: [4]
  gate_hidden_units: [4]
  tower_hidden_units: [4]
embeddings: {{dim: 4, init_std: 0.1}}
training: {{batch_size: {batch}, eval_batch_size: 20, epochs: 3, max_steps: {last}, patience: null, log_every_steps: 4,
  checkpoint_every_steps: 5, keep_checkpoints: 20}}
"""
MANAGED = 'embeddings.managed={"admit_after": 2, "evict": "lru", "update_every": 4}'
#: Case -> overrides: sums over ranks in forward, in backward, in the strategy; how tables lie; what goes between ranks.
CASES = {
    "mmoe-bn": ["model.name=mmoe", "model.use_bn=true", "model.dropout=0.2", "dense.clip_norm=1.0"],
    "ple": ["model.name=ple"],
    "star": ["model.name=star", "dense.l2=0.01", "embeddings.l2=0.01"],
    "pepnet-bn": ["model.name=pepnet", "model.use_bn=true"],
    "single_task": ["model.name=single_task"],
    "escm2": ["dataset.setting=mtl", "model.name=escm2"],
    "balanced": ["dataset.setting=msl", "dataset.tasks=[click]", "loss.scenario_reduction=balanced"],
    "bf16": ["model.name=mmoe", "training.precision=bf16"],
    "pcgrad": ["balancing.name=pcgrad", "balancing.scope=both"],
    "pcgrad-local": ["balancing.name=pcgrad", "balancing.gram=local", "balancing.unit=scenario"],
    "gradnorm": ["balancing.name=gradnorm"],
    "uw": ["balancing.name=uw", "balancing.unit=head"],
    "dwa": ["balancing.name=dwa", "balancing.window_steps=3"],
    "row_wise": ["embeddings.sharding=row_wise"],
    "rowwise_adagrad": ["embeddings.sharding=row_wise", "embeddings.optimizer.name=rowwise_adagrad"],
    "fp16": ["embeddings.sharding=row_wise", "embeddings.communication=fp16"],
    # Its gradients take 33 MiB, which is more than one bucket.
    "large": ["model.expert_hidden_units=[2048, 1024]", "dense.optimizer={name: sgd, lr: 0.01}"],
    "managed": [MANAGED],
    "managed-row_wise": [MANAGED, "embeddings.sharding=row_wise", "balancing.name=gradnorm"],
}
#: On two hosts of two.
ON_HOSTS = {
    "table_row_wise": ["embeddings.sharding=table_row_wise"],
    "table_row_wise-fp16": ["embeddings.sharding=table_row_wise", "embeddings.communication=fp16"],
}


def of(name):
    return "managed" if name.startswith("managed") else "plain"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Datasets, plain and with managed tables, and a configuration for each."""
    folder = tmp_path_factory.mktemp("bits")
    rows = {"train": STEPS * BATCH - BATCH // 3, "valid": 90, "test": 90}
    write_dataset(folder / "plain", rows=rows, table_rows=30, missing_labels=0.2, funnel=True)
    write_managed(folder / "managed", steps=STEPS, batch_size=BATCH, slots={"user": 17, "item": 12})
    for name, setting in (("plain", "mtmsl"), ("managed", "mtl")):
        content = CONFIG.format(dataset=folder / name, setting=setting, batch=BATCH, last=LAST)
        (folder / f"{name}.yaml").write_text(content)
    return folder


def killed(root, run_dir, name, overrides, world_size, hosts):
    """A training of which a rank, and with it all others, is killed before step `KILLED`."""
    logs = [run_dir.with_name(f"{run_dir.name}-{rank}.log") for rank in range(world_size)]
    ends = [str(KILLED), str(world_size - 1), str(int(signal.SIGKILL))]
    arguments = [sys.executable, SCRIPT, str(run_dir.with_name(f"{run_dir.name}-rows")), *ends]
    arguments += ["--config", str(root / f"{of(name)}.yaml"), "--run-dir", str(run_dir), *overrides]
    ranks = start_ranks(arguments, logs, hosts)
    try:
        assert ranks[-1].wait(240) == -signal.SIGKILL, logs[-1].read_text()[-3000:]
    finally:
        for rank in ranks:
            rank.kill()
    assert not (run_dir / "result.json").exists()


def differences(whole, resumed):
    """Names of the tensors of the last checkpoint that are not the same in all bits, and whether logs and reports are."""
    expected, found = (tensors(run_dir / f"checkpoints/step_{LAST:09d}") for run_dir in (whole, resumed))
    assert expected.keys() == found.keys()
    assert list(losses(whole)) == [4, 8, 12, LAST]  # that of step 8 is of steps of two starts
    told = [losses(resumed) == losses(whole), validations(resumed) == validations(whole)]
    told.append(json.loads((resumed / "result.json").read_text()) == json.loads((whole / "result.json").read_text()))
    return [key for key, value in expected.items() if not value.equal(found[key])], told


def compare(root, folder, cases, world_size, hosts=1):
    """Case -> `differences`, of unbroken trainings and those that were killed."""

    def train(name, run_dir):
        config = str(root / f"{of(name)}.yaml")
        return {"kind": "train", "name": "all", "config": config, "overrides": cases[name], "run_dir": str(run_dir)}

    for name, overrides in cases.items():
        killed(root, folder / f"{name}-resumed", name, overrides, world_size, hosts)
    # In another order, so that nothing is the same because of what came before in the process.
    actions = [train(name, folder / f"{name}-resumed") for name in cases]
    actions += [train(name, folder / f"{name}-whole") for name in reversed(cases)]
    launch(world_size, actions, folder / "logs", hosts=hosts)
    said = (folder / "logs" / f"rank-{world_size}-0.log").read_text()
    assert said.count("step_000000005 at step 5") == len(cases)
    return {name: differences(folder / f"{name}-whole", folder / f"{name}-resumed") for name in cases}


SAME = ([], [True, True, True])


def test_a_killed_training_of_three_ranks_resumes_to_the_bit(root, tmp_path):
    name = "mmoe-bn"
    assert compare(root, tmp_path, {name: CASES[name]}, 3) == {name: SAME}


@pytest.mark.long
@pytest.mark.parametrize(("cases", "world_size", "hosts"), [(CASES, 3, 1), (CASES, 4, 1), (ON_HOSTS, 4, 2)])
def test_killed_trainings_resume_to_the_bit(root, tmp_path, cases, world_size, hosts):
    found = compare(root, tmp_path, cases, world_size, hosts)
    assert {name: result for name, result in found.items() if result != SAME} == {}
