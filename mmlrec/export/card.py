"""The card of an exported model: `model.json` for programs, README.md for people."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import mmlrec
from mmlrec.encoding.encoder import Encoder
from mmlrec.encoding.specs import FeatureSpec
from mmlrec.export.network import Format, Scorer
from mmlrec.export.parity import parity_text
from mmlrec.export.tables import Precision
from mmlrec.serving.card import CARD
from mmlrec.session.session import Session
from mmlrec.storage.parquet import open_parquet
from mmlrec.storage.places import Place
from mmlrec.terminal import plain

README, TABLES_FOLDER = "README.md", "tables"
_EXAMPLES = 3


def table_file(name: str, branches: list[str]) -> str:
    """Where a table lies in the folder. Of tables of branches, `branch/table`, the branch is told by its number.

    Names of tables hold letters, digits, '_' and '-' only; those of branches hold whatever a scenario is called.
    """
    branch, _, table = name.rpartition("/")
    number = f".{branches.index(branch)}" if branch else ""
    return f"{TABLES_FOLDER}/{table}{number}.safetensors"


def make_card(
    session: Session,
    encoder: Encoder,
    scorer: Scorer,
    stored: dict[str, tuple[int, int]],
    precision: Precision,
    kind: Format,
    result: dict[str, Any],
) -> dict[str, Any]:
    """All of the card but the marks of files, and the parity.

    Args:
        stored: table -> rows and width.
        result: `result.json` of the run.
    """
    manifest, config = session.manifest, session.config
    branches = [name for name, _, _ in session.branches()]
    return {
        "form": 2 if session.managed else 1,
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
            {"name": spec.name, "kind": spec.kind, "examples": _examples(session, encoder, spec)} for spec in encoder.features
        ],
        "metrics": result,
        "parity": {},
        "files": {},
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


def _examples(session: Session, encoder: Encoder, spec: FeatureSpec) -> list[Any]:
    if spec.table is None:
        return examples(spec, None, ())
    facts = encoder.facts["tables"][spec.table]
    vocabulary = session.manifest.table(spec.table).vocabulary if facts["ids"] == "vocabulary" else None
    return examples(spec, None if vocabulary is None else session.encoder / vocabulary, facts.get("borders", ()))


def examples(spec: FeatureSpec, vocabulary: Place | None, borders: Sequence[float]) -> list[Any]:
    """Some raw cells of a feature: the most frequent values of a vocabulary, borders of buckets, or the ends of a range.

    Nothing of hashed values, and of numbers whose range is not known.

    Args:
        vocabulary: of its table, where ids are looked up.
        borders: of its table, where ids are buckets.
    """
    found: list[Any]
    if spec.kind == "dense" or borders:
        numbers = [] if spec.indicator else list(spec.range or borders)[:_EXAMPLES]
        found = [math.copysign(math.expm1(abs(number)), number) if spec.log else number for number in numbers]
    elif vocabulary is None:
        found = []
    else:
        with open_parquet(vocabulary) as file:
            rows = next(file.iter_batches(batch_size=_EXAMPLES, columns=["value"]), None)
        found = [] if rows is None else rows.column("value").to_pylist()
    if not spec.listed:
        return found
    return [[value] if spec.separator is None else str(value) for value in found]


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Write `model.json`."""
    (folder / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_readme(folder: Path, card: dict[str, Any]) -> None:
    """Write README.md."""
    (folder / README).write_text(readme(card), encoding="utf-8")


def readme(card: dict[str, Any]) -> str:
    """The card in words."""
    lines = [
        f"# {card['method']} on {card['name']}",
        "",
        f"For setting {card['setting']}. Exported by mmlrec {card['mmlrec']}, torch {card['torch']}, on {card['date']}.",
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
