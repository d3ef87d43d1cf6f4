"""Forward passes as on a GPU, without one: torch's fake tensors know device, shape and number format, and hold no numbers.

An operator on tensors of two devices fails, and so does whatever would wait for a number of the device.
"""

import itertools
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from mmlrec.layers.scenario import Dispatch
from mmlrec.registry import method, method_names
from mmlrec.testing.networks import SHAPES, TINY, Data, losses_of, spec_of

ROWS = 12
CASES = [(name, shape) for name, shape in itertools.product(method_names(), SHAPES) if spec_of(shape).setting in method(name).settings]


@contextmanager
def gpu(capability):
    """As on a GPU of this compute capability."""
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        mock.patch("torch.cuda.get_device_capability", return_value=capability),
        torch.no_grad(),  # gradients would ask the driver for its devices
        FakeTensorMode(),
    ):
        yield


def on_gpu(module: nn.Module) -> nn.Module:
    """Parameters and buffers of the same shapes there."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    held[name] = nn.Parameter(fake, requires_grad=False) if held is part._parameters else fake
    return module


def batch_for(net) -> Data:
    spec = net.spec
    lead = (ROWS, spec.num_heads) if net.tables_per_branch else (ROWS,)
    x = torch.empty(*lead, spec.input_width, device="cuda")
    views = x.split([*spec.fields.values(), spec.num_dense], dim=-1)
    scenario = torch.empty(ROWS, dtype=torch.int64, device="cuda")
    labels, ones = torch.empty(ROWS, spec.num_tasks, device="cuda"), torch.ones(ROWS, device="cuda")
    return Data(x, dict(zip(spec.fields, views, strict=False)), scenario, labels, torch.ones_like(labels), ones)


@pytest.mark.parametrize(("precision", "capability"), [("fp32", (9, 0)), ("bf16", (9, 0)), ("bf16", (8, 0))])
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_a_method_mixes_no_devices_and_waits_for_none(name, shape, precision, capability):
    known = {key: value for key, value in TINY.items() if key in method(name).Config.model_fields}
    net = method(name)(spec_of(shape), method(name).Config(**known))
    with gpu(capability):
        on_gpu(net).train()
        data, noise = batch_for(net), torch.empty(net.num_noise, device="cuda") if net.num_noise else None
        valid = torch.ones(ROWS, dtype=torch.bool, device="cuda")
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            output = net(data.x, data.fields, data.scenario, valid=valid, noise=noise)
        assert output.logits.device == data.x.device
        found = losses_of(net, output, data)
        assert found
        for value in found.values():
            assert value.device == data.x.device
