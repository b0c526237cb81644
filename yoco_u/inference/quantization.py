"""int8 weights, made by torchao; on a CPU, `prepacking.py` lays them out for the kernels."""

import importlib
from types import ModuleType

from torch import Tensor, nn

from yoco_u.errors import UserError


def quantize(model: nn.Module) -> None:
    """Replace the weights of linear layers by torchao's int8 tensors, in place; they are symmetric, with one scale per output.

    The LM head is quantized too, so it is not tied to the embedding any more. Embeddings, norms, the experts' router and the
    experts (which are parameters of three dimensions, not linear layers) stay as they are. Activations are not quantized.

    Raises:
        UserError: if torchao is not installed.
    """
    torchao = require_torchao()
    config = torchao.Int8WeightOnlyConfig(set_inductor_config=False)
    torchao.quantize_(model, config, lambda module, name: isinstance(module, nn.Linear) and name.split(".")[-1] != "router")


def require_torchao() -> ModuleType:
    """Import `torchao.quantization`.

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
