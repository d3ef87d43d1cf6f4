"""mmlrec: multi-task and multi-scenario recommendation on TorchRec.

From Python, see docs/python.md:

    data = mmlrec.prepare(frame, features=["user", "item"], tasks=["click"])
    run = mmlrec.train("scaling/synthetic", dataset=data)
    scores = run.predict(new_rows)
"""

from __future__ import annotations

import getpass
import importlib
import logging
import os
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmlrec.api.dataset import Dataset, prepare
    from mmlrec.api.run import Run, load_run, train

__version__ = "0.1.0"
__all__ = ["Dataset", "Run", "load_run", "prepare", "train"]

#: Where the names are that `import mmlrec` alone does not bring: the command lines start without torch and pandas.
_FOUND_IN = {"Dataset": "dataset", "prepare": "dataset", "Run": "run", "load_run": "run", "train": "run"}


def __getattr__(name: str) -> Any:
    if name not in _FOUND_IN:
        raise AttributeError(f"module 'mmlrec' has no attribute '{name}'")
    return getattr(importlib.import_module(f"mmlrec.api.{_FOUND_IN[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _before_torch() -> None:
    """What torch 2.11 and fbgemm 1.6.0 want before they are imported. The newer pair wants nothing of it.

    That torch names a folder after the user, and fails where the user has no name, as in some containers: the name is then the
    one that newer ones take. That fbgemm warns 14 times in each process that its own table does not know its release: not of
    the torch that it was built for, says the doctor's table.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid_{os.getuid()}"
    known = re.compile(r"_fbgemm_torch_compat_table has no entry for 1\.6\.0[ +].*PyTorch 2\.11\.", re.DOTALL)
    logging.getLogger().addFilter(lambda record: not known.search(str(record.msg)))


_before_torch()
