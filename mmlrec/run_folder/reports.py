"""Files that a run appends to (`metrics.jsonl`, logs, TensorBoard's): where they are written, and put into its folder.

On a file system that is the run folder itself. On object storage nothing can be appended to: each rank writes its own into a
folder of its machine, and a thread puts those that have changed, each as a whole, every few seconds; and before a checkpoint
gets its marker, so that a resume loses none. Training never ends for that, and waits for it at checkpoints only.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

from mmlrec.distributed.world import World, logger
from mmlrec.errors import StorageError, UserError
from mmlrec.storage.places import Place, read
from mmlrec.storage.scratch import ScratchFolder

if TYPE_CHECKING:
    from upath import UPath

#: Of files that are being written, and get another name when they are whole.
_UNFINISHED = (".part", ".tmp")
_PUT_EVERY_S = 10.0
#: The share of the time, at most, in which reports are put: they grow, and each put is of the whole file.
_SHARE = 0.05


@contextlib.contextmanager
def reports(folder: Place, world: World, lost: Callable[[], UserError | None] = lambda: None) -> Iterator[Reports | None]:
    """Of a run whose folder lies on object storage; elsewhere None.

    At the end all reports are there, or a warning says that some are not.

    Args:
        lost: why this run may not write in its folder any more, if so.
    """
    error: UserError | None = None
    found: Reports | None = None
    if not isinstance(folder, Path):
        try:
            found = Reports(folder, world.rank, lost)
        except UserError as cause:
            error = cause
    world.raise_together(error)
    with found or contextlib.nullcontext():
        yield found


class Reports:
    """Brings files of one rank from a folder of this machine to a run folder, as long as that is the run's.

    Raises:
        UserError: this machine has no room for them, or the store cannot be reached.
    """

    def __init__(self, folder: UPath, rank: int, lost: Callable[[], UserError | None]) -> None:
        self._folder, self._lost = folder, lost
        self._put: dict[Path, tuple[int, int]] = {}
        try:
            self._scratch = ScratchFolder("reports")
            #: Where they are written; what a run has appended to so far lies there.
            self.written = self._scratch.path
            # TensorBoard begins a new file at each start.
            for name in [log_name(rank), *(["metrics.jsonl"] if rank == 0 else [])]:
                path = self.written / name
                path.parent.mkdir(exist_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    path.write_bytes(read(folder / name))
                    self._put[path] = _state(path)
        except StorageError:
            self._scratch.delete()
            raise
        except OSError as error:
            raise UserError(
                f"{folder}: reports are written to a folder of this machine before they are put there, and that fails: {error}."
                " TMPDIR names another place for it."
            ) from error
        self._out_of_reach = False
        self._putting, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="reports", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        # Where the store has not been reached of late, nobody has to wait for another refusal.
        if not self._out_of_reach and self.put():
            self._scratch.delete()
        else:
            self._scratch.keep()
            self.written = self._scratch.path
            logger.warning(
                "note: %s lacks the last reports of this run; they are in %s on this machine.", self._folder, self.written
            )

    def _run(self) -> None:
        pause = _PUT_EVERY_S
        while not self._ended.wait(pause):
            begun = time.monotonic()
            self.put()
            pause = max(_PUT_EVERY_S, (time.monotonic() - begun) / _SHARE)

    def put(self) -> bool:
        """Put what has changed since it was put; False where not all could be. Told when that begins, and when it is over."""
        with self._putting:
            return self._put_changed()

    def _put_changed(self) -> bool:
        try:
            files = sorted(path for path in self.written.rglob("*") if path.is_file() and path.suffix not in _UNFINISHED)
            changed = {path: state for path in files if self._put.get(path) != (state := _state(path))}
            if changed and self._lost() is not None:  # those of the run that has taken the folder over would be replaced
                return False
            for path, state in changed.items():
                self._folder.joinpath(*path.relative_to(self.written).parts).write_bytes(path.read_bytes())
                self._put[path] = state
        except (StorageError, OSError) as error:
            if not self._out_of_reach:
                logger.warning("note: reports cannot be put into the run folder, and that is tried on: %s", error)
            self._out_of_reach = True
            return False
        if self._out_of_reach:
            logger.info("%s: reports are put there again", self._folder)
        self._out_of_reach = False
        return True


def log_name(rank: int) -> str:
    """Where a rank logs, below the run folder."""
    return "train.log" if rank == 0 else f"logs/rank-{rank:05d}.log"


def _state(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns
