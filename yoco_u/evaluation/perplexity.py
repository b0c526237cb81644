"""Loss, perplexity and bits per byte of texts. Every token counts once, and bytes are counted exactly."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from yoco_u.config import Config
from yoco_u.data import Batch, Document, DocumentEncoder, PackedDataset
from yoco_u.data.batches import document_ids
from yoco_u.device import read_back
from yoco_u.errors import UserError
from yoco_u.evaluation.finite import check_finite
from yoco_u.model import YocoUForCausalLM
from yoco_u.model.loss import IGNORED
from yoco_u.training import evaluate
from yoco_u.training.distributed import Distributed
from yoco_u.training.forward import count_targets
from yoco_u.training.metrics import loss_figures
from yoco_u.training.validation import batch_nats

_LOGITS_PER_PASS = 1 << 25
_DOCUMENTS_PER_BATCH = 64


class Score(Config):
    """How well a model predicts texts.

    Attributes:
        loss: nats per predicted token.
        perplexity: exp(loss).
        bits_per_byte: loss of all predicted tokens in bits, divided by the bytes of the texts.
        tokens: number of predicted tokens: those of the texts, and the end of each document.
        documents: number of texts of which tokens are predicted.
        bytes: bytes of the texts in UTF-8.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    documents: int
    bytes: int


def score_documents(
    model: YocoUForCausalLM,
    encoder: DocumentEncoder,
    documents: Iterable[Document],
    sequence_length: int,
    num_loops: int | None = None,
) -> Score:
    """Score texts as training reads them: packed one after another into rows, in which a token sees its own document only.

    A document that continues in another row begins there without context. The last row may be shorter, so that every token is
    scored.

    Args:
        model: the model, in evaluation mode.
        encoder: its tokenizer.
        documents: the texts.
        sequence_length: tokens per row, and so the longest context.
        num_loops: loop count T; the model's own by default.

    Raises:
        UserError: if there is no text, one spells the token that separates documents, or the loss is not finite.
    """
    counts = _Counts()
    rows = _rows(_stream(encoder, documents, counts), sequence_length)
    nats, tokens = _score_rows(model, rows, sequence_length, encoder.eot_id, num_loops)
    if not tokens:
        raise UserError("there is no text in the files; give files that hold some")
    check_finite(nats, model)
    figures = loss_figures(nats / tokens, counts.bytes / tokens)
    return Score(**figures, tokens=tokens, documents=counts.documents, bytes=counts.bytes)


def score_split(
    model: YocoUForCausalLM, dataset: PackedDataset, distributed: Distributed, num_loops: int | None = None
) -> Score:
    """Score all whole rows of a split of a prepared dataset, as training evaluates them.

    The number of bytes is an estimate: the split's mean bytes per token times the scored tokens. Where answers
    alone are targets, it is exact.

    Args:
        model: the model, on this process's device.
        dataset: the split, made with `shuffle=False`.
        distributed: the processes among which the rows are divided.
        num_loops: loop count T; the model's own by default.

    Raises:
        UserError: if the loss is not finite.
    """
    rows = min(_rows_per_pass(model, dataset.sequence_length), dataset.rows_per_epoch)
    found = evaluate(model, dataset, None, rows, distributed, "float32", num_loops)
    check_finite(found.loss, model)
    bytes_scored = round(found.tokens * dataset.bytes_per_target)
    return Score(**asdict(found), documents=dataset.documents_per_epoch, bytes=bytes_scored)


def _score_rows(
    model: YocoUForCausalLM, rows: Iterator[NDArray[np.int64]], sequence_length: int, eot_id: int, num_loops: int | None = None
) -> tuple[float, int]:
    """The loss in nats, summed over all targets, and the number of targets.

    Args:
        rows: rows of up to sequence_length + 1 tokens, the last of which is only a target.
    """
    count = _rows_per_pass(model, sequence_length)
    nats, total = torch.zeros((), dtype=torch.float64, device=model.device), 0
    for batch in _batches(rows, count, eot_id):
        nats += batch_nats(model, batch, model.device, "float32", num_loops)
        total += count_targets(batch["shift_labels"])
    return read_back(nats), total


def _rows_per_pass(model: YocoUForCausalLM, sequence_length: int) -> int:
    return max(1, _LOGITS_PER_PASS // (sequence_length * model.config.vocab_size))


class _Counts:
    """What `_stream` has read so far."""

    documents = 0
    bytes = 0


def _stream(encoder: DocumentEncoder, documents: Iterable[Document], counts: _Counts) -> Iterator[NDArray[np.uint32]]:
    """The tokens of each document, and at the end one more `<|endoftext|>`, the last document's end."""
    read = iter(documents)
    while batch := list(islice(read, _DOCUMENTS_PER_BATCH)):
        counts.documents += len(batch)
        counts.bytes += sum(len(document.text.encode()) for document in batch)
        yield from encoder.encode_documents(batch)
    if counts.documents:
        yield np.array([encoder.eot_id], dtype=np.uint32)


def _rows(stream: Iterator[NDArray[np.uint32]], length: int) -> Iterator[NDArray[np.int64]]:
    """Rows (up to length + 1,) of the stream; the last token of a row is the first of the next."""
    held = np.empty(0, dtype=np.int64)
    for tokens in stream:
        held = np.concatenate([held, tokens.astype(np.int64)])
        start = 0
        while len(held) - start > length:
            yield held[start : start + length + 1]
            start += length
        held = held[start:]
    if len(held) > 1:
        yield held


def _batches(rows: Iterator[NDArray[np.int64]], count: int, eot_id: int) -> Iterator[Batch]:
    """Batches of `count` rows; the last may have fewer. A short row is padded, without targets in the padding."""
    while some := list(islice(rows, count)):
        yield _batch(some, eot_id)


def _batch(rows: list[NDArray[np.int64]], eot_id: int) -> Batch:
    length = max(len(row) for row in rows) - 1
    inputs = torch.full((len(rows), length), eot_id)
    targets = torch.full((len(rows), length), IGNORED)
    for i, row in enumerate(rows):
        inputs[i, : len(row) - 1] = torch.from_numpy(row[:-1])
        targets[i, : len(row) - 1] = torch.from_numpy(row[1:])
    return Batch(input_ids=inputs, shift_labels=targets, document_ids=document_ids(inputs, eot_id))
