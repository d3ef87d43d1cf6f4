"""Small exported models, made without a run: a network that can be computed by hand, and tables of known rows."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from mmlrec.encoding.encoder import Encoder
from mmlrec.encoding.vocabularies import Vocabularies

ROWS, DIM = {"user": 50, "tag": 20}, 4
USERS, TAGS = [f"u{number}" for number in range(1, 50)], list(range(100, 119))
PLACES = ["home", "search", "cart"]
LOOKUPS = [
    {"feature": "user", "table": "user", "pooling": "sum"},
    {"feature": "tags", "table": "tag", "pooling": "mean"},
    {"feature": "marks", "table": "tag", "pooling": "sum"},
]
DENSE = ["price", "age"]
FACTS = {
    "form": 1,
    "dataset": "toy",
    "digest": "0" * 64,
    "features": {
        "user": {"kind": "sparse", "type": "string", "table": "user"},
        "price": {"kind": "dense", "type": "float64", "range": [0.0, 10.0], "fill": 4.0},
        "tags": {"kind": "multi", "type": "int64", "table": "tag", "listed": True},
        "marks": {"kind": "multi", "type": "int64", "table": "tag", "listed": True, "pooling": "sum"},
        "age": {"kind": "dense", "type": "float32", "range": [20.0, 60.0]},
    },
    "scenario": {"name": "place", "values": PLACES, "column": "place", "type": "string", "map": [[p, p] for p in PLACES]},
    "tables": {"user": {"ids": "vocabulary", "rows": 50}, "tag": {"ids": "vocabulary", "rows": 20}},
}
#: Features of the card, with examples of raw values.
FEATURES = [
    {"name": "user", "kind": "sparse", "examples": ["u1", "u2"]},
    {"name": "price", "kind": "dense", "examples": [0.0, 10.0]},
    {"name": "tags", "kind": "multi", "examples": [[100], [101]]},
    {"name": "marks", "kind": "multi", "examples": []},
    {"name": "age", "kind": "dense", "examples": [20.0, 60.0]},
]


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


def raw_rows(num_rows: int, seed: int = 5) -> list[dict]:
    """Raw rows of `FACTS`, with unseen ids, missing cells, empty lists and numbers beyond the range of train."""
    draw = np.random.default_rng(seed)

    def tags() -> list[int]:
        return [int(tag) for tag in draw.choice([*TAGS, 5, 6], draw.integers(0, 4))]

    return [
        {
            "user": draw.choice([*USERS[:9], "nobody", None]),
            "price": draw.choice([None, float(draw.uniform(-3, 13))]),
            **{"tags": tags(), "marks": tags(), "age": int(draw.integers(10, 70)), "place": str(draw.choice(PLACES))},
            "label": 1,
        }
        for _ in range(num_rows)
    ]


def encoded_by_hand(rows: list[dict]) -> SimpleNamespace:
    """What a network reads of raw rows: dictionaries and formulas."""
    users, tags = ({value: at for at, value in enumerate(of, start=1)} for of in (USERS, TAGS))
    lists = {name: [[tags.get(tag, 0) for tag in row[name] or []] for row in rows] for name in ("tags", "marks")}
    ids = {"user": (np.array([users.get(row["user"], 0) for row in rows], np.int64), np.arange(len(rows) + 1))}
    for name, of in lists.items():
        ids[name] = (
            np.array([tag for one in of for tag in one], np.int64),
            np.append(0, np.cumsum([len(one) for one in of])).astype(np.int64),
        )
    prices = [4.0 if row["price"] is None else row["price"] for row in rows]
    dense = [
        [min(max(price / 10, 0), 1), min(max((row["age"] - 20) / 40, 0), 1)] for price, row in zip(prices, rows, strict=True)
    ]
    scenario = np.array([PLACES.index(row["place"]) for row in rows], np.int64)
    return SimpleNamespace(ids=ids, dense=np.array(dense, np.float32).reshape(-1, 2), scenario=scenario, num_rows=len(rows))


def scores_by_hand(inputs, contents, lookups, weight, multi_scenario: bool = True) -> np.ndarray:
    """[B, 2] scores of `Toy`, row by row in float64."""
    found = []
    for row in range(inputs.num_rows):
        vectors = []
        for branch in lookups:
            parts = []
            for lookup in branch:
                ids, offsets = inputs.ids[lookup["feature"]]
                rows = meaning(contents[lookup["table"]])[ids[offsets[row] : offsets[row + 1]]]
                pooled = rows.sum(0)
                parts.append(pooled / len(rows) if lookup["pooling"] == "mean" and len(rows) else pooled)
            vectors.append(np.concatenate([*parts, inputs.dense[row]]))
        logits = [vectors[t % len(vectors)] @ weight[:, t] + (inputs.scenario[row] if multi_scenario else 0) for t in (0, 1)]
        found.append([1 / (1 + np.exp(-logit)) for logit in logits])
    return np.array(found).reshape(-1, 2)


def write_model(
    folder: Path,
    contents: dict[str, dict[str, np.ndarray]],
    lookups: list[list[dict[str, str]]] | None = None,
    *,
    dtype: str = "fp32",
    form: str = "pt2",
    multi_scenario: bool = True,
    network: nn.Module | None = None,
    outputs: tuple[str, ...] = ("click", "buy"),
    **card: object,
) -> np.ndarray:
    """Write an exported model of `Toy`; returns the weight of the network, [d_in, 2]."""
    lookups, dense = lookups or [LOOKUPS], DENSE
    dim = next(iter(contents.values()))["weight"].shape[1]
    width, branches = len(lookups[0]) * dim + len(dense), len(lookups)
    weight = np.random.default_rng(1).normal(size=(width, 2)).astype(np.float32)
    (folder / "tables").mkdir(parents=True)
    for name, parts in contents.items():
        save_file(parts, folder / "tables" / f"{name}.safetensors")
    x = torch.zeros(3, branches, width) if branches > 1 else torch.zeros(3, width)
    vocabularies = Vocabularies.of({"user": [pa.array(USERS)], "tag": [pa.array(TAGS)]})
    Encoder(FACTS, vocabularies).save(folder / "encoder")
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
        **{"lookups": lookups, "dense": dense, "features": FEATURES},
        "network": {"file": f"network.{form}", "format": form, "outputs": list(outputs)},
        **card,
    }
    (folder / "model.json").write_text(json.dumps(content))
    return weight
