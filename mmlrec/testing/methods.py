"""The contract of methods.

In a test file of one's own:

    from mmlrec.testing.methods import MethodContract

    class TestMyMethod(MethodContract):
        method = MyMethod
        options = {"num_experts": 3, "expert_hidden_units": [7, 5]}  # small sizes: a test takes milliseconds

It is the one under which this repository's methods are; its tests of several ranks (tests/training/test_method_parity.py) need
the repository.
"""

from __future__ import annotations

from mmlrec.testing.compiled import Compiled
from mmlrec.testing.invariants import Invariants
from mmlrec.testing.stability import Stability
from mmlrec.testing.tied_heads import TiedHeads


class MethodContract(Invariants, Stability, Compiled, TiedHeads):
    """What holds for every method, in every setting that it is defined for; `MethodCases` says what a subclass may set."""
