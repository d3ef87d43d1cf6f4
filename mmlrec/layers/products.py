"""Products of matrices of hidden layers on a CPU, [B, i] by [i, o], forward and backward, outside of autograd.

torch gives float32 products to MKL, which has no AVX-512 kernels for processors of AMD; those of oneDNN take half the time
there, and add the bias before a result leaves the cache. torch has no public function for them, only the operator that its
compiler uses, which makes its result anew, from rows that lie one after the other. In bfloat16 its own products are oneDNN's.

Relu is torch's: that of oneDNN makes 0 of what is not a number, and a network that has diverged would train on unseen.

oneDNN compiles a kernel for each shape that it meets: this is for layers whose number of rows stays the same.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

#: Fewer rows are not worth the compilation of a kernel.
LEAST_ROWS = 128


def by_onednn(x: Tensor) -> bool:
    """Whether products with these rows [B, i] are oneDNN's; a function of machine, type and shape only, so that runs repeat."""
    return x.shape[0] >= LEAST_ROWS and x.dtype == torch.float32 and _has_onednn()


@cache
def _has_onednn() -> bool:
    found = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return found and torch.backends.cpu.get_cpu_capability() == "AVX512"


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """relu(x @ weight + bias), [B, o], written to `out` if there is one; `bias` [o]. Numbers that are none stay none."""
    if by_onednn(x):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.t(), bias, "none", [], "")
        return y.relu_() if out is None else torch.clamp_min(y, 0, out=out)
    # Copied: the layout that MKL reads fastest.
    return torch.addmm(bias, x, weight.t().contiguous().t(), out=out).relu_()


def at_input(grad: Tensor, weight: Tensor, plus: Tensor | None = None) -> Tensor:
    """The product grad @ weight.T, [B, o] and [i, o] -> [B, i], added to `plus`, which may be overwritten."""
    if by_onednn(grad):
        if plus is None:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(grad, weight, None, "none", [], "")
        else:
            product = torch.ops.mkldnn._linear_pointwise.binary(grad, plus, weight, None, "add")
        return product
    if plus is not None:
        return plus.addmm_(grad, weight.t())
    # MKL writes rows of an odd width at 0.7 of the speed: rows begin at multiples of 128 bytes.
    width, columns = weight.shape[0], 128 // grad.element_size()
    made = grad.new_empty(len(grad), -(-width // columns) * columns)[:, :width]
    return torch.mm(grad, weight.t(), out=made)


def columns_of(x: Tensor) -> Tensor:
    """x.T, [B, i] -> [i, B], as `at_weight` reads it fastest; worth keeping where several products read it."""
    return x.t().contiguous() if by_onednn(x) else x.t()


def at_weight(columns: Tensor, grad: Tensor) -> Tensor:
    """The product columns @ grad, [i, B] and [B, o] -> [i, o]."""
    if by_onednn(grad):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(columns, grad.t(), None, "none", [], "")
        return product
    return torch.mm(columns, grad)
