"""How a result is compared with the truth, and what is told of it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gpu_phases.record import Figure

FLOAT32 = 1e-4
"""The largest error in float32, as a share of the largest entry of the truth. Against float64, the CPU's own is up to 1e-5."""

BFLOAT16_FACTOR = 4.0
"""How many times the error of the CPU's bfloat16 that of the GPU may be. It was up to 3 with experts, of which rounding chooses
others now and then, on a CPU that added in another order."""


def largest_error(found: Tensor, truth: Tensor) -> float:
    """The largest difference, as a share of the largest entry of the truth; infinite where a result is not finite."""
    return _finite(float((_there(found) - truth.double()).abs().max()) / max(float(truth.abs().max()), 1e-30))


def typical_error(found: Tensor, truth: Tensor) -> float:
    """The root mean square of the difference, as a share of that of the truth; infinite where a result is not finite."""
    difference = (_there(found) - truth.double()).square().mean().sqrt()
    return _finite(float(difference / truth.double().square().mean().sqrt().clamp(min=1e-30)))


def worst(found: Mapping[str, Tensor], truth: Mapping[str, Tensor], error: Any) -> tuple[float, str]:
    """The largest error of several tensors, and the name of the tensor that has it."""
    return max((error(found[name], truth[name]), name) for name in truth)


def verdict(error: float, limit: float, **details: Any) -> Figure:
    """A check as it is kept: wrong if the error is above its limit, or not finite."""
    return {"error": error, "limit": limit, "wrong": not error <= limit, **details}


def _there(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _finite(error: float) -> float:
    return error if error == error else float("inf")
