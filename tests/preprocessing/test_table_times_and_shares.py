"""Tables of one's own: times in any form, and splits by any shares."""

import math
import time
from datetime import UTC, datetime, timedelta, timezone
from fractions import Fraction

import numpy as np
import pytest

from preprocessing.split_rules import GroupSplit, TimeSplit
from tests.preprocessing.movielens_fake import folder_bytes
from tests.preprocessing.table_fake import SMALL, run, small
from tests.preprocessing.test_splits import chance, rows_of, toy_columns
from tests.preprocessing.test_splits import run as run_toy
from tests.preprocessing.test_table import make, read
from tests.preprocessing.test_tables_as_they_come import FORMS, told, write

# Times.


START = 1_704_164_645
UNITS = {"seconds": 1, "milliseconds": 1000, "microseconds": 10**6, "nanoseconds": 10**9}


def timed(folder, form, times, key):
    rows = range(len(times))
    columns = {"row": [*rows], "user": [f"u{k % 5}" for k in rows], "ts": times, "y": [k % 2 for k in rows]}
    keys = {"row": {"type": "int"}, "ts": {"type": "datetime"} | key}
    split = {"rule": "time", "key": "ts"}
    return write(folder, form, columns, features={"user": {"kind": "id"}}, keys=keys, split=split)


@pytest.mark.parametrize("form", FORMS)
def test_times_since_1970_in_any_unit(form, tmp_path):
    """The last of a second, before 1970, and missing."""
    times = [START + 60 * k for k in range(100)] + [-5, 0, None]
    columns = {"user": [f"u{k % 5}" for k in range(103)], "x": list(range(103)), "y": [k % 2 for k in range(103)]}
    for unit, scale in UNITS.items():
        columns[unit] = [None if time is None else time * scale + (scale - 1) for time in times]
    keys = {"x": {"type": "int"}} | {unit: {"type": "datetime", "format": unit} for unit in UNITS}
    make(write(tmp_path, form, columns, keys=keys).parent, tmp_path / "out")
    for unit in UNITS:
        assert {row["key.x"]: row[f"key.{unit}"] for row in read(tmp_path / "out")} == dict(enumerate(times))


def test_seconds_with_a_fraction_are_rounded_down(tmp_path):
    times = [k + 0.75 for k in range(40)] + [-0.25]
    for form in FORMS:
        make(timed(tmp_path, form, times, {"format": "seconds"}).parent, tmp_path / form)
        assert {row["key.row"]: row["key.ts"] for row in read(tmp_path / form)} == {
            k: math.floor(t) for k, t in enumerate(times)
        }


PATTERNS = {
    "%d.%m.%Y %H:%M": timedelta(minutes=1),
    "%m/%d/%Y": timedelta(days=1),
    "%d %b %Y %H:%M:%S %z": timedelta(seconds=1),
    "%Y-%m-%d %I:%M:%S.%f %p": timedelta(seconds=1),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_times_by_a_pattern(pattern, tmp_path):
    zone = timezone(timedelta(hours=3)) if "%z" in pattern else UTC
    start = datetime(2024, 1, 1, tzinfo=zone)
    moments = [start + PATTERNS[pattern] * 7 * k for k in range(100)]
    make(timed(tmp_path, "csv", [moment.strftime(pattern) for moment in moments], {"format": pattern}).parent, tmp_path / "out")
    assert {row["key.row"]: row["key.ts"] for row in read(tmp_path / "out")} == {
        k: int(moment.timestamp()) for k, moment in enumerate(moments)
    }


def test_days_that_are_numbers(tmp_path):
    """20240131 is an integer in JSON and Parquet, and a time by its pattern there, too."""
    days = [int((datetime(2024, 1, 1) + timedelta(days=k)).strftime("%Y%m%d")) for k in range(60)]
    for form in FORMS:
        make(timed(tmp_path, form, days, {"format": "%Y%m%d"}).parent, tmp_path / form)
        found = {row["key.row"]: row["key.ts"] for row in read(tmp_path / form)}
        assert found == {k: datetime(2024, 1, 1, tzinfo=UTC).timestamp() + 86400 * k for k in range(60)}


def test_names_of_zones_are_utc_and_gmt_wherever_the_machine_is(tmp_path, capsys, monkeypatch):
    """Python takes the names of the machine's own zone, too, and forgets what they say."""
    texts = [f"{k + 1:02}.05.2024 12:00 {('UTC', 'GMT')[k % 2]}" for k in range(20)]
    pattern = {"format": "%d.%m.%Y %H:%M %Z"}
    with monkeypatch.context() as of_zone:
        of_zone.setenv("TZ", "Europe/Berlin")
        time.tzset()
        make(timed(tmp_path, "csv", texts, pattern).parent, tmp_path / "out")
        code = run(timed(tmp_path, "csv", [*texts, "30.05.2024 12:00 CEST"], pattern), tmp_path / "none")
    time.tzset()
    found = sorted(row["key.ts"] for row in read(tmp_path / "out"))
    assert found == [int(datetime(2024, 5, k + 1, 12, tzinfo=UTC).timestamp()) for k in range(20)]
    assert code == 2
    assert "found 30.05.2024 12:00 CEST. Mend the line. Of names of zones, %Z, UTC and GMT are known" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("form", "unit"), [*(("csv", unit) for unit in UNITS), ("json", "seconds"), ("parquet", "milliseconds")]
)
def test_times_since_1970_without_a_format_are_told_which_one(form, unit, tmp_path, capsys):
    times = [(START + k) * UNITS[unit] for k in range(40)]
    message = told(capsys, timed(tmp_path, form, times, {}), tmp_path / "out")
    assert f"line {2 if form == 'csv' else 1}: ts must be a time in ISO 8601" in message
    assert f", found {times[0]}. It looks like {unit} since 1970: say so at the key, format: {unit}." in message


