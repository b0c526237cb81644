"""What an engine asks of a model before it runs it: whether its caches fit, how often it loops, which tokens end outputs."""

import torch

from yoco_u.architecture import Architecture
from yoco_u.budget import bytes_per_kv_element, cache_bytes
from yoco_u.data import DocumentEncoder
from yoco_u.device import free_memory_bytes
from yoco_u.errors import UserError, first_line
from yoco_u.inference.block_tables import table_bytes
from yoco_u.inference.kv_cache import CacheShape
from yoco_u.inference.runner import Runner
from yoco_u.model import YocoUForCausalLM


def check_memory(a: Architecture, shape: CacheShape, loops: int, allocated: int, device: torch.device) -> None:
    """Refuse caches, with their block tables, that the machine has not the memory for.

    Args:
        allocated: bytes of these that are there already.
    """
    tokens, looped = shape.num_blocks * shape.block_size, a.with_loops(loops)

    def bytes_of(tokens: int) -> int:
        caches = cache_bytes(looped, tokens, shape.max_num_seqs, shape.window or 0, bytes_per_kv_element(looped, shape.kind))
        return caches + table_bytes(shape.max_num_seqs, tokens // shape.block_size, device)

    needed = bytes_of(tokens)
    missing = needed - allocated
    if missing <= 0:
        return
    free = free_memory_bytes(device)
    if missing > free:
        a_block = bytes_of(shape.block_size) - bytes_of(0)
        fit = (free + allocated - bytes_of(0)) // a_block * shape.block_size if a_block else 0
        raise UserError(
            f"caches of {tokens} tokens and {shape.max_num_seqs} sequences at {loops} loops need {needed >> 20} MiB, "
            f"{missing >> 20} more than are allocated, but {free >> 20} MiB are free; lower cache_tokens, max_num_seqs or "
            f"num_loops ({max(fit, 0)} tokens would fit)",
            "num_loops",
        )


def make_room(runner: Runner, loops: int) -> None:
    """Allocate the caches that requests of `loops` loops need, unless they are there.

    Raises:
        UserError: if the machine has not the memory for it.
    """
    cache = runner.cache
    check_memory(runner.architecture, cache.shape, loops, cache.nbytes + runner.tables.nbytes, cache.device)
    try:
        cache.grow(loops)
    except RuntimeError as error:  # of an allocation, in the words of torch
        problem = f"caches of {loops} loops cannot be allocated ({first_line(error)}); lower num_loops, or cache_tokens"
        raise UserError(problem, "num_loops") from error


def check_one_loop_count(a: Architecture) -> None:
    """Refuse a model whose stages loop unequally often: a request has one loop count for all of them."""
    loops = {a.stages[index].loops for index in a.looped_stages}
    if len(loops) > 1:
        raise UserError(
            f"the model's stages loop {' and '.join(map(str, sorted(loops)))} times, but a request loops all of them as often; "
            "set num_loops"
        )


def end_tokens(model: YocoUForCausalLM, encoder: DocumentEncoder | None) -> tuple[int, ...]:
    """The tokens that end an output: those of the model's config, or the tokenizer's."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    if configured is None:
        configured = model.config.eos_token_id
    if configured is None:
        return (encoder.eot_id,) if encoder is not None else ()
    return tuple(configured) if isinstance(configured, list) else (configured,)
