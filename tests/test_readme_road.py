"""The road that the README shows, from raw logs to a service, command by command."""

import json
import random
import re
import shlex
import signal
import sys
import time
import urllib.request
from pathlib import Path

import pandas as pd
import pytest
import yaml

from mmlrec.schema import DatasetManifest
from tests import processes

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SHOP = {
    "files": ["*.csv"],
    "features": {"user": {"kind": "id", "type": "int"}, "item": {"kind": "id"}, "price": {"kind": "number", "scale": "log"}},
    "tasks": [{"name": "click", "label": "click"}, {"name": "buy", "label": "buy"}],
    "keys": {"user": {"type": "int"}},
    "group_key": "user",
}


def write_log(path: Path, rows: int, seed: int, labels: bool = True) -> list[dict]:
    draw = random.Random(seed)
    records = []
    for _ in range(rows):
        user, item = draw.randrange(80), draw.randrange(30)
        click = int((user + item) % 3 > 0)
        record = {"user": user, "item": f"i{item}", "price": round(draw.lognormvariate(3, 1), 2)}
        records.append(record | ({"click": click, "buy": click * draw.randrange(2)} if labels else {}))
    path.parent.mkdir(parents=True)
    pd.DataFrame(records).to_csv(path, index=False)
    return records


def commands() -> list[list[str]]:
    section = README.partition("## From raw logs to a service")[2].partition("\n## ")[0]
    lines = re.findall(r"^    (python -m .*)$", section, re.MULTILINE)
    return [shlex.split(line)[1:] for line in lines] + [
        shlex.split(line)[1:] for line in re.findall(r"`(python -m apps.evaluate [^`]*)`", section)
    ]


def test_six_commands_from_raw_logs_to_a_service(tmp_path):
    write_log(tmp_path / "raw" / "sunday" / "views.csv", 3000, 0)
    new = write_log(tmp_path / "raw" / "monday" / "views.csv", 200, 1)
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump(SHOP, sort_keys=False))
    *road, serve, evaluate = commands()
    assert [command[1] for command in [*road, serve]] == [
        *("preprocessing", "apps.train", "preprocessing", "apps.predict", "apps.export", "apps.serve")
    ]
    for command in [*road, evaluate]:
        result = processes.run([sys.executable, *command], cwd=tmp_path, env=processes.environment())
        assert result.returncode == 0, f"{command}: {result.stderr}"
    assert "click" in result.stdout  # the metrics of the new rows
    scores = pd.read_parquet(tmp_path / "runs" / "shop" / "monday.parquet").sort_values("key.source_line")
    assert len(scores) == DatasetManifest.load(tmp_path / "data" / "monday").splits["test"].num_rows == 200
    service = processes.Command(
        [sys.executable, *serve, "--port", "0"], cwd=tmp_path, env=processes.environment(), log=tmp_path / "serve.log"
    )
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"ready: (http://\S+?:\d+)/", (tmp_path / "serve.log").read_text())):
            assert service.poll() is None, (tmp_path / "serve.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        rows = [{name: row[name] for name in ("user", "item", "price")} for row in new[:3]]
        asked = urllib.request.Request(f"{found[1]}/score", json.dumps({"rows": rows}).encode())
        with urllib.request.urlopen(asked, timeout=30) as answer:
            served = json.load(answer)["scores"]
        service.send_signal(signal.SIGTERM)
        assert service.wait(20) == 0
    finally:
        service.kill()
    for row, (_, score) in zip(served, scores.head(3).iterrows(), strict=True):
        assert row == {name: pytest.approx(score[name], abs=1e-6) for name in ("score.click", "score.buy")}
