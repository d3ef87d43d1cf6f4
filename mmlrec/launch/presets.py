"""Job presets: the named shapes of a job in `torchx.yaml`. TorchX itself never reads that file. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from mmlrec.errors import ConfigError, did_you_mean
from mmlrec.paths import PRESETS_FILE, shipped_folder
from mmlrec.yaml_config import StrictModel, read_yaml, validate_section

EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class ResourceConfig(StrictModel):
    """What one node gives to the job. Names as in TorchX; memMB in MiB."""

    cpu: int = Field(ge=1)
    gpu: int = Field(default=0, ge=0)
    memMB: int = Field(ge=1)


class Preset(StrictModel):
    """The shape of a job: nodes x processes, and how the scheduler treats it."""

    nodes: int = Field(default=1, ge=1)
    nproc: int = Field(ge=1, description="Processes (ranks) on each node.")
    resource: ResourceConfig
    env: dict[EnvironmentName, str] = {}
    max_retries: int = Field(default=0, ge=0, description="How often the scheduler may start a failed job again.")
    shutdown_timeout: int = Field(default=25, ge=1, description="Seconds between SIGTERM and SIGKILL, for a last checkpoint.")
    rdzv_port: int = Field(default=29500, ge=1024, le=65535, description="Port on the first node, when there are several.")


class PresetsFile(StrictModel):
    """The whole of `torchx.yaml`."""

    presets: dict[str, Preset] = Field(min_length=1)


def load_preset(name: str, *, path: Path | None = None, nodes: int | None = None, nproc: int | None = None) -> Preset:
    """Read one preset.

    Args:
        path: the presets file; when absent, `torchx.yaml` in the current folder, or the shipped one where there is none.
        nodes: number of nodes, instead of the preset's.
        nproc: processes on each node, instead of the preset's.

    Raises:
        ConfigError: no such preset, or a file with an unknown key or a wrong value anywhere in it.
    """
    if path is None:
        here = Path(PRESETS_FILE)
        path = here if here.is_file() else shipped_folder() / PRESETS_FILE
    presets = validate_section(PresetsFile, read_yaml(path), prefix="", source=str(path)).presets
    if name not in presets:
        raise ConfigError(f"{path}: no preset '{name}'.{did_you_mean(name, presets)} Presets: {', '.join(sorted(presets))}.")
    given = {key: value for key, value in (("nodes", nodes), ("nproc", nproc)) if value is not None}
    return validate_section(Preset, presets[name].model_dump() | given, prefix="", source="command line")
