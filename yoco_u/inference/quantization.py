"""Weights in int8: torchao quantizes, and on a CPU one kernel multiplies."""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from yoco_u.errors import UserError
from yoco_u.model.layers import JointLinear

BLOCK = 64  # outputs that the kernel computes together


def quantize(model: nn.Module) -> None:
    """Replace the weights of linear layers by torchao's int8 tensors, in place: symmetric, one scale an output.

    The LM head is one of them, and no longer tied to the embeddings then. Embeddings, norms, the experts' router and the
    experts themselves (parameters of three dimensions, not linear layers) stay as they are. Activations are not quantized.

    Raises:
        UserError: if torchao is not installed.
    """
    torchao = require_torchao()
    config = torchao.Int8WeightOnlyConfig(set_inductor_config=False)
    torchao.quantize_(model, config, lambda module, name: isinstance(module, nn.Linear) and name.split(".")[-1] != "router")


def require_torchao() -> ModuleType:
    """`torchao.quantization`.

    Raises:
        UserError: if torchao is not installed.
    """
    try:
        return importlib.import_module("torchao.quantization")
    except ImportError:
        raise UserError("int8 weights need torchao: pip install 'yoco-u[quantization]'") from None


def is_int8(weight: Tensor) -> bool:
    """Whether `quantize` made this weight."""
    return hasattr(weight, "qdata")


class Int8Linear(JointLinear):
    """Linear layers without bias and with int8 weights, run as one product by the compiled kernel. Inputs are bfloat16.

    Args:
        weights: (outputs, inputs) of each layer, from `quantize`; not needed afterwards.
    """

    def __init__(self, weights: Sequence[Any]) -> None:
        super().__init__([len(weight.qdata) for weight in weights])
        whole = torch.cat([weight.qdata for weight in weights])
        scales = torch.cat([weight.scale.flatten().float() for weight in weights])
        self.packed = packed_int8(whole)
        self.scales = pad(scales, (0, -len(scales) % BLOCK))
        self.outputs = len(whole)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.yoco_u.int8_linear(x, self.packed, self.scales, self.outputs)


def packed_int8(weight: Tensor) -> Tensor:
    """(outputs, inputs) -> (blocks, pairs of inputs, 64, 2), filled up with zeros."""
    outputs, inputs = weight.shape
    filled = pad(weight, (0, inputs % 2, 0, -outputs % BLOCK))
    return filled.view(-1, BLOCK, filled.shape[1] // 2, 2).transpose(1, 2).contiguous()
