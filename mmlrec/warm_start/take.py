"""Fill a session that begins with what another run knows: rows of tables by value, the network by name; and tell of it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tabulate import tabulate
from torch import Tensor

from mmlrec.distributed.world import World, logger
from mmlrec.embeddings.tables import local_shards
from mmlrec.errors import CheckpointError, StorageError, UserAdvice, UserError
from mmlrec.models.base.model import MultiTaskModel
from mmlrec.registry import method, model_config
from mmlrec.run_folder import checkpoint, whole
from mmlrec.run_folder.folder import RunFolder, write_atomically
from mmlrec.run_folder.index import SavedTensor, saved_tensors
from mmlrec.schema import DatasetManifest, Setting, facts_digest
from mmlrec.session.parts import build_spec
from mmlrec.session.recommender import TABLES
from mmlrec.session.session import Session
from mmlrec.warm_start import keys
from mmlrec.warm_start.rows import Encoded, Matching, matching, old_rows
from mmlrec.warm_start.slices import Known, Taken, layouts, taken
from mmlrec.warm_start.source import Source

#: Of a table's rows that are read at a time.
_PIECE_BYTES = 32 << 20
_WEIGHTS = f"model.{TABLES}.embedding_bags."
_STATE = f"optimizer.tables.{TABLES}.embedding_bags."
_NETWORK, _NETWORK_STATE = "model.head.network.", "optimizer.dense.head.network."
#: Whether a tensor is taken as a whole, and whether it is not taken -> what is said of it.
_IS = {(True, False): "taken", (False, False): "in part", (False, True): "fresh"}
_BY_NAME, _WITHOUT_STATE = "by name", "by name, and its optimizer begins anew"
_NAMED = 10  # names that a line of the log spells out


@dataclass
class TableTaken:
    """What became of a table: of its `rows`, how many are taken and new; how many of the other run's are dropped."""

    table: str
    rows: int
    taken: int
    new: int
    dropped: int
    matched: str
    optimizer_state: str
    note: str


def take(session: Session, source: Source, into: RunFolder, forgotten: Mapping[str, NDArray[np.int64]] | None = None) -> None:
    """Fill weights and optimizer state of a session that has just been built; all ranks call it together.

    Each rank reads what its own shards need. It is told in the log, and written as `RUN/init_from.json`.

    Args:
        forgotten: table -> rows, of this run, that are not taken.

    Raises:
        UserError: a checkpoint is damaged or was replaced meanwhile, or a vocabulary is missing or damaged.
    """
    world, best = session.world, source.folder.best
    world.at(f"taking rows and network from {source.folder.path}")
    with checkpoint.unchanged(best, world):
        error: UserError | None = None
        tables: list[TableTaken] = []
        parameters: list[dict[str, str]] = []
        network = ""
        try:
            weights = saved_tensors(whole.inside(best))
            state = {} if source.optimizer is None else saved_tensors(whole.inside(source.optimizer))
            if checkpoint.read_state(best) != source.state:
                error = CheckpointError(f"{best} was replaced by its run while it was read. Give the command again.")
        except (CheckpointError, StorageError) as cause:
            weights, state, error = {}, {}, cause
        world.raise_together(error)
        own = checkpoint.training_tensors(session.model, session.optimizer, world.rank)
        new = Encoded(session.manifest, session.encoder)
        tables = _take_tables(session, own, weights, state, new, source, forgotten or {})
        try:
            parameters, network = _take_network(session, own, weights, state, source)
        except (CheckpointError, StorageError) as cause:
            error = cause
        except OSError as cause:
            error = CheckpointError(f"{source.folder.path}: its checkpoint cannot be read: {cause}. Give the command again.")
        world.raise_together(error)
    if world.is_main:
        _tell(session, source, into, tables, parameters, network, weights)


