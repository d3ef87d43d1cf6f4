"""Managed tables by plain dictionaries and one pass over all batches: the truth that training is compared with."""

from collections import Counter


class BruteForce:
    """Which key holds which slot of one table.

    Attributes:
        slots: key -> slot.
        tenures: key -> number of its tenure, each time a key gets a slot another one; 1, 2, ...
    """

    def __init__(
        self, num_slots: int, *, admit_after: int = 1, evict: str = "lfu", update_every: int = 1, bits: int = 0
    ) -> None:
        self.num_slots, self.admit_after, self.evict, self.update_every, self.bits = (
            *(num_slots, admit_after, evict, update_every, bits),
        )
        self.counts: Counter[int] = Counter()
        self.last: dict[int, int] = {}
        self.seen: set[int] = set()
        self.slots: dict[int, int] = {}
        self.tenures: dict[int, int] = {}
        self.num_tenures = self.admissions = self.evictions = self.step = 0
        self.evicted: list[tuple[int, int]] = []
        self.looked_up, self.without = [0], [0]  # between boundaries

    def train(self, keys: list[int]) -> list[int]:
        """One step on the keys of a global batch, 0 for a missing one; the tenure of each while it is looked up, 0 for none."""
        self.step += 1
        tenures = [self.tenures[key] if key in self.slots else 0 for key in keys]
        there = [key for key in keys if key != 0]
        self.looked_up[-1] += len(there)
        self.without[-1] += sum(key not in self.slots for key in there)
        self.counts.update(there)
        self.seen.update(there)
        self.last.update(dict.fromkeys(there, self.step))
        if self.step % self.update_every == 0:
            self._boundary()
        return tenures

    def _boundary(self) -> None:
        score = self.counts if self.evict == "lfu" else self.last
        for bucket in range(1 << self.bits):
            own = range(bucket * self.num_slots // (1 << self.bits) + 1, (bucket + 1) * self.num_slots // (1 << self.bits) + 1)
            candidates = [
                key
                for key in self.seen
                if key not in self.slots and self.counts[key] >= self.admit_after and unsigned(key) >> 64 - self.bits == bucket
            ]
            for key in sorted(candidates, key=lambda key: (-score[key], unsigned(key))):
                holders = {slot: holder for holder, slot in self.slots.items() if slot in own}
                free = [slot for slot in own if slot not in holders]
                if free:
                    self._give(key, free[0])
                    continue
                worst = min(holders.values(), key=lambda holder: (score[holder], -unsigned(holder)))
                if score[worst] >= score[key]:
                    break
                slot = self.slots.pop(worst)
                self.evictions += 1
                self.evicted.append((self.step, slot))
                self._give(key, slot)
        self.seen.clear()
        self.looked_up.append(0)
        self.without.append(0)

    def _give(self, key: int, slot: int) -> None:
        self.slots[key] = slot
        self.admissions += 1
        self.num_tenures += 1
        self.tenures[key] = self.num_tenures


def unsigned(key: int) -> int:
    return key % 2**64
