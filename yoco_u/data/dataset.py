"""Packed rows of tokens from a prepared dataset. A row is a function of its number and the seed, so nothing has to be saved."""

from functools import lru_cache
from os import PathLike
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from yoco_u.data.index import SplitName
from yoco_u.data.split import SplitDocuments
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

    Attributes:
        documents: those of the split, in the order of the files.

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
        self.documents = SplitDocuments(folder, split)
        self.index, self.split = self.documents.index, self.documents.split
        self.sequence_length, self.seed, self.shuffle = sequence_length, seed, shuffle
        if sequence_length < 1:
            raise UserError(f"sequence_length is {sequence_length}, expected at least 1")
        if self.split.tokens < sequence_length + 1:
            raise UserError(
                f"{folder}: the {split} split has {self.split.tokens} tokens, but one row of sequence_length "
                f"{sequence_length} takes {sequence_length + 1}; give more text or shorten sequence_length"
            )
        self.rows_per_epoch = (self.split.tokens - 1) // sequence_length
        self._check_whole()
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
            length = int(self.documents.lengths[document])
            skip = begin + filled - int(epoch.ends[position]) + length
            take = min(length - skip, len(row) - filled)
            row[filled : filled + take] = self.documents.read(document, skip, take)
            filled += take
            position += 1
        return row

    @property
    def documents_per_epoch(self) -> int:
        """The documents that the rows of an epoch without `shuffle` reach: but for the rest that fills no row, all."""
        inputs = self.rows_per_epoch * self.sequence_length
        return int(np.searchsorted(np.cumsum(self.documents.lengths), inputs)) + 1

    @property
    def bytes_per_target(self) -> float:
        """Bytes of text per target: the split's mean per token; 1 where answers alone, whose tokens are bytes, are targets."""
        return self.split.bytes_per_token if self.index.answers is None else 1.0

    def _check_whole(self) -> None:
        lengths = np.unique(self.documents.lengths)
        if self.index.answers is not None and (len(lengths) > 1 or self.sequence_length % lengths[0]):
            raise UserError(
                f"{self.index.folder}: rows of {self.sequence_length} tokens would cut documents of "
                f"{', '.join(map(str, lengths))} tokens, and part answers from their questions; give all documents one length, "
                "and set training.sequence_length to a multiple of it"
            )

    def _make_epoch(self, number: int) -> _Epoch:
        documents, rows = len(self.documents.lengths), self.rows_per_epoch
        if self.shuffle:
            generator = np.random.default_rng((self.seed, number))
            order, row_order = generator.permutation(documents), generator.permutation(rows)
        else:
            order, row_order = np.arange(documents), np.arange(rows)
        return _Epoch(order, np.cumsum(self.documents.lengths[order]), row_order)
