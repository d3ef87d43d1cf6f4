"""Whether the tables of a configuration have their places on the ranks of a job, at every number of nodes that it may have.

Imports torchrec: it is asked where a configuration says something of ranks.
"""

from __future__ import annotations

from pathlib import Path

from mmlrec.config import EmbeddingsConfig
from mmlrec.embeddings.hardware import GPU, Hardware
from mmlrec.embeddings.plan_file import check_ranks as check_ranks_of_plan
from mmlrec.errors import ConfigError
from mmlrec.launch.presets import Preset
from mmlrec.paths import scheme_of


def check_ranks(preset: Preset, config: EmbeddingsConfig) -> None:
    """Refuse what each start of the job would refuse, or one after a node has come or gone.

    A plan that does not lie here is not looked at: it may lie on a mount of the job, or be made before it begins. Nor is one at
    an address: the keys of the store may be known to the job alone.

    Raises:
        ConfigError: replicas that the ranks cannot be divided into, or a plan of other ranks.
        DataError: the plan cannot be read.
    """
    elastic = preset.least_nodes < preset.most_nodes
    for nodes in range(preset.least_nodes, preset.most_nodes + 1):
        hardware = Hardware(nodes * preset.nproc, preset.nproc, "cuda", 0, GPU)
        try:
            of_replica = hardware.of_replica(config.replicas)
            if config.plan is not None and scheme_of(config.plan) is None and Path(config.plan).exists():
                check_ranks_of_plan(config.plan, of_replica)
        except ConfigError as error:
            number = f"{nodes} of its {preset.nodes} nodes" if elastic else f"its {nodes} node(s)"
            remedy = " Give the job a number of nodes that does not change (--nodes N)." if elastic else ""
            raise ConfigError(f"With {number} of {preset.nproc} process(es) the job would end: {error}{remedy}") from error
