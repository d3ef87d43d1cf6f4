"""The network of a run as one graph for batches of any size: from looked-up vectors to final scores."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mmlrec.errors import UserError
from mmlrec.layers.scenario import dense_dispatch
from mmlrec.models.base.chain import ChainModel
from mmlrec.models.base.model import MultiTaskModel

Format = Literal["pt2", "onnx"]


class Scorer(nn.Module):
    """A network and what makes its logits scores, as `apps.predict` writes them.

    A probability of a binary task, a value in the unit of its labels of a regression task. Of a chain also `cvr`, the last step
    given the first (a ratio that may be above 1 where steps are not `conditional`), and `ctr` and `ctcvr`, its first and last
    step, unless tasks have these names. A task without a trained head is left out; where it has heads for other scenarios only,
    a row's score is NaN.

    Args:
        network: on the CPU; put into evaluation.
        scales: regression task -> mean and deviation of the labels that it is trained on; those without one keep their unit.
    """

    trained: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, network: MultiTaskModel, scales: Mapping[str, tuple[float, float]]) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        spec = network.spec
        heads = list(network.branches) or range(spec.num_heads)
        trained = torch.isin(torch.arange(spec.num_heads), torch.tensor(heads)).view(spec.num_tasks, -1)
        #: Columns of the logits that are scores.
        self.columns = [task for task in range(spec.num_tasks) if bool(trained[task].any())]
        tasks = [spec.tasks[task] for task in self.columns]
        self.binary = [task.kind == "binary" for task in tasks]
        of_tasks = torch.tensor([scales.get(task.name, (0.0, 1.0)) for task in tasks])
        self.register_buffer("mean", of_tasks[:, 0].clone())
        self.register_buffer("deviation", of_tasks[:, 1].clone())
        self.register_buffer("trained", trained[self.columns].t().contiguous())  # [S, outputs]
        self.some_missing = not bool(trained[self.columns].all())
        #: The names of the scores, in order.
        self.outputs = [task.name for task in tasks]
        #: Of a chain: further names, and whether cvr is one of them.
        self.steps: list[int] = []
        self.with_cvr = False
        if isinstance(network, ChainModel):
            self.with_cvr = "cvr" not in self.outputs
            known = set(self.outputs)
            self.outputs += ["cvr"] * self.with_cvr
            for name, step in (("ctr", network.chain[0]), ("ctcvr", network.chain[-1])):
                if name not in known:
                    self.outputs.append(name)
                    self.steps.append(step)

    def example(self, rows: int) -> tuple[Tensor, Tensor]:
        """Inputs of so many rows: x [B, d_in], or [B, U, d_in] of U > 1 branches with tables of their own, and scenario [B]."""
        network, spec = self.network, self.network.spec
        lead = (rows, len(network.branches)) if len(network.branches) > 1 else (rows,)
        generator = torch.Generator().manual_seed(0)
        return torch.randn(*lead, spec.input_width, generator=generator), torch.arange(rows) % spec.num_scenarios

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """Scores [B, outputs] float32 of x [B, d_in] or [B, U, d_in] float32 and scenario [B] int64."""
        spec = self.network.spec
        if len(self.network.branches) == 1:
            x = x.unsqueeze(1)
        views = x.split([*spec.fields.values(), spec.num_dense], dim=-1)
        logits = self.network(x, dict(zip(spec.fields, views, strict=False)), scenario).logits.float()
        values = logits[:, self.columns] if len(self.columns) < spec.num_tasks else logits
        if all(self.binary):
            scores = torch.sigmoid(values)
        else:
            scores = values * self.deviation + self.mean
            if any(self.binary):
                scores = torch.where(torch.tensor(self.binary), torch.sigmoid(values), scores)
        if self.some_missing:
            scores = torch.where(self.trained.index_select(0, scenario), scores, torch.nan)
        further = [self._last_given_first(logits)] if self.with_cvr else []
        further += [scores[:, step] for step in self.steps]
        return torch.cat([scores, torch.stack(further, dim=1)], dim=1) if further else scores

    def _last_given_first(self, logits: Tensor) -> Tensor:
        """sigmoid(last) / sigmoid(first) of a chain, [B]. In float64, where neither is 0; of conditional steps below 1."""
        network = self.network
        assert isinstance(network, ChainModel)
        first, last = (torch.sigmoid(logits[:, network.chain[step]].double()) for step in (0, -1))
        ratio = last / first
        # As in `metrics.exact.conditional_logit`: what is above that is rounding.
        return (ratio.clamp(max=1 - 1e-7) if network.conditional else ratio).float()


def export_network(scorer: Scorer, kind: Format) -> ExportedProgram:
    """The graph of a network, with its weights: one for batches of any size.

    Rows of many scenarios are grouped by an operator of our own; in ONNX, which has none, all scenarios are computed.

    Raises:
        UserError: its `forward` is no such graph.
    """
    batch = Dim("batch")
    # More than 2 rows, or than there are scenarios: a number of the example must not be taken for another one of the network.
    with torch.no_grad(), dense_dispatch() if kind == "onnx" else nullcontext():
        try:
            return torch.export.export(scorer, scorer.example(11), dynamic_shapes={"x": {0: batch}, "scenario": {0: batch}})
        except Exception as error:  # of any class: torch's own, and those of the method
            raise UserError(
                f"{type(scorer.network).__name__}: its forward is not one graph for batches of every size, so it cannot be"
                f" exported: no branch on values of tensors, x.shape[0] instead of len(x). torch.export says: {error}"
            ) from error


def save_network(program: ExportedProgram, path: Path, kind: Format) -> None:
    """Write a graph with its weights as one file.

    Raises:
        UserError: ONNX, and its packages are not installed.
        OSError: it cannot be written.
    """
    if kind == "pt2":
        content = io.BytesIO()  # where torch writes a file itself and the disk is full, it ends the process
        torch.export.save(program, content)
        path.write_bytes(content.getbuffer())
        return
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--format onnx needs packages that are not installed ({error}): pip install 'mmlrec[onnx]'") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx_program = torch.onnx.export(
            program, dynamo=True, input_names=["x", "scenario"], output_names=["scores"], external_data=False, verbose=False
        )
        assert onnx_program is not None
        onnx_program.save(path, external_data=False)
