"""`worker.py` with replicas of tables on a CPU: torchrec's, but for the line that refuses it and the mean that gloo lacks."""

import inspect
import re
import textwrap

import torch.distributed as dist
from torchrec.distributed import model_parallel

from apps.cli import run as entry_point
from mmlrec.embeddings import replicas
from mmlrec.session import session
from tests.training import worker


def mean(context, tensors):
    """Of the ranks that hold the same rows: what NCCL calls AVG."""
    for tensor in tensors:
        dist.all_reduce(tensor, group=context.replica_pg)
        tensor /= dist.get_world_size(context.replica_pg)


def main() -> None:
    plain = model_parallel.DMPCollection
    source = textwrap.dedent(inspect.getsource(plain.__init__))
    source, count = re.subn(
        r'assert \(\s*device.type == "cuda" or .*?\), "DMPCollection only supports[^\n]*', "", source, flags=re.DOTALL
    )
    assert count == 1
    source = source.replace("super().__init__(", "super(DMPCollection, self).__init__(")
    exec(compile(source, "DMPCollection", "exec"), vars(model_parallel), scope := {})
    # A CPU has no number.
    place = model_parallel._remote_device
    model_parallel._remote_device = lambda text: place(re.sub(r"/cpu:\d+", "/cpu", text))
    plain.__init__ = scope["__init__"]
    plain._allreduce_tensors = lambda self, context, tensors, *_: [mean(context, of_type) for of_type in tensors.values()]
    session.check_replicas = lambda config, device: None
    assert replicas.DMPCollection is plain
    worker.main()


if __name__ == "__main__":
    entry_point(main)
