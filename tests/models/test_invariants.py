"""Every method under the contract of invariants; a new one is picked up by its name. Relabelled scenarios; refusals by name."""

import copy

import pytest
import torch

from mmlrec.errors import ConfigError
from mmlrec.registry import method_names, model_config
from mmlrec.testing.invariants import Invariants
from tests.models.support import build, contracts, make_data, make_spec, supports

globals().update(contracts(Invariants))

RELABELLED = [
    ("mlp", {}),
    ("mlp", {"per_head_output": True}),
    ("esmm", {}),
    ("esmm", {"scenario_towers": "shared"}),
    ("aitm", {"use_tower": True}),
    ("escm2", {"variant": "ips"}),
    ("escm2", {"variant": "dr"}),
    ("hmoe", {}),
    ("hmoe", {"gate_mode": "per_scenario", "weight_mode": "per_scenario"}),
    ("pepnet", {}),
    ("pepnet", {"head_scope": "per_head"}),
]


@pytest.mark.parametrize(
    ("name", "options", "tasks"), [(*case, n) for case in RELABELLED for n in (1, 2) if supports(case[0], make_spec(n, 3))]
)
def test_relabelling_scenarios_with_their_parameters_changes_nothing(name, options, tasks):
    """The other methods' tests of this are with their own."""
    net = build(name, make_spec(tasks, 3), **options).double()
    data = make_data(net, 30, dtype=torch.float64)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    new_id = torch.tensor([2, 0, 1])
    old_id = new_id.argsort()
    moved = copy.deepcopy(net)
    with torch.no_grad():
        for key, parameter in moved.named_parameters():
            if net.owner(key) in ("head", "scenario"):
                members = parameter.reshape(-1, 3, parameter[0].numel())
                parameter.copy_(members[:, old_id].reshape(parameter.shape))
            if key == "score_weights.weight":  # HMoE: a column for each scenario whose score is mixed.
                parameter.copy_(parameter[..., old_id].clone())
            if key.startswith("ppnet.out_") and options:  # PEPNet: a gate for each hidden unit of each head's tower.
                parameter.copy_(parameter.unflatten(-1, (tasks, 3, -1))[..., old_id, :].flatten(-3))
    before, after = net(data.x, data.fields, data.scenario), moved(data.x, data.fields, new_id[data.scenario])
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-12, atol=1e-12)
    for key, value in before.named.items():
        torch.testing.assert_close(after.named[key], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", method_names())
def test_refusals_of_a_config_name_the_key(name):
    with pytest.raises(ConfigError, match=r"model\.dropuot: unknown key.*Did you mean 'dropout'"):
        model_config({"name": name, "dropuot": 0.1}, {}, "x.yaml")
    with pytest.raises(ConfigError, match=r"model\.activation"):
        model_config({"name": name, "activation": "swoosh"}, {}, "x.yaml")
