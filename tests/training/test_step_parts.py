"""Own seconds by part: parts within others, waits in collectives, and what is left out."""

import contextlib
import threading

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Work
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from mmlrec.distributed import step_parts
from mmlrec.distributed.step_parts import BACKWARD, CHECKPOINT, DATA, INPUT, OTHER, WAITING, StepParts
from mmlrec.session.pipeline import WithTables


@pytest.fixture
def clock(monkeypatch):
    """Time by hand."""
    now = [0.0]
    monkeypatch.setattr(step_parts.time, "perf_counter", lambda: now[0])

    def pass_by(seconds):
        now[0] += seconds

    return pass_by


def spent(parts):
    return {part: seconds for part, seconds in parts.seconds.items() if seconds}


def test_a_part_within_another_counts_for_itself(clock):
    parts = StepParts()
    with parts.of(OTHER):
        clock(1)
        with parts.of(BACKWARD):
            clock(2)
            with parts.of(WAITING):
                assert parts.waiting
                clock(4)
            assert not parts.waiting
            clock(8)
            with contextlib.suppress(KeyError), parts.of(DATA):
                clock(16)
                raise KeyError
        clock(32)
    clock(64)
    with parts.of(OTHER):
        clock(128)
    assert spent(parts) == {OTHER: 161, BACKWARD: 10, WAITING: 4, DATA: 16}


def test_what_is_left_out_counts_nowhere(clock):
    parts = StepParts()
    with parts.of(CHECKPOINT):
        clock(1)
        with parts.left_out():
            clock(2)
            with parts.of(BACKWARD):
                clock(4)
        clock(8)
    assert spent(parts) == {CHECKPOINT: 9}


def test_the_end_of_a_backward_is_a_wait(clock):
    """What the engine calls at the end, as DistributedDataParallel has it called, comes after all gradients."""
    parts = StepParts()
    weight = torch.ones(2, requires_grad=True)
    weight.register_hook(lambda _: clock(1))
    total = weight.sum()
    engine = torch.autograd.variable.Variable._execution_engine
    # As one that waits for the others would queue it, once its gradients are there.
    weight.register_hook(lambda _: engine.queue_callback(lambda: clock(2)))
    with parts.backward_of(total):
        total.backward()
        clock(4)
    assert spent(parts) == {BACKWARD: 1, WAITING: 6}


def test_waits_of_other_threads_do_not_count(clock, monkeypatch):
    monkeypatch.setattr(Work, "wait", lambda work: clock(1))
    plain = Work.wait
    parts = StepParts()
    with parts.seeing_waits():
        Work.wait(None)
        thread = threading.Thread(target=Work.wait, args=(None,))
        thread.start()
        thread.join()
    assert Work.wait is plain
    assert spent(parts) == {WAITING: 1}


@pytest.mark.parametrize(("device", "ranks", "part"), [("cuda", 2, WAITING), ("cuda", 1, INPUT), ("cpu", 2, INPUT)])
def test_on_several_gpus_the_host_waits_where_it_reads_what_the_others_send(clock, monkeypatch, device, ranks, part):
    """NCCL's own waits are the device's. On CPUs the method of torch tells them."""
    monkeypatch.setattr(TrainPipelineSparseDist, "wait_sparse_data_dist", lambda *_: clock(1))
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    pipeline = WithTables.__new__(WithTables)
    pipeline._device, pipeline._parts = torch.device(device), StepParts()
    pipeline.wait_sparse_data_dist(None)
    assert spent(pipeline._parts) == {part: 1}
