"""Hard-concrete gates against closed forms, and gated connections against a loop."""

from __future__ import annotations

import math

import pytest
import torch

from mmlrec.layers.hard_concrete import GatedConnections, HardConcrete, HardConcreteOptions, split_noise
from mmlrec.layers.scenario import Dispatch
from tests.models.support import mean_gate

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gates(values, **options):
    module = HardConcrete((len(values),), HardConcreteOptions(**options), generator()).double()
    with torch.no_grad():
        module.log_alpha.copy_(torch.tensor(values, dtype=F64))
    return module


OPTIONS = [{}, {"beta": 2 / 3}, {"beta": 3.0}, {"gamma": -0.4, "zeta": 1.7}, {"gamma": -1e-6, "zeta": 1 + 1e-6}]


@pytest.mark.parametrize("options", OPTIONS)
def test_gates_in_evaluation_are_the_mean_of_those_in_training(options):
    values = [-6.0, -2.4, 0.0, 2.0, 2.4, 7.0]
    module = gates(values, **options).eval()
    o = module.options
    expected = [mean_gate(value, o.beta, o.gamma, o.zeta) for value in values]
    torch.testing.assert_close(module(), torch.tensor(expected, dtype=F64), rtol=0, atol=1e-9)
    torch.testing.assert_close(module.float()(), torch.tensor(expected), rtol=0, atol=1e-6)
    # The draws of training themselves, at equal distances over all uniform numbers.
    draws = 20_000
    uniform = (torch.arange(draws, dtype=F64) + 0.5) / draws
    for value, mean in zip(values, expected, strict=True):
        assert gates([value] * draws, **options)(uniform).mean().item() == pytest.approx(mean, abs=1e-6)


def test_worked_gates_in_evaluation():
    # By symmetry a gate at 0 is half open, and two at opposite places are 1 together; beta = 1 has a closed form:
    # with r = exp(log_alpha), P(z > t) = r (zeta - t) / (r (zeta - t) + t - gamma).
    z = gates([-2.0, 0.0, 2.0]).eval()()
    torch.testing.assert_close(z, torch.tensor([0.1603855, 0.5, 0.8396145], dtype=F64), rtol=0, atol=1e-6)
    z = gates([2.0], beta=1.0).eval()()
    r, gamma, zeta = math.exp(2.0), -0.1, 1.1
    a, b = r * zeta - gamma, 1 - r  # P(z > t) = r (zeta - t) / (a + b t)
    expected = r * ((zeta + a / b) / b * math.log((a + b) / a) - 1 / b)
    assert z.item() == pytest.approx(expected, abs=1e-12)


def test_a_gate_is_never_more_open_than_it_is_likely_to_be_open():
    module = gates(torch.linspace(-15, 15, 301).tolist()).eval()
    z = module()
    assert (z > 0).all()
    assert (z <= module.open_probability()).all()
    assert (z.diff() > 0).all()


def test_worked_open_probabilities():
    found = gates([-2.0, 0.0, 2.0]).open_probability()
    torch.testing.assert_close(found, torch.tensor([0.5394443, 0.8964238, 0.9846036], dtype=F64), rtol=0, atol=1e-6)


def test_worked_gates_in_training():
    z = gates([0.0, 0.0, 2.0])(torch.tensor([0.5, 0.1, 0.9], dtype=F64))
    torch.testing.assert_close(z, torch.tensor([0.5, 0.0, 1.0], dtype=F64), rtol=0, atol=1e-6)
    # Before clamping: s = 0.0800727 and 0.9906556, seen through an interval so wide that nothing is clamped.
    wide = gates([0.0, 2.0], gamma=-1e-9, zeta=1 + 1e-9)(torch.tensor([0.1, 0.9], dtype=F64))
    torch.testing.assert_close(wide, torch.tensor([0.0800727, 0.9906556], dtype=F64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"beta": 2 / 3}, {"gamma": -0.4, "zeta": 1.7}])
def test_open_as_often_as_the_closed_form_says(options):
    draws = 100_000
    for log_alpha in (-3.0, -1.0, 0.5, 2.0):
        module = gates([log_alpha] * draws, **options)
        z = module(torch.rand(draws, dtype=F64, generator=generator(1)))
        p = module.open_probability()[0].item()
        assert abs((z != 0).double().mean().item() - p) < 3 * math.sqrt(p * (1 - p) / draws)
        # Open to the full with P(s > (1 - gamma) / (zeta - gamma)), by the distribution function of the logistic.
        o = module.options
        edge = (1 - o.gamma) / (o.zeta - o.gamma)
        full = 1 / (1 + math.exp(o.beta * math.log(edge / (1 - edge)) - log_alpha))
        assert abs((z == 1).double().mean().item() - full) < 3 * math.sqrt(full * (1 - full) / draws)


