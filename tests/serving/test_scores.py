"""Scores of encoded inputs equal formulas: lookups of each dtype and pooling, networks of both formats, damage told."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from mmlrec import serving
from mmlrec.errors import DataError
from tests.serving.folders import DIM, LOOKUPS, ROWS, scores_by_hand, tables, write_model


def drawn(num_rows: int, seed: int = 3) -> SimpleNamespace:
    """Inputs of rows, some bags of which are empty."""
    draw = np.random.default_rng(seed)
    ids = {"user": (draw.integers(0, 50, num_rows), np.arange(num_rows + 1))}
    for name in ("tags", "marks"):
        offsets = np.append(0, np.cumsum(draw.integers(0, 4, num_rows)))
        ids[name] = draw.integers(0, 20, offsets[-1]), offsets
    dense, scenario = draw.normal(size=(num_rows, 2)).astype(np.float32), draw.integers(0, 3, num_rows)
    return SimpleNamespace(ids=ids, dense=dense, scenario=scenario, num_rows=num_rows)


@pytest.mark.parametrize(("dtype", "form"), [("fp32", "pt2"), ("fp16", "pt2"), ("int8", "pt2"), ("fp32", "onnx")])
def test_scores_are_those_of_the_formula(tmp_path, dtype, form):
    contents = tables(dtype, ROWS, DIM)
    weight = write_model(tmp_path / "model", contents, dtype=dtype, form=form)
    model = serving.load(tmp_path / "model")
    for num_rows in (0, 1, 2, 300):
        inputs = drawn(num_rows)
        scores = model.score_inputs(inputs)
        assert scores.shape == (num_rows, 2)
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, scores_by_hand(inputs, contents, [LOOKUPS], weight), atol=2e-6)


def test_tables_for_each_branch_and_no_scenario(tmp_path):
    contents = tables("fp32", {"0-user": 50, "0-tag": 20, "1-user": 50, "1-tag": 20}, DIM)
    lookups = [[lookup | {"table": f"{branch}-{lookup['table']}"} for lookup in LOOKUPS] for branch in (0, 1)]
    weight = write_model(tmp_path / "model", contents, lookups, multi_scenario=False)
    inputs = drawn(40)
    expected = scores_by_hand(inputs, contents, lookups, weight, multi_scenario=False)
    np.testing.assert_allclose(serving.load(tmp_path / "model").score_inputs(inputs), expected, atol=2e-6)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "model"
    write_model(folder, tables("fp32", ROWS, DIM))
    return folder


def test_chunks_and_threads_change_no_score(toy):
    model, inputs = serving.load(toy), drawn(5000)
    scores = model.score_inputs(inputs)
    some = [drawn(700, seed) for seed in range(8)]
    alone = [model.score_inputs(part) for part in some]
    with ThreadPoolExecutor(4) as pool:
        for found, expected in zip(pool.map(model.score_inputs, some * 3), alone * 3, strict=True):
            np.testing.assert_array_equal(found, expected)
    at = slice(3000, 3001)
    one = SimpleNamespace(
        ids={n: (i[o[3000] : o[3001]], o[3000:3002] - o[3000]) for n, (i, o) in inputs.ids.items()},
        **{"dense": inputs.dense[at], "scenario": inputs.scenario[at], "num_rows": 1},
    )
    np.testing.assert_allclose(model.score_inputs(one), scores[at], atol=1e-6)


def _cut(name):
    def damage(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def _edit(change):
    def damage(folder):
        card = json.loads((folder / "model.json").read_text())
        change(card)
        (folder / "model.json").write_text(json.dumps(card))

    return damage


DAMAGES = {
    "no encoder": (lambda folder: shutil.rmtree(folder / "encoder"), "encoder"),
    "no card": (lambda folder: (folder / "model.json").unlink(), "is not an exported model: it has no model.json"),
    "half a card": (_cut("model.json"), "model.json is damaged: no JSON"),
    "later form": (_edit(lambda card: card.update(form=3)), "an exported model of form 3, this release reads 1, 2"),
    "no lookups": (_edit(lambda card: card.pop("lookups")), "model.json is damaged: lookups is missing"),
    "empty lookups": (_edit(lambda card: card.update(lookups=[])), "model.json is damaged: lookups is empty"),
    "bad rows": (_edit(lambda card: card["tables"][0].update(rows="9")), r"tables\[0\].rows is '9', not of type int"),
    "unlisted": (_edit(lambda card: card["lookups"][0][0].update(table="x")), "in table 'x', which is not listed"),
    "half a network": (_cut("network.pt2"), "network.pt2: the network cannot be read"),
    "no network": (lambda folder: (folder / "network.pt2").unlink(), "network.pt2: the network is not there"),
    "other format": (_edit(lambda card: card["network"].update(format="xml")), "a network of format 'xml'"),
    "half a table": (_cut("tables/user.safetensors"), "user.safetensors: the table 'user' cannot be read"),
    "no table": (lambda folder: (folder / "tables/tag.safetensors").unlink(), "tag.safetensors: the table 'tag' cannot be"),
    "other table": (
        lambda folder: shutil.copy(folder / "tables/tag.safetensors", folder / "tables/user.safetensors"),
        r"weight of the table 'user' is float32 \[20, 4\], the card says fp32 \[50, 4\]",
    ),
    "other width": (_edit(lambda card: card["dense"].pop()), "network.pt2 does not take what model.json says"),
    "other outputs": (_edit(lambda card: card["network"]["outputs"].pop()), r"gives \[2\] scores a row, model.json names 1"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_told_at_load(toy, tmp_path, name):
    damage, words = DAMAGES[name]
    shutil.copytree(toy, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(DataError, match=words) as told:
        serving.load(tmp_path / "model")
    assert re.search(r"python -m apps\.export", str(told.value))


def test_no_folder(tmp_path):
    with pytest.raises(DataError, match="the folder does not exist"):
        serving.load(tmp_path / "none")
