"""Rotary position embedding (RoPE, arXiv 2104.09864)."""

import torch
from torch import Tensor


def rotary_angles(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotation angles, for heads whose element i is paired with element i + head_dim / 2.

    Args:
        position_ids: (batch or 1, tokens).
        theta: base of the frequencies.

    Returns:
        cos and sin, each (batch or 1, tokens, 1, head_dim), float32.
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim)
    angles = position_ids[..., None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)[..., None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate queries or keys, (batch, tokens, heads, head_dim): computed in float32, returned in the dtype of `x`."""
    cos, sin = rotary
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)
