"""TorchRec's train pipelines, which tell `StepParts` where they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipeline, TrainPipelineBase, TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.pipeline_context import TrainPipelineContext
from torchrec.optim.keyed import CombinedOptimizer

from mmlrec.data.batch import Batch
from mmlrec.distributed.step_parts import INPUT, WAITING, StepParts
from mmlrec.session.recommender import Predictions

Pipeline: TypeAlias = TrainPipeline[Batch, Predictions]


class WithTables(TrainPipelineSparseDist[Batch, Predictions]):
    """The pipeline that distributes the ids of the next batches while this one is trained."""

    def __init__(
        self, model: DistributedModelParallel, optimizer: CombinedOptimizer, device: torch.device, parts: StepParts
    ) -> None:
        # Left to itself it would average replicas of the tables after every step, whatever `embeddings.average_every` says.
        super().__init__(model, optimizer, device, dmp_collection_sync_interval_batches=None)
        self._parts = parts

    def start_sparse_data_dist(self, batch: Batch | None, context: TrainPipelineContext) -> None:
        """See the base class."""
        with self._parts.of(INPUT):
            super().start_sparse_data_dist(batch, context)

    def wait_sparse_data_dist(self, context: TrainPipelineContext) -> None:
        """See the base class. On several GPUs this is where the host waits in each step, for what the other ranks send."""
        on_gpus = self._device.type == "cuda" and dist.get_world_size() > 1
        with self._parts.of(WAITING if on_gpus else INPUT):
            super().wait_sparse_data_dist(context)

    def _backward(self, losses: Tensor) -> None:
        with self._parts.backward_of(losses):
            super()._backward(losses)


class WithoutTables(TrainPipelineBase[Batch, Predictions]):
    """The pipeline where nothing is looked up; as the other one it begins anew with the next iterator."""

    def __init__(
        self, model: DistributedModelParallel, optimizer: CombinedOptimizer, device: torch.device, parts: StepParts
    ) -> None:
        super().__init__(model, optimizer, device)
        self._parts = parts

    def _backward(self, losses: Tensor) -> None:
        with self._parts.backward_of(losses):
            super()._backward(losses)

    def progress(self, dataloader_iter: Iterator[Batch]) -> Predictions:
        """One step. Raises StopIteration behind the last batch."""
        try:
            return super().progress(dataloader_iter)
        except StopIteration:
            self.reset()
            raise
