"""BatchNorm against torch's own, with padding, stacks, and several ranks."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mmlrec.layers.normalisation import BatchNorm
from tests.processes import spawn

F64 = torch.float64


def pair(features):
    ours, theirs = BatchNorm(features).double(), nn.BatchNorm1d(features).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.rand(features, dtype=F64) + 0.5)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("stack", [None, 3])
def test_equals_batchnorm1d_over_training_and_evaluation(stack):
    width = 4
    ours, theirs = pair(width * (stack or 1))
    for _ in range(3):
        flat = torch.randn(10, width * (stack or 1), dtype=F64) * 2 + 1
        mine, reference = flat.clone().requires_grad_(), flat.clone().requires_grad_()
        y = ours(mine if stack is None else mine.view(10, stack, width).transpose(0, 1))
        y = y if stack is None else y.transpose(0, 1).reshape(10, -1)
        expected = theirs(reference)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
        pull = torch.randn_like(expected)
        ours.zero_grad(), theirs.zero_grad()
        y.backward(pull), expected.backward(pull)
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
        for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=key)
    ours.eval(), theirs.eval()
    x = torch.randn(5, width, dtype=F64)
    if stack is None:
        torch.testing.assert_close(ours(x), theirs(x))


def test_padding_rows_do_not_count():
    ours, theirs = pair(4)
    x = torch.randn(8, 4, dtype=F64)
    padded = torch.cat([x, torch.full((3, 4), 1e3, dtype=F64)])
    y = ours(padded, torch.arange(11) < 8)
    torch.testing.assert_close(y[:8], theirs(x), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_rows_of_each_member_and_too_few_rows():
    ours = BatchNorm(2).double()
    x = torch.tensor([[[1.0], [3.0], [50.0]], [[7.0], [8.0], [9.0]]], dtype=F64)
    y = ours(x, torch.tensor([[True, True, False], [True, False, False]]))
    torch.testing.assert_close(y[0, :2, 0], torch.tensor([-1.0, 1.0], dtype=F64), rtol=1e-4, atol=0)
    # One row is no batch: the running statistics (0, 1) serve, and stay.
    torch.testing.assert_close(y[1, :, 0], x[1, :, 0], rtol=1e-4, atol=0)
    torch.testing.assert_close(ours.running_mean, torch.tensor([0.2, 0.0], dtype=F64))
    torch.testing.assert_close(ours.running_var, torch.tensor([0.9 + 0.1 * 2.0, 1.0], dtype=F64))


def test_bf16_input_gives_bf16_output_and_float32_statistics():
    ours = BatchNorm(3)
    assert ours(torch.randn(6, 3).bfloat16()).dtype == torch.bfloat16
    assert ours.running_mean.dtype == torch.float32


def batch():
    g = torch.Generator().manual_seed(4)
    return torch.randn(11, 3, generator=g, dtype=F64), torch.randn(11, 3, generator=g, dtype=F64)


def rank_part(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    x, pull = batch()
    part = slice(0, 4) if rank == 0 else slice(4, 11)
    mine = x[part].clone().requires_grad_()
    layer = BatchNorm(3).double()
    y = layer(mine)
    y.backward(pull[part])
    torch.save((y.detach(), mine.grad, layer.weight.grad, layer.running_mean, layer.running_var), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_with_unequal_rows_equal_one_process(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    spawn(rank_part, (port, tmp_path), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    x, pull = batch()
    x.requires_grad_()
    layer = nn.BatchNorm1d(3).double()
    y = layer(x)
    y.backward(pull)
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), y.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), x.grad, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(parts[0][2] + parts[1][2], layer.weight.grad, rtol=1e-10, atol=1e-12)
    for p in parts:
        torch.testing.assert_close(p[3], layer.running_mean)
        torch.testing.assert_close(p[4], layer.running_var)