def _take_tables(
    session: Session,
    own: Mapping[str, Any],
    weights: Mapping[str, SavedTensor],
    state: Mapping[str, SavedTensor],
    new: Encoded,
    source: Source,
    forgotten: Mapping[str, NDArray[np.int64]],
) -> list[TableTaken]:
    world, old = session.world, source.encoded
    names = [key.removeprefix(_WEIGHTS).removesuffix(".weight") for key in own if key.startswith(_WEIGHTS)]
    matchings = _matchings(sorted({_table(name) for name in names}), new, old, world)
    here: dict[str, tuple[int, bool, bool]] = {}  # of each table: rows taken, whether there is state, and whether any is taken
    there = {name: weights[f"{_WEIGHTS}{name}.weight"].size[0] for name in names if f"{_WEIGHTS}{name}.weight" in weights}
    error: UserError | None = None
    table, by_key = "", None
    for name in sorted(names, key=_table):
        world.at(f"taking rows of {name}")
        try:
            gone, match = forgotten.get(_table(name), np.empty(0, np.int64)), _match(name, matchings, own, weights)
            if table != _table(name):
                table, by_key = _table(name), None
            if match.how == "by key" and by_key is None:
                by_key = _by_key(table, session, new, source)  # once: all branches have one map
            keyed = by_key if match.how == "by key" else None
            if keyed is not None:
                there[name] = keyed.there
            here[name] = _take_table(name, match, keyed, own, weights, state, new, old, gone)
        except UserError as cause:
            error = cause
        except OSError as cause:
            error = CheckpointError(
                f"table '{name}' cannot be taken from {old.folder.parent}: {cause}. Give the command again."
            )
        if error is not None:
            break
    world = world.without_limit()
    world.raise_together(error)
    found = []
    for name, of_ranks in zip(names, zip(*world.gather([here[name] for name in names]), strict=True), strict=True):
        key = f"{_WEIGHTS}{name}.weight"
        match = _match(name, matchings, own, weights)
        num_rows, total = sum(rows for rows, _, _ in of_ranks), int(own[key].size()[0])
        others = there.get(name, 0)
        with_state, with_taken = (any(of[index] for of in of_ranks) for index in (1, 2))
        of_state = "none" if not with_state else "taken" if with_taken else "fresh"
        note = match.why_not or _rounding(own[key].dtype, weights[key].dtype)
        found.append(TableTaken(name, total, num_rows, total - num_rows, others - num_rows, match.how, of_state, note))
    return found


def _match(
    name: str, matchings: Mapping[str, Matching], own: Mapping[str, Any], weights: Mapping[str, SavedTensor]
) -> Matching:
    """How the rows of a table, of a branch or of all, are found in the other run."""
    key = f"{_WEIGHTS}{name}.weight"
    if key not in weights:
        return Matching("not", why_not="a new table")
    here, there = int(own[key].size()[1]), weights[key].size[1]
    if here != there:
        return Matching("not", why_not=f"its rows are {here} wide here, {there} there")
    return matchings[_table(name)]


def _rounding(here: torch.dtype, there: torch.dtype) -> str:
    """What is to be said of rows that are taken into another number format; nothing where that holds all their numbers."""
    if torch.promote_types(here, there) == here:
        return ""
    return f"rounded to {checkpoint.dtype_name(here)}, {checkpoint.dtype_name(there)} there"


