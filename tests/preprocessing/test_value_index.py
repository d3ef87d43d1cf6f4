"""The hash table of raw values against a dict."""

import numpy as np
import pyarrow as pa
import pytest

from preprocessing.encoding import value_index
from preprocessing.encoding.value_index import ValueIndex, hash_words


def odd_strings(numbers):
    """Short, long, empty, with zero bytes at the end, beyond ASCII; equal for equal numbers only."""
    return [("x" * (abs(int(k)) % 90)) + "ü" * (int(k) % 2) + str(k) + "\0" * (int(k) % 3) for k in numbers] + [""]


def batches(seed=0):
    random = np.random.default_rng(seed)
    for batch in range(40):
        few = random.integers(-500, 500, random.integers(0, 400))
        many = random.integers(-(2**63), 2**63 - 1, random.integers(0, 3000))
        distinct = np.unique(few if batch % 2 else many)
        random.shuffle(distinct)
        yield distinct


def check(kind, batch_values):
    index, truth = ValueIndex(kind), {}
    for values in batch_values:
        for value, code in zip(values, index.codes(pa.array(values, kind)).tolist(), strict=True):
            assert truth.setdefault(value, code) == code
    assert sorted(truth.values()) == list(range(len(index)))
    kept = index.values().to_pylist()
    assert all(kept[code] == value for value, code in truth.items())


def test_every_value_keeps_its_code():
    check(pa.int64(), [numbers.tolist() for numbers in batches()])
    check(pa.string(), [odd_strings(numbers) for numbers in batches()])
    check(pa.string(), [[], ["", "\0", "\0\0", "a", "a\0", "aaaaaaaa", "aaaaaaaa\0", "aaaaaaaaa"]])


@pytest.mark.parametrize("bits", [0, 3])
def test_strings_of_equal_hash_are_told_apart(monkeypatch, bits):
    def weak(values):
        words, lengths = hash_words(values)
        return words & np.uint64((1 << bits) - 1), np.full_like(lengths, 255)

    monkeypatch.setattr(value_index, "hash_words", weak)
    check(pa.string(), [odd_strings(numbers[:40]) for numbers in batches()])


def test_values_of_a_slice_are_those_of_a_copy():
    values = pa.array(odd_strings(range(200)))
    for part in (values.slice(0, 0), values.slice(7, 50), values.slice(150)):
        copy = pa.array(part.to_pylist(), pa.string())
        for found, expected in zip(hash_words(part), hash_words(copy), strict=True):
            assert found.tolist() == expected.tolist()
        assert hash_words(part.cast(pa.large_string()))[0].tolist() == hash_words(copy)[0].tolist()


def test_short_values_have_hashes_of_their_own():
    numbers = pa.array(np.arange(-200_000, 200_000))
    assert len(np.unique(hash_words(numbers)[0])) == len(numbers)
    texts = pa.array([format(k, "08x") for k in range(200_000)])
    assert len(np.unique(hash_words(texts)[0])) == len(texts)
