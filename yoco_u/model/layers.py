"""Small layers that the other modules of the model are built from."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """RMSNorm (arXiv 1910.07467); under autocast it computes in float32 and returns the dtype of the matrix products."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            return super().forward(x.float()).to(torch.get_autocast_dtype(x.device.type))
        return super().forward(x)


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
