"""Tables that are split over the ranks of one host: two pretend hosts of two ranks train like one process.

One launch on four ranks, one on two and one on one run all cases.
"""

import json
import os
import re
import signal
import sys
import time

import pyarrow.parquet as pq
import pytest
from torchrec import EmbeddingBagConfig

from mmlrec.config import EmbeddingsConfig
from mmlrec.embeddings.hardware import CPU, Hardware
from mmlrec.embeddings.sharding import make_plan, plan_report
from mmlrec.embeddings.tables import build_tables
from mmlrec.errors import ConfigError
from mmlrec.schema import DatasetManifest
from tests.datasets import with_vocabularies, write_dataset
from tests.processes import Command, run
from tests.training.launch import (
    free_port,
    launch,
    losses,
    rank_process,
    rows_of_steps,
    start_ranks,
    tensors,
    validations,
)

CONFIG = """
dataset: {{path: {dataset}, setting: mtmsl}}
model: {{name: shared_bottom, bottom_hidden_units: [12, 8], tower_hidden_units: [4]}}
embeddings: {{dim: 4, init_std: 0.1, sharding: table_row_wise}}
training: {{batch_size: 50, eval_batch_size: 100, max_steps: 10, patience: null, log_every_steps: 1}}
"""
SGD = ["embeddings.optimizer={name: sgd, lr: 0.05}", "dense.optimizer={name: sgd, lr: 0.05}"]
PLANS = ("table_wise", "table_row_wise", "row_wise")
CASES = {
    # The second epoch begins at step 10: the 9th batch has 37 rows, and 3 padding rows on 4 ranks.
    "adagrad": [],
    "rowwise-adagrad": ["embeddings.optimizer.name=rowwise_adagrad"],
    # Steps that leave ranks without a row.
    "tiny-batches": [*SGD, "training.batch_size=3"],
    "sum": ["dataset.path={root}/sum"],
    "beside-others": ["embeddings.table_sharding={t0: table_wise, tm0: row_wise}"],
    # Tables of 1, 2, 3 and 4 rows on hosts of 2 ranks.
    "smaller-than-a-host": ["dataset.path={root}/small"],
    "planned": ["embeddings.sharding=auto", "embeddings.plan={root}/plan.json"],
}


