"""Hooks that watch a forward pass from outside: what blocks read and write, what loops leave, what attention works on.

Every hook is removed when its context manager ends, and none changes a result.
"""

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
from yoco_u.model.blocks import LoopedStack, blocks_of

_LOGITS_ALIVE = 1 << 23


@dataclass(frozen=True)
class UnrolledLayer:
    """One application of a block in a forward pass: a slot of `Architecture.slots()`, numbered as people count.

    Attributes:
        number: position in the unrolled depth, from 1.
        stage: index of the stage, from 0.
        loop: which of the stage's loops, from 1.
        layer: which of the stage's blocks, from 1.
        attention: full, sliding, retention or cross.
    """

    number: int
    stage: int
    loop: int
    layer: int
    attention: str


def unroll(architecture: Architecture) -> list[UnrolledLayer]:
    """All applications of blocks in the order of a forward pass, see `Architecture.slots`."""
    return [
        UnrolledLayer(number, slot.stage, slot.loop + 1, slot.layer + 1, slot.attention)
        for number, slot in enumerate(architecture.slots(), start=1)
    ]


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
    """Run the model; return the hidden states of all positions after the final norm, (rows * tokens, hidden)."""
    device = model.device
    ids, documents = batch["input_ids"].to(device), batch["document_ids"].to(device)
    output = model.model(ids, document_ids=documents, num_loops=num_loops, use_cache=False)
    return output.last_hidden_state.flatten(0, 1)


@torch.no_grad()
def log_probabilities(model: YocoUForCausalLM, states: Tensor) -> Tensor:
    """The LM head's log-probabilities, (tokens, hidden) -> (tokens, vocab), in float32 at least."""
    logits = model.lm_head(states)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def pieces(model: YocoUForCausalLM, tokens: int) -> Iterator[slice]:
    """Cut `tokens` tokens into slices, each so short that the log-probabilities of its tokens fit into memory together."""
    step = max(1, _LOGITS_ALIVE // model.config.vocab_size)
    return (slice(start, start + step) for start in range(0, tokens, step))


@contextmanager
def watch_layers(model: YocoUForCausalLM, see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """During one forward pass, call `see` for every unrolled layer with its number, what it read and what it wrote.

    Both tensors are (rows, tokens, hidden), or (rows, tokens, streams, hidden). A loop gate is not applied to what was written.
    """
    numbers = count(1)

    def after(_: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        see(next(numbers), args[0], output[0])

    with _removed([block.register_forward_hook(after) for block in blocks_of(model)]):
        yield


@contextmanager
def watch_loops(model: YocoUForCausalLM, stage: int) -> Iterator[list[Tensor]]:
    """During one forward pass, collect a stage's states: the input of its first loop, and the output of each of its T loops.

    Yields:
        A list that holds T + 1 states after the pass, each (rows, tokens, hidden) or (rows, tokens, streams, hidden). Loop
        gates are applied.
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
    """The inputs of one layer's softmax attention.

    Attributes:
        q: queries after RoPE, (rows, tokens, heads, head_dim).
        k: keys after RoPE, (rows, prefix + tokens, kv_heads, head_dim), learned prefix keys first.
        prefix: how many of the keys are a learned prefix, which every token sees.
        window: keys that a token sees, itself included; None for itself and all tokens before it.
        segments: (rows, tokens); a token sees its own segment alone. None if each row is one segment.
    """

    q: Tensor
    k: Tensor
    prefix: int
    window: int | None
    segments: Tensor | None


@dataclass
class ObservedBackend(PaddedBackend):
    """A `PaddedBackend` without a cache that shows the inputs of softmax attention before it attends.

    Attributes:
        see: called once for each attention, with its inputs.
    """

    see: Callable[[Attended], None]

    def sliding_attention(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._show(q, k, window=self.window)
        return super().sliding_attention(slot, q, k, v)

    def full_attention(self, slot: int, q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor] | None) -> Tensor:
        self._show(q, k, prefix=prefix[0] if prefix is not None else None)
        return super().full_attention(slot, q, k, v, prefix)

    def cross_attention(self, slot: int, q: Tensor, global_kv: tuple[Tensor, Tensor]) -> Tensor:
        self._show(q, global_kv[0])
        return super().cross_attention(slot, q, global_kv)

    def _show(self, q: Tensor, k: Tensor, window: int | None = None, prefix: Tensor | None = None) -> None:
        if prefix is not None:
            k = torch.cat([prefix.to(k.dtype).expand(k.shape[0], -1, -1, -1), k], dim=1)
        segments = self.segments[0] if self.segments is not None else None
        self.see(Attended(q, k, 0 if prefix is None else len(prefix), window, segments))


@contextmanager
def watch_attention(model: YocoUForCausalLM, see: Callable[[int, Attended], None]) -> Iterator[None]:
    """During one forward pass without a cache, call `see` for every unrolled layer with its number and its attention's inputs.

    Layers of gated retention, which has no softmax, are left out.
    """
    numbers = count(1)

    def before(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, backend, *rest = args
        return (x, ObservedBackend(**vars(backend), see=partial(see, next(numbers))), *rest)

    with _removed([block.register_forward_pre_hook(before) for block in blocks_of(model)]):
        yield


@contextmanager
def _removed(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
