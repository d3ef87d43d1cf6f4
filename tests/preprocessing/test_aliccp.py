"""Ali-CCP, fake: decoded and compared with what plain Python reads, in both forms; places; bad files."""

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from mmlrec.schema import DatasetManifest
from preprocessing.command_line import main
from preprocessing.writing.permutation import RowPermutation
from tests.preprocessing.aliccp_fake import PLACES, entry, write_aliccp

USER = ["101", "121", "122", "124", "125", "126", "127", "128", "129"]
SAMPLE = ["205", "206", "207", "216", "508", "509", "702", "853", "301"]
HISTORIES = ["109_14", "110_14", "127_14", "150_14"]
TRAIN, COMMON = "sample_skeleton_train.csv", "common_features_train.csv"


@pytest.fixture
def fake(tmp_path):
    return write_aliccp(tmp_path / "raw", 1200, 700)


def features_of(text):
    """Field -> [(feature, value)] in their order."""
    found = {}
    for part in text.split("\x01"):
        field, rest = part.split("\x02")
        feature, value = rest.split("\x03")
        found.setdefault(field, []).append((int(feature), float(value)))
    return found


def side_rows(folder, side):
    """Every usable sample with its features; None = missing."""
    common = {}
    for line in (folder / f"common_features_{side}.csv").read_text().splitlines():
        index, _, text = line.split(",")
        common[index] = features_of(text)
    rows = []
    for line in (folder / f"sample_skeleton_{side}.csv").read_text().splitlines():
        sample, click, purchase, index, _, text = line.split(",")
        own, shared = features_of(text), common[index]
        if (click, purchase) == ("0", "1") or "301" not in own:
            continue
        row = {"sample_id": int(sample), "click": int(click), "purchase": int(purchase), "index": int(index, 16)}
        for field in USER:
            row[field] = shared[field][-1][0] if field in shared else None
        for field in SAMPLE:
            row[field] = own[field][-1][0] if field in own else None
        row["210"] = [feature for feature, _ in own.get("210", [])]
        for field in HISTORIES:
            row[field] = sorted(shared.get(field, []), key=lambda pair: -pair[1])
        rows.append(row)
    return pd.DataFrame(rows, dtype=object)


def expected_rows(folder, seed=2024):
    """Rows in their order on disk, with their split."""
    train, test = (side_rows(folder, side) for side in ("train", "test"))
    train, test = (rows.iloc[np.argsort(RowPermutation(len(rows), seed).positions(0, len(rows)))] for rows in (train, test))
    half = len(test) // 2
    parts = [train.assign(split="train"), test[:half].assign(split="valid"), test[half:].assign(split="test")]
    return pd.concat(parts, ignore_index=True)


def read(out, split):
    return pd.concat(
        [pq.read_table(out / part.path).to_pandas() for part in DatasetManifest.load(out).splits[split].parts],
        ignore_index=True,
    )


def vocabulary(out, name, train_values):
    """Raw value -> id, after a check against the values of train that occur ten times or more."""
    entries = pq.read_table(out / "vocab" / f"f{name}.parquet").to_pandas()
    counts = pd.Series(train_values).value_counts()
    kept = sorted(((value, count) for value, count in counts.items() if count >= 10), key=lambda item: (-item[1], item[0]))
    assert list(zip(entries["value"], entries["count"], strict=True)) == kept, name
    return dict(zip(entries["value"], entries["id"], strict=True))


def assert_decodes_to(out, expected, places=PLACES, longest=20):
    train = expected[expected.split == "train"]
    ids = {name: vocabulary(out, name, [value for value in train[name] if value is not None]) for name in (*USER, *SAMPLE)}
    ids["210"] = vocabulary(out, "210", [value for bag in train["210"] for value in bag])
    for name in HISTORIES:
        ids[name] = vocabulary(out, name, [value for bag in train[name] for value, _ in bag[:longest]])
    for split in ("train", "valid", "test"):
        found, wanted = read(out, split), expected[expected.split == split].reset_index(drop=True)
        assert len(found) == len(wanted) > 0
        assert np.array_equal(found["label.click"], wanted["click"])
        assert np.array_equal(found["label.purchase"], wanted["purchase"])
        assert np.array_equal(found["sample.scenario"], wanted["301"].map(places.index))
        assert np.array_equal(found["key.sample_id"], wanted["sample_id"])
        assert [int(key) % 2**64 for key in found["key.common_features"]] == wanted["index"].tolist()
        for name in (*USER, *SAMPLE):
            assert found[f"f{name}"].tolist() == [ids[name].get(value, 0) for value in wanted[name]], name
        assert [list(bag) for bag in found["f210"]] == [[ids["210"].get(v, 0) for v in bag] for bag in wanted["210"]]
        for name in HISTORIES:
            bags = [[ids[name].get(value, 0) for value, _ in bag[:longest]] for bag in wanted[name]]
            assert [list(bag) for bag in found[f"f{name}"]] == bags, name


