"""The command line: one sub-command a dataset, the closing summary, and errors without tracebacks."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, get_args

import mmlrec
from mmlrec.errors import ConfigError, DataError, UserError, discard_output
from mmlrec.extensions import import_modules
from mmlrec.schema import MANIFEST, SPLITS, DatasetManifest
from mmlrec.storage.places import Place, is_local, place
from mmlrec.terminal import plain_output
from preprocessing.dataset import Dataset, dataset_class, datasets, natural
from preprocessing.describing import report as description_report
from preprocessing.describing.drift import drift_lines
from preprocessing.describing.notes import block, look_at_this
from preprocessing.downloading.download import download
from preprocessing.engines import spark
from preprocessing.engines.local import build
from preprocessing.new_rows import ASIDE, NewRows, asked_for, refuse_alone
from preprocessing.new_rows import add_options as add_new_rows
from preprocessing.reading.raw_files import RawFolder
from preprocessing.reading.spool import Spool, spooled
from preprocessing.split_rules import Duplicates
from preprocessing.writing.output import check_files
from preprocessing.writing.upload import MARK

_EXAMPLES = """examples:
  python -m preprocessing movielens-100k --raw raw/ml-100k --out data/movielens-100k --download
  python -m preprocessing movielens-1m --raw raw/ml-1m --out data/movielens-1m
  python -m preprocessing movielens-1m --raw raw/ml-1m --out data/movielens-1m-age --scenario age3
  python -m preprocessing synthetic --rows 1e6 --tasks 2 --scenarios 3 --out data/synthetic
  python -m preprocessing synthetic --help
  python -m preprocessing describe data/movielens-1m --page movielens-1m.html

The folder --out appears when it is complete, never half. Then train on it:
  python -m apps.train --config configs/mtl/movielens.yaml dataset.path=data/movielens-1m
"""
_PROGRAM = "python -m preprocessing"
_DESCRIBE = "describe"  # the one sub-command that is no dataset
#: Options that do not change what is written.
_MOST_GIB = 1 << 20
_NO_CONTENT = {*ASIDE, "imports", "dataset", "raw", "out", "overwrite", "download", "workers", "memory", "engine", "duplicates"}


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code: 0 done, 2 the user can mend it, 130 interrupted."""
    with plain_output():
        return _exit_code(arguments)


def _exit_code(arguments: list[str]) -> int:
    # SIGINT too: a command that a script starts in the background inherits it ignored.
    previous = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _run(arguments)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        discard_output()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


