"""What a run that begins with another one has before its first step: each row where its value is, each slice where its name is.

Expected is what plain loops find over values, names and tensors of both checkpoints, read with torch's own code.
"""

import functools
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from mmlrec.distributed.world import process_group
from tests.datasets import with_vocabularies, write_dataset
from tests.training import worker
from tests.training.launch import launch, tensors

CONFIG = """
dataset: {{path: {dataset}, setting: mtmsl}}
model: {{name: {model}}}
model_defaults: {{num_experts: 2, expert_hidden_units: [6], gate_hidden_units: [5], tower_hidden_units: [3]}}
embeddings: {{dim: 4, optimizer: {{name: {optimizer}}}}}
training: {{batch_size: 50, epochs: 1000, max_steps: 6, validate_every_steps: 2, patience: null, keep_checkpoints: 1}}
"""
MODELS = ("mmoe", "single_task")
OPTIMIZERS = {"mmoe": "adagrad", "single_task": "rowwise_adagrad"}
PLANS = ("table_wise", "row_wise")
BEFORE = {"tasks": ["click", "buy"], "scenarios": ["s0", "s1", "s2"], "fields": ["f0", "m0", "f1", "f2"]}
NOW = {"tasks": ["share", "buy", "click"], "scenarios": ["s2", "new", "s0", "s1"], "fields": ["f0", "f1", "f2", "f3"]}
HEAD, INPUT = "head", "input"
#: Tensor -> what its axes are made of, by hand.
AXES = {
    "mmoe": {
        "experts.weights.0": (None, INPUT, None),
        "experts.biases.0": (None, None),
        "gates.hidden.weights.0": (HEAD, INPUT, None),
        "gates.hidden.biases.0": (HEAD, None),
        "gates.weight": (HEAD, None, None),
        "towers.hidden.weights.0": (HEAD, None, None),
        "towers.hidden.biases.0": (HEAD, None),
        "towers.weight": (HEAD, None, None),
        "towers.bias": (HEAD,),
    },
    "single_task": {
        "networks.weights.0": (HEAD, INPUT, None),
        "networks.biases.0": (HEAD, None),
        "towers.hidden.weights.0": (HEAD, None, None),
        "towers.hidden.biases.0": (HEAD, None),
        "towers.weight": (HEAD, None, None),
        "towers.bias": (HEAD,),
    },
}


def labels(world, kind):
    if kind == HEAD:
        return [f"{task}:{scenario}" for task in world["tasks"] for scenario in world["scenarios"]]
    return [f"{field}/{column}" for field in world["fields"] for column in range(4)] + ["d0", "d1"]


