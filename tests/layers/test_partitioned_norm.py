"""Partitioned normalisation against a loop over scenarios, torch's BatchNorm1d, finite differences, and several ranks."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mmlrec.layers import normalisation
from mmlrec.layers.normalisation import PartitionedNorm
from tests.processes import spawn

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_norm(scenarios, width, **options):
    layer = PartitionedNorm(scenarios, width, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand(parameter.shape, dtype=F64, generator=generator(len(parameter))) + 0.5)
    return layer


def loop(layer, x, scenario, valid, moments):
    """One row after the other; `moments(s)` gives mean and variance of a scenario."""
    rows = []
    for b, s in enumerate(scenario.tolist()):
        mean, var = moments(s)
        z = (x[b] - mean) / torch.sqrt(var + layer.eps)
        rows.append(layer.weight * layer.scenario_weight[s] * z + layer.bias + layer.scenario_bias[s])
    return torch.stack(rows)


def batch_moments(layer, x, scenario, valid):
    """Moments of a scenario's real rows; running ones where they are too few."""

    def moments(s):
        own = [x[b] for b in range(len(x)) if scenario[b] == s and valid[b]]
        if len(own) < layer.min_count:
            return layer.running_mean[s].clone(), layer.running_var[s].clone()
        mean = sum(own) / len(own)
        return mean, sum((row - mean) ** 2 for row in own) / len(own)

    return moments


def test_worked_numbers():
    layer = PartitionedNorm(2, 1, eps=0.0).double()
    y = layer(torch.tensor([[1.0], [3.0], [10.0], [14.0]], dtype=F64), torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(y.flatten(), torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=F64), rtol=0, atol=1e-6)


@pytest.fixture(params=["cpu", "gpu"])
def either_form(request, monkeypatch):
    """Sums over the rows of scenarios as on a CPU, and by products of matrices as on a GPU."""
    if request.param == "gpu":
        monkeypatch.setattr(normalisation, "_sums", normalisation._Sums.apply)
        monkeypatch.setattr(normalisation, "_of_rows", normalisation._OfRows.apply)


# Scenario 1 has one real row, scenario 3 none; rows 4 and 9 are padding.
SCENARIO = torch.tensor([0, 2, 1, 0, 0, 2, 2, 0, 2, 1, 4, 4])
VALID = torch.tensor([True] * 4 + [False] + [True] * 4 + [False] + [True] * 2)


