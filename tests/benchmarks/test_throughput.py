"""Resident batches: the steps are the trainer's, the floors those of the shape, and a device that is not there is refused.

And what `benchmarks.throughput` makes of the figures of a run.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from tempfile import TemporaryDirectory
from unittest import mock

import pytest
import torch
from torchrec import KeyedJaggedTensor

from benchmarks import throughput
from benchmarks.resident import ResidentSteps, distinct
from benchmarks.throughput import SHAPES, Shape, resident_row
from mmlrec.distributed.world import process_group
from mmlrec.registry import load
from mmlrec.session.session import build_session
from tests import processes
from tests.datasets import write_dataset
from tests.processes import ROOT

CONFIG = "dataset: {{path: {0}, setting: mtl}}\nmodel: {{name: {1}}}\ntraining: {{batch_size: 32, max_steps: 6, epochs: 1}}\n"
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.fixture
def config(tmp_path):
    write_dataset(tmp_path / "data", rows=200)
    (tmp_path / "config.yaml").write_text(CONFIG.format(tmp_path / "data", "shared_bottom"))
    return tmp_path / "config.yaml"


@pytest.mark.parametrize("method", ["shared_bottom", "single_task"])  # one with tables of its own for each branch
def test_resident_steps_are_those_of_a_reader(config, tmp_path, method, monkeypatch):
    """The same weights to the bit, whether batches come from the reader or are kept, in windows of any length."""
    for key in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    config.write_text(CONFIG.format(tmp_path / "data", method))
    with process_group() as world:
        read = build_session(load(str(config), []), world, for_training=True)
        read.model.train()
        feed = read.prepare(read.reader("train").epoch(0), training=True)
        for _ in range(6):
            read.pipeline.progress(feed)
        kept = build_session(load(str(config), []), world, for_training=True)
        source = kept.reader("train").epoch(0)
        steps = ResidentSteps(kept, [next(source) for _ in range(6)])
        steps.train(2)
        assert steps.seconds(3) > 0
        steps.train(1)
        for one, other in zip(read.network.parameters(), kept.network.parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_the_command_measures_steps_and_tables_alone(config, tmp_path, device):
    """Of two configurations, one after the other in one process."""
    other = tmp_path / "other.yaml"
    other.write_text(config.read_text().replace("batch_size: 32", "batch_size: 50"))
    command = [sys.executable, "-m", "benchmarks.resident", "--config", str(config), "--config", str(other)]
    command += ["--device", device, "--steps", "2", "--profiles", str(tmp_path / "profiles")]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    done = processes.run(command, env=processes.environment(**hidden))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [found["config"] for found in lines] == ["config", "other"]
    assert [found["batches"] for found in lines] == [6, 4]  # 200 rows: the seventh of 32 would be padded
    for found in lines:
        assert found["lookup_update_ms"] > 0
        assert found["step_ms"] > 0
        assert (found["waits"] is None) == (device == "cpu")
        table = (tmp_path / "profiles" / f"{found['config']}.txt").read_text()
        assert table.startswith("5 steps")
        assert "aten::" in table


def test_distinct_ids_are_those_of_a_feature():
    """Two features of three rows: 7, 7, 7 and 7, 8, 8."""
    sparse = KeyedJaggedTensor.from_lengths_sync(["a", "b"], torch.tensor([7, 7, 7, 7, 8, 8]), torch.ones(6, dtype=torch.int32))
    assert distinct(mock.Mock(sparse=sparse)) == 3 / 6


def test_two_configurations_of_one_name_are_refused(config, tmp_path):
    (tmp_path / "more").mkdir()
    other = shutil.copy(config, tmp_path / "more")
    command = [sys.executable, "-m", "benchmarks.resident", "--config", str(config), "--config", str(other), "--device", "cpu"]
    done = processes.run(command)
    assert done.returncode == 2
    assert "two files of one name" in done.stderr


def test_a_device_that_is_not_there_is_refused(config):
    environment = processes.environment(CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "-m", "benchmarks.resident", "--config", str(config), "--device", "cuda"]
    done = processes.run(command, env=environment)
    assert done.returncode == 2
    assert "error: --device cuda: this process sees cpu only." in done.stderr
    done = processes.run([sys.executable, "-m", "benchmarks.throughput", "--device", "cuda"], env=environment)
    assert done.returncode == 1
    assert "error: --device cuda: no GPU is visible." in done.stderr


def test_floors_by_hand():
    """One feature of width 4 and no numbers: experts 2 * 4 (4 * 256 + 256 * 128), two gates, two towers; 96 bytes a row."""
    shape = Shape(1, 0, 4, "10", 1, 1)
    forward = 2 * (4 * (4 * 256 + 256 * 128) + 2 * (4 * 64 + 64 * 4 + 4 * 128) + 2 * (128 * 64 + 64))
    found = {"step_ms": 20.0, "lookup_update_ms": 4.0, "waits": None, "distinct_ids": 0.25}
    rates = {"fp32": 1.0, "bf16": 3e5 * forward, "copy": 96e6}
    row = resident_row("x", "bf16", found, shape, 1000, rates)
    assert row == ["x", "bf16", "50,000", "20.00", "10.00", "4.00", "1.00", "25%", "55%", "25%", ""]
    assert resident_row("x", "bf16", found | {"waits": {"a.py:1": 2.0, "b.py:7": 0.5}}, shape, 1000, rates)[-1] == "2.5"


def test_windows_have_the_rows_of_the_usual_batch():
    batches = (1024, 4096, 65536, 10**6)
    assert [throughput._window(SHAPES["b"], batch, "cpu", on_gpu=12) for batch in batches] == [60, 15, 2, 2]
    assert [throughput._window(SHAPES["b"], batch, "cuda", on_gpu=12) for batch in batches] == [60, 15, 12, 12]


@pytest.mark.long
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_both_tables_are_printed(device, monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "a", replace(SHAPES["a"], steps=2))
    monkeypatch.chdir(ROOT)
    with TemporaryDirectory() as folder:
        given = ["--shapes=a", "--rounds=1", "--rows=20000", "--no-baseline", "--batch=2048", f"--device={device}"]
        monkeypatch.setattr(sys, "argv", ["throughput", *given, "--threads=1", f"--work-dir={folder}"])
        throughput.main()
    said = capsys.readouterr().out
    assert "End to end" in said
    assert "Resident batches" in said
    assert said.count("measured: a fp32") == said.count("measured: a bf16") == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_scaling_measures_on_a_gpu(tmp_path):
    options = ["--base=batch=64,ids=800", "--ids=", "--batch=", "--scenarios=", "--tasks=", "--planned-ranks=", "--seconds=0.1"]
    command = [sys.executable, "-m", "benchmarks.scaling", *options, "--device=cuda", "--ranks=1", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    from benchmarks.scaling import results

    ((point, row),) = results.read(tmp_path, 1)[1].items()
    assert (point.batch, row.kind) == (64, "measured")
    assert row.lookup_update_ms
    assert row.bare_ms
    assert row.resident


def test_start_up_is_what_comes_before_the_first_step_and_what_the_first_window_takes_longer():
    # Windows of 100 rows: 10 s, then 5 s each; the first step began 4 s after the process.
    assert throughput._speed(started=5.0, first_step=9.0, windows=[10.0, 20.0, 20.0, 25.0], rows=100) == (20.0, 9.0)
    # A first window that is no slower takes nothing away.
    assert throughput._speed(started=5.0, first_step=9.0, windows=[40.0, 20.0, 20.0], rows=100) == (20.0, 4.0)


def test_the_floor_counts_the_fastest_product_at_hand(monkeypatch):
    def seconds_of(work, device, calls=1):
        return 0.001 if work.func is throughput.at_input else 0.004

    monkeypatch.setattr(throughput, "seconds_of", seconds_of)
    threads = torch.get_num_threads()
    try:
        assert throughput.rates(1)["fp32"] == pytest.approx(2 * throughput.BATCH * 512 * 1024 / 0.001)
    finally:
        torch.set_num_threads(threads)


def test_other_forms_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for given, message in (
        (["bf16,fp8"], "--apart bf16,fp8: choose of bf16,compiled"),
        (["compiled", "--device", "cuda"], "--apart compiled: the baseline is code for CPUs"),
    ):
        monkeypatch.setattr("sys.argv", ["throughput", "--apart", *given])
        with pytest.raises(SystemExit):
            throughput.main()
        assert message in capsys.readouterr().err


def test_what_is_compared_waits_for_cores_alike(monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    seen = []

    def run(command, **options):
        seen.append(options["env"].get("GOMP_SPINCOUNT"))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    throughput._run(["benchmarks.baseline"], 1)
    throughput._run(["apps.train"], 1)
    assert seen == ["10000"] * 2
