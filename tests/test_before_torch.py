"""What the older pair of torch and fbgemm wants before it is imported.

Beside that pair, launch/test_bare_machine.py shows that a training of a user without a name works, without these warnings.
"""

import getpass
import logging
import os

import pytest

import mmlrec
from mmlrec.doctor import PAIRS

WARNING = """
            \033[33m
            _fbgemm_torch_compat_table has no entry for {fbgemm} of FBGEMM;
            cannot determine compatibility with PyTorch {torch}
            \033[0m
            """


@pytest.mark.parametrize(
    ("fbgemm", "torch", "told"),
    [
        ("1.6.0", "2.11.0+cu130", False),
        ("1.6.0+cpu", "2.11.1", False),
        ("1.6.0", "2.12.0", True),
        ("1.6.1", "2.11.0", True),
        ("1.9.0", "2.13.0+cpu", True),
    ],
)
def test_fbgemm_may_warn_of_pairs_that_nobody_knows(fbgemm, torch, told):
    known = (fbgemm.partition("+")[0], torch.rpartition(".")[0]) in [(pair[1], torch) for torch, pair in PAIRS.items()]
    assert told is not known
    record = logging.makeLogRecord({"msg": WARNING.format(fbgemm=fbgemm, torch=torch), "levelno": logging.WARNING})
    assert bool(logging.getLogger().filter(record)) is told


def test_other_words_are_heard(caplog):
    logging.warning("FBGEMM: %s", "no memory")
    assert caplog.messages == ["FBGEMM: no memory"]


@pytest.mark.parametrize("error", [KeyError("getpwuid(): uid not found: 54321"), OSError("No username set in the environment")])
def test_a_user_without_a_name_gets_the_one_that_newer_torch_takes(error, monkeypatch):
    def nameless():
        raise error

    monkeypatch.setattr(logging.getLogger(), "filters", [])
    monkeypatch.setenv("USER", "somebody")
    mmlrec._before_torch()
    assert os.environ["USER"] == "somebody"
    monkeypatch.setattr(getpass, "getuser", nameless)
    mmlrec._before_torch()
    assert os.environ["USER"] == f"uid_{os.getuid()}"
