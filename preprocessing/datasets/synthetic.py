"""Generated data: tasks x scenarios with Zipf ids and labels of known probability, so the best possible AUC is known.

A row has a scenario s, ids i_f and numbers x_d. The score of task t is

    score_t = b[t, s] + a * sum_f g[s, f] * e_t(f, i_f) + c * sum_d v[t, d] * (x_d - 1/2)

and its label is Bernoulli(sigmoid(score_t)). The effect e_t(f, i) of an id has mean 0 and variance 1 over the ids and comes
from a hash of (seed, feature, id), so that a billion ids cost no memory. A multi-valued feature contributes the mean over its
list. g[s, f] says how much a scenario heeds a feature. Effects of neighbouring tasks have correlation `--conflict`.

With `--day K --drift X` it is the K-th day of a log that drifts. Each day a share X of the ids of each feature, frequent and
rare ones alike, gives way to ids that were never seen before: rank r has the id r + num_ids * (how often it has changed). And
effects move: e on day K is (1 - X) e on day K - 1 + sqrt(1 - (1 - X)^2) times a fresh draw, so that its variance stays 1 and
days that lie d apart have correlation (1 - X)^d. Ids then have vocabularies, to be extended from day to day.

With `--managed SLOTS` or `--hash BUCKETS` raw ids are 64-bit integers, positive and negative: a bijection of the numbers above,
by a hash of the feature. They become keys of managed tables, or buckets, on any day the same.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmlrec.errors import ConfigError
from mmlrec.hashing import mix64
from mmlrec.schema import Scenario, Task
from preprocessing.dataset import Column, Dataset, Hashing, Managed, dense, multi, natural, sparse
from preprocessing.reading.raw_files import RawFolder, RowFiles
from preprocessing.rows.zipf import Zipf
from preprocessing.split_rules import InOrder, RandomSplit, SplitRule
from preprocessing.writing.permutation import split_ends

CHUNK_ROWS = 1 << 16
_THREADS = 2
_AUC_ROWS = 1_000_000
_HEAD_IDS = 4096  # effects of the most frequent ids are kept; the others are hashed when drawn
_SPARSE_SCALE, _DENSE_SCALE = 1.2, 0.6  # standard deviation of the score's parts
_DRIFT = 0.1  # unless told
_DAY_STEP = 1 << 40  # from the numbers of chunks and features of one day to those of the next

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


class Synthetic(Dataset):
    """Rows are drawn chunk by chunk, each from its own counter-based generator: equal options give equal bytes."""

    name = "synthetic"
    summary = "generated tasks x scenarios, any number of rows and ids, with the best possible AUC known"
    split: SplitRule = InOrder()
    examples = """examples:
  python -m preprocessing synthetic --rows 1e6 --tasks 2 --scenarios 3 --out data/synthetic
  python -m preprocessing synthetic --rows 1e7 --sparse-features 26 --num-ids 10:1e8 --dense-features 13 --out data/large
  python -m preprocessing synthetic --rows 1e5 --num-ids 1000,500,20 --sparse-features 3 --conflict -0.8 --out data/conflict
  python -m preprocessing synthetic --rows 1e5 --day 1 --drift 0.1 --out data/day-01
  python -m preprocessing synthetic --day 2 --extend data/day-01 --out data/day-02
