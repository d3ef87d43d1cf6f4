"""Small exported models, made without a run: a network that can be computed by hand, and tables of known rows."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn


class Toy(nn.Module):
    """Scores sigmoid(x w_t + scenario), t = 1, 2; with tables for each branch, of branch t."""

    def __init__(self, weight: np.ndarray) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(weight))

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        logits = x @ self.weight if x.dim() == 2 else torch.einsum("btd,dt->bt", x, self.weight)
        return torch.sigmoid(logits + scenario.float()[:, None])


def tables(dtype: str, rows: dict[str, int], dim: int, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """Contents of table files of some dtype."""
    draw, found = np.random.default_rng(seed), {}
    for name, num_rows in rows.items():
        if dtype == "int8":
            weight = draw.integers(0, 256, (num_rows, dim)).astype(np.uint8)
            scale, offset = draw.uniform(0.001, 0.01, num_rows), draw.normal(size=num_rows)
            found[name] = {"weight": weight, "scale": scale.astype(np.float32), "offset": offset.astype(np.float32)}
        else:
            weight = draw.normal(size=(num_rows, dim)).astype({"fp32": np.float32, "fp16": np.float16}[dtype])
            found[name] = {"weight": weight}
    return found


def meaning(table: dict[str, np.ndarray]) -> np.ndarray:
    """[V, D] float64: what the rows of a table stand for."""
    weight = table["weight"].astype(np.float64)
    return weight * table["scale"][:, None] + table["offset"][:, None] if "scale" in table else weight


def write_model(
    folder: Path,
    contents: dict[str, dict[str, np.ndarray]],
    lookups: list[list[dict[str, str]]],
    dense: list[str],
    *,
    dtype: str = "fp32",
    form: str = "pt2",
    multi_scenario: bool = True,
    network: nn.Module | None = None,
    outputs: tuple[str, ...] = ("click", "buy"),
    **card: object,
) -> np.ndarray:
    """Write an exported model of `Toy`, without its encoder; returns the weight of the network, [d_in, 2]."""
    dim = next(iter(contents.values()))["weight"].shape[1]
    width, branches = len(lookups[0]) * dim + len(dense), len(lookups)
    weight = np.random.default_rng(1).normal(size=(width, 2)).astype(np.float32)
    (folder / "tables").mkdir(parents=True)
    for name, parts in contents.items():
        save_file(parts, folder / "tables" / f"{name}.safetensors")
    x = torch.zeros(3, branches, width) if branches > 1 else torch.zeros(3, width)
    batch = {0: torch.export.Dim("rows")}
    given = (x, torch.zeros(3, dtype=torch.int64))
    network = (network or Toy(weight)).eval()
    if form == "pt2":
        torch.export.save(torch.export.export(network, given, dynamic_shapes=(batch, batch)), folder / "network.pt2")
    else:
        torch.onnx.export(
            *(network, given, folder / "network.onnx"),
            **{"dynamo": True, "dynamic_shapes": (batch, batch), "input_names": ["x", "scenario"], "verbose": False},
        )
    entries = [
        {"name": name, "file": f"tables/{name}.safetensors", "rows": len(parts["weight"]), "dim": dim, "dtype": dtype}
        for name, parts in contents.items()
    ]
    content = {
        **{"form": 1, "name": "toy", "method": "toy", "multi_scenario": multi_scenario, "tables": entries},
        **{"lookups": lookups, "dense": dense},
        "network": {"file": f"network.{form}", "format": form, "outputs": list(outputs)},
        **card,
    }
    (folder / "model.json").write_text(json.dumps(content))
    return weight
