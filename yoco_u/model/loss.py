"""The cross-entropy of many tokens without their logits, which for a long row are larger than all other activations.

The tokens are taken chunk by chunk. The forward pass computes the logits of a chunk, and at once the gradients that follow from
them, so that no logits are kept or computed again; the backward pass only scales the gradients.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from yoco_u.errors import UserError
from yoco_u.model.layers import autocast_dtype, without_autocast

LOGITS = 2**26
"""The most logits in memory at a time; in float32, a quarter of a GiB."""

IGNORED = -100


def chunk_loss(logits: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The loss of one chunk of tokens, summed over its targets, in float32 at least.

    Args:
        logits: (tokens, vocab).
        targets: (tokens,); -100 is ignored.
        gradient: whether the loss's gradient is asked for.

    Returns:
        The loss, and the gradient of the logits in their dtype or None.
    """
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ignored = targets == IGNORED
    at = targets.masked_fill(ignored, 0)[:, None]
    normalizer = exact.logsumexp(-1, keepdim=True)
    loss = (normalizer - exact.gather(-1, at)).masked_fill(ignored[:, None], 0).sum()
    if not gradient:
        return loss, None
    hit = at == torch.arange(logits.shape[-1], device=logits.device)  # compared, not scattered: that fuses into one kernel
    off = (exact - normalizer).exp() - hit.to(exact.dtype)
    return loss, off.masked_fill(ignored[:, None], 0).to(logits.dtype)


def targets_of(labels: Tensor | None, shift_labels: Tensor | None, shape: torch.Size, segments: Tensor | None) -> Tensor:
    """The target of each token, (batch, tokens), with -100 where there is none.

    Padding predicts nothing, and a document's last token does not predict the next document's first one.

    Args:
        labels: the input tokens, (batch, tokens): the target of a token is the label of the next one.
        shift_labels: the targets themselves, used as they are; these go before `labels`.
        shape: (batch, positions) of the hidden states.
        segments: of all tokens so far, see `yoco_u.model.attention`; None for rows of one document without padding.

    Raises:
        UserError: if the shapes differ.
    """
    name, given = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
    assert given is not None
    if given.shape != shape:
        raise UserError(
            f"{name} has shape {tuple(given.shape)}; expected {tuple(shape)}, one per token, and none dropped by logits_to_keep"
        )
    if shift_labels is not None:
        return shift_labels.contiguous()
    targets = F.pad(given, (0, 1), value=IGNORED)[:, 1:]
    if segments is not None:
        new = segments[:, -shape[1] :]
        foreign = (new[:, 1:] != new[:, :-1]) & (new[:, 1:] != 0)
        targets = targets.masked_fill(F.pad(foreign, (0, 1)), IGNORED)
    return targets.contiguous()


ChunkLoss = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    of_chunk: ChunkLoss = chunk_loss,
) -> Tensor:
    """The cross-entropy of an LM head's logits, as the loss function of transformers computes it from them.

    Products are in the dtype of autocast, or else of `hidden`; softmax, loss and the sum of the weight's gradient over chunks
    are in float32 at least.

    Args:
        hidden: (..., hidden).
        weight: of the LM head, (vocab, hidden).
        targets: (...); -100 is ignored.
        num_items_in_batch: what the summed loss is divided by; the number of targets by default.
        of_chunk: `chunk_loss`, or a compiled version of it.
    """
    count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    total: Tensor = _SummedLoss.apply(hidden, weight, targets, of_chunk, torch.is_grad_enabled())
    return total / count


class _SummedLoss(torch.autograd.Function):
    """Of hidden states (tokens, hidden), the LM head's weight (vocab, hidden) and targets (tokens,): the summed loss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, of_chunk: ChunkLoss, gradient: bool) -> Tensor:
        dtype = autocast_dtype(hidden.device) or hidden.dtype
        exact = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if gradient else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if gradient else None
        size = max(1, LOGITS // len(weight))
        with without_autocast(hidden.device):
            head = weight.to(dtype)
            for start in range(0, len(hidden), size):
                part = slice(start, start + size)
                states = hidden[part].to(dtype)
                loss, grad = of_chunk(states @ head.T, targets[part], gradient)
                total += loss
                if grad is not None and grad_hidden is not None and grad_weight is not None:
                    grad_hidden[part] = grad @ head
                    grad_weight += grad.T @ states
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0], (grad_weight * grads[0]).to(ctx.weight_dtype), None, None, None
