"""One batch of samples, as training and evaluation see it."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


@dataclass
class Batch(Pipelineable):
    """B rows of this rank, padded to the same B on every rank and step.

    A padding row has empty bags, zeros elsewhere, `valid` False, weight and mask 0, and row -1.

    Attributes:
        sparse: ids of all fields, int64, feature-major; with weights when features are weighted.
        dense: [B, N] float32.
        labels: [B, T] float32, 0 where missing.
        mask: [B, T] float32, 1 where the label is present.
        scenario: [B] int64 in 0..S-1; 0 without scenarios.
        weight: [B] float32.
        valid: [B] bool, False for padding.
        row: [B] int64, position of the row in its split on disk, -1 for padding.
        group: [B] int64, group of the row for GAUC (the user); 0 when the dataset names none.
    """

    sparse: KeyedJaggedTensor
    dense: Tensor
    labels: Tensor
    mask: Tensor
    scenario: Tensor
    weight: Tensor
    valid: Tensor
    row: Tensor
    group: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """A copy on `device`."""
        self.sparse.length_per_key()  # the copy keeps it; torchrec would ask the device for it, and wait, in every step
        return Batch(**{f.name: getattr(self, f.name).to(device=device, non_blocking=non_blocking) for f in fields(self)})

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the CUDA allocator that `stream` uses these tensors."""
        for f in fields(self):
            getattr(self, f.name).record_stream(stream)

    def pin_memory(self) -> Batch:
        """A copy in page-locked host memory."""
        self.sparse.length_per_key()  # as in `to`, but in the thread of the reader
        return Batch(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})

    @property
    def num_rows(self) -> int:
        """B, padding included."""
        return int(self.valid.shape[0])
