"""Reads the shards of torch.distributed.checkpoint without ever running code that a checkpoint brings along.

torch's own reader takes `.metadata`, and every value that is no tensor, for trusted pickles, which may call any function.
Here a pickle may only make the objects that torch writes there.
"""

import io
import pickle
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *(
        (_METADATA, name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}
_PATHS = {"PosixPath": PurePosixPath, "WindowsPath": PureWindowsPath}


def load_shards(tensors: dict[str, Any], folder: Path, no_dist: bool) -> None:
    """Read a sharded checkpoint into the tensors of a state dict, in place, and into its other values.

    Raises:
        Exception: of nearly any kind if the checkpoint is damaged, or holds what no checkpoint holds.
    """
    reader = _Reader(folder)
    reader.read_metadata()  # `load` would look elsewhere for metadata that it cannot read, and log tracebacks
    load(tensors, storage_reader=reader, planner=_Planner(), no_dist=no_dist)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if module in ("pathlib", "pathlib._local") and name in _PATHS:  # the module's name in Python 3.13, and in others
            return _PATHS[name]
        raise pickle.UnpicklingError(f"the metadata asks for {module}.{name}, which no checkpoint needs")


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"the metadata is a {type(metadata).__name__}")
        for stored in (metadata.storage_data or {}).values():
            if Path(stored.relative_path).name != stored.relative_path:
                raise pickle.UnpicklingError(f"the metadata points out of the checkpoint, to {stored.relative_path!r}")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        checked = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), checked)
        checked.seek(0)
        super().load_bytes(read_item, checked)
