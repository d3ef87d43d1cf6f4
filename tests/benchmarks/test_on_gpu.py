"""benchmarks.gpu: what becomes of stages, the summary, and the whole command where there is no GPU."""

import json
import subprocess
import sys
import tarfile
import time

import pytest

from benchmarks import gpu
from benchmarks.gpu import Stage, Stages, speed_table, waits_of
from benchmarks.throughput import SHAPES
from mmlrec.errors import UserError
from tests.processes import ROOT

RATES = {"fp32": 1e12, "bf16": 2e12, "copy": 1e12}


def line(config, step_ms, waits=None):
    return {"config": config, "batches": 8, "step_ms": step_ms, "waits": waits, "distinct_ids": 0.5, "lookup_update_ms": 2.0}


def test_a_stage_that_fails_or_hangs_stops_no_other(tmp_path, capsys):
    stages = Stages(tmp_path, "cpu")
    child = tmp_path / "child"
    hangs = (  # with a process of its own that outlives it
        f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        f" open({str(child)!r}, 'w').write(str(p.pid)); print('begun', flush=True); time.sleep(60)"
    )
    stages.run(
        [
            Stage("fails", ["-c", "import sys; print('why'); sys.exit(3)"], 30),
            Stage("hangs", ["-c", hangs], 3),
            Stage("well", ["-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'] == '', os.getcwd())"], 30),
        ],
        time.monotonic() + 60,
    )
    assert [(ended.name, ended.code, ended.line) for ended in stages.ended] == [
        ("fails", 3, "why"),
        ("hangs", None, "begun"),
        ("well", 0, f"True {ROOT}"),
    ]
    state = subprocess.run(["ps", "-o", "stat=", "-p", child.read_text()], capture_output=True, text=True, check=False).stdout
    assert not state.strip() or state.startswith("Z")
    assert "out of time" in capsys.readouterr().out


def test_no_stage_begins_when_the_time_is_up(tmp_path):
    stages = Stages(tmp_path, "cpu")
    lanes = [[Stage(name, ["-c", "raise SystemExit"], 30)] for name in ("one", "two")]
    stages.together(lanes, time.monotonic() - 1)
    assert sorted((ended.name, ended.code, ended.line) for ended in stages.ended) == [
        ("one", None, "no time was left"),
        ("two", None, "no time was left"),
    ]


def test_what_is_measured_gets_its_time(tmp_path, monkeypatch, capsys):
    """A stage before it hangs, and may take longer than there is time."""
    monkeypatch.setattr(gpu, "first", lambda *_: [])
    monkeypatch.setattr(gpu, "tests", lambda _: [Stage("tests", ["-c", "import time; time.sleep(60)"], 60)])
    monkeypatch.setattr(gpu, "users_run", lambda *_: [])
    monkeypatch.setattr(gpu, "shapes_data", lambda *_: [])
    monkeypatch.setattr(gpu, "measured", lambda *_: [Stage("speed", ["-c", "print('measured')"], 60)])
    monkeypatch.setattr(sys, "argv", ["gpu", "--device=cpu", f"--out={tmp_path}", "--seconds=6"])
    with pytest.raises(UserError, match="failed: tests; see above"):
        gpu.main()
    ended = {each["name"]: each["code"] for each in json.loads((tmp_path / "results.json").read_text())["stages"]}
    assert ended == {"tests": None, "speed": 0}


def test_the_command_says_what_failed_and_leaves_three_files(tmp_path, monkeypatch, capsys):
    def stage(name, code):
        return Stage(name, ["-c", code], 30)

    found = [{"device": "H", "rates": RATES}, line("b-1024-fp32", 10.0)]
    printed = "; ".join(f"print({json.dumps(each)!r})" for each in found)
    monkeypatch.setattr(gpu, "first", lambda *_: [stage("first", "pass")])
    monkeypatch.setattr(gpu, "tests", lambda _: [stage("tests", "print('FAILED tests/x.py::y'); raise SystemExit(1)")])
    monkeypatch.setattr(gpu, "users_run", lambda *_: [stage("train", "print('trained')"), stage("left", "1 / 0")])
    monkeypatch.setattr(gpu, "shapes_data", lambda *_: [])
    monkeypatch.setattr(gpu, "measured", lambda *_: [stage("speed", printed)])
    monkeypatch.setattr(sys, "argv", ["gpu", "--device=cpu", f"--out={tmp_path}", "--skip=left"])
    with pytest.raises(UserError, match="failed: tests; see above"):
        gpu.main()
    said = capsys.readouterr().out
    assert "  FAILED tests/x.py::y" in said
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "tables.md", "logs.tar.gz"}
    results = json.loads((tmp_path / "results.json").read_text())
    assert {each["name"]: each["code"] for each in results["stages"]} == {"first": 0, "tests": 1, "train": 0, "speed": 0}
    assert results["speed"] == found
    assert "|       b |   1,024 |   fp32 |     102,400 |" in (tmp_path / "tables.md").read_text()
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        assert {"logs/tests.log", "logs/train.log", "logs/speed.log"} < set(archive.getnames())


