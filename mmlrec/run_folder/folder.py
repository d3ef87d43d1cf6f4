"""The run folder: everything a run leaves behind, under fixed names."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import uuid
from pathlib import Path
from typing import Any

import torch
import yaml

from mmlrec.config import RunConfig, load_config
from mmlrec.distributed import World, logger
from mmlrec.errors import ConfigError, UserError
from mmlrec.run_folder.lock import unwritable
from mmlrec.schema import DatasetManifest
from mmlrec.yaml_config import StrictModel

#: Keys that may differ between the run that wrote a checkpoint and the one that resumes it.
_MAY_DIFFER = (
    "run_dir",
    "dataset.path",
    "embeddings.sharding",
    "embeddings.table_sharding",
    "training.max_steps",
    "training.epochs",
    "training.eval_batch_size",
    "training.log_every_steps",
    "training.checkpoint_every_steps",
    "training.keep_checkpoints",
)


class RunFolder:
    """Paths and small files of one run. Rank 0 alone writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.plan = path / "plan.json"
        self.metrics = path / "metrics.jsonl"
        self.log = path / "train.log"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.best = path / "checkpoints" / "best"
        self.result = path / "result.json"

    def create(self) -> None:
        """Make the folders and prove that they can be written.

        Raises:
            UserError: they cannot.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.write_text("", encoding="utf-8")
            probe.unlink()
            # What starts that were killed left of files that the holder of the lock alone writes; result.json others may, too.
            for path in (self.config, self.environment, self.plan, self.metrics):
                for leftover in self.path.glob(f"{path.name}.*.tmp"):
                    leftover.unlink()
        except OSError as error:
            raise unwritable(self.path, error) from error

    def write_description(self, config: RunConfig, world: World, plan: list[dict[str, Any]]) -> None:
        """Write the resolved configuration, the environment and the sharding plan."""
        write_atomically(self.config, config.to_yaml())
        write_atomically(self.environment, json.dumps(_environment(world), indent=1))
        write_atomically(self.plan, json.dumps(plan, indent=1))

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
            return dict(json.loads(self.result.read_text(encoding="utf-8")))
        except ValueError as error:
            raise UserError(f"{self.result} is damaged: {error}. Delete it; evaluation writes it again.") from error

    def check_same_run(self, config: RunConfig) -> None:
        """Refuse to resume, or to evaluate, under a configuration that trains something else.

        Raises:
            ConfigError: listing each key that differs, with both values.
        """
        different = [
            f"  {key}: {before!r} in the run folder, {now!r} now"
            for key, (before, now) in differences(self.read_config(), config).items()
        ]
        if different:
            raise ConfigError(
                f"{self.path} holds a run with another configuration:\n" + "\n".join(different) + "\n"
                "Choose another folder with --run-dir, delete this one, or undo the change."
            )

    def check_same_data(self, digest: str, config: RunConfig) -> None:
        """Refuse to go on, or to evaluate, on other data than the run was trained on.

        Args:
            digest: `dataset_digest` of the data of the run.

        Raises:
            ConfigError: the dataset of the configuration has another.
        """
        if digest != dataset_digest(DatasetManifest.load(Path(config.dataset.path))):
            raise ConfigError(
                f"{self.path} holds a run on other data than {config.dataset.path} has now."
                " Choose another folder with --run-dir, or delete this one."
            )

    def keep_metrics_until(self, step: int) -> None:
        """Drop lines of `metrics.jsonl` written after `step`, which a resumed run writes again, and broken ones."""
        if not self.metrics.is_file():
            return
        kept, broken = [], []
        for number, line in enumerate(self.metrics.read_bytes().split(b"\n"), start=1):
            try:
                if line and json.loads(line)["step"] <= step:
                    kept.append(line.decode() + "\n")
            except (ValueError, KeyError, TypeError, RecursionError):
                broken.append(number)
        if broken:
            lines = f"line {broken[0]} is" if len(broken) == 1 else f"lines {', '.join(map(str, broken))} are"
            logger.warning("%s: %s no report, as a power cut may leave it; dropped.", self.metrics, lines)
        write_atomically(self.metrics, "".join(kept))


def dataset_digest(manifest: DatasetManifest) -> str:
    """Identity of a dataset: a hash over the checksums of its parts."""
    parts = [part.sha256 for split in manifest.splits.values() for part in split.parts]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file so that readers see the old or the new content, never a part, whoever else writes it, too."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def differences(before: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> both values, of the keys that differ and make another run; in order of key."""
    old, new = _flat(before), _flat(now)
    return {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(key == k or key.startswith(f"{k}.") for k in _MAY_DIFFER)
    }


def _flat(config: StrictModel) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def visit(value: Any, prefix: str) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                visit(inner, f"{prefix}.{key}" if prefix else key)
        else:
            flat[prefix] = value

    visit(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))), "")
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
