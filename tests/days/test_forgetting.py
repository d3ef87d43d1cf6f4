"""Which rows start afresh, against sets of Python."""

import random

import numpy as np
import pytest

from mmlrec.days.forgetting import forgotten_rows, load_seen, note_seen, save_seen, seen_before
from mmlrec.errors import DataError, UserError
from tests.days.support import ids_in_train, without_ids, write_days


@pytest.mark.parametrize("forget_after", [1, 2, 4])
def test_rows_that_were_absent_for_so_many_days_are_given_once_in_each_absence(tmp_path, forget_after):
    days, draw = write_days(tmp_path, 8, rows=60), random.Random(forget_after)
    for number, day in enumerate(days):
        start = draw.randint(1, 25)
        days[number] = without_ids(day, "f0", range(start, start + 15))
    features = {"t0": "f0", "tm0": "m0", "t1": "f1", "t2": "f2"}
    stood = {table: [ids_in_train(day, feature) for day in days] for table, feature in features.items()}
    seen = {}
    forgotten_before = {table: set() for table in features}
    for number, day in enumerate(days):
        found = forgotten_rows(seen, number, forget_after)
        for table in features:
            sizes = [of_day.manifest.table(table).num_rows for of_day in days]
            known = set(range(1, sizes[number - 1])) if number else set()
            recent = set().union(*stood[table][max(number - forget_after, 0) : number])
            ever = set().union(*stood[table][:number])
            absent = {row for row in known if row in ever and row not in recent and number > forget_after}
            # What was absent already before the day before, and so was given then.
            expected = absent - forgotten_before[table]
            assert set(found.get(table, np.array([])).tolist()) == expected, (table, number)
            forgotten_before[table] = absent
        seen = note_seen(seen, day.folder, day.manifest, number)
        (tmp_path / "last_seen.npz.0123456789ab.tmp").touch()  # of a process that was killed while it wrote
        save_seen(tmp_path, seen)
        assert not list(tmp_path.glob("last_seen.npz.*"))
        seen = load_seen(tmp_path)
    assert any(forgotten_before["t0"])


def test_rows_of_a_run_that_the_first_day_begins_with_count_as_seen_before_it(tmp_path):
    days = write_days(tmp_path, 3, rows=60)
    first = without_ids(days[0], "f0", range(5, 12))
    seen = note_seen(seen_before(first.manifest), first.folder, first.manifest, 0)
    absent = set(range(1, first.manifest.table("t0").num_rows)) - ids_in_train(first, "f0")
    assert absent >= set(range(5, 12))
    assert set(forgotten_rows(seen, 1, 1)["t0"].tolist()) == absent
    # Without such a run they have never been there, so that there is nothing to forget.
    assert forgotten_rows(note_seen({}, first.folder, first.manifest, 0), 1, 1)["t0"].tolist() == []


def test_what_cannot_be_read_is_named(tmp_path):
    (day,) = write_days(tmp_path, 1, rows=60)
    with pytest.raises(UserError, match=r"last_seen\.npz cannot be read"):
        load_seen(tmp_path)
    (tmp_path / "last_seen.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"last_seen\.npz cannot be read"):
        load_seen(tmp_path)
    small = day.manifest.model_copy(
        update={"tables": [table.model_copy(update={"num_rows": 3}) for table in day.manifest.tables]}
    )
    with pytest.raises(DataError, match=r"part-00000\.parquet: its ids cannot be read"):
        note_seen({}, day.folder, small, 0)
