"""Each method in each setting: it builds and gives logits, or it is refused with a message that says what to use instead."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

from mmlrec.errors import ConfigError
from mmlrec.models.base.model import ONE_TASK, ModelSpec
from mmlrec.registry import method, method_names
from mmlrec.schema import Setting, Task

#: models.md 1.3. A refusal by default that options lift is written as those options.
MATRIX: dict[str, tuple[object, object, object]] = {
    # method: (mtl, msl, mtmsl)
    "single_task": (True, True, True),
    "mlp": (True, True, True),
    "cross_stitch": (True, True, True),
    "shared_bottom": (True, True, True),
    "mmoe": (True, True, True),
    "ple": (True, True, True),
    "snr": (True, True, True),
    "mssm": (True, True, True),
    "esmm": (True, False, True),
    "aitm": (True, False, True),
    "escm2": (True, False, True),
    "star": (True, True, True),
    "apg": ({"condition": "self"}, True, True),
    "hmoe": (True, True, True),
    "pepnet": (True, True, True),
}
SIZES = {Setting.MTL: (2, 1), Setting.MSL: (1, 3), Setting.MTMSL: (2, 3)}
CASES = [(name, setting) for name in method_names() for setting in Setting]


def spec_of(setting: Setting, tasks: int, scenarios: int) -> ModelSpec:
    """A chain of tasks, so that chain methods have what they need."""
    chain = (Task(name="click", role="ctr", implied_by_next=True), Task(name="buy", role="ctcvr"))
    return ModelSpec(setting, chain[:tasks], scenarios, {"user": 8, "item": 8, "place": 8}, 3)


def start(name: str, spec: ModelSpec, options: dict[str, object]) -> None:
    """What a run does: check, build, and one forward pass."""
    chosen = method(name)
    chosen.check_setting(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Advice, such as on scores of different labels that are mixed.
        net = chosen(spec, chosen.Config(**options))
    lead = (6, spec.num_heads) if net.tables_per_branch else (6,)
    x = torch.randn(*lead, spec.input_width)
    parts = x.split([*spec.fields.values(), spec.num_dense], dim=-1)
    output = net(x, dict(zip(spec.fields, parts, strict=False)), torch.arange(6) % spec.num_scenarios)
    assert output.logits.shape == (6, spec.num_tasks)
    assert output.logits.isfinite().all()


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_a_method_works_in_a_setting_or_names_another_choice(name, setting):
    # A method that the table does not know yet is held to what it says itself.
    row = MATRIX.get(name, tuple(s in method(name).settings for s in Setting))
    expected = dict(zip((Setting.MTL, Setting.MSL, Setting.MTMSL), row, strict=True))[setting]
    spec = spec_of(setting, *SIZES[setting])
    if expected is True:
        start(name, spec, {})
        return
    with pytest.raises(ConfigError) as refusal:
        start(name, spec, {})
    message = str(refusal.value).lower()
    assert name.replace("_", "") in message.replace("_", "").replace("-", "")
    assert f"'{setting}'" in message
    if expected is False:
        assert setting not in method(name).settings
        assert any(str(s) in message.replace(f"'{setting}'", "") for s in method(name).settings), "name a valid setting"
    else:
        assert all(option in message for option in expected)
        start(name, spec, expected)


@pytest.mark.parametrize("name", method_names())
@pytest.mark.parametrize(
    ("setting", "tasks", "scenarios", "remedy"),
    [
        (Setting.MTL, 1, 1, "msl"),
        (Setting.MSL, 2, 3, "mtmsl"),
        (Setting.MSL, 1, 1, "mtl"),
        (Setting.MTMSL, 1, 3, "msl"),
        (Setting.MTMSL, 2, 1, "mtl"),
    ],
)
def test_data_that_does_not_fit_the_setting_is_refused(name, setting, tasks, scenarios, remedy):
    if setting is Setting.MTL and method(name).one_task:
        start(name, spec_of(setting, tasks, scenarios), {"condition": "self"} if name == "apg" else {})
        return
    with pytest.raises(ConfigError) as refusal:
        method(name).check_setting(spec_of(setting, tasks, scenarios))
    message = str(refusal.value).lower()
    assert name.replace("_", "") in message.replace("_", "")
    assert f"'{setting}'" in message
    if setting in method(name).settings:
        # A method without MSL cannot be told to use it: then the remedy is another task.
        assert f"'{remedy}'" in message if remedy in method(name).settings else "dataset.tasks" in message


def test_the_advice_on_one_task_names_the_methods_that_take_it():
    named = re.findall(r"\w+", ONE_TASK.partition("model.name=")[2])
    assert {*named} - {"or"} == {name for name in MATRIX if method(name).one_task}


def test_every_method_of_the_specification_is_there():
    assert set(MATRIX) <= set(method_names())
