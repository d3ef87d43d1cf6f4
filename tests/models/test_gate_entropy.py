"""Gates that mix experts: their entropies in the reports against plain sums, and no collapse in a short training."""

from __future__ import annotations

import math

import pytest
import torch

from tests.models.support import build, make_data, spec_of, step

pytestmark = pytest.mark.filterwarnings("ignore:hmoe mixes scores of different tasks")


def mean_entropy(gates):
    """Mean over rows of -sum_e p_e log p_e / log E of gates [B, E]."""
    rows = [-sum(p * math.log(p) for p in row) / math.log(len(row)) for row in gates.tolist()]
    return sum(rows) / len(rows)


def by_head(net, gates, data, prefix):
    """What the report should say of the gates [B, H, E] of all heads."""
    found, scenarios = {}, net.spec.num_scenarios
    for t, task in enumerate(net.spec.tasks):
        for s in range(scenarios):
            own = gates[data.scenario == s, t * scenarios + s]
            found[f"{prefix}/{task.name}" + (f"/{s}" if scenarios > 1 else "")] = mean_entropy(own)
    return found


def expected(net, data):
    x = data.x
    if hasattr(net, "levels"):
        first, last = net.levels
        own, _ = first(x, x, None, data.scenario, None, None)
        parts = {"level1": first.gates(x), "level2": last.gates(own)}
        return {
            key: value
            for level, gates in parts.items()
            for key, value in by_head(net, gates, data, f"gate_entropy/{level}").items()
        }
    gates = net.gates(x)
    return {"gate_entropy": mean_entropy(gates[:, 0])} if gates.shape[1] == 1 else by_head(net, gates, data, "gate_entropy")


@pytest.mark.parametrize("shape", ["mtl", "msl", "mtmsl", "msl-many"])
@pytest.mark.parametrize(
    ("name", "options"), [("mmoe", {}), ("ple", {}), ("hmoe", {}), ("hmoe", {"gate_mode": "per_scenario"})]
)
def test_gates_do_not_collapse_and_reports_equal_a_plain_computation(name, options, shape):
    net = build(name, spec_of(shape), **options)
    assert net.diagnostics() == {}
    data = make_data(net, 64)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(50):
        step(net, data)
        optimizer.step()
    net(data.x, data.fields, data.scenario)
    found = net.diagnostics()
    assert found == pytest.approx(expected(net, data), rel=1e-5)
    assert min(found.values()) > 0.1
    assert 0.5 < sum(found.values()) / len(found) < 0.9999
    # Padding does not count, evaluation is not kept, and where there is one expert there is nothing to say.
    padded = data.rows(torch.cat([torch.arange(64), torch.zeros(9, dtype=torch.long)]))
    padded.x[64:] = torch.randn(9, data.x.shape[1])
    net(padded.x, padded.fields, padded.scenario, valid=torch.arange(73) < 64)
    assert net.diagnostics() == pytest.approx(found, rel=1e-5)
    net.eval()(padded.x, padded.fields, padded.scenario)
    assert net.diagnostics() == pytest.approx(found, rel=1e-5)


def test_one_expert_has_no_entropy():
    net = build("mmoe", spec_of("mtl"), num_experts=1)
    step(net, make_data(net, 8))
    assert net.diagnostics() == {}
