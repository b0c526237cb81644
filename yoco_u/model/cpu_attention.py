"""Causal and sliding attention on a CPU, one block of queries at a time, with scores that fit into the processor's cache.

The keys that a block of queries can see are one slice of all keys, so its scores are (block, slice). They are freed before the
next block's are computed, and the backward pass computes them again. With a window, time and memory are linear in the tokens;
without one, memory is. In bfloat16 this is several times as fast as torch's fused attention on a CPU, which is why it exists;
other devices use `yoco_u.model.attention`.

The two functions are custom operators, so that torch.compile does not look inside, where it would unroll the loop over blocks.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 64
"""Queries per block: smaller blocks compute fewer masked scores at the edges of a window, larger ones multiply faster."""

SCORES = 2**21
"""The most scores in memory at a time, over rows and heads: as many as a core's share of the processor's cache can hold."""


@torch.library.custom_op("yoco_u::block_attention", mutates_args=())
def block_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, query_segments: Tensor | None, key_segments: Tensor | None
) -> Tensor:
    """Attention in which token i sees the keys i - window + 1 .. i of its own segment.

    Args:
        q: (batch, queries, heads, head_dim); the queries belong to the last of the tokens that have keys.
        k, v: (batch, keys, kv_heads, head_dim), keys >= queries.
        window: keys that a token sees, itself included; the number of keys for attention without a window.
        query_segments, key_segments: (batch, queries) and (batch, keys), see `yoco_u.model.attention`.

    Returns:
        (batch, queries, heads, head_dim)
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    groups = q.shape[2] // k.shape[2]
    for rows, block, keys in _pieces(q, k, window):
        q_block = _grouped(q[rows, block], groups)
        k_part, v_part = _by_head(k[rows, keys]), _by_head(v[rows, keys])
        p = _probabilities(q_block, k_part, rows, block, keys, k.shape[1] - q.shape[1], window, query_segments, key_segments)
        out[rows, block] = _ungrouped(p @ v_part, k.shape[2], groups)
    return out


@torch.library.custom_op("yoco_u::block_attention_backward", mutates_args=())
def block_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int, query_segments: Tensor | None, key_segments: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. Those of k and v are sums over blocks of queries, which are kept in float32 at least."""
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k, grad_v = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v))
    groups = q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5
    for rows, block, keys in _pieces(q, k, window):
        q_block, grad_block = _grouped(q[rows, block], groups), _grouped(grad[rows, block], groups)
        k_part, v_part = _by_head(k[rows, keys]), _by_head(v[rows, keys])
        p = _probabilities(q_block, k_part, rows, block, keys, k.shape[1] - q.shape[1], window, query_segments, key_segments)
        grad_v[rows, keys] += _from_head(p.transpose(1, 2) @ grad_block, k.shape[2])
        grad_p = grad_block @ v_part.transpose(1, 2)
        grad_s = torch._softmax_backward_data(grad_p, p, -1, p.dtype).mul_(scale)
        grad_q[rows, block] = _ungrouped(grad_s @ k_part, k.shape[2], groups)
        grad_k[rows, keys] += _from_head(grad_s.transpose(1, 2) @ q_block, k.shape[2])
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _pieces(q: Tensor, k: Tensor, window: int) -> list[tuple[slice, slice, slice]]:
    """Cut the work into pieces: some rows of the batch, a block of queries, and the slice of keys that these can see."""
    batch, queries, heads, _ = q.shape
    past = k.shape[1] - queries
    pieces = []
    for start in range(0, queries, BLOCK):
        end = min(start + BLOCK, queries)
        keys = slice(max(0, past + start - window + 1), past + end)
        rows = max(1, SCORES // (heads * (end - start) * (keys.stop - keys.start)))
        pieces += [(slice(row, row + rows), slice(start, end), keys) for row in range(0, batch, rows)]
    return pieces


def _probabilities(
    q_block: Tensor,
    k_part: Tensor,
    rows: slice,
    block: slice,
    keys: slice,
    past: int,
    window: int,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
) -> Tensor:
    """Softmax of the masked scores, (rows * kv_heads, groups * block, keys)."""
    scores = (q_block * q_block.shape[-1] ** -0.5) @ k_part.transpose(1, 2)
    size, seen = block.stop - block.start, keys.stop - keys.start
    by_query = scores.view(-1, size, seen)
    by_query[:, :, seen - size :].masked_fill_(_reached(size, size, -1).T, float("-inf"))
    first_seen = past + block.start - window + 1 - keys.start  # the first query's first key; negative at the row's beginning
    left = first_seen + size - 1
    if left > 0:
        by_query[:, :, :left].masked_fill_(_reached(size, left, first_seen - 1), float("-inf"))
    if query_segments is not None and key_segments is not None:
        foreign = query_segments[rows, block, None] != key_segments[rows, None, keys]  # (rows, block, keys)
        scores.view(foreign.shape[0], -1, size, seen).masked_fill_(foreign[:, None], float("-inf"))
    return torch.softmax(scores, dim=-1)


@lru_cache(maxsize=64)
def _reached(queries: int, keys: int, ahead: int) -> Tensor:
    """A mask (queries, keys) that is true where key <= query + ahead."""
    return torch.ones(queries, keys, dtype=torch.bool).tril_(ahead)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(rows, block, heads, head_dim) -> (rows * kv_heads, groups * block, head_dim), for one product per row and KV head."""
    rows, block, heads, head_dim = x.shape
    x = x.view(rows, block, heads // groups, groups, head_dim).permute(0, 2, 3, 1, 4)
    return x.reshape(rows * (heads // groups), groups * block, head_dim)


def _ungrouped(x: Tensor, kv_heads: int, groups: int) -> Tensor:
    """The inverse of `_grouped`."""
    rows, block, head_dim = x.shape[0] // kv_heads, x.shape[1] // groups, x.shape[2]
    x = x.view(rows, kv_heads, groups, block, head_dim).permute(0, 3, 1, 2, 4)
    return x.reshape(rows, block, kv_heads * groups, head_dim)


def _by_head(x: Tensor) -> Tensor:
    """(rows, keys, kv_heads, head_dim) -> (rows * kv_heads, keys, head_dim)"""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _from_head(x: Tensor, kv_heads: int) -> Tensor:
    """The inverse of `_by_head`."""
    return x.view(-1, kv_heads, *x.shape[1:]).transpose(1, 2)


@block_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, window: int, query_segments: Tensor | None, key_segments: Tensor | None) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@block_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int, query_segments: Tensor | None, key_segments: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return grad_q, grad_k, grad_v


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.window, query_segments, key_segments = inputs
    ctx.save_for_backward(q, k, v, query_segments, key_segments)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, query_segments, key_segments = ctx.saved_tensors
    return (*block_attention_backward(grad, q, k, v, ctx.window, query_segments, key_segments), None, None, None)


block_attention.register_autograd(_backward, setup_context=_save)
