import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.preprocessing.movielens_fake import write_movielens

ROOT = Path(__file__).parents[2]
REAL_DATA = Path(os.environ.get("MMLREC_REAL_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture
def real_data():
    """Folder of a real raw dataset by name; skips where it is absent."""

    def folder(name):
        if not (REAL_DATA / name).is_dir():
            pytest.skip(f"{REAL_DATA / name} is absent")
        return REAL_DATA / name

    return folder


@pytest.fixture
def command():
    """Run `python -m preprocessing ...` in a process of its own."""

    def run(*arguments, prelude=""):
        code = f"import sys\n{prelude}\nfrom preprocessing.command_line import main\nsys.exit(main(sys.argv[1:]))"
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120
        )

    return run


@pytest.fixture
def raw(tmp_path):
    return write_movielens(tmp_path / "raw")
