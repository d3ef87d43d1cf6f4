"""`mmlrec.train` and `mmlrec.load_run`: a run folder, and what can be asked of it."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa

from mmlrec.api.dataset import Dataset, prepare
from mmlrec.api.frames import Frame, arrow_table
from mmlrec.api.process import one_process, signals_to_hear
from mmlrec.api.scoring import score_rows
from mmlrec.api.temporary import TemporaryFolder
from mmlrec.config import RunConfig
from mmlrec.distributed.stopping import StopSignal
from mmlrec.encoding.encoder import Encoder
from mmlrec.encoding.folders import encoder_folder
from mmlrec.errors import ConfigError, UserError
from mmlrec.evaluation.evaluation import check_labels, choose_split, evaluate_split
from mmlrec.evaluation.prediction import write_predictions
from mmlrec.export.model import Exported, export_model
from mmlrec.export.network import Format
from mmlrec.export.tables import Precision
from mmlrec.metrics.report import lines_of
from mmlrec.models.base.model import MultiTaskModel
from mmlrec.registry import load
from mmlrec.run_folder.folder import RunFolder
from mmlrec.schema import MANIFEST, DatasetManifest, Setting
from mmlrec.session.session import load_session
from mmlrec.storage.places import Place, place, read
from mmlrec.storage.scratch import ScratchFolder
from mmlrec.training import run as training


class History(NamedTuple):
    """What a run reported while it trained.

    Attributes:
        train: a row each `training.log_every_steps`: step, epoch, `loss.<objective>`, samples_per_second, learning_rate_factor.
        valid: a row for each validation, task and scenario, with the metrics; `all`, `mean` and `weighted mean` stand among
            the scenarios, as in the printed report.
    """

    train: pd.DataFrame
    valid: pd.DataFrame


class Run:
    """A run folder. `load_run` and `train` give one.

    Each call of `evaluate`, `predict` and `network` loads the best checkpoint, which takes a second or more, so score many rows
    at once. For a service export the model (`export`), and score with mmlrec.serving. Calls of several threads wait for each
    other.

    Attributes:
        path: the folder, or the address of one.
        config: the configuration, resolved.
    """

    path: Place
    config: RunConfig

    def __init__(self, path: str | Place, *, _held: tuple[object, ...] = ()) -> None:
        self.path = place(path)
        self._folder = RunFolder(self.path)
        self.config = self._folder.read_config()
        self._held = _held  # temporary folders, which go with this object

    def evaluate(self, data: Frame | Dataset | str | Place | None = None, split: str | None = None) -> pd.DataFrame:
        """Metrics of the best checkpoint, one row for each task and scenario; see docs/metrics.md.

        Args:
            data: raw rows with labels, of a run on a table or a frame; or a dataset that is encoded as the run's
                (`prepare(..., like=run)`), or its folder. None: the run's own.
            split: of the dataset; None: test, or the only one.

        Returns:
            Index (task, scenario) with `all`, `mean` and `weighted mean` among the scenarios; columns rows, auc and so on.

        Raises:
            UserError: the data are encoded otherwise, or gone, or have no labels; the run has no best checkpoint.
        """
        if isinstance(data, pd.DataFrame | pa.Table):
            data = prepare(data, like=self)  # kept until the end of the call
        with one_process(self.config.training.timeout, quiet=True) as world:
            session, _, _, rows = load_session(self._folder, world, [], None if data is None else place(_path(data)))
            manifest, there = (session.manifest, session.encoder) if rows is None else (DatasetManifest.load(rows), rows)
            split = choose_split(manifest, there, split)
            check_labels(session, manifest, there, split)
            report = evaluate_split(session, split, None, rows)
        return _metrics(report).set_index(["task", "scenario"])

    def predict(self, data: Frame | Dataset | str | Place, split: str | None = None) -> pd.DataFrame:
        """Scores of the best checkpoint: probabilities, and of regression tasks values.

        Args:
            data: raw rows, with the columns that the features and the scenario are made of; others are passed over, labels
                are not needed. Or a dataset that is encoded as the run's, or its folder.
            split: of a dataset; None: test, or the only one.

        Returns:
            float32 columns `score.<task>`. Of a DataFrame with its index; of a dataset beside keys, scenario, labels, weight.

        Raises:
            ConfigError: raw rows lack a column; the message names its feature.
            DataError: cells or a scenario that cannot be used, with column and row; a dataset that is encoded otherwise.
        """
        if not isinstance(data, pd.DataFrame | pa.Table):
            rows = place(_path(data))
            with one_process(self.config.training.timeout, quiet=True) as world, ScratchFolder("scores") as scratch:
                session, *_ = load_session(self._folder, world, [], rows, measured=False)
                split = choose_split(DatasetManifest.load(rows), rows, split)
                write_predictions(session, rows, split, scratch.path / "scores.parquet")
                return pd.read_parquet(scratch.path / "scores.parquet")
        # Releases before kept no encoder in the run: the dataset has it.
        kept = self.path if (self._folder.encoder / MANIFEST).is_file() else place(self.config.dataset.path)
        encoder = Encoder.load(encoder_folder(kept))
        with_scenario = self.config.dataset.setting is not Setting.MTL
        needed = {name: " and ".join(column.uses) for name, column in encoder.needed(scenario=with_scenario).items()}
        raw = arrow_table(data, needed)
        with one_process(self.config.training.timeout, quiet=True) as world:
            session, *_ = load_session(self._folder, world, [])
            scores = score_rows(session, encoder, raw)
        index = data.index if isinstance(data, pd.DataFrame) else None
        return pd.DataFrame({name: column.to_numpy(zero_copy_only=False) for name, column in scores.items()}, index=index)

    @property
    def network(self) -> MultiTaskModel:
        """The network of the best checkpoint, a torch module in evaluation mode, without the tables."""
        with one_process(self.config.training.timeout, quiet=True) as world:
            session, *_ = load_session(self._folder, world, [])
        return session.network.eval()

    def history(self) -> History:
        """What the run reported while it trained, from its `metrics.jsonl`.

        Raises:
            UserError: there is no such file.
        """
        file = self.path / self._folder.metrics.name
        if not file.is_file():
            raise UserError(f"{file} is not there: the run has reported nothing yet, or the file was left out of a copy.")
        records = [json.loads(line) for line in read(file).splitlines() if line.strip()]
        train, valid = [], []
        for record in records:
            at = {"step": record["step"], "epoch": record["epoch"]}
            if record["split"] == "train":
                losses = {f"loss.{name}": value for name, value in record["loss"].items()}
                names = ("samples_per_second", "learning_rate_factor")
                train.append(at | losses | {name: record[name] for name in names})
            else:
                told = _metrics(record["report"])
                valid.append(pd.concat([pd.DataFrame(at, index=range(len(told))), told], axis=1))
        return History(pd.DataFrame(train), pd.concat(valid, ignore_index=True) if valid else pd.DataFrame())

    def export(
        self,
        out: str | Path,
        data: Frame | Dataset | str | Place | None = None,
        *,
        tables: Precision = "fp32",
        format: Format = "pt2",
        overwrite: bool = False,
    ) -> Path:
        """Write the best checkpoint as a model folder that scores without torchrec, as `python -m apps.export` does.

        Args:
            out: the folder to make, on a disk of this machine.
            data: rows on which the scores of both are compared, as for `evaluate`; labels are not needed. None: the test rows
                of the run's own dataset.
            tables: "fp32", "fp16" or "int8". format: of the network, "pt2" or "onnx".
            overwrite: replace `out`.

        Returns:
            `out`, for `mmlrec.serving.load`.

        Raises:
            UserError: the run has no usable best checkpoint or no rows to compare on, `out` exists, or the scores differ.
        """
        if isinstance(data, pd.DataFrame | pa.Table):
            data = prepare(data, like=self)  # kept until the end of the call
        with one_process(self.config.training.timeout, quiet=True) as world:
            rows = None if data is None else place(_path(data))
            export_model(Exported(self._folder, Path(out), tables, format, rows, overwrite), world)
        return Path(out)

    def __repr__(self) -> str:
        config = self.config
        tasks = "" if config.dataset.tasks is None else f", tasks {', '.join(config.dataset.tasks)}"
        temporary = " (temporary)" if self._held and self._held[0] is not None else ""
        return f"Run('{self.path}'){temporary}: {config.model['name']}, setting {config.dataset.setting}{tasks}"


def train(
    config: str | Path | Mapping[str, Any],
    *,
    dataset: Dataset | str | Place | None = None,
    run_dir: str | Place | None = None,
    progress: bool = True,
    **overrides: Any,
) -> Run:
    """Train in this process, and evaluate the best checkpoint on test, as `python -m apps.train` does.

    In the main thread an interrupt (of the notebook's kernel, or Ctrl-C) ends the training between two steps, with a
    checkpoint, as `mmlrec.distributed.stopping.Interrupted`; behind the last step as well, when the run is done. A second one
    ends the call at once, as KeyboardInterrupt. Signals are as they were afterwards, and SIGTERM is never taken. In another
    thread no signal is heard. Several processes are for `torchrun -m apps.train`.

    Args:
        config: a YAML file, the name of a shipped configuration such as "mtl/movielens", or the content of one.
        dataset: what `prepare` gave: all its tasks, in the setting that it has. Or a dataset folder: then tasks and setting are
            those of the configuration.
        run_dir: folder or address of the run. A run that was stopped there goes on. None: `run_dir` of the configuration, else
            a temporary folder, deleted with the last object that uses it, or when Python ends.
        progress: False logs warnings only.
        overrides: sections, merged over the configuration key by key: training={"epochs": 3}, model={"name": "ple"}.

    Returns:
        The run.

    Raises:
        ConfigError: the configuration, naming the key.
        UserError: data or folder are unusable, another run writes there, a process group is open, or it was interrupted.
    """
    if isinstance(dataset, Dataset):
        overrides["dataset"] = dataset.section | overrides.get("dataset", {})
    elif dataset is not None:
        overrides["dataset"] = {"path": _path(dataset)} | overrides.get("dataset", {})
    checked = load(config, overrides)
    held = TemporaryFolder("run") if run_dir is None and checked.run_dir is None else None
    there = held.path / "run" if held is not None else place(run_dir if run_dir is not None else str(checked.run_dir))
    with one_process(checked.training.timeout, quiet=not progress) as world:
        source = "config" if isinstance(config, Mapping) else str(config)
        training.train(checked, there, world, source=source, signals=signals_to_hear())
        kept = "" if held is not None else f" mmlrec.load_run('{there}') gives it, and so does the same call."
        StopSignal.end_if_late(world, f"interrupted when the run was trained and measured.{kept}")
    gc.collect()  # its tables, which circles of references hold: the cells of a notebook that follow need their memory
    return Run(there, _held=(held, dataset))


def load_run(path: str | Place) -> Run:
    """A run that is there.

    Args:
        path: its folder, or s3://bucket/name.

    Raises:
        UserError: it is no run folder.
    """
    return Run(path)


def _path(data: Dataset | str | Place) -> str:
    if isinstance(data, Dataset):
        return str(data.path)
    if isinstance(data, str) or hasattr(data, "joinpath"):
        return str(data)
    raise ConfigError(
        f"{type(data).__name__} is neither a dataset, nor the folder of one. Raw rows are a pandas DataFrame or an Arrow table:"
        " pandas.DataFrame(rows)."
    )


def _metrics(report: dict[str, Any]) -> pd.DataFrame:
    """The lines of a report, with whole numbers of rows, which means have none of."""
    frame = pd.DataFrame([{"task": task, "scenario": scenario, **_plain(entry)} for task, scenario, entry in lines_of(report)])
    counts = [name for name in ("rows", "positives", "above_one") if name in frame]
    metrics = [name for name in frame if name not in ("task", "scenario", *counts)]
    return frame.astype(dict.fromkeys(counts, "Int64") | dict.fromkeys(metrics, "float64"))[
        ["task", "scenario", *counts, *metrics]
    ]


def _plain(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of a report without those of its scenarios."""
    return {name: value for name, value in entry.items() if not isinstance(value, dict)}
