"""The usual pattern of the field in plain PyTorch, as the yardstick for `benchmarks.throughput`.

One `nn.Embedding` per feature with dense gradients, the default unfused Adam, experts in a Python loop, and a TensorDataset in
a DataLoader without workers. Written as its users write it; nothing in it is slowed down on purpose.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mmlrec.paths import local_path
from mmlrec.schema import DatasetManifest, label_column


def mlp(width: int, hidden: list[int]) -> nn.Sequential:
    """Linear and ReLU for each hidden size."""
    layers: list[nn.Module] = []
    for units in hidden:
        layers += [nn.Linear(width, units), nn.ReLU()]
        width = units
    return nn.Sequential(*layers)


class LoopMMoE(nn.Module):
    """MMoE with one embedding per feature and a Python loop over experts, gates and towers."""

    def __init__(self, sizes: list[int], num_dense: int, dim: int, num_tasks: int, num_experts: int = 4) -> None:
        super().__init__()
        embeddings = [nn.Embedding(size, dim) for size in sizes]
        for embedding in embeddings:
            nn.init.normal_(embedding.weight, std=0.01)
        self.embeddings = nn.ModuleList(embeddings)
        width = len(sizes) * dim + num_dense
        self.experts = nn.ModuleList(mlp(width, [256, 128]) for _ in range(num_experts))
        self.gates = nn.ModuleList(
            nn.Sequential(mlp(width, [64]), nn.Linear(64, num_experts, bias=False), nn.Softmax(dim=-1))
            for _ in range(num_tasks)
        )
        self.towers = nn.ModuleList(nn.Sequential(mlp(128, [64]), nn.Linear(64, 1)) for _ in range(num_tasks))

    def forward(self, ids: Tensor, dense: Tensor) -> list[Tensor]:
        """Logits of each task, [B] each, from ids [B, F] and dense [B, N]."""
        looked_up = [embedding(ids[:, i]) for i, embedding in enumerate(self.embeddings)]
        x = torch.cat([*looked_up, dense], dim=1)
        experts = torch.stack([expert(x) for expert in self.experts], dim=1)
        outputs = []
        for gate, tower in zip(self.gates, self.towers, strict=True):
            mixed = torch.sum(gate(x).unsqueeze(-1) * experts, dim=1)
            outputs.append(tower(mixed).squeeze(-1))
        return outputs


def load(folder: Path, manifest: DatasetManifest) -> TensorDataset:
    """The train split in memory."""
    columns = [f.name for f in manifest.sparse_features]
    dense_columns = [f.name for f in manifest.dense_features]
    labels = [label_column(task.name) for task in manifest.tasks]
    table = pq.read_table(
        [folder / part.path for part in manifest.splits["train"].parts], columns=columns + dense_columns + labels
    )

    def matrix(names: list[str], dtype: type) -> Tensor:
        if not names:
            return torch.zeros(table.num_rows, 0)
        return torch.from_numpy(np.stack([table[name].to_numpy().astype(dtype) for name in names], axis=1))

    return TensorDataset(matrix(columns, np.int64), matrix(dense_columns, np.float32), matrix(labels, np.float32))


def main() -> None:
    """Train for some windows of steps; print samples per second of each, and when the first step began, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True, type=local_path)
    parser.add_argument("--dim", required=True, type=int)
    parser.add_argument("--steps", required=True, type=int, help="steps of one window")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--compile", action="store_true", help="by torch.compile")
    arguments = parser.parse_args()
    manifest = DatasetManifest.load(arguments.dataset)
    sizes = [manifest.table(str(f.table)).num_rows for f in manifest.sparse_features]
    torch.manual_seed(0)
    model: nn.Module = LoopMMoE(sizes, len(manifest.dense_features), arguments.dim, len(manifest.tasks))
    if arguments.compile:
        model.compile()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    criterion = nn.BCEWithLogitsLoss()
    loader = DataLoader(load(arguments.dataset, manifest), batch_size=arguments.batch_size, shuffle=True, drop_last=True)
    speeds: list[float] = []
    first_step = time.time()
    step, start = 0, time.perf_counter()
    while len(speeds) < arguments.windows:
        for ids, dense, labels in loader:
            outputs = model(ids, dense)
            loss = torch.stack([criterion(output, labels[:, t]) for t, output in enumerate(outputs)]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % arguments.steps == 0:
                now = time.perf_counter()
                speeds.append(arguments.steps * arguments.batch_size / (now - start))
                start = now
                if len(speeds) == arguments.windows:
                    break
    print(json.dumps({"samples_per_second": speeds, "first_step": first_step}))


if __name__ == "__main__":
    main()
