import argparse
import json
from pathlib import Path

import torch

from benchmarks import reader
from benchmarks.reader import STAGES, compare, generate


def test_the_benchmark_measures_every_stage_of_what_it_generates(tmp_path, monkeypatch, capsys):
    generate(tmp_path, rows=5000, num_sparse=3, num_multi=1, num_dense=2, row_group_size=1024)
    options = {"dataset": tmp_path, "batch-size": 256, "epochs": 2, "threads": torch.get_num_threads()}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    monkeypatch.setattr("sys.argv", ["reader", "--measure", *words])
    reader.main()
    times = json.loads(capsys.readouterr().out)
    assert tuple(times) == STAGES
    assert all(len(epochs) == 2 and min(wall for wall, _ in epochs) > 0 for epochs in times.values())


def test_rounds_alternate_and_ratios_are_those_of_a_round(tmp_path, monkeypatch):
    generate(tmp_path, rows=5000, num_sparse=3, num_multi=1, num_dense=2, row_group_size=1024)
    measured = []

    def fake(checkout, folder, options):
        measured.append(checkout.name)
        # The machine halves its speed from round to round; the code after is four times as fast in training.
        slower = 2.0 ** ((len(measured) - 1) // 2)
        wall = dict.fromkeys(STAGES, 0.5) | {"training": 2.0 if checkout.name == "old" else 0.5, "decoding": 0.25}
        return {stage: [(slower * wall[stage], 0.01)] for stage in STAGES}

    monkeypatch.setattr(reader, "_measured", fake)
    options = argparse.Namespace(rounds=3)
    table = {tuple(row[:2]): row[2:] for row in compare(tmp_path, {"before": Path("old"), "now": Path("new")}, options)}
    assert measured == ["old", "new", "new", "old", "old", "new"]
    assert table["before", "training"] == ["1,250", "2.000", "0.12", "1.00"]
    assert table["now", "training"] == ["5,000", "2.000", "0.50", "4.00"]
    assert table["now", "sequential"] == ["5,000", "2.000", "0.50", "1.00"]
