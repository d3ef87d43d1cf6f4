"""How ranks with GPUs begin and end, by ranks that only believe to have some: what NCCL would do, gloo does for them."""

import sys

import pytest

from mmlrec.distributed.last_words import _PEER_GONE
from tests.processes import Command
from tests.training.launch import start_ranks

SCRIPT = """
import os
from types import SimpleNamespace

import torch
import torch.distributed as dist

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: {visible}
torch.cuda.set_device = lambda device: print("on", device, flush=True)
torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid={gpus!r}[int(os.environ["RANK"])])
join, leave = dist.init_process_group, dist.destroy_process_group

def pretended(backend, **options):
    print("by", backend, flush=True)
    join("gloo", **options)

def left():
    print("left", flush=True)
    leave()

dist.init_process_group, dist.destroy_process_group = pretended, left

from apps.cli import run
from mmlrec.distributed import last_words
from mmlrec.distributed.world import process_group

last_words._hang_up = lambda: print("hung up", flush=True)

def main():
    with process_group(timeout=30) as world:
        if world.rank == 1:
            {do}
        world.barrier()

run(main)
"""
#: What NCCL says where it is used wrongly, in the form that torch gives it.
NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled system error (run with NCCL_DEBUG=INFO for"
    " details), NCCL version 2.28.9\\nncclSystemError: System call (e.g. socket, malloc) or external library call failed."
    "\\nLast error:\\nError while attaching to shared memory segment"
)


def ended(tmp_path, *, visible: int = 2, gpus: tuple[str, str] = ("a", "b"), do: str = "pass") -> tuple[list[int], list[str]]:
    """Exit codes and outputs of two ranks of one host."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(visible=visible, gpus=gpus, do=do))
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    ranks: list[Command] = start_ranks([sys.executable, str(script)], logs)
    try:
        codes = [rank.wait(60) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return codes, [log.read_text() for log in logs]


def the_line(texts: list[str]) -> str:
    (line,) = [line for text in texts for line in text.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(("visible", "places"), [(2, ["cuda:0", "cuda:1"]), (1, ["cuda:0", "cuda:0"])])
def test_a_rank_has_the_gpu_of_its_number_or_the_only_one_that_it_sees(tmp_path, visible, places):
    """A scheduler may show each process the GPU that it is to have, and no other."""
    codes, texts = ended(tmp_path, visible=visible)
    assert codes == [0, 0], texts
    assert [text.split("\n")[:2] for text in texts] == [[f"on {place}", "by nccl"] for place in places]
    assert ["left" in text for text in texts] == [True, True]


def test_two_ranks_on_one_gpu_are_refused_by_their_numbers(tmp_path):
    codes, texts = ended(tmp_path, visible=1, gpus=("a", "a"))
    assert codes == [2, 2], texts
    assert the_line(texts).startswith("error: ranks 0 and 1 have the same GPU: start as many processes on a node as it has")


def test_a_rank_that_fails_ends_without_the_others_and_says_why(tmp_path):
    """NCCL takes its leave of all ranks, and those that wait for this one do not come: its last words would never be heard.

    Nor does it close NCCL's connections, on which that would end this process before it has said anything. And what NCCL itself
    says is a cause, if it is not of a lost rank.
    """
    codes, texts = ended(tmp_path, do=f'raise dist.DistBackendError("{NCCL}")')
    assert codes == [1, 1]
    assert "failed: DistBackendError: NCCL error in: " in the_line(texts)
    assert "Error while attaching to shared memory segment" in texts[1]
    assert not any(word in text for text in texts for word in ("left", "hung up"))


@pytest.mark.parametrize(
    "text",
    [
        "NCCL error in: x.cpp:1, remote process exited or there was a network error\nncclRemoteError: A call failed",
        "NCCL error in: x.cpp:1, unhandled system error\nLast error:\nsocketProgress: Connection closed by remote peer host<4>",
        "NCCL communicator was aborted on rank 1.",
    ],
)
def test_what_nccl_says_of_a_lost_rank_is_no_cause(text):
    assert _PEER_GONE.search(text)
