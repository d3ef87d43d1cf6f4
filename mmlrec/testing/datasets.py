"""The contract of datasets.

In a test file of one's own:

    from mmlrec.testing.datasets import DatasetContract, Fake

    class TestMyData(DatasetContract):
        dataset = MyData
        fake = Fake(write_my_data)  # a function that writes small raw files with what makes the real ones awkward

It is the one under which this repository's datasets are: bad raw files, full disks, kills, workers, leaks, groups.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from mmlrec.encoding.encoder import Encoder
from mmlrec.encoding.inputs import Inputs
from mmlrec.errors import DataError
from mmlrec.schema import SCENARIO_COLUMN, SPLITS, DatasetManifest, key_column, label_column
from mmlrec.testing.contract import Contract, over
from mmlrec.testing.raw_faults import Spoiled, bad_row, copied_rows, faults, unpacked
from mmlrec.testing.raw_folders import Fake, Made, bytes_of, command, made_of, make, run
from mmlrec.testing.traces import sides_of_lines, traced
from mmlrec.testing.without_labels import without_labels
from preprocessing.command_line import main
from preprocessing.dataset import PLACE_KEYS, Dataset
from preprocessing.reading import raw_files
from preprocessing.reading.delimited import DelimitedText
from preprocessing.reading.json_lines import JsonLines
from preprocessing.reading.raw_files import RawFolder
from preprocessing.split_rules import FileSplit, GroupSplit
from preprocessing.writing.parts import SplitWriter

__all__ = ["DatasetContract", "Fake"]

TEXTS = (DelimitedText, JsonLines)


@contextmanager
def disk_of(num_bytes: int) -> Iterator[None]:
    """Files of this process can grow no further."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, old[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


_KILL = """
import os, signal
from {room} import {module}
method = {module}.{place}
def stop(*arguments):
    method(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
{module}.{place} = stop
"""
#: Where a run is killed -> code that has it do so.
KILLS = {
    "reading": _KILL.format(room="preprocessing.rows", module="batch_file", place="BatchFile.append"),
    "writing": _KILL.format(room="preprocessing.writing", module="parts", place="SplitWriter.write"),
    "before the end": _KILL.format(room="mmlrec.storage", module="new_folder", place="_sync"),
}
# `python -m preprocessing` of a dataset that may lie anywhere.
_START = """
import importlib, sys
sys.path[:] = {path}
from preprocessing import command_line
{kill}
kind = getattr(importlib.import_module({dataset.__module__!r}), {dataset.__name__!r})
command_line.dataset_class = lambda name: kind
sys.exit(command_line.main(sys.argv[1:]))
"""


def _rows(out: Path) -> pa.Table:
    parts = [part for split in DatasetManifest.load(out).splits.values() for part in split.parts]
    return pa.concat_tables([pq.read_table(out / part.path) for part in parts])


def _cells(rows: pa.Table, names: list[str]) -> list[tuple[str, ...]]:
    """The rows, as what can be counted and ordered."""
    return list(zip(*(_texts(rows[name]) for name in names), strict=True))


def _texts(column: pa.ChunkedArray) -> list[str]:
    """A text for each cell, another one for another bit. By columns, without Python's numbers, where that can be."""
    kind = column.type
    if pa.types.is_floating(kind):
        column = pa.chunked_array([chunk.view(f"int{kind.bit_width}") for chunk in column.chunks], f"int{kind.bit_width}")
    if pa.types.is_floating(kind) or pa.types.is_integer(kind):
        return list(column.cast(pa.string()).fill_null("None").to_pylist())
    return list(map(repr, column.to_pylist()))


