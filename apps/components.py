"""The TorchX components: `torchx run -s local_cwd apps/components.py:train --preset local --config FILE`.

Also registered as `mmlrec.train`, `mmlrec.days`, `mmlrec.evaluate`, `mmlrec.predict`, `mmlrec.preprocess` and
`mmlrec.scaling`. TorchX reads a function's signature and docstring for its `--help`, and wants it defined in this very file.
"""

import contextlib
import sys
from collections.abc import Iterator

from torchx import specs

from mmlrec.errors import UserError
from mmlrec.launch.presets import Preset, load_preset
from mmlrec.launch.spec import days_app, evaluate_app, predict_app, preprocess_app, scaling_app, train_app
from mmlrec.terminal import plain


def train(
    *overrides: str,
    config: str,
    preset: str = "local",
    nodes: str = "",
    nproc: int = 0,
    image: str = "",
    run_dir: str | None = None,
    imports: str = "",
) -> specs.AppDef:
    """Train with torchrun in the shape that a preset of torchx.yaml gives.

    Args:
        overrides: key.path=value changes of the config, such as training.max_steps=200
        config: training config, relative to the current folder, or the name of a shipped one
        preset: name of a preset in torchx.yaml
        nodes: number of nodes, or least:most such as 1:4; the preset's unless given
        nproc: processes on each node; 0 takes the preset's
        image: container image; the preset's unless given
        run_dir: folder of the run; one that holds a checkpoint is resumed
        imports: modules with a method or strategy that is not part of mmlrec, separated by commas
    """
    with _told():
        shape = _shape(preset, nodes, nproc, image)
        return train_app(shape, config=config, overrides=list(overrides), run_dir=run_dir, imports=_modules(imports))


def days(
    *overrides: str,
    config: str,
    days: str,
    run_dir: str,
    forget_after: int = 0,
    preset: str = "local",
    nodes: str = "",
    nproc: int = 0,
    image: str = "",
    imports: str = "",
) -> specs.AppDef:
    """Measure each day's model on the next day, then train it on that day, with torchrun.

    Args:
        overrides: key.path=value changes of the config, for each day, such as training.epochs=1
        config: training config, relative to the current folder, or the name of a shipped one
        days: pattern of the days' dataset folders, such as data/day-*
        run_dir: folder for a run folder of each day; one that was begun goes on
        forget_after: days without a value in train after which its rows start afresh; 0: they stay
        preset: name of a preset in torchx.yaml
        nodes: number of nodes, or least:most such as 1:4; the preset's unless given
        nproc: processes on each node; 0 takes the preset's
        image: container image; the preset's unless given
        imports: modules with a method or strategy that is not part of mmlrec, separated by commas
    """
    with _told():
        shape = _shape(preset, nodes, nproc, image)
        return days_app(
            shape,
            config=config,
            days=days,
            run_dir=run_dir,
            overrides=list(overrides),
            forget_after=forget_after or None,
            imports=_modules(imports),
        )


def evaluate(
    *overrides: str,
    run_dir: str,
    split: str = "test",
    preset: str = "local",
    nodes: str = "",
    nproc: int = 0,
    image: str = "",
    imports: str = "",
) -> specs.AppDef:
    """Evaluate the best checkpoint of a run with torchrun; metrics go to its result.json.

    Args:
        overrides: key.path=value changes of the config, such as embeddings.sharding=row_wise
        run_dir: folder of the run
        split: train, valid or test
        preset: name of a preset in torchx.yaml
        nodes: number of nodes; the preset's unless given
        nproc: processes on each node; 0 takes the preset's
        image: container image; the preset's unless given
        imports: modules with a method or strategy that is not part of mmlrec, separated by commas
    """
    with _told():
        shape = _shape(preset, nodes, nproc, image)
        return evaluate_app(shape, run_dir=run_dir, split=split, overrides=list(overrides), imports=_modules(imports))


def predict(
    run_dir: str,
    input: str,
    output: str,
    split: str = "test",
    preset: str = "local",
    nodes: str = "",
    nproc: int = 0,
    image: str = "",
    imports: str = "",
) -> specs.AppDef:
    """Score a dataset with the best checkpoint of a run.

    Args:
        run_dir: folder of the run
        input: dataset folder, encoded with the vocabularies the run was trained on
        output: file to write, .parquet, .csv or .jsonl
        split: train, valid or test
        preset: name of a preset in torchx.yaml
        nodes: number of nodes; the preset's unless given
        nproc: processes on each node; 0 takes the preset's
        image: container image; the preset's unless given
        imports: modules with a method or strategy that is not part of mmlrec, separated by commas
    """
    with _told():
        shape = _shape(preset, nodes, nproc, image)
        return predict_app(shape, run_dir=run_dir, data=input, output=output, split=split, imports=_modules(imports))


def preprocess(
    *options: str,
    dataset: str,
    out: str,
    raw: str | None = None,
    preset: str = "local",
    image: str = "",
    imports: str = "",
) -> specs.AppDef:
    """Raw logs to a dataset folder, on one node.

    Args:
        options: of python -m preprocessing NAME, behind a --, such as -- --rows 1e6
        dataset: name of a dataset, such as movielens-1m
        out: dataset folder to write
        raw: folder with the raw files
        preset: name of a preset in torchx.yaml
        image: container image; the preset's unless given
        imports: modules with a dataset that is not part of mmlrec, separated by commas
    """
    with _told():
        shape = _shape(preset, "", 0, image)
        return preprocess_app(shape, dataset=dataset, raw=raw, out=out, options=list(options), imports=_modules(imports))


def scaling(
    *options: str,
    out: str = "runs/scaling",
    preset: str = "local",
    nodes: str = "",
    nproc: int = 0,
    image: str = "",
) -> specs.AppDef:
    """Measure how training scales to the ranks of a preset; results go to a CSV file of OUT.

    Args:
        options: of python -m benchmarks.scaling, behind a --, such as -- --batch 4096,65536
        out: folder of the results, the same for all jobs of a study
        preset: name of a preset in torchx.yaml
        nodes: number of nodes; the preset's unless given
        nproc: processes on each node; 0 takes the preset's
        image: container image; the preset's unless given
    """
    with _told():
        return scaling_app(_shape(preset, nodes, nproc, image), out=out, options=list(options))


def _shape(preset: str, nodes: str, nproc: int, image: str) -> Preset:
    return load_preset(preset, nodes=nodes or None, nproc=nproc or None, image=image or None)


def _modules(imports: str) -> list[str]:
    return [module for module in imports.split(",") if module]


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """A mistake of the user ends TorchX with one message."""
    try:
        yield
    except UserError as error:
        print(f"error: {plain(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
