"""The run folder: everything a run leaves behind, under fixed names."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import uuid
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch

from mmlrec.config import RunConfig, load_config
from mmlrec.distributed.world import World, logger
from mmlrec.errors import ConfigError, UserError
from mmlrec.identity import DATA_FORM, data_differences, data_facts, encoding_differences, parts_digest, rows_alone_differ
from mmlrec.run_folder.lease import LEASE
from mmlrec.run_folder.lock import LOCK, unwritable
from mmlrec.run_folder.one_writer import Holder
from mmlrec.run_folder.reports import Reports, log_name
from mmlrec.schema import MANIFEST, DatasetManifest, Encoding
from mmlrec.storage.places import Place, names_in, read
from mmlrec.yaml_config import StrictModel

#: Keys that may differ between the run that wrote a checkpoint and the one that resumes it.
_MAY_DIFFER = (
    "run_dir",
    "dataset.path",
    "embeddings.sharding",
    "embeddings.table_sharding",
    "embeddings.plan",
    "embeddings.host_cache",
    "training.max_steps",
    "training.epochs",
    "training.eval_batch_size",
    "training.log_every_steps",
    "training.checkpoint_every_steps",
    "training.checkpoint_every_minutes",
    "training.checkpoint_async",
    "training.keep_checkpoints",
    "training.keep_every_steps",
    "training.max_failed_checkpoints",
    "training.timeout",
)

#: Keys that may differ, too, when a run goes back to an earlier checkpoint: what a run that diverged is mended with.
REMEDIES = (
    "dense.optimizer.lr",
    "dense.optimizer.eps",
    "dense.clip_norm",
    "embeddings.optimizer.lr",
    "embeddings.optimizer.eps",
    "schedule",
)


#: Keys that may differ, too, in an evaluation, whose result is then shown and not kept.
MEASURED_OTHERWISE = ("training.precision",)

#: What says that a start was here.
_HELD = frozenset((LOCK, LEASE))
#: What a start makes before there is a `config.yaml`, where it may be killed.
_BEGUN = ("checkpoints", ".writable", "encoder", "init_from.json", "config.yaml", log_name(0))
#: What a run replaces, deletes or adds to; and what a dataset is known by. Not `logs`: launchers write there, too.
_OWN = (
    *_BEGUN,
    "environment.json",
    "plan.json",
    "dataset.json",
    "metrics.jsonl",
    "result.json",
    "profile",
    "tensorboard",
    MANIFEST,
)


class RunFolder:
    """Paths and small files of one run. Rank 0 alone writes.

    Args:
        holder: of the folder, in this process; None where it only reads.
        reports: where this process writes files that are appended to, if not into the folder.
    """

    def __init__(self, path: Place, holder: Holder | None = None, reports: Reports | None = None) -> None:
        self.path = path
        self._holder = holder
        self.reports = reports
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.plan = path / "plan.json"
        self.dataset = path / "dataset.json"
        self.encoder = path / "encoder"
        self.init_from = path / "init_from.json"
        #: Paths of this machine, also where the run folder is none.
        written = path if isinstance(path, Path) else Path() if reports is None else reports.written
        self.metrics = written / "metrics.jsonl"
        self.log = written / log_name(0)
        self.logs = written / "logs"
        self._written = written
        self.profile = written / "profile"
        self.tensorboard = written / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.best = path / "checkpoints" / "best"
        self.result = path / "result.json"

    def log_of(self, rank: int) -> Path:
        """Where a rank logs."""
        return self._written / log_name(rank)

    def check_place(self) -> None:
        """Refuse a folder without a run where things lie that a run would replace, delete or add to, and a dataset.

        Raises:
            UserError: such things are of neither a run nor a start that was killed; or the folder cannot be read.
        """
        names = names_of(self.path)
        if self.config.name not in names or not names & {*_HELD, self.checkpoints.name, self.environment.name}:
            check_no_others(self.path, names, _OWN, _BEGUN)

    def create(self) -> None:
        """Make the folders and prove that they can be written.

        Raises:
            UserError: they cannot, or a file that is appended to is a link.
        """
        if not isinstance(self.path, Path):
            return  # its lease has been written there
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.write_text("", encoding="utf-8")
            probe.unlink()
            # What starts that were killed left of files that the holder of the lock alone writes; result.json others may, too.
            for path in (
                self.log,
                self.metrics,
                *self.logs.glob("*"),
            ):  # which are appended to: a folder from elsewhere could name any file
                if path.is_symlink() and path.is_file():
                    raise UserError(f"{path} is a link to another file, {path.resolve()}. Delete the link.")
            for file in (self.config, self.environment, self.plan, self.dataset, self.init_from, self.metrics):
                delete_leftovers(file)
        except OSError as error:
            raise unwritable(self.path, error) from error

    def check_held(self, world: World) -> None:
        """Before checkpoints are written or deleted: does the run still hold this folder? All ranks call it.

        Raises:
            UserError: it was moved, deleted or replaced, or its lease was taken over; another run may write there by now.
        """
        world.raise_together(self.lost())

    def lost(self) -> UserError | None:
        """What to say where the run does not hold this folder any more; None where it does."""
        return None if self._holder is None else self._holder.lost()

    def put_reports(self) -> None:
        """On rank 0, before a checkpoint is whole: what was reported up to it is there, too, as far as that can be done."""
        if self.reports is not None:
            self.reports.put()

    def write_description(self, config: RunConfig, world: World, plan: list[dict[str, Any]], manifest: DatasetManifest) -> None:
        """Write the resolved configuration, the environment, the sharding plan, and which data the run is trained on."""
        write_atomically(self.config, config.to_yaml())
        write_atomically(self.environment, json.dumps(_environment(world), indent=1))
        write_atomically(self.plan, json.dumps(plan, indent=1))
        write_atomically(self.dataset, json.dumps({"name": manifest.name} | data_state(manifest), indent=1))

    def read_config(self, overrides: list[str] | None = None) -> RunConfig:
        """The configuration the run was started with.

        Raises:
            UserError: this is no run folder.
        """
        if not self.config.is_file():
            raise UserError(
                f"{self.path} is not a run folder: it has no config.yaml. Train first: python -m apps.train --config FILE"
            )
        return load_config(self.config, overrides)

    def read_result(self) -> dict[str, Any]:
        """What `result.json` holds; nothing without it.

        Raises:
            UserError: it is damaged.
        """
        if not self.result.is_file():
            return {}
        try:
            return dict(json.loads(read(self.result)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.result} is damaged: {error}. Delete it; evaluation writes it again.") from error

    def check_same_run(self, config: RunConfig, also: tuple[str, ...] = (), *, remedy: str | None = None) -> None:
        """Refuse to resume, or to evaluate, under a configuration that trains something else.

        Args:
            also: keys that may differ besides those of any resume.
            remedy: what to do; that of a resume when absent.

        Raises:
            ConfigError: listing each key that differs, with both values.
        """
        different = differences(self.read_config(), config, also)
        if not different:
            return
        if remedy is None:
            remedy = "Undo the change, or train it as a run of its own: choose another folder with --run-dir."
            if all(key in REMEDIES or key.startswith("schedule.") for key in different):
                remedy += " These keys may also change where a run goes back to one of its checkpoints:"
                remedy += f" --run-dir {self.path} --from-step N."
        listed = "".join(f"  {key}: {before!r} in the run folder, {now!r} now\n" for key, (before, now) in different.items())
        raise ConfigError(f"{self.path} holds a run with another configuration:\n{listed}{remedy}")

    def check_same_data(self, state: dict[str, Any], there: Place, *, other_rows: bool = False) -> bool:
        """Refuse to go on, or to evaluate, on data that differ from those of the run, or that are encoded otherwise.

        Args:
            state: of a checkpoint; what it holds of `data_state` is compared.
            there: the dataset.
            other_rows: other rows are let pass where it is known that they are encoded alike, labels included; also with
                vocabularies that begin with those of the run.

        Returns:
            Whether these are the rows of the run.

        Raises:
            ConfigError: listing what differs, with both values where they are short.
            DataError: the dataset or its manifest is damaged.
        """
        manifest = DatasetManifest.load(there)
        recorded = state.get("data")
        if isinstance(recorded, dict) and recorded.get("form") == DATA_FORM:
            different = data_differences(recorded, data_facts(manifest))
        else:
            logger.info("%s was written by another release: only checksums of the data can be compared, no lanes", self.path)
            different = [] if state["dataset"] == parts_digest(manifest) else ["  parts: others than those of the run"]
            recorded = {}
        before = Encoding.read(state.get("encoding"), str(self.path))
        comparable = before is not None and before.comparable(manifest.encoding)
        encoded: list[str] = []
        if before is not None and comparable:
            # Where rows are the same to the bit, so are labels, whatever their rule.
            labels = bool(different)
            encoded = encoding_differences(before, manifest, there, scenario=True, labels=labels, extended=other_rows)
        if not different and not encoded:
            return True
        if other_rows and comparable and not encoded and rows_alone_differ(recorded, data_facts(manifest)):
            return False
        remedy = "Bring the data back, or train on them as a run of its own: choose another folder with --run-dir."
        if other_rows and encoded:
            remedy = (
                "A model is measured on data that are encoded as those it was trained on, by their ranges and vocabularies."
            )
        elif other_rows:
            remedy = (
                "Whether both are encoded alike is not on record, so no metrics are made of them. Scores, with what can be"
                f" compared: python -m apps.predict --run-dir {shlex.quote(str(self.path))} --input"
                f" {shlex.quote(str(there))} --output scores.parquet"
            )
        raise ConfigError(
            f"{self.path} holds a run on other data than {there} has now:\n" + "\n".join(different + encoded) + f"\n{remedy}"
        )

    def keep_metrics_until(self, step: int, *, validated: bool = True) -> None:
        """Drop lines of `metrics.jsonl` written after `step`, which a resumed run writes again, and broken ones.

        Args:
            validated: False drops the validation of `step`, too.
        """
        if not self.metrics.is_file():
            return
        kept, broken = [], []
        last = {"train": step, "valid": step if validated else step - 1}
        for number, line in enumerate(self.metrics.read_bytes().split(b"\n"), start=1):
            try:
                if line and (record := json.loads(line))["step"] <= last[record["split"]]:
                    kept.append(line.decode() + "\n")
            except (ValueError, KeyError, TypeError, RecursionError):
                broken.append(number)
        if broken:
            lines = f"line {broken[0]} is" if len(broken) == 1 else f"lines {', '.join(map(str, broken))} are"
            logger.warning("%s: %s no report, as a power cut may leave it; dropped.", self.path / self.metrics.name, lines)
        write_atomically(self.metrics, "".join(kept))


def data_state(manifest: DatasetManifest) -> dict[str, Any]:
    """What a run keeps of the data it is trained on, for its folder and for the state of its checkpoints.

    Returns:
        `data`: facts on the rows and their order. `encoding`: identity of the encoding; None where the dataset records none.
        `dataset`: what releases before these two compare.
    """
    encoding = manifest.encoding.model_dump(mode="json") if manifest.encoding else None
    return {"dataset": parts_digest(manifest), "data": data_facts(manifest), "encoding": encoding}


def write_atomically(path: Place, content: str | bytes) -> None:
    """Write a small file so that readers see the old or the new content, never a part, whoever else writes it, too."""
    data = content.encode() if isinstance(content, str) else content
    if not isinstance(path, Path):
        path.write_bytes(data)  # as every put
        return
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def names_of(folder: Place) -> set[str]:
    """Names of what lies in a folder that is to be written in; none where there is no folder.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return names_in(folder)
    except OSError as error:
        raise unwritable(folder, error) from error


