"""What is applied to a model so that it trains fast, in little memory, or on many processes.

Recomputation, then compilation, then DDP or FSDP2 around both: the order matters. The model itself knows of none of them.
"""

import warnings
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from yoco_u.device import what_compiling_lacks
from yoco_u.errors import UserError
from yoco_u.model import YocoUForCausalLM
from yoco_u.model.blocks import LoopedStack, blocks_of
from yoco_u.training.distributed import Distributed
from yoco_u.training.settings import TrainingConfig


def parallelize(model: YocoUForCausalLM, config: TrainingConfig, distributed: Distributed) -> nn.Module:
    """Move the model to its device and make it ready to train. Call this before the optimizer is built.

    Every rank must pass the same weights. With FSDP2 each block is one group of shards; everything else (embedding, LM head,
    global KV, loop gates, final norm) is in the root's group.
    """
    checkpoint_stages(model, config.checkpoint_stages)
    truncate_backpropagation(model, config.backward_loops)
    compile_model(model, config.compile, distributed.device)
    if distributed.world_size == 1:
        return model.to(distributed.device)
    if config.parallel == "ddp":
        # Buffers are not broadcast, because the token counts of a mixture of experts differ by rank until a step sums them.
        with warnings.catch_warnings():  # some of the torch versions that we support lack the argument's new name
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            return DistributedDataParallel(model.to(distributed.device), broadcast_buffers=False, gradient_as_bucket_view=True)
    mesh = init_device_mesh(distributed.device.type, (distributed.world_size,))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def checkpoint_stages(model: YocoUForCausalLM, stages: tuple[int, ...]) -> None:
    """Make the blocks of these stages recompute their activations in the backward pass instead of keeping them."""
    for stage in stages:
        for block in blocks_of(model.model.stages[stage]):
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def truncate_backpropagation(model: YocoUForCausalLM, loops: int | None) -> None:
    """Let gradients go through the last `loops` loops of each stage alone; through all for None."""
    for stack in model.modules():
        if isinstance(stack, LoopedStack):
            stack.backward_loops = loops


_GRAPHS = 32
"""The most graphs that blocks are compiled to; beyond, they run uncompiled."""


def compile_model(model: YocoUForCausalLM, setting: str, device: torch.device) -> None:
    """Run the blocks and the loss through torch.compile. One graph serves all layers of a kind, in all loops.

    Args:
        setting: `on`, `off` or `auto`, see `TrainingConfig.compile`.
        device: where the model will run.

    Raises:
        UserError: if the setting is `on` where nothing can be compiled.
    """
    if setting == "off":
        return
    if (lack := what_compiling_lacks(device)) is not None:
        if setting == "on":
            raise UserError(f"training.compile on cannot be had: {lack}; training.compile=auto or off do without")
        return
    # All blocks run the same code: a model's kinds of blocks, in training and in evaluation, and those of a teacher.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
    for block in blocks_of(model):
        block.compile(dynamic=False)
    model.loss_function = torch.compile(model.loss_function, dynamic=False)
    model.chunk_loss = torch.compile(model.chunk_loss, dynamic=False)


def without_gradient_sync(model: nn.Module) -> Any:
    """A context for all but the last micro-batch of a step, in which DDP keeps gradients local: it then sums them once a step.

    It does nothing for FSDP2, which sums gradients after every micro-batch, so that a rank only ever holds its shard of them.
    """
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def unwrap(model: nn.Module) -> YocoUForCausalLM:
    """The model inside DDP."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    assert isinstance(inner, YocoUForCausalLM)
    return inner
