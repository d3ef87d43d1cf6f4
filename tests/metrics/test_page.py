"""The code of docs/metrics.md that compares methods, against sums in plain Python."""

import json
import random
import re
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

import pytest
from scipy.special import stdtr

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_comparison_of_methods_is_that_of_paired_seeds(tmp_path, monkeypatch):
    draw, aucs = random.Random(0), {}
    for number, method in enumerate(("shared_bottom", "mmoe", "ple")):
        for seed in range(5):
            folder = tmp_path / "runs" / method / f"seed{seed}"
            folder.mkdir(parents=True)
            of_seed = {task: 0.7 + 0.01 * number + 0.02 * draw.random() for task in ("click", "buy")}
            aucs[method, seed] = of_seed
            report = {"test": {"tasks": {task: {"auc": auc} for task, auc in of_seed.items()}}, "step": 1}
            (folder / "result.json").write_text(json.dumps(report))
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    session = {}
    exec(compile(code, "docs/metrics.md", "exec"), session)
    table = session["table"]
    assert len(table) == 6
    for method, task in table.index:
        found = [aucs[method, seed][task] for seed in range(5)]
        assert table.loc[(method, task), "mean"] == pytest.approx(mean(found))
        assert table.loc[(method, task), "std"] == pytest.approx(stdev(found))
        if method == "shared_bottom":
            assert table.loc[(method, task)].isna().sum() == 3
            continue
        apart = [auc - aucs["shared_bottom", seed][task] for seed, auc in enumerate(found)]
        t = mean(apart) / (stdev(apart) / sqrt(5))
        assert table.loc[(method, task), "difference"] == pytest.approx(mean(apart))
        assert table.loc[(method, task), "of which std"] == pytest.approx(stdev(apart))
        assert table.loc[(method, task), "p"] == pytest.approx(2 * stdtr(4, -abs(t)))