@pytest.mark.parametrize("piece_bytes", [1 << 14, 8 << 20])
def test_samples_decode_to_the_joined_rows(fake, tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr("preprocessing.reading.raw_files.PIECE_BYTES", piece_bytes)
    out = tmp_path / "out"
    assert main(["aliccp", "--raw", str(fake), "--out", str(out)]) == 0
    expected = expected_rows(fake)
    assert_decodes_to(out, expected)
    assert max(len(bag) for name in HISTORIES for bag in expected[name]) > 20
    manifest = DatasetManifest.load(out)
    assert [(task.name, task.role, task.implied_by_next) for task in manifest.tasks] == [
        ("click", "ctr", True),
        ("purchase", "ctcvr", False),
    ]
    assert {f.name for f in manifest.features if f.kind == "sparse"} == {f"f{name}" for name in (*USER, *SAMPLE)}
    assert {f.name for f in manifest.features if f.kind == "multi"} == {f"f{name}" for name in ("210", *HISTORIES)}
    assert (manifest.scenario.values, manifest.statistics["places"]) == (["1", "2", "3"], PLACES)
    for side, part in (("train", expected.split == "train"), ("test", expected.split != "train")):
        lines = (fake / f"sample_skeleton_{side}.csv").read_text().splitlines()
        impossible = sum(line.split(",")[1:3] == ["0", "1"] for line in lines)
        left_out = manifest.statistics["passed_over"][f"sample_skeleton_{side}.csv"]
        assert left_out["purchases without a click"] == impossible > 0
        assert left_out["without field 301"] == len(lines) - impossible - part.sum() > 0


def test_histories_keep_the_features_of_greatest_value(fake, tmp_path):
    assert main(["aliccp", "--raw", str(fake), "--out", str(tmp_path / "out"), "--max-history", "3"]) == 0
    assert_decodes_to(tmp_path / "out", expected_rows(fake), longest=3)


def test_parity_form_has_the_18_fields_with_one_value(fake, tmp_path):
    out = tmp_path / "out"
    assert main(["aliccp", "--raw", str(fake), "--out", str(out), "--parity"]) == 0
    manifest, expected = DatasetManifest.load(out), expected_rows(fake)
    assert [(f.name, f.kind) for f in manifest.features] == [(f"f{name}", "sparse") for name in (*USER, *SAMPLE)]
    found = pd.concat([read(out, split) for split in ("train", "valid", "test")], ignore_index=True)
    for name in (*USER, *SAMPLE):
        values = sorted({value for value in expected[name] if value is not None})
        assert found[f"f{name}"].tolist() == [0 if v is None else values.index(v) + 1 for v in expected[name]], name


def test_places_in_any_order(fake, tmp_path):
    out, places = tmp_path / "out", [PLACES[2], PLACES[0], PLACES[1], 77]
    assert main(["aliccp", "--raw", str(fake), "--out", str(out), "--places", ",".join(map(str, places))]) == 0
    assert_decodes_to(out, expected_rows(fake), places)
    manifest = DatasetManifest.load(out)
    assert manifest.scenario.values == ["1", "2", "3", "4"]
    assert manifest.statistics["scenario_rows"]["4"] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--places", "1"], "give two or more whole numbers, each once"),
        (["--places", "1,1"], "give two or more whole numbers, each once"),
        (["--places", "a,b"], "give two or more whole numbers, each once"),
        (["--max-history", "0"], "--max-history 0: give 1 or more"),
    ],
)
def test_options_that_do_not_fit_are_told(fake, tmp_path, options, words, capsys):
    assert main(["aliccp", "--raw", str(fake), "--out", str(tmp_path / "out"), *options]) == 2
    assert words in capsys.readouterr().err


