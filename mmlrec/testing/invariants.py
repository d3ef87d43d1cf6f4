"""What holds for every method in every setting (models.md section 7). A new method file is picked up by its name."""

from __future__ import annotations

import copy

import pytest
import torch

from mmlrec.config import ConfigError
from mmlrec.models.base.model import ModelSpec
from mmlrec.registry import method, method_names, model_config
from tests.models.support import SHAPES, build, losses, make_data, make_spec, spec_of, step, supports

CASES = [(name, shape) for name in method_names() for shape in SHAPES if supports(name, spec_of(shape))]
SCENARIO_CASES = [(name, shape) for name, shape in CASES if shape != "mtl"]


def members_by_scenario(net, gradients):
    """Gradients of the parameters that heads or scenarios own, as name -> [.., S, elements]."""
    for key, gradient in gradients.items():
        if net.owner(key) not in ("head", "scenario"):
            continue
        stack = net.get_submodule(key.split(".norms.")[0]).stack if ".norms." in key else gradient.shape[0]
        yield key, gradient.reshape(-1, net.spec.num_scenarios, gradient.numel() // stack)


def owning_heads(net, owner, member):
    """Heads (task, scenario) that may train a member of an owned parameter."""
    tasks, scenarios = range(net.spec.num_tasks), range(net.spec.num_scenarios)
    return {
        (t, s) for t in tasks for s in scenarios if member == {"head": t * len(scenarios) + s, "task": t, "scenario": s}[owner]
    }


@pytest.mark.parametrize(("name", "shape"), CASES)
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_shapes_and_types(name, shape, rows):
    net = build(name, spec_of(shape))
    data = make_data(net, rows)
    output = net(data.x, data.fields, data.scenario, return_all_heads=True)
    assert output.logits.shape == (rows, net.spec.num_tasks)
    assert output.all_logits.shape == (rows, net.spec.num_heads)
    assert output.logits.dtype == torch.float32
    assert output.all_logits.isfinite().all()
    heads = torch.arange(net.spec.num_tasks) * net.spec.num_scenarios + data.scenario.view(-1, 1)
    torch.testing.assert_close(output.logits, output.all_logits.gather(1, heads), rtol=0, atol=0)
    # Computing only the own scenario's heads gives the same logits.
    alone = net(data.x, data.fields, data.scenario)
    assert alone.all_logits is None
    torch.testing.assert_close(alone.logits, output.logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "shape"), CASES)
@pytest.mark.parametrize("use_bn", [False, True])
def test_state_dict_holds_everything_and_copies_are_equal(name, shape, use_bn):
    spec = spec_of(shape)
    net = build(name, spec, use_bn=use_bn)
    data = make_data(net, 16)
    step(net, data)
    other = build(name, ModelSpec(**{**vars(spec), "seed": 9}), use_bn=use_bn)
    other.load_state_dict(net.state_dict())
    copied = copy.deepcopy(net).eval()
    net.eval(), other.eval()
    expected = net(data.x, data.fields, data.scenario).logits
    for again in (other, copied):
        torch.testing.assert_close(again(data.x, data.fields, data.scenario).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_every_tensor_of_the_state_dict_influences_the_output(name, shape):
    net = build(name, spec_of(shape), use_bn=True).double().eval()
    data = make_data(net, 64, dtype=torch.float64)
    before = net(data.x, data.fields, data.scenario).logits
    for key, value in net.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        kept = value.clone()
        value.add_(torch.rand(value.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) + 0.1)
        after = net(data.x, data.fields, data.scenario).logits
        assert not torch.equal(before, after), key
        value.copy_(kept)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_initial_weights_depend_on_the_seed_only(name, shape):
    spec = spec_of(shape)
    torch.manual_seed(1)
    one = build(name, spec).state_dict()
    torch.manual_seed(2)
    two = build(name, spec).state_dict()
    other = build(name, ModelSpec(**{**vars(spec), "seed": 1})).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_every_parameter_has_a_gradient_and_moves(name, shape):
    net = build(name, spec_of(shape))
    data = make_data(net, 256)
    before = {key: value.clone() for key, value in net.named_parameters()}
    step(net, data)
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    for key, value in net.named_parameters():
        assert not torch.equal(value, before[key]), key


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_permuting_the_batch_permutes_the_output(name, shape):
    net = build(name, spec_of(shape)).double()
    data = make_data(net, 33, dtype=torch.float64)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0))
    moved = data.rows(order)
    expected = net(data.x, data.fields, data.scenario).logits[order]
    torch.testing.assert_close(net(moved.x, moved.fields, moved.scenario).logits, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "shape"), SCENARIO_CASES)
