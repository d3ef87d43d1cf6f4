"""Small fakes of the Criteo logs in all their forms: text days, the Kaggle file, arrays with one or several ids."""

import numpy as np

NUMBERS = [f"int_{k}" for k in range(13)]
CATEGORIES = [f"cat_{k}" for k in range(26)]
#: Rows of the fake's tables, and ids a row of its multi-hot form.
TABLE_ROWS = [500, 40, *(3 + 7 * k for k in range(24))]
HOT_SIZES = [3, 2, 1, 2, 6, *(1 + k % 4 for k in range(21))]


def _lines(random, num_rows):
    """Empty fields, integers of -1, -3 and beyond 2^31, ids that begin with zeros, are common or come once."""
    numbers = np.where(random.random((num_rows, 13)) < 0.9, random.integers(-1, 300, (num_rows, 13)), random.integers(0, 2**33))
    numbers[::50, 1] = -3
    empty = random.random((num_rows, 39)) < 0.15
    common = random.integers(0, 2**32, (26, 400)) >> random.integers(0, 20, (26, 1))
    picked = (np.array(TABLE_ROWS).clip(max=400) * random.random((num_rows, 26)) ** 3).astype(int)
    ids = np.take_along_axis(common.T, picked, axis=0)
    once = random.random((num_rows, 26)) < 0.05
    ids = np.where(once, random.integers(0, 2**32, (num_rows, 26)), ids)
    click = random.random(num_rows) < 0.1 + 0.3 * (picked[:, 0] % 2)
    for row in range(num_rows):
        fields = [str(n) for n in numbers[row]] + [f"{i:08x}" for i in ids[row]]
        yield "\t".join([str(int(click[row])), *("" if e else f for f, e in zip(fields, empty[row], strict=True))]) + "\n"


def write_kaggle(folder, num_rows=2000, seed=0):
    folder.mkdir(parents=True)
    (folder / "train.txt").write_text("".join(_lines(np.random.default_rng(seed), num_rows)))
    return folder


def write_days(folder, days=(0, 1, 2), num_rows=1000, seed=0):
    """Each day some rows longer than the one before."""
    folder.mkdir(parents=True)
    for day in days:
        random = np.random.default_rng([seed, day])
        (folder / f"day_{day}").write_text("".join(_lines(random, num_rows + 100 * day)))
    return folder


def write_arrays(folder, multi_hot, days=(0, 1, 2), num_rows=1000, seed=0):
    """DLRM's layout; with `multi_hot` MLPerf's."""
    folder.mkdir(parents=True)
    for day in days:
        random, rows = np.random.default_rng([seed, day]), num_rows + 100 * day
        np.save(folder / f"day_{day}_labels.npy", random.integers(0, 2, (rows, 1), dtype=np.int32))
        np.save(folder / f"day_{day}_dense.npy", np.log(random.integers(2, 300, (rows, 13))).astype(np.float32))
        if multi_hot:
            ids = {
                str(k): random.integers(0, n, (rows, hot), dtype=np.int32)
                for k, (n, hot) in enumerate(zip(TABLE_ROWS, HOT_SIZES, strict=True))
            }
            np.savez(folder / f"day_{day}_sparse_multi_hot.npz", **ids)
        else:
            np.save(folder / f"day_{day}_sparse.npy", random.integers(0, TABLE_ROWS, (rows, 26)).astype(np.int32))
    return folder
