"""What people write on their first day: the message names the key that was meant, and how its value is written."""

import pytest

from mmlrec.registry import load
from preprocessing.command_line import main as preprocess

TRAIN = """
dataset:
  path: {folder}
  tasks: [click, buy]
model:
  name: mmoe
  num_experts: 4
dense:
  optimizer: {{lr: 0.001}}
training:
  batch_size: 512
  epochs: 2
"""

#: Mistake -> words of the command line, what the message holds.
COMMAND_LINE = {
    "a level too high": (["dense.lr=1e-3"], ["dense.lr: unknown key", "Did you mean 'dense.optimizer.lr'?"]),
    "the wrong section": (
        ["training.lr=1e-3"],
        ["training.lr: unknown key", "Did you mean 'embeddings.optimizer.lr' or 'dense.optimizer.lr'?"],
    ),
    "no section": (["batch_size=512"], ["batch_size: unknown key", "Did you mean 'training.batch_size'?"]),
    "an option of the model at the top": (["num_experts=8"], ["num_experts: unknown key", "Did you mean 'model.num_experts'?"]),
    "an option of the model in training": (["training.dropout=0.1"], ["Did you mean 'model.dropout'?"]),
    "a training key in the model": (["model.batch_size=512"], ["model.batch_size", "Did you mean 'training.batch_size'?"]),
    "an option of another method": (["model.num_shared_experts=2"], ["model.num_shared_experts", "It belongs to ple"]),
    "sections joined by an underscore": (["embedding_dim=16"], ["embedding_dim", "Did you mean 'embeddings.dim'?"]),
    "a section misspelt": (["train.batch_size=512"], ["train: unknown key", "Did you mean 'training'?"]),
    "another word for a key": (["training.learning_rate=0.01"], ["dense.optimizer.lr", "embeddings.optimizer.lr"]),
    "another word for early stopping": (["early_stopping=5"], ["Did you mean 'training.patience'?"]),
    "an old place": (["loss.loss_weights={click: 2}"], ["balancing.loss_weights"]),
    "camel case": (["training.batchSize=512"], ["training.batchSize", "Did you mean 'batch_size'?"]),
    "a fraction for an integer": (["training.batch_size=512.5"], ["training.batch_size", "integer", "512.5"]),
    "a fraction of an epoch": (["training.epochs=0.5"], ["training.epochs", "integer"]),
    "percent": (["model.dropout=10%"], ["model.dropout", "Write a share: 0.1."]),
    "percent without its sign": (["model.dropout=20"], ["model.dropout", "20 % is 0.2"]),
    "a unit": (["training.timeout=10min"], ["training.timeout", "without a unit", "in seconds"]),
    "milliseconds": (["training.timeout=600000"], ["training.timeout", "in seconds"]),
    "a decimal comma": (["dense.optimizer.lr=0,001"], ["dense.optimizer.lr", "such as 0.001"]),
    "quotes around a number": (["training.seed='3'"], ["training.seed", "Write it without quotes: 3."]),
    "Python's None": (["training.patience=None"], ["training.patience", "null is the word for none"]),
    "a word that YAML reads as false, for none": (
        ["training.patience=off"],
        ["training.patience", "null is the word for none"],
    ),
    "text for a list": (["dataset.tasks=click,buy"], ["dataset.tasks", "Write a list: [click, buy]."]),
    "a number for a list": (["model.expert_hidden_units=64"], ["model.expert_hidden_units", "Write a list: [64]."]),
    "text for a switch": (["model.use_bn='yes'"], ["model.use_bn", "Write true or false, without quotes."]),
    "a word that YAML reads as false": (["dataset.tasks=[click, no]"], ["dataset.tasks.1", "in quotes"]),
    "a number for a text": (["run_dir=2024"], ["run_dir", "put it in quotes"]),
    "no blank behind a colon": (["balancing.loss_weights={buy:2}"], ["loss_weights", "a blank is missing", "buy: 2"]),
    "a name for a section": (["model=ple"], ["model: must be a section", "such as model.name=ple"]),
    "a name for an optimizer": (["dense.optimizer=sgd"], ["dense.optimizer", "such as dense.optimizer.name=sgd"]),
    "a misspelt method": (["model.name=mmeo"], ["model.name", "Did you mean 'mmoe'?"]),
    "a misspelt strategy": (["balancing.name=pc_grad"], ["balancing", "Did you mean 'pcgrad'?"]),
    "a misspelt choice": (["training.precision=fp23"], ["training.precision", "Did you mean 'fp32'?"]),
    "capitals": (["dataset.setting=MTL"], ["dataset.setting", "Did you mean 'mtl'?"]),
    "dashes": (["--model.name=ple"], ["unrecognized arguments: --model.name=ple", "have no dashes", ": model.name=ple"]),
    "dashes and a blank": (["--training.batch_size", "512"], ["have no dashes", ": training.batch_size=VALUE"]),
    "a colon": (["training.seed:", "3"], ["'training.seed:' is not of the form", "e.g. training.seed=VALUE"]),
    "blanks around the equals sign": (
        ["training.seed", "=", "3"],
        ["'training.seed' is not of the form", "without blanks around the equals sign", "training.seed=VALUE"],
    ),
    "a list that the shell has cut": (["dataset.tasks=[click,", "buy]"], ["dataset.tasks", "put the whole into quotes"]),
}


