"""Rotary position embedding (RoPE, arXiv 2104.09864)."""

import math

import torch
from torch import Tensor

from yoco_u.architecture import RotaryScaling


def rotary_angles(
    position_ids: Tensor, head_dim: int, theta: float, scaling: RotaryScaling | None = None, share: float = 1.0
) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotation angles, for heads whose element i is paired with element i + head_dim / 2.

    Args:
        position_ids: (batch or 1, tokens).
        theta: base of the frequencies.
        scaling: how the frequencies are changed. YaRN's `attention_factor` is in cos and sin, which so scale what they rotate.
        share: of the whole effect, rotation and scale; 0 is as without positions.

    Returns:
        cos and sin, each (batch or 1, tokens, 1, head_dim), float32.
    """
    frequencies = rotary_frequencies(head_dim, theta, position_ids.device)
    if scaling is not None:
        frequencies = frequencies * frequency_scale(frequencies, theta, scaling)
    positions = position_ids if share == 1 else share * position_ids
    angles = positions[..., None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)[..., None, :]
    cos, sin = angles.cos(), angles.sin()
    if scaling is not None and scaling.type == "yarn":
        factor = 1 + share * (scaling.attention_factor - 1) if share != 1 else scaling.attention_factor
        cos, sin = cos * factor, sin * factor
    return cos, sin


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate queries or keys, (batch, tokens, heads, head_dim): computed in float32, returned in the dtype of `x`."""
    cos, sin = rotary
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)


def rotary_frequencies(head_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """The frequencies of RoPE before scaling, in radians per token, (head_dim / 2,), float32."""
    return theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)


def frequency_scale(frequencies: Tensor, theta: float, scaling: RotaryScaling) -> Tensor:
    """What each frequency is multiplied by, (head_dim / 2,): from 1 to 1 / factor."""
    if scaling.type == "linear":
        return torch.full_like(frequencies, 1 / scaling.factor)
    assert scaling.original_length is not None
    if scaling.type == "llama3":
        turns = frequencies * scaling.original_length / (2 * math.pi)
        kept = (turns - scaling.low_turns) / (scaling.high_turns - scaling.low_turns)
    else:
        count = len(frequencies)
        fast, slow = (
            count * math.log(scaling.original_length / (turns * 2 * math.pi)) / math.log(theta)
            for turns in (scaling.high_turns, scaling.low_turns)
        )
        if scaling.truncate:
            fast, slow = math.floor(fast), math.ceil(slow)
        fast, slow = max(fast, 0), min(slow, 2 * count - 1)
        kept = 1 - (torch.arange(count, device=frequencies.device) - fast) / max(slow - fast, 1e-3)
    kept = kept.clamp(0, 1)
    return kept + (1 - kept) / scaling.factor
