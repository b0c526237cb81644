"""Small layers that the other modules of the model are built from."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of matrix products under autocast; None where autocast is off, and on the meta device, which has none."""
    enabled = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else None


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which operations on a device compute in the dtype of their inputs."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


class RMSNorm(nn.RMSNorm):
    """RMSNorm (arXiv 1910.07467); under autocast it computes in float32 and returns the dtype of the matrix products."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = autocast_dtype(x.device)
        return super().forward(x) if dtype is None else super().forward(x.float()).to(dtype)


class GroupedRMSNorm(RMSNorm):
    """RMSNorm over head_dim of (..., groups, heads, head_dim), with weights for each group, which lie one behind the other."""

    def __init__(self, groups: int, head_dim: int, eps: float) -> None:
        super().__init__(head_dim, eps)
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(groups * head_dim))

    def forward(self, x: Tensor) -> Tensor:
        dtype = autocast_dtype(x.device)
        out = F.rms_norm(x if dtype is None else x.float(), self.normalized_shape, eps=self.eps)
        return (out * self.weight.view(self.groups, 1, -1)).to(dtype or x.dtype)


class ResidualLinear(nn.Linear):
    """A projection without bias whose output is added to the residual stream; its initial scale depends on the depth."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)


class JointLinear(nn.Module):
    """Several linear layers of the same input as one matrix product; one object takes the place of each of the layers.

    Args:
        sizes: number of outputs of each layer.
    """

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """Run the product once and return the output of each layer."""
        return self(x).split(self.sizes, dim=-1)


def project(x: Tensor, *layers: nn.Module) -> Sequence[Tensor]:
    """The outputs of several linear layers of the same input: from one product if they are one `JointLinear`."""
    return layers[0].split(x) if isinstance(layers[0], JointLinear) else tuple(layer(x) for layer in layers)


class Biased(nn.Module):
    """A module that adds biases to what its linear layers give, where its architecture has biases.

    They are apart from the layers, which so can be joined, prepacked and quantized.
    """

    has_bias = False

    def make_biases(self, **layers: nn.Linear) -> None:
        """Make the parameter `NAME_bias` for the output of each layer."""
        self.has_bias = True
        for name, layer in layers.items():
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(layer.out_features)))

    def biased(self, names: str, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The outputs plus the biases of these names, a letter each; the outputs alone if there are none."""
        if not self.has_bias:
            return outputs
        return [output + getattr(self, f"{name}_bias").to(output.dtype) for name, output in zip(names, outputs, strict=True)]
