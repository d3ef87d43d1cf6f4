"""Exported graphs of every method in every setting: the scores that the network's logits stand for, at any batch size."""

import warnings
from itertools import product

import numpy as np
import onnx
import pytest
import torch

from mmlrec.errors import UserAdvice, UserError
from mmlrec.export.network import Scorer, export_network, save_network
from mmlrec.metrics.exact import log_ratio
from mmlrec.models.base.chain import ChainModel
from mmlrec.models.base.model import ModelSpec
from mmlrec.registry import method, method_names
from mmlrec.schema import Setting, Task
from mmlrec.serving.networks import _FORMATS as OPEN
from mmlrec.testing.networks import SHAPES, TINY, spec_of

BATCHES = (1, 2, 7, 1000)
ONNX_TOO = ("star",)


def settings():
    """The widest setting of each method as a graph of torch without normalisation; ONNX of some; all others are long."""
    found = []
    for name in method_names():
        shapes = [shape for shape in ("mtmsl", "msl", "mtl") if spec_of(shape).setting in method(name).settings]
        for shape, use_bn, kind in product(shapes, (False, True), ("pt2", "onnx")):
            quick = shape == shapes[0] and not use_bn and (kind == "pt2" or name in ONNX_TOO)
            label = f"{name}-{shape}{'-bn' * use_bn}-{kind}"
            found.append(pytest.param(name, shape, use_bn, kind, id=label, marks=[] if quick else [pytest.mark.long]))
    return found


def network(name, spec, **options):
    known = {key: value for key, value in TINY.items() if key in method(name).Config.model_fields}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserAdvice)
        net = method(name)(spec, method(name).Config(**(known | options)))
    # Neither weights nor statistics as they begin, where many are 0 or 1.
    generator = torch.Generator().manual_seed(3)
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor.is_floating_point() and tensor.shape != torch.Size([]):
            tensor.data += 0.3 * (torch.rand(tensor.shape, generator=generator) - 0.5).to(tensor.dtype)
    return net


def inputs(net, rows, seed):
    spec = net.spec
    generator = torch.Generator().manual_seed(seed)
    lead = (rows, len(net.branches)) if len(net.branches) > 1 else (rows,)
    x = torch.randn(*lead, spec.input_width, generator=generator)
    return x, torch.randint(spec.num_scenarios, (rows,), generator=generator)


def expected(net, x, scenario, scales=None):
    """Name -> scores in float64, from the logits of the network itself."""
    spec = net.spec
    if len(net.branches) == 1:
        x = x.unsqueeze(1)
    views = x.split([*spec.fields.values(), spec.num_dense], dim=-1)
    net.eval()
    with torch.no_grad():
        logits = net(x, dict(zip(spec.fields, views, strict=False)), scenario).logits.double().numpy()
    found = {}
    for t, task in enumerate(spec.tasks):
        mean, deviation = (scales or {}).get(task.name, (0.0, 1.0))
        found[task.name] = 1 / (1 + np.exp(-logits[:, t])) if task.kind == "binary" else mean + deviation * logits[:, t]
    if isinstance(net, ChainModel):
        first, last = net.chain[0], net.chain[-1]
        found["cvr"] = np.exp(log_ratio(logits[:, first], logits[:, last]))
        found |= {"ctr": found[spec.tasks[first].name], "ctcvr": found[spec.tasks[last].name]}
    return found


def check(net, path, kind, scales=None, batches=BATCHES):
    scorer = Scorer(net, scales or {})
    save_network(export_network(scorer, kind), path, kind)
    if kind == "onnx":  # operators that others know, and no sorting
        nodes = onnx.load(path).graph.node
        assert {node.domain for node in nodes} == {""}
        assert not {node.op_type for node in nodes} & {"Sort", "TopK", "Loop"}
    run = OPEN[kind](path, None)
    for seed, rows in enumerate(batches):
        x, scenario = inputs(net, rows, seed)
        scores = run(x.numpy(), scenario.numpy())
        assert scores.dtype == np.float32
        assert scores.shape == (rows, len(scorer.outputs))
        wanted = expected(net, x, scenario, scales)
        assert list(wanted) == scorer.outputs
        for column, name in enumerate(scorer.outputs):
            scale = max(1.0, np.abs(wanted[name]).max())  # a ratio or a value may be above 1
            np.testing.assert_allclose(scores[:, column] / scale, wanted[name] / scale, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("name", "shape", "use_bn", "kind"), settings())
