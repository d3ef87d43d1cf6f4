"""One backward leaves the gradients that separate backwards of each objective, combined by hand, would leave."""

import numpy as np
import pytest
import torch

from mmlrec.balancing.build import build_balancing
from mmlrec.balancing.gradients import GradientBalancing
from mmlrec.errors import ConfigError
from mmlrec.losses import LossOptions
from mmlrec.registry import method, method_names, strategy
from mmlrec.schema import Setting
from tests.balancing.support import make
from tests.models.support import build, make_data, make_spec, spec_of, supports

GRADIENT_LEVEL = ("gradnorm", "pcgrad", "mgda", "cagrad", "imtl_g", "nash", "aligned", "metabalance")
UNITS = ("task", "scenario", "head")
CASES = [("mtl", "task"), ("mtl", "head"), ("msl", "scenario"), ("msl-many", "head"), *(("mtmsl", unit) for unit in UNITS)]
#: What one objective owns in each case; in MTL a task has one head, in MSL a scenario has.
OWNED = {
    ("mtl", "task"): {"head", "task"},
    ("mtl", "head"): {"head", "task"},
    ("msl", "scenario"): {"head", "scenario"},
    ("msl", "head"): {"head", "scenario"},
    ("mtmsl", "task"): {"head", "task"},
    ("mtmsl", "scenario"): {"head", "scenario"},
    ("mtmsl", "head"): {"head"},
}
EVERYWHERE = [
    (name, shape, unit)
    for name in method_names()
    for shape, unit in CASES
    if supports(name, spec_of(shape)) and not method(name).tables_per_branch
]