@pytest.mark.parametrize("mistake", COMMAND_LINE)
def test_on_the_command_line(run_app, tmp_path, mistake):
    words, expected = COMMAND_LINE[mistake]
    (tmp_path / "train.yaml").write_text(TRAIN.format(folder=tmp_path / "data"))
    code, error = run_app("train", "--config", tmp_path / "train.yaml", "--show", *words)
    assert code == 2
    for fragment in expected:
        assert fragment in error, error


#: Mistake -> text that is replaced, what by, what the message holds besides the file.
IN_A_FILE = {
    "no blank behind a colon": ("  batch_size: 512", "  batch_size:512", ["Line 11 lacks a blank", "batch_size: 512"]),
    "no blank behind the only colon": (
        "  batch_size: 512\n  epochs: 2",
        "  batch_size:512",
        ["training: must be a section", "A blank is missing behind the colon: write batch_size: 512."],
    ),
    "a tab": ("  epochs: 2", "\tepochs: 2", ["Line 12 is indented by a tab"]),
    "a key twice": ("  epochs: 2", "  epochs: 2\n  epochs: 3", ["key 'epochs' appears twice"]),
    "nothing indented": (
        "  batch_size: 512\n  epochs: 2",
        "batch_size: 512",
        ["training", "batch_size", "'training.batch_size'"],
    ),
    "dashes": (
        "  batch_size: 512\n  epochs: 2",
        "  - batch_size: 512\n  - epochs: 2",
        ["training: must be a section", "Leave the dashes away"],
    ),
    "an equals sign": ("  batch_size: 512\n  epochs: 2", "  epochs=2", ["training: must be a section", "epochs: 2"]),
    "dots": ("training:", "training.seed: 3\ntraining:", ["training.seed", "nested: training: {seed: 3}"]),
    "a name for a section": ("model:\n  name: mmoe\n  num_experts: 4", "model: ple", ["model.name=ple"]),
}


@pytest.mark.parametrize("mistake", IN_A_FILE)
def test_in_a_training_file(run_app, tmp_path, mistake):
    old, new, expected = IN_A_FILE[mistake]
    text = TRAIN.format(folder=tmp_path / "data")
    assert old in text
    path = tmp_path / "train.yaml"
    path.write_text(text.replace(old, new))
    code, error = run_app("train", "--config", path, "--show")
    assert code == 2
    for fragment in (str(path), *expected):
        assert fragment in error, error


TABLE = """
files: [log.csv]
csv: {separator: ","}
features:
  item: {kind: id, type: int, min_count: 2}
  price: {kind: number}
tasks:
  - {name: click, label: click}
keys:
  user: {type: int}
group_key: user
"""

#: As above, of the configuration of a table.
IN_A_TABLE = {
    "a key of a section at the top": ("csv:", "separator: ';'\ncsv:", ["separator", "csv.separator"]),
    "a key of a feature at the top": ("csv:", "min_count: 2\ncsv:", ["min_count", "'features.NAME.min_count'"]),
    "a key of the hash in its feature": ("min_count: 2", "num_buckets: 1e6", ["features.item", "hash.num_buckets"]),
    "an integral float": ("min_count: 2", "min_count: 2.5", ["features.item.min_count", "integer", "2.5"]),
    "a misspelt kind": ("kind: number", "kind: numbr", ["features.price.kind", "Did you mean 'number'?"]),
    "a type of pandas": ("type: int, min", "type: int64, min", ["features.item.type", "Did you mean 'int'?"]),
    "text for a list": ("files: [log.csv]", "files: log.csv", ["files", "Write a list: [log.csv]."]),
    "no blank behind a colon": ("{kind: number}", "{kind:number}", ["features.price", "a blank is missing", "kind: number"]),
    "no blank behind a colon in a block": ('csv: {separator: ","}', "csv:\n  quoted:true", ["csv", "write quoted: true"]),
    "a tab": ("  price:", "\tprice:", ["Line 6 is indented by a tab"]),
    "a dash too few": ("  - {name: click", "  {name: click", ["tasks", "list"]),
    "another word": ("label: click", "column: click", ["tasks.0.column", "label"]),
    "a misspelt key of the rows": ("group_key: user", "group_key: usr", ["group_key", "Did you mean 'user'?"]),
}


@pytest.mark.parametrize("mistake", IN_A_TABLE)
def test_in_the_configuration_of_a_table(tmp_path, capsys, mistake):
    old, new, expected = IN_A_TABLE[mistake]
    assert old in TABLE
    path = tmp_path / "table.yaml"
    path.write_text(TABLE.replace(old, new, 1))
    assert preprocess(["table", "--config", str(path), "--raw", str(tmp_path), "--out", str(tmp_path / "data")]) == 2
    error = capsys.readouterr().err
    for fragment in (str(path), *expected):
        assert fragment in error, error


def test_the_good_files_pass(tmp_path):
    (tmp_path / "train.yaml").write_text(TRAIN.format(folder=tmp_path / "data"))
    assert load(tmp_path / "train.yaml", ["training.patience=null", "model.dropout=1e-1"]).training.patience is None


def test_a_shipped_configuration_misspelt(run_app):
    code, error = run_app("train", "--config", "mtl/movielens100k", "--show")
    assert code == 2
    assert "mtl/movielens100k: no such config file" in error
    assert "Did you mean 'mtl/movielens-100k'?" in error
    assert "mtmsl/amazon" in error
