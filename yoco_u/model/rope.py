"""Rotary position embedding (RoPE, arXiv 2104.09864)."""

import torch
from torch import Tensor


def rotary_angles(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE (arXiv 2104.09864), halves rotated against each other, (batch or 1, tokens, 1, head_dim)."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim)
    angles = position_ids[..., None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)[..., None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate (batch, tokens, heads, head_dim) in float32, returned in its own dtype."""
    cos, sin = rotary
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)
