"""`pcg` = MMoE with PCGrad; what a run reports about its gates."""

import json
import math
from pathlib import Path

import pytest
import torch

from mmlrec.config import ConfigError, load_config
from mmlrec.distributed.world import process_group
from mmlrec.models.base.model import ModelSpec
from mmlrec.registry import aliases, method, method_names, resolve
from mmlrec.training.run import default_run_dir, train
from tests.datasets import write_dataset
from tests.models.support import build, make_data, spec_of


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        f"dataset: {{path: {tmp_path / 'data'}}}\nmodel_defaults: {{expert_hidden_units: [8], tower_hidden_units: [4]}}\n"
        "embeddings: {dim: 4}\ntraining: {batch_size: 50, epochs: 1, log_every_steps: 2}\n"
    )
    return file


def test_alias_is_listed_and_resolves(config):
    assert aliases() == {"pcg": "mmoe"}
    assert "pcg" not in method_names()
    assert method("pcg") is method("mmoe")
    resolved = resolve(load_config(config, ["model.name=pcg", "balancing.scope=both"]), "here")
    assert (resolved.balancing["name"], resolved.balancing["scope"]) == ("pcgrad", "both")
    assert resolved.model["expert_hidden_units"] == [8]
    assert default_run_dir(resolved, config) == Path("runs/mtl-config-pcg-seed0-balancing.scope=both")
    assert default_run_dir(load_config(config, ["model.name=pcg"]), config) == Path("runs/mtl-config-pcg-seed0")


def test_strategies_have_run_folders_of_their_own(config):
    balanced, plain = load_config(config, ["balancing.name=uw"]), load_config(config)
    assert default_run_dir(balanced, config) == Path("runs/mtl-config-mmoe-uw-seed0")
    assert default_run_dir(plain, config) == Path("runs/mtl-config-mmoe-seed0")


@pytest.mark.parametrize("strategy", ["static", "mgda"])
def test_alias_refuses_another_strategy(config, strategy):
    with pytest.raises(ConfigError, match=f"balancing.name=pcgrad, but balancing.name is '{strategy}'"):
        load_config(config, ["model.name=pcg", f"balancing.name={strategy}"])


def test_alias_trains_as_mmoe_with_pcgrad_and_logs(config, tmp_path):
    write_dataset(tmp_path / "data", rows=400, table_rows=30)
    logged = []
    for name, overrides in (("alias", ["model.name=pcg"]), ("spelt", ["model.name=mmoe", "balancing.name=pcgrad"])):
        with process_group() as world:
            train(load_config(config, overrides), tmp_path / name, world)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        logged.append([(line["loss"], line["diagnostics"]) for line in lines if line["split"] == "train"])
    assert logged[0] == logged[1]
    assert set(logged[0][0][1]) == {
        *(f"balancing/{kind}/{task}" for kind in ("coefficient", "norm") for task in ("click", "buy")),
        "balancing/cosine/click~buy",
        *(f"network/gate_entropy/{task}" for task in ("click", "buy")),
    }
    # The resolved file names the alias, and runs again.
    assert load_config(tmp_path / "alias" / "config.yaml").model["name"] == "pcg"


def plain_entropies(net, data) -> dict[str, float]:
    """Softmax gates from the weights, row by row, in float64."""
    found: dict[str, list[float]] = {}
    spec: ModelSpec = net.spec
    hidden, output = net.gates.hidden, net.gates.weight.double()
    for b in range(len(data.x)):
        s = int(data.scenario[b])
        for t, task in enumerate(spec.tasks):
            h = t * spec.num_scenarios + s
            row = data.x[b].double()
            for weight, bias in zip(hidden.weights, hidden.biases, strict=True):
                row = torch.relu(row @ weight[h].double() + bias[h].double())
            p = torch.softmax(row @ output[h], 0).tolist()
            suffix = f"/{s}" if spec.num_scenarios > 1 else ""
            found.setdefault(f"gate_entropy/{task.name}{suffix}", []).append(-sum(q * math.log(q) for q in p) / math.log(3))
    return {name: sum(values) / len(values) for name, values in found.items()}


@pytest.mark.parametrize("shape", ["mtl", "msl", "mtmsl", "msl-many"])
def test_gate_entropy_of_each_head(shape):
    net = build("mmoe", spec_of(shape))
    assert net.diagnostics() == {}
    net.eval()
    data = make_data(net, 33)
    net(data.x, data.fields, data.scenario)
    assert net.diagnostics() == {}  # of training batches only
    net.train()
    padded = torch.cat([data.x, torch.randn(5, data.x.shape[1])])
    valid = torch.arange(38) < 33
    net(padded, {}, torch.cat([data.scenario, torch.zeros(5, dtype=torch.long)]), valid=valid)
    assert net.diagnostics() == pytest.approx(plain_entropies(net, data), rel=1e-5)
    collapsed = net.gates.weight.detach().clone()
    with torch.no_grad():
        net.gates.weight.mul_(0.0)
    net(data.x, {}, data.scenario)
    assert list(net.diagnostics().values()) == pytest.approx([1.0] * spec_of(shape).num_heads)
    with torch.no_grad():
        net.gates.weight.copy_(1e4 * collapsed)
    net(data.x, {}, data.scenario)
    assert max(net.diagnostics().values()) < 0.5
