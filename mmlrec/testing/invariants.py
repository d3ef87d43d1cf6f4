"""What holds for a method in every setting: shapes, state, who trains what, masks, padding, dropout, refusals."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlrec.errors import ConfigError
from mmlrec.models.base.model import ModelSpec, MultiTaskModel, Owner
from mmlrec.schema import Setting
from mmlrec.testing.contract import over
from mmlrec.testing.method_cases import MethodCases
from mmlrec.testing.networks import SHAPES, Data, losses, make_data, make_spec, spec_of, step, sum_of
from mmlrec.yaml_config import validate_section


def members_by_scenario(net: MultiTaskModel, gradients: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Gradients of the parameters that heads or scenarios own, as name -> [.., S, elements]."""
    for key, gradient in gradients.items():
        if net.owner(key) not in ("head", "scenario"):
            continue
        module: Any = net.get_submodule(key.split(".norms.")[0]) if ".norms." in key else None
        stack = module.stack if module else gradient.shape[0]
        yield key, gradient.reshape(-1, net.spec.num_scenarios, gradient.numel() // stack)


def owning_heads(net: MultiTaskModel, owner: Owner, member: int) -> set[tuple[int, int]]:
    """Heads (task, scenario) that may train a member of an owned parameter."""
    tasks, scenarios = range(net.spec.num_tasks), range(net.spec.num_scenarios)
    return {
        (t, s) for t in tasks for s in scenarios if member == {"head": t * len(scenarios) + s, "task": t, "scenario": s}[owner]
    }


class Invariants(MethodCases):
    """In every setting of the method."""

    @over("shape", MethodCases.shapes)
    @pytest.mark.parametrize("rows", [1, 2, 7, 64])
    def test_shapes_and_types(self, shape: str, rows: int) -> None:
        """Logits [B, T] are those of the row's own scenario among all heads [B, H], for any number of rows."""
        net = self.build(spec_of(shape))
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

    @over("shape", MethodCases.shapes)
    @pytest.mark.parametrize("use_bn", [False, True])
    def test_state_dict_holds_everything_and_copies_are_equal(self, shape: str, use_bn: bool) -> None:
        """A network that loads another's state, and a copy, give the same logits to the bit."""
        spec = spec_of(shape)
        net = self.build(spec, use_bn=use_bn)
        data = make_data(net, 16)
        step(net, data)
        other = self.build(ModelSpec(**{**vars(spec), "seed": 9}), use_bn=use_bn)
        other.load_state_dict(net.state_dict())
        copied = copy.deepcopy(net).eval()
        net.eval(), other.eval()
        expected = net(data.x, data.fields, data.scenario).logits
        for again in (other, copied):
            torch.testing.assert_close(again(data.x, data.fields, data.scenario).logits, expected, rtol=0, atol=0)

    @over("shape", MethodCases.shapes)
    def test_every_tensor_of_the_state_dict_influences_the_output(self, shape: str) -> None:
        """Nothing is saved for nothing."""
        net = self.build(spec_of(shape), use_bn=True).double().eval()
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

    @over("shape", MethodCases.shapes)
    def test_initial_weights_depend_on_the_seed_only(self, shape: str) -> None:
        """`spec.seed`, and not torch's global random state."""
        spec = spec_of(shape)
        torch.manual_seed(1)
        one = self.build(spec).state_dict()
        torch.manual_seed(2)
        two = self.build(spec).state_dict()
        other = self.build(ModelSpec(**{**vars(spec), "seed": 1})).state_dict()
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert any(not torch.equal(one[key], other[key]) for key in one)

    @over("shape", MethodCases.shapes)
    def test_every_parameter_has_a_gradient_and_moves(self, shape: str) -> None:
        """One step of SGD changes every parameter."""
        net = self.build(spec_of(shape))
        data = make_data(net, 256)
        before = {key: value.clone() for key, value in net.named_parameters()}
        step(net, data)
        torch.optim.SGD(net.parameters(), lr=0.1).step()
        for key, value in net.named_parameters():
            assert not torch.equal(value, before[key]), key

    @over("shape", MethodCases.shapes)
    def test_fields_may_have_different_widths(self, shape: str) -> None:
        """Every column of every field takes part in the logits, and every parameter gets a gradient."""
        net = self.build(dataclasses.replace(spec_of(shape), fields={"f0": 4, "f1": 12, "f2": 8})).double()
        data = make_data(net, 64, dtype=torch.float64)
        step(net, data)
        x = data.x.clone().requires_grad_()
        views = x.split([*net.spec.fields.values(), net.spec.num_dense], dim=-1)
        logits = net.eval()(x, dict(zip(net.spec.fields, views, strict=False)), data.scenario).logits
        (gradient,) = torch.autograd.grad(logits.square().sum(), x)
        assert gradient.flatten(0, -2).abs().sum(0).min() > 0

    @over("shape", MethodCases.shapes)
    def test_permuting_the_batch_permutes_the_output(self, shape: str) -> None:
        """A row's logits depend on no other row."""
        net = self.build(spec_of(shape)).double()
        data = make_data(net, 33, dtype=torch.float64)
        order = torch.randperm(33, generator=torch.Generator().manual_seed(0))
        moved = data.rows(order)
        expected = net(data.x, data.fields, data.scenario).logits[order]
        torch.testing.assert_close(net(moved.x, moved.fields, moved.scenario).logits, expected, rtol=1e-12, atol=1e-12)

    @over("shape", MethodCases.shapes_with_scenarios)
    @pytest.mark.parametrize("use_bn", [False, True])
    def test_a_batch_of_one_scenario_leaves_the_others_parameters_alone(self, shape: str, use_bn: bool) -> None:
        """What heads or scenarios own gets a gradient from its own rows only."""
        net = self.build(spec_of(shape), use_bn=use_bn)
        data = make_data(net, 24)
        data.scenario[:] = 1
        _, gradients = step(net, data)
        found = dict(members_by_scenario(net, gradients))
        assert found
        others = [s for s in range(net.spec.num_scenarios) if s != 1]
        for key, members in found.items():
            assert (members[:, others] == 0).all(), key

    @over("shape", MethodCases.small_shapes)
    def test_owned_parameters_are_trained_by_their_owner_and_all_others_by_several_heads(self, shape: str) -> None:
        """`owners` says who trains what."""
        net = self.build(spec_of(shape))
        spec = net.spec
        data = make_data(net, 256)
        trained: dict[str, dict[tuple[int, int], Tensor]] = {key: {} for key, _ in net.named_parameters()}
        for t in range(spec.num_tasks):
            for s in range(spec.num_scenarios):
                alone = data.rows(data.scenario == s)
                alone.mask = torch.zeros_like(alone.mask)
                alone.mask[:, t] = 1
                if net.chain:  # A step not taken tells the next one, whatever its mask.
                    alone.labels[:] = 1
                if self.needs_first_label:
                    alone.mask[:, 0] = 1
                for key, gradient in step(net, alone)[1].items():
                    trained[key][t, s] = gradient
        for key, gradients in trained.items():
            owner = net.owner(key)
            if owner is None:
                heads = 1 if shape == "mtl" and key.startswith(self.trained_by_one) else 2
                assert sum(bool((gradient != 0).any()) for gradient in gradients.values()) >= heads, key
                continue
            owners = {"head": spec.num_heads, "task": spec.num_tasks, "scenario": spec.num_scenarios}[owner]
            stack = len(next(iter(gradients.values())))
            for member in range(owners):
                for head, gradient in gradients.items():
                    touched = bool((gradient.reshape(-1, owners, gradient.numel() // stack)[:, member] != 0).any())
                    assert touched <= (head in owning_heads(net, owner, member)), (key, member, head)

    @over("shape", MethodCases.shapes_with_scenarios)
    def test_features_of_other_scenarios_change_no_bit_of_a_scenario(self, shape: str) -> None:
        """Neither its logits nor the gradients of what it owns."""
        net = self.build(spec_of(shape))
        data = make_data(net, 24)
        changed = make_data(net, 24)
        own = data.scenario == 0
        changed.x[~own] = changed.x[~own] * -3 + 1
        before, after = (net(d.x, d.fields, d.scenario).logits[own] for d in (data, changed))
        assert torch.equal(before, after)
        if self.exchanges_gradients:
            return
        (_, one), (_, two) = step(net, data), step(net, changed)
        for (key, first), (_, second) in zip(members_by_scenario(net, one), members_by_scenario(net, two), strict=True):
            assert torch.equal(first[:, 0], second[:, 0]), key

    @over("shape", MethodCases.shapes)
    @pytest.mark.parametrize("reduction", ["pooled", "balanced"])
    def test_masked_labels_change_nothing(self, shape: str, reduction: str) -> None:
        """Whatever stands in them, NaN included."""
        net = self.build(spec_of(shape))
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

    @over("shape", MethodCases.shapes)
    def test_a_task_without_labels_has_loss_zero_and_no_gradient(self, shape: str) -> None:
        """The other tasks train on."""
        net = self.build(spec_of(shape))
        data = make_data(net, 16)
        data.mask[:, 0] = 0
        assert losses(net, data)["t0"] == 0
        _, gradients = step(net, data)
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        if net.spec.num_tasks == 1 or self.needs_first_label:
            assert all((gradient == 0).all() for gradient in gradients.values())
        else:
            assert any((gradient != 0).any() for gradient in gradients.values())

    @over("shape", MethodCases.shapes)
    @pytest.mark.parametrize("reduction", ["pooled", "balanced"])
    def test_duplicating_the_batch_changes_nothing(self, shape: str, reduction: str) -> None:
        """Losses are means."""
        net = self.build(spec_of(shape)).double()
        data = make_data(net, 21, dtype=torch.float64)
        total, gradients = step(net, data, reduction)
        again, doubled = step(net, data.rows(torch.arange(42) % 21), reduction)
        torch.testing.assert_close(again, total, rtol=1e-12, atol=1e-12)
        for key, gradient in gradients.items():
            torch.testing.assert_close(doubled[key], gradient, rtol=1e-10, atol=1e-12)

    @over("shape", MethodCases.shapes)
    def test_dropout_acts_in_training_only(self, shape: str) -> None:
        """Two passes differ in training and are equal in evaluation."""
        net = self.build(spec_of(shape), dropout=0.5)
        data = make_data(net, 32)
        draws = [net(data.x, data.fields, data.scenario).logits for _ in range(2)]
        assert not torch.equal(*draws)
        net.eval()
        draws = [net(data.x, data.fields, data.scenario).logits for _ in range(2)]
        assert torch.equal(*draws)

    @over("shape", MethodCases.shapes)
    def test_padding_rows_leave_statistics_and_gradients_alone(self, shape: str) -> None:
        """Rows that are not `valid` count nowhere."""
        net = self.build(spec_of(shape), use_bn=True).double()
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

    def _learnable(self) -> list[Any]:
        shapes = [shape for shape in self.shapes() if not self.ranks_tasks_alike or shape.startswith("msl")]
        return [pytest.param(shape, marks=pytest.mark.long if shape == "msl-many" else ()) for shape in shapes]

    @over("shape", _learnable)
    def test_overfits_64_rows(self, shape: str) -> None:
        """Every head can learn random labels by heart, in 300 steps at most."""
        # Towers, too: all four ReLU units of a TINY one may die in 300 steps at this rate, which says nothing of the method.
        sizes = ("dnn_hidden_units", "bottom_hidden_units", "expert_hidden_units", "tower_hidden_units")
        wide = {key: [32, 16] for key in sizes if key in self.method.Config.model_fields}
        net = self.build(spec_of(shape), **wide, **self.overfit_options)
        data = make_data(net, 64)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, fused=True)
        for number in range(1, 301):
            optimizer.zero_grad()
            sum_of(losses(net, data)).backward()
            optimizer.step()
            if number % 25 == 0 and (_errors(net, data) < 0.1).all():
                return
        raise AssertionError(f"after 300 steps: {_errors(net, data)}")

    @over("shape", MethodCases.small_shapes)
    def test_initial_logits_vary_over_rows_at_benchmark_sizes(self, shape: str) -> None:
        """With the default sizes and small inputs, every head tells rows apart from the start."""
        config = self.method.Config(**(self.mtl_options if shape == "mtl" else {}))
        net = self.method(make_spec(*SHAPES[shape], fields=7, dim=8, num_dense=0), config)
        data = make_data(net, 512)
        x, fields = data.x * 0.01, {field: value * 0.01 for field, value in data.fields.items()}
        # In evaluation mode: statistics of a normalised input are those of a batch in training, and would hide its size.
        for training in (True, False):
            logits = net.train(training)(x, fields, data.scenario).logits
            for scenario in range(net.spec.num_scenarios):
                assert (logits[data.scenario == scenario].std(dim=0) > 1e-4).all()

    def test_refusals_name_the_key(self) -> None:
        """Unknown options, values that are none, and data with one head."""
        with pytest.raises(ConfigError, match=r"model\.dropuot: unknown key.*Did you mean 'dropout'"):
            validate_section(self.method.Config, {"dropuot": 0.1}, prefix="model.", source="x.yaml")
        with pytest.raises(ConfigError, match=r"model\.activation"):
            validate_section(self.method.Config, {"activation": "swoosh"}, prefix="model.", source="x.yaml")
        one_task = [] if self.method.one_task else [make_spec(1, 1)]
        for spec in (*one_task, ModelSpec(Setting.MSL, make_spec(1).tasks, 1, {"f": 4}, 0)):
            with pytest.raises(ConfigError, match=r"setting"):
                self.method.check_setting(spec)


@torch.no_grad()
def _errors(net: MultiTaskModel, data: Data) -> Tensor:
    """Mean log loss of each head over its rows, [S, T]."""
    logits = net(data.x, data.fields, data.scenario).logits
    errors = torch.nn.functional.binary_cross_entropy_with_logits(logits, data.labels, reduction="none")
    return torch.stack([errors[data.scenario == s].mean(0) for s in range(net.spec.num_scenarios)])
