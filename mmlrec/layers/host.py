"""Numbers between host and device, so that the host waits for the device at most where it says so."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host on a device, through pinned memory: a copy from elsewhere would wait for all work of the device.

    On the CPU the values themselves.
    """
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def to_host(values: Tensor) -> Tensor:
    """Values of a device on the host, through pinned memory, with one wait until the device has computed them.

    On the CPU the values themselves.
    """
    if values.device.type == "cpu":
        return values
    found = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    found.copy_(values, non_blocking=True)
    torch.cuda.current_stream(values.device).record_event().synchronize()
    return found
