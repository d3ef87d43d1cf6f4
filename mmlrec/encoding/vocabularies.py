"""Ids of values by vocabularies: one hash directory for all tables, in arrays that can be mapped from disk.

The entries of a table are sorted by the 64-bit hash of their values (mmlrec.hashing), and a directory tells for each value of
its leading bits where the entries begin. A look-up reads a place of the directory and compares the hashes of the few entries
there: it costs the same in a vocabulary of any size, and touches a handful of pages. An integer is known by its hash, which no
other one has; of a text the bytes are compared, too, so that equal hashes of different texts never give a wrong id.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmlrec.encoding.columns import valid
from mmlrec.hashing import UInt64Array, hash_ids

IntArray = NDArray[np.int64]
_SEED = 0
_WORD = 8


@dataclass(frozen=True)
class Text:
    """Some texts: their UTF-8 bytes one behind the other, with 8 more, and where each begins, [n + 1]."""

    starts: NDArray[np.signedinteger]
    content: NDArray[np.uint8]

    @classmethod
    def of(cls, values: pa.Array) -> Text:
        """Of string or large_string without nulls."""
        _, offset_buffer, data = values.buffers()
        width = np.int64 if pa.types.is_large_string(values.type) else np.int32
        offsets = np.frombuffer(offset_buffer, width)[values.offset :][: len(values) + 1] if len(values) else np.zeros(1, width)
        content = np.zeros(int(offsets[-1] - offsets[0]) + _WORD, np.uint8)
        if data is not None:
            content[:-_WORD] = np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]]
        return cls(offsets - offsets[0], content)

    def equal(self, rows: IntArray, other: Text, other_rows: IntArray) -> NDArray[np.bool_]:
        """[n], whether these texts are those of the other ones, byte for byte."""
        first, second = self.starts[rows].astype(np.int64), other.starts[other_rows].astype(np.int64)
        lengths = self.starts[rows + 1] - first
        same = lengths == other.starts[other_rows + 1] - second
        words, other_words = _words(self.content), _words(other.content)
        active, at = np.flatnonzero(same & (lengths > 0)), 0
        while len(active):
            beyond = np.maximum(_WORD - (lengths[active] - at), 0).astype(np.uint64) * np.uint64(8)
            differ = (words[first[active] + at] ^ other_words[second[active] + at]) << beyond != 0
            same[active[differ]] = False
            at += _WORD
            active = active[~differ & (lengths[active] > at)]
        return same


def _words(content: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The 8 bytes that begin at each byte but the last seven."""
    return np.ndarray((len(content) - _WORD + 1,), "<u8", content, strides=(1,))


