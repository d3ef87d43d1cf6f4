"""YAML as people write it: anchors, `<<:`, 1e6 for an integer, words that YAML takes for booleans."""

from pathlib import Path

import pytest
import yaml

from mmlrec.config import load_config
from mmlrec.errors import ConfigError
from mmlrec.paths import shipped_folder
from mmlrec.registry import resolve
from mmlrec.yaml_config import Loader, StrictModel, load_with_base, read_yaml, validate_section
from preprocessing.own_tables.config import read_table_config


class Section(StrictModel):
    """A section with fields of all kinds."""

    count: int = 1
    widths: list[int] = []
    rate: float = 0.5
    name: str = "a"
    by_name: dict[str, int] = {}


def read(tmp_path: Path, text: str) -> dict:
    (tmp_path / "config.yaml").write_text(text)
    return read_yaml(tmp_path / "config.yaml")


def section(tmp_path: Path, text: str) -> Section:
    return validate_section(Section, read(tmp_path, text), prefix="", source="config.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e6", 1_000_000), ("1E+3", 1000), ("-2e2", -200), ("1.5e3", 1500), ("64.0", 64), ("3.", 3), ("0.0", 0)],
)
def test_a_float_without_fraction_is_an_integer_where_one_is_meant(tmp_path, text, value):
    found = section(tmp_path, f"count: {text}\nwidths: [{text}, 7]\nrate: {text}\n")
    assert (found.count, found.widths, found.rate) == (value, [value, 7], value)
    assert [type(each) for each in (found.count, found.widths[0], found.rate)] == [int, int, float]


@pytest.mark.parametrize("text", ["1e-3", "1.5", ".5", "-2.5e0", "1.0001e3"])
def test_a_float_with_a_fraction_is_none(tmp_path, text):
    assert section(tmp_path, f"rate: {text}").rate == float(text)
    with pytest.raises(ConfigError, match=r"count: .*integer; found"):
        section(tmp_path, f"count: {text}")


def test_the_command_line_takes_them_alike():
    path = Path(__file__).parents[1] / "configs" / "mtl" / "movielens-100k.yaml"
    config = load_config(path, ["training.batch_size=1e3", "model.expert_hidden_units=[1e2, 64.0]", "dense.optimizer.lr=1e-2"])
    assert config.training.batch_size == 1000
    assert config.model["expert_hidden_units"] == [100, 64]
    assert config.dense.optimizer.lr == 0.01


def test_anchors_and_merges(tmp_path):
    text = """
    x-shared: &shared {kind: number, scale: log}
    list: &list [1, 2]
    again: *list
    a: &a {<<: *shared, fill: 0}
    b: {fill: 1, <<: *a, kind: id}
    c: {<<: [*b, *shared], more: true}
    d: *shared
    """.replace("\n    ", "\n")
    # `b` has no anchor yet.
    with pytest.raises(ConfigError, match="undefined alias"):
        read(tmp_path, text)
    found = read(tmp_path, text.replace("b: {", "b: &b {"))
    assert found == {
        "list": [1, 2],
        "again": [1, 2],
        "a": {"kind": "number", "scale": "log", "fill": 0},
        "b": {"kind": "id", "scale": "log", "fill": 1},
        "c": {"kind": "id", "scale": "log", "fill": 1, "more": True},
        "d": {"kind": "number", "scale": "log"},
    }


def test_a_mapping_that_is_merged_before_it_is_read(tmp_path):
    """What `<<:` brings is in a mapping beside its own keys, which is no key twice."""
    text = "a: [{<<: &b {<<: &c {k: 1, l: 2}, k: 3}, l: 4}, *b, *c]"
    assert read(tmp_path, text) == {"a": [{"k": 3, "l": 4}, {"k": 3, "l": 2}, {"k": 1, "l": 2}]}


def test_a_base_may_be_a_shipped_configuration_and_one_that_is_not_there_names_both_files(tmp_path):
    """A file beside goes first."""
    config, origin = tmp_path / "my.yaml", {}
    config.write_text("base: base/train\ntraining: {epochs: 2}\n")
    found = load_with_base(config, origin)
    shipped = read_yaml(shipped_folder() / "configs/base/train.yaml")
    assert found == shipped | {"training": shipped["training"] | {"epochs": 2}}
    assert origin["training.batch_size"].endswith("base/train.yaml")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "train").write_text("training: {batch_size: 7}\n")
    assert load_with_base(config, {}) == {"training": {"batch_size": 7, "epochs": 2}}
    config.write_text("base: ../base/train.yaml\n")  # a copy of a shipped one
    message = rf"{config}: base: .*base/train\.yaml: no such config file\..* by its name: base: base/train\."
    with pytest.raises(ConfigError, match=message):
        load_with_base(config, {})


