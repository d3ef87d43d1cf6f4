"""Floating-point operations of one row's forward pass, by formula: what a method has to compute, whatever the code does.

A multiply-add counts as 2; only matrix products, mixtures and dot products count. With scenarios, what only a row's own
scenario needs is counted once, not S times. Sizes are the defaults of the methods' options.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

HIDDEN = (256, 128)
K = HIDDEN[-1]
EXPERTS = 4
GATE = TOWER = 64


@dataclass(frozen=True)
class Case:
    """A shape of the network's input and heads.

    Attributes:
        tasks: T.
        scenarios: S; 1 without scenarios.
    """

    num_fields: int
    dim: int
    num_dense: int
    tasks: int
    scenarios: int

    @property
    def width(self) -> int:
        """d_in."""
        return self.num_fields * self.dim + self.num_dense

    @property
    def heads(self) -> int:
        """H."""
        return self.tasks * self.scenarios


def mm(width: int, hidden: Sequence[int] = HIDDEN) -> int:
    """A chain of linear layers."""
    return sum(2 * i * o for i, o in zip((width, *hidden), hidden, strict=False))


def tower(width: int = K) -> int:
    """One tower, its logit included."""
    return mm(width, (TOWER, 1))


def gate(width: int, outputs: int) -> int:
    """One gate over some experts."""
    return mm(width, (GATE, outputs))


def mlp(case: Case) -> int:
    """One network, one logit."""
    return mm(case.width, (*HIDDEN, 1))


def single_task(case: Case) -> int:
    """A network for each task; of the scenarios only the own."""
    return case.tasks * (mm(case.width) + tower())


def shared_bottom(case: Case) -> int:
    """Bottom and towers."""
    return mm(case.width) + case.tasks * tower()


def mmoe(case: Case) -> int:
    """Experts, gates, mixtures, towers."""
    return EXPERTS * mm(case.width) + case.tasks * (gate(case.width, EXPERTS) + 2 * EXPERTS * K + tower())


def ple(case: Case) -> int:
    """Two levels of 3 specific experts for each head and 2 shared ones; the last for the own scenario only."""
    specific, shared = 3, 2
    every = case.heads * specific + shared
    first = every * (mm(case.width) + 2 * K) + case.heads * (gate(case.width, specific + shared) + 2 * (specific + shared) * K)
    first += gate(case.width, every)
    own = case.tasks * specific + shared
    return first + own * mm(K) + case.tasks * (gate(K, specific + shared) + 2 * (specific + shared) * K + tower())


def cross_stitch(case: Case) -> int:
    """All heads' networks, scalar stitches, own towers."""
    return case.heads * mm(case.width) + 2 * case.heads**2 * sum(HIDDEN) + case.tasks * tower()


def _snr(case: Case, connection: Callable[[int], int]) -> int:
    layers = EXPERTS * mm(case.width)
    return layers + EXPERTS * (EXPERTS * connection(HIDDEN[0]) + case.tasks * connection(K)) + case.tasks * tower()


def snr_trans(case: Case) -> int:
    """A matrix for each connection."""
    return _snr(case, lambda width: 2 * width**2)


def snr_aver(case: Case) -> int:
    """A number for each connection."""
    return _snr(case, lambda width: 2 * width)


def esmm(case: Case) -> int:
    """Two networks with a logit each."""
    return 2 * mlp(case)


def escm2_dr(case: Case) -> int:
    """Three networks with a logit each."""
    return 3 * mlp(case)


def aitm(case: Case) -> int:
    """Networks, and for each step a transfer and the attention over two candidates."""
    step = 2 * K**2 + 2 * (3 * 2 * K**2 + 2 * K + 2 * K)
    return case.tasks * (mm(case.width) + 2 * K) + (case.tasks - 1) * step


def hmoe(case: Case) -> int:
    """Experts and one gate; all towers, and for each task the own weights of their mixture, over scenarios or else tasks."""
    mixed = case.scenarios if case.scenarios > 1 else case.tasks
    experts = EXPERTS * mm(case.width) + gate(case.width, EXPERTS) + 2 * EXPERTS * K
    return experts + case.heads * tower() + case.tasks * gate(case.width, mixed)


def star(case: Case) -> int:
    """A star network for each task of a row's own scenario; with scenarios the auxiliary network, too."""
    aux = mm(case.width + case.dim, (64, 1)) if case.scenarios > 1 else 0
    return case.tasks * mlp(case) + aux


def apg(case: Case) -> int:
    """Low-rank layers with a generated core: one for each row from a field, or with scenarios one for each of them."""
    total = 0
    for i, o in ((case.width, HIDDEN[0]), HIDDEN):
        k = -(-min(i, o) // 4)
        total += 2 * k * (i + k + o)
        total += 2 * case.dim * (k * k + k) if case.scenarios == 1 else 0
    return total + case.tasks * 2 * K


def pepnet(case: Case, epnet_hidden: int = 128, prior: int = 2) -> int:
    """Gate on the input where there are scenarios, a gate on each hidden layer of all towers, the towers."""
    total = mm(case.width + case.dim, (epnet_hidden, case.width)) if case.scenarios > 1 else 0
    for width in HIDDEN:
        total += mm(case.width + prior * case.dim, (case.tasks * width, case.tasks * width))
    return total + case.tasks * mlp(case)


#: Method, or method and variant -> operations.
FORWARD: dict[str, Callable[[Case], int]] = {
    "single_task": single_task,
    "mlp": mlp,
    "shared_bottom": shared_bottom,
    "mmoe": mmoe,
    "ple": ple,
    "cross_stitch": cross_stitch,
    "snr": snr_trans,
    "snr aver": snr_aver,
    "mssm": snr_trans,
    "esmm": esmm,
    "aitm": aitm,
    "escm2": esmm,
    "escm2 dr": escm2_dr,
    "star": star,
    "apg": apg,
    "hmoe": hmoe,
    "pepnet": pepnet,
}
