"""Cross-stitch: a network for each head; after every layer the networks' activations are mixed by a learned matrix.

Misra, Shrivastava, Gupta, Hebert, "Cross-Stitch Networks for Multi-task Learning", CVPR 2016.

Layers l = 1..n, as many as `dnn_hidden_units`, branches i = 1..H, with x_{0,i} = MLP(x; `shared_depth` layers):

    u_{l,i} = act(Lin_{l,i}(x_{l-1,i}))                          [B, h_l]
    x_{l,i} = sum_j A_l[i, j] u_{l,j}          `scalar`          A_l [H, H]
    x_{l,i} = sum_j A_l[i, j] * u_{l,j}        `channel`         A_l [H, H, h_l]
    x_{l,i} = concat_j(u_{l,j}) A_l[i]         `full`            A_l [H, H h_l, h_l]
    z_i = Tower_i(x_{n,i})                                       [B], i = t * S + s

A_l starts as stitch_self on the diagonal and stitch_cross elsewhere (`full`: those times the identity). Every branch runs
for every row, because the stitches mix all branches: the cost grows with H. Only towers are computed for a row's own
scenario alone.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmlrec.errors import UserAdvice
from mmlrec.layers.experts import StackedMLP, stacked_linear
from mmlrec.layers.mlp import MLP
from mmlrec.layers.towers import Towers
from mmlrec.models.base.model import ModelSpec, MultiTaskModel, NetworkConfig, Owner, Width
from mmlrec.output import Output

Mode = Literal["scalar", "channel", "full"]


class _Stitch(nn.Module):
    """Mixes U branches of one width: [U, B, h] -> [U, B, h]."""

    def __init__(self, mode: Mode, branches: int, width: int, own: float, cross: float) -> None:
        super().__init__()
        self.mode = mode
        weight = torch.full((branches, branches), cross).fill_diagonal_(own)
        if mode == "channel":
            weight = weight.unsqueeze(2).repeat(1, 1, width)
        elif mode == "full":
            weight = torch.einsum("ij,ab->ijab", weight, torch.eye(width)).flatten(1, 2)
        self.weight = nn.Parameter(weight)

    def forward(self, u: Tensor) -> Tensor:
        """The inputs of the next layer's branches."""
        if self.mode == "scalar":
            return (self.weight @ u.flatten(1)).unflatten(1, u.shape[1:])
        if self.mode == "channel":
            return torch.einsum("ijd,jbd->ibd", self.weight, u)
        return stacked_linear(u.transpose(0, 1).flatten(1), self.weight, None)


class CrossStitch(MultiTaskModel):
    """One network for each head, stitched together."""

    class Config(NetworkConfig):
        """Options of Cross-stitch."""

        dnn_hidden_units: list[Width] = Field(default=[256, 128], min_length=1, description="Widths of each branch.")
        tower_hidden_units: list[Width] = Field(default=[64], description="Widths of each tower; may be empty.")
        stitch_mode: Mode = Field(default="scalar", description="One weight per pair of branches, per channel, or a matrix.")
        stitch_self: float = Field(default=0.9, description="Start of a branch's weight on itself.")
        stitch_cross: float | None = Field(default=None, description="Start of its weight on each other; 0.1 / (H - 1).")
        stitch_lr_mult: float = Field(default=1.0, gt=0, description="Learning rate of the stitches over the network's.")
        shared_depth: int = Field(default=0, ge=0, description="Shared layers below the branches, as wide as their first.")

    config: Config

    def __init__(self, spec: ModelSpec, config: Config) -> None:
        super().__init__(spec, config)
        generator, hidden, heads, units = self.generator, config.hidden, spec.num_heads, config.dnn_hidden_units
        if config.stitch_mode == "full" and heads > 8:
            warnings.warn(
                f"cross_stitch with stitch_mode 'full' builds {heads} x {heads} matrices in each layer; consider 'scalar'",
                UserAdvice,
                stacklevel=2,
            )
        cross = 0.1 / max(heads - 1, 1) if config.stitch_cross is None else config.stitch_cross
        self.shared = MLP(spec.input_width, units[:1] * config.shared_depth, hidden, generator)
        self.layers, self.stitches = nn.ModuleList(), nn.ModuleList()
        width = self.shared.out_features
        for units_here in units:
            self.layers.append(StackedMLP(heads, width, [units_here], hidden, generator))
            self.stitches.append(_Stitch(config.stitch_mode, heads, units_here, config.stitch_self, cross))
            width = units_here
        self.towers = Towers(heads, width, config.tower_hidden_units, hidden, generator)

    def owner(self, parameter: str) -> Owner | None:
        """Heads own the towers and, of the last stitch, what leads to them."""
        return "head" if parameter.startswith(("towers.", f"stitches.{len(self.stitches) - 1}.")) else None

    def lr_factors(self) -> dict[str, float]:
        """The stitches have a learning rate of their own."""
        return {"stitches": self.config.stitch_lr_mult}

    def forward(
        self,
        x: Tensor,
        fields: dict[str, Tensor],
        scenario: Tensor,
        *,
        valid: Tensor | None = None,
        noise: Tensor | None = None,
        return_all_heads: bool = False,
    ) -> Output:
        """Logits; see the base class."""
        dispatch = self.own_dispatch(scenario, self.config.tower_hidden_units, return_all_heads)
        if dispatch is not None:
            x = dispatch.arrange(x)
        x = self.shared(x, valid)
        for layer, stitch in zip(self.layers, self.stitches, strict=True):
            x = stitch(layer(x, valid))
        if dispatch is None:
            return self.select(self.towers(x, self.head_rows(scenario, valid)), scenario, return_all_heads)
        return Output(dispatch.restore(self.towers.own(dispatch.own(x), dispatch)))
