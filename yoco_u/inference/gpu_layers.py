"""Layers for a GPU: linear layers of the same input are joined, and each operation between products is one kernel.

A decode step is bound by its launches as much as by memory: joined products launch once and read their input once. Results are
the same up to rounding.
"""

import torch
from torch import Tensor, nn

from yoco_u.inference.kernels.gpu import rms_norm, swiglu
from yoco_u.inference.prepacking import linear_layers
from yoco_u.model import YocoUForCausalLM
from yoco_u.model.feed_forward import SwiGLU
from yoco_u.model.layers import JointLinear, RMSNorm
from yoco_u.model.quantization import is_int8


class JoinedLinear(JointLinear):
    """Linear layers without bias as one product.

    Args:
        weights: weight of each layer, (outputs, inputs); a copy is kept, so they can be freed.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__([len(weight) for weight in weights])
        self.weight = nn.Parameter(torch.cat([weight.detach() for weight in weights]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class FusedRMSNorm(nn.Module):
    """`RMSNorm` as one kernel."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        assert norm.eps is not None
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class FusedSwiGLU(nn.Module):
    """`SwiGLU` with joined linear layers and its activation as one kernel."""

    def __init__(self, layer: SwiGLU) -> None:
        super().__init__()
        self.gate_up, self.down = layer.gate_proj, layer.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


@torch.no_grad()
def fuse_layers(model: YocoUForCausalLM) -> None:
    """Replace the layers of a model in place. Afterwards it can only run forward: it has no gradients."""
    for module in list(model.modules()):
        for names in linear_layers(module):
            weights = [getattr(module, name).weight for name in names]
            if len(names) > 1 and not any(map(is_int8, weights)):
                joint = JoinedLinear(weights)
                for name in names:
                    setattr(module, name, joint)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is RMSNorm:  # not one of several groups
                setattr(parent, name, FusedRMSNorm(child))
            elif isinstance(child, SwiGLU) and isinstance(child.gate_proj, JoinedLinear):
                setattr(parent, name, FusedSwiGLU(child))
