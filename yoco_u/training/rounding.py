"""Quantization-aware training: the passes of a step multiply rounded weights, and its update changes the weights themselves.

torchao's layers for it round in the forward pass, so in every loop again, and are passed by where the loss multiplies by the LM
head's weight itself. Here the parameters hold the rounded weights while the passes run. So a weight is rounded once a step, by
`quantize` itself, and the model, its compiled graphs and its wrappers do not know of it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from yoco_u.model.quantization import WeightType, quantize, quantized_layers
from yoco_u.training.parallelize import unwrap


@contextmanager
def rounded_weights(model: nn.Module, weights: WeightType | None) -> Iterator[None]:
    """Let a model compute what `quantize` would make it compute, while the block runs; afterwards it has its own weights again.

    Gradients that backward passes in the block leave in the parameters go straight through the rounding (arXiv 1308.3432): the
    gradient of a rounded weight counts as that of the weight.

    Args:
        model: a causal LM, or one that `parallelize` wrapped; under FSDP2 without tied embeddings. Shards hold whole outputs,
            and no two outputs share a scale, so that each process rounds its own.
        weights: what they are rounded to; None changes nothing.
    """
    if weights is None:
        yield
        return
    _reshard(model)
    inner = unwrap(model)
    layers = [layer for layer in quantized_layers(model) if _local(layer.weight).numel()]  # few outputs leave a process none
    rounded = dict(zip(layers, _rounded(layers, weights), strict=True))
    head, embedding = inner.lm_head, inner.model.embed_tokens.weight
    is_tied = head.weight is embedding
    if is_tied:
        del head.weight
        head.weight = _StraightThrough.apply(embedding, rounded.pop(head))
    local = [_local(layer.weight) for layer in rounded]
    own = [weight.clone() for weight in local]
    _fill(local, rounded.values())
    rounded.clear()
    try:
        yield
    finally:
        _reshard(model)
        _fill(local, own)
        if is_tied:
            del head.weight
            head.weight = embedding


class _StraightThrough(torch.autograd.Function):
    """The rounded weight for the passes; its gradient is that of the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _rounded(layers: list[nn.Linear], weights: WeightType) -> list[Tensor]:
    """What `quantize` would make of the weights of layers, dequantized."""
    twins = nn.ModuleList(nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta") for layer in layers)
    for twin, layer in zip(twins, layers, strict=True):
        twin.weight = nn.Parameter(_local(layer.weight), requires_grad=False)
    quantize(twins, weights)
    return [twin.weight.dequantize() for twin in twins]  # type: ignore[operator]


@torch.no_grad()
def _fill(local: list[Tensor], values: Iterable[Tensor]) -> None:
    for weight, value in zip(local, values, strict=True):
        weight.copy_(value)


def _local(weight: Tensor) -> Tensor:
    """The part of a weight that this process holds, without gradients and in the same memory."""
    weight = weight.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _reshard(model: nn.Module) -> None:
    """Bring the parameters of FSDP2 back to their shards, of which the root's are not after a pass without gradients."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
