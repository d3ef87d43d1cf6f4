"""Counting, buckets and the rule of one boundary after the other, on any number of ranks, against plain dictionaries."""

from types import SimpleNamespace

import numpy as np
import pytest

from mmlrec.config import ManagedConfig
from mmlrec.schema import Table
from mmlrec.slots import occurrences
from mmlrec.slots.buckets import Buckets
from mmlrec.slots.managed import ManagedTables
from mmlrec.slots.occurrences import Gathered, KeyCounts, Occurrences
from mmlrec.slots.rule import OwnBuckets
from mmlrec.slots.slot_map import SlotMap, map_bytes
from tests.slots.brute_force import BruteForce
from tests.slots.support import keys_of

STEPS = 60


def stream(seed: int) -> list[np.ndarray]:
    """Keys of each step: ids that come and go, some of them often, some missing."""
    rng = np.random.default_rng(seed)
    steps = []
    for step in range(STEPS):
        ids = np.minimum(rng.zipf(1.2, 40), 60) + step // 2
        steps.append(keys_of(np.where(rng.random(40) < 0.1, 0, ids)))
    return steps


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("admit_after", [1, 3])
@pytest.mark.parametrize("evict", ["lfu", "lru"])
@pytest.mark.parametrize(("num_slots", "bits"), [(1, 0), (13, 0), (13, 2), (29, 3)])
def test_each_boundary_is_that_of_plain_dictionaries(world_size, admit_after, evict, num_slots, bits):
    buckets, every = Buckets(num_slots, bits), 3
    config = ManagedConfig(admit_after=admit_after, evict=evict, update_every=every)
    own = [OwnBuckets(buckets, buckets.of_rank(rank, world_size), config) for rank in range(world_size)]
    fed = [Gathered() for _ in range(world_size)]
    truth = BruteForce(num_slots, admit_after=admit_after, evict=evict, update_every=every, bits=bits)
    found = SlotMap(num_slots)
    for step, keys in enumerate(stream(num_slots + admit_after), start=1):
        for rank, part in enumerate(np.array_split(keys, world_size)):
            fed[rank].add(part.view(np.uint64), step)
        truth.train(keys.tolist())
        if step % every:
            continue
        everything = Occurrences.joined([of_rank.take() for of_rank in fed])
        for rank, of_rank in enumerate(own):
            places = buckets.places(everything.keys, buckets.of_rank(rank, world_size))
            of_rank.arrived = Occurrences(*(column[places[0] : places[-1]] for column in everything))
        changes = [np.concatenate(columns) for columns in zip(*(of_rank.update() for of_rank in own), strict=True)]
        found.change(np.sort(changes[2][changes[2] != 0]), changes[0], changes[1])
        assert dict(zip(found.keys.view(np.int64).tolist(), found.slots.tolist(), strict=True)) == truth.slots
    assert truth.evictions >= (1 if num_slots == 1 else 5)
    asked = keys_of(np.arange(200))
    assert found.look_up(asked.view(np.uint64)).tolist() == [truth.slots.get(key, 0) for key in asked.tolist()]
    if own[0].others is not None:
        counts = {}
        for of_rank in own:
            held = (of_rank.holders.keys, of_rank.holders.counts)
            for keys, numbers in (held, of_rank.others.entries()):
                assert np.all(keys[1:] > keys[:-1])
                counts |= dict(zip(keys.view(np.int64).tolist(), numbers.tolist(), strict=True))
        assert counts == truth.counts
    elif evict == "lru":
        assert all(of_rank.holders.last.max(initial=0) <= STEPS for of_rank in own)


@pytest.mark.parametrize("num_slots", [1, 3, (1 << 15) - 1, 1 << 15, 10**5, 10**8])
def test_buckets_share_out_slots_and_keys_whatever_the_ranks(num_slots):
    buckets = Buckets.of(num_slots)
    assert buckets.count == 1 if num_slots < 1 << 15 else num_slots // buckets.count >= 1 << 14
    firsts = [buckets.first_slot(bucket) for bucket in range(buckets.count + 1)]
    assert (firsts[0], firsts[-1]) == (1, num_slots + 1)
    assert max(np.diff(firsts)) - min(np.diff(firsts)) <= 1
    for world_size in (1, 2, 3, 7, 2000):
        owned = [bucket for rank in range(world_size) for bucket in buckets.of_rank(rank, world_size)]
        assert owned == list(range(buckets.count))
    keys = np.sort(np.append(keys_of(np.arange(1, 1000)).view(np.uint64), np.uint64(2**64 - 1)))
    places = buckets.places(keys, range(buckets.count))
    owners = np.repeat(np.arange(buckets.count), np.diff(places))
    assert owners.tolist() == [int(key) >> 64 - buckets.bits for key in keys]


