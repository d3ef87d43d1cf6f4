"""docs/serving.md: its commands and its Python run, or say what they need."""

import re
import subprocess
from pathlib import Path

import pytest

from tests import processes
from tests.serving.folders import DIM, ROWS, tables, write_model
from tests.serving.served import served

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for line in re.findall(r"^    (\S.*)$", PAGE.replace("```", "\n```"), re.MULTILINE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_model(folder / "model", tables("fp32", ROWS, DIM))
    return folder


def test_the_python_of_the_page_runs(folder, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(folder)
    exec(code, {})
    scores, columns, row = capsys.readouterr().out.splitlines()
    assert scores.count("score.buy") == 2
    assert "'price': RawColumn" in columns
    assert eval(row)["place"] == "home"


def test_the_commands_of_the_page_run(folder, tmp_path):
    (serve,) = [line for line in COMMANDS if "apps.serve" in line]
    assert serve == "python -m apps.serve --model model --port 8080"
    asked = [line for line in COMMANDS if line.startswith("curl")]
    with served(folder / "model", tmp_path / "log") as service:
        answers = [
            subprocess.run(
                ["bash", "-c", line.replace("8080", str(service.port))], capture_output=True, text=True, check=True
            ).stdout
            for line in asked
        ]
    for answer, words in zip(answers, ('"status": "ready"', '"score.buy"', "mmlrec_rows_total 1", "/score"), strict=True):
        assert words in answer


def test_the_page_names_the_options_that_there_are():
    told = processes.run([processes.sys.executable, "-m", "apps.serve", "--help"]).stdout
    for option in set(re.findall(r"`(--[a-z-]+)`", PAGE)):
        assert option in told
