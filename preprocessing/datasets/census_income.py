"""Census-Income (KDD) and Adult: income above 50,000 dollars, and never married (docs/datasets/census_income.md).

Lane and Kohavi, "Census-Income (KDD)", UCI Machine Learning Repository, 2000.
Becker and Kohavi, "Adult", UCI Machine Learning Repository, 1996.

Fields are divided by a comma and a blank. `?` is a missing value; `NA` and `Not in universe` are values like others.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmlrec.schema import Task, label_column
from preprocessing.dataset import PLACE_KEYS, Dataset, dense, place_columns, sparse
from preprocessing.reading.delimited import DelimitedText
from preprocessing.reading.raw_files import Block, RawFile
from preprocessing.split_rules import SIDE_COLUMN, FileSplit, RandomSplit

_TERMS = (
    "UCI Machine Learning Repository, Creative Commons Attribution 4.0 (CC BY 4.0): name the donors, Terran Lane and Ron Kohavi"
    " (KDD), Barry Becker and Ron Kohavi (Adult)."
)
_CODE, _NUMBER, _TEXT = pa.int64(), pa.float32(), pa.string()
_KDD = {
    **{"age": _NUMBER, "class_worker": _TEXT, "det_ind_code": _CODE, "det_occ_code": _CODE, "education": _TEXT},
    **{"wage_per_hour": _NUMBER, "hs_college": _TEXT, "marital_stat": _TEXT, "major_ind_code": _TEXT, "major_occ_code": _TEXT},
    **{"race": _TEXT, "hisp_origin": _TEXT, "sex": _TEXT, "union_member": _TEXT, "unemp_reason": _TEXT},
    **{"full_or_part_emp": _TEXT, "capital_gains": _NUMBER, "capital_losses": _NUMBER, "stock_dividends": _NUMBER},
    **{"tax_filer_stat": _TEXT, "region_prev_res": _TEXT, "state_prev_res": _TEXT, "det_hh_fam_stat": _TEXT},
    **{"det_hh_summ": _TEXT, "instance_weight": _NUMBER, "mig_chg_msa": _TEXT, "mig_chg_reg": _TEXT, "mig_move_reg": _TEXT},
    **{"mig_same": _TEXT, "mig_prev_sunbelt": _TEXT, "num_emp": _NUMBER, "fam_under_18": _TEXT, "country_father": _TEXT},
    **{"country_mother": _TEXT, "country_self": _TEXT, "citizenship": _TEXT, "own_or_self": _NUMBER, "vet_question": _TEXT},
    **{"vet_benefits": _NUMBER, "weeks_worked": _NUMBER, "year": _NUMBER, "income_50k": _TEXT},
}
_ADULT = {
    **{"age": _NUMBER, "workclass": _TEXT, "fnlwgt": _NUMBER, "education": _TEXT, "education_num": _NUMBER},
    **{"marital_status": _TEXT, "occupation": _TEXT, "relationship": _TEXT, "race": _TEXT, "sex": _TEXT},
    **{"capital_gain": _NUMBER, "capital_loss": _NUMBER, "hours_per_week": _NUMBER, "native_country": _TEXT, "income": _TEXT},
}


class _Census(Dataset):
    """What both releases share: two labels made of two fields, and the other fields as features.

    Attributes:
        fields: all fields of a line, in order: texts and codes become sparse features, numbers dense ones.
        labels: task -> its field, the values that mean 0, the values that mean 1.
        weight: the field that says how many people a row stands for; no property of the person.
        left_out: further fields that are no features.
        comment: see `RawFolder.blocks`.
    """

    terms = _TERMS
    next_config = "configs/mtl/census.yaml"
    fields: dict[str, pa.DataType]
    labels: ClassVar[dict[str, tuple[str, list[str], list[str]]]]
    weight: ClassVar[str]
    left_out: ClassVar[tuple[str, ...]] = ()
    comment: ClassVar[str] = ""

    def __init__(self, options: argparse.Namespace) -> None:
        self.parity: bool = options.parity
        absent = {*self.left_out, *(field for field, _, _ in self.labels.values())}
        if not (options.keep_weight or self.parity):
            absent.add(self.weight)
        kinds = {name: kind for name, kind in self.fields.items() if name not in absent}
        self.features = tuple(dense(name) if kind == _NUMBER else sparse(name, kind) for name, kind in kinds.items())
        self.tasks = tuple(Task(name=name) for name in self.labels)
        self.keys, self.numbering = PLACE_KEYS, tuple(PLACE_KEYS)
        self.split = FileSplit(valid_from="test", one_in=2)

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """`--keep-weight`."""
        parser.add_argument(
            "--keep-weight",
            action="store_true",
            help=f"take {cls.weight} as a feature, as the reference benchmark does and the data's authors ask not to"
            " (--parity implies it)",
        )

    def sources(self) -> Iterator[DelimitedText]:
        """Train file, then test file."""
        for file in self.raw_files:
            optional = self.may_lack(*(field for field, _, _ in self.labels.values()))
            yield DelimitedText(file.name, ", ", self.fields, comment=self.comment, optional=optional)

    def rows(self, block: Block) -> dict[str, Any]:
        """Cleaned columns and the two labels."""
        block = self._cleaned(block)
        for field, zeros, ones in self.labels.values():
            known = self.labelled(block, field, self._known(zeros + ones, block.source.name))
            block = block.require(known, f"{field} holds no known value: {{{field}!r}}. Mend the line.")
        columns: dict[str, Any] = {feature.name: block.table[feature.name] for feature in self.features}
        for task, (field, _, ones) in self.labels.items():
            positive = pc.is_in(block.table[field], pa.array(ones)).cast(pa.float32())
            columns[label_column(task)] = pc.if_else(pc.is_valid(block.table[field]), positive, None)
        columns |= place_columns(block)
        columns[SIDE_COLUMN] = np.full(len(block.lines), 2 if block.source.name.endswith(".test") else 0)
        return columns

    def _known(self, values: list[str], file: str) -> list[str]:
        """Those of a label's values that a file may hold."""
        return values

    def _cleaned(self, block: Block) -> Block:
        """Texts without blanks at their ends. `?` and an empty text become null; in the parity form they are values."""
        columns = {}
        for name, kind in self.fields.items():
            columns[name] = block.table[name]
            if kind == _TEXT:
                text = pc.utf8_trim_whitespace(block.table[name])
                missing = pc.is_in(text, pa.array([] if self.parity else ["", "?"], _TEXT))
                columns[name] = pc.if_else(missing, None, text)
        return replace(block, table=pa.table(columns))


