"""Hashed ids: known answers against a plain version, uniform buckets, seeds, slices and nulls."""

import numpy as np
import pyarrow as pa
import pytest

from mmlrec.hashing import bucket_ids, hash_ids, key_ids, keys_of

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
IDS = [0, 1, -1, 42, 2**62 + 3, -(2**63), 2**63 - 1]
WORDS = ["", "a", "user_1", "eightchr", "ninechars", "straße", "日本語のテキスト", "x" * 100, "\x00", "a\x00"]


def finalise(z):
    z = (z + GOLDEN) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def plain_hash(value, seed):
    start = finalise(seed)
    if isinstance(value, int):
        return finalise(value & MASK ^ start)
    text = value.encode()
    for at in range(0, len(text), 8):
        start = finalise(start ^ int.from_bytes(text[at : at + 8], "little"))
    return finalise(start ^ len(text))


def plain_buckets(value, seed, num_buckets, num_hashes):
    first = plain_hash(value, seed)
    others = [finalise((first + j * GOLDEN) & MASK) for j in range(1, num_hashes)]
    return [h % num_buckets + 1 for h in (first, *others)]


def plain_key(value, seed):
    """Of a missing value 0, of others the hash as int64; the hash 0 is 1."""
    key = 0 if value is None else plain_hash(value, seed) or 1
    return key - (key >> 63 << 64)


@pytest.mark.parametrize("values", [IDS, WORDS], ids=["int64", "string"])
@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_equals_plain_python(values, seed):
    assert hash_ids(pa.array(values), seed).tolist() == [plain_hash(value, seed) for value in values]
    for num_buckets, num_hashes in ((1, 1), (7, 3), (1_000_003, 2), (2**40, 4)):
        expected = [plain_buckets(value, seed, num_buckets, num_hashes) for value in values]
        assert bucket_ids(pa.array(values), seed, num_buckets, num_hashes).tolist() == expected


def test_known_answers_never_change():
    """Worked out once; tables trained with these ids would be lost if they changed."""
    assert hash_ids(pa.array([0, 1, -1, 42]), 0).tolist() == [
        12035550249420947055,
        627405149472732430,
        3303439293501059696,
        5592132763777985307,
    ]
    assert hash_ids(pa.array(["", "a", "user_1", "ninechars"]), 7).tolist() == [
        13309476754707697221,
        9493150456396940119,
        17216064759540618675,
        2931579481153975929,
    ]
    assert bucket_ids(pa.array([1, 2, 3]), 5, 1000, 2).tolist() == [[587, 337], [631, 437], [326, 942]]


def test_nulls_are_0_and_slices_are_like_wholes():
    for values in (IDS, WORDS):
        array = pa.array([values[0], None, *values[1:], None])
        whole = bucket_ids(array, 3, 50, 2)
        assert np.array_equal((whole == 0).all(axis=1), np.array(array.is_null()))
        assert ((whole >= 1) & (whole <= 50)).any(axis=1).sum() == len(values)
        for start in range(len(array)):
            assert np.array_equal(bucket_ids(array[start:], 3, 50, 2), whole[start:])
            assert np.array_equal(bucket_ids(array[:start], 3, 50, 2), whole[:start])
    assert bucket_ids(pa.nulls(2, pa.string()), 3, 50).tolist() == [[0], [0]]


def test_keys_are_hashes_of_64_bits():
    for values in (IDS, WORDS):
        keys = key_ids(pa.array([values[0], None, *values[1:]]), 9)
        assert keys.tolist() == [plain_key(value, 9) for value in (values[0], None, *values[1:])]
        assert keys.dtype == np.int64
        assert key_ids(pa.array(values), 9).tolist() == [plain_key(value, 9) for value in values]
    assert keys_of(np.array([0, 1, 2**63, 2**64 - 1], np.uint64)).tolist() == [1, 1, -(2**63), -1]
    assert key_ids(pa.nulls(2, pa.string()), 3).tolist() == [0, 0]


def test_the_keys_of_integers_differ():
    """A bijection: neighbours, and ids of all bits, have as many keys; the id whose hash is 0 takes that of 1."""
    near = np.arange(-50_000, 50_000)
    far = np.random.default_rng(0).integers(-(2**63), 2**63, 50_000)
    every = np.unique(np.concatenate([near, far]))
    for seed in (0, 7):
        keys = key_ids(pa.array(every), seed)
        assert len(np.unique(keys)) == len(every)
        assert not (keys == 0).any()
        zero, one = ((backwards(hash) ^ finalise(seed)) for hash in (0, 1))
        ids = [each - (each >> 63 << 64) for each in (zero, one)]
        assert hash_ids(pa.array(ids), seed).tolist() == [0, 1]
        assert key_ids(pa.array(ids), seed).tolist() == [1, 1]


def backwards(hash):
    """The number that `finalise` makes to this one."""

    def unshifted(z, bits):
        found = z
        for _ in range(64 // bits):
            found = z ^ (found >> bits)
        return found

    z = unshifted(hash, 31) * pow(0x94D049BB133111EB, -1, 1 << 64) & MASK
    z = unshifted(z, 27) * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & MASK
    return (unshifted(z, 30) - GOLDEN) & MASK


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="must be int64 or string, found double"):
        hash_ids(pa.array([1.5]), 0)


@pytest.mark.parametrize("make", [lambda n: pa.array(np.arange(n) * 64), lambda n: pa.array(np.arange(n)).cast(pa.string())])
def test_regular_ids_fill_the_buckets_like_random_ones(make):
    """Of n balls in n boxes about n (1 - 1/e) boxes are taken; ids that are multiples of 64 would take n / 64 by `id % n`."""
    n = 1 << 16
    for num_hashes in (1, 2):
        for ids in bucket_ids(make(n), 1, n, num_hashes).T:
            taken = len(np.unique(ids))
            assert taken == pytest.approx(n * (1 - np.exp(-1)), abs=5 * np.sqrt(n) * 0.32)


def test_hashes_of_one_id_and_of_two_seeds_are_independent():
    n, b = 100_000, 1000
    values = pa.array(np.arange(n))
    first, second = bucket_ids(values, 1, b, 2).T
    (other,) = bucket_ids(values, 2, b).T
    for ids in (second, other):
        assert np.count_nonzero(first == ids) == pytest.approx(n / b, abs=5 * np.sqrt(n / b))
