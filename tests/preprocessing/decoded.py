"""Dataset folders decoded through their vocabularies and compared with rows that plain pandas made of the raw files."""

from collections import Counter

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from mmlrec.schema import DatasetManifest, key_column
from preprocessing.dataset import PLACE_KEYS
from preprocessing.writing.permutation import RowPermutation, split_ends
from tests.preprocessing.test_splits import chance

SPLITS = ("train", "valid", "test")


def read(out, split):
    parts = [pq.read_table(out / part.path).to_pandas() for part in DatasetManifest.load(out).splits[split].parts]
    return pd.concat(parts, ignore_index=True)


def content(out):
    """What the same rows have alike, however their files are written: path -> part without the places of rows, or bytes."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file() and path.name != "manifest.json"):
        found[str(path.relative_to(out))] = path.read_bytes()
        if path.parent.name in SPLITS:
            table = pq.read_table(path)
            found[str(path.relative_to(out))] = table.drop_columns([key_column(name) for name in PLACE_KEYS])
    return found


def sides_in_order(rows, sides):
    """Rows in their order on disk with a column `split`; `sides` says where each belongs, or is None for 8:1:1 at random."""
    if sides is None:
        ordered = permuted(rows)
        ends = split_ends(len(rows))
        return ordered.assign(split=np.repeat(SPLITS, np.diff([0, *ends, len(rows)])))
    sides = np.asarray(sides)
    return pd.concat([permuted(rows[sides == name]).assign(split=name) for name in SPLITS], ignore_index=True)


def permuted(rows):
    """The permutation has tests of its own."""
    return rows.iloc[np.argsort(RowPermutation(len(rows), 2024).positions(0, len(rows)))].reset_index(drop=True)


def sides_by_key(keys):
    """8:1:1 of the keys, by their hash."""
    return [SPLITS[(chance(int(key), 2024) >= 0.8) + (chance(int(key), 2024) >= 0.9)] for key in keys]


def assert_decodes_to(out, expected, min_count=1, parity=False):
    """`expected` is named as the parts are, in their order, with raw values (None = missing) and a column `split`.

    Vocabularies hold the values of the train rows (parity: of all rows) seen min_count times, the most frequent first (parity:
    in order); min-max scales are those of the same rows.
    """
    manifest = DatasetManifest.load(out)
    named = {name for name in expected.columns if "." not in name} - {"split"}
    assert named == {feature.name for feature in manifest.features}
    fitted = expected if parity else expected[expected["split"] == "train"]
    for split in SPLITS:
        found, wanted = read(out, split), expected[expected["split"] == split].reset_index(drop=True)
        assert len(found) == len(wanted) > 0
        assert set(found.columns) == set(wanted.columns) - {"split"}
        for feature in manifest.features:
            name = feature.name
            if feature.kind == "dense":
                assert np.allclose(found[name], scaled(name, fitted, wanted), rtol=0, atol=1e-6), (split, name)
                continue
            values = fitted[name].explode() if feature.kind == "multi" else fitted[name]
            counts = {value: count for value, count in Counter(values.dropna()).items() if count >= min_count}
            order = sorted(counts) if parity else sorted(counts, key=lambda value: (-counts[value], value))
            entries = pq.read_table(out / "vocab" / f"{name}.parquet").to_pydict()
            assert list(zip(entries["value"], entries["count"], strict=True)) == [(value, counts[value]) for value in order]
            assert entries["id"] == list(range(1, len(order) + 1))
            raw = [None, *order]
            for ids, value in zip(found[name], wanted[name], strict=True):
                if feature.kind == "multi":
                    assert [raw[i] for i in ids] == [v if v in counts else None for v in value], (split, name)
                else:
                    assert raw[ids] == (value if value in counts else None), (split, name)
        for name in (name for name in wanted.columns if "." in name):
            assert found[name].tolist() == wanted[name].tolist(), (split, name)


def scaled(name, fitted, wanted):
    """Indicators stay as they are."""
    if name.endswith("_missing"):
        return wanted[name]
    low, high = fitted[name].min(), fitted[name].max()
    return ((wanted[name] - low) / (high - low)).clip(0, 1).fillna(0)
