"""Cross-stitch: a loop over rows and branches; sizes; special cases; the stitches' learning rate."""

from __future__ import annotations

import pytest
import torch

from mmlrec.config import load_config
from mmlrec.distributed.world import process_group
from mmlrec.registry import method
from mmlrec.session.session import build_session
from mmlrec.training.run import train
from tests.datasets import write_dataset
from tests.models.support import assert_gradients_are_slopes, build, make_data, make_spec, step
from tests.training.launch import tensors

F64 = torch.float64
SIZES = [(2, 1), (3, 1), (1, 2), (1, 6), (2, 2), (3, 4)]
MODES = ["scalar", "channel", "full"]


def tower(x, towers, head):
    for weight, bias in zip(towers.hidden.weights, towers.hidden.biases, strict=True):
        x = torch.clamp(x @ weight[head] + bias[head], min=0)
    return (x @ towers.weight[head])[0] + towers.bias[head]


def reference(net, x):
    """Logits of all heads of one row."""
    heads, mode = net.spec.num_heads, net.config.stitch_mode
    for weight, bias in zip(net.shared.weights, net.shared.biases, strict=True):
        x = torch.clamp(x @ weight + bias, min=0)
    branches = [x] * heads
    for stack, stitch in zip(net.layers, net.stitches, strict=True):
        a = stitch.weight
        u = [torch.clamp(branches[i] @ stack.weights[0][i] + stack.biases[0][i], min=0) for i in range(heads)]
        if mode == "full":
            branches = [torch.cat(u) @ a[i] for i in range(heads)]
        else:
            branches = [sum(a[i, j] * u[j] for j in range(heads)) for i in range(heads)]
    return torch.stack([tower(branches[h], net.towers, h) for h in range(heads)])


def perturbed(spec, **options):
    net = build("cross_stitch", spec, **options).double()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=F64, generator=g))
    return net


def set_scalar(net, weight):
    """Every stitch as the matrix `weight`, whatever the mode."""
    with torch.no_grad():
        for stitch in net.stitches:
            if stitch.mode == "scalar":
                stitch.weight.copy_(weight)
            elif stitch.mode == "channel":
                stitch.weight.copy_(weight.unsqueeze(2).expand_as(stitch.weight))
            else:
                blocks = [torch.cat([value * torch.eye(stitch.weight.shape[2]) for value in row.tolist()]) for row in weight]
                stitch.weight.copy_(torch.stack(blocks))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize(("tasks", "scenarios"), SIZES)
def test_equals_a_loop_over_rows_and_branches(mode, depth, tasks, scenarios):
    spec = make_spec(tasks, scenarios, fields=2, dim=5, num_dense=3, seed=tasks)
    options = {"dnn_hidden_units": [7, 13], "stitch_mode": mode, "shared_depth": depth}
    # Far from the start, where members of a branch would hardly be told apart.
    net = perturbed(spec, **options)
    data = make_data(net, 9, dtype=F64)
    expected = torch.stack([reference(net, row) for row in data.x])
    got = net(data.x, data.fields, data.scenario, return_all_heads=True)
    torch.testing.assert_close(got.all_logits, expected, rtol=1e-6, atol=1e-6)
    heads = torch.arange(tasks) * scenarios + data.scenario.view(-1, 1)
    own = expected.gather(1, heads)
    for dtype, tolerance in ((F64, 1e-6), (torch.float32, 1e-5)):
        logits = net.to(dtype)(data.x.to(dtype), data.fields, data.scenario).logits
        torch.testing.assert_close(logits.to(F64), own, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("tasks", "scenarios"), [(2, 1), (2, 3)])
def test_gradients_equal_finite_differences(mode, tasks, scenarios):
    net = build("cross_stitch", make_spec(tasks, scenarios), stitch_mode=mode, activation="tanh", shared_depth=1).double()
    data = make_data(net, 6, dtype=F64)
    assert_gradients_are_slopes(net, data)


