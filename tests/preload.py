"""What the server of `processes.py` imports before it forks: all that any command or rank imports later, too.

Some of it is loaded by others when they are first used, at two seconds of a core in each process: pandas by pyarrow when it
meets an array, the optimizers that `torch.distributed.optim` compiles by torchrec when it is given one, the TensorBoard writer.
"""

# ruff: noqa: E402
import gc

gc.disable()  # Nothing of it is garbage, and looking for some would take a fifth of the time.

import importlib
import pkgutil

import pandas  # noqa: F401
import torch.distributed.optim
import torch.utils.tensorboard  # noqa: F401

import apps.cli  # noqa: F401
import mmlrec.balancing.strategies
import mmlrec.evaluation.prediction
import mmlrec.models
import mmlrec.session.recommender
import mmlrec.training.run
from tests.processes import end_with_parent

# Not by the registry, which would remember the packages that are installed here.
for package in (mmlrec.models, mmlrec.balancing.strategies):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
end_with_parent()
gc.freeze()  # so that collections in children leave the pages shared
gc.enable()
