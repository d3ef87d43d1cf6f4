"""Which days are taken, and what is refused of a folder that was begun: by name, before anything is trained."""

import json
import re

import pytest

from mmlrec.config import load_config
from mmlrec.days.folders import check_extended, find_days, new_ids
from mmlrec.days.record import KEYS, Record, data_digest
from mmlrec.distributed.world import process_group
from mmlrec.errors import ConfigError, DataError, UserError
from tests.datasets import with_vocabularies, write_dataset
from tests.days.support import FIRST_ROWS, NEW_ROWS, write_day, write_days


@pytest.fixture(scope="module")
def world():
    with process_group() as of_one:
        yield of_one


def test_days_come_in_the_order_of_their_names_and_new_ids_are_those_that_the_day_before_lacks(tmp_path):
    write_days(tmp_path, 3, rows=40)
    (tmp_path / "day-notes.txt").touch()
    days = find_days(str(tmp_path / "day-*"))
    assert [day.name for day in days] == ["day-01", "day-02", "day-03"]
    assert days[0].rows == {"train": 40, "valid": 10, "test": 10}
    check_extended(days)
    tables = ["t0", "tm0", "t1", "t2"]
    assert new_ids(None, days[0].manifest) == {table: FIRST_ROWS + n - 1 for n, table in enumerate(tables)}
    assert new_ids(days[0].manifest, days[1].manifest) == dict.fromkeys(tables, NEW_ROWS)