def test_too_few_places_to_know_the_scenarios(fake, tmp_path, capsys):
    path = fake / TRAIN
    path.write_text(path.read_text().replace(f"301\x02{PLACES[1]}\x03", f"301\x02{PLACES[0]}\x03"))
    assert main(["aliccp", "--raw", str(fake), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "field 301, the scenario, has 2 features there" in message
    assert all(f"{place} in " in message for place in (PLACES[0], PLACES[2]))
    assert "--places" in message


def field(name, number, index, text):
    """Replace one comma field of a line."""

    def apply(folder):
        lines = (folder / name).read_text().splitlines()
        fields = lines[number - 1].split(",")
        fields[index] = text
        lines[number - 1] = ",".join(fields)
        (folder / name).write_text("\n".join(lines) + "\n")

    return apply


def first_line_again(folder):
    (folder / COMMON).write_text((folder / COMMON).read_text() + (folder / COMMON).read_text().splitlines()[0] + "\n")


GOOD = entry(301, PLACES[0])
DAMAGED = "the features are no entries FIELD 0x02 FEATURE 0x03 VALUE divided by 0x01"
BAD = {
    "click 2": (field(TRAIN, 7, 1, "2"), f"{TRAIN}, line 7: click must be 0 or 1, found 2"),
    "no purchase": (field(TRAIN, 7, 2, ""), f"{TRAIN}, line 7: purchase must be 0 or 1, found None"),
    "no sample id": (field(TRAIN, 7, 0, ""), f"{TRAIN}, line 7: the sample_id is missing"),
    "sample beyond 64 bits": (field(TRAIN, 7, 0, str(2**63)), f"{TRAIN}, line 7: sample_id = {2**63} does not fit"),
    "index no hexadecimal": (field(TRAIN, 7, 3, "xyz"), f"{TRAIN}, line 7: common_feature_index must be up to 16 hexadecimal"),
    "no features": (field(TRAIN, 7, 5, ""), f"{TRAIN}, line 7: there are no features"),
    "other separators": (field(TRAIN, 7, 5, "205:1:1.0 301:2:1.0"), f"{TRAIN}, line 7: {DAMAGED}"),
    "no value": (field(TRAIN, 7, 5, GOOD + "\x01205\x025"), f"{TRAIN}, line 7: {DAMAGED}"),
    "empty feature": (field(TRAIN, 7, 5, GOOD + "\x01205\x02\x031.0"), f"{TRAIN}, line 7: {DAMAGED}"),
    "value nan": (field(TRAIN, 7, 5, GOOD + "\x01" + entry(205, 5, "nan")), f"{TRAIN}, line 7: {DAMAGED}"),
    "feature beyond 64 bits": (field(TRAIN, 7, 5, GOOD + "\x01" + entry(205, 2**64)), f"{TRAIN}, line 7: {DAMAGED}"),
    "divided at the end": (field(TRAIN, 7, 5, GOOD + "\x01"), f"{TRAIN}, line 7: {DAMAGED}"),
    "history of inf": (field(COMMON, 5, 2, entry("109_14", 5, "inf")), f"{COMMON}, line 5: {DAMAGED}"),
    "index twice": (first_line_again, f"{COMMON}, line 61: common_features 000"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_raw_data_is_named_by_file_and_line(case, fake, tmp_path, capsys):
    change, words = BAD[case]
    change(fake)
    assert main(["aliccp", "--raw", str(fake), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("index", "text", "words"),
    [
        (3, "0123456789abcdef", "common_feature_index 0123456789abcdef is not in common_features_train.csv"),
        (5, entry(301, 123), "field 301 must hold one of 9351665, 9351666, 9351670, found 123"),
    ],
)
def test_unmapped_places_and_unknown_indices_are_bad_rows(fake, tmp_path, capsys, index, text, words):
    number = next(k for k, line in enumerate((fake / TRAIN).read_text().splitlines(), 1) if k > 600 and "\x01301" in line)
    for column, value in ((1, "1"), (index, text)):
        field(TRAIN, number, column, value)(fake)
    arguments = ["aliccp", "--raw", str(fake), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert f"{TRAIN}, line {number}: {words}" in capsys.readouterr().err
    assert main([*arguments, "--max-bad-rows", "1"]) == 0
    assert DatasetManifest.load(tmp_path / "out").statistics["bad_rows"] == {TRAIN: 1}


def test_missing_files_say_where_they_are_had(fake, tmp_path, capsys):
    (fake / COMMON).unlink()
    assert main(["aliccp", "--raw", str(fake), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    for words in (f"lacks: {COMMON}", "tianchi.aliyun.com", "A login is needed", "sample_train.tar.gz"):
        assert words in message
