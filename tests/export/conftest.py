"""What the tests of exported models share."""

import logging
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """Tiny tensors: a second thread only costs time. Traces of graphs are for nobody, and pytest would have all written."""
    threads, trace = torch.get_num_threads(), logging.getLogger("torch.__trace")
    torch.set_num_threads(1)
    propagate, trace.propagate = trace.propagate, False
    yield
    trace.propagate = propagate
    torch.set_num_threads(threads)
