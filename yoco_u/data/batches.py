"""The batch of every training step, a function of the step's number: the same whatever the number of processes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from yoco_u.data.dataset import PackedDataset
from yoco_u.errors import UserError


class Batch(TypedDict):
    """What a training step reads: int64 tensors (rows, sequence_length) on the CPU. The keys are arguments of the model.

    Attributes:
        input_ids: the tokens of the rows.
        shift_labels: the target at each token, which is the token after it; -100 where there is no target, as at tokens that
            are no answer in a dataset whose answers alone are targets.
        document_ids: the document of each token, counted from 1 in each row, one more at each `<|endoftext|>`.
    """

    input_ids: torch.Tensor
    shift_labels: torch.Tensor
    document_ids: torch.Tensor


def as_batch(rows: NDArray[np.int64], eot_id: int, answers: tuple[int, int] | None = None) -> Batch:
    """A batch from rows of tokens (rows, sequence_length + 1); the last token of each row is only a target.

    Args:
        answers: the tokens before and behind an answer, if answers alone are targets.
    """
    tokens = torch.from_numpy(rows)
    input_ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if answers is not None:
        labels.masked_fill_(~in_answers(tokens, *answers)[:, 1:], -100)
    return Batch(input_ids=input_ids, shift_labels=labels, document_ids=document_ids(input_ids, eot_id))


def in_answers(tokens: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """Which tokens (rows, tokens) are part of an answer: those after a token `begin`, up to the one before the next `end`."""
    places = torch.arange(1, tokens.shape[1] + 1).expand_as(tokens)
    begun, ended = (torch.where(tokens == mark, places, 0).cummax(dim=1).values for mark in (begin, end))
    return (begun > ended) & (tokens != begin)


def document_ids(input_ids: torch.Tensor, eot_id: int) -> torch.Tensor:
    """The document of each token of packed rows (rows, tokens), as in `Batch`."""
    begins = input_ids == eot_id
    begins[:, 0] = True  # also where a row begins in the middle of a document
    return begins.long().cumsum(dim=1)


class BatchLoader:
    """Batches of R = `rows_per_step` rows: step s has the rows s R to (s + 1) R - 1 of the dataset.

    Each rank takes a contiguous part of them, in the order of the ranks. The loader remembers nothing from step to step, so a
    run resumes by asking for its next step.

    Raises:
        UserError: if the rows of a step do not divide among the ranks.
    """

    def __init__(self, dataset: PackedDataset, rows_per_step: int, rank: int = 0, world_size: int = 1) -> None:
        if rows_per_step < 1 or rows_per_step % world_size:
            raise UserError(
                f"{rows_per_step} rows a step do not divide among {world_size} processes; "
                f"choose a positive multiple of {world_size}"
            )
        self.dataset, self.rows_per_step = dataset, rows_per_step
        self._rows = rows_per_step // world_size
        self._first = rank * self._rows

    def batch(self, step: int) -> Batch:
        """This rank's rows of step `step` >= 0."""
        first = step * self.rows_per_step + self._first
        rows = np.stack([self.dataset.row(index) for index in range(first, first + self._rows)])
        return as_batch(rows, self.dataset.index.eot_id, self.dataset.index.answers)

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """The batches from `start_step` on, without end. A thread makes the next one while the caller uses this one."""
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            step = start_step
            upcoming = pool.submit(self.batch, step)
            while True:
                ready = upcoming.result()
                step += 1
                upcoming = pool.submit(self.batch, step)
                yield ready
