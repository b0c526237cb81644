"""The text that measures run on, as batches of rows without padding, so that every token counts."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from yoco_u.data import Batch, Corpus, Document, DocumentEncoder, PackedDataset, as_batch
from yoco_u.errors import UserError
from yoco_u.evaluation.held_out import validation_split

_TOKENS_PER_PASS = 4096


def read_batches(
    path: Path, files: Sequence[str], text_field: str, sequence_length: int, tokens: int, tokenizer: PreTrainedTokenizerFast
) -> list[Batch]:
    """The text that a command names: files, or the validation split of a run where there are none.

    Args:
        path: a run folder or a saved model.
        files: entries of a corpus, as in a config's `data.corpus`.
        tokens: the most targets to take.

    Raises:
        UserError: if there is no text.
    """
    if files:
        return document_batches(
            DocumentEncoder(tokenizer), Corpus(list(files), text_field).documents(), sequence_length, tokens
        )
    return split_batches(validation_split(path, sequence_length), tokens)


def split_batches(dataset: PackedDataset, tokens: int) -> list[Batch]:
    """Take the first rows of an unshuffled split: enough for `tokens` targets, at least one row and at most all.

    All tokens are targets here, also where training counts answers alone.
    """
    rows = min(dataset.rows_per_epoch, -(-tokens // dataset.sequence_length))
    return _batches([dataset.row(i) for i in range(rows)], dataset.index.eot_id)


def document_batches(encoder: DocumentEncoder, documents: Iterable[Document], sequence_length: int, tokens: int) -> list[Batch]:
    """Pack documents one after another into rows, as `yoco-u evaluate` does; the last row may be shorter.

    Args:
        tokens: the most targets to take; documents beyond them are not read.

    Raises:
        UserError: if there is no text.
    """
    parts: list[NDArray[np.uint32]] = []
    for document in documents:
        parts += encoder.encode([document.text])
        if sum(map(len, parts)) > tokens:
            break
    if not parts:
        raise UserError("there is no text in the files; give files that hold some")
    stream = np.append(np.concatenate(parts), encoder.eot_id).astype(np.int64)[: tokens + 1]
    starts = range(0, len(stream) - 1, sequence_length)
    return _batches([stream[start : start + sequence_length + 1] for start in starts], encoder.eot_id)


def _batches(rows: list[NDArray[np.int64]], eot_id: int) -> list[Batch]:
    """Batches of rows, each (tokens + 1,), of which only the last may be shorter than the others."""
    full = [row for row in rows if len(row) == len(rows[0])]
    step = max(1, _TOKENS_PER_PASS // (len(rows[0]) - 1))
    groups = [full[start : start + step] for start in range(0, len(full), step)]
    groups += [[rows[-1]]] if len(full) < len(rows) else []
    return [as_batch(np.stack(group), eot_id) for group in groups]
