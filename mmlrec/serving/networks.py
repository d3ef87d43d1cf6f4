"""The network of an exported model: run by torch, or by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmlrec.errors import DataError, UserError
from mmlrec.serving.card import AGAIN

#: (x [B, d_in] or [B, U, d_in] float32, scenario [B] int64) -> scores [B, num_outputs] float32. Thread-safe.
Network = Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[np.float32]]


def open_network(folder: Path, card: dict[str, Any], threads: int | None) -> Network:
    """Load the network that a card names.

    Args:
        threads: cores that one call may use; None: as the library has it. For torch this is a setting of the process.

    Raises:
        DataError: the file cannot be read, or its format is not known.
        UserError: it needs a package that is not installed.
    """
    path, form = folder / card["network"]["file"], card["network"]["format"]
    if form not in _FORMATS:
        raise DataError(f"{folder}: a network of format {form!r}; this release reads {', '.join(_FORMATS)}. {AGAIN}")
    if not path.is_file():
        raise DataError(f"{path}: the network is not there. {AGAIN}")
    try:
        return _FORMATS[form](path, threads)
    except UserError:
        raise
    except Exception as error:  # of any class, as the damage is
        raise DataError(f"{path}: the network cannot be read: {error}. {AGAIN}") from error


def _torch_network(path: Path, threads: int | None) -> Network:
    import torch.export  # a second of imports that ONNX folders do without

    import mmlrec.layers.scenario  # noqa: F401  (an operator of our own, which graphs with many scenarios have)

    if threads is not None:
        torch.set_num_threads(threads)
    module = torch.export.load(path).module()

    def run(x: NDArray[np.float32], scenario: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.inference_mode():
            scores: torch.Tensor = module(torch.from_numpy(x), torch.from_numpy(scenario))
        return scores.numpy()

    return run


def _onnx_network(path: Path, threads: int | None) -> Network:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{path}: needs onnxruntime, which is not installed: pip install 'mmlrec[onnx]'") from error
    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(x: NDArray[np.float32], scenario: NDArray[np.int64]) -> NDArray[np.float32]:
        (scores,) = session.run(None, dict(zip(names, (x, scenario), strict=False)))
        return scores

    return run


_FORMATS: dict[str, Callable[[Path, int | None], Network]] = {"pt2": _torch_network, "onnx": _onnx_network}