def test_sections_of_one_anchor_are_changed_apart(tmp_path):
    (tmp_path / "base.yaml").write_text("a: &a {lr: 1, inner: {k: 1}}\nb: *a\n")
    (tmp_path / "config.yaml").write_text("base: base.yaml\nb: {lr: 2, inner: {l: 2}}\n")
    origin: dict[str, str] = {}
    found = load_with_base(tmp_path / "config.yaml", origin)
    assert found == {"a": {"lr": 1, "inner": {"k": 1}}, "b": {"lr": 2, "inner": {"k": 1, "l": 2}}}
    assert Path(origin["b.inner.k"]).name == "base.yaml"
    assert Path(origin["b.inner.l"]).name == "config.yaml"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: {k: 1, k: 2}", "key 'k' appears twice"),
        ("a: {k: &a 1, <<: {}, <<: {}}", "key '<<' appears twice"),
        ("a: {<<: 3}", "expected a mapping or list of mappings for merging"),
        ("a: &a [1, *a]", "recursive"),
        ("a: &a {b: *a}", "recursive"),
        ("a: *b", "undefined alias 'b'"),
        ("features: {on: {kind: id}}", "YAML reads the key on as true: put it in quotes where text is meant"),
        ("features: {No: {kind: id}}", "YAML reads the key No as false: put it in quotes where text is meant"),
        ("yes: 1", "YAML reads the key yes as true: put it in quotes"),
        ("{~: 1}", "YAML reads the key ~ as null: put it in quotes"),
    ],
)
def test_what_is_refused_in_words(tmp_path, text, words):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    assert words in str(error.value)
    assert "config.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("text", "found"), [("on", "True"), ("no", "False"), ("~", "None"), ("3", "3"), ("2024-05-01", "date")]
)
def test_a_value_that_is_no_text_is_told_the_quotes(tmp_path, text, found):
    with pytest.raises(ConfigError, match=rf"name: .*string; found .*{found}.*: put it in quotes where text is meant"):
        section(tmp_path, f"name: {text}")
    with pytest.raises(ConfigError, match="put it in quotes") if text == "3" else pytest.raises(ConfigError):
        section(tmp_path, f"by_name: {{{text}: 1}}")
    assert section(tmp_path, f"name: '{text}'\nby_name: {{'{text}': 1}}").name == text


def test_a_section_for_anchors_is_told_its_name(tmp_path):
    with pytest.raises(ConfigError, match=r"begins with x-: x-defs\."):
        section(tmp_path, "defs: {w: &w 3}\ncount: *w\n")
    assert section(tmp_path, "x-defs: {w: &w 3}\ncount: *w\n").count == 3


def test_numbers_that_are_no_floats_stay_what_they_are():
    assert yaml.load("[.inf, 12, 1_000, 0x10, '1e6', 1e400]", Loader) == [float("inf"), 12, 1000, 16, "1e6", float("inf")]


def test_integral_floats_of_a_run_and_of_a_table(tmp_path):
    (tmp_path / "train.yaml").write_text(
        "dataset: {path: nowhere}\nmodel: {name: mmoe, num_experts: 4.0, expert_hidden_units: [1e2, 64]}\n"
        "balancing: {name: pcgrad, refresh_every: 1e1}\ntraining: {max_steps: 1e6}\n"
    )
    config = resolve(load_config(tmp_path / "train.yaml", ["training.batch_size=1e3", "dense.optimizer.lr=1e-3"]), "train.yaml")
    assert (config.training.max_steps, config.training.batch_size, config.dense.optimizer.lr) == (1_000_000, 1000, 0.001)
    assert (config.model["num_experts"], config.model["expert_hidden_units"]) == (4, [100, 64])
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "again.yaml") == config
    (tmp_path / "table.yaml").write_text(
        "features: {item: {kind: id, hash: {num_buckets: 1e6}}, price: {kind: number, buckets: 1e1}}\n"
        "tasks: [{name: click, label: click}]\nsplit: {rule: file, train: [a], test: [b], one_in: 5.0}\n"
    )
    table = read_table_config(tmp_path / "table.yaml")
    assert table.features["item"].hash.num_buckets == 1_000_000
    assert (table.features["price"].buckets, table.split.one_in) == (10, 5)
