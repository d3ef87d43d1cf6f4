"""What makes two encodings the same, two datasets the same, and a file the one that was written.

Identities are compared part by part, so that a message can say what differs. They are made of facts and of content, never of
the text of a configuration, of paths, or of how the work was done. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmlrec.errors import DataError
from mmlrec.schema import DatasetManifest, Encoding, Part, facts_digest
from mmlrec.storage.parquet import open_parquet, stored_sha256
from mmlrec.storage.places import Place

#: Of `data_facts`. Raised when they say something else; those of older forms are then still made, for the runs that hold them.
DATA_FORM = 1
_READ_BYTES = 1 << 20
_BATCH_ROWS = 1 << 16
_SHORT = 60  # characters of a fact that a message shows; of a longer one it shows the digest
_RESTORE = "Restore it from a copy, or run the preprocessing again."


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def check_part(folder: Place, part: Part) -> None:
    """Raise DataError when a part of a dataset cannot be read, or is not, to the bit, what was written."""
    path = folder / part.path
    try:
        found = file_sha256(path) if isinstance(path, Path) else stored_sha256(path, part.num_bytes, part.sha256)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: the file cannot be read: {error}. {_RESTORE}") from error
    if found != part.sha256:
        raise DataError(
            f"{path} is damaged: its checksum is {found[:12]}…, the manifest says {part.sha256[:12]}… (sha256)."
            f" The file has changed since it was written. {_RESTORE}"
        )


def type_name(kind: pa.DataType) -> str:
    """int64, string, float32 or float64: names of raw types in an identity, whatever Arrow calls them."""
    names = {pa.large_string(): "string", pa.string(): "string", pa.float32(): "float32", pa.float64(): "float64"}
    return names.get(kind, str(kind))


def vocabulary_digest(path: Place, num_entries: int | None = None) -> str:
    """Digest of the values of a vocabulary file, or of a file of quantiles, in the order of their ids.

    Args:
        num_entries: take the first so many only. A vocabulary begins with another one when the digest of its first entries is
            the other one's.

    Raises:
        DataError: the file cannot be read, or is no vocabulary.
    """
    lengths, values, total = hashlib.sha256(), hashlib.sha256(), 0
    try:
        with open_parquet(path) as file:
            kind = file.schema_arrow.field("value").type
            text = type_name(kind) == "string"
            for batch in file.iter_batches(_BATCH_ROWS, columns=["value"]):
                column = batch.column(0)
                if num_entries is not None:
                    column = column.slice(0, num_entries - total)
                total += len(column)
                if not len(column):
                    break
                if text:
                    column = column.cast(pa.large_binary())
                    _, offset_buffer, data = column.buffers()
                    offsets = np.frombuffer(offset_buffer, np.int64)[column.offset :][: len(column) + 1]
                    lengths.update(np.diff(offsets).astype("<i8").tobytes())
                    if data is not None:
                        values.update(memoryview(data)[int(offsets[0]) : int(offsets[-1])])
                else:
                    numbers = column.to_numpy()
                    numbers = numbers + numbers.dtype.type(0)  # -0 is 0
                    values.update(numbers.astype(numbers.dtype.newbyteorder("<")).tobytes())
    except (OSError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{path} is damaged: the vocabulary cannot be read: {error}. {_RESTORE}") from error
    return facts_digest([type_name(kind), total, lengths.hexdigest(), values.hexdigest()])


def check_vocabulary(path: Place, facts: Mapping[str, Any]) -> None:
    """Raise DataError when a vocabulary file cannot be read, or does not hold the values that its dataset's encoding says.

    Args:
        facts: of the table, in `Encoding.tables`.
    """
    found = vocabulary_digest(path)
    if facts.get("digest", found) != found:
        raise DataError(
            f"{path} is damaged: the digest of its values is {found[:12]}…, the manifest says {facts['digest'][:12]}…."
            f" The file has changed since it was written. {_RESTORE}"
        )


def encoding_differences(
    before: Encoding, manifest: DatasetManifest, folder: Place, *, scenario: bool, labels: bool, extended: bool = False
) -> list[str]:
    """What a dataset encodes otherwise than the data of a run, a line each; empty where equal cells give equal inputs.

    Args:
        before: of the run.
        manifest: of the dataset in `folder`, which has an encoding.
        scenario, labels: whether these parts are compared, too.
        extended: vocabularies that begin with those of the run are let pass: what is behind can be read as unseen.

    Raises:
        DataError: a vocabulary of the dataset, which had to be looked into, is damaged.
    """
    now = manifest.encoding
    assert now is not None
    parts = {"feature": (before.features, now.features), "table": (before.tables, now.tables)}
    if scenario:
        parts["scenario"] = {"": before.scenario or {}}, {"": now.scenario or {}}
    if labels:
        parts["label"] = before.labels, now.labels
    lines: list[str] = []
    for what, (old, new) in parts.items():
        for name in [*old, *(name for name in new if name not in old)]:
            which = f"{what} '{name}'" if name else what
            if name not in old or name not in new:
                lines.append(f"  {which}: {'in the run only' if name in old else 'not in the run'}")
            elif what == "table" and _begins_with(old[name], new[name], manifest, name, folder):
                if extended:
                    continue
                more = new[name]["entries"] - old[name]["entries"]
                lines.append(f"  {which}: the vocabulary of the run, and behind it {more} values that the run has no rows for")
            else:
                lines += fact_differences(which, old[name], new[name], "in the run")
    return lines


def fact_differences(which: str, old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> list[str]:
    """What differs between the facts of one part of an encoding, a line each.

    Args:
        which: names the part.
        where: the old facts are.
    """
    lines = []
    for key in [*old, *(key for key in new if key not in old)]:
        here, there = _shown(new.get(key)), _shown(old.get(key))
        if (key in old) != (key in new) and here == there:  # null, and no such fact
            here, there = ("nothing", there) if key in old else (here, "nothing")
        if here != there or facts_digest(old.get(key)) != facts_digest(new.get(key)):
            lines.append(f"  {which}, {key}: {here} here, {there} {where}")
    return lines


def grown_tables(before: Encoding | None, manifest: DatasetManifest, folder: Place) -> set[str]:
    """Tables of a dataset whose vocabularies begin with those of a run, and go on; none where encodings cannot be compared."""
    if before is None or not before.comparable(manifest.encoding):
        return set()
    now = manifest.encoding
    assert now is not None
    both = before.tables.keys() & now.tables.keys()
    return {name for name in both if _begins_with(before.tables[name], now.tables[name], manifest, name, folder)}


def _begins_with(old: Mapping[str, Any], new: Mapping[str, Any], manifest: DatasetManifest, name: str, folder: Place) -> bool:
    """Whether a vocabulary is the old one with more values behind it."""
    path = next((table.vocabulary for table in manifest.tables if table.name == name), None)
    same_kind = old.get("ids") == new.get("ids") == "vocabulary" and old.get("type") == new.get("type")
    if path is None or not same_kind or new["entries"] <= old["entries"]:
        return False
    check_vocabulary(folder / path, new)
    return vocabulary_digest(folder / path, old["entries"]) == old["digest"]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHORT else f"{facts_digest(value)[:12]}…"


def data_facts(manifest: DatasetManifest) -> dict[str, Any]:
    """Everything that the rows which a run trains on, and their order, depend on, beside its configuration.

    A key of the manifest that has its default is left out, so that one which is added later does not change what is recorded.
    """
    facts: dict[str, Any] = {"form": DATA_FORM, "num_lanes": manifest.num_lanes, "row_group_size": manifest.row_group_size}
    facts["features"] = facts_digest([f.model_dump(mode="json", exclude_defaults=True) for f in manifest.features])
    facts["tables"] = facts_digest(
        [[table.name, table.num_rows, *(["managed"] if table.managed else [])] for table in manifest.tables]
    )
    facts["tasks"] = facts_digest([task.model_dump(mode="json", exclude_defaults=True) for task in manifest.tasks])
    facts["scenarios"] = manifest.scenario.values if manifest.scenario else None
    facts["group_key"] = manifest.group_key
    for name, split in manifest.splits.items():
        facts[f"rows of {name}"] = split.num_rows
        facts[f"parts of {name}, in their order"] = facts_digest([[part.num_rows, part.sha256] for part in split.parts])
    return facts


def data_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two `data_facts`, a line each."""
    return [
        f"  {key}: {_shown(before.get(key))} in the run, {_shown(now.get(key))} now"
        for key in [*before, *(key for key in now if key not in before)]
        if before.get(key) != now.get(key)
    ]


def rows_alone_differ(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two `data_facts` agree in all but which rows there are and in which order: a model can be measured on both.

    How many rows tables have is for the encodings to compare: a vocabulary may have grown.
    """

    def others(facts: Mapping[str, Any]) -> dict[str, Any]:
        rows = ("num_lanes", "row_group_size", "tables", "rows of ", "parts of ")
        return {key: value for key, value in facts.items() if not key.startswith(rows)}

    return others(before) == others(now)


def parts_digest(manifest: DatasetManifest) -> str:
    """The checksums of all parts as one: all that a run recorded of its data before there were `data_facts`."""
    parts = [part.sha256 for split in manifest.splits.values() for part in split.parts]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