@dataclass(frozen=True)
class Vocabularies:
    """Vocabularies of several tables; those of text first.

    Attributes:
        tables: table -> where its part of the directory begins, and by how many bits a hash is shifted to a place in it.
        directory: where the entries of each place begin, [places + 1] for each table.
        hashes, ids: of all entries.
        text: the values of the entries of text.
    """

    tables: dict[str, tuple[int, int]]
    directory: NDArray[np.unsignedinteger]
    hashes: UInt64Array
    ids: NDArray[np.signedinteger]
    text: Text

    @classmethod
    def of(cls, values: Mapping[str, Iterable[pa.Array]]) -> Vocabularies:
        """Of the values of each table in the order of their ids 1, 2, ...: chunks of int64, string or large_string."""
        found = {name: _Sorted.of(chunks) for name, chunks in values.items()}
        parts = {name: part for text in (True, False) for name, part in found.items() if (part.text is not None) == text}
        total = sum(len(part.hashes) for part in parts.values())
        tables, directories = {}, []
        first_place = first_entry = 0
        for name, part in parts.items():
            tables[name] = first_place, part.shift
            directories.append((part.directory + first_entry).astype(np.uint32 if total < 1 << 32 else np.uint64))
            first_place += len(part.directory)
            first_entry += len(part.hashes)
        ids = [(part.order + 1).astype(np.int32 if total < 1 << 31 else np.int64) for part in parts.values()]
        texts = [part.text for part in parts.values() if part.text is not None]
        return cls(
            tables,
            np.concatenate(directories) if directories else np.zeros(0, np.uint32),
            np.concatenate([part.hashes for part in parts.values()]) if parts else np.zeros(0, np.uint64),
            np.concatenate(ids) if ids else np.zeros(0, np.int32),
            _joined(texts),
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All arrays by name, for a file; `from_arrays` takes them."""
        return {
            "directory": self.directory,
            "hashes": self.hashes,
            "ids": self.ids,
            "starts": self.text.starts,
            "content": self.text.content,
        }

    @classmethod
    def from_arrays(cls, tables: dict[str, tuple[int, int]], arrays: dict[str, NDArray[Any]]) -> Vocabularies:
        """What `tables` and `arrays` tell, as it is: arrays may be mapped from a file."""
        text = Text(arrays["starts"], arrays["content"])
        return cls(tables, arrays["directory"], arrays["hashes"], arrays["ids"], text)

    def with_slots(self, slots: Mapping[str, tuple[UInt64Array, NDArray[np.signedinteger]]]) -> Vocabularies:
        """These, and behind them the maps of managed tables: keys, ascending, and the slot of each."""
        tables, directory, hashes, ids = dict(self.tables), [self.directory], [self.hashes], [self.ids]
        total = len(self.hashes) + sum(len(keys) for keys, _ in slots.values())
        kind: type[np.unsignedinteger[Any]] = np.uint32 if total < 1 << 32 else np.uint64
        for name, (keys, of_keys) in slots.items():
            shift, places = _directory(keys)
            tables[name] = sum(map(len, directory)), shift
            directory.append((places + sum(map(len, hashes))).astype(kind))
            hashes.append(keys)
            ids.append(of_keys.astype(self.ids.dtype))
        return Vocabularies(tables, np.concatenate(directory), np.concatenate(hashes), np.concatenate(ids), self.text)

    def slots(self, table: str, keys: IntArray) -> IntArray:
        """Rows of keys of a managed table whose map is here, [n]; 0 for one that holds no slot, and for a missing one."""
        first_place, shift = self.tables[table]
        return self.find(first_place, np.uint64(shift), keys.view(np.uint64), None)

    def look_up(self, table: str, values: pa.Array) -> IntArray:
        """Ids of values, int64 or string, [n]; 0 for null and for what is not in the vocabulary."""
        first_place, shift = self.tables[table]
        if pa.types.is_integer(values.type):
            ids = self.find(first_place, np.uint64(shift), hash_ids(values, _SEED), None)
        else:
            known = values.fill_null("") if values.null_count else values
            ids = self.find(first_place, np.uint64(shift), hash_ids(known, _SEED), Text.of(known))
        return np.where(valid(values), ids, 0) if values.null_count else ids

    def find(
        self, first_place: int | IntArray, shift: np.uint64 | UInt64Array, hashes: UInt64Array, text: Text | None
    ) -> IntArray:
        """Ids of values by their hashes, [n]; 0 for what is not in the vocabulary.

        Args:
            first_place, shift: of the table of each value (`tables`), or of all.
            text: the values themselves, where they are text.
        """
        places = (hashes >> shift).astype(np.int64) + first_place
        at, ends = self.directory[places].astype(np.int64), self.directory[places + 1].astype(np.int64)
        ids = np.zeros(len(hashes), np.int64)
        rows = np.flatnonzero(at < ends)
        while len(rows):
            here = at[rows]
            same = self.hashes[here] == hashes[rows]
            if text is not None:
                alike = np.flatnonzero(same)
                same[alike] = text.equal(rows[alike], self.text, here[alike])
            ids[rows[same]] = self.ids[here[same]]
            at[rows] += 1
            rows = rows[~same & (here + 1 < ends[rows])]
        return ids


@dataclass(frozen=True)
class _Sorted:
    """One vocabulary with its entries sorted by hash; `order` are their places in the vocabulary."""

    shift: int
    directory: IntArray
    hashes: UInt64Array
    order: IntArray
    text: Text | None

    @classmethod
    def of(cls, chunks: Iterable[pa.Array]) -> _Sorted:
        parts = list(chunks)
        hashes = np.concatenate([hash_ids(part, _SEED) for part in parts]) if parts else np.zeros(0, np.uint64)
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        shift, directory = _directory(hashes)
        text = None
        if parts and not pa.types.is_integer(parts[0].type):
            values = pa.chunked_array([part.cast(pa.large_string()) for part in parts], pa.large_string())
            text = Text.of(pc.take(values.combine_chunks(), pa.array(order)))
        return cls(shift, directory, hashes, order, text)


def _directory(hashes: UInt64Array) -> tuple[int, IntArray]:
    """By how many bits ascending hashes are shifted to their places, and where the entries of each place begin, and end."""
    bits = max(len(hashes).bit_length(), 1)
    return 64 - bits, directory_of(hashes, bits, np.int64)


def directory_of(hashes: UInt64Array, bits: int, kind: type[np.integer[Any]]) -> NDArray[Any]:
    """Where the entries of each value of the leading bits of ascending hashes begin, and end, [2^bits + 1] of a type."""
    directory = np.zeros((1 << bits) + 1, kind)
    places = (hashes >> np.uint64(64 - bits)).view(np.int64)
    np.cumsum(np.bincount(places, minlength=1 << bits), out=directory[1:])
    return directory


def _joined(texts: list[Text]) -> Text:
    """Texts one behind the other."""
    starts, contents, size = [np.zeros(1, np.int64)], [], 0
    for text in texts:
        starts.append(text.starts[1:] + size)
        contents.append(text.content[:-_WORD])
        size += len(contents[-1])
    return Text(np.concatenate(starts), np.concatenate([*contents, np.zeros(_WORD, np.uint8)]))