class DatasetContract(Contract):
    """What holds for every dataset. A subclass sets `dataset` and `fake`."""

    #: The class that is tested; one that its module has by its name.
    dataset: ClassVar[type[Dataset]]
    #: Raw files to test it on.
    fake: ClassVar[Fake]
    #: Leave kills out with -m 'not long': each starts a process.
    long_kills: ClassVar[bool] = False
    _made: ClassVar[Made]

    @pytest.fixture
    def made(self, tmp_path_factory: pytest.TempPathFactory) -> Made:
        """The dataset of the fake, made once for all tests of the class."""
        kind = type(self)
        if "_made" not in vars(kind):
            kind._made = make(self.dataset, self.fake, tmp_path_factory.mktemp("fake"))
        return kind._made

    def run(self, raw: Path, out: Path, *more: str) -> int:
        """Preprocess; the exit code."""
        return run(self.dataset, self.fake, raw, out, *more)

    def test_faults_are_told_by_file_and_line(self, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Exit code 2 and file and line in the message; nothing is left in or beside --out."""
        assert made.sources.keys() == made.paths.keys()  # no raw file that only some private way reads
        wrong = []
        full = made.of_one_form()
        for file, path in made.paths.items():
            spoilt: dict[str, Spoiled | None] = {"missing": None}
            spoilt |= faults(made.sources[file], file, unpacked(path)) if file in full else {}
            for number, (fault, spoiled) in enumerate(spoilt.items()):
                folder = tmp_path / f"{Path(file).name}-{number}"
                suffix = spoiled.suffix if spoiled else ""
                raw = made.with_files({file: spoiled.content if spoiled else None}, folder / "raw", suffix)
                code = self.run(raw, folder / "out")
                message = capsys.readouterr().err
                words = [Path(file).name + suffix]
                if spoiled and spoiled.line:
                    words[0] += f", line {spoiled.line}:"
                if code != 2 or any(word not in message for word in words) or os.listdir(folder) != ["raw"]:
                    wrong.append(f"{file}, {fault}: code {code}, {words} in: {message[-300:]} {os.listdir(folder)}")
                shutil.rmtree(folder)
        assert not wrong, "\n".join(wrong)

    def test_bad_rows_are_passed_over_and_counted_where_that_is_allowed(
        self, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """They are told with file and line, and the manifest counts them."""
        for number, file in enumerate(made.of_one_form()):
            spoiled = bad_row(made.sources[file], unpacked(made.paths[file]))
            if spoiled is None:
                continue
            folder = tmp_path / str(number)
            raw = made.with_files({file: spoiled.content}, folder / "raw")
            assert self.run(raw, folder / "out", "--max-bad-rows", "100000") == 0
            assert f"{Path(file).name}, line {spoiled.line}:" in capsys.readouterr().err
            counts = DatasetManifest.load(folder / "out").statistics["bad_rows"]
            assert [count for path, count in counts.items() if Path(path).name == Path(file).name] == [1]

    def test_equal_bytes_for_any_number_of_workers_and_size_of_pieces(self, made: Made, tmp_path: Path) -> None:
        """The same folder, to the byte."""
        with mock.patch.object(raw_files, "PIECE_BYTES", 20_000):
            assert self.run(made.raw, tmp_path / "out", "--workers", "3") == 0
        expected, again = bytes_of(made.out), bytes_of(tmp_path / "out")
        assert [part for part in expected if again.get(part) != expected[part]] == []
        assert again.keys() == expected.keys()

    def test_the_last_line_of_a_file_may_lack_its_end(self, made: Made, tmp_path: Path) -> None:
        """Parts and vocabularies are the same, to the byte."""
        texts = {file: unpacked(path) for file, path in made.paths.items() if isinstance(made.sources[file], TEXTS)}
        if not texts:
            return
        cut = {file: text.removesuffix(b"\n").removesuffix(b"\r") for file, text in texts.items()}
        raw = made.with_files(cut, tmp_path / "raw")
        assert self.run(raw, tmp_path / "out") == 0
        expected, again = bytes_of(made.out), bytes_of(tmp_path / "out")
        assert [part for part in expected if part != "manifest.json" and again.get(part) != expected[part]] == []

    def test_describe_reads_it(self, made: Made, capsys: pytest.CaptureFixture[str]) -> None:
        """Every feature, and every task's rate of positives."""
        capsys.readouterr()
        assert main(["describe", str(made.out)]) == 0
        shown = capsys.readouterr().out
        manifest = DatasetManifest.load(made.out)
        for feature in manifest.features:
            assert f"\n{feature.name} " in shown
        for task in manifest.tasks:
            labelled, positive = manifest.splits["test"].label_counts[task.name]["all"]
            assert f"{positive / labelled:.6f}" in shown

    def test_no_feature_decides_a_label(self, made: Made) -> None:
        """Of the train rows whose value of a feature stands in others, too, these others do not tell the label."""
        manifest = DatasetManifest.load(made.out)
        parts = [pq.read_table(made.out / part.path) for part in manifest.splits["train"].parts]
        rows, decided = pa.concat_tables(parts), []
        for task in manifest.tasks:
            label = rows[label_column(task.name)].to_numpy()
            for feature in manifest.features:
                values, of_row = rows[feature.name].combine_chunks(), np.arange(len(rows))
                if feature.kind == "multi":
                    of_row, values = pc.list_parent_indices(values).to_numpy(), pc.list_flatten(values)
                known = ~np.isnan(label[of_row])
                codes, positive = values.dictionary_encode().indices.to_numpy()[known], label[of_row][known] > 0
                counts, positives = (np.bincount(codes, weights) for weights in (None, positive))
                often = counts > 1
                wrong, num_positive = np.minimum(positives, counts - positives)[often].sum(), positives[often].sum()
                rarer = min(num_positive, counts[often].sum() - num_positive)
                if rarer >= 20 and counts[often].mean() >= 5 and wrong < 0.01 * rarer:
                    decided.append(f"{feature.name} tells {task.name}: {wrong:.0f} wrong, {rarer:.0f} by the rate alone")
        assert not decided, decided

    def test_new_rows_may_lack_labels_and_are_encoded_alike(self, made: Made, tmp_path: Path) -> None:
        """--like, of the raw files as they are and without what only labels need: the rows of the dataset, by their place."""
        if "--parity" in self.fake.options:
            pytest.skip("nothing is encoded like that")
        like = ("--like", str(made.out), "--split", "new")
        labelled = made_of(self.dataset, self.fake, made.raw, tmp_path / "labelled", *like)
        raw = made.with_files(without_labels(labelled, self.fake.labels), tmp_path / "raw")
        bare = made_of(self.dataset, self.fake, raw, tmp_path / "bare", *like)
        before, manifests = DatasetManifest.load(made.out), [DatasetManifest.load(each.out) for each in (labelled, bare)]
        features, labels = [f.name for f in before.features], [label_column(task.name) for task in before.tasks]
        assert [(list(each.splits), each.encoding) for each in manifests] == 2 * [(["new"], before.encoding)]
        for each in manifests:
            assert {*each.keys} == {*before.keys, *PLACE_KEYS}
        old, with_labels, without = (_rows(each.out) for each in (made, labelled, bare))
        assert Counter(_cells(old, [*features, *labels])) == Counter(_cells(with_labels, [*features, *labels]))
        found: list[dict[tuple[Any, ...], list[tuple[Any, ...]]]] = []
        for rows in (with_labels, without):
            by_place: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
            for place, cells in zip(_cells(rows, list(map(key_column, PLACE_KEYS))), _cells(rows, features), strict=True):
                by_place.setdefault(place, []).append(cells)
            found.append({place: sorted(cells) for place, cells in by_place.items()})
        lines, files = {place: found[1].get(place) for place in found[0]}, {place[0] for place in found[0]}
        assert lines == found[0]
        assert files <= {repr(file) for file in made.sources}
        empty = [label for label in labels if without[label].null_count == len(without)]
        assert all(without[label].null_count == with_labels[label].null_count for label in labels if label not in empty)
        stripped = [file for file in bare.sources if made.paths[file] != bare.paths.get(file)]
        assert empty or not any(getattr(bare.sources[file], "optional", self.fake.labels) for file in stripped)

    @pytest.mark.parametrize("when", ["reading", "writing"])
    def test_full_disk_is_told_and_leaves_nothing(
        self, when: str, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """While raw files are read, and while the dataset is written."""
        write = SplitWriter.write

        def limited(self: SplitWriter, rows: Any) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            write(self, rows)

        with (
            disk_of(100 if when == "reading" else resource.RLIM_INFINITY),
            mock.patch.object(SplitWriter, "write", write if when == "reading" else limited),
        ):
            code = self.run(made.raw, tmp_path / "out")
        message = capsys.readouterr().err
        assert code == 2
        assert f"{tmp_path / 'out'}: the dataset cannot be written: File too large" in message
        assert os.listdir(tmp_path) == []

    @over("when", lambda case: [pytest.param(when, marks=pytest.mark.long if case.long_kills else ()) for when in KILLS])
    def test_after_a_kill_nothing_passes_for_a_dataset_and_the_next_start_works(
        self, when: str, made: Made, tmp_path: Path
    ) -> None:
        """SIGKILL, at three points of a run in a process of its own."""
        out = tmp_path / "out"
        arguments = command(self.dataset, self.fake, made.raw, out)
        start = _START.format(path=[str(Path(place).resolve()) for place in sys.path], kill=KILLS[when], dataset=self.dataset)
        code = subprocess.run([sys.executable, "-c", start, *arguments], capture_output=True, timeout=120).returncode
        assert code == -signal.SIGKILL
        assert os.listdir(tmp_path) == [".out.tmp"]
        with pytest.raises(DataError, match="the folder does not exist"):
            DatasetManifest.load(out)
        assert self.run(made.raw, out) == 0
        assert os.listdir(tmp_path) == ["out"]
        assert bytes_of(out) == bytes_of(made.out)

    def test_valid_and_test_rows_leave_no_trace_in_train(self, made: Made, tmp_path: Path) -> None:
        """All lines of valid and test become copies of one of them; train, vocabularies and ranges stay as they are."""
        if "--parity" in self.fake.options:
            pytest.skip("its vocabularies are of all rows")
        with traced() as files:
            assert self.run(made.raw, tmp_path / "traced", "--workers", "1") == 0
        sides = sides_of_lines(tmp_path / "traced", files)
        contents: dict[str, bytes | None] = {}
        copied = dict.fromkeys(("valid", "test"), 0)
        for file, lines in sides.items():
            rows: dict[int, int] = {}
            for split in copied:
                held = [line for line, splits in lines.items() if splits == {split}]
                rows |= dict.fromkeys(held[1:], held[0]) if held else {}
                copied[split] += len(held[1:])
            contents[file] = copied_rows(made.sources[file], unpacked(made.paths[file]), rows, self.fake.own)
        raw = made.with_files(contents, tmp_path / "raw")
        assert min(copied.values()) > 20
        assert self.run(raw, tmp_path / "out") == 0
        old, new = bytes_of(made.out), bytes_of(tmp_path / "out")
        kept = [part for part in old if part.startswith(("train/", "vocab/"))]
        assert kept == [part for part in new if part.startswith(("train/", "vocab/"))]
        assert [part for part in kept if old[part] != new[part]] == []
        assert any(old[part] != new.get(part) for part in old if part.startswith("valid/"))
        assert any(old[part] != new.get(part) for part in old if part.startswith("test/"))
        for path in (("tables",), ("splits", "train"), ("preprocessing", "dense_ranges"), ("encoding",)):
            before, after = (functools.reduce(dict.__getitem__, path, json.loads(of["manifest.json"])) for of in (old, new))
            assert before == after
        before, after = (json.loads(of["manifest.json"])["preprocessing"].get("dense_fills") for of in (old, new))
        assert before == after

    def test_the_frozen_encoder_gives_what_stands_in_the_parts(self, made: Made, tmp_path: Path) -> None:
        """From canonical rows; these are raw ones, too, of a dataset with a file of its own, with the scenario by value."""
        manifest = DatasetManifest.load(made.out)
        Encoder.load(made.out).save(tmp_path / "mapped")
        encoder = Encoder.load(tmp_path / "mapped")
        raw = RawFolder(made.raw, made.dataset.raw_files, "", workers=1)
        raw.scratch = tmp_path
        rows = pa.Table.from_batches(made.dataset.batches(raw), made.dataset.canonical_schema())
        parts = pa.concat_tables(pq.read_table(made.out / part.path) for of in manifest.splits.values() for part in of.parts)
        names = [spec.name for spec in encoder.features] + ([SCENARIO_COLUMN] if manifest.scenario else [])
        others = [label_column(task.name) for task in manifest.tasks]
        expected = _counted(parts.select([*names, *others]))
        batch = rows.combine_chunks().to_batches()[0]
        assert _counted(pa.table(encoder.encode(batch).select([*names, *others]))) == expected
        if "config" in manifest.preprocessing:
            return
        raw_rows = rows.select([spec.name for spec in encoder.features])
        if manifest.scenario is not None and encoder.scenario is not None:
            values = pa.array(manifest.scenario.values).take(batch.column(SCENARIO_COLUMN))
            if encoder.scenario.column not in raw_rows.column_names:
                raw_rows = raw_rows.append_column(encoder.scenario.column, values)
        found = encoder.inputs(raw_rows)
        assert _counted(_as_table(found, encoder, rows.select(others)).select([*names, *others])) == expected

    def test_groups_are_on_one_side(self, made: Made) -> None:
        """No value of the key that the rule keeps together is in two splits."""
        split = made.dataset.split
        if isinstance(split, GroupSplit):
            key, pairs = split.key, [("train", "valid"), ("train", "test"), ("valid", "test")]
        elif isinstance(split, FileSplit) and split.group and split.valid_from:
            key, pairs = split.group, [(split.valid_from, "valid")]
        else:
            pytest.skip("its rule keeps no groups together")
        manifest = DatasetManifest.load(made.out)
        groups = {
            side: {
                value
                for part in manifest.splits[side].parts
                for value in pq.read_table(made.out / part.path)[f"key.{key}"].to_pylist()
            }
            for side in SPLITS
        }
        for one, other in pairs:
            assert groups[one]
            assert not groups[one] & groups[other]


def _counted(rows: pa.Table) -> Counter[tuple[str, ...]]:
    """How often each row occurs."""
    return Counter(_cells(rows, rows.column_names))


def _as_table(inputs: Inputs, encoder: Encoder, others: pa.Table) -> pa.Table:
    """Inputs as columns like those of the parts, beside other columns of the same rows."""
    dense = [spec.name for spec in encoder.features if spec.kind == "dense"]
    columns: dict[str, Any] = {name: inputs.dense[:, index] for index, name in enumerate(dense)}
    for spec in encoder.features:
        if spec.kind != "dense":
            ids, offsets = inputs.ids[spec.name]
            lists = pa.ListArray.from_arrays(offsets.astype(np.int32), ids)
            columns[spec.name] = lists if spec.kind == "multi" else ids
    if encoder.scenario is not None:
        columns[SCENARIO_COLUMN] = inputs.scenario
    return pa.table(columns | {name: others[name] for name in others.column_names})