def check_no_others(folder: Place, names: AbstractSet[str], own: Iterable[str], begun: Iterable[str]) -> None:
    """Refuse a folder to write in where other things have the names of what is to be written.

    Args:
        names: of what lies in it.
        own: names of what is to be written, which may also be about to get them.
        begun: those of them that it may hold where a start was here.

    Raises:
        UserError: it holds one of them.
    """
    taken = set(own) - (set(begun) if names & _HELD else set())
    for name in sorted(names):
        if name in taken or (name.endswith(".tmp") and name.startswith(tuple(f"{of_own}." for of_own in taken))):
            raise UserError(
                f"{folder} is not empty: it holds '{name}', which is of no run, and has the name of a file that a run replaces,"
                " deletes or adds to, or of a dataset's. Choose another folder with --run-dir, or move it away."
            )


def delete_leftovers(path: Place) -> None:
    """Delete what `write_atomically` left of this file where its process was killed. Nobody else may be writing it.

    Raises:
        OSError: it stays.
    """
    if isinstance(path, Path):
        for leftover in path.parent.glob(f"{path.name}.*.tmp"):
            leftover.unlink()


def differences(before: RunConfig, now: RunConfig, also: tuple[str, ...] = ()) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> both values, of the keys that differ and make another run; in order of key.

    Args:
        also: keys that may differ beside the usual ones.
    """
    old, new = _flat(before), _flat(now)
    return {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(key == k or key.startswith(f"{k}.") for k in (*_MAY_DIFFER, *also))
    }


def _flat(config: StrictModel) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def visit(value: Any, prefix: str) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                visit(inner, f"{prefix}.{key}" if prefix else key)
        else:
            flat[prefix] = value

    visit(config.model_dump(mode="json"), "")
    return flat


def _environment(world: World) -> dict[str, Any]:
    versions = {}
    for package in ("mmlrec", "torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "numpy", "pyarrow"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "versions": versions,
        "git_commit": _git_commit(),
        "world_size": world.world_size,
        "device": world.device.type,
        "device_name": torch.cuda.get_device_name() if world.device.type == "cuda" else platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),  # which library multiplies matrices, hence the last bits
        "threads_per_rank": torch.get_num_threads(),
        "torchx_job_id": os.environ.get("TORCHX_JOB_ID"),
    }


def _git_commit() -> str | None:
    """The commit of the code that runs; None where it is no checkout, or where there is no git, as in slim containers."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        return None
