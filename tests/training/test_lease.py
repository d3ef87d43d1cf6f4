"""The lease of a run folder on object storage: one holder at a time, told who it is, and succeeded when it is dead."""

import json
import os
import socket
import threading
import time

import pytest

from mmlrec.errors import UserError
from mmlrec.run_folder import lease
from mmlrec.run_folder.lease import Lease
from mmlrec.storage.places import place


@pytest.fixture
def folder(store):
    return place(f"{store.address}/runs/a")


@pytest.fixture
def far(monkeypatch):
    """Leases of hosts that cannot look each other's processes up, and that are short."""
    monkeypatch.setattr(lease, "_process_space", lambda: None)
    monkeypatch.setattr(lease, "LENGTH_S", 1.0)
    monkeypatch.setattr(lease, "RENEWED_EVERY_S", 0.2)
    monkeypatch.setattr(lease, "_LOOKED_AT_EVERY_S", 0.05)


def content(start: str, host: str = "host-a") -> dict:
    return {"start": start, "since": f"2026-01-02 03:04:05 of {start}", "job": None, "ranks": [(host, 17)]}


def taken(folder, start: str, host: str = "host-a") -> Lease:
    found = Lease(folder)
    assert found.take(content(start, host))
    return found


def objects(folder) -> list[str]:
    return sorted(path.name for path in (folder / ".lease").iterdir()) if (folder / ".lease").is_dir() else []


def test_a_second_start_is_told_who_holds_the_folder(folder, far):
    first = taken(folder, "one")
    try:
        with pytest.raises(UserError) as error:
            Lease(folder).take(content("two"))
        assert str(error.value) == (
            f"{folder} is taken: a run that was started at 2026-01-02 03:04:05 of one on host-a, process 17 is writing there."
            " Wait for its end or stop it, or choose another folder with --run-dir."
        )
        assert str(folder).startswith("s3://")
        assert first.lost() is None
        assert Lease(folder).join("one", 1)
        assert not Lease(folder).join("two", 1)
    finally:
        first.leave()


def test_what_a_start_leaves_behind_is_nothing_or_free_at_once(folder, far, monkeypatch):
    monkeypatch.setattr(lease, "LENGTH_S", 60.0)
    taken(folder, "one").leave()
    assert objects(folder) == []
    second = taken(folder, "two")
    (folder / "config.yaml").write_text("a run")
    second.leave()
    assert objects(folder) == ["1"]
    begun = time.monotonic()
    taken(folder, "three").leave()
    assert time.monotonic() - begun < 30
    assert objects(folder) == ["2"]


def test_a_holder_that_does_not_renew_is_succeeded_and_notices_it(folder, far):
    stopped = taken(folder, "one")
    stopped._left.set()  # its thread renews no more, as when the process is stopped
    stopped._renewing.join()
    begun = time.monotonic()
    second = taken(folder, "two", "host-b")
    assert time.monotonic() - begun >= 1.0
    assert second.lost() is None
    error = stopped.lost()
    assert error is not None
    assert f"{folder}: another run has taken it over, started at 2026-01-02 03:04:05 of two on host-b, process 17" in str(error)
    stopped.leave()
    assert second.lost() is None
    assert objects(folder) == ["2"]
    second.leave()


def test_a_live_holder_is_not_succeeded_however_its_clock_goes(folder, far, monkeypatch):
    """Nothing of a clock stands in the lease: one that is years behind is as good."""
    monkeypatch.setattr(time, "time", lambda: 0.0)
    first = taken(folder, "one")
    for _ in range(3):
        with pytest.raises(UserError, match="is taken"):
            Lease(folder).take(content("two"))
    first.leave()


def test_a_start_that_did_not_look_does_not_take_its_holder_for_dead(folder, far, monkeypatch):
    """It was stopped for longer than the lease, between an answer of the store and the next look."""
    first = taken(folder, "one")
    second, looks = Lease(folder), []
    plain = second._newest

    def newest():
        found = plain()
        looks.append(found)
        if len(looks) == 2:
            time.sleep(1.5)
        return found

    monkeypatch.setattr(second, "_newest", newest)
    with pytest.raises(UserError, match="is taken"):
        second.take(content("two"))
    assert first.lost() is None
    first.leave()


def test_of_starts_at_one_moment_one_begins(folder, far):
    won, told, gate = [], [], threading.Barrier(6)

    def start(name: str) -> None:
        found = Lease(folder)
        gate.wait()
        try:
            found.take(content(name))
        except UserError as error:
            told.append(str(error))
        else:
            won.append(found)

    threads = [threading.Thread(target=start, args=(str(index),)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert len(told) == 5
    assert all("is taken: a run that was started at" in text for text in told)
    won[0].leave()


def test_processes_of_this_machine_are_looked_up(folder):
    """Nobody waits for the lease of a process that has ended here; one that is stopped is alive."""
    first = taken(folder, "one", socket.gethostname())
    first._left.set()
    first._renewing.join()
    begun = time.monotonic()
    with pytest.raises(UserError, match="is taken"):
        Lease(folder).take(content("two"))
    # Its process number may be used again: the time at which it was started is not the same.
    path = folder / ".lease" / "1"
    written = json.loads(path.read_bytes())
    assert written["process"]["number"] == os.getpid()
    written["process"]["begun"] = "1"
    path.write_text(json.dumps(written))
    second = taken(folder, "two")
    assert time.monotonic() - begun < 20
    assert first.lost() is not None
    second.leave()


def test_one_that_was_slow_does_not_take_a_number_that_has_been_before(folder, far, monkeypatch):
    """It saw the lease expire, slept, and creates the next number, which another has had and left meanwhile."""
    (folder / "config.yaml").write_text("a run")
    first = taken(folder, "one")
    first.leave()
    plain = lease.create

    def late(path, text: bytes) -> None:
        monkeypatch.setattr(lease, "create", plain)
        for name in ("two", "three"):
            held.append(taken(folder, name))
            if name == "two":
                held[-1].leave()
        plain(path, text)

    held: list[Lease] = []
    monkeypatch.setattr(lease, "create", late)
    with pytest.raises(UserError, match="of three on host-a"):
        Lease(folder).take(content("slow"))
    assert held[-1].lost() is None
    held[-1].leave()


def test_a_store_that_overwrites_whatever_is_asked_is_told_of(folder, far, monkeypatch, caplog):
    monkeypatch.setattr(lease, "create", lambda path, data: path.write_bytes(data))
    monkeypatch.setattr(lease, "_SETTLES_WITHIN_S", 0.2)
    told = []
    monkeypatch.setattr(lease.logger, "warning", lambda text, *rest: told.append(text % rest))
    first = taken(folder, "one")
    assert len(told) == 1
    assert f"note: {folder}: its store does not honour conditional puts" in told[0]
    with pytest.raises(UserError, match="is taken"):
        Lease(folder).take(content("two"))
    first.leave()


def test_an_outage_is_told_once_and_the_lease_kept(folder, store, far, monkeypatch):
    monkeypatch.setenv("MMLREC_STORAGE_SECONDS", "0.1")
    told = []
    for level in ("warning", "info"):
        monkeypatch.setattr(lease.logger, level, lambda text, *rest: told.append(text % rest))
    first = taken(folder, "one")
    store.link.cut()
    deadline = time.monotonic() + 10
    while not told and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.8)
    assert len(told) == 1
    assert "the lease of the run folder cannot be renewed" in told[0]
    assert str(folder) in told[0]
    assert first.lost() is None  # unknown, and not asserted
    store.link.mend()
    while len(told) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert told[1] == f"{folder}: the lease is renewed again"
    assert first.lost() is None
    first.leave()
