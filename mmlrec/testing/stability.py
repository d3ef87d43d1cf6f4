"""Losses and gradients stay finite: extreme inputs, and many steps in bf16 (models.md C18)."""

import pytest
import torch

from mmlrec.registry import method_names
from tests.models.support import SHAPES, build, losses, losses_of, make_data, spec_of, supports

CASES = [(name, shape) for name in method_names() for shape in SHAPES if supports(name, spec_of(shape))]
WIDEST = [(name, next(s for s in ("mtmsl", "mtl", "msl") if (name, s) in CASES)) for name in method_names()]
EXTREMES = {
    "zeros": lambda x: torch.zeros_like(x),
    "equal rows": lambda x: x[:1].expand_as(x),
    "large": lambda x: x * 1e4,
    "tiny": lambda x: x * 1e-30,
    "one large row": lambda x: torch.cat([x[:1] * 1e4, x[1:]]),
}


@pytest.mark.parametrize(("name", "shape"), CASES)
@pytest.mark.parametrize("use_bn", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_inputs(name, shape, use_bn, bf16, extreme):
    net = build(name, spec_of(shape), use_bn=use_bn)
    data = make_data(net, 16)
    data.x = EXTREMES[extreme](data.x).requires_grad_()
    widths = list(net.spec.fields.values())
    parts = data.x[..., : sum(widths)].split(widths, dim=-1)
    data.fields = dict(zip(net.spec.fields, parts, strict=True))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found = losses(net, data)
    total = sum(found.values())
    assert total.dtype == torch.float32
    total.backward()
    assert total.isfinite()
    assert data.x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
    assert all(buffer.isfinite().all() for buffer in net.buffers())


@pytest.mark.parametrize(("name", "shape"), WIDEST)
@pytest.mark.parametrize("use_bn", [False, True])
def test_100_steps_in_bf16(name, shape, use_bn):
    net = build(name, spec_of(shape), use_bn=use_bn)
    data = make_data(net, 64)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    history = []
    for _ in range(100):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = net(data.x, data.fields, data.scenario)
            assert all(logits.dtype == torch.float32 for logits in (output.logits, *output.named.values()))
            total = sum(losses_of(net, output, data).values())
        assert total.dtype == torch.float32
        total.backward()
        optimizer.step()
        history.append(total.item())
    assert torch.tensor(history).isfinite().all()
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    assert history[-1] < history[0]
