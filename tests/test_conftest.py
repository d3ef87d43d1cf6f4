"""When tests see a GPU: a run of all of them must not, and one of those of a GPU must, in the processes that it starts, too."""

import subprocess
import sys

import pytest

from tests import processes
from tests.conftest import asks_for_gpu


@pytest.mark.parametrize(
    ("marks", "arguments", "asked"),
    [
        ("gpu", ["tests"], True),
        ("", ["tests/training/test_gpu.py"], True),
        ("", ["tests/training/test_gpu.py::test_one", "tests/training/test_gpu_methods.py"], True),
        ("not long and not gpu and not cluster", ["tests"], False),
        ("", ["tests/training/test_gpu.py", "tests/training/test_resume.py"], False),
        ("", [], False),
    ],
)
def test_a_gpu_is_seen_where_only_its_tests_are_asked_for(marks, arguments, asked):
    assert asks_for_gpu(marks, arguments) is asked


def test_where_there_is_a_gpu_processes_are_not_forked_from_one_that_has_asked_for_it(tmp_path):
    """As the server of forks has, which has imported fbgemm."""
    assert processes.START == "forkserver"
    script, starts = tmp_path / "script.py", tmp_path / "starts.py"
    script.write_text("import sys; print('fbgemm_gpu' in sys.modules)\n")
    starts.write_text(
        "import torch; torch.cuda.is_available = lambda: True\nimport sys\nfrom tests import processes\n"
        f"if __name__ == '__main__':\n    print(processes.run([sys.executable, {str(script)!r}]).stdout)\n"
    )
    command = [sys.executable, str(starts)]
    done = subprocess.run(command, env=processes.environment(), capture_output=True, text=True, check=False, cwd=processes.ROOT)
    assert done.stdout.split() == ["False"], done.stderr
