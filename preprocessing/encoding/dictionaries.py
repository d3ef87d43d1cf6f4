"""Raw values of many tables as integer codes, within a bound of memory.

A table's dictionary that grows too large is written to disk and a new one is begun, so that a value may have a code in each
*generation*. preprocessing/encoding/ranking.py brings the generations together again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from preprocessing.encoding.value_index import Codes, Hashes, ValueIndex, spread


class Dictionary:
    """The codes of one table's values; for several threads. Made by `Dictionaries`."""

    def __init__(self, raw_type: pa.DataType, path: Path, owner: Dictionaries) -> None:
        self._raw_type, self._path, self._owner = raw_type, path, owner
        self._lock = Lock()
        self._index = ValueIndex(raw_type)
        self.num_bytes = 0
        #: Number of codes of each generation that is on disk.
        self._closed: list[int] = []

    def code(self, local: pa.DictionaryArray, hashes: Hashes) -> tuple[int, Codes]:
        """Generation, and code of each value in it, [n] int32, -1 for null.

        Args:
            local: the values, in a dictionary of their own.
            hashes: `hash_words` of its entries.
        """
        with self._lock:
            generation = len(self._closed)
            codes = self._index.codes(local.dictionary, hashes)
            if self._owner.too_large(self, self._index.num_bytes):
                self._close()
        return generation, spread(codes, local, np.int32(-1))

    def finish(self) -> None:
        """No value is left to code: keep the values alone, on disk where others are there already."""
        if self._closed:
            self._close()
        else:
            self._index.finish()

    @property
    def sizes(self) -> list[int]:
        """Number of codes of each generation."""
        return [*self._closed, len(self._index)]

    def values(self, generation: int) -> pa.ChunkedArray:
        """The values of a generation in the order of their codes; strings as large_string."""
        if generation == len(self._closed):
            return self._index.values()
        with pa.OSFile(str(self._file(generation)), "rb") as file:
            return pa.ipc.open_stream(file).read_all()["value"]

    def _close(self) -> None:
        values = pa.table({"value": self._index.values()})
        with pa.OSFile(str(self._file(len(self._closed))), "wb") as file, pa.ipc.new_stream(file, values.schema) as stream:
            stream.write_table(values)
        self._closed.append(len(self._index))
        self._index = ValueIndex(self._raw_type)
        self._owner.too_large(self, 0)

    def _file(self, generation: int) -> Path:
        return self._path.with_name(f"{self._path.name}-{generation}.arrow")


class Dictionaries:
    """A dictionary for each table. When all together exceed `limit_bytes`, the largest goes to disk."""

    def __init__(self, raw_types: dict[str, pa.DataType], folder: Path, limit_bytes: int) -> None:
        self._limit_bytes, self._num_bytes = limit_bytes, 0
        self._lock = Lock()
        folder.mkdir(parents=True)
        self.tables = {name: Dictionary(kind, folder / str(k), self) for k, (name, kind) in enumerate(raw_types.items())}

    def too_large(self, dictionary: Dictionary, num_bytes: int) -> bool:
        """Whether this one, which takes as much by now, must go to disk. A larger one will, when its turn comes."""
        with self._lock:  # one sum for all: there may be ten thousand tables
            self._num_bytes += num_bytes - dictionary.num_bytes
            dictionary.num_bytes = num_bytes
            if self._num_bytes <= self._limit_bytes:
                return False
            return num_bytes == max(table.num_bytes for table in self.tables.values())


class ArrayStore:
    """Arrays by key, of which those used last are kept in memory; for several threads.

    An array that is changed must have been taken out since any other was, by one thread.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit_bytes, self._num_bytes = folder, limit_bytes, 0
        folder.mkdir(parents=True)
        self._kept: OrderedDict[Hashable, NDArray[Any]] = OrderedDict()
        self._paths: dict[Hashable, Path] = {}
        self._lock = Lock()

    def put(self, key: Hashable, array: NDArray[Any]) -> None:
        """Add an array."""
        with self._lock:
            self._paths[key] = self._folder / f"{len(self._paths)}.npy"
            self._keep(key, array)

    def get(self, key: Hashable) -> NDArray[Any]:
        """The array of a key."""
        with self._lock:
            if key not in self._kept:
                self._keep(key, np.load(self._paths[key]))
            self._kept.move_to_end(key)
            return self._kept[key]

    def _keep(self, key: Hashable, array: NDArray[Any]) -> None:
        self._num_bytes += array.nbytes - (self._kept[key].nbytes if key in self._kept else 0)
        self._kept[key] = array
        while len(self._kept) > 1 and self._num_bytes > self._limit_bytes:
            oldest, content = self._kept.popitem(last=False)
            self._num_bytes -= content.nbytes
            np.save(self._paths[oldest], content)
