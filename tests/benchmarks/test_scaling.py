"""benchmarks.scaling: which points there are, that what is measured stays measured, and that plans are those of apps.plan."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from benchmarks.scaling import results
from benchmarks.scaling.__main__ import parse, words
from benchmarks.scaling.data import batches_of, described
from benchmarks.scaling.job import _Book, work
from benchmarks.scaling.page import write_page
from benchmarks.scaling.planned import Planner
from benchmarks.scaling.points import AXES, Point, points
from benchmarks.scaling.results import MEASURED, PLANNED, Row
from mmlrec.embeddings.hardware import host_memory
from mmlrec.errors import ConfigError, UserError
from tests import processes
from tests.processes import ROOT

GIB = 2**30
SMALL = ["--base=batch=64,ids=800", "--batch=", "--scenarios=", "--tasks=", "--planned-ranks=4", "--seconds=0.1"]


def test_one_axis_varies_at_a_time():
    base = Point(ranks=2)
    found = points(base, AXES)
    assert len(found) == len(set(found)) == 1 + 1 + 5 + 3 + 3 + 4  # base, weak, and of each axis those that are not the base
    for point in found:
        assert sum(getattr(point, axis) != getattr(base, axis) for axis in AXES) <= 1
    assert replace(base, batch=8192) in found
    assert len(points(Point(), AXES)) == 16


def test_a_job_gets_the_options_of_the_command_line():
    options = parse([*SMALL, "--ids=800,1e10", "--ranks=1", "--device=cpu", "--zipf=1.05", "--again", "model.name=ple"])
    again = parse(words(options))
    assert {**vars(again), "ranks": [1]} == vars(options)
    assert (again.ids, again.batch, again.base.batch) == ([800, 10**10], [], 64)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--base=batch=", "'batch' needs a number, such as batch=4096"),
        ("--base=ids", "'ids' needs a number"),
        ("--base=ids=15", "15 ids are too few"),
        ("--ids=1e5,15", "15 ids are too few"),
        ("--threads=0", "'0' is no whole number above 0"),
        ("--ranks-per-host=-1", "'-1' is no whole number above 0"),
        ("--seconds=-1", "'-1' is no number above 0"),
        ("--limit=0", "'0' is no number above 0"),
        ("--limit=inf", "'inf' is no number above 0"),
        ("--zipf=-1", "'-1' is no number of 0 or more"),
        ("--zipf=nan", "'nan' is no number of 0 or more"),
    ],
)
def test_what_no_point_can_have_is_refused(capsys, given, words):
    with pytest.raises(SystemExit) as stop:
        parse([given])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_batches_are_those_of_point_and_rank():
    point = Point(ranks=2, ids=8000, batch=100, scenarios=3, tasks=4)
    first, other = batches_of(point, 0, 2, 0.0), batches_of(point, 1, 2, 0.0)
    for batch in first:
        ids = batch.sparse.values()
        assert (batch.num_rows, batch.labels.shape, ids.shape) == (50, (50, 4), (400,))
        assert int(ids.min()) >= 1
        assert int(ids.max()) < 1000
        assert int(batch.scenario.max()) < 3
    assert not first[0].sparse.values().equal(other[0].sparse.values())
    assert first[1].sparse.values().equal(batches_of(point, 0, 2, 0.0)[1].sparse.values())


def measured(point):
    return Row(
        *(MEASURED, 2.5, 1000 * point.batch / 2.5, {"lookup": 1.0, "network": 1.5}, 0.75, 0.6, 0.5, 4096),
        *([1234567891] * point.ranks, [0.5 * GIB] * point.ranks, [1e6] * point.ranks, [1.01e6] * point.ranks),
    )


def keep_all(book, ranks, tmp_path):
    for number, point in enumerate(book.todo):
        result = tmp_path / "result.json"
        row = {name: value for name, value in vars(measured(point)).items() if name not in ("kind", "note") and value}
        result.write_text(json.dumps(row))
        book.keep(number, point, [(0, "")] * ranks, result, 1.0)


def test_what_is_measured_is_not_measured_again(tmp_path):
    options = parse([*SMALL, "--ids=800,1600,1e10", f"--out={tmp_path}"])
    book = _Book(options, "cpu", 2)
    assert [(point.ids, point.batch) for point in book.todo] == [(800, 64), (800, 128), (1600, 64)]
    book.keep(0, book.todo[0], [(0, ""), (2, "error: no such thing")], tmp_path / "none", 1.0)
    assert book.failed == 1
    book = _Book(options, "cpu", 2)
    assert len(book.todo) == 3, "a point that failed is tried again"
    keep_all(book, 2, tmp_path)
    before = results.read(tmp_path, 2)[1]
    assert [row.kind for row in before.values()] == [MEASURED, MEASURED, MEASURED, PLANNED]
    text = results.path_of(tmp_path, 2).read_text()
    assert _Book(options, "cpu", 2).todo == []
    assert results.path_of(tmp_path, 2).read_text() == text
    more = parse([*SMALL, "--ids=800,3200", f"--out={tmp_path}"])
    assert [point.ids for point in _Book(more, "cpu", 2).todo] == [3200]
    assert results.read(tmp_path, 2)[1].items() >= before.items(), "points that are not asked for stay"
    assert len(_Book(parse([*SMALL, "--ids=800", "--again", f"--out={tmp_path}"]), "cpu", 2).todo) == 2
    assert results.read(tmp_path, 2)[1].items() >= before.items(), "until they are measured again"
    for change, name in ((["--zipf=1"], "zipf"), (["--threads=2"], "threads"), (["model.name=ple"], "config")):
        with pytest.raises(ConfigError, match=rf"ranks-0002.csv holds results of {name}=.*another --out"):
            _Book(parse([*SMALL, "--ids=800", f"--out={tmp_path}", *change]), "cpu", 2)
    path = results.path_of(tmp_path, 2)
    path.write_text(path.read_text().replace("\n2,", "\ntwo,", 1))
    with pytest.raises(ConfigError, match=r"ranks-0002.csv, line 2: not as this release writes it"):
        _Book(options, "cpu", 2)


def test_points_that_do_not_fit_are_planned_here_and_where_they_would_fit(tmp_path):
    options = parse([*SMALL, "--ids=800,1e10", f"--out={tmp_path}", "embeddings.optimizer.name=rowwise_adagrad"])
    book = _Book(options, "cpu", 1)
    row = results.read(tmp_path, 1)[1][replace(options.base, ids=10**10)]
    assert (row.kind, row.step_ms) == (PLANNED, None)
    weights = 10**10 * (64 + 4)
    assert row.planned == pytest.approx(weights, rel=0.01)
    assert row.note == f"does not fit: {row.missing / GIB:.1f} GiB too many on a rank"
    usable = 0.85 * host_memory("MemTotal")
    assert row.missing == pytest.approx(row.planned - usable, rel=0.01)
    ((ranks, there),) = [
        (point.ranks, row) for point, row in results.all_rows(tmp_path)[1].items() if point.ids == 10**10 and not row.missing
    ]
    assert ranks & (ranks - 1) == 0
    assert weights / ranks <= usable < 2 * weights / ranks * 1.1, "the least number of ranks, by doubling"
    assert there.kind == PLANNED
    keep_all(book, 1, tmp_path)
    page = write_page(tmp_path).read_text()
    assert row.note in page
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    kinds = {(row[1], row[2]): row[0] for row in lines if len(row) == 15}
    assert kinds[("1", "8e+02")] == "measured"
    assert kinds[("1", "1e+10")] == kinds[(str(ranks), "1e+10")] == kinds[("4", "8e+02")] == "planned"
    for name in ("ranks", "ids", "axes", "memory"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert write_page(tmp_path).read_text() == page
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"README\.md is there, and of something else"):
        write_page(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("point", [Point(2, 10**6, 4096, 8, 3), Point(64, 10**10, 65536, 1, 16)], ids=["small", "huge"])
def test_planned_rows_are_those_of_apps_plan(point, tmp_path):
    (tmp_path / "tables.json").write_text(described(point).model_dump_json())
    key, memory = "embeddings.optimizer.name=rowwise_adagrad", 24 * GIB
    hosts = ["--hosts", str(point.ranks // 2), "--processes-per-host", "2", "--ram", f"{memory}B"]
    command = [
        sys.executable,
        "-m",
        "apps.plan",
        "--config",
        "scaling/synthetic",
        "--tables",
        str(tmp_path / "tables.json"),
        *hosts,
    ]
    command += ["--no-alternatives", "--json", str(tmp_path / "plan.json"), key, f"training.batch_size={point.batch}"]
    done = processes.run(command)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "plan.json").read_text())
    plan = Planner("scaling/synthetic", [key], "cpu", memory, 2).plan(point)
    ours = json.loads(json.dumps(plan.as_dict()))
    for name in ("hardware", "tables", "ranks", "step", "step_ms", "missing_bytes", "warnings"):
        assert ours[name] == told[name]


def test_steps_of_one_rank_are_planned_within_a_quarter_of_what_was_measured():
    """Of 1 to 16 tasks, 2 to 64 scenarios, 1k to 64k rows. Rates are the same for all; some were read from these results."""
    _, rows = results.read(ROOT / "docs/scaling/cpu", 1)
    measured_ms = {point: row.step_ms for point, row in rows.items() if row.kind == MEASURED}
    assert {point.tasks for point in measured_ms} >= {1, 16}
    assert {point.scenarios for point in measured_ms} >= {2, 64}
    planner = Planner("scaling/synthetic", [], "cpu", 24 * GIB, 2)
    planned_ms = {point: planner.plan(point).step_ms for point in measured_ms}
    assert planned_ms == {point: pytest.approx(ms, rel=0.25) for point, ms in measured_ms.items()}


def test_operations_of_a_plan_are_those_of_the_matrices():
    """Whatever multiplies them here: forward, at inputs and at weights, two for each number of a matrix."""
    plan = Planner("scaling/synthetic", ["model.name=shared_bottom"], "cpu", 24 * GIB, 1).plan(Point(scenarios=1))
    matrices = sum(weight.numel() for weight in plan.network.parameters() if weight.dim() > 1)
    assert plan.cost.operations == pytest.approx(6 * matrices, rel=0.01)


def test_a_row_meets_one_scenario_in_a_plan():
    planner = Planner("scaling/synthetic", [], "cpu", 24 * GIB, 1)
    few, many = (planner.plan(Point(scenarios=scenarios)).cost.operations for scenarios in (2, 64))
    assert 0 < few <= many < 1.1 * few


@pytest.mark.long
def test_a_run_that_is_killed_goes_on_behind_what_it_has_measured(tmp_path):
    command = [sys.executable, "-m", "benchmarks.scaling", *SMALL, "--ids=800,1600,2400", "--ranks=2", f"--out={tmp_path}"]

    def lines():
        path = results.path_of(tmp_path, 2)
        return [line for line in path.read_text().splitlines() if ",measured," in line] if path.is_file() else []

    first = subprocess.Popen(command, cwd=ROOT, start_new_session=True, env=processes.environment())
    while len(lines()) < 1 and first.poll() is None:
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    kept = lines()
    assert 1 <= len(kept) < 4
    done = subprocess.run(command, cwd=ROOT, env=processes.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"2 rank(s): {4 - len(kept)} points to measure" in done.stdout
    assert lines()[: len(kept)] == kept
    for row in results.read(tmp_path, 2)[1].values():
        assert row.sent == pytest.approx(row.formula, rel=0.05)
    assert (tmp_path / "README.md").is_file()


@pytest.mark.long
def test_the_local_preset_runs_it_as_a_job(tmp_path):
    options = [*SMALL, "--ids=", "--preset=local", f"--out={tmp_path}"]
    command = [sys.executable, "-m", "benchmarks.scaling", *options]
    done = subprocess.run(command, cwd=ROOT, env=processes.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = results.read(tmp_path, 2)[1]
    assert [(point.batch, row.kind) for point, row in rows.items()] == [(64, MEASURED), (128, MEASURED)]


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: no GPU is visible"):
        work(parse(["--device=cuda"]))


def test_a_preset_is_cut_to_numbers_of_ranks(monkeypatch):
    from benchmarks.scaling import __main__ as command

    sent = []

    def run(given, check):
        sent.append(given)
        return subprocess.CompletedProcess(given, 0)

    monkeypatch.setattr(command.subprocess, "run", run)
    monkeypatch.chdir(ROOT)
    command.submit(parse(["--preset=slurm-2n", "--ranks=4,8,16", "--out=runs/x", "model.name=ple"]))
    shapes = [(given[given.index("--nodes") + 1], given[given.index("--nproc") + 1]) for given in sent]
    assert shapes == [("1", "4"), ("1", "8"), ("2", "8")]
    for given in sent:
        assert given[1:4] == ["-m", "apps.launch", "scaling"]
        job = parse(given[given.index("--") + 1 :])
        assert (job.ranks_per_host, job.overrides) == (8, ["model.name=ple"])
    with pytest.raises(ConfigError, match="--ranks 12: no multiple of the 8 processes"):
        command.submit(parse(["--preset=slurm-2n", "--ranks=12"]))


def test_the_component_starts_this_benchmark_under_torchrun(tmp_path, capsys):
    from torchx.specs.builders import materialize_appdef

    from apps.components import scaling

    given = ["--preset", "slurm-2n", "--out", "runs/scaling", "--", "--batch", "4096", "model.name=ple"]
    (role,) = materialize_appdef(scaling, given).roles
    assert "-m mmlrec.launch.agent" in role.args[1]
    assert role.args[1].endswith("-m benchmarks.scaling --out runs/scaling --batch 4096 model.name=ple")
    assert (role.num_replicas, role.resource.gpu) == (2, 8)
    with pytest.raises(SystemExit):
        scaling(out="results", preset="kubernetes-2n")
    assert "error: results: on no writable mount" in capsys.readouterr().err