def planned():
    """A plan as files have it: two tables on the second host, two on the first."""
    sizes = {"t0": 30, "tm0": 31, "t1": 32, "t2": 33}
    hosts = {"t0": [2, 3], "tm0": [0, 1], "t1": [0, 1], "t2": [2, 3]}
    return [
        {"table": name, "rows": n, "dim": 4, "sharding": "table_row_wise", "ranks": hosts[name], "weight_bytes": 16 * n}
        for name, n in sizes.items()
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("hosts")
    rows = {"train": 437, "valid": 120, "test": 130}
    with_vocabularies(write_dataset(root / "data", rows=rows, table_rows=30, missing_labels=0.2))  # which can be exported
    write_dataset(root / "small", rows=rows, table_rows=1)
    written = write_dataset(root / "sum", rows=rows, table_rows=30).folder
    manifest = DatasetManifest.load(written)
    features = [f.model_copy(update={"pooling": "sum"}) if f.kind == "multi" else f for f in manifest.features]
    manifest.model_copy(update={"features": features}).save(written)
    (root / "plan.json").write_text(json.dumps(planned()))
    config = root / "config.yaml"
    config.write_text(CONFIG.format(dataset=root / "data"))

    def action(kind, run_dir, *overrides, name="all", **more):
        filled = [text.replace("{root}", str(root)) for text in overrides]
        return {"kind": kind, "name": name, "config": str(config), "overrides": filled, "run_dir": str(run_dir), **more}

    def train(run_dir, *overrides, name="all"):
        return action("train", run_dir, *overrides, name=name)

    def resharded(source, target, output):
        return action("reshard", root / source, f"embeddings.sharding={target}", output=str(root / output))

    hosts = [train(root / "hosts" / case, *overrides) for case, overrides in CASES.items()]
    # Each placement trains, and its checkpoint is read and written under each other; then on one host, and by one process.
    hosts += [train(root / plan, f"embeddings.sharding={plan}", "training.max_steps=7") for plan in PLANS]
    hosts += [resharded(a, b, f"{a}-{b}") for a in PLANS for b in PLANS if a != b]
    hosts += [action("evaluate", root / "hosts" / "adagrad", output=str(root / "evaluated-4.json"))]
    hosts += [train(root / "moved", "training.max_steps=4", name="first")]
    launch(4, hosts, root / "four", hosts=2)
    two = [resharded("table_row_wise", "table_row_wise", "on-two")]
    two += [train(root / "moved", "training.max_steps=8", "embeddings.sharding=auto", name="second")]
    two += [action("predict", root / "hosts" / "adagrad", output=str(root / "scores-2.parquet"))]
    launch(2, two, root / "two")
    one = [train(root / "one" / case, *(text for text in overrides if "plan" not in text)) for case, overrides in CASES.items()]
    one += [resharded("table_row_wise", "row_wise", "on-one")]
    one += [action("evaluate", root / "hosts" / "adagrad", output=str(root / "evaluated-1.json"))]
    one += [action("predict", root / "hosts" / "adagrad", output=str(root / "scores-1.parquet"))]
    one += [train(root / "moved", "training.max_steps=12", "embeddings.sharding=table_row_wise", name="third")]
    one += [train(root / "uninterrupted", "training.max_steps=12")]
    launch(1, one, root / "one-process")
    return root


def flat(value, prefix=""):
    """The numbers of a report, by their place in it."""
    if isinstance(value, dict):
        return {key: number for name, inner in value.items() for key, number in flat(inner, f"{prefix}/{name}").items()}
    return {} if isinstance(value, str | list) else {prefix: value}


@pytest.mark.parametrize("case", CASES)
def test_two_hosts_train_like_one_process(runs, case):
    expected, found = losses(runs / "one" / case), losses(runs / "hosts" / case)
    assert list(found) == list(expected) == list(range(1, 11))
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-5, abs=1e-5), f"step {step}"
    assert rows_of_steps(runs / "hosts" / case, "all", 4) == rows_of_steps(runs / "one" / case, "all", 1)
    weights, of_hosts = (tensors(runs / side / case / "checkpoints/step_000000010") for side in ("one", "hosts"))
    assert of_hosts.keys() == weights.keys()
    for key, value in weights.items():
        if key.startswith("model."):
            assert of_hosts[key].numpy() == pytest.approx(value.numpy(), rel=1e-5, abs=1e-5), key
    tested, of_hosts = (json.loads((runs / side / case / "result.json").read_text())["test"] for side in ("one", "hosts"))
    assert flat(of_hosts) == pytest.approx(flat(tested), rel=1e-5, abs=1e-5)
    assert flat(validations(runs / "hosts" / case)[-1]["report"]) == pytest.approx(
        flat(validations(runs / "one" / case)[-1]["report"]), rel=1e-5, abs=1e-5
    )


def test_the_tables_lay_where_they_should(runs):
    def placed(case):
        plan = json.loads((runs / "hosts" / case / "plan.json").read_text())
        return {table["table"]: (table["sharding"], table["ranks"]) for table in plan}

    for case in ("adagrad", "rowwise-adagrad", "tiny-batches", "sum"):
        assert {sharding for sharding, _ in placed(case).values()} == {"table_row_wise"}
        assert {tuple(ranks) for _, ranks in placed(case).values()} == {(0, 1), (2, 3)}
    assert placed("planned") == {table["table"]: ("table_row_wise", table["ranks"]) for table in planned()}
    assert [placed("beside-others")[name][0] for name in ("t0", "tm0", "t1", "t2")] == [*PLANS[::2], *PLANS[1:2] * 2]
    # Of one row each rank of a host cannot have one.
    assert [placed("smaller-than-a-host")[name][0] for name in ("t0", "tm0", "t1", "t2")] == ["table_wise", *PLANS[1:2] * 3]


