"""The loss of a batch: the forward pass of training and validation, from tensors on the host."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from yoco_u.device import host_waits, upload
from yoco_u.model.loss import IGNORED
from yoco_u.model.segments import cumulative_lengths

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def batch_loss(
    model: nn.Module, batch: Mapping[str, Any], device: torch.device, dtype: str, num_loops: int | None, **kwargs: Any
) -> Tensor:
    """Run the model on a batch. A GPU is not waited for, and logits are not kept there.

    Args:
        model: a causal LM on the device, or one that `parallelize` wrapped.
        batch: a `Batch`, or some of its rows.
        device: the device of the model.
        dtype: `bfloat16` (autocast) or `float32`.
        num_loops: loop count of the model; its own by default.
        kwargs: further arguments of the model.

    Returns:
        The loss, a scalar on the device.
    """
    if host_waits(device):
        kwargs["return_logits"] = False
    with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32"):
        loss: Tensor = model(**on_device(batch, device), num_loops=num_loops, use_cache=False, **kwargs).loss
    return loss


def count_targets(labels: Tensor) -> int:
    """How many of the labels are targets."""
    return int((labels != IGNORED).sum())


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """The tensors of a batch on a device, with those that flash attention works by on a GPU, which is not waited for."""
    inputs = {name: tensor for name, tensor in batch.items() if isinstance(tensor, Tensor)}
    if host_waits(device):
        inputs["cu_seqlens"] = cumulative_lengths(inputs["document_ids"])
    return {name: upload(tensor, device) for name, tensor in inputs.items()}