def _take_table(
    name: str,
    match: Matching,
    keyed: keys.Taken | None,
    own: Mapping[str, Any],
    weights: Mapping[str, SavedTensor],
    state: Mapping[str, SavedTensor],
    new: Encoded,
    old: Encoded,
    forgotten: NDArray[np.int64],
) -> tuple[int, bool, bool]:
    """Rows that this rank takes, whether it has state for them, and whether it takes any of that.

    Args:
        keyed: what is taken by key, where the match is.
        forgotten: rows of this run's table that are not taken.
    """
    key, prefix = f"{_WEIGHTS}{name}.weight", f"{_STATE}{name}.weight."
    of_state = [other for other in own if other.startswith(prefix) and own[other].dim() > 0]
    if match.how == "not":
        return 0, bool(of_state), False
    same = [other for other in of_state if other in state and tuple(own[other].size())[1:] == state[other].size[1:]]
    num_rows = 0
    for shard, (first, *_) in local_shards(own[key]):
        if keyed is not None:
            rows, state_rows = keyed.within(first, first + shard.shape[0])
        else:
            rows = state_rows = old_rows(_table(name), match, first, first + shard.shape[0], new, old)
        rows[forgotten[(forgotten >= first) & (forgotten < first + len(rows))] - first] = -1
        num_rows += int((rows >= 0).sum())
        _copy_rows(name, shard, rows, weights[key])
        for other in same:
            for piece, (at, *_) in local_shards(own[other]):
                if at == first:
                    _copy_rows(name, piece, state_rows, state[other])
    return num_rows, bool(of_state), bool(same) and num_rows > 0


def _by_key(name: str, session: Session, new: Encoded, source: Source) -> keys.Taken:
    """What a table takes by key; a managed one has its map, and counts, from then on."""
    mine, theirs = new.manifest.table(name), source.encoded.manifest.table(name)
    if theirs.managed:
        known = keys.Known.of_managed(name, source.folder.best, source.optimizer)
    else:
        assert mine.hash_seed is not None
        known = keys.Known.of_vocabulary(source.encoded.vocabulary(name), mine.hash_seed)
    if mine.managed:
        return keys.Taken.into_slots(name, known, session.managed)
    assert theirs.hash_seed is not None
    return keys.Taken.into_values(name, known, theirs.hash_seed, new)


def _table(name: str) -> str:
    """The manifest's name of a table, which may be one for each branch."""
    return name.rpartition("/")[2]


def _matchings(names: list[str], new: Encoded, old: Encoded, world: World) -> dict[str, Matching]:
    """Of each table. Vocabularies are read through for it, so the ranks share the tables out."""
    error: UserError | None = None
    found: dict[str, Matching] = {}
    for name in names[world.rank :: world.world_size]:
        try:
            found[name] = matching(name, new, old)
        except UserError as cause:
            error = cause
            break
    world = world.without_limit()
    world.raise_together(error)
    return {name: match for some in world.gather(found) for name, match in some.items()}


