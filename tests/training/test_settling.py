"""A rank that is slow to read finds what it reads: rank 0 waits before it deletes."""

import json
import threading
import time
from pathlib import Path

from mmlrec.run_folder import checkpoint, whole


class Threads:
    """Two threads as the ranks of a world; each gathers by position."""

    def __init__(self) -> None:
        self.meeting, self.values = threading.Barrier(2), [None, None]

    def rank(self, number: int) -> "Rank":
        return Rank(self, number)


class Rank:
    world_size = 2

    def __init__(self, ranks: Threads, number: int) -> None:
        self.ranks, self.rank, self.is_main = ranks, number, number == 0

    def gather(self, value):
        self.ranks.meeting.wait(30)
        self.ranks.values[self.rank] = value
        self.ranks.meeting.wait(30)
        found = list(self.ranks.values)
        self.ranks.meeting.wait(30)
        return found

    def from_main(self, value):
        return self.gather(value)[0]

    def barrier(self) -> None:
        self.gather(None)

    def raise_together(self, error: Exception | None) -> None:
        for found in self.gather(error):
            if found is not None:
                raise found

    def at(self, *_) -> None:
        pass

    def without_limit(self) -> "Rank":
        return self


def write(folder: Path, step: int) -> None:
    folder.mkdir()
    whole.seal(folder, {"state.json": whole.write_synced(folder / "state.json", json.dumps({"step": step}).encode())})


def test_the_best_that_is_too_new_is_deleted_after_all_have_read_it(tmp_path, monkeypatch):
    write(tmp_path / "best", 220)
    write(tmp_path / "best.old", 200)
    plain, delete = checkpoint.read_state, whole.delete

    def slow(folder: Path) -> dict:
        if threading.current_thread().name == "1":
            time.sleep(0.3)
        return plain(folder)

    def slow_delete(folder: Path) -> None:
        delete(folder)
        time.sleep(0.6)

    monkeypatch.setattr(checkpoint, "read_state", slow)
    monkeypatch.setattr(whole, "delete", slow_delete)
    ranks, failures = Threads(), []

    def run(number: int) -> None:
        try:
            checkpoint.settle_best(tmp_path / "best", 210, ranks.rank(number))
        except Exception as error:
            failures.append(error)
            ranks.meeting.abort()

    threads = [threading.Thread(target=run, args=(number,), name=str(number)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert plain(tmp_path / "best")["step"] == 200
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
