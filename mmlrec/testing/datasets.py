"""What holds for every dataset, tried on its fake (fakes.py): bad raw files, full disks, kills, workers, leaks, groups."""

import functools
import json
import os
import resource
import shutil
import signal
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmlrec.errors import DataError
from mmlrec.schema import SPLITS, DatasetManifest
from preprocessing.command_line import main
from preprocessing.dataset import Dataset
from preprocessing.reading import raw_files
from preprocessing.reading.delimited import DelimitedText
from preprocessing.reading.json_lines import JsonLines
from preprocessing.reading.raw_files import Block, RawFolder, Source
from preprocessing.split_rules import FileSplit, GroupSplit
from preprocessing.writing.parts import SplitWriter
from tests.preprocessing.fakes import FAKES
from tests.preprocessing.movielens_fake import folder_bytes
from tests.preprocessing.raw_faults import bad_row, copied_rows, faults, unpacked

TEXTS = (DelimitedText, JsonLines)
_TRACE = "key.trace"
_LINE_BITS = 40


@dataclass(frozen=True)
class Made:
    """A fake and the dataset made of it.

    Attributes:
        paths: plain name of each raw file -> where it lies. sources: plain name -> how it is read.
    """

    raw: Path
    out: Path
    dataset: Dataset
    paths: dict[str, Path]
    sources: dict[str, Source]


def arguments(name, raw, out, *more):
    return [name.split()[0], "--out", str(out), *FAKES[name].arguments(raw), *more]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make a fake's dataset, once; returns `Made`."""

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp("fake")
        raw = FAKES[name].write(folder / "raw")
        with watched() as (datasets, paths, sources):
            assert main(arguments(name, raw, folder / "out", "--workers", "1")) == 0
        return Made(raw, folder / "out", datasets[-1], paths, sources)

    return make


@contextmanager
def watched():
    """The dataset of a run, where its raw files lie and how they are read."""
    datasets, paths, sources = [], {}, {}
    original, schema = RawFolder.map, Dataset.canonical_schema

    def recorded(self, function, source, *more, **named):
        paths.update(self.paths)
        names = [name for name, _ in getattr(source, "files", ())] or [source.name]
        sources.update(dict.fromkeys(names, source))
        return original(self, function, source, *more, **named)

    def kept(self):
        datasets.append(self)
        return schema(self)

    with mock.patch.object(RawFolder, "map", recorded), mock.patch.object(Dataset, "canonical_schema", kept):
        yield datasets, paths, sources


def with_files(made, contents, folder, suffix=""):
    """A raw folder that shares all files but these; one whose content is None is missing."""
    changed = {made.paths[name] for name in contents}
    for path in made.raw.rglob("*"):
        if path.is_file() and path not in changed:
            place = folder / path.relative_to(made.raw)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path)
    for name, content in contents.items():
        place = folder / made.paths[name].relative_to(made.raw).parent / (Path(name).name + suffix)
        place.parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            place.write_bytes(content)
    return folder


def of_one_form(made):
    """Names of the files without those that are read just like an earlier one."""
    found = {}
    for name, source in made.sources.items():
        found.setdefault(str(replace(source, name="")), name)
    return list(found.values())


@pytest.mark.parametrize("name", FAKES)
def test_faults_are_told_by_file_and_line(name, made, tmp_path, capsys):
    """Exit code 2 and file and line in the message; nothing is left in or beside --out."""
    found = made(name)
    assert found.sources.keys() == found.paths.keys()  # no raw file that only some private way reads
    wrong = []
    full = of_one_form(found)
    for file, path in found.paths.items():
        spoilt = {"missing": None} | (faults(found.sources[file], file, unpacked(path)) if file in full else {})
        for number, (fault, spoiled) in enumerate(spoilt.items()):
            folder = tmp_path / f"{Path(file).name}-{number}"
            suffix = spoiled.suffix if spoiled else ""
            raw = with_files(found, {file: spoiled and spoiled.content}, folder / "raw", suffix)
            code = main(arguments(name, raw, folder / "out"))
            message = capsys.readouterr().err
            words = [Path(file).name + suffix]
            if spoiled and spoiled.line:
                words[0] += f", line {spoiled.line}:"
            if code != 2 or any(word not in message for word in words) or os.listdir(folder) != ["raw"]:
                wrong.append(f"{file}, {fault}: code {code}, {words} in: {message[-300:]} {os.listdir(folder)}")
            shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", FAKES)
