"""Looked-up vectors and their gradients, rounded on their way between ranks (`embeddings.communication`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fbgemm_gpu.quantize_comm import QuantizationContext, QuantizedCommCodec
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import Tensor
from torchrec.distributed.types import CommOp, QuantizedCommCodecs

from mmlrec.errors import ConfigError

_TYPES = {"fp16": SparseType.FP16, "bf16": SparseType.BF16, "fp8": SparseType.FP8}


class Communication:
    """How vectors go between the ranks of a session.

    They are rounded in training steps only, so that a report or a score is the same on any number of ranks.

    Args:
        precision: fp32, fp16, bf16 or fp8.
        batch_size: rows of a global batch.
        dims: widths of the tables.

    Attributes:
        rounding: whether this is a training step; `Recommender` sets it.
        codecs: for torchrec's sharder and planner; None for fp32.
    """

    def __init__(self, precision: str, batch_size: int, dims: Sequence[int]) -> None:
        self.rounding = True
        self.codecs: dict[str, QuantizedCommCodecs] | None = None
        if precision != "fp32":
            # fp8: one factor for so many numbers, of which every table has a multiple.
            row = math.gcd(*dims) if precision == "fp8" else None
            # The gradient of a row is about 1 / B, of which fp16 has few digits or none. A power of two changes no digit.
            scale = 2.0 ** math.floor(math.log2(batch_size)) if precision == "fp16" else 1.0
            kind = _TYPES[precision]
            both = QuantizedCommCodecs(_Codec(self, kind, row, 1.0, True), _Codec(self, kind, row, scale, False))
            # Of tables that lie whole on a rank, and of sums over the ranks that share a table; table_row_wise has both.
            self.codecs = {
                CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL.name: both,
                CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER.name: both,
            }


class _Codec(QuantizedCommCodec):
    """fbgemm's codec with a switch, and with a factor that is taken off in float32.

    fbgemm takes its own `loss_scale` off in float16, where what was too small becomes so again.
    """

    def __init__(self, of: Communication, kind: SparseType, row: int | None, scale: float, is_forward: bool) -> None:
        super().__init__(kind, row_dim=row, is_fwd=is_forward)
        self._of = of
        self._scale = scale

    def encode(self, input_tensor: Tensor, ctx: QuantizationContext | None = None) -> Tensor:
        """What is sent for float32 numbers; those beyond the largest become the largest, NaN stays NaN."""
        if not self._of.rounding:
            return input_tensor
        return super().encode(input_tensor if self._scale == 1.0 else input_tensor * self._scale, ctx)

    def decode(self, input_tensor: Tensor, ctx: QuantizationContext | None = None) -> Tensor:
        """Float32 numbers again."""
        if not self._of.rounding:
            return input_tensor
        found = super().decode(input_tensor, ctx)
        return found if self._scale == 1.0 else found / self._scale

    def calc_quantized_size(self, input_len: int, ctx: QuantizationContext | None = None) -> int:
        """How many elements are sent for so many numbers."""
        return super().calc_quantized_size(input_len, ctx) if self._of.rounding else input_len


def communicable(precision: str, device: str, shardings: Sequence[str]) -> list[str]:
    """Those of some sharding types whose vectors go between ranks in this precision; never in another instead.

    Raises:
        ConfigError: the device does not have it.
    """
    if device == "cpu" and precision in ("bf16", "fp8"):
        # gloo sums no bf16, and torchrec would take fp16 in its place; fbgemm's fp8 gives garbage on a CPU.
        raise ConfigError(
            f"embeddings.communication: '{precision}' needs GPUs; between processes on CPUs vectors go as fp32 or fp16."
        )
    # Sums over ranks in fp8 are done by nobody; torchrec would take fp16 and bf16 in its place.
    return [sharding for sharding in shardings if precision != "fp8" or sharding == "table_wise"]
