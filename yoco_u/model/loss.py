"""The cross-entropy of many tokens without their logits, which for a long row are larger than all other activations.

The tokens are taken chunk by chunk. The forward pass computes the logits of a chunk, and at once the gradients that follow from
them, so that no logits are kept or computed again; the backward pass only scales the gradients.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from yoco_u.errors import UserError
from yoco_u.model.layers import autocast_dtype, without_autocast

LOGITS = 2**26
"""The most logits in memory at a time; in float32, a quarter of a GiB."""

IGNORED = -100


class SoftTargets(NamedTuple):
    """What a teacher expects in the place of each token: distillation (arXiv 1503.02531) from its likeliest tokens.

    The loss is `share` times the divergence KL(teacher || model), and 1 - share times the usual cross-entropy. The tokens that
    are not among the teacher's likeliest count as one, so that the divergence is a lower bound of the whole one.

    Attributes:
        ids: the teacher's likeliest tokens, (..., k).
        log_probs: their log probabilities, (..., k).
        share: from 0 to 1.
    """

    ids: Tensor
    log_probs: Tensor
    share: float

    def flat(self) -> "SoftTargets":
        return SoftTargets(self.ids.flatten(0, -2), self.log_probs.flatten(0, -2), self.share)

    def part(self, tokens: slice) -> "SoftTargets":
        return SoftTargets(self.ids[tokens], self.log_probs[tokens], self.share)


def chunk_loss(
    logits: Tensor, targets: Tensor, gradient: bool, soft: SoftTargets | None = None
) -> tuple[Tensor, Tensor | None]:
    """The loss of one chunk of tokens, summed over its targets, in float32 at least.

    Args:
        logits: (tokens, vocab).
        targets: (tokens,); -100 is ignored.
        gradient: whether the loss's gradient is asked for.
        soft: a teacher's targets of these tokens, where there is one.

    Returns:
        The loss, and the gradient of the logits in their dtype or None.
    """
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ignored = targets == IGNORED
    at = targets.masked_fill(ignored, 0)[:, None]
    normalizer = exact.logsumexp(-1, keepdim=True)
    loss = (normalizer - exact.gather(-1, at)).masked_fill(ignored[:, None], 0).sum()
    off = (exact - normalizer).exp() if gradient else None
    if soft is not None:
        divergence, off = _divergence(exact, normalizer, soft, off)
        loss = (1 - soft.share) * loss + soft.share * divergence.masked_fill(ignored, 0).sum()
    if off is None:
        return loss, None
    hit = at == torch.arange(logits.shape[-1], device=logits.device)  # compared, not scattered: that fuses into one kernel
    off = off - (1.0 if soft is None else 1 - soft.share) * hit.to(exact.dtype)
    return loss, off.masked_fill(ignored[:, None], 0).to(logits.dtype)


def _divergence(exact: Tensor, normalizer: Tensor, soft: SoftTargets, off: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """KL(teacher || model) of each token, with the tokens beyond the teacher's likeliest taken as one.

    The teacher's distribution over these is taken to be the model's own, scaled to the same sum.

    Args:
        exact: logits, (tokens, vocab).
        normalizer: their logsumexp, (tokens, 1).
        off: the model's probabilities, (tokens, vocab), where the gradient is asked for.

    Returns:
        (tokens,), and the gradient of the logits: the model's probabilities minus `share` times the teacher's.
    """
    own, teacher = exact.gather(-1, soft.ids) - normalizer, soft.log_probs.to(exact.dtype)
    likely = teacher.exp()
    rest = (1 - likely.sum(-1, keepdim=True)).clamp_min(0) * (soft.ids.shape[-1] < exact.shape[-1])
    # From the other logits themselves: if the model is sure, 1 minus the sum of its likeliest is nothing but rounding.
    others = exact.scatter(-1, soft.ids, -torch.inf)
    own_rest = others.logsumexp(-1, keepdim=True).clamp_min(torch.finfo(exact.dtype).min)
    divergence = (likely * (teacher - own)).sum(-1, keepdim=True) + torch.xlogy(rest, rest) - rest * (own_rest - normalizer)
    if off is not None:
        off = (off - soft.share * rest * (others - own_rest).exp()).scatter_add(-1, soft.ids, -soft.share * likely)
    return divergence.squeeze(-1), off


class EarlyExit(NamedTuple):
    """A second loss, of what the network predicts if it leaves the loop early: self-distillation from the last loop.

    Attributes:
        loop: the loop, counted from 1 and before the last, that is followed by what follows the last one.
        weight: what its divergence from the last loop's prediction is multiplied by in the loss.
    """

    loop: int
    weight: float


def chunked_divergence(
    hidden: Tensor, toward: Tensor, weight: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """KL(toward || hidden) of the LM head's distributions, chunk by chunk; its gradient goes through `hidden` alone.

    Args:
        hidden, toward: hidden states, (..., hidden).
        weight: of the LM head, (vocab, hidden).
        targets: (...); tokens without one, -100, do not count.
        num_items_in_batch: what the sum over tokens is divided by; the number of targets by default.
    """
    count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    size = max(1, LOGITS // len(weight))
    tokens = zip(*(x.flatten(0, -2).split(size) for x in (hidden, toward.detach(), targets[..., None])), strict=True)
    return torch.stack([checkpoint(_summed_divergence, *part, weight, use_reentrant=False) for part in tokens]).sum() / count


def _summed_divergence(hidden: Tensor, toward: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    exact = torch.promote_types(hidden.dtype, torch.float32)
    with torch.no_grad():
        expected = F.linear(toward, weight).to(exact).log_softmax(-1)
    found = F.linear(hidden, weight).to(exact).log_softmax(-1)
    return F.kl_div(found, expected, reduction="none", log_target=True).masked_fill(targets == IGNORED, 0).sum()


def targets_of(labels: Tensor | None, shift_labels: Tensor | None, shape: torch.Size, segments: Tensor | None) -> Tensor:
    """The target of each token, (batch, tokens), with -100 where there is none.

    A token predicts the next one of its own document: padding neither predicts nor is predicted, whatever its label.

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
        foreign = (new[:, 1:] != new[:, :-1]) | (new[:, 1:] == 0)
        targets = targets.masked_fill(F.pad(foreign, (0, 1)), IGNORED)
    return targets.contiguous()