def test_bad_rows_are_passed_over_and_counted_where_that_is_allowed(name, made, tmp_path, capsys):
    found = made(name)
    for number, file in enumerate(of_one_form(found)):
        spoiled = bad_row(found.sources[file], unpacked(found.paths[file]))
        if spoiled is None:
            continue
        folder = tmp_path / str(number)
        raw = with_files(found, {file: spoiled.content}, folder / "raw")
        assert main(arguments(name, raw, folder / "out", "--max-bad-rows", "100000")) == 0
        assert f"{Path(file).name}, line {spoiled.line}:" in capsys.readouterr().err
        counts = DatasetManifest.load(folder / "out").statistics["bad_rows"]
        assert [count for path, count in counts.items() if Path(path).name == Path(file).name] == [1]


@pytest.mark.parametrize("name", FAKES)
def test_equal_bytes_for_any_number_of_workers_and_size_of_pieces(name, made, tmp_path):
    found = made(name)
    with mock.patch.object(raw_files, "PIECE_BYTES", 20_000):
        assert main(arguments(name, found.raw, tmp_path / "out", "--workers", "3")) == 0
    expected, again = folder_bytes(found.out), folder_bytes(tmp_path / "out")
    assert [part for part in expected if again.get(part) != expected[part]] == []
    assert again.keys() == expected.keys()


@pytest.mark.parametrize("name", FAKES)
def test_the_last_line_of_a_file_may_lack_its_end(name, made, tmp_path):
    found = made(name)
    texts = {file: unpacked(path) for file, path in found.paths.items() if isinstance(found.sources[file], TEXTS)}
    if not texts:
        return
    raw = with_files(
        found, {file: text.removesuffix(b"\n").removesuffix(b"\r") for file, text in texts.items()}, tmp_path / "raw"
    )
    assert main(arguments(name, raw, tmp_path / "out")) == 0
    expected, again = folder_bytes(found.out), folder_bytes(tmp_path / "out")
    assert [part for part in expected if part != "manifest.json" and again.get(part) != expected[part]] == []


@pytest.mark.parametrize("name", FAKES)
def test_describe_reads_it(name, made, capsys):
    found = made(name)
    capsys.readouterr()
    assert main(["describe", str(found.out)]) == 0
    shown = capsys.readouterr().out
    manifest = DatasetManifest.load(found.out)
    for feature in manifest.features:
        assert f"\n{feature.name} " in shown
    for task in manifest.tasks:
        labelled, positive = manifest.splits["test"].label_counts[task.name]["all"]
        assert f"{positive / labelled:.6f}" in shown


