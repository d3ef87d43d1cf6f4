"""Look-ups against dictionaries; equal hashes of different texts; files that are mapped, cut off, or changed."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mmlrec import hashing
from mmlrec.encoding import vocabularies
from mmlrec.encoding.encoder import Encoder
from mmlrec.encoding.vocabularies import Vocabularies
from mmlrec.errors import DataError, UserError

ROOT = Path(__file__).parents[2]


def texts(num, seed=0):
    """Distinct ones of all lengths, with zero bytes, and beginnings of each other."""
    draw = random.Random(seed)
    found = {"", "\0", "\0\0", "a", "a\0", "aaaaaaaa", "aaaaaaaa\0", "ä" * 40}
    while len(found) < num:
        found.add("".join(draw.choice("ab\0ß𝄞") for _ in range(draw.choice([1, 3, 7, 8, 9, 16, 17, 40]))))
    return sorted(found)


def facts(tables):
    """Of an encoder with one feature for each table: name -> type and number of values."""
    return {
        "form": 1,
        "features": {name: {"kind": "sparse", "type": kind, "table": name} for name, (kind, _) in tables.items()},
        "tables": {name: {"ids": "vocabulary", "rows": size + 1} for name, (_, size) in tables.items()},
        "scenario": None,
    }


def encoder_of(values):
    tables = {name: (str(of.type).removeprefix("large_"), len(of)) for name, of in values.items()}
    chunks = {name: [of.slice(0, 3), of.slice(3)] for name, of in values.items()}
    return Encoder(facts(tables), Vocabularies.of(chunks))


@pytest.fixture
def values():
    draw = np.random.default_rng(0)
    return {
        "numbers": pa.array(np.unique(draw.integers(-(2**63), 2**63 - 1, 1000))).take(pa.array(draw.permutation(1000))),
        "words": pa.array(random.Random(1).sample(texts(500), 500), pa.large_string()),
        "one": pa.array([7]),
        "none": pa.array([], pa.string()),
        "few": pa.array(["b", "a"]),
    }


def test_ids_are_those_of_a_dictionary(values, tmp_path):
    encoder = encoder_of(values)
    encoder.save(tmp_path)
    unseen = {"numbers": list(range(-50, 50)), "words": texts(900, seed=1), "one": [6, 8], "none": ["", "a"], "few": ["c", ""]}
    for name, known in values.items():
        ids = {value: place for place, value in enumerate(known.to_pylist(), 1)}
        asked = [None, *known.to_pylist(), *unseen[name], None]
        random.Random(3).shuffle(asked)
        right = [ids.get(value, 0) for value in asked]
        kind = pa.int64() if pa.types.is_integer(known.type) else pa.string()
        for each in (encoder, Encoder.load(tmp_path)):
            assert each.encode_column(name, pa.array(asked, kind)).to_pylist() == right
            assert each.encode_column(name, pa.array([None, *asked], kind).slice(1, 9)).to_pylist() == right[:9]


@pytest.mark.parametrize("bits", [0, 3])
def test_texts_with_equal_hashes_are_told_apart(values, bits, monkeypatch):
    """All hashes equal, or one of eight."""

    def few(texts, start):
        return hashing.hashes_from(texts, start) & np.uint64((1 << bits) - 1)

    monkeypatch.setattr(vocabularies, "hash_ids", lambda texts, seed: few(texts, np.zeros(1, np.uint64)))
    words = values["words"].slice(0, 100)
    encoder = encoder_of({"words": words, "few": values["few"]})
    asked = pa.array([*words.to_pylist(), *texts(200, seed=2)], pa.string())
    ids = {value: place for place, value in enumerate(words.to_pylist(), 1)}
    assert encoder.encode_column("words", asked).to_pylist() == [ids.get(value, 0) for value in asked.to_pylist()]
    assert encoder.encode_column("few", pa.array(["a", "b", "c"])).to_pylist() == [2, 1, 0]


def test_a_fact_that_was_changed_is_told_wherever_it_stands(values, tmp_path):
    """Also one with which the file can still be read, and without the export's card. A file without a checksum is taken."""
    encoder_of(values).save(tmp_path)
    path = tmp_path / "encoder.json"
    text = path.read_text(encoding="utf-8")
    facts = json.loads(text)
    for change in ({"dataset": "another"}, {"features": dict(reversed(facts["features"].items()))}, {"checksum": "0" * 64}):
        path.write_text(json.dumps(facts | change), encoding="utf-8")
        with pytest.raises(DataError, match=r"encoder\.json is damaged: its checksum is not that .* Copy the folder again"):
            Encoder.load(tmp_path)
    path.write_text(text.replace(facts["checksum"], ""), encoding="utf-8")
    with pytest.raises(DataError, match="its checksum"):
        Encoder.load(tmp_path)
    del facts["checksum"]
    path.write_text(json.dumps(facts), encoding="utf-8")
    assert Encoder.load(tmp_path).facts == encoder_of(values).facts


