"""A process group of one for as long as a call takes, in a process that belongs to somebody else: a notebook, a service."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist

from mmlrec.distributed.world import TALKATIVE, World, logger, process_group
from mmlrec.errors import UserError

#: One call at a time: a process has one process group.
_ONE_AT_A_TIME = threading.Lock()


@contextlib.contextmanager
def one_process(timeout: float, *, quiet: bool = False) -> Iterator[World]:
    """A process group of this process alone, left at the end, with loggers, warnings and torch's random state as they were.

    Calls of other threads wait for their turn.

    Args:
        timeout: `training.timeout`.
        quiet: log warnings only.

    Raises:
        UserError: a process group that is not ours is open, or this is one of several ranks.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "mmlrec.train, evaluate and predict use one process, and this is one of several ranks (WORLD_SIZE). Start the"
            " ranks with torchrun -m apps.train, apps.evaluate or apps.predict; the run folder can be loaded here afterwards."
        )
    with _ONE_AT_A_TIME:
        if dist.is_initialized():
            raise UserError(
                "a torch.distributed process group is open in this process, and mmlrec opens one of its own. Close it first:"
                " torch.distributed.destroy_process_group(); or call mmlrec in another process."
            )
        gc.collect()  # tables of the calls before, which circles of references hold
        with _manners(), process_group(timeout) as world:
            if quiet:
                for handler in logger.handlers:
                    handler.addFilter(lambda record: record.levelno >= logging.WARNING)
            yield world


def signals_to_hear() -> tuple[signal.Signals, ...]:
    """The signals that end a training between two steps: an interrupt, in the main thread.

    SIGTERM and SIGUSR1 stay with whom this process belongs to. In other threads Python hands out no signals at all.
    """
    return (signal.SIGINT,) if threading.current_thread() is threading.main_thread() else ()


@contextlib.contextmanager
def _manners() -> Iterator[None]:
    """What `process_group` sets for a process of its own is as it was afterwards."""
    handlers, propagate, level = list(logger.handlers), logger.propagate, logger.level
    levels = {name: logging.getLogger(name).level for name in TALKATIVE}
    with warnings.catch_warnings(), torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            yield
        finally:
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)
            for name, before in levels.items():
                logging.getLogger(name).setLevel(before)