"""

    def __init__(self, options: argparse.Namespace) -> None:
        if not -1 <= options.conflict <= 1:
            raise ConfigError(f"--conflict must lie in -1..1, found {options.conflict}.")
        if not 0 <= options.multi_length <= 10_000:
            raise ConfigError(f"--multi-length must lie in 0..10000, found {options.multi_length}.")
        if hasattr(options, "drift") and not hasattr(options, "day"):
            raise ConfigError("--drift is that of a log of several days: give --day, too.")
        self._day: int | None = getattr(options, "day", None)
        self._drift: float = getattr(options, "drift", _DRIFT) if self._day is not None else 0.0
        if not 0 <= self._drift <= 1:
            raise ConfigError(f"--drift must lie in 0..1, found {self._drift}.")
        if self._day is not None:
            self.split = RandomSplit()
        self._days = self._day or 1
        self.num_rows: int = options.rows
        self._seed: int = options.seed
        self._num_tasks: int = options.tasks
        self._conflict: float = options.conflict
        num_features: int = options.sparse_features + options.multi_features
        num_ids = _ids_of_features(options.num_ids, num_features)
        names = [f"sparse_{f}" for f in range(options.sparse_features)] + [f"multi_{f}" for f in range(options.multi_features)]
        self._fields = [_Field(f, n, options.zipf, self) for f, n in enumerate(num_ids)]
        self._num_sparse: int = options.sparse_features
        self._mean_length: float = options.multi_length
        self._num_dense: int = options.dense_features
        makers = [sparse] * options.sparse_features + [multi] * options.multi_features
        if hasattr(options, "managed") and hasattr(options, "hash"):
            raise ConfigError("--managed and --hash exclude each other: both say what becomes of raw ids.")
        managed = Managed(options.managed) if hasattr(options, "managed") else None
        hashing = Hashing(options.hash) if hasattr(options, "hash") else None
        self._raw_ids = managed is not None or hashing is not None
        given = self._day is None and not self._raw_ids
        columns: list[Column] = [
            make(name, pa.int64(), num_ids=n if given else None, hashing=hashing, managed=managed)
            for make, name, n in zip(makers, names, num_ids, strict=True)
        ]
        self.features = (*columns, *(dense(f"dense_{d}", scaled=False) for d in range(self._num_dense)))
        self.tasks = tuple(Task(name=f"task_{t}") for t in range(self._num_tasks))
        self._num_scenarios: int = options.scenarios
        if self._num_scenarios > 1:
            self.scenario = Scenario(name="scenario", values=[f"s{s}" for s in range(self._num_scenarios)])
            if self._num_tasks == 1:
                self.next_config = f"{self.next_config} dataset.setting=msl"
        self.keys = {"user": pa.int64()}
        self.group_key = "user"
        self._draw_hidden(num_features)
        self._test: list[tuple[FloatArray, FloatArray, IntArray]] = []

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Sizes, distributions and the conflict of tasks."""
        add = parser.add_argument
        add("--rows", type=_count, default=1_000_000, help="rows over all splits (default: 1e6)")
        add("--sparse-features", type=_count, default=8, help="features with one id a row; the first is the user (default: 8)")
        add(
            "--num-ids",
            default="1000",
            help="distinct ids of each feature: one number, LOW:HIGH (log-spaced over the features), or a comma list, sparse"
            " features first, then multi (default: 1000)",
        )
        add("--dense-features", type=natural, default=4, help="numbers, uniform in [0, 1) (default: 4)")
        add("--multi-features", type=natural, default=0, help="features with a list of ids a row (default: 0)")
        add("--multi-length", type=float, default=5.0, help="mean length of the lists, Poisson; some are empty (default: 5)")
        add("--tasks", type=_count, default=2, help="(default: 2)")
        add("--scenarios", type=_count, default=1, help="of geometrically falling share; 1 = none (default: 1)")
        add(
            "--zipf",
            type=float,
            default=1.05,
            help="exponent: the k-th id has probability ~ k^-ZIPF; 0 = uniform (default: 1.05)",
        )
        add(
            "--conflict",
            type=float,
            default=0.5,
            help="correlation between the hidden effects of neighbouring tasks: 1 = same, 0 = unrelated, -1 = opposite"
            " (default: 0.5)",
        )
        # Absent unless given, so that what was made before there were days is still recognised as made with these options.
        add("--day", type=_count, default=argparse.SUPPRESS, help="which day of a log that drifts, from 1 on")
        add(
            "--drift",
            type=float,
            default=argparse.SUPPRESS,
            help=f"with --day: share of ids and effects that change from day to day (default: {_DRIFT})",
        )
        add(
            "--managed",
            type=_count,
            default=argparse.SUPPRESS,
            metavar="SLOTS",
            help="64-bit ids, in managed tables of so many",
        )
        add("--hash", type=_count, default=argparse.SUPPRESS, metavar="BUCKETS", help="64-bit ids, hashed to so many buckets")

    def _draw_hidden(self, num_features: int) -> None:
        """Draw b [T, S], g [S, F], v [T, D] and the scenarios' shares [S]."""
        random = np.random.Generator(np.random.Philox(key=[self._seed, 1 << 62]))
        num_tasks, num_scenarios = self._num_tasks, self._num_scenarios
        self._bias = random.normal(-0.5, 0.7, (num_tasks, 1)) + 0.4 * random.standard_normal((num_tasks, num_scenarios))
        heed = random.uniform(0.2, 1.8, (num_scenarios, num_features))
        if num_scenarios == 1:
            heed[:] = 1.0
        self._heed = (_SPARSE_SCALE * heed / np.sqrt((heed**2).sum(1, keepdims=True))).astype(np.float32)
        slopes = random.standard_normal((num_tasks, self._num_dense))
        deviation = np.sqrt((slopes**2).sum(1, keepdims=True) / 12) if self._num_dense else 1.0
        self._slopes = (_DENSE_SCALE * slopes / deviation).astype(np.float32)
        shares = 0.7 ** np.arange(num_scenarios)
        self._scenario_ends = np.cumsum(shares / shares.sum())[:-1]

    def row_files(self) -> list[RowFiles]:
        """None: rows are drawn."""
        return []

    def batches(self, raw: RawFolder) -> Iterator[pa.RecordBatch]:
        """Chunks in order, drawn a few ahead on two threads."""
        self._test = []
        with ThreadPoolExecutor(_THREADS) as pool:
            ahead: deque[Future[tuple[pa.RecordBatch, FloatArray, FloatArray, IntArray]]] = deque()
            starts = range(0, self.num_rows, CHUNK_ROWS)
            coming = iter(starts)
            for start in starts:
                while len(ahead) < 2 * _THREADS and (next_start := next(coming, None)) is not None:
                    ahead.append(pool.submit(self._chunk, next_start))
                batch, probability, label, scenario = ahead.popleft().result()
                self._remember_test(start, probability, label, scenario)
                yield batch

    def statistics(self) -> dict[str, Any]:
        """What the best model can reach, [task][all or scenario].

        Measured on the test split, or on the one split that holds all rows; at most on its first million rows.

        `bayes_auc`: AUC of the true probabilities against the drawn labels. `bayes_auc_expected`: the same over the
        distribution of the labels instead of one draw. Of a day of a log: `of_all_rows`, all splits together.
        """
        probability, label = (np.concatenate([part[k] for part in self._test], axis=1) for k in (0, 1))
        scenario = np.concatenate([part[2] for part in self._test])
        slices = {"all": np.ones(len(scenario), bool)}
        if self.scenario:
            slices |= {value: scenario == s for s, value in enumerate(self.scenario.values)}
        drawn: dict[str, dict[str, float | None]] = {}
        expected: dict[str, dict[str, float | None]] = {}
        for t, task in enumerate(self.tasks):
            drawn[task.name] = {n: auc(probability[t, rows], label[t, rows]) for n, rows in slices.items()}
            expected[task.name] = {n: auc(probability[t, rows], probability[t, rows]) for n, rows in slices.items()}
        found = {"bayes_auc": drawn, "bayes_auc_expected": expected, "bayes_auc_rows": len(scenario)}
        return found if self._day is None else {"of_all_rows": found}

    def _chunk(self, start: int) -> tuple[pa.RecordBatch, FloatArray, FloatArray, IntArray]:
        """Rows from `start`: the batch, true probabilities [T, n], labels [T, n], scenarios [n]."""
        num_rows = min(CHUNK_ROWS, self.num_rows - start)
        chunk = start // CHUNK_ROWS + _DAY_STEP * (self._days - 1)
        random = np.random.Generator(np.random.Philox(key=[self._seed, chunk]))
        scenario = np.searchsorted(self._scenario_ends, random.random(num_rows), side="right").astype(np.int64)
        score = self._bias.astype(np.float32)[:, scenario]
        columns: dict[str, pa.Array] = {}
        for f, (field, column) in enumerate(zip(self._fields, self.features, strict=False)):
            heed = self._heed[scenario, f]
            if f < self._num_sparse:
                ids, effect = field.draw(random, num_rows)
                columns[column.name] = pa.array(self.raw_ids(f, ids))
            else:
                lengths = random.poisson(self._mean_length, num_rows)
                ids, of_ids = field.draw(random, int(lengths.sum()))
                ends = np.cumsum(lengths)
                offsets = pa.array(np.append(0, ends).astype(np.int32))
                columns[column.name] = pa.ListArray.from_arrays(offsets, pa.array(self.raw_ids(f, ids)))
                effect = _list_means(of_ids, lengths, ends)
            effect *= heed
            score += effect
        numbers = random.random((self._num_dense, num_rows), dtype=np.float32)
        for d in range(self._num_dense):
            columns[f"dense_{d}"] = pa.array(numbers[d])
            # not one matrix product: its order of summation, so the last bit, varies with the machine
            score += self._slopes[:, d, None] * (numbers[d] - np.float32(0.5))
        probability = (np.float32(1) / (np.float32(1) + np.exp(-score))).astype(np.float32)
        label = (random.random(score.shape, dtype=np.float32) < probability).astype(np.float32)
        columns |= {f"label.task_{t}": pa.array(label[t]) for t in range(self._num_tasks)}
        if self.scenario:
            columns["sample.scenario"] = pa.array(scenario)
        columns["key.user"] = columns["sparse_0"]
        return pa.RecordBatch.from_pydict(columns, schema=self.canonical_schema()), probability, label, scenario

    def _remember_test(self, start: int, probability: FloatArray, label: FloatArray, scenario: IntArray) -> None:
        test_start = split_ends(self.num_rows)[1] if isinstance(self.split, InOrder) else 0
        rows = slice(max(test_start - start, 0), max(test_start + _AUC_ROWS - start, 0))
        if len(scenario[rows]):
            self._test.append((probability[:, rows].copy(), label[:, rows].copy(), scenario[rows].copy()))

    def effects(self, feature: int, ids: IntArray) -> FloatArray:
        """e_t(feature, id) of all tasks, [T, n] float32, each of mean 0 and variance 1 over the ids.

        sign * sqrt(|conflict|) * shared + sqrt(1 - |conflict|) * own, where the sign alternates over the tasks when
        conflict < 0. `shared` and `own` are uniform, 16 bits of the hash each. On later days of a log, see the module.
        """
        effects, kept = self._drawn_effects(feature, ids), np.float32(1 - self._drift)
        for day in range(1, self._days):
            effects = kept * effects + np.sqrt(1 - kept * kept) * self._drawn_effects(feature + _DAY_STEP * day, ids)
        return effects

    def _drawn_effects(self, feature: int, ids: IntArray) -> FloatArray:
        """One draw of the effects, another one for each number of a feature."""
        key = mix64(np.array([self._seed, feature], np.uint64))
        base = mix64(ids.astype(np.uint64) ^ key[0]) ^ key[1]
        words = [mix64(base + np.uint64(w)) for w in range(self._num_tasks // 4 + 1)]
        scale = np.float32(np.sqrt(12) / 65536)

        def uniform(j: int) -> FloatArray:
            bits = (words[j // 4] >> np.uint64(16 * (j % 4))).astype(np.uint16)
            return (bits.astype(np.float32) - np.float32(32767.5)) * scale

        shared = uniform(0) * np.float32(np.sqrt(abs(self._conflict)))
        own = np.float32(np.sqrt(1 - abs(self._conflict)))
        signs = [-1 if self._conflict < 0 and t % 2 else 1 for t in range(self._num_tasks)]
        return np.stack([sign * shared + own * uniform(1 + t) for t, sign in enumerate(signs)])

    def raw_ids(self, feature: int, ids: IntArray) -> IntArray:
        """What stands in a row for ids, [n]: themselves, or integers of 64 bits, one for each."""
        if not self._raw_ids:
            return ids
        return mix64(ids.view(np.uint64) ^ mix64(np.array([self._seed, feature], np.uint64))[1]).view(np.int64)

    def ids_of_ranks(self, feature: int, ranks: IntArray, num_ids: int) -> IntArray:
        """Which ids have these ranks on the day, of `num_ids` that a day has."""
        changes = np.zeros(len(ranks), np.int64)
        for day in range(1, self._days):
            key = mix64(np.array([self._seed, feature + _DAY_STEP * day], np.uint64))
            drawn = mix64(mix64(ranks.astype(np.uint64) ^ key[0]) + key[1])
            changes += (drawn >> np.uint64(11)) < self._drift * 2**53
        return ranks + num_ids * changes


class _Field:
    """One feature: its distribution of ids, and the effects of its most frequent ids."""

    def __init__(self, index: int, num_ids: int, exponent: float, data: Synthetic) -> None:
        self._index, self._data = index, data
        self._zipf, self._num_ids = Zipf(num_ids, exponent), num_ids
        self._head_ids = data.ids_of_ranks(index, np.arange(1 + min(num_ids, _HEAD_IDS)), num_ids)
        self._head = data.effects(index, self._head_ids)

    def draw(self, random: np.random.Generator, size: int) -> tuple[IntArray, FloatArray]:
        """Ids [size], 1..num_ids unless the log drifts, and their effects [T, size]."""
        ranks = self._zipf.draw(random, size)
        num_head = self._head.shape[1]
        effects = np.take(self._head, ranks, axis=1, mode="clip")
        ids = np.take(self._head_ids, ranks, mode="clip")
        tail = np.flatnonzero(ranks >= num_head)
        if tail.size:
            ids[tail] = self._data.ids_of_ranks(self._index, ranks[tail], self._num_ids)
            effects[:, tail] = self._data.effects(self._index, ids[tail])
        return ids, effects


def auc(score: FloatArray, positive: FloatArray) -> float | None:
    """AUC with ties counted half, of rows that are positive with the given probability (0 or 1 for drawn labels).

    Expected number of correctly ordered pairs of two different rows over the expected number of pairs. None for one class.
    """
    order = np.argsort(score, kind="stable")
    sorted_score, p = score[order], positive[order].astype(np.float64)
    starts = np.flatnonzero(np.append(True, sorted_score[1:] != sorted_score[:-1])) if len(p) else np.zeros(0, np.int64)
    if not len(p):
        return None
    up, down = np.add.reduceat(p, starts), np.add.reduceat(1 - p, starts)
    itself = float((p * (1 - p)).sum())
    correct = float((up * (np.cumsum(down) - down / 2)).sum()) - itself / 2
    pairs = float(up.sum() * down.sum()) - itself
    return correct / pairs if pairs > 0 else None


def _list_means(of_ids: FloatArray, lengths: IntArray, ends: IntArray) -> FloatArray:
    """Mean over each list, [T, n]; 0 for an empty one."""
    sums = np.zeros((of_ids.shape[0], of_ids.shape[1] + 1))
    np.cumsum(of_ids, axis=1, dtype=np.float64, out=sums[:, 1:])
    return ((sums[:, ends] - sums[:, ends - lengths]) / np.maximum(lengths, 1)).astype(np.float32)


def _ids_of_features(text: str, num_features: int) -> list[int]:
    try:
        if ":" in text:
            low, high = (_count(part) for part in text.split(":"))
            return [int(n) for n in np.rint(np.geomspace(low, high, num_features))]
        parts = [_count(part) for part in text.split(",")]
    except (ValueError, argparse.ArgumentTypeError):
        raise ConfigError(f"--num-ids {text}: give one number, LOW:HIGH, or a comma list of numbers, e.g. 1000:1e9.") from None
    if len(parts) not in (1, num_features):
        raise ConfigError(f"--num-ids {text}: {len(parts)} numbers for {num_features} features (sparse and multi together).")
    return parts * num_features if len(parts) == 1 else parts


def _count(text: str) -> int:
    if natural(text) < 1:
        raise argparse.ArgumentTypeError("1 or more is needed, found 0")
    return natural(text)


DATASETS = (Synthetic,)
