"""The loss on held-out rows: the same rows at every evaluation of a run, whatever the number of processes."""

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from yoco_u.data import Batch, BatchLoader, PackedDataset
from yoco_u.device import read_back
from yoco_u.model.loss import IGNORED
from yoco_u.training.distributed import Distributed
from yoco_u.training.forward import batch_loss, count_targets
from yoco_u.training.metrics import loss_figures


@dataclass(frozen=True)
class Evaluation:
    """The figures of one evaluation.

    Attributes:
        loss: nats per token, the mean over `tokens` targets.
        perplexity: exp(loss).
        bits_per_byte: bits per byte of the targets, see `PackedDataset.bytes_per_target`.
        tokens: number of targets that were scored: all tokens of the rows, or those of their answers.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: PackedDataset,
    max_tokens: int | None,
    batch_rows: int,
    distributed: Distributed,
    dtype: str = "bfloat16",
    num_loops: int | None = None,
) -> Evaluation:
    """Score the first rows of a dataset, in its order. Every rank must call it. A GPU is waited for once, at the end.

    Args:
        model: a causal LM on the rank's device, or one that `parallelize` wrapped. It runs in evaluation mode; afterwards it is
            in the mode that it was in before.
        dataset: made with `shuffle=False`, so that the rows are the text from its beginning on.
        max_tokens: the most tokens of rows to score, though at least one row of them; None scores every whole row.
        batch_rows: rows per forward pass of one process.
        distributed: the processes among which the rows are divided.
        dtype: `bfloat16` (autocast) or `float32`.
        num_loops: loop count of the model; its own by default.
    """
    length, device = dataset.sequence_length, distributed.device
    rows = dataset.rows_per_epoch if max_tokens is None else min(dataset.rows_per_epoch, max(1, max_tokens // length))
    loader = BatchLoader(dataset, batch_rows * distributed.world_size, distributed.rank, distributed.world_size)
    total, targets = torch.zeros((), dtype=torch.float64, device=device), 0
    was_training = model.training
    model.eval()
    # All ranks make equally many passes, since FSDP gathers weights in each. All passes have the same shape, since a compiled
    # model would compile anew for another. So the last pass may hold rows beyond the end; their labels are masked.
    for step in range(-(-rows // loader.rows_per_step)):
        batch = loader.batch(step)
        row = step * loader.rows_per_step + distributed.rank * batch_rows + torch.arange(batch_rows)
        batch["shift_labels"].masked_fill_(row[:, None] >= rows, IGNORED)
        targets += count_targets(batch["shift_labels"])
        total += batch_nats(model, batch, device, dtype, num_loops)
    model.train(was_training)
    tokens = round(distributed.sum(targets))
    loss = distributed.sum(read_back(total)) / tokens
    return Evaluation(tokens=tokens, **loss_figures(loss, dataset.bytes_per_target))


def text_digest(dataset: PackedDataset, max_tokens: int) -> str:
    """The SHA-256 of the tokens that evaluations score, but for where the last row ends.

    Args:
        dataset: the validation split.
        max_tokens: as of `evaluate`.
    """
    digest, left = hashlib.sha256(), max(max_tokens, dataset.sequence_length)
    for document in dataset.documents:
        digest.update(document[:left].astype("<u4").tobytes())
        left -= len(document)
        if left <= 0:
            break
    return digest.hexdigest()


@torch.no_grad()
def batch_nats(model: nn.Module, batch: Batch, device: torch.device, dtype: str, num_loops: int | None) -> torch.Tensor:
    """The loss of a batch in nats, summed over its targets: a float64 scalar on the device. Arguments as in `evaluate`."""
    # The model divides the summed loss by num_items_in_batch; 1 leaves the sum.
    return batch_loss(model, batch, device, dtype, num_loops, num_items_in_batch=1).double()
