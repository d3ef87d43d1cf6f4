"""What the server of `processes.py` imports before it forks: all that any command or rank imports later, too.

Some of it is loaded by others when they are first used, at two seconds of a core in each process: pandas by pyarrow when it
meets an array, the optimizers that `torch.distributed.optim` compiles by torchrec when it is given one, the TensorBoard writer.
"""

import gc

import pandas  # noqa: F401
import torch.distributed.optim
import torch.utils.tensorboard  # noqa: F401

import apps.cli  # noqa: F401
import mmlrec.evaluation.prediction
import mmlrec.session.recommender
import mmlrec.training.run  # noqa: F401
from mmlrec.registry import method, method_names, strategy, strategy_names
from tests.processes import end_with_parent

for name in method_names():
    method(name)
for name in strategy_names():
    strategy(name)
end_with_parent()
gc.freeze()  # so that collections in children leave the pages shared