@contextmanager
def disk_of(num_bytes):
    """Files of this process can grow no further."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, old[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("name", FAKES)
@pytest.mark.parametrize("when", ["reading", "writing"])
def test_full_disk_is_told_and_leaves_nothing(name, when, made, tmp_path, capsys):
    found = made(name)
    write = SplitWriter.write

    def limited(self, rows):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        write(self, rows)

    with (
        disk_of(100 if when == "reading" else resource.RLIM_INFINITY),
        mock.patch.object(SplitWriter, "write", write if when == "reading" else limited),
    ):
        code = main(arguments(name, found.raw, tmp_path / "out"))
    message = capsys.readouterr().err
    assert code == 2
    assert f"{tmp_path / 'out'}: the dataset cannot be written: File too large" in message
    assert os.listdir(tmp_path) == []


_KILL = """
import os, signal
from preprocessing.{room} import {module}
method = {module}.{place}
def stop(*arguments):
    method(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
{module}.{place} = stop
"""
KILLS = {
    "reading": _KILL.format(room="rows", module="batch_file", place="BatchFile.append"),
    "writing": _KILL.format(room="writing", module="parts", place="SplitWriter.write"),
    "before the end": _KILL.format(room="writing", module="output", place="_sync"),
}


@pytest.mark.parametrize("when", KILLS)
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] if k else []) for k, name in enumerate(FAKES)])
def test_after_a_kill_nothing_passes_for_a_dataset_and_the_next_start_works(name, when, made, tmp_path, command):
    found = made(name)
    out = tmp_path / "out"
    result = command(*arguments(name, found.raw, out), prelude=KILLS[when])
    assert result.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == [".out.tmp"]
    with pytest.raises(DataError, match="the folder does not exist"):
        DatasetManifest.load(out)
    assert main(arguments(name, found.raw, out)) == 0
    assert os.listdir(tmp_path) == ["out"]
    assert folder_bytes(out) == folder_bytes(found.out)


@contextmanager
def traced():
    """Add a key that tells file and line to each row; yields the files in the order of their numbers."""
    files = []
    schema, only = Dataset.canonical_schema, Block.only
    last = [None]

    def followed(self, wanted, *more):
        result = only(self, wanted, *more)
        last[0] = result.lines
        return result

    def lines_of(dataset, block, num_rows):
        if len(last[0]) == num_rows:
            return last[0]
        lines = []  # several rows of a line: see what each gives
        for k in range(len(block.lines)):
            table = block.table.slice(k, 1).combine_chunks()
            one = replace(block, lines=block.lines[k : k + 1], table=table, bad_rows=[], passed_over={})
            lines += [block.lines[k]] * len(dataset.rows(one)[dataset.features[0].name])
        assert len(lines) == num_rows
        return lines

    def canonical(self, block):
        last[0] = block.lines
        columns = self.rows(block)
        if block.source.name not in files:
            files.append(block.source.name)
        lines = lines_of(self, block, len(columns[self.features[0].name]))
        number = files.index(block.source.name) << _LINE_BITS
        columns[_TRACE] = pa.array([number + int(line) for line in lines], pa.int64())
        names = self.canonical_schema()
        return pa.table({name: columns[name] for name in names.names}, schema=names).combine_chunks().to_batches()

    with (
        mock.patch.object(Dataset, "canonical_schema", lambda self: schema(self).append(pa.field(_TRACE, pa.int64()))),
        mock.patch.object(Dataset, "canonical", canonical),
        mock.patch.object(Block, "only", followed),
    ):
        yield files


def sides_of_lines(out, manifest):
    """Trace -> the splits that its rows are in."""
    found = {}
    for split in SPLITS:
        for part in manifest.splits[split].parts:
            for trace in set(pq.read_table(out / part.path, columns=[_TRACE])[_TRACE].to_pylist()):
                found.setdefault(trace, set()).add(split)
    return found


@pytest.mark.parametrize("name", [name for name in FAKES if "--parity" not in FAKES[name].options])
def test_valid_and_test_rows_leave_no_trace_in_train(name, made, tmp_path):
    """All lines of valid and test become copies of one of them; train, vocabularies and ranges stay as they are."""
    found = made(name)
    with traced() as files:
        assert main(arguments(name, found.raw, tmp_path / "traced", "--workers", "1")) == 0
    sides = sides_of_lines(tmp_path / "traced", DatasetManifest.load(tmp_path / "traced"))
    contents = {}
    copied = dict.fromkeys(("valid", "test"), 0)
    for number, file in enumerate(files):
        rows = {}
        for split in copied:
            held = [
                trace & (1 << _LINE_BITS) - 1
                for trace, splits in sides.items()
                if trace >> _LINE_BITS == number and splits == {split}
            ]
            rows |= dict.fromkeys(held[1:], held[0]) if held else {}
            copied[split] += len(held[1:])
        contents[file] = copied_rows(found.sources[file], unpacked(found.paths[file]), rows, FAKES[name].own)
    raw = with_files(found, contents, tmp_path / "raw")
    assert min(copied.values()) > 20
    assert main(arguments(name, raw, tmp_path / "out")) == 0
    old, new = folder_bytes(found.out), folder_bytes(tmp_path / "out")
    kept = [part for part in old if part.startswith(("train/", "vocab/"))]
    assert kept == [part for part in new if part.startswith(("train/", "vocab/"))]
    assert [part for part in kept if old[part] != new[part]] == []
    assert any(old[part] != new.get(part) for part in old if part.startswith("valid/"))
    assert any(old[part] != new.get(part) for part in old if part.startswith("test/"))
    for path in (("tables",), ("splits", "train"), ("preprocessing", "dense_ranges")):
        before, after = (functools.reduce(dict.get, path, json.loads(files["manifest.json"])) for files in (old, new))
        assert before == after


@pytest.mark.parametrize("name", FAKES)
def test_groups_are_on_one_side(name, made):
    found = made(name)
    split = found.dataset.split
    if isinstance(split, GroupSplit):
        key, pairs = split.key, [("train", "valid"), ("train", "test"), ("valid", "test")]
    elif isinstance(split, FileSplit) and split.group:
        key, pairs = split.group, [(split.valid_from, "valid")]
    else:
        pytest.skip("its rule keeps no groups together")
    manifest = DatasetManifest.load(found.out)
    groups = {
        side: {
            value
            for part in manifest.splits[side].parts
            for value in pq.read_table(found.out / part.path)[f"key.{key}"].to_pylist()
        }
        for side in SPLITS
    }
    for one, other in pairs:
        assert groups[one]
        assert not groups[one] & groups[other]
