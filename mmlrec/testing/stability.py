"""Losses and gradients stay finite: extreme inputs, and many steps in bf16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmlrec.testing.contract import over
from mmlrec.testing.method_cases import MethodCases
from mmlrec.testing.networks import losses, losses_of, make_data, spec_of, sum_of

EXTREMES: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": lambda x: torch.zeros_like(x),
    "equal rows": lambda x: x[:1].expand_as(x),
    "large": lambda x: x * 1e4,
    "tiny": lambda x: x * 1e-30,
    "one large row": lambda x: torch.cat([x[:1] * 1e4, x[1:]]),
}


class Stability(MethodCases):
    """Numbers that a float can hold."""

    @over("shape", MethodCases.shapes)
    @pytest.mark.parametrize("use_bn", [False, True])
    @pytest.mark.parametrize("bf16", [False, True])
    @pytest.mark.parametrize("extreme", EXTREMES)
    def test_extreme_inputs(self, shape: str, use_bn: bool, bf16: bool, extreme: str) -> None:
        """Zeros, equal rows, very large and very small ones; in float32 and bf16."""
        net = self.build(spec_of(shape), use_bn=use_bn)
        data = make_data(net, 16)
        data.x = EXTREMES[extreme](data.x).requires_grad_()
        widths = list(net.spec.fields.values())
        parts = data.x[..., : sum(widths)].split(widths, dim=-1)
        data.fields = dict(zip(net.spec.fields, parts, strict=True))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            found = losses(net, data)
        total = sum_of(found)
        assert total.dtype == torch.float32
        total.backward()
        assert total.isfinite()
        gradients = [tensor.grad for tensor in (data.x, *net.parameters())]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
        assert all(buffer.isfinite().all() for buffer in net.buffers())

    @over("shape", lambda case: case.widest_first()[:1])
    @pytest.mark.parametrize("use_bn", [False, True])
    def test_100_steps_in_bf16(self, shape: str, use_bn: bool) -> None:
        """The loss falls, and nothing overflows; logits and losses are float32."""
        net = self.build(spec_of(shape), use_bn=use_bn)
        data = make_data(net, 64)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, fused=True)
        history = []
        for _ in range(100):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                output = net(data.x, data.fields, data.scenario)
                assert all(logits.dtype == torch.float32 for logits in (output.logits, *output.named.values()))
                total = sum_of(losses_of(net, output, data))
            assert total.dtype == torch.float32
            total.backward()
            optimizer.step()
            history.append(total.item())
        assert torch.tensor(history).isfinite().all()
        assert all(parameter.isfinite().all() for parameter in net.parameters())
        assert history[-1] < history[0]