@pytest.mark.parametrize("use_bn", [False, True])
def test_a_batch_of_one_scenario_leaves_the_others_parameters_alone(name, shape, use_bn):
    net = build(name, spec_of(shape), use_bn=use_bn)
    data = make_data(net, 24)
    data.scenario[:] = 1
    _, gradients = step(net, data)
    found = dict(members_by_scenario(net, gradients))
    assert found
    others = [s for s in range(net.spec.num_scenarios) if s != 1]
    for key, members in found.items():
        assert (members[:, others] == 0).all(), key


@pytest.mark.parametrize(("name", "shape"), [c for c in CASES if c[1] != "msl-many"])
def test_owned_parameters_are_trained_by_their_owner_and_all_others_by_several_heads(name, shape):
    net = build(name, spec_of(shape))
    spec = net.spec
    data = make_data(net, 256)
    trained = {key: {} for key, _ in net.named_parameters()}
    for t in range(spec.num_tasks):
        for s in range(spec.num_scenarios):
            alone = data.rows(data.scenario == s)
            alone.mask = torch.zeros_like(alone.mask)
            alone.mask[:, t] = 1
            if net.chain:  # A step not taken tells the next one, whatever its mask.
                alone.labels[:] = 1
            if name == "escm2":  # A conversion counts only where the click is known.
                alone.mask[:, 0] = 1
            for key, gradient in step(net, alone)[1].items():
                trained[key][t, s] = gradient
    for key, gradients in trained.items():
        owner = net.owner(key)
        if owner is None:
            # What AITM passes on to its second step is trained by that step alone when it is the last and has one head.
            heads = 1 if name == "aitm" and shape == "mtl" and key.startswith(("transfers", "maps")) else 2
            assert sum(bool((gradient != 0).any()) for gradient in gradients.values()) >= heads, key
            continue
        owners = {"head": spec.num_heads, "task": spec.num_tasks, "scenario": spec.num_scenarios}[owner]
        stack = len(next(iter(gradients.values())))
        for member in range(owners):
            for head, gradient in gradients.items():
                touched = bool((gradient.reshape(-1, owners, gradient.numel() // stack)[:, member] != 0).any())
                assert touched <= (head in owning_heads(net, owner, member)), (key, member, head)


@pytest.mark.parametrize(("name", "shape"), SCENARIO_CASES)
def test_features_of_other_scenarios_change_no_bit_of_a_scenario(name, shape):
    net = build(name, spec_of(shape))
    data = make_data(net, 24)
    changed = make_data(net, 24)
    own = data.scenario == 0
    changed.x[~own] = changed.x[~own] * -3 + 1
    before, after = (net(d.x, d.fields, d.scenario).logits[own] for d in (data, changed))
    assert torch.equal(before, after)
    if name == "ple":  # The gradient of a last-level expert passes through other heads' level below only in forward.
        return
    (_, one), (_, two) = step(net, data), step(net, changed)
    for (key, first), (_, second) in zip(members_by_scenario(net, one), members_by_scenario(net, two), strict=True):
        assert torch.equal(first[:, 0], second[:, 0]), key


@pytest.mark.parametrize(("name", "shape"), CASES)
@pytest.mark.parametrize("reduction", ["pooled", "balanced"])
def test_masked_labels_change_nothing(name, shape, reduction):
    net = build(name, spec_of(shape))
    data = make_data(net, 32)
    data.mask[::3, 0] = 0
    total, gradients = step(net, data, reduction)
    for poison in (1.0, float("nan")):
        poisoned = make_data(net, 32)
        poisoned.mask[::3, 0] = 0
        poisoned.labels[::3, 0] = poison
        again, others = step(net, poisoned, reduction)
        assert torch.equal(total, again)
        assert all(torch.equal(gradients[key], others[key]) for key in gradients)
    # A NaN label is missing although its mask says that it is there.
    unmasked = make_data(net, 32)
    unmasked.labels[::3, 0] = float("nan")
    assert torch.equal(step(net, unmasked, reduction)[0], total)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_a_task_without_labels_has_loss_zero_and_no_gradient(name, shape):
    net = build(name, spec_of(shape))
    data = make_data(net, 16)
    data.mask[:, 0] = 0
    assert losses(net, data)["t0"] == 0
    _, gradients = step(net, data)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    if net.spec.num_tasks == 1 or name == "escm2":  # Without click labels ESCM2 has no loss at all.
        assert all((gradient == 0).all() for gradient in gradients.values())
    else:
        assert any((gradient != 0).any() for gradient in gradients.values())


@pytest.mark.parametrize(("name", "shape"), CASES)
@pytest.mark.parametrize("reduction", ["pooled", "balanced"])
def test_duplicating_the_batch_changes_nothing(name, shape, reduction):
    net = build(name, spec_of(shape)).double()
    data = make_data(net, 21, dtype=torch.float64)
    total, gradients = step(net, data, reduction)
    again, doubled = step(net, data.rows(torch.arange(42) % 21), reduction)
    torch.testing.assert_close(again, total, rtol=1e-12, atol=1e-12)
    for key, gradient in gradients.items():
        torch.testing.assert_close(doubled[key], gradient, rtol=1e-10, atol=1e-12)


RELABELLED = [
    ("mlp", {}),
    ("mlp", {"per_head_output": True}),
    ("esmm", {}),
    ("esmm", {"scenario_towers": "shared"}),
    ("aitm", {"use_tower": True}),
    ("escm2", {"variant": "ips"}),
    ("escm2", {"variant": "dr"}),
    ("hmoe", {}),
    ("hmoe", {"gate_mode": "per_scenario", "weight_mode": "per_scenario"}),
    ("pepnet", {}),
    ("pepnet", {"head_scope": "per_head"}),
]


@pytest.mark.parametrize(
    ("name", "options", "tasks"), [(*case, n) for case in RELABELLED for n in (1, 2) if supports(case[0], make_spec(n, 3))]
)
def test_relabelling_scenarios_with_their_parameters_changes_nothing(name, options, tasks):
    """The other methods' tests of this are with their own."""
    net = build(name, make_spec(tasks, 3), **options).double()
    data = make_data(net, 30, dtype=torch.float64)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    new_id = torch.tensor([2, 0, 1])
    old_id = new_id.argsort()
    moved = copy.deepcopy(net)
    with torch.no_grad():
        for key, parameter in moved.named_parameters():
            if net.owner(key) in ("head", "scenario"):
                members = parameter.reshape(-1, 3, parameter[0].numel())
                parameter.copy_(members[:, old_id].reshape(parameter.shape))
            if key == "score_weights.weight":  # HMoE: a column for each scenario whose score is mixed.
                parameter.copy_(parameter[..., old_id].clone())
            if key.startswith("ppnet.out_") and options:  # PEPNet: a gate for each hidden unit of each head's tower.
                parameter.copy_(parameter.unflatten(-1, (tasks, 3, -1))[..., old_id, :].flatten(-3))
    before, after = net(data.x, data.fields, data.scenario), moved(data.x, data.fields, new_id[data.scenario])
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-12, atol=1e-12)
    for key, value in before.named.items():
        torch.testing.assert_close(after.named[key], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_dropout_acts_in_training_only(name, shape):
    net = build(name, spec_of(shape), dropout=0.5)
    data = make_data(net, 32)
    draws = [net(data.x, data.fields, data.scenario).logits for _ in range(2)]
    assert not torch.equal(*draws)
    net.eval()
    draws = [net(data.x, data.fields, data.scenario).logits for _ in range(2)]
    assert torch.equal(*draws)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_padding_rows_leave_statistics_and_gradients_alone(name, shape):
    net = build(name, spec_of(shape), use_bn=True).double()
    data = make_data(net, 20, dtype=torch.float64)
    twin = copy.deepcopy(net)
    padded = data.rows(torch.cat([torch.arange(20), torch.zeros(5, dtype=torch.long)]))
    valid = torch.arange(25) < 20
    padded.x[20:], padded.mask[20:], padded.weight[20:], padded.scenario[20:] = 0.0, 0.0, 0.0, 0
    short = net(data.x, data.fields, data.scenario, valid=valid[:20]).logits
    long = twin(padded.x, padded.fields, padded.scenario, valid=valid).logits
    torch.testing.assert_close(long[:20], short, rtol=1e-10, atol=1e-12)
    short.sum().backward()
    long[:20].sum().backward()
    for (key, one), two in zip(net.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12, msg=key)
    for (key, one), two in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-8, atol=1e-10, msg=key)


# All logits of MLP have one ranking, whatever the task.
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(name, shape, marks=pytest.mark.long if shape == "msl-many" else ())
        for name, shape in CASES
        if name != "mlp" or shape.startswith("msl")
    ],
)
def test_overfits_64_rows(name, shape):
    # HMoE's mixed logits have no bound: from some starts they diverge, and rounding decides from which. Probabilities cannot.
    bounded = {"mix_space": "prob"} if name == "hmoe" else {}
    net = build(name, spec_of(shape), **{k: [32, 16] for k in _hidden(name)}, **bounded)
    data = make_data(net, 64)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, fused=True)
    for _ in range(300):
        optimizer.zero_grad()
        sum(losses(net, data).values()).backward()
        optimizer.step()
    logits = net(data.x, data.fields, data.scenario).logits
    errors = torch.nn.functional.binary_cross_entropy_with_logits(logits, data.labels, reduction="none")
    for s in range(net.spec.num_scenarios):
        assert (errors[data.scenario == s].mean(0) < 0.1).all(), s  # Every head.


