"""The index of a checkpoint, `.metadata`: which tensor lies where in its files; read without running what it may hold.

torch.distributed.checkpoint writes the index with pickle, and a pickle is a program: a run folder from elsewhere could do
anything. Here it may name only what an index consists of.
"""

from __future__ import annotations

import io
import pickle
from typing import Any, cast

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, StorageMeta, TensorStorageMetadata

from mmlrec.errors import CheckpointError, StorageError
from mmlrec.run_folder.summed_files import Files
from mmlrec.storage.places import Place, read

_INDEX = ".metadata"
_METADATA = "torch.distributed.checkpoint.metadata"
#: Module -> names: all that occurs in the indices that DCP has written for us, on one rank and several, with sharded tables.
ALLOWED = {
    _METADATA: {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", "bfloat16", "bool", "float16", "float32", "float64", "int32", "int64", "uint8"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
    # Python 3.13 pickles paths under this name.
    "pathlib._local": {"PosixPath"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of ours contains")


def _memory_format(kind: Any, name: Any) -> Any:
    """The one thing that `getattr` may do: Python 3.11.0 to 3.11.3, as of Debian 12, pickle members of an enumeration so."""
    if kind is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError("it names builtins.getattr, which no checkpoint of ours contains")
    return _MEM_FORMAT_ENCODING[name]


class Reader(FileSystemReader):
    """DCP's reader of a folder, with an index that cannot run code."""

    def __init__(self, folder: Place) -> None:
        super().__init__("")
        self.fs = Files()
        self.path = cast(Any, folder)
        self.folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            CheckpointError: it is damaged, names anything else than an index does, or holds anything but tensors (what DCP
                calls bytes would be unpickled, too).
        """
        path = self.folder / _INDEX
        try:
            found = _Unpickler(io.BytesIO(read(path))).load()
        except StorageError:
            raise
        # A damaged pickle may raise anything.
        except Exception as error:
            raise CheckpointError(f"{path} is not the index of a checkpoint: {error}. Do not use this run folder.") from error
        if not isinstance(found, Metadata):
            raise CheckpointError(f"{path} is not the index of a checkpoint. Do not use this run folder.")
        for key, entry in found.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                kind = type(entry).__name__
                raise CheckpointError(f"{path}: entry '{key}' is no tensor: {kind}. Do not use this run folder.")
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found