def test_scores_are_those_of_the_networks_logits_at_every_batch_size(name, shape, use_bn, kind, tmp_path):
    check(network(name, spec_of(shape), use_bn=use_bn), tmp_path / f"network.{kind}", kind)


def test_every_method_and_setting_is_among_them():
    covered = {tuple(case.values[:2]) for case in settings()}
    assert covered == {
        (n, s) for n in method_names() for s in SHAPES if s != "msl-many" and spec_of(s).setting in method(n).settings
    }


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("single_task", {}),
        ("apg", {"condition": "self"}),
        ("hmoe", {"gate_mode": "per_scenario", "mix_axis": "head"}),
        ("pepnet", {"head_scope": "per_head", "scenario_fields": ["f0"]}),
        ("star", {"star_axis": "scenario", "scenario_fields": ["f1"]}),
        ("snr", {"variant": "aver"}),
        ("mssm", {"fscm": False}),
        ("mmoe", {"gate_extra_fields": ["f1"]}),
        ("cross_stitch", {"stitch_mode": "full", "shared_depth": 1}),
        ("aitm", {"scenario_towers": "shared"}),
        ("escm2", {"variant": "dr", "scenario_towers": "shared"}),
    ],
)
@pytest.mark.long
def test_options_that_take_other_ways_through_the_network(name, options, tmp_path):
    check(network(name, spec_of("mtmsl"), **options), tmp_path / "network.pt2", "pt2")


@pytest.mark.parametrize("kind", ["pt2", pytest.param("onnx", marks=pytest.mark.long)])
def test_values_of_regression_tasks_have_the_unit_of_their_labels(kind, tmp_path):
    tasks = (Task(name="click"), Task(name="price", kind="regression"), Task(name="stars", kind="regression"))
    spec = ModelSpec(Setting.MTMSL, tasks, 3, {"f0": 4, "f1": 4, "f2": 4}, 2)
    net = network("shared_bottom", spec)
    check(net, tmp_path / f"network.{kind}", kind, scales={"price": (250.0, 31.0)})


def test_a_chain_of_three_steps_whose_tasks_have_names_of_roles(tmp_path):
    tasks = tuple(Task(name=name, implied_by_next=name != "buy") for name in ("click", "cvr", "buy"))
    net = network("esmm", ModelSpec(Setting.MTL, tasks, 1, {"f0": 4, "f1": 4}, 0))
    scorer = Scorer(net, {})
    assert scorer.outputs == ["click", "cvr", "buy", "ctr", "ctcvr"]
    x, scenario = inputs(net, 5, 0)
    scores = scorer(x, scenario).numpy()
    np.testing.assert_array_equal(scores[:, 3:], scores[:, [0, 2]])


def test_branches_that_were_left_out_have_no_score(tmp_path):
    """Of 2 tasks x 3 scenarios: task 0 has heads for scenarios 0 and 2, task 1 for none."""
    net = network("single_task", spec_of("mtmsl"), branches=[2, 0])
    scorer = Scorer(net, {})
    assert scorer.outputs == ["t0"]
    save_network(export_network(scorer, "pt2"), tmp_path / "network.pt2", "pt2")
    run = OPEN["pt2"](tmp_path / "network.pt2", None)
    for rows in BATCHES:
        x, scenario = inputs(net, rows, rows)
        scores = run(x.numpy(), scenario.numpy())[:, 0]
        np.testing.assert_array_equal(np.isnan(scores), scenario.numpy() == 1)
        known = scenario.numpy() != 1
        np.testing.assert_allclose(scores[known], expected(net, x, scenario)["t0"][known], rtol=0, atol=1e-6)


def test_a_forward_that_branches_on_values_is_told():
    net = network("mlp", spec_of("mtl"))
    honest = net.forward
    net.forward = lambda x, *more: honest(x if float(x.sum()) > 0 else -x, *more)
    with pytest.raises(UserError, match=r"MLP: its forward is not one graph .*no branch on values of tensors"):
        export_network(Scorer(net, {}), "pt2")


def test_one_branch_alone_reads_rows_as_other_methods_do(tmp_path):
    net = network("single_task", spec_of("mtl"), branches=[1])
    scorer = Scorer(net, {})
    assert scorer.outputs == ["t1"]
    x, scenario = inputs(net, 6, 0)
    assert x.shape == (6, net.spec.input_width)
    np.testing.assert_allclose(scorer(x, scenario)[:, 0].numpy(), expected(net, x, scenario)["t1"], rtol=0, atol=1e-6)
