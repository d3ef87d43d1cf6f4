"""What a terminal sees of advice and of other libraries' warnings."""

import sys

import pytest

from tests.processes import run


@pytest.mark.parametrize("rank", [0, 1])
def test_advice_is_one_line_of_rank_0_and_other_warnings_stay(rank, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import warnings; from mmlrec.errors import UserAdvice; from mmlrec.distributed.world import configure_logging\n"
        f"configure_logging({rank})\n"
        "warnings.warn('fewer experts would do', UserAdvice)\n"
        "warnings.warn('a library speaks')\n"
    )
    result = run([sys.executable, str(script)])
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    advice = [line for line in lines if "fewer experts would do" in line]
    assert [line.split(" ", 1)[1] for line in advice] == ["note: fewer experts would do"][: 1 - rank]
    assert any("UserWarning: a library speaks" in line for line in lines)
