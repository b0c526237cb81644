"""What is applied to a model so that it trains fast, in little memory, or on many processes.

Recomputation, then compilation, then DDP or FSDP2 around both: the order matters. The model itself knows of none of them.
"""

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from yoco_u.budget import optimizer_bytes, parameters
from yoco_u.device import cxx_compiler, memory_bytes
from yoco_u.errors import UserError
from yoco_u.formatting import short_bytes, short_count
from yoco_u.model import YocoUForCausalLM
from yoco_u.model.blocks import Block, LoopedStack
from yoco_u.training.config import RunConfig, TrainingConfig
from yoco_u.training.distributed import Distributed
from yoco_u.training.forward import DTYPES


def check_memory(run: RunConfig, distributed: Distributed) -> None:
    """Check that a device could hold what training keeps of a model, before anything is made.

    Raises:
        UserError: if weights, gradients and AdamW's state alone are more than its memory, or one number for each token, block
            and element of the hidden states, of which every block keeps more for the backward pass.
    """
    architecture, config = run.architecture, run.training
    there, count = memory_bytes(distributed.device), parameters(architecture).total
    needed = optimizer_bytes(architecture) // (distributed.world_size if config.parallel == "fsdp" else 1)
    if needed > there:
        raise UserError(
            f"training a model of {short_count(count)} parameters takes {short_bytes(needed)} for weights, gradients and "
            f"optimizer, but there are {short_bytes(there)}; choose a smaller one, or more processes with parallel fsdp"
        )
    tokens = config.micro_batch_rows * config.sequence_length
    blocks = max(_blocks_with_gradients(run, loops) for loops in run.loop_counts())
    kept = tokens * blocks * architecture.hidden_size * DTYPES[config.dtype].itemsize
    if kept > there:
        raise UserError(
            f"training on micro-batches of {config.micro_batch_rows} x {config.sequence_length} tokens through "
            f"{blocks} blocks keeps at least {short_bytes(kept)}, but there are {short_bytes(there)}; "
            "lower micro_batch_rows, sequence_length or loops"
        )


def _blocks_with_gradients(run: RunConfig, loops: int | None) -> int:
    """Blocks that a token passes through with gradients in a step, of which `loops_at` says the loop count."""
    architecture, most = run.architecture if loops is None else run.architecture.with_loops(loops), run.training.backward_loops
    return sum(stage.layers * (stage.loops if most is None else min(stage.loops, most)) for stage in architecture.stages)


def parallelize(model: YocoUForCausalLM, config: TrainingConfig, distributed: Distributed) -> nn.Module:
    """Move the model to its device and make it ready to train. Call this before the optimizer is built.

    Every rank must pass the same weights. With FSDP2 each block is one group of shards; everything else (embedding, LM head,
    global KV, loop gates, final norm) is in the root's group.
    """
    checkpoint_stages(model, config.checkpoint_stages)
    truncate_backpropagation(model, config.backward_loops)
    compile_model(model, config.compile)
    if distributed.world_size == 1:
        return model.to(distributed.device)
    if config.parallel == "ddp":
        # Buffers are not broadcast, because the token counts of a mixture of experts differ by rank until a step sums them.
        with warnings.catch_warnings():  # some of the torch versions that we support lack the argument's new name
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            return DistributedDataParallel(model.to(distributed.device), broadcast_buffers=False, gradient_as_bucket_view=True)
    mesh = init_device_mesh(distributed.device.type, (distributed.world_size,))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def checkpoint_stages(model: YocoUForCausalLM, stages: tuple[int, ...]) -> None:
    """Make the blocks of these stages recompute their activations in the backward pass instead of keeping them."""
    for stage in stages:
        for block in _blocks(model.model.stages[stage]):
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def truncate_backpropagation(model: YocoUForCausalLM, loops: int | None) -> None:
    """Let gradients go through the last `loops` loops of each stage alone; through all for None."""
    for stack in model.modules():
        if isinstance(stack, LoopedStack):
            stack.backward_loops = loops


_GRAPHS = 32
"""The most graphs that blocks are compiled to; beyond, they run uncompiled."""


def compile_model(model: YocoUForCausalLM, setting: str) -> None:
    """Run the blocks and the loss through torch.compile. One graph serves all layers of a kind, in all loops.

    Args:
        setting: `on`, `off` or `auto`, see `TrainingConfig.compile`.
    """
    can_compile = torch.cuda.is_available() or cxx_compiler() is not None
    if setting == "off" or (setting == "auto" and not can_compile):
        return
    # All blocks run the same code: a model's kinds of blocks, in training and in evaluation, and those of a teacher.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
    for block in _blocks(model):
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


def _blocks(module: nn.Module) -> Iterator[Block]:
    return (block for block in module.modules() if isinstance(block, Block))
