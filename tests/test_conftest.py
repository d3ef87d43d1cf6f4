"""When tests see a GPU: a run of all of them must not, and one of those of a GPU must."""

import pytest

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
