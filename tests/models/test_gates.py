"""Gates that mix experts: their entropies in the reports against plain sums, no collapse in a short training, dropout."""

from __future__ import annotations

import math

import pytest
import torch

from mmlrec.layers.gates import drop_gates
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


def test_dropped_gates_keep_their_ratios_and_sum_to_one():
    gates = torch.softmax(torch.randn(20_000, 1, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    torch.manual_seed(0)
    dropped = drop_gates(gates, 0.4)
    torch.testing.assert_close(dropped.sum(dim=-1), torch.ones(20_000, 1))
    # An entry is left out with probability .4, but not in the .4^3 of rows in which all would be.
    assert (dropped == 0).float().mean().item() == pytest.approx(0.4 - 0.4**3, abs=0.01)
    for before, after in zip(gates[:200, 0].tolist(), dropped[:200, 0].tolist(), strict=True):
        kept = [e for e in range(3) if after[e] > 0]
        assert after == pytest.approx(
            [before[e] / sum(before[k] for k in kept) if e in kept else 0 for e in range(3)], rel=1e-5
        )


@pytest.mark.parametrize("shape", ["mtl", "msl", "mtmsl"])
def test_gate_dropout_of_mmoe(shape):
    net, plain = (build("mmoe", spec_of(shape), gate_dropout=p) for p in (0.5, 0.0))
    data = make_data(net, 16)
    torch.testing.assert_close(
        net.eval()(data.x, data.fields, data.scenario).logits, plain.eval()(data.x, data.fields, data.scenario).logits
    )
    net.train()
    torch.manual_seed(5)
    logits = net(data.x, data.fields, data.scenario, return_all_heads=True).logits
    torch.manual_seed(5)
    gates, experts = drop_gates(net.gates(data.x), 0.5), net.experts(data.x)
    for b, s in enumerate(data.scenario.tolist()):
        for t in range(net.spec.num_tasks):
            h = t * net.spec.num_scenarios + s
            mixed = sum(gates[b, h, e] * experts[e, b] for e in range(3))
            expected = net.towers(mixed.view(1, 1, -1).expand(net.spec.num_heads, 1, -1))[0, h]
            torch.testing.assert_close(logits[b, t], expected, rtol=1e-5, atol=1e-6)
    first, second = (net(data.x, data.fields, data.scenario).logits for _ in range(2))
    assert not torch.equal(first, second)  # Also where only a row's own scenario is computed.
    step(net, data)
    assert all(parameter.grad is not None for parameter in net.parameters())
