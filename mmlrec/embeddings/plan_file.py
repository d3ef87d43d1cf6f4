"""Plans as files: `plan.json` of a run, or what `apps.plan --json` has written. Read for training, and compared."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tabulate import tabulate
from torchrec import EmbeddingBagCollection

from mmlrec.config import EmbeddingsConfig
from mmlrec.embeddings.hardware import Hardware
from mmlrec.embeddings.placement import FUSED, SHARDING_TYPES, Where, too_small
from mmlrec.errors import ConfigError, DataError
from mmlrec.storage.places import Place, place, read

_GIB = 2**30
_AGAIN = "Plan again, or leave embeddings.plan out."


class TableOfPlan(BaseModel):
    """What both kinds of file say of a table; keys beside these are passed over."""

    model_config = ConfigDict(frozen=True)

    table: str
    rows: int = Field(gt=0)
    dim: int = Field(gt=0)
    sharding: Literal["table_wise", "table_row_wise", "row_wise"]
    ranks: list[int] = Field(min_length=1)
    kernel: Literal["fused", "fused_uvm_caching"] = "fused"
    weight_bytes: int = Field(ge=0)
    #: Releases before wrote none into `plan.json`.
    state_bytes: int | None = Field(default=None, ge=0)
    #: Copies of the table, of which `ranks` are those of the first. Releases before wrote none: then it is
    #: what all ranks of a plan hold, over what its tables take, and None of a run, whose file does not say it.
    replicas: int | None = Field(default=None, ge=1)


class _RankOfPlan(BaseModel):
    weight_bytes: int
    state_bytes: int
    host_bytes: int


class _HardwareOfPlan(BaseModel):
    ranks: int = Field(gt=0)


class BesideTables(BaseModel):
    """What `apps.plan` writes beside the tables, as far as plans are compared by it."""

    hardware: _HardwareOfPlan | None = None
    ranks: list[_RankOfPlan] = []
    step_ms: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    fits: bool | None = None


def read_plan(there: str | Place) -> tuple[list[TableOfPlan], BesideTables]:
    """Tables of a plan, and what its file says beside them: nothing in a run's.

    Args:
        there: the file, or the folder of a run.

    Raises:
        DataError: it is missing, or no plan.
    """
    path = place(there)
    path = path / "plan.json" if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"{path}: no such plan. Plans are plan.json of a run, and what python -m apps.plan --json FILE writes.")
    try:
        content = json.loads(read(path))
        rows, beside = (content, {}) if isinstance(content, list) else (content["tables"], content)
        tables, known = [TableOfPlan.model_validate(row) for row in rows], BesideTables.model_validate(beside)
    except (ValueError, TypeError, KeyError, ValidationError) as error:
        raise DataError(f"{path} is no plan of tables, or damaged: {error}") from error
    names = Counter(table.table for table in tables)
    if twice := [name for name, number in names.items() if number > 1]:
        raise DataError(f"{path} is no plan of tables, or damaged: it places '{twice[0]}' twice.")
    of_all = sum(rank.weight_bytes + rank.state_bytes + rank.host_bytes for rank in known.ranks)
    of_one = sum(table.weight_bytes + (table.state_bytes or 0) for table in tables)
    if of_all and of_one and all(table.replicas is None for table in tables):
        copies = round(of_all / of_one)
        tables = [table.model_copy(update={"replicas": max(1, copies)}) for table in tables]
    return tables, known


def placement_of_plan(tables: EmbeddingBagCollection, config: EmbeddingsConfig, hardware: Hardware) -> dict[str, Where] | None:
    """Where `embeddings.plan` says that each table lies; None where there is no plan. Raises as `given_placement`."""
    if config.plan is None:
        return None
    sizes = {c.name: (c.num_embeddings, c.embedding_dim) for c in tables.embedding_bag_configs()}
    return given_placement(config.plan, sizes, hardware, config.host_cache)


def given_placement(
    there: str, sizes: Mapping[str, tuple[int, int]], hardware: Hardware, host_cache: float | None = None
) -> dict[str, Where]:
    """Where each table lies, as a plan says.

    Args:
        sizes: table -> rows and dim that the training has.
        host_cache: `embeddings.host_cache`, without which no table lies in the memory of a host.

    Raises:
        ConfigError: the plan is of other tables or another number of ranks.
        DataError: it cannot be read.
    """
    rows, beside = read_plan(there)
    found = {row.table: row for row in rows}
    _check_number(there, rows, beside, hardware)
    if missing := sizes.keys() - found.keys():
        raise ConfigError(f"embeddings.plan: {there} has no table '{min(missing)}', which the training has. {_AGAIN}")
    if unknown := found.keys() - sizes.keys():
        raise ConfigError(f"embeddings.plan: {there} has a table '{min(unknown)}', which the training has not. {_AGAIN}")
    for name, row in found.items():
        if (row.rows, row.dim) != sizes[name]:
            raise ConfigError(
                f"embeddings.plan: in {there} table '{name}' is {row.rows} x {row.dim}, in the training"
                f" {sizes[name][0]} x {sizes[name][1]}. {_AGAIN}"
            )
        _check_ranks(there, row, hardware)
        if row.kernel != FUSED and host_cache is None:
            raise ConfigError(
                f"embeddings.plan: {there} places '{name}' in the memory of the host. Say which share of its rows GPUs cache:"
                " embeddings.host_cache=0.1, or plan again."
            )
        if too_small(row.rows, len(row.ranks)):
            raise ConfigError(
                f"embeddings.plan: {there} splits '{name}', which has too few rows to give each of {len(row.ranks)} ranks"
                f" some. {_AGAIN}"
            )
    return {name: Where(row.sharding, row.ranks, row.kernel) for name, row in found.items()}


def check_ranks(there: str, hardware: Hardware) -> None:
    """Refuse a plan of other ranks, whatever its tables are.

    Args:
        hardware: the ranks of one copy of the tables.

    Raises:
        ConfigError: naming a table.
        DataError: it cannot be read.
    """
    rows, beside = read_plan(there)
    _check_number(there, rows, beside, hardware)
    for row in rows:
        _check_ranks(there, row, hardware)


def _check_number(there: str, rows: list[TableOfPlan], beside: BesideTables, hardware: Hardware) -> None:
    of_copy = _ranks_of_copy(rows, beside)
    if of_copy not in (None, hardware.world_size):
        raise ConfigError(
            f"embeddings.plan: {there} is of {of_copy} rank(s) for a copy of the tables; the training has"
            f" {hardware.world_size} rank(s). {_AGAIN}"
        )


def _ranks_of_copy(rows: list[TableOfPlan], beside: BesideTables) -> int | None:
    """How many ranks hold one copy of the tables, all replicas alike; None where the file does not say it."""
    if beside.hardware is None:
        return None
    return beside.hardware.ranks // max((row.replicas or 1 for row in rows), default=1)


def _check_ranks(there: str, row: TableOfPlan, hardware: Hardware) -> None:
    if row.ranks not in _places(row.sharding, hardware):
        hosts = f" on {hardware.num_hosts} host(s)" if row.sharding == "table_row_wise" else ""
        raise ConfigError(
            f"embeddings.plan: {there} places '{row.table}' {row.sharding} on {_ranks(row.ranks)}; the training has"
            f" {hardware.world_size} rank(s){hosts}, row_wise tables lie on all, table_row_wise ones on those of one host."
            f" {_AGAIN}"
        )


def _places(sharding: str, hardware: Hardware) -> list[list[int]]:
    """The ranks that a table may lie on."""
    if sharding == "table_wise":
        return [[rank] for rank in range(hardware.world_size)]
    if sharding == "row_wise":
        return [list(range(hardware.world_size))]
    return [hardware.host(index) for index in range(hardware.num_hosts)] if hardware.has_whole_hosts else []


def compare_plans(first: str | Place, second: str | Place) -> str:
    """Two plans side by side, as text: totals, then the tables that are not placed alike.

    Raises:
        DataError: one cannot be read.
    """
    plans = [read_plan(there) for there in (first, second)]
    totals = [
        [key, *values] for key, values in zip(_TOTALS, zip(*(_totals(*plan) for plan in plans), strict=True), strict=True)
    ]
    tables = [{row.table: row for row in rows} for rows, _ in plans]
    differing = []
    for name in sorted(tables[0].keys() | tables[1].keys()):
        cells = [_cell(of.get(name)) for of in tables]
        if cells[0] != cells[1]:
            differing.append([name, *cells])
    lines = [tabulate(totals, headers=["", "A", "B"], disable_numparse=True), ""]
    if differing:
        lines.append(tabulate(differing, headers=["table", "A", "B"], disable_numparse=True))
    else:
        lines.append("Every table has the same size and lies on the same ranks in both.")
    return "\n".join([f"A: {first}", f"B: {second}", "", *lines])


_TOTALS = (
    *("tables", "copies of them", "ranks with tables", "table_wise / table_row_wise / row_wise"),
    *("weights of a copy, GiB", "state of a copy, GiB"),
    *("fullest rank, tables, GiB", "emptiest rank, tables, GiB", "fullest rank, tables in host memory, GiB"),
    *("step, ms (predicted)", "fits"),
)


def _totals(rows: list[TableOfPlan], beside: BesideTables) -> list[str]:
    kinds: Counter[str] = Counter(row.sharding for row in rows)
    # Of one copy: the ranks of the others hold as much.
    on_device: Counter[int] = Counter()
    on_host: Counter[int] = Counter()
    for row in rows:
        for rank in row.ranks:
            load = on_device if row.kernel == FUSED else on_host
            load[rank] += (row.weight_bytes + (row.state_bytes or 0)) // len(row.ranks)
    known = all(row.state_bytes is not None for row in rows)
    recorded = [row.replicas for row in rows if row.replicas]
    replicas = max(recorded, default=1)
    holding = on_device.keys() | on_host.keys()
    recorded_ranks = _ranks_of_copy(rows, beside)
    of_copy = max(holding, default=-1) + 1 if recorded_ranks is None else recorded_ranks
    fullest = max(on_device.values(), default=0)
    emptiest = min(on_device.values(), default=0) if len(on_device) >= of_copy else 0
    return [
        str(len(rows)),
        str(replicas) if recorded or not rows else "not recorded",
        f"{replicas * len(holding)} of {replicas * of_copy}",
        " / ".join(str(kinds[kind]) for kind in SHARDING_TYPES),
        f"{sum(row.weight_bytes for row in rows) / _GIB:.2f}",
        f"{sum(row.state_bytes or 0 for row in rows) / _GIB:.2f}" if known else "not recorded",
        f"{fullest / _GIB:.2f}",
        f"{emptiest / _GIB:.2f}",
        f"{max(on_host.values(), default=0) / _GIB:.2f}",
        "not in this file" if beside.step_ms is None else f"{beside.step_ms:.3f}",
        "not in this file" if beside.fits is None else "yes" if beside.fits else "no",
    ]


def _cell(row: TableOfPlan | None) -> str:
    if row is None:
        return "-"
    host = "" if row.kernel == FUSED else ", in host memory"
    copies = f", {row.replicas} copies of it" if (row.replicas or 1) > 1 else ""
    return f"{row.rows:,} x {row.dim} {row.sharding} on {_ranks(row.ranks)}{host}{copies}"


def _ranks(ranks: list[int]) -> str:
    """`rank 3`, or `ranks 0-7`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    consecutive = ranks == list(range(ranks[0], ranks[-1] + 1))
    return f"ranks {ranks[0]}-{ranks[-1]}" if consecutive else f"ranks {','.join(map(str, ranks))}"
