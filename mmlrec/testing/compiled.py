"""A compiled network equals the plain one and is compiled once, whichever scenarios a batch holds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from mmlrec.testing.contract import over
from mmlrec.testing.method_cases import MethodCases
from mmlrec.testing.networks import losses_of, make_data, spec_of, sum_of


class Compiled(MethodCases):
    """One graph for any batch."""

    def _settings(self) -> list[Any]:
        """The widest first; the other settings, and those with batch normalisation, are long."""
        shapes, found = self.widest_first(), []
        for shape in shapes:
            for use_bn in (False, True):
                marks = [] if shape == shapes[0] and not use_bn else [pytest.mark.long]
                found.append(pytest.param(shape, use_bn, id=f"{shape}{'-bn' * use_bn}", marks=marks))
        return found

    @over("shape, use_bn", _settings)
    def test_compiled_equals_plain_and_never_compiles_again(self, shape: str, use_bn: bool) -> None:
        """Logits, gradients and buffers, over batches with all scenarios, with one, and with padding."""
        compiled_net = self.build(spec_of(shape), use_bn=use_bn)
        plain_net = copy.deepcopy(compiled_net)
        torch._dynamo.reset()
        # A backend without code generation, so that no C++ compiler is needed; a break of the graph is an error.
        compiled = torch.compile(compiled_net.forward, backend="aot_eager", fullgraph=True)
        data = make_data(plain_net, 32)
        last = plain_net.spec.num_scenarios - 1
        for batch, scenario in enumerate((data.scenario, torch.zeros_like(data.scenario), data.scenario.clamp(min=last))):
            data.scenario = scenario
            valid = torch.arange(32) < 32 - batch
            generator = torch.Generator().manual_seed(batch)
            noise = torch.rand(plain_net.num_noise, generator=generator) if plain_net.num_noise else None
            results = []
            with torch._dynamo.config.patch(error_on_recompile=batch > 0):
                for net, forward in ((plain_net, plain_net.forward), (compiled_net, compiled)):
                    net.zero_grad()
                    output = forward(data.x, data.fields, data.scenario, valid=valid, noise=noise)
                    sum_of(losses_of(net, output, data)).backward()
                    results.append([output.logits, *output.named.values(), *[p.grad for p in net.parameters()], *net.buffers()])
            for expected, found in zip(*results, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