def test_saturated_gates_are_exact_and_have_a_gradient_of_zero():
    module = gates([20.0, -20.0])
    z = module(torch.tensor([0.001, 0.999], dtype=F64))
    assert z.tolist() == [1.0, 0.0]
    z.sum().backward()
    assert module.log_alpha.grad.tolist() == [0.0, 0.0]
    # The mean has what there is of a chance left: exp(-20) of it.
    torch.testing.assert_close(module.eval()(), torch.tensor([1.0, 0.0], dtype=F64), rtol=0, atol=5e-9)


def test_gradient_of_an_open_gate():
    module = gates([0.3])
    module(torch.tensor([0.6], dtype=F64)).backward()
    s = 1 / (1 + math.exp(-(math.log(0.6 / 0.4) + 0.3) / 0.9))
    assert module.log_alpha.grad.item() == pytest.approx(1.2 * s * (1 - s) / 0.9, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_noise_at_the_ends_stays_finite(dtype):
    module = gates([2.0, 2.0, 0.0]).to(dtype)
    z = module(torch.tensor([0.0, 1.0, 0.5], dtype=torch.float32))
    z.sum().backward()
    assert z.tolist() == pytest.approx([0.0, 1.0, 0.5])
    assert module.log_alpha.grad.isfinite().all()


def test_noise_is_drawn_when_it_is_absent_and_not_read_in_evaluation():
    module = HardConcrete((50, 3), HardConcreteOptions(), generator())
    assert module.num_noise == 150
    assert not torch.equal(module(), module())
    noise = torch.rand(150, generator=generator(2))
    assert torch.equal(module(noise), module(noise))
    assert not torch.equal(module(noise), module(1 - noise))
    module.eval()
    assert torch.equal(module(), module(noise))


def test_start_of_the_gates():
    log_alpha = HardConcrete((100, 100), HardConcreteOptions(log_alpha_init=1.5), generator()).log_alpha
    assert log_alpha.mean().item() == pytest.approx(1.5, abs=1e-3)
    assert log_alpha.std().item() == pytest.approx(0.01, rel=0.05)


def test_split_noise_hands_out_each_number_once():
    modules = [HardConcrete(shape, HardConcreteOptions(), generator()) for shape in ((2, 3), (4,), (1, 2, 5))]
    parts = split_noise(torch.arange(20.0), modules)
    assert [len(part) for part in parts] == [6, 4, 10]
    assert torch.cat(parts).tolist() == list(range(20))
    assert split_noise(None, modules) == [None] * 3


@pytest.mark.parametrize("cells", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("tasks", "scenarios", "inputs", "width"), [(1, 3, 4, 7), (2, 5, 2, 5), (3, 1, 1, 13)])
def test_connections_equal_a_loop(cells, grouped, tasks, scenarios, inputs, width):
    outputs = tasks * scenarios
    module = GatedConnections(outputs, inputs, width, HardConcreteOptions(0.0), generator(), cells=cells).double()
    with torch.no_grad():
        module.gates.log_alpha.normal_(0.0, 1.5, generator=generator(4))
    u = torch.randn(inputs, 11, width, dtype=F64, generator=generator(1))
    noise = torch.rand(module.gates.num_noise, generator=generator(2))
    z = module.gates(noise)
    assert ((z == 0) | (z == 1)).any(), "the case shows nothing about clamped gates"
    assert ((z > 0) & (z < 1)).any()
    expected = torch.zeros(outputs, 11, width, dtype=F64)
    for i in range(outputs):
        for b in range(11):
            for j in range(inputs):
                for c in range(width):
                    gate = z[i, j, c] if cells else z[i, j]
                    expected[i, b, c] += gate * sum(u[j, b, a] * module.weight[i, j, a, c] for a in range(width))
    torch.testing.assert_close(module(u, noise), expected, rtol=1e-12, atol=1e-12)
    scenario = torch.randint(0, scenarios, (11,), generator=generator(3))
    own = torch.stack([expected[scenario + t * scenarios, torch.arange(11)] for t in range(tasks)])
    dispatch = Dispatch(scenario, scenarios, grouped=grouped)
    for dtype, tolerance in ((F64, 1e-12), (torch.float32, 1e-5)):
        module.to(dtype)
        found = dispatch.restore(module.own(dispatch.arrange(u.to(dtype)), dispatch, noise))
        torch.testing.assert_close(found.to(F64), own, rtol=tolerance, atol=tolerance)


def test_connections_start_with_the_variance_of_one_xavier_map():
    module = GatedConnections(6, 4, 64, HardConcreteOptions(20.0), generator())
    assert module.weight.std().item() == pytest.approx(1 / math.sqrt(64 * 4), rel=0.02)
    u = torch.randn(4, 512, 64, generator=generator(1))
    assert module(u).var().item() == pytest.approx(1.0, rel=0.05)


def test_gates_stay_float32_under_autocast():
    module = GatedConnections(2, 3, 8, HardConcreteOptions(), generator())
    with torch.autocast("cpu", torch.bfloat16):
        assert module.gates().dtype == torch.float32
        assert module(torch.randn(3, 5, 8)).dtype == torch.bfloat16
