"""What methods have alike whose connections between sub-networks carry random gates: SNR and MSSM."""

from __future__ import annotations

from pydantic import Field
from torch import nn

from mmlrec.layers.hard_concrete import HardConcrete, HardConcreteOptions
from mmlrec.models.base.model import MultiTaskModel, NetworkConfig, Owner, Width


class GatedConnectionsConfig(NetworkConfig):
    """Options of methods whose connections between levels of sub-networks carry hard-concrete gates."""

    num_experts: int = Field(default=4, ge=1, description="Sub-networks E of each level.")
    expert_hidden_units: list[Width] = Field(default=[256, 128], min_length=1, description="Width of each level.")
    tower_hidden_units: list[Width] = Field(default=[64], description="Widths of each tower; may be empty.")
    log_alpha_init: float = Field(default=2.0, description="Start of the gates; 2 = open with probability 0.985.")
    hc_beta: float = Field(default=0.9, gt=0, description="Temperature of the gates.")
    hc_gamma: float = Field(default=-0.1, lt=0, description="Lower end of the gates' stretched interval.")
    hc_zeta: float = Field(default=1.1, gt=1, description="Upper end of the gates' stretched interval.")
    gate_lr_mult: float = Field(default=40.0, gt=0, description="Learning rate of the gates over the network's.")

    @property
    def gates(self) -> HardConcreteOptions:
        """The gates' options, as the layer takes them."""
        return HardConcreteOptions(self.log_alpha_init, self.hc_beta, self.hc_gamma, self.hc_zeta)


class GatedConnectionsModel(MultiTaskModel):
    """Base class of these methods: `connections` of each level, the last of which lead to the `towers` of the heads."""

    config: GatedConnectionsConfig
    connections: nn.ModuleList

    def owner(self, parameter: str) -> Owner | None:
        """Heads own the towers and the connections that lead to them."""
        return "head" if parameter.startswith(("towers.", f"connections.{len(self.connections) - 1}.")) else None

    def lr_factors(self) -> dict[str, float]:
        """The gates have a learning rate of their own."""
        return {name: self.config.gate_lr_mult for name, module in self.named_modules() if isinstance(module, HardConcrete)}