class Case:
    """A network in float64, a batch with conflicting tasks and masked labels, and a strategy."""

    def __init__(self, name, shape, unit, rows=40, **options):
        self.net = build(name, spec_of(shape)).double()
        self.net.train()
        self.data = make_data(self.net, rows, dtype=torch.float64)
        self.data.mask[:7, 0] = 0
        if self.net.spec.num_tasks > 1:
            self.data.labels[:, 1] = 1 - self.data.labels[:, 0]
        self.loss = self.net.make_loss(LossOptions(unit=unit))
        self.owners = {name: self.net.owner(name) for name, _ in self.net.named_parameters()}
        self.sole = {name: self.net.sole(name) for name, _ in self.net.named_parameters()}
        self.options = options

    def strategy(self, name, **options):
        chosen = strategy(name)
        config = chosen.Config(**(self.options | options))
        looked_up = sum(self.net.spec.fields.values())
        return build_balancing(name, chosen, config, self.loss, self.owners, self.sole, looked_up, seed=0, steps_per_epoch=5)

    def objectives(self, x, only=None):
        """[K], from a new forward pass."""
        parts = x[:, : sum(self.net.spec.fields.values())].split(list(self.net.spec.fields.values()), dim=1)
        output = self.net(x, dict(zip(self.net.spec.fields, parts, strict=True)), self.data.scenario)
        targets = (self.data.labels, self.data.mask, self.data.scenario, self.data.weight)
        found = self.loss(output, *targets, self.loss.denominators(*targets))
        return torch.stack([found[name] for name in self.loss.objectives])

    def backward(self, loss_of):
        """Gradients by name, `x` included, after one ordinary backward."""
        self.net.zero_grad(set_to_none=True)
        x = self.data.x.clone().requires_grad_()
        value = loss_of(x)
        value.backward()
        zero = {name: torch.zeros_like(p) for name, p in self.net.named_parameters()}
        given = {name: p.grad for name, p in self.net.named_parameters() if p.grad is not None}
        return value.detach(), {"x": x.grad, **zero, **given}

    def of_each(self):
        """The gradients of each objective, each from a forward and a backward of its own."""
        count = len(self.loss.objectives)
        return [self.backward(lambda x, k=k: self.objectives(x)[k])[1] for k in range(count)]

    def owned(self):
        """Name -> 1 where one objective owns a number, else 0, in the shape of the parameter."""
        setting, unit = self.net.spec.setting, self.loss.unit
        found = {"x": torch.zeros_like(self.data.x)}
        for name, parameter in self.net.named_parameters():
            parts = (False,)
            if self.owners[name] in OWNED[setting, unit]:
                parts = (True,)
            elif self.sole[name] and (unit == "task" or setting is Setting.MTL or (unit == "head" and self.owners[name])):
                parts = self.sole[name]
            own = torch.tensor(parts, dtype=torch.float64).repeat_interleave(parameter.numel() // len(parts))
            found[name] = own.view_as(parameter)
        return found

    def gram(self, of_each, scope):
        """Inner products, vector by vector."""
        width = sum(self.net.spec.fields.values())
        vectors = []
        for own in of_each:
            parts = []
            if scope != "embedding":
                parts += [((1 - self.owned()[name]) * g).flatten() for name, g in own.items() if name != "x"]
            if scope != "shared_dense":
                parts.append(own["x"][:, :width].flatten())
            vectors.append(torch.cat(parts).numpy())
        return np.array([[a @ b for b in vectors] for a in vectors])


@pytest.mark.parametrize(("name", "shape", "unit"), EVERYWHERE)
def test_gradients_equal_the_explicit_form(name, shape, unit):
    case = Case(name, shape, unit)
    if case.net.num_noise:
        case.net.eval()  # gates without noise: the explicit form runs one forward pass for each objective
    of_each = case.of_each()
    for key, owned in case.owned().items():
        # Owned means: no number of it is trained by two objectives. Else each part of it is.
        by = torch.stack([own[key] != 0 for own in of_each])
        assert (by.sum(0)[owned == 1] <= 1).all(), key
        for part in torch.arange(owned.numel()).chunk(len(case.sole.get(key) or (0,))):
            if (owned.flatten()[part] == 0).all():
                assert by.flatten(1)[:, part].any(1).sum() >= 2, key
    closer = [("pcgrad", "shared_dense"), ("cagrad", "embedding")] if name in ("shared_bottom", "mmoe", "ple") else []
    for rule, scope in [("mgda", "both"), *closer]:
        strategy = case.strategy(rule, scope=scope)
        value, found = case.backward(lambda x, s=strategy: s(case.objectives(x), x, dict(case.net.named_parameters()), 1))
        gram = case.gram(of_each, scope)
        np.testing.assert_allclose(strategy.gram.numpy(), gram, rtol=1e-9, atol=1e-15)
        c = case.strategy(rule, scope=scope).coefficients(torch.from_numpy(gram), case.objectives(case.data.x).detach(), 1)
        torch.testing.assert_close(strategy.coefficient, c, rtol=1e-6, atol=1e-9)
        for key, gradient in found.items():
            owned = case.owned()[key]
            factors = [owned + (1 - owned) * f for f in strategy.coefficient.tolist()]
            expected = sum(f * own[key] for f, own in zip(factors, of_each, strict=True))
            torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-13, msg=lambda m, key=key: f"{key}: {m}")
        torch.testing.assert_close(value, case.objectives(case.data.x).sum().detach(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["shared_bottom", "mmoe", "ple", "star", "esmm", "aitm"])
def test_cached_coefficients_give_the_same_gradients(name):
    case = Case(name, "mtmsl", "task")
    every = case.strategy("pcgrad")
    cached = case.strategy("pcgrad", refresh_every=3)
    cached.load_state_dict(every.state_dict())
    with torch.no_grad():
        cached.coefficient.copy_(torch.tensor([0.7, -0.2], dtype=torch.float64))
    every.coefficients = lambda gram, losses, step: torch.tensor([0.7, -0.2], dtype=torch.float64)
    results = [
        case.backward(lambda x, s=s: s(case.objectives(x), x, dict(case.net.named_parameters()), 2)) for s in (every, cached)
    ]
    for key, expected in results[0][1].items():
        torch.testing.assert_close(results[1][1][key], expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("made", "told"), [(np.ones(2), "returns a ndarray"), (torch.ones(()), r"returns a tensor \[\]"), (torch.ones(3), r"\[3\]")]
)
def test_coefficients_that_are_no_tensor_of_the_objectives_are_refused(made, told):
    """A strategy of before that overrode them with arrays is told where it belongs."""
    case = Case("mmoe", "mtl", "task")
    strategy = case.strategy("mgda")
    strategy.coefficients = lambda gram, losses, step: made
    with pytest.raises(TypeError, match=rf"balancing.name=mgda: \w+.coefficients .*{told}.* a tensor \[2\].*`rule`"):
        case.backward(lambda x: strategy(case.objectives(x), x, dict(case.net.named_parameters()), 1))


def test_coefficients_are_computed_every_n_steps_only():
    case = Case("shared_bottom", "mtl", "task", refresh_every=4)
    strategy, seen = case.strategy("mgda"), []
    plain = strategy.coefficients
    strategy.coefficients = lambda gram, losses, step: seen.append(step) or plain(gram, losses, step)
    for step in range(1, 11):
        case.backward(lambda x, step=step: strategy(case.objectives(x), x, dict(case.net.named_parameters()), step))
    assert seen == [1, 5, 9]


def test_an_objective_with_coefficient_zero_still_trains_its_head():
    case = Case("mmoe", "mtl", "task")
    strategy = case.strategy("mgda")
    strategy.coefficients = lambda gram, losses, step: torch.tensor([1.0, 0.0], dtype=torch.float64)
    _, found = case.backward(lambda x: strategy(case.objectives(x), x, dict(case.net.named_parameters()), 1))
    first, second = case.of_each()
    torch.testing.assert_close(found["experts.weights.0"], first["experts.weights.0"])
    assert (found["towers.weight"][1] != 0).any()
    torch.testing.assert_close(found["towers.weight"][1], second["towers.weight"][1])


@pytest.mark.parametrize("unit", ["task", "head"])
@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("esmm", ["towers.weight", "towers.hidden.weights.0"]),
        ("escm2", ["towers.bias", "towers.hidden.biases.1"]),
        ("aitm", ["bottoms.weights.0"]),
    ],
)
def test_a_chain_step_that_only_its_own_loss_trains_is_left_alone(name, own, unit):
    """c = (1, 0): the last step's part gets the whole gradient of its loss, the first step's only that of the first loss."""
    case = Case(name, "mtl", unit)
    strategy = case.strategy("mgda")
    strategy.coefficients = lambda gram, losses, step: torch.tensor([1.0, 0.0], dtype=torch.float64)
    _, found = case.backward(lambda x: strategy(case.objectives(x), x, dict(case.net.named_parameters()), 1))
    first, second = case.of_each()
    for key in own:
        assert (second[key][1] != 0).any()
        assert (first[key][1] == 0).all()
        torch.testing.assert_close(found[key][1], second[key][1], rtol=1e-12, atol=0)
        torch.testing.assert_close(found[key][0], first[key][0], rtol=1e-12, atol=0)
    if name == "aitm":
        for key in ("maps", "transfers.0.weights.0"):
            torch.testing.assert_close(found[key], second[key], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", GRADIENT_LEVEL)
def test_an_objective_without_rows_leaves_the_others_alone(name):
    """Two objectives of which one is masked in this batch: training is that of the other alone."""
    case = Case("shared_bottom", "mtl", "task")
    case.data.mask[:, 1] = 0
    strategy = case.strategy(name)
    _, found = case.backward(lambda x: strategy(case.objectives(x), x, dict(case.net.named_parameters()), 1))
    _, alone = case.backward(lambda x: case.objectives(x)[0])
    factor = strategy.coefficient[0].item()
    assert factor == pytest.approx(1.2 if name == "cagrad" else 1 / 1.01**0.5 if name == "nash" else 1)
    for key, gradient in found.items():
        owned = case.owned()[key]
        expected = alone[key] * (owned + (1 - owned) * factor)
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", ["static", "monitor"])
def test_static_and_monitor_equal_the_plain_sum_to_the_bit(name):
    case = Case("ple", "mtmsl", "head")
    strategy = case.strategy(name)
    value, found = case.backward(lambda x: strategy(case.objectives(x), x, dict(case.net.named_parameters()), 1))
    expected_value, expected = case.backward(lambda x: case.objectives(x).sum())
    assert value == expected_value
    assert all(found[key].equal(gradient) for key, gradient in expected.items())
    assert isinstance(strategy, GradientBalancing) == (name == "monitor")


def test_metabalance_follows_the_main_objective():
    case = Case("mmoe", "mtl", "task")
    strategy = case.strategy("metabalance", main="t1", r=1.0)
    for step in range(1, 4):
        case.backward(lambda x, step=step: strategy(case.objectives(x), x, dict(case.net.named_parameters()), step))
    norms = strategy.gram.diagonal().sqrt()  # constant here, so the moving averages equal them
    torch.testing.assert_close(strategy.coefficient * norms, norms[1].expand(2))


def test_gradnorm_weights_descend_and_keep_their_sum():
    case = Case("mmoe", "mtl", "task")
    strategy = case.strategy("gradnorm", lr=0.1)
    run = dict(case.net.named_parameters())
    case.backward(lambda x: strategy(case.objectives(x), x, run, 1))
    assert strategy.coefficient.tolist() == [1, 1]
    n = strategy.gram.diagonal().sqrt().numpy()
    # At the first step all rates are 1, the target is the mean norm.
    stepped = 1 - 0.1 * np.sign(n - n.mean()) * n
    case.backward(lambda x: strategy(case.objectives(x), x, run, 2))
    np.testing.assert_allclose(strategy.coefficient.numpy(), 2 * stepped / stepped.sum(), rtol=1e-12)


def coefficients_of(strategy, losses, matrices):
    """Step by step, [steps, K]."""
    steps = enumerate(zip(matrices, losses, strict=True), 1)
    return np.array(
        [strategy.coefficients(torch.from_numpy(gram), torch.from_numpy(own), step).numpy() for step, (gram, own) in steps]
    )


def random_grams(steps, count, seed):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(steps, count, 6)) * rng.uniform(0.2, 3, (steps, count, 1))
    return vectors @ vectors.transpose(0, 2, 1)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_gradnorm_equals_a_loop(alpha):
    """Rates are measured from the first losses; w falls against sign(w n - target) n, is floored and scaled to sum K."""
    matrices = random_grams(30, 3, seed=1)
    losses = np.random.default_rng(2).uniform(0.1, 1.0, (30, 3))
    strategy = make("gradnorm", 3, alpha=alpha, lr=0.1)
    found, w, floored = coefficients_of(strategy, losses, matrices), [1.0, 1.0, 1.0], 0
    for step in range(30):
        assert found[step] == pytest.approx(w, rel=1e-12)
        n = [matrices[step][t][t] ** 0.5 for t in range(3)]
        rates = [losses[step][t] / losses[0][t] for t in range(3)]
        mean_norm, mean_rate = sum(w[t] * n[t] for t in range(3)) / 3, sum(rates) / 3
        for t in range(3):
            target = mean_norm * (rates[t] / mean_rate) ** alpha
            w[t] -= 0.1 * n[t] * (1 if w[t] * n[t] > target else -1)
        floored += sum(value < 1e-4 for value in w)
        w = [max(value, 1e-4) for value in w]
        w = [3 * value / sum(w) for value in w]
    assert floored


