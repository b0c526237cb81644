"""The documents of a split of a prepared dataset."""

from collections.abc import Iterator
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from yoco_u.data.index import DatasetIndex, SplitName
from yoco_u.data.shards import TokenFiles, shard_paths
from yoco_u.errors import UserError


class SplitDocuments:
    """The documents of a split in the order of the files, read from the shards on demand.

    Attributes:
        index: the dataset's index.
        split: the totals of the split.
        lengths: (documents,), the tokens of each document.

    Raises:
        UserError: if the split is missing or damaged; when documents are read, if a token is not in the vocabulary.
    """

    def __init__(self, folder: str | PathLike[str], split: SplitName) -> None:
        self.index = DatasetIndex.load(folder)
        self.split, self._name = self.index.split(split), split
        paths = [shard_paths(Path(folder), split, number) for number in range(len(self.split.shards))]
        offsets = [self._offsets(number, *files) for number, files in enumerate(paths)]
        self._tokens = TokenFiles([tokens for tokens, _ in paths], self._dtype)
        self._starts = np.concatenate([offset[:-1] for offset in offsets])  # (documents,), each counted within its shard
        self.lengths = np.concatenate([np.diff(offset) for offset in offsets])
        self._shard_ends = np.cumsum([len(offset) - 1 for offset in offsets])  # (shards,): first document after each shard

    def __iter__(self) -> Iterator[NDArray[np.unsignedinteger]]:
        """The tokens of each document, `eot_id` first."""
        for document, length in enumerate(self.lengths.tolist()):
            yield self.read(document, 0, length)

    def read(self, document: int, skip: int, take: int) -> NDArray[np.unsignedinteger]:
        """The tokens (take,) of a document behind its first `skip`."""
        shard = int(np.searchsorted(self._shard_ends, document, side="right"))
        tokens = self._tokens.read(shard, int(self._starts[document]) + skip, take)
        largest = int(tokens.max(initial=0))
        if largest >= self.index.vocab_size:
            raise UserError(
                f"{self.index.folder}: token {largest} of the {self._name} split is beyond the vocabulary of "
                f"{self.index.vocab_size}; the dataset is damaged, remove it and prepare it again"
            )
        return tokens

    @property
    def _dtype(self) -> np.dtype[np.unsignedinteger]:
        return np.dtype(self.index.dtype).newbyteorder("<")

    def _offsets(self, number: int, tokens: Path, offsets: Path) -> NDArray[np.int64]:
        """The offsets of a shard, after comparing both of its files with the index."""
        shard, expected = self.split.shards[number], self.split.shards[number].tokens * self._dtype.itemsize
        try:
            size = tokens.stat().st_size
            found: NDArray[np.int64] = np.load(offsets)
        except (FileNotFoundError, ValueError, EOFError) as error:
            raise UserError(f"{self.index.folder}: the dataset is damaged ({error}); remove it and prepare it again") from None
        if size != expected:
            raise UserError(
                f"{tokens}: {size} bytes, expected {expected} for {shard.tokens} tokens; "
                "remove the dataset and prepare it again"
            )
        if found.shape != (shard.documents + 1,) or found[-1] != shard.tokens:
            raise UserError(f"{offsets}: does not fit the index; remove the dataset and prepare it again")
        return found
