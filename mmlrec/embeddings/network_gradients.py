"""Means over ranks of the network's gradients, added up in the same order in every step of every start."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.model_parallel import DataParallelWrapper
from torchrec.distributed.types import ShardingEnv


class SameBuckets(DataParallelWrapper):
    """What torchrec puts around all but the tables, with buckets that stay what they are."""

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        """See the base class."""
        module = dmp._dmp_wrapped_module
        tables = list(DistributedModelParallel._sharded_parameter_names(module))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, tables)
        dmp._dmp_wrapped_module = _Joined(
            module,
            device_ids=None if device.type == "cpu" else [device],
            process_group=env.process_group,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,
            static_graph=True,
            bucket_cap_mb=25,
        )


class _Joined(DistributedDataParallel):
    """DistributedDataParallel that sets up its buckets once, before the first step.

    By itself it does so after the first step of each start, in the order in which gradients came. Three ranks and more add up
    in a ring, in which the order of the ranks depends on where in a bucket a number lies. So the step after a resume would
    add otherwise than the same step of an unbroken run. torch has no option against it but `find_unused_parameters`, which
    costs a pass over the graph and a collective in each step.

    The buckets are filled from the last parameter to the first, about as gradients come, so that the means of those that are
    full are on their way while the backward goes on.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reducer._push_all_rebuilt_params()
        if not self.reducer._rebuild_buckets():
            raise RuntimeError("this torch does not set up the buckets of DistributedDataParallel before the first step")

    def _build_params_for_reducer(self) -> tuple[list[nn.Parameter], list[bool]]:
        parameters, are_sparse = super()._build_params_for_reducer()
        return parameters[::-1], are_sparse[::-1]