ChunkLoss = Callable[[Tensor, Tensor, bool, SoftTargets | None], tuple[Tensor, Tensor | None]]


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    of_chunk: ChunkLoss = chunk_loss,
    soft: SoftTargets | None = None,
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
        soft: a teacher's targets, (..., k), where there is one.
    """
    count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    soft = None if soft is None else soft.flat()
    total: Tensor = _SummedLoss.apply(hidden, weight, targets, of_chunk, torch.is_grad_enabled(), soft)
    return total / count


class _SummedLoss(torch.autograd.Function):
    """Of hidden states (tokens, hidden), the LM head's weight (vocab, hidden) and targets (tokens,): the summed loss."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, of_chunk: ChunkLoss, gradient: bool, soft: SoftTargets | None
    ) -> Tensor:
        dtype = autocast_dtype(hidden.device) or hidden.dtype
        exact = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if gradient else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if gradient and ctx.needs_input_grad[1] else None
        size = max(1, LOGITS // len(weight))
        with without_autocast(hidden.device):
            head = weight.to(dtype)
            for start in range(0, len(hidden), size):
                part = slice(start, start + size)
                states = hidden[part].to(dtype)
                loss, grad = of_chunk(states @ head.T, targets[part], gradient, None if soft is None else soft.part(part))
                total += loss
                if grad is not None and grad_hidden is not None:
                    grad_hidden[part] = grad @ head
                    if grad_weight is not None:
                        grad_weight += grad.T @ states
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        weight = None if grad_weight is None else (grad_weight * grads[0]).to(ctx.weight_dtype)
        return grad_hidden * grads[0], weight, None, None, None, None
