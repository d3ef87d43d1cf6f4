"""MTMSL with the same labels for every task and tied heads is MSL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmlrec.models.base.model import MultiTaskModel
from mmlrec.testing.contract import over
from mmlrec.testing.method_cases import MethodCases
from mmlrec.testing.networks import losses, make_data, make_spec, sum_of

TASKS, SCENARIOS = 3, 2


def tied(net: MultiTaskModel, key: str, value: Tensor) -> Tensor:
    """A parameter of the MSL network as MTMSL's: each task's members are copies; what no head owns is the same."""
    owner = net.owner(key)
    if owner == "head":
        return value.unflatten(0, (-1, 1, SCENARIOS)).expand(-1, TASKS, -1, *value.shape[1:]).flatten(0, 2)
    if owner == "task":
        return value.unsqueeze(1).expand(-1, TASKS, *value.shape[1:]).flatten(0, 1)
    return value


class TiedHeads(MethodCases):
    """For methods that are for both."""

    @over("options", MethodCases.ties)
    def test_tied_heads_with_the_same_labels_are_one_task(self, options: dict[str, Any]) -> None:
        """Logits, losses and gradients of each task; what tasks share learns from each of them."""
        single, several = (self.build(make_spec(tasks, SCENARIOS), **options).double() for tasks in (1, TASKS))
        # Random gates are as many as connections: without noise they are equal.
        single.train(not single.num_noise), several.train(not single.num_noise)
        shapes = {key: value.shape for key, value in several.named_parameters()}
        weights = {key: tied(single, key, value) for key, value in single.named_parameters()}
        fits = {key: value.shape for key, value in weights.items()} == shapes
        assert fits == (not self.pairwise or bool(options))
        if not fits:
            return
        several.load_state_dict(weights, strict=False)
        one = make_data(single, 48, dtype=torch.float64)
        many = make_data(several, 48, dtype=torch.float64)
        many.scenario, many.labels = one.scenario, one.labels.expand(-1, TASKS)
        many.x = one.x.repeat(1, TASKS, 1) if single.tables_per_branch else one.x
        many.fields = {field: v.repeat(1, TASKS, 1) if single.tables_per_branch else v for field, v in one.fields.items()}

        expected = single(one.x, one.fields, one.scenario).logits
        torch.testing.assert_close(several(many.x, many.fields, many.scenario).logits, expected.expand(-1, TASKS))
        expected_losses, found_losses = losses(single, one), losses(several, many)
        for task in several.spec.tasks:
            torch.testing.assert_close(found_losses[task.name], expected_losses["t0"])
        sum_of(expected_losses).backward()
        sum_of(found_losses).backward()
        gradients = {key: value.grad for key, value in several.named_parameters()}
        for key, value in single.named_parameters():
            assert value.grad is not None
            # Every head learns as the single one does; what they share learns from each of them.
            times = 1 if several.owner(key) in ("head", "task") else TASKS
            torch.testing.assert_close(gradients[key], tied(single, key, value.grad) * times, msg=key)
