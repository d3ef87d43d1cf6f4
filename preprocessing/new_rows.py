"""Rows that are encoded as those of another dataset were: the options `--like`, `--extend`, `--split`, `--refit-ranges`.

The other one is a dataset or a run, which keeps the encoder of its dataset. What its options were is taken from its manifest;
an option that is given, and that would encode anything otherwise, is refused by name.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from mmlrec.encoding.folders import encoder_folder
from mmlrec.errors import ConfigError
from mmlrec.schema import SPLITS, DatasetManifest
from mmlrec.storage.places import Place, place
from preprocessing.dataset import Dataset
from preprocessing.encoding.fitted import Fitted
from preprocessing.split_rules import InOrder, OneSplit

#: The one split of new rows, unless another is named.
DEFAULT_SPLIT = "test"
#: Options of every dataset that say how, and not what.
_OWN = ("seed", "parity", "max_bad_rows", "duplicates")
#: What options for new rows leave among the options of a dataset, which are recorded without them.
ASIDE = ("like", "extend", "refit_ranges", "split_names", "one_split", "labels_optional", "new_files")
_LIKE = (
    "encode the rows as those of this dataset, or of this run's dataset, were encoded: vocabularies and ranges as they are"
    " there. Labels may be absent, and columns that only labels need. Options that are not given are taken from there"
)
_EXTEND = (
    "the same, with vocabularies that grow: known values keep their ids, values that are new in train get ids behind them, and"
    " ranges stay. Labels are needed"
)
_REFIT = "with --extend: fit the ranges, quantiles and means of numbers anew, as an encoding of its own"
_NAMES = (
    "of new rows: the name of the split that holds them all; or train,valid,test: the dataset's own rule (default: test with"
    " --like, the dataset's own rule with --extend)"
)


@dataclass(frozen=True)
class NewRows:
    """What was asked for.

    Attributes:
        given: dataset or run. folder: its encoder. manifest: of the encoder.
        grows, refit_ranges: see `Fitted`.
        split: the one that gets all rows; None: the dataset's own rule.
    """

    given: Place
    folder: Place
    manifest: DatasetManifest
    grows: bool
    refit_ranges: bool
    split: OneSplit | None

    @property
    def option(self) -> str:
        """By which it was asked for."""
        return "--extend" if self.grows else "--like"

    @property
    def fitted(self) -> Fitted:
        """What the engines take over."""
        return Fitted.of(self.folder, grows=self.grows, refit_ranges=self.refit_ranges)

    def fill(self, command: argparse.ArgumentParser) -> None:
        """Let options that are not given be those of the other dataset, and need none that it had to be given."""
        recorded, kept = self._recorded, {}
        for action in command._actions:
            if action.dest in recorded:
                action.required = False
                kept[action.dest] = recorded[action.dest]
        command.set_defaults(**kept, like=self.manifest, one_split=self.split is not None, labels_optional=not self.grows)

    @property
    def record(self) -> dict[str, Any]:
        """For the manifest of the new dataset: what it was made like, and how many rows and labels the train rows had."""
        train, before = self.manifest.splits.get("train"), self.manifest.preprocessing.get("new_rows", {})
        encoding = self.manifest.encoding
        assert encoding is not None
        return {
            "option": self.option.removeprefix("--"),
            "of": str(self.given),
            "digest": encoding.digest,
            "refit_ranges": self.refit_ranges,
            "split": self.split.name if self.split else None,
            "train": train.model_dump(mode="json", exclude={"parts"}) if train else before.get("train"),
        }

    @property
    def _recorded(self) -> dict[str, Any]:
        """The dataset's own options; the seed, too."""
        return {name: value for name, value in self.manifest.preprocessing.items() if name not in _OWN[1:]}

    def dataset(self, kind: type[Dataset], options: argparse.Namespace) -> Dataset:
        """The dataset of these options, ready to take the rows.

        Raises:
            ConfigError: they do not go with it, or change what is encoded.
        """
        self._check(kind, options)
        dataset = kind(options)
        dataset.take_over(self.manifest)
        names = [[task.name, task.kind] for task in dataset.tasks], [[task.name, task.kind] for task in self.manifest.tasks]
        if names[0] != names[1]:
            raise ConfigError(f"{self.option}: the tasks are {names[0]}, those of {self.given} are {names[1]}. Use these.")
        if not self.grows:
            dataset.take_new_rows()
        if options.duplicates is None and not self.grows:
            dataset.duplicates = "keep"  # each row is to get its score
        if self.split is not None:
            dataset.split = self.split
        return dataset

    def _check(self, kind: type[Dataset], options: argparse.Namespace) -> None:
        if self.manifest.name != kind.name:
            raise ConfigError(
                f"{self.option}: {self.given} holds '{self.manifest.name}', not '{kind.name}'. Name the same dataset."
            )
        if isinstance(kind.split, InOrder):
            raise ConfigError(
                f"{self.option}: {kind.name} is generated and comes encoded: there are no new rows to encode. Leave the option"
                " away."
            )
        if self.manifest.parity or getattr(options, "parity", False):
            what = f"{self.given} is" if self.manifest.parity else "--parity asks to be"
            raise ConfigError(
                f"{self.option}: {what} encoded as the reference benchmark does, by all rows together, and nothing can be added"
                " to that. It is for comparing with published numbers only."
            )
        if self.manifest.encoding is None:
            raise ConfigError(
                f"{self.option}: {self.given} does not record its encoding: a release before made it. Make it again from its"
                " raw files."
            )
        out = options.out
        if any(other.resolve() == out.resolve() for other in (self.given, self.folder)):
            raise ConfigError(f"--out {out} is what {self.option} names, which would be replaced. Choose another --out.")
        self._refuse_changes(kind, options)

    def _refuse_changes(self, kind: type[Dataset], options: argparse.Namespace) -> None:
        """Raise ConfigError naming an option that is not as in the other dataset and changes what is encoded."""
        recorded = {name: value for name, value in self._recorded.items() if name in vars(options)}
        changed = [name for name, value in recorded.items() if vars(options)[name] != value]
        if not changed:
            return
        before = kind.encodes(argparse.Namespace(**(vars(options) | recorded)))
        for name in changed:
            now = kind.encodes(argparse.Namespace(**(vars(options) | recorded | {name: vars(options)[name]})))
            if parts := [part for part in {**before, **now} if before.get(part) != now.get(part)]:
                raise ConfigError(
                    f"{self.option}: --{name.replace('_', '-')} {vars(options)[name]} encodes otherwise than {self.given}:"
                    f" {', '.join(parts[:5])}{' ...' if len(parts) > 5 else ''}. Leave it away, or make a dataset of its own"
                    f" without {self.option}."
                )


