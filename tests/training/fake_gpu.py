"""Training steps behind the lookup on a device that is none: python -m tests.training.fake_gpu FOLDER CASES

CASES are lists of overrides of FOLDER/config.yaml, as JSON. Prints a JSON list: for each case the complaint, or null.

torch's fake tensors have a device, a shape and a number format, and hold no numbers. So an operator on tensors of two devices
fails, and so does whatever asks for a number of the device, which on a GPU waits for all that it was given. What copies between
devices and waits is noticed here.
"""

import json
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torchrec import KeyedTensor

from mmlrec.data.batch import Batch
from mmlrec.distributed.world import World, process_group
from mmlrec.registry import load
from mmlrec.session.recommender import Head
from mmlrec.session.session import build_parts, table_branches

ROWS = 12


_setup_privateuseone_for_python_backend("gpu")
DEVICE = torch.device("gpu", 0)


class Autocast(TorchFunctionMode):
    """What torch.autocast does to products on a GPU, in its place; for a device of one's own there is none."""

    products = (
        *(torch.bmm, torch.mm, torch.addmm, torch.matmul, torch.baddbmm, torch.einsum, torch.nn.functional.linear),
        *(torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__),
    )
    now = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.products and self.now:
            args = tree_map_only(torch.Tensor, lambda tensor: tensor.to(torch.bfloat16), args)
        return function(*args, **(kwargs or {}))

    @contextmanager
    def autocast(self, device, dtype=torch.bfloat16, enabled=True):
        before, self.now = self.now, enabled
        yield
        self.now = before

    def __enter__(self):
        torch.autocast, torch.get_autocast_dtype = self.autocast, lambda device: torch.bfloat16
        torch.is_autocast_enabled = lambda device: self.now
        return super().__enter__()


class NoWaits(TorchDispatchMode):
    """Fails where a copy between devices waits: from the device, or to it unless `non_blocking`."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket._qualified_op_name
        if name in ("aten::_to_copy", "aten::copy_"):
            source = args[1] if name == "aten::copy_" else args[0]
            target = args[0].device if name == "aten::copy_" else (kwargs.get("device") or source.device)
            waits = not (kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2]))
            if {source.device.type, torch.device(target).type} == {"cpu", DEVICE.type} and source.dim() and waits:
                raise AssertionError(f"a copy from {source.device.type} to {torch.device(target).type} that waits")
        return function(*args, **kwargs)


def to_device(module: nn.Module) -> nn.Module:
    """Parameters and buffers of the same shapes there."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)
                    held[name] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if held is part._parameters else fake
    return module


def inputs(head: Head) -> tuple[KeyedTensor, Batch]:
    spec = head.network.spec
    keys = [key for of_branch in head.keys for key in of_branch]
    widths = [*spec.fields.values()] * len(head.keys)
    pooled = KeyedTensor(keys, widths, torch.empty(ROWS, sum(widths), device=DEVICE, requires_grad=True))
    numbers = {name: torch.empty(ROWS, spec.num_tasks, device=DEVICE) for name in ("labels", "mask")}
    whole = {name: torch.empty(ROWS, dtype=torch.int64, device=DEVICE) for name in ("scenario", "row", "group")}
    valid = torch.empty(ROWS, dtype=torch.bool, device=DEVICE)
    dense, weight = torch.empty(ROWS, spec.num_dense, device=DEVICE), torch.empty(ROWS, device=DEVICE)
    return pooled, Batch(sparse=None, dense=dense, weight=weight, valid=valid, **numbers, **whole)


def complaints(folder: Path, overrides: list[str], world: World) -> str | None:
    config = load(str(folder / "config.yaml"), overrides)
    manifest, network, loss, balancing, scales, _ = build_parts(config)
    branches = table_branches(network, manifest)
    prefixes = [""] if branches is None else [f"{name}/" for name in branches]
    head = Head(network, loss, balancing, config, prefixes, scales, world.parts)
    with FakeTensorMode():
        to_device(head).train()
        pooled, batch = inputs(head)
        try:
            with NoWaits(), Autocast():
                total, predictions = head(pooled, batch)
                total.backward()
            assert total.device == predictions.logits.device == DEVICE
            assert all(p.grad is None or p.grad.device == DEVICE for p in network.parameters())
        except Exception as error:
            own = [frame for frame in traceback.extract_tb(error.__traceback__) if "mmlrec" in Path(frame.filename).parts]
            return f"{Path(own[-1].filename).name}: {own[-1].line}: {type(error).__name__}: {str(error)[:200]}"
    return None


def main() -> None:
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    with process_group() as world:
        print(json.dumps([complaints(folder, overrides, world) for overrides in cases]))


if __name__ == "__main__":
    main()
