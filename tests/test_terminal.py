"""Text from elsewhere commands no terminal: in whatever is printed, by every entry point."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from mmlrec.errors import DataError
from mmlrec.schema import DatasetManifest
from mmlrec.terminal import plain, plain_output
from preprocessing.command_line import main
from tests.datasets import write_dataset
from tests.preprocessing.table_fake import run, small
from tests.test_bad_input import CONFIG, app  # noqa: F401

ROOT = Path(__file__).parents[1]
ESCAPE = "\x1b]0;owned\x07\x1b[2J"
SHOWN = "\\x1b]0;owned\\x07\\x1b[2J"
COMMANDS = ("\x1b", "\x07", "\x9b", "\u202e", "\ud800")


def test_only_what_commands_is_written_otherwise():
    assert plain("straße, 漢字, 😀,\tand a line\n") == "straße, 漢字, 😀,\tand a line\n"
    assert plain(f"{ESCAPE}\r\x00\x85\u202e\ud800") == f"{SHOWN}\\r\\x00\\x85\\u202e\\ud800"
    assert plain(plain(ESCAPE)) == SHOWN


def test_streams_are_plain_within_and_themselves_again_after(capsys):
    before = sys.stdout, sys.stderr
    with contextlib.suppress(ZeroDivisionError), plain_output():
        print("a", ESCAPE)
        print("\r 50 %", end="", file=sys.stderr)
        sys.stderr.writelines(["\n", ESCAPE])
        print(1 / 0)
    assert (sys.stdout, sys.stderr) == before
    assert tuple(capsys.readouterr()) == (f"a {SHOWN}\n", f"\r 50 %\n{SHOWN}")


def test_a_bar_below_another_one_comes_back_to_its_line(monkeypatch):
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self):
            return True

    written = []
    for context in (contextlib.nullcontext, plain_output):
        monkeypatch.setattr(sys, "stderr", Terminal())
        with context(), tqdm(total=1, ncols=60, bar_format="{desc}{n_fmt}", desc="above") as above:
            with tqdm(total=1, ncols=60, bar_format="{desc}{n_fmt}", desc="below", leave=False) as below:
                below.update()
            above.update()
        written.append(sys.stderr.getvalue())
    assert "\x1b[A" in written[0]
    assert written[1] == written[0]


def test_what_an_encoding_lacks_is_written_otherwise(monkeypatch):
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, "ascii"))
    with plain_output():
        print("straße", "\ud800")
        sys.stdout.flush()
    assert content.getvalue() == b"stra\\xdfe \\ud800\n"


@pytest.fixture
def hostile(tmp_path):
    """A dataset whose terms, scenarios and groups of rows are made to command terminals."""
    written = write_dataset(tmp_path / "data", rows=200)
    path = written.folder / "manifest.json"
    content = json.loads(path.read_text())
    content["name"] = content["terms"] = f"be kind{ESCAPE}\u202e\x9b"
    content["statistics"] |= {"bad_rows": {f"a{ESCAPE}.csv": 1}, "passed_over": {"b.csv": {f"so{ESCAPE}": 2}}}
    path.write_text(json.dumps(content))
    return written.folder


def test_describe_prints_plainly(hostile, tmp_path, capsys):
    assert main(["describe", str(hostile), "--page", str(tmp_path / "page.html")]) == 0
    told = "".join(capsys.readouterr())
    assert f"Terms: be kind{SHOWN}" in told
    assert f"a{SHOWN}.csv" in told
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for text in (told, page):
        assert [command for command in COMMANDS if command in text] == []


def test_training_prints_the_terms_plainly(hostile, tmp_path, app):  # noqa: F811
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(dataset=hostile))
    code, error = app("train", "--config", config, "--run-dir", tmp_path / "run")
    assert code == 0, error
    assert f"terms of the data: be kind{SHOWN}" in error
    log = (tmp_path / "run/train.log").read_text(encoding="utf-8")
    assert f"terms of the data: be kind{SHOWN}" in log
    assert [command for text in (error, log) for command in COMMANDS if command in text] == []


def test_what_torchrun_prints_of_a_rank_is_plain(hostile, tmp_path, app, monkeypatch):  # noqa: F811
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    config = tmp_path / "config.yaml"
    shown = ESCAPE.encode("unicode_escape").decode()
    config.write_text(CONFIG.format(dataset=f'"{tmp_path}/no{shown}"'))
    assert app("train", "--config", config, "--run-dir", tmp_path / "run")[0] == 2
    told = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert f"no{SHOWN}" in told
    assert [command for command in COMMANDS if command in told] == []


def test_bad_cells_and_bad_configurations_are_quoted_plainly(tmp_path, capsys):
    rows = "".join(f"u{k % 3},{k},{k % 2}\n" for k in range(20))
    for cell, scenario in (
        (ESCAPE, {}),
        ("\u202e1", {}),
        ("1", {"scenario": {"column": "user", "values": ["u0", "u1", "u2"]}}),
    ):
        config = small(tmp_path, f"user,x,y\n{rows}{ESCAPE},{cell},1\n", **scenario)
        assert run(config, tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert "line 22: " in error
        assert [command for command in COMMANDS if command in error] == []
    config.write_text(config.read_text() + f'more: "{ESCAPE.encode("unicode_escape").decode()}"\n"\\x1b[2J": 1\n')
    assert run(config, tmp_path / "out") == 2
    assert "\\x1b[2J: unknown key" in (error := capsys.readouterr().err)
    assert "\x1b" not in error


def test_half_a_surrogate_pair_is_told(tmp_path):
    written = write_dataset(tmp_path / "data", rows=50)
    path = written.folder / "manifest.json"
    path.write_text(path.read_text().replace('"terms": ""', '"terms": "\\ud800"'))
    assert "\\ud800" in path.read_text()
    with pytest.raises(DataError, match=r"manifest\.json is damaged: .*surrogates not allowed"):
        DatasetManifest.load(written.folder)


def test_a_file_whose_name_is_no_text_is_told(tmp_path, capsys):
    config = small(tmp_path, files=["*.csv"])
    try:
        os.rename(os.fsencode(config.parent / "rows.csv"), os.fsencode(config.parent) + b"/caf\xe9.csv")
    except OSError:
        pytest.skip("this file system takes text only")
    assert run(config, tmp_path / "out") == 2
    assert "the name of a file, 'caf\\udce9.csv', is no UTF-8" in capsys.readouterr().err


def test_a_config_that_is_no_utf8_is_told(tmp_path, capsys):
    config = small(tmp_path)
    config.write_bytes(config.read_bytes() + b"terms: caf\xe9\n")
    assert run(config, tmp_path / "out") == 2
    assert "my_table.yaml: cannot be read: 'utf-8' codec can't decode" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["apps.models", "preprocessing"])
def test_entry_points_print_through_it(module):
    code = "import sys; from mmlrec import terminal\n"
    code += "terminal._PlainStream.write = lambda self, text: self._stream.write('seen\\n')\n"
    code += f"import runpy; sys.argv = ['x', '--help']; runpy.run_module('{module}', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert set(result.stdout.split("\n")) == {"seen", ""}, result.stderr


def test_all_entry_points_of_apps_run_alike():
    scripts = [path for path in (ROOT / "apps").glob("*.py") if "__main__" in path.read_text()]
    assert len(scripts) >= 5
    for path in scripts:
        assert path.read_text().endswith('if __name__ == "__main__":\n    run(main)\n'), path
