"""Looking into a forward pass from outside: hooks on the blocks, and the unrolled order in which tokens meet them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor

from yoco_u.architecture import Architecture
from yoco_u.data import Batch
from yoco_u.errors import UserError
from yoco_u.model import YocoUForCausalLM
from yoco_u.model.backend import PaddedBackend
from yoco_u.model.blocks import Block, LoopedStack

_LOGITS_ALIVE = 1 << 23


@dataclass(frozen=True)
class UnrolledLayer:
    """A block as tokens meet it on their way.

    Attributes:
        number: from 1, over the unrolled depth.
        stage: index of its stage, from 0.
        loop, layer: from 1; the loop of the stage, and the block within it.
        attention: full, sliding, retention or cross.
    """

    number: int
    stage: int
    loop: int
    layer: int
    attention: str


def unroll(architecture: Architecture) -> list[UnrolledLayer]:
    """The blocks in the order of a forward pass, see `Architecture.slots`."""
    return [
        UnrolledLayer(number, slot.stage, slot.loop + 1, slot.layer + 1, slot.attention)
        for number, slot in enumerate(architecture.slots(), start=1)
    ]


def at_loops(model: YocoUForCausalLM, num_loops: int | None) -> Architecture:
    """The model's architecture at a loop count; at its own by default."""
    architecture = model.model.architecture
    return architecture if num_loops is None else architecture.with_loops(num_loops)


def one_looped_stage(architecture: Architecture) -> int:
    """The index of the stage that loops.

    Raises:
        UserError: if none loops, or more than one.
    """
    found = architecture.looped_stages
    if len(found) == 1:
        return found[0]
    stages = f"stages {', '.join(map(str, found))} loop" if found else "no stage loops"
    raise UserError(f"{stages}; expected one looped stage to follow from loop to loop")


@torch.no_grad()
def last_states(model: YocoUForCausalLM, batch: Batch, num_loops: int | None = None) -> Tensor:
    """Hidden states after the final norm, of all positions, (rows * tokens, hidden), by the model's own forward pass."""
    device = model.device
    ids, documents = batch["input_ids"].to(device), batch["document_ids"].to(device)
    output = model.model(ids, document_ids=documents, num_loops=num_loops, use_cache=False)
    return output.last_hidden_state.flatten(0, 1)


@torch.no_grad()
def read_out(model: YocoUForCausalLM, states: Tensor) -> Tensor:
    """What the LM head reads, (rows * tokens, hidden), if the network ended at these states.

    Args:
        states: (rows, tokens, hidden), or (rows, tokens, streams, hidden).
    """
    mixer = model.model.stream_mixer
    return model.model.norm(states if mixer is None else mixer(states)).flatten(0, 1)


@torch.no_grad()
def log_probabilities(model: YocoUForCausalLM, states: Tensor) -> Tensor:
    """(tokens, hidden) -> (tokens, vocab), in float32 at least."""
    logits = model.lm_head(states)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def pieces(model: YocoUForCausalLM, tokens: int) -> Iterator[slice]:
    """Slices of so many tokens whose log-probabilities fit into memory together."""
    step = max(1, _LOGITS_ALIVE // model.config.vocab_size)
    return (slice(start, start + step) for start in range(0, tokens, step))


@contextmanager
def watch_layers(model: YocoUForCausalLM, see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """During one forward pass, show every unrolled layer's number, what it read, and what it wrote.

    Both are (rows, tokens, hidden), or (rows, tokens, streams, hidden), before any loop gate.
    """
    numbers = count(1)

    def after(_: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        see(next(numbers), args[0], output[0])

    with _removed([block.register_forward_hook(after) for block in _blocks(model)]):
        yield


@contextmanager
def watch_loops(model: YocoUForCausalLM, stage: int) -> Iterator[list[Tensor]]:
    """During one forward pass, collect a stage's states: what its first loop reads, and what each of its T loops leaves.

    T + 1 of them, each (rows, tokens, hidden) or (rows, tokens, streams, hidden), behind the loop gates.
    """
    states: list[Tensor] = []
    stack = cast(LoopedStack, model.model.stages[stage])

    def before_loop(_: Any, args: tuple[Any, ...]) -> None:
        states.append(args[0])

    def after_stage(_: Any, __: Any, output: tuple[Tensor, list[Tensor]]) -> None:
        states.append(output[0])

    with _removed([stack.layers[0].register_forward_pre_hook(before_loop), stack.register_forward_hook(after_stage)]):
        yield states


@dataclass(frozen=True)
class Attended:
    """What one layer's softmax attention works on.

    Attributes:
        q: (rows, tokens, heads, head_dim), rotated.
        k: (rows, prefix + tokens, kv_heads, head_dim), rotated, learned prefix keys first.
        prefix: how many keys are a learned prefix, which every token sees.
        window: keys that a token sees, itself included; None for all before it.
        segments: (rows, tokens); a token sees its own segment alone. None where there is one.
    """

    q: Tensor
    k: Tensor
    prefix: int
    window: int | None
    segments: Tensor | None


class _Watched:
    """The sequences of a batch for one block, which shows the queries and keys that come by; all else is the batch's own."""

    def __init__(self, batch: PaddedBackend, see: Callable[[Attended], None]) -> None:
        self._batch, self._see = batch, see

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def sliding_attention(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._show(q, k, window=self._batch.window)
        return self._batch.sliding_attention(slot, q, k, v)

    def full_attention(self, slot: int, q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor] | None) -> Tensor:
        self._show(q, k, prefix=prefix[0] if prefix is not None else None)
        return self._batch.full_attention(slot, q, k, v, prefix)

    def cross_attention(self, slot: int, q: Tensor, global_kv: tuple[Tensor, Tensor]) -> Tensor:
        self._show(q, global_kv[0])
        return self._batch.cross_attention(slot, q, global_kv)

    def _show(self, q: Tensor, k: Tensor, window: int | None = None, prefix: Tensor | None = None) -> None:
        if prefix is not None:
            k = torch.cat([prefix.to(k.dtype).expand(k.shape[0], -1, -1, -1), k], dim=1)
        segments = self._batch.segments[0] if self._batch.segments is not None else None
        self._see(Attended(q, k, 0 if prefix is None else len(prefix), window, segments))


@contextmanager
def watch_attention(model: YocoUForCausalLM, see: Callable[[int, Attended], None]) -> Iterator[None]:
    """During one forward pass without a cache, show every unrolled layer's number with its queries and keys.

    Layers of gated retention, which has no softmax, are passed over.
    """
    numbers = count(1)

    def before(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, backend, *rest = args
        return (x, _Watched(backend, partial(see, next(numbers))), *rest)

    with _removed([block.register_forward_pre_hook(before) for block in _blocks(model)]):
        yield


def _blocks(model: YocoUForCausalLM) -> list[Block]:
    return [module for module in model.modules() if isinstance(module, Block)]


@contextmanager
def _removed(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
