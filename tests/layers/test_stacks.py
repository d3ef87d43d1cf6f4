"""Stacked layers against members computed one by one, how weights start, and what autocast computes in."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmlrec.layers.experts import StackedMLP, stacked_linear
from mmlrec.layers.gates import mix, mix_own
from mmlrec.layers.mlp import MLP
from mmlrec.layers.options import HiddenOptions
from mmlrec.layers.towers import Towers

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_same_gradients(y, expected, ours, theirs):
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    pull = torch.randn(y.shape, dtype=F64, generator=generator())
    y.backward(pull)
    expected.backward(pull)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [None, 2, 6])
def test_stacked_linear_equals_its_members(groups):
    shape = (5, 3) if groups is None else (groups, 5, 3)
    leaves = [torch.randn(*s, dtype=F64, generator=generator()) for s in (shape, (6, 3, 4), (6, 4))]
    ours, theirs = ([leaf.clone().requires_grad_() for leaf in leaves] for _ in range(2))
    x, weight, bias = theirs
    members = [(x if groups is None else x[u % groups]) @ weight[u] + bias[u] for u in range(6)]
    assert_same_gradients(stacked_linear(*ours), torch.stack(members), ours, theirs)


@pytest.mark.parametrize("groups", [None, 2, 6])
@pytest.mark.parametrize("hidden", [[4], [4, 7], [4, 7, 2]])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_a_stack_equals_its_members(groups, hidden, activation):
    # relu on a CPU has a backward pass of its own, which overwrites what it owns; nothing of the caller's may change.
    stack = StackedMLP(6, 3, hidden, HiddenOptions(activation=activation), generator()).double()
    for bias in stack.biases:
        bias.data.normal_(generator=generator())
    x = torch.randn((5, 3) if groups is None else (groups, 5, 3), dtype=F64, generator=generator())
    ours = [x.clone().requires_grad_(), *stack.parameters()]
    theirs = [leaf.detach().clone().requires_grad_() for leaf in ours]
    weights, biases = theirs[1 : 1 + len(hidden)], theirs[1 + len(hidden) :]
    members = []
    for u in range(6):
        z = theirs[0] if groups is None else theirs[0][u % groups]
        for weight, bias in zip(weights, biases, strict=True):
            z = getattr(torch, activation)(z @ weight[u] + bias[u])
        members.append(z)
    y = stack(ours[0])
    kept = y.detach().clone()
    assert_same_gradients(y, torch.stack(members), ours, theirs)
    assert y.equal(kept)


@pytest.mark.parametrize("live", [[], [1], [0, 4], [2, 3, 5]])
@pytest.mark.parametrize(("groups", "hidden"), [(None, [4]), (None, [4, 7]), (None, [130, 5]), (3, [4, 7]), (6, [7])])
def test_members_without_a_gradient_get_zeros(groups, hidden, live):
    # relu on a CPU skips them; every gradient is the one of the loss of the others.
    stack = StackedMLP(6, 3, hidden, HiddenOptions(), generator()).double()
    x = torch.randn((5, 3) if groups is None else (groups, 5, 3), dtype=F64, generator=generator()).requires_grad_()
    pull = torch.randn(6, 5, hidden[-1], dtype=F64, generator=generator())
    leaves = [x, *stack.parameters()]
    found = torch.autograd.grad((stack(x)[live] * pull[live]).sum(), leaves)
    layers = list(zip(stack.weights, stack.biases, strict=True))
    loss = x.sum() * 0
    for u in live:
        z = x if groups is None else x[u % groups]
        for weight, bias in layers:
            z = torch.relu(z @ weight[u] + bias[u])
        loss = loss + (z * pull[u]).sum()
    expected = torch.autograd.grad(loss, leaves, materialize_grads=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("hidden", [[], [5], [7, 5], [200, 5]])
def test_an_mlp_equals_its_layers(hidden):
    mlp = MLP(13, hidden, HiddenOptions(), generator()).double()
    for bias in mlp.biases:
        bias.data.normal_(generator=generator())
    ours = [torch.randn(6, 13, dtype=F64, generator=generator()).requires_grad_(), *mlp.parameters()]
    theirs = [leaf.detach().clone().requires_grad_() for leaf in ours]
    z, depth = theirs[0] * 1, len(hidden)
    for weight, bias in zip(theirs[1 : 1 + depth], theirs[1 + depth :], strict=True):
        z = torch.clamp(z @ weight + bias, min=0)
    assert_same_gradients(mlp(ours[0]), z, ours, theirs)


@pytest.mark.parametrize("use_bn", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_a_stack_of_one_is_an_mlp(use_bn, activation):
    options = HiddenOptions(activation=activation, use_bn=use_bn)
    one, stack = MLP(5, [7, 3], options, generator()), StackedMLP(1, 5, [7, 3], options, generator())
    x = torch.randn(9, 5)
    torch.testing.assert_close(stack(x)[0], one(x), rtol=1e-5, atol=1e-6)


def test_mixes():
    gates, experts = torch.rand(5, 2, 3), torch.rand(3, 5, 4)
    torch.testing.assert_close(mix(gates, experts), torch.einsum("bue,ebk->ubk", gates, experts))
    own = torch.rand(3, 2, 5, 4)
    torch.testing.assert_close(mix_own(gates, own.view(6, 5, 4)), torch.einsum("bun,nubk->ubk", gates, own))


def test_standard_initialisation_has_the_fan_in_of_one_member():
    stack = StackedMLP(4, 100, [200], HiddenOptions(), generator())
    assert stack.weights[0].std().item() == pytest.approx(math.sqrt(2 / 100), rel=0.02)
    assert (stack.biases[0] == 0).all()
    towers = Towers(3, 200, [], HiddenOptions(), generator())
    bound = math.sqrt(6 / 201)
    assert bound * 0.95 < towers.weight.abs().max() <= bound
    assert (towers.bias == 0).all()


def test_mmlrec_initialisation():
    stack = StackedMLP(4, 100, [200], HiddenOptions(init="mmlrec"), generator())
    assert stack.weights[0].std().item() == pytest.approx(1e-4, rel=0.02)
    assert 0.095 < stack.biases[0].abs().max() <= 0.1


class Products(TorchDispatchMode):
    """Records the type of every matrix product."""

    def __init__(self):
        super().__init__()
        self.types = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.split(".")[0] in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "_grouped_mm"):
            self.types.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("build", [MLP, lambda *a: StackedMLP(2, *a)], ids=["mlp", "stack"])
def test_autocast_computes_all_products_in_bf16(build, activation):
    layers = build(8, [16, 8], HiddenOptions(activation=activation), generator())
    x = torch.randn(4, 8, requires_grad=True)
    with Products() as recorded:
        with torch.autocast("cpu", torch.bfloat16):
            y = layers(x)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert len(recorded.types) >= 6
    assert set(recorded.types) == {torch.bfloat16}
    assert all(tensor.grad.dtype == torch.float32 for tensor in [x, *layers.parameters()])