@pytest.mark.usefixtures("either_form")
@pytest.mark.parametrize("min_count", [2, 3, 4])
@pytest.mark.parametrize("width", [1, 5, 7])
def test_values_gradients_and_statistics_equal_a_loop(min_count, width):
    layer = random_norm(5, width, min_count=min_count, momentum=0.3)
    layer.running_mean.normal_(generator=generator(1))
    layer.running_var.uniform_(0.5, 2.0, generator=generator(2))
    layer.num_batches_tracked.fill_(9)  # Past the mean of the first batches.
    leaf = torch.randn(12, width, dtype=F64, generator=generator(3)) * 2 + 1
    pull = torch.randn(12, width, dtype=F64, generator=generator(4))
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    results = []
    for ours in (False, True):
        layer.zero_grad()
        x = leaf.clone().requires_grad_()
        y = layer(x, SCENARIO, VALID) if ours else loop(layer, x, SCENARIO, VALID, batch_moments(layer, x, SCENARIO, VALID))
        y.backward(pull)
        results.append([y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    for s in range(5):
        own = leaf[(s == SCENARIO) & VALID]
        if len(own) >= 2:
            mean[s] += 0.3 * (own.mean(dim=0) - mean[s])
            var[s] += 0.3 * (own.var(dim=0, unbiased=True) - var[s])
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer.running_var, var, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("either_form")
def test_gradients_equal_finite_differences():
    layer = random_norm(5, 3, momentum=1e-9)
    x = torch.randn(12, 3, dtype=F64, generator=generator(5), requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows, *_: layer(rows, SCENARIO, VALID), (x, *layer.parameters()))


def test_evaluation_uses_running_statistics():
    layer = random_norm(3, 4)
    scenario = torch.arange(9) % 3
    for seed in range(3):
        layer(torch.randn(9, 4, dtype=F64, generator=generator(seed)) * 3 - 1, scenario)
    layer.eval()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    x = torch.randn(5, 4, dtype=F64, generator=generator(9))
    expected = loop(layer, x, scenario[:5], None, lambda s: (layer.running_mean[s], layer.running_var[s]))
    torch.testing.assert_close(layer(x, scenario[:5]), expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_one_scenario_is_batchnorm1d():
    width = 6
    layer, reference = random_norm(1, width, eps=1e-4, momentum=0.3), nn.BatchNorm1d(width, eps=1e-4).double()
    with torch.no_grad():
        reference.weight.copy_(layer.weight * layer.scenario_weight[0])
        reference.bias.copy_(layer.bias + layer.scenario_bias[0])
    scenario = torch.zeros(10, dtype=torch.long)
    for seed, momentum in enumerate((1.0, 1 / 2, 1 / 3, 0.3, 0.3)):
        reference.momentum = momentum
        x = torch.randn(10, width, dtype=F64, generator=generator(seed)) * 2 + 3
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        layer.zero_grad(), reference.zero_grad()
        y, expected = layer(mine, scenario), reference(theirs)
        pull = torch.randn(10, width, dtype=F64, generator=generator(seed + 10))
        y.backward(pull), expected.backward(pull)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(layer.bias.grad, reference.bias.grad)
        # g * g_0 is the reference's weight, so that d/dg = g_0 d/dweight.
        torch.testing.assert_close(layer.weight.grad, reference.weight.grad * layer.scenario_weight[0])
        torch.testing.assert_close(layer.running_mean[0], reference.running_mean)
        torch.testing.assert_close(layer.running_var[0], reference.running_var)
    layer.eval(), reference.eval()
    torch.testing.assert_close(layer(x, scenario), reference(x))


def test_each_scenario_has_mean_0_and_variance_1():
    scenario = torch.randint(0, 4, (400,), generator=generator())
    shift = torch.tensor([-5.0, 0.0, 3.0, 100.0], dtype=F64)[scenario].unsqueeze(1)
    x = torch.randn(400, 7, dtype=F64, generator=generator(1)) * (1 + scenario.unsqueeze(1)) + shift
    y = PartitionedNorm(4, 7, eps=0.0).double()(x, scenario)
    for s in range(4):
        own = y[scenario == s]
        torch.testing.assert_close(own.mean(dim=0), torch.zeros(7, dtype=F64), rtol=0, atol=1e-12)
        torch.testing.assert_close(own.var(dim=0, unbiased=False), torch.ones(7, dtype=F64), rtol=1e-10, atol=0)


@pytest.mark.usefixtures("either_form")
def test_a_scenario_without_rows_is_left_alone():
    layer = random_norm(3, 4)
    layer(torch.randn(8, 4, dtype=F64, generator=generator()), torch.tensor([0, 2] * 4)).square().sum().backward()
    assert (layer.running_mean[1] == 0).all()
    assert (layer.running_var[1] == 1).all()
    for gradient in (layer.scenario_weight.grad, layer.scenario_bias.grad):
        assert (gradient[1] == 0).all()
        assert (gradient[[0, 2]] != 0).all()
    assert (layer.running_mean[[0, 2]] != 0).all()


def test_running_statistics_are_the_mean_of_the_first_batches_of_each_scenario():
    """Scenario 1 has rows in every third batch only, and one row, which has no variance, in the others; 2 never has any."""
    layer = PartitionedNorm(3, 4, momentum=0.01).double()
    batches = [torch.randn(9, 4, dtype=F64, generator=generator(seed)) * 0.01 + 0.5 for seed in range(9)]
    for number, rows in enumerate(batches):
        layer(rows, torch.tensor([0] * 6 + [1] * 3 if number % 3 == 0 else [0] * 8 + [1]))
    means = torch.stack([rows[: 6 if number % 3 == 0 else 8].mean(dim=0) for number, rows in enumerate(batches)])
    seldom = [rows[6:] for rows in batches[::3]]
    torch.testing.assert_close(layer.running_mean[0], means.mean(dim=0))
    torch.testing.assert_close(layer.running_mean[1], torch.stack([rows.mean(dim=0) for rows in seldom]).mean(dim=0))
    torch.testing.assert_close(layer.running_var[1], torch.stack([rows.var(dim=0) for rows in seldom]).mean(dim=0))
    assert layer.num_batches_tracked.tolist() == [9, 3, 0]
    assert (layer.running_mean[2] == 0).all()
    assert (layer.running_var[2] == 1).all()


def test_a_layer_that_goes_on_from_a_state_is_one_that_was_not_interrupted():
    whole, second = PartitionedNorm(2, 3), PartitionedNorm(2, 3)
    batches = [torch.randn(8, 3, generator=generator(seed)) for seed in range(6)]
    for number, rows in enumerate(batches):
        if number == 3:
            second.load_state_dict(whole.state_dict())
        for layer in (whole, second) if number >= 3 else (whole,):
            layer(rows, torch.arange(8) % 2)
    for key, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key


@pytest.mark.usefixtures("either_form")
def test_rows_of_other_scenarios_change_no_bit():
    layer = PartitionedNorm(3, 5)
    scenario = torch.arange(60) % 3
    x = torch.randn(60, 5, generator=generator())
    changed = torch.where((scenario == 1).unsqueeze(1), x, x * -7 + 2)
    one, two = (layer(rows, scenario)[scenario == 1] for rows in (x, changed))
    assert torch.equal(one, two)


@pytest.mark.usefixtures("either_form")
def test_float32_keeps_a_small_variance_beside_a_large_mean():
    scenario = torch.arange(2000) % 2
    x = torch.randn(2000, 3, generator=generator()) * 0.1 + torch.tensor([0.0, 1000.0])[scenario].unsqueeze(1)
    y = PartitionedNorm(2, 3, eps=1e-6)(x, scenario)
    exact = PartitionedNorm(2, 3, eps=1e-6).double()(x.double(), scenario)
    # A mean of 1000 is known to some units of 6e-5, here 6e-4 deviations; E[x^2] - E[x]^2 would be wrong by 10 variances.
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-2)
    torch.testing.assert_close(y[scenario == 1].std(dim=0), torch.ones(3), rtol=1e-3, atol=0)


def test_moments_are_float32_under_autocast():
    layer, reference = PartitionedNorm(2, 4), PartitionedNorm(2, 4)
    scenario = torch.arange(64) % 2
    x = torch.randn(64, 4, generator=generator()) + 10
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, scenario)
        half = layer(x.bfloat16(), scenario)
    assert torch.equal(y, reference(x, scenario))
    assert half.dtype == torch.bfloat16
    assert layer.running_mean.dtype == torch.float32


def whole_batch():
    """Scenario 0 on both ranks, 1 with one row on each, 2 on one rank only, 3 with one row, 4 nowhere; padding on rank 1."""
    g = generator(4)
    scenario = torch.tensor([0, 0, 1, 2, 2, 0, 1, 0, 0, 3, 0])
    valid = torch.tensor([True] * 10 + [False])
    return torch.randn(11, 3, generator=g, dtype=F64), torch.randn(11, 3, generator=g, dtype=F64), scenario, valid


def rank_part(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    x, pull, scenario, valid = whole_batch()
    part = slice(0, 5) if rank == 0 else slice(5, 11)
    mine = x[part].clone().requires_grad_()
    layer = random_norm(5, 3)
    y = layer(mine, scenario[part], valid[part])
    y.backward(pull[part])
    gradients = [p.grad for p in layer.parameters()]
    layer(mine, scenario[part], valid[part])  # The second of a count is half of the running statistics.
    statistics = layer.running_mean, layer.running_var, layer.num_batches_tracked
    torch.save((y.detach(), mine.grad, gradients, *statistics), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    spawn(rank_part, (port, tmp_path), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    x, pull, scenario, valid = whole_batch()
    x.requires_grad_()
    layer = random_norm(5, 3)
    y = layer(x, scenario, valid)
    y.backward(pull)
    layer(x, scenario, valid)
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), y.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), x.grad, rtol=1e-8, atol=1e-10)
    for first, second, parameter in zip(parts[0][2], parts[1][2], layer.parameters(), strict=True):
        torch.testing.assert_close(first + second, parameter.grad, rtol=1e-9, atol=1e-11)
    for p in parts:
        torch.testing.assert_close(p[3], layer.running_mean)
        torch.testing.assert_close(p[4], layer.running_var)
        assert p[5].tolist() == layer.num_batches_tracked.tolist() == [2, 2, 2, 0, 0]