def test_metabalance_equals_a_loop():
    """Norms are moving averages over the steps in which an objective has a gradient."""
    matrices = random_grams(12, 3, seed=3)
    matrices[4, 1] = matrices[4, :, 1] = 0
    matrices[0, 2] = matrices[0, :, 2] = 0
    strategy = make("metabalance", 3, main="t1", r=0.6, beta=0.8)
    found, mean = coefficients_of(strategy, np.ones((12, 3)), matrices), [None] * 3
    for step in range(12):
        for t in range(3):
            n = matrices[step][t][t] ** 0.5
            if n:
                mean[t] = n if mean[t] is None else 0.8 * mean[t] + 0.2 * n
        expected = [1.0 if m is None else 0.6 * mean[1] / m + 0.4 for m in mean]
        assert found[step] == pytest.approx(expected, rel=1e-12)


def test_scale_is_that_of_a_sum():
    """CAGrad without radius is the sum; IMTL-G's and MGDA's coefficients add up to K; Nash: c_t (Q c)_t = 1 - ridge a_t^2."""
    gram = random_grams(1, 3, seed=4)[0]
    losses = np.ones(3)
    rules = [make(name, 3).rule for name in ("imtl_g", "mgda")]
    assert make("cagrad", 3, c_a=0.0).rule(gram, losses, 1) == pytest.approx([1, 1, 1], rel=1e-9)
    for rule in rules:
        assert rule(gram, losses, 1).sum() == pytest.approx(3, rel=1e-9)
    for ridge in (0.01, 0.3):
        c = make("nash", 3, ridge=ridge).rule(gram, losses, 1)
        size = np.linalg.norm(gram)
        assert c * (gram / size @ c) == pytest.approx(1 - ridge * c**2 * np.diag(gram) / size, rel=1e-8)


