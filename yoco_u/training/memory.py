"""Whether a run fits into memory, by arithmetic, before anything is made."""

import torch

from yoco_u.budget import parameters
from yoco_u.device import memory_bytes
from yoco_u.errors import UserError
from yoco_u.formatting import short_bytes, short_count
from yoco_u.model import YocoUConfig, YocoUForCausalLM
from yoco_u.model.quantization import quantized_layers
from yoco_u.training.config import RunConfig
from yoco_u.training.distillation import freeze
from yoco_u.training.distributed import Distributed
from yoco_u.training.forward import DTYPES
from yoco_u.training.step import micro_batch_rows


def check_memory(config: RunConfig, distributed: Distributed) -> None:
    """Check that a device could hold what training keeps, before anything is made. On a CPU the processes share its memory.

    Raises:
        UserError: if weights, gradients, AdamW's state, rounded weights and the weights of a teacher alone are more than there
            is, or one number for each token, block and element of the hidden states, of which every block keeps more for the
            backward pass.
    """
    there = memory_bytes(distributed.device)
    sharing = distributed.local_world_size if distributed.device.type == "cpu" else 1
    count, training = parameters(config.architecture).total, config.training
    shards = distributed.world_size if training.parallel == "fsdp" else 1
    fits = 4 * count // shards <= there
    trained, rounded = (_trained_parameters(config), _rounded_parameters(config)) if fits else (count, 0)
    # 4 bytes of a weight, as many of its gradient and of two moments where it is trained, and of its rounded twin in a step
    needed = sharing * ((4 * count + 12 * trained + 4 * rounded) // shards + 4 * _teacher_parameters(config))
    if needed > there:
        teacher = ", with its teacher," if config.distillation else ""
        processes = f" of {sharing} processes" if sharing > 1 else ""
        raise UserError(
            f"training a model of {short_count(count)} parameters{teacher} takes {short_bytes(needed)} for weights, gradients "
            f"and optimizer{processes}, but there are {short_bytes(there)}; choose a smaller one, or more processes with "
            "parallel fsdp"
        )
    rows = micro_batch_rows(config, distributed.world_size)
    blocks = max(_blocks_with_gradients(config, loops) for loops in config.loop_counts())
    numbers = rows * training.sequence_length * blocks * config.architecture.hidden_size
    kept = sharing * numbers * DTYPES[training.dtype].itemsize
    if kept > there:
        raise UserError(
            f"training on micro-batches of {rows} x {training.sequence_length} tokens through {blocks} blocks keeps at least "
            f"{short_bytes(kept)}, but there are {short_bytes(there)}; lower micro_batch_rows, sequence_length or loops"
        )


def _trained_parameters(config: RunConfig) -> int:
    if not _is_frozen_in_part(config):
        return parameters(config.architecture).total
    with torch.device("meta"):
        model = YocoUForCausalLM(YocoUConfig.from_architecture(config.architecture))
    freeze(model, config.distillation)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _rounded_parameters(config: RunConfig) -> int:
    """Weights of which the passes of a step hold both the rounded and the unrounded values."""
    if config.training.weights is None:
        return 0
    with torch.device("meta"):
        model = YocoUForCausalLM(YocoUConfig.from_architecture(config.architecture))
    return sum(layer.weight.numel() for layer in quantized_layers(model))


def _teacher_parameters(config: RunConfig) -> int:
    return 0 if config.distillation is None else parameters(config.distillation.architecture).total


def _blocks_with_gradients(config: RunConfig, loops: int | None) -> int:
    """Blocks that a token passes through with gradients where they have this loop count, as of `loops_at`."""
    architecture = config.architecture if loops is None else config.architecture.with_loops(loops)
    most = config.training.backward_loops
    return sum(
        stage.layers * (stage.loops if most is None else min(stage.loops, most))
        for stage in architecture.stages
        if stage.attention == "cross" or not _is_frozen_in_part(config)
    )


def _is_frozen_in_part(config: RunConfig) -> bool:
    return config.distillation is not None and not config.distillation.trains_all