def test_folders_that_are_no_days_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"--days \S+/day-\*: no such folder"):
        find_days(str(tmp_path / "day-*"))
    for parent in "ab":
        write_dataset(tmp_path / parent / "day-01", rows=20)
    with pytest.raises(ConfigError, match=r"a/day-01 and \S+b/day-01 have one name"):
        find_days(str(tmp_path / "*" / "day-*"))
    write_dataset(tmp_path / "short", rows={"train": 20, "valid": 0, "test": 5})
    with pytest.raises(DataError, match=r"short has no rows of valid"):
        find_days(str(tmp_path / "short"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty is not a dataset"):
        find_days(str(tmp_path / "empty"))


def test_days_that_no_vocabulary_puts_in_order_are_not_taken_in_another_one(tmp_path):
    for name in ("day-9", "day-10"):
        write_dataset(tmp_path / "short" / name, rows=20)
        write_dataset(tmp_path / "long" / name.replace("-9", "-09"), rows=20)
        with_vocabularies(write_dataset(tmp_path / "same" / name, rows=20))
        with_vocabularies(write_dataset(tmp_path / "grows" / name, rows=20, table_rows=len(name)))
    for folder in ("short", "same"):
        with pytest.raises(ConfigError, match=r"day-10 would come before day-9\. Give all numbers as many digits"):
            find_days(str(tmp_path / folder / "day-*"))
    assert [day.name for day in find_days(str(tmp_path / "long/day-*"))] == ["day-09", "day-10"]
    assert [day.name for day in find_days(str(tmp_path / "grows/day-*"))] == ["day-10", "day-9"]  # `check_extended` tells


def test_a_day_that_does_not_extend_the_one_before_is_named_with_what_differs(tmp_path):
    days = write_days(tmp_path, 3, rows=40)
    third = with_vocabularies(days[2], {"t1": [f"other-{id}" for id in range(1, days[2].manifest.table("t1").num_rows)]})
    with pytest.raises(ConfigError) as refused:
        check_extended(find_days(str(tmp_path / "day-*")))
    text = str(refused.value)
    assert f"{third.folder} was not made with --extend of {days[1].folder}" in text
    assert re.search(r"table 't1', digest: \S+ here, \S+ in day-02", text)
    assert f"--extend {days[1].folder} --out {third.folder}" in text
    # Ten days without leading zeros come in another order than they were made in.
    for number in (9, 10):
        write_day(tmp_path / "many", number, rows=40).folder.rename(tmp_path / "many" / f"d{number}")
    with pytest.raises(ConfigError, match=r"d9 was not made with --extend of \S+d10, which comes before it by name"):
        check_extended(find_days(str(tmp_path / "many" / "d*")))
    write_dataset(tmp_path / "without" / "a", rows=40)
    write_dataset(tmp_path / "without" / "b", rows=40)
    with pytest.raises(ConfigError, match=r"how \S+/a is encoded is not on record"):
        check_extended(find_days(str(tmp_path / "without" / "*")))


def test_other_days_another_configuration_and_changed_days_are_refused_by_name(tmp_path, world):
    write_days(tmp_path, 3, rows=40)
    days, config = find_days(str(tmp_path / "day-*")), load_config(tmp_path / "config.yaml")
    folder = tmp_path / "run"
    folder.mkdir()
    record = Record(folder, world)
    record.begin(config, 3, days[:2])
    for day in days[:2]:
        record.put(dict.fromkeys(KEYS) | {"day": day.name, "data": data_digest(day)})
    record.put(dict.fromkeys(KEYS) | {"day": "day-02", "data": data_digest(days[1]), "step": 7})

    def begin(config=config, forget_after=3, days=days):
        again = Record(folder, world)
        again.begin(config, forget_after, days)
        return again

    assert [line["step"] for line in begin().lines] == [None, 7]  # a day was added behind
    longer = config.model_copy(update={"training": config.training.model_copy(update={"keep_checkpoints": 5})})
    begin(config=longer)  # as for any run
    with pytest.raises(ConfigError, match=r"other days: its day 2 is 'day-02', and --days gives no further day"):
        begin(days=days[:1])
    with pytest.raises(ConfigError, match=r"its day 1 is 'day-01', and --days gives 'day-02'"):
        begin(days=days[1:])
    other = config.model_copy(update={"embeddings": config.embeddings.model_copy(update={"dim": 8})})
    with pytest.raises(ConfigError, match=r"embeddings\.dim: 4 in the folder, 8 now"):
        begin(config=other)
    twice = config.model_copy(update={"training": config.training.model_copy(update={"epochs": 2})})
    with pytest.raises(ConfigError, match=r"training\.epochs: 1 in the folder, 2 now"):
        begin(config=twice)
    for name in ("days.yaml", "days.jsonl"):  # of a process that was killed while it wrote
        (folder / f"{name}.0123456789ab.tmp").touch()
    begin()
    assert sorted(path.name for path in folder.iterdir()) == ["days.jsonl", "days.yaml"]
    with pytest.raises(ConfigError, match=r"--forget-after: 3 in the folder, None now"):
        begin(forget_after=None)
    write_day(tmp_path, 1, rows=44)
    with pytest.raises(ConfigError, match=r"day-02 was changed since day 'day-02' was trained in \S+run"):
        begin(days=find_days(str(tmp_path / "day-*")))
    (folder / "days.yaml").write_text("config: 3\n")
    with pytest.raises(UserError, match=r"days\.yaml is damaged"):
        begin()
    for damaged, why in (({"step": 3}, "line 1 has no 'day'"), ({"day": "day-01", "step": 3}, "line 1 has no 'dataset'")):
        (folder / "days.jsonl").write_text(json.dumps(damaged) + "\n")
        with pytest.raises(UserError, match=rf"days\.jsonl is damaged: {why}"):
            begin()


def test_a_run_folder_is_no_folder_of_days(tmp_path, world):
    write_days(tmp_path, 1, rows=40)
    assert (tmp_path / "config.yaml").is_file()
    with pytest.raises(ConfigError, match="holds a run; days have a folder of their own"):
        Record(tmp_path, world).check_place(find_days(str(tmp_path / "day-*")))


def test_a_folder_that_a_killed_start_left_is_one_of_days_and_none_where_others_have_their_names(tmp_path, world):
    write_days(tmp_path, 2, rows=40)
    days, record = find_days(str(tmp_path / "day-*")), Record(tmp_path / "run", world)
    record.check_place(days)
    (tmp_path / "run/day-01").mkdir(parents=True)  # of which there is no line yet
    with pytest.raises(UserError, match="is not empty: it holds 'day-01'"):
        record.check_place(days)
    (tmp_path / "run/.lock").touch()
    (tmp_path / "run/days.yaml.0123456789ab.tmp").touch()
    record.check_place(days)
    (tmp_path / "run/job.sh").touch()
    record.check_place(days)
    (tmp_path / "run/days.png").touch()
    with pytest.raises(UserError, match=r"is not empty: it holds 'days\.png'"):
        record.check_place(days)