def test_report_names_cosines_norms_and_coefficients():
    case = Case("mmoe", "mtl", "task")
    strategy = case.strategy("pcgrad")
    case.backward(lambda x: strategy(case.objectives(x), x, dict(case.net.named_parameters()), 1))
    gram = case.gram(case.of_each(), "shared_dense")
    report = strategy.report(case.loss.objectives)
    assert report["balancing/norm/t0"] == pytest.approx(gram[0, 0] ** 0.5)
    assert report["balancing/cosine/t0~t1"] == pytest.approx(gram[0, 1] / (gram[0, 0] * gram[1, 1]) ** 0.5)
    assert set(report) == {f"balancing/{k}" for k in ("norm/t0", "norm/t1", "cosine/t0~t1", "coefficient/t0", "coefficient/t1")}


@pytest.mark.parametrize("name", ["shared_bottom", "star", "apg", "pepnet", "hmoe"])
def test_with_one_task_heads_are_scenarios(name):
    coefficients = []
    for unit in ("scenario", "head"):
        case = Case(name, "msl-many", unit)
        strategy = case.strategy("mgda")
        case.backward(lambda x, c=case, s=strategy: s(c.objectives(x), x, dict(c.net.named_parameters()), 1))
        coefficients.append(strategy.coefficient)
    assert torch.equal(*coefficients)