class CensusIncome(_Census):
    """199,523 + 99,762 rows, 42 fields."""

    name = "census-income"
    summary = "Census-Income (KDD): 299,285 people of 1994-95; two tasks, income and marital"
    home = "https://archive.ics.uci.edu/dataset/117/census+income+kdd"
    archive = "https://archive.ics.uci.edu/static/public/117/census+income+kdd.zip"
    hint = "No login. Without census-income.data, census-income.test alone serves with --variant recut."
    raw_files: tuple[RawFile, ...] = (
        RawFile("census-income.data"),
        RawFile("census-income.test", 51_918_813, "98402b1ab879573d0a7f38a699a40258080e25e33d3401e7bf9c96d3fa0fab8c"),
    )
    fields = _KDD
    labels = {
        "income": ("income_50k", ["- 50000."], ["50000+."]),
        "marital": (
            "marital_stat",
            [
                *("Divorced", "Married-A F spouse present", "Married-civilian spouse present", "Married-spouse absent"),
                *("Separated", "Widowed"),
            ],
            ["Never married"],
        ),
    }
    weight = "instance_weight"

    def __init__(self, options: argparse.Namespace) -> None:
        if options.codes_as_sparse:
            self.fields = _KDD | dict.fromkeys(("own_or_self", "vet_benefits", "year"), _CODE)
        super().__init__(options)
        if options.variant == "recut":
            self.raw_files = self.raw_files[1:]
            self.split = RandomSplit()

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """`--variant`, `--codes-as-sparse`."""
        super().add_options(parser)
        parser.add_argument(
            "--variant",
            choices=["official", "recut"],
            default="official",
            help="official: train on census-income.data, census-income.test halved at random into valid and test; recut:"
            " census-income.test alone, cut 8:1:1 at random, for when the other file is not at hand (default: official)",
        )
        parser.add_argument(
            "--codes-as-sparse", action="store_true", help="own_or_self, vet_benefits and year as ids, not as numbers"
        )


class AdultIncome(_Census):
    """32,561 + 16,281 rows, 15 fields. `relationship` (husband, wife) nearly tells the marital status, so it is left out."""

    name = "adult-income"
    summary = "Adult: 48,842 people of 1994; the same tasks in small"
    home = "https://archive.ics.uci.edu/dataset/2/adult"
    hint = "No login."
    archive = "https://archive.ics.uci.edu/static/public/2/adult.zip"
    raw_files = (
        RawFile("adult.data", 3_974_305, "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d"),
        RawFile("adult.test", 2_003_153, "a2a9044bc167a35b2361efbabec64e89d69ce82d9790d2980119aac5fd7e9c05"),
    )
    next_config = "configs/mtl/adult.yaml"
    fields = _ADULT
    labels = {
        "income": ("income", ["<=50K", "<=50K."], [">50K", ">50K."]),  # the test file has the period
        "marital": (
            "marital_status",
            ["Divorced", "Married-AF-spouse", "Married-civ-spouse", "Married-spouse-absent", "Separated", "Widowed"],
            ["Never-married"],
        ),
    }
    weight = "fnlwgt"
    left_out = ("relationship",)
    comment = "|"  # the test file begins with such a line, and both end with a blank one

    def _known(self, values: list[str], file: str) -> list[str]:
        """Only the test file's labels of income end in a period, which tells when the two are swapped."""
        return values if file.endswith(".test") else [value for value in values if not value.endswith(".")]


DATASETS = (CensusIncome, AdultIncome)
