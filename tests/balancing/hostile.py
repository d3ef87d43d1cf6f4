"""Gram matrices of gradients as training hardly gives them, for the rules of all strategies."""

import numpy as np


def _gram(gradients) -> np.ndarray:
    gradients = np.asarray(gradients, dtype=np.float64)
    return gradients @ gradients.T


def _random(seed: int, count: int, rank: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, rank))


def _opposite(epsilon: float, length: float = 1.0) -> np.ndarray:
    return _gram([[1.0, 0.0], [-length, length * epsilon]])


ORDINARY = {f"random {count}": _gram(_random(count, count, 3 * count)) for count in range(2, 9)}
_FOUR, _SCALES = _random(4, 4, 12), (1e-10, 1e-5, 1e5, 1e10, 1e15)
#: Every gradient has a length, but there are fewer directions than gradients, or nearly so.
DEPENDENT = {
    "rank one, one side": _gram(np.outer([1.0, 3.0, 0.2], [1.0, 2.0])),
    "rank one, both sides": _gram(np.outer([1.0, -3.0, 0.2, 2.0], [1.0, 2.0])),
    "identical": np.ones((8, 8)),
    "rank two of six": _gram(_random(1, 6, 2)),
    "cancelling": _gram([*_random(2, 3, 5), -_random(2, 3, 5).sum(0)]),
    "opposite": _opposite(0.0),
    "opposite, of other lengths": _opposite(0.0, 1e4),
    "pairs of opposites": _gram([*_random(3, 3, 6), *-_random(3, 3, 6)]),
    **{f"nearly opposite, {epsilon:g}": _opposite(epsilon) for epsilon in (1e-3, 1e-6, 1e-9, 1e-12)},
    **{f"nearly identical, {epsilon:g}": _gram([[1.0, 0.0], [1.0, epsilon]]) for epsilon in (1e-3, 1e-6, 1e-9, 1e-12)},
}
#: All gradients of one set, longer or shorter.
SCALED = {f"all times {scale:g}": scale * _gram(_FOUR) for scale in _SCALES}
#: One gradient of a set, or each, of another length than the rest.
UNEVEN = {f"one times {scale:g}": _gram(_FOUR * [[scale**0.5], [1], [1], [1]]) for scale in _SCALES} | {
    "each of another length": _gram(_FOUR * [[1e-5], [1.0], [1e3], [1e7]]),
    "opposite and uneven": _opposite(1e-3, 1e6),
}
#: Objectives without a gradient.
ABSENT = {
    "all zero": np.zeros((3, 3)),
    "one zero": _gram([[1.0, 2.0], [0.0, 0.0], [-2.0, 0.5]]),
    "first zero": _gram([[0.0, 0.0], [1.0, 2.0], [-2.0, 0.5]]),
    "one left": _gram([[0.0, 0.0], [1.0, 2.0]]),
}
HOSTILE = ORDINARY | DEPENDENT | SCALED | UNEVEN | ABSENT
