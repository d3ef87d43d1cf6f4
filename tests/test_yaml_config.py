"""YAML and sections, whatever they are of: numbers as they are written."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from mmlrec.config import load_config
from mmlrec.errors import ConfigError
from mmlrec.registry import resolve
from mmlrec.yaml_config import StrictModel, read_yaml, validate_section
from preprocessing.own_tables.config import read_table_config


class Inner(StrictModel):
    kind: Literal["inner"] = "inner"
    size: int | None = None
    widths: list[Annotated[int, Field(gt=0)]] = []
    rate: float = 0.0


class Other(StrictModel):
    kind: Literal["other"]
    size: int = 0


class Outer(StrictModel):
    size: int = 0
    by_name: dict[str, Annotated[Inner | Other, Field(discriminator="kind")]] = {}
    inner: Inner = Inner()


def outer(tmp_path: Path, text: str) -> Outer:
    (tmp_path / "x.yaml").write_text(text)
    return validate_section(Outer, read_yaml(tmp_path / "x.yaml"), prefix="", source="x.yaml")


@pytest.mark.parametrize("written", ["1e3", "1E3", "1.0e+3", "1e+3", "1000.0", "1000."])
def test_a_float_without_a_fraction_is_an_integer_where_one_is_wanted(tmp_path, written):
    text = (
        f"size: {written}\ninner: {{size: {written}, widths: [7, {written}], rate: {written}}}\n"
        f"by_name: {{a: {{kind: other, size: {written}}}, b: {{kind: inner, widths: [{written}]}}}}\n"
    )
    found = outer(tmp_path, text)
    assert found == Outer(
        size=1000,
        inner=Inner(size=1000, widths=[7, 1000], rate=1000.0),
        by_name={"a": Other(kind="other", size=1000), "b": Inner(widths=[1000])},
    )
    whole = (found.size, found.inner.size, found.inner.widths[1], found.by_name["a"].size, found.by_name["b"].widths[0])
    assert {type(value) for value in whole} == {int}
    assert type(found.inner.rate) is float


@pytest.mark.parametrize("written", ["1.5", "1e-3", "1e20", ".inf", "'1e3'", "true"])
def test_another_number_is_no_integer(tmp_path, written):
    with pytest.raises(ConfigError, match=r"x.yaml: inner.size: .*integer"):
        outer(tmp_path, f"size: 1e3\ninner: {{size: {written}}}\n")


def test_bounds_hold_for_integers_written_as_floats(tmp_path):
    with pytest.raises(ConfigError, match=r"inner\.widths\.1: Input should be greater than 0; found 0"):
        outer(tmp_path, "inner: {widths: [1e1, 0.0]}")


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
