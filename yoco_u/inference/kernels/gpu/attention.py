"""Attention of one query per sequence over a paged cache: flash decoding (https://pytorch.org/blog/flash-decoding/).

The first kernel computes a work item for one kv head: all queries that share the head, over some keys of one sequence. The
queries are the rows of the matrix products, padded to the 16 that tensor cores take. The second kernel joins the items of each
sequence. Both keep sums in float32; products of bfloat16 queries with bfloat16 or int8 keys run on tensor cores.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E = tl.constexpr(1.4426950408889634)
_TILE_BYTES = 2**14  # of keys as they are multiplied
_JOINED = 32  # items at a time


@triton.jit(
    do_not_specialize=["sequences", "table_row"],
    do_not_specialize_on_alignment=["block_table", "sequence_of", "first_of", "last_of"],
)
def _attend_item(
    q, cache, scales, block_table, sequence_of, first_of, last_of, out, lse,
    sequences, q_sequence, q_head, cache_rows, table_row, block_size, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    TILE: tl.constexpr, DTYPE: tl.constexpr, QUANTIZED: tl.constexpr, ONE_BLOCK: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Grid: (items, kv_heads).

    Args:
        out, lse: of each sequence if there is a single item for each, otherwise of each item.
        scale: of the scores.
        DTYPE: of the matrix products.
        ONE_BLOCK: whether the keys of a tile lie in one block.
    """
    item, kv_head = tl.program_id(0), tl.program_id(1)
    sequence, first, last = tl.load(sequence_of + item), tl.load(first_of + item), tl.load(last_of + item)
    if sequence >= sequences:
        return
    if not SINGLE and first == last:
        return
    g, d, n = tl.arange(0, GROUP_PADDED), tl.arange(0, DIM_PADDED), tl.arange(0, TILE)
    heads = kv_head * GROUP + g
    is_query = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    queries = tl.load(q + sequence.to(tl.int64) * q_sequence + heads[:, None] * q_head + d[None, :], mask=is_query, other=0.0)
    queries = queries.to(DTYPE)  # (group, head_dim)

    k_begin = kv_head.to(tl.int64) * cache_rows
    v_begin = (KV_HEADS + kv_head).to(tl.int64) * cache_rows
    table = block_table + sequence.to(tl.int64) * table_row
    best = tl.full((GROUP_PADDED,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_PADDED,), tl.float32)
    acc = tl.zeros((GROUP_PADDED, DIM_PADDED), tl.float32)
    for start in range(first, last, TILE):
        keys = start + n
        valid = keys < last
        if ONE_BLOCK:
            rows = tl.load(table + start // block_size).to(tl.int64) * block_size + start % block_size + n
        else:
            rows = tl.load(table + keys // block_size, mask=valid, other=0).to(tl.int64) * block_size + keys % block_size
        exists = valid[:, None] & (d < HEAD_DIM)[None, :]
        k = tl.load(cache + (k_begin + rows)[:, None] * HEAD_DIM + d[None, :], mask=exists, other=0.0).to(DTYPE)
        v = tl.load(cache + (v_begin + rows)[:, None] * HEAD_DIM + d[None, :], mask=exists, other=0.0).to(DTYPE)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * (scale * _LOG2E)  # (group, tile), to base 2
        if QUANTIZED:
            scores *= tl.load(scales + k_begin + rows, mask=valid, other=0.0)[None, :]
        scores = tl.where(valid[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_best[:, None])
        fade = tl.exp2(best - new_best)
        total = total * fade + tl.sum(weights, axis=1)
        if QUANTIZED:
            weights *= tl.load(scales + v_begin + rows, mask=valid, other=0.0)[None, :]
        acc = tl.dot(weights.to(DTYPE), v, acc * fade[:, None], input_precision="ieee")
        best = new_best

    index = (sequence if SINGLE else item).to(tl.int64) * (KV_HEADS * GROUP) + heads
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + index[:, None] * HEAD_DIM + d[None, :], result.to(out.dtype.element_ty), mask=is_query)
    tl.store(lse + index, (best + tl.log2(total)) / _LOG2E, mask=g < GROUP)


@triton.jit(do_not_specialize_on_alignment=["offsets"])
def _join_items(
    part_out, part_lse, offsets, out, lse,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """Grid: (sequences, heads)."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    d = tl.arange(0, DIM_PADDED)
    best = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((DIM_PADDED,), tl.float32)
    for start in range(begin, end, JOINED):
        items = start + tl.arange(0, JOINED)
        index = items.to(tl.int64) * HEADS + head
        part = tl.load(part_lse + index, mask=items < end, other=float("-inf"))
        exists = (items < end)[:, None] & (d < HEAD_DIM)[None, :]
        values = tl.load(part_out + index[:, None] * HEAD_DIM + d[None, :], mask=exists, other=0.0)
        new_best = tl.maximum(best, tl.max(part, axis=0))
        weights = tl.exp(part - new_best)
        fade = tl.exp(best - new_best)
        total = total * fade + tl.sum(weights, axis=0)
        acc = acc * fade + tl.sum(weights[:, None] * values, axis=0)
        best = new_best
    index = sequence.to(tl.int64) * HEADS + head
    result = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out + index * HEAD_DIM + d, result.to(out.dtype.element_ty), mask=d < HEAD_DIM)
    tl.store(lse + index, best + tl.log(total))


def attend_items(
    q: Tensor, cache: Tensor, scales: Tensor | None, block_table: Tensor, block_size: int,
    sequence: Tensor, first: Tensor, last: Tensor, out: Tensor, lse: Tensor, single: bool,
) -> None:  # fmt: skip
    """Attention of every item of a plan, see `SplitPlan`.

    Args:
        out, lse: written: output and log-sum-exp of each item, or of each sequence if `single`.
    """
    sequences, heads, head_dim = q.shape
    if sequences == 0:
        return
    kv_heads, cache_rows = cache.shape[1:3]
    q = q if q.stride(2) == 1 else q.contiguous()
    on_tensor_cores = q.dtype == torch.bfloat16 and cache.dtype in (torch.bfloat16, torch.int8)
    padded = max(16, triton.next_power_of_2(head_dim))
    # A tile's rows are loaded after its block number, and each of the two loads takes two of the five stages. So two tiles are
    # on their way while one is computed; of such programs three in bfloat16 and two in int8 fit into a multiprocessor of an
    # H100. Without tensor cores the products need the registers.
    warps, stages = (4, 5) if on_tensor_cores else (8, 1)
    tile = min(128, max(16, _TILE_BYTES // (padded * (2 if on_tensor_cores else 4))))
    _attend_item[len(sequence), kv_heads](
        q, cache, scales, block_table, sequence, first, last, out, lse,
        sequences, q.stride(0), q.stride(1), cache_rows, block_table.stride(0), block_size, head_dim**-0.5,
        KV_HEADS=kv_heads, GROUP=heads // kv_heads, GROUP_PADDED=max(16, triton.next_power_of_2(heads // kv_heads)),
        HEAD_DIM=head_dim, DIM_PADDED=padded, TILE=tile, DTYPE=tl.bfloat16 if on_tensor_cores else tl.float32,
        QUANTIZED=cache.dtype == torch.int8, ONE_BLOCK=block_size % tile == 0 or block_table.shape[1] == 1, SINGLE=single,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def join_items(part_out: Tensor, part_lse: Tensor, offsets: Tensor, out: Tensor, lse: Tensor) -> None:
    """Join the items of each sequence, see `SplitPlan`, into `out` and `lse`."""
    sequences, heads, head_dim = out.shape
    if sequences == 0:
        return
    _join_items[sequences, heads](
        part_out, part_lse, offsets, out, lse,
        HEADS=heads, HEAD_DIM=head_dim, DIM_PADDED=triton.next_power_of_2(head_dim), JOINED=_JOINED, num_warps=4,
    )  # fmt: skip
