"""What would make the host wait for a device, found without one: on tensors of the device `meta`, which have no numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Operators that on CUDA read a number to the host: to know a shape, to check what a solver says, or because it was asked for.
WAITING = {
    "_linalg_check_errors",
    "_linalg_eigh",
    "_linalg_svd",
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "linalg_eig",
    "linalg_lstsq",
    "linalg_matrix_exp",
    "linalg_pinv",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
COPIES = {"_to_copy", "copy_"}


class Waits(TorchDispatchMode):
    """Collects by name what waits within it; that which a device without numbers cannot do raises an error besides.

    A copy between host and device waits unless it is told not to. All other operators that take tensors of both copy
    them first; a number of the host is but an argument of theirs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._made = _Made(self.found)

    def __enter__(self) -> Waits:
        super().__enter__()
        self._made.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._made.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let the operator run, once it is looked at."""
        kwargs = kwargs or {}
        name = operator.overloadpacket.__name__
        if name in COPIES:
            source, target = (args[1], args[0].device) if name == "copy_" else (args[0], kwargs.get("device") or args[0].device)
            told = kwargs.get("non_blocking") or (name == "copy_" and any(args[2:]))
            if torch.device(target).type != source.device.type and not told:
                self.found.append(name)
        else:
            places = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if _counts(leaf)}
            masked = name.startswith("index") and any(_is_mask(leaf) for leaf in tree_leaves(args[1:2]))
            if "meta" in places and (name in WAITING or masked or len(places) > 1):
                self.found.append(name)
        return operator(*args, **kwargs)


class _Made(TorchFunctionMode):
    """Tensors made on a device from numbers of Python, as an index, too: those are copied, and the copy is waited for."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = function in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "meta"
        if function in (Tensor.__getitem__, Tensor.__setitem__) and args[0].is_meta:
            made = any(isinstance(part, list) for part in (args[1] if isinstance(args[1], tuple) else args[1:2]))
        if made or (function is Tensor.new_tensor and args[0].is_meta):
            self._found.append(function.__name__)
        return function(*args, **kwargs)


def _is_mask(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_meta and leaf.dtype == torch.bool


def _counts(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_meta or leaf.dim() > 0)
