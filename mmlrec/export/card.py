"""The card of an exported model: `model.json` for programs, README.md for people."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

import mmlrec
from mmlrec.export.network import Format, Scorer
from mmlrec.export.parity import parity_text
from mmlrec.export.tables import Precision
from mmlrec.schema import DatasetManifest, Feature
from mmlrec.session.session import Session
from mmlrec.storage.parquet import open_parquet
from mmlrec.storage.places import Place
from mmlrec.terminal import plain

CARD = "model.json"
#: Of the folder: raised when a reader of the form before would read something wrong.
FORM = 1
_EXAMPLES = 3


def table_file(name: str, branches: list[str]) -> str:
    """Where a table lies in the folder. Of tables of branches, `branch/table`, the branch is told by its number.

    Names of tables hold letters, digits, '_' and '-' only; those of branches hold whatever a scenario is called.
    """
    branch, _, table = name.rpartition("/")
    return f"tables/{table}.{branches.index(branch)}.safetensors" if branch else f"tables/{table}.safetensors"


def make_card(
    session: Session,
    scorer: Scorer,
    stored: dict[str, tuple[int, int]],
    precision: Precision,
    kind: Format,
    result: dict[str, Any],
) -> dict[str, Any]:
    """All of the card but the parity.

    Args:
        stored: table -> rows and width.
        result: `result.json` of the run.
    """
    manifest, config = session.manifest, session.config
    branches = [name for name, _, _ in session.branches()]
    return {
        "form": FORM,
        "mmlrec": mmlrec.__version__,
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "name": manifest.name,
        "method": config.model["name"],
        "setting": str(config.dataset.setting),
        "digest": manifest.encoding.digest if manifest.encoding else None,
        "terms": manifest.terms,
        "tasks": [{"name": task.name, "kind": task.kind, "role": task.role} for task in session.spec.tasks],
        "scenario": manifest.scenario.model_dump() if manifest.scenario else None,
        "multi_scenario": session.spec.num_scenarios > 1,
        "features": [
            {"name": feature.name, "kind": feature.kind, "examples": examples(session.encoder, manifest, feature)}
            for feature in manifest.features
        ],
        "metrics": result,
        "parity": {},
        "network": {"file": f"network.{kind}", "format": kind, "outputs": scorer.outputs},
        "tables": [
            {"name": name, "file": table_file(name, branches), "rows": rows, "dim": dim, "dtype": precision}
            for name, (rows, dim) in stored.items()
        ],
        "lookups": [
            [
                {
                    "feature": feature.name,
                    "table": prefix + str(feature.table),
                    "pooling": feature.pooling if feature.kind == "multi" else "sum",
                }
                for feature in manifest.sparse_features
            ]
            for prefix in ([f"{branch}/" for branch in branches] or [""])
        ],
        "dense": [feature.name for feature in manifest.dense_features],
    }


def examples(encoder: Place, manifest: DatasetManifest, feature: Feature) -> list[Any]:
    """Some raw values of a feature: the most frequent ones of a vocabulary; nothing of numbers and hashed values."""
    table = manifest.table(feature.table) if feature.table else None
    if table is None or table.vocabulary is None:
        return []
    try:
        with open_parquet(encoder / table.vocabulary) as file:
            rows = next(file.iter_batches(batch_size=_EXAMPLES, columns=["value"]), None)
    except (OSError, pa.ArrowException):
        return []
    return [] if rows is None else [str(value) for value in rows.column("value").to_pylist()]


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Write `model.json`."""
    (folder / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_readme(folder: Path, card: dict[str, Any]) -> None:
    """Write README.md."""
    (folder / "README.md").write_text(readme(card), encoding="utf-8")


def readme(card: dict[str, Any]) -> str:
    """The card in words."""
    lines = [
        f"# {card['method']} on {card['name']}",
        "",
        f"A model for setting {card['setting']}, exported by mmlrec {card['mmlrec']} (torch {card['torch']}) on {card['date']}.",
        "Scores of raw rows, with torch, numpy, pyarrow and safetensors alone:",
        "",
        "    import mmlrec.serving",
        '    model = mmlrec.serving.load("FOLDER")',
        "    scores = model.score(rows)  # a DataFrame, an Arrow table, or a list of dicts",
        "",
        f"Scores: {', '.join(f'`score.{name}`' for name in card['network']['outputs'])}.",
        "",
        "| task | kind | role |",
        "| --- | --- | --- |",
        *(f"| {_cell(task['name'])} | {task['kind']} | {task['role'] or ''} |" for task in card["tasks"]),
        "",
    ]
    if card["scenario"]:
        lines += [f"Scenarios, by {_cell(card['scenario']['name'])}: {_cell(', '.join(card['scenario']['values']))}.", ""]
    lines += ["| feature | kind | examples |", "| --- | --- | --- |"]
    for feature in card["features"]:
        shown = ", ".join(map(str, feature["examples"]))
        lines.append(f"| {_cell(feature['name'])} | {feature['kind']} | {_cell(shown)} |")
    lines += ["", f"Tables: {len(card['tables'])}, {card['tables'][0]['dtype'] if card['tables'] else 'none'}.", ""]
    lines += ["## Compared with the model of the run", "", "```", parity_text(card["parity"]), "```", ""]
    lines += ["## Data", "", f"Digest of the encoding: {card['digest'] or 'not recorded'}.", ""]
    lines += [f"Terms of the data: {_cell(card['terms']) or 'not recorded'}"]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text from data in a table of a page: no line breaks, no borders of cells, no marks."""
    return plain(text).replace("\n", " ").replace("|", "\\|").replace("<", "&lt;")
