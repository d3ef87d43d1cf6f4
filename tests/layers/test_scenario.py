"""Scenario dispatch against a loop over rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlrec.layers.scenario import Dispatch, prefers_grouped, scenario_linear


@pytest.mark.parametrize("grouped", [False, True, None])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize(("scenarios", "fan_in", "width"), [(3, 5, 7), (4, 8, 16), (6, 3, 1), (1, 4, 4)])
def test_scenario_linear_equals_a_loop(grouped, dtype, tolerance, scenarios, fan_in, width):
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=g).to(dtype).requires_grad_()
        for shape in ((11, fan_in), (scenarios, fan_in, width), (scenarios, width))
    )
    # The last scenario has no row.
    scenario = torch.randint(0, max(1, scenarios - 1), (11,), generator=g)
    y = scenario_linear(x, weight, bias, scenario, grouped=grouped)
    xs, ws, bs = (t.detach().double().requires_grad_() for t in (x, weight, bias))
    expected = torch.stack([xs[b] @ ws[s] + bs[s] for b, s in enumerate(scenario.tolist())])
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    pull = torch.randn(11, width, generator=g).to(dtype)
    y.backward(pull)
    expected.backward(pull.double())
    for got, reference in zip((x, weight, bias), (xs, ws, bs), strict=True):
        torch.testing.assert_close(got.grad.double(), reference.grad, rtol=tolerance, atol=tolerance)
    if scenarios > 1:
        assert (weight.grad[-1] == 0).all()
        assert (bias.grad[-1] == 0).all()


@pytest.mark.parametrize("grouped", [False, True])
def test_a_stack_uses_the_weights_of_member_and_scenario(grouped):
    g = torch.Generator().manual_seed(1)
    x, weight = torch.randn(2, 9, 4, generator=g), torch.randn(2 * 3, 4, 5, generator=g)
    scenario = torch.tensor([2, 0, 1, 2, 2, 0, 0, 1, 0])
    dispatch = Dispatch(scenario, 3, grouped=grouped)
    y = dispatch.restore(dispatch.linear(dispatch.arrange(x), weight, None))
    for n in range(2):
        for b, s in enumerate(scenario.tolist()):
            torch.testing.assert_close(y[n, b], x[n, b] @ weight[n * 3 + s], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("width", [1, 3, 5, 7, 8, 16, 130])
@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("way", ["_grouped", "_in_blocks"])
def test_the_ways_of_cuda_equal_a_loop(way, dtype, tolerance, width, stack, has_bias):
    """Called directly; bf16 has steps of 2^-7, so that the bound is under three of the largest value."""
    g = torch.Generator().manual_seed(width)
    scenarios, fan_in = 4, 6
    scenario = torch.tensor([3, 0, 3, 3, 1, 0, 3, 1, 0])  # No row of scenario 2.
    dispatch = Dispatch(scenario, scenarios, grouped=True)
    x, weight, bias = (
        torch.randn(*shape, generator=g).to(dtype).requires_grad_()
        for shape in ((stack, 9, fan_in), (stack * scenarios, fan_in, width), (stack * scenarios, width))
    )
    pull = torch.randn(stack, 9, width, generator=g).to(dtype)
    y = dispatch.restore(getattr(dispatch, way)(dispatch.arrange(x), weight, bias if has_bias else None))
    leaves = [x, weight, bias] if has_bias else [x, weight]
    got = [y, *torch.autograd.grad(y, leaves, pull)]
    xs, ws, bs = (t.detach().double().requires_grad_() for t in (x, weight, bias))
    rows = [
        xs[n, b] @ ws[n * scenarios + s] + (bs[n * scenarios + s] if has_bias else 0)
        for n in range(stack)
        for b, s in enumerate(scenario.tolist())
    ]
    expected = torch.stack(rows).view(stack, 9, width)
    reference = [expected, *torch.autograd.grad(expected, [xs, ws, bs][: len(leaves)], pull.double())]
    assert y.dtype == dtype
    for ours, theirs in zip(got, reference, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance * max(1.0, theirs.abs().max().item()))
    for gradient in got[2:]:
        assert (gradient.unflatten(0, (stack, scenarios))[:, 2] == 0).all()


@given(scenario=st.lists(st.integers(0, 6), min_size=1, max_size=40), scenarios=st.integers(7, 12))
@settings(max_examples=60, deadline=None)
def test_blocks_hold_all_rows_however_they_are_spread(scenario, scenarios):
    rows = torch.tensor(scenario)
    x, weight = torch.randn(1, len(rows), 3), torch.randn(scenarios, 3, 2)
    dispatch = Dispatch(rows, scenarios, grouped=True)
    found = dispatch.restore(dispatch._in_blocks(dispatch.arrange(x), weight, None))[0]
    torch.testing.assert_close(found, torch.stack([x[0, b] @ weight[s] for b, s in enumerate(scenario)]))


@pytest.mark.parametrize("cached_numbers", [1, 60, 1 << 18])
@pytest.mark.parametrize("has_shared", [False, True])
@pytest.mark.parametrize("only", [None, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-1)])
def test_weights_in_parts_equal_a_loop(monkeypatch, cached_numbers, has_shared, only, dtype, tolerance):
    """Weights [3 * 4, 5, 6] one, two or all at a time; gradients of one scenario's rows only, as balancing asks."""
    monkeypatch.setattr("mmlrec.layers.scenario.CACHED_NUMBERS", cached_numbers)
    g = torch.Generator().manual_seed(2)
    scenario = torch.tensor([3, 0, 3, 3, 1, 0, 3, 1, 0])  # No row of scenario 2.
    leaves = [torch.randn(*shape, generator=g) for shape in ((3, 9, 5), (12, 5, 6), (12, 6), (5, 6))][: 4 if has_shared else 3]
    x, weight, bias, *shared = (leaf.to(torch.promote_types(dtype, torch.float32)).requires_grad_() for leaf in leaves)
    xs, ws, bs, *sh = (leaf.detach().double().requires_grad_() for leaf in (x, weight, bias, *shared))
    pull = torch.randn(3, 9, 6, generator=g)
    if only is not None:
        pull[:, scenario != only] = 0
    dispatch = Dispatch(scenario, 4, grouped=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = dispatch.restore(dispatch.linear(dispatch.arrange(x), weight, bias, *shared))
    got = [y, *torch.autograd.grad(y, [x, weight, bias, *shared], pull.to(y.dtype))]
    own = ws * sh[0] if has_shared else ws
    rows = [xs[n, b] @ own[n * 4 + s] + bs[n * 4 + s] for n in range(3) for b, s in enumerate(scenario.tolist())]
    expected = torch.stack(rows).view(3, 9, 6)
    reference = [expected, *torch.autograd.grad(expected, [xs, ws, bs, *sh], pull.double())]
    assert y.dtype == dtype
    for ours, theirs in zip(got, reference, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def test_arrange_and_restore_are_inverse_and_stable():
    scenario = torch.tensor([1, 0, 1, 0])
    dispatch = Dispatch(scenario, 2, grouped=True)
    rows = torch.arange(4.0).view(4, 1)
    assert dispatch.arrange(rows).flatten().tolist() == [1, 3, 0, 2]
    assert torch.equal(dispatch.restore(dispatch.arrange(rows)), rows)


@pytest.mark.parametrize("grouped", [False, True])
def test_autocast_computes_in_bf16(grouped):
    x, weight, bias = torch.randn(6, 8), torch.randn(2, 8, 8), torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = scenario_linear(x, weight, bias, torch.tensor([0, 1, 0, 1, 1, 0]), grouped=grouped)
    assert y.dtype == torch.bfloat16


def test_strategy_by_size():
    assert not prefers_grouped(2, 32)
    assert prefers_grouped(2, 64)
    assert prefers_grouped(30, 16)
