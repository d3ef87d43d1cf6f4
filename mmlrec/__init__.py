"""mmlrec: multi-task and multi-scenario recommendation on TorchRec.

From Python, see docs/python.md:

    data = mmlrec.prepare(frame, features=["user", "item"], tasks=["click"])
    run = mmlrec.train("scaling/synthetic", dataset=data)
    scores = run.predict(new_rows)
"""

from __future__ import annotations

import importlib
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
