"""Tables, network and loss joined in one module, in the form that TorchRec's pipelines expect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, KeyedTensor

from mmlrec.balancing.base import Balancing
from mmlrec.config import RunConfig
from mmlrec.data.batch import Batch
from mmlrec.distributed.step_parts import LOOKUP, LOSS, NETWORK, StepParts
from mmlrec.embeddings.communication import Communication
from mmlrec.embeddings.tables import NoTables
from mmlrec.layers.decay import decay_targets
from mmlrec.losses import Loss
from mmlrec.models.base.model import MultiTaskModel
from mmlrec.schema import Setting

#: Where the tables are inside `Recommender`; sharding plans and checkpoints name them by it.
TABLES = "tables"


class Predictions(NamedTuple):
    """What a forward pass hands to logging and evaluation, detached.

    Attributes:
        logits: [B, T] float32, own scenario; of a regression task the value, in the unit of its labels.
        objectives: this rank's share of each objective of the loss; the mean over ranks is the loss of the global batch.
    """

    logits: Tensor
    objectives: Tensor


class Head(nn.Module):
    """Everything behind the lookup: concatenation, network, masked losses with global denominators, one scalar.

    Args:
        balancing: joins the objectives of a training step.
        prefixes: prefix of the features of each branch that has its own tables; [""] when tables are shared.
        scales: regression task -> mean and deviation of its labels in train: the network's output z stands for
            mean + deviation * z, and the loss compares z with the standardised label. Tasks without one keep their unit.
        parts: where the time of this rank goes.
    """

    loss_weights: Tensor
    label_mean: Tensor | None
    label_deviation: Tensor | None

    def __init__(
        self,
        network: MultiTaskModel,
        loss: Loss,
        balancing: Balancing,
        config: RunConfig,
        prefixes: list[str],
        scales: Mapping[str, tuple[float, float]],
        parts: StepParts,
    ) -> None:
        super().__init__()
        self.parts = parts
        self.network = network
        self.loss = loss
        self.balancing = balancing
        self.keys = [[prefix + name for name in network.spec.fields] for prefix in prefixes]
        self.stacked = network.tables_per_branch
        self.multi_scenario = config.dataset.setting is not Setting.MTL
        self.l2_tables = config.embeddings.l2
        self.l2_dense = config.dense.l2
        self.decays = decay_targets(network)
        self.bf16 = config.training.precision == "bf16"
        self.seed = config.training.seed
        #: Training steps taken; the trainer sets it at a resume.
        self.step = 0
        weights = [balancing.config.loss_weights.get(name, 1.0) for name in loss.objectives]
        self.register_buffer("loss_weights", torch.tensor(weights), persistent=False)
        of_tasks = torch.tensor([scales.get(task.name, (0.0, 1.0)) for task in network.spec.tasks])
        self.register_buffer("label_mean", of_tasks[:, 0].clone() if scales else None, persistent=False)
        self.register_buffer("label_deviation", of_tasks[:, 1].clone() if scales else None, persistent=False)

    def forward(self, pooled: KeyedTensor, batch: Batch) -> tuple[Tensor, Predictions]:
        """Compute the training loss and the predictions of one batch.

        Returns:
            The scalar to differentiate, and `Predictions`.
        """
        with self.parts.of(NETWORK):
            x, fields = self.inputs(pooled, batch.dense)
            scenario = batch.scenario if self.multi_scenario else torch.zeros_like(batch.scenario)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
                output = self.network(x, fields, scenario, valid=batch.valid, noise=self.noise(x.device))
        with self.parts.of(LOSS):
            labels, logits = batch.labels, output.logits.detach()
            if self.label_mean is not None and self.label_deviation is not None:
                labels = (labels - self.label_mean) / self.label_deviation
                logits = logits.float() * self.label_deviation + self.label_mean
            local = self.loss.denominators(labels, batch.mask, scenario, batch.weight)
            sums = torch.cat([local.flatten(), batch.valid.sum(dtype=local.dtype).view(1)])
            world_size = dist.get_world_size()
            if world_size > 1:
                dist.all_reduce(sums)
            denominators = sums[:-1].view_as(local)
            losses = self.loss(output, labels, batch.mask, scenario, batch.weight, denominators, world_size)
            objectives = torch.stack([losses.pop(name) for name in self.loss.objectives])
            weighted = objectives * self.loss_weights
            if self.training:
                total = self.balancing(weighted, x, dict(self.network.named_parameters()), self.step)
            else:
                total = torch.sum(weighted)
            for method_term in losses.values():
                total = total + method_term
            if self.l2_tables and fields:
                looked_up = torch.stack([field.float().square().sum() for field in fields.values()]).sum()
                total = total + self.l2_tables * world_size / sums[-1].clamp(min=1) * looked_up
            if self.l2_dense:
                named = dict(self.network.named_parameters())
                away = [(named[name] - target).square().sum() for name, target in self.decays.items()]
                total = total + self.l2_dense * torch.stack(away).sum()
            return total, Predictions(logits, objectives.detach())

    def diagnostics(self) -> dict[str, float]:
        """What strategy and network say about the newest training step, by key, for the log."""
        return self.balancing.report(self.loss.objectives) | {
            f"network/{name}": value for name, value in self.network.diagnostics().items()
        }

    def noise(self, device: torch.device) -> Tensor | None:
        """The random numbers of this training step's gates: a function of seed and step, so equal on all ranks."""
        if not self.training:
            return None
        self.step += 1
        if not self.network.num_noise:
            return None
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        return torch.rand(self.network.num_noise, generator=generator).to(device, non_blocking=True)

    def inputs(self, pooled: KeyedTensor, dense: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Model input x, [B, d_in] or [B, U, d_in] with tables for each branch, and the fields as views of it.

        Columns are taken by key: the order in which sharded tables come back depends on the plan.
        """
        tail = [dense] if dense.shape[1] else []
        if len(self.keys) == 1 and pooled.keys() == self.keys[0]:
            # The order is ours already: many narrow copies less, forward and backward.
            branches = [torch.cat([pooled.values(), *tail], dim=1) if tail else pooled.values()]
        else:
            by_key = pooled.to_dict()
            branches = [torch.cat([by_key[key] for key in keys] + tail, dim=1) for keys in self.keys]
        x = torch.stack(branches, dim=1) if self.stacked else branches[0]
        spec = self.network.spec
        views = x.split([*spec.fields.values(), spec.num_dense], dim=-1)
        return x, dict(zip(spec.fields, views, strict=False))


class Recommender(nn.Module):
    """Lookup, then `Head`."""

    def __init__(self, tables: EmbeddingBagCollection | NoTables, head: Head, communication: Communication) -> None:
        super().__init__()
        self.tables = tables
        self.head = head
        self.communication = communication

    def forward(self, batch: Batch) -> tuple[Tensor, Predictions]:
        """Training loss (a scalar) and predictions of one batch."""
        self.communication.rounding = self.training
        with self.head.parts.of(LOOKUP):
            pooled = self.tables(batch.sparse)
        return self.head(pooled, batch)
