"""Raw ids to rows of a table of fixed size, without a vocabulary: the same for preprocessing and for serving.

An id becomes a 64-bit hash, and the hash one bucket of 1..num_buckets, or k of them; row 0 stays for missing ids. With
M the finaliser `mix64`, G its constant, and all arithmetic modulo 2^64:

    h = M(id XOR M(seed))                                     an int64 id, as two's complement
    h = M(... M(M(w_1 XOR M(seed)) XOR w_2) ... XOR n)        a string: its UTF-8 bytes in little-endian words of 8 bytes,
                                                              the last one filled up with zeros, then their number n
    bucket_1 = h mod num_buckets + 1,   bucket_j = M(h + (j - 1) G) mod num_buckets + 1
    key = h, as two's complement; 1 where h is 0                                          of an id of a managed table

Nothing depends on the platform, the byte order, the version of a library or the other ids of an array: tables trained with
these ids stay valid. Imports no torch.

Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014 (`mix64`). Several hashes for one id:
Tito Svenstrup et al., "Hash Embeddings for Efficient Word Representations", NeurIPS 2017.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

UInt64Array = NDArray[np.uint64]
IntArray = NDArray[np.int64]

_GOLDEN = 0x9E3779B97F4A7C15


def mix64(values: UInt64Array) -> UInt64Array:
    """Hash of each value, uint64, a bijection: the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014, figure 17)."""
    z = values + np.uint64(_GOLDEN)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def hash_ids(values: pa.Array, seed: int) -> UInt64Array:
    """64-bit hashes of int64 or string ids, [N]; of a null: any.

    Args:
        seed: 0..2^63 - 1.

    Raises:
        TypeError: the ids are neither int64 nor strings.
    """
    return hashes_from(values, mix64(np.array([seed], np.uint64)))


def hashes_from(values: pa.Array, start: UInt64Array) -> UInt64Array:
    """As `hash_ids`, of ids with seeds of their own.

    Args:
        start: `mix64` of the seed of each id, [N], or of that of all, [1].
    """
    if pa.types.is_int64(values.type):
        return mix64(values.fill_null(0).to_numpy().view(np.uint64) ^ start)
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise TypeError(f"ids must be int64 or string, found {values.type}")
    return _hash_strings(values, start)


def buckets_of(hashes: UInt64Array, num_buckets: int, num_hashes: int = 1) -> IntArray:
    """Buckets 1..num_buckets of 64-bit hashes, [N, num_hashes]; the first column does not depend on `num_hashes`."""
    columns = [hashes, *(mix64(hashes + np.uint64(j * _GOLDEN % 2**64)) for j in range(1, num_hashes))]
    return np.stack([column % np.uint64(num_buckets) for column in columns], axis=1).view(np.int64) + 1


def bucket_ids(values: pa.Array, seed: int, num_buckets: int, num_hashes: int = 1) -> IntArray:
    """Rows of a table of num_buckets + 1 rows for int64 or string ids, [N, num_hashes]; 0 for a null. Raises as `hash_ids`."""
    buckets = buckets_of(hash_ids(values, seed), num_buckets, num_hashes)
    return np.where(values.is_valid().to_numpy(zero_copy_only=False)[:, None], buckets, 0)


def keys_of(hashes: UInt64Array) -> IntArray:
    """Keys of 64-bit hashes, [N] int64, as two's complement: never 0, which stands for a missing id; the hash 0 becomes 1."""
    return np.where(hashes == 0, np.uint64(1), hashes).view(np.int64)


def key_ids(values: pa.Array, seed: int) -> IntArray:
    """Keys by which a managed table knows int64 or string ids, [N] int64; 0 for a null. Raises as `hash_ids`.

    Different int64 ids have different keys, the two excepted whose hashes are 0 and 1.
    """
    keys = keys_of(hash_ids(values, seed))
    return np.where(values.is_valid().to_numpy(zero_copy_only=False), keys, 0) if values.null_count else keys


def _hash_strings(values: pa.Array, start: UInt64Array) -> UInt64Array:
    """One step for all strings at a time: those that have an i-th word take it in."""
    content = pc.fill_null(values, "")
    if not len(content):
        return np.empty(0, np.uint64)
    _, offsets, buffer = content.buffers()
    width = np.int64 if pa.types.is_large_string(content.type) else np.int32
    ends = np.frombuffer(offsets, width)[content.offset :][: len(content) + 1].astype(np.int64)
    first, lengths = ends[:-1] - ends[0], np.diff(ends)
    text = np.frombuffer((buffer[ends[0] : ends[-1]].to_pybytes() if buffer else b"") + bytes(8), np.uint8)
    # the 8 bytes that begin at each byte
    words = np.ndarray((len(text) - 7,), "<u8", text, strides=(1,))
    hashes = np.broadcast_to(start, len(content)).copy()
    active, at = np.arange(len(content)), 0
    while len(active := active[lengths[active] > at]):
        word = words[first[active] + at].astype(np.uint64)
        spare = 64 - 8 * np.minimum(lengths[active] - at, 8)
        hashes[active] = mix64(hashes[active] ^ (word & (np.uint64(2**64 - 1) >> spare.view(np.uint64))))
        at += 8
    return mix64(hashes ^ lengths.view(np.uint64))
