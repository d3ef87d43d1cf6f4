"""Whether an exported model scores as the model of the run does, measured on rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tabulate import tabulate

from mmlrec.errors import DataError, UserAdvice
from mmlrec.evaluation.prediction import score_columns
from mmlrec.export.decoded import check_encoder, inputs_of
from mmlrec.metrics.gather import PredictionRows
from mmlrec.metrics.report import build_report
from mmlrec.models.base.chain import ChainModel
from mmlrec.schema import SCENARIO_COLUMN, DatasetManifest
from mmlrec.serving import Model
from mmlrec.session.session import Session
from mmlrec.storage.parquet import open_parquet
from mmlrec.storage.places import Place

#: Largest difference of a score that float32 arithmetic in another order explains, relative to the scale of its scores. That is
#: 1 for probabilities; of a regression task the deviation of its labels, or its largest value where that is more. Of cvr, a
#: ratio r of probabilities with logits a and b, it is the largest r (|a| + |b|) where that is more: so the rounding of logits
#: grows in it. By the device that the run's model is on: a GPU's thread adds up hundreds of products one after the other, a CPU
#: many sums side by side. Layers of 256, 128 and 64 on 2,000 numbers are then 1.3e-6 from exact scores, and 4e-7.
TOLERANCES = {"cpu": 1e-6, "cuda": 1e-5}
#: Numbers that are not scaled may be so large that sums of a network round by more. Then a score may differ by so many times
#: what the last bits of the numbers in its row move it by: a sum of n products rounds by some sqrt(n) bits, n some hundreds.
LAST_BITS = 16
_BATCH_ROWS = 1 << 14
#: Rows that are decoded and encoded again: they lie shuffled on disk.
_SAMPLE_ROWS = 256


def exported_scores(
    model: Model, dataset: Place, manifest: DatasetManifest, split: str, *, next_numbers: bool = False
) -> NDArray[np.float32]:
    """Scores of the rows of a split, [N, outputs], in the order in which they lie on disk.

    Args:
        next_numbers: of rows whose numbers (dense inputs) are each the next larger float32.
    """
    scores = []
    for batch in _batches(dataset, manifest, split, _BATCH_ROWS):
        inputs = inputs_of(batch, model.encoder)
        if next_numbers:
            inputs = replace(inputs, dense=np.nextafter(inputs.dense, np.float32(np.inf)))
        scores.append(model.score_inputs(inputs))
    return np.concatenate(scores)


def compare_encoder(model: Model, session: Session, dataset: Place, manifest: DatasetManifest, split: str) -> dict[str, Any]:
    """Some rows of a split decoded and encoded again by the exported model's encoder.

    Returns:
        `{"rows": how many, "equal": names of the features that were compared, "not_compared": those that cannot be decoded}`.

    Raises:
        DataError: an id is another one.
    """
    sample = next(_batches(dataset, manifest, split, _SAMPLE_ROWS))
    equal = check_encoder(model.encoder, session.encoder, session.manifest, sample)
    others = [feature.name for feature in manifest.features if feature.name not in equal]
    return {"rows": sample.num_rows, "equal": equal, "not_compared": others}


def _batches(dataset: Place, manifest: DatasetManifest, split: str, num_rows: int) -> Iterator[pa.RecordBatch]:
    columns = [feature.name for feature in manifest.features] + ([SCENARIO_COLUMN] if manifest.scenario else [])
    for part in manifest.splits[split].parts:
        with open_parquet(dataset / part.path, part.num_bytes, part.sha256) as file:
            yield from file.iter_batches(batch_size=num_rows, columns=columns)


def compare(
    session: Session, rows: PredictionRows, scores: NDArray[np.float32], outputs: list[str], split: str, dataset: Place
) -> dict[str, Any]:
    """The differences between the scores of the run's model and those of the exported one, and what they mean for AUC.

    Args:
        rows: of the split, with the logits of the run's model.
        scores: [N, outputs] of the exported model for the same rows.

    Returns:
        `{"dataset", "split", "rows", "tolerance", "scores": {OUTPUT: {"largest_difference", "scale"}}, "metrics": {TASK:
        {"metric", "all": [BEFORE, AFTER], "scenarios": {VALUE: [BEFORE, AFTER]}}}}`; of a regression task the metric is RMSE.
        What is not defined is None.
    """
    scenario = rows.scenario if session.spec.num_scenarios > 1 else np.zeros_like(rows.scenario)
    before = {name.removeprefix("score."): _numpy(column) for name, column in _columns(session, rows, scenario).items()}
    kinds = {task.name: task.kind for task in session.spec.tasks}
    differences = {}
    for index, name in enumerate(outputs):
        ours, exported = before[name], scores[:, index]
        known = ~np.isnan(ours)
        if (np.isnan(exported) == known).any():
            raise DataError(f"score.{name}: the exported model does not score the rows that the run's model scores.")
        grown = np.abs(ours[known])
        if name == "cvr" and name not in kinds:
            grown = grown * np.abs(rows.logits[:, [session.network.chain[0], session.network.chain[-1]]]).sum(axis=1)
        least = session.scales.get(name, (0.0, 1.0))[1] if kinds.get(name) == "regression" else 1.0
        scale = max(least, float(grown.max(initial=0.0)))
        largest = float(np.abs(ours[known].astype(np.float64) - exported[known]).max(initial=0.0))
        differences[name] = {"largest_difference": largest, "scale": scale}
    return {
        "dataset": str(dataset),
        "split": split,
        "rows": len(rows.row),
        "tolerance": TOLERANCES[session.world.device.type],
        "scores": differences,
        "metrics": _metrics(session, rows, scores, outputs),
    }


def add_last_bit(parity: dict[str, Any], moved: NDArray[np.float32], outputs: list[str]) -> None:
    """Record how far the last bit of their numbers moves the scores of rows; `moved`: [N, outputs], NaN where there is none."""
    for index, name in enumerate(outputs):
        parity["scores"][name]["last_bit"] = float(np.nan_to_num(np.abs(moved[:, index])).max(initial=0.0))


def beyond_tolerance(parity: dict[str, Any]) -> list[str]:
    """The scores that differ by more than the order of float32 arithmetic explains, in words."""
    return [
        f"score.{name}: {of['largest_difference']:.3g} apart, at a scale of {of['scale']:.3g}"
        for name, of in parity["scores"].items()
        if not of["largest_difference"] <= max(parity["tolerance"] * of["scale"], LAST_BITS * of.get("last_bit", 0.0))
    ]


def parity_text(parity: dict[str, Any]) -> str:
    """What was found, as text."""
    lines = [f"{parity['rows']} rows of {parity['split']} of {parity['dataset']}.", "", "largest differences of scores:"]
    cells: list[list[str]] = [[name, f"{of['largest_difference']:.2e}"] for name, of in parity["scores"].items()]
    lines.append(tabulate(cells, headers=["score", "difference"], disable_numparse=True, colalign=["left", "right"]))
    if moved := [f"{name} by {of['last_bit']:.2e}" for name, of in parity["scores"].items() if "last_bit" in of]:
        lines += [
            "",
            f"The last bit of the numbers in a row, which may be large where they are not scaled, moves {', '.join(moved)}.",
        ]
    cells = []
    for task, of in parity["metrics"].items():
        for place, (before, after) in {"all": of["all"], **of["scenarios"]}.items():
            change = "-" if before is None or after is None else f"{after - before:+.6f}"
            cells.append([task, place, of["metric"], *("-" if v is None else f"{v:.6f}" for v in (before, after)), change])
    headers = ["task", "scenario", "metric", "run", "exported", "change"]
    lines += ["", tabulate(cells, headers=headers, disable_numparse=True, colalign=["left"] * 3 + ["right"] * 3)]
    if losses := _losses(parity):
        loss, where = max(losses)
        lines += ["", f"largest loss of AUC: {max(loss, 0.0):.6f} ({where})"]
    encoder = parity["encoder"]
    lines += [
        "",
        f"encoder: {encoder['rows']} rows decoded and encoded again, equal in {', '.join(encoder['equal']) or 'nothing'}.",
    ]
    if encoder["not_compared"]:
        lines[-1] += f" Hashes, keys, buckets and numbers cannot be decoded: {', '.join(encoder['not_compared'])}."
    return "\n".join(lines)


def _losses(parity: dict[str, Any]) -> list[tuple[float, str]]:
    """What AUC loses, with task and scenario, where it is defined."""
    found = []
    for task, of in parity["metrics"].items():
        for place, (before, after) in {"all": of["all"], **of["scenarios"]}.items():
            if of["metric"] == "auc" and before is not None and after is not None:
                found.append((before - after, f"{task}, {place}"))
    return found


def _columns(session: Session, rows: PredictionRows, scenario: NDArray[np.integer]) -> dict[str, pa.Array]:
    """As predictions have them, and the further names of a chain."""
    columns = score_columns(session, rows.logits, scenario)
    network = session.network
    if isinstance(network, ChainModel):
        for name, step in (("ctr", network.chain[0]), ("ctcvr", network.chain[-1])):
            columns.setdefault(f"score.{name}", columns[f"score.{session.spec.tasks[step].name}"])
    return columns


def _numpy(column: pa.Array) -> NDArray[np.float32]:
    found: NDArray[np.float32] = column.to_numpy(zero_copy_only=False)
    return found


def _metrics(session: Session, rows: PredictionRows, scores: NDArray[np.float32], outputs: list[str]) -> dict[str, Any]:
    """AUC, or RMSE of a regression task, of both, by task and scenario."""
    logits = rows.logits.astype(np.float64)
    for column, task in enumerate(session.spec.tasks):
        if task.name in outputs:
            values = scores[:, outputs.index(task.name)].astype(np.float64)
            if task.kind == "binary":
                # Back to logits: which rows are equal, and how they are ranked, is told by the scores alone.
                with np.errstate(divide="ignore"):
                    values = np.log(values) - np.log1p(-values)
                values = np.clip(values, -1e3, 1e3)
            logits[:, column] = np.where(np.isnan(values), logits[:, column], values)
    reports = []
    for of in (rows, replace(rows, logits=cast(Any, logits))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserAdvice)  # of metrics that are not defined: told by the run, None here
            reports.append(
                build_report(of, tasks=session.spec.tasks, scenario=session.manifest.scenario, deviations=session.deviations)[
                    "tasks"
                ]
            )
    found = {}
    for task in session.spec.tasks:
        if task.name not in outputs:
            continue
        metric = "auc" if task.kind == "binary" else "rmse"
        before, after = (report[task.name] for report in reports)
        found[task.name] = {
            "metric": metric,
            "all": [before[metric], after[metric]],
            "scenarios": {
                value: [of[metric], after["scenarios"][value][metric]] for value, of in before.get("scenarios", {}).items()
            },
        }
    return found