def test_a_file_that_is_cut_off_changed_or_gone_is_named(values, tmp_path):
    encoder_of(values).save(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["content.npy", "directory.npy", "encoder.json", "hashes.npy", "ids.npy", "starts.npy"]
    for name in names:
        path = tmp_path / name
        content = path.read_bytes()
        middle = len(content) - 3
        for damaged in (content[:-1], content[:100], b"", content[:middle] + b"~" + content[middle + 1 :], None):
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            if name == "encoder.json" and damaged == content[:-1]:
                continue  # only the line end is lacking
            with pytest.raises(
                UserError, match=name if path.exists() or name != "encoder.json" else "neither a dataset nor a run"
            ):
                Encoder.load(tmp_path)
        path.write_bytes(content)
    Encoder.load(tmp_path)
    for form in (2, None):
        (tmp_path / "encoder.json").write_text(json.dumps({"form": form}), encoding="utf-8")
        with pytest.raises(DataError, match=r"encoder\.json: an encoder of form .*; this release reads 1"):
            Encoder.load(tmp_path)


_USE = """
import sys, time
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchrec", "fbgemm_gpu", "pydantic", "yaml", "fsspec", "upath", "s3fs"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
import pyarrow as pa
from mmlrec.encoding.encoder import Encoder
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
"""


def use(code):
    """Run code in a process in which heavy packages cannot be imported; what it prints."""
    done = subprocess.run([sys.executable, "-c", _USE + code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_an_exported_encoder_needs_numpy_and_arrow_alone(values, tmp_path):
    words = values["words"].to_pylist()
    encoder_of(values).save(tmp_path / "encoder")
    rows = {"numbers": [None, 1], "words": [words[7], "new"], "one": [7, 8], "none": ["a", None], "few": ["a", "b"]}
    found = use(
        f"encoder = Encoder.load({str(tmp_path / 'encoder')!r})\n"
        f"inputs = encoder.inputs(pa.Table.from_pylist(pa.table({rows!r}).to_pylist()))\n"
        "print(*(number for ids, _ in inputs.ids.values() for number in ids))"
    )
    assert found == [*"00", "8", "0", "1", *"000", "2", "1"]


def load_and_look(folder, column, value):
    """Seconds to load and to look a value up, KiB that the process grows, and the id. It did so with a small encoder before."""
    small = folder / "small"
    encoder_of({column: pa.array(["a"])}).save(small)
    seconds, first, grown, found = use(
        f"Encoder.load({str(small)!r}).encode_column({column!r}, pa.array(['a']))\n"
        f"before, start = resident(), time.perf_counter()\n"
        f"encoder = Encoder.load({str(folder)!r})\n"
        f"loaded = time.perf_counter() - start\n"
        f"found = encoder.encode_column({column!r}, pa.array([{value!r}])).to_pylist()[0]\n"
        "print(loaded, time.perf_counter() - start, resident() - before, found)"
    )
    return float(seconds), float(first), int(grown), int(found)


def test_only_what_is_looked_up_is_read_into_memory(tmp_path):
    names = pa.array(np.char.add("name of some length ", np.arange(400_000).astype(str)).astype(object), pa.string())
    encoder_of({"words": names}).save(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size > 16 << 20
    _, _, grown, found = load_and_look(tmp_path, "words", "name of some length 77")
    assert found == 78
    assert grown << 10 < size / 3, f"{grown} KiB of {size >> 10} were read"


@pytest.mark.long
def test_ten_million_texts_are_loaded_far_below_a_second(tmp_path):
    chunks = []
    for start in range(0, 10_000_000, 1_000_000):
        numbers = np.arange(start, start + 1_000_000).astype(str)
        chunks.append(pa.array(np.char.add("some-name-", numbers).astype(object), pa.string()))
    start = time.perf_counter()
    Encoder(facts({"words": ("string", 10_000_000)}), Vocabularies.of({"words": chunks})).save(tmp_path)
    print(f"built and saved in {time.perf_counter() - start:.1f} s")
    loaded, looked_up, grown, found = load_and_look(tmp_path, "words", "some-name-1234567")
    print(f"loaded in {loaded:.4f} s, a value found after {looked_up:.4f} s, {grown} KiB of memory")
    assert found == 1_234_568
    assert loaded < 0.3
    assert grown << 10 < sum(path.stat().st_size for path in tmp_path.iterdir()) / 10
