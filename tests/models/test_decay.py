"""What `dense.l2` decays: the weights of linear layers of every method, and nothing else."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from mmlrec.config import load_config
from mmlrec.distributed.world import process_group
from mmlrec.layers.decay import decay_targets
from mmlrec.registry import method_names, resolve
from mmlrec.session.session import build_session
from tests.datasets import write_dataset
from tests.models.support import TINY, build, spec_of, supports

#: (class, attribute) -> what its parameters decay to; None: they do not. Every parameter of every method is one of these.
KINDS = {
    ("StackedMLP", "weights"): 0,  # experts, branches, and the hidden layers of towers and gates
    ("MLP", "weights"): 0,
    ("Towers", "weight"): 0,
    ("Gates", "weight"): 0,
    ("GatedConnections", "weight"): 0,
    ("AITM", "maps"): 0,
    ("MLP", "weight"): 0,
    ("_Factor", "parts"): 0,
    ("_Layer", "core_weight"): 0,
    ("_Layer", "core_bias_weight"): 0,
    ("_GateUnits", "weight"): 0,
    ("_GateUnits", "out_weights"): 0,
    ("_Star", "weights"): 0,
    ("_Star", "own_weights"): 1,  # factors of the shared weights
    ("StackedMLP", "biases"): None,
    ("MLP", "biases"): None,
    ("MLP", "bias"): None,
    ("Towers", "bias"): None,
    ("AITM", "map_biases"): None,
    ("_Layer", "core"): None,  # the bias of a core, which starts as the identity
    ("_Layer", "core_bias"): None,
    ("_Layer", "v_bias"): None,
    ("_Layer", "u_bias"): None,
    ("_GateUnits", "bias"): None,
    ("_GateUnits", "out_biases"): None,
    ("_Star", "biases"): None,
    ("_Star", "own_biases"): None,
    ("BatchNorm", "weight"): None,
    ("BatchNorm", "bias"): None,
    ("PartitionedNorm", "weight"): None,
    ("PartitionedNorm", "bias"): None,
    ("PartitionedNorm", "scenario_weight"): None,
    ("PartitionedNorm", "scenario_bias"): None,
    ("HardConcrete", "log_alpha"): None,
    ("ScenarioEmbedding", "weight"): None,
    ("_Stitch", "weight"): None,
}
OPTIONS = {
    "aitm": [{"ait_bias": True, "use_tower": True}],
    "apg": [{"apg_overparam": True}],
    "cross_stitch": [{"stitch_mode": "full", "shared_depth": 1}],
    "escm2": [{"variant": "dr"}],
    "mlp": [{"per_head_output": True}],
    "snr": [{"variant": "aver"}],
}
CASES = [(name, options) for name in method_names() for options in ({}, {"use_bn": True}, *OPTIONS.get(name, []))]


def expected(net: nn.Module) -> dict[str, int]:
    found = {}
    for name, _ in net.named_parameters():
        plain = re.sub(r"\.\d+$", "", name)  # of a list
        module = net.get_submodule(plain.rpartition(".")[0])
        target = KINDS[type(module).__name__, plain.rpartition(".")[2]]
        if target is not None:
            found[name] = target
    return found


@pytest.mark.parametrize(("name", "options"), CASES)
def test_linear_weights_decay_and_nothing_else(name, options):
    for shape in ("mtl", "msl", "mtmsl"):
        if supports(name, spec_of(shape)):
            net = build(name, spec_of(shape), **options)
            assert decay_targets(net) == expected(net)


def test_the_weight_of_a_layer_of_torch_decays():
    net = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    assert decay_targets(net) == {"0.weight": 0, "2.weight": 0}


@pytest.mark.parametrize("name", ["star", "snr", "pepnet"])
def test_the_penalty_adds_the_slope_of_the_squares_and_without_it_nothing_changes(tmp_path, name):
    write_dataset(tmp_path / "data", rows=100, num_scenarios=2)
    (tmp_path / "config.yaml").write_text(
        f"dataset: {{path: {tmp_path / 'data'}, setting: mtmsl}}\nmodel: {{name: {name}}}\nmodel_defaults: {TINY}\n"
        "embeddings: {dim: 4}\ntraining: {batch_size: 32}\n".replace(", 'condition_fields': ['f0']", "").replace(
            "['f1', 'f2']", "[]"
        )
    )
    slopes = []
    for overrides in (["dense.l2=0.25"], []):
        with process_group() as world:
            config = resolve(load_config(tmp_path / "config.yaml", overrides), "config")
            session = build_session(config, world, for_training=True)
            with torch.no_grad():
                for parameter in session.network.parameters():
                    parameter.add_(0.5)
            loss, _ = session.model(next(iter(session.reader("train").epoch(0))))
            loss.backward()
            slopes.append({key: value.grad.clone() for key, value in session.network.named_parameters()})
            targets, values = expected(session.network), dict(session.network.named_parameters())
    for key, without in slopes[1].items():
        added = 0.25 * 2 * (values[key].detach() - targets[key]) if key in targets else torch.zeros_like(without)
        torch.testing.assert_close(slopes[0][key], without + added, rtol=1e-5, atol=1e-6, msg=key)
