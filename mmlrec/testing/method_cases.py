"""What the contract asks about a method: its class, its options, and in what it differs from others by design."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch

from mmlrec.models.base.model import ModelSpec, MultiTaskModel
from mmlrec.schema import Setting
from mmlrec.testing.contract import Contract
from mmlrec.testing.networks import SHAPES, build, spec_of


class MethodCases(Contract):
    """A subclass sets `method`; the rest only where a test asks for more than the method promises, with a reason beside it."""

    #: The class that is tested.
    method: ClassVar[type[MultiTaskModel]]
    #: Options of the tested networks. For sizes that are not among them see `TINY` in networks.py.
    options: ClassVar[dict[str, Any]] = {}

    #: Options that the defaults lack in MTL.
    mtl_options: ClassVar[dict[str, Any]] = {}
    #: Options with which it learns any labels by heart.
    overfit_options: ClassVar[dict[str, Any]] = {}
    #: All tasks' logits rank the rows alike: it cannot learn labels of several tasks by heart.
    ranks_tasks_alike: ClassVar[bool] = False
    #: The gradient of what a scenario owns depends on rows of others, through a layer that heads exchange.
    exchanges_gradients: ClassVar[bool] = False
    #: There is no loss where the first task has no label.
    needs_first_label: ClassVar[bool] = False
    #: Beginnings of shared parameters' names that one head alone trains in MTL.
    trained_by_one: ClassVar[tuple[str, ...]] = ()
    #: It has weights for every pair of heads or tasks, so that heads of MTMSL cannot be tied to those of MSL.
    pairwise: ClassVar[bool] = False
    #: Further options with which they can be.
    tied_options: ClassVar[tuple[dict[str, Any], ...]] = ()

    @pytest.fixture(autouse=True)
    def one_thread(self) -> Iterator[None]:
        """Tiny tensors: a second thread only costs time."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    def build(self, spec: ModelSpec, **options: Any) -> MultiTaskModel:
        """A tiny network of the method."""
        return build(self.method, spec, **(self.options | options))

    def shapes(self) -> list[str]:
        """The shapes, of those in networks.py, that the method is defined for."""
        return [shape for shape in SHAPES if spec_of(shape).setting in self.method.settings]

    def shapes_with_scenarios(self) -> list[str]:
        """Those with several scenarios."""
        return [shape for shape in self.shapes() if shape != "mtl"]

    def small_shapes(self) -> list[str]:
        """Those with few heads."""
        return [shape for shape in self.shapes() if shape != "msl-many"]

    def widest_first(self) -> list[str]:
        """The same as `shapes`, the setting with most heads first."""
        return [shape for shape in ("mtmsl", "mtl", "msl", "msl-many") if shape in self.shapes()]

    def ties(self) -> list[dict[str, Any]]:
        """Options to tie heads with; none where the method is not for both MSL and MTMSL."""
        return [{}, *self.tied_options] if {Setting.MSL, Setting.MTMSL} <= set(self.method.settings) else []
