"""Packed rows of tokens from a prepared dataset. A row is a function of its number and the seed, so nothing has to be saved."""

from collections.abc import Iterator
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from yoco_u.data.index import DatasetIndex, SplitName
from yoco_u.data.shards import TokenFiles, shard_paths
from yoco_u.errors import UserError


class _Epoch(NamedTuple):
    """The order of documents and rows in an epoch.

    Attributes:
        order: (documents,), the documents in the order in which they are laid into the stream.
        ends: (documents,), where each document of `order` ends in the stream, in tokens.
        rows: (rows,), the rows of the stream in the order in which they are read.
    """

    order: NDArray[np.int64]
    ends: NDArray[np.int64]
    rows: NDArray[np.int64]


class PackedDataset:
    """An endless sequence of packed rows, each of N + 1 tokens for `sequence_length` N, read from the shards on demand.

    In each epoch the documents, each beginning with `eot_id`, are laid one after another into one stream. Row r of the stream
    is the tokens r N to r N + N, of which the last is only a target; tokens at the end that do not fill a row are left out.
    With `shuffle` a generator seeded by (seed, epoch) permutes the documents in the stream and then the rows; without, both
    keep the order of the files. Memory is O(documents + rows); no shard is ever loaded whole.

    Raises:
        UserError: if the split is missing or damaged, or too short for one row, or if rows would cut generated documents, whose
            answers would then lack their questions; when rows are read, if a token is not in the vocabulary.
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        split: SplitName,
        sequence_length: int,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        self.index = DatasetIndex.load(folder)
        self.split, self._split_name = self.index.split(split), split
        self.sequence_length, self.seed, self.shuffle = sequence_length, seed, shuffle
        if sequence_length < 1:
            raise UserError(f"sequence_length is {sequence_length}, expected at least 1")
        if self.split.tokens < sequence_length + 1:
            raise UserError(
                f"{folder}: the {split} split has {self.split.tokens} tokens, but one row of sequence_length "
                f"{sequence_length} takes {sequence_length + 1}; give more text or shorten sequence_length"
            )
        self.rows_per_epoch = (self.split.tokens - 1) // sequence_length
        paths = [shard_paths(Path(folder), split, number) for number in range(len(self.split.shards))]
        offsets = [self._offsets(number, *files) for number, files in enumerate(paths)]
        self._tokens = TokenFiles([tokens for tokens, _ in paths], self._dtype)
        self._starts = np.concatenate([offset[:-1] for offset in offsets])  # (documents,), each counted within its shard
        self._lengths = np.concatenate([np.diff(offset) for offset in offsets])  # (documents,)
        self._check_whole()
        self._shard_ends = np.cumsum([len(offset) - 1 for offset in offsets])  # (shards,): first document after each shard
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def row(self, index: int) -> NDArray[np.int64]:
        """The tokens (sequence_length + 1,) of row `index` >= 0; the count continues from epoch to epoch."""
        if index < 0:
            raise IndexError(f"row {index}, expected at least 0")
        number, within = divmod(index, self.rows_per_epoch)
        epoch = self._epoch(number)
        begin = int(epoch.rows[within]) * self.sequence_length
        row = np.empty(self.sequence_length + 1, dtype=np.int64)
        filled = 0
        position = int(np.searchsorted(epoch.ends, begin, side="right"))
        while filled < len(row):
            document = int(epoch.order[position])
            skip = begin + filled - int(epoch.ends[position] - self._lengths[document])
            take = min(int(self._lengths[document]) - skip, len(row) - filled)
            start = int(self._starts[document]) + skip
            row[filled : filled + take] = self._tokens.read(self._shard(document), start, take)
            filled += take
            position += 1
        self._check_ids(row)
        return row

    def documents(self) -> Iterator[NDArray[np.unsignedinteger]]:
        """The tokens of each document of the split, in the order of the files, `eot_id` first."""
        for document, (start, length) in enumerate(zip(self._starts.tolist(), self._lengths.tolist(), strict=True)):
            tokens = self._tokens.read(self._shard(document), start, length)
            self._check_ids(tokens)
            yield tokens

    def _check_whole(self) -> None:
        lengths = np.unique(self._lengths)
        if self.index.answers is not None and (len(lengths) > 1 or self.sequence_length % lengths[0]):
            raise UserError(
                f"{self.index.folder}: rows of {self.sequence_length} tokens would cut documents of "
                f"{', '.join(map(str, lengths))} tokens, and part answers from their questions; give all documents one length, "
                "and set training.sequence_length to a multiple of it"
            )

    def _check_ids(self, tokens: NDArray[np.integer]) -> None:
        largest = int(tokens.max(initial=0))
        if largest >= self.index.vocab_size:
            raise UserError(
                f"{self.index.folder}: token {largest} of the {self._split_name} split is beyond the vocabulary of "
                f"{self.index.vocab_size}; the dataset is damaged, remove it and prepare it again"
            )

    def _shard(self, document: int) -> int:
        return int(np.searchsorted(self._shard_ends, document, side="right"))

    def _make_epoch(self, number: int) -> _Epoch:
        documents, rows = len(self._lengths), self.rows_per_epoch
        if self.shuffle:
            generator = np.random.default_rng((self.seed, number))
            order, row_order = generator.permutation(documents), generator.permutation(rows)
        else:
            order, row_order = np.arange(documents), np.arange(rows)
        return _Epoch(order, np.cumsum(self._lengths[order]), row_order)

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