@pytest.mark.parametrize(
    ("key", "time", "words"),
    [
        ({}, "31.05.2024", "Mend the line; or give the key the format of its times: format: seconds (or "),
        (
            {"format": "seconds"},
            START * 1000,
            "ts in seconds since 1970 is no time from year 1 to 9999, found 1704164645000.0.",
        ),
        ({"format": "%d.%m.%Y"}, "05/31/2024", "ts must be a time of the form %d.%m.%Y, found 05/31/2024. Mend the line."),
        ({"format": "%d.%m.%Y"}, "31.06.2024", "ts must be a time of the form %d.%m.%Y, found 31.06.2024. Mend the line."),
        ({"format": "milliseconds"}, "2024-05-31", "ts must be a number, found '2024-05-31'"),
        ({"format": "seconds"}, "", "ts, by which rows are divided or grouped, is missing"),
    ],
)
def test_times_of_another_form_than_the_told_one(key, time, words, tmp_path, capsys):
    given = key.get("format")
    good = "01.01.2024" if given == "%d.%m.%Y" else str(START) if given else "2024-01-01"
    config = timed(tmp_path, "csv", [good] * 5 + [time], key)
    message = told(capsys, config, tmp_path / "out")
    assert "rows.csv, line 7: " in message
    assert words in message


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ({"type": "datetime", "format": "second"}, "keys.ts: format: 'second' is no form of a time. Did you mean 'seconds'?"),
        ({"type": "datetime", "format": "%d/%m"}, "'%d/%m' is no form of a time. Give seconds, milliseconds, microseconds or"),
        ({"type": "datetime", "format": "%s"}, "is no form of a time"),
        ({"type": "datetime", "format": "YYYY-MM-DD"}, "a pattern of strptime with year, month and day"),
        ({"type": "int", "format": "seconds"}, "keys.ts: format is for type: datetime, not for int"),
    ],
)
def test_formats_that_are_none(key, words, tmp_path, capsys):
    assert words in told(capsys, small(tmp_path, SMALL, keys={"ts": key}), tmp_path / "out")


@pytest.mark.parametrize(
    ("times", "words"),
    [
        (
            ["2024-01-01"] * 60,
            "More than 90 % of them have the least value, 1704067200 (2024-01-01T00:00:00Z); rows of one value",
        ),
        (["2024-01-01"] * 50 + ["2024-01-02"] * 3 + ["2024-01-03"] * 7, "More than 80 % of them have the least value"),
        (["2024-01-01"] * 40 + ["2024-01-02"] * 20, "Those at 80 % and at 90 % in order of time have one value, 1704153600"),
    ],
)
def test_rows_of_one_time_are_told(times, words, tmp_path, capsys):
    message = told(capsys, timed(tmp_path, "csv", times, {}), tmp_path / "out")
    assert words in message
    assert "Give more rows" not in message


# Shares of the split.


SHARES = [(0.9, 0.05, 0.05), (0.29, 0.7, 0.01)]


def ends_of(fractions, num_rows):
    train, valid, _ = (Fraction(str(fraction)) for fraction in fractions)
    return math.floor(train * num_rows), math.floor((train + valid) * num_rows)


@pytest.mark.parametrize("fractions", SHARES)
def test_rows_at_random_by_any_shares(fractions, tmp_path):
    for num_rows in (100, 117):
        text = "user,x,y\n" + "".join(f"u{k % 3},{k},{k % 2}\n" for k in range(num_rows))
        config = small(tmp_path, text, split={"rule": "random", "fractions": list(fractions)})
        manifest = make(config.parent, tmp_path / str(num_rows))
        first, second = ends_of(fractions, num_rows)
        assert [split.num_rows for split in manifest.splits.values()] == [first, second - first, num_rows - second]


