"""Several ranks train like one: every method in every setting, under both kinds of plan. A new method is picked up by its name.

One launch for each world size runs all cases that are selected. `make test` takes each method once in each setting on two
ranks, `make test-all` the whole matrix, and each method on three and four ranks; `pytest -k "parity and mmoe"` one method's.
"""

import itertools
import shutil
from typing import NamedTuple

import pytest
import torch

from mmlrec.registry import method, method_names
from mmlrec.schema import Setting
from tests.datasets import write_dataset
from tests.models.support import TINY
from tests.training.launch import launch

pytestmark = pytest.mark.timeout(1800)

# The tests of models leave out the terms that need no labels; here they take part, large enough to be seen.
OPTIONS = TINY | {key: 0.1 for key in TINY if key.startswith("l0_")}
PLANS = ("table_wise", "row_wise")
WITH_BN = "mmoe"  # the method that runs with normalisation too in the short selection
STEPS = 10
TOLERANCE = 1e-5  # relative, in float32
SMALL = 0.01  # size below which a tensor's differences are not measured by its own size
# 10 batches, the last of 35 rows. A row group has rows of one scenario, and a rank reads two lanes of row groups: few of its
# batches hold all scenarios, and yet a scenario has enough rows for statistics that do not magnify rounding errors.
BATCH, GROUP = 96, 32
ROWS = 9 * BATCH + 35

CONFIG = """
dataset: {{path: {dataset}}}
model: {{name: mlp}}
model_defaults: {options}
embeddings: {{dim: 4, table_dim: {{t1: 8, tm0: 12}}, init_std: 0.1, optimizer: {{name: sgd, lr: 0.1}}}}
dense: {{optimizer: {{name: sgd, lr: 0.1}}}}
training: {{batch_size: {batch}}}
"""


class Case(NamedTuple):
    method: str
    setting: Setting
    plan: str
    use_bn: bool
    world_size: int = 2

    def __str__(self) -> str:
        return "-".join([self.method, self.setting, self.plan, *["bn"] * self.use_bn, str(self.world_size)])

    @property
    def overrides(self) -> list[str]:
        tasks = "[click]" if self.setting is Setting.MSL else "[click, buy]"
        data = [f"dataset.setting={self.setting}", f"dataset.tasks={tasks}"]
        return [f"model.name={self.method}", f"model.use_bn={self.use_bn}", f"embeddings.sharding={self.plan}", *data]


def cases() -> list:
    """The whole matrix; what is not in the short selection is marked `long`."""
    found = []
    pairs = [(name, setting) for setting in Setting for name in method_names() if setting in method(name).settings]
    for number, (name, setting) in enumerate(pairs):
        for plan, use_bn in itertools.product(PLANS, (False, True)):
            short = plan == PLANS[number % 2] and (not use_bn or name == WITH_BN)
            found.append((Case(name, setting, plan, use_bn), short))
    widest = dict(pairs)  # settings come in the order of their width
    for (name, setting), world_size in itertools.product(widest.items(), (3, 4)):
        found.append((Case(name, setting, PLANS[world_size % 2], False, world_size), False))
    return [pytest.param(case, id=str(case), marks=[] if short else [pytest.mark.long]) for case, short in found]


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """What ranks kept: case -> one dict for each rank."""
    root = tmp_path_factory.mktemp("parity")
    write_dataset(
        root / "data",
        rows=ROWS,
        table_rows=30,
        num_scenarios=4,
        scenario_run=GROUP,
        row_group_size=GROUP,
        rows_per_part=ROWS,
        missing_labels=0.2,
        funnel=True,
    )
    config = root / "config.yaml"
    config.write_text(CONFIG.format(dataset=root / "data", options=OPTIONS, batch=BATCH))
    selected = {item.callspec.params["case"] for item in request.session.items if item.path == request.path}
    for world_size in sorted({1} | {case.world_size for case in selected}):
        alike = [case._replace(world_size=world_size) for case in selected if world_size in (1, case.world_size)]
        actions = [
            {
                "kind": "steps",
                "config": str(config),
                "overrides": case.overrides,
                "steps": STEPS,
                "run_dir": str(root / str(case)),
            }
            for case in sorted(set(alike))
        ]
        launch(world_size, actions, root)
    yield lambda case: [torch.load(root / str(case) / f"{rank}.pt") for rank in range(case.world_size)]
    shutil.rmtree(root)


@pytest.mark.parametrize("case", cases())
def test_ranks_equal_one_process(runs, case):
    (one,), many = runs(case._replace(world_size=1)), runs(case)
    assert len(one["losses"]) == len(many[0]["losses"]) == STEPS
    torch.testing.assert_close(many[0]["losses"], one["losses"], rtol=TOLERANCE, atol=0)
    assert many[0]["weights"].keys() == one["weights"].keys()
    for key, expected in one["weights"].items():
        found = many[0]["weights"][key]
        apart, size = (found - expected).abs().max(), expected.abs().max()
        # Biases start at 0, and in front of a normalisation their gradient is 0 but for rounding: no size of their own.
        assert apart <= TOLERANCE * max(size, SMALL), f"{key}: {apart} of {size}"
    # What makes this hard did happen: in some step one rank had no row of a scenario that the other had, and labels of
    # a task were spread unequally.
    scenarios, labels = (torch.stack([torch.stack(rank[kind]) for rank in many]) for kind in ("scenarios", "labels"))
    assert ((scenarios == 0).any(dim=0) & (scenarios > 0).any(dim=0)).any()
    assert (labels[0] != labels[-1]).any()
