"""The shards of a dataset, which hold its tokens: `<split>-<number>.bin` beside `<split>-<number>.offsets.npy`."""

import threading
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from numpy.typing import NDArray

from yoco_u.data.index import Shard, Split, SplitName
from yoco_u.errors import UserError


def shard_paths(folder: Path, split: SplitName, number: int) -> tuple[Path, Path]:
    """The two files of a shard: its token ids one after another, and int64 offsets (documents + 1,), where each begins."""
    name = f"{split}-{number:05d}"
    return folder / f"{name}.bin", folder / f"{name}.offsets.npy"


class TokenFile:
    """The token ids of a shard. They are read and not mapped into memory, where a file that shrinks would kill the process."""

    def __init__(self, path: Path, dtype: np.dtype[np.unsignedinteger]) -> None:
        self._path, self._dtype = path, dtype
        self._file = path.open("rb", buffering=0)
        self._lock = threading.Lock()

    def read(self, start: int, count: int) -> NDArray[np.unsignedinteger]:
        """The tokens start .. start + count - 1, (count,).

        Raises:
            UserError: if the file has become shorter since it was opened, or cannot be read.
        """
        tokens = np.empty(count, self._dtype)
        into = tokens.data.cast("B")
        try:
            with self._lock:
                self._file.seek(start * self._dtype.itemsize)
                while into and (got := self._file.readinto(into)):
                    into = into[got:]
        except OSError as error:
            raise UserError(f"{self._path}: cannot read it ({error.strerror or error})") from None
        if into:
            raise UserError(f"{self._path}: ends before token {start + count}; the file was cut, prepare the dataset again")
        return tokens


class ShardWriter:
    """Appends documents to the shards of a split. No document lies across two shards."""

    def __init__(self, folder: Path, split: SplitName, dtype: str, shard_tokens: int) -> None:
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shards: list[Shard] = []
        self._file: IO[bytes] | None = None
        self._offsets = [0]
        self._bytes = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file:
            self._file.close()

    def add(self, tokens: NDArray[np.uint32], text_bytes: int) -> None:
        """Append one document (tokens,), whose text has `text_bytes` bytes in UTF-8."""
        if self._file is None:
            self._file = shard_paths(self._folder, self._split, len(self._shards))[0].open("wb")
        self._file.write(tokens.astype(self._dtype).tobytes())
        self._offsets.append(self._offsets[-1] + len(tokens))
        self._bytes += text_bytes
        if self._offsets[-1] >= self._shard_tokens:
            self._close()

    def finish(self) -> Split:
        """Close the last shard, and return the totals of all."""
        self._close()
        return Split(shards=tuple(self._shards))

    def _close(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self._file = None
        np.save(shard_paths(self._folder, self._split, len(self._shards))[1], np.array(self._offsets, dtype="<i8"))
        shard = Shard(tokens=self._offsets[-1], documents=len(self._offsets) - 1, bytes=self._bytes)
        self._shards.append(shard)
        self._offsets = [0]
        self._bytes = 0
