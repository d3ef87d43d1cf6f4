"""What comes before and after training with managed tables: frames, other rows, other numbers of slots, exports, days."""

import json

import numpy as np
import pandas as pd
import pytest

import mmlrec
import mmlrec.serving
from mmlrec.encoding.encoder import Encoder
from mmlrec.errors import UserError
from mmlrec.schema import DatasetManifest
from mmlrec.slots import stored
from mmlrec.training.advice import advise_on_slots
from tests.test_hashing import plain_key

CONFIG = {
    "model": {"name": "shared_bottom", "bottom_hidden_units": [8], "tower_hidden_units": []},
    "embeddings": {"dim": 4, "init_std": 0.5, "managed": {"update_every": 2}},
    "training": {"batch_size": 64, "epochs": 1, "patience": None},
}
SLOTS = 30


def frame(seed, rows=800, users=60):
    random = np.random.default_rng(seed)
    user = np.minimum(random.zipf(1.3, rows), users) * 10**17 - 2**62
    x = random.random(rows)
    return pd.DataFrame({"user": user, "x": x, "y": (x > 0.5).astype(int), "z": random.integers(0, 2, rows)})


def prepared(seed, slots=SLOTS, key_seed=0, **more):
    features = {"user": {"kind": "id", "type": "int", "managed": {"slots": slots, "seed": key_seed}}, "x": "number"}
    return mmlrec.prepare(frame(seed), features=features, tasks=["y", "z"], **more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ends")
    data = prepared(0, out=folder / "data")
    return mmlrec.train(CONFIG, dataset=data, run_dir=folder / "run", progress=False)


def slots_of(run):
    keys, slots = stored.read(run.path / "checkpoints/best", "user")
    return dict(zip(keys.view(np.int64).tolist(), slots.tolist(), strict=True))


@pytest.mark.parametrize(("tables", "tolerance"), [("fp32", 1e-6), ("fp16", 2e-3), ("int8", 2e-2)])
def test_an_export_knows_who_holds_which_slot_and_an_unseen_id_is_as_a_missing_one(trained, tmp_path, tables, tolerance):
    held = slots_of(trained)
    assert len(held) == SLOTS
    model = mmlrec.serving.load(trained.export(tmp_path / "model", tables=tables))
    rows = frame(1, users=10**6).assign(user=lambda rows: rows["user"].astype("Int64"))
    rows.loc[:20, "user"] = [-(2**63), 2**63 - 1, 0, *range(18)]  # which nobody has seen
    rows.loc[21:40, "user"] = pd.NA
    assert model.card["form"] == 2  # of which a release that knows no managed tables says that it cannot read it
    found = Encoder.load(tmp_path / "model/encoder").inputs(mmlrec.api.frames.arrow_table(rows, {"user": "", "x": ""}))
    expected = [held.get(plain_key(None if user is pd.NA else int(user), 0), 0) for user in rows["user"]]
    assert found.ids["user"][0].tolist() == expected
    assert 40 < expected.count(0) < 700
    scores = model.score(rows)
    np.testing.assert_allclose(scores, trained.predict(rows), atol=tolerance)
    missing = rows.assign(user=[pd.NA if slot == 0 else user for user, slot in zip(rows["user"], expected, strict=True)])
    pd.testing.assert_frame_equal(model.score(missing.astype({"user": "Int64"})), scores)
    assert len(set(scores["score.y"].round(5))) > 100


def test_an_export_of_branches_with_tables_of_their_own_has_the_one_map(tmp_path):
    model = {"name": "single_task", "expert_hidden_units": [8], "tower_hidden_units": []}
    run = mmlrec.train(CONFIG | {"model": model}, dataset=prepared(0), run_dir=tmp_path / "run", progress=False)
    assert len(slots_of(run)) == SLOTS
    rows = frame(1, users=10**6)
    scores = mmlrec.serving.load(run.export(tmp_path / "model")).score(rows)
    np.testing.assert_allclose(scores, run.predict(rows), atol=1e-6)
    assert len(set(scores["score.y"].round(5))) > 100


def test_a_dataset_with_other_slots_is_encoded_alike_and_one_with_another_seed_is_not(trained, tmp_path):
    own, same, more = trained.evaluate(), prepared(0), prepared(0, slots=77)
    assert same.manifest.encoding == more.manifest.encoding
    pd.testing.assert_frame_equal(trained.evaluate(more), own)
    pd.testing.assert_frame_equal(trained.predict(more).filter(like="score."), trained.predict(same).filter(like="score."))
    other = prepared(0, key_seed=1)
    with pytest.raises(UserError, match="table 'user', seed: 1 here, 0 in the run"):
        trained.evaluate(other)
    like = mmlrec.prepare(frame(2), like=trained)
    assert like.manifest.table("user") == same.manifest.table("user")
    assert like.manifest.schema_version == DatasetManifest.load(trained.path / "encoder").schema_version == 2
    assert not any((like.path / "vocab").iterdir())


@pytest.mark.parametrize("option", ["--like", "--extend"])
def test_rows_that_are_encoded_like_others_may_have_other_slots_and_no_other_seed(tmp_path, capsys, option):
    from preprocessing.command_line import main

    rows = frame(0, rows=200)
    rows.to_csv(tmp_path / "log.csv", index=False)
    configs = {}
    for name, managed in {"made": [30, 0], "more": [77, 0], "seed": [30, 1]}.items():
        features = {"user": {"kind": "id", "type": "int", "managed": dict(zip(("slots", "seed"), managed, strict=True))}}
        features["x"] = {"kind": "number"}
        content = {"files": ["log.csv"], "features": features, "tasks": [{"name": "y", "label": "y"}]}
        configs[name] = tmp_path / f"{name}.yaml"
        configs[name].write_text(json.dumps(content))
    assert main(["table", "--config", str(configs["made"]), "--out", str(tmp_path / "made")]) == 0
    like = ("table", option, str(tmp_path / "made"), "--split", "train", "--out")
    assert main([*like, str(tmp_path / "more"), "--config", str(configs["more"])]) == 0
    made, more = (DatasetManifest.load(tmp_path / name) for name in ("made", "more"))
    assert more.table("user").num_rows == 78
    assert more.encoding == made.encoding
    assert main([*like, str(tmp_path / "seed"), "--config", str(configs["seed"])]) == 2
    assert "seed.yaml encodes otherwise than" in capsys.readouterr().err
    synthetic = ("synthetic", "--rows", "50", "--num-ids", "40", "--sparse-features", "1", "--managed")
    assert main([*synthetic, "9", "--day", "1", "--out", str(tmp_path / "day-1")]) == 0
    extend = ("--day", "2", "--extend", str(tmp_path / "day-1"), "--out", str(tmp_path / "day-2"))
    assert main([*synthetic, "12", *extend]) == 0
    assert DatasetManifest.load(tmp_path / "day-2").tables[0].num_rows == 13


@pytest.mark.parametrize(("update_every", "told"), [(9, False), (100, True)])
def test_a_run_that_ends_before_ids_train_in_slots_says_so(update_every, told, tmp_path):
    data = prepared(0, out=tmp_path / "data")
    embeddings = {"managed": {"update_every": update_every}}
    run = mmlrec.train(CONFIG, dataset=data, run_dir=tmp_path / "run", progress=False, embeddings=embeddings)
    assert json.loads((run.path / "result.json").read_text())["step"] == 10
    assert (len(slots_of(run)) > 0) != told
    lines = [line for line in (run.path / "train.log").read_text().splitlines() if "no id trains in a slot" in line]
    assert len(lines) == told
    assert all(f"update_every={update_every}: the run has 10 steps" in line and "update_every=1." in line for line in lines)
    assert advise_on_slots(10, 10) is not None  # slots that are earned at the last step are trained by none
    assert "Set" not in str(advise_on_slots(1, 1))  # no number of steps would do


def test_more_slots_than_a_training_takes_are_refused_before_rows_are_read():
    with pytest.raises(UserError, match=r"features.user.managed.slots: Input should be less than 2147483648; found 2147483648"):
        prepared(0, slots=2**31)


def test_a_run_goes_on_with_its_slots_only(trained, tmp_path):
    data = prepared(0, out=tmp_path / "data")
    run = mmlrec.train(CONFIG, dataset=data, run_dir=tmp_path / "run", progress=False)
    more = prepared(0, slots=77, out=tmp_path / "data", overwrite=True)
    with pytest.raises(UserError, match="tables"):
        mmlrec.train(CONFIG, dataset=more, run_dir=run.path, progress=False, training={"epochs": 2})


def test_a_day_goes_on_with_the_map_of_the_day_before(tmp_path, run_app):
    from preprocessing.command_line import main

    options = ("--rows", "2000", "--managed", str(SLOTS), "--num-ids", "300,20", "--sparse-features", "2", "--drift", "0.3")
    for number in (1, 2, 3):
        assert main(["synthetic", *options, "--day", str(number), "--out", str(tmp_path / f"data/day-{number}")]) == 0
    (tmp_path / "config.yaml").write_text(json.dumps(CONFIG | {"dataset": {"path": "none", "setting": "mtl"}}))
    days = ("--days", str(tmp_path / "data/day-*"), "--run-dir", str(tmp_path / "run"), "--forget-after", "1")
    code, said = run_app("days", "--config", tmp_path / "config.yaml", *days)
    assert code == 0, said
    lines = [json.loads(line) for line in (tmp_path / "run/days.jsonl").read_text().splitlines()]
    assert [line["forgotten"] for line in lines] == [{}, {}, {}]
    before: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        run = tmp_path / f"run/day-{number}"
        keys, _ = stored.read(run / "checkpoints/best", "sparse_0")
        if number > 1:
            told = {table["table"]: table for table in json.loads((run / "init_from.json").read_text())["tables"]}
            assert told["sparse_0"]["matched"] == "by key"
            assert told["sparse_0"]["taken"] == 1 + len(before)
            assert line["next_day"]["managed"]["sparse_0"]["occupied"] == len(before)
            assert set(before) & set(keys.tolist())
        before = dict.fromkeys(keys.tolist(), number)
    shares = [line["next_day"]["managed"]["sparse_0"] for line in lines[1:]]
    assert all(0 < share["without_slot"] < share["looked_up"] for share in shares)