@pytest.mark.parametrize(
    ("mode", "tiny", "benchmark"), [("scalar", 422, 111_626), ("channel", 470, 113_154), ("full", 814, 439_298)]
)
def test_parameter_counts(mode, tiny, benchmark):
    for scenarios in (1, 2):
        net = build("cross_stitch", make_spec(2 // scenarios, scenarios), stitch_mode=mode)
        assert sum(p.numel() for p in net.parameters()) == tiny
    net = method("cross_stitch")(make_spec(fields=7, dim=8, num_dense=0), method("cross_stitch").Config(stitch_mode=mode))
    assert sum(p.numel() for p in net.parameters()) == benchmark


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("tasks", "scenarios"), [(2, 1), (1, 3), (2, 2)])
def test_identity_stitches_are_single_task_on_a_shared_input(mode, tasks, scenarios):
    spec = make_spec(tasks, scenarios)
    net = build("cross_stitch", spec, stitch_mode=mode, stitch_self=1.0, stitch_cross=0.0)
    alone = build("single_task", spec)
    with torch.no_grad():
        for level, stack in enumerate(net.layers):
            alone.networks.weights[level].copy_(stack.weights[0])
            alone.networks.biases[level].copy_(stack.biases[0])
    alone.towers.load_state_dict(net.towers.state_dict())
    data = make_data(net, 40)
    expected = alone(data.x.unsqueeze(1).expand(-1, spec.num_heads, -1), {}, data.scenario).logits
    torch.testing.assert_close(net(data.x, data.fields, data.scenario).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("heads", "options", "own", "cross"), [(3, {}, 0.9, 0.05), (1, {}, 0.9, 0.0), (2, {"stitch_cross": 0.3}, 0.9, 0.3)]
)
def test_start_of_the_stitches(mode, heads, options, own, cross):
    net = build("cross_stitch", make_spec(heads), stitch_mode=mode, **options)
    twin = build("cross_stitch", make_spec(heads), stitch_mode=mode)
    set_scalar(twin, torch.full((heads, heads), cross).fill_diagonal_(own))
    for mine, theirs in zip(net.stitches, twin.stitches, strict=True):
        assert torch.equal(mine.weight, theirs.weight)


@pytest.mark.parametrize("mode", MODES)
def test_equal_stitches_give_all_branches_the_same_input(mode):
    net = perturbed(make_spec(4), stitch_mode=mode)
    set_scalar(net, torch.full((4, 4), 0.25))
    mixed = net.stitches[0](net.layers[0](make_data(net, 7, dtype=F64).x))
    torch.testing.assert_close(mixed, mixed[:1].expand_as(mixed), rtol=1e-12, atol=1e-12)
    assert mixed.std() > 0


@pytest.mark.parametrize("mode", ["channel", "full"])
def test_larger_modes_contain_the_scalar_one(mode):
    spec = make_spec(2, 3)
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    scalar, larger = (build("cross_stitch", spec, stitch_mode=m) for m in ("scalar", mode))
    for part in ("layers", "towers"):
        getattr(larger, part).load_state_dict(getattr(scalar, part).state_dict())
    for net in (scalar, larger):
        set_scalar(net, weight)
    data = make_data(scalar, 30)
    expected, found = (net(data.x, data.fields, data.scenario).logits for net in (scalar, larger))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_permuting_branches_with_rows_and_columns_permutes_the_outputs(mode):
    tasks, scenarios = 2, 3
    net = perturbed(make_spec(tasks, scenarios), stitch_mode=mode)
    data = make_data(net, 30, dtype=F64)
    expected = net(data.x, data.fields, data.scenario).logits
    # Scenarios 0, 1, 2 become 2, 0, 1 and the tasks are swapped.
    new_id = torch.tensor([2, 0, 1])
    old = torch.tensor([(1 - t) * scenarios + s for t in range(tasks) for s in new_id.argsort().tolist()])
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            moved = parameter[old]
            if key.startswith("stitches"):
                columns = moved.unflatten(1, (6, -1))[:, old] if mode == "full" else moved[:, old]
                moved = columns.reshape(parameter.shape)
            parameter.copy_(moved.clone())
    found = net(data.x, data.fields, new_id[data.scenario]).logits
    torch.testing.assert_close(found[:, [1, 0]], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_reaches_the_other_branches_through_the_stitches_only(mode):
    for weight, reached in ((torch.tensor([[0.9, 0.1], [0.1, 0.9]]), True), (torch.eye(2), False)):
        net = build("cross_stitch", make_spec(), stitch_mode=mode)
        set_scalar(net, weight)
        data = make_data(net, 64)
        data.mask[:, 1] = 0
        _, gradients = step(net, data)
        for level in (0, 1):
            other = gradients[f"layers.{level}.weights.0"][1]
            assert bool((other != 0).any()) == reached
        assert (gradients["stitches.1.weight"][1] == 0).all()
        assert (gradients["towers.weight"][1] == 0).all()


def test_shared_layers_are_as_wide_as_the_first_of_the_branches():
    net = build("cross_stitch", make_spec(), shared_depth=2, dnn_hidden_units=[8, 6])
    assert [tuple(weight.shape) for weight in net.shared.weights] == [(14, 8), (8, 8)]
    assert net.layers[0].weights[0].shape == (2, 8, 8)


def test_many_branches_with_full_stitches_warn():
    with pytest.warns(UserWarning, match="9 x 9 matrices"):
        build("cross_stitch", make_spec(1, 9), stitch_mode="full")


CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: cross_stitch, dnn_hidden_units: [6, 4], tower_hidden_units: [3], stitch_lr_mult: {factor}}}
embeddings: {{dim: 4}}
dense: {{optimizer: {{name: {optimizer}, lr: 0.01}}, clip_norm: {clip}}}
schedule: {{name: linear, warmup_steps: 2, total_steps: 40}}
training: {{batch_size: 40, max_steps: 12, checkpoint_every_steps: 6, keep_checkpoints: 9, validate_every_steps: 6}}
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stitch") / "data"
    write_dataset(folder, rows=600, table_rows=20)
    return folder


