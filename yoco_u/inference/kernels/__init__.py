"""What an engine step does besides matrix products: each kernel by its name, run by the fastest implementation there is.

`cpu/` holds the C++ for CPUs, `gpu/` the Triton kernels for GPUs of NVIDIA, which the meta device stands in for in dry runs.
`direct.py` holds the same in plain torch, for every device and for the tests; it may wait for a device. `YOCO_U_KERNELS=off`
does without the C++.
"""

import torch
from torch import Tensor

from yoco_u.inference.kernels import direct, gpu
from yoco_u.inference.kernels.cpu import compiled
from yoco_u.inference.kernels.gpu.splits import SplitPlan, merge_attention
from yoco_u.model import rope


def store_rows(k: Tensor, v: Tensor, rows: Tensor, cache: Tensor, scales: Tensor | None) -> None:
    """Write keys and values into a cache.

    Args:
        k, v: (tokens, kv_heads, head_dim).
        rows: the slot mapping: the row of the cache that each token goes to, (tokens,), int64; a token with -1 is not written.
        cache, scales: as in `decode_attention`.
    """
    if _on_gpu(k):
        gpu.store_rows(k, v, rows, cache, scales)
    elif k.device.type == "cpu" and compiled():
        torch.ops.yoco_u.store_rows(k, v, rows, cache, scales)
    else:
        direct.store_rows(k, v, rows, cache, scales)


def decode_attention(
    q: Tensor,
    cache: Tensor,
    scales: Tensor | None,
    block_table: Tensor,
    block_size: int,
    lengths: Tensor,
    plan: SplitPlan | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of one query per sequence over the rows of that sequence's blocks.

    Args:
        q: (sequences, heads, head_dim).
        cache: keys and values, (2, kv_heads, blocks * block_size, head_dim), float32, bfloat16 or int8.
        scales: of an int8 cache, (2, kv_heads, blocks * block_size), float32; None for other caches.
        block_table: block numbers, (sequences, blocks), int32.
        lengths: rows that each query sees, (sequences,), int32 or int64.
        plan: how a GPU divides these rows among its multiprocessors; None for one part per sequence. CPUs ignore it.
        prefix: keys and values that every query sees besides, each (prefix, kv_heads, head_dim).

    Returns:
        (sequences, heads, head_dim), in the dtype of q; computed in float32, with bfloat16 products on GPUs if queries are
        bfloat16. Zeros for a query that sees nothing.
    """
    if _on_gpu(q):
        out, lse = gpu.decode_attention(q, cache, scales, block_table, block_size, plan or SplitPlan.undivided(lengths))
        return out if prefix is None else merge_attention(out, lse, *direct.prefix_attention(q, *prefix))
    if q.device.type == "cpu" and prefix is None and compiled():
        return torch.ops.yoco_u.decode_attention(q, cache, scales, block_table, block_size, lengths.long())
    return direct.decode_attention(q, cache, scales, block_table, block_size, lengths, prefix)


def chunk_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Causal attention of a chunk of one sequence, whose queries belong to the last of the keys' tokens.

    Args:
        q: (1, queries, heads, head_dim).
        k, v: (1, keys, kv_heads, head_dim), keys >= queries.
        window: keys that a token sees, itself included; None for all.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and compiled():
        return torch.ops.yoco_u.chunk_attention(q, k, v, k.shape[1] if window is None else window)
    return direct.chunk_attention(q, k, v, window)


def retention_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, states: Tensor, seats: Tensor) -> Tensor:
    """One token of each sequence through gated retention, as `yoco_u.model.retention.recurrent_retention` defines it.

    Args:
        q, k, v: (sequences, heads, head_dim), float32.
        log_decay: (sequences, heads), float32.
        states: of all seats, (seats, heads, head_dim, head_dim), float32; updated in place.
        seats: of each sequence, (sequences,), int32 or int64. The sequence of seat -1 changes nothing, and its output is zero.

    Returns:
        (sequences, heads, head_dim).
    """
    if _on_gpu(q):
        return gpu.retention_step(q, k, v, log_decay, states, seats)
    return direct.retention_step(q, k, v, log_decay, states, seats)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE, as `yoco_u.model.rope.rotate` defines it."""
    if _on_gpu(x):
        return gpu.rotate(x, *rotary)
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and compiled():
        return torch.ops.yoco_u.rotate(x, *rotary)
    return rope.rotate(x, rotary)


def _on_gpu(x: Tensor) -> bool:
    return x.device.type in ("cuda", "meta")