def test_counts_are_exact_whenever_new_keys_are_put_among_the_others(monkeypatch):
    monkeypatch.setattr(occurrences, "_LEAST", 8)
    monkeypatch.setattr(occurrences, "_GATHERED", 50)
    rng = np.random.default_rng(3)
    counts, truth = KeyCounts(np.zeros(0, np.uint64), np.zeros(0, np.uint32)), {}
    for _ in range(200):
        gathered = Gathered()
        ids = [rng.integers(0, 150, rng.integers(0, 30)).astype(np.uint64) for _ in range(4)]
        for step, part in enumerate(ids):
            gathered.add(part, step)
        seen = gathered.take()
        everything = np.concatenate(ids)
        assert seen.keys.tolist() == sorted({*everything.tolist()} - {0})
        assert seen.counts.tolist() == [int((everything == key).sum()) for key in seen.keys]
        assert seen.last.tolist() == [max(step for step, part in enumerate(ids) if key in part) for key in seen.keys]
        for key, count in zip(seen.keys.tolist(), seen.counts.tolist(), strict=True):
            truth[key] = truth.get(key, 0) + count
        assert counts.add(seen.keys, seen.counts).tolist() == [truth[key] for key in seen.keys.tolist()]
        gone = np.unique(rng.choice(150, 3)).astype(np.uint64)
        counts.remove(gone)
        for key in gone.tolist():
            truth.pop(key, None)
    keys, numbers = counts.entries()
    assert dict(zip(keys.tolist(), numbers.tolist(), strict=True)) == truth


def test_a_count_stays_at_the_largest_number_there_is_room_for():
    counts = KeyCounts(np.array([5], np.uint64), np.array([2**32 - 3], np.uint32))
    assert counts.add(np.array([5, 6], np.uint64), np.array([7, 2**33])).tolist() == [2**32 - 1, 2**32 - 1]
    own = OwnBuckets(Buckets(1, 0), range(1), ManagedConfig())
    for count in (2**33, 1):
        own.arrived = Occurrences(np.array([9], np.uint64), np.array([count]), np.array([1]))
        own.update()
    assert own.holders.counts.tolist() == [2**32 - 1]


def test_a_map_takes_the_bytes_that_a_plan_counts():
    found = SlotMap(1000)
    found.change(
        np.zeros(0, np.uint64), np.sort(keys_of(np.arange(1, 1001)).view(np.uint64)), np.arange(1, 1001, dtype=np.int32)
    )
    entries = found._entries
    assert sum(array.nbytes for array in (entries.directory, entries.hashes, entries.ids)) == map_bytes(1000) + 4


@pytest.mark.parametrize("evict", ["lfu", "lru"])
def test_a_run_begins_with_the_keys_of_another_the_best_first(evict):
    keys = np.sort(keys_of(np.arange(1, 31)).view(np.uint64))
    counts = np.random.default_rng(0).integers(1, 8, 30)
    last = np.random.default_rng(1).permutation(30)
    held, others = (Occurrences(keys[part::3], counts[part::3], last[part::3]) for part in (0, 1))
    begun = []
    for rank in range(2):
        world = SimpleNamespace(rank=rank, world_size=2)
        table = Table(name="t", num_rows=7, managed=True, hash_seed=1)
        manifest = SimpleNamespace(sparse_features=[SimpleNamespace(table="t")], tables=[table])
        managed = ManagedTables(manifest, ManagedConfig(evict=evict, admit_after=2), world)
        slots = managed.begin("t", held, others)
        begun.append((slots.tolist(), {name: tensor.tolist() for name, tensor in managed.tensors(history=True).items()}))
    assert begun[0][0] == begun[1][0]
    score = held.counts if evict == "lfu" else held.last
    order = sorted(range(10), key=lambda row: (-score[row], held.keys[row]))
    assert begun[0][0] == [order.index(row) + 1 if order.index(row) < 6 else 0 for row in range(10)]
    chosen = sorted(order[:6])
    kept = begun[0][1]
    assert kept["managed.t.0.keys"] == held.keys.view(np.int64)[chosen].tolist()
    assert kept["managed.t.0.counts"] == held.counts[chosen].tolist()
    left = {key: count for part in (held, others) for key, count in zip(part.keys, part.counts, strict=True)}
    left = {key: count for key, count in left.items() if key not in held.keys[chosen]}
    assert kept["managed.t.0.other_keys"] == np.sort(np.array([*left], np.uint64)).view(np.int64).tolist()
    assert kept["managed.t.0.other_counts"] == [left[key] for key in sorted(left)]
    assert begun[1][1]["managed.t.1.keys"] == begun[1][1]["managed.t.1.other_keys"] == []
