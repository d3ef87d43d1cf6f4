"""Every dataset, in every form of its fake: half of its rows encoded with the fitted parts of the other half, cell by cell.

The reference is plain Python over the canonical rows, which the datasets' own tests compare with the raw files.
"""

from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmlrec.encoding.encoder import Encoder
from mmlrec.encoding.inputs import Inputs
from mmlrec.identity import encoding_differences
from mmlrec.schema import DatasetManifest
from preprocessing import command_line
from preprocessing.dataset import dataset_class
from tests.preprocessing.fakes import FAKES
from tests.preprocessing.reference import Reference

TRACE = "key.trace"
QUICK = ["movielens-1m", "ijcai15 lists", "aliccp", "criteo multi-hot"]


def spread(trace):
    """Some number that has nothing to do with what is in a row."""
    return (trace * 0x9E3779B97F4A7C15 & (1 << 64) - 1) >> 40


def disturbed(column, value, number):
    """A cell as no train row has it: unseen, missing or out of range; some stay."""
    kind = number % 12
    if kind > 3 or column.num_ids is not None:
        return value
    if kind == 0:
        return None
    if pa.types.is_floating(column.raw_type):
        return (1.0e6, -1.0e6, 0.5)[kind - 1]
    new = 10**15 + number % 7 if pa.types.is_integer(column.raw_type) else f"neu {number % 7} é"
    return [*(value or []), new, new] if column.kind == "multi" else new


def half_of(kind, half, disturb):
    """The dataset with every other row, which has a key that tells it from all others. `disturb`: no labels, and odd cells.

    Its rows, as they were before they were encoded, are in `seen`: column -> values.
    """

    class Half(kind):
        seen = {}

        def canonical_schema(self):
            return super().canonical_schema().append(pa.field(TRACE, pa.int64()))

        @property
        def identity(self):
            return [name for name in super().identity if name != TRACE]

        def rows(self, block):
            columns, schema = super().rows(block), self.canonical_schema()
            num_rows = len(columns[self.features[0].name])
            place = hash_of(block.source.name) << 48 | int(block.lines[0]) << 24 if len(block.lines) else 0
            columns[TRACE] = pa.array([place + k for k in range(num_rows)], pa.int64())
            table = pa.table({name: columns[name] for name in schema.names if name in columns})
            chosen = [row for row, trace in enumerate(table[TRACE].to_pylist()) if spread(trace) % 2 == half]
            table = table.take(pa.array(chosen, pa.int64()))
            if disturb:
                traces = table[TRACE].to_pylist()
                for index, feature in enumerate(self.features):
                    cells = [
                        disturbed(feature, value, spread(trace + 7919 * index))
                        for value, trace in zip(table[feature.name].to_pylist(), traces, strict=True)
                    ]
                    table = table.set_column(
                        table.schema.get_field_index(feature.name),
                        feature.name,
                        pa.array(cells, schema.field(feature.name).type),
                    )
                for name in (name for name in table.column_names if name.startswith("label.")):
                    table = table.set_column(table.schema.get_field_index(name), name, pa.nulls(len(table), pa.float32()))
            for name in table.column_names:
                self.seen.setdefault(name, []).extend(table[name].to_pylist())
            return {name: table[name] for name in table.column_names}

    return Half


def hash_of(text):
    return sum(ord(letter) * 31**place for place, letter in enumerate(text)) % 9973


def make(kind, arguments):
    with mock.patch.object(command_line, "dataset_class", return_value=kind):
        assert command_line.main([kind.name, *arguments, "--workers", "1"]) == 0


def rows_of(out, split):
    parts = DatasetManifest.load(out).splits[split].parts
    return pa.concat_tables([pq.read_table(out / part.path) for part in parts])