@pytest.mark.parametrize("after", [*(f"{a}-{b}" for a in PLANS for b in PLANS if a != b), "on-two", "on-one"])
def test_checkpoints_move_between_all_placements(runs, after):
    plan = "table_row_wise" if after.startswith("on-") else after.partition("-")[0]
    before, moved = tensors(runs / plan / "checkpoints/step_000000007"), tensors(runs / after)
    assert before.keys() == moved.keys()
    rows = {key: value for key, value in before.items() if "embedding_bags" in key}
    assert len([key for key in rows if key.endswith("momentum1")]) == len(rows) // 2 == 4  # tables, each with its state
    assert all(value.abs().sum() > 0 for value in rows.values())
    for key, value in before.items():
        assert moved[key].equal(value), key


def test_a_run_goes_on_on_one_host_and_in_one_process(runs):
    expected, found = losses(runs / "uninterrupted"), losses(runs / "moved")
    assert list(found) == list(expected) == list(range(1, 13))
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-5, abs=1e-5), f"step {step}"


def test_what_two_hosts_trained_is_measured_scored_and_exported_elsewhere(runs, tmp_path):
    one, four = (json.loads((runs / f"evaluated-{ranks}.json").read_text()) for ranks in (1, 4))
    assert flat(four) == pytest.approx(flat(one), rel=1e-6)
    scores = [pq.read_table(runs / f"scores-{ranks}.parquet").to_pandas() for ranks in (1, 2)]
    assert len(scores[0]) == 130
    assert scores[0].columns.tolist() == scores[1].columns.tolist()
    for name, values in scores[0].items():
        near = pytest.approx(values.tolist(), rel=1e-6, nan_ok=True) if values.dtype.kind == "f" else values.tolist()
        assert scores[1][name].tolist() == near, name
    command = ["-m", "apps.export", "--run-dir", str(runs / "hosts" / "adagrad"), "--out", str(tmp_path / "model")]
    done = run([sys.executable, *command], timeout=300)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert (tmp_path / "model" / "model.json").is_file()


ROWS = (1, 2, 3, 4, 5, 7, 9, 1000)


def plan_of(hardware, **options):
    """The plan of tables t1, t2, ... that are named after their rows, and its report."""
    configs = [EmbeddingBagConfig(name=f"t{n}", embedding_dim=4, num_embeddings=n, feature_names=[f"f{n}"]) for n in ROWS]
    tables = build_tables(configs)
    plan = make_plan("tables", tables, EmbeddingsConfig(**options), hardware, batch_size=8)
    return plan.plan["tables"], plan_report(plan, "tables", tables, "adagrad")