def test_where_the_first_run_fails_its_traceback_is_shown_at_once_and_tests_alone_follow(tmp_path, monkeypatch, capsys):
    fails = Stage("first", ["-c", "def step(): return [][1]\nprint('begun'); step()"], 30)
    monkeypatch.setattr(gpu, "first", lambda *_: [fails])
    monkeypatch.setattr(gpu, "tests", lambda _: [Stage("tests", ["-c", "print('12 passed')"], 30)])
    for name in ("users_run", "shapes_data", "measured"):
        monkeypatch.setattr(gpu, name, lambda *_: [Stage("needs-a-training", ["-c", "1 / 0"], 30)])
    monkeypatch.setattr(sys, "argv", ["gpu", "--device=cpu", f"--out={tmp_path}"])
    with pytest.raises(UserError, match="failed: first; see above"):
        gpu.main()
    ended = {each["name"]: each["code"] for each in json.loads((tmp_path / "results.json").read_text())["stages"]}
    assert ended == {"first": 1, "tests": 0}
    before, _, behind = capsys.readouterr().out.partition("tests ")
    for said in (before, behind):
        assert "Traceback (most recent call last)" in said
        assert "IndexError: list index out of range" in said
        assert ", in step" in said


def test_of_several_tracebacks_the_first_is_the_cause_also_behind_what_torchrun_puts_before_lines():
    lines = ["note", "Traceback (most recent call last):", '  File "a.py", line 1, in a', "    a()", "ValueError: why", "more"]
    later = ["", "During handling of the above exception, another exception occurred:", "", lines[1], "  no", "KeyError: other"]
    said = "\n".join(f"[rank0]: {line}" for line in [*lines, *later])
    assert gpu.why(said)[:5] == [f"[rank0]: {line}" for line in lines[1:6]]
    assert not any("KeyError" in line for line in gpu.why(said))
    assert gpu.why("one\ntwo") == ["one", "two"]
    assert gpu.why("Traceback (most recent call last)\nE   assert 1\nFAILED a::b") == ["E   assert 1", "FAILED a::b"]


def test_a_stage_that_is_none_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu", "--device=cpu", f"--out={tmp_path}", "--skip=test"])
    with pytest.raises(UserError, match=r"--skip: no stage 'test'\. Stages: first_data, first, doctor, tests"):
        gpu.main()


def test_tables_have_what_was_measured_in_order_beside_floors():
    cases = [line("b-65536-bf16", 20.0, {"a.py:3": 2.0}), line("a-4096-fp32", 1.0, {"a.py:3": 0.2, "b.py:1": 1.0})]
    about, table = speed_table([{"device": "H", "rates": RATES}, *cases], "cuda")
    assert about == "H: matrix products 1 TFLOP/s fp32, 2 bf16; copy 1000 GB/s"
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()]
    assert rows[0][:5] == ["shape", "batch", "code", "samples/s", "step ms"]
    assert [row[:5] for row in rows[2:]] == [
        ["a", "4,096", "fp32", "4,096,000", "1.00"],
        ["b", "65,536", "bf16", "3,276,800", "20.00"],
    ]
    moved = 65536 * SHAPES["b"].lookup_bytes() / RATES["copy"]
    assert rows[3][rows[0].index("of copy rate")] == f"{1000 * moved / 2.0:.0%}"
    assert waits_of(cases) == {"a.py:3": {"b-65536-bf16": 2.0, "a-4096-fp32": 0.2}, "b.py:1": {"a-4096-fp32": 1.0}}
    assert speed_table([], "cuda") == ("", "")


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(UserError, match="no GPU is visible"):
        gpu.main()


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_whole_command_in_small(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--device=cpu", "--seconds=1100", "--skip=tests", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert [each["config"] for each in results["speed"][1:]] != []
    assert results["end_to_end"] > 0
    assert len(results["speed"]) == 1 + len(gpu.cases("cpu"))
    assert "copy" in (tmp_path / "tables.md").read_text()
