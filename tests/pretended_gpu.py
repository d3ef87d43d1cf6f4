"""A GPU that is none, to execute on a machine without one what is written for GPUs: `python -m tests.pretended_gpu MODULE ...`.

Tensors of the device "cuda" have their numbers in the memory of the host (`pretended_gpu.cpp`, compiled at the first use), and
CPU kernels compute with them, once it is known that CUDA would: it has the operator, and all tensors are its own. So code takes
the ways of GPUs: a thread of autograd for the device, autocast, fused and foreach optimizers, streams, page-locked memory.

It shows tensors on the wrong device; operators that CUDA does not have; memory that is read before it was written, by the
device or by a copy that nobody waited for, as it holds what is not a number; and where the host waits, as
`torch.cuda.set_sync_debug_mode` tells it, with copies from memory that is not page-locked besides. It does not show other
kernels' numbers and limits, what streams must wait for, and times. What has no kernel for CPUs cannot run: Adam of tables,
tables in the memory of the host, fp8 between ranks, a profile of the GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOURCE = Path(__file__).with_suffix(".cpp")
MEMORY = 8 << 30
#: What fbgemm 1.6's build for GPUs has for CPUs alone, and a name does not say so.
ON_CPUS_ONLY = [
    *("bottom_k_per_row", "cat_reorder_batched_ad_indices", "embedding_bag_rowwise_prune", "jagged_1d_to_truncated_values"),
    *("jagged_slice_forward", "lengths_range_out", "masked_select_jagged_1d", "padding_fused_tbe_input_combine"),
    *("padding_fused_tbe_input_combine_with_length", "pruned_hashmap_insert", "tbe_input_combine"),
]
_MODES = {"default": 0, "warn": 1, "error": 2}


def library() -> Path:
    """The compiled source, made anew where it or torch has changed."""
    found = importlib.util.find_spec("torch")
    torch_folder = Path(str(found and found.origin)).parent
    of = (SOURCE, Path(__file__), torch_folder / "version.py")
    key = hashlib.sha256(b"".join(path.read_bytes() for path in of)).hexdigest()[:16]
    made = Path(tempfile.gettempdir()) / f"mmlrec-pretended-gpu-{key}.so"
    if not made.exists():
        beside = made.with_suffix(f".{os.getpid()}")
        command = [
            "g++",
            "-std=c++20",
            "-O1",
            "-shared",
            "-fPIC",
            f"-I{torch_folder / 'include'}",
            str(SOURCE),
            "-o",
            str(beside),
        ]
        command += [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_folder / 'lib'}"]
        subprocess.run(command, check=True)
        beside.replace(made)
    return made


def operators() -> str:
    """What CUDA has of torch's operators, by torch's own table of them, in the form that the library reads; and of fbgemm's."""
    import fbgemm_gpu  # noqa: F401
    import torch
    import torchgen
    import yaml

    from tests.waits import WAITING

    file = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    entries = yaml.load(file.read_text(), yaml.CSafeLoader)
    by_name = {entry["func"].partition("(")[0]: entry for entry in entries}
    lines = []
    for name, entry in by_name.items():
        made_by = by_name[entry.get("structured_delegate", name)]
        kernels = made_by.get("dispatch", {"CompositeImplicitAutograd": ""})
        keys = {key for several in kernels for key in several.replace(" ", "").split(",")}
        if "CUDA" in keys or "ufunc_inner_loop" in made_by or any(key.startswith("Composite") for key in keys):
            lines.append(f"aten::{name} {'lax' if entry.get('device_check') == 'NoCheck' else 'strict'}")
        if name.partition(".")[0] in WAITING:
            lines.append(f"aten::{name} reads")
    of_fbgemm = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fbgemm::")}
    lines += [f"{name} lax" for name in of_fbgemm - {f"fbgemm::{name}" for name in ON_CPUS_ONLY}]
    return "\n".join(lines)


@contextlib.contextmanager
def _without_a_word() -> Iterator[None]:
    """torch says that kernels are put in place of its own."""
    before = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def install() -> None:
    """From now on this process has the GPU. Call it before torch is imported, which asks once whether it has CUDA."""
    assert "torch" not in sys.modules
    with _without_a_word():
        loaded = ctypes.CDLL(str(library()))
    import torch

    table = library().with_suffix(".txt")
    if not table.exists():
        beside = table.with_suffix(f".{os.getpid()}")
        beside.write_text(operators())
        beside.replace(table)
    loaded.pretended_operators(str(table).encode())
    properties = SimpleNamespace(
        name="pretended",
        total_memory=MEMORY,
        uuid=os.environ.get("LOCAL_RANK"),
        major=9,
        minor=0,
        multi_processor_count=4,
        gcnArchName="",
    )
    mode = [0]

    def set_sync_debug_mode(to: int | str) -> None:
        mode[0] = _MODES[to] if isinstance(to, str) else to
        loaded.pretended_debug_mode(mode[0])

    def only(number: Any = None) -> None:
        assert number is None or torch.device(number).index in (None, 0), number

    class Stream(torch.Stream):
        """`torch.cuda.Stream`."""

        def __new__(cls, device: Any = None, priority: int = 0, **options: Any) -> Any:
            return super().__new__(cls, device="cuda:0", priority=priority, **options)

    class Event(torch.Event):
        """`torch.cuda.Event`."""

        def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> Any:
            return super().__new__(cls, device="cuda:0", enable_timing=enable_timing)

    @contextlib.contextmanager
    def stream(to: Any) -> Iterator[None]:
        before = torch.accelerator.current_stream()
        if to is not None:
            torch.accelerator.set_stream(to)
        try:
            yield
        finally:
            torch.accelerator.set_stream(before)

    @contextlib.contextmanager
    def device(number: Any) -> Iterator[None]:
        only(number)
        yield

    state = torch.zeros(16, dtype=torch.uint8)
    in_place_of: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda call, **_: None,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": only,
        "device": device,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_properties": lambda device=None: properties,
        "synchronize": lambda device=None: loaded.pretended_wait(),
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "get_rng_state": lambda device=None: state.clone(),
        "set_rng_state": lambda new, device=None: state.copy_(new),
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "set_sync_debug_mode": set_sync_debug_mode,
        "get_sync_debug_mode": lambda: mode[0],
        "Stream": Stream,
        "Event": Event,
        "stream": stream,
        "current_stream": lambda device=None: torch.accelerator.current_stream(),
        "default_stream": lambda device=None: Stream(),
    }
    for name, value in in_place_of.items():
        setattr(torch.cuda, name, value)
    clone = torch.UntypedStorage.clone

    def copied(storage: Any) -> Any:
        """As `copy.deepcopy` of a buffer asks for it."""
        if storage.device.type != "cuda":
            return clone(storage)
        return torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage).clone().untyped_storage()

    setattr(torch.UntypedStorage, "clone", copied)  # noqa: B010 (not mypy's)
    for name in ("get_rng_state", "set_rng_state"):
        setattr(torch.cuda.random, name, in_place_of[name])
    _exchange_by_gloo()


def _exchange_by_gloo() -> None:
    """In place of NCCL; the gradients of the network are not timed."""
    import torch
    import torch.distributed as dist

    plain = dist.init_process_group

    def init_process_group(backend: str | None = None, *arguments: Any, **options: Any) -> None:
        plain("cpu:gloo,cuda:gloo" if backend == "nccl" else backend, *arguments, **options)

    dist.init_process_group = init_process_group
    setattr(torch._C._distributed_c10d.Logger, "set_runtime_stats_and_log", lambda logger: None)  # noqa: B010 (not mypy's)


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
