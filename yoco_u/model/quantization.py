"""Weights in 8 or 4 bits, made by torchao; on a CPU, `prepacking.py` lays those of 8 bits out for the kernels."""

import math
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from yoco_u.errors import import_optional

WeightType = Literal["int8", "int4"]

_GROUP = 32  # weights of an output that share a scale in int4


def quantize(model: nn.Module, weights: WeightType = "int8") -> None:
    """Replace the weights of linear layers by torchao's tensors, in place; they are symmetric.

    In int8 there is one scale for each output, in int4 one for each 32 weights of an output (fewer where 32 does not divide an
    output's weights). The engine runs int8; int4 is for measuring what it would cost. The LM head is quantized too, so it is
    not tied to the embedding any more. Embeddings, norms, the experts' router and the experts (which are parameters of three
    dimensions, not linear layers) stay as they are. Activations are not quantized.

    Raises:
        UserError: if torchao is not installed.
    """
    torchao, layers = require_torchao(), set(quantized_layers(model))

    def apply(config: Any, inputs: int | None = None) -> None:
        torchao.quantize_(model, config, lambda module, _: module in layers and inputs in (None, module.in_features))

    if weights == "int8":
        apply(torchao.Int8WeightOnlyConfig(set_inductor_config=False))
        return
    for inputs in {layer.in_features for layer in layers}:
        group = torchao.PerGroup(math.gcd(_GROUP, inputs))
        apply(torchao.IntxWeightOnlyConfig(weight_dtype=getattr(torch, "int4"), granularity=group), inputs)  # noqa: B009


def quantized_layers(model: nn.Module) -> list[nn.Linear]:
    """The layers whose weights `quantize` replaces, in the model's order."""
    named = model.named_modules()
    return [module for name, module in named if isinstance(module, nn.Linear) and name.split(".")[-1] != "router"]


def require_torchao() -> ModuleType:
    """Import `torchao.quantization`.

    Raises:
        UserError: if torchao is not installed.
    """
    return import_optional("torchao.quantization", "quantized weights need torchao", "quantization")


def is_int8(weight: Tensor) -> bool:
    """Whether `quantize` made this weight."""
    return hasattr(weight, "qdata")
