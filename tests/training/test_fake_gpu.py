"""No method and no strategy on losses mixes devices, or waits for the device in a step: shown without a GPU (fake_gpu.py)."""

import json
import sys

from mmlrec.balancing.gradients import GradientBalancing
from mmlrec.registry import method, method_names, strategy, strategy_names
from mmlrec.schema import Setting
from tests import processes
from tests.datasets import write_dataset
from tests.models.support import TINY

CONFIG = """
dataset: {{path: {dataset}, setting: mtmsl, tasks: [click, buy]}}
model: {{name: mmoe}}
model_defaults: {options}
embeddings: {{dim: 8, l2: 1.0e-3}}
dense: {{l2: 1.0e-3}}
training: {{batch_size: 64}}
"""
TASKS = {Setting.MSL: "[click]"}
#: Each method in each of its settings, the widest last.
METHODS = {
    name: [
        [f"model.name={name}", f"dataset.setting={setting}", f"dataset.tasks={TASKS.get(setting, '[click, buy]')}"]
        for setting in Setting
        if setting in method(name).settings
    ]
    for name in method_names()
}
#: Those on gradients solve their problem on the host.
STRATEGIES = [[f"balancing.name={name}"] for name in strategy_names() if not issubclass(strategy(name), GradientBalancing)]


def found(folder, cases):
    write_dataset(folder / "data", rows=200, funnel=True)
    (folder / "config.yaml").write_text(CONFIG.format(dataset=folder / "data", options=json.dumps(TINY)))
    done = processes.run([sys.executable, "-m", "tests.training.fake_gpu", str(folder), json.dumps(cases)])
    assert done.returncode == 0, done.stderr
    return dict(zip(map(" ".join, cases), json.loads(done.stdout.splitlines()[-1]), strict=True))


def test_methods_leave_the_device_alone(tmp_path):
    """In each setting, and in bf16 in the widest."""
    cases = [case for settings in METHODS.values() for case in settings]
    cases += [[*settings[-1], "training.precision=bf16"] for settings in METHODS.values()]
    complaints = found(tmp_path, cases)
    assert {case: complaint for case, complaint in complaints.items() if complaint} == {}


def test_strategies_leave_the_device_alone(tmp_path):
    complaints = found(tmp_path, STRATEGIES)
    assert {case: complaint for case, complaint in complaints.items() if complaint} == {}
