"""docs/cluster.md: its commands run, or say what they need; its table has all keys of a preset."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mmlrec.launch.presets import Preset
from tests.processes import ROOT, environment

PAGE = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (\S.*)$", PAGE, re.MULTILINE)
NEEDS = r"\s+# needs (Slurm|Kubernetes|a container engine)$"


def test_every_key_of_a_preset_is_explained():
    (section,) = re.findall(r"^## Presets.*?(?=^## )", PAGE, re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == Preset.model_fields.keys()


def test_marked_commands_name_files_that_are_here():
    marked = [command for command in COMMANDS if re.search(NEEDS, command)]
    assert len(marked) >= 8
    for command in marked:
        for path in re.findall(r"\b(?:deploy|configs)/\S+", command):
            assert (ROOT / path).is_file(), path


@pytest.mark.long
def test_all_other_commands_run(tmp_path):
    for name in ("configs", "apps"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    others = [command for command in COMMANDS if not re.search(NEEDS, command)]
    assert len(others) >= 10
    for command in others:
        done = subprocess.run(
            shlex.split(command),
            cwd=tmp_path,
            env=environment(PATH=path),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "runs/b/scores.parquet").is_file()
    assert (tmp_path / "runs/c/result.json").is_file()
