"""Batches by step number, the same data whatever the number of processes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from yoco_u.data.dataset import PackedDataset
from yoco_u.errors import UserError


class Batch(TypedDict):
    """What a training step reads; the keys are arguments of the model. int64, (rows, sequence_length), on the CPU.

    `shift_labels` are the tokens one further on; `document_ids` count from 1 in each row, up by one at each
    `<|endoftext|>` of `input_ids`.
    """

    input_ids: torch.Tensor
    shift_labels: torch.Tensor
    document_ids: torch.Tensor


def as_batch(rows: NDArray[np.int64], eot_id: int) -> Batch:
    """Rows of tokens (rows, sequence_length + 1), the last one of each only a target, as a batch."""
    tokens = torch.from_numpy(rows)
    input_ids = tokens[:, :-1].contiguous()
    return Batch(input_ids=input_ids, shift_labels=tokens[:, 1:].contiguous(), document_ids=document_ids(input_ids, eot_id))


def document_ids(input_ids: torch.Tensor, eot_id: int) -> torch.Tensor:
    """The document of each token of packed rows, (rows, tokens): from 1 in each row, one more at each `<|endoftext|>`."""
    begins = input_ids == eot_id
    begins[:, 0] = True  # a row may begin within a document
    return begins.long().cumsum(dim=1)


class BatchLoader:
    """Step s is the rows s R to (s + 1) R - 1 of the dataset, of which each rank takes its part in turn.

    Nothing is remembered from step to step: to resume is to ask for the next step.

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
        return as_batch(rows, self.dataset.index.eot_id)

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """The batches from `start_step` on, without end, the next one being made in a thread meanwhile."""
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            step = start_step
            upcoming = pool.submit(self.batch, step)
            while True:
                ready = upcoming.result()
                step += 1
                upcoming = pool.submit(self.batch, step)
                yield ready
