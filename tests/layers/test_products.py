"""Products of hidden layers at as many rows as oneDNN takes, against numpy in float64, and stacks made of them."""

import numpy as np
import pytest
import torch

from mmlrec.layers import products
from mmlrec.layers.experts import StackedMLP
from mmlrec.layers.mlp import MLP
from mmlrec.layers.options import HiddenOptions
from mmlrec.layers.stacked_relu import together

ROWS = 2 * products.LEAST_ROWS + 3
#: What float32 and bfloat16 keep of sums of some hundred products.
ROOM = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(tensor):
    return tensor.detach().double().numpy()


def assert_close(found, expected, kind):
    assert found.dtype == kind
    np.testing.assert_allclose(exact(found), expected, atol=ROOM[kind] * np.abs(expected).max(), rtol=0)


@pytest.fixture(params=["as this machine has it", "MKL"])
def _library(request, monkeypatch):
    if request.param == "MKL":
        monkeypatch.setattr(products, "by_onednn", lambda x: False)


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("fan_in", "width"), [(29, 64), (128, 17), (1, 1)])
def test_every_product_is_that_of_its_matrices(kind, fan_in, width):
    # Rows of x and gradient lie apart, as a part of a wide product's do.
    x, grad = (draw(ROWS, 2, n, seed=n).to(kind)[:, 1] for n in (fan_in, width))
    weight, bias = draw(fan_in, width, seed=2).to(kind), draw(width, seed=3).to(kind)
    expected = np.maximum(exact(x) @ exact(weight) + exact(bias), 0)
    assert_close(products.linear_relu(x, weight, bias), expected, kind)
    room = torch.empty(3, ROWS, width, dtype=kind)
    products.linear_relu(x, weight, bias, out=room[1])
    assert_close(room[1], expected, kind)
    at_input = exact(grad) @ exact(weight).T
    assert_close(products.at_input(grad, weight), at_input, kind)
    plus = draw(ROWS, fan_in, seed=4).to(kind)
    assert_close(products.at_input(grad, weight, plus.clone()), at_input + exact(plus), kind)
    at_weight = exact(x).T @ exact(grad)
    assert_close(products.at_weight(products.columns_of(x), grad), at_weight, kind)
    assert_close(products.at_weight(x.t(), grad), at_weight, kind)


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("where", ["x", "weight", "bias"])
def test_what_is_not_a_number_is_not_made_zero(where, kind):
    """Else a network that has diverged would go on with dead units, and a finite loss."""
    operands = {"x": draw(ROWS, 21), "weight": draw(21, 17), "bias": draw(17)}
    operands[where].view(-1)[3] = torch.nan
    x, weight, bias = (operand.to(kind) for operand in operands.values())
    expected = (x.double() @ weight.double() + bias.double()).isnan()
    assert expected.any()
    assert products.linear_relu(x, weight, bias).isnan().equal(expected)
    assert products.linear_relu(x, weight, bias, out=torch.empty(ROWS, 17, dtype=kind)).isnan().equal(expected)


def test_few_rows_and_other_types_are_torchs_own():
    assert not products.by_onednn(draw(products.LEAST_ROWS - 1, 8))
    assert not products.by_onednn(draw(ROWS, 8).double())


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("live", [[0, 1, 2, 3], [1, 3], []])
@pytest.mark.parametrize(("groups", "hidden"), [(None, [200, 40]), (None, [40]), (None, [48, 40, 24]), (2, [40, 24])])
def test_a_stack_trains_like_its_members(groups, hidden, live):
    stack = StackedMLP(4, 21, hidden, HiddenOptions(), torch.Generator().manual_seed(0))
    for bias in stack.biases:
        bias.data.normal_(generator=torch.Generator().manual_seed(1))
    x = draw(*((ROWS, 21) if groups is None else (groups, ROWS, 21))).requires_grad_()
    pull = draw(4, ROWS, hidden[-1], seed=5)
    pull[:, :20] = 0  # the first rows are padding, or have no label
    found = stack(x)
    gradients = torch.autograd.grad((found[live] * pull[live]).sum(), [x, *stack.parameters()])
    theirs = [leaf.detach().double().requires_grad_() for leaf in (x, *stack.parameters())]
    z_of = []
    for u in range(4):
        z = theirs[0] if groups is None else theirs[0][u % groups]
        for layer in range(len(hidden)):
            z = torch.relu(z @ theirs[1 + layer][u] + theirs[1 + len(hidden) + layer][u])
        z_of.append(z)
    members = torch.stack(z_of)
    assert_close(found, members.detach().numpy(), torch.float32)
    expected = torch.autograd.grad((members[live] * pull[live].double()).sum(), theirs)
    for ours, other in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(ours.double(), other, atol=1e-5 * max(1.0, float(other.abs().max())), rtol=0)


def test_stacks_on_one_input_train_as_each_alone():
    options, generator = HiddenOptions(), torch.Generator().manual_seed(0)
    stacks = [StackedMLP(3, 21, [136, 16], options, generator), StackedMLP(2, 21, [8], options, generator)]
    parameters = [p for stack in stacks for p in stack.parameters()]

    def gradients(outputs, x):
        loss = sum((output * draw(*output.shape, seed=n)).sum() for n, output in enumerate(outputs))
        return torch.autograd.grad(loss, [x, *parameters])

    x = draw(ROWS, 21).requires_grad_()
    apart = gradients([stack(x) for stack in stacks], x)
    for ours, other in zip(gradients(together(x, stacks, [None, None]), x), apart, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


def test_a_step_repeats_to_the_bit():
    mlp = MLP(21, [40, 24], HiddenOptions(), torch.Generator().manual_seed(0))
    x, pull = draw(ROWS, 21), draw(ROWS, 24, seed=1)
    first, second = (torch.autograd.grad((mlp(x) * pull).sum(), list(mlp.parameters())) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
