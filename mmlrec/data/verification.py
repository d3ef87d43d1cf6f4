"""Whether the parts that are read are those that were written: each hashed once, in a thread behind the reader.

sha256 runs at more than a GB a second and without the interpreter's lock, so a run has hashed its parts long before its first
epoch ends. What a rank reads is spread over all parts; the ranks of a machine, which see the same files, share them out. An
object store shows all machines the same: there, all ranks share them out.
"""

from __future__ import annotations

import threading
from collections import deque

from mmlrec.errors import DataError, UserError
from mmlrec.identity import check_part
from mmlrec.schema import Part
from mmlrec.storage.places import Place, is_local


class Verification:
    """Compares parts with the checksums of their manifests, each once, in the order in which they come.

    Args:
        rank, num_ranks: of those on this machine; each takes one part in `num_ranks`.
        all_ranks: rank and number of ranks on all machines, who share the parts of an object store.

    Attributes:
        failure: what is wrong with a part, once that is known; nothing is hashed any more then.
    """

    def __init__(self, rank: int = 0, num_ranks: int = 1, all_ranks: tuple[int, int] | None = None) -> None:
        self._on_machine, self._on_all = (rank, num_ranks), all_ranks or (rank, num_ranks)
        self._seen: set[Place] = set()
        self._waiting: deque[tuple[Place, Part]] = deque()
        self._change = threading.Condition()
        self._running = False
        self.failure: UserError | None = None

    def add(self, folder: Place, parts: list[Part]) -> None:
        """Have this rank's share of some parts hashed, less those that were added before."""
        rank, num_ranks = self._on_machine if is_local(folder) else self._on_all
        mine = [part for index, part in enumerate(parts) if index % num_ranks == rank]
        with self._change:
            new = [part for part in mine if folder / part.path not in self._seen]
            self._seen |= {folder / part.path for part in new}
            self._waiting += [(folder, part) for part in new]
            if new and not self._running:
                self._running = True
                # A daemon: the process may end before all is hashed.
                threading.Thread(target=self._work, name="mmlrec-verify", daemon=True).start()

    def finished(self, seconds: float) -> bool:
        """Wait that long at most for all parts to be hashed, or for one that is wrong; whether it is so."""
        with self._change:
            return self._change.wait_for(lambda: not self._running, seconds)

    def _work(self) -> None:
        while True:
            with self._change:
                if self.failure is not None or not self._waiting:
                    self._waiting.clear()
                    self._running = False
                    self._change.notify_all()
                    return
                folder, part = self._waiting.popleft()
            try:
                check_part(folder, part)
            except UserError as error:
                self.failure = error
            except Exception as error:  # whatever it is: nobody may wait for ever for what is not hashed any more
                self.failure = DataError(f"{folder / part.path}: cannot be compared with its checksum: {error!r}.")
