"""What tests of several folders share as fixtures."""

import gc
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# While tests are imported nothing is garbage, and looking for some would take a fifth of the time.
gc.disable()

pytest_plugins = ("tests.storage",)

#: The files that take longest, longest first: they begin first, so that none is left for one worker alone. By argument this
#: cannot be had: pytest leaves out a folder that lies in another one it is given.
LONGEST = (
    "test_every_dataset.py",
    "test_world_sizes.py",
    "test_balancing.py",
    "test_method_parity.py",
    "test_resume.py",
    "test_launched_training.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Tests are of the CPU, several ranks on one machine too, unless only those of a GPU are asked for."""
    if not asks_for_gpu(config.option.markexpr, config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # As a batch: a thread that wakes takes no core from one at work. Where ranks and gloo's threads outnumber the cores, tests
    # of several ranks then take a quarter less time (25 s against 34, in turn, on two cores).
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def asks_for_gpu(marks: str, arguments: list[str]) -> bool:
    """Whether only tests of a GPU were asked for, by mark or by files `test_gpu*.py`."""
    files = [Path(argument.split("::")[0]).name for argument in arguments]
    return marks == "gpu" or (bool(files) and all(name.startswith("test_gpu") for name in files))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


def pytest_collection_finish() -> None:
    """Collect garbage from here on, and leave what was imported out of it."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def run_app(monkeypatch, capfd) -> Callable[..., tuple[int, str]]:
    """Runs an entry point in this process, `run_app(name, *arguments)`; returns exit code and standard error."""
    from apps.cli import run  # not above: pytest-xdist loads this file in its controller, too, which needs none of it

    def call(name: str, *arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            run(importlib.import_module(f"apps.{name}").main)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, capfd.readouterr().err

    return call