@torch.no_grad()
def _copy_rows(name: str, shard: Tensor, rows: NDArray[np.int64], saved: SavedTensor) -> None:
    """Copy rows of a saved tensor, some at a time: row i of the shard from rows[i], where that is no -1.

    Raises:
        CheckpointError: a number is too large for the number format of the shard.
    """
    into = np.flatnonzero(rows >= 0)
    wanted = rows[into]
    if (wanted[1:] < wanted[:-1]).any():
        order = np.argsort(wanted, kind="stable")
        into, wanted = into[order], wanted[order]
    at_a_time = max(1, _PIECE_BYTES // max(1, 4 * int(np.prod(saved.size[1:]))))
    first = 0
    while first < len(wanted):
        start = int(wanted[first])
        last = int(np.searchsorted(wanted, start + at_a_time))
        block = saved.read(start, int(wanted[last - 1]) + 1)
        values = block[torch.from_numpy(wanted[first:last] - start)]
        rounded = values.to(shard.dtype)
        if rounded.dtype != values.dtype and not bool(rounded.isfinite().all()):
            raise CheckpointError(
                f"init_from: table '{name}' has {float(values.abs().max()):g}, which is beyond"
                f" {checkpoint.dtype_name(shard.dtype)}: choose another embeddings.dtype, or leave init_from out."
            )
        shard[torch.from_numpy(into[first:last]).to(shard.device)] = rounded.to(shard.device)
        first = last


@torch.no_grad()
def _take_network(
    session: Session,
    own: Mapping[str, Any],
    weights: Mapping[str, SavedTensor],
    state: Mapping[str, SavedTensor],
    source: Source,
) -> tuple[list[dict[str, str]], str]:
    """What became of each of the network's tensors; and of all of it: by name, or why nothing is taken."""
    names = [key.removeprefix(_NETWORK) for key in own if key.startswith(_NETWORK)]
    mine, theirs = session.config.model["name"], source.config.model["name"]
    if mine != theirs:
        return [], f"begins anew: the method is {mine} here, {theirs} there"
    new, old = _known(session.network, session.manifest), _known(_network_of(source), source.encoded.manifest)
    plans = layouts(session.network)
    chosen = {
        name: taken(plans[name], tuple(own[_NETWORK + name].shape), weights[_NETWORK + name].size, new, old)
        if _NETWORK + name in weights
        else Taken(why_not="the other run has none of this name")
        for name in names
    }
    for name in names:  # a counter of a module, such as of the batches that its statistics are of
        beside = [other for other in names if other.rpartition(".")[0] == name.rpartition(".")[0]]
        if own[_NETWORK + name].dim() == 0 and not all(chosen[other].whole for other in beside):
            chosen[name] = Taken(why_not="it counts for what is not taken as a whole")
    found, others = [], False
    for name, plan in chosen.items():
        key = _NETWORK + name
        if not plan.why_not:
            others = others or any(_of_parameter(own_key, name) and own_key not in state for own_key in own)
            plan.copy(weights[key].read(), own[key])
            for own_key in own:
                if own_key not in state or not _of_parameter(own_key, name):
                    continue
                if own[own_key].dim() == own[key].dim():
                    plan.copy(state[own_key].read(), own[own_key])
                elif plan.whole:  # counts steps: what is new in a parameter that is taken in part moves as in a new run
                    own[own_key].copy_(state[own_key].read())
        found.append({"name": name, "is": _IS[plan.whole, bool(plan.why_not)], "why": plan.why_not})
    return found, _WITHOUT_STATE if others else _BY_NAME


def _of_parameter(key: str, name: str) -> bool:
    """Whether a key of the optimizer's state is of this parameter, and not of one whose name begins with its name."""
    return key.startswith(f"{_NETWORK_STATE}{name}.") and "." not in key.removeprefix(f"{_NETWORK_STATE}{name}.")


def _network_of(source: Source) -> MultiTaskModel:
    """The other run's network, for what it is made for."""
    config = source.config
    spec = build_spec(config, source.encoded.manifest)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserAdvice)  # what there is to say of it was said to that run
        return method(config.model["name"])(spec, model_config(config.model, config.model_defaults, str(source.folder.config)))


def _known(network: MultiTaskModel, manifest: DatasetManifest) -> Known:
    scenarios = manifest.scenario.values if manifest.scenario and network.spec.num_scenarios > 1 else []
    return Known.of(network, scenarios, [feature.name for feature in manifest.dense_features])


def _tell(
    session: Session,
    source: Source,
    into: RunFolder,
    tables: list[TableTaken],
    parameters: list[dict[str, str]],
    network: str,
    weights: Mapping[str, SavedTensor],
) -> None:
    new, old = session.manifest, source.encoded.manifest
    multi_scenario = [config.dataset.setting is not Setting.MTL for config in (session.config, source.config)]
    scenarios = [m.scenario.values if m.scenario and used else [] for m, used in zip((new, old), multi_scenario, strict=True)]
    names: dict[str, tuple[list[str], list[str]]] = {
        "tasks": ([task.name for task in session.spec.tasks], _tasks(source)),
        "scenarios": (scenarios[0], scenarios[1]),
        "features": ([feature.name for feature in new.features], [feature.name for feature in old.features]),
    }
    kept = {table.table for table in tables}
    others = {key.removeprefix(_WEIGHTS).removesuffix(".weight") for key in weights if key.startswith(_WEIGHTS)}
    of_network = {key.removeprefix(_NETWORK) for key in weights if key.startswith(_NETWORK)}
    step = None if source.optimizer is None else checkpoint.step_of(source.optimizer)
    told: dict[str, Any] = {
        "run": str(source.folder.path),
        "step": int(source.state["step"]),
        "optimizer_state_of_step": step,
        "tables": [asdict(table) for table in tables],
        "dropped_tables": sorted(others - kept),
        "network": network,
        "parameters": parameters,
        "dropped_parameters": sorted(of_network - {parameter["name"] for parameter in parameters}),
        **{
            what: {
                "known": [name for name in mine if name in theirs],
                "new": [name for name in mine if name not in theirs],
                "dropped": [name for name in theirs if name not in mine],
            }
            for what, (mine, theirs) in names.items()
        },
        "encoded_otherwise": _encoded_otherwise(new, old),
    }
    write_atomically(into.init_from, json.dumps(told, indent=1, ensure_ascii=False))
    for line in _lines(told):
        logger.info("%s", line)
    if source.optimizer is None:
        logger.warning("init_from: %s has no whole checkpoint besides its best, so the optimizers begin anew", told["run"])
    for line in told["encoded_otherwise"]:
        logger.warning("note: init_from: %s: its numbers mean something else to what is taken", line)


