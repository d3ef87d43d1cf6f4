"""Key -> slot of one managed table: sorted keys with a directory, the same on every rank, changed only as a whole."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmlrec.encoding.vocabularies import IntArray, Text, Vocabularies, directory_of
from mmlrec.hashing import UInt64Array

SlotArray = NDArray[np.int32]
_NO_TEXT = Text(np.zeros(1, np.int64), np.zeros(8, np.uint8))
#: Of the key and the slot of an entry; the directory has 4 for each of its places, of which there are one to two for a slot.
_ENTRY_BYTES = 12


class SlotMap:
    """Which key holds which slot; at first none does.

    Args:
        num_slots: S of the table, below 2^31.

    Attributes:
        keys: [n] sorted; never 0.
        slots: [n], the slot 1..S of each.
    """

    def __init__(self, num_slots: int) -> None:
        self._bits = num_slots.bit_length()
        self.replace(np.zeros(0, np.uint64), np.zeros(0, np.int32))

    def replace(self, keys: UInt64Array, slots: SlotArray) -> None:
        """Take these entries in place of all; keys are sorted."""
        self.keys, self.slots = keys, slots
        shift = 64 - self._bits
        directory = directory_of(keys, self._bits, np.uint32)
        self._entries = Vocabularies({"": (0, shift)}, directory, keys, slots, _NO_TEXT)
        self._shift = np.uint64(shift)

    def change(self, gone: UInt64Array, keys: UInt64Array, slots: SlotArray) -> None:
        """Take some keys out, which hold slots, and put others in, which do not; all of them sorted."""
        stay = np.ones(len(self.keys), np.bool_)
        stay[np.searchsorted(self.keys, gone)] = False
        left = self.keys[stay]
        at = np.searchsorted(left, keys)
        self.replace(np.insert(left, at, keys), np.insert(self.slots[stay], at, slots))

    def look_up(self, keys: UInt64Array) -> IntArray:
        """The slot of each key, [n]; 0 for one that holds none."""
        return self._entries.find(0, self._shift, keys, None)


def map_bytes(num_slots: int) -> int:
    """Bytes that the map of a table takes on each rank, once all its slots are held."""
    return _ENTRY_BYTES * num_slots + 4 * (1 << num_slots.bit_length())