@pytest.mark.parametrize("unit", UNITS)
def test_objectives_of_every_unit_add_up(unit):
    case = Case("mmoe", "mtmsl", unit)
    expected = Case("mmoe", "mtmsl", "task").objectives(case.data.x)
    found = case.objectives(case.data.x)
    torch.testing.assert_close(found.sum(), expected.sum(), rtol=1e-12, atol=0)
    if unit == "head":
        assert case.loss.objectives == ("t0/0", "t0/1", "t0/2", "t1/0", "t1/1", "t1/2")
        torch.testing.assert_close(found.view(2, 3).sum(1), expected, rtol=1e-12, atol=0)


def test_refusals():
    case = Case("mmoe", "msl", "task")
    with pytest.raises(ConfigError, match="2 or more objectives"):
        case.strategy("pcgrad")
    with pytest.raises(ConfigError, match="'t9' is not an objective of this run"):
        case.strategy("static", loss_weights={"t9": 1.0})
    case = Case("mmoe", "msl", "scenario")
    case.owners = dict.fromkeys(case.owners, "head")
    with pytest.raises(ConfigError, match=r"shares no parameters.*scope=embedding"):
        case.strategy("pcgrad")
    case.strategy("pcgrad", scope="embedding")


def test_regression_and_scenarios_in_uncertainty_weighting():
    spec = make_spec(2, 3)
    assert spec.setting is Setting.MTMSL
    case = Case("mmoe", "mtmsl", "head")
    assert case.strategy("uw").kappa.tolist() == [1.0] * 6
    tasks = (case.loss.tasks[0], case.loss.tasks[1].model_copy(update={"kind": "regression"}))
    case.loss.tasks = tasks
    assert case.strategy("uw").kappa.tolist() == [1.0] * 3 + [0.5] * 3


@pytest.mark.parametrize("strategy", GRADIENT_LEVEL)
def test_a_gradient_that_is_not_finite_is_added_and_leaves_no_trace_in_the_strategy(strategy):
    case = Case("mmoe", "mtl", "task")
    balancing = case.strategy(strategy)
    before = {key: value.clone() for key, value in balancing.state_dict().items() if key != "gram"}
    parameters = dict(case.net.named_parameters())
    entry = case.net.experts.weights[0].flatten()[0]

    def loss_of(x):
        steep = torch.sqrt(entry - entry.detach())  # 0, with an infinite slope
        return balancing(case.objectives(x) + torch.stack([torch.zeros_like(steep), steep]), x, parameters, 1)

    loss, found = case.backward(loss_of)
    assert loss.isfinite()
    assert found["experts.weights.0"].isfinite().logical_not().sum() == 1
    for key, value in before.items():
        assert balancing.state_dict()[key].equal(torch.ones_like(value) if key == "coefficient" else value), key
