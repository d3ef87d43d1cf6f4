import pytest
import torch

from mmlrec.data.branches import branch_names, expand_branches
from mmlrec.data.reader import Reader
from mmlrec.schema import Scenario, Setting, Task
from tests.datasets import write_dataset

TASKS = [Task(name="click"), Task(name="buy")]
PAGES = Scenario(name="page", values=["home", "cart", "list"])


def test_branch_names():
    assert branch_names(Setting.MTL, TASKS, PAGES) == ["click", "buy"]
    assert branch_names(Setting.MSL, TASKS[:1], PAGES) == ["home", "cart", "list"]
    names = ["click:home", "click:cart", "click:list", "buy:home", "buy:cart", "buy:list"]
    assert branch_names(Setting.MTMSL, TASKS, PAGES) == names


@pytest.mark.parametrize("num_multi", [0, 2])
@pytest.mark.parametrize("setting", list(Setting))
@pytest.mark.parametrize("training", [True, False])
def test_bags_are_those_of_the_branch_and_no_other(tmp_path, setting, training, num_multi):
    dataset = write_dataset(tmp_path / "d", rows={"train": 90}, num_multi=num_multi, missing_labels=0.4)
    tasks = TASKS[:1] if setting is Setting.MSL else TASKS
    scenarios = 1 if setting is Setting.MTL else 3
    names = branch_names(setting, tasks, dataset.manifest.scenario)
    reader = Reader(dataset.folder, dataset.manifest, "train", tasks=[t.name for t in tasks], batch_size=40)
    batch = list(reader.sequential())[-1]
    assert 0 < batch.valid.sum() < 40
    expanded = expand_branches(batch, names, scenarios, training=training)
    keys = batch.sparse.keys()
    assert expanded.sparse.keys() == [f"{name}/{key}" for name in names for key in keys]
    assert torch.equal(expanded.labels, batch.labels)
    original = {key: batch.sparse[key].to_dense() for key in keys}
    kept = 0
    for head, name in enumerate(names):
        task, scenario = divmod(head, scenarios)
        for key, bags in original.items():
            copies = expanded.sparse[f"{name}/{key}"].to_dense()
            for row, bag in enumerate(bags):
                own = bool(batch.valid[row])
                own &= scenarios == 1 or int(batch.scenario[row]) == scenario
                own &= not training or bool(batch.mask[row, task])
                assert copies[row].tolist() == (bag.tolist() if own else [])
                kept += own
    assert kept > 0