def write(folder, world, rows, values):
    dataset = write_dataset(
        folder,
        rows=120,
        table_rows=rows,
        num_sparse=sum(field[0] == "f" for field in world["fields"]),
        num_multi=sum(field[0] == "m" for field in world["fields"]),
        tasks=tuple(world["tasks"]),
        num_scenarios=len(world["scenarios"]),
    )
    text = (folder / "manifest.json").read_text()
    for number in range(len(world["scenarios"])):
        text = text.replace(f'"s{number}"', f'"scenario {number}"')
    for number, name in enumerate(world["scenarios"]):
        text = text.replace(f'"scenario {number}"', f'"{name}"')
    (folder / "manifest.json").write_text(text)
    manifest = type(dataset.manifest).load(folder)
    dataset = type(dataset)(folder, manifest, dataset.tables)
    values = {name: values(name, table.num_rows - 1) for name, table in manifest.by_name.items() if values(name, 1)}
    return with_vocabularies(dataset, values), values


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two datasets: t0 has texts, t1 numbers, t2 ids that come as such; tm0 and t3 are of one of them only.

    Which values both know, and in which order, is drawn at random.
    """
    folder = tmp_path_factory.mktemp("begin")
    draw = np.random.default_rng(0)
    names = {kind: [f"{word}{i}" for i in draw.permutation(90)] for kind, word in (("t0", "ü"), ("tm0", "m"), ("t3", "n"))}

    def values(name, count):
        if name == "t1":
            return [int(value) * 10**12 for value in draw.choice(80, count, replace=False)]
        return None if name == "t2" else [str(value) for value in draw.choice(names[name], count, replace=False)]

    found = {}
    for name, world, rows in (("before", BEFORE, 29), ("now", NOW, 37)):
        found[name] = write(folder / f"{name}-data", world, rows, values)[1]
        for model in MODELS:
            optimizer = OPTIMIZERS[model]
            text = CONFIG.format(dataset=folder / f"{name}-data", model=model, optimizer=optimizer)
            (folder / f"{name}-{model}.yaml").write_text(text)
    assert 3 < len(set(found["before"]["t0"]) & set(found["now"]["t0"])) < 28
    (folder / "values.json").write_text(json.dumps(found))
    return folder


def config(root, name, model, plan, *overrides):
    return {"config": str(root / f"{name}-{model}.yaml"), "overrides": [f"embeddings.sharding={plan}", *overrides]}


def run_of(root, model, size, plan):
    return root / f"run-{model}-{size}-{plan}"


def trained(root, model, size, plan):
    return {
        "kind": "train",
        "name": "run",
        "run_dir": str(run_of(root, model, size, plan)),
        **config(root, "before", model, plan),
    }


def begun(root, model, size, plan, source):
    folder = root / f"begun-{model}-{size}-{plan}-{'-'.join(map(str, source))}"
    overrides = config(root, "now", model, plan, f"init_from={run_of(root, model, *source)}")
    return {"kind": "begin", "run_dir": str(folder), **overrides}


def fresh(root, model):
    return {"kind": "begin", "run_dir": str(root / f"fresh-{model}"), **config(root, "now", model, "table_wise")}


def here(actions):
    """On one rank, in this process."""
    with process_group() as world:
        for action in actions:
            Path(action["run_dir"]).mkdir(exist_ok=True)
            worker.run(action, world)


def table_expected(values, key, name, fresh, old):
    """Rows of a table or its state: those of the value, or fresh."""
    expected = fresh.clone()
    table = name.rpartition("/")[2]
    if old is None:
        return expected, 0
    before, now = values["before"].get(table), values["now"].get(table)
    if now is None:  # ids that are the values
        before, now = list(range(1, old.shape[0])), list(range(1, fresh.shape[0]))
    expected[0] = old[0]
    taken = 1
    for row, value in enumerate(now, start=1):
        if value in before:
            expected[row] = old[before.index(value) + 1]
            taken += 1
    return expected, taken


def network_expected(axes, fresh, old):
    """Entry by entry: of the entry with the same labels, or fresh."""
    expected = fresh.clone()
    names = [None if axis is None else (labels(NOW, axis), labels(BEFORE, axis)) for axis in axes]
    for place in np.ndindex(*fresh.shape):
        there = []
        for index, of in zip(place, names, strict=True):
            if of is None:
                there.append(index)
            elif of[0][index] in of[1]:
                there.append(of[1].index(of[0][index]))
        if len(there) == len(place):
            expected[place] = old[tuple(there)]
    return expected


@functools.cache
def kept(checkpoint):
    return tensors(checkpoint)


def check(root, model, size, plan, source):
    values = json.loads((root / "values.json").read_text())
    action = begun(root, model, size, plan, source)
    found, plain = tensors(Path(action["run_dir"]) / "begun"), kept(root / f"fresh-{model}" / "begun")
    run = run_of(root, model, *source)
    best, last = kept(run / "checkpoints" / "best"), kept(run / "checkpoints" / "step_000000006")
    told = json.loads((Path(action["run_dir"]) / "init_from.json").read_text())
    assert told["optimizer_state_of_step"] == 6
    assert told["step"] == json.loads((run / "checkpoints/best/state.json").read_text())["step"]
    tables = {table["table"]: table for table in told["tables"]}
    assert found.keys() == plain.keys()
    seen = 0
    for key, value in found.items():
        old = (best if key.startswith("model.") else last).get(key)
        if ".embedding_bags." in key:
            name = key.partition(".embedding_bags.")[2].partition(".weight")[0]
            expected, taken = table_expected(values, key, name, plain[key], old)
            of = tables[name]
            assert (of["taken"], of["new"]) == (taken, len(expected) - taken), name
            assert of["dropped"] == (0 if old is None else len(old) - taken)
            assert of["optimizer_state"] == ("taken" if taken else "fresh")
            seen += taken > 0
        else:
            assert key.startswith(("model.head.network.", "optimizer.dense.head.network.")), key
            name = key.partition(".head.network.")[2]
            if value.dim() == 0:  # steps of a parameter: those of one that is taken as a whole go on
                whole = not {HEAD, INPUT} & set(AXES[model][name.rpartition(".")[0]])
                expected = old if whole else plain[key]
            else:
                name = name if name in AXES[model] else name.rpartition(".")[0]
                expected = network_expected(AXES[model][name], plain[key], old)
                assert not (expected == plain[key]).all(), key
        assert (value == expected).all(), key
    assert seen >= 6  # t0, t1, t2 and their state


def cases(sources, sizes, models=MODELS):
    return [(model, size, plan, source) for model, source, size, plan in itertools.product(models, sources, sizes, PLANS)]


def test_every_row_is_where_its_value_is_and_every_slice_where_its_name_is(root):
    """Runs of one and two ranks, table-wise and row-wise; taken by one, two and three."""
    one, two = (1, "table_wise"), (2, "row_wise")
    sources = {"mmoe": [one, two], "single_task": [two]}
    here([trained(root, "mmoe", *one), *(fresh(root, model) for model in MODELS)])
    wanted = [case for model in MODELS for case in cases(sources[model], (1, 2, 3), [model])]
    wanted = [case for case in wanted if case[0] == "mmoe" or case[1:3] in ((1, "table_wise"), (2, "row_wise"))]
    at = {size: [begun(root, *case) for case in wanted if case[1] == size] for size in (1, 2, 3)}
    launch(2, [*(trained(root, model, *two) for model in MODELS), *at[2]], root / "launch")
    launch(3, at[3], root / "launch")
    here(at[1])
    for case in wanted:
        check(root, *case)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_every_number_of_ranks_and_every_plan_on_both_sides(root):
    sources = list(itertools.product((1, 2, 3), PLANS))
    for size in (1, 2, 3):
        actions = [trained(root, model, *source) for model in MODELS for source in sources if source[0] == size]
        launch(size, [action for action in actions if not Path(action["run_dir"]).exists()], root / "long")
    launch(1, [fresh(root, model) for model in MODELS], root / "long")
    wanted = cases(sources, (1, 2, 3))
    for size in (1, 2, 3):
        launch(size, [begun(root, *case) for case in wanted if case[1] == size], root / "long")
    for case in wanted:
        check(root, *case)
