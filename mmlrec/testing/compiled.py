"""A compiled network equals the plain one and is compiled once, whichever scenarios a batch holds (models.md C16)."""

import copy

import pytest
import torch

from mmlrec.registry import method_names
from tests.models.support import build, losses_of, make_data, spec_of, supports


def cases() -> list:
    """Each method in its widest setting; the other settings, and those with batch normalisation, are long."""
    found = []
    for name in method_names():
        shapes = [shape for shape in ("mtmsl", "mtl", "msl", "msl-many") if supports(name, spec_of(shape))]
        for shape in shapes:
            for use_bn in (False, True):
                marks = [] if shape == shapes[0] and not use_bn else [pytest.mark.long]
                found.append(pytest.param(name, shape, use_bn, id=f"{name}-{shape}{'-bn' * use_bn}", marks=marks))
    return found


@pytest.mark.parametrize(("name", "shape", "use_bn"), cases())
def test_compiled_equals_plain_and_never_compiles_again(name, shape, use_bn):
    compiled_net = build(name, spec_of(shape), use_bn=use_bn)
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
                sum(losses_of(net, output, data).values()).backward()
                results.append([output.logits, *output.named.values(), *[p.grad for p in net.parameters()], *net.buffers()])
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_recompilation_is_seen():
    # The test above would notice: another width of the batch's fields does compile again.
    net = build("mlp", spec_of("mtl"))
    torch._dynamo.reset()
    compiled = torch.compile(net.forward, backend="aot_eager", fullgraph=True)
    data = make_data(net, 8)
    compiled(data.x, data.fields, data.scenario)
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(torch._dynamo.exc.RecompileError):
        compiled(data.x.double(), data.fields, data.scenario)