@pytest.mark.parametrize(("world_size", "each"), [(4, 2), (6, 3), (16, 8), (8, 8), (3, 1), (1, 1)])
@pytest.mark.parametrize("sharding", ["table_row_wise", "auto"])
def test_every_rank_of_a_host_has_rows(world_size, each, sharding):
    plan, report = plan_of(Hardware(world_size, each, "cpu", 2**30, CPU), sharding=sharding)
    for table in report:
        shards = plan[table["table"]].sharding_spec.shards
        assert min(shard.shard_sizes[0] for shard in shards) > 0
        assert sum(shard.shard_sizes[0] for shard in shards) == table["rows"]
        if table["sharding"] == "table_row_wise":
            assert table["ranks"] == list(range(table["ranks"][0], table["ranks"][0] + each))
            assert table["ranks"][0] % each == 0
            assert {plan[table["table"]].compute_kernel} == {"fused"}
        if sharding == "table_row_wise":
            fits = -(-table["rows"] // each) * (each - 1) < table["rows"]
            assert table["sharding"] == ("table_row_wise" if fits else "table_wise"), table
        elif each in (1, world_size):
            assert table["sharding"] != "table_row_wise"  # A host is a rank, or all of them.


def test_what_hosts_do_not_allow_is_refused():
    with pytest.raises(ConfigError, match=r"table_sharding.t4: too few rows to give each of 3 ranks of a host some"):
        plan_of(Hardware(6, 3, "cpu", 2**30, CPU), table_sharding={"t4": "table_row_wise"})
    for uneven in (Hardware(5, 3, "cpu", 2**30, CPU), Hardware(6, 3, "cpu", 2**30, CPU, equal_hosts=False)):
        with pytest.raises(ConfigError, match=r"table_sharding.t5: table_row_wise .* hosts with different numbers of ranks"):
            plan_of(uneven, table_sharding={"t5": "table_row_wise"})
        _, report = plan_of(uneven)
        assert "table_row_wise" not in {table["sharding"] for table in report}


def endless(folder, timeout=60):
    """A training of tables that are split within hosts, which goes on until it is ended; returns its configuration."""
    write_dataset(folder / "data", rows=640, table_rows=30)
    config = folder / "config.yaml"
    keys = f"epochs: 100000, max_steps: null, checkpoint_every_steps: 10, timeout: {timeout}"
    config.write_text(CONFIG.format(dataset=folder / "data").replace("max_steps: 10", keys))
    return ["-m", "apps.train", "--config", str(config), "--run-dir", str(folder / "run")]


def wait_for_step(folder, step, logs):
    deadline = time.monotonic() + 240
    while not (folder / "run/metrics.jsonl").exists() or max(losses(folder / "run"), default=0) < step:
        assert time.monotonic() < deadline, "\n".join(log.read_text()[-3000:] for log in logs)
        time.sleep(0.2)


@pytest.mark.long
def test_a_stopped_rank_of_another_host_is_named_within_the_timeout(tmp_path):
    """Ranks wait for it in the groups of a host, and in those of one rank of each host."""
    logs = [tmp_path / f"{rank}.log" for rank in range(4)]
    ranks = start_ranks([sys.executable, *endless(tmp_path, timeout=4)], logs, hosts=2)
    try:
        wait_for_step(tmp_path, 5, logs)
        time.sleep(2)
        ranks[3].send_signal(signal.SIGSTOP)
        start = time.monotonic()
        assert [rank.wait(90) for rank in ranks[:3]] == [1, 1, 1]
        assert time.monotonic() - start < 4 + 40
    finally:
        for rank in ranks:
            rank.kill()
    errors = [line for log in logs for line in log.read_text().splitlines() if line.startswith("error:")]
    assert len(errors) == 1, errors
    assert re.match(r"error: rank 3 \(process \d+ on \S+\) has not answered for 4 s \(training.timeout\)", errors[0])


@pytest.mark.long
def test_agents_of_two_hosts_start_it_again_in_place(tmp_path):
    """The hosts are those that the agents name; new ranks have new groups."""
    port, logs, agents = free_port(), [tmp_path / "log0", tmp_path / "log1"], []
    options = ["--nnodes", "2", "--nproc-per-node", "2", "--max-restarts", "1", "--rdzv-id", "test", "--tee", "3"]
    options += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    train = endless(tmp_path)
    for number, log in enumerate(logs):
        host = ["--rdzv-conf", f"is_host={int(number == 0)}"]
        agents.append(Command([sys.executable, "-m", "mmlrec.launch.agent", *options, *host, *train], log=log))
    try:
        wait_for_step(tmp_path, 25, logs)
        killed_at = max(losses(tmp_path / "run"))
        os.kill(rank_process(tmp_path / "run", 3), signal.SIGKILL)
        wait_for_step(tmp_path, killed_at + 25, logs)
        for agent in agents:
            agent.send_signal(signal.SIGTERM)
        assert [agent.wait(120) for agent in agents] == [85, 85], logs[0].read_text()
    finally:
        for agent in agents:
            agent.kill()
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert {table["sharding"] for table in plan} == {"table_row_wise"}
    assert {tuple(table["ranks"]) for table in plan} == {(0, 1), (2, 3)}
    starts = re.findall(r"(new run|resumed) .*at step (\d+) of", (tmp_path / "run/train.log").read_text())
    assert [how for how, _ in starts] == ["new run", "resumed"]
