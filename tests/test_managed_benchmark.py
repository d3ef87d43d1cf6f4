"""The benchmark of managed tables runs, and writes what it shows."""

import csv
import json
import sys

import pytest

from benchmarks import managed


@pytest.mark.long
def test_each_way_is_measured_on_each_day_but_the_first(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.json"
    arguments = ["--size", "tiny", "--seeds", "0,1", "--ways", "vocabulary,hash,lru", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["managed", *arguments, "--work-dir", str(tmp_path / "work")])
    managed.main()
    results, lines = json.loads(out.read_text()), list(csv.DictReader(out.with_suffix(".csv").open()))
    assert [(result["way"], result["seed"]) for result in results] == [
        (way, seed) for seed in (0, 1) for way in ("vocabulary", "hash", "lru")
    ]
    assert all(len(result["auc"]) == 2 and 0.5 < min(result["auc"]) < max(result["auc"]) < 0.8 for result in results)
    assert [float(line["next_day_auc"]) for line in lines] == pytest.approx([a for r in results for a in r["auc"]], abs=1e-6)
    assert all(bool(line["without_slot"]) == (line["way"] == "lru") for line in lines)
    shown = capsys.readouterr().out
    assert "| lru" in shown.splitlines()[-2]
    assert "distinct ids in train" in shown