@pytest.mark.parametrize("fractions", SHARES)
def test_groups_and_times_by_any_shares(fractions, tmp_path):
    columns = toy_columns()
    users, times = columns["key.user"], columns["key.time"]
    first, second = map(float, (Fraction(str(fractions[0])), Fraction(str(fractions[0])) + Fraction(str(fractions[1]))))
    found = rows_of(run_toy(tmp_path / "group", GroupSplit("user", fractions), columns))
    assert found["train"] == [r for r in range(len(users)) if chance(users[r], 5) < first]
    assert found["test"] == [r for r in range(len(users)) if chance(users[r], 5) >= second]
    found = rows_of(run_toy(tmp_path / "time", TimeSplit("time", fractions=fractions), columns))
    ordered, places = sorted(times), ends_of(fractions, len(times))
    assert found["train"] == [r for r in range(len(times)) if times[r] < ordered[places[0]]]
    assert found["test"] == [r for r in range(len(times)) if times[r] >= ordered[places[1]]]


@pytest.mark.parametrize("rule", ["random", "group", "time"])
def test_the_shares_of_a_configuration_reach_the_rule(rule, tmp_path):
    num_rows = 2000
    text = "user,x,y,t\n" + "".join(f"u{k % 3},{k},{k % 2},{k}\n" for k in range(num_rows))
    split = {"rule": rule, "fractions": [0.5, 0.25, 0.25]} | ({} if rule == "random" else {"key": "t"})
    for duplicates in ("keep", "keep_together"):
        config = small(tmp_path, text, split=split, keys={"t": {"type": "int"}}, duplicates=duplicates)
        sizes = [split.num_rows for split in make(config.parent, tmp_path / f"{rule}-{duplicates}").splits.values()]
        if rule == "time" or (rule == "random" and duplicates == "keep"):
            assert sizes == [1000, 500, 500]
        else:
            assert np.allclose(sizes, [1000, 500, 500], atol=4 * (num_rows / 4) ** 0.5)
            assert sizes[0] < 1200  # not four fifths


@pytest.mark.parametrize("rule", ["random", "group", "time"])
def test_the_usual_shares_are_8_1_1_to_the_byte(rule, tmp_path):
    split = {"rule": rule} | ({} if rule == "random" else {"key": "x"})
    for name, more in (("absent", {}), ("given", {"fractions": [0.8, 0.1, 0.1]})):
        config = small(tmp_path, SMALL, split=split | more, keys={"x": {"type": "int"}})
        make(config.parent, tmp_path / name, "--seed", "3")
    assert folder_bytes(tmp_path / "absent") == folder_bytes(tmp_path / "given")


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ({"rule": "random", "fractions": [0.9, 0.05]}, "give shares of train, valid and test, together 1, such as [0.9, 0.05"),
        ({"rule": "random", "fractions": [0.9, 0.1, 0.1]}, "found [0.9, 0.1, 0.1], together 1.1"),
        ({"rule": "random", "fractions": [8, 1, 1]}, "found [8, 1, 1]"),
        ({"rule": "group", "key": "x", "fractions": [1.0, 0.0, 0.0]}, "split.fractions: give shares"),
        ({"rule": "random", "fractions": 0.9}, "found 0.9"),
        ({"rule": "random", "fractions": [".8", ".1", ".1"]}, "found ['.8', '.1', '.1']"),
        ({"rule": "random", "fraction": [0.8, 0.1, 0.1]}, "split.fraction: unknown key. Did you mean 'fractions'?"),
        (
            {"rule": "time", "key": "x", "cuts": ["1.5.2024", "2.5.2024"]},
            "split.cuts: '1.5.2024' is no time: give dates or times in",
        ),
        ({"rule": "time", "key": "x", "cuts": [1, 2], "fractions": [0.8, 0.1, 0.1]}, "cuts and fractions exclude each other"),
        ({"rule": "file", "train": ["a"], "test": ["b"], "fractions": [0.8, 0.1, 0.1]}, "split.fractions: unknown key"),
    ],
)
def test_shares_that_are_none(split, words, tmp_path, capsys):
    assert words in told(capsys, small(tmp_path, SMALL, split=split, keys={"x": {"type": "int"}}), tmp_path / "out")


def test_an_empty_side_is_told_its_reason(tmp_path, capsys):
    keys = {"x": {"type": "int"}, "user": {"type": "string"}}
    for split, words in (
        (
            {"rule": "group", "key": "user"},
            "8:1:1 by the values of key 'user'. Rows of one value stay together: divide by a key of",
        ),
        ({"rule": "time", "key": "x", "cuts": [50, 60]}, "by key 'x' at 50 and 60. Give cuts before, between and after which"),
        (
            {"rule": "random", "fractions": [0.98, 0.01, 0.01]},
            "no row of 20 falls to valid: they are divided 0.98:0.01:0.01 at",
        ),
    ):
        assert words in told(capsys, small(tmp_path, SMALL, split=split, keys=keys), tmp_path / "out")