def add_options(command: argparse.ArgumentParser) -> None:
    """Show the options in the help of a dataset; `asked_for` takes them off the command line before it is parsed."""
    own_split = any("--split" in action.option_strings for action in command._actions)
    group = command.add_argument_group("new rows, encoded as others were (docs/new_rows.md)")
    _add(group, split="" if own_split else "--split")
    if own_split:
        group.description = f"With one of them, --split NAME is {_NAMES}"


def asked_for(arguments: list[str]) -> tuple[NewRows | None, list[str]]:
    """The options for new rows, and the other arguments.

    Raises:
        ConfigError: they do not go together, or with a name of a split that cannot be.
        UserError: what they name is neither dataset nor run.
    """
    known, _ = _parser("").parse_known_args(arguments)
    if known.like is None and known.extend is None:
        if known.refit_ranges:
            raise ConfigError("--refit-ranges goes with --extend.")
        return None, arguments
    known, rest = _parser("--split").parse_known_args(arguments)
    if known.like is not None and known.extend is not None:
        raise ConfigError("--like and --extend exclude each other: vocabularies stay as they are, or grow.")
    if known.refit_ranges and known.like is not None:
        raise ConfigError("--refit-ranges goes with --extend: with --like everything stays as it is.")
    given = known.like if known.extend is None else known.extend
    grows = known.extend is not None
    split = _split_of(known.split_names, grows)
    folder = encoder_folder(given)
    manifest = DatasetManifest.load(folder)
    return NewRows(given, folder, manifest, grows, known.refit_ranges, split), rest


def refuse_alone(options: argparse.Namespace) -> None:
    """Raise ConfigError where options for new rows stand without those that name the other dataset."""
    for name, written in (("split_names", "--split"), ("new_files", "--files")):
        if getattr(options, name, None) is not None:
            raise ConfigError(f"{written} is for new rows: it goes with --like or --extend.")


def _split_of(text: str | None, grows: bool) -> OneSplit | None:
    if text is None:
        return None if grows else OneSplit(DEFAULT_SPLIT)
    if "," not in text:
        return OneSplit(text)
    if tuple(text.split(",")) != SPLITS:
        raise ConfigError(f"--split {text}: give one name for all rows, or {','.join(SPLITS)} for the dataset's own rule.")
    return None


def _parser(split: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m preprocessing", add_help=False, allow_abbrev=False)
    _add(parser, split)
    return parser


def _add(parser: argparse._ActionsContainer, split: str) -> None:
    parser.add_argument("--like", type=place, metavar="DATASET_OR_RUN", help=_LIKE)
    parser.add_argument("--extend", type=place, metavar="DATASET_OR_RUN", help=_EXTEND)
    parser.add_argument("--refit-ranges", action="store_true", help=_REFIT)
    if split:
        parser.add_argument(split, dest="split_names", metavar="NAME", help=_NAMES)
