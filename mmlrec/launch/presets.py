"""Job presets: the named shapes of a job in `torchx.yaml`. TorchX itself never reads that file. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from mmlrec.errors import ConfigError, did_you_mean
from mmlrec.paths import PRESETS_FILE, shipped_folder
from mmlrec.yaml_config import StrictModel, read_yaml, validate_section

EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Seconds = Annotated[int, Field(ge=1)]
ELASTIC_RESTARTS = 3


class ResourceConfig(StrictModel):
    """What one node gives to the job. Names as in TorchX; memMB in MiB."""

    cpu: int = Field(ge=1)
    gpu: int = Field(default=0, ge=0)
    memMB: int = Field(ge=1)


class MountConfig(StrictModel):
    """A folder that the container sees. Names as in TorchX."""

    type: Literal["bind", "volume", "device"] = Field(description="A folder of the node, a claim on a volume, or a device.")
    src: str = Field(min_length=1, description="Path on the node, or name of the PersistentVolumeClaim.")
    dst: str = Field(pattern="^/", description="Absolute path in the container.")
    readonly: bool = False


class RendezvousConfig(StrictModel):
    """Waits of torchrun's rendezvous in seconds; what is not given is torchrun's own."""

    join_timeout: Seconds | None = Field(default=None, description="Until the least number of nodes has come.")
    last_call_timeout: Seconds | None = Field(default=None, description="For more nodes than the least; elastic jobs only.")
    close_timeout: Seconds | None = None
    heartbeat_timeout: Seconds | None = None
    read_timeout: Seconds | None = Field(default=None, description="For the first node's store to answer.")
    keep_alive_interval: Seconds | None = None
    keep_alive_max_attempt: Annotated[int, Field(ge=1)] | None = Field(default=None, description="A count, not seconds.")


class MetadataConfig(StrictModel):
    """What only one scheduler understands."""

    kubernetes: dict[str, Any] = Field(
        default={}, description="Laid over each pod: mappings merge, lists grow, single values replace."
    )


class SchedulerConfig(StrictModel):
    """Where `python -m apps.launch` sends the job; `torchx run` takes both from its command line and .torchxconfig."""

    name: Literal["local_cwd", "local_docker", "slurm", "kubernetes"]
    options: dict[str, str | int | bool] = Field(default={}, description="As `torchx runopts NAME` lists them.")


class Preset(StrictModel):
    """The shape of a job: nodes x processes, and how the scheduler treats it."""

    nodes: int | str = Field(default=1, description="A number, or 'least:most' for a job that trains on as many as there are.")
    nproc: int = Field(ge=1, description="Processes (ranks) on each node.")
    resource: ResourceConfig
    image: str | None = Field(
        default=None, min_length=1, description="Container image; without one the job runs in the current folder."
    )
    mounts: list[MountConfig] = []
    metadata: MetadataConfig = MetadataConfig()
    env: dict[EnvironmentName, str] = {}
    scheduler: SchedulerConfig | None = None
    max_retries: int = Field(default=0, ge=0, description="How often the scheduler may start a failed job again.")
    max_restarts: int | None = Field(
        default=None,
        ge=0,
        description="How often torchrun may start the ranks again in place; unless told 0, or 3 where nodes may come and go.",
    )
    shutdown_timeout: int = Field(default=25, ge=1, description="Seconds between SIGTERM and SIGKILL, for a last checkpoint.")
    rdzv_port: int | None = Field(
        default=None,
        ge=1024,
        le=65535,
        description="Port on the first node, when there are several; else one of the job's own.",
    )
    rdzv_conf: RendezvousConfig = RendezvousConfig()

    @field_validator("nodes", mode="before")
    @classmethod
    def _read_nodes(cls, given: Any) -> int | str:
        text = str(given)
        found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
        if isinstance(given, bool) or not found or not 1 <= int(found[1]) <= int(found[2] or found[1]):
            raise ValueError(f"must be a number of nodes, or 'least:most' such as '1:4'; found {given!r}")
        return text if found[2] else int(text)

    @property
    def restarts(self) -> int:
        """Starts in place: of a job that trains on as many nodes as there are, some, else none unless told."""
        if self.max_restarts is None:
            return ELASTIC_RESTARTS if self.least_nodes < self.most_nodes else 0
        return self.max_restarts

    @property
    def least_nodes(self) -> int:
        """Number of nodes below which the job does not run."""
        return int(str(self.nodes).partition(":")[0])

    @property
    def most_nodes(self) -> int:
        """Number of nodes that the scheduler is asked for."""
        return int(str(self.nodes).rpartition(":")[2])


class PresetsFile(StrictModel):
    """The whole of `torchx.yaml`."""

    presets: dict[str, Preset] = Field(min_length=1)


def load_preset(
    name: str, *, path: Path | None = None, nodes: int | str | None = None, nproc: int | None = None, image: str | None = None
) -> Preset:
    """Read one preset.

    Args:
        path: the presets file; when absent, `torchx.yaml` in the current folder, or the shipped one where there is none.
        nodes: number of nodes, or 'least:most', instead of the preset's.
        nproc: processes on each node, instead of the preset's.
        image: container image, instead of the preset's.

    Raises:
        ConfigError: no such preset, or a file with an unknown key or a wrong value anywhere in it.
    """
    if path is None:
        here = Path(PRESETS_FILE)
        path = here if here.is_file() else shipped_folder() / PRESETS_FILE
    presets = validate_section(PresetsFile, read_yaml(path), prefix="", source=str(path)).presets
    if name not in presets:
        raise ConfigError(f"{path}: no preset '{name}'.{did_you_mean(name, presets)} Presets: {', '.join(sorted(presets))}.")
    options = {"nodes": nodes, "nproc": nproc, "image": image}
    given = {key: value for key, value in options.items() if value is not None}
    return validate_section(Preset, presets[name].model_dump() | given, prefix="", source="command line")
