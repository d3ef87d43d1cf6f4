"""From the manifest to embedding tables, and their initial weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor, PoolingType
from torchrec.distributed.types import ShardedTensor
from torchrec.modules.embedding_configs import DataType
from torchrec.optim.keyed import KeyedOptimizer

from mmlrec.config import EmbeddingsConfig
from mmlrec.errors import ConfigError, DataError, did_you_mean
from mmlrec.schema import DatasetManifest, Feature, Table

#: Rows drawn from one random stream. Part of the definition of the initial weights: changing it changes every run.
_BLOCK_ROWS = 16384


#: `embeddings.dtype` -> what torchrec calls it.
_DATA_TYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16}


def check_table_dim(manifest: DatasetManifest, embeddings: EmbeddingsConfig) -> None:
    """Refuse widths of tables that the dataset does not have.

    Raises:
        ConfigError: naming the table, and the nearest one.
    """
    used = list(dict.fromkeys(str(feature.table) for feature in manifest.sparse_features))
    for name in embeddings.table_dim:
        if not used:
            raise ConfigError(
                f"embeddings.table_dim.{name}: the dataset has no tables, all its features are numbers. Leave it out."
            )
        if name not in used:
            raise ConfigError(
                f"embeddings.table_dim.{name}: no such table.{did_you_mean(name, used)} Tables: {', '.join(used)}."
            )


def table_configs(
    manifest: DatasetManifest, embeddings: EmbeddingsConfig, branches: list[str] | None = None
) -> list[EmbeddingBagConfig]:
    """One EmbeddingBagConfig for each table of the manifest, or for each branch and table.

    Args:
        embeddings: tells width and number format.
        branches: names of branches that have tables of their own; tables and features are then named `branch/name`.

    Raises:
        DataError: features that share a table are pooled differently, which one table cannot do.
    """
    configs = []
    for prefix in [""] if branches is None else [f"{branch}/" for branch in branches]:
        for table in manifest.tables:
            features = [f for f in manifest.sparse_features if f.table == table.name]
            if not features:
                continue
            configs.append(
                EmbeddingBagConfig(
                    name=prefix + table.name,
                    embedding_dim=embeddings.width(table.name),
                    num_embeddings=table.num_rows,
                    feature_names=[prefix + f.name for f in features],
                    pooling=_pooling(table, features),
                    data_type=_DATA_TYPES[embeddings.dtype],
                )
            )
    return configs


def _pooling(table: Table, features: list[Feature]) -> PoolingType:
    # A bag of one id is its own mean: SUM spares the kernel the division.
    pooled = {f.pooling for f in features if f.kind == "multi"}
    if len(pooled) > 1:
        raise DataError(
            f"features {[f.name for f in features]} share table '{table.name}' but are pooled differently: {sorted(pooled)}"
        )
    return PoolingType.MEAN if pooled == {"mean"} else PoolingType.SUM


class NoTables(nn.Module):
    """Stands for the tables where all features are numbers: looks nothing up, and there is nothing to shard.

    TorchRec's collection needs a table.
    """

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """None; as a collection names its tables."""
        return []

    def forward(self, sparse: KeyedJaggedTensor) -> KeyedTensor:
        """No keys; values are [B, 0], and take gradients as looked-up vectors do."""
        values = torch.empty(sparse.stride(), 0, device=sparse.lengths().device, requires_grad=self.training)
        return KeyedTensor(keys=[], length_per_key=[], values=values)


def build_tables(configs: list[EmbeddingBagConfig]) -> EmbeddingBagCollection | NoTables:
    """The unsharded collection without storage; `DistributedModelParallel` makes the shards, `initialize` fills them."""
    return EmbeddingBagCollection(tables=configs, device=torch.device("meta")) if configs else NoTables()


def initial_rows(table: str, start: int, stop: int, dim: int, std: float, seed: int) -> Tensor:
    """Initial weights of rows start..stop-1 of a table: N(0, std^2), a function of (seed, table, row) only.

    Each block of rows has its own counter-based stream (Philox), so a shard computes its rows without the others.

    Returns:
        [stop - start, dim] float32 on the CPU.
    """
    digest = hashlib.sha256(f"{seed}/{table}".encode()).digest()
    key = np.frombuffer(digest[:16], dtype=np.uint64)
    rows = np.empty((stop - start, dim), dtype=np.float32)
    for block in range(start // _BLOCK_ROWS, -(-stop // _BLOCK_ROWS)):
        generator = np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, block, 0], dtype=np.uint64)))
        first = block * _BLOCK_ROWS
        low, high = max(start, first), min(stop, first + _BLOCK_ROWS)
        drawn = generator.standard_normal(size=(high - first, dim), dtype=np.float32)
        rows[low - start : high - start] = drawn[low - first :]
    rows *= np.float32(std)
    return torch.from_numpy(rows)


def local_shards(tensor: Tensor | ShardedTensor | DTensor) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """Local pieces of a plain or sharded tensor, each with the offset of its first element in the whole."""
    if isinstance(tensor, ShardedTensor):
        for shard in tensor.local_shards():
            yield shard.tensor, tuple(shard.metadata.shard_offsets)
    elif isinstance(tensor, DTensor):  # of replicas; a rank that has no shard has an offset all the same
        local: Any = tensor.to_local()
        yield from zip(local.local_shards(), map(tuple, local.local_offsets()), strict=False)
    else:
        yield tensor, (0,) * tensor.dim()


@torch.no_grad()
def initialize(tables: nn.Module, *, std: float, seed: int) -> None:
    """Overwrite the local shards of a (sharded) EmbeddingBagCollection with their initial weights.

    The weights depend on seed, table and row alone, so they are equal at every world size and under every plan. In fp16 they
    are those of fp32, rounded to the nearest number.
    """
    for key, weight in tables.state_dict().items():
        name = key.removeprefix("embedding_bags.").removesuffix(".weight")
        for shard, offsets in local_shards(weight):
            # Block by block: a second copy of a whole shard would not fit beside a large one.
            first, end = offsets[0], offsets[0] + shard.shape[0]
            while first < end:
                stop = min(end, (first // _BLOCK_ROWS + 1) * _BLOCK_ROWS)
                rows = initial_rows(name, first, stop, weight.shape[1], std, seed)
                shard[first - offsets[0] : stop - offsets[0]] = rows[:, offsets[1] : offsets[1] + shard.shape[1]]
                first = stop


@torch.no_grad()
def begin_anew(
    tables: nn.Module, optimizer: KeyedOptimizer, rows: Mapping[str, NDArray[np.int64]], *, std: float, seed: int
) -> None:
    """Give some rows their initial weights again, and no optimizer state: those of them that this rank holds.

    Args:
        tables: sharded.
        optimizer: of the tables.
        rows: table -> rows, sorted.
        std, seed: of the initial weights.
    """
    changed = {name: of_table for name, of_table in rows.items() if len(of_table)}
    weights = tables.state_dict() if changed else {}
    states = optimizer.state_dict()["state"] if changed else {}
    for name, of_table in changed.items():
        key = f"embedding_bags.{name}.weight"
        for shard, offsets in local_shards(weights[key]):
            for block in np.split(here := _within(of_table, shard, offsets), _block_ends(here)):
                if len(block):
                    first = int(block[0])
                    drawn = initial_rows(name, first, int(block[-1]) + 1, weights[key].shape[1], std, seed)
                    columns = slice(offsets[1], offsets[1] + shard.shape[1])
                    shard[torch.from_numpy(block - offsets[0])] = drawn[block - first, columns].to(shard)
        of_state = [value for parameter, state in states.items() if parameter.endswith(key) for value in state.values()]
        for value in of_state:
            for piece, offsets in local_shards(value):
                piece[torch.from_numpy(_within(of_table, piece, offsets) - offsets[0])] = 0


def _within(rows: NDArray[np.int64], piece: Tensor, offsets: tuple[int, ...]) -> NDArray[np.int64]:
    """Those of sorted rows that lie in a piece."""
    low, high = np.searchsorted(rows, [offsets[0], offsets[0] + piece.shape[0]])
    return rows[low:high]


def _block_ends(rows: NDArray[np.int64]) -> NDArray[np.intp]:
    """Where sorted rows go on to the next block of initial weights."""
    return np.flatnonzero(np.diff(rows // _BLOCK_ROWS)) + 1


def count_steps(tables: nn.Module, steps: int) -> None:
    """Tell the fused kernels how many training steps there were. Call before steps that follow anything else.

    They count forward passes, those of a validation, too, and have the count in no state dict; Adam corrects its moments by it.

    Args:
        tables: sharded.
    """
    for kernel in kernels(tables):
        kernel.iter_cpu.fill_(steps)
        kernel.iter.fill_(steps)


def forget_cached_rows(tables: nn.Module) -> None:
    """Have rows of tables in the memory of the host fetched anew after each `state_dict`, which writes them back.

    So what is written into its tensors, as by a checkpoint that is loaded, is what is looked up.

    Args:
        tables: sharded.
    """

    def forget(module: nn.Module, *_: Any) -> None:
        for kernel in kernels(module):
            kernel.reset_cache_states()

    tables.register_state_dict_post_hook(forget)


def kernels(tables: nn.Module) -> Iterator[SplitTableBatchedEmbeddingBagsCodegen]:
    """The lookup kernels of this rank, one for each group of its tables.

    Args:
        tables: sharded.
    """
    for lookup in [lookup for module in tables.modules() for lookup in getattr(module, "_lookups", ())]:
        yield from (module for module in lookup.modules() if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen))


@torch.no_grad()
def touch_state(optimizer: KeyedOptimizer) -> None:
    """Write the (zero) optimizer state of the tables once.

    Fresh zeros are not in memory until they are written; steps would meet their page faults row by row, at random.
    """
    for state in optimizer.state_dict()["state"].values():
        for value in state.values():
            for piece, _ in local_shards(value):
                piece.zero_()