def _stop(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run(arguments: list[str]) -> None:
    before, arguments = _imports().parse_known_args(arguments)
    import_modules(before.imports)
    new, arguments = asked_for(arguments)
    kinds = _asked_for(arguments)
    options = _parser(kinds, new).parse_args(arguments)
    if options.dataset == _DESCRIBE:
        description_report.run(options)
        return
    made = _make(kinds[options.dataset], options, new)
    if made.was_there:
        print(f"{options.out}: already there, made from the same raw files and options.")
    else:
        _print_summary(made.manifest, options.out, made.next_config)


class Made(NamedTuple):
    """A dataset folder. `was_there`: it had been made before, from the same raw files and options."""

    manifest: DatasetManifest
    next_config: str
    was_there: bool


def make(arguments: list[str]) -> Made:
    """The dataset folder that a command line asks for, without a summary.

    Args:
        arguments: of a dataset, such as ["table", "--config", FILE, "--out", FOLDER]; argparse refuses others, and ends Python.

    Raises:
        UserError: options do not go together, raw data are bad, or `--out` cannot be used.
    """
    new, arguments = asked_for(arguments)
    kinds = _asked_for(arguments)
    options = _parser(kinds, new).parse_args(arguments)
    return _make(kinds[options.dataset], options, new)


def _make(kind: type[Dataset], options: argparse.Namespace, new: NewRows | None) -> Made:
    if new is None:
        refuse_alone(options)
    given = options.raw
    if options.engine == "spark" and not (is_local(options.out) and (given is None or is_local(given))):
        raise ConfigError("--engine spark: --raw and --out must be folders that all its machines see; addresses are refused.")
    if options.download and not is_local(given):
        raise ConfigError(f"--download: files are fetched into a folder, and {given} is none. Fetch them, then put them there.")
    with spooled(Path() if given is None else given) as spool:
        options.raw = given and spool.folder
        return _made(kind, options, spool, new)


def _made(kind: type[Dataset], options: argparse.Namespace, spool: Spool, new: NewRows | None) -> Made:
    dataset = kind(options) if new is None else new.dataset(kind, options)
    dataset.duplicates = options.duplicates or dataset.duplicates
    recorded = {name: value for name, value in sorted(vars(options).items()) if name not in _NO_CONTENT}
    recorded["mmlrec"] = mmlrec.__version__
    if dataset.duplicates != "keep":
        recorded["duplicates"] = dataset.duplicates
    if new is not None:
        recorded["new_rows"] = new.record
    if options.download:
        download(dataset, options.raw)
    absent = tuple(dataset.row_files()) if new is not None else ()
    raw = RawFolder(options.raw, dataset.raw_files, _advice(dataset), options.max_bad_rows, options.workers, absent)
    spool.fetch(raw.paths.values())
    if _holds_dataset(options.out):
        if not options.overwrite:
            _refuse_other(options.out, kind.name, recorded, raw)
            return Made(DatasetManifest.load(options.out), dataset.next_config, True)
        _refuse_more(options.out)
    parity = getattr(options, "parity", False)
    how: dict[str, Any] = {"seed": options.seed, "parity": parity, "options": recorded, "fitted": new and new.fitted}
    if options.engine == "spark":
        manifest = spark.build(dataset, raw, options.out, **how)
    else:
        manifest = build(dataset, raw, options.out, memory_bytes=int(options.memory * (1 << 30)), **how)
    return Made(manifest, dataset.next_config, False)


def _asked_for(arguments: list[str]) -> dict[str, type[Dataset]]:
    """The dataset that is named; all of them where none is, for `--help`. Those of other packages are loaded only then."""
    if not arguments or arguments[0].startswith("-"):
        return datasets()
    return {} if arguments[0] == _DESCRIBE else {arguments[0]: dataset_class(arguments[0])}


def _imports() -> argparse.ArgumentParser:
    """The option that is read before all others, because it says which datasets there are."""
    parser = argparse.ArgumentParser(prog=_PROGRAM, add_help=False, allow_abbrev=False)
    parser.add_argument("--import", dest="imports", action="append", default=[], metavar="package.module", help=_IMPORT)
    return parser


def _parser(kinds: dict[str, type[Dataset]], new: NewRows | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        parents=[_imports()],
        allow_abbrev=False,
        description="Turn raw logs into a dataset folder: Parquet parts train/valid/test, vocabularies, manifest.json.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="dataset", metavar="DATASET", required=True)
    for name, kind in kinds.items():
        command = commands.add_parser(
            name,
            help=kind.summary,
            description=_description(kind),
            allow_abbrev=False,
            epilog=kind.examples or None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--out", type=place, required=True, help="the dataset folder to make; or s3://bucket/name")
        command.add_argument("--overwrite", action="store_true", help="replace --out, once the new one is complete")
        command.add_argument("--seed", type=_seed, default=2024, help="of the split and of generated data (default: 2024)")
        command.add_argument("--workers", type=_positive, metavar="N", help=_WORKERS)
        command.add_argument("--memory", type=_gib, default=4.0, metavar="GIB", help=_MEMORY)
        command.add_argument("--engine", choices=["local", "spark"], default="local", help=_ENGINE)
        if kind.raw_files:
            command.add_argument("--raw", type=place, required=True, help="folder of the raw files; or s3://bucket/name")
            command.add_argument("--parity", action="store_true", help=_PARITY)
        if kind.raw_files or kind.rows is not Dataset.rows:
            command.add_argument("--max-bad-rows", type=natural, metavar="N", help=_BAD_ROWS)
            command.add_argument("--duplicates", choices=get_args(Duplicates), help=_DUPLICATES)
        if kind.archive or kind.single_files:
            command.add_argument("--download", action="store_true", help="fetch missing raw files into --raw first")
        command.set_defaults(raw=Path(), download=False, max_bad_rows=0, duplicates=None)
        kind.add_options(command)
        if new is not None:
            new.fill(command)
        elif kind.raw_files or kind.sources is not Dataset.sources:
            add_new_rows(command)
    summary = "what a dataset folder holds: label rates, ids, coverage, examples; as tables and as a page with plots"
    command = commands.add_parser(_DESCRIBE, help=summary, description=f"{_DESCRIBE}: {summary}.")
    description_report.add_options(command)
    return parser


_IMPORT = "a module with a dataset that is not part of mmlrec; may be repeated"


_PARITY = (
    "encode as the reference benchmark does: vocabularies over all rows in the order of raw values, lists as one id per"
    " whole string. It sees valid and test: for comparing with published numbers only"
)


_BAD_ROWS = (
    "pass over up to N bad rows instead of stopping at the first; the first ten are told, all are counted in the manifest"
    " (default: 0)"
)


_DUPLICATES = (
    "rows that are equal in all features, labels and keys: keep them where the split puts them, drop all but the first, or keep"
    " them together on one side of the split; counted in the manifest in any case (default: the dataset's own, see its page)"
)


_WORKERS = "how many threads work beside each other; the dataset is the same, to the byte, for any number (default: all cores)"


_MEMORY = (
    "GiB that the process may take; what does not fit goes to disk beside --out, and the dataset is the same, to the byte"
    " (default: 4)"
)


_ENGINE = (
    "spark: let the executors of Spark do the work, on one machine or many, as Spark's own configuration says; the dataset is"
    " the same, to the byte. See docs/datasets/large_files.md (default: local)"
)


def _gib(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.5 <= value <= _MOST_GIB:
        raise argparse.ArgumentTypeError(f"a number of GiB from 0.5 to {_MOST_GIB:,} is needed, found '{text}'")
    return value


def _positive(text: str) -> int:
    if not natural(text):
        raise argparse.ArgumentTypeError(f"a whole number of 1 or more is needed, found '{text}'")
    return natural(text)


def _seed(text: str) -> int:
    if natural(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"a whole number from 0 to 2^63 - 1 is needed, found '{text}'")
    return natural(text)


def _description(kind: type[Dataset]) -> str:
    return f"{kind.name}: {kind.summary}." + (f"\n\n{_advice(kind)}" if kind.raw_files else "")


def _advice(kind: Dataset | type[Dataset]) -> str:
    names = ", ".join(file.name for file in kind.raw_files)
    lines = [f"Raw files: {names}, from {kind.home}", f"Terms: {kind.terms}"]
    if kind.archive:
        lines.append(f"Put them into --raw (they are in {kind.archive}), or let --download fetch them.")
    if kind.single_files:
        lines.append("Put them into --raw, or let --download fetch those that have an address.")
    if kind.hint:
        lines.append(kind.hint)
    return "\n".join(lines)


def _holds_dataset(out: Place) -> bool:
    """Whether there is a dataset to keep or to replace. Anything else that has content is never replaced."""
    try:
        if (out / MANIFEST).is_file():
            return True
        if not is_local(out) and (out / MARK).is_file():
            return False  # left behind by an attempt that was killed
        other = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    except OSError as error:
        raise DataError(f"{out} cannot be used: {error.strerror}. Choose another --out.") from error
    if other:
        raise DataError(f"{out} exists and is no dataset, so it is never replaced. Choose another --out, or remove it.")
    return False


def _refuse_more(out: Place) -> None:
    """Raise when a folder that is to be replaced holds more than a dataset."""
    more = sorted({path.name for path in out.iterdir()} - {MANIFEST, MARK, "vocab", *SPLITS, *DatasetManifest.load(out).splits})
    if more:
        raise DataError(
            f"{out} holds more than a dataset ({', '.join(more[:5])}), which --overwrite would delete. Move that away, or"
            " choose another --out."
        )


def _refuse_other(out: Place, name: str, recorded: dict[str, Any], raw: RawFolder) -> None:
    """Raise unless `out` is a complete dataset of the same raw files and options."""
    remedy = "Choose another --out, or --overwrite it."
    manifest = DatasetManifest.load(out)
    old = {key: value for key, value in manifest.preprocessing.items() if key not in ("dense_ranges", "dense_fills")}
    if manifest.name != name or old != recorded:
        differing = [key for key in sorted(old.keys() | recorded.keys()) if old.get(key) != recorded.get(key)]
        found = ", ".join(f"{key}={old.get(key)!r} (now {recorded.get(key)!r})" for key in differing)
        raise DataError(f"{out} holds dataset '{manifest.name}' made with other options: {found or 'another name'}. {remedy}")
    if manifest.raw_files != raw.sha256():
        raise DataError(f"{out} was made from other raw files. {remedy}")
    check_files(out, manifest)


def _print_summary(manifest: DatasetManifest, out: Place, config: str) -> None:
    statistics = manifest.statistics
    print(f"{manifest.name}: {statistics['rows']:,} rows")
    print("  " + ", ".join(f"{name} {split.num_rows:,}" for name, split in manifest.splits.items()))
    for name, count in statistics.get("bad_rows", {}).items():
        print(f"  bad rows passed over in {name}: {count:,}")
    for name, reasons in statistics.get("passed_over", {}).items():
        print(f"  passed over in {name}: " + ", ".join(f"{count:,} {reason}" for reason, count in reasons.items()))
    names = ["all", *(manifest.scenario.values if manifest.scenario else [])]
    rows = {"all": statistics["rows"]} | statistics.get("scenario_rows", {})
    duplicates = statistics["duplicates"]
    if duplicates["rows"] or duplicates.get("dropped"):
        print(f"  {_copies(duplicates, len(manifest.splits) > 1)}")
    tasks = [task.name for task in manifest.tasks if task.name in statistics["label_rates"]]
    width = max([12, *(len(task) + 2 for task in tasks)])
    first = max(12, *(len(name) + 2 for name in names))
    print("  label rate".ljust(first + 2) + "".join(f"{task:>{width}}" for task in tasks) + f"{'rows':>16}")
    for name in names:
        rates = [statistics["label_rates"][task][name] for task in tasks]
        shown = "".join(f"{'-' if rate is None else format(rate, '.6f'):>{width}}" for rate in rates)
        print(f"  {name:<{first}}{shown}{rows[name]:>16,}")
    for task, of_splits in statistics.get("label_values", {}).items():
        print(f"  label {task}".ljust(first + 2) + "".join(f"{what:>14}" for what in of_splits["all"]["all"]))
        for name in names:
            values = of_splits["all"][name].values()
            print(f"  {name:<{first}}" + "".join(f"{'-' if value is None else format(value, '.6g'):>14}" for value in values))
    for task, values in statistics.get("bayes_auc", {}).items():
        print(f"  best possible AUC on test, {task}: " + ", ".join(f"{n} {_shown(v)}" for n, v in values.items()))
    tables = ", ".join(f"{table.name} {table.num_rows:,}" for table in manifest.tables[:8])
    more = f", and {len(manifest.tables) - 8} more" if len(manifest.tables) > 8 else ""
    if tables:
        print(f"  rows of the tables: {tables}{more}")
    for table, found in statistics.get("hash_collisions", {}).items():
        print(f"  hashed ids of {table}: {found['values']:,} values in train, {found['rate']:.2%} share their ids with others")
    for table, found in statistics.get("managed_ids", {}).items():
        print(f"  managed ids of {table}: {found['values']:,} values in train, {manifest.table(table).num_rows - 1:,} slots")
    for line in drift_lines(manifest):
        print(f"  {line}")
    if notes := block(look_at_this(manifest, out)):
        print(notes)
    train = f"python -m apps.train --config {config} {shlex.quote(f'dataset.path={out}')}"
    if "train" in manifest.splits:
        print(f"It is in {out}. Run next:\n  {train}")
        return
    told = f"--run-dir RUN --input {shlex.quote(str(out))}"
    print(f"It is in {out}. Run next, with a run that was trained on data encoded so:")
    print(f"  python -m apps.predict {told} --output scores.parquet")
    if any(counts["all"][0] for split in manifest.splits.values() for counts in split.label_counts.values()):
        print(f"  python -m apps.evaluate {told}")


def _copies(counts: dict[str, Any], several: bool) -> str:
    """The line about rows that are equal to others."""
    told = f"copies of rows (duplicates: {counts['policy']}): "
    if counts["policy"] == "drop":
        return f"{told}{counts['dropped']:,} left out"
    sides = f"; of valid {counts['valid_in_train']:,} and of test {counts['test_in_train']:,} are equal to a row of train"
    return f"{told}{counts['rows']:,}, at most {counts['most']:,} rows alike{sides if several else ''}"


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
