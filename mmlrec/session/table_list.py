"""Tables that no dataset has yet, described in a file: a manifest without rows, to plan with."""

from __future__ import annotations

from pydantic import Field, ValidationError, model_validator

from mmlrec.errors import DataError
from mmlrec.schema import DatasetManifest, Feature, Scenario, Split, Table, Task
from mmlrec.storage.places import Place
from mmlrec.yaml_config import StrictModel, read_yaml, validate_section


class DescribedTable(StrictModel):
    """One table, used by one feature of the same name."""

    name: str
    rows: int = Field(ge=1, le=10**15)
    dim: int | None = Field(default=None, gt=0, multiple_of=4, description="Width; embeddings.dim when absent.")
    pooling_length: float = Field(default=1.0, gt=0, description="Mean number of ids of a row.")


class TableList(StrictModel):
    """The whole file: YAML, of which JSON is a part."""

    name: str
    tables: list[DescribedTable] = Field(min_length=1)
    dense: int = Field(default=0, ge=0, description="Features that are numbers.")
    tasks: int = Field(default=1, ge=1)
    scenarios: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _distinct(self) -> TableList:
        names = [table.name for table in self.tables]
        if len(set(names)) < len(names):
            raise ValueError(f"a table is named twice: {max(names, key=names.count)}")
        return self

    @model_validator(mode="after")
    def _as_a_dataset_may_have_them(self) -> TableList:
        try:
            self.manifest()
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
        return self

    @property
    def dims(self) -> dict[str, int]:
        """Tables of a width of their own, as `embeddings.table_dim` has them."""
        return {table.name: table.dim for table in self.tables if table.dim is not None}

    def manifest(self) -> DatasetManifest:
        """The manifest of a dataset with these tables and no rows."""
        multi = {table.name: table.pooling_length != 1 for table in self.tables}
        sparse = [Feature(name=name, kind="multi" if of else "sparse", table=name) for name, of in multi.items()]
        dense = [Feature(name=f"dense_{number}", kind="dense") for number in range(self.dense)]
        scenario = Scenario(name="scenario", values=[f"s{n}" for n in range(self.scenarios)]) if self.scenarios > 1 else None
        return DatasetManifest(
            name=self.name,
            tables=[Table(name=table.name, num_rows=table.rows) for table in self.tables],
            features=[*sparse, *dense],
            tasks=[Task(name=f"task_{number}") for number in range(self.tasks)],
            scenario=scenario,
            num_lanes=1,
            row_group_size=1,
            splits={"train": Split(parts=[], num_rows=0, label_counts={})},
            statistics={"mean_lengths": {table.name: table.pooling_length for table in self.tables if multi[table.name]}},
        )


def read_table_list(path: Place) -> TableList:
    """Read a description of tables.

    Raises:
        DataError: it is missing.
        ConfigError: it says something that tables do not have.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file. --tables takes a description of tables (docs/scaling.md) or a dataset folder.")
    return validate_section(TableList, read_yaml(path), prefix="", source=str(path))