def _lines(told: Mapping[str, Any]) -> list[str]:
    step, run = told["optimizer_state_of_step"], told["run"]
    state = "" if step is None else f", state of the optimizers of step {step}"
    lines = [f"init_from: weights of {run}, its best checkpoint, of step {told['step']}{state}"]
    headers = ["table", "rows", "taken", "new", "dropped", "matched", "optimizer state", ""]
    rows = [[*list(table.values())] for table in told["tables"]]
    if rows:
        lines.append(f"rows of tables:\n{tabulate(rows, headers=headers, disable_numparse=True)}")
    if told["dropped_tables"]:
        lines.append(f"tables that are dropped: {_listed(told['dropped_tables'])}")
    if told["network"] != _BY_NAME:
        lines.append(f"network: {told['network']}")
    if told["parameters"]:
        by_kind: dict[str, list[str]] = {"taken": [], "in part": [], "fresh": []}
        for parameter in told["parameters"]:
            why = f" ({parameter['why']})" if parameter["why"] else ""
            by_kind[parameter["is"]].append(parameter["name"] + why)
        lines.append(
            f"network: {len(by_kind['taken'])} tensors taken, {len(by_kind['in part'])} in part, {len(by_kind['fresh'])} fresh"
        )
        lines += [f"network, {kind}: {_listed(by_kind[kind])}" for kind in ("in part", "fresh") if by_kind[kind]]
    for what in ("tasks", "scenarios", "features"):
        changed = [f"{kind} {_listed(told[what][kind])}" for kind in ("new", "dropped") if told[what][kind]]
        if changed:
            lines.append(f"{what}: {len(told[what]['known'])} known, {', '.join(changed)}")
    return lines


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _tasks(source: Source) -> list[str]:
    return list(source.config.dataset.tasks or [task.name for task in source.encoded.manifest.tasks])


def _encoded_otherwise(new: DatasetManifest, old: DatasetManifest) -> list[str]:
    """Features of both whose numbers or ids are made otherwise, as by another range, and labels by another rule."""
    if new.encoding is None or old.encoding is None or not old.encoding.comparable(new.encoding):
        before, now = (manifest.preprocessing.get("dense_ranges") or {} for manifest in (old, new))
        return [
            f"feature '{name}', range: {now[name]} here, {before[name]} there"
            for name in now
            if before.get(name, now[name]) != now[name]
        ]
    pairs = [("feature", old.encoding.features, new.encoding.features), ("label", old.encoding.labels, new.encoding.labels)]
    return [
        f"{what} '{name}', {key}: {json.dumps(now[name].get(key))} here, {json.dumps(before[name].get(key))} there"
        for what, before, now in pairs
        for name in now
        if name in before
        for key in sorted(now[name].keys() | before[name].keys())
        if facts_digest(now[name].get(key)) != facts_digest(before[name].get(key))
    ]