def _hidden(name):
    # Towers, too: all four ReLU units of a TINY one may die in 300 steps at this rate, which says nothing about the method.
    options = ("dnn_hidden_units", "bottom_hidden_units", "expert_hidden_units", "tower_hidden_units")
    return [key for key in options if key in method(name).Config.model_fields]


@pytest.mark.parametrize(("name", "shape"), [c for c in CASES if c[1] != "msl-many"])
def test_initial_logits_vary_over_rows_at_benchmark_sizes(name, shape):
    needed = {"condition_fields": ["f0"]} if name == "apg" and shape == "mtl" else {}  # It has no condition by default.
    net = method(name)(make_spec(*SHAPES[shape], fields=7, dim=8, num_dense=0), method(name).Config(**needed))
    data = make_data(net, 512)
    x, fields = data.x * 0.01, {field: value * 0.01 for field, value in data.fields.items()}
    # In evaluation mode: statistics of a normalised input are those of a batch in training, and would hide its size.
    for training in (True, False):
        logits = net.train(training)(x, fields, data.scenario).logits
        for scenario in range(net.spec.num_scenarios):
            assert (logits[data.scenario == scenario].std(dim=0) > 1e-4).all()


@pytest.mark.parametrize("name", method_names())
def test_refusals_name_the_key(name):
    with pytest.raises(ConfigError, match=r"model\.dropuot: unknown key.*Did you mean 'dropout'"):
        model_config({"name": name, "dropuot": 0.1}, {}, "x.yaml")
    with pytest.raises(ConfigError, match=r"model\.activation"):
        model_config({"name": name, "activation": "swoosh"}, {}, "x.yaml")
    for spec in (make_spec(1, 1), ModelSpec("msl", make_spec(1).tasks, 1, {"f": 4}, 0)):
        with pytest.raises(ConfigError, match=r"setting"):
            method(name).check_setting(spec)
