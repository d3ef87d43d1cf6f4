"""An interrupt of the process that `mmlrec.train` works in: whenever it comes it is told, and nothing is lost."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

import mmlrec
from mmlrec.distributed.stopping import Interrupted
from mmlrec.training import run as training
from tests import processes

REPOSITORY = Path(__file__).parents[1]
SMALL = {"model": {"name": "mmoe", "num_experts": 2, "expert_hidden_units": [8], "tower_hidden_units": [4]}}
SHORT = {"training": {"epochs": 1, "batch_size": 200, "patience": None}}


@pytest.fixture(scope="module")
def data():
    draw = np.random.default_rng(0)
    frame = pd.DataFrame({name: draw.integers(0, 40, 1500) for name in ("user", "item")})
    for task in ("click", "buy"):
        frame[task] = draw.integers(0, 2, 1500)
    return mmlrec.prepare(frame, features=["user", "item"], tasks=["click", "buy"])


INTERRUPTED = """
import os, signal, sys, threading, time
import mmlrec
data, folder = mmlrec.Dataset(sys.argv[1]), sys.argv[2]
before = signal.getsignal(signal.SIGTERM)
signal.signal(signal.SIGINT, signal.{before})

def interrupt():
    while not os.path.isdir(os.path.join(folder, "checkpoints", "best")):
        time.sleep(0.05)
    assert signal.getsignal(signal.SIGTERM) == before
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
try:
    mmlrec.train({{}}, dataset=data, run_dir=folder, training={{"epochs": 5000, "batch_size": 200, "patience": None}})
except mmlrec.errors.UserError as error:
    print("told:", type(error).__name__)
assert signal.getsignal(signal.SIGINT) == signal.{before}
"""


@pytest.mark.parametrize("before", ["default_int_handler", "SIG_IGN"])
def test_an_interrupt_ends_a_training_with_a_checkpoint_from_which_it_goes_on(data, tmp_path, before):
    """Also in a process that was started with interrupts ignored, as those in the background of a script are."""
    (tmp_path / "script.py").write_text(INTERRUPTED.format(before=before))
    command = [sys.executable, str(tmp_path / "script.py"), str(data.path), str(tmp_path / "run")]
    result = processes.run(command, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert result.stdout == "told: Interrupted\n"
    steps = sorted(int(path.name.removeprefix("step_")) for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config["training"]["epochs"], config["training"]["max_steps"] = 5000, steps[-1] + 3
    run = mmlrec.train(config, run_dir=tmp_path / "run", progress=False)
    assert run.history().train["step"].max() == steps[-1] + 3
    assert run.history().train["step"].is_monotonic_increasing


TWICE = """
import os, signal, sys, threading, time
import mmlrec
from mmlrec.training.trainer import Trainer

data, folder = mmlrec.Dataset(sys.argv[1]), sys.argv[2]
plain = Trainer._save

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

def save(self, *, final=False):
    if final:
        threading.Timer(0.3, interrupt).start()
        time.sleep(60)
    plain(self, final=final)
    interrupt()

Trainer._save = save
try:
    mmlrec.train({}, dataset=data, run_dir=folder, training={"epochs": 5000, "batch_size": 200, "patience": None})
except KeyboardInterrupt:
    print("ended")
assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
Trainer._save = plain
run = mmlrec.train({}, dataset=data, run_dir=folder, training={"epochs": 2, "batch_size": 200, "patience": None})
print("goes on", list(run.history().train["step"]))
"""


def test_a_second_interrupt_ends_the_call_and_not_the_process(data, tmp_path):
    (tmp_path / "script.py").write_text(TWICE)
    command = [sys.executable, str(tmp_path / "script.py"), str(data.path), str(tmp_path / "run")]
    result = processes.run(command, timeout=60, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == "ended"
    assert result.stdout.splitlines()[1].startswith("goes on")


def test_an_interrupt_behind_the_last_step_is_told_and_the_run_is_whole(data, tmp_path, monkeypatch):
    """A loop over runs would go on with the next one, and the user wait for its end."""
    plain, given = training.evaluate_split, {"dataset": data, "run_dir": tmp_path / "run", "progress": False, **SHORT}

    def interrupted(*arguments):
        report = plain(*arguments)
        signal.raise_signal(signal.SIGINT)
        return report

    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate_split", interrupted)
        with pytest.raises(Interrupted, match=r"interrupted when the run was trained and measured\. mmlrec\.load_run"):
            mmlrec.train(SMALL, **given)
    assert mmlrec.load_run(tmp_path / "run").evaluate() is not None
    assert json.loads((tmp_path / "run/result.json").read_text())["test"]
    assert mmlrec.train(SMALL, **given).path == tmp_path / "run"  # told once
