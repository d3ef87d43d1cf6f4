"""Features of independent branches: every branch (head) looks up its own tables, and only for its own rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mmlrec.data.batch import Batch
from mmlrec.schema import Scenario, Setting, Task


def branch_names(setting: Setting, tasks: Sequence[Task], scenario: Scenario | None) -> list[str]:
    """Names of the H heads in the order h = t*S + s: the task in MTL, the scenario in MSL, `task:scenario` in MTMSL."""
    if setting is Setting.MTL:
        return [task.name for task in tasks]
    assert scenario is not None, "check_setting refuses MSL and MTMSL without scenarios"
    if setting is Setting.MSL:
        return [_escaped(value) for value in scenario.values]
    return [f"{task.name}:{_escaped(value)}" for task in tasks for value in scenario.values]


def _escaped(value: str) -> str:
    """Without '.', which a torch module name may not hold, and '/', which ends the branch in names of its tables."""
    return value.replace("%", "%25").replace(".", "%2E").replace("/", "%2F")


def expand_branches(
    batch: Batch, names: Sequence[str], num_scenarios: int, *, training: bool, branches: Sequence[int] | None = None
) -> Batch:
    """Give every branch its own copy of all features, with empty bags for rows that are not its own.

    A table row that a branch does not use must not be touched, or its optimizer state would move.

    Args:
        batch: with F keys and B rows.
        names: the U branches.
        num_scenarios: S of the model; 1 in MTL, where all rows belong to every branch.
        training: also empty the bags of rows whose label of the branch's task is missing.
        branches: head h = t*S + s of each branch; all H heads, in order, when absent.

    Returns:
        The batch with U*F keys `branch/field`, branch-major. Bags are empty for padding and rows of other scenarios;
        labels of heads that are not among the branches are masked. It lies in page-locked memory where the given one does.
    """
    heads = torch.arange(len(names)) if branches is None else torch.tensor(branches)
    own = batch.valid.unsqueeze(0).expand(len(names), -1)
    if num_scenarios > 1:
        own = own & (batch.scenario.unsqueeze(0) == (heads % num_scenarios).unsqueeze(1))
    if training:
        own = own & (batch.mask.t()[heads // num_scenarios] > 0)

    sparse = batch.sparse
    lengths = sparse.lengths().view(len(sparse.keys()), sparse.stride())
    rows = torch.arange(lengths.shape[1], device=own.device).repeat(len(sparse.keys()))
    row_of_value = torch.repeat_interleave(rows, lengths.flatten().long(), output_size=sparse.values().numel())
    expanded = KeyedJaggedTensor(
        keys=[f"{name}/{key}" for name in names for key in sparse.keys()],  # noqa: SIM118
        values=sparse.values().expand(len(names), -1)[own[:, row_of_value]],
        lengths=(lengths.unsqueeze(0) * own.unsqueeze(1)).flatten(),
        stride=lengths.shape[1],
    )
    trained = torch.zeros(batch.labels.shape[1] * num_scenarios, dtype=batch.mask.dtype)
    trained[heads] = 1
    scenario = batch.scenario if num_scenarios > 1 else torch.zeros_like(batch.scenario)
    made = replace(batch, sparse=expanded, mask=batch.mask * trained.view(-1, num_scenarios)[:, scenario].t())
    return made.pin_memory() if batch.mask.is_pinned() else made