def config_of(dataset, folder, factor=100.0, optimizer="adam", clip="null", overrides=()):
    path = folder / f"{factor}-{optimizer}-{clip}.yaml"
    path.write_text(CONFIG.format(dataset=dataset, factor=factor, optimizer=optimizer, clip=clip))
    return load_config(path, list(overrides))


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize("clip", ["null", "0.5"])
def test_the_stitches_learn_with_a_multiple_of_the_rate(dataset, tmp_path, optimizer, clip):
    moved = {}
    for factor in (1.0, 100.0):
        config = config_of(dataset, tmp_path, factor, optimizer, clip)
        with process_group() as world:
            session = build_session(config, world, for_training=True)
            session.model.train()
            before = {key: value.detach().clone() for key, value in session.network.named_parameters()}
            session.pipeline.progress(iter(session.prepare(session.reader("train").epoch(0), training=True)))
            moved[factor] = {key: value.detach() - before[key] for key, value in session.network.named_parameters()}
    for key, change in moved[1.0].items():
        factor = 100.0 if key.startswith("stitches.") else 1.0
        assert (change != 0).any()
        torch.testing.assert_close(moved[100.0][key], factor * change, rtol=1e-3, atol=2e-6 * factor, msg=key)


def test_a_resumed_run_with_two_rates_equals_an_uninterrupted_one(dataset, tmp_path):
    for name, parts in (("whole", [12]), ("parts", [6, 12])):
        for steps in parts:
            with process_group() as world:
                train(config_of(dataset, tmp_path, 10.0, overrides=[f"training.max_steps={steps}"]), tmp_path / name, world)
    whole, parts = (tensors(tmp_path / name / "checkpoints/step_000000012") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert [key for key in whole if not whole[key].equal(parts[key])] == []
    moments = [value for key, value in whole.items() if key.startswith("optimizer.") and "stitches" in key and "exp" in key]
    assert len(moments) == 4
    assert all((value != 0).any() for value in moments)