@pytest.mark.parametrize("form", [form if form in QUICK else pytest.param(form, marks=pytest.mark.long) for form in FAKES])
def test_half_of_the_rows_with_the_fitted_parts_of_the_other_half(form, tmp_path):
    fake, kind = FAKES[form], dataset_class(form.split()[0])
    raw = fake.write(tmp_path / "raw")
    one, other = half_of(kind, 0, False), half_of(kind, 1, True)
    make(one, [*fake.arguments(raw), "--out", str(tmp_path / "one")])
    new = ["--like", str(tmp_path / "one"), "--raw", str(raw), "--out", str(tmp_path / "other"), "--split", "later"]
    make(other, new)

    before, after = DatasetManifest.load(tmp_path / "one"), DatasetManifest.load(tmp_path / "other")
    assert after.encoding == before.encoding
    assert encoding_differences(before.encoding, after, tmp_path / "other", scenario=True, labels=True) == []
    for table in (table for table in before.tables if table.vocabulary):
        assert (tmp_path / "one" / table.vocabulary).read_bytes() == (tmp_path / "other" / table.vocabulary).read_bytes()
    assert list(after.splits) == ["later"]

    train = set(rows_of(tmp_path / "one", "train")[TRACE].to_pylist())
    fitted_on = [row for row, trace in enumerate(one.seen[TRACE]) if trace in train]
    columns = other(command_line._parser({kind.name: kind}, None).parse_args([kind.name, "--out", "x", *fake.arguments(raw)]))
    names = [column.name for column in columns.features]
    reference = Reference(columns.features, {name: [one.seen[name][row] for row in fitted_on] for name in names})
    found = rows_of(tmp_path / "other", "later")
    place = {trace: row for row, trace in enumerate(other.seen[TRACE])}
    order = [place[trace] for trace in found[TRACE].to_pylist()]
    assert sorted(order) == list(range(len(place)))
    for name in names:
        wanted = [reference.cell(name, other.seen[name][row]) for row in order]
        assert found[name].to_pylist() == wanted, name
    for name in (name for name in found.column_names if name.startswith("label.")):
        assert found[name].null_count == len(order)
    if "sample.scenario" in found.column_names:
        assert found["sample.scenario"].to_pylist() == [other.seen["sample.scenario"][row] for row in order]

    if kind.name != "table":  # whose raw columns are not its canonical ones: tests/encoding/test_table_settings.py
        assert_served_alike(tmp_path / "one", {name: [other.seen[name][row] for row in order] for name in other.seen}, found)

    against, unseen, outside = after.statistics["against_train"], 0, 0
    assert list(against) == names
    for name in names:
        of_split = dict(against[name]["later"])
        rate = np.mean([not values_of(one.seen[name][row]) for row in fitted_on])
        assert of_split.pop("missing_rate_in_train") == pytest.approx(rate, abs=1e-15)
        assert of_split == reference.against_train(name, [other.seen[name][row] for row in order]), name
        unseen, outside = unseen + of_split.get("unseen", 0), outside + of_split.get("outside", 0)
    assert unseen > 0 or not any(column.has_vocabulary for column in columns.features)
    assert outside > 0 or not any(column.scaled for column in columns.features)


def assert_served_alike(folder, seen, found):
    """What serves a model makes of the rows, typed and as text, what the preprocessing has made of them, to the bit."""
    encoder = Encoder.load(folder)
    typed = {spec.name: pa.array(seen[spec.name], spec.canonical_type) for spec in encoder.features}
    text = {
        name: values if pa.types.is_list(values.type) else pa.array([v if v is None else str(v) for v in values.to_pylist()])
        for name, values in typed.items()
    }
    for columns in (typed, text):
        rows, shared = pa.table(columns), encoder.scenario is not None and encoder.scenario.column in columns
        encoded = encoder.encode(encoder.canonical(rows, scenario=False))
        for spec in encoder.features:
            assert encoded.column(spec.name).to_pylist() == found[spec.name].to_pylist(), spec.name
        if shared:  # its odd cells are no scenarios, which is an error
            continue
        if encoder.scenario is not None:
            scenarios = pa.array([encoder.scenario.values[at] for at in seen["sample.scenario"]])
            rows = rows.append_column(encoder.scenario.column, scenarios)
        inputs, right = encoder.inputs(rows), Inputs.of(found, encoder)
        assert right.scenario.tolist() == seen.get("sample.scenario", [0] * len(found))
        np.testing.assert_array_equal(inputs.dense, right.dense)
        np.testing.assert_array_equal(inputs.scenario, right.scenario)
        for name, (ids, offsets) in right.ids.items():
            np.testing.assert_array_equal(inputs.ids[name][0], ids, err_msg=name)
            np.testing.assert_array_equal(inputs.ids[name][1], offsets, err_msg=name)


def values_of(cell):
    return [value for value in (cell if isinstance(cell, list) else [cell]) if value is not None]
