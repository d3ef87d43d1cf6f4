"""Encoders of datasets with a file of their own: which raw columns they read; and where the encoder of a run lies."""

import json

import pyarrow as pa
import pytest

from mmlrec.encoding.encoder import Encoder
from mmlrec.encoding.folders import encoder_folder
from mmlrec.errors import DataError, UserError
from mmlrec.schema import DatasetManifest
from preprocessing.command_line import main
from tests.preprocessing.ijcai18_fake import write_ijcai18
from tests.preprocessing.movielens_fake import write_movielens

ROW = {"user": 1, "movie": 2, "age": 25, "occupation": 4, "zip": "12345", "genres": ["Drama"]}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return write_movielens(tmp_path_factory.mktemp("movielens") / "raw", 600)


def made(folder, *arguments):
    assert main([*map(str, arguments), "--out", str(folder)]) == 0
    return Encoder.load(folder)


def rows(**columns):
    num_rows = len(next(iter(columns.values())))
    return pa.Table.from_pylist([ROW | {name: values[row] for name, values in columns.items()} for row in range(num_rows)])


def test_a_feature_that_holds_the_scenario_serves_both(raw, tmp_path):
    encoder = made(tmp_path / "out", "movielens-1m", "--raw", raw)
    assert encoder.columns["gender"].uses == ("feature gender", "scenario")
    assert encoder.inputs(rows(gender=["M", "F"])).scenario.tolist() == [1, 0]
    with pytest.raises(DataError, match=r"row 1 \(counted from 0\): gender holds no value of the scenarios, found X"):
        encoder.inputs(rows(gender=["M", "X"]))


def test_a_scenario_without_a_feature_is_a_column_of_its_own_by_value(raw, tmp_path):
    encoder = made(tmp_path / "out", "movielens-1m", "--raw", raw, "--scenario", "age3")
    assert encoder.columns["age3"].uses == ("scenario",)
    assert encoder.inputs(rows(gender=["M", "F"], age3=["35 and over", "under 25"])).scenario.tolist() == [2, 0]


def test_a_feature_of_the_scenarios_name_with_other_values_leaves_it_a_column_of_its_own(raw, tmp_path):
    encoder = made(tmp_path / "parity", "movielens-1m", "--raw", raw, "--scenario", "age3", "--parity")
    assert encoder.columns["age3"].uses == ("feature age3",)
    assert encoder.columns["sample.scenario"].uses == ("scenario",)
    columns = {"age3": [2, 0], "sample.scenario": ["35 and over", "under 25"], "genres": ["Drama", "Drama"]}
    assert encoder.inputs(rows(gender=["M", "F"], **columns)).scenario.tolist() == [2, 0]
    write_ijcai18(tmp_path / "raw")
    encoder = made(tmp_path / "ijcai18", "ijcai18", "--raw", tmp_path / "raw")
    assert "scenario" not in encoder.columns["user_gender_id"].uses
    assert encoder.scenario.column == "sample.scenario"


def test_generated_ids_come_as_such(tmp_path):
    sizes = ("--rows", "500", "--num-ids", "5,9,7", "--sparse-features", "2", "--dense-features", "1", "--multi-features", "1")
    encoder = made(tmp_path / "out", "synthetic", *sizes)
    names = [spec.name for spec in encoder.features if spec.kind == "sparse"]
    row = {spec.name: [1] if spec.kind == "multi" else 1 for spec in encoder.features}
    table = pa.Table.from_pylist([row, row | {names[0]: None}, row | {names[0]: 5}])
    assert encoder.inputs(table).ids[names[0]][0].tolist() == [1, 0, 5]
    with pytest.raises(DataError, match=rf"feature '{names[0]}': ids must lie in 0\.\.5"):
        encoder.inputs(pa.Table.from_pylist([row | {names[0]: 6}]))
    assert encoder.inputs(pa.Table.from_pylist([row | {names[0]: "4"}])).ids[names[0]][0].tolist() == [4]


def test_encoder_folder(raw, tmp_path):
    made(tmp_path / "dataset", "movielens-1m", "--raw", raw)
    assert encoder_folder(tmp_path / "dataset") == tmp_path / "dataset"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(UserError, match=r"run is a run without encoder/manifest\.json"):
        encoder_folder(tmp_path / "run")
    (tmp_path / "dataset").rename(tmp_path / "run" / "encoder")
    assert encoder_folder(tmp_path / "run") == tmp_path / "run" / "encoder"
    with pytest.raises(UserError, match="absent is neither a dataset nor a run: there is no such folder"):
        encoder_folder(tmp_path / "absent")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"other is neither a dataset nor a run: it has neither manifest\.json nor"):
        encoder_folder(tmp_path / "other")


def test_a_damaged_vocabulary_and_a_manifest_without_an_encoding_are_told(raw, tmp_path):
    made(tmp_path / "out", "movielens-1m", "--raw", raw)
    path = tmp_path / "out" / "vocab" / "zip.parquet"
    path.write_bytes((tmp_path / "out" / "vocab" / "genres.parquet").read_bytes())
    with pytest.raises(DataError, match=r"zip\.parquet is damaged"):
        Encoder.load(tmp_path / "out")
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"zip\.parquet is damaged"):
        Encoder.load(tmp_path / "out")
    manifest = DatasetManifest.load(tmp_path / "out")
    manifest.model_copy(update={"encoding": None}).save(tmp_path / "out")
    with pytest.raises(DataError, match="its manifest records no encoding, which this release cannot apply"):
        Encoder.load(tmp_path / "out")
    with pytest.raises(UserError, match="absent is neither a dataset nor a run: there is no such folder"):
        Encoder.load(tmp_path / "absent")


def test_a_run_is_loaded_as_its_dataset_is(raw, tmp_path):
    encoder = made(tmp_path / "run" / "encoder", "movielens-1m", "--raw", raw)
    assert Encoder.load(tmp_path / "run").facts == encoder.facts


@pytest.mark.parametrize("part", ["arrays", "directories", "features", "tables"])
def test_facts_that_lack_a_part_are_damaged(raw, tmp_path, part):
    made(tmp_path / "out", "movielens-1m", "--raw", raw).save(tmp_path / "saved")
    path = tmp_path / "saved" / "encoder.json"
    path.write_text(
        json.dumps({name: of for name, of in json.loads(path.read_text()).items() if name not in (part, "checksum")})
    )
    with pytest.raises(DataError, match=rf"encoder\.json is damaged: KeyError\('{part}'\)\. Export the model again"):
        Encoder.load(tmp_path / "saved")
