"""The shards of a dataset, which hold its tokens: `<split>-<number>.bin` beside `<split>-<number>.offsets.npy`."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from numpy.typing import NDArray

from yoco_u.data.index import Shard, Split, SplitName
from yoco_u.errors import UserError

_OPEN_FILES = 64


def shard_paths(folder: Path, split: SplitName, number: int) -> tuple[Path, Path]:
    """The two files of a shard: its token ids one after another, and int64 offsets (documents + 1,), where each begins."""
    name = f"{split}-{number:05d}"
    return folder / f"{name}.bin", folder / f"{name}.offsets.npy"


class TokenFiles:
    """The token ids of the shards of a split.

    They are read and not mapped into memory, where a file that shrinks would kill the process. A few files are held open, since
    a large dataset has more shards than a process may have open files.
    """

    def __init__(self, paths: Sequence[Path], dtype: np.dtype[np.unsignedinteger]) -> None:
        self._paths, self._dtype = paths, dtype
        self._open: OrderedDict[int, FileIO] = OrderedDict()  # the one that was read last comes last
        self._lock = threading.Lock()

    def read(self, shard: int, start: int, count: int) -> NDArray[np.unsignedinteger]:
        """The tokens start .. start + count - 1 of a shard, (count,).

        Raises:
            UserError: if the file has become shorter, or cannot be read.
        """
        tokens = np.empty(count, self._dtype)
        into = tokens.data.cast("B")
        try:
            with self._lock:
                file = self._opened(shard)
                file.seek(start * self._dtype.itemsize)
                while into and (got := file.readinto(into)):
                    into = into[got:]
        except OSError as error:
            raise UserError(f"{self._paths[shard]}: cannot read it ({error.strerror or error})") from None
        if into:
            name = self._paths[shard]
            raise UserError(f"{name}: ends before token {start + count}; the file was cut, prepare the dataset again")
        return tokens

    def _opened(self, shard: int) -> FileIO:
        if shard not in self._open:
            if len(self._open) == _OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            self._open[shard] = self._paths[shard].open("rb", buffering=0)
        self._open.move_to_end(shard)
        return self._open[shard]


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
