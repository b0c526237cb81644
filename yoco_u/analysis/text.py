"""The text that measures run on, as batches of rows without padding, so that every token counts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from yoco_u.data import Batch, Corpus, Document, DocumentEncoder, PackedDataset, as_batch
from yoco_u.data.synthetic import SyntheticCorpus, document_text, is_synthetic, read_entry
from yoco_u.data.tokenizer import answer_marks
from yoco_u.errors import UserError
from yoco_u.evaluation.held_out import document_encoder, row_length, validation_split
from yoco_u.evaluation.levels import check_bytes

_TOKENS_PER_PASS = 4096


@dataclass(frozen=True)
class Text:
    """The text that a command names.

    Attributes:
        batches: its rows.
        sequence_length: tokens per row; the last row may be shorter.
        answers: of a generated task, the tokens before and behind an answer; None for any other text.
    """

    batches: list[Batch]
    sequence_length: int
    answers: tuple[int, int] | None


def read_text(
    path: Path,
    files: Sequence[str],
    text_field: str,
    sequence_length: int | None,
    tokens: int,
    tokenizer: PreTrainedTokenizerFast,
) -> Text:
    """Read the text that a command names: files, a generated task, or the validation split of a run where nothing is named.

    Args:
        path: a run folder or a saved model.
        files: entries of a corpus, as in a config's `data.corpus`. A generated task stands by itself; its documents are those
            for tests.
        sequence_length: tokens per row; by default those of a document of the task, or the run's, or 1024 for a saved model.
        tokens: the most targets to take.

    Raises:
        UserError: if there is no text, a task does not come by itself or does not fit into the rows, or the model's tokens are
            not bytes, as those of a task are.
    """
    encoder, task = document_encoder(path, tokenizer), _task(files)
    length = sequence_length or (row_length(path) if task is None else task.length)
    if not files:
        dataset = validation_split(path, length)
        return Text(split_batches(dataset, tokens), length, dataset.index.answers)
    answers = None
    if task is not None:
        if length % task.length:
            raise UserError(
                f"{files[0]}: rows of {length} tokens would part answers from their questions; give --sequence-length "
                f"{task.length}, or a multiple of it"
            )
        text = document_text(task, task.levels[0], 0, held_out=True)
        check_bytes(text, encoder.encode([text])[0])
        answers = answer_marks(tokenizer)
    return Text(document_batches(encoder, Corpus(files, text_field).documents(), length, tokens), length, answers)


def _task(files: Sequence[str]) -> SyntheticCorpus | None:
    """The generated task among the entries of a corpus; None if there is none."""
    entries = [entry for entry in files if is_synthetic(entry)]
    if not entries:
        return None
    if len(files) > 1:
        other = files[1] if files[0] == entries[0] else files[0]
        raise UserError(f"{entries[0]} is a generated task, and {other} comes with it; give a task by itself, or texts alone")
    return read_entry(entries[0])


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
        UserError: if there is no text, or one spells the token that separates documents.
    """
    parts: list[NDArray[np.uint32]] = []
    read = 0
    for document in documents:
        parts += encoder.encode_documents([document])
        read += len(parts[-1])
        if read > tokens:
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
